//! Who is compared: how each is configured, and started on a core of its own.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use clap::ValueEnum;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::bench::processes::{Process, free_port, is_ready};
use crate::bench::proxy::cpu::{LOAD_CORE, PROXY_CORE, on_core};
use crate::bench::proxy::load::{self, Protocol};
use crate::failure::Failure;

/// Who is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Contender {
    Haproxy,
    HaproxyMap,
    Nginx,
    NginxLua,
    Bare,
    Full,
    #[value(skip)]
    Other,
    HaproxyGrpc,
    NginxGrpc,
    Grpc,
}

impl Contender {
    pub(crate) const ALL: [Self; 10] = [
        Self::Haproxy,
        Self::HaproxyMap,
        Self::Nginx,
        Self::NginxLua,
        Self::Bare,
        Self::Full,
        Self::Other,
        Self::HaproxyGrpc,
        Self::NginxGrpc,
        Self::Grpc,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::HaproxyMap => "haproxy-map",
            Self::Nginx => "nginx",
            Self::NginxLua => "nginx-lua",
            Self::Bare => "bare",
            Self::Full => "full",
            Self::Other => "other",
            Self::HaproxyGrpc => "haproxy-grpc",
            Self::NginxGrpc => "nginx-grpc",
            Self::Grpc => "grpc",
        }
    }

    const fn kind(self) -> Kind {
        match self {
            Self::Haproxy | Self::HaproxyMap | Self::HaproxyGrpc => Kind::Haproxy,
            Self::Nginx | Self::NginxLua | Self::NginxGrpc => Kind::Nginx,
            Self::Bare | Self::Full | Self::Other | Self::Grpc => Kind::Ours,
        }
    }

    const fn configuration(self) -> &'static str {
        match self {
            Self::Haproxy => include_str!("../../../../bench/proxy/haproxy.cfg"),
            Self::HaproxyMap => include_str!("../../../../bench/proxy/haproxy-map.cfg"),
            Self::HaproxyGrpc => include_str!("../../../../bench/proxy/haproxy-grpc.cfg"),
            Self::Nginx => include_str!("../../../../bench/proxy/nginx.conf"),
            Self::NginxLua => include_str!("../../../../bench/proxy/nginx-lua.conf"),
            Self::NginxGrpc => include_str!("../../../../bench/proxy/nginx-grpc.conf"),
            Self::Full => include_str!("../../../../bench/proxy/full.yaml"),
            Self::Bare | Self::Other | Self::Grpc => {
                include_str!("../../../../bench/proxy/bare.yaml")
            }
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Haproxy,
    Nginx,
    Ours,
}

/// Says what is missing for these, and how to get it.
pub(crate) fn check(contenders: &[Contender]) -> Result<(), Failure> {
    let has = |kind| contenders.iter().any(|one| one.kind() == kind);
    let lua = contenders.contains(&Contender::NginxLua);
    // The path where a Debian package has its file, since /usr/sbin is not on every user's PATH.
    let needs = [
        (has(Kind::Nginx), NGINX, "nginx-light"),
        (lua, LUA_MODULE, "libnginx-mod-http-lua"),
        (lua, "/usr/share/lua/5.1/resty/core.lua", "lua-resty-core"),
        (has(Kind::Haproxy), HAPROXY, "haproxy"),
        (true, "/usr/bin/wrk", "wrk"),
        (true, "/usr/bin/h2load", "nghttp2-client"),
        (true, "/usr/bin/taskset", "util-linux"),
    ];
    let missing = needs.iter().filter(|(needed, file, _)| *needed && !Path::new(file).exists());
    let packages: Vec<&str> = missing.map(|(_, _, package)| *package).collect();
    if !packages.is_empty() {
        return Err(Failure::new("the bench lacks what it compares with")
            .because(format!("not installed: {}", packages.join(", ")))
            .try_this(format!("apt-get install --no-install-recommends {}", packages.join(" "))));
    }
    if !Path::new("/proc/self/schedstat").exists() {
        return Err(Failure::new("the bench cannot read what a process has used")
            .because("there is no /proc/self/schedstat")
            .try_this("run it on Linux, with a kernel that has schedstats"));
    }
    match std::thread::available_parallelism() {
        Ok(cores) if cores.get() > usize::from(LOAD_CORE) => Ok(()),
        _ => Err(Failure::new("the bench needs two cores")
            .because("proxies and load would share one, and wait for each other")),
    }
}

/// What all of them are started with.
pub(crate) struct Surroundings {
    pub(crate) dir: PathBuf,
    pub(crate) ports: [SocketAddr; 4],
    pub(crate) assigner: SocketAddr,
    pub(crate) program: PathBuf,
    pub(crate) other: Option<PathBuf>,
}

/// One of them, running.
pub(crate) struct Running {
    pub(crate) contender: Contender,
    pub(crate) address: SocketAddr,
    pub(crate) process: Process,
}

impl Running {
    pub(crate) const fn protocol(&self) -> Protocol {
        match self.contender {
            Contender::HaproxyGrpc | Contender::NginxGrpc | Contender::Grpc => Protocol::Grpc,
            _ => Protocol::Http,
        }
    }
}

impl Surroundings {
    /// Writes what several of them read.
    pub(crate) fn write(&self) -> anyhow::Result<()> {
        load::write(&self.dir)?;
        let lines = (0..1_000).map(|n| format!("{n} m{}\n", n * 7_919 % 4));
        fs::write(self.dir.join("slices.map"), lines.collect::<String>())?;
        Ok(())
    }

    /// Starts one, and waits until it takes requests.
    pub(crate) async fn start(&self, contender: Contender) -> anyhow::Result<Running> {
        let (address, admin) = (free_port()?, free_port()?);
        let dir = self.dir.display().to_string();
        let mut text = contender
            .configuration()
            .replace("@listen@", &address.to_string())
            .replace("@admin@", &admin.to_string())
            .replace("@assigner@", &self.assigner.to_string())
            .replace("@dir@", &dir);
        for (n, port) in self.ports.iter().enumerate() {
            text = text.replace(&format!("@port{n}@"), &port.port().to_string());
        }
        let file = self.dir.join(format!("{contender}.conf"));
        fs::write(&file, text)?;
        let file = file.display().to_string();
        let command = match contender.kind() {
            Kind::Haproxy => on_core(PROXY_CORE, Path::new(HAPROXY), ["-db", "-f", &file]),
            Kind::Nginx => {
                let words = ["-e", "stderr", "-p", &dir, "-c", &file];
                on_core(PROXY_CORE, Path::new(NGINX), words)
            }
            Kind::Ours => {
                let other = self.other.as_ref().filter(|_| contender == Contender::Other);
                let program = other.unwrap_or(&self.program);
                on_core(PROXY_CORE, program, ["proxy", "--config", &file])
            }
        };
        let mut process = Process::spawn(command, &contender.to_string(), &self.dir)?;
        let end = Instant::now() + START_WITHIN;
        loop {
            let there = match contender.kind() {
                Kind::Ours => is_ready(admin).await,
                Kind::Haproxy | Kind::Nginx => TcpStream::connect(address).await.is_ok(),
            };
            if there {
                return Ok(Running { contender, address, process });
            }
            if process.ended().is_some() || Instant::now() >= end {
                bail!("{contender} does not serve at {address}:\n{}", process.log_tail());
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
}

const NGINX: &str = "/usr/sbin/nginx";
const HAPROXY: &str = "/usr/sbin/haproxy";
const LUA_MODULE: &str = "/usr/lib/nginx/modules/ngx_http_lua_module.so";
/// A start takes a moment; past this something is wrong.
const START_WITHIN: Duration = Duration::from_secs(30);

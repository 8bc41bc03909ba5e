//! The servers that stand behind this proxy elsewhere: nginx, HAProxy and Apache, each between the proxy and the recorder.
//! Each reads what the proxy has forwarded in its own way, and writes down what it took for a request.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tokio::net::TcpStream;

use crate::tests::harness::within;

/// A server between the proxy and the recorder. Killed when dropped.
pub(super) struct Peer {
    pub(super) name: &'static str,
    pub(super) address: SocketAddr,
    folder: PathBuf,
    child: Child,
}

/// Where a program is, by the variable that names it. Without it a test says so and passes, unless
/// `MANDOLINE_REQUIRE_ALL=1` forbids that.
fn program(variable: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    let required = std::env::var("MANDOLINE_REQUIRE_ALL").as_deref() == Ok("1");
    assert!(!required, "{variable} does not name a program");
    println!("skipped: {variable} does not name a program");
    None
}

impl Peer {
    pub(super) async fn nginx(recorder: SocketAddr) -> Option<Self> {
        let program = program("MANDOLINE_NGINX")?;
        Some(
            Self::start("nginx", |address, folder| {
                let folder_of = folder.display();
                let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                    .map(|what| format!("{what}_temp_path {folder_of}/{what};\n"))
                    .concat();
                let config = format!(
                    "daemon off; master_process off; worker_processes 1;\n\
                     pid {folder_of}/pid; error_log {folder_of}/errors;\n\
                     events {{ worker_connections 512; }}\n\
                     http {{\n\
                     {temporary}\
                     log_format one escape=none '$request_method $request_uri $status';\n\
                     access_log {folder_of}/log one;\n\
                     client_max_body_size 0; client_header_buffer_size 64k; large_client_header_buffers 4 64k;\n\
                     upstream recorder {{ server {recorder}; keepalive 8; }}\n\
                     server {{ listen {address}; location / {{ proxy_pass http://recorder; proxy_http_version 1.1;\n\
                     proxy_set_header Host $http_host; proxy_set_header Connection ''; }} }}\n\
                     }}\n"
                );
                let mut command = Command::new(program);
                command.arg("-p").arg(folder).arg("-e").arg(folder.join("errors")).arg("-c");
                command.arg(write(folder, &config));
                command
            })
            .await,
        )
    }

    pub(super) async fn haproxy(recorder: SocketAddr) -> Option<Self> {
        let program = program("MANDOLINE_HAPROXY")?;
        Some(
            Self::start("haproxy", |address, folder| {
                let config = format!(
                    "global\n  log stdout format raw local0\n  tune.bufsize 65536\n  tune.http.maxhdr 200\n\
                     defaults\n  mode http\n  log global\n  option dontlognull\n  timeout connect 5s\n  timeout client 10s\n  timeout server 10s\n\
                     frontend proxy\n  bind {address}\n  log-format '%HM %HU %ST'\n  default_backend recorder\n\
                     backend recorder\n  server recorder {recorder}\n"
                );
                let mut command = Command::new(program);
                command.args(["-db", "-f"]).arg(write(folder, &config));
                command.stdout(File::create(folder.join("log")).unwrap());
                command
            })
            .await,
        )
    }

    pub(super) async fn apache(recorder: SocketAddr) -> Option<Self> {
        let program = program("MANDOLINE_APACHE")?;
        Some(
            Self::start("apache", |address, folder| {
                let modules = modules(&program);
                let load: String = ["mpm_event", "authz_core", "proxy", "proxy_http"]
                    .map(|name| format!("LoadModule {name}_module {modules}/mod_{name}.so\n"))
                    .concat();
                let folder_of = folder.display();
                let config = format!(
                    "{load}ServerName recorder\nServerRoot {folder_of}\nDefaultRuntimeDir {folder_of}\n\
                     PidFile {folder_of}/pid\nErrorLog {folder_of}/errors\nListen {address}\n\
                     <IfModule unixd_module>\nUser www-data\nGroup www-data\n</IfModule>\n\
                     LogFormat '%r %>s' one\nCustomLog {folder_of}/log one\n\
                     LimitRequestFields 200\nMergeSlashes Off\nLimitRequestFieldSize 65536\nLimitRequestLine 65536\nAllowEncodedSlashes NoDecode\n\
                     ProxyPreserveHost On\nProxyPass / http://{recorder}/ nocanon\n"
                );
                let mut command = Command::new(&program);
                // One process, so that none is left when it is killed.
                command.args(["-X", "-f"]).arg(write(folder, &config));
                command
            })
            .await,
        )
    }

    async fn start(name: &'static str, command: impl FnOnce(SocketAddr, &Path) -> Command) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).unwrap();
        let own = format!("mandoline-corpus-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(own);
        fs::create_dir_all(&folder).unwrap();
        let child = command(address, &folder)
            .stdin(Stdio::null())
            .stderr(File::create(folder.join("stderr")).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let mut peer = Self { name, address, folder, child };
        let mut again = tokio::time::interval(std::time::Duration::from_millis(10));
        within("a peer to listen", async {
            while TcpStream::connect(address).await.is_err() {
                let ended = peer.child.try_wait().unwrap();
                assert!(ended.is_none(), "{name} ended: {}", peer.complaints());
                again.tick().await;
            }
        })
        .await;
        peer
    }

    /// What it took for requests so far: each begins with method and target, and ends with a status.
    pub(super) fn log(&self) -> Vec<String> {
        let log = fs::read(self.folder.join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        // The last line may be under way.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        whole.lines().map(str::to_owned).collect()
    }

    /// A first line in the form in which it stands in the log.
    pub(super) fn logs(&self, line: &str) -> String {
        match self.name {
            "haproxy" => line.replace('"', "#22"),
            "apache" => line.replace('\\', r"\\").replace('"', r#"\""#),
            _ => line.to_owned(),
        }
    }

    pub(super) fn complaints(&self) -> String {
        ["stderr", "errors"]
            .map(|file| fs::read_to_string(self.folder.join(file)).unwrap_or_default())
            .concat()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
        fs::remove_dir_all(&self.folder).ok();
    }
}

fn write(folder: &Path, config: &str) -> PathBuf {
    let path = folder.join("config");
    fs::write(&path, config).unwrap();
    path
}

/// Where Apache keeps its modules: beside its binary in the places that are common.
fn modules(program: &Path) -> String {
    let found =
        ["/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/usr/local/apache2/modules"];
    let found = found.into_iter().find(|folder| Path::new(folder).join("mod_proxy.so").exists());
    found.unwrap_or_else(|| panic!("the modules of {} are not found", program.display())).to_owned()
}

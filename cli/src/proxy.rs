//! `mandoline proxy`: the proxy as a process of its own, round a clerk.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use mandoline::Hub;
use mandoline::clerk::Clerk;
use mandoline::gateways::{Gateway, Gateways, Region};
use mandoline::http::key::KeyFrom;
use mandoline_assigner::access::connector;
use mandoline_core::name::JobName;
use mandoline_core::task::Address;
use mandoline_proxy::config::Config;
use mandoline_proxy::proxy::{Proxy, StartError};
use mandoline_proxy::router::Router;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::access_args::AccessArgs;
use crate::failure::Failure;
use crate::task::{default_assigners, demo_job};
use crate::text::{self, Text, overlay};
use crate::units::{Size, Span};
use crate::{file, ports, stop};

/// Sends each request to the task that owns its key
///
/// Examples:
///   mandoline proxy --job kv --key path:1
///   mandoline proxy --job carts --key header:x-user --listen 0.0.0.0:8080 --assigners a:7400,b:7400,c:7400
///
/// Every option may come from the environment or from a YAML file (--config), where it has the same name with `_`:
///
///   listen: 127.0.0.1:8080
///   job: kv
///   key: path:1
///   assigners: ['10.0.0.1:7400', '10.0.0.2:7400']
///   cache: /var/lib/mandoline/kv.assignment
///   region: eu
///   gateways: ['us=gw1.us.example:8080', 'us=gw2.us.example:8080']
#[derive(Debug, Default, Args, Deserialize)]
#[command(verbatim_doc_comment)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ProxyArgs {
    /// A YAML file with these options; flags and environment win over it
    #[arg(long, env = "MANDOLINE_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Where requests come in [default: 127.0.0.1:8080]
    #[arg(long, env = "MANDOLINE_LISTEN", value_name = "IP:PORT")]
    listen: Option<Text<SocketAddr>>,
    /// Where /metrics, /livez and /readyz are [default: 127.0.0.1:7480]
    #[arg(long, env = "MANDOLINE_ADMIN", value_name = "IP:PORT")]
    admin: Option<Text<SocketAddr>>,
    /// The job whose tasks serve [default: kv]
    #[arg(long, env = "MANDOLINE_JOB")]
    job: Option<Text<JobName>>,
    /// Where a request has its key: path:N (from 0), header:NAME, cookie:NAME, query:NAME or host; GROUP/KEY keeps a group
    /// together, such as header:tenant/header:user [default: path:1]
    #[arg(long, env = "MANDOLINE_KEY", value_name = "WHERE")]
    key: Option<Text<KeyFrom>>,
    /// Where assigners answer [default: 127.0.0.1:7400]
    #[arg(long, env = "MANDOLINE_ASSIGNERS", value_name = "HOST:PORT,..", value_delimiter = ',')]
    assigners: Option<Vec<Text<Address>>>,
    /// Who else may know, asked while no assigner answers: proxies and tasks that serve watches
    #[arg(long, env = "MANDOLINE_WATCH_PEERS", value_name = "HOST:PORT,..", value_delimiter = ',')]
    watch_peers: Option<Vec<Text<Address>>>,
    /// Where others may watch the assignment [default: nowhere]
    #[arg(long, env = "MANDOLINE_WATCH_LISTEN", value_name = "IP:PORT")]
    watch_listen: Option<Text<SocketAddr>>,
    /// The region that it is in, as in the tasks' label region; needed with --gateway [default: none]
    #[arg(long, env = "MANDOLINE_REGION")]
    region: Option<Text<Region>>,
    /// A gateway of another region, such as one of its proxies: requests for keys that live there go to it rather than straight
    /// to the task. Repeat it for more; tasks of a region without a gateway are asked straight
    #[arg(
        long = "gateway",
        env = "MANDOLINE_GATEWAYS",
        value_name = "REGION=HOST:PORT",
        value_delimiter = ','
    )]
    #[serde(rename = "gateways")]
    gateways: Option<Vec<Text<Gateway>>>,
    /// The zone that it is in, as in the tasks' label zone: replicas there are asked first, unless they are overloaded [default: none]
    #[arg(long, env = "MANDOLINE_ZONE")]
    zone: Option<String>,
    /// How old the assignment may be at most: once nobody has told of changes for so long, requests get a 503 [default: any age]
    #[arg(long, env = "MANDOLINE_MAX_STALENESS", value_name = "DURATION")]
    max_staleness: Option<Span>,
    /// Keeps the last assignment here, to start from it while nobody answers
    #[arg(long, env = "MANDOLINE_CACHE", value_name = "FILE")]
    cache: Option<PathBuf>,
    /// How many cores to use [default: all]
    #[arg(long, env = "MANDOLINE_WORKERS")]
    workers: Option<NonZeroUsize>,
    /// How long a request is held at most while the slice of its key moves to another task [default: 30s]
    #[arg(long, env = "MANDOLINE_HOLD_WAIT", value_name = "DURATION")]
    hold_wait: Option<Span>,
    /// How many requests are held at a time; one more gets a 503 [default: 10000]
    #[arg(long, env = "MANDOLINE_HOLD_REQUESTS", value_name = "NUMBER")]
    hold_requests: Option<usize>,
    /// How much of them is held at a time, heads and bodies [default: 64MiB]
    #[arg(long, env = "MANDOLINE_HOLD_BYTES", value_name = "SIZE")]
    hold_bytes: Option<Size>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Runs until told to stop.
pub(crate) async fn run(mut args: ProxyArgs) -> Result<ExitCode, Failure> {
    if let Some(path) = &args.config {
        let from_file: ProxyArgs = file::read(path)?;
        overlay!(
            args, from_file;
            listen, admin, job, key, assigners, watch_peers, watch_listen, region, gateways, cache,
            workers, hold_wait, hold_requests, hold_bytes, zone, max_staleness,
        );
        args.access.overlay(from_file.access);
    }
    let local = |given: Option<Text<SocketAddr>>, port| {
        given.map_or_else(|| SocketAddr::from(([127, 0, 0, 1], port)), |Text(address)| address)
    };
    let listen = local(args.listen, 8080);
    // The proxy binds with SO_REUSEPORT, beside whoever did so too: find that out first.
    drop(ports::bind(listen, "requests to the proxy")?);
    let access = args.access.load()?;
    let job = args.job.map_or_else(demo_job, |Text(job)| job);
    let key = args.key.map_or_else(|| KeyFrom::path(1), |Text(key)| key);
    let (zone, region) = (args.zone, args.region.clone());
    let gateways = gateways(args.region, args.gateways)?;
    let stop = stop::on_signal()?;

    let hub = Hub::new();
    let mut builder = Clerk::builder(job.clone())
        .sources(args.assigners.map_or_else(default_assigners, text::plain))
        .peers(args.watch_peers.map_or_else(Vec::new, text::plain))
        .connector(connector(&access))
        .named(format!("proxy {listen}"))
        .report_offered(true);
    if let Some(zone) = zone {
        builder = builder.zone(zone);
    }
    if let Some(Text(region)) = region {
        builder = builder.region(region.to_string());
    }
    if let Some(path) = args.cache {
        builder = builder.cache(path);
    }
    let watch = match args.watch_listen {
        Some(Text(address)) => {
            access.check(address).map_err(|error| {
                Failure::new("the watch address is open to strangers").because(error)
            })?;
            builder = builder.publish_to(hub.clone());
            Some(ports::bind(address, "those who watch")?)
        }
        None => None,
    };
    let clerk =
        builder.start().map_err(|e| Failure::new("the clerk did not start").caused_by(&e))?;
    let mut config = Config {
        admin: Some(local(args.admin, 7480)),
        ..Config::new(listen, key, Router::new(clerk.clone()))
    };
    config.gateways = gateways;
    config.max_staleness = args.max_staleness.map(|Span(most)| most);
    if let Some(workers) = args.workers {
        config.workers = workers;
    }
    if let Some(Span(wait)) = args.hold_wait {
        config.timeouts.hold = wait;
    }
    if let Some(requests) = args.hold_requests {
        config.limits.held_requests = requests;
    }
    if let Some(Size(bytes)) = args.hold_bytes {
        config.limits.held_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
    let proxy = start(config, &stop)?;
    eprintln!("proxy: requests for job {job} at {}", proxy.local_addr());
    match watch {
        Some(listener) => {
            mandoline_assigner::server::serve_watch(listener, hub, &access, stop.clone())
                .await
                .map_err(|error| Failure::new("watching cannot be served").caused_by(&error))?;
        }
        None => stop.cancelled().await,
    }
    proxy.stop().await;
    eprintln!("proxy: stopped");
    Ok(ExitCode::SUCCESS)
}

/// What the proxy is to know of regions; nothing if it was told none.
fn gateways(
    region: Option<Text<Region>>,
    gateways: Option<Vec<Text<Gateway>>>,
) -> Result<Option<Gateways>, Failure> {
    let given = text::plain(gateways.unwrap_or_default());
    let Some(Text(region)) = region else {
        return match given.first() {
            None => Ok(None),
            Some(gateway) => Err(Failure::new(format!(
                "gateway {gateway} is of another region than what? Give --region: the one that this proxy is in"
            ))),
        };
    };
    let gateways = Gateways::new(region, given);
    gateways.map(Some).map_err(|error| Failure::new("these gateways cannot be used").because(error))
}

/// Starts a proxy.
pub(crate) fn start(config: Config, stop: &CancellationToken) -> Result<Proxy, Failure> {
    Proxy::start(config, stop).map_err(|error| match error {
        StartError::Bind { address, source } => ports::taken(address, "the proxy", &source),
        error => Failure::new("the proxy did not start").caused_by(&error),
    })
}

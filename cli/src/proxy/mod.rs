//! `mandoline proxy`: the proxy as a process of its own.

mod file;
mod lookups;
mod flags;
mod otlp;
mod pools;
mod clerk;
mod kept;
mod settings;
mod check;
mod explain;
mod reload;
mod standby;
mod schema;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use mandoline::Hub;
use mandoline::gateways::{Gateway, Region};
use mandoline::http::key::KeyFrom;
use mandoline_core::name::JobName;
use mandoline_core::task::Address;
use mandoline_proxy::config::Config;
use mandoline_proxy::config::id::ProxyId;
use mandoline_proxy::handover::Offer;
use mandoline_proxy::look::Look;
use mandoline_proxy::proxy::{Proxy, StartError};
use mandoline_proxy::sockets::SocketsError;
use serde::Deserialize;
use serde_saphyr::Spanned;
use tokio_util::sync::CancellationToken;

use crate::access_args::AccessArgs;
use crate::failure::Failure;
use crate::proxy::file::bounds::{LimitsFile, PausesFile, TimeoutsFile};
use crate::proxy::file::forwarded::ForwardedFile;
use crate::proxy::file::job::JobFile;
use crate::proxy::file::listener::ListenerFile;
use crate::proxy::file::observe::{AccessLogFile, DebugFile, TracesFile};
use crate::proxy::file::route::RouteFile;
use crate::proxy::kept::Kept;
use crate::proxy::lookups::{LookupFile, LookupName};
use crate::proxy::pools::PoolFile;
use crate::proxy::schema::SCHEMA;
use crate::proxy::settings::Settings;
use crate::proxy::standby::Standby;
use crate::text::Text;
use crate::units::{Size, Span};
use crate::{ports, stop};

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
///
/// A file may have routes, to several jobs, in place of job and key (see docs/proxy.md, and mandoline proxy schema):
///
///   routes:
///     - {host: shop.example.com, path: /carts/*, job: carts, key: header:x-user}
///     - {job: kv, key: path:1}
///
/// A changed file comes into force at once, without a restart; so it does on SIGHUP.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub(crate) struct ProxyCommand {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    args: Box<ProxyArgs>,
}

/// What else to do than to run.
#[derive(Debug, Subcommand)]
enum Verb {
    Check(check::CheckArgs),
    Explain(Box<explain::ExplainArgs>),
    /// Prints the JSON Schema of the configuration file, for editors
    Schema,
}

/// The options of a proxy, from flags, environment and file.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ProxyArgs {
    /// A YAML file with these options; flags and environment win over it
    #[arg(long, env = "MANDOLINE_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Where requests come in [default: 127.0.0.1:8080]
    #[arg(long, env = "MANDOLINE_LISTEN", value_name = "IP:PORT")]
    listen: Option<Text<SocketAddr>>,
    /// Where a page for people is (/), /metrics, /livez, /readyz, /explain, /reload and what else is for operators alone: whoever
    /// reaches it may reload [default: 127.0.0.1:7480]
    #[arg(long, env = "MANDOLINE_ADMIN", value_name = "IP:PORT")]
    admin: Option<Text<SocketAddr>>,
    /// What it calls itself in Via; two proxies in a row need different names [default: drawn]
    #[arg(long, env = "MANDOLINE_PROXY_ID", value_name = "NAME")]
    id: Option<Text<ProxyId>>,
    /// The job whose tasks serve [default: kv]
    #[arg(long, env = "MANDOLINE_JOB")]
    job: Option<Text<JobName>>,
    /// Where a request has its key: path:N (from 0) or path(/shops/{key}/*), query:NAME, header:NAME, metadata:NAME, cookie:NAME, host,
    /// client, method, jwt(CLAIM), json(/FIELD) or 'text'; lower(..), first(.., ..) and join(.., ..) of these; GROUP/KEY keeps a group
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
    /// A socket file at which the next process takes over from this one: started with the same, it serves from the same sockets, and
    /// this one ends what it has begun [default: none]
    #[arg(long, env = "MANDOLINE_HANDOVER", value_name = "FILE")]
    handover: Option<PathBuf>,
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
    #[arg(skip)]
    listeners: Option<Vec<ListenerFile>>,
    #[arg(skip)]
    routes: Option<Vec<Spanned<RouteFile>>>,
    #[arg(skip)]
    jobs: Option<BTreeMap<Text<JobName>, JobFile>>,
    #[arg(skip)]
    pools: Option<BTreeMap<Text<JobName>, Spanned<PoolFile>>>,
    #[arg(skip)]
    lookups: Option<BTreeMap<Text<LookupName>, Spanned<LookupFile>>>,
    #[arg(skip)]
    timeouts: Option<TimeoutsFile>,
    #[arg(skip)]
    limits: Option<LimitsFile>,
    #[arg(skip)]
    pauses: Option<PausesFile>,
    #[arg(skip)]
    access_log: Option<AccessLogFile>,
    #[arg(skip)]
    debug: Option<DebugFile>,
    #[arg(skip)]
    traces: Option<TracesFile>,
    #[arg(skip)]
    forwarded: Option<ForwardedFile>,
}

/// Runs until told to stop.
pub(crate) async fn run(command: ProxyCommand) -> Result<ExitCode, Failure> {
    match command.verb {
        None => serve(*command.args).await,
        Some(Verb::Check(args)) => check::run(&args),
        Some(Verb::Explain(args)) => explain::run(*args).await,
        Some(Verb::Schema) => {
            print!("{SCHEMA}");
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn serve(mut args: ProxyArgs) -> Result<ExitCode, Failure> {
    // Before it is read: a change in between, or while this waits to take over, is seen as one later.
    let seen = args.config.as_deref().and_then(Look::at);
    let settings = Settings::of(args.clone())?;
    // A name that is drawn is kept when the file is read again.
    args.id.get_or_insert_with(|| Text(settings.id()));
    let access = settings.access()?;
    let stop = stop::on_signal()?;
    let hub = Hub::new();
    let watch = match settings.watch_listen() {
        Some(address) => {
            access.check(address).map_err(|error| {
                Failure::new("the watch address is open to strangers").because(error)
            })?;
            Some(ports::bind(address, "those who watch")?)
        }
        None => None,
    };
    let mut kept = Kept::new(access.clone(), watch.is_some().then(|| hub.clone()));
    let config = settings.check(settings.config(&mut kept)?)?;
    kept.heard_flags().await;
    let mut standby = Standby::new(&settings, &kept).await?;
    let sockets = standby.sockets(&config)?;
    let offer = sockets
        .share()
        .map_err(|error| Failure::new("the sockets cannot be shared").because(error))?;
    let proxy = Proxy::start_on(sockets, config, &stop).map_err(not_started)?;
    kept.tell_of(proxy.pauses());
    let offer = standby.serves(offer, &stop)?;
    eprintln!("proxy: requests for {} at {}", settings.jobs(), places(&proxy));
    let reloading =
        tokio::spawn(reload::run(args, settings, seen, kept, proxy.reloader(), stop.clone()));
    match watch {
        Some(listener) => {
            mandoline_assigner::server::serve_watch(listener, hub, &access, stop.clone())
                .await
                .map_err(|error| Failure::new("watching cannot be served").caused_by(&error))?;
        }
        None => stop.cancelled().await,
    }
    // The next process serves at the admin address too, if there is one.
    let is_taken = offer.as_ref().is_some_and(Offer::is_taken);
    drop(offer);
    if is_taken {
        proxy.stop_taken_over().await;
    } else {
        proxy.stop().await;
    }
    // What is kept is needed until the last request has ended.
    if let Ok(kept) = reloading.await {
        kept.leave().await;
    }
    eprintln!("proxy: stopped");
    Ok(ExitCode::SUCCESS)
}

/// Starts a proxy.
pub(crate) fn start(config: Config, stop: &CancellationToken) -> Result<Proxy, Failure> {
    Proxy::start(config, stop).map_err(not_started)
}

/// Says where requests come in.
fn places(proxy: &Proxy) -> String {
    let places: Vec<String> = proxy.addresses().iter().map(ToString::to_string).collect();
    places.join(", ")
}

fn not_started(error: StartError) -> Failure {
    match error {
        StartError::Sockets(error) => no_sockets(error),
        error => Failure::new("the proxy did not start").caused_by(&error),
    }
}

fn no_sockets(error: SocketsError) -> Failure {
    match error {
        SocketsError::Bind { address, source } => ports::taken(address, "the proxy", &source),
        error => Failure::new("the proxy has no sockets to listen on").caused_by(&error),
    }
}

//! `mandoline demo task`: one task of the sample service, as a process of its own; `dev` runs several in one.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use mandoline::Utilisation;
use mandoline::slicelet::{Claim, CostError, Guard, NotOwner, Shutdown, Slicelet};
use mandoline_assigner::access::connector;
use mandoline_core::key::SliceKey;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::task::Address;
use mandoline_distributor::connect::Connector;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::access_args::AccessArgs;
use crate::demo::moving::Moving;
use crate::demo::server::{Server, Shard};
use crate::demo::store::Store;
use crate::failure::Failure;
use crate::text::{Text, overlay};
use crate::units::{Size, Span};
use crate::{file, ports, stop};

/// Runs a task of the sample service: an in-memory cache, GET, PUT and DELETE of /kv/KEY
///
/// Examples:
///   mandoline demo task --name kv-0 --listen 127.0.0.1:9000
///   curl -i -X PUT -d hello 127.0.0.1:9000/kv/greeting
///
/// A request for a key that another task owns is answered 421; send it through `mandoline proxy` and it finds its way.
/// SIGTERM drains: the task serves on until its slices have moved away.
#[derive(Debug, Default, Args, Deserialize)]
#[command(verbatim_doc_comment)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TaskArgs {
    /// A YAML file with these options; flags and environment win over it
    #[arg(long, env = "MANDOLINE_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Its stable name, kept over restarts
    #[arg(long, env = "MANDOLINE_NAME")]
    name: Option<Text<TaskName>>,
    /// Where it serves [default: 127.0.0.1:9000]
    #[arg(long, env = "MANDOLINE_LISTEN", value_name = "IP:PORT")]
    listen: Option<Text<SocketAddr>>,
    /// What it tells others of where it is [default: where it listens]
    #[arg(long, env = "MANDOLINE_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<Text<Address>>,
    /// Where others may watch the assignment, so that they start while no assigner runs [default: nowhere]
    #[arg(long, env = "MANDOLINE_WATCH_LISTEN", value_name = "IP:PORT")]
    watch_listen: Option<Text<SocketAddr>>,
    /// The job that it serves [default: kv]
    #[arg(long, env = "MANDOLINE_JOB")]
    job: Option<Text<JobName>>,
    /// Where assigners answer [default: 127.0.0.1:7400]
    #[arg(long, env = "MANDOLINE_ASSIGNERS", value_name = "HOST:PORT,..", value_delimiter = ',')]
    assigners: Option<Vec<Text<Address>>>,
    /// How much it can carry, as a multiple of an ordinary task [default: 1]
    #[arg(long, env = "MANDOLINE_CAPACITY", value_name = "TIMES")]
    capacity: Option<f64>,
    /// What placement may look at, such as zone=a,region=eu [default: nothing]
    #[arg(
        long = "label",
        env = "MANDOLINE_LABELS",
        value_name = "KEY=VALUE,..",
        value_delimiter = ','
    )]
    labels: Option<Vec<Text<Label>>>,
    /// Which version of the program this is: in a rollout, slices go to the newest [default: none]
    #[arg(long, env = "MANDOLINE_REVISION")]
    revision: Option<String>,
    /// How much its values may take [default: 256MiB]
    #[arg(long, env = "MANDOLINE_MEMORY", value_name = "SIZE")]
    memory: Option<Size>,
    /// How long it waits, told to stop, for its slices to move away [default: 25s]
    #[arg(long, env = "MANDOLINE_GRACE", value_name = "DURATION")]
    grace: Option<Span>,
    /// Crash when this key is asked for here: for demonstrations of what confinement does [default: never]
    #[arg(long, hide = true, value_name = "KEY")]
    crash_on: Option<String>,
    #[command(flatten)]
    access: AccessArgs,
}

/// What placement may look at: `zone=a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err(format!("{text:?} is no label: give KEY=VALUE, such as zone=a")),
        }
    }
}

/// What a task of the sample service needs to start.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) name: TaskName,
    pub(crate) job: JobName,
    pub(crate) listener: TcpListener,
    /// Where others find it, if not where it listens.
    pub(crate) advertise: Option<Address>,
    pub(crate) watch: Option<SocketAddr>,
    pub(crate) assigners: Vec<Address>,
    pub(crate) capacity: f64,
    pub(crate) labels: Vec<Label>,
    pub(crate) revision: String,
    pub(crate) memory: Size,
    pub(crate) grace: Span,
    pub(crate) crash_on: Option<String>,
    pub(crate) connector: Connector,
}

impl Setup {
    /// An ordinary task on loopback.
    pub(crate) fn new(
        name: TaskName,
        job: JobName,
        listener: TcpListener,
        assigners: Vec<Address>,
    ) -> Self {
        Self {
            name,
            job,
            listener,
            advertise: None,
            watch: None,
            assigners,
            capacity: 1.0,
            labels: Vec::new(),
            revision: String::new(),
            memory: MEMORY,
            grace: GRACE,
            crash_on: None,
            connector: Connector::default(),
        }
    }
}

/// Crashes where it is asked for one key that it owns, as a bug would.
struct Frail {
    slicelet: Arc<Slicelet>,
    crash_on: Option<SliceKey>,
}

impl Frail {
    /// Is asked for a key that this task owns.
    fn serve(&self, key: &[u8]) {
        if self.crash_on == Some(SliceKey::of(key)) {
            eprintln!("crashing: asked for the key that it crashes on");
            std::process::abort();
        }
    }
}

impl Shard for Frail {
    type Guard = Guard;

    fn acquire(&self, key: &[u8], cost: f64) -> Result<Guard, NotOwner> {
        let guard = self.slicelet.as_ref().acquire_at(SliceKey::of(key), cost)?;
        self.serve(key);
        Ok(guard)
    }

    fn still_owned(guard: &Guard) -> bool {
        guard.still_owned()
    }

    fn claim_spilled(&self, key: &[u8], cost: f64) -> Result<Claim, CostError> {
        let claim = Shard::claim_spilled(self.slicelet.as_ref(), key, cost)?;
        if claim == Claim::Mine {
            self.serve(key);
        }
        Ok(claim)
    }

    fn utilisation(&self) -> Utilisation {
        Shard::utilisation(self.slicelet.as_ref())
    }
}

/// A task of the sample service, under way.
#[derive(Debug)]
pub(crate) struct Task {
    slicelet: Arc<Slicelet>,
    server: Server,
    // Ends the server alone.
    stop: CancellationToken,
}

impl Task {
    /// Starts to serve, and to ask for slices.
    pub(crate) fn start(setup: Setup) -> Result<Self, Failure> {
        let name = setup.name;
        let failed = |error: &dyn std::error::Error| {
            Failure::new(format!("task {name} did not start")).caused_by(error)
        };
        let listener = tokio::net::TcpListener::from_std(setup.listener).map_err(|e| failed(&e))?;
        let listens = listener.local_addr().map_err(|e| failed(&e))?;
        let address = setup.advertise.map_or_else(|| listens.to_string(), |a| a.to_string());
        let Size(bytes) = setup.memory;
        let store = Arc::new(Store::new(usize::try_from(bytes).unwrap_or(usize::MAX)));
        let kept = Arc::clone(&store);
        let mut builder = Slicelet::builder(setup.job.as_str(), name.as_str(), &address)
            .assigners(setup.assigners.iter().map(Address::as_str))
            .capacity(setup.capacity)
            .revision(&setup.revision)
            .grace(setup.grace.0)
            .probe(tokio::runtime::Handle::current())
            .connector(setup.connector)
            .state(Moving::new(Arc::clone(&store)))
            .on_removed(move |slices| {
                for slice in slices {
                    kept.forget(*slice);
                }
            });
        for Label { key, value } in &setup.labels {
            builder = builder.label(key, value);
        }
        // Values move to where their keys do: whoever takes them over pulls them from here.
        let watch = setup.watch.or_else(|| {
            let loopback = listens.ip().is_loopback();
            loopback.then(|| SocketAddr::new(listens.ip(), 0))
        });
        if let Some(watch) = watch {
            builder = builder.watch_address(&watch.to_string());
        }
        let slicelet = Arc::new(builder.start().map_err(|e| failed(&e))?);
        let stop = CancellationToken::new();
        let crash_on = setup.crash_on.map(|key| SliceKey::of(key.as_bytes()));
        let shard = Arc::new(Frail { slicelet: Arc::clone(&slicelet), crash_on });
        let server =
            Server::start(&name, listener, shard, store, stop.clone()).map_err(|e| failed(&e))?;
        Ok(Self { slicelet, server, stop })
    }

    /// Gives where it serves.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Gives what it knows of its slices.
    pub(crate) fn slicelet(&self) -> &Slicelet {
        &self.slicelet
    }

    /// Leaves in good order: serves until its slices have moved away, then stops.
    pub(crate) async fn drain(self) -> Shutdown {
        let how = self.slicelet.shutdown().await;
        // Callers that have not heard of the move yet are told 421, rather than find nobody.
        tokio::time::sleep(LINGER).await;
        self.end().await;
        how
    }

    /// Stops at once.
    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.server.finished().await;
    }
}

/// Runs until told to stop, then drains.
pub(crate) async fn run(mut args: TaskArgs) -> Result<ExitCode, Failure> {
    if let Some(path) = &args.config {
        let from_file: TaskArgs = file::read(path)?;
        overlay!(args, from_file; name, listen, advertise, watch_listen, job, assigners, capacity, labels, revision, memory, grace, crash_on);
        args.access.overlay(from_file.access);
    }
    let Some(Text(name)) = args.name else {
        return Err(Failure::new("the task has no name").try_this("--name kv-0"));
    };
    let listen = args.listen.map_or_else(|| SocketAddr::from(([127, 0, 0, 1], 9000)), |t| t.0);
    let access = args.access.load()?;
    if let Some(Text(address)) = args.watch_listen {
        check_watch(address, access.insecure)?;
    }
    let token = stop::on_signal()?;
    let setup = Setup {
        name,
        job: args.job.map_or_else(demo_job, |Text(job)| job),
        listener: ports::bind(listen, "requests")?,
        advertise: args.advertise.map(|Text(address)| address),
        watch: args.watch_listen.map(|Text(address)| address),
        assigners: args.assigners.map_or_else(default_assigners, crate::text::plain),
        capacity: args.capacity.unwrap_or(1.0),
        labels: args.labels.map_or_else(Vec::new, crate::text::plain),
        revision: args.revision.unwrap_or_default(),
        memory: args.memory.unwrap_or(MEMORY),
        grace: args.grace.unwrap_or(GRACE),
        crash_on: args.crash_on,
        connector: connector(&access),
    };
    let (name, job) = (setup.name.clone(), setup.job.clone());
    let task = Task::start(setup)?;
    eprintln!("task {name} of job {job} serves at {}", task.address());
    tokio::select! {
        () = token.cancelled() => {}
        ready = task.slicelet().ready() => {
            match ready {
                Ok(()) => tracing::info!(task = %name, "The task is registered"),
                Err(error) => tracing::warn!(task = %name, %error, "The task goes on asking"),
            }
            token.cancelled().await;
        }
    }
    match task.drain().await {
        Shutdown::Drained => eprintln!("task {name} is drained and stops"),
        Shutdown::GraceOver { slices } => {
            eprintln!("task {name} stops with {slices} slices that nobody took over");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks that no stranger can watch: a task serves its watch plain, whatever certificate and token it has for its calls.
fn check_watch(address: SocketAddr, insecure: bool) -> Result<(), Failure> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    if !insecure {
        return Err(Failure::new(format!("the watch address {address} is open to strangers"))
            .because("a task's watch is plain so far: no TLS, and it asks for no token")
            .try_this(
                "listen on 127.0.0.1, have proxies serve watches (`mandoline proxy --watch-listen`), or say --insecure",
            ));
    }
    eprintln!("warning: --insecure: whoever reaches {address} reads where the job's tasks are");
    Ok(())
}

/// The job of the sample service.
pub(crate) fn demo_job() -> JobName {
    JobName::new("kv").expect("kv is a name")
}

/// Where `dev` and a first assigner listen.
pub(crate) fn default_assigners() -> Vec<Address> {
    vec!["127.0.0.1:7400".parse().expect("this is an address")]
}

/// Enough for a demonstration, and little enough for a laptop.
const MEMORY: Size = Size(256 << 20);
/// How long a drained task still answers: many times what an assignment takes to spread.
pub(crate) const LINGER: std::time::Duration = std::time::Duration::from_millis(500);
/// Kubernetes kills after 30 s.
pub(crate) const GRACE: Span = Span(std::time::Duration::from_secs(25));

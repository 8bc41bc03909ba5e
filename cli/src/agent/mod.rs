//! `mandoline agent`: makes tasks of servers that link nothing, for as long as they are healthy.
//!
//! The agent is what such a server lacks: it registers, beats and drains on its behalf, a slicelet each. It counts no load,
//! since requests do not pass through it: what proxies and clerks say that they offer is what the balancer goes by.

pub(crate) mod judge;
pub(crate) mod check;
mod list;
mod keeper;
mod job;
mod child;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Args;
use mandoline_assigner::access::connector;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::task::Address;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::access_args::AccessArgs;
use crate::agent::check::Check;
use crate::agent::child::{Child, Other, Told, code, signals};
use crate::agent::judge::Limits;
use crate::agent::keeper::Setup;
use crate::agent::list::{Entry, Resolved, Watched, distinct, name_of};
use crate::client::ClientArgs;
use crate::failure::Failure;
use crate::stop;
use crate::task::{GRACE, LINGER, Label, default_assigners};
use crate::text::{self, Text};
use crate::units::Span;

/// Makes tasks of servers that link nothing: any HTTP or gRPC server, judged by its health check
///
/// One server, beside it or around it:
///   mandoline agent --job kv --for http://127.0.0.1:9000 --health /livez
///   mandoline agent --job kv --for grpc://127.0.0.1:9000 --name kv-0 -- ./server --port 9000
///
/// Many servers by one agent:
///   mandoline agent --job kv --tasks kv-0=10.0.0.7:9000,kv-1=10.0.0.8:9000 --health /livez
///   mandoline agent --job kv --dns kv.internal:9000
///   mandoline agent --job kv --file tasks.txt         # a line a task: NAME=HOST:PORT, then labels: zone=a
///
/// A server is given keys once it is healthy, and they are moved away when it is not, when it leaves the list, and when the
/// agent is told to stop (SIGTERM), which waits for that. Callers find it through `mandoline proxy` or a clerk: those say
/// how much load it has. With `-- COMMAND` the agent runs the server, passes signals on, and stops it after the drain.
///
/// Jobs with `consistency: exclusive` are refused: an agent cannot keep a server from serving what it has lost.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct AgentArgs {
    /// The job that the servers serve
    #[arg(long, env = "MANDOLINE_JOB")]
    job: Text<JobName>,
    #[command(flatten)]
    servers: Servers,
    /// The task's stable name, kept over restarts [default: its address, such as 127.0.0.1-9000]
    #[arg(long, env = "MANDOLINE_NAME")]
    name: Option<Text<TaskName>>,
    /// What others are told of where the server is, if not the address of --for
    #[arg(long, env = "MANDOLINE_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<Text<Address>>,
    /// How to ask whether a server is healthy: tcp (it accepts a connection), /PATH or http://HOST:PORT/PATH (it answers 2xx),
    /// grpc or grpc:SERVICE (grpc.health.v1 says SERVING) [default: grpc for a grpc:// server, else tcp]
    #[arg(long, env = "MANDOLINE_HEALTH", value_name = "CHECK")]
    health: Option<Check>,
    /// How often each server is asked
    #[arg(long, env = "MANDOLINE_EVERY", default_value = "1s", value_name = "DURATION")]
    every: Span,
    /// An answer that takes longer is none
    #[arg(long, env = "MANDOLINE_WITHIN", default_value = "1s", value_name = "DURATION")]
    within: Span,
    /// After so many good checks in a row a server is healthy
    #[arg(long, env = "MANDOLINE_HEALTHY_AFTER", default_value_t = 1, value_name = "CHECKS", value_parser = clap::value_parser!(u32).range(1..))]
    healthy_after: u32,
    /// After so many bad checks in a row it no longer is
    #[arg(long, env = "MANDOLINE_UNHEALTHY_AFTER", default_value_t = 3, value_name = "CHECKS", value_parser = clap::value_parser!(u32).range(1..))]
    unhealthy_after: u32,
    /// Fail if a server is not healthy so long after it was listed [default: wait for ever]
    #[arg(long, env = "MANDOLINE_HEALTHY_WITHIN", value_name = "DURATION")]
    healthy_within: Option<Span>,
    /// How often the file or the DNS name is looked at again
    #[arg(long, env = "MANDOLINE_LIST_EVERY", default_value = "2s", value_name = "DURATION")]
    list_every: Span,
    /// Where assigners answer [default: 127.0.0.1:7400]
    #[arg(
        long,
        visible_alias = "assigner",
        env = "MANDOLINE_ASSIGNERS",
        value_name = "HOST:PORT,..",
        value_delimiter = ','
    )]
    assigners: Option<Vec<Text<Address>>>,
    /// How much each server can carry, as a multiple of an ordinary task
    #[arg(long, env = "MANDOLINE_CAPACITY", default_value_t = 1.0, value_name = "TIMES")]
    capacity: f64,
    /// What placement may look at, such as zone=a,region=eu; in a file, each task has its own as well
    #[arg(
        long = "label",
        env = "MANDOLINE_LABELS",
        value_name = "KEY=VALUE,..",
        value_delimiter = ','
    )]
    labels: Vec<Text<Label>>,
    /// Which version of the program the servers run: in a rollout, slices go to the newest
    #[arg(long, env = "MANDOLINE_REVISION", default_value = "", hide_default_value = true)]
    revision: String,
    /// How long it waits for a server's slices to move away
    #[arg(long, env = "MANDOLINE_GRACE", default_value_t = GRACE, value_name = "DURATION")]
    grace: Span,
    /// Sends SIGTERM to this process once its slices have moved away
    #[arg(long, value_name = "PID", conflicts_with = "command")]
    then_stop: Option<u32>,
    /// How long the command of `--` may take to stop before it is killed
    #[arg(long, env = "MANDOLINE_STOP_WITHIN", default_value = "10s", value_name = "DURATION")]
    stop_within: Span,
    #[command(flatten)]
    access: AccessArgs,
    /// Runs the server of --for as a child, and ends as it does
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Which servers: one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Servers {
    /// One server: http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or HOST:PORT
    #[arg(long = "for", env = "MANDOLINE_FOR", value_name = "URL")]
    server: Option<Server>,
    /// A list of servers
    #[arg(long, env = "MANDOLINE_TASKS", value_name = "NAME=HOST:PORT,..", value_delimiter = ',')]
    tasks: Option<Vec<Entry>>,
    /// Whatever this DNS name stands for: a task for each address
    #[arg(long, env = "MANDOLINE_DNS", value_name = "HOST:PORT")]
    dns: Option<Text<Address>>,
    /// A file of servers, a line each: NAME=HOST:PORT, then labels such as zone=a; read again when it changes
    #[arg(long, env = "MANDOLINE_FILE", value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Where one server is, and whether it speaks gRPC.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Server {
    address: Address,
    grpc: bool,
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("tcp", text));
        let grpc = match scheme {
            "http" | "https" | "tcp" => false,
            "grpc" => true,
            _ => return Err(format!("{scheme:?} is no scheme: give http, https, grpc or tcp")),
        };
        let place = rest.strip_suffix('/').unwrap_or(rest);
        if place.contains(['/', '?']) {
            return Err("a task is an address and has no path: give that to --health".to_owned());
        }
        if !place.is_empty() && (!place.contains(':') || place.ends_with(']')) {
            return Err(format!("it has no port: give one, such as {scheme}://{place}:9000"));
        }
        let address = place.parse().map_err(|error| format!("{error}"))?;
        Ok(Self { address, grpc })
    }
}

impl AgentArgs {
    /// Checks that what is said of one server is not said of several. By hand: clap waives what an option requires where that
    /// would exclude another one that is given.
    fn check_one(&self) -> Result<(), Failure> {
        let of_one = [
            ("--name", self.name.is_some()),
            ("--advertise", self.advertise.is_some()),
            ("--then-stop", self.then_stop.is_some()),
            ("a command", !self.command.is_empty()),
        ];
        match of_one.iter().find(|(_, given)| *given && self.servers.server.is_none()) {
            Some((what, _)) => Err(Failure::new(format!("{what} goes with one server"))
                .because("--tasks, --dns and --file may stand for several")
                .try_this("--for http://127.0.0.1:9000")),
            None => Ok(()),
        }
    }
}

/// Runs until told to stop, or until the command has ended.
pub(crate) async fn run(args: AgentArgs) -> Result<ExitCode, Failure> {
    args.check_one()?;
    let access = args.access.load()?;
    let assigners = args.assigners.map_or_else(default_assigners, text::plain);
    let Text(job) = args.job;
    let grpc = args.servers.server.as_ref().is_some_and(|server| server.grpc);
    let usual = if grpc { Check::Grpc { service: String::new() } } else { Check::Connect };
    let setup = Setup {
        job: job.clone(),
        assigners: assigners.clone(),
        connector: connector(&access),
        check: args.health.unwrap_or(usual),
        every: args.every.0.max(SHORTEST),
        within: args.within.0.max(SHORTEST),
        limits: Limits { good: args.healthy_after, bad: args.unhealthy_after },
        healthy_within: args.healthy_within.map(|Span(patience)| patience),
        advertise: args.advertise.map(|Text(address)| address),
        capacity: args.capacity,
        labels: text::plain(args.labels),
        revision: args.revision,
        grace: args.grace.0,
        listed: AtomicUsize::new(0),
        serving: AtomicUsize::new(0),
    };
    let then_stop = args.then_stop.map(Other::find).transpose()?;
    let list = List::open(args.servers, args.name.map(|Text(name)| name))?;
    let client = ClientArgs {
        assigners: assigners.into_iter().map(Text).collect(),
        timeout: Span(ASK_WITHIN),
        access: args.access,
    };
    let agent =
        Agent { setup: Arc::new(setup), list, list_every: args.list_every.0.max(SHORTEST), client };
    if args.command.is_empty() {
        agent.run(stop::on_signal()?).await?;
        if let Some(other) = then_stop {
            tokio::time::sleep(LINGER).await;
            other.stop();
        }
        eprintln!("agent: stopped");
        return Ok(ExitCode::SUCCESS);
    }
    let told = signals()?;
    around(agent, Child::spawn(&args.command)?, told, args.stop_within.0).await
}

/// Runs the agent round a child: drains before the child is stopped, and when it has ended.
async fn around(
    agent: Agent,
    mut child: Child,
    mut told: tokio::sync::mpsc::Receiver<Told>,
    within: Duration,
) -> Result<ExitCode, Failure> {
    let stop = CancellationToken::new();
    let mut running = std::pin::pin!(agent.run(stop.clone()));
    loop {
        tokio::select! {
            ran = &mut running => {
                if ran.is_ok() {
                    tokio::time::sleep(LINGER).await;
                }
                let stopped = child.stop(within).await;
                ran?;
                return stopped;
            }
            ended = child.ended() => {
                let status = ended?;
                eprintln!("agent: the server has ended ({status})");
                let before = stop.is_cancelled();
                stop.cancel();
                tokio::select! {
                    ran = &mut running => ran?,
                    () = told_again(&mut told, before) => {}
                }
                return Ok(code(status));
            }
            Some(told) = told.recv() => match told {
                Told::Pass(signal) => child.signal(signal),
                Told::Stop if stop.is_cancelled() => {
                    eprintln!("agent: told to stop again: no longer waiting for the drain");
                    return child.stop(within).await;
                }
                Told::Stop => stop.cancel(),
            }
        }
    }
}

/// Waits until told to stop twice in all, while the drain of a server that has ended goes on. The first time may have meant the server
/// as well, as where a whole control group is told; so it is no haste.
async fn told_again(told: &mut tokio::sync::mpsc::Receiver<Told>, mut before: bool) {
    while let Some(now) = told.recv().await {
        if now != Told::Stop {
            continue;
        }
        if before {
            eprintln!("agent: told to stop again: no longer waiting for the drain");
            return;
        }
        before = true;
        eprintln!("agent: told to stop: waiting for the drain, unless told again");
    }
    std::future::pending::<()>().await;
}

/// Where the servers are found.
enum List {
    Fixed(Vec<Entry>),
    File(Watched, Vec<Entry>),
    Dns(Resolved),
}

impl List {
    fn open(servers: Servers, name: Option<TaskName>) -> Result<Self, Failure> {
        if let Some(Server { address, .. }) = servers.server {
            let name = match name {
                Some(name) => name,
                None => TaskName::new(&name_of(&address)).map_err(|error| {
                    Failure::new(format!("{address} makes no task's name"))
                        .because(error)
                        .try_this("--name kv-0")
                })?,
            };
            return Ok(Self::Fixed(vec![Entry { name, address, labels: Vec::new() }]));
        }
        if let Some(entries) = servers.tasks {
            distinct(&entries).map_err(|error| Failure::new(format!("--tasks: {error}")))?;
            return Ok(Self::Fixed(entries));
        }
        if let Some(path) = servers.file {
            let (watched, entries) = Watched::open(&path)?;
            return Ok(Self::File(watched, entries));
        }
        let Some(Text(name)) = servers.dns else {
            return Err(Failure::new("there is no server").try_this("--for http://127.0.0.1:9000"));
        };
        Ok(Self::Dns(Resolved::new(name)))
    }

    /// What there is to begin with.
    fn first(&self) -> &[Entry] {
        match self {
            Self::Fixed(entries) | Self::File(_, entries) => entries,
            Self::Dns(_) => &[],
        }
    }

    /// Looks again, and gives the list if it may have changed.
    async fn look(&mut self) -> Option<Vec<Entry>> {
        match self {
            Self::Fixed(_) => std::future::pending().await,
            Self::File(watched, _) => watched.look(),
            Self::Dns(resolved) => resolved.look().await,
        }
    }
}

/// Keeps all servers of the list.
struct Agent {
    setup: Arc<Setup>,
    list: List,
    list_every: Duration,
    client: ClientArgs,
}

impl Agent {
    /// Keeps them until told to stop or until something fails, then has all drained.
    async fn run(mut self, stop: CancellationToken) -> Result<(), Failure> {
        self.setup.check_tasks(self.list.first())?;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            open = job::is_open(&self.setup.job, &self.client) => open?,
        }
        let (failing, mut failed) = tokio::sync::mpsc::channel(1);
        let mut kept = Kept {
            setup: self.setup,
            failing,
            kept: BTreeMap::new(),
            leaving: Vec::new(),
            refused: None,
        };
        kept.follow(self.list.first().to_vec());
        let mut tick = interval(self.list_every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let failure = loop {
            let looked = async {
                tick.tick().await;
                self.list.look().await
            };
            tokio::select! {
                () = stop.cancelled() => break None,
                failure = failed.recv() => break failure,
                looked = looked => if let Some(entries) = looked { kept.hear(entries) },
            }
        };
        kept.end().await;
        failure.map_or(Ok(()), Err)
    }
}

/// The servers that are kept, each by a task of the runtime that ends when its place is given up.
struct Kept {
    setup: Arc<Setup>,
    failing: tokio::sync::mpsc::Sender<Failure>,
    kept: BTreeMap<TaskName, Place>,
    leaving: Vec<JoinHandle<()>>,
    /// Why the list was not followed, as it was said.
    refused: Option<String>,
}

struct Place {
    entry: Entry,
    stop: CancellationToken,
    handle: JoinHandle<()>,
}

impl Kept {
    /// Follows a list that has changed, unless one of it can be no task: then all stay, for whoever writes a list must be able to slip.
    fn hear(&mut self, entries: Vec<Entry>) {
        let refused = self.setup.check_tasks(&entries).err().map(|failure| failure.to_string());
        if let Some(why) = refused.as_ref().filter(|why| self.refused.as_ref() != Some(why)) {
            eprintln!("{why}\n  the tasks stay as they were");
        }
        self.refused = refused;
        if self.refused.is_none() {
            self.follow(entries);
        }
    }

    /// Begins to keep who is new, and gives up who is no longer listed. Who has another address or other labels does both,
    /// one after the other, for the assigner knows a name once.
    fn follow(&mut self, entries: Vec<Entry>) {
        self.leaving.retain(|handle| !handle.is_finished());
        let listed: BTreeMap<TaskName, Entry> =
            entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        self.setup.listed.store(listed.len(), Ordering::Relaxed);
        let gone = self.kept.extract_if(.., |name, place| listed.get(name) != Some(&place.entry));
        let mut gone: BTreeMap<TaskName, Place> = gone.collect();
        for place in gone.values() {
            place.stop.cancel();
        }
        for (name, entry) in listed {
            if !self.kept.contains_key(&name) {
                let before = gone.remove(&name).map(|place| place.handle);
                let place = self.keep(entry, before);
                self.kept.insert(name, place);
            }
        }
        self.leaving.extend(gone.into_values().map(|place| place.handle));
    }

    fn keep(&self, entry: Entry, before: Option<JoinHandle<()>>) -> Place {
        let stop = CancellationToken::new();
        let (setup, failing) = (Arc::clone(&self.setup), self.failing.clone());
        let (kept, told) = (entry.clone(), stop.clone());
        let handle = tokio::spawn(async move {
            if let Some(before) = before {
                // It panicked or it ended: its place is free either way.
                drop(before.await);
            }
            if let Err(failure) = keeper::keep(setup, kept, told).await {
                // One failure ends them all: of a second nobody needs to hear.
                drop(failing.try_send(failure));
            }
        });
        Place { entry, stop, handle }
    }

    /// Gives all up, and waits until their slices have moved.
    async fn end(mut self) {
        self.follow(Vec::new());
        for handle in self.leaving {
            drop(handle.await);
        }
    }
}

/// No check and no look follows another sooner: a slip of the finger must not become a flood.
const SHORTEST: Duration = Duration::from_millis(10);
/// How long an assigner may take to say what kind a job is.
const ASK_WITHIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn parse(line: &str) -> Result<AgentArgs, String> {
        let words = format!("agent {line}");
        let parsed = Line::try_parse_from(words.split_whitespace());
        parsed.map(|line| line.agent).map_err(|error| error.to_string())
    }

    #[test]
    fn a_server_is_an_address_with_a_port() {
        for (text, address, grpc) in [
            ("http://127.0.0.1:9000", "127.0.0.1:9000", false),
            ("https://kv.internal:443/", "kv.internal:443", false),
            ("grpc://[::1]:9000", "[::1]:9000", true),
            ("127.0.0.1:9000", "127.0.0.1:9000", false),
        ] {
            let server: Server = text.parse().unwrap();
            assert_eq!((server.address.as_str(), server.grpc), (address, grpc));
        }
        for (text, says) in [
            ("http://127.0.0.1", "has no port: give one, such as http://127.0.0.1:9000"),
            ("http://[::1]", "has no port: give one, such as http://[::1]:9000"),
            ("kv", "has no port"),
            ("http://a:1/livez", "has no path: give that to --health"),
            ("ftp://a:1", "\"ftp\" is no scheme: give http, https, grpc or tcp"),
            ("http://a:99999", "\"a:99999\" is no address"),
            ("http://", "\"\" is no address"),
        ] {
            let error = text.parse::<Server>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn one_kind_of_list_is_given() {
        let agent = parse("--job kv --for http://a:1 --name x -- ./server --port 1").unwrap();
        assert_eq!(agent.command, ["./server", "--port", "1"]);
        let agent = parse("--job kv --tasks a=b:1,c=d:2 --assigner x:1 --assigner y:2").unwrap();
        assert_eq!(agent.servers.tasks.unwrap().len(), 2);
        assert_eq!(agent.assigners.unwrap().len(), 2);
        for (line, says) in [
            ("--job kv", "--for <URL>"),
            ("--for http://a:1", "--job <JOB>"),
            ("--job kv --for http://a:1 --dns b:1", "cannot be used with"),
            ("--job kv --for http://a:1 --then-stop 1 -- ./server", "cannot be used with"),
            ("--job kv --tasks a", "expected NAME=HOST:PORT"),
            ("--job kv --for http://a:1 --unhealthy-after 0", "0 is not in"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
        for (line, what) in [
            ("--job kv --dns b:1 --name x", "--name"),
            ("--job kv --tasks a=b:1 --advertise b:2", "--advertise"),
            ("--job kv --file f --then-stop 1", "--then-stop"),
            ("--job kv --dns b:1 -- ./server", "a command"),
        ] {
            let error = parse(line).unwrap().check_one().unwrap_err().to_string();
            assert!(error.contains(&format!("{what} goes with one server")), "{error}");
        }
    }

    #[test]
    fn a_task_without_a_name_has_that_of_its_address() {
        let open = |line: &str| List::open(parse(line).unwrap().servers, None);
        let list = open("--job kv --for http://127.0.0.1:9000").unwrap();
        assert_eq!(list.first()[0].name.as_str(), "127.0.0.1-9000");
        let long = format!("--job kv --for http://{}:1", "x".repeat(70));
        assert!(open(&long).err().unwrap().to_string().contains("try: --name kv-0"));
        let twice = open("--job kv --tasks a=b:1,a=b:2").err().unwrap().to_string();
        assert!(twice.contains("--tasks: a=b:2 has the name of a=b:1"), "{twice}");
    }
}

//! `mandoline bench proxy`: the processor time that a request costs in our proxy, beside nginx and HAProxy.
//!
//! All of them run at once, each one worker on the first core, and are loaded in turns; the load and the tasks have the second core.
//! Each is charged what the kernel says that its threads ran. A ratio is the median of those of its rounds, so that what else the
//! machine does hits both alike. The configurations are in `bench/proxy/`.

pub(in crate::bench) mod origin;
mod cpu;
mod load;
mod peers;
mod ratios;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use serde_json::json;

use crate::bench::processes::{Cluster, Process, free_port};
use crate::bench::proxy::load::Latency;
use crate::bench::proxy::peers::{Contender, Running, Surroundings};
use crate::bench::proxy::ratios::{Rounds, median};
use crate::failure::Failure;
use crate::stop;

/// Measures what a request costs in the proxy, beside nginx and HAProxy
///
/// Needs their Debian packages, which it names if they are missing; see bench/proxy/README.md. Everything runs on loopback and ends
/// with this command. The figures are those of this machine at this moment, so they decide nothing: ends with 1 only if requests
/// failed.
///
/// Examples:
///   mandoline bench proxy --quick
///   mandoline bench proxy --json
///   mandoline bench proxy --only bare,haproxy-map --rounds 21
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ProxyArgs {
    /// Takes less than a minute: four rounds of a second
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// How often each is loaded
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    rounds: u16,
    /// For how many seconds each time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Measures these alone
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,..")]
    only: Vec<Contender>,
    /// Another build of this program, measured as `other`, bare
    #[arg(long, value_name = "FILE")]
    beside: Option<PathBuf>,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: ProxyArgs) -> Result<ExitCode, Failure> {
    let stop = stop::on_signal()?;
    let contenders = args.contenders();
    peers::check(&contenders)?;
    let failed = |error: anyhow::Error| {
        Failure::new("the bench could not be run").because(format!("{error:#}"))
    };
    let found = tokio::select! {
        found = measure(&args, &contenders) => found.map_err(failed)?,
        () = stop.cancelled() => return Ok(ExitCode::from(130)),
    };
    if args.json {
        println!("{}", found.json());
    } else {
        print!("{}", found.text());
    }
    Ok(if found.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

impl ProxyArgs {
    fn contenders(&self) -> Vec<Contender> {
        let all = Contender::ALL.into_iter();
        let wanted = |one: &Contender| match one {
            Contender::Other => self.beside.is_some(),
            one => self.only.is_empty() || self.only.contains(one),
        };
        all.filter(wanted).collect()
    }

    const fn rounds(&self) -> (u16, u16) {
        if self.quick { (4, 1) } else { (self.rounds, self.seconds) }
    }
}

/// What was measured.
struct Found {
    rounds: Rounds,
    latency: Vec<Added>,
    requests: u64,
    failed: u64,
}

/// What going by a proxy adds to going straight to a task.
struct Added {
    by: Contender,
    connections: u16,
    latency: Latency,
}

async fn measure(args: &ProxyArgs, contenders: &[Contender]) -> anyhow::Result<Found> {
    let program = std::env::current_exe()?;
    let cluster = Cluster::start(&program, 1).await?;
    let ports = [free_port()?, free_port()?, free_port()?, free_port()?];
    let assigner = cluster.nodes[0].client;
    let _tasks = start_tasks(&cluster, &ports, assigner).await?;
    let other = args.beside.clone();
    let around = Surroundings { dir: cluster.dir().to_owned(), ports, assigner, program, other };
    around.write()?;
    let mut running = Vec::new();
    for contender in contenders.iter().copied() {
        running.push(around.start(contender).await?);
    }
    let mut found =
        Found { rounds: Rounds::default(), latency: Vec::new(), requests: 0, failed: 0 };
    let mut warm = Vec::new();
    for one in running {
        let load = load::run(one.protocol(), one.address, cluster.dir(), 1).await?;
        if load.requests > 0 {
            warm.push(one);
        } else if one.contender == Contender::Grpc {
            eprintln!("grpc is left out: this build speaks no HTTP/2");
        } else {
            bail!("{} answers nothing:\n{}", one.contender, one.process.log_tail());
        }
    }
    let running = warm;
    let (rounds, seconds) = args.rounds();
    for round in 0..usize::from(rounds) {
        // Each is first and last as often as the others.
        let turn = round % running.len().max(1);
        let (early, late) = running.split_at(turn);
        let mut costs = BTreeMap::new();
        for one in late.iter().chain(early) {
            let before = cpu::used(one.process.id())?;
            let load = load::run(one.protocol(), one.address, cluster.dir(), seconds).await?;
            let used = cpu::used(one.process.id())? - before;
            ensure!(
                load.requests > 0,
                "{} answered nothing:\n{}",
                one.contender,
                one.process.log_tail()
            );
            found.requests += load.requests;
            found.failed += load.failed;
            costs.insert(one.contender, used.as_secs_f64() * 1e6 / load.requests as f64);
        }
        eprintln!("round {} of {rounds}: {}", round + 1, ratios::line(&costs));
        found.rounds.0.push(costs);
    }
    let timed = [Contender::Bare, Contender::HaproxyMap, Contender::Nginx];
    let timed: Vec<&Running> =
        running.iter().filter(|one| timed.contains(&one.contender)).collect();
    found.latency = added(&timed, ports[0], cluster.dir(), args.quick).await?;
    Ok(found)
}

/// What going by each proxy adds to going straight to a task, for a client with one connection and for 64 that are in no hurry. All are
/// asked in turns, so that what a machine takes to wake up a process is the same for all.
async fn added(
    proxies: &[&Running],
    task: SocketAddr,
    dir: &Path,
    quick: bool,
) -> anyhow::Result<Vec<Added>> {
    let (rounds, seconds) = if quick { (1, 1) } else { (5, 3) };
    let mut all = Vec::new();
    for connections in [1, load::CONNECTIONS] {
        let mut more: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); proxies.len()];
        for _ in 0..rounds {
            let straight = load::latency(task, connections, dir, seconds).await?;
            for (proxy, (p50, p99)) in proxies.iter().zip(&mut more) {
                let by_proxy = load::latency(proxy.address, connections, dir, seconds).await?;
                p50.push(by_proxy.p50_us - straight.p50_us);
                p99.push(by_proxy.p99_us - straight.p99_us);
            }
        }
        for (proxy, (p50, p99)) in proxies.iter().zip(more) {
            let [p50_us, p99_us] = [p50, p99].map(|of| median(of).unwrap_or_default());
            let latency = Latency { p50_us, p99_us };
            all.push(Added { by: proxy.contender, connections, latency });
        }
    }
    Ok(all)
}

/// Starts one process that is all four tasks, and gives each of 1,000 slices to one of them.
async fn start_tasks(
    cluster: &Cluster,
    ports: &[SocketAddr; 4],
    assigner: SocketAddr,
) -> anyhow::Result<Process> {
    cluster.apply(&(&JobSpec::new("kv".parse()?)).into(), START_WITHIN).await?;
    let listen = ports.map(|port| port.to_string()).join(",");
    let command = cpu::on_core(
        cpu::LOAD_CORE,
        &std::env::current_exe()?,
        ["bench", "origin", "--listen", &listen, "--assigner", &assigner.to_string()],
    );
    let process = Process::spawn(command, "tasks", cluster.dir())?;
    cluster.served("kv", ports.len(), START_WITHIN).await?;
    let leader = cluster.leader(START_WITHIN).await?;
    let pins = (0..SLICES).map(|n| {
        let mut admin = cluster.admin(leader.index);
        async move {
            let (first, last) =
                (n * STEP, if n + 1 == SLICES { u64::MAX } else { (n + 1) * STEP - 1 });
            let slice = Slice::new(SliceKey(first), SliceKey(last)).context("a slice")?;
            let task = origin::name(usize::try_from(n * 7_919 % 4)?);
            let request =
                pb::PinSliceRequest { job: "kv".to_owned(), slice: Some(slice.into()), task };
            admin.pin_slice(request).await.context("a pin was refused")?;
            anyhow::Ok(())
        }
    });
    stream::iter(pins).buffer_unordered(PINS_AT_ONCE).try_collect::<()>().await?;
    let settled = async |cluster: &Cluster| {
        let job = cluster.served("kv", 4, START_WITHIN).await.ok()?;
        (job.slices >= SLICES).then_some(())
    };
    cluster.until("an assignment of 1,000 slices", START_WITHIN, settled).await?;
    Ok(process)
}

impl Found {
    fn text(&self) -> String {
        let mut text = self.rounds.text();
        for Added { by, connections, latency: Latency { p50_us, p99_us } } in &self.latency {
            text += &format!(
                "added latency, {by}, {connections} connections: {p50_us:.0} us p50, {p99_us:.0} us p99\n"
            );
        }
        text + &format!("{} requests, {} failed\n", self.requests, self.failed)
    }

    fn json(&self) -> serde_json::Value {
        let mut object = self.rounds.json();
        let mut latency = json!({});
        for Added { by, connections, latency: Latency { p50_us, p99_us } } in &self.latency {
            latency[by.to_string()][connections.to_string()] =
                json!({ "p50": p50_us, "p99": p99_us });
        }
        object.insert("added_latency_us".to_owned(), latency);
        object.insert("requests".to_owned(), self.requests.into());
        object.insert("failed".to_owned(), self.failed.into());
        object.into()
    }
}

/// How many slices the tasks share, one after the other.
const SLICES: u64 = 1_000;
const STEP: u64 = u64::MAX / SLICES;
/// Pins that are under way: enough that the leader writes several at once.
const PINS_AT_ONCE: usize = 64;
/// How long a start may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(60);

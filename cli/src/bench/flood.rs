//! `mandoline bench flood`: what a flood costs the proxy in memory, and the clients beside it in time.
//!
//! An assigner, a task and a proxy of one worker run as processes. A few clients ask at a steady pace all along, from a thread of their
//! own. Each flood is one window long, between windows without it: a pair is compared, so that what else runs on the machine hits both.
//! Whoever floods, and what is flooded, take processor time from the clients beside it, also where the proxy is fair: so in a third window
//! the same flood goes to another proxy, of the same tasks, on the same machine. What is left between the two is the proxy's own.
//! Memory is what the kernel counts for the proxy's process, looked at all the while.

mod kinds;

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use clap::builder::PossibleValuesParser;
use mandoline_core::spec::JobSpec;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::bench::flood::kinds::{KINDS, Kind};
use crate::bench::plain::Caller;
use crate::bench::processes::{Cluster, Proxy, ProxyKnows, Task};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::failure::Failure;

/// Floods a proxy in every way that is known, and measures its memory and what other clients notice
///
/// Starts an assigner, a task and two proxies as processes of their own on loopback; all of them end with this command. Ends with 1 if the
/// proxy took more than 64 MiB more than at rest, if the other clients' 99th percentile more than doubled, or if a request of theirs failed.
/// The second proxy is for comparison: how much longer the clients wait while the same flood goes there is the machine's part.
///
/// Example: mandoline bench flood --rounds 5 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct FloodArgs {
    /// How often each flood comes; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long it lasts, and how long the rest before it, in milliseconds
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    window_ms: u64,
    /// Only these floods, by name
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(KINDS.map(|kind| kind.name)))]
    only: Vec<String>,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// What a flood did.
struct Effect {
    name: &'static str,
    /// The proxy's memory at its peak, above that at rest.
    more_kib: u64,
    /// The other clients' 99th percentile, beside that without the flood: the median of the rounds.
    p99_ratio: f64,
    p99_ms: f64,
    /// Their 99th percentile while the flood went to another proxy, beside that without a flood.
    p99_ratio_elsewhere: f64,
    /// How many connections the proxy ended.
    ended: u64,
}

struct Found {
    rest_kib: u64,
    effects: Vec<Effect>,
    asked: u64,
    failed: u64,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: FloodArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    let more_kib = found.effects.iter().map(|effect| effect.more_kib).max().unwrap_or(0);
    let ratio = found.effects.iter().map(|effect| effect.p99_ratio).fold(0.0, f64::max);
    if args.json {
        let effects: Map<String, Value> = found
            .effects
            .iter()
            .map(|effect| {
                let of = json!({
                    "more_kib": effect.more_kib, "p99_ratio": rounded(effect.p99_ratio),
                    "p99_ms": rounded(effect.p99_ms),
                    "p99_ratio_elsewhere": rounded(effect.p99_ratio_elsewhere), "ended": effect.ended,
                });
                (effect.name.to_owned(), of)
            })
            .collect();
        println!(
            "{}",
            json!({
                "rounds": args.rounds, "window_ms": args.window_ms, "rest_kib": found.rest_kib,
                "more_kib_max": more_kib, "p99_ratio_max": rounded(ratio),
                "asked": found.asked, "failed": found.failed, "floods": effects,
            })
        );
    } else {
        println!(
            "{} floods: at most {more_kib} KiB above {} KiB at rest, p99 at most {ratio:.2} times, {} of {} requests beside them failed",
            found.effects.len(),
            found.rest_kib,
            found.failed,
            found.asked
        );
    }
    let is_fine = more_kib <= MORE_KIB && ratio <= P99_RATIO && found.failed == 0;
    Ok(if is_fine { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn rounded(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

/// What is measured on.
struct Stage {
    // Ends with this.
    _cluster: Cluster,
    _task: Task,
    proxy: Proxy,
    // Knows and does the same, and serves none of the clients that are looked at.
    elsewhere: Proxy,
}

impl Stage {
    async fn start() -> anyhow::Result<Self> {
        let cluster = Cluster::start(&std::env::current_exe()?, 1).await?;
        let spec = JobSpec::new("kv".parse()?);
        cluster.apply(&(&spec).into(), WITHIN).await?;
        let task = cluster.start_task("kv-0")?;
        cluster.served("kv", 1, WITHIN).await?;
        let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await?;
        let elsewhere = cluster.start_proxy("elsewhere", ProxyKnows::default()).await?;
        let mut caller = Caller::new(proxy.address);
        let put = caller.ask("PUT", "flood", &vec![b'x'; VALUE_BYTES]).await?;
        ensure!(put.is_served(), "the value was not taken: {put:?}");
        Ok(Self { _cluster: cluster, _task: task, proxy, elsewhere })
    }
}

async fn measure(args: &FloodArgs) -> anyhow::Result<Found> {
    let stage = Stage::start().await?;
    let window = Duration::from_millis(args.window_ms);
    let mut others = Others::start(stage.proxy.address);
    // Pools and buffers that anybody makes it have.
    others.during(sleep(2 * window)).await?;
    let rest_kib = resident_kib(stage.proxy.process.id())?;
    eprintln!("{rest_kib} KiB at rest");
    let (mut effects, mut asked, mut failed) = (Vec::new(), 0, 0);
    let is_wanted =
        |kind: &Kind| args.only.is_empty() || args.only.iter().any(|name| name == kind.name);
    for kind in KINDS.into_iter().filter(is_wanted) {
        let (mut peak, mut ended) = (0, 0);
        let (mut ratios, mut p99s, mut elsewhere) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let calm = others.during(sleep(window)).await?;
            let flooding = flood(&stage.elsewhere, &kind, window);
            let (flooded, beside) = others.during_with(flooding).await?;
            flooded?;
            elsewhere.push(beside.p99() / calm.p99());
            asked += beside.asked();
            failed += beside.failed;
            sleep(window / 4).await;
            let flooding = flood(&stage.proxy, &kind, window);
            let (flooded, beside) = others.during_with(flooding).await?;
            let (most, closed) = flooded?;
            sleep(window / 4).await;
            (peak, ended) = (peak.max(most), ended + closed);
            ratios.push(beside.p99() / calm.p99());
            p99s.push(beside.p99());
            asked += calm.asked() + beside.asked();
            failed += calm.failed + beside.failed;
        }
        let effect = Effect {
            name: kind.name,
            more_kib: peak.saturating_sub(rest_kib),
            p99_ratio: median(&mut ratios),
            p99_ms: median(&mut p99s),
            p99_ratio_elsewhere: median(&mut elsewhere),
            ended,
        };
        eprintln!(
            "{}: {} KiB more, p99 {:.2} times ({:.2} ms; {:.2} times while it goes elsewhere), {} connections ended",
            effect.name,
            effect.more_kib,
            effect.p99_ratio,
            effect.p99_ms,
            effect.p99_ratio_elsewhere,
            effect.ended
        );
        effects.push(effect);
    }
    Ok(Found { rest_kib, effects, asked, failed })
}

/// Floods for a while. Gives the proxy's memory at its peak, and how many connections the proxy has ended.
async fn flood(proxy: &Proxy, kind: &Kind, window: Duration) -> anyhow::Result<(u64, u64)> {
    let ended = Arc::new(AtomicU64::new(0));
    let mut connections = JoinSet::new();
    for index in 0..kind.connections {
        let (address, kind, ended) = (proxy.address, *kind, Arc::clone(&ended));
        // Not all at the same moment: a burst of connections would be another flood.
        let first = window.mul_f64(0.5 * index as f64 / kind.connections as f64);
        connections.spawn(async move {
            sleep(first).await;
            loop {
                // One that the proxy has ended is opened again, and not at once.
                drop(send(address, &kind).await);
                ended.fetch_add(1, Relaxed);
                sleep(TICK).await;
            }
        });
    }
    let end = Instant::now() + window;
    let mut peak = 0;
    while Instant::now() < end {
        peak = peak.max(resident_kib(proxy.process.id())?);
        sleep(LOOK_EVERY).await;
    }
    Ok((peak, ended.load(Relaxed)))
}

/// Sends what a flood sends, until the proxy ends the connection.
async fn send(address: std::net::SocketAddr, kind: &Kind) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.split();
    let writing = async {
        writer.write_all(&(kind.opens)()).await?;
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for tick in 0.. {
            ticks.tick().await;
            writer.write_all(&(kind.goes_on)(tick)).await?;
        }
        Ok(())
    };
    let reading = async {
        let mut buffer = vec![0; 16 << 10];
        if !kind.reads {
            std::future::pending::<()>().await;
        }
        while reader.read(&mut buffer).await? > 0 {}
        Ok(())
    };
    tokio::select! {
        written = writing => written,
        read = reading => read,
    }
}

/// The clients beside the floods, on a thread of their own.
struct Others {
    told: mpsc::Receiver<Sample>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

/// How long a request took; nothing if it failed.
type Sample = Option<Duration>;

/// What the clients noticed for a while.
struct Noticed {
    took: Vec<Duration>,
    failed: u64,
}

impl Others {
    fn start(address: std::net::SocketAddr) -> Self {
        let (tell, told) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be had").block_on(async {
                let mut clients = JoinSet::new();
                for _ in 0..CLIENTS {
                    clients.spawn(ask_on(address, tell.clone(), Arc::clone(&stopped)));
                }
                while clients.join_next().await.is_some() {}
            });
        });
        Self { told, stop, thread: Some(thread) }
    }

    async fn during(&mut self, what: impl Future<Output = ()>) -> anyhow::Result<Noticed> {
        Ok(self.during_with(what).await?.1)
    }

    async fn during_with<T>(
        &mut self,
        what: impl Future<Output = T>,
    ) -> anyhow::Result<(T, Noticed)> {
        self.told.try_iter().for_each(drop);
        let done = what.await;
        let mut samples: Vec<Sample> = self.told.try_iter().collect();
        // In a short window on a busy machine there may be no answer: the one under way then counts.
        let end = Instant::now() + WITHIN;
        while samples.iter().flatten().next().is_none() && Instant::now() < end {
            sleep(LOOK_EVERY).await;
            samples.extend(self.told.try_iter());
        }
        let failed = samples.iter().filter(|sample| sample.is_none()).count() as u64;
        let mut took: Vec<Duration> = samples.into_iter().flatten().collect();
        took.sort_unstable();
        ensure!(!took.is_empty(), "no request beside the flood was answered: {failed} failed");
        Ok((done, Noticed { took, failed }))
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // If it panicked there is nothing left to stop.
            drop(thread.join());
        }
    }
}

impl Noticed {
    fn asked(&self) -> u64 {
        self.took.len() as u64 + self.failed
    }

    /// In milliseconds.
    fn p99(&self) -> f64 {
        let at = self.took.len() * 99 / 100;
        self.took[at.min(self.took.len() - 1)].as_secs_f64() * 1e3
    }
}

/// Asks at a steady pace until told to stop, on a connection that is kept.
async fn ask_on(address: std::net::SocketAddr, tell: mpsc::Sender<Sample>, stop: Arc<AtomicBool>) {
    let mut caller = Caller::new(address);
    let mut ticks = interval(ASK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stop.load(Relaxed) {
        ticks.tick().await;
        let since = Instant::now();
        let answer = timeout(WITHIN, caller.ask("GET", "other", &[])).await;
        let is_served = answer.is_ok_and(|answer| answer.is_ok_and(|answer| answer.is_served()));
        if tell.send(is_served.then(|| since.elapsed())).is_err() {
            return;
        }
    }
}

/// What is resident of a process, by the kernel's count.
fn resident_kib(process: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))
        .context("the proxy's memory cannot be read: this bench needs Linux")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.context("the proxy has ended")?.parse().context("VmRSS is a number")
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The goal: how much more the proxy may take than at rest.
const MORE_KIB: u64 = 64 << 10;
/// The goal: how much longer the other clients may wait at their 99th percentile.
const P99_RATIO: f64 = 2.0;
/// How long a flood's connection waits between two pieces: a hundred a second, so that it sends some ten thousand frames in that time.
const TICK: Duration = Duration::from_millis(10);
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Together two thousand requests a second: enough for a percentile in one window, and a small part of what a worker can do.
const CLIENTS: usize = 8;
const ASK_EVERY: Duration = Duration::from_millis(4);
/// What the floods ask for: a hundred at a time on each connection are more than any window.
const VALUE_BYTES: usize = 64 << 10;
/// How long anything may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(30);

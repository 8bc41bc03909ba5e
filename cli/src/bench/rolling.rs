//! `mandoline bench rolling`: what callers and the cache notice when every task is restarted, one after another.
//!
//! Real tasks of the sample cache, whose values move with their slices, behind a proxy, under an open load that fills what
//! it misses. Each task is told to stop when the restart gate says that it may, drains, ends, and is started again under its
//! name, empty. Once with owners, once without.
//!
//! What had to move is what each task carried when it was told to stop, and a task's part for the last one: it comes back with
//! nobody left to drain, so it is filled by balancing.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_proto::pb;
use serde_json::{Value, json};
use tokio::time::{Instant, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::bench::processes::{Cluster, ProxyKnows, Task};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::drive::ledger::Totals;
use crate::drive::{Driver, Limits, Load};
use crate::failure::Failure;

/// Restarts every task under load, and measures what fails, what moves, and what the cache forgets
///
/// Starts assigners, tasks and a proxy as processes of their own on loopback, with their data in a temporary directory; all
/// of them end with this command. Ends with 1 if a request failed.
///
/// Example: mandoline bench rolling --tasks 20 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct RollingArgs {
    /// How many tasks serve, and are restarted
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u8).range(2..=50))]
    tasks: u8,
    /// Requests a second through the proxy
    #[arg(long, default_value_t = 1_000, value_name = "PER_SECOND", value_parser = clap::value_parser!(u32).range(100..=100_000))]
    rate: u32,
    /// How many keys there are, drawn by Zipf's law (0.99)
    #[arg(long, default_value_t = 3_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    keys: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: RollingArgs) -> Result<ExitCode, Failure> {
    let measure_both = async {
        let exclusive = measure(&args, Consistency::Exclusive).await?;
        anyhow::Ok([
            ("exclusive", exclusive),
            ("affinity", measure(&args, Consistency::Affinity).await?),
        ])
    };
    let Some(found) = until_stopped(Box::pin(measure_both)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    if args.json {
        let kinds = found.iter().map(|(kind, found)| ((*kind).to_owned(), found.json()));
        println!("{}", Value::Object(kinds.collect()));
    } else {
        for (kind, found) in &found {
            println!("{kind:<10} {}", found.text());
        }
    }
    let good = found.iter().all(|(_, found)| found.failed == 0);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

async fn measure(args: &RollingArgs, consistency: Consistency) -> anyhow::Result<Findings> {
    let cluster = Cluster::start(&std::env::current_exe()?, 3).await?;
    let spec = JobSpec {
        consistency,
        heartbeat: Duration::from_millis(500),
        report_every: Duration::from_millis(500),
        // Often, so that what moves between two restarts shows.
        balance_every: Duration::from_secs(2),
        ..JobSpec::new("kv".parse()?)
    };
    cluster.apply(&(&spec).into(), WITHIN).await?;
    let count = usize::from(args.tasks);
    let mut tasks: Vec<Task> = (0..count)
        .map(|index| cluster.start_task(&format!("kv-{index}")))
        .collect::<Result<_, _>>()?;
    cluster.served("kv", count, WITHIN).await?;
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await?;
    let workload = format!("zipf:0.99,keys={}", args.keys).parse()?;
    let load = Load::Made { workload, seed: 1, rate: args.rate.to_string().parse()? };
    let stop = CancellationToken::new();
    let mut driver = Driver::start(proxy.address, load, Limits::default(), &stop).await?;
    let job = until_all_carry(&cluster, count).await?;
    let hits_before = until_warm(&driver).await?;
    eprintln!("{consistency:?}: {count} tasks are warm, {:.2} % hits", hits_before * 100.0);
    let moved_before = job.churn.unwrap_or_default().load;

    let (began, from) = (Instant::now(), driver.totals());
    let mut lowest = 1.0_f64;
    let restart = async {
        let mut must_move = 0.0;
        for task in &mut tasks {
            must_move += restart(&cluster, task, count).await?;
        }
        let restarted = began.elapsed();
        // What balancing still moves belongs to it. If it takes its time, that is no reason to throw the rest away.
        let job = timeout(FILL_WITHIN, until_all_carry(&cluster, count)).await;
        let filled = job.is_ok_and(|job| job.is_ok());
        anyhow::Ok((cluster.served("kv", count, WITHIN).await?, must_move, restarted, filled))
    };
    let mut restart = std::pin::pin!(restart);
    let (mut looks, mut last) = (interval(HITS_OVER), from.clone());
    looks.tick().await;
    let (job, must_move, restarted, filled) = loop {
        tokio::select! {
            ended = &mut restart => break ended?,
            _ = looks.tick() => {
                let now = driver.totals();
                if let Some(hits) = hit_rate(&last, &now) {
                    lowest = lowest.min(hits);
                }
                last = now;
            }
        }
    };
    stop.cancel();
    let (totals, _) = driver.finished().await;
    let moved = (job.churn.unwrap_or_default().load - moved_before) as f64 / 1e6;
    Ok(Findings {
        tasks: count,
        restarted,
        filled,
        requests: totals.requests - from.requests,
        failed: totals.failed + totals.refused,
        errors: totals.errors.clone(),
        moved,
        must_move,
        fill: 1.0 / count as f64,
        hits_before,
        hits: hit_rate(&from, &totals).unwrap_or(0.0),
        hits_lowest: lowest,
        p99: totals.latency.quantile(0.99),
        longest: totals.latency.max(),
    })
}

/// Restarts a task when it may, and gives what share of the load it carried.
async fn restart(cluster: &Cluster, task: &mut Task, count: usize) -> anyhow::Result<f64> {
    let name = task.name.clone();
    let may = async |cluster: &Cluster| {
        let leader = cluster.leader(WITHIN).await.ok()?;
        let request = pb::MayRestartRequest { job: "kv".to_owned(), task: name.clone() };
        let reply = cluster.admin(leader.index).may_restart(request).await.ok()?;
        reply.into_inner().yes.then_some(())
    };
    cluster.until("the gate to let the next one go", WITHIN, may).await?;
    let job = cluster.served("kv", count, WITHIN).await?;
    let all: u64 = job.tasks.iter().map(|task| task.load).sum();
    let of_it = job.tasks.iter().find(|status| {
        status
            .task
            .as_ref()
            .and_then(|task| task.info.as_ref())
            .is_some_and(|info| info.name == name)
    });
    let carried = of_it.context("the task is registered")?.load as f64 / all.max(1) as f64;
    task.process.terminate()?;
    let ended = task.process.wait_ended(WITHIN).await?;
    if !ended.success() {
        bail!("{name} ended with {ended}:\n{}", task.process.log_tail());
    }
    *task = cluster.start_task(&name)?;
    cluster.served("kv", count, WITHIN).await?;
    eprintln!("{name} carried {:.2} % of the load and is back", carried * 100.0);
    Ok(carried)
}

/// Waits until each task carries a quarter of its part: so few requests are a noisy load, which is evened out slowly.
async fn until_all_carry(cluster: &Cluster, count: usize) -> anyhow::Result<pb::JobStatus> {
    let look = async |cluster: &Cluster| {
        let job = cluster.served("kv", count, WITHIN).await.ok()?;
        let all: u64 = job.tasks.iter().map(|task| task.load).sum();
        let carries = |task: &pb::TaskStatus| task.load * count as u64 * 4 > all;
        (all > 0 && job.tasks.iter().all(carries)).then_some(job)
    };
    cluster.until("every task to carry something", WITHIN, look).await
}

/// Waits until the cache knows nearly every key that is asked for, and gives its hit rate.
async fn until_warm(driver: &Driver) -> anyhow::Result<f64> {
    let warm = async {
        let (mut looks, mut last) = (interval(WARM_OVER), driver.totals());
        looks.tick().await;
        loop {
            looks.tick().await;
            let now = driver.totals();
            let hits = hit_rate(&last, &now).unwrap_or(0.0);
            if hits >= WARM {
                return hits;
            }
            last = now;
        }
    };
    timeout(WARM_WITHIN, warm).await.with_context(|| {
        format!("the cache was not warm within {WARM_WITHIN:?}: try fewer keys or a higher rate")
    })
}

/// The share of reads between two moments that found a value; nothing if there were none.
fn hit_rate(before: &Totals, after: &Totals) -> Option<f64> {
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
}

/// What was found.
#[derive(Debug)]
struct Findings {
    tasks: usize,
    /// How long the restarts took.
    restarted: Duration,
    /// Whether the last task was given a part again within `FILL_WITHIN` after them.
    filled: bool,
    requests: u64,
    failed: u64,
    errors: Vec<String>,
    /// Of all load, as the assigner counts it.
    moved: f64,
    /// What the tasks carried that were told to stop.
    must_move: f64,
    /// What the last one is filled with.
    fill: f64,
    hits_before: f64,
    hits: f64,
    hits_lowest: f64,
    p99: Duration,
    longest: Duration,
}

impl Findings {
    fn json(&self) -> Value {
        json!({
            "tasks": self.tasks,
            "seconds": self.restarted.as_secs_f64(),
            "last_is_filled": self.filled,
            "requests": self.requests,
            "failed": self.failed,
            "errors": self.errors,
            "load_moved": self.moved,
            "load_that_had_to": self.must_move,
            "moved_of_what_had_to": self.moved / self.must_move,
            "moved_of_what_had_to_and_the_last_fill": self.moved / (self.must_move + self.fill),
            "hit_rate": {
                "before": self.hits_before,
                "during": self.hits,
                "lowest_second": self.hits_lowest,
                "dip_points": (self.hits_before - self.hits_lowest) * 100.0,
            },
            "latency_ms": { "p99": self.p99.as_secs_f64() * 1e3, "max": self.longest.as_secs_f64() * 1e3 },
        })
    }

    fn text(&self) -> String {
        let mut text = format!(
            "{} tasks restarted within {:.0} s: {} of {} requests failed; {:.2} of all load moved, {:.2} of what had to; \
             hits {:.2} % before, {:.2} % in the worst second",
            self.tasks,
            self.restarted.as_secs_f64(),
            self.failed,
            self.requests,
            self.moved,
            self.moved / self.must_move,
            self.hits_before * 100.0,
            self.hits_lowest * 100.0,
        );
        for error in &self.errors {
            text.push_str(&format!("\n           {error}"));
        }
        text
    }
}

/// What the cache must know before the first restart.
const WARM: f64 = 0.99;
/// Over how long that is looked at.
const WARM_OVER: Duration = Duration::from_secs(5);
/// A thousand requests a second find three thousand keys in a third of this.
const WARM_WITHIN: Duration = Duration::from_secs(180);
/// A dip is looked for over each second: some thousand reads.
const HITS_OVER: Duration = Duration::from_secs(1);
/// How long it is waited for the last task to be filled.
const FILL_WITHIN: Duration = Duration::from_secs(50);
/// How long anything may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

//! `mandoline bench reaction`: how long until a key that is suddenly hot is evened out, by the real path.
//!
//! A real cluster runs as child processes, and even load goes through its proxy. Then one new key draws a good part of all
//! requests; measured is the time from its first request until every task has served at most 1.2 times the mean. That
//! takes a report, a round, a commit, and the news of it in tasks and the proxy. Two jobs are measured: one whose key is more than a
//! task should carry and may have as many replicas as there are tasks, and one whose slices have one replica, so that the
//! key's neighbours must go.
//!
//! What tasks have served is read from answers, over a window that ends when it is looked at: a figure holds all of the
//! window in which balance was first seen, so it is too high rather than too low. The key comes at another moment of the
//! round each time.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use mandoline_core::spec::{JobSpec, ReplicaBounds};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::bench::processes::{Cluster, ProxyKnows, Task};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::drive::ledger::Totals;
use crate::drive::{Driver, Limits, Load, Pace};
use crate::failure::Failure;
use crate::units::Span;

/// Makes a new key hot again and again, and measures how long until the load is even
///
/// Starts assigners, tasks and a proxy as processes of their own on loopback, on free ports, with their data in a
/// temporary directory; all of them end with this command. Ends with 1 if the load was not evened out in twelve rounds.
///
/// Example: mandoline bench reaction --runs 5 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ReactionArgs {
    /// How often a key becomes hot, of each of the two jobs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    runs: u16,
    /// How often tasks report their load
    #[arg(long, default_value = "5s", value_name = "DURATION")]
    report_every: Span,
    /// How often the load is balanced
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    balance_every: Span,
    /// How many tasks serve
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=50))]
    tasks: u8,
    /// Requests a second of all keys but the hot one
    #[arg(long, default_value_t = 400, value_name = "PER_SECOND", value_parser = clap::value_parser!(u32).range(10..=100_000))]
    rate: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: ReactionArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    if args.json {
        println!("{}", found.json());
    } else {
        print!("{}", found.text());
    }
    Ok(if found.never == 0 && found.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// What a job may do about a hot key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Remedy {
    /// Give it to more tasks.
    Replicate,
    /// Take its neighbours away.
    Clear,
}

impl Remedy {
    const ALL: [Self; 2] = [Self::Replicate, Self::Clear];

    const fn name(self) -> &'static str {
        match self {
            Self::Replicate => "replicas for the key",
            Self::Clear => "its neighbours go",
        }
    }

    fn spec(self, args: &ReactionArgs) -> anyhow::Result<JobSpec> {
        let max = match self {
            Self::Replicate => ReplicaBounds::ALL,
            Self::Clear => 1,
        };
        let (Span(report_every), Span(balance_every)) = (args.report_every, args.balance_every);
        let replicas = ReplicaBounds { min: 1, max };
        let spec = JobSpec { report_every, balance_every, replicas, ..JobSpec::new("kv".parse()?) };
        spec.check()?;
        Ok(spec)
    }

    /// What the key draws, by what a mean task then has: twice that is too much for one, three quarters leave room beside
    /// it.
    fn hot_rate(self, args: &ReactionArgs) -> f64 {
        let of_mean = match self {
            Self::Replicate => 2.0_f64.min(f64::from(args.tasks) / 2.0),
            Self::Clear => 0.75,
        };
        let share = of_mean / f64::from(args.tasks);
        f64::from(args.rate) * share / (1.0 - share)
    }
}

async fn measure(args: &ReactionArgs) -> anyhow::Result<Findings> {
    let program = std::env::current_exe()?;
    let cluster = Cluster::start(&program, 1).await?;
    let stop = CancellationToken::new();
    cluster.apply(&(&Remedy::Replicate.spec(args)?).into(), START_WITHIN).await?;
    let tasks: Vec<Task> = (0..args.tasks)
        .map(|index| cluster.start_task(&format!("kv-{index}")))
        .collect::<Result<_, _>>()?;
    cluster.served("kv", tasks.len(), START_WITHIN).await?;
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await?;
    let rate = args.rate.to_string().parse()?;
    let even = Load::Made { workload: "zipf:0,keys=100000".parse()?, seed: 1, rate };
    let even = Driver::start(proxy.address, even, Limits::default(), &stop).await?;
    let mut watch = Watch::new(tasks.len());

    let mut found = Findings::default();
    for remedy in Remedy::ALL {
        cluster.apply(&(&remedy.spec(args)?).into(), START_WITHIN).await?;
        for run in 1..=args.runs {
            watch.settle(&even, args, run).await;
            let began = Instant::now();
            let hot =
                hot_key(remedy, run, args, proxy.address, &stop).await.context("the hot key")?;
            let limit = args.balance_every.0 * ROUNDS_MAX;
            let took = watch.until_even(&[&even, &hot.driver], limit, began).await;
            match took {
                Some(took) => {
                    eprintln!("{}, {run}: even after {:.1} s", remedy.name(), took.as_secs_f64());
                    found.took.entry(remedy).or_default().push(took);
                }
                None => {
                    eprintln!("{}, {run}: not even after {limit:?}", remedy.name());
                    found.never += 1;
                }
            }
            let totals = hot.end().await;
            found.add(&totals);
        }
    }
    let totals = even.totals();
    found.add(&totals);
    Ok(found)
}

/// Requests for one key that nobody has asked for before.
async fn hot_key(
    remedy: Remedy,
    run: u16,
    args: &ReactionArgs,
    target: std::net::SocketAddr,
    stop: &CancellationToken,
) -> anyhow::Result<Hot> {
    let mut file = tempfile::NamedTempFile::new()?;
    let key = format!("hot-{remedy:?}-{run}");
    file.write_all(format!("0 {key} 1 100\n").repeat(1_000).as_bytes())?;
    let pace = Pace::Rate(format!("{}", remedy.hot_rate(args)).parse()?);
    let load = Load::Recorded { path: file.path().to_owned(), key: None, pace };
    // With a length it is repeated.
    let limits = Limits { length: Some(FOR_GOOD), ..Limits::default() };
    let stop = stop.child_token();
    let driver = Driver::start(target, load, limits, &stop).await?;
    Ok(Hot { driver, stop, _file: file })
}

/// A driver with the file that it reads.
struct Hot {
    driver: Driver,
    stop: CancellationToken,
    _file: tempfile::NamedTempFile,
}

/// What the tasks have served of late.
struct Watch {
    tasks: usize,
    recent: VecDeque<BTreeMap<Box<str>, u64>>,
}

impl Watch {
    fn new(tasks: usize) -> Self {
        Self { tasks, recent: VecDeque::new() }
    }

    /// Lets the system come to rest after the last key has gone: what it had cost is forgotten.
    async fn settle(&mut self, even: &Driver, args: &ReactionArgs, run: u16) {
        let round = args.balance_every.0;
        // The golden ratio spreads the moments evenly over the round, however many there are.
        let phase = round.mul_f64(f64::from(run) * 0.618_034 % 1.0);
        sleep(round * 2 + args.report_every.0 + phase).await;
        let rest = self.until_even(&[even], round * ROUNDS_MAX, Instant::now()).await;
        if rest.is_none() {
            eprintln!("the load was not even before the key came");
        }
    }

    /// Waits until each task has served at most so much of the mean, and says after how long since `began`.
    async fn until_even(
        &mut self,
        drivers: &[&Driver],
        limit: Duration,
        began: Instant,
    ) -> Option<Duration> {
        // What was served before is of another load.
        drivers.iter().for_each(|driver| drop(driver.window()));
        self.recent.clear();
        while began.elapsed() < limit {
            sleep(LOOK_EVERY).await;
            let mut served: BTreeMap<Box<str>, u64> = BTreeMap::new();
            for (task, cost) in drivers.iter().flat_map(|driver| driver.window().by_task) {
                *served.entry(task).or_default() += cost;
            }
            self.recent.push_back(served);
            if self.recent.len() > WINDOW_LOOKS {
                self.recent.pop_front();
            }
            if self.recent.len() == WINDOW_LOOKS && over_mean(&self.recent, self.tasks) <= EVEN {
                return Some(began.elapsed());
            }
        }
        None
    }
}

/// Gives the most that a task has served, over the mean.
fn over_mean(recent: &VecDeque<BTreeMap<Box<str>, u64>>, tasks: usize) -> f64 {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (task, cost) in recent.iter().flatten() {
        *sums.entry(task).or_default() += cost;
    }
    let (total, max) = (sums.values().sum::<u64>(), sums.values().max().copied().unwrap_or(0));
    if total == 0 { f64::INFINITY } else { max as f64 * tasks as f64 / total as f64 }
}

impl Hot {
    /// Ends the requests, and says what came of them.
    async fn end(mut self) -> Totals {
        self.stop.cancel();
        self.driver.finished().await.0
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Findings {
    took: BTreeMap<Remedy, Vec<Duration>>,
    never: u32,
    requests: u64,
    failed: u64,
    errors: Vec<String>,
}

impl Findings {
    fn add(&mut self, totals: &Totals) {
        self.requests += totals.requests;
        self.failed += totals.failed;
        self.errors.extend(totals.errors.iter().cloned());
    }

    /// The median and the most, in seconds.
    fn spread(&self, remedy: Remedy) -> Option<(f64, f64)> {
        let mut took = self.took.get(&remedy)?.clone();
        took.sort_unstable();
        let half = took[(took.len() - 1) / 2];
        Some((half.as_secs_f64(), took.last()?.as_secs_f64()))
    }

    fn json(&self) -> Value {
        let spread = |remedy| {
            let found = self.spread(remedy);
            found.map(
                |(p50, max)| json!({ "runs": self.took[&remedy].len(), "p50": p50, "max": max }),
            )
        };
        json!({
            "replicate_s": spread(Remedy::Replicate),
            "clear_s": spread(Remedy::Clear),
            "never": self.never,
            "requests": self.requests,
            "failed": self.failed,
            "errors": self.errors,
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for remedy in Remedy::ALL {
            if let Some((half, max)) = self.spread(remedy) {
                let (name, runs) = (remedy.name(), self.took[&remedy].len());
                text.push_str(&format!(
                    "{name:<22} {runs:>3} times  p50 {half:>6.1} s  max {max:>6.1} s\n"
                ));
            }
        }
        text.push_str(&format!(
            "{} requests, {} failed; not evened out: {}\n",
            self.requests, self.failed, self.never
        ));
        for error in &self.errors {
            text.push_str(&format!("{error}\n"));
        }
        text
    }
}

/// What counts as even: the most that a task serves, over the mean.
const EVEN: f64 = 1.2;
/// How often is looked, which is how far a figure may be too high beside the window.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Looks of a window: 2 s, so that chance is a tenth of a task's load at a hundred requests a second and a task.
const WINDOW_LOOKS: usize = 20;
/// After so many rounds nobody waits any longer.
const ROUNDS_MAX: u32 = 12;
/// A start takes a second or two; past this something is wrong that waiting does not mend.
const START_WITHIN: Duration = Duration::from_secs(30);
/// Longer than any run.
const FOR_GOOD: Duration = Duration::from_secs(24 * 3_600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_served_nothing_counts() {
        let look = |costs: &[(&str, u64)]| -> BTreeMap<Box<str>, u64> {
            costs.iter().map(|(task, cost)| (Box::from(*task), *cost)).collect()
        };
        let recent = VecDeque::from([look(&[("a", 10), ("b", 5)]), look(&[("b", 5)])]);
        assert_eq!(over_mean(&recent, 2), 1.0);
        assert_eq!(over_mean(&recent, 4), 2.0);
        assert_eq!(over_mean(&VecDeque::new(), 2), f64::INFINITY);
    }
}

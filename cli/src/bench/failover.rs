//! `mandoline bench failover`: how long the cluster is without a leader when that dies, and whether anyone notices.
//!
//! A real cluster runs as child processes, and load goes through its proxy. Again and again the leader is killed; measured
//! is the time until another says that it leads, and for how long no change is accepted, by a caller that just tries again.
//! Then the dead node comes back. A second phase stops the leader politely, so that it hands over first. At the end every change
//! that was accepted must be there.
//!
//! The measuring costs little: nodes are asked every 5 ms, which is also how far a figure may be too high.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use mandoline::clerk::Clerk;
use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::spec::{Band, JobSpec, Ratio};
use mandoline_proto::pb;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bench::processes::{Cluster, ProxyKnows, Task};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::drive::{Driver, Limits, Load, Rate};
use crate::failure::Failure;

/// Kills the leader again and again under load, and measures how long nobody leads
///
/// Starts assigners, tasks and a proxy as processes of their own on loopback, on free ports, with their data in a
/// temporary directory; all of them end with this command. Ends with 1 if a request failed, or if anything that was
/// acknowledged is gone.
///
/// Example: mandoline bench failover --kills 20 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct FailoverArgs {
    /// How often the leader is killed (SIGKILL)
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// How often it is stopped politely (SIGTERM) after that, so that it hands over first
    #[arg(long, default_value_t = 10)]
    polite: u32,
    /// How many assigner nodes decide
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=9))]
    assigners: u8,
    /// How many tasks serve
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
    tasks: u8,
    /// Requests a second through the proxy
    #[arg(long, default_value = "500", value_name = "PER_SECOND")]
    rate: Rate,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: FailoverArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    if args.json {
        println!("{}", found.json());
    } else {
        print!("{}", found.text());
    }
    let good = found.failed == 0 && found.lost.is_empty();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

async fn measure(args: &FailoverArgs) -> anyhow::Result<Findings> {
    let program = std::env::current_exe()?;
    let mut cluster = Cluster::start(&program, usize::from(args.assigners)).await?;
    let mut kept = Kept::default();
    let spec = JobSpec {
        report_every: Duration::from_millis(500),
        balance_every: Duration::from_secs(1),
        ..JobSpec::new("kv".parse()?)
    };
    kept.accepted(&cluster, &(&spec).into(), CHANGE_WITHIN).await?;
    let tasks: Vec<Task> = (0..args.tasks)
        .map(|index| cluster.start_task(&format!("kv-{index}")))
        .collect::<Result<_, _>>()?;
    cluster.served("kv", tasks.len(), CHANGE_WITHIN).await?;
    // Whichever node the proxy asks, it knows this much.
    cluster.settled(SETTLE_WITHIN).await?;
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await?;
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).named("bench").start()?;
    let seen = Seen::begin(&clerk);
    tokio::time::timeout(CHANGE_WITHIN, clerk.ready()).await?;

    let load = Load::Made { workload: "zipf:0.99".parse()?, seed: 1, rate: args.rate };
    let stop = CancellationToken::new();
    let mut driver = Driver::start(proxy.address, load, Limits::default(), &stop).await?;
    eprintln!(
        "{} assigners, {} tasks and a proxy run; {} requests/s",
        args.assigners,
        tasks.len(),
        args.rate
    );

    let mut found = Findings::default();
    let ways = [(Way::Kill, args.kills), (Way::Stop, args.polite)];
    for (way, times) in ways {
        for round in 1..=times {
            let failed_before = driver.totals().failed;
            let (leader, change) = fell(&mut cluster, way, round, &mut kept).await?;
            let settled = cluster.settled(SETTLE_WITHIN).await?;
            let generation = kept.generation(&cluster, settled.index).await?;
            if Some(generation) < seen.newest() {
                found.lost.push(format!("generation {generation} after {:?}", seen.newest()));
            }
            let failed = driver.totals().failed - failed_before;
            eprintln!(
                "{} {round}: a new leader after {:.0} ms, no change accepted for {:.0} ms, {failed} requests failed",
                way.name(),
                millis(leader),
                millis(change)
            );
            match way {
                Way::Kill => {
                    found.new_leader.push(leader);
                    found.next_change.push(change);
                }
                Way::Stop => {
                    found.polite_leader.push(leader);
                    found.polite_change.push(change);
                }
            }
        }
    }

    stop.cancel();
    let (totals, _) = driver.finished().await;
    found.requests = totals.requests;
    found.failed = totals.failed;
    found.errors = totals.errors.clone();
    found.accepted = kept.count;
    let settled = cluster.settled(SETTLE_WITHIN).await?;
    for index in cluster.running() {
        found.lost.extend(kept.lost(&cluster, index, &tasks).await?);
    }
    let generation = kept.generation(&cluster, settled.index).await?;
    found.generation = generation.to_string();
    let (back, newest) = seen.end().await;
    found.lost.extend(back);
    if newest.is_none_or(|newest| newest > generation) {
        found.lost.push(format!("generation {newest:?} was seen, {generation} is the last"));
    }
    Ok(found)
}

/// How a leader goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// SIGKILL.
    Kill,
    /// SIGTERM: it hands over first.
    Stop,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
        }
    }
}

/// Has the leader go, measures until another leads and for how long no change is accepted, and brings the node back.
async fn fell(
    cluster: &mut Cluster,
    way: Way,
    round: u32,
    kept: &mut Kept,
) -> anyhow::Result<(Duration, Duration)> {
    let old = cluster.leader(CHANGE_WITHIN).await?;
    let mut gone = cluster.nodes[old.index].process.take().expect("a leader runs");
    let began = Instant::now();
    match way {
        Way::Kill => gone.kill(),
        Way::Stop => gone.terminate()?,
    }
    // A job of its own for each round: all of them must be there at the end.
    let mut spec = JobSpec::new(format!("{}-{round}", way.name()).parse()?);
    let leads = AtomicBool::new(false);
    let (leader, change) = {
        let cluster = &*cluster;
        let leader = async {
            cluster.leader(CHANGE_WITHIN).await?;
            leads.store(true, Ordering::Relaxed);
            anyhow::Ok(began.elapsed())
        };
        // One change after the other, for the old leader may accept some before it goes: the longest stretch without.
        let change = async {
            let (mut accepted_at, mut longest) = (began, Duration::ZERO);
            loop {
                let is_last = leads.load(Ordering::Relaxed);
                let band = spec.band.ratio().millionths();
                spec.band = Band::Adaptive(Ratio::from_millionths(band + 1));
                kept.accepted(cluster, &(&spec).into(), CHANGE_WITHIN).await?;
                let now = Instant::now();
                longest = longest.max(now - accepted_at);
                accepted_at = now;
                if is_last {
                    return anyhow::Ok(longest);
                }
            }
        };
        tokio::try_join!(leader, change)?
    };
    gone.wait_ended(STOP_WITHIN).await?;
    drop(gone);
    cluster.start_node(old.index)?;
    Ok((leader, change))
}

/// What was acknowledged, and so must stay.
#[derive(Debug, Default)]
struct Kept {
    count: u64,
    versions: BTreeMap<String, (u64, pb::JobSpec)>,
}

impl Kept {
    /// Makes a change, and notes it once it is accepted.
    async fn accepted(
        &mut self,
        cluster: &Cluster,
        spec: &pb::JobSpec,
        within: Duration,
    ) -> anyhow::Result<()> {
        let version = cluster.apply(spec, within).await?;
        self.count += 1;
        self.versions.insert(spec.name.clone(), (version, spec.clone()));
        Ok(())
    }

    /// Names what a node does not have.
    async fn lost(
        &self,
        cluster: &Cluster,
        index: usize,
        tasks: &[Task],
    ) -> anyhow::Result<Vec<String>> {
        let status = cluster.status(index).await?;
        let mut lost = vec![];
        for (name, (version, spec)) in &self.versions {
            let found =
                status.jobs.iter().find(|job| job.spec.as_ref().is_some_and(|s| s.name == *name));
            // A change that was tried twice may have been made twice: a version may be higher.
            let good =
                found.is_some_and(|job| job.version >= *version && job.spec.as_ref() == Some(spec));
            if !good {
                lost.push(format!("job {name} at version {version}, on node {}", index + 1));
            }
        }
        let here = status.jobs.iter().flat_map(|job| &job.tasks);
        let names: Vec<&str> = here
            .filter_map(|task| task.task.as_ref()?.info.as_ref())
            .map(|info| info.name.as_str())
            .collect();
        let missing = tasks.iter().filter(|task| !names.contains(&task.name.as_str()));
        lost.extend(missing.map(|task| format!("task {}, on node {}", task.name, index + 1)));
        Ok(lost)
    }

    /// Gives the generation of job `kv`, as a node has it.
    async fn generation(&self, cluster: &Cluster, index: usize) -> anyhow::Result<Generation> {
        let status = cluster.status(index).await?;
        let kv = status.jobs.iter().find(|job| job.spec.as_ref().is_some_and(|s| s.name == "kv"));
        let generation = kv.and_then(|job| job.generation);
        generation
            .map(Generation::from)
            .ok_or_else(|| anyhow::anyhow!("node {} does not know job kv", index + 1))
    }
}

/// Watches the assignments as a caller does, and notes any that is older than one before, or another one of the same
/// generation.
#[derive(Debug)]
struct Seen {
    changes: watch::Receiver<Option<Arc<Assignment>>>,
    stop: CancellationToken,
    watching: JoinHandle<Vec<String>>,
}

impl Seen {
    fn begin(clerk: &Clerk) -> Self {
        let (changes, stop) = (clerk.changes(), CancellationToken::new());
        let (mut heard, ending) = (changes.clone(), stop.clone());
        let watching = tokio::spawn(async move {
            let (mut newest, mut back) = (None, vec![]);
            loop {
                let generation = heard.borrow_and_update().as_ref().map(|a| a.generation);
                if generation < newest {
                    back.push(format!("generation {generation:?} was seen after {newest:?}"));
                }
                newest = newest.max(generation);
                tokio::select! {
                    changed = heard.changed() => if changed.is_err() { return back },
                    () = ending.cancelled() => return back,
                }
            }
        });
        Self { changes, stop, watching }
    }

    fn newest(&self) -> Option<Generation> {
        self.changes.borrow().as_ref().map(|assignment| assignment.generation)
    }

    /// Gives what went wrong, and the newest that was seen.
    async fn end(self) -> (Vec<String>, Option<Generation>) {
        self.stop.cancel();
        let back = self.watching.await.expect("watching does not panic, and nobody aborts it");
        let newest = self.changes.borrow().as_ref().map(|assignment| assignment.generation);
        (back, newest)
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Findings {
    new_leader: Vec<Duration>,
    next_change: Vec<Duration>,
    polite_leader: Vec<Duration>,
    polite_change: Vec<Duration>,
    requests: u64,
    failed: u64,
    errors: Vec<String>,
    accepted: u64,
    lost: Vec<String>,
    generation: String,
}

impl Findings {
    fn json(&self) -> Value {
        json!({
            "kills": self.new_leader.len(),
            "polite": self.polite_leader.len(),
            "new_leader_ms": spread(&self.new_leader),
            "next_change_ms": spread(&self.next_change),
            "polite_new_leader_ms": spread(&self.polite_leader),
            "polite_next_change_ms": spread(&self.polite_change),
            "requests": self.requests,
            "failed": self.failed,
            "errors": self.errors,
            "accepted": self.accepted,
            "lost": self.lost.len(),
            "lost_what": self.lost,
            "generation": self.generation,
        })
    }

    fn text(&self) -> String {
        let line = |what: &str, times: &[Duration]| {
            let [half, most, max] = [0.5, 0.99, 1.0].map(|share| millis(quantile(times, share)));
            format!(
                "{what:<34} {:>3} times  p50 {half:>6.0} ms  p99 {most:>6.0} ms  max {max:>6.0} ms\n",
                times.len()
            )
        };
        let mut text = line("killed: a new leader after", &self.new_leader);
        text.push_str(&line("killed: no change accepted for", &self.next_change));
        text.push_str(&line("stopped: a new leader after", &self.polite_leader));
        text.push_str(&line("stopped: no change accepted for", &self.polite_change));
        text.push_str(&format!(
            "{} requests, {} failed; {} changes accepted, {} lost; generation {}\n",
            self.requests,
            self.failed,
            self.accepted,
            self.lost.len(),
            self.generation
        ));
        for what in self.lost.iter().chain(&self.errors) {
            text.push_str(&format!("  {what}\n"));
        }
        text
    }
}

fn spread(times: &[Duration]) -> Value {
    let [half, most, max] = [0.5, 0.99, 1.0].map(|share| tenths(millis(quantile(times, share))));
    json!({ "p50": half, "p99": most, "max": max })
}

/// The smallest that at least `share` of them do not exceed; zero if there are none.
fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

/// A change needs an election at worst, which is a second or two on a busy machine.
const CHANGE_WITHIN: Duration = Duration::from_secs(30);
/// A node that comes back replays its log and hears from the leader.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// A hand-over takes milliseconds, and what is cut off after it two seconds.
const STOP_WITHIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let times: Vec<Duration> = (1..=20).rev().map(Duration::from_millis).collect();
        assert_eq!(spread(&times), json!({ "p50": 10.0, "p99": 20.0, "max": 20.0 }));
        assert_eq!(spread(&[]), json!({ "p50": 0.0, "p99": 0.0, "max": 0.0 }));
    }

    #[test]
    fn findings_are_told_in_json_and_text() {
        let times = vec![Duration::from_micros(1_250)];
        let found =
            Findings { new_leader: times, lost: vec!["job a".into()], ..Findings::default() };
        assert_eq!(found.json()["new_leader_ms"]["p50"], 1.3);
        assert_eq!(found.json()["lost"], 1);
        assert!(found.text().ends_with("1 lost; generation \n  job a\n"), "{}", found.text());
    }
}

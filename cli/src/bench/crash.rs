//! `mandoline bench crash`: how long the slices of an exclusive job's owner are unserved when that is killed.
//!
//! Nobody may serve them before the dead owner's lease is over, for nobody but the lease says that it is dead. A lease is renewed by
//! each heartbeat, so it has between a heartbeat less and all of its length to run when the owner dies: the owner is killed at
//! another moment of the heartbeat each time. Measured is from the kill to the first answer of another task, for keys all
//! over the owner's slices: the first of them, which must not be too early, and the last.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;
use mandoline_core::spec::{Consistency, JobSpec};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::bench::plain::Caller;
use crate::bench::processes::{Cluster, Task};
use crate::bench::trial::{STOPPED, failed, until_stopped};
use crate::failure::Failure;

/// Kills owners of an exclusive job, and measures how long until their slices are served elsewhere
///
/// Starts three assigners and two tasks as processes of their own on loopback, with their data in a temporary directory; all
/// of them end with this command. The lease is 2 s, the heartbeat 500 ms. Ends with 1 if a slice was served before the lease of
/// its dead owner could be over.
///
/// Example: mandoline bench crash --kills 20 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct CrashArgs {
    /// How often an owner is killed (SIGKILL)
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    kills: u16,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: CrashArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    let Found { mut outages, under_new_leader } = found;
    outages.sort_unstable_by_key(|outage| outage.last);
    let first = outages.iter().chain(&under_new_leader).map(|outage| outage.first);
    let early = first.clone().filter(|first| *first < EARLIEST).count();
    let first = first.min().unwrap_or_default().as_secs_f64();
    let others = under_new_leader.len();
    let kills = outages.len();
    if kills == 0 {
        return Err(failed(anyhow!("the lead changed at each kill: the machine is too busy")));
    }
    let at = |share: f64| outages[((kills - 1) as f64 * share).round() as usize].last.as_secs_f64();
    let (p50, p99, max) = (at(0.5), at(0.99), at(1.0));
    if args.json {
        println!(
            "{}",
            json!({
                "kills": kills,
                "kills_under_new_leader": others,
                "lease_s": LEASE.as_secs_f64(),
                "heartbeat_s": HEARTBEAT.as_secs_f64(),
                "first_s": first,
                "all_s": { "p50": p50, "p99": p99, "max": max },
                "early": early,
            })
        );
    } else {
        println!(
            "{kills} kills, lease {LEASE:?}: all keys served elsewhere after {p50:.2} s (median), {p99:.2} s (p99), {max:.2} s at most; \
             the first of any after {first:.2} s; too early: {early}; not counted, as the lead changed: {others}"
        );
    }
    Ok(if early == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// For how long after a kill nobody served.
#[derive(Clone, Copy, Debug)]
struct Outage {
    /// Any of the keys.
    first: Duration,
    /// At least one of them.
    last: Duration,
}

/// What was found.
#[derive(Debug, Default)]
struct Found {
    outages: Vec<Outage>,
    /// Outages in which the lead changed, as it may where processors are busy: a new leader first waits for owners that it has
    /// not heard of, so these say nothing of a crash under a stable one.
    under_new_leader: Vec<Outage>,
}

async fn measure(args: &CrashArgs) -> anyhow::Result<Found> {
    let cluster = Cluster::start(&std::env::current_exe()?, 3).await?;
    let spec = JobSpec {
        consistency: Consistency::Exclusive,
        lease: LEASE,
        heartbeat: HEARTBEAT,
        balance_every: Duration::from_secs(1),
        // To the assigner these kills look like a key that kills.
        confine_after: 0,
        ..JobSpec::new("kv".parse()?)
    };
    cluster.apply(&(&spec).into(), START_WITHIN).await?;
    let mut tasks = [cluster.start_task("kv-0")?, cluster.start_task("kv-1")?];
    let mut found = Found::default();
    for kill in 0..args.kills {
        cluster.served("kv", tasks.len(), START_WITHIN).await?;
        let (mut callers, keys) = until_both_own(&tasks).await?;
        // The golden ratio spreads the moments evenly over the heartbeat, however many there are.
        sleep(HEARTBEAT.mul_f64(f64::from(kill) * 0.618_034 % 1.0)).await;
        let victim = usize::from(kill % 2);
        let other = &mut callers[1 - victim];
        for key in &keys[victim] {
            if other.is_served(key).await {
                bail!("{key} is served by both tasks");
            }
        }
        let leader = cluster.leader(START_WITHIN).await?;
        let killed = Instant::now();
        tasks[victim].process.kill();
        let outage = outage(other, keys[victim].clone(), killed).await?;
        eprintln!(
            "kill {}: {} keys served elsewhere after {:.2} s, the first after {:.2} s",
            kill + 1,
            keys[victim].len(),
            outage.last.as_secs_f64(),
            outage.first.as_secs_f64()
        );
        match cluster.leader(START_WITHIN).await? == leader {
            true => found.outages.push(outage),
            false => found.under_new_leader.push(outage),
        }
        let name = tasks[victim].name.clone();
        tasks[victim] = cluster.start_task(&name)?;
    }
    Ok(found)
}

/// Waits until each task serves some of the keys, and gives which.
async fn until_both_own(tasks: &[Task; 2]) -> anyhow::Result<([Caller; 2], [Vec<String>; 2])> {
    let mut callers = [Caller::new(tasks[0].address), Caller::new(tasks[1].address)];
    let deadline = Instant::now() + START_WITHIN;
    loop {
        let mut keys = [Vec::new(), Vec::new()];
        for key in (0..KEYS).map(|key| format!("key-{key}")) {
            for (caller, keys) in callers.iter_mut().zip(&mut keys) {
                if caller.is_served(&key).await {
                    keys.push(key.clone());
                }
            }
        }
        let all = keys.iter().map(Vec::len).sum::<usize>() == KEYS;
        if all && keys.iter().all(|keys| keys.len() >= KEYS_MIN) {
            return Ok((callers, keys));
        }
        if Instant::now() > deadline {
            bail!("a task was given nothing within {START_WITHIN:?}");
        }
        sleep(ASK_EVERY).await;
    }
}

/// Asks for the keys of a dead task at the other one until that has served each.
async fn outage(
    other: &mut Caller,
    mut keys: Vec<String>,
    killed: Instant,
) -> anyhow::Result<Outage> {
    let mut first = None;
    loop {
        let mut unserved = Vec::new();
        for key in keys {
            match other.is_served(&key).await {
                true => first = first.or_else(|| Some(killed.elapsed())),
                false => unserved.push(key),
            }
        }
        keys = unserved;
        if keys.is_empty() {
            let last = killed.elapsed();
            return Ok(Outage { first: first.unwrap_or(last), last });
        }
        if killed.elapsed() > START_WITHIN {
            bail!("{} keys are served by nobody {START_WITHIN:?} after the kill", keys.len());
        }
        sleep(ASK_EVERY).await;
    }
}

/// As short as the tests have it: the goal is a second beyond it, however long it is.
const LEASE: Duration = Duration::from_secs(2);
const HEARTBEAT: Duration = Duration::from_millis(500);
/// The soonest that a lease can be over: it was renewed a heartbeat before the kill, by a heartbeat that a busy machine may
/// have sent a tenth of a second late.
const EARLIEST: Duration = Duration::from_millis(1_400);
/// Keys that are asked for, all over the key space.
const KEYS: usize = 64;
/// So that it is seen when a part of the slices comes back later than the rest.
const KEYS_MIN: usize = 4;
/// How far a figure may be too high, beside the asking itself.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// How long a cluster, a move and a task may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(30);

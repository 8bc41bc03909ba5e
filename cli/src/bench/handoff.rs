//! `mandoline bench handoff`: for how long nobody serves a slice of an exclusive job while it moves, by the real path.
//!
//! A real cluster runs as child processes. An operator's pin moves a slice to and fro between two tasks: each is a planned
//! hand-off, with state. One caller asks for a key of the slice all the time, from before the pin on, and goes to the other
//! task as soon as one says no. A move's dark time is from the last answer of the old owner to the first of the new one, the
//! caller's own time included. Then both are asked for a while: the old owner must not answer again.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_proto::pb;
use serde_json::json;
use tokio::time::{Instant, timeout};

use crate::bench::plain::Caller;
use crate::bench::processes::Cluster;
use crate::bench::trial::{STOPPED, until_stopped};
use crate::failure::Failure;

/// Moves a slice of an exclusive job to and fro, and measures for how long nobody serves it
///
/// Starts three assigners and two tasks as processes of their own on loopback, with their data in a temporary directory; all
/// of them end with this command. Ends with 1 if two tasks ever answered for the key at once.
///
/// Example: mandoline bench handoff --moves 100 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct HandoffArgs {
    /// How often the slice moves
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    moves: u16,
    /// KiB of state that moves along
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(0..=65_536))]
    state_kib: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: HandoffArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    let Found { mut dark, both, asked } = found;
    dark.sort_unstable();
    let ms = |share: f64| {
        let at = ((dark.len() - 1) as f64 * share).round() as usize;
        dark[at].as_secs_f64() * 1e3
    };
    let (p50, p99, max) = (ms(0.5), ms(0.99), ms(1.0));
    if args.json {
        let dark_ms = json!({ "p50": p50, "p99": p99, "max": max });
        println!(
            "{}",
            json!({ "moves": dark.len(), "both": both, "asked": asked, "dark_ms": dark_ms })
        );
    } else {
        println!(
            "{} moves: nobody served for {p50:.1} ms (median), {p99:.1} ms (p99), {max:.1} ms at most; two at once: {both}",
            dark.len()
        );
    }
    Ok(if both == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

struct Found {
    dark: Vec<Duration>,
    /// Answers of an old owner to requests that were sent after a new one had answered.
    both: u64,
    asked: u64,
}

async fn measure(args: &HandoffArgs) -> anyhow::Result<Found> {
    let cluster = Cluster::start(&std::env::current_exe()?, 3).await?;
    let spec = JobSpec {
        consistency: Consistency::Exclusive,
        balance_every: Duration::from_millis(100),
        ..JobSpec::new("kv".parse()?)
    };
    cluster.apply(&(&spec).into(), START_WITHIN).await?;
    let tasks = [cluster.start_task("kv-0")?, cluster.start_task("kv-1")?];
    cluster.served("kv", tasks.len(), START_WITHIN).await?;
    // Keys of one slice, narrower than any other: one that is asked for, and those that hold the state.
    let block = SliceKey::of(b"key-0").0 & !(WIDTH - 1);
    let slice = Slice::new(SliceKey(block), SliceKey(block + (WIDTH - 1))).context("a slice")?;
    let mut keys = (0..)
        .map(|n| format!("key-{n}"))
        .filter(|key| slice.contains(SliceKey::of(key.as_bytes())));
    let key = keys.next().context("a key")?;
    let state: Vec<String> = keys.take(args.state_kib.div_ceil(VALUE_KIB) as usize).collect();
    let mut callers = [Caller::new(tasks[0].address), Caller::new(tasks[1].address)];
    let leader = cluster.leader(START_WITHIN).await?;
    let mut found = Found { dark: Vec::new(), both: 0, asked: 0 };
    let mut owner = 0;
    pin(&cluster, leader.index, slice, &tasks[owner].name).await?;
    until_served(&mut callers[owner], &key).await?;
    let mut left = args.state_kib;
    for large in &state {
        let value = vec![b'x'; left.min(VALUE_KIB) as usize * 1_024];
        let put = callers[owner].ask("PUT", large, &value).await?;
        if put.status != 204 {
            bail!("the state was not taken: {put:?}");
        }
        left -= left.min(VALUE_KIB);
    }
    for nth in 0..args.moves {
        let next = 1 - owner;
        let pinned = pin(&cluster, leader.index, slice, &tasks[next].name);
        let moved = watch(&mut callers, owner, &key, &mut found);
        let both = async { tokio::try_join!(pinned, moved) };
        timeout(START_WITHIN, both)
            .await
            .with_context(|| format!("move {nth} did not end within {START_WITHIN:?}"))??;
        for _ in 0..ASK_AGAIN {
            found.both += u64::from(callers[owner].ask("GET", &key, &[]).await?.is_served());
            if !callers[next].ask("GET", &key, &[]).await?.is_served() {
                bail!("move {nth}: the new owner serves no longer");
            }
            found.asked += 2;
        }
        owner = next;
        for large in &state {
            let got = callers[owner].ask("GET", large, &[]).await?;
            if got.status != 200 {
                bail!("move {nth} lost a part of the state: {got:?}");
            }
        }
        if (nth + 1) % 50 == 0 {
            eprintln!("{} of {} moves", nth + 1, args.moves);
        }
    }
    Ok(found)
}

/// Asks for the key until the other task serves it, and notes for how long nobody did.
async fn watch(
    callers: &mut [Caller; 2],
    owner: usize,
    key: &str,
    found: &mut Found,
) -> anyhow::Result<()> {
    let (mut last, mut at) = (None, owner);
    loop {
        found.asked += 1;
        let served = callers[at].ask("GET", key, &[]).await?.is_served();
        match (served, at == owner) {
            (true, true) => last = Some(Instant::now()),
            (true, false) => break,
            // Whoever says no sends its caller on.
            (false, _) => at = 1 - at,
        }
    }
    let last = last.context("the old owner never served the key")?;
    found.dark.push(last.elapsed());
    Ok(())
}

async fn pin(cluster: &Cluster, leader: usize, slice: Slice, task: &str) -> anyhow::Result<()> {
    let request = pb::PinSliceRequest {
        job: "kv".to_owned(),
        slice: Some(slice.into()),
        task: task.to_owned(),
    };
    cluster.admin(leader).pin_slice(request).await.context("the pin was refused")?;
    Ok(())
}

async fn until_served(caller: &mut Caller, key: &str) -> anyhow::Result<()> {
    let served = async {
        while !caller.ask("GET", key, &[]).await?.is_served() {}
        anyhow::Ok(())
    };
    timeout(START_WITHIN, served).await.context("nobody serves the key")?
}

/// How many keys the slice has: one in 4,096.
const WIDTH: u64 = 1 << 52;

/// The state lies in values of this size, as that of a service does, rather than in one.
const VALUE_KIB: u32 = 64;
/// How often both are asked after a move: for some 20 ms, many times what an assignment takes to spread.
const ASK_AGAIN: u32 = 50;

/// How long a cluster, a pin and a move may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(30);

//! What is simulated happens: one trace through `mandoline dev`, in real time over sockets, and through the simulator, on a
//! virtual clock, come to the same imbalance and the same churn.
//!
//! Both begin with the same layout: how tasks that join at the same moment are served first depends on which registration
//! comes first, and that is not what is compared. What is left is chance: the simulator cannot know at which moment of its
//! round the real leader was when the load began, so it plays several, and the mean of them is what it says.
//!
//! A task joins and one drains before balance is measured: what that moves is much, beside what chance moves. And the trace
//! has no key with more than one request in three hundred: with `nasa_http`, whose hottest has one in fourteen, it depends on the
//! phase of a round whether that key moves at the start, and single runs differ by a quarter.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::JobSpec;
use mandoline_core::task::SessionId;
use mandoline_sim::event::Event;
use mandoline_sim::rehearsal::{Rehearsal, Rehearsed};
use mandoline_sim::replay::Replay;
use serde_json::Value;

use crate::callers::my_turn_blocking;
use crate::kit::{Process, json, until};

const TASKS: usize = 5;
const RATE: f64 = 500.0;
/// Real runs at the same time. The one of three counts that moved least: on a busy machine a heartbeat comes late now and then, which moves
/// more than the simulator would, and nothing makes a run move less.
const RUNS: usize = 3;
/// A task joins and one drains, both before anything of balance is measured: with what the start moves that is churn enough for
/// chance to be small beside it.
const JOIN_AT: Duration = Duration::from_secs(8);
const DRAIN_AT: Duration = Duration::from_secs(14);
const LENGTH: Duration = Duration::from_secs(40);

#[test]
fn a_trace_does_to_the_simulator_what_it_does_to_the_real_thing() {
    let Some(path) = trace("arc_oltp_pages.tsv.zst") else { return };
    let _turn = my_turn_blocking();
    let runs: Vec<(Value, Start)> = thread::scope(|scope| {
        let runs: Vec<_> = (0..RUNS).map(|_| scope.spawn(|| real(&path))).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    // As many as are sent, and some more: a rate is not kept to the request.
    let sent = (RATE * LENGTH.as_secs_f64() * 1.2) as usize;
    let events: Vec<Event> =
        Replay::open(&path, None).unwrap().take(sent).map(Result::unwrap).collect();
    let simulated: Vec<Rehearsed> =
        runs.iter().flat_map(|(_, start)| simulated(&events, start)).collect();
    let churn = |(sums, _): &&(Value, Start)| sums["load_churn"].as_f64().unwrap();
    let calmest = runs.iter().min_by(|a, b| churn(a).total_cmp(&churn(b))).unwrap();
    let of_real = |figure: &str| calmest.0[figure].as_f64().unwrap();
    for (what, real, simulated) in [
        ("imbalance", of_real("imbalance_p50"), mean(simulated.iter().map(|s| s.imbalance_p50))),
        ("load churn", of_real("load_churn"), mean(simulated.iter().map(|s| s.load_churn))),
    ] {
        println!("{what}: real {real:.3}, simulated {simulated:.3}");
        let apart = (real - simulated).abs() / real;
        assert!(apart <= 0.1, "{what}: real {real:.3}, simulated {simulated:.3}");
    }
}

/// How a real run began.
struct Start {
    layout: SliceMap<SessionId>,
    /// Who drains: the task that `dev` started first.
    leaves: SessionId,
}

/// Plays the trace with the real run's layout, at each of several moments of the round.
fn simulated(events: &[Event], Start { layout, leaves }: &Start) -> Vec<Rehearsed> {
    let spec = JobSpec {
        report_every: Duration::from_millis(500),
        balance_every: Duration::from_secs(1),
        ..JobSpec::new("kv".parse().unwrap())
    };
    let play = |idle, lag| {
        let rehearsal = Rehearsal {
            spec: spec.clone(),
            tasks: TASKS,
            layout: Some(layout.clone()),
            lag: Duration::from_millis(lag),
            idle: Duration::from_millis(idle),
            join_at: Some(JOIN_AT),
            drain_at: Some((DRAIN_AT, *leaves)),
            rate: RATE,
            length: LENGTH,
        };
        rehearsal.play(events)
    };
    let idles = (1_000..2_000).step_by(200);
    let phases = idles.flat_map(|idle| [50, 150, 250, 350, 450].map(|lag| (idle, lag)));
    phases.map(|(idle, lag)| play(idle, lag)).collect()
}

fn mean(figures: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = figures.len() as f64;
    figures.sum::<f64>() / count
}

/// Has the real thing serve the trace, and gives its sums and the layout that it began with.
fn real(path: &Path) -> (Value, Start) {
    let (tasks, rate) = (TASKS.to_string(), RATE.to_string());
    let length = format!("{}s", LENGTH.as_secs());
    let mut dev = Process::start(&[
        "dev",
        "--json",
        "--port-base",
        "0",
        "--assigners",
        "1",
        "--tasks",
        &tasks,
        "--replay",
        path.to_str().unwrap(),
        "--rate",
        &rate,
        "--for",
        &length,
        "--add-task-at",
        &format!("{}s", JOIN_AT.as_secs()),
        "--drain-task-at",
        &format!("{}s", DRAIN_AT.as_secs()),
    ]);
    let node = dev.line("assigners ").split_whitespace().next().unwrap().to_owned();
    // On a busy machine the last of them may join a moment later.
    let shown = until("every task to have slices", || {
        let shown = json(&["assignment", "show", "kv", "-o", "json", "--assigners", &node]);
        let slices = shown["slices"].as_array().unwrap();
        let tasks = slices.iter().filter_map(|slice| slice["replicas"][0]["task"].as_str());
        (tasks.collect::<BTreeSet<_>>().len() == TASKS).then_some(shown)
    });
    let slices = shown["slices"].as_array().unwrap();
    let run = |slice: &Value| {
        assert_eq!(slice["load"], 0.0, "the load began before the layout was asked for");
        let first = slice["slice"].as_str().unwrap().split_once("..").unwrap().0;
        let session = slice["replicas"][0]["session"].as_u64().unwrap();
        (SliceKey(u64::from_str_radix(first, 16).unwrap()), SessionId(session))
    };
    let layout = SliceMap::from_runs(slices.iter().map(run).collect()).unwrap();
    let replicas = slices.iter().map(|slice| &slice["replicas"][0]);
    let leaves = replicas.into_iter().find(|replica| replica["task"] == "kv-0").unwrap();
    let leaves = SessionId(leaves["session"].as_u64().unwrap());
    assert_eq!(dev.ended(), Some(0), "{}", dev.stderr());
    let out = dev.stdout();
    let sums: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    println!("{sums}");
    (sums, Start { layout, leaves })
}

fn trace(name: &str) -> Option<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = std::env::var("MANDOLINE_TRACES").unwrap_or_else(|_| "../shared/data".to_owned());
    let path = workspace.join(folder).join(name);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("MANDOLINE_REQUIRE_ALL").as_deref() == Ok("1");
    assert!(!required, "{} is missing", path.display());
    println!("skipped: {} not found", path.display());
    None
}

//! A disk that loses power, fills up or fails under writes: what was acknowledged is there afterwards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_core::command::Command;
use mandoline_core::generation::Generation;
use mandoline_core::name::TaskName;
use mandoline_core::prng::Prng;
use mandoline_core::state::{Outcome, State};
use mandoline_core::task::{SessionId, TaskInfo};
use tokio_util::sync::CancellationToken;

use super::kit::{PATIENCE, apply, job, version};
use crate::raft::config::{Config, FirstStart, Snapshots, Timings, Transport};
use crate::raft::disk::{DiskError, Storage};
use crate::raft::faulty::{Faults, Media};
use crate::raft::start::StartError;
use crate::raft::types::Member;
use crate::raft::{Consensus, Failure, ProposeError, Role};

/// As many as the issue asks for.
const CUTS: u64 = 500;
/// Alone, a node is elected at once; this is how long it waits for others first.
const HASTY: Timings = Timings {
    heartbeat: Duration::from_millis(4),
    election_min: Duration::from_millis(8),
    election_max: Duration::from_millis(16),
    propose: Duration::from_secs(10),
};

/// What a node has acknowledged, over all its lives.
#[derive(Clone, Debug, Default)]
struct Acknowledged {
    versions: BTreeMap<&'static str, u64>,
    session: Option<SessionId>,
    generation: Option<Generation>,
}

/// So that snapshots and purges happen between most cuts.
const OFTEN: Snapshots = Snapshots { every: 20, keep: 5, bytes: u64::MAX };
/// So that the log grows until the disk is full.
const NEVER: Snapshots = Snapshots { every: 1_000_000, keep: 0, bytes: u64::MAX };

async fn start(
    media: &Media,
    faults: Faults,
    snapshots: Snapshots,
) -> Result<Consensus, StartError> {
    let config = Config {
        storage: Storage::Backend("media".to_owned(), Box::new(media.plug(faults))),
        member: Member { client: "client:1".to_owned(), peer: "peer:1".to_owned() },
        first: FirstStart::Alone,
        timings: HASTY,
        snapshots,
        transport: Transport::plain(),
    };
    Consensus::start(config, Box::new(|_| ()), CancellationToken::new()).await
}

/// Writes until the node fails; counts what was acknowledged.
async fn write(node: &Consensus, acknowledged: &Arc<Mutex<Acknowledged>>, life: u64) {
    let jobs = ["a", "b", "c"].map(|name| {
        let (node, acknowledged) = (node.clone(), acknowledged.clone());
        async move {
            while let Some(applied) = propose(&node, apply(name)).await {
                acknowledged.lock().unwrap().versions.insert(name, version(&applied));
            }
        }
    });
    let tasks = async {
        for incarnation in 0.. {
            let stopped = acknowledged.lock().unwrap().session;
            let name = TaskName::new("t").unwrap();
            let info = TaskInfo::new(name, life << 32 | incarnation, "t:1".parse().unwrap());
            let register = Command::Register { job: job("a"), info, stopped };
            let Some(applied) = propose(node, register).await else {
                return;
            };
            let (Some(delta), Outcome::Session(session)) = (applied.delta, applied.outcome) else {
                panic!("a new process registers")
            };
            let mut acknowledged = acknowledged.lock().unwrap();
            assert!(acknowledged.generation < Some(delta.to), "a generation only grows");
            acknowledged.session = Some(session);
            acknowledged.generation = Some(delta.to);
        }
    };
    let first = propose(node, apply("a")).await;
    if first.is_some() {
        let writing = Box::pin(async { tokio::join!(tasks, futures_util::future::join_all(jobs)) });
        tokio::time::timeout(PATIENCE, writing).await.expect("waited for the disk to fail");
    }
}

async fn propose(node: &Consensus, command: Command) -> Option<mandoline_core::state::Applied> {
    loop {
        match node.propose(command.clone()).await {
            Ok(applied) => return Some(applied),
            // The session that was to be replaced may have been, by a command whose answer was lost.
            Err(ProposeError::Refused(_)) => {
                let state = node.state();
                let Command::Register { job, info, .. } = &command else {
                    panic!("refused {command}")
                };
                let task =
                    state.jobs[job].assignment.tasks.values().next().expect("it is in the way");
                let retry = Command::Register {
                    job: job.clone(),
                    info: info.clone(),
                    stopped: Some(task.session),
                };
                return Box::pin(propose(node, retry)).await;
            }
            Err(ProposeError::NotLeader { leader: None }) => {}
            Err(ProposeError::Stopped | ProposeError::Unknown) => return None,
            Err(error) => panic!("{error}"),
        }
    }
}

fn check(state: &State, acknowledged: &Acknowledged, what: &str) {
    for (name, version) in &acknowledged.versions {
        let found = state.jobs.get(&job(name)).map_or(0, |job| job.version);
        assert!(found >= *version, "{what}: {name} is at {found}, and {version} was acknowledged");
    }
    let Some(generation) = acknowledged.generation else {
        return;
    };
    let found = state.jobs[&job("a")].assignment.generation;
    assert!(found >= generation, "{what}: generation {found}, and {generation} was acknowledged");
    assert!(
        Some(SessionId(state.last_session)) >= acknowledged.session,
        "{what}: a session would be minted twice"
    );
}

async fn leads(node: &Consensus) -> bool {
    let mut role = node.role();
    let leads = role.wait_for(|role| matches!(role, Role::Leader { .. }));
    tokio::select! {
        led = tokio::time::timeout(PATIENCE, leads) => led.expect("waited for the node to lead").is_ok(),
        _ = node.failed() => false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_500_power_cuts_everything_acknowledged_is_there() {
    let seed = 0x6d61_6e64_6f6c_696e;
    let mut prng = Prng::new(seed);
    let media = Media::default();
    let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));
    let (mut lives, mut commands) = (0, 0);
    for cut in 0..CUTS {
        let what = format!("cut {cut} of seed {seed:#x}");
        let cut_at = Some(1 + prng.below(300));
        match start(&media, Faults { cut_at, ..Faults::default() }, OFTEN).await {
            Ok(node) => {
                if leads(&node).await {
                    check(&node.state(), &acknowledged.lock().unwrap(), &what);
                    lives += 1;
                    write(&node, &acknowledged, cut).await;
                }
                let failure = tokio::time::timeout(PATIENCE, node.failed())
                    .await
                    .expect("waited for a failure");
                assert!(
                    matches!(failure, Failure::Disk(_) | Failure::Start(_)),
                    "{what}: {failure}"
                );
                node.stop().await;
                // What it had applied was on disk: a node alone is a quorum.
                let state = node.state();
                commands = commands.max(state.jobs.values().map(|job| job.version).sum());
            }
            Err(
                StartError::Disk(DiskError::Io { .. }) | StartError::Raft(_) | StartError::Io(_),
            ) => {}
            // The file was never finished. In a directory it would not have its name yet.
            Err(StartError::Disk(DiskError::Damaged { .. })) if lives == 0 => {
                media.overwrite(Vec::new());
            }
            Err(error) => panic!("{what}: {error}"),
        }
        assert!(lives == 0 || media.is_off(), "{what}: the power is still there");
        media.cut(&mut prng);
    }
    let node = start(&media, Faults::default(), OFTEN).await.unwrap();
    assert!(leads(&node).await);
    check(&node.state(), &acknowledged.lock().unwrap(), "the end");
    node.stop().await;
    println!("{lives} of {CUTS} lives led, {commands} commands");
    assert!(
        lives > CUTS / 2,
        "{lives} of {CUTS} lives led: the cuts come too early to show anything"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_at_any_call_stops_the_node_and_loses_nothing() {
    let mut prng = Prng::new(7);
    for fail_at in (1..60).chain([100, 200, 400]) {
        let media = Media::default();
        let acknowledged = Arc::default();
        let faults = Faults { fail_at: Some(fail_at), ..Faults::default() };
        Box::pin(fails(&media, faults, OFTEN, &acknowledged)).await;
        // And the machine may die right after.
        media.cut(&mut prng);
        comes_back(&media, &acknowledged).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_the_node_and_loses_nothing() {
    for capacity in [0, 100_000, 2_000_000] {
        let media = Media::default();
        let acknowledged = Arc::default();
        let faults = Faults { capacity: Some(capacity), ..Faults::default() };
        Box::pin(fails(&media, faults, NEVER, &acknowledged)).await;
        comes_back(&media, &acknowledged).await;
    }
}

/// Starts a node whose disk will fail, and writes until it does.
async fn fails(
    media: &Media,
    faults: Faults,
    snapshots: Snapshots,
    acknowledged: &Arc<Mutex<Acknowledged>>,
) {
    let node = match start(media, faults, snapshots).await {
        Ok(node) => node,
        Err(StartError::Disk(DiskError::Io { .. }) | StartError::Raft(_) | StartError::Io(_)) => {
            return;
        }
        Err(error) => panic!("{faults:?}: {error}"),
    };
    if leads(&node).await {
        write(&node, acknowledged, 1).await;
    }
    let failure =
        tokio::time::timeout(PATIENCE, node.failed()).await.expect("waited for a failure");
    assert!(matches!(failure, Failure::Disk(_) | Failure::Start(_)), "{faults:?}: {failure}");
    let refused = node.propose(apply("a")).await;
    assert_eq!(refused, Err(ProposeError::Stopped), "{faults:?}");
    node.stop().await;
}

/// Starts the node on the disk, which is well again.
async fn comes_back(media: &Media, acknowledged: &Mutex<Acknowledged>) {
    let node = match start(media, Faults::default(), OFTEN).await {
        Ok(node) => node,
        // The file was never finished. In a directory it would not have its name yet.
        Err(StartError::Disk(DiskError::Damaged { .. }))
            if acknowledged.lock().unwrap().versions.is_empty() =>
        {
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert!(leads(&node).await);
    check(&node.state(), &acknowledged.lock().unwrap(), "after the disk was well again");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_lies_about_its_syncs_is_found_out_by_these_tests() {
    let mut prng = Prng::new(5);
    for cut in 0..50 {
        let media = Media::default();
        let node = start(&media, Faults::default(), OFTEN).await.unwrap();
        assert!(leads(&node).await);
        let before = version(&node.propose(apply("a")).await.unwrap());
        node.stop().await;
        let faults = Faults { cut_at: Some(50), lies: true, ..Faults::default() };
        let node = start(&media, faults, OFTEN).await.unwrap();
        let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));
        if leads(&node).await {
            write(&node, &acknowledged, cut).await;
        }
        node.stop().await;
        media.cut(&mut prng);
        let acknowledged =
            acknowledged.lock().unwrap().versions.get("a").copied().unwrap_or(before);
        let Ok(node) = start(&media, Faults::default(), OFTEN).await else {
            return;
        };
        assert!(leads(&node).await);
        let found = node.state().jobs.get(&job("a")).map_or(0, |job| job.version);
        node.stop().await;
        if found < acknowledged {
            return;
        }
    }
    panic!("50 cuts of a disk that lies, and nothing was missed");
}

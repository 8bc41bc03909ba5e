//! Owners as processes: one that crashes keeps its keys until its lease is over, one that slept does not answer for what is no
//! longer its own, and values move with their keys.

use std::net::SocketAddr;
use std::time::Duration;

use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_proto::pb;
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::{Instant, timeout};

use crate::callers::{PATIENCE, ask, my_turn, program};
use crate::kit::{run, text};
use crate::processes::{Cluster, ProxyKnows, Task};

const LEASE: Duration = Duration::from_secs(2);
const HEARTBEAT: Duration = Duration::from_millis(500);
const KEYS: usize = 60;

fn job(consistency: Consistency) -> pb::JobSpec {
    pb::JobSpec::from(&JobSpec {
        consistency,
        lease: LEASE,
        heartbeat: HEARTBEAT,
        balance_every: Duration::from_secs(3_600),
        ..JobSpec::new("kv".parse().unwrap())
    })
}

async fn two_tasks(spec: &pb::JobSpec) -> (Cluster, Task, Task) {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(spec, PATIENCE).await.unwrap();
    let one = cluster.start_task("kv-0").unwrap();
    let two = cluster.start_task("kv-1").unwrap();
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    (cluster, one, two)
}

/// Whether a task answers for a key itself. A task that sleeps or is gone does not.
async fn serves(task: SocketAddr, key: usize) -> bool {
    let mut connection = None;
    let asked = ask(&mut connection, task, "GET", key);
    let answer = timeout(Duration::from_secs(1), asked).await;
    matches!(answer, Ok(Ok(answer)) if matches!(answer.status, 200 | 404))
}

/// A key that `owner` serves, once it serves any.
async fn key_of(owner: &Task) -> usize {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for key in 0..KEYS {
            if serves(owner.address, key).await {
                return key;
            }
        }
        assert!(Instant::now() < deadline, "{} serves nothing", owner.name);
    }
}

/// How long it takes until a task serves a key.
async fn until_served(task: &Task, key: usize, since: Instant) -> Duration {
    while !serves(task.address, key).await {
        assert!(since.elapsed() < PATIENCE, "{} never serves it", task.name);
    }
    since.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_owner_keeps_its_keys_until_its_lease_is_over() {
    let _turn = my_turn().await;
    let (_cluster, mut owner, other) = two_tasks(&job(Consistency::Exclusive)).await;
    let key = key_of(&owner).await;
    assert!(!serves(other.address, key).await, "it has one owner");
    let killed = Instant::now();
    owner.process.kill();
    let took = until_served(&other, key, killed).await;
    println!("a crashed owner's key was served elsewhere after {:.2} s", took.as_secs_f64());
    // It was renewed at most a heartbeat before it died, and one per cent of the lease is the margin.
    assert!(took >= LEASE - HEARTBEAT - LEASE / 50, "{took:?}");
    assert!(took <= LEASE + Duration::from_secs(3), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_slept_answers_for_nothing_that_went_meanwhile() {
    let _turn = my_turn().await;
    let (_cluster, owner, other) = two_tasks(&job(Consistency::Exclusive)).await;
    let key = key_of(&owner).await;
    owner.process.signal(Signal::STOP).unwrap();
    until_served(&other, key, Instant::now()).await;
    // Asked while it sleeps, it answers when it wakes.
    let asked = tokio::spawn(async move { ask(&mut None, owner.address, "GET", key).await });
    tokio::task::yield_now().await;
    owner.process.signal(Signal::CONT).unwrap();
    let answer = timeout(PATIENCE, asked).await.unwrap().unwrap().unwrap();
    assert!(matches!(answer.status, 421 | 503), "{answer:?}");
    for _ in 0..20 {
        assert!(!serves(owner.address, key).await, "it has one owner");
    }
    assert!(serves(other.address, key).await);
}

/// The job, and the slices of one of its tasks, once it has some and nothing is on its way.
async fn slices_of(cluster: &Cluster, task: &str) -> (pb::JobStatus, Vec<String>) {
    let assigner = cluster.nodes[0].client.to_string();
    let args = ["assignment", "show", "kv", "--task", task, "-o", "json"];
    let look = async |cluster: &Cluster| {
        let job = cluster.served("kv", 2, PATIENCE).await.ok()?;
        let output = run(&[&args[..], &["--assigners", &assigner]].concat());
        let page: Value = serde_json::from_slice(&output.stdout).ok()?;
        let slices = page["slices"].as_array()?;
        let stays = !slices.is_empty() && slices.iter().all(|slice| slice["transit"].is_null());
        stays.then(|| (job, slices.iter().map(|slice| slice["slice"].to_string()).collect()))
    };
    cluster.until("nothing to be on its way", PATIENCE, look).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_was_killed_has_its_slices_back_within_its_grace() {
    let _turn = my_turn().await;
    for consistency in [Consistency::Exclusive, Consistency::Affinity] {
        let grace_ms = Some(60_000);
        let spec = pb::JobSpec { grace_ms, ..job(consistency) };
        let (cluster, mut crashes, other) = two_tasks(&spec).await;
        let (before, had) = slices_of(&cluster, &crashes.name).await;
        let key = key_of(&crashes).await;
        crashes.process.kill();
        let unserved = async |cluster: &Cluster| {
            let jobs = cluster.status(0).await.ok()?.jobs;
            (jobs[0].tasks.len() == 1).then(|| jobs[0].unserved)
        };
        let waits = cluster.until("it to be found lost", PATIENCE, unserved).await.unwrap();
        assert_eq!(waits as usize, had.len(), "they wait for it");
        assert!(!serves(other.address, key).await);
        let back = cluster.start_task(&crashes.name).unwrap();
        until_served(&back, key, Instant::now()).await;
        let (after, has) = slices_of(&cluster, &back.name).await;
        let moves = |job: pb::JobStatus| job.churn.unwrap_or_default().moves;
        assert_eq!((has, moves(after)), (had, moves(before)), "as if it had never gone");
    }
}

/// How many of the values that were written are there after each task was restarted, one after another.
async fn values_left(consistency: Consistency) -> usize {
    const TASKS: usize = 3;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&job(consistency), PATIENCE).await.unwrap();
    let mut tasks = vec![cluster.start_task("kv-0").unwrap()];
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
    let mut connection = None;
    for key in 0..KEYS {
        let answer = ask(&mut connection, proxy.address, "PUT", key).await.unwrap();
        assert_eq!(answer.status, 204, "{answer:?}");
    }
    // Nothing is on its way while they are written: an affinity job may lose what is written then.
    tasks.extend((1..TASKS).map(|index| cluster.start_task(&format!("kv-{index}")).unwrap()));
    cluster.served("kv", TASKS, PATIENCE).await.unwrap();
    for task in &mut tasks {
        task.process.terminate().unwrap();
        let ended = task.process.wait_ended(PATIENCE).await.unwrap();
        assert!(ended.success(), "{ended}: {}", task.process.log_tail());
        *task = cluster.start_task(&task.name).unwrap();
        cluster.served("kv", TASKS, PATIENCE).await.unwrap();
    }
    let mut left = 0;
    for key in 0..KEYS {
        let answer = ask(&mut connection, proxy.address, "GET", key).await.unwrap();
        left += usize::from(answer.status == 200);
    }
    left
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_survive_a_rolling_restart() {
    let _turn = my_turn().await;
    assert_eq!(values_left(Consistency::Exclusive).await, KEYS);
    assert_eq!(values_left(Consistency::Affinity).await, KEYS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slice_that_moves_to_and_fro_has_one_owner_and_its_state() {
    let _turn = my_turn().await;
    let bench = tokio::process::Command::new(program())
        .args(["bench", "handoff", "--moves", "5", "--json"])
        .kill_on_drop(true)
        .output();
    let output = timeout(PATIENCE * 2, bench).await.expect("the bench ends in time").unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    println!("{out}{err}");
    assert!(output.status.success(), "{out}{err}");
    let found: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&found["moves"], &found["both"]), (&5.into(), &0.into()), "{out}{err}");
}

//! Real tasks restarted one after another under load, each when the gate says that it may: nothing fails, and little more
//! moves than has to.

use std::time::Duration;

use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_proto::pb;
use serde_json::Value;
use tokio::time::Instant;

use crate::callers::{Callers, PATIENCE, assert_none, my_turn, program};
use crate::kit;
use crate::processes::{Cluster, ProxyKnows, Task};

const TASKS: usize = 6;
/// Keys that are asked for: enough that counting them is not all chance.
const KEYS: usize = 240;
/// What must move: each slice once, those of the first task twice, for nobody has restarted yet to whom they could go for
/// good, and what the last one is filled with. Six tasks feel the latter two; of twenty they are a tenth.
const MUST: f64 = (TASKS + 2) as f64 / TASKS as f64;
/// What may move beside that.
const MORE: f64 = 1.1;

/// A job that is balanced often, so that what moves between two restarts shows.
fn job() -> JobSpec {
    JobSpec {
        heartbeat: Duration::from_millis(500),
        report_every: Duration::from_millis(500),
        balance_every: Duration::from_secs(2),
        ..JobSpec::new("kv".parse().unwrap())
    }
}

/// What the gate says by HTTP.
fn gate(cluster: &Cluster, task: &str) -> (u16, Value) {
    let path = format!("/api/jobs/kv/tasks/{task}/may-restart");
    let answer = kit::ask(cluster.nodes[0].client, "GET", &path, "").expect("the node answers");
    (answer.status, serde_json::from_str(&answer.body).expect("it answers in JSON"))
}

/// What the gate says by the command line.
fn command(cluster: &Cluster, task: &str) -> (Option<i32>, String) {
    let assigner = cluster.nodes[0].client.to_string();
    let args = ["task", "may-restart", task, "--job", "kv", "--assigners", &assigner];
    let output = kit::run(&args);
    (output.status.code(), kit::text(&output.stdout) + &kit::text(&output.stderr))
}

/// Restarts every task once, and gives how much of all load moved.
async fn restarted(spec: &JobSpec) -> f64 {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&pb::JobSpec::from(spec), PATIENCE).await.unwrap();
    let mut tasks: Vec<Task> =
        (0..TASKS).map(|index| cluster.start_task(&format!("kv-{index}")).unwrap()).collect();
    cluster.served("kv", TASKS, PATIENCE).await.unwrap();
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
    let callers = Callers::start(proxy.address, KEYS);
    let job = until_all_carry(&cluster, "all to carry something").await;
    let before = job.churn.unwrap_or_default().load;
    let began = Instant::now();
    for (index, task) in tasks.iter_mut().enumerate() {
        let name = task.name.clone();
        let look = async |cluster: &Cluster| (gate(cluster, &name).0 == 200).then_some(());
        cluster.until("the gate to let the next one go", PATIENCE, look).await.unwrap();
        if index == 0 {
            at_the_gate(&cluster);
        }
        task.process.terminate().unwrap();
        let ended = task.process.wait_ended(PATIENCE).await.unwrap();
        assert!(ended.success(), "{ended}: {}", task.process.log_tail());
        *task = cluster.start_task(&name).unwrap();
        cluster.served("kv", TASKS, PATIENCE).await.unwrap();
    }
    let took = began.elapsed();
    let job = until_all_carry(&cluster, "the last one to be filled").await;
    let moved = (job.churn.unwrap_or_default().load - before) as f64 / 1e6;
    let outcomes = callers.stop().await;
    println!(
        "{TASKS} tasks restarted within {:.1} s: {} requests, {moved:.2} of all load moved, {:.2} of what had to",
        took.as_secs_f64(),
        outcomes.len(),
        moved / MUST
    );
    assert_none("requests failed", outcomes.iter().filter(|outcome| !outcome.is_good()));
    moved
}

/// One was told yes a moment ago; nobody else is.
fn at_the_gate(cluster: &Cluster) {
    assert_eq!(gate(cluster, "kv-0").0, 200, "it may ask again");
    let (status, page) = gate(cluster, "kv-1");
    assert_eq!((status, &page["may_restart"]), (409, &Value::Bool(false)), "{page}");
    assert!(page["reason"].as_str().is_some_and(|why| why.contains("kv-0 was told")), "{page}");
    let (code, text) = command(cluster, "kv-1");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("kv-1 may not restart now: 1 may be unavailable at once"), "{text}");
    assert_eq!(command(cluster, "kv-0").0, Some(0));
    let (code, text) = command(cluster, "kv-9");
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("no task kv-9"), "{text}");
    assert_eq!(gate(cluster, "kv-9").0, 404);
    assert_eq!(gate(cluster, "k%20v").0, 400);
}

/// Waits until each task carries something: an eighth of its part. So few requests are a noisy load, which is evened out slowly.
async fn until_all_carry(cluster: &Cluster, what: &str) -> pb::JobStatus {
    let look = async |cluster: &Cluster| {
        let job = cluster.served("kv", TASKS, PATIENCE).await.ok()?;
        let all: u64 = job.tasks.iter().map(|task| task.load).sum();
        let carries = |task: &pb::TaskStatus| task.load * TASKS as u64 * 8 > all;
        (all > 0 && job.tasks.iter().all(carries)).then_some(job)
    };
    cluster.until(what, PATIENCE, look).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_task_does_not_wait_for_nobody() {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&pb::JobSpec::from(&job()), PATIENCE).await.unwrap();
    let mut task = cluster.start_task("kv-0").unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let told = Instant::now();
    task.process.terminate().unwrap();
    let ended = task.process.wait_ended(PATIENCE).await.unwrap();
    let took = told.elapsed();
    assert!(ended.success(), "{ended}: {}", task.process.log_tail());
    let said = task.process.log_tail();
    assert!(said.contains("slices that nobody took over"), "{said}");
    // Its grace is 25 s.
    assert!(took < Duration::from_secs(10), "it took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_restart_one_after_another_and_nothing_fails() {
    let _turn = my_turn().await;
    let moved = restarted(&job()).await;
    assert!(moved <= MORE * MUST, "{moved:.2} of all load moved, where {MUST:.2} had to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_restart_one_after_another_and_nothing_fails() {
    let _turn = my_turn().await;
    let spec = JobSpec { consistency: Consistency::Exclusive, ..job() };
    let moved = restarted(&spec).await;
    assert!(moved <= MORE * MUST, "{moved:.2} of all load moved, where {MUST:.2} had to");
}

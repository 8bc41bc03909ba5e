//! A task dies, or leaves in good order: who else notices, and for how long.

use std::time::Duration;

use mandoline::clerk::Clerk;
use tokio::time::Instant;

use crate::callers::{Callers, PATIENCE, assert_none, at_rest, bytes_of, kv, my_turn, program};
use crate::processes::{Cluster, Proxy, ProxyKnows, Task};

/// Keys that are asked for: each caller comes round once a second.
const KEYS: usize = 240;
/// What is claimed, with a heartbeat of 1 s. It takes about one second.
const ANSWERED_WITHIN: Duration = Duration::from_secs(3);
/// A refusal that takes longer is a hang.
const REFUSED_WITHIN: Duration = Duration::from_secs(3);

struct Town {
    callers: Callers,
    clerk: Clerk,
    _proxy: Proxy,
    tasks: Vec<Task>,
    cluster: Cluster,
}

impl Town {
    async fn start() -> Self {
        let cluster = Cluster::start(program(), 1).await.unwrap();
        cluster.apply(&kv(), PATIENCE).await.unwrap();
        let tasks: Vec<Task> =
            (0..3).map(|index| cluster.start_task(&format!("kv-{index}")).unwrap()).collect();
        cluster.served("kv", tasks.len(), PATIENCE).await.unwrap();
        let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
        let clerk = Clerk::builder("kv").sources(cluster.addresses());
        let clerk = clerk.start().unwrap();
        at_rest(&clerk, tasks.len()).await;
        let callers = Callers::start(proxy.address, KEYS);
        let (all, began): (Vec<usize>, _) = ((0..KEYS).collect(), Instant::now());
        let look = async |_: &Cluster| callers.answered(&all, began).then_some(());
        cluster.until("every key to be answered", PATIENCE, look).await.unwrap();
        assert_none("requests failed before anything happened", bad(&callers.since(began)));
        Self { callers, clerk, _proxy: proxy, tasks, cluster }
    }

    /// The keys of a task, as the newest assignment has it.
    fn keys_of(&self, task: &str) -> Vec<usize> {
        let is_its = |key: &usize| {
            self.clerk.route(&bytes_of(*key)).is_ok_and(|target| target.name().as_str() == task)
        };
        (0..KEYS).filter(is_its).collect()
    }
}

fn bad(outcomes: &[crate::callers::Outcome]) -> impl Iterator<Item = &crate::callers::Outcome> {
    outcomes.iter().filter(|outcome| !outcome.is_good())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_killed_task_are_answered_by_others_and_no_others_fail() {
    let _turn = my_turn().await;
    let mut town = Town::start().await;
    let (victim, keys) = (town.tasks.remove(1), town.keys_of("kv-1"));
    assert!((20..KEYS - 20).contains(&keys.len()), "kv-1 has {} of {KEYS} keys", keys.len());

    let killed = Instant::now();
    drop(victim);
    // The last that failed says when the loss was over; an answer each, which began later, that it is.
    let look = async |_: &Cluster| {
        let outcomes = town.callers.since(killed);
        let last_bad = bad(&outcomes).map(|outcome| outcome.began).max()?;
        town.callers.answered(&keys, last_bad).then_some(last_bad)
    };
    let what = "the killed task's keys to be answered by others";
    let last_bad = town.cluster.until(what, PATIENCE, look).await.unwrap();
    town.cluster.served("kv", 2, PATIENCE).await.unwrap();

    let outcomes = town.callers.stop().await;
    let took = last_bad - killed;
    let refused = bad(&outcomes).count();
    println!(
        "the keys of a killed task: answered by others after {:.2} s; {refused} of {} requests refused",
        took.as_secs_f64(),
        outcomes.len()
    );
    assert!(took <= ANSWERED_WITHIN, "it took {took:?}");
    assert_none(
        "requests for other keys failed",
        bad(&outcomes).filter(|o| !keys.contains(&o.key)),
    );
    assert_none("refusals are not clear", bad(&outcomes).filter(|outcome| !outcome.is_clear()));
    assert_none("answers hung", outcomes.iter().filter(|outcome| outcome.took > REFUSED_WITHIN));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_told_to_stop_is_drained_and_nothing_fails() {
    let _turn = my_turn().await;
    let mut town = Town::start().await;
    let (mut leaver, keys) = (town.tasks.remove(1), town.keys_of("kv-1"));
    assert!(!keys.is_empty(), "kv-1 has no key");

    let told = Instant::now();
    leaver.process.terminate().unwrap();
    let status = leaver.process.wait_ended(PATIENCE).await.unwrap();
    let ended = Instant::now();
    assert!(status.success(), "{status}: {}", leaver.process.log_tail());
    let look = async |_: &Cluster| town.callers.answered(&keys, ended).then_some(());
    town.cluster.until("the drained task's keys to be answered", PATIENCE, look).await.unwrap();
    town.cluster.served("kv", 2, PATIENCE).await.unwrap();

    let outcomes = town.callers.stop().await;
    println!(
        "a task that was told to stop ended after {:.2} s; {} requests, none failed",
        (ended - told).as_secs_f64(),
        outcomes.len()
    );
    assert_none("requests failed", bad(&outcomes));
}

//! Spill, with real processes: a key that is too hot for its task is served by others too, where the job lets callers spill.

use std::collections::BTreeMap;
use std::time::Duration;

use mandoline::Clerk;
use mandoline_core::spec::{JobSpec, Ratio, Spill};
use mandoline_proto::pb;
use tokio::time::Instant;

use crate::callers::{Callers, Outcome, PATIENCE, assert_none, at_rest, my_turn, program};
use crate::processes::{Cluster, ProxyKnows};

/// Enough that the callers of all workers know the load: four seconds' worth.
const REQUESTS: usize = 1_200;

/// Asks for one key alone, and gives how many requests each of three tasks answered.
async fn hot_key(spill: Option<Spill>) -> Vec<usize> {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    let spec = JobSpec {
        balance_every: Duration::from_secs(3_600),
        prepare_within: Duration::ZERO,
        spill,
        ..JobSpec::new("kv".parse().unwrap())
    };
    cluster.apply(&pb::JobSpec::from(&spec), PATIENCE).await.unwrap();
    let names = ["kv-0", "kv-1", "kv-2"];
    let _tasks = names.map(|name| cluster.start_task(name).unwrap());
    cluster.served("kv", names.len(), PATIENCE).await.unwrap();
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).start().unwrap();
    at_rest(&clerk, names.len()).await;
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
    let callers = Callers::start(proxy.address, 1);
    let began = Instant::now();
    let look = async |_: &Cluster| (callers.since(began).len() >= REQUESTS).then_some(());
    cluster.until("enough requests", PATIENCE, look).await.unwrap();
    let outcomes = callers.stop().await;
    assert_none("requests failed", outcomes.iter().filter(|outcome| !outcome.is_good()));
    let by_task = by_task(&outcomes);
    names.map(|name| by_task.get(name).copied().unwrap_or_default()).to_vec()
}

fn by_task(outcomes: &[Outcome]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let tasks = outcomes.iter().filter_map(|outcome| outcome.answer.as_ref().ok()?.task.clone());
    tasks.for_each(|task| *counts.entry(task).or_default() += 1);
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_key_is_served_by_as_many_tasks_as_it_needs() {
    let counts = hot_key(Some(Spill { cap: Ratio::percent(115) })).await;
    let mean = counts.iter().sum::<usize>() as f64 / counts.len() as f64;
    let most = *counts.iter().max().unwrap() as f64 / mean;
    println!("a hot key on three tasks, with spill above 115 %: {counts:?}, max/mean {most:.2}");
    assert!(most <= 1.3, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_spill_a_hot_key_stays_with_its_task() {
    let counts = hot_key(None).await;
    assert_eq!(counts.iter().filter(|count| **count > 0).count(), 1, "{counts:?}");
}

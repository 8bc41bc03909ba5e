//! All assigners are gone: whoever knows goes on, and whoever comes now learns from a peer or from its disk.
//!
//! `MANDOLINE_AWAY_SECONDS` says for how long, 10 if it is not set.

use std::path::Path;
use std::time::Duration;

use mandoline::clerk::Clerk;
use tokio::time::Instant;

use crate::callers::{
    Callers, PATIENCE, ask, assert_none, at_rest, bytes_of, kv, my_turn, number, program,
};
use crate::processes::{Cluster, Proxy, ProxyKnows, Task, address};

const KEYS: usize = 120;

/// Asks for every key through a proxy, and gives those who answered.
async fn answerers(proxy: &Proxy) -> Vec<String> {
    let mut connection = None;
    let mut tasks = vec![];
    for key in 0..KEYS {
        let answer = ask(&mut connection, proxy.address, "GET", key).await.unwrap();
        assert!(answer.status < 500, "key {key} through {}: {answer:?}", proxy.address);
        tasks.extend(answer.task);
    }
    tasks.sort();
    tasks.dedup();
    tasks
}

/// Waits until a proxy that has just been started routes.
async fn routes(cluster: &Cluster, proxy: &Proxy, what: &str) {
    let look = async |_: &Cluster| {
        let answer = ask(&mut None, proxy.address, "GET", 0).await.ok()?;
        (answer.status < 500).then_some(())
    };
    cluster.until(what, PATIENCE, look).await.unwrap();
    assert_eq!(answerers(proxy).await, ["kv-0", "kv-1"], "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_go_on_and_new_ones_start_while_every_assigner_is_gone() {
    let _turn = my_turn().await;
    let away = Duration::from_secs(number("MANDOLINE_AWAY_SECONDS", 10));
    let mut cluster = Cluster::start(program(), 3).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let mut tasks: Vec<Task> =
        (0..2).map(|index| cluster.start_task(&format!("kv-{index}")).unwrap()).collect();
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    cluster.settled(PATIENCE).await.unwrap();
    let (of_proxy, of_clerk) =
        (cluster.dir().join("proxy.assignment"), cluster.dir().join("clerk.assignment"));
    let knows = ProxyKnows { cache: Some(of_proxy.clone()), ..ProxyKnows::default() };
    let proxy = cluster.start_proxy("proxy", knows).await.unwrap();
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).cache(&of_clerk).start().unwrap();
    let generation = at_rest(&clerk, 2).await;
    let glance = cluster.dir().join("glance.assignment");
    let holds = |cache: &Path| {
        std::fs::copy(cache, &glance).ok()?;
        let builder = Clerk::builder("kv").sources(cluster.addresses());
        let known = builder.cache(&glance).start().unwrap().assignment()?;
        (known.generation == generation).then_some(())
    };
    let look = async |_: &Cluster| holds(&of_proxy).and_then(|()| holds(&of_clerk));
    cluster.until("both caches to have what is known", PATIENCE, look).await.unwrap();
    routes(&cluster, &proxy, "the proxy to route").await;
    let callers = Callers::start(proxy.address, KEYS);
    let keys: Vec<usize> = (0..KEYS).collect();

    let gone_at = Instant::now();
    cluster.kill_nodes();

    // One source of knowledge each, and no other.
    let copy = cluster.dir().join("copy.assignment");
    std::fs::copy(&of_proxy, &copy).unwrap();
    let by_task = ProxyKnows { peers: vec![tasks[0].watch], ..ProxyKnows::default() };
    let by_proxy = ProxyKnows { peers: vec![proxy.watch], ..ProxyKnows::default() };
    let by_disk = ProxyKnows { cache: Some(copy), ..ProxyKnows::default() };
    let mut newcomers = vec![];
    for (name, knows) in [("by-task", by_task), ("by-proxy", by_proxy), ("by-disk", by_disk)] {
        let newcomer = cluster.start_proxy(name, knows).await.unwrap();
        routes(&cluster, &newcomer, &format!("a proxy that learns {name} to route")).await;
        newcomers.push(newcomer);
    }
    let copy = cluster.dir().join("copy-of-clerk.assignment");
    std::fs::copy(&of_clerk, &copy).unwrap();
    let builder = || Clerk::builder("kv").sources(cluster.addresses());
    let clerks = [
        ("task", builder().peers([address(tasks[1].watch)]).start().unwrap()),
        ("proxy", builder().peers([address(proxy.watch)]).start().unwrap()),
        ("disk", builder().cache(copy).start().unwrap()),
    ];
    for (from, clerk) in &clerks {
        let ready = tokio::time::timeout(PATIENCE, clerk.ready()).await;
        ready.unwrap_or_else(|_| panic!("a clerk that learns from a {from} knows nothing"));
    }
    let all: Vec<&Clerk> = clerks.iter().map(|(_, clerk)| clerk).chain([&clerk]).collect();
    let mut lookups = 0_u64;
    let look = async |_: &Cluster| {
        for (clerk, key) in all.iter().flat_map(|clerk| keys.iter().map(move |key| (clerk, key))) {
            let target = clerk.route(&bytes_of(*key));
            assert!(target.is_ok(), "key {key}: {:?}", target.err());
        }
        (gone_at.elapsed() >= away).then_some(())
    };
    cluster.until("the time without assigners to pass", away + PATIENCE, look).await.unwrap();
    lookups += (all.len() * KEYS) as u64;
    let away_for = gone_at.elapsed();

    for index in 0..3 {
        cluster.start_node(index).unwrap();
    }
    let back_at = Instant::now();
    cluster.settled(PATIENCE).await.unwrap();
    // Changes flow again: a task that comes now is seen by all, and answers through every proxy.
    tasks.push(cluster.start_task("kv-2").unwrap());
    cluster.served("kv", 3, PATIENCE).await.unwrap();
    for clerk in &all {
        let wait = async {
            let mut changes = clerk.changes();
            let has_it = |known: &Option<std::sync::Arc<mandoline::Assignment>>| {
                known.as_ref().is_some_and(|known| known.tasks.len() == 3)
            };
            changes.wait_for(has_it).await.map(drop).unwrap();
        };
        let heard = tokio::time::timeout(PATIENCE, wait).await;
        heard.unwrap_or_else(|_| {
            panic!("a clerk has not heard of the new task: {:?}", clerk.state())
        });
    }
    for proxy in newcomers.iter().chain([&proxy]) {
        let look =
            async |_: &Cluster| answerers(proxy).await.contains(&"kv-2".to_owned()).then_some(());
        cluster.until("the new task to answer through each proxy", PATIENCE, look).await.unwrap();
    }
    let back = back_at.elapsed();

    let outcomes = callers.stop().await;
    println!(
        "no assigner for {:.1} s: {} requests, none failed, at least {lookups} lookups; all followed again {:.1} s after the assigners were back",
        away_for.as_secs_f64(),
        outcomes.len(),
        back.as_secs_f64()
    );
    assert_none("requests failed", outcomes.iter().filter(|outcome| !outcome.is_good()));
}

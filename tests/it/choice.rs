//! Which replica callers ask, and how old their assignment may be: real processes in two zones, one of which fails, and a control
//! plane that dies.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mandoline_core::spec::{JobSpec, ReplicaBounds};
use mandoline_proto::pb;
use serde_json::Value;

use crate::agent::{ANY, Plain, agent};
use crate::callers::{Callers, PATIENCE, ask, assert_none, program};
use crate::kit::{ask as get, json, run, text};
use crate::processes::{Cluster, ProxyKnows};

/// Two replicas of each slice, one in each zone.
fn spread() -> pb::JobSpec {
    pb::JobSpec::from(&JobSpec {
        replicas: ReplicaBounds { min: 2, max: 2 },
        spread: Some("zone".to_owned()),
        balance_every: Duration::from_secs(1),
        report_every: Duration::from_millis(500),
        ..JobSpec::new("kv".parse().unwrap())
    })
}

fn flags(words: &str) -> ProxyKnows {
    let flags = words.split(' ').map(str::to_owned).collect();
    ProxyKnows { flags, ..ProxyKnows::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_stay_in_their_zone_until_a_task_there_fails() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&spread(), PATIENCE).await.unwrap();
    let (near, other) = (Plain::start("near", ANY).await, Plain::start("other", ANY).await);
    let far = [Plain::start("far-1", ANY).await, Plain::start("far-2", ANY).await];
    let lines = [(&near, "a"), (&other, "a"), (&far[0], "b"), (&far[1], "b")]
        .map(|(task, zone)| format!("{} zone={zone}\n", task.listed()));
    let list = cluster.dir().join("tasks");
    std::fs::write(&list, lines.concat()).unwrap();
    let _agent = agent(&cluster, &["--file", list.to_str().unwrap(), "--health", "/livez"]);
    cluster.served("kv", 4, PATIENCE).await.unwrap();
    let spread_out = async |cluster: &Cluster| {
        let status = job(cluster)?;
        // Each zone has every key.
        (status["unserved"] == 0 && replicas(cluster)? == 2).then_some(())
    };
    cluster.until("two replicas of every slice", PATIENCE, spread_out).await.unwrap();
    let proxy = cluster.start_proxy("proxy", flags("--zone a")).await.unwrap();

    let answers = async || {
        let mut tasks = vec![];
        let mut connection = None;
        for key in 0..60 {
            let answer = ask(&mut connection, proxy.address, "GET", key).await.ok()?;
            tasks.push(answer.task.filter(|_| answer.status == 200)?);
        }
        tasks.sort();
        tasks.dedup();
        Some(tasks)
    };
    let look = async |_: &Cluster| (answers().await? == ["near", "other"]).then_some(());
    cluster.until("the near zone to answer", PATIENCE, look).await.unwrap();

    let callers = Callers::start(proxy.address, 60);
    near.fails.store(true, Ordering::Relaxed);
    let look = async |_: &Cluster| (!answers().await?.contains(&"near".to_owned())).then_some(());
    cluster.until("the far zone to answer for the one that fails", PATIENCE, look).await.unwrap();
    // The leader hears of it, and says so; it keeps its slices, for it lives.
    let named = async |cluster: &Cluster| {
        let status = job(cluster)?;
        let tasks = status["tasks"].as_array()?;
        let avoided: Vec<_> = tasks.iter().filter(|task| task["avoided_by"] != 0).collect();
        let [task] = avoided[..] else { return None };
        (task["name"] == "near" && task["slices"] != 0 && task["connected"] == true).then_some(())
    };
    cluster.until("the leader to name it", PATIENCE, named).await.unwrap();
    let assigner = cluster.addresses()[0].to_string();
    let page = text(&run(&["status", "--assigners", &assigner]).stdout);
    assert!(page.contains("fails: avoided by 1 caller"), "{page}");
    let metrics = get(cluster.nodes[0].client, "GET", "/metrics", "").unwrap().body;
    assert!(metrics.contains("mandoline_assigner_job_tasks_avoided{job=\"kv\"} 1"), "{metrics}");
    let metrics = get(proxy.admin, "GET", "/metrics", "").unwrap().body;
    assert!(metrics.contains("mandoline_proxy_tasks_avoided{job=\"kv\"} 1"), "{metrics}");

    let outcomes = callers.stop().await;
    let failed = outcomes.iter().filter(|outcome| !outcome.is_good()).count();
    // Five in a row, of which this test itself asked some, and those that were under way by then: of six callers, each with one.
    println!("{failed} of {} requests failed before callers left the task", outcomes.len());
    assert!((1..=5 + 6).contains(&failed), "{failed} of {} requests failed", outcomes.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_assignment_that_may_be_too_old_is_not_gone_by_where_callers_say_so() {
    let mut cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&spread(), PATIENCE).await.unwrap();
    let _task = cluster.start_task("kv-0").unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let strict = cluster.start_proxy("strict", flags("--max-staleness 500ms")).await.unwrap();
    let any = cluster.start_proxy("any", ProxyKnows::default()).await.unwrap();
    let status = |address| get(address, "PUT", "/kv/key", "").map(|answer| answer.status);
    let look = async |_: &Cluster| (status(strict.address)? < 300).then_some(());
    cluster.until("a request to be served", PATIENCE, look).await.unwrap();

    let callers = Callers::start(any.address, 6);
    cluster.kill_nodes();
    let look = async |_: &Cluster| {
        let answer = get(strict.address, "GET", "/kv/key", "")?;
        (answer.status == 503).then_some(answer.body)
    };
    let told = cluster.until("the old assignment to be refused", PATIENCE, look).await.unwrap();
    assert!(told.contains("may be older than 500ms: nobody has told what changes for"), "{told}");
    // Whoever asks for nothing goes on as before.
    assert_none("requests failed", callers.stop().await.iter().filter(|o| !o.is_good()));

    cluster.start_node(0).unwrap();
    let look = async |_: &Cluster| (status(strict.address)? < 300).then_some(());
    cluster.until("requests to be served again", PATIENCE, look).await.unwrap();
}

fn job(cluster: &Cluster) -> Option<Value> {
    let assigner = cluster.addresses().first()?.to_string();
    Some(json(&["job", "get", "kv", "-o", "json", "--assigners", &assigner]))
}

/// How many replicas each slice has, if all have as many.
fn replicas(cluster: &Cluster) -> Option<usize> {
    let assigner = cluster.addresses().first()?.to_string();
    let shown = json(&["assignment", "show", "kv", "-o", "json", "--assigners", &assigner]);
    let mut counts =
        shown["slices"].as_array()?.iter().map(|s| s["replicas"].as_array().map(Vec::len));
    let first = counts.next()??;
    counts.all(|count| count == Some(first)).then_some(first)
}

//! A cluster of processes, as on many machines: three assigners, two tasks, a proxy, and an operator at work.

use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use mandoline_proto::pb::admin_client::AdminClient;
use serde_json::Value;
use tempfile::TempDir;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

use rustix::process::Signal;

use crate::kit::{Process, ask, free_ports, json, local, run, run_with, text, until};

struct Cluster {
    // Dropped before the directories that they write to.
    nodes: Vec<Option<Process>>,
    clients: Vec<u16>,
    list: String,
    _data: TempDir,
}

impl Cluster {
    fn start(count: usize) -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = free_ports(2 * count);
        let (clients, peers) = ports.split_at(count);
        let seats: Vec<String> = clients
            .iter()
            .zip(peers)
            .map(|(client, peer)| format!("127.0.0.1:{client}/{peer}"))
            .collect();
        let node = |index: usize| {
            Some(Process::start(&[
                "assigner",
                "--listen",
                &local(clients[index]).to_string(),
                "--peer-listen",
                &local(peers[index]).to_string(),
                "--peers",
                &seats.join(","),
                "--data-dir",
                data.path().join(index.to_string()).to_str().unwrap(),
            ]))
        };
        let nodes = (0..count).map(node).collect();
        let list: Vec<String> = clients.iter().map(|port| local(*port).to_string()).collect();
        let cluster = Self { nodes, clients: clients.to_vec(), list: list.join(","), _data: data };
        for port in &cluster.clients {
            cluster.ready(*port);
        }
        cluster
    }

    fn ready(&self, port: u16) {
        until("a node to be ready", || {
            ask(local(port), "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
    }

    fn status(&self) -> Value {
        json(&["status", "-o", "json", "--assigners", &self.list])
    }

    /// A node that does not lead.
    fn follower(&self) -> String {
        let status = self.status();
        let nodes = status["nodes"].as_array().unwrap();
        let follower = nodes.iter().find(|node| node["leader"] == false).expect("one follows");
        follower["client_address"].as_str().unwrap().to_owned()
    }
}

fn task(name: &str, assigners: &str) -> Process {
    Process::start(&[
        "demo",
        "task",
        "--name",
        name,
        "--listen",
        "127.0.0.1:0",
        "--assigners",
        assigners,
    ])
}

#[test]
fn a_cluster_of_processes_does_the_main_job() {
    let mut cluster = Cluster::start(3);
    let list = cluster.list.clone();
    let to_all = ["--assigners", &list];

    // An operator makes a job, by way of a node that does not lead.
    let follower = cluster.follower();
    let spec = "name: kv\nheartbeat: 500ms\nreport_every: 500ms\nbalance_every: 1s\n";
    let applied = run_with(&["job", "apply", "-", "--assigners", &follower], spec);
    assert_eq!(text(&applied.stdout), "job kv is at version 1\n", "{}", text(&applied.stderr));
    let again =
        run_with(&["job", "apply", "-", "--if-version", "0", "--assigners", &follower], spec);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("is at version 1, not 0"), "{}", text(&again.stderr));
    let job = json(&["job", "get", "kv", "-o", "json", "--assigners", &follower]);
    assert_eq!(job["spec"]["heartbeat"], "500ms");
    assert_eq!(run(&["job", "get", "nope", "--assigners", &list]).status.code(), Some(1));

    // By hand, too, and the leader hears of it.
    let frozen = run(&["assignment", "freeze", "kv", "--assigners", &follower]);
    assert!(frozen.status.success(), "{}", text(&frozen.stderr));
    assert_eq!(cluster.status()["jobs"][0]["frozen"], true);
    assert!(run(&["assignment", "unfreeze", "kv", "--assigners", &follower]).status.success());

    // Tasks come, and a proxy.
    let mut tasks = [task("kv-0", &list), task("kv-1", &list)];
    let served = until("both tasks to serve", || {
        let status = cluster.status();
        let job = &status["jobs"][0];
        let tasks = job["tasks"].as_array()?;
        let serve = |task: &Value| task["slices"].as_u64() > Some(0) && task["connected"] == true;
        (tasks.len() == 2 && tasks.iter().all(serve) && job["unserved"] == 0).then_some(status)
    });
    assert_eq!(served["nodes"].as_array().unwrap().len(), 3);
    let table = text(&run(&["status", "--assigners", &list]).stdout);
    assert!(table.contains("leader") && table.contains("kv-0"), "{table}");
    let [listen, admin] = free_ports(2)[..] else { unreachable!("two were asked for") };
    let mut proxy = Process::start(
        &[
            &[
                "proxy",
                "--listen",
                &local(listen).to_string(),
                "--admin",
                &local(admin).to_string(),
            ],
            &to_all[..],
        ]
        .concat(),
    );
    let proxied = |method: &str, key: &str, body: &str| {
        ask(local(listen), method, &format!("/kv/{key}"), body)
    };
    until("the proxy to route", || proxied("GET", "0", "").filter(|answer| answer.status == 404));
    for key in 0..32 {
        let put = proxied("PUT", &key.to_string(), "v").expect("the proxy answers");
        assert_eq!(put.status, 204, "{put:?}");
    }

    // A task drains; nothing fails meanwhile, and the other has everything.
    let drained = run(&[&["task", "drain", "kv-0", "--wait"], &to_all[..]].concat());
    assert!(drained.status.success(), "{}", text(&drained.stderr));
    for key in 0..32 {
        let get = proxied("GET", &key.to_string(), "").expect("the proxy answers");
        assert!(matches!(get.status, 200 | 404), "{get:?}");
    }
    tasks[0].signal(Signal::TERM);
    assert_eq!(tasks[0].ended(), Some(0), "{}", tasks[0].stderr());
    let list_of = |args: &[&str]| json(&[args, &["-o", "json"], &to_all[..]].concat());
    let left = list_of(&["task", "list", "--job", "kv"]);
    assert_eq!(left.as_array().unwrap().len(), 1, "{left}");

    // Leadership goes where it is told to, and a leader that is stopped hands it over.
    let before = cluster.status();
    let heir = before["nodes"].as_array().unwrap().iter().find(|node| node["leader"] == false);
    let heir = heir.unwrap()["node"].as_u64().unwrap();
    let moved = run(&[&["cluster", "transfer", &heir.to_string()], &to_all[..]].concat());
    assert!(moved.status.success(), "{}", text(&moved.stderr));
    let leader = until("the heir to lead", || {
        let status = cluster.status();
        (status["leader"] == heir).then_some(heir as usize)
    });
    let mut stopped = cluster.nodes[leader - 1].take().expect("it runs");
    stopped.signal(Signal::TERM);
    assert_eq!(stopped.ended(), Some(0), "{}", stopped.stderr());
    until("another to lead", || {
        let status = cluster.status();
        (status["leader"].is_u64() && status["leader"] != leader as u64).then_some(())
    });
    let applied = run_with(&[&["job", "apply", "-"], &to_all[..]].concat(), spec);
    assert_eq!(text(&applied.stdout), "job kv is at version 2\n", "{}", text(&applied.stderr));
    let get = proxied("GET", "7", "").expect("the proxy answers");
    assert!(matches!(get.status, 200 | 404), "{get:?}");

    // Everything ends when told to.
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.ended(), Some(0), "{}", proxy.stderr());
}

#[test]
fn a_token_is_asked_for_and_a_member_joins_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let token = path("token");
    std::fs::write(&token, "0123456789abcdef0123456789abcdef\n").unwrap();
    let ports = free_ports(4);
    let address = |index: usize| local(ports[index]).to_string();
    let data = [path("a"), path("b")];
    let node = |index: usize, begin: &[&str]| {
        let (listen, peer) = (address(2 * index), address(2 * index + 1));
        let args =
            ["assigner", "--listen", &listen, "--peer-listen", &peer, "--data-dir", &data[index]];
        Process::start(&[&args[..], &["--token-file", &token], begin].concat())
    };
    let _first = node(0, &["--init"]);
    until("the node to be ready", || {
        ask(local(ports[0]), "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });
    let shut_out = run(&["status", "--assigners", &address(0)]);
    assert_eq!(shut_out.status.code(), Some(2));
    assert!(
        text(&shut_out.stderr).contains("does not let this call in"),
        "{}",
        text(&shut_out.stderr)
    );

    let _second = node(1, &["--join", &address(1)]);
    until("the second node to vote", || {
        let status =
            json(&["status", "-o", "json", "--assigners", &address(0), "--token-file", &token]);
        let nodes = status["nodes"].as_array()?.clone();
        (nodes.len() == 2 && nodes.iter().all(|node| node["voter"] == true)).then_some(())
    });
    let removed =
        run(&["cluster", "remove", "2", "--assigners", &address(0), "--token-file", &token]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    let status = json(&[
        "cluster",
        "status",
        "-o",
        "json",
        "--assigners",
        &address(0),
        "--token-file",
        &token,
    ]);
    assert_eq!(status["nodes"].as_array().unwrap().len(), 1, "{status}");
}

#[tokio::test]
async fn a_call_that_was_passed_on_is_not_passed_on_again() {
    let cluster = Cluster::start(3);
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.follower())).unwrap();
    let mut admin = AdminClient::new(endpoint.connect().await.unwrap());
    let spec = JobSpec::new("kv".parse().unwrap());
    let apply =
        || Request::new(pb::ApplyJobRequest { spec: Some((&spec).into()), if_version: None });
    let mut passed_on = apply();
    passed_on.metadata_mut().insert("mandoline-forwarded-by", MetadataValue::from_static("9"));
    let refusal = admin.apply_job(passed_on).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unavailable, "{refusal}");
    assert!(refusal.message().contains("does not lead"), "{refusal}");
    assert_eq!(admin.apply_job(apply()).await.unwrap().into_inner().version, 1);
    // The node that passed it on has it too by now.
    let job = admin.get_job(pb::GetJobRequest { name: "kv".to_owned() }).await.unwrap();
    assert_eq!(job.into_inner().version, 1);
}

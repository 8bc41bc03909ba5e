//! gRPC through the proxy from end to end: the clients and servers of the control plane, real ones, with a proxy between them. Single
//! calls, streams that last, errors that are nothing but trailers, in clear text and by TLS.

use std::net::SocketAddr;

use mandoline::Clerk;
use serde_json::Value;
use tokio::time::timeout;

use crate::callers::{PATIENCE, program};
use crate::kit::{Process, ask, free_ports, local, run, run_with, text, until};
use crate::processes::Cluster;

fn file(name: &str) -> String {
    format!("{}/../tests/it/tls/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// What a family of metrics of the proxy comes to.
fn number(admin: SocketAddr, begins: &str) -> u64 {
    let metrics = ask(admin, "GET", "/metrics", "").unwrap().body;
    let of_it = metrics.lines().filter(|line| line.starts_with(begins));
    of_it.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_goes_through_the_proxy_from_end_to_end() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    let assigner = cluster.addresses()[0].to_string();
    let ports = free_ports(3);
    let [clear, tls, admin] = [ports[0], ports[1], ports[2]].map(local);
    let config = cluster.dir().join("proxy.yaml");
    let yaml = format!(
        "admin: {admin}
assigners: ['{assigner}']
listeners:
  - address: {clear}
  - address: {tls}
    tls: {{certificates: [{{chain: {}, key: {}}}]}}
routes:
  - {{name: control, path: /mandoline.v1.Admin/*, pool: control}}
  - {{name: watches, pool: control}}
pools:
  control: {{servers: ['{assigner}'], health: {{check: tcp}}}}
",
        file("node.pem"),
        file("node.key")
    );
    std::fs::write(&config, yaml).unwrap();
    let _proxy = Process::start(&["proxy", "--config", config.to_str().unwrap()]);
    until("the proxy to be ready", || {
        ask(admin, "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });
    let (clear, tls) = (clear.to_string(), tls.to_string());

    // Single calls, and one that fails: its status is what the server said.
    let applied = run_with(&["job", "apply", "-", "--assigners", &clear], "name: kv\n");
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let by_tls = ["--assigners", &tls, "--tls-ca", &file("authority.pem")];
    let status = run(&[&["status", "-o", "json"][..], &by_tls].concat());
    let status: Value = serde_json::from_slice(&status.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", text(&status.stderr)));
    assert!(status["leader"].is_u64(), "{status}");
    let unknown = run(&["job", "get", "nope", "--assigners", &clear]);
    assert!(!unknown.status.success());
    let says = text(&unknown.stderr);
    assert!(says.contains("nope"), "{says}");
    assert!(number(admin, "mandoline_proxy_route_requests_total{route=\"control\"") >= 3);
    // The server was spoken to in HTTP/2, on few connections.
    assert!(number(admin, "mandoline_proxy_connects_total") <= 4);

    // Streams that last: a task's session, and what a clerk watches.
    let listen = local(free_ports(1)[0]).to_string();
    let task = ["demo", "task", "--name", "a", "--listen", &listen, "--assigners", &clear];
    let _task = Process::start(&task);
    let clerk = Clerk::builder("kv").sources([&clear]).start().unwrap();
    timeout(PATIENCE, clerk.ready()).await.expect("the clerk hears");
    let mut changes = clerk.changes();
    let has_task = changes.wait_for(|known| known.as_ref().is_some_and(|it| !it.tasks.is_empty()));
    drop(timeout(PATIENCE, has_task).await.expect("the task is told of").unwrap());
    let open = || number(admin, "mandoline_proxy_route_requests_in_flight{route=\"watches\"");
    until("the streams to be open", || (open() >= 1).then_some(()));

    // Who leaves is noticed at the other end: no stream stays open.
    let before = open();
    drop((changes, clerk));
    until("the clerk's stream to end", || (open() < before).then_some(()));
}

//! The control plane away: what runs goes on, and what is started new begins from whoever still knows.

use rustix::process::Signal;

use crate::kit::{Process, ask, free_ports, json, local, run_with, text, until};

#[test]
fn routing_goes_on_without_any_assigner_and_can_even_begin() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, cache) = (path("node"), path("kv.assignment"));
    let ports = free_ports(8);
    let [node, peer, first, first_admin, watch, second, third, other_admin] = ports[..]
        .iter()
        .map(|port| local(*port).to_string())
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let mut assigner = Process::start(&[
        "assigner",
        "--init",
        "--data-dir",
        &data,
        "--listen",
        &node,
        "--peer-listen",
        &peer,
    ]);
    let at = |port: &str| port.parse().unwrap();
    until("the node to be ready", || {
        ask(at(&node), "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });
    let applied = run_with(&["job", "apply", "-", "--assigners", &node], "name: kv\n");
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let task = |name: &str| {
        Process::start(&[
            "demo",
            "task",
            "--name",
            name,
            "--listen",
            "127.0.0.1:0",
            "--assigners",
            &node,
        ])
    };
    let _tasks = [task("kv-0"), task("kv-1")];
    until("both tasks to serve", || {
        let job = json(&["job", "get", "kv", "-o", "json", "--assigners", &node]);
        (job["tasks"].as_array()?.len() == 2 && job["unserved"] == 0).then_some(())
    });
    let proxy = |listen: &str, admin: &str, more: &[&str]| {
        let args = ["proxy", "--listen", listen, "--admin", admin, "--assigners", &node];
        Process::start(&[&args[..], more].concat())
    };
    let routes = |listen: &str| {
        until("the proxy to route", || {
            let put = ask(at(listen), "PUT", "/kv/a", "hello")?;
            (put.status == 204).then_some(())
        });
    };
    let _first = proxy(&first, &first_admin, &["--watch-listen", &watch, "--cache", &cache]);
    routes(&first);
    until("the assignment to be on disk", || std::path::Path::new(&cache).exists().then_some(()));

    assigner.signal(Signal::KILL);
    assigner.ended();
    for key in 0..32 {
        let put = ask(at(&first), "PUT", &format!("/kv/{key}"), "v").expect("the proxy answers");
        assert_eq!(put.status, 204, "{put:?}");
    }
    let second_proxy = proxy(&second, &other_admin, &["--watch-peers", &watch]);
    routes(&second);
    drop(second_proxy);
    let _third = proxy(&third, &other_admin, &["--cache", &cache]);
    routes(&third);
}

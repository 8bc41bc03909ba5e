//! A cluster whose disks are gone and that is founded anew: callers and tasks that outlived it believe the new one.

use rustix::process::Signal;

use crate::kit::{Process, ask, free_ports, json, local, run_with, text, until};

#[test]
fn those_who_outlive_a_wiped_cluster_believe_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let ports: Vec<String> =
        free_ports(4).into_iter().map(|port| local(port).to_string()).collect();
    let [node, peer, front, admin] = [&ports[0], &ports[1], &ports[2], &ports[3]];
    let founded = |name: &str| {
        let data = dir.path().join(name);
        let data = data.to_str().unwrap();
        let args = ["--data-dir", data, "--listen", node, "--peer-listen", peer];
        let assigner = Process::start(&[&["assigner", "--init"][..], &args].concat());
        until("the job to be taken", || {
            let applied = run_with(&["job", "apply", "-", "--assigners", node], "name: kv\n");
            applied.status.success().then_some(())
        });
        assigner
    };
    let mut first = founded("first");
    let args = ["--listen", "127.0.0.1:0", "--assigners", node];
    let task = |name| Process::start(&[&["demo", "task", "--name", name][..], &args].concat());
    let _tasks = [task("kv-0"), task("kv-1")];
    let _proxy =
        Process::start(&["proxy", "--listen", front, "--admin", admin, "--assigners", node]);
    let served = || {
        until("all keys to be served", || {
            let put = |key| ask(front.parse().unwrap(), "PUT", &format!("/kv/{key}"), "v");
            (0..32).all(|key| put(key).is_some_and(|answer| answer.status == 204)).then_some(())
        });
    };
    served();
    let generation = || {
        let job = json(&["job", "get", "kv", "-o", "json", "--assigners", node]);
        let text = job["generation"].as_str().expect("a generation is text").to_owned();
        let (incarnation, number) = text.split_once('.').expect("it has two parts");
        (incarnation.parse::<u64>().unwrap(), number.parse::<u64>().unwrap())
    };
    let before = generation();
    first.signal(Signal::KILL);
    first.ended();
    let second = founded("second");
    served();
    assert!(
        generation() > before,
        "{before:?} {:?}: {}",
        generation(),
        text(second.stderr().as_bytes())
    );
    // The task that is told of later changes is the one that the proxy goes to: the old assignment is forgotten.
    let third = task("kv-2");
    until("the third task to serve", || {
        let job = json(&["job", "get", "kv", "-o", "json", "--assigners", node]);
        let tasks = job["tasks"].as_array()?;
        (tasks.len() == 3 && job["unserved"] == 0).then_some(())
    });
    served();
    drop(third);
}

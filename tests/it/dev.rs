//! `mandoline dev`: everything in one process.

use std::net::SocketAddr;

use rustix::process::Signal;
use serde_json::Value;

use crate::kit::{Process, ask, free_row, json, run, text};

#[test]
fn dev_prints_what_works_and_stops_on_ctrl_c() {
    let mut dev = Process::start(&["dev", "--port-base", "0", "--tasks", "2"]);
    dev.line("Ctrl-C stops it all.");
    let proxy: SocketAddr = dev.line("proxy ").parse().unwrap();
    let put = ask(proxy, "PUT", "/kv/greeting", "hello").expect("the proxy answers");
    assert_eq!(put.status, 204, "{put:?}");
    let get = ask(proxy, "GET", "/kv/greeting", "").expect("the proxy answers");
    assert_eq!((get.status, get.body.contains("hello")), (200, true), "{get:?}");

    let node = dev.line("assigners ").split_whitespace().next().unwrap().parse().unwrap();
    let ready = ask(node, "GET", "/readyz?verbose", "").expect("the node answers");
    assert_eq!(ready.status, 200, "{ready:?}");
    assert!(ready.body.contains("[ok] leader"), "{ready:?}");
    let metrics = ask(node, "GET", "/metrics", "").expect("the node answers");
    assert!(metrics.body.contains("mandoline_assigner_job_tasks{job=\"kv\"} 2"), "{metrics:?}");

    dev.signal(Signal::INT);
    assert_eq!(dev.ended(), Some(0), "{}", dev.stderr());
    assert!(dev.stdout().contains("stopped in"), "{}", dev.stdout());
}

#[test]
fn dev_asks_what_a_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let spec = dir.path().join("shop.yaml");
    std::fs::write(&spec, "name: shop\nband: 10%\nbalance_every: 2s\n").unwrap();
    let spec = spec.to_str().unwrap();
    let args = ["--port-base", "0", "--tasks", "2", "--spec", spec, "--report-every", "300ms"];
    let mut dev = Process::start(&[&["dev"], &args[..]].concat());
    dev.line("Ctrl-C stops it all.");
    let node = dev.line("assigners ").split_whitespace().next().unwrap().to_owned();
    let job = json(&["job", "get", "shop", "-o", "json", "--assigners", &node]);
    assert_eq!(job["spec"]["band"], "10%");
    // A flag wins over the file, and the file over what dev usually asks.
    assert_eq!(job["spec"]["report_every"], "300ms");
    assert_eq!(job["spec"]["balance_every"], "2s");
    assert_eq!(job["unserved"], 0);
    dev.signal(Signal::INT);
    assert_eq!(dev.ended(), Some(0), "{}", dev.stderr());
}

#[test]
fn a_run_ends_with_its_sums_on_a_line() {
    let load = ["--load", "zipf:0.99", "--rate", "200", "--add-task-at", "1s", "--for", "3s"];
    let sums = sums(&[&["--port-base", "0"], &load[..]].concat());
    assert!(sums["requests"].as_u64().unwrap() > 100, "{sums}");
    assert_eq!(sums["failed"], 0, "{sums}");
    assert!(sums["first_try_share"].as_f64().unwrap() > 0.9, "{sums}");
    for field in ["imbalance_p50", "imbalance_p99", "moves", "key_churn", "load_churn"] {
        assert!(sums.get(field).is_some(), "{field}: {sums}");
    }
}

#[test]
fn a_restart_finds_everything_again() {
    let dir = tempfile::tempdir().unwrap();
    let base = free_row(22).to_string();
    let data = ["--data-dir", dir.path().to_str().unwrap(), "--port-base", &base];
    let run = || sums(&[&data[..], &["--for", "1s", "--listen", "127.0.0.1:0"]].concat());
    let generation = |sums: &Value| -> (u64, u64) {
        let generation = sums["generation"].as_str().expect("there is a generation");
        let (incarnation, number) = generation.split_once('.').expect("it has two parts");
        (incarnation.parse().unwrap(), number.parse().unwrap())
    };
    let (before, after) = (run(), run());
    let (old, new) = (generation(&before), generation(&after));
    assert!(new.0 == old.0 && new.1 > old.1, "nothing was founded anew: {before} {after}");
}

#[test]
fn a_restart_with_other_assigners_is_refused_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = free_row(22).to_string();
    let data = dir.path().to_str().unwrap();
    let rest = ["--data-dir", data, "--port-base", &base, "--for", "1s", "--listen", "127.0.0.1:0"];
    let with = |assigners| [&rest[..], &["--assigners", assigners]].concat();
    sums(&with("3"));
    for other in ["1", "2", "5"] {
        let output = run(&[&["dev"], &with(other)[..]].concat());
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{err}");
        let what = format!("{data} holds a cluster of 3, and {other} were asked for");
        assert!(err.contains(&what) && err.contains("--assigners 3"), "{err}");
    }
    sums(&with("3"));
}

fn sums(args: &[&str]) -> Value {
    let output = run(&[&["dev", "--json"], args].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let out = text(&output.stdout);
    let line = out.lines().last().expect("there is a last line");
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {out}"))
}

//! `mandoline sim balance`: what it prints in each form, and what it says of bad input.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;

use crate::kit::{Process, json, run, text, until};

fn file(dir: &Path, text: &str) -> String {
    let path = dir.join("load");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A trace of 20 keys, 10 requests a second, 10 intervals of 10 s.
fn trace() -> String {
    (0..1_000).map(|n| format!("{}.{} k{} 1\n", n / 10, n % 10, n * n % 20)).collect()
}

const SMALL: &str = "zipf:0.99,keys=500,rate=200,intervals=8,warmup=2";

#[test]
fn the_json_form_has_every_policy_with_its_figures() {
    let found = json(&["sim", "balance", "--workload", SMALL, "--tasks", "4", "--json"]);
    let policies = found["policies"].as_array().unwrap();
    let names: Vec<&str> = policies.iter().map(|p| p["policy"].as_str().unwrap()).collect();
    let expected = [
        "mandoline",
        "mandoline+spill",
        "slicer",
        "slicer+band",
        "dicer",
        "ring",
        "bounded-ring",
        "static",
        "clairvoyant",
    ];
    for name in expected {
        assert!(names.contains(&name), "{names:?}");
    }
    for policy in policies {
        let mut keys: Vec<&String> = policy.as_object().unwrap().keys().collect();
        keys.sort();
        let expected =
            ["imbalance", "key_churn", "load_churn", "moves", "plan_ms", "policy", "slices"];
        assert_eq!(keys, expected);
        for percentile in ["p50", "p90", "p99", "max"] {
            assert!(policy["imbalance"][percentile].as_f64().unwrap() >= 1.0, "{policy}");
        }
        for figure in [&policy["load_churn"], &policy["key_churn"]] {
            assert!((0.0..=1.0).contains(&figure.as_f64().unwrap()), "{policy}");
        }
        assert!(policy["moves"].is_u64() && policy["slices"].is_u64(), "{policy}");
        assert!(policy["plan_ms"]["p50"].is_f64() && policy["plan_ms"]["p99"].is_f64());
    }
}

#[test]
fn the_same_seeds_give_the_same_figures() {
    let figures = |seeds: &str| {
        let mut found = json(&[
            "sim",
            "balance",
            "--workload",
            SMALL,
            "--policy",
            "slicer",
            "--seeds",
            seeds,
            "-o",
            "json",
        ]);
        found["policies"][0]["plan_ms"] = Value::Null;
        found
    };
    assert_eq!(figures("2"), figures("1,2"));
    assert_ne!(figures("1,"), figures("7,"));
}

#[test]
fn a_trace_is_cut_into_intervals() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), &trace());
    let args = ["sim", "balance", "--trace", &path, "--interval", "10s", "--tasks", "3"];
    let csv = run(&[&args[..], &["-o", "csv", "--policy", "ring", "--events", "fail"]].concat());
    let csv = text(&csv.stdout);
    let rows: Vec<&str> = csv.lines().collect();
    assert!(rows[0].starts_with("policy,seed,interval,imbalance,"), "{csv}");
    assert_eq!(rows.len(), 11, "{csv}");
    let columns = rows[0].split(',').count();
    assert!(rows.iter().all(|row| row.split(',').count() == columns), "{csv}");

    let plot = dir.path().join("out.svg");
    let table = run(&[&args[..], &["--plot", plot.to_str().unwrap()]].concat());
    let table = text(&table.stdout);
    assert!(table.contains("\nPOLICY") && table.contains("\nstatic"), "{table}");
    let plot = fs::read_to_string(plot).unwrap();
    assert!(plot.starts_with("<svg") && plot.contains("prefers-color-scheme"), "{plot}");
}

#[test]
fn an_access_log_is_sharded_by_the_part_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let log: String = (0..200)
        .map(|n| {
            format!(
                "h{} - - [10/Oct/2000:13:{:02}:00 -0700] \"GET /a/{} HTTP/1.0\" 200 1\n",
                n % 3,
                n / 20,
                n % 7
            )
        })
        .collect();
    let path = file(dir.path(), &log);
    let args = ["sim", "balance", "--policy", "static", "--tasks", "5", "--json", "--trace", &path];
    let by = |key: &str| run(&[&args[..], &["--key", key]].concat());
    assert!(by("path:1").stderr.is_empty());
    let by_host = text(&by("host").stderr);
    assert!(by_host.contains("note: there are more tasks (5) than keys (3)"), "{by_host}");
}

#[test]
fn few_keys_work_and_are_remarked_on() {
    let dir = tempfile::tempdir().unwrap();
    let one: String = (0..100).map(|n| format!("{n} k\n")).collect();
    let args = ["sim", "balance", "--json", "--interval", "10s", "--tasks", "4", "--trace"];
    let output = run(&[&args[..], &[&file(dir.path(), &one)]].concat());
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("note: there is one key only"));
}

#[test]
fn bad_input_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str); 13] = [
        (&["--policy", "slicr"], "there is no policy \"slicr\": did you mean \"slicer\"?"),
        (&["--policy", "best"], "there is no policy \"best\": use "),
        (&["--workload", "zipf:0.99,drfit"], "did you mean \"drift\"?"),
        (&["--workload", "zipf:0.99,hetero=0/1"], "hetero=\"0\" is out of range"),
        (&["--workload", "pareto:1"], "begin with zipf:ALPHA or uniform"),
        (&["--events", "fial"], "did you mean \"fail\"?"),
        (&["--events", "drift"], "there is no \"drift\""),
        (&["--tasks", "0"], "0 is not in 1..=10000"),
        (&["--tasks", "10001"], "10001 is not in 1..=10000"),
        (&["--seeds", "0"], "\"0\" gives no seeds"),
        (&["--interval", "60"], "\"60\" is no duration"),
        (&["--trace", "no/such/file"], "no/such/file: cannot be opened"),
        (&["--key", "path"], "--trace <FILE>"),
    ];
    for (args, expected) in cases {
        let output = run(&[&["sim", "balance"][..], args].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(expected) && output.stdout.is_empty(), "{args:?}: {said}");
    }
    let files = [
        ("", ": there is no event in it"),
        ("0 a\n1 b\nnan c\n", ":3: the time \"nan\""),
        ("0 a\n5 b\n4 c\n", ":3: 4 s comes after 5 s"),
        ("0 a\n1 b -3\n", ":2: the weight \"-3\""),
        ("hello\n", ":1: neither a trace nor an access log"),
        ("0 a\n1 b\n", "1 interval(s) are too few"),
        ("0 a\n999999999 b\n", "the trace spans more than 1000000 intervals"),
    ];
    for (given, expected) in files {
        let path = file(dir.path(), given);
        let output = run(&["sim", "balance", "--trace", &path, "--policy", "static"]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{given:?}: {said}");
        assert!(said.contains(expected) && output.stdout.is_empty(), "{given:?}: {said}");
    }
}

#[test]
fn broken_lines_are_passed_over_only_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), &trace().replacen("\n3.", "\nthree.", 1));
    let args = ["sim", "balance", "--interval", "10s", "--policy", "static", "--json", "--trace"];
    let strict = run(&[&args[..], &[&path]].concat());
    assert_eq!(strict.status.code(), Some(2));
    assert!(text(&strict.stderr).contains("try: --lenient"), "{}", text(&strict.stderr));
    let lenient = run(&[&args[..], &[&path, "--lenient"]].concat());
    let said = text(&lenient.stderr);
    assert!(lenient.status.success(), "{said}");
    assert!(said.contains("note: 1 broken line(s) passed over, the first is line 31"), "{said}");
}

#[test]
fn ctrl_c_ends_it_at_once() {
    let load = "zipf:0.99,keys=1000000,intervals=1000";
    let mut process = Process::start(&["sim", "balance", "--tasks", "500", "--workload", load]);
    // Once it listens for Ctrl-C: bit 1 of the signals that it catches.
    until("the signal to be caught", || {
        let status = fs::read_to_string(format!("/proc/{}/status", process.id())).ok()?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        (u64::from_str_radix(caught.trim(), 16).ok()? & 2 != 0).then_some(())
    });
    process.signal(Signal::INT);
    assert_eq!(process.ended(), Some(130));
}

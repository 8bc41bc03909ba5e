//! What is told to whoever made a slip: what, where, and what to do about it, on stderr, with exit code 2.

use std::net::TcpListener;

use crate::kit::{run, run_with, text};

fn check(args: &[&str], input: &str, expected: &[&str]) {
    let output = run_with(args, input);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
    for part in expected {
        assert!(err.contains(part), "{args:?} does not say {part:?}: {err}");
    }
}

#[test]
fn a_slip_in_a_file_is_named_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let node = path("node.yaml", "data_dir: x\nlisten: 127.0.0.1\n");
    check(&["assigner", "--config", &node], "", &["node.yaml:2:9: listen: invalid socket address"]);
    let proxy = path("proxy.yaml", "jobb: kv\n");
    check(
        &["proxy", "--config", &proxy],
        "",
        &["proxy.yaml:1:1: unknown field \"jobb\"", "did you mean \"job\"?"],
    );
    let task = path("task.yaml", "name: kv-0\ngrace: 25\n");
    check(
        &["demo", "task", "--config", &task],
        "",
        &["task.yaml:2:8: grace: \"25\" is no duration", "such as 500ms or 5s"],
    );
    let missing = dir.path().join("none.yaml");
    check(
        &["proxy", "--config", missing.to_str().unwrap()],
        "",
        &["cannot read", "none.yaml", "No such file"],
    );
}

#[test]
fn a_slip_in_a_job_is_named_before_anyone_is_asked() {
    let apply = ["job", "apply", "-"];
    check(&apply, "name: kv\nbnad: 10%\n", &["standard input:2:1", "did you mean \"band\"?"]);
    check(&apply, "name: kv\nheartbeat: 1\n", &["heartbeat: \"1\" is no duration"]);
    check(&apply, "name: kv\nreplicas: {min: 0}\n", &["replicas is min 0"]);
    check(&apply, "name: 'a b'\n", &["the name \"a b\" has ' ' at byte 1"]);
    check(&apply, &format!("name: {}\n", "x".repeat(64)), &["64 bytes long"]);
}

#[test]
fn a_job_is_checked_without_a_cluster() {
    let validate = ["job", "validate", "-"];
    check(
        &validate,
        "name: kv\nband: {fixed: 1%, of: hint}\n",
        &["band is 1% of hint", "max_load_hint"],
    );
    let good = run_with(&validate, "name: kv\nspill: {cap: 1.15}\n");
    assert!(good.status.success(), "{}", text(&good.stderr));
    let schema = run(&["job", "schema"]);
    let schema: serde_json::Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert_eq!(schema["required"][0], "name");
}

#[test]
fn a_slip_in_a_flag_is_named() {
    check(&["status", "--timeout", "5"], "", &["--timeout", "\"5\" is no duration"]);
    check(&["proxy", "--key", "pat:1"], "", &["--key"]);
    check(&["dev", "--load", "zipf"], "", &["--load"]);
    check(&["dev", "--spec", "/nonexistent.yaml"], "", &["cannot read /nonexistent.yaml"]);
    check(&["assigner", "--init", "--join", "a:7401"], "", &["cannot be used with"]);
    check(&["assigner", "--listen", "0.0.0.0:0"], "", &["TLS", "--insecure"]);
    let kept = ["dev", "--port-base", "0", "--data-dir", "/nonexistent"];
    check(&kept, "", &["the same ports each time", "--port-base"]);
    check(&["demo", "task"], "", &["the task has no name", "--name"]);
    check(&["demo", "task", "--name", "a", "--label", "zone"], "", &["no label: give KEY=VALUE"]);
    let open = ["demo", "task", "--name", "a", "--watch-listen", "0.0.0.0:0"];
    check(&open, "", &["open to strangers", "watch is plain so far", "--insecure"]);
    check(&["cluster", "remove", "x"], "", &["is no node"]);
    check(&["assignment", "pin", "kv", "abc", "kv-0"], "", &["\"abc\" is no slice", "key:KEY"]);
    check(&["moves", "kv", "--newest", "0"], "", &["--newest", "1..=1000"]);
}

#[test]
fn a_taken_port_is_named_with_who_holds_it() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let me = std::process::id().to_string();
    let expected = [&format!("cannot listen on {address}") as &str, "is taken by process", &me];
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    check(&["assigner", "--init", "--data-dir", data, "--listen", &address], "", &expected);
    check(&["proxy", "--listen", &address], "", &expected);
    check(&["demo", "task", "--name", "a", "--listen", &address], "", &expected);
    check(&["dev", "--port-base", "0", "--listen", &address], "", &expected);
}

#[test]
fn a_node_that_was_told_nothing_says_what_to_tell_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    let args = ["--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data-dir", data];
    check(&[&["assigner"], &args[..]].concat(), "", &["nothing on disk", "--init", "--join"]);
}

#[test]
fn nobody_home_is_said_so() {
    // A port that was just free: nobody listens.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let expected = ["no assigner could answer", &free, "mandoline dev"];
    check(&["status", "--assigners", &free], "", &expected);
    check(&["job", "get", "kv", "--assigners", &free], "", &expected);
}

#[test]
fn help_is_help() {
    let help = run(&["job", "apply", "--help"]);
    assert!(help.status.success());
    let page = text(&help.stdout);
    assert!(
        page.contains("churn_budget: 100%") && page.contains("mandoline job apply kv.yaml"),
        "{page}"
    );
}

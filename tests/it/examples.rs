//! The examples, as their first lines say to run them.

use std::path::PathBuf;
use std::process::Command;

use crate::kit::{Process, free_ports, json, local, run_with, text};

/// An example, which `cargo test` builds beside this test.
fn example(name: &str, assigner: &str) -> Option<Command> {
    let test = std::env::current_exe().expect("a test is a file");
    let built: PathBuf = test.parent()?.parent()?.join("examples").join(name);
    if !built.exists() {
        assert!(
            std::env::var("MANDOLINE_REQUIRE_ALL").as_deref() != Ok("1"),
            "{} is missing",
            built.display()
        );
        println!("skipped: {} not found", built.display());
        return None;
    }
    let mut command = Command::new(built);
    command.env("MANDOLINE_ASSIGNERS", assigner);
    Some(command)
}

#[test]
fn a_sharded_echo_server_answers_from_whoever_owns_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let ports: Vec<String> =
        free_ports(2).into_iter().map(|port| local(port).to_string()).collect();
    let [assigner, peers] = [&ports[0], &ports[1]];
    let data = dir.path().join("a");
    let args = [
        "assigner",
        "--init",
        "--data-dir",
        data.to_str().unwrap(),
        "--listen",
        assigner,
        "--peer-listen",
        peers,
    ];
    let _node = Process::start(&args);
    crate::kit::until("a leader", || {
        run_with(&["job", "apply", "-", "--assigners", assigner], "name: echo\n")
            .status
            .success()
            .then_some(())
    });
    let mut servers = vec![];
    for name in ["echo-0", "echo-1"] {
        let Some(mut command) = example("echo", assigner) else { return };
        command.args(["serve", name, "127.0.0.1:0"]);
        let mut server = Process::spawn(command);
        server.line(&format!("{name} serves"));
        servers.push(server);
    }
    let keys: Vec<String> = (0..20).map(|key| format!("user-{key}")).collect();
    let output = example("echo", assigner).unwrap().arg("ask").args(&keys).output().unwrap();
    let answers = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for (key, answer) in keys.iter().zip(answers.lines()) {
        assert!(
            answer.starts_with("200 echo-") && answer.ends_with(&format!("has {key}")),
            "{answers}"
        );
    }
    assert!(answers.contains("echo-0") && answers.contains("echo-1"), "both serve some: {answers}");
    let jobs = json(&["job", "list", "-o", "json", "--assigners", assigner]);
    assert!(jobs.to_string().contains("echo-1"), "{jobs}");
    let usage = example("echo", assigner).unwrap().output().unwrap();
    assert!(!usage.status.success() && text(&usage.stderr).contains("usage: echo serve"));
}

//! The examples, as their first lines say to run them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
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

/// An assigner with one job, on free ports; with where it listens.
fn assigner(dir: &Path, job: &str) -> (Process, String) {
    let ports: Vec<String> =
        free_ports(2).into_iter().map(|port| local(port).to_string()).collect();
    let [assigner, peers] = [&ports[0], &ports[1]];
    let data = dir.join("a");
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
    let node = Process::start(&args);
    crate::kit::until("a leader", || {
        let spec = format!("name: {job}\n");
        run_with(&["job", "apply", "-", "--assigners", assigner], &spec)
            .status
            .success()
            .then_some(())
    });
    (node, assigner.clone())
}

#[test]
fn a_sharded_echo_server_answers_from_whoever_owns_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, assigner) = assigner(dir.path(), "echo");
    let mut servers = vec![];
    for name in ["echo-0", "echo-1"] {
        let Some(mut command) = example("echo", &assigner) else { return };
        command.args(["serve", name, "127.0.0.1:0"]);
        let mut server = Process::spawn(command);
        server.line(&format!("{name} serves"));
        servers.push(server);
    }
    let keys: Vec<String> = (0..20).map(|key| format!("user-{key}")).collect();
    let output = example("echo", &assigner).unwrap().arg("ask").args(&keys).output().unwrap();
    let answers = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for (key, answer) in keys.iter().zip(answers.lines()) {
        assert!(
            answer.starts_with("200 echo-") && answer.ends_with(&format!("has {key}")),
            "{answers}"
        );
    }
    assert!(answers.contains("echo-0") && answers.contains("echo-1"), "both serve some: {answers}");
    let jobs = json(&["job", "list", "-o", "json", "--assigners", &assigner]);
    assert!(jobs.to_string().contains("echo-1"), "{jobs}");
    let usage = example("echo", &assigner).unwrap().output().unwrap();
    assert!(!usage.status.success() && text(&usage.stderr).contains("usage: echo serve"));
}

#[test]
fn a_web_application_that_forwards_answers_the_same_wherever_it_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (_node, assigner) = assigner(dir.path(), "carts");
    let mut tasks = vec![];
    for name in ["carts-0", "carts-1"] {
        let Some(mut command) = example("backhaul", &assigner) else { return };
        command.args([name, "127.0.0.1:0"]);
        let mut task = Process::spawn(command);
        let said = task.line(&format!("{name} serves"));
        tasks.push((said.rsplit(' ').next().unwrap().trim().to_owned(), task));
    }
    let ask = |at: usize, user: &str, item: Option<&str>| {
        let address: SocketAddr = tasks[at].0.parse().unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        let (method, body) = item.map_or(("GET", ""), |item| ("POST", item));
        let length = body.len();
        let head =
            format!("{method} /carts/{user} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
        write!(stream, "{head}content-length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.rsplit("\r\n\r\n").next().unwrap().to_owned()
    };
    for user in (0..20).map(|n| format!("user-{n}")) {
        ask(0, &user, Some("apples"));
        ask(1, &user, Some("pears"));
        for at in [0, 1] {
            assert!(ask(at, &user, None).contains("apples, pears"), "{user} at {at}");
        }
    }
}

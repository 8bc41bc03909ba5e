//! The examples, as their first lines say to run them: real processes against a real assigner.

mod echo;
mod backhaul;
mod two_regions;
mod sharded_cache;
mod rate_limiter;
mod rendezvous;
mod stub_routing;
mod reqwest_client;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::kit::{Process, free_ports, local, run, run_with, text, until};

/// An assigner with one job, and what examples say to it.
struct Scene {
    assigner: String,
    _node: Process,
    _data: tempfile::TempDir,
}

impl Scene {
    /// Makes a job by this spec.
    fn start(spec: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = free_ports(2);
        let (assigner, peers) = (local(ports[0]).to_string(), local(ports[1]).to_string());
        let kept = data.path().to_str().unwrap();
        let place = ["--data-dir", kept, "--listen", &assigner, "--peer-listen", &peers];
        let node = Process::start(&[&["assigner", "--init"], &place[..]].concat());
        until("a leader", || {
            let made = run_with(&["job", "apply", "-", "--assigners", &assigner], spec);
            made.status.success().then_some(())
        });
        Self { assigner, _node: node, _data: data }
    }

    /// Says something to the assigner, as an operator does.
    fn operator(&self, args: &[&str]) -> Output {
        run(&[args, &["--assigners", &self.assigner]].concat())
    }

    /// Waits until this many tasks serve the job, and has its keys stay where they are from then on: what a task keeps in memory is gone
    /// when they move. Tasks that leave are replaced all the same.
    fn settle(&self, job: &str, tasks: usize) {
        let json = |args: &[&str]| -> Option<Value> {
            serde_json::from_slice(&self.operator(&[args, &["-o", "json"]].concat()).stdout).ok()
        };
        until("every task to have slices", || {
            let listed = json(&["task", "list"])?;
            let serves = |task: &&Value| task["slices"].as_u64() > Some(0);
            (listed.as_array()?.iter().filter(serves).count() == tasks).then_some(())
        });
        let frozen = self.operator(&["assignment", "freeze", job]);
        assert!(frozen.status.success(), "{}", text(&frozen.stderr));
        until("what is on its way to arrive", || {
            let shown = json(&["assignment", "show", job])?;
            shown["slices"].as_array()?.iter().all(|slice| slice["transit"].is_null()).then_some(())
        });
    }

    /// An example with these arguments.
    fn example(&self, name: &str, args: &[&str]) -> Command {
        let mut command = Command::new(built(name).expect("asked before"));
        command.env("MANDOLINE_ASSIGNERS", &self.assigner).args(args).stdin(Stdio::null());
        command
    }

    /// Runs an example to its end, and gives what it prints.
    fn says(&self, name: &str, args: &[&str]) -> String {
        let mut process = Process::spawn(self.example(name, args));
        assert_eq!(process.ended(), Some(0), "{name} {args:?}: {}", process.stderr());
        process.stdout()
    }

    /// Starts a task of an example on a free port, and waits until it is ready; with where it listens.
    fn task(&self, example: &str, args: &[&str], name: &str) -> (Process, SocketAddr) {
        let mut task = Process::spawn(self.example(example, args));
        let said = task.line(&format!("{name} serves"));
        (task, said.rsplit(' ').next().unwrap().parse().unwrap())
    }
}

/// Where `cargo test` builds an example, beside this test. None if it was told to build this test alone.
fn built(name: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().expect("a test is a file");
    let built = test.parent()?.parent()?.join("examples").join(name);
    if !built.exists() {
        let all = std::env::var("MANDOLINE_REQUIRE_ALL").as_deref() == Ok("1");
        assert!(!all, "{} is missing", built.display());
        println!("skipped: {} not found", built.display());
        return None;
    }
    Some(built)
}

/// Sends a task Ctrl-C, and waits until it has given its slices away and ended well.
fn ctrl_c(mut task: Process) {
    task.signal(Signal::INT);
    assert_eq!(task.ended(), Some(0), "{}", task.stderr());
}

#[test]
fn an_example_is_read_at_one_sitting_and_says_how_to_run_it() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let readme = std::fs::read_to_string(folder.join("../README.md")).unwrap();
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        if file.extension().is_none_or(|ending| ending != "rs") || name == "build" {
            continue;
        }
        let source = std::fs::read_to_string(&file).unwrap();
        assert!(source.lines().count() < 150, "{name}.rs has {} lines", source.lines().count());
        let mut commands = source.lines().filter_map(|line| line.strip_prefix("//!     "));
        let run = format!("cargo run -p examples --example {name} -- ");
        assert!(commands.any(|command| command.starts_with(&run)), "{name}.rs shows no {run}");
        assert!(readme.contains(&format!("--example {name} -- ")), "README.md does not run {name}");
        if let Some(built) = built(&name) {
            let mut command = Command::new(built);
            command.arg("--what");
            let mut process = Process::spawn(command);
            assert_eq!(process.ended(), Some(1), "{name} takes --what");
            let said = process.stderr();
            assert!(said.contains(&format!("usage: {name} ")), "{name} --what says {said}");
        }
        seen += 1;
    }
    assert!(seen >= 7, "{seen} examples");
}

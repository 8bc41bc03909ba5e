//! Too many tasks gone at once, and a key that crashes whoever serves it: real processes that are stopped and crash.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::process::Signal;
use serde_json::Value;

use crate::kit::{Process, ask, free_ports, json, local, mandoline, run, run_with, text, until};

struct Scene {
    assigner: String,
    http: SocketAddr,
    _node: Process,
    _data: tempfile::TempDir,
}

impl Scene {
    /// A node and a job.
    fn start(spec: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = free_ports(2);
        let (http, peer) = (local(ports[0]), local(ports[1]).to_string());
        let (assigner, kept) = (http.to_string(), data.path().to_str().unwrap());
        let place = ["--data-dir", kept, "--listen", &assigner, "--peer-listen", &peer];
        let node = Process::start(&[&["assigner", "--init"], &place[..]].concat());
        until("the node to be ready", || {
            ask(http, "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
        let scene = Self { assigner, http, _node: node, _data: data };
        let output = run_with(&scene.to(&["job", "apply", "-"]), spec);
        assert!(output.status.success(), "{}", text(&output.stderr));
        scene
    }

    fn to<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [args, &["--assigners", &self.assigner]].concat()
    }

    fn task<'a>(&'a self, name: &'a str, listen: &'a str) -> Vec<&'a str> {
        self.to(&["demo", "task", "--name", name, "--listen", listen])
    }

    fn job(&self) -> Value {
        json(&self.to(&["job", "get", "kv", "-o", "json"]))
    }

    fn metric(&self, name: &str) -> String {
        let page = ask(self.http, "GET", "/metrics", "").unwrap().body;
        let begins = format!("mandoline_assigner_{name}{{job=\"kv\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&begins));
        line.unwrap_or_else(|| panic!("no {name}: {page}")).to_owned()
    }

    fn refused(&self, args: &[&str], says: &str) {
        let output = run(&self.to(args));
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?} does not say {says:?}: {err}");
    }
}

/// Waits until so many tasks serve.
fn serving(scene: &Scene, count: usize) {
    until("all tasks to serve", || {
        let tasks = scene.job()["tasks"].clone();
        let tasks = tasks.as_array()?;
        let serve = tasks.iter().all(|task| task["slices"].as_u64() > Some(0));
        (tasks.len() == count && serve).then_some(())
    });
}

#[test]
fn most_tasks_stopped_at_once_lose_nothing_until_somebody_knows_better() {
    let scene = Scene::start("name: kv\nheartbeat: 200ms\nbalance_every: 1s\nlease: 2s\n");
    let tasks: Vec<Process> = (0..5)
        .map(|index| Process::start(&scene.task(&format!("kv-{index}"), "127.0.0.1:0")))
        .collect();
    serving(&scene, 5);
    scene.refused(&["task", "believe-lost", "--job", "kv"], "its brake does not hold");
    scene.refused(&["task", "believe-lost", "--job", "nope"], "there is no job nope");
    assert_eq!(scene.metric("brake_holding"), "0");

    let stop = |signal| tasks[..3].iter().for_each(|task| task.signal(signal));
    let held = |count: usize| {
        until("the brake to hold", || {
            let job = scene.job();
            (job["brake"]["missing"].as_array()?.len() == count).then_some(job)
        })
    };
    let before = scene.job();
    stop(Signal::STOP);
    let during = held(3);
    assert_eq!(during["brake"]["tasks"], 5);
    assert_eq!(during["tasks"].as_array().unwrap().len(), 5, "{during}");
    assert_eq!((&during["churn"], &during["unserved"]), (&before["churn"], &0.into()));
    assert_eq!(
        (scene.metric("brake_holding"), scene.metric("brake_missing_tasks")),
        ("1".into(), "3".into())
    );
    let status = text(&run(&scene.to(&["status"])).stdout);
    assert!(status.contains("ALARM  job kv: 3 of 5 tasks are missing at once"), "{status}");
    assert!(status.contains("mandoline task believe-lost --job kv"), "{status}");
    assert_eq!(ask(scene.http, "GET", "/readyz", "").unwrap().status, 200);

    stop(Signal::CONT);
    until("the brake to let go", || scene.job()["brake"].is_null().then_some(()));
    until("all tasks to be connected", || {
        let tasks = scene.job()["tasks"].clone();
        tasks.as_array()?.iter().all(|task| task["connected"] == true).then_some(())
    });
    let after = scene.job();
    assert_eq!(after["tasks"].as_array().unwrap().len(), 5);
    assert_eq!(after["churn"]["moves"], before["churn"]["moves"], "all well without a move");

    stop(Signal::STOP);
    held(3);
    let output = run(&scene.to(&["task", "believe-lost", "--job", "kv"]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "taken for lost: kv-0, kv-1, kv-2\n");
    until("the others to serve everything", || {
        let job = scene.job();
        let left = job["tasks"].as_array()?.len();
        (left == 2 && job["unserved"] == 0 && job["brake"].is_null()).then_some(())
    });
    stop(Signal::CONT);
}

/// Starts a task anew whenever it has crashed, until told to stop; counts its crashes.
fn supervise(args: Vec<String>, stop: Arc<AtomicBool>) -> JoinHandle<u32> {
    std::thread::spawn(move || {
        let mut crashes = 0;
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        while !stop.load(Ordering::Relaxed) {
            let mut child = mandoline(&args).stderr(std::process::Stdio::null()).spawn().unwrap();
            let ended = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break Some(status);
                }
                if stop.load(Ordering::Relaxed) {
                    child.kill().ok();
                    child.wait().ok();
                    break None;
                }
                std::thread::park_timeout(std::time::Duration::from_millis(20));
            };
            crashes += u32::from(ended.is_some());
        }
        crashes
    })
}

#[test]
fn a_key_that_crashes_tasks_is_confined_to_one_and_shown() {
    let scene = Scene::start(
        "name: kv\nheartbeat: 100ms\nbalance_every: 1s\nlease: 2s\nbrake: 100%\nconfine_after: 3\n",
    );
    let ports = free_ports(4);
    let stop = Arc::new(AtomicBool::new(false));
    let supervisors: Vec<JoinHandle<u32>> = (0..4)
        .map(|index| {
            let (name, listen) = (format!("kv-{index}"), local(ports[index]).to_string());
            let args = scene.task(&name, &listen);
            let args = [&args[..], &["--crash-on", "poison"]].concat();
            supervise(args.into_iter().map(str::to_owned).collect(), Arc::clone(&stop))
        })
        .collect();
    serving(&scene, 4);
    // A caller that asks whoever serves the key, again and again, as long as it takes.
    let ask_all = || {
        for port in &ports {
            ask(local(*port), "GET", "/kv/poison", "");
        }
    };
    let job = until("the key's slice to be confined", || {
        ask_all();
        let job = scene.job();
        (!job["confined"].as_array()?.is_empty()).then_some(job)
    });
    let confined = job["confined"].as_array().unwrap();
    let crashes = confined[0]["crashes"].as_array().unwrap();
    assert!(crashes.len() >= 3, "{confined:?}");
    let keeper = confined[0]["task"].as_str().unwrap().to_owned();
    let status = text(&run(&scene.to(&["status"])).stdout);
    let says = format!("crashes tasks and stays with {keeper}, which serves nothing else");
    assert!(status.contains(&says) && status.contains("assignment release kv"), "{status}");
    assert_ne!(scene.metric("job_confined"), "0");

    // From now on no other dies of it, however often it is asked for.
    let sessions = |job: &Value| -> Vec<u64> {
        let tasks = job["tasks"].as_array().unwrap().iter();
        let others = tasks.filter(|task| task["name"] != keeper.as_str());
        others.map(|task| task["session"].as_u64().unwrap()).collect()
    };
    // One that has not heard yet that the key is not its own may die of it once more.
    let others = (0..4).filter(|index| keeper != format!("kv-{index}"));
    let others: Vec<u16> = others.map(|index| ports[index]).collect();
    until("the others to know", || {
        let knows = |port: &u16| {
            ask(local(*port), "GET", "/kv/poison", "").is_some_and(|answer| answer.status == 421)
        };
        others.iter().all(knows).then_some(())
    });
    let settled = until("the others to serve", || {
        let job = scene.job();
        (sessions(&job).len() == 3).then_some(job)
    });
    let mut deaths = 0;
    let mut keeper_was = None;
    until("its keeper to crash three times more", || {
        ask_all();
        let job = scene.job();
        let tasks = job["tasks"].as_array()?;
        let is = tasks.iter().find(|task| task["name"] == keeper.as_str());
        let is = is.and_then(|task| task["session"].as_u64());
        if is.is_some() && is != keeper_was {
            deaths += 1;
            keeper_was = is;
        }
        (deaths > 3).then_some(())
    });
    assert_eq!(sessions(&scene.job()), sessions(&settled), "no other died");

    let slice = confined[0]["slice"].as_str().unwrap();
    let output = run(&scene.to(&["assignment", "release", "kv", slice]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    scene.refused(&["assignment", "release", "kv", slice], "has not confined");
    scene.refused(&["assignment", "release", "nope", slice], "there is no job nope");
    stop.store(true, Ordering::Relaxed);
    let crashes: Vec<u32> = supervisors.into_iter().map(|one| one.join().unwrap()).collect();
    let died = crashes.iter().filter(|count| **count > 0).count();
    println!("crashes by task: {crashes:?}");
    assert!(died <= 4, "{crashes:?}");
}

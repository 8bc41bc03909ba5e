//! Pauses by the command: from the log to whoever follows the flags, over deaths and restarts, and through a real proxy.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mandoline::flags::Follower;
use mandoline_core::flags::{Count, Flags, PauseId, Phase, Standing};
use serde_json::Value;
use tokio::time::Instant;

use crate::kit::{Process, ask, free_ports, json, local, run, run_with, text, until};

/// An assigner of its own, which can die and come back.
struct Scene {
    assigner: String,
    http: SocketAddr,
    peer: String,
    node: Option<Process>,
    data: tempfile::TempDir,
}

impl Scene {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = free_ports(2);
        let (http, peer) = (local(ports[0]), local(ports[1]).to_string());
        let mut scene = Self { assigner: http.to_string(), http, peer, node: None, data };
        scene.come(&["--init"]);
        let output = run_with(&scene.to(&["job", "apply", "-"]), "name: kv\n");
        assert!(output.status.success(), "{}", text(&output.stderr));
        scene
    }

    fn come(&mut self, first: &[&str]) {
        let kept = self.data.path().join("node");
        let kept = kept.to_str().unwrap();
        let place = ["--data-dir", kept, "--listen", &self.assigner, "--peer-listen", &self.peer];
        let node = Process::start(&[&["assigner"], first, &place[..]].concat());
        until("the node to be ready", || {
            ask(self.http, "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
        self.node = Some(node);
    }

    fn die(&mut self) {
        drop(self.node.take());
    }

    fn to<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [args, &["--assigners", &self.assigner]].concat()
    }

    /// Adds a pause of the job, and gives its id.
    fn pause(&self, lasts: &str, more: &[&str]) -> String {
        let add = ["pause", "add", "--job", "kv", "--for", lasts, "-o", "json"];
        let added = json(&self.to(&[&add[..], more].concat()));
        added["pause"].as_str().unwrap().to_owned()
    }

    fn list(&self) -> Vec<Value> {
        let list = json(&self.to(&["pause", "list", "-o", "json"]));
        list.as_array().unwrap().clone()
    }

    /// What a command ends with, and what it says.
    fn ends(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = run(&self.to(args));
        (output.status.code(), text(&output.stdout) + &text(&output.stderr))
    }

    fn check(&self, args: &[&str], code: i32, says: &str) {
        let (found, said) = self.ends(args);
        assert_eq!(found, Some(code), "{args:?}: {said}");
        assert!(said.contains(says), "{args:?} does not say {says:?}: {said}");
    }

    fn follow(&self, cache: Option<&Path>) -> Follower {
        follow(&self.assigner, cache)
    }
}

fn follow(source: &str, cache: Option<&Path>) -> Follower {
    let builder = Follower::builder().sources([source]).named("test");
    let builder = match cache {
        Some(path) => builder.cache(path),
        None => builder,
    };
    builder.start().unwrap()
}

/// The pauses that a follower knows, as `1 holding, 2 releasing`.
fn shown(follower: &Follower) -> String {
    let flags: Arc<Flags> = follower.flags().borrow().clone();
    let pause = |pause: &mandoline_core::flags::Pause| {
        let phase = match pause.phase {
            Phase::Holding => "holding",
            Phase::Releasing { .. } => "releasing",
        };
        format!("{} {phase}", pause.id)
    };
    flags.pauses.values().map(pause).collect::<Vec<_>>().join(", ")
}

fn reaches(follower: &Follower, wanted: &str) {
    until(&format!("the flags {wanted:?}"), || (shown(follower) == wanted).then_some(()));
}

#[test]
fn a_pause_is_added_followed_ended_and_gone_and_nonsense_is_refused() {
    let scene = Scene::start();
    let early = scene.follow(None);
    assert_eq!(scene.list(), [] as [Value; 0]);
    scene.check(&["pause", "add", "--job", "kv"], 2, "--for");
    scene.check(&["pause", "add", "--job", "kv", "--for", "0s"], 2, "give it an end");
    scene.check(&["pause", "add", "--job", "kv", "--for", "2h"], 2, "give it an end");
    scene.check(&["pause", "add", "--for", "30s"], 2, "says of nothing what it is for");
    scene.check(&["pause", "add", "--job", "no", "--for", "30s"], 2, "there is no job no");
    scene.check(&["pause", "add", "--slice", "f..0", "--for", "30s"], 2, "is no slice");
    scene.check(&["pause", "add", "--path", "carts", "--for", "30s"], 2, "is no path");
    scene.check(&["pause", "end", "p9"], 2, "there is no pause p9");
    scene.check(&["pause", "wait", "p9"], 1, "there is no pause p9");
    scene.check(&["pause", "end", "--all"], 0, "there is no pause");

    let first =
        scene.pause("50s", &["--why", "disk swap", "--path", "/kv", "--method", "PUT,POST"]);
    assert_eq!(first, "p1");
    let listed = scene.list();
    assert_eq!((&listed[0]["pause"], &listed[0]["state"]), (&"p1".into(), &"holding".into()));
    assert_eq!(listed[0]["scope"]["methods"], serde_json::json!(["PUT", "POST"]));
    assert_eq!((&listed[0]["why"], &listed[0]["for"]), (&"disk swap".into(), &"50s".into()));
    scene.check(&["pause", "list"], 0, "job kv, path /kv, method PUT or POST  disk swap");
    scene.check(&["status"], 0, "requests are paused: p1");
    reaches(&early, "p1 holding");
    let late = scene.follow(None);
    reaches(&late, "p1 holding");

    assert_eq!(scene.pause("3s", &["--then", "fail"]), "p2");
    reaches(&late, "p1 holding, p2 holding");
    scene.check(&["pause", "end", "p1", "--over", "1h"], 2, "600s at most");
    scene.check(&["pause", "end", "p1", "--over", "1s"], 0, "ended: p1");
    scene.check(&["pause", "wait", "p1"], 1, "was ended");
    // The one is taken away a while after it was let go, the other when it has lasted.
    reaches(&late, "");
    reaches(&early, "");
    assert_eq!(scene.list(), [] as [Value; 0]);
    assert_eq!(scene.pause("30s", &[]), "p3", "an id is given once");
    scene.check(&["pause", "end", "--all", "--over", "0s"], 0, "ended: p3");
}

#[test]
fn waiting_ends_when_every_proxy_holds_and_nothing_is_in_flight() {
    let scene = Scene::start();
    let proxy = scene.follow(None);
    let standing = proxy.standing();
    let pause = scene.pause("1m", &[]);
    reaches(&proxy, "p1 holding");
    let progress = || scene.list()[0]["progress"].clone();
    // It is there, and has not said that it holds.
    until("the proxy to be known", || (progress()["proxies"] == 1).then_some(()));
    assert_eq!((&progress()["heard"], &progress()["quiet"]), (&0.into(), &false.into()));
    let wait = |within| ["pause", "wait", &pause, "--within", within].map(str::to_owned);
    let waits = |within| {
        let args = wait(within);
        scene.ends(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert!(waits("100ms").1.contains("in force in 0 of 1 proxies"));
    let version = proxy.flags().borrow().version;
    let stand = |in_flight| {
        let counts = [(PauseId(1), Count { in_flight, held: 7 })].into();
        standing.send_replace(Standing { version, counts });
    };
    stand(2);
    until("the proxy's word", || (progress()["in_flight"] == 2).then_some(()));
    let (code, said) = waits("100ms");
    assert_eq!(code, Some(1));
    assert!(said.contains("in force in 1 of 1 proxies, 2 requests are in flight"), "{said}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| waits("40s"));
        stand(0);
        let (code, said) = waiting.join().unwrap();
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("in 1 proxies that hold 7 requests"), "{said}");
    });
    // One that comes back to life is waited for again; one that leaves is not.
    stand(1);
    until("the proxy's word", || (progress()["in_flight"] == 1).then_some(()));
    proxy.leave();
    until("the proxy to be forgotten", || (progress()["proxies"] == 0).then_some(()));
    assert!(waits("10s").1.contains("no proxy is there"));
}

#[test]
fn a_pause_outlives_the_assigner_and_comes_back_with_its_disk_and_not_once_it_was_ended() {
    let mut scene = Scene::start();
    let kept = scene.data.path().join("flags");
    let follower = scene.follow(Some(&kept));
    scene.pause("50s", &[]);
    reaches(&follower, "p1 holding");
    scene.die();
    assert_eq!(shown(&follower), "p1 holding", "who knew it still does");
    // A proxy that restarts with nobody to ask knows it too, and for no longer.
    until("the flags on disk", || kept.exists().then_some(()));
    let restarted = scene.follow(Some(&kept));
    let lasts = restarted.flags().borrow().pauses[&PauseId(1)].order.lasts;
    assert!(lasts < Duration::from_secs(50), "{lasts:?}");
    scene.come(&[]);
    assert_eq!(scene.list()[0]["state"], "holding");
    scene.pause("50s", &[]);
    for known in [&follower, &restarted] {
        reaches(known, "p1 holding, p2 holding");
    }
    let (code, said) = scene.ends(&["pause", "end", "--all", "--over", "0s"]);
    assert_eq!(code, Some(0), "{said}");
    reaches(&follower, "");
    scene.die();
    scene.come(&[]);
    assert_eq!(scene.list(), [] as [Value; 0], "what was ended stays so");
    assert_eq!(scene.pause("30s", &[]), "p3");
    for known in [&follower, &restarted] {
        reaches(known, "p3 holding");
    }
}

#[test]
fn a_leader_that_dies_takes_no_pause_with_it() {
    let data = tempfile::tempdir().unwrap();
    let ports = free_ports(6);
    let client = |node: usize| local(ports[node]).to_string();
    let peer = |node: usize| local(ports[3 + node]).to_string();
    let seats: Vec<String> =
        (0..3).map(|node| format!("127.0.0.1:{}/{}", ports[node], ports[3 + node])).collect();
    let seats = seats.join(",");
    let mut nodes: Vec<Option<Process>> = (0..3)
        .map(|node| {
            let kept = data.path().join(node.to_string());
            let kept = kept.to_str().unwrap();
            let (listen, peer) = (client(node), peer(node));
            Some(Process::start(&[
                "assigner",
                "--peers",
                &seats,
                "--data-dir",
                kept,
                "--listen",
                &listen,
                "--peer-listen",
                &peer,
            ]))
        })
        .collect();
    for port in &ports[..3] {
        until("the nodes to be ready", || {
            ask(local(*port), "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
    }
    let all = (0..3).map(client).collect::<Vec<_>>().join(",");
    let to = |args: &[&str]| {
        let output = run(&[args, &["--assigners", &all]].concat());
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    to(&["pause", "add", "--path", "/kv", "--for", "1m"]);
    let followers: Vec<Follower> = (0..3).map(|node| follow(&client(node), None)).collect();
    followers.iter().for_each(|follower| reaches(follower, "p1 holding"));
    let status: Value = serde_json::from_str(&to(&["status", "-o", "json"])).unwrap();
    let leads = status["nodes"].as_array().unwrap().iter().find(|node| node["leader"] == true);
    let leads = leads.unwrap()["client_address"].as_str().unwrap().to_owned();
    let leader = (0..3).find(|node| client(*node) == leads).unwrap();
    nodes[leader] = None;
    // The next leader has it, counts it anew, and ends it.
    let others: Vec<usize> = (0..3).filter(|node| *node != leader).collect();
    let ended = until("another leader", || {
        let (first, second) = (client(others[0]), client(others[1]));
        let args = ["pause", "end", "p1", "--over", "0s", "--assigners"];
        let output = run(&[&args[..], &[&format!("{first},{second}")]].concat());
        output.status.success().then(|| text(&output.stdout))
    });
    assert_eq!(ended, "ended: p1\n");
    others.iter().for_each(|node| reaches(&followers[*node], ""));
    assert_eq!(shown(&followers[leader]), "p1 holding", "it has nobody to ask");
}

#[test]
fn a_distributor_passes_pauses_on() {
    let scene = Scene::start();
    let listen = local(free_ports(1)[0]).to_string();
    let start = ["distributor", "--job", "kv", "--upstream", &scene.assigner, "--listen", &listen];
    let _distributor = Process::start(&start);
    scene.pause("1m", &[]);
    let follower = follow(&listen, None);
    reaches(&follower, "p1 holding");
    scene.check(&["pause", "end", "p1", "--over", "0s"], 0, "ended: p1");
    reaches(&follower, "");
}

#[test]
fn a_proxy_holds_while_it_is_paused_and_lets_go_by_its_own_clock_with_the_assigner_dead() {
    let mut scene = Scene::start();
    let ports = free_ports(3);
    let (task, listen, admin) =
        (local(ports[0]).to_string(), local(ports[1]).to_string(), local(ports[2]).to_string());
    let _task = Process::start(&scene.to(&["demo", "task", "--name", "kv-0", "--listen", &task]));
    let proxy = ["proxy", "--job", "kv", "--listen", &listen, "--admin", &admin];
    let _proxy = Process::start(&scene.to(&proxy));
    let put = |key: &str| {
        let began = Instant::now();
        let answer = ask(local(ports[1]), "PUT", &format!("/kv/{key}"), "x");
        answer.map(|answer| (answer.status, began.elapsed()))
    };
    until("the job to be served", || put("a").filter(|(status, _)| *status < 300));

    // By its end in the log.
    let pause = scene.pause("1m", &["--release-over", "0s"]);
    let progress = || scene.list()[0]["progress"].clone();
    until("the proxy to hold", || (progress()["heard"] == 1).then_some(()));
    std::thread::scope(|scope| {
        let held = scope.spawn(|| put("b"));
        until("the request to be held", || (progress()["held"] == 1).then_some(()));
        scene.check(&["pause", "wait", &pause, "--within", "40s"], 0, "that hold 1 requests");
        assert!(!held.is_finished());
        scene.check(&["pause", "end", &pause], 0, "ended");
        let (status, _) = held.join().unwrap().unwrap();
        assert!(status < 300, "{status}");
    });

    // By the proxy's clock.
    scene.pause("4s", &["--release-over", "0s"]);
    let holds = || {
        let page = ask(local(ports[2]), "GET", "/metrics", "").unwrap().body;
        page.contains("pause=\"p2\"")
    };
    until("the proxy to hear", || holds().then_some(()));
    scene.die();
    let (status, took) = put("c").unwrap();
    assert!(status < 300 && took > Duration::from_millis(500), "{status} {took:?}");
}

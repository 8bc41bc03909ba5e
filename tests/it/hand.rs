//! The operator's hand: what is frozen, pinned and shown by the command line, on a real node with real tasks.

use serde_json::Value;

use crate::kit::{Process, ask, free_ports, json, local, run, run_with, text, until};

struct Scene {
    assigner: String,
    _processes: Vec<Process>,
    _data: tempfile::TempDir,
}

impl Scene {
    /// A node, a job and two tasks that both serve.
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = free_ports(2);
        let (assigner, peer) = (local(ports[0]).to_string(), local(ports[1]).to_string());
        let kept = data.path().to_str().unwrap();
        let place = ["--data-dir", kept, "--listen", &assigner, "--peer-listen", &peer];
        let mut processes = vec![Process::start(&[&["assigner", "--init"], &place[..]].concat())];
        until("the node to be ready", || {
            ask(local(ports[0]), "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
        let scene = Self { assigner, _processes: vec![], _data: data };
        let spec = "name: kv\nheartbeat: 500ms\nreport_every: 500ms\nbalance_every: 1s\n";
        scene.run_with(&["job", "apply", "-"], spec);
        for (name, labels) in [("kv-0", "zone=a,region=us"), ("kv-1", "zone=b,region=eu")] {
            let listen = ["--listen", "127.0.0.1:0", "--assigners", &scene.assigner];
            let args = [&["demo", "task", "--name", name, "--label", labels], &listen[..]].concat();
            processes.push(Process::start(&args));
        }
        let scene = Self { _processes: processes, ..scene };
        until("both tasks to serve", || {
            let tasks = scene.json(&["task", "list"]);
            let serves = |task: &Value| task["slices"].as_u64() > Some(0);
            let tasks = tasks.as_array()?;
            (tasks.len() == 2 && tasks.iter().all(serves)).then_some(())
        });
        scene
    }

    fn to<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [args, &["--assigners", &self.assigner]].concat()
    }

    fn json(&self, args: &[&str]) -> Value {
        json(&[args, &["-o", "json", "--assigners", &self.assigner]].concat())
    }

    fn run_with(&self, args: &[&str], input: &str) -> String {
        let output = run_with(&self.to(args), input);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn refused(&self, args: &[&str], code: i32, says: &str) {
        let output = run(&self.to(args));
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?} does not say {says:?}: {err}");
    }
}

const LOW: &str = "0000000000000000..00000000000000ff";

#[test]
fn an_operator_freezes_pins_and_looks() {
    let scene = Scene::start();
    // What is shown of all slices leaves no key out.
    let page = scene.json(&["assignment", "show", "kv"]);
    let slices = page["slices"].as_array().unwrap();
    let text_of = |slice: &Value| slice["slice"].as_str().unwrap().to_owned();
    assert!(text_of(&slices[0]).starts_with("0000000000000000.."), "{page}");
    assert!(text_of(slices.last().unwrap()).ends_with("..ffffffffffffffff"), "{page}");
    let task_of = |slice: &Value| slice["replicas"][0]["task"].as_str().unwrap().to_owned();
    assert!(slices.iter().all(|slice| task_of(slice).starts_with("kv-")), "{page}");
    assert!(slices.iter().all(|slice| slice["replicas"][0]["since"].is_string()), "{page}");
    // Of one key, its slice alone: "abc" lies at 78af5f94892f3950.
    let one = scene.json(&["assignment", "show", "kv", "--key", "abc"]);
    assert_eq!(one["slice_key"], "78af5f94892f3950");
    let [slice] = &one["slices"].as_array().unwrap()[..] else { panic!("one slice: {one}") };
    let (first, last) =
        text_of(slice).split_once("..").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert!(first.as_str() <= "78af5f94892f3950" && "78af5f94892f3950" <= last.as_str(), "{one}");
    let of_one = scene.json(&["assignment", "show", "kv", "--task", "kv-1"]);
    assert!(of_one["slices"].as_array().unwrap().iter().all(|slice| task_of(slice) == "kv-1"));

    // Frozen, and not.
    scene.run_with(&["assignment", "freeze", "kv"], "");
    assert_eq!(scene.json(&["assignment", "show", "kv"])["frozen"], true);
    assert!(scene.run_with(&["assignment", "show", "kv"], "").contains("frozen"));
    assert_eq!(scene.json(&["job", "get", "kv"])["frozen"], true);
    assert!(scene.run_with(&["job", "get", "kv"], "").contains("frozen by hand"));
    scene.run_with(&["assignment", "unfreeze", "kv"], "");
    assert_eq!(scene.json(&["assignment", "show", "kv"])["frozen"], false);

    // Pinned: a slice, a key and a group; what makes no sense is refused by name.
    scene.run_with(&["assignment", "pin", "kv", LOW, "kv-1"], "");
    scene.run_with(&["assignment", "pin", "kv", "key:abc", "kv-0"], "");
    scene.run_with(&["assignment", "pin", "kv", "group:tenant-7", "kv-0"], "");
    let pin = ["assignment", "pin", "kv"];
    scene.refused(
        &[&pin[..], &["80..1ff", "kv-0"]].concat(),
        2,
        "is pinned to kv-1: unpin that first",
    );
    scene.refused(&[&pin[..], &["200..2ff", "kv-9"]].concat(), 2, "job kv has no task kv-9");
    scene.refused(&[&pin[..], &["2ff..200", "kv-0"]].concat(), 2, "is no slice: give FIRST..LAST");
    scene.refused(&["assignment", "pin", "nope", LOW, "kv-0"], 2, "there is no job nope");
    scene.refused(&["assignment", "unpin", "kv", "0..fe"], 2, "has no pin of 0000000000000000..");
    scene.refused(&["assignment", "freeze", "nope"], 2, "there is no job nope");
    scene.refused(&["assignment", "show", "nope"], 1, "no job nope");
    scene.refused(&["assignment", "show", "kv", "--task", "kv-9"], 1, "no task kv-9");
    scene.refused(&["moves", "nope"], 1, "no job nope");
    // What is pinned goes there, and says why.
    for (keys, task) in [(LOW, "kv-1"), ("78af5f94892f3950..78af5f94892f3950", "kv-0")] {
        until("a pinned slice to be where it was put", || {
            let page = scene.json(&["assignment", "show", "kv", "--task", task]);
            page["slices"].as_array()?.iter().any(|slice| slice["slice"] == keys).then_some(())
        });
    }
    let reasons = scene.json(&["moves", "kv"]);
    let reasons = reasons.as_array().unwrap().iter().map(|step| &step["reason"]);
    assert!(reasons.into_iter().any(|reason| reason == "pin"));
    let pins = scene.json(&["assignment", "show", "kv"])["pins"].clone();
    assert_eq!(pins.as_array().unwrap().len(), 3, "{pins}");
    assert_eq!((&pins[0]["slice"], &pins[0]["task"]), (&LOW.into(), &"kv-1".into()));
    scene.run_with(&["assignment", "unpin", "kv", "group:tenant-7"], "");
    assert_eq!(scene.json(&["job", "get", "kv"])["pins"], 2);

    // Every move that led here has a reason.
    let moves = scene.json(&["moves", "kv"]);
    let moves = moves.as_array().unwrap();
    assert_eq!(moves[0]["reason"], "first", "{moves:?}");
    assert!(moves.iter().all(|step| step["to"]["task"].as_str().is_some()), "{moves:?}");
    let newest = scene.json(&["moves", "kv", "--newest", "1"]);
    assert_eq!(newest.as_array().unwrap()[..], moves[moves.len() - 1..]);
    let table = scene.run_with(&["moves", "kv"], "");
    assert!(table.contains("GENERATION") && table.contains("first"), "{table}");

    // What `job get` shows can be edited and applied.
    let job = scene.json(&["job", "get", "kv"]);
    let mut spec = job["spec"].clone();
    spec["spill"] = serde_json::json!({ "cap": 1.15 });
    spec["homes"] = serde_json::json!([{ "group": "tenant-7", "region": "eu" }]);
    scene.run_with(&["job", "apply", "-", "--if-version", "1"], &spec.to_string());
    let again = scene.json(&["job", "get", "kv"]);
    assert_eq!(again["spec"]["spill"]["cap"], "115%");
    assert_eq!(again["spec"]["homes"][0]["region"], "eu");
    assert_eq!(again["pins"], 2, "a spec leaves pins alone");
    assert_eq!(scene.json(&["assignment", "show", "kv"])["spill"], "115%", "callers are told");
    // And the group lives where its home is.
    let home = again["spec"]["homes"][0]["slice"].as_str().unwrap();
    let (first, last) = home.split_once("..").unwrap();
    until("the group to be at home", || {
        let page = scene.json(&["assignment", "show", "kv"]);
        let all = page["slices"].as_array()?.clone();
        let within = |slice: &&Value| {
            let text = text_of(slice);
            text.split_once("..").is_some_and(|(a, b)| a <= last && first <= b)
        };
        all.iter().filter(within).all(|slice| task_of(slice) == "kv-1").then_some(())
    });
}

//! reqwest reaches the tasks of the sample cache, with no proxy in between.

use super::{Scene, built};
use crate::kit::{Process, text};

#[test]
fn reqwest_asks_the_owner_of_each_key() {
    if built("reqwest_client").is_none() {
        return;
    }
    let scene = Scene::start("name: kv\n");
    let _tasks = ["kv-0", "kv-1"].map(|name| {
        let place = ["--listen", "127.0.0.1:0", "--assigners", &scene.assigner];
        Process::start(&[&["demo", "task", "--name", name], &place[..]].concat())
    });
    scene.settle("kv", 2);
    let keys: Vec<String> = (0..10).map(|key| format!("key-{key}")).collect();
    for key in &keys {
        scene.says("reqwest_client", &["put", key, &format!("{key}'s")]);
    }
    let get: Vec<&str> = ["get"].into_iter().chain(keys.iter().map(String::as_str)).collect();
    let had = scene.says("reqwest_client", &get);
    for (key, line) in keys.iter().zip(had.lines()) {
        assert!(line.starts_with(&format!("{key}: 200 OK from 127.0.0.1:")), "{had}");
        assert!(line.ends_with(&format!(": {key}'s")), "{had}");
    }
    let drained = scene.operator(&["task", "drain", "kv-0", "--wait"]);
    assert!(drained.status.success(), "{}", text(&drained.stderr));
    let had = scene.says("reqwest_client", &get);
    let address = |line: &str| {
        line.split(" from ").nth(1).map(|rest| rest.split(": ").next().unwrap().to_owned())
    };
    let mut tasks: Vec<String> = had.lines().filter_map(address).collect();
    tasks.dedup();
    assert_eq!(tasks.len(), 1, "{had}");
}

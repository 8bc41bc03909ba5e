//! Calls by a generated stub reach their keys' owners.

use super::{Scene, built, ctrl_c};

#[test]
fn a_generated_stub_finds_each_keys_owner() {
    if built("stub_routing").is_none() {
        return;
    }
    let scene = Scene::start("name: stubs\n");
    let start = |name| scene.task("stub_routing", &["serve", name, "127.0.0.1:0"], name).0;
    let [leaves, _stays] = ["stubs-0", "stubs-1"].map(start);
    scene.settle("stubs", 2);
    let keys: Vec<String> = (0..10).map(|key| format!("key-{key}")).collect();
    let put = |key: &String| {
        let said = scene.says("stub_routing", &["put", key, "red"]);
        said.strip_suffix(&format!(" keeps {key}\n")).expect(&said).to_owned()
    };
    let kept_by: Vec<String> = keys.iter().map(put).collect();
    let get: Vec<&str> = ["get"].into_iter().chain(keys.iter().map(String::as_str)).collect();
    let had = scene.says("stub_routing", &get);
    for ((key, by), line) in keys.iter().zip(&kept_by).zip(had.lines()) {
        assert_eq!(line, format!("{by} has {key}: red"));
    }
    assert!(had.contains("stubs-0") && had.contains("stubs-1"), "both serve some: {had}");

    ctrl_c(leaves);
    let had = scene.says("stub_routing", &get);
    assert!(had.lines().all(|line| line.starts_with("stubs-1 has ")), "{had}");
    assert!(had.contains(": nothing") && had.contains(": red"), "{had}");
}

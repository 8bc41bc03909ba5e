//! The smallest one: a protocol of one line.

use super::{Scene, built};
use crate::kit::json;

#[test]
fn a_sharded_echo_server_answers_from_whoever_owns_the_key() {
    if built("echo").is_none() {
        return;
    }
    let scene = Scene::start("name: echo\n");
    let serve = |name| scene.task("echo", &["serve", name, "127.0.0.1:0"], name);
    let _servers = ["echo-0", "echo-1"].map(serve);
    scene.settle("echo", 2);
    let keys: Vec<String> = (0..20).map(|key| format!("user-{key}")).collect();
    let asked: Vec<&str> = ["ask"].into_iter().chain(keys.iter().map(String::as_str)).collect();
    let answers = scene.says("echo", &asked);
    for (key, answer) in keys.iter().zip(answers.lines()) {
        assert!(
            answer.starts_with("200 echo-") && answer.ends_with(&format!("has {key}")),
            "{answers}"
        );
    }
    assert!(answers.contains("echo-0") && answers.contains("echo-1"), "both serve some: {answers}");
    let jobs = json(&["job", "list", "-o", "json", "--assigners", &scene.assigner]);
    assert!(jobs.to_string().contains("echo-1"), "{jobs}");
}

//! Who listens by one task hears what is said to the other, before a topic moves and after.

use super::{Scene, built, ctrl_c};
use crate::kit::{Process, ask, until};

#[test]
fn publishers_and_listeners_meet_whichever_task_they_ask_and_meet_again_when_it_has_left() {
    if built("rendezvous").is_none() {
        return;
    }
    let scene = Scene::start("name: topics\n");
    let start = |name| scene.task("rendezvous", &["task", name, "127.0.0.1:0"], name);
    let [(leaves, by), (_stays, other)] = ["topics-0", "topics-1"].map(start);
    scene.settle("topics", 2);
    // So many that each task owns some.
    let topics: Vec<String> = (0..10).map(|topic| format!("topic-{topic}")).collect();
    let listen = |topic: &String| {
        let args = ["listen", topic, &by.to_string(), &other.to_string()];
        let mut listener = Process::spawn(scene.example("rendezvous", &args));
        listener.line(&format!("listening to {topic} by {by}"));
        listener
    };
    let mut listeners: Vec<Process> = topics.iter().map(listen).collect();
    // Until one hears it: what is said while a topic moves is lost.
    let say = |topic: &str, what: &str| {
        until("somebody to listen", || {
            let answer = ask(other, "POST", &format!("/topics/{topic}"), what)?;
            (answer.status == 200 && answer.body == "heard by 1\n").then_some(())
        });
    };
    for (topic, listener) in topics.iter().zip(&mut listeners) {
        say(topic, "soup");
        listener.line(&format!("{topic}: soup"));
    }

    ctrl_c(leaves);
    for (topic, listener) in topics.iter().zip(&mut listeners) {
        listener.line(&format!("listening to {topic} by {other}"));
        say(topic, "cake");
        listener.line(&format!("{topic}: cake"));
    }
    let told = topics.iter().zip(&listeners);
    let told = told
        .filter(|(topic, listener)| listener.stdout().contains(&format!("{topic}: come again")));
    assert!(told.count() > 0, "the task that left has told its listeners so");
}

//! The leader ends pauses in the log when they are over by its clock.

use super::*;
use crate::flags::{AtEnd, PauseOrder, Scope};

/// What a scene's flags are at each second at which they change.
fn history(scene: &mut Scene, seconds: u64) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for second in 0..seconds {
        let pauses = scene.state.flags.pauses.values();
        let pauses = pauses.map(|pause| format!("{} {:?}", pause.id, pause.phase));
        let line = pauses.collect::<Vec<_>>().join(", ");
        if found.last().and_then(|last| last.split_once(": ")).is_none_or(|(_, was)| was != line) {
            found.push(format!("{second}: {line}"));
        }
        scene.pass(1, &[], |_| 0);
    }
    found
}

fn pause(scene: &mut Scene, lasts: u64, at_end: AtEnd) {
    let order = PauseOrder {
        scope: Scope { job: Some(kv()), ..Scope::default() },
        why: "".into(),
        lasts: Duration::from_secs(lasts),
        at_end,
        release_over: Duration::from_secs(4),
    };
    scene.propose(Command::AddPause { order });
}

#[test]
fn pauses_end_by_the_leaders_clock_each_in_its_way() {
    let mut scene = Scene::new();
    pause(&mut scene, 10, AtEnd::GoOn);
    pause(&mut scene, 12, AtEnd::Fail);
    let expected = [
        "0: p1 Holding, p2 Holding",
        "10: p1 Releasing { over: 4s }, p2 Holding",
        "12: p1 Releasing { over: 4s }",
        "15: ",
    ];
    assert_eq!(history(&mut scene, 30), expected);
    assert_eq!(scene.leader.pauses.deadline(), None);
}

#[test]
fn an_operators_end_counts_and_a_new_leader_counts_anew() {
    let mut scene = Scene::new();
    pause(&mut scene, 10, AtEnd::GoOn);
    scene.pass(5, &[], |_| 0);
    let (id, over) = (PauseId(1), Duration::from_secs(2));
    scene.propose(Command::EndPause { id, over });
    assert_eq!(history(&mut scene, 10), ["0: p1 Releasing { over: 2s }", "3: "]);
    pause(&mut scene, 10, AtEnd::Fail);
    scene.pass(9, &[], |_| 0);
    scene.leader = Leader::new(scene.now, &scene.state);
    assert_eq!(history(&mut scene, 30), ["0: p2 Holding", "10: "]);
}

//! What a restored backup begins with: nothing of it may be taken for what the cluster before still does.

use super::transcript::Scene;
use super::*;

const NEW: ClusterId = ClusterId(8);

fn restored(mut scene: Scene) -> Scene {
    scene.state = scene.state.restored(NEW, 1_700_000_000_000);
    scene.follow();
    scene
}

#[test]
fn a_restored_cluster_is_another_and_all_that_it_gives_is_greater() {
    let before = Scene::new(Consistency::Exclusive, "a b");
    let last = before.state.last_session;
    let after = restored(before);
    assert_eq!((after.state.cluster, after.state.hold_off), (Some(NEW), true));
    assert_eq!(after.assignment().generation.to_string(), "1700000000000.1");
    // The backup is older than what the cluster before has minted since.
    assert!(after.state.last_session > last + 1_000_000_000);
    // Also where the clock went back since the cluster was founded.
    let again = after.state.restored(NEW, 7);
    assert_eq!(again.incarnation, after.state.incarnation + 1);
    assert!(again.last_session > after.state.last_session + 1_000_000_000);
}

#[test]
fn tasks_and_hand_offs_of_the_cluster_before_are_unknown() {
    let mut scene = Scene::new(Consistency::Exclusive, "a b");
    scene.act("- -> a");
    scene.act("a -> b");
    let old = scene.session("a");
    let mut scene = restored(scene);
    assert_eq!(scene.assignment().tasks.len(), 0);
    for line in ["drain a", "end a", "release", "acknowledged a", "abort"] {
        let refused = scene.act(line);
        assert!(refused == "stale" || refused.contains("has no session"), "{line}: {refused}");
    }
    // Their word that they stopped counts for nothing, and harms nothing.
    assert_eq!(scene.act("again a"), "- #1");
    assert!(scene.session("a") > old);
}

#[test]
fn nobody_owns_until_the_tasks_of_before_have_surely_lapsed() {
    let mut scene = Scene::new(Consistency::Exclusive, "a");
    scene.act("- -> a");
    let mut scene = restored(scene);
    assert_eq!(scene.act("join a"), "- #1");
    assert!(scene.act("- -> a").contains("no slice of kv gets an owner yet"));
    assert_eq!(scene.act("split 80"), "00: - #1; 80: - #1", "nobody owns anything by that");
    assert_eq!(scene.act("merge"), "- #1");
    let settle = |incarnation| Command::Settle { incarnation };
    let incarnation = scene.state.incarnation;
    assert!(scene.apply(settle(incarnation - 1)).contains("is waited out"));
    scene.apply(settle(incarnation));
    assert!(scene.apply(settle(incarnation)).contains("is waited out"), "once is enough");
    assert_eq!(scene.act("- -> a"), "a@5 #5");
}

#[test]
fn what_waited_for_a_task_waits_no_longer_and_is_nobodys() {
    let mut scene = Scene::new(Consistency::Exclusive, "a");
    let (grace, consistency) = (Duration::from_secs(30), Consistency::Exclusive);
    let spec = JobSpec { grace, consistency, ..JobSpec::new(kv()) };
    scene.apply(Command::ApplyJob { spec, if_version: None });
    scene.act("- -> a");
    assert_eq!(scene.act("end a"), "- #4");
    assert_eq!(scene.state.jobs[&kv()].waiting().len(), 1);
    let mut scene = restored(scene);
    let job = &scene.state.jobs[&kv()];
    assert_eq!((job.waiting().len(), job.gone.len()), (0, 0));
    // The task may have been back in the cluster before, after the backup was made.
    assert_eq!(scene.act("join a"), "- #1");
}

#[test]
fn an_affinity_job_is_served_at_once() {
    let mut scene = Scene::new(Consistency::Affinity, "a");
    scene.act("- -> a");
    let mut scene = restored(scene);
    scene.act("join a");
    assert_eq!(scene.act("- -> a"), "a@3 #3");
}

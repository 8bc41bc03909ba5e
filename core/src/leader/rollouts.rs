//! Tasks that restart one after another, under load, and what that moves.

use std::time::Duration;

use crate::command::{Command, EndReason};
use crate::leader::tests::{Scene, kv};
use crate::leader::{Event, Leader};
use crate::restart::NotNow;
use crate::slice::Slice;
use crate::spec::{JobSpec, Ratio};
use crate::state::Refused;
use crate::task::{SessionId, TaskInfo};

/// Some keys carry five times what others do.
fn uneven(slice: Slice) -> u64 {
    let heat = 1 + (slice.first().0 >> 56) % 5;
    (slice.width() >> 44) as u64 * heat
}

impl Scene {
    fn moved(&self) -> Ratio {
        let churn = self.state.jobs[&kv()].churn.load;
        Ratio::from_millionths(u32::try_from(churn).unwrap())
    }

    /// What a task carries of all load.
    fn share_of(&self, session: SessionId) -> f64 {
        let tasks = self.state.jobs[&kv()].assignment.tasks.keys();
        self.load_of(session) / tasks.map(|task| self.load_of(*task)).sum::<f64>()
    }

    /// Drains a task, stops it, and starts it anew after so long.
    fn restart(&mut self, id: u64, session: SessionId, away: u64, revision: &str) -> SessionId {
        self.propose(Command::Drain { job: kv(), session });
        assert_eq!(self.keys_of(session), 0.0, "t{id} is drained");
        self.propose(Command::End { job: kv(), session, reason: EndReason::Left });
        self.pass(away, &[], uneven);
        self.begin(id, 100 + id, revision)
    }

    fn begin(&mut self, id: u64, process: u64, revision: &str) -> SessionId {
        let info = TaskInfo {
            revision: revision.to_owned(),
            ..TaskInfo::new(
                format!("t{id}").parse().unwrap(),
                process,
                format!("h:{id}").parse().unwrap(),
            )
        };
        self.join(info)
    }
}

/// What a rolling restart moves, in relation to all load, and to what had to move: each slice once, and those of the first
/// task twice, since nobody has restarted yet to whom they could go for good.
fn moved_by_a_rolling_restart(tasks: u64, to: &str, pause: u64) -> (f64, f64) {
    let mut scene = Scene::new();
    let old: Vec<SessionId> = (1..=tasks).map(|id| scene.begin(id, id, "v1")).collect();
    scene.pass(60, &[], uneven);
    let (before, first) = (scene.moved(), scene.share_of(old[0]));
    for (id, session) in (1..).zip(old) {
        scene.restart(id, session, 2, to);
        scene.pass(pause, &[], uneven);
    }
    // The rollout is over, and the last one is filled.
    scene.pass(90, &[], uneven);
    let tasks: Vec<SessionId> = scene.state.jobs[&kv()].assignment.tasks.keys().copied().collect();
    for task in &tasks {
        let part = scene.share_of(*task) * tasks.len() as f64;
        assert!((0.9..1.1).contains(&part), "{task} carries {part:.3} of its part at the end");
    }
    let moved = f64::from(scene.moved().millionths() - before.millionths()) / 1e6;
    (moved, moved / (1.0 + first))
}

#[test]
fn a_rolling_restart_moves_each_slice_about_once() {
    for (to, pause) in [("v1", 0), ("v1", 4), ("v1", 25), ("v2", 4), ("v2", 60)] {
        let (of_all, of_must) = moved_by_a_rolling_restart(20, to, pause);
        println!(
            "20 tasks to {to}, {pause} s between them: {of_all:.3} of all load moved, {of_must:.3} of what had to"
        );
        assert!(of_must <= 1.1, "to {to} every {pause} s: {of_must}");
    }
}

#[test]
fn load_is_evened_out_again_when_a_rollout_was_abandoned() {
    let mut scene = Scene::new();
    let tasks: Vec<SessionId> = (1..=4).map(|id| scene.begin(id, id, "v1")).collect();
    scene.pass(60, &[], uneven);
    let canary = scene.restart(1, tasks[0], 2, "v2");
    scene.pass(240, &[], uneven);
    assert_eq!(scene.keys_of(canary), 0.0, "what leaves next is for the newest revision");
    scene.pass(120, &[], uneven);
    assert!(scene.keys_of(canary) > 0.1, "{}", scene.keys_of(canary));
}

#[test]
fn one_task_that_restarts_is_filled_before_long() {
    let mut scene = Scene::new();
    let tasks: Vec<SessionId> = (1..=4).map(|id| scene.begin(id, id, "")).collect();
    scene.pass(60, &[], uneven);
    let back = scene.restart(1, tasks[0], 2, "");
    scene.pass(20, &[], uneven);
    assert_eq!(scene.keys_of(back), 0.0);
    scene.pass(30, &[], uneven);
    assert!(scene.keys_of(back) > 0.1, "{}", scene.keys_of(back));
}

#[test]
fn where_all_leave_nobody_waits() {
    let mut scene = Scene::new();
    let [one, two] = [1, 2].map(|id| scene.begin(id, id, ""));
    let drain = |session| Command::Drain { job: kv(), session };
    scene.propose(drain(one));
    assert_eq!(scene.drained, [one], "its slices have moved");
    scene.propose(drain(two));
    assert_eq!(scene.drained, [one, one, two], "and these have nowhere to go");
    scene.propose(Command::Undrain { job: kv(), session: one });
    assert_eq!((scene.keys_of(one), scene.drained.len()), (1.0, 4), "or they have, after all");
    assert_eq!(scene.drained[3], two);
}

fn with_grace(seconds: u64) -> (Scene, Vec<SessionId>) {
    let mut scene = Scene::new();
    let spec = JobSpec { grace: Duration::from_secs(seconds), ..JobSpec::new(kv()) };
    scene.propose(Command::ApplyJob { spec, if_version: None });
    let tasks = (1..=4).map(|id| scene.begin(id, id, "")).collect();
    scene.pass(60, &[], uneven);
    (scene, tasks)
}

impl Scene {
    fn lose(&mut self, session: SessionId) {
        self.propose(Command::End { job: kv(), session, reason: EndReason::Lost });
    }

    fn slices_of(&self, session: SessionId) -> Vec<Slice> {
        self.state.jobs[&kv()].assignment.of(session).map(|(slice, _)| slice).collect()
    }

    fn unserved(&self) -> usize {
        let slices = self.state.jobs[&kv()].assignment.slices.iter();
        slices.filter(|(_, assigned)| assigned.replicas.as_slice().is_empty()).count()
    }
}

#[test]
fn a_task_that_is_back_within_its_grace_has_its_slices_back() {
    let (mut scene, tasks) = with_grace(30);
    let (had, moved) = (scene.slices_of(tasks[1]), scene.moved());
    scene.lose(tasks[1]);
    scene.pass(25, &tasks[1..2], uneven);
    assert_eq!(scene.unserved(), had.len(), "they wait");
    let back = scene.begin(2, 102, "");
    assert_eq!((scene.slices_of(back), scene.moved()), (had, moved), "and nothing has moved");
}

#[test]
fn when_the_grace_is_over_others_serve() {
    let (mut scene, tasks) = with_grace(30);
    scene.lose(tasks[1]);
    scene.pass(29, &[], uneven);
    assert!(scene.unserved() > 0);
    scene.pass(2, &[], uneven);
    assert_eq!(scene.unserved(), 0);
    // A grace that a new leader finds begins anew, but not for ever.
    scene.lose(tasks[2]);
    scene.pass(20, &[], uneven);
    scene.leader = Leader::new(scene.now, &scene.state);
    scene.pass(20, &[], uneven);
    assert!(scene.unserved() > 0);
    scene.pass(12, &[], uneven);
    assert_eq!(scene.unserved(), 0);
}

#[test]
fn who_drains_or_has_no_grace_is_not_waited_for() {
    let (mut scene, tasks) = with_grace(0);
    scene.lose(tasks[1]);
    assert_eq!(scene.unserved(), 0);
    let (mut scene, tasks) = with_grace(30);
    scene.propose(Command::Drain { job: kv(), session: tasks[0] });
    scene.lose(tasks[0]);
    scene.propose(Command::End { job: kv(), session: tasks[1], reason: EndReason::Left });
    assert_eq!(scene.unserved(), 0);
}

impl Scene {
    fn may_restart(&mut self, task: &str) -> Result<Result<(), NotNow>, Refused> {
        self.leader.may_restart(self.now, &self.state, &kv(), &task.parse().unwrap())
    }

    fn refusal(&mut self, task: &str) -> String {
        self.may_restart(task).unwrap().unwrap_err().to_string()
    }
}

#[test]
fn one_task_at_a_time_may_restart() {
    let mut scene = Scene::new();
    let tasks: Vec<SessionId> = (1..=4).map(|id| scene.begin(id, id, "")).collect();
    scene.pass(20, &[], uneven);
    assert_eq!(scene.may_restart("t1"), Ok(Ok(())));
    assert_eq!(scene.may_restart("t1"), Ok(Ok(())), "who was told yes may ask again");
    assert_eq!(
        scene.refusal("t2"),
        "1 may be unavailable at once, and t1 was told that it may restart (`max_unavailable` in the job's spec)"
    );
    scene.propose(Command::Drain { job: kv(), session: tasks[0] });
    assert!(scene.refusal("t2").contains("t1 drains"));
    scene.propose(Command::End { job: kv(), session: tasks[0], reason: EndReason::Left });
    scene.pass(30, &[], uneven);
    assert!(scene.refusal("t2").contains("t1 is not back yet"));
    scene.begin(1, 101, "");
    assert_eq!(scene.may_restart("t2"), Ok(Ok(())));
    // It changed its mind.
    scene.pass(11, &[], uneven);
    assert_eq!(scene.may_restart("t3"), Ok(Ok(())));
    let unknown = scene.may_restart("t9").unwrap_err();
    assert!(matches!(unknown, Refused::NoSuchTask { .. }), "{unknown}");
    // Nobody waits for ever for one that is gone for good.
    scene.pass(11, &[], uneven);
    scene.lose(tasks[3]);
    assert!(scene.refusal("t2").contains("t4 is not back yet"));
    scene.pass(120, &[], uneven);
    assert_eq!(scene.may_restart("t2"), Ok(Ok(())));
}

#[test]
fn none_may_restart_while_others_are_not_heard() {
    let mut scene = Scene::new();
    let tasks: Vec<SessionId> = (1..=5).map(|id| scene.begin(id, id, "")).collect();
    scene.pass(20, &[], uneven);
    // One was killed a moment ago, and its end is not known yet.
    scene.happen(Event::Broken { job: kv(), session: tasks[0] });
    assert!(scene.refusal("t5").contains("and t1 is not heard ("), "{}", scene.refusal("t5"));
    scene.happen(Event::Attached { job: kv(), session: tasks[0] });
    // So many are missing that the brake holds: none of them ends, however long that is.
    scene.pass(300, &tasks[..3], uneven);
    assert!(scene.leader.hold(&kv()).is_some());
    let refusal = scene.refusal("t5");
    assert!(refusal.contains("t1 is not heard, t2 is not heard, t3 is not heard ("), "{refusal}");
    assert!(scene.refusal("t1").contains("t2 is not heard, t3"), "nor is one of them replaced");
    scene.pass(1, &[], uneven);
    assert_eq!(scene.may_restart("t5"), Ok(Ok(())));
}

#[test]
fn more_may_restart_at_once_where_the_spec_says_so() {
    let mut scene = Scene::new();
    let max_unavailable = crate::spec::Unavailable::Share(Ratio::percent(50));
    let spec = JobSpec { max_unavailable, ..JobSpec::new(kv()) };
    scene.propose(Command::ApplyJob { spec, if_version: None });
    for id in 1..=4 {
        scene.begin(id, id, "");
    }
    assert_eq!([scene.may_restart("t1"), scene.may_restart("t4")], [Ok(Ok(())), Ok(Ok(()))]);
    assert!(scene.refusal("t2").starts_with("2 may be unavailable at once, and t1 was told"));
}

#[test]
fn a_leader_that_began_lately_does_not_know_who_may_restart() {
    let mut scene = Scene::new();
    scene.begin(1, 1, "");
    assert_eq!(scene.may_restart("t1"), Ok(Ok(())), "it has seen everyone come");
    scene.leader = Leader::new(scene.now, &scene.state);
    assert!(scene.refusal("t1").ends_with("ask again in 10s"), "{}", scene.refusal("t1"));
    scene.pass(10, &[], uneven);
    assert_eq!(scene.may_restart("t1"), Ok(Ok(())));
}

#[test]
fn a_new_leader_knows_who_is_not_back() {
    let mut scene = Scene::new();
    let tasks: Vec<SessionId> = (1..=4).map(|id| scene.begin(id, id, "")).collect();
    scene.pass(20, &[], uneven);
    scene.propose(Command::Drain { job: kv(), session: tasks[0] });
    scene.propose(Command::End { job: kv(), session: tasks[0], reason: EndReason::Left });
    let without = scene.state.clone();
    scene.leader = Leader::new(scene.now, &scene.state);
    scene.pass(60, &[], uneven);
    assert!(scene.refusal("t2").contains("t1 is not back yet"), "{}", scene.refusal("t2"));
    // It does not know for how long, so it waits as long as ever.
    scene.pass(60, &[], uneven);
    assert_eq!(scene.may_restart("t2"), Ok(Ok(())));
    // One that has come back since is not waited for, whatever its name is.
    for name in ["t1", "t9"] {
        let info = TaskInfo::new(name.parse().unwrap(), 9, "h:9".parse().unwrap());
        scene.state = without.clone();
        scene.state.apply(Command::Register { job: kv(), info, stopped: None }).unwrap();
        scene.leader = Leader::new(scene.now, &scene.state);
        scene.pass(11, &[], uneven);
        assert_eq!(scene.may_restart("t2"), Ok(Ok(())), "{name}");
    }
}

#[test]
fn the_last_that_could_take_over_may_not_restart() {
    let replicated = JobSpec {
        replicas: crate::spec::ReplicaBounds { min: 2, max: 2 },
        max_unavailable: crate::spec::Unavailable::Tasks(9),
        ..JobSpec::new(kv())
    };
    let mut scene = Scene::new();
    scene.propose(Command::ApplyJob { spec: replicated, if_version: None });
    for id in 1..=3 {
        scene.begin(id, id, "");
    }
    scene.pass(30, &[], uneven);
    assert_eq!(scene.may_restart("t1"), Ok(Ok(())));
    assert!(scene.refusal("t2").starts_with("no other task that stays serves 0"));
    let owned = crate::spec::Consistency::Exclusive;
    let exclusive = JobSpec {
        consistency: owned,
        max_unavailable: crate::spec::Unavailable::Tasks(9),
        ..JobSpec::new(kv())
    };
    let mut state = crate::state::State::default();
    state.apply(Command::ApplyJob { spec: exclusive, if_version: None }).unwrap();
    scene.leader = Leader::new(scene.now, &state);
    scene.state = state;
    scene.begin(1, 1, "");
    let other = scene.begin(2, 2, "");
    scene.happen(Event::Broken { job: kv(), session: other });
    assert!(scene.refusal("t1").starts_with("no other task could take its slices"));
    scene.happen(Event::Attached { job: kv(), session: other });
    assert_eq!(scene.may_restart("t1"), Ok(Ok(())));
    assert!(scene.refusal("t2").starts_with("no other task could take its slices"));
}

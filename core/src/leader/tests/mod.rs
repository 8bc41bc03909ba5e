//! What the leader does about tasks that come, go and carry load, on a log of one node that applies at once.

mod stage;
mod leases;
mod handoffs;
mod pauses;

use super::*;
use crate::balance;
use crate::key::SliceKey;
use crate::offers::{Caller, SliceOffer};
use crate::report::Size;
use crate::slice::Slice;
use crate::spec::{Band, BandOf, JobSpec, Metric, Ratio};
use crate::state::{Outcome, Refused};
use crate::task::TaskInfo;
use crate::transit::{Step, Transit};

/// A leader, and a log of one node that applies at once.
pub(super) struct Scene {
    pub(super) state: State,
    pub(super) leader: Leader,
    pub(super) now: Time,
    pub(super) drained: Vec<SessionId>,
    granted: Vec<(SessionId, u64)>,
}

pub(super) fn kv() -> JobName {
    "kv".parse().unwrap()
}

impl Scene {
    pub(super) fn new() -> Self {
        let (state, now) = (State::default(), Time::from_millis(1_000));
        let leader = Leader::new(now, &state);
        let mut scene = Self { state, leader, now, drained: Vec::new(), granted: Vec::new() };
        scene.propose(Command::ApplyJob { spec: JobSpec::new(kv()), if_version: None });
        scene
    }

    pub(super) fn propose(&mut self, command: Command) -> Option<SessionId> {
        let applied = self.state.apply(command.clone());
        let event =
            if applied.is_ok() { Event::Applied { job: kv() } } else { Event::Failed(command) };
        self.happen(event);
        self.happen(Event::Flagged);
        match applied.ok()?.outcome {
            Outcome::Session(session) => Some(session),
            _ => None,
        }
    }

    pub(super) fn happen(&mut self, event: Event) {
        let mut out = Vec::new();
        self.leader.handle(self.now, &self.state, event, &mut out);
        self.carry_out(out);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Propose(command) => drop(self.propose(command)),
                Action::Plan(round) => {
                    let plan = balance::plan(&round);
                    self.happen(Event::Planned { job: kv(), plan });
                }
                Action::Drained { session, .. } => self.drained.push(session),
                Action::Confirm => self.happen(Event::Confirmed(true)),
                Action::Grant { session, request, .. } => self.granted.push((session, request)),
            }
        }
    }

    /// Lets time pass; all tasks but `silent` beat, and report the load that `load` gives each key.
    pub(super) fn pass(&mut self, seconds: u64, silent: &[SessionId], load: impl Fn(Slice) -> u64) {
        for second in 0..seconds * 10 {
            self.now += Duration::from_millis(100);
            let assignment = Arc::clone(&self.state.jobs[&kv()].assignment);
            for session in
                assignment.tasks.keys().copied().filter(|session| !silent.contains(session))
            {
                self.happen(Event::Heard { job: kv(), session });
                if second % 50 == 0 {
                    let slices = assignment
                        .of(session)
                        .map(|(s, _)| (s, Load::from_milli(load(s))))
                        .collect();
                    let (generation, window) = (assignment.generation, Duration::from_secs(5));
                    self.happen(Event::Reported {
                        job: kv(),
                        report: Report::new(session, generation, window, slices),
                    });
                }
            }
            let mut out = Vec::new();
            if self.leader.deadline().is_some_and(|deadline| deadline <= self.now) {
                self.leader.tick(self.now, &self.state, &mut out);
            }
            self.carry_out(out);
        }
    }

    fn register(&mut self, id: u64) -> SessionId {
        let info = TaskInfo::new(
            format!("t{id}").parse().unwrap(),
            id,
            format!("h:{id}").parse().unwrap(),
        );
        self.join(info)
    }

    pub(super) fn join(&mut self, info: TaskInfo) -> SessionId {
        let session = self.propose(Command::Register { job: kv(), info, stopped: None }).unwrap();
        self.happen(Event::Attached { job: kv(), session });
        session
    }

    pub(super) fn load_of(&self, session: SessionId) -> f64 {
        self.leader.load_of(&kv(), session).units()
    }

    pub(super) fn keys_of(&self, session: SessionId) -> f64 {
        let keys: u128 =
            self.state.jobs[&kv()].assignment.of(session).map(|(slice, _)| slice.width()).sum();
        keys as f64 / (1_u128 << 64) as f64
    }
}

#[test]
fn the_first_task_gets_everything_and_the_next_ones_their_part_at_once() {
    let mut scene = Scene::new();
    let first = scene.register(1);
    assert_eq!(scene.keys_of(first), 1.0);
    let more: Vec<SessionId> = (2..=4).map(|id| scene.register(id)).collect();
    for session in more {
        assert!((0.22..0.28).contains(&scene.keys_of(session)), "{}", scene.keys_of(session));
    }
}

#[test]
fn a_lost_task_is_replaced_by_the_others() {
    let mut scene = Scene::new();
    let (lost, other) = (scene.register(1), scene.register(2));
    scene.pass(20, &[], |_| 100_000);
    scene.happen(Event::Broken { job: kv(), session: lost });
    scene.pass(2, &[lost], |_| 100_000);
    assert_eq!(scene.keys_of(other), 1.0);
    assert!(!scene.state.jobs[&kv()].assignment.tasks.contains_key(&lost));
}

#[test]
fn a_newcomer_under_load_is_filled_round_by_round() {
    let mut scene = Scene::new();
    let spec = JobSpec { churn_budget: Ratio::percent(5), ..JobSpec::new(kv()) };
    scene.propose(Command::ApplyJob { spec, if_version: None });
    let _ = [scene.register(1), scene.register(2)];
    let even = |slice: Slice| (slice.width() >> 44) as u64;
    scene.pass(20, &[], even);
    let newcomer = scene.register(3);
    assert_eq!(scene.keys_of(newcomer), 0.0, "no more than emergencies between rounds");
    scene.pass(10, &[], even);
    assert!((0.01..0.06).contains(&scene.keys_of(newcomer)), "{}", scene.keys_of(newcomer));
    scene.pass(100, &[], even);
    assert!(scene.keys_of(newcomer) > 0.25, "{}", scene.keys_of(newcomer));
}

/// How many moves a new leader makes in its first round, when one of two tasks reports nearly all load.
fn moves_of_a_new_leader(with_away: bool) -> u64 {
    let mut scene = Scene::new();
    let (hot, away) = (scene.register(1), scene.register(2));
    scene.leader = Leader::new(scene.now, &scene.state);
    for session in [hot, away].into_iter().take(if with_away { 2 } else { 1 }) {
        scene.happen(Event::Attached { job: kv(), session });
    }
    let assignment = Arc::clone(&scene.state.jobs[&kv()].assignment);
    for (session, milli) in [(hot, 900_000), (away, 100)] {
        let slices = assignment.of(session).map(|(slice, _)| (slice, Load::from_milli(milli)));
        let (generation, window) = (assignment.generation, Duration::from_secs(5));
        let report = Report::new(session, generation, window, slices.collect());
        scene.happen(Event::Reported { job: kv(), report });
    }
    let before = scene.state.jobs[&kv()].churn.moves;
    scene.now += Duration::from_secs(10);
    let mut out = Vec::new();
    scene.leader.tick(scene.now, &scene.state, &mut out);
    scene.carry_out(out);
    scene.state.jobs[&kv()].churn.moves - before
}

/// How uneven the memory of two tasks is in the end, whose load is even all the time, where one begins with three times as
/// much.
fn memory_of_the_fuller(metrics: Vec<Metric>) -> f64 {
    let mut scene = Scene::new();
    // As wide as it takes: each move of memory moves load, too.
    let band = Band::Fixed { ratio: Ratio::percent(50), of: BandOf::Mean };
    let spec = JobSpec { band, metrics, ..JobSpec::new(kv()) };
    scene.propose(Command::ApplyJob { spec, if_version: None });
    let tasks = [scene.register(1), scene.register(2)];
    // What the first task has at the start is large.
    let start = Arc::clone(&scene.state.jobs[&kv()].assignment);
    let memory = |slice: Slice| match start.get(slice.first()).1.replicas.of(tasks[0]) {
        Some(_) => 30_000,
        None => 10_000,
    };
    let mut held = [0.0; 2];
    for _ in 0..10 {
        let assignment = Arc::clone(&scene.state.jobs[&kv()].assignment);
        for (at, session) in tasks.into_iter().enumerate() {
            let slices: Vec<_> = assignment.of(session).map(|(slice, _)| slice).collect();
            let load = |slice: Slice| Load::from_milli((slice.width() >> 44) as u64);
            let loads = slices.iter().map(|slice| (*slice, load(*slice))).collect();
            let window = Duration::from_secs(5);
            let mut report = Report::new(session, assignment.generation, window, loads);
            let milli =
                |slice: Slice| ((memory(slice) as u128 * (slice.width() >> 32)) >> 32) as u64;
            let size = |slice: &Slice| Size {
                slice: *slice,
                metrics: vec![Load::from_milli(milli(*slice))],
                move_cost: None,
            };
            report.sizes = slices.iter().map(size).collect();
            held[at] = slices.iter().map(|slice| milli(*slice)).sum::<u64>() as f64;
            scene.happen(Event::Reported { job: kv(), report });
        }
        scene.pass(10, &[], |slice| (slice.width() >> 44) as u64);
    }
    held[0].max(held[1]) * 2.0 / (held[0] + held[1])
}

#[test]
fn a_further_metric_is_kept_in_its_band_as_well() {
    let memory = Metric { name: "memory".to_owned(), band: Ratio::percent(10) };
    let (without, with) = (memory_of_the_fuller(vec![]), memory_of_the_fuller(vec![memory]));
    assert!(with < 1.12 && without > 1.3, "{with} with the metric, {without} without");
}

#[test]
fn load_is_not_evened_out_while_a_task_cannot_hear_of_it() {
    assert!(moves_of_a_new_leader(true) > 0);
    assert_eq!(moves_of_a_new_leader(false), 0);
}

#[test]
fn a_leaving_task_hears_when_its_last_slice_is_gone() {
    let mut scene = Scene::new();
    let (leaving, _) = (scene.register(1), scene.register(2));
    scene.propose(Command::Drain { job: kv(), session: leaving });
    assert_eq!((scene.keys_of(leaving), scene.drained.as_slice()), (0.0, [leaving].as_slice()));
}

#[test]
fn a_plan_that_something_overtook_is_dropped_and_made_anew() {
    let mut scene = Scene::new();
    let first = scene.register(1);
    // A plan is under way when a task registers.
    let info = TaskInfo::new("t2".parse().unwrap(), 2, "h:2".parse().unwrap());
    let mut out = Vec::new();
    let drain = scene.state.apply(Command::Drain { job: kv(), session: first });
    assert!(drain.is_ok());
    scene.leader.handle(scene.now, &scene.state, Event::Applied { job: kv() }, &mut out);
    let told = std::mem::take(&mut out);
    assert!(
        matches!(told.as_slice(), [Action::Drained { session, .. }] if *session == first),
        "there is nobody to take over: {told:?}"
    );
    scene.state.apply(Command::Register { job: kv(), info, stopped: None }).unwrap();
    scene.leader.handle(scene.now, &scene.state, Event::Applied { job: kv() }, &mut out);
    let [Action::Plan(round)] = out.as_slice() else { panic!("a plan is asked for: {out:?}") };
    let stale = balance::plan(round);
    scene.state.apply(Command::Undrain { job: kv(), session: first }).unwrap();
    let mut out = Vec::new();
    scene.leader.handle(
        scene.now,
        &scene.state,
        Event::Planned { job: kv(), plan: stale },
        &mut out,
    );
    assert!(matches!(out.as_slice(), [Action::Plan(_)]), "{out:?}");
}

#[test]
fn a_new_leader_finishes_what_cannot_wait() {
    let mut scene = Scene::new();
    let (gone, other) = (scene.register(1), scene.register(2));
    // The leader died after the end was agreed on and before anyone planned for it.
    scene.state.apply(Command::End { job: kv(), session: gone, reason: EndReason::Lost }).unwrap();
    scene.leader = Leader::new(scene.now, &scene.state);
    scene.pass(1, &[], |_| 0);
    assert_eq!(scene.keys_of(other), 1.0);
}

#[test]
fn a_new_leader_begins_with_the_stored_loads_and_gives_everyone_time() {
    let mut scene = Scene::new();
    let (one, two) = (scene.register(1), scene.register(2));
    scene.pass(70, &[], |_| 100_000);
    let stored: Load = scene.state.jobs[&kv()].assignment.slices.iter().map(|(_, a)| a.load).sum();
    assert!(stored > Load::ZERO);
    scene.now += Duration::from_secs(100);
    scene.leader = Leader::new(scene.now, &scene.state);
    scene.pass(2, &[one, two], |_| 0);
    assert_eq!(scene.state.jobs[&kv()].assignment.tasks.len(), 2);
    scene.pass(2, &[one, two], |_| 0);
    assert_eq!(
        scene.state.jobs[&kv()].assignment.tasks.len(),
        0,
        "three heartbeats, and not for ever"
    );
}

fn even(slice: Slice) -> u64 {
    (slice.width() >> 44) as u64
}

/// Five tasks that serve, of which three fall silent for two minutes.
fn three_of_five_fall_silent(spec: JobSpec) -> (Scene, Vec<SessionId>) {
    let mut scene = Scene::new();
    scene.propose(Command::ApplyJob { spec, if_version: None });
    let tasks: Vec<SessionId> = (1..=5).map(|id| scene.register(id)).collect();
    scene.pass(20, &[], even);
    let before = scene.state.jobs[&kv()].churn.moves;
    scene.pass(120, &tasks[..3], even);
    let after = &scene.state.jobs[&kv()];
    assert_eq!((after.assignment.tasks.len(), after.churn.moves), (5, before));
    let hold = scene.leader.hold(&kv()).unwrap();
    assert_eq!(hold.missing.keys().copied().collect::<Vec<_>>(), tasks[..3]);
    (scene, tasks)
}

#[test]
fn most_tasks_gone_at_once_are_waited_for_and_are_well_when_they_return() {
    let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
    let before = scene.state.jobs[&kv()].churn.moves;
    scene.pass(5, &[], even);
    assert!(scene.leader.hold(&kv()).is_none());
    let after = &scene.state.jobs[&kv()];
    assert_eq!((after.assignment.tasks.len(), after.churn.moves), (tasks.len(), before));
}

#[test]
fn nothing_is_evened_out_while_the_brake_holds() {
    let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
    let before = scene.state.jobs[&kv()].churn.moves;
    let hot: Vec<Slice> =
        scene.state.jobs[&kv()].assignment.of(tasks[4]).map(|(slice, _)| slice).collect();
    let is_hot = |slice: Slice| hot.iter().any(|hot| hot.overlap(slice).is_some());
    scene.pass(120, &tasks[..3], |slice| even(slice) * if is_hot(slice) { 10 } else { 1 });
    assert!(scene.load_of(tasks[4]) > 5.0 * scene.load_of(tasks[3]), "it has far too much");
    assert_eq!(scene.state.jobs[&kv()].churn.moves, before);
}

#[test]
fn an_exclusive_job_is_held_likewise() {
    // A session's task has its lease from when it registered.
    let mut scene = Scene::new();
    let spec = JobSpec {
        name: "own".parse().unwrap(),
        consistency: Consistency::Exclusive,
        ..JobSpec::new(kv())
    };
    let own = spec.name.clone();
    scene.propose(Command::ApplyJob { spec, if_version: None });
    let mut tasks = Vec::new();
    for id in 1..=5_u64 {
        let (name, address) = (format!("t{id}"), format!("h:{id}"));
        let info = TaskInfo::new(name.parse().unwrap(), id, address.parse().unwrap());
        let command = Command::Register { job: own.clone(), info, stopped: None };
        let applied = scene.state.apply(command).unwrap();
        let Outcome::Session(session) = applied.outcome else { panic!("{applied:?}") };
        tasks.push(session);
        scene.happen(Event::Applied { job: own.clone() });
    }
    for second in 0..120 {
        scene.now += Duration::from_secs(1);
        for session in &tasks[3..] {
            let (job, session) = (own.clone(), *session);
            scene.happen(Event::Renewed { job, session, request: second });
        }
        let mut out = Vec::new();
        scene.leader.tick(scene.now, &scene.state, &mut out);
        let ends = |action: &Action| matches!(action, Action::Propose(Command::End { .. }));
        assert!(!out.iter().any(ends), "second {second}");
    }
    assert_eq!(scene.leader.hold(&own).unwrap().missing.len(), 3);
    let believe = Command::BelieveLost { job: own, sessions: tasks[..3].to_vec() };
    scene.state.apply(believe).unwrap();
    scene.now += Duration::from_secs(1);
    let mut out = Vec::new();
    scene.leader.tick(scene.now, &scene.state, &mut out);
    let ends = out.iter().filter(|a| matches!(a, Action::Propose(Command::End { .. })));
    assert_eq!(ends.count(), 3, "their leases are long over");
}

#[test]
fn an_operator_says_that_they_are_lost_and_the_word_is_used_up() {
    let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
    // A new leader knows of the word.
    let sessions = tasks[..3].to_vec();
    scene.propose(Command::BelieveLost { job: kv(), sessions });
    scene.leader = Leader::new(scene.now, &scene.state);
    scene.pass(10, &tasks[..3], even);
    let job = &scene.state.jobs[&kv()];
    assert_eq!((job.assignment.tasks.len(), job.believed.len()), (2, 0));
    assert!(scene.leader.hold(&kv()).is_none());
    assert!(job.assignment.slices.iter().all(|(_, a)| !a.replicas.as_slice().is_empty()));
    let unknown = Command::BelieveLost { job: kv(), sessions: tasks[..1].to_vec() };
    assert!(matches!(scene.state.apply(unknown), Err(Refused::NoSuchSession { .. })));
}

#[test]
fn a_word_on_tasks_that_come_back_is_taken_back() {
    let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
    for session in &tasks {
        scene.happen(Event::Heard { job: kv(), session: *session });
    }
    scene.propose(Command::BelieveLost { job: kv(), sessions: tasks[..3].to_vec() });
    scene.pass(20, &[], even);
    let job = &scene.state.jobs[&kv()];
    assert_eq!((job.assignment.tasks.len(), job.believed.len()), (5, 0));
}

#[test]
fn those_under_whose_names_others_knock_are_lost() {
    let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
    scene.happen(Event::Succeeded { job: kv(), session: tasks[0] });
    scene.happen(Event::Succeeded { job: kv(), session: tasks[4] });
    scene.pass(2, &tasks[..3], even);
    let left: Vec<SessionId> = scene.state.jobs[&kv()].assignment.tasks.keys().copied().collect();
    assert!(!left.contains(&tasks[0]) && left.contains(&tasks[4]), "{left:?}");
}

#[test]
fn callers_say_whether_tasks_that_are_not_heard_are_gone() {
    for (failed, left) in [(100, 2), (10, 5)] {
        let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
        for _ in 0..6 {
            let assignment = Arc::clone(&scene.state.jobs[&kv()].assignment);
            let part = |(slice, _): (Slice, _)| SliceOffer {
                slice,
                load: Load::from_milli(100_000),
                failed: Load::from_milli(failed * 1_000),
            };
            let mut slices: Vec<_> =
                tasks[..3].iter().flat_map(|session| assignment.of(*session)).map(part).collect();
            slices.sort_by_key(|part| part.slice);
            let window = Duration::from_secs(5);
            let caller = Caller(1);
            let offer = Offer { caller, window, slices, hot: vec![], avoided: vec![] };
            scene.leader.offer(scene.now, &kv(), offer).unwrap().unwrap();
            scene.pass(3, &tasks[..3], even);
        }
        let tasks = scene.state.jobs[&kv()].assignment.tasks.len();
        assert_eq!(tasks, left, "{failed} of 100 fail");
    }
}

/// Who serves a key; nobody while it waits.
fn holder(scene: &Scene, key: SliceKey) -> Option<SessionId> {
    let job = &scene.state.jobs[&kv()];
    job.assignment.slices.get(key).1.replicas.as_slice().first().map(|replica| replica.session)
}

fn name_of(scene: &Scene, session: SessionId) -> u64 {
    let task = &scene.state.jobs[&kv()].assignment.tasks[&session];
    task.info.name.as_str()[1..].parse().unwrap()
}

/// Whoever serves the key crashes and is back a second later under its name; gives the names of those that crashed.
fn poison(scene: &mut Scene, key: SliceKey, seconds: u64) -> Vec<u64> {
    let mut crashed = Vec::new();
    for second in 0..seconds {
        if let Some(session) = holder(scene, key) {
            let name = name_of(scene, session);
            crashed.push(name);
            scene.happen(Event::Broken { job: kv(), session });
            scene.pass(2, &[session], even);
            let (process, job, stopped) = (1_000 + second, kv(), None);
            let (name, address) = (format!("t{name}"), format!("h:{name}"));
            let info = TaskInfo::new(name.parse().unwrap(), process, address.parse().unwrap());
            let session = scene.propose(Command::Register { job, info, stopped }).unwrap();
            scene.happen(Event::Attached { job: kv(), session });
        }
        scene.pass(1, &[], even);
    }
    crashed
}

#[test]
fn a_key_that_kills_stays_with_one_task_after_the_third() {
    let mut scene = Scene::new();
    let key = SliceKey(0x7777_7777_7777_7777);
    for id in 1..=4 {
        scene.register(id);
    }
    scene.pass(60, &[], even);
    let crashed = poison(&mut scene, key, 60);
    let confined = &scene.state.jobs[&kv()].confined;
    assert!(!confined.is_empty(), "{crashed:?}");
    assert!(confined.iter().any(|confined| confined.slice.contains(key)));
    assert_eq!(confined[0].crashes.len(), 3, "{crashed:?} {confined:?}");
    let keeper = crashed[2];
    assert_eq!(confined[0].task.as_str(), format!("t{keeper}"));
    assert!(crashed[3..].iter().all(|name| *name == keeper), "{crashed:?}");
    // It serves nothing else, and the others all that is not confined.
    scene.pass(30, &[], even);
    let job = &scene.state.jobs[&kv()];
    for (slice, assigned) in job.assignment.slices.iter() {
        let [replica] = assigned.replicas.as_slice() else { panic!("{slice}: {assigned:?}") };
        let inside = job.confined.iter().any(|c| c.slice.overlap(slice).is_some());
        assert_eq!(name_of(&scene, replica.session) == keeper, inside, "{slice}");
    }
    // A new leader goes on so.
    scene.leader = Leader::new(scene.now, &scene.state);
    let crashed = poison(&mut scene, key, 20);
    assert!(crashed.iter().all(|name| *name == keeper), "{crashed:?}");
}

#[test]
fn confined_keys_are_released_by_word_or_after_an_hour_and_move_on_from_a_task_that_is_gone() {
    let mut scene = Scene::new();
    let key = SliceKey(0x7777_7777_7777_7777);
    let tasks: Vec<SessionId> = (1..=4).map(|id| scene.register(id)).collect();
    scene.pass(20, &[], even);
    let slices = vec![Slice::new(key, key).unwrap()];
    let confine = |task: &str, slices: &[Slice]| Command::Confine {
        job: kv(),
        slices: slices.to_vec(),
        task: task.parse().unwrap(),
        crashes: vec![],
    };
    scene.propose(confine("t2", &slices));
    assert_eq!(holder(&scene, key), Some(tasks[1]));
    assert_eq!(scene.state.jobs[&kv()].assignment.of(tasks[1]).count(), 1);
    // Its task goes for good: another is found, and meanwhile they wait.
    let reason = EndReason::Lost;
    scene.propose(Command::End { job: kv(), session: tasks[1], reason });
    assert_eq!(holder(&scene, key), None);
    scene.pass(40, &[], even);
    assert_eq!(holder(&scene, key), None);
    scene.pass(40, &[], even);
    assert!(holder(&scene, key).is_some());
    // By word.
    let release = Command::Unconfine { job: kv(), slice: slices[0] };
    scene.propose(release.clone());
    assert!(scene.state.jobs[&kv()].confined.is_empty());
    let refused = scene.state.apply(release).unwrap_err();
    assert!(matches!(refused, Refused::NoSuchConfined { .. }), "{refused}");
    let wide = Slice::FULL;
    scene.propose(confine("t1", &slices));
    let refused = scene.state.apply(confine("t1", &[wide])).unwrap_err();
    assert_eq!(refused, Refused::Confined(wide));
    // An hour after the last crash.
    scene.pass(1_800, &[], even);
    assert_eq!(poison(&mut scene, key, 1), [1]);
    scene.pass(1_900, &[], even);
    assert_eq!(scene.state.jobs[&kv()].confined.len(), 1);
    scene.pass(1_720, &[], even);
    assert!(scene.state.jobs[&kv()].confined.is_empty());
}

#[test]
fn a_newcomer_under_load_is_filled_at_a_bounded_rate_and_to_the_mean() {
    let mut scene = Scene::new();
    let spec = JobSpec { fill_rate: Ratio::percent(20), ..JobSpec::new(kv()) };
    scene.propose(Command::ApplyJob { spec, if_version: None });
    for id in 1..=4 {
        scene.register(id);
    }
    scene.pass(30, &[], even);
    let newcomer = scene.register(5);
    let mut before = scene.keys_of(newcomer);
    for _ in 0..30 {
        scene.pass(10, &[], even);
        let now = scene.keys_of(newcomer);
        assert!(now - before <= 0.2 * 0.2 + 0.001, "{before} {now}");
        before = now;
    }
    assert!((0.17..0.22).contains(&before), "{before}");
}

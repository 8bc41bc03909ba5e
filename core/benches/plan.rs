//! How long a round takes to plan and to apply, in processor time: skewed load, a budget of a fifth, and the first plan of a
//! job, which makes all its slices; then large fleets that are steady, lose one task in a hundred, or double, each beside
//! one pass over the slices, which is the least that any planner does.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Bencher, Criterion, criterion_group, criterion_main};
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::balance::{Policy, Round, plan};
use mandoline_core::command::Command;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::plan::{Edit, at_once};
use mandoline_core::prng::Prng;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::{JobSpec, Ratio};
use mandoline_core::state::State;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use rustix::time::{ClockId, clock_gettime};

fn kv() -> JobName {
    "kv".parse().expect("it is a name")
}

fn with_tasks(tasks: u64) -> State {
    let mut state = State::default();
    let mut apply = |command| drop(state.apply(command).expect("it is accepted"));
    apply(Command::ApplyJob { spec: JobSpec::new(kv()), if_version: None });
    for id in 0..tasks {
        let name = format!("t{id}").parse().expect("it is a name");
        let info = TaskInfo::new(name, id, format!("h{id}:1").parse().expect("it is an address"));
        apply(Command::Register { job: kv(), info, stopped: None });
    }
    state
}

/// A round where one slice in a hundred is twenty times as hot as the rest; or where nothing was measured.
fn round(state: &State, seed: Option<u64>) -> Round {
    let job = &state.jobs[&kv()];
    let mut prng = Prng::new(seed.unwrap_or(0));
    let heat = |prng: &mut Prng| prng.below(1_000) + if prng.below(100) == 0 { 20_000 } else { 0 };
    let load = |prng: &mut Prng| Load::from_milli(if seed.is_some() { heat(prng) } else { 0 });
    let loads = job.assignment.slices.iter().map(|_| load(&mut prng)).collect();
    let policy = Policy { churn_budget: Ratio::percent(20), ..Policy::from(&job.spec) };
    Round { fresh: seed.is_none(), ..Round::new(Arc::clone(&job.assignment), loads, policy) }
}

fn change(state: &mut State, round: &Round) {
    state.apply(Command::Change { job: kv(), plan: plan(round) }).expect("the plan fits");
}

/// What happens to a large fleet before the round that is timed.
#[derive(Clone, Copy)]
enum Event {
    Steady,
    Fail,
    Double,
}

/// `tasks` that serve an equal number of slices each, and `idle` ones.
fn fleet(tasks: u64, idle: u64, slices: u64) -> Assignment {
    let since = Generation { incarnation: 1, number: 1 };
    let mut fleet = Assignment::new(kv(), since);
    for id in 1..=tasks + idle {
        let name = format!("t{id}").parse().expect("it is a name");
        let info = TaskInfo::new(name, id, format!("h{id}:1").parse().expect("it is an address"));
        let session = SessionId(id);
        fleet.tasks.insert(session, Arc::new(Task::new(session, info)));
    }
    let run = |index: u64| {
        let first = SliceKey(
            u64::try_from((u128::from(index) << 64) / u128::from(slices)).expect("index < slices"),
        );
        let replicas = Replicas::One(Replica { session: SessionId(1 + index % tasks), since });
        (first, Assigned { replicas, token: since, ..Assigned::default() })
    };
    fleet.slices =
        SliceMap::from_runs((0..slices).map(run).collect()).expect("the runs are in order");
    fleet
}

/// A round of a fleet that was even, with slices whose loads are exponentially distributed, once something has happened to it.
fn large(tasks: u64, slices: u64, event: Event) -> Round {
    let mut prng = Prng::new(7);
    let load = |_| Load::from_milli((-prng.unit().max(1e-9).ln() * 1e6) as u64);
    let loads: Vec<Load> = (0..slices).map(load).collect();
    let policy = Policy::from(&JobSpec::new(kv()));
    let mut fleet = fleet(tasks, 0, slices);
    let first = plan(&Round::new(Arc::new(fleet.clone()), loads.clone(), policy.clone()));
    let next = Generation { incarnation: 1, number: 2 };
    for edit in first.edits.iter().filter(|edit| matches!(edit, Edit::Move(_))) {
        edit.apply(&mut fleet.slices, next, &at_once).expect("the plan fits");
    }
    match event {
        Event::Steady => {}
        Event::Fail => {
            let gone = tasks / 100;
            fleet.tasks.retain(|session, _| session.0 > gone);
            fleet.slices = fleet.slices.map(|_, assigned| {
                let lost = assigned.replicas.as_slice()[0].session.0 <= gone;
                let replicas = if lost { Replicas::None } else { assigned.replicas.clone() };
                Assigned { replicas, ..assigned.clone() }
            });
        }
        Event::Double => fleet.tasks = self::fleet(tasks, tasks, 1).tasks,
    }
    Round::new(Arc::new(fleet), loads, policy)
}

/// Adds up what each task carries.
fn pass(round: &Round, carried: &mut [Load]) {
    for ((_, assigned), load) in round.assignment.slices.iter().zip(&round.loads) {
        for replica in assigned.replicas.as_slice() {
            carried[replica.session.0 as usize] += *load;
        }
    }
}

/// Times the thread's computing: what other processes take does not count.
fn time_cpu(bencher: &mut Bencher<'_>, mut work: impl FnMut()) {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
    };
    bencher.iter_custom(|times| {
        let before = now();
        (0..times).for_each(|_| work());
        now() - before
    });
}

fn large_fleets(c: &mut Criterion) {
    for (tasks, slices) in [(1_000, 100_000), (10_000, 1_000_000)] {
        let mut group = c.benchmark_group(format!("{tasks} tasks, {slices} slices"));
        group.sample_size(10);
        for (name, event) in
            [("steady", Event::Steady), ("1 % failed", Event::Fail), ("doubling", Event::Double)]
        {
            let round = large(tasks, slices, event);
            if matches!(event, Event::Steady) {
                let mut carried =
                    vec![Load::ZERO; 1 + usize::try_from(tasks).expect("it is small")];
                group.bench_function("one pass", |b| {
                    time_cpu(b, || {
                        pass(black_box(&round), black_box(&mut carried));
                    });
                });
            }
            group
                .bench_function(name, |b| time_cpu(b, || drop(black_box(plan(black_box(&round))))));
        }
        group.finish();
    }
}

fn benches(c: &mut Criterion) {
    for tasks in [100, 1_000] {
        let mut group = c.benchmark_group(format!("{tasks} tasks"));
        group.sample_size(10);
        let mut state = with_tasks(tasks);
        let first = round(&state, None);
        group.bench_function("plan the first round", |b| b.iter(|| plan(black_box(&first))));
        group.bench_function("apply the first plan", |b| {
            b.iter_batched(
                || state.clone(),
                |mut state| change(&mut state, &first),
                BatchSize::LargeInput,
            );
        });
        change(&mut state, &first);
        let later = round(&state, Some(1));
        group.bench_function("plan a skewed round", |b| b.iter(|| plan(black_box(&later))));
        group.finish();
    }
}

criterion_group!(all, benches, large_fleets);
criterion_main!(all);

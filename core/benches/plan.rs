//! How long a round takes to plan and to apply: skewed load, a budget of a fifth, and the first plan of a job, which makes
//! all its slices.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use mandoline_core::balance::{Policy, Round, plan};
use mandoline_core::command::Command;
use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::prng::Prng;
use mandoline_core::spec::{JobSpec, Ratio};
use mandoline_core::state::State;
use mandoline_core::task::TaskInfo;

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

criterion_group!(all, benches);
criterion_main!(all);

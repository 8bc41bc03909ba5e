//! Nanoseconds from a key of 16 bytes to the task that serves it: `cargo bench -p mandoline`.
//!
//! Slices begin at random places, 50 tasks serve them, and keys are drawn evenly from a set larger than the first-level
//! cache. Beside it what a lookup stands on, the hash alone and a binary search in the place of the table, and what one
//! would write in an hour: a `BTreeMap` behind an `RwLock`, with the standard library's hash.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::hint::black_box;
use std::sync::{Arc, RwLock};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mandoline::{Address, Assignment, Clerk, Generation, SessionId, SliceKey, Task, Utilisation};
use mandoline_core::assignment::{Assigned, Replica};
use mandoline_core::prng::Prng;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::Ratio;
use mandoline_core::task::TaskInfo;

const TASKS: u64 = 50;
const KEYS: usize = 1 << 16;

fn assignment(slices: usize, replicas: u64) -> Arc<Assignment> {
    let generation = Generation { incarnation: 1, number: 1 };
    let mut prng = Prng::new(slices as u64);
    let mut made = Assignment::new("bench".parse().expect("a name"), generation);
    for id in 1..=TASKS {
        let address: Address = format!("10.0.0.{id}:80").parse().expect("an address");
        let info = TaskInfo::new(format!("t{id}").parse().expect("a name"), id, address);
        let task = Task::new(SessionId(id), info);
        made.tasks.insert(task.session, Arc::new(task));
    }
    let mut firsts: Vec<u64> = (1..slices).map(|_| prng.bits()).chain([0]).collect();
    firsts.sort_unstable();
    firsts.dedup();
    let mut run = |first| {
        let from = prng.below(TASKS);
        let replica = |n| Replica { session: SessionId(1 + (from + n) % TASKS), since: generation };
        let replicas = (0..replicas).map(replica).collect();
        (SliceKey(first), Assigned { replicas, ..Assigned::default() })
    };
    made.slices = SliceMap::from_runs(firsts.into_iter().map(&mut run).collect()).expect("sorted");
    Arc::new(made)
}

fn keys() -> Vec<[u8; 16]> {
    let mut prng = Prng::new(7);
    let mut key = || {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&prng.bits().to_le_bytes());
        key[8..].copy_from_slice(&prng.bits().to_le_bytes());
        key
    };
    (0..KEYS).map(|_| key()).collect()
}

fn route(c: &mut Criterion) {
    let keys = keys();
    let mut at = 0;
    let mut next = move || {
        at = (at + 1) % KEYS;
        at
    };
    let mut group = c.benchmark_group("route");
    group.bench_function("hash alone", |b| b.iter(|| black_box(SliceKey::of(&keys[next()]))));
    for slices in [1_000, 10_000, 100_000] {
        let known = assignment(slices, 1);
        let clerk = Clerk::frozen(Arc::clone(&known));
        let mut router = clerk.router();
        group.bench_function(BenchmarkId::new("router", slices), |b| {
            b.iter(|| {
                let target = router.route(&keys[next()]).expect("a task");
                black_box(target.session())
            });
        });
        group.bench_function(BenchmarkId::new("clerk", slices), |b| {
            b.iter(|| {
                let target = clerk.route(&keys[next()]).expect("a task");
                black_box(target.session())
            });
        });
        group.bench_function(BenchmarkId::new("binary search", slices), |b| {
            b.iter(|| {
                let (_, assigned) = known.get(SliceKey::of(&keys[next()]));
                black_box(assigned.replicas.as_slice()[0].session)
            });
        });
    }
    let known = assignment(10_000, 1);
    let slices = known
        .slices
        .iter()
        .map(|(slice, assigned)| (slice.first().0, assigned.replicas.as_slice()[0].session));
    let map: RwLock<BTreeMap<u64, SessionId>> = RwLock::new(slices.collect());
    let hasher = RandomState::new();
    group.bench_function("BTreeMap behind an RwLock/10000", |b| {
        b.iter(|| {
            let hash = hasher.hash_one(keys[next()]);
            let map = map.read().expect("nobody panics");
            black_box(map.range(..=hash).next_back().map(|(_, session)| *session))
        });
    });
    let clerk = Clerk::frozen(assignment(10_000, 3));
    let mut router = clerk.router();
    group.bench_function("router, 3 replicas/10000", |b| {
        b.iter(|| {
            let target = router.route(&keys[next()]).expect("a task");
            black_box(target.session())
        });
    });
    // With spill: below the cap, as nearly always, and with every answer told.
    let mut spilling = Arc::unwrap_or_clone(assignment(10_000, 1));
    spilling.spill = Some(Ratio::percent(115));
    let clerk = Clerk::frozen(Arc::new(spilling));
    let mut router = clerk.router();
    group.bench_function("router, spill/10000", |b| {
        b.iter(|| {
            let target = router.route(&keys[next()]).expect("a task");
            black_box(target.session())
        });
    });
    group.bench_function("clerk, spill/10000", |b| {
        b.iter(|| {
            let target = clerk.route(&keys[next()]).expect("a task");
            black_box(target.session())
        });
    });
    let mut served = 0;
    group.bench_function("router, spill, and what the answer tells/10000", |b| {
        b.iter(|| {
            let target = router.route(&keys[next()]).expect("a task");
            let sent = target.sent().expect("there is spill");
            served += 1;
            router.heard(sent, Utilisation { requests: served, thousandths: served * 1_000 });
        });
    });
    group.finish();
}

criterion_group!(benches, route);
criterion_main!(benches);

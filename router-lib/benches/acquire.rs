//! Nanoseconds of the checks that an owner makes at each request: `cargo bench -p mandoline --bench acquire`.
//!
//! Slicer's took 153 us to get a handle and 94 us to check it (OSDI'16, 5.2.5).

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mandoline::slicelet::Slicelet;
use mandoline::{Assignment, Generation, JobName, SessionId, SliceKey, Task};
use mandoline_core::assignment::{Assigned, Replica, Replicas};
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::TaskInfo;

/// A task that owns every second of so many slices.
fn owner(slices: u64) -> Slicelet {
    let (mine, other) = (SessionId(1), SessionId(2));
    let generation = Generation { incarnation: 1, number: 7 };
    let job: JobName = "kv".parse().expect("a name");
    let mut made = Assignment::exclusive(job, generation);
    for session in [mine, other] {
        let name = format!("t{session}").parse().expect("a name");
        let address = format!("h:{}", session.0).parse().expect("an address");
        let task = Task::new(session, TaskInfo::new(name, session.0, address));
        made.tasks.insert(session, Arc::new(task));
    }
    let run = |nth: u64| {
        let session = if nth.is_multiple_of(2) { mine } else { other };
        let owner = Replica { session, since: generation };
        let replicas = Replicas::Owner(Some(owner));
        let first = SliceKey(nth * (u64::MAX / slices));
        (first, Assigned { replicas, token: generation, ..Assigned::default() })
    };
    made.slices = SliceMap::from_runs((0..slices).map(run).collect()).expect("they are in order");
    Slicelet::frozen(mine, Arc::new(made))
}

fn checks(c: &mut Criterion) {
    let mut group = c.benchmark_group("owner");
    for slices in [1_000, 10_000] {
        let slicelet = owner(slices);
        let keys: Vec<SliceKey> = (0..4_096_u64)
            .map(|n| SliceKey::of(&n.to_be_bytes()))
            .filter(|key| slicelet.owns_at(*key))
            .collect();
        let mut next = (0..keys.len()).cycle();
        let mut key = || keys[next.next().expect("it goes round")];
        group.bench_function(BenchmarkId::new("acquire and drop", slices), |b| {
            b.iter(|| black_box(slicelet.acquire_at(key(), 1.0).expect("it owns the key")));
        });
        let guards: Vec<_> =
            keys.iter().map(|key| slicelet.acquire_at(*key, 1.0).expect("it owns it")).collect();
        let mut at = (0..guards.len()).cycle();
        group.bench_function(BenchmarkId::new("still_owned", slices), |b| {
            b.iter(|| black_box(guards[at.next().expect("it goes round")].still_owned()));
        });
    }
    group.finish();
}

criterion_group!(benches, checks);
criterion_main!(benches);

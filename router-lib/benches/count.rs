//! Nanoseconds to count a request: `cargo bench -p mandoline --bench count`.
//!
//! CPU time of the thread, so that a busy machine does not count. What each part costs alone and what a task pays for all of it, by one thread and by two at once; slices begin at even
//! places, the task owns all of them, and keys are drawn by Zipf's law (0.99) from a million, and evenly.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, criterion_group, criterion_main};
use mandoline::{Address, Assignment, Generation, SessionId, SliceKey, Slicelet, Task};
use mandoline_core::assignment::{Assigned, Replica, Replicas};
use mandoline_core::prng::Prng;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::TaskInfo;
use rustix::time::{ClockId, clock_gettime};

// What is measured is private to the library.
#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../src/counters.rs"]
mod counters;
#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../src/hot.rs"]
mod hot;

const SLICES: usize = 1_000;
/// How many keys are drawn beforehand.
const DRAWN: usize = 1 << 16;

fn slicelet() -> Slicelet {
    let (generation, session) = (Generation { incarnation: 1, number: 1 }, SessionId(1));
    let address: Address = "10.0.0.1:80".parse().expect("an address");
    let info = TaskInfo::new("t1".parse().expect("a name"), 1, address);
    let mut made = Assignment::new("bench".parse().expect("a name"), generation);
    made.tasks.insert(session, Arc::new(Task::new(session, info)));
    let replicas = Replicas::One(Replica { session, since: generation });
    let run = |nth: usize| {
        let first = (u128::from(u64::MAX) * nth as u128 / SLICES as u128) as u64;
        (SliceKey(first), Assigned { replicas: replicas.clone(), ..Assigned::default() })
    };
    made.slices = SliceMap::from_runs((0..SLICES).map(run).collect()).expect("sorted");
    Slicelet::frozen(session, Arc::new(made))
}

fn zipf() -> Vec<SliceKey> {
    let mut sum = 0.0;
    let cumulated: Vec<f64> = (1..=1_000_000_u32)
        .map(|rank| {
            sum += f64::from(rank).powf(-0.99);
            sum
        })
        .collect();
    let mut prng = Prng::new(1);
    let mut draw = || {
        let at = prng.unit() * sum;
        SliceKey::of(&cumulated.partition_point(|below| *below < at).to_le_bytes())
    };
    (0..DRAWN).map(|_| draw()).collect()
}

fn even() -> Vec<SliceKey> {
    let mut prng = Prng::new(2);
    (0..DRAWN).map(|_| SliceKey(prng.bits())).collect()
}

/// The CPU time of the thread that asks.
struct CpuTime;

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("time goes on")
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        cpu_time()
    }

    fn end(&self, began: Duration) -> Duration {
        cpu_time() - began
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// Runs `count` so often on each of `threads`, and gives what the slowest took.
fn threads(
    threads: usize,
    times: u64,
    keys: &[SliceKey],
    count: impl Fn(SliceKey) + Sync,
) -> Duration {
    let run = |from: usize| {
        let began = cpu_time();
        for n in 0..times {
            count(keys[(from + n as usize) % DRAWN]);
        }
        cpu_time() - began
    };
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads).map(|from| scope.spawn(move || run(from * 999))).collect();
        runs.into_iter().map(|run| run.join().expect("no panic")).max().unwrap_or_default()
    })
}

/// A window's first requests, each of which is sampled.
fn quiet(times: u64, keys: &[SliceKey]) -> Duration {
    const WINDOW: usize = 2_000;
    let hot = hot::Hot::new();
    let (mut spent, mut left) = (Duration::ZERO, times as usize);
    while left > 0 {
        let now = left.min(WINDOW);
        let began = cpu_time();
        keys[..now].iter().for_each(|key| hot.note(*key, 1_000));
        spent += cpu_time() - began;
        drop(hot.take());
        left -= now;
    }
    spent
}

fn count(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("count");
    for (name, keys) in [("zipf", zipf()), ("even", even())] {
        let mut at = 0;
        let mut next = || {
            at = (at + 1) % DRAWN;
            keys[at]
        };
        let (tally, hot, slicelet) = (counters::Tally::new(SLICES), hot::Hot::new(), slicelet());
        let index = |key: SliceKey| ((u128::from(key.0) * SLICES as u128) >> 64) as usize;
        group.bench_function(format!("tally alone/{name}"), |b| {
            b.iter(|| tally.add(black_box(index(next())), 1_000));
        });
        group.bench_function(format!("sketch alone/{name}"), |b| {
            b.iter(|| hot.note(black_box(next()), 1_000));
        });
        group.bench_function(format!("sketch alone, quiet/{name}"), |b| {
            b.iter_custom(|times| quiet(times, &keys));
        });
        group.bench_function(format!("slicelet, looked up only/{name}"), |b| {
            b.iter(|| black_box(slicelet.owns_at(next())));
        });
        group.bench_function(format!("slicelet, claimed/{name}"), |b| {
            b.iter(|| black_box(slicelet.claim_at(next(), 1.0)));
        });
        for n in [1, 2, 4] {
            group.bench_function(format!("slicelet, claimed by {n} threads/{name}"), |b| {
                b.iter_custom(|times| {
                    threads(n, times, &keys, |key| {
                        let _claimed = black_box(slicelet.claim_at(key, 1.0));
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group!(
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = count
);
criterion_main!(benches);

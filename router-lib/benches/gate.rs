//! Nanoseconds that a guard is built from: `cargo bench -p mandoline --bench gate`.
//!
//! In and out of a gate by one thread, and by two at once who get in each other's way at one gate and at gates of their own;
//! an entry that is refused; and the two checks of "do I still own this": the flag, and the clock that leases are counted
//! by, beside the one that stops in suspend.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};

// What is measured is private to the library.
#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../src/gate.rs"]
mod gate;
#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../src/boot_clock.rs"]
mod boot_clock;
mod sync {
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
}

use gate::Gate;

fn visit(gate: &Gate) {
    gate.enter().expect("it is open");
    black_box(gate.leave());
}

/// Runs `visit` so often on two threads, and gives what the slower took.
fn by_two(times: u64, gates: [&Gate; 2]) -> Duration {
    let run = |gate: &Gate| {
        let began = boot_clock::now();
        (0..times).for_each(|_| visit(gate));
        boot_clock::now().since(began)
    };
    std::thread::scope(|scope| {
        let threads = gates.map(|gate| scope.spawn(move || run(gate)));
        let [one, other] = threads.map(|thread| thread.join().expect("no panic"));
        one.max(other)
    })
}

fn gates(c: &mut Criterion) {
    let mut group = c.benchmark_group("gate");
    let (one, other) = (Arc::new(Gate::open()), Arc::new(Gate::open()));
    group.bench_function("in and out", |b| b.iter(|| visit(black_box(&one))));
    group.bench_function("in and out, two threads at one gate", |b| {
        b.iter_custom(|times| by_two(times, [&one, &one]));
    });
    group.bench_function("in and out, two threads at two gates", |b| {
        b.iter_custom(|times| by_two(times, [&one, &other]));
    });
    group.bench_function("not revoked", |b| b.iter(|| black_box(&one).is_revoked()));
    let closed = Gate::open();
    assert!(closed.close());
    group.bench_function("refused", |b| b.iter(|| black_box(&closed).enter().is_err()));
    group.finish();
    let mut group = c.benchmark_group("clock");
    group.bench_function("boot", |b| b.iter(boot_clock::now));
    group.bench_function("monotonic", |b| b.iter(|| clock_gettime(ClockId::Monotonic)));
    group.finish();
}

criterion_group!(benches, gates);
criterion_main!(benches);

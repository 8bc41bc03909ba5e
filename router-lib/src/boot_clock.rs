//! The clock that counts leases: the one file that reads it, and says which it is.
//!
//! A lease that was granted before a suspend must be over after it, so the clock has to count suspend. Rust's `Instant` does
//! not on Linux. There this is `CLOCK_BOOTTIME`, which the vDSO answers without a system call, so that every check can
//! read it anew: a time that was noted a moment ago is one that a pause may have made a lie.
//!
//! | system | clock | counts suspend |
//! |---|---|---|
//! | Linux, Android | `CLOCK_BOOTTIME` | yes |
//! | macOS and its kin | `CLOCK_MONOTONIC` | yes, by its manual |
//! | other Unixes | `CLOCK_MONOTONIC` | do not count on it: an owner may wake with its lease, and only fencing protects |
//! | Windows | none yet: the crate does not build there | |
//!
//! No clock in a guest counts what a hypervisor hides from it: see docs/fencing.md.

#[cfg(feature = "testing")]
use std::sync::Arc;
#[cfg(feature = "testing")]
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_core::time::Time;
use rustix::time::Timespec;

/// Reads the clock: time since the machine started, suspend included. Never goes back.
#[inline]
pub(crate) fn now() -> Time {
    let Timespec { tv_sec, tv_nsec } = read();
    // Both are counted from the start of the machine, so neither is negative, and the sum lasts for five centuries.
    Time::from_nanos(tv_sec as u64 * 1_000_000_000 + tv_nsec as u64)
}

/// The clock that one slicelet's leases are counted by: this machine's, but in the test kit, whose time is told by the test.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    #[cfg(feature = "testing")]
    told: Option<Arc<AtomicU64>>,
}

impl Clock {
    /// Goes by nanoseconds that someone else counts.
    #[cfg(feature = "testing")]
    pub(crate) const fn told(nanos: Arc<AtomicU64>) -> Self {
        Self { told: Some(nanos) }
    }

    /// Reads it.
    #[inline]
    pub(crate) fn now(&self) -> Time {
        #[cfg(feature = "testing")]
        if let Some(nanos) = &self.told {
            return Time::from_nanos(nanos.load(Ordering::SeqCst));
        }
        now()
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
#[inline]
fn read() -> Timespec {
    use rustix::time::{DynamicClockId, clock_gettime_dynamic};
    clock_gettime_dynamic(DynamicClockId::Boottime).expect("Linux has CLOCK_BOOTTIME since 2.6.39")
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
#[inline]
fn read() -> Timespec {
    rustix::time::clock_gettime(rustix::time::ClockId::Monotonic)
}

#[cfg(test)]
mod tests {
    use rustix::time::{ClockId, clock_gettime};

    use super::*;

    #[test]
    fn time_never_goes_back_on_any_thread() {
        let read = || {
            let mut last = now();
            for _ in 0..100_000 {
                let next = now();
                assert!(last <= next, "{last} and then {next}");
                last = next;
            }
            last
        };
        let before = now();
        let threads = std::thread::scope(|scope| {
            let threads = [(); 4].map(|()| scope.spawn(read));
            threads.map(|thread| thread.join().unwrap())
        });
        assert!(threads.iter().all(|last| before < *last && *last <= now()));
    }

    #[test]
    fn it_counts_at_least_what_a_clock_counts_that_stops_in_suspend() {
        let without = clock_gettime(ClockId::Monotonic);
        let without = without.tv_sec as u64 * 1_000_000_000 + without.tv_nsec as u64;
        assert!(now() >= Time::from_nanos(without));
    }
}

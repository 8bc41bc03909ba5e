//! The time that this thread has spent computing: what other processes take does not count.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Gives this thread's processor time so far.
pub(crate) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither is ever negative on this clock.
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

//! The clock that a shell hands to a machine: tokio's, so that tests can pause it.

use mandoline_core::time::Time;
use tokio::time::Instant;

/// Reads time since it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// Begins to count.
    pub fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// Reads the time.
    pub fn now(&self) -> Time {
        Time::ZERO + self.origin.elapsed()
    }

    /// Waits until a time has come; without one, for good.
    pub async fn sleep_until(&self, time: Option<Time>) {
        match time {
            Some(time) => tokio::time::sleep_until(self.origin + time.since(Time::ZERO)).await,
            None => std::future::pending().await,
        }
    }
}

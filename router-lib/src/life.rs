//! Signs of life: the leader's, which grants heartbeats, and the application's, whose runtime runs tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

/// Heartbeats that may be on their way at once: far beyond what silence allows.
const UNANSWERED_MAX: u64 = 16;

/// Heartbeats sent and granted over one connection.
pub(crate) struct Beats {
    sent: u64,
    granted: u64,
    heard: Instant,
    paused: bool,
}

impl Beats {
    /// Begins with a new connection.
    pub(crate) const fn new(now: Instant) -> Self {
        Self::after(0, now)
    }

    /// Begins with a new connection of a session whose last heartbeat had this number.
    pub(crate) const fn after(last: u64, now: Instant) -> Self {
        Self { sent: last, granted: last, heard: now, paused: false }
    }

    /// Gives the number of the next heartbeat.
    pub(crate) fn next(&mut self, now: Instant) -> u64 {
        if std::mem::take(&mut self.paused) {
            self.heard = now;
        }
        self.sent += 1;
        self.sent
    }

    /// Takes a grant in. One for a number that was not sent, or was granted before, says nothing.
    pub(crate) fn granted(&mut self, request: u64, now: Instant) {
        if (self.granted + 1..=self.sent).contains(&request) {
            self.granted = request;
            self.heard = now;
        }
    }

    /// Says whether the leader has been silent for longer than `patience`.
    pub(crate) fn are_unanswered(&self, now: Instant, patience: Duration) -> bool {
        let waiting = self.sent - self.granted;
        !self.paused
            && waiting > 0
            && (now.duration_since(self.heard) > patience || waiting > UNANSWERED_MAX)
    }

    /// Notes that no heartbeat is sent for now, and says whether that is news.
    pub(crate) fn pause(&mut self, now: Instant) -> bool {
        self.heard = now;
        !std::mem::replace(&mut self.paused, true)
    }
}

/// Whether the application's runtime still runs tasks: one is given to it with each heartbeat, and must have run before
/// the next.
pub(crate) struct Pulse {
    runtime: Handle,
    sent: u64,
    asked: Instant,
    felt: Arc<AtomicU64>,
}

impl Pulse {
    /// Begins to watch a runtime.
    pub(crate) fn new(runtime: Handle) -> Self {
        Self { runtime, sent: 0, asked: Instant::now(), felt: Arc::default() }
    }

    /// Says whether the runtime was asked so long ago and has not answered. Sooner than that it may just be busy, and a
    /// dial that falls upon a beat would find every runtime hung.
    pub(crate) fn is_missed(&self, patience: Duration) -> bool {
        !self.is_felt() && self.asked.elapsed() >= patience
    }

    /// Says whether the runtime ran what it was given last.
    fn is_felt(&self) -> bool {
        self.felt.load(Ordering::Relaxed) == self.sent
    }

    /// Gives the runtime another task.
    pub(crate) fn beat(&mut self) {
        // One at a time: a runtime that hangs for hours must not find thousands of them when it is back.
        if !self.is_felt() {
            return;
        }
        self.sent += 1;
        self.asked = Instant::now();
        let (number, felt) = (self.sent, Arc::clone(&self.felt));
        // Its handle is let go: the count says all there is to know, and the task is one store long.
        drop(self.runtime.spawn(async move { felt.store(number, Ordering::Relaxed) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_grant_for_a_heartbeat_that_was_sent_says_something() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let silent =
            |beats: &Beats, seconds| beats.are_unanswered(later(seconds), Duration::from_secs(2));
        let mut beats = Beats::new(start);
        assert!(!silent(&beats, 9), "nothing was asked");
        assert_eq!((beats.next(later(1)), beats.next(later(2))), (1, 2));
        beats.granted(3, later(2));
        assert!(silent(&beats, 3), "that one was never sent");
        beats.granted(1, later(2));
        assert!(!silent(&beats, 4));
        beats.granted(1, later(5));
        assert!(silent(&beats, 5), "that one was granted before");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_counts_anew_after_a_pause() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut beats = Beats::new(start);
        beats.next(later(1));
        assert!(beats.pause(later(2)) && !beats.pause(later(9)));
        assert!(!beats.are_unanswered(later(20), Duration::from_secs(2)));
        beats.next(later(20));
        assert!(!beats.are_unanswered(later(22), Duration::from_secs(2)));
        assert!(beats.are_unanswered(later(23), Duration::from_secs(2)));
    }
}

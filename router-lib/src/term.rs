//! One session's right to serve, as every check reads it: an end that moves on, and once it was passed never again.

use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_core::task::SessionId;
use mandoline_core::time::Time;

use crate::boot_clock::Clock;

/// A time that has passed on every machine.
const ENDED: u64 = 1;

/// How long one session may serve. Shared by all its views and guards.
#[derive(Debug)]
pub(crate) struct Term {
    pub(crate) session: SessionId,
    /// Nanoseconds of the boot clock; 0 before the first grant.
    until: AtomicU64,
    clock: Clock,
}

impl Term {
    /// Begins a session that needs grants.
    pub(crate) fn leased(session: SessionId) -> Self {
        Self::leased_by(Clock::default(), session)
    }

    /// Begins one whose time is counted by this clock.
    pub(crate) const fn leased_by(clock: Clock, session: SessionId) -> Self {
        Self { session, until: AtomicU64::new(0), clock }
    }

    /// Reads the clock that it is counted by.
    pub(crate) fn now(&self) -> Time {
        self.clock.now()
    }

    /// Moves the end on. Says whether it could: not once it was passed and someone has noticed.
    #[must_use]
    pub(crate) fn extend(&self, until: Time) -> bool {
        let later = |old| (old != ENDED).then(|| until.as_nanos().max(old));
        self.until.fetch_update(Ordering::AcqRel, Ordering::Acquire, later).is_ok()
    }

    /// Ends it for good: a later session has a term of its own.
    pub(crate) fn end(&self) {
        self.until.store(ENDED, Ordering::Release);
    }

    /// Says whether the session may serve right now, and no later than `limit`. Whoever finds that its time has passed ends it,
    /// so that what was denied once is never granted again.
    pub(crate) fn holds(&self, limit: u64) -> bool {
        let mut until = self.until.load(Ordering::Acquire);
        loop {
            let now = self.clock.now().as_nanos();
            if now < until {
                return now < limit;
            }
            if until <= ENDED {
                return false;
            }
            match self.until.compare_exchange(until, ENDED, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return false,
                // It was extended between the two looks.
                Err(newer) => until = newer,
            }
        }
    }

    /// Gives when it ends, as far as is known now.
    pub(crate) fn ends(&self) -> Time {
        Time::from_nanos(self.until.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::boot_clock;

    #[test]
    fn it_holds_from_the_first_grant_to_its_end_and_no_limit_lies_beyond() {
        let term = Term::leased(SessionId(1));
        assert!(!term.holds(u64::MAX));
        assert!(term.extend(boot_clock::now() + Duration::from_secs(60)));
        assert!(term.holds(u64::MAX) && !term.holds(0));
        assert!(term.extend(Time::from_nanos(2)));
        assert!(term.holds(u64::MAX), "it is never shortened");
        term.end();
        assert!(!term.holds(u64::MAX) && !term.extend(boot_clock::now() + Duration::from_secs(60)));
    }

    #[test]
    fn what_was_denied_once_is_never_extended() {
        let term = Term::leased(SessionId(1));
        assert!(term.extend(boot_clock::now()));
        assert!(!term.holds(u64::MAX));
        assert!(!term.extend(boot_clock::now() + Duration::from_secs(60)));
        assert!(!term.holds(u64::MAX));
    }
}

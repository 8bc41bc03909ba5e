//! Lines of the log that every request could cause, and that are written once in a while.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How often at most: whoever looks at the log while something fails finds it near the end, and it is no flood.
const EVERY: Duration = Duration::from_secs(30);

/// Says when it is time for such a line.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    /// Whether the line is to be written now. If so, it is not again for a while.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.duration_since(last) >= EVERY);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_at_once_and_then_once_in_a_while() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        let due = |after: Duration| seldom.is_due(start + after);
        assert!(due(Duration::ZERO));
        assert!(!due(Duration::ZERO));
        assert!(!due(EVERY - Duration::from_millis(1)));
        assert!(due(EVERY));
        assert!(!due(EVERY + Duration::from_secs(1)));
        assert!(due(EVERY * 9));
    }
}

//! When pauses ended, and what they were of: a key that was translated before then may have got another translation under the
//! pause, which was perhaps for just that.

use std::cell::RefCell;
use std::collections::VecDeque;

use mandoline_core::flags::Scope;
use tokio::time::Instant;

use crate::hold::flights::Facts;

/// How many ends are remembered with their scopes. Each request with a lookup is held against all of them.
const REMEMBERED: usize = 64;

/// When pauses ended.
#[derive(Debug, Default)]
pub(crate) struct Ends(RefCell<Inner>);

#[derive(Debug, Default)]
struct Inner {
    // The last to end at the end.
    scopes: VecDeque<(Scope, Instant)>,
    // The latest of those whose scopes are not remembered any more, which thus may have covered anything.
    others: Option<Instant>,
}

impl Ends {
    /// Notes that a pause has ended.
    pub(crate) fn note(&self, scope: &Scope, at: Instant) {
        let Inner { scopes, others } = &mut *self.0.borrow_mut();
        scopes.push_back((scope.clone(), at));
        if scopes.len() > REMEMBERED {
            let forgotten = scopes.pop_front().map(|(_, at)| at);
            *others = forgotten.max(*others);
        }
    }

    /// Says when the last pause ended that covered a request, or may have.
    pub(crate) fn last(&self, facts: &Facts) -> Option<Instant> {
        let Inner { scopes, others } = &*self.0.borrow();
        if scopes.is_empty() {
            return None;
        }
        let covering = facts.ask(|asked| {
            let covering = scopes.iter().filter(|(scope, _)| scope.covers(asked));
            covering.map(|(_, at)| *at).max()
        });
        covering.max(*others)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::Method;
    use http::header::HeaderValue;

    use super::*;

    fn facts(host: &'static str) -> Facts {
        let host = HeaderValue::from_static(host);
        Facts { job: None, key: None, host, path: None, method: Method::GET }
    }

    fn of(host: &str) -> Scope {
        Scope { host: Some(host.into()), ..Scope::default() }
    }

    #[test]
    fn the_last_end_that_concerns_a_request_is_told() {
        let (ends, start) = (Ends::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(ends.last(&facts("a.org")), None);
        for (host, second) in [("a.org", 1), ("b.org", 2), ("a.org", 3), ("b.org", 4)] {
            ends.note(&of(host), at(second));
        }
        assert_eq!(ends.last(&facts("a.org")), Some(at(3)));
        assert_eq!(ends.last(&facts("c.org")), None);
    }

    #[test]
    fn one_whose_scope_is_forgotten_may_have_concerned_anything() {
        let (ends, start) = (Ends::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        ends.note(&of("a.org"), at(0));
        for second in 1..=REMEMBERED as u64 {
            assert_eq!(ends.last(&facts("c.org")), None);
            ends.note(&of("b.org"), at(second));
        }
        assert_eq!(ends.last(&facts("c.org")), Some(at(0)));
        assert_eq!(ends.last(&facts("b.org")), Some(at(REMEMBERED as u64)));
    }
}

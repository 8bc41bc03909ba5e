//! When pauses ended, and what they were of: a key that was translated before then may have got another translation under the
//! pause, which was perhaps for just that.

use std::cell::RefCell;
use std::collections::VecDeque;

use mandoline_core::flags::{Asked, PauseId, Scope};
use tokio::time::Instant;

use crate::hold::flights::Facts;

/// How many ends are remembered with their scopes. Each request with a lookup is held against all of them.
const REMEMBERED: usize = 64;

/// When pauses ended.
#[derive(Debug, Default)]
pub(crate) struct Ends(RefCell<Inner>);

#[derive(Debug, Default)]
struct Inner {
    // The last to be heard of at the end.
    ended: VecDeque<End>,
    // The latest of those whose scopes are not remembered any more, which thus may have covered anything.
    others: Option<Instant>,
}

#[derive(Debug)]
struct End {
    pause: PauseId,
    scope: Scope,
    at: Instant,
}

impl Ends {
    /// Notes that a pause has ended, unless that is noted.
    pub(crate) fn note(&self, pause: PauseId, scope: &Scope, at: Instant) {
        let Inner { ended, others } = &mut *self.0.borrow_mut();
        if ended.iter().any(|end| end.pause == pause) {
            return;
        }
        ended.push_back(End { pause, scope: scope.clone(), at });
        if ended.len() > REMEMBERED {
            let forgotten = ended.pop_front().map(|end| end.at);
            *others = forgotten.max(*others);
        }
    }

    /// Says when the last pause ended that covered a request, or may have.
    pub(crate) fn last(&self, facts: &Facts) -> Option<Instant> {
        self.last_of(facts, |scope, asked| scope.covers(asked))
    }

    /// The same of a request whose key is not known: any slice may be its own.
    pub(crate) fn last_of_any_key(&self, facts: &Facts) -> Option<Instant> {
        self.last_of(facts, |scope, asked| match scope.slice {
            None => scope.covers(asked),
            Some(_) => Scope { slice: None, ..scope.clone() }.covers(asked),
        })
    }

    fn last_of(
        &self,
        facts: &Facts,
        covers: impl Fn(&Scope, &Asked<'_>) -> bool,
    ) -> Option<Instant> {
        let Inner { ended, others } = &*self.0.borrow();
        if ended.is_empty() {
            return None;
        }
        let covering = facts.ask(|asked| {
            let covering = ended.iter().filter(|end| covers(&end.scope, asked));
            covering.map(|end| end.at).max()
        });
        covering.max(*others)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::Method;
    use http::header::HeaderValue;
    use mandoline_core::slice::Slice;

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
            ends.note(PauseId(second), &of(host), at(second));
        }
        // One that is told of again has not ended again.
        ends.note(PauseId(1), &of("a.org"), at(5));
        assert_eq!(ends.last(&facts("a.org")), Some(at(3)));
        assert_eq!(ends.last(&facts("c.org")), None);
    }

    #[test]
    fn whose_key_is_not_known_may_be_in_any_slice_but_not_at_any_host() {
        let (ends, at) = (Ends::default(), Instant::now());
        ends.note(PauseId(1), &Scope { slice: Some(Slice::FULL), ..of("a.org") }, at);
        assert_eq!(ends.last(&facts("a.org")), None);
        assert_eq!(ends.last_of_any_key(&facts("a.org")), Some(at));
        assert_eq!(ends.last_of_any_key(&facts("b.org")), None);
    }

    #[test]
    fn one_whose_scope_is_forgotten_may_have_concerned_anything() {
        let (ends, start) = (Ends::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        ends.note(PauseId(0), &of("a.org"), at(0));
        for second in 1..=REMEMBERED as u64 {
            assert_eq!(ends.last(&facts("c.org")), None);
            ends.note(PauseId(second), &of("b.org"), at(second));
        }
        assert_eq!(ends.last(&facts("c.org")), Some(at(0)));
        assert_eq!(ends.last(&facts("b.org")), Some(at(REMEMBERED as u64)));
    }
}

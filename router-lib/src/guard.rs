//! What a request holds while it works on a key: the word that the task owns it, for as long as that is true.
//!
//! A guard does not keep the slice: a lease that runs out takes it away whatever is under way. But a slice that is handed off
//! in good order waits for its guards, so keep them as short as the work.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::task::{Address, SessionId};
use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;

use crate::counters::CostError;
use crate::gate::{Closed, Gate};
use crate::owned::{Owned, View};

/// The longest wait before the clock is looked at again: it counts suspend, and timers do not.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The word that this task owns a key. Let go of it when the work on the key is done.
#[must_use = "the key is owned only as long as the guard is held"]
pub struct Guard {
    owned: Arc<Owned>,
    // None in an affinity job: nothing waits for guards there.
    gate: Option<Arc<Gate>>,
    key: SliceKey,
    session: SessionId,
    since: Generation,
    token: Generation,
}

/// Why there is no guard.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NotOwner {
    /// Another task owns the key, or none does.
    #[error("this task does not own the key{}", at(owner.as_ref()))]
    Elsewhere {
        /// Where another task serves the key, if one is known.
        owner: Option<Address>,
        /// The assignment that says so.
        generation: Generation,
    },
    /// The key is on its way from this task to another: ask again when it is there. Nothing was done.
    #[error("the key is on its way to another task (hand-off {id})")]
    InTransit {
        /// Which hand-off: callers wait for a newer assignment than began it.
        id: HandOffId,
        /// The assignment that says so.
        generation: Generation,
    },
    /// The cost that was given is none.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// This task has no lease right now: it cannot reach the assigner, or has just begun.
    #[error("this task has no lease: it cannot serve before it hears of the assigner")]
    NoLease {
        /// The newest assignment that it knows.
        generation: Generation,
    },
}

fn at(owner: Option<&Address>) -> String {
    owner.map_or_else(String::new, |owner| format!(": {owner} does, as far as it knows"))
}

impl Guard {
    /// Takes a guard of a key, and counts what its request costs, wherever it belongs.
    pub(crate) fn take(
        owned: &Arc<Owned>,
        key: SliceKey,
        thousandths: u64,
    ) -> Result<Self, NotOwner> {
        loop {
            let view = owned.view();
            let index = view.index_of(key);
            let Some(tenures) = view.tenures() else {
                return Self::of_affinity(owned, &view, key, thousandths);
            };
            let Some(tenure) = tenures.at(index) else { return Err(elsewhere(&view, key)) };
            let in_transit = |id| {
                let generation = view.assignment().generation;
                Err(NotOwner::InTransit { id, generation })
            };
            if let Some((id, _)) = tenure.release {
                return in_transit(id);
            }
            let gate = tenure.gates.own();
            match gate.enter() {
                Ok(()) => {
                    let guard = Self {
                        owned: Arc::clone(owned),
                        gate: Some(Arc::clone(gate)),
                        key,
                        session: tenures.term.session,
                        since: tenure.since,
                        token: tenure.token,
                    };
                    // After the entry: whoever ends the term from here on ends this guard as well.
                    if !tenures.term.holds(u64::MAX) {
                        return Err(NotOwner::NoLease { generation: view.assignment().generation });
                    }
                    view.count(index, key, thousandths);
                    return Ok(guard);
                }
                Err(refused) => {
                    if refused.wake {
                        owned.drained.notify_one();
                    }
                    if refused.why == Closed::Revoked {
                        return Err(elsewhere(&view, key));
                    }
                    // Closed since this view was read: the newer one is published, and says more.
                }
            }
        }
    }

    fn of_affinity(
        owned: &Arc<Owned>,
        view: &View,
        key: SliceKey,
        thousandths: u64,
    ) -> Result<Self, NotOwner> {
        let (_, assigned) = view.assignment().get(key);
        let Some(own) = view.session.and_then(|session| assigned.replicas.of(session)) else {
            return Err(elsewhere(view, key));
        };
        view.count(view.index_of(key), key, thousandths);
        let (session, since, token) = (own.session, own.since, assigned.token);
        Ok(Self { owned: Arc::clone(owned), gate: None, key, session, since, token })
    }

    /// Says whether the key is still owned, without a break since the guard was taken: ask before you answer. Once it says no
    /// it never says yes again.
    pub fn still_owned(&self) -> bool {
        if self.gate.as_ref().is_some_and(|gate| gate.is_revoked()) {
            return false;
        }
        let view = self.owned.view();
        if view.session != Some(self.session) {
            return false;
        }
        match (view.tenure(self.key), &self.gate) {
            (Some((term, tenure)), Some(_)) => {
                tenure.since == self.since && term.holds(tenure.limit())
            }
            (None, None) => {
                let (_, assigned) = view.assignment().get(self.key);
                assigned.replicas.of(self.session).is_some_and(|own| own.since == self.since)
            }
            _ => false,
        }
    }

    /// Waits until the key is no longer owned. For ever, if that never happens.
    pub async fn lost(&self) {
        loop {
            let changed = self.owned.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if !self.still_owned() {
                return;
            }
            let Some(ends) = self.ends() else {
                changed.await;
                continue;
            };
            let left = ends.min(LOOK_AGAIN);
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    /// How long until the right to the key ends, as far as is known now. Nothing in an affinity job.
    fn ends(&self) -> Option<Duration> {
        let view = self.owned.view();
        let (term, tenure) = view.tenure(self.key)?;
        Some(term.ends().min(Time::from_nanos(tenure.limit())).since(term.now()))
    }

    /// Gives the key's fencing token, for storage to refuse whoever owned the key before: see `docs/fencing.md`.
    pub const fn fencing_token(&self) -> Generation {
        self.token
    }

    /// Gives since when the key has been owned without a break.
    pub const fn since(&self) -> Generation {
        self.since
    }
}

fn elsewhere(view: &View, key: SliceKey) -> NotOwner {
    let (_, assigned) = view.assignment().get(key);
    // A slice that has come and that the application is not ready for is served by what was before: whoever knows that it
    // is here asks again.
    let coming = view.session.and_then(|session| assigned.replicas.of(session));
    let generation = coming.map_or(view.assignment().generation, |own| {
        let Generation { incarnation, number } = own.since;
        Generation { incarnation, number: number.saturating_sub(1) }
    });
    NotOwner::Elsewhere { owner: view.other_owner(key), generation }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.gate.as_ref().is_some_and(|gate| gate.leave()) {
            self.owned.drained.notify_one();
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("key", &self.key)
            .field("since", &self.since)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

//! Which task owns a key, and how long to wait for a newer answer when the one at hand turned out wrong.

use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::task::{Address, SessionId};
use tokio::time::Instant;

/// How long a request waits for a newer assignment before its second try. A move is announced to tasks and callers at the
/// same moment, so a caller lags by a round trip; 200 ms is many of those, and still no hang.
pub(crate) const FRESH_WAIT: Duration = Duration::from_millis(200);

/// How long a request waits for a task that lags behind the caller to learn that it owns the key.
pub(crate) const LAG_WAIT: Duration = Duration::from_millis(25);

/// Who owns a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where the task listens.
    pub address: Address,
    /// Which life of which task it is.
    pub session: SessionId,
    /// The assignment that says so.
    pub generation: Generation,
}

/// Looks up owners in the newest assignment that this process knows.
#[derive(Clone, Debug)]
pub struct Router {
    table: tokio::sync::watch::Receiver<Table>,
}

/// An assignment in the least form that routes.
#[derive(Clone, Debug)]
pub struct Table {
    /// Which one it is.
    pub generation: Generation,
    /// Who owns what.
    pub owners: mandoline_core::slice_map::SliceMap<Option<(SessionId, Address)>>,
}

impl Router {
    /// Routes by the newest of a row of tables.
    pub fn new(table: tokio::sync::watch::Receiver<Table>) -> Self {
        Self { table }
    }

    /// Finds the owner of a key, unless nobody serves it.
    pub fn route(&self, key: SliceKey) -> Option<Target> {
        let table = self.table.borrow();
        let (_, owner) = table.owners.get(key);
        let (session, address) = owner.clone()?;
        Some(Target { address, session, generation: table.generation })
    }

    /// Gives the generation that keys are routed by.
    pub fn generation(&self) -> Generation {
        self.table.borrow().generation
    }

    /// Says whether there is an assignment to route by.
    pub fn is_ready(&self) -> bool {
        self.generation() > Generation::ZERO
    }

    /// Waits until the assignment at hand is `least` or newer.
    pub async fn wait_for(&self, least: Generation) {
        let mut table = self.table.clone();
        let found = table.wait_for(|table| table.generation >= least).await.map(drop);
        if found.is_err() {
            // Nobody will ever bring a newer one.
            std::future::pending::<()>().await;
        }
    }

    /// Finds the owner for a second try, after `tried` could not be reached or said that it does not own the key, by an
    /// assignment of generation `told` if it said so. Waits at most `FRESH_WAIT`.
    pub(crate) async fn fresh(
        &self,
        key: SliceKey,
        tried: &Target,
        told: Option<Generation>,
    ) -> Option<Target> {
        let deadline = Instant::now() + FRESH_WAIT;
        let mut least = tried.generation.next().max(told.unwrap_or_default());
        if told.is_some_and(|told| told < tried.generation) {
            // The task lags, not we: it is about to hear what we know.
            tokio::time::sleep(LAG_WAIT).await;
            return self.route(key);
        }
        loop {
            match self.route(key) {
                Some(target) if target.session == tried.session => {}
                other => return other,
            }
            if tokio::time::timeout_at(deadline, self.wait_for(least)).await.is_err() {
                return self.route(key);
            }
            least = self.generation().next();
        }
    }
}

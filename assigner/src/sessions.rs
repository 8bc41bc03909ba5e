//! Which tasks are connected to this node: one connection a session, the newest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::task::SessionId;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The sessions that are connected to this node. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Sessions(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    last: u64,
    by_session: BTreeMap<(JobName, SessionId), Entry>,
}

#[derive(Debug)]
struct Entry {
    connection: u64,
    replaced: CancellationToken,
    look_again: Arc<Notify>,
    granted: Granted,
}

/// The newest grant that a session was not told of yet.
type Granted = Arc<Mutex<Option<Grant>>>;

/// The leader's answer to an owner's renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The number of the renewal.
    pub request: u64,
    /// The newest generation that was applied.
    pub generation: Generation,
}

/// One connection of a session, from attaching to its end.
#[derive(Debug)]
pub struct Seat {
    sessions: Sessions,
    key: (JobName, SessionId),
    connection: u64,
    /// Another connection has taken the session.
    pub replaced: CancellationToken,
    /// Something has changed that the task should hear of: its last slice has gone, its job's spec says otherwise, or it was
    /// granted something.
    pub look_again: Arc<Notify>,
    granted: Granted,
}

impl Sessions {
    /// Notes a new connection of a session; one that there was before is told to end.
    pub fn take(&self, job: &JobName, session: SessionId) -> Seat {
        let mut open = self.lock();
        open.last += 1;
        let (connection, key) = (open.last, (job.clone(), session));
        let (replaced, look_again) = (CancellationToken::new(), Arc::new(Notify::new()));
        let granted = Granted::default();
        let entry = Entry {
            connection,
            replaced: replaced.clone(),
            look_again: Arc::clone(&look_again),
            granted: Arc::clone(&granted),
        };
        if let Some(before) = open.by_session.insert(key.clone(), entry) {
            before.replaced.cancel();
        }
        Seat { sessions: self.clone(), key, connection, replaced, look_again, granted }
    }

    /// Has a session, if it is connected here, look at the state again.
    pub fn look_again_at(&self, job: &JobName, session: SessionId) {
        if let Some(entry) = self.lock().by_session.get(&(job.clone(), session)) {
            entry.look_again.notify_one();
        }
    }

    /// Has a session, if it is connected here, told of a grant. Only the newest means anything.
    pub fn grant(&self, job: &JobName, session: SessionId, grant: Grant) {
        if let Some(entry) = self.lock().by_session.get(&(job.clone(), session)) {
            *entry.granted.lock().unwrap_or_else(PoisonError::into_inner) = Some(grant);
            entry.look_again.notify_one();
        }
    }

    /// Has all sessions of a job that are connected here look at the state again.
    pub fn look_again(&self, job: &JobName) {
        let all = (job.clone(), SessionId(0))..=(job.clone(), SessionId(u64::MAX));
        self.lock().by_session.range(all).for_each(|(_, entry)| entry.look_again.notify_one());
    }

    /// Counts the connections.
    pub fn count(&self) -> usize {
        self.lock().by_session.len()
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Takes the newest grant, if there is one that was not taken yet.
    pub fn granted(&self) -> Option<Grant> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Gives the connection up. If it was still the newest of its session, `if_newest` is called before another can take
    /// the session: so what it says is heard before anything that the next connection says.
    pub fn leave(self, if_newest: impl FnOnce()) {
        let mut open = self.sessions.lock();
        if open.is_newest(&self) {
            open.by_session.remove(&self.key);
            if_newest();
        }
        drop(open);
    }
}

impl Open {
    fn is_newest(&self, seat: &Seat) -> bool {
        let entry = self.by_session.get(&seat.key);
        entry.is_some_and(|entry| entry.connection == seat.connection)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.sessions.lock();
        if open.is_newest(self) {
            open.by_session.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_connection_replaces_the_first() {
        let (sessions, job) = (Sessions::default(), "kv".parse().unwrap());
        let first = sessions.take(&job, SessionId(1));
        let second = sessions.take(&job, SessionId(1));
        assert!(first.replaced.is_cancelled() && !second.replaced.is_cancelled());
        first.leave(|| panic!("the session is the second's"));
        assert_eq!(sessions.count(), 1);
        let mut told = false;
        second.leave(|| told = true);
        assert_eq!((sessions.count(), told), (0, true));
    }
}

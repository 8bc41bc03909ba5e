//! What this proxy knows of each pause, over all its workers: until when it lasts, how many it holds, what became of them, and
//! how many that had begun before are still under way.
//!
//! The first worker to hear of a pause starts its clock, for all of them. From then on the pause ends by that clock, also when
//! nobody can be reached who would tell of its end, and does not begin anew when it is told of again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mandoline_core::flags::{AtEnd, Flags, Pause, PauseId, PauseOrder, Phase};
use mandoline_core::generation::Generation;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::limits::Limits;
use crate::hold::room::{Full, Room};
use crate::metrics::stats::PauseStats;

/// All pauses that this proxy has heard of lately, and the room for those whom they and hand-offs hold.
#[derive(Debug)]
pub(crate) struct Book {
    workers: u64,
    limits: Mutex<Limits>,
    /// For all who are held, whatever for.
    pub(crate) room: Room,
    accounts: Mutex<BTreeMap<PauseId, Arc<Account>>>,
    // The flags that each worker goes by.
    versions: Mutex<Vec<Generation>>,
    changes: Arc<watch::Sender<()>>,
}

/// One pause, in this proxy.
#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) id: PauseId,
    pub(crate) order: PauseOrder,
    pub(crate) until: Instant,
    release: Mutex<Option<Release>>,
    room: Room,
    // Workers that go by it.
    in_force: AtomicU64,
    in_flight: AtomicU64,
    changes: Arc<watch::Sender<()>>,
    holds: AtomicU64,
    released: AtomicU64,
    failed: AtomicU64,
    late: AtomicU64,
    left: AtomicU64,
    refused: AtomicU64,
}

/// How those whom a pause held are let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    pub(crate) began: Instant,
    pub(crate) over: Duration,
    pub(crate) at_end: AtEnd,
}

/// How a stay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Released,
    Failed,
    Late,
    Left,
}

impl Book {
    pub(crate) fn new(workers: usize, limits: Limits) -> Self {
        Self {
            workers: workers as u64,
            limits: Mutex::new(limits),
            room: Room::new(limits.held_requests, limits.held_bytes),
            accounts: Mutex::default(),
            versions: Mutex::default(),
            changes: Arc::default(),
        }
    }

    /// Takes a worker in, and says which it is.
    pub(crate) fn enlist(&self) -> usize {
        let mut versions = lock(&self.versions);
        versions.push(Generation::ZERO);
        versions.len() - 1
    }

    /// A worker goes by these flags.
    pub(crate) fn goes_by(&self, worker: usize, version: Generation) {
        lock(&self.versions)[worker] = version;
        self.changes.send_replace(());
    }

    /// Gives the version of the flags that every worker goes by, or a later one.
    pub(crate) fn version(&self) -> Generation {
        let versions = lock(&self.versions);
        let least = versions.iter().min().filter(|_| versions.len() as u64 == self.workers);
        least.copied().unwrap_or(Generation::ZERO)
    }

    /// Tells of changes that are worth to be told of at once: of the version, and of pauses that nothing is in flight for any more.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Goes by other limits from now on. Pauses that are known keep theirs.
    pub(crate) fn set(&self, limits: Limits) {
        *lock(&self.limits) = limits;
        self.room.set(limits.held_requests, limits.held_bytes);
    }

    /// Opens the account of a pause that was told of, or brings it up to date.
    pub(crate) fn told(&self, pause: &Pause) -> Arc<Account> {
        let limits = *lock(&self.limits);
        let mut accounts = lock(&self.accounts);
        let fresh = || Arc::new(Account::new(pause, limits, Arc::clone(&self.changes)));
        let account = accounts.entry(pause.id).or_insert_with(fresh);
        if let Phase::Releasing { over } = pause.phase {
            account.release(over);
        }
        Arc::clone(account)
    }

    /// Forgets pauses that are over and that nobody tells of any more, but for the last few.
    pub(crate) fn tidy(&self, flags: &Flags) {
        let mut accounts = lock(&self.accounts);
        let is_over = |account: &Account| {
            account.in_force.load(Relaxed) == 0 && !flags.pauses.contains_key(&account.id)
        };
        let over = accounts.values().filter(|account| is_over(account));
        let over: Vec<PauseId> = over.map(|account| account.id).collect();
        for id in &over[..over.len().saturating_sub(REMEMBERED)] {
            accounts.remove(id);
        }
    }

    /// Says how things are with each pause.
    pub(crate) fn stats(&self) -> Vec<PauseStats> {
        lock(&self.accounts).values().map(|account| account.stats(self.workers)).collect()
    }
}

impl Account {
    fn new(pause: &Pause, limits: Limits, changes: Arc<watch::Sender<()>>) -> Self {
        let now = Instant::now();
        let cell = || AtomicU64::new(0);
        Self {
            id: pause.id,
            order: pause.order.clone(),
            // What overflows would be a pause without end, and there is none.
            until: now.checked_add(pause.order.lasts).unwrap_or(now),
            release: Mutex::default(),
            room: Room::new(limits.paused_requests, limits.paused_bytes),
            in_force: cell(),
            in_flight: cell(),
            changes,
            holds: cell(),
            released: cell(),
            failed: cell(),
            late: cell(),
            left: cell(),
            refused: cell(),
        }
    }

    /// Ends the pause, or changes over how long those are let go whom it holds still.
    fn release(&self, over: Duration) {
        let mut release = lock(&self.release);
        let stays = |known: Release| known.over == over || known.at_end == AtEnd::Fail;
        if !release.is_some_and(stays) {
            *release = Some(Release { began: Instant::now(), over, at_end: AtEnd::GoOn });
        }
    }

    /// Ends the pause as it was ordered for when it has lasted, unless it has ended.
    pub(crate) fn lapse(&self) -> Release {
        let PauseOrder { release_over: over, at_end, .. } = self.order;
        *lock(&self.release).get_or_insert_with(|| Release { began: Instant::now(), over, at_end })
    }

    /// Says how those whom it held are let go, once it has ended. To be asked again and again: it ends by the clock.
    pub(crate) fn ended(&self, now: Instant) -> Option<Release> {
        if now >= self.until { Some(self.lapse()) } else { *lock(&self.release) }
    }

    /// Says how long it lasts yet at most, to the last request that it holds.
    pub(crate) fn left(&self) -> Duration {
        let end = match *lock(&self.release) {
            Some(release) => release.began.checked_add(release.over),
            None => self.until.checked_add(self.order.release_over),
        };
        end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()))
    }

    /// One more worker goes by it.
    pub(crate) fn is_taken_up(&self) {
        self.in_force.fetch_add(1, Relaxed);
    }

    /// One worker less goes by it.
    pub(crate) fn is_let_off(&self) {
        self.in_force.fetch_sub(1, Relaxed);
    }

    /// A request in its scope had begun before it.
    pub(crate) fn has_in_flight(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// A request in its scope that had begun before it has ended.
    pub(crate) fn has_landed(&self) {
        if self.in_flight.fetch_sub(1, Relaxed) == 1 {
            self.changes.send_replace(());
        }
    }

    /// Takes a request in, if there is room.
    pub(crate) fn enter(&self, bytes: usize) -> Result<(), Full> {
        self.room.enter(bytes)?;
        self.holds.fetch_add(1, Relaxed);
        Ok(())
    }

    /// A request is not held, since there is no room.
    pub(crate) fn refuses(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// Takes in more of a request that it holds, if there is room.
    pub(crate) fn grow(&self, more: usize) -> bool {
        self.room.grow(more)
    }

    /// A request is held no longer.
    pub(crate) fn leave(&self, bytes: usize, end: End) {
        self.room.leave(bytes);
        let cell = match end {
            End::Released => &self.released,
            End::Failed => &self.failed,
            End::Late => &self.late,
            End::Left => &self.left,
        };
        cell.fetch_add(1, Relaxed);
    }

    fn stats(&self, workers: u64) -> PauseStats {
        PauseStats {
            id: self.id,
            scope: self.order.scope.clone(),
            in_force: self.in_force.load(Relaxed) == workers,
            ended: self.ended(Instant::now()).is_some(),
            lasts_yet: self.left(),
            in_flight: self.in_flight.load(Relaxed),
            held: self.room.requests() as u64,
            held_bytes: self.room.bytes() as u64,
            holds: self.holds.load(Relaxed),
            released: self.released.load(Relaxed),
            failed: self.failed.load(Relaxed),
            late: self.late.load(Relaxed),
            left: self.left.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// How many pauses are shown that are over.
const REMEMBERED: usize = 32;

//! Who is inside a slice, and whether more may come in: the guard count and the release flag, in one atomic word.
//!
//! One word, because the question that a release asks ("is anyone inside, and can nobody enter any more?") is about both
//! at once. All changes of a word have one order that every thread agrees on, so an entry lies either before the close, and is
//! waited for, or behind it, and is refused. Two words would need a fence between a store and a load on either side.
//!
//! * To enter is wait-free: one look, and one addition that cannot fail. Whoever finds out by the addition that the gate is
//!   closed takes it back. For that moment the count is one too high, so it may be this thread that takes it to zero and
//!   has to say so. The look comes first so that a thread does this at most once a close: callers who keep asking a closed
//!   gate cannot keep it from becoming empty.
//! * `DRAINED` is set once, when a closed gate is seen empty, and by it *exactly one* of all who could say "now it is empty"
//!   says it: the close itself, the last guard, or an entry that was taken back. Reopening clears it.
//! * Orderings. `leave` releases and `drain` acquires, and every change in between is a read-modify-write, which carries
//!   the release on: whoever learns that the gate is drained sees all that was done inside. `close`, `reopen` and `revoke`
//!   release, `enter` and `is_revoked` acquire: who is refused because slices were split finds the view that replaced this
//!   one, who enters after an abort sees what the abort put back, who is lost sees why. Nothing here needs `SeqCst`: there is no second word to be ordered with.
//!
//! `tests/gate.rs` tries every interleaving of this file by loom.

use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};

/// Lets guards in until it is closed, and knows how many are inside.
#[derive(Debug)]
pub(crate) struct Gate {
    /// The number of guards inside in the low bits, and above it the flags.
    word: AtomicU64,
}

/// Why a gate let nobody in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// The slice is being released: it is in transit, or will be reopened.
    Releasing,
    /// The slice was split or merged: newer gates have its keys, so look again.
    Superseded,
    /// The slice is lost.
    Revoked,
}

/// An entry that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Refused {
    /// Why.
    pub(crate) why: Closed,
    /// Whether this attempt held up a release that must now be told, as by [`Gate::leave`].
    pub(crate) wake: bool,
}

impl Gate {
    /// Makes a gate that is open and empty.
    pub(crate) fn open() -> Self {
        Self { word: AtomicU64::new(0) }
    }

    /// Lets one guard in, who must [`leave`](Self::leave) once.
    pub(crate) fn enter(&self) -> Result<(), Refused> {
        if let Some(why) = closed(self.word.load(Ordering::Acquire)) {
            return Err(Refused { why, wake: false });
        }
        match closed(self.word.fetch_add(1, Ordering::Acquire)) {
            None => Ok(()),
            Some(why) => Err(Refused { why, wake: self.leave() }),
        }
    }

    /// Lets one guard out. Says whether it was the last of a closed gate, so that whoever waits for it must be told: to one
    /// caller a close, and never while a guard is inside.
    ///
    /// The waiter may be told of a close that was aborted since; so it asks [`is_drained`](Self::is_drained) again.
    #[must_use]
    pub(crate) fn leave(&self) -> bool {
        let before = self.word.fetch_sub(1, Ordering::Release);
        debug_assert!(before & COUNT > 0, "who leaves has entered");
        before & (CLOSED | COUNT) == CLOSED | 1 && self.drain()
    }

    /// Lets no more in. Says whether the gate is empty; if not, exactly one who leaves will say so.
    #[must_use]
    pub(crate) fn close(&self) -> bool {
        self.shut(CLOSED)
    }

    /// Lets no more in, for good, since newer gates have its keys; those who are inside stay valid. The newer gates must be
    /// published before, for that is where the refused look next.
    ///
    /// Says whether the gate is empty, as [`close`](Self::close) does.
    #[must_use]
    pub(crate) fn supersede(&self) -> bool {
        self.shut(CLOSED | SUPERSEDED)
    }

    /// Lets guards in again after a release that was aborted. A superseded gate stays closed, a revoked one too.
    pub(crate) fn reopen(&self) {
        let open = |word| (word & SUPERSEDED == 0).then_some(word & !(CLOSED | DRAINED));
        // Refused where superseded: then there is nothing to reopen.
        let _reopened = self.word.fetch_update(Ordering::Release, Ordering::Relaxed, open);
    }

    /// Ends every guard inside for good, and lets no more in. They go on being counted until they leave.
    pub(crate) fn revoke(&self) {
        self.word.fetch_or(REVOKED, Ordering::Release);
    }

    /// Says whether the guards inside are lost.
    pub(crate) fn is_revoked(&self) -> bool {
        self.word.load(Ordering::Acquire) & REVOKED != 0
    }

    /// Says whether the gate is closed and empty.
    pub(crate) fn is_drained(&self) -> bool {
        self.word.load(Ordering::Acquire) & DRAINED != 0
    }

    fn shut(&self, flags: u64) -> bool {
        let before = self.word.fetch_or(flags, Ordering::AcqRel);
        before & DRAINED != 0 || self.drain()
    }

    /// Sets `DRAINED` on a closed, empty gate. True for the one who did it.
    ///
    /// Tries again only if another thread changed the word meanwhile, and each thread can do that but a few times.
    fn drain(&self) -> bool {
        let empty = |word| (word & (CLOSED | DRAINED | COUNT) == CLOSED).then_some(word | DRAINED);
        self.word.fetch_update(Ordering::Acquire, Ordering::Relaxed, empty).is_ok()
    }
}

fn closed(word: u64) -> Option<Closed> {
    match word {
        word if word & REVOKED != 0 => Some(Closed::Revoked),
        word if word & SUPERSEDED != 0 => Some(Closed::Superseded),
        word if word & CLOSED != 0 => Some(Closed::Releasing),
        _ => None,
    }
}

/// The gate of a slice, and the gates it had before it was split or merged, while guards from then are still inside.
///
/// Guards of an older gate may lie in any of the slices that came of it. So a release waits for all of them, and a loss
/// ends all of them: at worst a release takes a little longer, or a guard is lost that need not have been.
#[derive(Debug)]
pub(crate) struct Gates {
    own: Arc<Gate>,
    // Each is superseded, or will be as soon as the view with this slice is published.
    older: Vec<Arc<Gate>>,
}

impl Gates {
    /// Makes the gates of a slice that was not here before.
    pub(crate) fn open() -> Self {
        Self { own: Arc::new(Gate::open()), older: Vec::new() }
    }

    /// Makes the gates of a slice whose keys were in slices with these gates. When it is published, each of those must be
    /// told to [`supersede`](Self::supersede).
    pub(crate) fn after<'a>(replaced: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut older: Vec<Arc<Gate>> = Vec::new();
        for gate in replaced.into_iter().flat_map(|gates| gates.older.iter().chain([&gates.own])) {
            if !gate.is_drained() && !older.iter().any(|known| Arc::ptr_eq(known, gate)) {
                older.push(Arc::clone(gate));
            }
        }
        Self { own: Arc::new(Gate::open()), older }
    }

    /// Takes the gates along into the next view of a slice that did not change, but not those that are empty by now.
    pub(crate) fn kept(&self) -> Self {
        let older = self.older.iter().filter(|gate| !gate.is_drained()).map(Arc::clone).collect();
        Self { own: Arc::clone(&self.own), older }
    }

    /// Gives the gate for new guards.
    pub(crate) const fn own(&self) -> &Arc<Gate> {
        &self.own
    }

    /// Sends those who would enter on to the gates that replace these. Who is inside stays. To be done before one of those
    /// is closed, for a gate that is open has no last guard.
    pub(crate) fn supersede(&self) {
        // Nobody waits yet: whoever releases a successor asks `is_drained` first.
        let _drained = self.own.supersede();
    }

    /// Begins a release. Says whether nobody is inside; if not, ask [`is_drained`](Self::is_drained) whenever a guard of
    /// these says, as it leaves, that it was a gate's last.
    #[must_use]
    pub(crate) fn close(&self) -> bool {
        self.own.close() && self.older_are_drained()
    }

    /// Ends a release that was aborted.
    pub(crate) fn reopen(&self) {
        self.own.reopen();
    }

    /// Ends all guards for good: the slice is lost.
    pub(crate) fn revoke(&self) {
        for gate in self.older.iter().chain([&self.own]) {
            gate.revoke();
        }
    }

    /// Says whether the release can be acknowledged: closed, and nobody inside.
    ///
    /// Gate by gate is good enough: each stays drained until `reopen`, which is for those who ask this to call.
    pub(crate) fn is_drained(&self) -> bool {
        self.own.is_drained() && self.older_are_drained()
    }

    fn older_are_drained(&self) -> bool {
        self.older.iter().all(|gate| gate.is_drained())
    }
}

const CLOSED: u64 = 1 << 63;
const DRAINED: u64 = 1 << 62;
const SUPERSEDED: u64 = 1 << 61;
const REVOKED: u64 = 1 << 60;
const COUNT: u64 = REVOKED - 1;

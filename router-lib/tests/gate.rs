//! Every interleaving of the threads at a gate, by loom: `gate.rs` itself, compiled over loom's atomics.
//!
//! What a guard protects is a loom cell here, so an ordering that is too weak is a failure, and not a matter of luck.
//! Each of these changes to `gate.rs` was made, one at a time, and makes a test fail: `enter`, `leave`, `shut`, `reopen` or
//! `revoke` as a load and a store; `drain` that does not look at the count, at `CLOSED` or at `DRAINED`, that tries only
//! once, or that does nothing; `enter` that keeps what it should take back, or takes it back and tells nobody; `leave` that
//! tells always; `is_drained` by the count; `reopen` that keeps `DRAINED`, or opens what is superseded; and each ordering,
//! made `Relaxed`, and `AcqRel` made either half of itself.

#![expect(clippy::arc_with_non_send_sync, reason = "loom runs all its threads on one")]

// What is tested is private to the library.
#[allow(dead_code)]
#[path = "../src/gate.rs"]
mod gate;
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

use std::sync::Arc;

use gate::{Closed, Gate, Gates, Refused};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;

/// A slice: its gate, what only its owner may touch, and how often someone said that it is empty.
struct Slice {
    gate: Gate,
    state: UnsafeCell<u64>,
    told: AtomicU64,
}

impl Slice {
    fn new() -> Arc<Self> {
        let (gate, state) = (Gate::open(), UnsafeCell::new(0));
        Arc::new(Self { gate, state, told: AtomicU64::new(0) })
    }

    /// Enters, looks at the state as guards do beside one another, and leaves. Hands over if it falls to this thread.
    fn visit(&self) -> Result<(), Closed> {
        let (came, last) = self.look();
        if last {
            self.hand_over();
        }
        came
    }

    /// Enters, looks and leaves. Says whether someone must be told now.
    fn look(&self) -> (Result<(), Closed>, bool) {
        match self.gate.enter() {
            Ok(()) => {
                self.state.with(|_| ());
                (Ok(()), self.gate.leave())
            }
            Err(Refused { why, wake }) => (Err(why), wake),
        }
    }

    fn release(&self) {
        if self.gate.close() {
            self.hand_over();
        }
    }

    /// What is done once nobody is inside: a data race with any guard's look, if one still is.
    fn hand_over(&self) {
        assert!(self.gate.is_drained());
        self.told.fetch_add(1, Ordering::Relaxed);
        self.state.with_mut(|_| ());
    }

    fn told(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }
}

/// Tries all interleavings in which threads are interrupted at most three times, where all there are take minutes. Those
/// were tried too: `LOOM_MAX_PREEMPTIONS=99`.
fn model_in_bounds(act: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(act);
}

/// Runs `act` on a thread of its own.
fn spawn<T: 'static>(
    slice: &Arc<Slice>,
    act: impl Fn(&Slice) -> T + 'static,
) -> thread::JoinHandle<T> {
    let slice = Arc::clone(slice);
    thread::spawn(move || act(&slice))
}

#[test]
fn a_release_waits_for_all_who_are_inside_and_one_says_so() {
    model_in_bounds(|| {
        let slice = Slice::new();
        let guards = [(); 2].map(|()| spawn(&slice, Slice::visit));
        slice.release();
        for guard in guards {
            let came = guard.join().unwrap();
            assert!(matches!(came, Ok(()) | Err(Closed::Releasing)));
        }
        assert_eq!(slice.told(), 1);
        assert!(slice.gate.is_drained());
        assert_eq!(slice.visit(), Err(Closed::Releasing));
    });
}

#[test]
fn a_gate_that_is_empty_stays_empty() {
    loom::model(|| {
        let slice = Slice::new();
        let guard = spawn(&slice, |slice| (slice.visit().is_ok(), slice.visit().is_ok()));
        let empty = slice.gate.close();
        if empty {
            // Were anyone let in from here on, this would race with their look.
            slice.state.with_mut(|_| ());
        }
        let (first, second) = guard.join().unwrap();
        assert!(first || !second, "who was refused once is refused again");
        assert_eq!(slice.told() + u64::from(empty), 1);
    });
}

#[test]
fn a_release_can_be_aborted_and_begun_again() {
    model_in_bounds(|| {
        let slice = Slice::new();
        let guard = spawn(&slice, |slice| [slice.look().1, slice.look().1]);
        let begin = || {
            let empty = slice.gate.close();
            if empty || slice.gate.is_drained() {
                slice.state.with_mut(|_| ());
            }
            empty
        };
        let first = begin();
        slice.gate.reopen();
        let second = begin();
        let [one, two] = guard.join().unwrap();
        assert!(slice.gate.is_drained());
        // The first release need not be told of, for it may be aborted while someone is inside; and nobody is told twice.
        assert!(!(first && second) || !(one || two));
        assert!((1..=2).contains(&[first, second, one, two].iter().filter(|told| **told).count()));
    });
}

#[test]
fn who_enters_after_an_abort_sees_what_it_put_back() {
    loom::model(|| {
        let slice = Slice::new();
        assert!(slice.gate.close());
        let guard = spawn(&slice, Slice::visit);
        slice.state.with_mut(|_| ());
        slice.gate.reopen();
        let came = guard.join().unwrap();
        assert!(matches!(came, Ok(()) | Err(Closed::Releasing)));
        assert_eq!(slice.told(), 0);
        assert_eq!(slice.visit(), Ok(()));
    });
}

#[test]
fn a_release_that_is_begun_twice_is_told_that_it_is_over() {
    loom::model(|| {
        let slice = Slice::new();
        assert_eq!(slice.gate.enter(), Ok(()));
        let empty = slice.gate.close();
        let guard = spawn(&slice, |slice| {
            slice.state.with(|_| ());
            slice.gate.leave()
        });
        let again = slice.gate.close();
        if again {
            slice.state.with_mut(|_| ());
        }
        let last = guard.join().unwrap();
        assert!(!empty && (again || last), "someone was told");
        assert!(slice.gate.close());
    });
}

#[test]
fn who_is_lost_sees_why() {
    loom::model(|| {
        let slice = Slice::new();
        let why = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&why);
        let guard = spawn(&slice, move |slice| {
            let lost = match slice.gate.enter() {
                Ok(()) => slice.gate.is_revoked(),
                Err(refused) => refused.why == Closed::Revoked,
            };
            assert!(!lost || seen.load(Ordering::Relaxed));
        });
        why.store(true, Ordering::Relaxed);
        slice.gate.revoke();
        guard.join().unwrap();
    });
}

#[test]
fn a_loss_ends_every_guard_that_came_in_before() {
    loom::model(|| {
        let slice = Slice::new();
        let guard = spawn(&slice, |slice| slice.gate.enter());
        slice.gate.revoke();
        let came = guard.join().unwrap();
        assert!(slice.gate.is_revoked());
        match came {
            Ok(()) => {
                assert!(!slice.gate.leave(), "lost, counted all the same, and nobody waits");
            }
            Err(Refused { why, wake }) => assert_eq!((why, wake), (Closed::Revoked, false)),
        }
        slice.gate.reopen();
        assert_eq!(slice.visit(), Err(Closed::Revoked), "for good");
    });
}

#[test]
fn a_loss_in_the_middle_of_a_release_hides_nothing_from_it() {
    model_in_bounds(|| {
        let slice = Slice::new();
        let guard = spawn(&slice, Slice::visit);
        let loss = spawn(&slice, |slice| slice.gate.revoke());
        slice.release();
        let _came = guard.join().unwrap();
        loss.join().unwrap();
        assert_eq!(slice.told(), 1);
        assert!(slice.gate.is_revoked() && slice.gate.is_drained());
    });
}

#[test]
fn who_is_sent_on_finds_the_gates_that_replace() {
    loom::model(|| {
        let slice = Slice::new();
        let published = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&published);
        let guard = spawn(&slice, move |slice| {
            if let Err(why) = slice.visit() {
                assert_eq!(why, Closed::Superseded);
                assert!(seen.load(Ordering::Relaxed), "published before the old gate was closed");
            }
        });
        published.store(true, Ordering::Relaxed);
        if slice.gate.supersede() {
            slice.hand_over();
        }
        slice.gate.reopen();
        assert_eq!(slice.gate.enter().map_err(|refused| refused.why), Err(Closed::Superseded));
        guard.join().unwrap();
        assert_eq!(slice.told(), 1);
    });
}

#[test]
fn the_release_of_a_part_waits_for_guards_of_the_whole() {
    loom::model(|| {
        let whole = Arc::new(Gates::open());
        assert_eq!(whole.own().enter(), Ok(()));
        let state = Arc::new(UnsafeCell::new(0));
        state.with(|_| ());
        let told = Arc::new(AtomicU64::new(0));
        let (low, high) = (Gates::after([&*whole]), Gates::after([&*whole]));
        whole.supersede();
        let guard = {
            let (whole, state, told) = (Arc::clone(&whole), Arc::clone(&state), Arc::clone(&told));
            thread::spawn(move || {
                state.with(|_| ());
                if whole.own().leave() {
                    told.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        if low.close() || low.is_drained() {
            state.with_mut(|_| ());
        }
        assert_eq!(high.own().enter(), Ok(()), "the other part goes on");
        guard.join().unwrap();
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert!(low.is_drained() && !high.is_drained());
        assert!(!high.close() && high.own().leave() && high.is_drained());
    });
}

#[test]
fn gates_are_kept_only_while_someone_is_inside() {
    loom::model(|| {
        let (one, other) = (Gates::open(), Gates::open());
        assert_eq!((one.own().enter(), other.own().enter()), (Ok(()), Ok(())));
        let both = Gates::after([&one, &other]);
        one.supersede();
        other.supersede();
        assert!(!both.close());
        assert!(one.own().leave() && !both.is_drained());
        both.reopen();

        // Merged, and split again: the guard of one half of old still counts, the other's gate is let go.
        let parts = [Gates::after([&both]), Gates::after([&both])];
        both.supersede();
        let again = Gates::after(&parts);
        parts.iter().for_each(Gates::supersede);
        assert!(!again.close());
        again.reopen();
        let again = again.kept();
        assert_eq!(again.own().enter(), Ok(()));
        assert!(other.own().leave());
        assert!(!again.close() && again.own().leave() && again.is_drained());

        again.reopen();
        again.kept().revoke();
        assert!(again.own().is_revoked());
        assert!(!other.own().is_revoked(), "nobody was inside any more");
    });
}

#[test]
fn a_loss_reaches_guards_from_before_a_split() {
    loom::model(|| {
        let whole = Gates::open();
        assert_eq!(whole.own().enter(), Ok(()));
        let part = Gates::after([&whole]);
        whole.supersede();
        part.revoke();
        assert!(whole.own().is_revoked() && part.own().is_revoked());
        assert!(!part.close() && whole.own().leave() && part.is_drained());
    });
}

//! Moves a slice's state from the task that has it to the task that will serve it, before it does.
//!
//! An application that implements [`State`] gets this from its slicelets; docs/state-transfer.md tells the whole story. The task that will
//! serve a slice pulls: a *bulk* pass while the other one serves on, and a *last* pass with what has changed since, once
//! that one serves no longer. Memory is bounded by [`AHEAD_MAX_BYTES`] a transfer on either side, however large the state is.
//!
//! A slice of an affinity job never stops being served, so there is no last pass: what is written between the bulk pass and the switch
//! stays behind. Whoever cannot bear that makes the job exclusive.
//!
//! ```
//! use std::io::{self, Write};
//!
//! use mandoline::transfer::{HandOff, Pass, Sink, Source, State};
//!
//! /// One counter for the whole slice, which everybody can see and nobody would shard.
//! struct Counter(std::sync::Mutex<u64>, std::sync::Mutex<Option<u64>>);
//!
//! impl State for Counter {
//!     fn export(&self, _: &HandOff, _: Pass, out: &mut Sink) -> io::Result<()> {
//!         let count = *self.0.lock().unwrap();
//!         out.write_all(&count.to_le_bytes())
//!     }
//!
//!     fn import(&self, _: &HandOff, _: Pass, bytes: &mut Source) -> io::Result<()> {
//!         let mut count = [0; 8];
//!         io::Read::read_exact(bytes, &mut count)?;
//!         *self.1.lock().unwrap() = Some(u64::from_le_bytes(count)); // set aside
//!         Ok(())
//!     }
//!
//!     fn keep(&self, _: &HandOff) {
//!         let count = self.1.lock().unwrap().take().expect("a pass came before");
//!         *self.0.lock().unwrap() = count;
//!     }
//!
//!     fn discard(&self, _: &HandOff) {
//!         *self.1.lock().unwrap() = None;
//!     }
//! }
//! ```

use std::fmt;
use std::io;
use std::time::Duration;

use mandoline_core::slice::Slice;
use mandoline_core::transit::HandOffId;
use mandoline_proto::transfer::CHUNK_MAX_BYTES;

pub use mandoline_proto::transfer::{Party, Pass, Refusal, RefusalCode};

mod window;
mod feed;
pub mod serve;
pub mod pull;

#[cfg(test)]
mod tests;

pub use crate::transfer::feed::Source;
pub use crate::transfer::window::Sink;

/// What an application implements so that the state of its slices moves with them.
///
/// Each call has a thread of its own and may block; the calls for one hand-off come one after the other. A call that panics or
/// never returns costs its thread and this transfer: the slice then starts empty.
pub trait State: Send + Sync + 'static {
    /// Writes what there is of a slice: at [`Pass::Bulk`] everything, while requests go on; at [`Pass::Last`] all that has
    /// changed since the newest bulk pass of the same hand-off began, while no request is under way. A bulk pass may come
    /// again, and then begins anew; so may a last pass, and adds to the same bulk pass. Writing waits while the other side is
    /// [`AHEAD_MAX_BYTES`] behind, and fails when nobody wants the rest any more: hold no lock meanwhile, and return that error.
    fn export(&self, hand_off: &HandOff, pass: Pass, out: &mut Sink) -> io::Result<()>;

    /// Hears, on the side that exports, that a hand-off is over, whatever became of it: changes need not be noted for it
    /// any longer.
    fn exported(&self, hand_off: &HandOff) {
        let _ = hand_off;
    }

    /// Reads a pass and sets it aside for this hand-off: nothing of it may be served yet. A pass that comes again replaces
    /// what it brought before, and a last pass adds to the bulk pass. The end of `bytes` comes only when all of them arrived as
    /// they were sent; an error from them means that they did not, and what this call brought is not to be used.
    fn import(&self, hand_off: &HandOff, pass: Pass, bytes: &mut Source) -> io::Result<()>;

    /// Takes what was set aside into use: the slice is this task's. Comes at most once a hand-off, and after it no `discard`.
    fn keep(&self, hand_off: &HandOff);

    /// Lets go of what was set aside, if anything: the hand-off was called off, or its transfer failed.
    fn discard(&self, hand_off: &HandOff);
}

/// A slice on its way from one task to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandOff {
    /// Never the same twice.
    pub id: HandOffId,
    /// Which keys.
    pub slice: Slice,
}

impl fmt::Display for HandOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.id, self.slice)
    }
}

/// What a pass has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// The bytes that the application wrote.
    pub bytes: u64,
    /// How often a broken connection was taken up again.
    pub resumed: u32,
}

/// How long things may take. The standard suits all but tests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long an export may write nothing while it is waited for, or a pull may wait in line.
    pub stall: Duration,
    /// How long an export waits for a puller that lost its connection.
    pub resume_within: Duration,
    /// How long a pull may come before its time: one side hears of a step sooner than the other.
    pub due_within: Duration,
    /// Tries in a row that bring nothing, after which the other side counts as lost.
    pub tries: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(10),
            resume_within: Duration::from_secs(5),
            due_within: Duration::from_secs(2),
            tries: 8,
        }
    }
}

/// What an export holds until the other side says that it has it: enough to fill a network of 10 ms at 100 MB/s.
const WINDOW_BYTES: usize = 4 * CHUNK_MAX_BYTES;

/// How far an export may be ahead of the import, in bytes: four chunks that wait for an acknowledgement, and one each that is being
/// written, lies ready, and is being read.
pub const AHEAD_MAX_BYTES: usize = WINDOW_BYTES + 3 * CHUNK_MAX_BYTES;
/// How many bulk passes a task exports, and imports, at once: each has a thread. More wait in line.
const BULK_MAX: usize = 8;
/// How many last passes: more, since callers wait for them.
const LAST_MAX: usize = 32;

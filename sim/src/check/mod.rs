//! What must always hold, one property a file, all of one shape: `see` is shown what happens, and says what is broken.
//!
//! A check knows nothing of the machines: it is shown what they said, applied, installed and believe, and keeps its own books.

pub mod single_owner;
pub mod generations;
pub mod coverage;
pub mod served;
pub mod fencing;
pub mod convergence;
pub mod imported;

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;

/// What happened, as a check is shown it. Processes are numbers: whoever shows them knows their names.
#[derive(Clone, Copy, Debug)]
pub enum Seen<'a> {
    /// A process has just started, and knows what its disk knows.
    Started {
        /// Which process.
        who: usize,
    },
    /// A process holds this assignment from now on.
    Holds {
        /// Which process.
        who: usize,
        /// The assignment.
        assignment: &'a Arc<Assignment>,
    },
    /// A task may believe more than before: what it believes to own right now, and what the others do.
    Believes {
        /// Which task.
        who: usize,
        /// What it believes to own.
        slices: &'a [Slice],
        /// What each of the others does.
        others: &'a [(usize, Vec<Slice>)],
    },
    /// A new owner has read from storage.
    Read {
        /// Which keys.
        slice: Slice,
        /// Its token.
        token: Generation,
    },
    /// Storage has taken a write.
    Wrote {
        /// Which key.
        key: SliceKey,
        /// The token that it came with.
        token: Generation,
    },
    /// A task has let go of a slice, and this is what its state came to.
    LetGo {
        /// Which task.
        who: usize,
        /// By which hand-off.
        id: HandOffId,
        /// What the state sums up to.
        checksum: u64,
    },
    /// A task serves a slice again that it had let go of.
    Resumed {
        /// Which task.
        who: usize,
        /// What was called off.
        id: HandOffId,
    },
    /// A slice has come to a task.
    Opened {
        /// Which task.
        who: usize,
        /// Which keys.
        slice: Slice,
        /// Since when it has them.
        since: Generation,
        /// By which hand-off its state came, and what that sums up to; nothing if it begins empty.
        import: Option<(HandOffId, u64)>,
    },
    /// The last fault is over.
    Calm {
        /// How long a restored cluster may give nothing away yet.
        held_off: Duration,
    },
    /// All is quiet: this is what everyone holds, and who serves what by its own word.
    Look(&'a Look),
}

/// What is looked at once the last fault is over.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// What each process that runs holds.
    pub holds: Vec<(usize, Option<Arc<Assignment>>)>,
    /// What is served by someone's own word, sorted, perhaps with overlaps.
    pub served: Vec<Slice>,
    /// Whether it is the last look.
    pub last: bool,
}

/// A property does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach {
    /// Which check found it.
    pub check: &'static str,
    /// When, in true time.
    pub at: Time,
    /// What it found.
    pub message: String,
    /// The keys that it is about, if it is about some.
    pub slice: Option<Slice>,
}

/// What one check says when it is shown something: what is broken, and which keys that is about.
pub type Verdict = Result<(), (String, Option<Slice>)>;

/// All checks.
#[derive(Debug, Default)]
pub struct Checks {
    single_owner: single_owner::SingleOwner,
    generations: generations::Generations,
    coverage: coverage::Coverage,
    served: served::Served,
    fencing: fencing::Fencing,
    convergence: convergence::Convergence,
    imported: imported::Imported,
    /// Two owners are only counted: clocks are further off than the protocol allows.
    allows_two_owners: bool,
    /// How often there were two.
    pub double_owners: u64,
}

impl Checks {
    /// All checks, where two owners are a violation or, with clocks further off than the protocol allows, to be expected.
    pub fn new(allows_two_owners: bool) -> Self {
        Self { allows_two_owners, ..Self::default() }
    }

    /// Shows all of them what happened, and gives the first thing that is broken.
    pub fn see(&mut self, at: Time, seen: &Seen<'_>) -> Option<Breach> {
        let mut owners = self.single_owner.see(at, seen);
        if self.allows_two_owners && owners.is_err() {
            self.double_owners += 1;
            owners = Ok(());
        }
        let verdicts = [
            (single_owner::NAME, owners),
            (generations::NAME, self.generations.see(at, seen)),
            (coverage::NAME, self.coverage.see(at, seen)),
            (served::NAME, self.served.see(at, seen)),
            (fencing::NAME, self.fencing.see(at, seen)),
            (convergence::NAME, self.convergence.see(at, seen)),
            (imported::NAME, self.imported.see(at, seen)),
        ];
        verdicts.into_iter().find_map(|(check, verdict)| {
            let (message, slice) = verdict.err()?;
            Some(Breach { check, at, message, slice })
        })
    }
}

//! What must always hold, one property a file, all of one shape: `see` is shown what happens, and says what is broken.
//!
//! A check knows nothing of the machines: it is shown what they said, applied, installed and believe, and keeps its own books.

pub mod generations;
pub mod coverage;
pub mod convergence;
pub mod served;

use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::slice::Slice;
use mandoline_core::time::Time;

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
    /// The last fault is over.
    Calm,
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
    generations: generations::Generations,
    coverage: coverage::Coverage,
    convergence: convergence::Convergence,
    served: served::Served,
}

impl Checks {
    /// Shows all of them what happened, and gives the first thing that is broken.
    pub fn see(&mut self, at: Time, seen: &Seen<'_>) -> Option<Breach> {
        let verdicts = [
            (generations::NAME, self.generations.see(at, seen)),
            (coverage::NAME, self.coverage.see(at, seen)),
            (convergence::NAME, self.convergence.see(at, seen)),
            (served::NAME, self.served.see(at, seen)),
        ];
        verdicts.into_iter().find_map(|(check, verdict)| {
            let (message, slice) = verdict.err()?;
            Some(Breach { check, at, message, slice })
        })
    }
}

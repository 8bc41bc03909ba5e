//! What happened, in numbers: a run that found nothing wrong says little if nothing went wrong in it.

use std::ops::AddAssign;

use crate::cluster::scenario::Kind;

/// Something that is counted, faults apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// What was looked at one after another.
    Events,
    /// Letters that the network lost.
    LettersLost,
    /// Letters that came twice.
    LettersTwice,
    /// Times that a node began to lead.
    LeaderChanges,
    /// Processes that started again.
    Restarts,
    /// Sessions that began.
    Sessions,
    /// Changes of the assignment that were agreed on.
    Changes,
    /// Assignments that were taken on by whoever watches.
    Installs,
    /// Requests of clerks that met a task.
    Requests,
    /// Hand-offs that began.
    HandOffsBegun,
    /// Hand-offs that led to the new owner.
    HandOffsDone,
    /// Hand-offs that were called off, or came to nothing with a task.
    HandOffsAborted,
    /// Leases that ran out on a task's own clock.
    Expiries,
    /// Sessions that ended, for whatever reason.
    Ends,
    /// Guards that were given.
    Guards,
    /// Guards that were lost before their work was done.
    GuardsLost,
    /// Slices whose state came with them.
    Imports,
    /// Slices that came without, and began empty.
    EmptyStarts,
    /// Writes that storage took.
    Writes,
    /// Writes of an earlier owner that storage refused.
    RefusedWrites,
    /// New owners that were none any more when storage heard of them.
    RefusedAdvances,
    /// Times that two tasks believed that they own a key, where clocks were too far off to prevent it.
    DoubleOwners,
}

impl Count {
    const ALL: [(Self, &'static str); 22] = [
        (Self::Events, "events"),
        (Self::LettersLost, "letters_lost"),
        (Self::LettersTwice, "letters_twice"),
        (Self::LeaderChanges, "leader_changes"),
        (Self::Restarts, "restarts"),
        (Self::Sessions, "sessions"),
        (Self::Changes, "changes"),
        (Self::Installs, "installs"),
        (Self::Requests, "requests"),
        (Self::HandOffsBegun, "handoffs_begun"),
        (Self::HandOffsDone, "handoffs_done"),
        (Self::HandOffsAborted, "handoffs_aborted"),
        (Self::Expiries, "expiries"),
        (Self::Ends, "ends"),
        (Self::Guards, "guards"),
        (Self::GuardsLost, "guards_lost"),
        (Self::Imports, "imports"),
        (Self::EmptyStarts, "empty_starts"),
        (Self::Writes, "writes"),
        (Self::RefusedWrites, "refused_writes"),
        (Self::RefusedAdvances, "refused_advances"),
        (Self::DoubleOwners, "double_owners"),
    ];
}

/// What happened, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// By kind, in the order of `Kind::ALL`.
    pub faults: [u64; Kind::ALL.len()],
    counts: [u64; Count::ALL.len()],
}

impl Tally {
    /// Counts a fault.
    pub const fn fault(&mut self, kind: Kind) {
        self.faults[kind as usize] += 1;
    }

    /// Counts something else.
    pub const fn count(&mut self, count: Count) {
        self.counts[count as usize] += 1;
    }

    /// Gives how often something was counted.
    pub const fn of(&self, count: Count) -> u64 {
        self.counts[count as usize]
    }

    /// Walks what was counted, faults apart, by name.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Count::ALL.iter().map(|(count, name)| (*name, self.of(*count)))
    }
}

impl AddAssign<&Self> for Tally {
    fn add_assign(&mut self, other: &Self) {
        let faults = self.faults.iter_mut().zip(other.faults);
        let counts = self.counts.iter_mut().zip(other.counts);
        faults.chain(counts).for_each(|(sum, more)| *sum += more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_stand_in_their_order() {
        assert!(Count::ALL.iter().enumerate().all(|(at, (count, _))| *count as usize == at));
    }
}

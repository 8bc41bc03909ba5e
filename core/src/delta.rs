//! What changed between two generations, and the only way in which a known assignment moves on.

use std::sync::Arc;

use crate::assignment::{Assigned, Assignment};
use crate::generation::Generation;
use crate::name::JobName;
use crate::slice::Slice;
use crate::spec::Ratio;
use crate::task::{SessionId, Task};

/// What became of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskChange {
    /// It is new, or says something else of itself.
    Set(Arc<Task>),
    /// It is gone.
    Gone(SessionId),
}

/// The step from one generation of an assignment to a later one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Which job.
    pub job: JobName,
    /// The generation that it applies to, and to no other.
    pub from: Generation,
    /// The generation that it leads to.
    pub to: Generation,
    /// What became of tasks.
    pub tasks: Vec<TaskChange>,
    /// The slices that are now so, sorted, without overlap. A merged slice stands once, whatever lay there before.
    pub slices: Vec<(Slice, Assigned)>,
    /// The cap for spill as it is now, changed or not.
    pub spill: Option<Ratio>,
}

/// Why a delta did not apply. The assignment is as it was; ask for a full one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It belongs to another job.
    #[error("the delta is of job {found}, not {expected}")]
    Job {
        /// The assignment's job.
        expected: JobName,
        /// The delta's.
        found: JobName,
    },
    /// It steps from another generation than the one that is known, or leads nowhere.
    #[error("the delta leads from {from} to {to}, but {known} is known")]
    OutOfOrder {
        /// What is known.
        known: Generation,
        /// Where the delta begins.
        from: Generation,
        /// Where it leads.
        to: Generation,
    },
    /// Its slices are out of order or overlap.
    #[error("the delta's slices are out of order or overlap at {0}")]
    Order(Slice),
    /// It would leave a slice with a task that the assignment does not have, or with one task twice.
    #[error("the delta would leave slice {0} with a task that is unknown or named twice")]
    Broken(Slice),
}

impl Delta {
    /// Gives the assignment that the delta leads to, leaving the one that it begins at as it was.
    pub fn apply_to(&self, old: &Assignment) -> Result<Assignment, DeltaError> {
        if self.job != old.job {
            return Err(DeltaError::Job { expected: old.job.clone(), found: self.job.clone() });
        }
        if self.from != old.generation || self.to <= self.from {
            return Err(DeltaError::OutOfOrder {
                known: old.generation,
                from: self.from,
                to: self.to,
            });
        }
        if let Some(pair) =
            self.slices.windows(2).find(|pair| pair[0].0.last() >= pair[1].0.first())
        {
            return Err(DeltaError::Order(pair[1].0));
        }
        let mut new = old.clone();
        for change in &self.tasks {
            match change {
                TaskChange::Set(task) => new.tasks.insert(task.session, Arc::clone(task)),
                TaskChange::Gone(session) => new.tasks.remove(session),
            };
        }
        new.slices.set_all(&self.slices);
        new.spill = self.spill;
        new.generation = self.to;
        // A task that is gone may be named anywhere; else only the slices that changed can be broken.
        match new.broken_slice() {
            Some(slice) => Err(DeltaError::Broken(slice)),
            None => Ok(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assignment::{Replica, Replicas};
    use crate::key::SliceKey;
    use crate::task::TaskInfo;

    fn task(id: u64) -> Arc<Task> {
        let name = format!("t{id}").parse().unwrap();
        let info = TaskInfo::new(name, id, format!("127.0.0.1:{id}").parse().unwrap());
        Arc::new(Task::new(SessionId(id), info))
    }

    fn served_by(id: u64) -> Assigned {
        let replica = Replica { session: SessionId(id), since: Generation::ZERO };
        Assigned { replicas: Replicas::One(replica), ..Assigned::default() }
    }

    fn number(number: u64) -> Generation {
        Generation { incarnation: 0, number }
    }

    fn delta(from: u64, to: u64, tasks: Vec<TaskChange>, slices: Vec<(Slice, Assigned)>) -> Delta {
        let (from, to) = (number(from), number(to));
        Delta { job: "kv".parse().unwrap(), from, to, tasks, slices, spill: None }
    }

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    #[test]
    fn a_delta_leads_from_one_generation_to_a_later_one() {
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let first = delta(0, 1, vec![TaskChange::Set(task(1))], vec![(Slice::FULL, served_by(1))]);
        let one = first.apply_to(&start).unwrap();
        let second = delta(1, 2, vec![TaskChange::Set(task(2))], vec![(slice(0, 9), served_by(2))]);
        let two = second.apply_to(&one).unwrap();
        assert_eq!((two.generation, two.slices.count(), two.tasks.len()), (number(2), 2, 2));
    }

    #[test]
    fn a_delta_that_does_not_fit_changes_nothing_and_says_why() {
        let known = Assignment::new("kv".parse().unwrap(), number(5));
        let full = |id| vec![(Slice::FULL, served_by(id))];
        let cases = [
            (delta(4, 6, vec![], vec![]), "the delta leads from 0.4 to 0.6, but 0.5 is known"),
            (delta(6, 7, vec![], vec![]), "the delta leads from 0.6 to 0.7, but 0.5 is known"),
            (delta(5, 5, vec![], vec![]), "the delta leads from 0.5 to 0.5, but 0.5 is known"),
            (
                delta(5, 6, vec![], full(9)),
                "would leave slice 0000000000000000..ffffffffffffffff with a task that is unknown",
            ),
            (
                delta(
                    5,
                    6,
                    vec![],
                    vec![(slice(0, 9), Assigned::default()), (slice(9, 10), Assigned::default())],
                ),
                "out of order or overlap at 0000000000000009..000000000000000a",
            ),
        ];
        for (delta, message) in cases {
            let error = delta.apply_to(&known).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let other = Delta { job: "other".parse().unwrap(), ..delta(5, 6, vec![], vec![]) };
        assert!(matches!(other.apply_to(&known), Err(DeltaError::Job { .. })));
    }

    #[test]
    fn a_cap_for_spill_comes_and_goes() {
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let cap = Some(Ratio::percent(115));
        let with = Delta { spill: cap, ..delta(0, 1, vec![], vec![]) }.apply_to(&start).unwrap();
        assert_eq!((with.spill, &with.slices), (cap, &start.slices));
        assert_eq!(delta(1, 2, vec![], vec![]).apply_to(&with).unwrap().spill, None);
    }

    #[test]
    fn a_task_cannot_leave_while_a_slice_names_it() {
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let served = delta(0, 1, vec![TaskChange::Set(task(1))], vec![(Slice::FULL, served_by(1))]);
        let served = served.apply_to(&start).unwrap();
        let gone = delta(1, 2, vec![TaskChange::Gone(SessionId(1))], vec![]);
        assert_eq!(gone.apply_to(&served), Err(DeltaError::Broken(Slice::FULL)));
    }
}

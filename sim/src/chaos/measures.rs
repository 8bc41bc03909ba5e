//! How well an assignment does under a load, and how much of that load is where it was not.

use std::collections::BTreeMap;

use mandoline_core::assignment::Assignment;
use mandoline_core::load::Load;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::SessionId;

/// How well a round was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measures {
    /// The hottest task's load above the mean, in relation to the hint.
    pub over: f64,
    /// The coldest task's load below the mean, in relation to the hint.
    pub under: f64,
    /// The share of the load that is newly on a task; of a slice with r replicas, each new one counts 1/r.
    pub churn: f64,
    /// How long the answer took, in milliseconds of one processor.
    pub ms: f64,
}

/// What lies where, under one load.
pub(in crate::chaos) struct Weighed {
    total: u64,
    max: u64,
    mean: f64,
    min: u64,
    /// The load that is newly on a task.
    moved: u64,
}

impl Weighed {
    /// Sums what each task of `after` carries of `loads`, which lie evenly within their runs, and what of it no task of
    /// `before` did.
    pub(in crate::chaos) fn new(
        loads: &SliceMap<Load>,
        before: &Assignment,
        after: &Assignment,
    ) -> Self {
        let mut tasks: BTreeMap<SessionId, u64> =
            after.tasks.keys().map(|session| (*session, 0)).collect();
        let (mut total, mut moved) = (0, 0);
        for (run, load) in loads.iter() {
            total += load.milli();
            for (slice, now) in after.slices.touching(run) {
                let range = slice.overlap(run).expect("it touches the run");
                for (slice, earlier) in before.slices.touching(range) {
                    let piece = slice.overlap(range).expect("it touches the range");
                    let replicas = now.replicas.as_slice();
                    let load = load.share(piece.width(), run.width()).milli();
                    let each = load / (replicas.len() as u64).max(1);
                    for replica in replicas {
                        *tasks.entry(replica.session).or_default() += each;
                        if earlier.replicas.of(replica.session).is_none() {
                            moved += each;
                        }
                    }
                }
            }
        }
        Self {
            total,
            max: tasks.values().copied().max().unwrap_or(0),
            mean: total as f64 / (tasks.len() as f64).max(1.0),
            min: tasks.values().copied().min().unwrap_or(0),
            moved,
        }
    }

    /// Gives the mean load of a task.
    pub(in crate::chaos) const fn mean(&self) -> f64 {
        self.mean
    }

    /// Puts the loads in relation to `hint`, in thousandths.
    pub(in crate::chaos) fn measures(&self, hint: f64, ms: f64) -> Measures {
        Measures {
            over: (self.max as f64 - self.mean).max(0.0) / hint,
            under: (self.mean - self.min as f64).max(0.0) / hint,
            churn: self.moved as f64 / (self.total as f64).max(1.0),
            ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::assignment::{Assigned, Replica};
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::slice::Slice;
    use mandoline_core::task::{Task, TaskInfo};

    use super::*;

    const HALF: u64 = 1 << 63;

    fn assignment(low: &[u64], high: &[u64]) -> Assignment {
        let mut assignment = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        for session in 1..=3 {
            let name = format!("t{session}").parse().unwrap();
            let info = TaskInfo::new(name, 1, format!("t:{session}").parse().unwrap());
            let session = SessionId(session);
            let task = Task::new(session, info);
            assignment.tasks.insert(session, task.into());
        }
        let (below, above) = Slice::FULL.split_at(SliceKey(HALF)).unwrap();
        for (slice, sessions) in [(below, low), (above, high)] {
            let since = Generation::ZERO;
            let replica = |id: &u64| Replica { session: SessionId(*id), since };
            let replicas = sessions.iter().map(replica).collect();
            assignment.slices.set(slice, Assigned { replicas, ..Assigned::default() });
        }
        assignment
    }

    fn weigh(before: &Assignment, after: &Assignment) -> Measures {
        // 600 on the lower half, of which a quarter of the keys have 300; 300 on the upper half.
        let runs = [(0, 300), (HALF / 2, 300), (HALF, 300)];
        let runs = runs.map(|(first, load)| (SliceKey(first), Load::from_milli(load)));
        let loads = SliceMap::from_runs(runs.to_vec()).unwrap();
        Weighed::new(&loads, before, after).measures(1_000.0, 0.0)
    }

    #[test]
    fn a_replica_that_is_new_counts_its_share_of_the_load() {
        let (one, two) = (assignment(&[1], &[2]), assignment(&[1, 3], &[2]));
        let found = weigh(&one, &two);
        // 300 on each of the three; half of the lower half's 600 is on a task that did not have it.
        let expected = Measures { over: 0.0, under: 0.0, churn: 300.0 / 900.0, ms: 0.0 };
        assert_eq!(found, expected);
        assert_eq!(weigh(&two, &one).churn, 0.0);
    }

    #[test]
    fn over_and_under_are_distances_from_the_mean_of_all_tasks() {
        let found = weigh(&assignment(&[1], &[2]), &assignment(&[2], &[1]));
        let expected = Measures { over: 0.3, under: 0.3, churn: 1.0, ms: 0.0 };
        assert_eq!(found, expected);
    }
}

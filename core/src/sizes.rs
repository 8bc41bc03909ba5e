//! What applications say of their slices beside load: further metrics, and what a slice costs to move.
//!
//! Soft, like a forecast, and kept over rounds: a task that did not report in this one has not lost its memory. What is
//! known of a slice is shared out by width when it splits and added up when it merges, until its task speaks of the new
//! ones. A job whose tasks say nothing costs nothing here.

use crate::assignment::{Assigned, Assignment};
use crate::balance::Further;
use crate::load::Load;
use crate::plan::SLICES_MAX;
use crate::report::LoadTable;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::{METRICS_MAX, Metric};

/// The most that moving one slice may be said to cost, so that the costs of all slices add up in a `u64`: 18 TB in bytes.
pub const COST_MAX: u64 = u64::MAX / SLICES_MAX as u64;

/// What applications say of their slices beside load.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    known: Option<SliceMap<Known>>,
}

/// What is known of one slice, over all of its replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    /// By metric of the spec, in its order.
    metrics: [Load; METRICS_MAX],
    /// What one replica costs to move, if the application says.
    cost: Option<u64>,
}

impl Sizes {
    /// Takes in what was reported since the last round.
    pub fn update(&mut self, assignment: &Assignment, table: &LoadTable) {
        if self.known.is_some() || table.has_sizes() {
            let known =
                assignment.slices.map(|slice, assigned| self.newest(slice, assigned, table));
            self.known = Some(known);
        }
    }

    /// Gives the further loads of each slice, in order, by those metrics of which anything is known.
    pub fn further(&self, assignment: &Assignment, metrics: &[Metric]) -> Vec<Further> {
        if self.known.is_none() || metrics.is_empty() {
            return Vec::new();
        }
        let known: Vec<Known> =
            assignment.slices.iter().map(|(slice, _)| self.inherited(slice)).collect();
        let one = |(index, metric): (usize, &Metric)| {
            let loads: Vec<Load> = known.iter().map(|known| known.metrics[index]).collect();
            let any = loads.iter().any(|load| *load > Load::ZERO);
            any.then_some(Further { band: metric.band, loads })
        };
        metrics.iter().take(METRICS_MAX).enumerate().filter_map(one).collect()
    }

    /// Gives what each slice costs to move, in order; nothing if no application says. A slice of which it is not known is
    /// taken to cost what so much key space does on average.
    pub fn costs(&self, assignment: &Assignment) -> Vec<u64> {
        if self.known.is_none() {
            return Vec::new();
        }
        let known: Vec<(u128, Option<u64>)> = assignment
            .slices
            .iter()
            .map(|(slice, _)| (slice.width(), self.inherited(slice).cost))
            .collect();
        let said = || known.iter().filter_map(|(width, cost)| Some((*width, (*cost)?)));
        if said().next().is_none() {
            return Vec::new();
        }
        let total: u128 = said().map(|(_, cost)| u128::from(cost)).sum();
        // Widths are up to 2^64, and so is the total: the product would not fit.
        let width: u128 = said().map(|(width, _)| width >> 16).sum();
        let usual = |slice: u128| {
            let cost = total * (slice >> 16) / width.max(1);
            u64::try_from(cost).unwrap_or(COST_MAX).min(COST_MAX)
        };
        known.iter().map(|(width, cost)| cost.unwrap_or_else(|| usual(*width))).collect()
    }

    /// What the tasks of a slice say of it now, or else what is known.
    fn newest(&self, slice: Slice, assigned: &Assigned, table: &LoadTable) -> Known {
        let replicas = assigned.replicas.as_slice();
        let said = replicas.iter().filter_map(|replica| table.sizes_of(replica.session, slice));
        let (mut speaking, mut newest) = (0, Known::default());
        for size in said {
            speaking += 1;
            for (sum, load) in newest.metrics.iter_mut().zip(&size.metrics) {
                *sum += *load;
            }
            newest.cost = newest.cost.max(size.move_cost.map(|cost| cost.min(COST_MAX)));
        }
        if speaking == 0 {
            return self.inherited(slice);
        }
        // Those that said nothing are like the others.
        for sum in &mut newest.metrics {
            *sum = sum.share(replicas.len() as u128, speaking);
        }
        newest
    }

    /// What is known of the keys of a slice, whatever slices they were in.
    fn inherited(&self, slice: Slice) -> Known {
        let mut all = Known::default();
        let Some(known) = &self.known else { return all };
        for (part, known) in known.touching(slice) {
            let overlap = part.overlap(slice).map_or(0, Slice::width);
            for (sum, load) in all.metrics.iter_mut().zip(known.metrics) {
                *sum += load.share(overlap, part.width());
            }
            if let Some(cost) = known.cost {
                let share = Load::from_milli(cost).share(overlap, part.width()).milli();
                all.cost = Some(all.cost.unwrap_or(0).saturating_add(share).min(COST_MAX));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::assignment::{Replica, Replicas};
    use crate::generation::Generation;
    use crate::report::{Report, Size};
    use crate::spec::Ratio;
    use crate::task::SessionId;

    const WHOLE: &str = "0..ffffffffffffffff";
    const LOW: &str = "0..7fffffffffffffff";
    const HIGH: &str = "8000000000000000..ffffffffffffffff";

    /// Slices with the sessions that serve them.
    fn assignment(slices: &[(&str, &[u64])]) -> Assignment {
        let mut assignment = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        for (slice, sessions) in slices {
            let replica = |id: &u64| Replica { session: SessionId(*id), since: Generation::ZERO };
            let replicas: Replicas = sessions.iter().map(replica).collect();
            let assigned = Assigned { replicas, ..Assigned::default() };
            assignment.slices.set(slice.parse().unwrap(), assigned);
        }
        assignment
    }

    fn table(said: &[(u64, &str, &[u64], Option<u64>)]) -> LoadTable {
        let mut table = LoadTable::default();
        for (session, slice, metrics, move_cost) in said {
            let slice = slice.parse().unwrap();
            let metrics = metrics.iter().map(|milli| Load::from_milli(*milli)).collect();
            let (generation, window) = (Generation::ZERO, Duration::from_secs(5));
            let slices = vec![(slice, Load::ZERO)];
            let mut report = Report::new(SessionId(*session), generation, window, slices);
            report.sizes = vec![Size { slice, metrics, move_cost: *move_cost }];
            table.receive(report).unwrap();
        }
        table
    }

    fn metrics(count: usize) -> Vec<Metric> {
        let metric = |index| Metric { name: format!("m{index}"), band: Ratio::percent(20) };
        (0..count).map(metric).collect()
    }

    fn loads(sizes: &Sizes, assignment: &Assignment, count: usize) -> Vec<Vec<u64>> {
        let further = sizes.further(assignment, &metrics(count));
        further.iter().map(|one| one.loads.iter().map(|load| load.milli()).collect()).collect()
    }

    #[test]
    fn who_says_nothing_asks_nothing() {
        let (mut sizes, halves) = (Sizes::default(), assignment(&[(LOW, &[1]), (HIGH, &[2])]));
        sizes.update(&halves, &LoadTable::default());
        assert_eq!(loads(&sizes, &halves, 2), Vec::<Vec<u64>>::new());
        assert_eq!(sizes.costs(&halves), Vec::<u64>::new());
    }

    #[test]
    fn what_was_said_is_kept_until_something_else_is() {
        let (mut sizes, halves) = (Sizes::default(), assignment(&[(LOW, &[1]), (HIGH, &[2])]));
        sizes.update(&halves, &table(&[(1, LOW, &[600, 0], None), (2, HIGH, &[200], None)]));
        // Of the second metric nothing is known: it asks for nothing.
        assert_eq!(loads(&sizes, &halves, 2), [[600, 200]]);
        sizes.update(&halves, &LoadTable::default());
        sizes.update(&halves, &table(&[(2, HIGH, &[300, 7], None)]));
        assert_eq!(loads(&sizes, &halves, 2), [[600, 300], [0, 7]]);
        assert_eq!(loads(&sizes, &halves, 1), [[600, 300]], "the spec asks for one only");
    }

    #[test]
    fn splits_share_and_merges_add_up() {
        let (mut sizes, whole) = (Sizes::default(), assignment(&[(WHOLE, &[1])]));
        let halves = assignment(&[(LOW, &[1]), (HIGH, &[1])]);
        sizes.update(&whole, &table(&[(1, WHOLE, &[1_000], Some(500))]));
        // A plan may come before the next round: it sees what is known, by the slices that there are.
        assert_eq!(loads(&sizes, &halves, 1), [[500, 500]]);
        assert_eq!(sizes.costs(&halves), [250, 250]);
        sizes.update(&halves, &table(&[(1, HIGH, &[800], Some(300))]));
        assert_eq!(loads(&sizes, &halves, 1), [[500, 800]]);
        assert_eq!((loads(&sizes, &whole, 1), sizes.costs(&whole)), (vec![vec![1_300]], vec![550]));
    }

    #[test]
    fn replicas_that_say_nothing_are_like_those_that_do() {
        let (mut sizes, both) = (Sizes::default(), assignment(&[(WHOLE, &[1, 2])]));
        sizes.update(&both, &table(&[(1, WHOLE, &[400], Some(9))]));
        assert_eq!((loads(&sizes, &both, 1), sizes.costs(&both)), (vec![vec![800]], vec![9]));
        let said = table(&[(1, WHOLE, &[400], Some(9)), (2, WHOLE, &[500], Some(7))]);
        sizes.update(&both, &said);
        assert_eq!((loads(&sizes, &both, 1), sizes.costs(&both)), (vec![vec![900]], vec![9]));
    }

    #[test]
    fn a_slice_without_a_cost_has_that_of_its_key_space() {
        let (mut sizes, halves) = (Sizes::default(), assignment(&[(LOW, &[1]), (HIGH, &[2])]));
        sizes.update(&halves, &table(&[(1, LOW, &[], Some(40))]));
        assert_eq!(sizes.costs(&halves), [40, 40]);
        sizes.update(&halves, &table(&[(1, LOW, &[], Some(u64::MAX)), (2, HIGH, &[], Some(0))]));
        assert_eq!(sizes.costs(&halves), [COST_MAX, 0]);
    }
}

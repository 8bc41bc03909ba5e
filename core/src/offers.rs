//! What callers offered, and how it is weighed against what tasks measured.
//!
//! A task counts what it takes. What it refuses, or what never reached it, only its callers know: they report what they
//! offered each slice, so that a task that is drowning does not pass for one that is merely busy.
//!
//! Callers count requests; a task may count what it likes. What callers say is weighed only where at least half of the
//! tasks count as their callers do, within a quarter: then what they offered counts where it exceeds what was served
//! beyond chance, and a task whose load is out of all proportion is believed only as far as its callers bear it out.
//! Nothing is gained by the larger of two noisy figures, so within chance the task's word stands.
//!
//! A task that counts nothing though requests are sent to it is silent: a server that links nothing, registered by an
//! agent. It says nothing of how tasks count, and on its slices the callers' word is all there is.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Add;
use std::time::Duration;

use crate::assignment::Assignment;
use crate::brake::Word;
use crate::load::Load;
use crate::report::{
    HotKey, LoadTable, Offered, ReportError, Second, check_hot, check_window, merge_by_key,
    out_of_order,
};
use crate::slice::Slice;
use crate::spec::Ratio;
use crate::task::SessionId;
use crate::time::Time;

/// Callers that are heard for one job; as many as watchers of a node.
pub const CALLERS_MAX: usize = 20_000;
/// Slices of one offer: the heaviest, where there are more. 200 KB on the wire; what is left out counts as not offered,
/// which raises nothing.
pub const OFFER_MAX: usize = 4_096;
/// Tasks that one offer may say to avoid: more fail together, and that is no task's fault.
pub const AVOIDED_MAX: usize = 256;
/// Slices of all offers of one job: 48 MB.
const SLICES_MAX: usize = 1_500_000;
/// After so many of its windows without a word a caller is forgotten.
const WINDOWS_KEPT: u32 = 3;
/// A task is suspect if it says so many times the mean of the others,
const SUSPECT_TIMES: u64 = 100;
/// and so many times what callers offered it.
const SUSPECT_OVER_OFFERED: u64 = 10;
/// Requests that a task must have had to say anything of how it counts.
const TELLING: u64 = 20;
/// If more than this share of what is sent to a task fails, it is not served by chance. Less is, by one that still lives.
const FAILING: Ratio = Ratio::percent(90);

/// A number that a caller drew when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Caller(pub u64);

/// What one caller offered over a window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Who.
    pub caller: Caller,
    /// How long it counted.
    pub window: Duration,
    /// Load by slice, sorted, without overlap.
    pub slices: Vec<SliceOffer>,
    /// The heaviest keys, sorted.
    pub hot: Vec<HotKey>,
    /// Tasks that it avoids, since they fail though they live; sorted.
    pub avoided: Vec<SessionId>,
}

/// What one caller offered a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceOffer {
    /// Which one.
    pub slice: Slice,
    /// All of it, whatever came of it.
    pub load: Load,
    /// What failed of it.
    pub failed: Load,
}

/// Why an offer was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// It is wrong in a way that a task's report may be, too.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// It named too many slices.
    #[error("the offer names {0} slices: name the {OFFER_MAX} heaviest")]
    Many(usize),
    /// It named too many tasks, or out of order.
    #[error(
        "the offer names {0} tasks that its caller avoids: name {AVOIDED_MAX} at most, each once and in order"
    )]
    Avoided(usize),
    /// More failed than was offered.
    #[error("more of {0} failed than was offered")]
    Failed(Slice),
    /// Too many callers report for the job.
    #[error("{CALLERS_MAX} callers report for this job: have fewer report, one in ten says enough")]
    Callers,
    /// What callers report for the job is too much.
    #[error(
        "callers report {SLICES_MAX} slices for this job: have fewer report, one in ten says enough"
    )]
    Slices,
}

impl Offer {
    /// Checks what a careful caller would never send.
    pub fn check(&self) -> Result<(), OfferError> {
        check_window(self.window)?;
        if self.slices.len() > OFFER_MAX {
            return Err(OfferError::Many(self.slices.len()));
        }
        if let Some(at) = out_of_order(self.slices.iter().map(|offer| offer.slice)) {
            return Err(ReportError::Order(at).into());
        }
        if let Some(offer) = self.slices.iter().find(|offer| offer.failed > offer.load) {
            return Err(OfferError::Failed(offer.slice));
        }
        let is_sorted = self.avoided.is_sorted_by(|a, b| a < b);
        if self.avoided.len() > AVOIDED_MAX || !is_sorted {
            return Err(OfferError::Avoided(self.avoided.len()));
        }
        Ok(check_hot(&self.hot)?)
    }
}

/// What the callers of a job last offered. Soft, as reports are.
#[derive(Clone, Debug, Default)]
pub struct Offers {
    callers: BTreeMap<Caller, (Time, Offer)>,
    slices: usize,
    totals: Totals,
}

/// What was offered in all, as of the last round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many callers report.
    pub callers: usize,
    /// What they offered.
    pub load: Load,
    /// What failed of it.
    pub failed: Load,
    /// Tasks that say far more than anyone offered them.
    pub suspects: BTreeSet<SessionId>,
    /// Tasks that fail though they live, and how many callers avoid each for that.
    pub outliers: BTreeMap<SessionId, usize>,
}

impl Offers {
    /// Takes what a caller offered in the place of what it offered before.
    pub fn receive(&mut self, now: Time, offer: Offer) -> Result<(), OfferError> {
        offer.check()?;
        let before = self.callers.get(&offer.caller).map_or(0, |(_, known)| known.slices.len());
        if self.callers.len() >= CALLERS_MAX && !self.callers.contains_key(&offer.caller) {
            return Err(OfferError::Callers);
        }
        let slices = self.slices - before + offer.slices.len();
        if slices > SLICES_MAX {
            return Err(OfferError::Slices);
        }
        self.slices = slices;
        self.callers.insert(offer.caller, (now + offer.window * WINDOWS_KEPT, offer));
        Ok(())
    }

    /// Gives what was offered in all, as of the last round.
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Weighs what callers offered against what tasks measured, before a round is planned by it.
    pub fn weigh(&mut self, now: Time, assignment: &Assignment, table: &mut LoadTable) {
        self.callers.retain(|_, (until, _)| now < *until);
        self.slices = self.callers.values().map(|(_, offer)| offer.slices.len()).sum();
        let mut totals = Totals { callers: self.callers.len(), ..Totals::default() };
        for session in self.callers.values().flat_map(|(_, offer)| &offer.avoided) {
            if assignment.tasks.contains_key(session) {
                *totals.outliers.entry(*session).or_default() += 1;
            }
        }
        if !self.callers.is_empty() {
            let sums = Sums::of(assignment, self.callers.values().map(|(_, offer)| offer));
            (totals.load, totals.failed) = (sums.load, sums.failed);
            let offered = sums.known(assignment).collect();
            let tasks = sums.counted(assignment, table);
            if count_alike(&tasks) {
                let hot = self.hot();
                let (suspects, silent) = (suspects(&tasks), silent(&tasks));
                totals.suspects.clone_from(&suspects);
                table.weigh(Second { offered, hot, suspects, silent });
            }
        }
        self.totals = totals;
    }

    /// Says of each of these sessions whether its callers are served by it. Of one whom nobody asks for anything, or whose
    /// slices others serve as well, they say nothing.
    pub fn words(
        &self,
        now: Time,
        assignment: &Assignment,
        of: &BTreeSet<SessionId>,
    ) -> BTreeMap<SessionId, Word> {
        let mut sent: BTreeMap<SessionId, (u64, u64)> = BTreeMap::new();
        let offers = self.callers.values().filter(|(until, _)| now < *until);
        for (offer, part) in offers.flat_map(|(_, o)| o.slices.iter().map(move |part| (o, part))) {
            let (whole, assigned) = assignment.slices.get(part.slice.first());
            let replicas = assigned.replicas.as_slice();
            if !whole.contains(part.slice.last())
                || !replicas.iter().all(|replica| of.contains(&replica.session))
            {
                continue;
            }
            for replica in replicas {
                let (all, failed) = sent.entry(replica.session).or_default();
                *all += requests(part.load, offer.window);
                *failed += requests(part.failed, offer.window);
            }
        }
        let telling = sent.into_iter().filter(|(_, (all, _))| *all >= TELLING * 1_000_000);
        telling
            .map(|(session, (all, failed))| {
                let fails = failed > FAILING.of(all);
                (session, if fails { Word::Failing } else { Word::Served })
            })
            .collect()
    }

    fn hot(&self) -> Vec<HotKey> {
        let named = self.callers.values().flat_map(|(_, offer)| offer.hot.iter().copied());
        let mut hot = Vec::new();
        merge_by_key(&mut hot, &named.collect::<Vec<_>>(), Add::add);
        hot
    }
}

/// Counts what a load comes to over a window, in millionths of a request.
fn requests(load: Load, window: Duration) -> u64 {
    let millis = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
    load.milli().saturating_mul(millis)
}

/// What all callers offered, by the slices of an assignment.
struct Sums {
    slices: Vec<Sum>,
    load: Load,
    failed: Load,
    window: Duration,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    load: Load,
    /// Someone spoke of a wider slice: nobody knows how its load lies.
    blurred: bool,
}

impl Sums {
    fn of<'a>(assignment: &Assignment, offers: impl Iterator<Item = &'a Offer>) -> Self {
        let slices = vec![Sum::default(); assignment.slices.count()];
        let (load, failed) = (Load::ZERO, Load::ZERO);
        let mut sums = Self { slices, load, failed, window: Duration::MAX };
        for offer in offers {
            sums.window = sums.window.min(offer.window);
            for part in &offer.slices {
                sums.load += part.load;
                sums.failed += part.failed;
                let first = assignment.slices.index_of(part.slice.first());
                let last = assignment.slices.index_of(part.slice.last());
                if first == last {
                    sums.slices[first].load += part.load;
                } else {
                    sums.slices[first..=last].iter_mut().for_each(|sum| sum.blurred = true);
                }
            }
        }
        sums
    }

    /// What each slice whose load is known was offered.
    fn known<'a>(&'a self, assignment: &'a Assignment) -> impl Iterator<Item = Offered> {
        let known = assignment.slices.iter().zip(&self.slices).filter(|(_, sum)| !sum.blurred);
        known.map(|((slice, assigned), sum)| {
            let replicas = assigned.replicas.as_slice();
            let each = sum.load.share(1, replicas.len().max(1) as u128);
            Offered { slice, load: sum.load, each, window: self.window }
        })
    }

    fn counted(&self, assignment: &Assignment, table: &LoadTable) -> BTreeMap<SessionId, Counted> {
        let mut tasks: BTreeMap<SessionId, Counted> = BTreeMap::new();
        let millis = u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX);
        for ((slice, assigned), sum) in assignment.slices.iter().zip(&self.slices) {
            let replicas = assigned.replicas.as_slice();
            let each = sum.load.share(1, replicas.len().max(1) as u128);
            for replica in replicas {
                let served = table.served(replica.session, replica.since, slice);
                let Some((_, served)) = served else { continue };
                let task = tasks.entry(replica.session).or_default();
                task.counts |= served > Load::ZERO;
                if !sum.blurred {
                    task.served += served;
                    task.offered += each;
                    task.requests += each.milli().saturating_mul(millis) / 1_000_000;
                }
            }
        }
        tasks
    }
}

/// What a task says that it served, and what it was offered, on the slices where both are known.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    served: Load,
    offered: Load,
    /// Requests that it was offered.
    requests: u64,
    /// It counted something on any of its slices.
    counts: bool,
}

/// Says whether at least half of the tasks that had anything to count came to what their callers say, within a quarter; or
/// whether no task counts at all, so that there is no word against the callers'.
fn count_alike(tasks: &BTreeMap<SessionId, Counted>) -> bool {
    if tasks.values().all(|task| !task.counts) {
        return tasks.values().map(|task| task.requests).sum::<u64>() >= TELLING;
    }
    let telling = || tasks.values().filter(|task| task.counts && task.requests >= TELLING);
    let alike = telling().filter(|task| {
        let (served, offered) = (u128::from(task.served.milli()), u128::from(task.offered.milli()));
        served * 5 >= offered * 4 && served * 4 <= offered * 5
    });
    let alike = alike.count();
    alike > 0 && alike * 2 >= telling().count()
}

fn silent(tasks: &BTreeMap<SessionId, Counted>) -> BTreeSet<SessionId> {
    tasks.iter().filter(|(_, task)| !task.counts).map(|(session, _)| *session).collect()
}

fn suspects(tasks: &BTreeMap<SessionId, Counted>) -> BTreeSet<SessionId> {
    let total: Load = tasks.values().map(|task| task.served).sum();
    let others = (tasks.len() as u64).saturating_sub(1).max(1);
    let suspect = |task: &Counted| {
        let mean = total.saturating_sub(task.served).milli() / others;
        let served = task.served.milli();
        served > mean.saturating_mul(SUSPECT_TIMES)
            && served > task.offered.milli().saturating_mul(SUSPECT_OVER_OFFERED)
    };
    tasks.iter().filter(|(_, task)| suspect(task)).map(|(session, _)| *session).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::assignment::{Assigned, Replica, Replicas};
    use crate::generation::Generation;
    use crate::key::SliceKey;
    use crate::report::{HOT_MAX, Report};
    use crate::slice_map::SliceMap;
    use crate::task::{Task, TaskInfo};

    const FIVE: Duration = Duration::from_secs(5);

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn units(units: u64) -> Load {
        Load::from_milli(units * 1_000)
    }

    /// Slices of a hundred keys; the n-th is session n+1's, the last goes to the end.
    fn assignment(slices: u64) -> Assignment {
        let run = |nth: u64| {
            let replica = Replica { session: SessionId(nth + 1), since: Generation::ZERO };
            let replicas = Replicas::One(replica);
            (SliceKey(nth * 100), Assigned { replicas, ..Assigned::default() })
        };
        let mut made = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        made.slices = SliceMap::from_runs((0..slices).map(run).collect()).unwrap();
        made
    }

    /// What each task of `assignment` served.
    fn table(assignment: &Assignment, served: &[u64]) -> LoadTable {
        let mut table = LoadTable::default();
        for ((slice, assigned), served) in assignment.slices.iter().zip(served) {
            let session = assigned.replicas.as_slice()[0].session;
            let slices = vec![(slice, units(*served))];
            table.receive(Report::new(session, Generation::ZERO, FIVE, slices)).unwrap();
        }
        table
    }

    fn offer(caller: u64, slices: &[(Slice, u64)]) -> Offer {
        let part = |&(slice, load): &(Slice, u64)| SliceOffer {
            slice,
            load: units(load),
            failed: Load::ZERO,
        };
        let slices = slices.iter().map(part).collect();
        Offer { caller: Caller(caller), window: FIVE, slices, hot: vec![], avoided: vec![] }
    }

    /// What the table says of each slice once offers were weighed.
    fn weighed(assignment: &Assignment, table: &mut LoadTable, offers: &mut Offers) -> Vec<u64> {
        offers.weigh(Time::ZERO, assignment, table);
        let of = |(slice, assigned): (Slice, &Assigned)| {
            let session = assigned.replicas.as_slice()[0].session;
            table
                .measured(session, Generation::ZERO, slice)
                .map_or(0, |(_, load)| load.milli() / 1_000)
        };
        assignment.slices.iter().map(of).collect()
    }

    fn offered(assignment: &Assignment, loads: &[u64]) -> Offers {
        let mut offers = Offers::default();
        let slices: Vec<(Slice, u64)> =
            assignment.slices.iter().zip(loads).map(|((slice, _), load)| (slice, *load)).collect();
        offers.receive(Time::ZERO, offer(1, &slices)).unwrap();
        offers
    }

    #[test]
    fn a_task_that_cannot_keep_up_has_the_load_that_it_was_offered() {
        let assignment = assignment(4);
        let mut served = table(&assignment, &[100, 100, 100, 100]);
        let mut offers = offered(&assignment, &[101, 90, 400, 99]);
        assert_eq!(weighed(&assignment, &mut served, &mut offers), [100, 100, 400, 100]);
        assert_eq!(served.offered(slice(200, 299)), Some(units(400)));
        assert_eq!(served.offered(slice(200, 250)), None);
        let totals = offers.totals();
        assert_eq!((totals.callers, totals.load, totals.suspects.len()), (1, units(690), 0));
        served.clear();
        assert_eq!(served.offered(slice(200, 299)), None, "weighed anew for each round");
    }

    #[test]
    fn what_several_callers_offer_adds_up() {
        let assignment = assignment(2);
        let mut served = table(&assignment, &[100, 100]);
        let mut offers = offered(&assignment, &[60, 100]);
        offers.receive(Time::ZERO, offer(2, &[(slice(0, 49), 40), (slice(50, 99), 70)])).unwrap();
        // In the place of what it said before.
        offers.receive(Time::ZERO, offer(2, &[(slice(0, 49), 80), (slice(50, 99), 70)])).unwrap();
        assert_eq!(weighed(&assignment, &mut served, &mut offers), [210, 100]);
    }

    #[test]
    fn tasks_that_count_something_else_are_taken_at_their_word() {
        let assignment = assignment(3);
        for served in [[10, 10, 10], [3_000, 2_000, 9_000]] {
            let mut table = table(&assignment, &served);
            let mut offers = offered(&assignment, &[100, 400, 100]);
            assert_eq!(weighed(&assignment, &mut table, &mut offers), served);
        }
    }

    #[test]
    fn where_no_task_counts_what_callers_offered_is_the_load() {
        let assignment = assignment(4);
        let mut table = table(&assignment, &[0, 0, 0, 0]);
        // The last is too little for chance to be ruled out, were there a task's word to weigh it against.
        let mut offers = offered(&assignment, &[100, 400, 0, 1]);
        assert_eq!(weighed(&assignment, &mut table, &mut offers), [100, 400, 0, 1]);
        let mut next = offered(&assignment, &[1, 0, 0, 0]);
        table.clear();
        assert_eq!(weighed(&assignment, &mut table, &mut next), [0, 0, 0, 0], "five are chance");
    }

    #[test]
    fn tasks_that_count_stand_beside_some_that_do_not() {
        let assignment = assignment(4);
        let mut table = table(&assignment, &[100, 0, 0, 0]);
        let mut offers = offered(&assignment, &[100, 400, 300, 2]);
        assert_eq!(weighed(&assignment, &mut table, &mut offers), [100, 400, 300, 2]);
        assert_eq!(offers.totals().suspects.len(), 0, "who counts is no liar");
    }

    #[test]
    fn a_silent_tasks_slice_that_callers_knew_as_part_of_another_is_not_taken_for_idle() {
        let assignment = assignment(4);
        let mut table = table(&assignment, &[0, 0, 0, 0]);
        let mut offers = Offers::default();
        let spoken = [(slice(0, 99), 100), (slice(100, 199), 50), (slice(200, 399), 900)];
        offers.receive(Time::ZERO, offer(1, &spoken)).unwrap();
        offers.weigh(Time::ZERO, &assignment, &mut table);
        let load = |nth: u64| {
            let (first, last) = (nth * 100, nth * 100 + 99);
            table.measured(SessionId(nth + 1), Generation::ZERO, slice(first, last))
        };
        assert_eq!(load(1), Some((FIVE, units(50))));
        assert_eq!(load(2), None, "its last known load stands");
    }

    #[test]
    fn a_word_on_a_wider_slice_raises_nothing() {
        let assignment = assignment(4);
        let mut table = table(&assignment, &[100, 100, 100, 100]);
        let mut offers = Offers::default();
        let spoken = [(slice(0, 99), 100), (slice(100, 299), 900), (slice(300, 399), 100)];
        offers.receive(Time::ZERO, offer(1, &spoken)).unwrap();
        assert_eq!(weighed(&assignment, &mut table, &mut offers), [100, 100, 100, 100]);
    }

    #[test]
    fn a_task_that_lies_is_believed_as_far_as_its_callers_bear_it_out() {
        let assignment = assignment(4);
        let mut served = table(&assignment, &[100, 1_000_000_000, 100, 100]);
        let mut offers = offered(&assignment, &[100, 120, 100, 100]);
        assert_eq!(weighed(&assignment, &mut served, &mut offers), [100, 120, 100, 100]);
        assert_eq!(offers.totals().suspects, BTreeSet::from([SessionId(2)]));
        // Without callers there is nothing to hold against it.
        let mut served = table(&assignment, &[100, 1_000_000_000, 100, 100]);
        let alone = weighed(&assignment, &mut served, &mut Offers::default());
        assert_eq!(alone, [100, 1_000_000_000, 100, 100]);
    }

    #[test]
    fn a_lie_on_a_slice_that_nobody_spoke_of_is_no_measurement() {
        let assignment = assignment(4);
        let mut table = table(&assignment, &[100, 1_000_000, 100, 100]);
        let extra = Report::new(
            SessionId(2),
            Generation::ZERO,
            FIVE,
            vec![(slice(100, 199), units(1_000_000)), (slice(500, 599), units(7))],
        );
        table.receive(extra).unwrap();
        let mut offers = offered(&assignment, &[100, 100, 100, 100]);
        offers.weigh(Time::ZERO, &assignment, &mut table);
        assert_eq!(table.measured(SessionId(2), Generation::ZERO, slice(500, 599)), None);
    }

    #[test]
    fn a_task_that_says_nothing_has_what_it_was_offered() {
        let assignment = assignment(3);
        let mut table = table(&assignment, &[100, 100]);
        let mut offers = offered(&assignment, &[100, 100, 70]);
        assert_eq!(weighed(&assignment, &mut table, &mut offers), [100, 100, 70]);
        let mut offers = offered(&assignment, &[100, 100, 0]);
        offers.weigh(Time::ZERO, &assignment, &mut table);
        assert_eq!(table.measured(SessionId(3), Generation::ZERO, slice(200, u64::MAX)), None);
    }

    #[test]
    fn tasks_that_callers_avoid_are_named_and_nothing_else_is_done() {
        let mut assignment = assignment(3);
        for id in 1..=3 {
            let info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, "h:1".parse().unwrap());
            assignment.tasks.insert(SessionId(id), Arc::new(Task::new(SessionId(id), info)));
        }
        let mut table = table(&assignment, &[100, 100, 100]);
        let before = table.clone();
        let mut offers = Offers::default();
        for (caller, avoided) in [(1, vec![2]), (2, vec![2, 3]), (3, vec![]), (4, vec![99])] {
            let avoided = avoided.into_iter().map(SessionId).collect();
            offers.receive(Time::ZERO, Offer { avoided, ..offer(caller, &[]) }).unwrap();
        }
        offers.weigh(Time::ZERO, &assignment, &mut table);
        // Of a task that has left nobody needs to hear.
        assert_eq!(offers.totals().outliers, [(SessionId(2), 2), (SessionId(3), 1)].into());
        for session in 1..=3 {
            let of = |table: &LoadTable| {
                table.served(SessionId(session), Generation::ZERO, slice(0, 99))
            };
            assert_eq!(of(&table), of(&before));
        }
        // Callers that say no more of it are done with it.
        offers.weigh(Time::ZERO + FIVE * 3, &assignment, &mut table);
        assert!(offers.totals().outliers.is_empty());
    }

    #[test]
    fn hot_keys_have_the_greater_load() {
        let hot = |key, load| HotKey { key: SliceKey(key), load: units(load) };
        let assignment = assignment(2);
        let mut table = table(&assignment, &[100, 100]);
        let slices = vec![(slice(0, 99), units(100))];
        let report = Report::new(SessionId(1), Generation::ZERO, FIVE, slices);
        table.receive(Report { hot: vec![hot(3, 60), hot(5, 30)], ..report }).unwrap();
        let mut offers = offered(&assignment, &[40, 50]);
        for caller in 2..4 {
            let offer = Offer {
                hot: vec![hot(3, 20), hot(101, 9)],
                ..offer(caller, &[(slice(0, 9), 30), (slice(100, 109), 25)])
            };
            offers.receive(Time::ZERO, offer).unwrap();
        }
        offers.weigh(Time::ZERO, &assignment, &mut table);
        // The first report of two has named none: half of 60 and 30.
        assert_eq!(table.hot_keys(), [hot(3, 40), hot(5, 15), hot(101, 18)]);
    }

    #[test]
    fn callers_that_fall_silent_are_forgotten() {
        let assignment = assignment(2);
        let mut offers = offered(&assignment, &[100, 100]);
        offers.weigh(Time::ZERO + FIVE * 2, &assignment, &mut LoadTable::default());
        assert_eq!(offers.totals().callers, 1);
        offers.weigh(Time::ZERO + FIVE * 3, &assignment, &mut LoadTable::default());
        assert_eq!((offers.totals(), offers.slices), (&Totals::default(), 0));
    }

    #[test]
    fn callers_say_of_whom_they_are_served() {
        let mut assignment = assignment(5);
        let offer = |caller, parts: &[(u64, u64, u64)]| {
            let part = |&(nth, load, failed): &(u64, u64, u64)| SliceOffer {
                slice: slice(nth * 100, nth * 100 + 99),
                load: units(load),
                failed: units(failed),
            };
            let slices = parts.iter().map(part).collect();
            let (hot, avoided) = (vec![], vec![]);
            Offer { caller: Caller(caller), window: FIVE, slices, hot, avoided }
        };
        let mut offers = Offers::default();
        offers.receive(Time::ZERO, offer(1, &[(0, 10, 10), (1, 10, 8), (3, 10, 10)])).unwrap();
        offers.receive(Time::ZERO, offer(2, &[(0, 10, 9), (1, 10, 10), (2, 3, 3)])).unwrap();
        let of: BTreeSet<SessionId> = [1, 2, 3].map(SessionId).into();
        let expected =
            BTreeMap::from([(SessionId(1), Word::Failing), (SessionId(2), Word::Served)]);
        assert_eq!(offers.words(Time::ZERO, &assignment, &of), expected, "of 15 requests nothing");
        assert_eq!(offers.words(Time::ZERO + FIVE * 3, &assignment, &of), BTreeMap::new());
        // Where another serves a slice as well, it is not known whose failures these are.
        let both =
            [1, 5].map(|session| Replica { session: SessionId(session), since: Generation::ZERO });
        let both = Assigned { replicas: both.into_iter().collect(), ..Assigned::default() };
        assignment.slices.set(slice(0, 99), both);
        assert_eq!(offers.words(Time::ZERO, &assignment, &of).get(&SessionId(1)), None);
    }

    #[test]
    fn offers_that_make_no_sense_are_refused_by_name() {
        let good = offer(1, &[(slice(0, 9), 5), (slice(10, 19), 5)]);
        let mut offers = Offers::default();
        offers.receive(Time::ZERO, good.clone()).unwrap();
        let mut check = |offer: Offer, error: OfferError| {
            assert_eq!(offers.receive(Time::ZERO, offer), Err(error));
            assert_eq!(offers.slices, 2, "the one before stays in force");
        };
        let never = Duration::ZERO;
        check(Offer { window: never, ..good.clone() }, ReportError::Window(never).into());
        let overlap = offer(1, &[(slice(0, 9), 5), (slice(9, 19), 5)]);
        check(overlap, ReportError::Order(slice(9, 19)).into());
        let many: Vec<(Slice, u64)> = (0..=OFFER_MAX as u64).map(|n| (slice(n, n), 1)).collect();
        check(offer(1, &many), OfferError::Many(OFFER_MAX + 1));
        let mut failed = good.clone();
        failed.slices[1].failed = units(6);
        check(failed, OfferError::Failed(slice(10, 19)));
        let hot = |key| HotKey { key: SliceKey(key), load: Load::ZERO };
        check(
            Offer { hot: vec![hot(2), hot(1)], ..good.clone() },
            ReportError::HotOrder(SliceKey(1)).into(),
        );
        let many = vec![hot(1); HOT_MAX + 1];
        check(Offer { hot: many, ..good.clone() }, ReportError::ManyHot(HOT_MAX + 1).into());
        let avoided = vec![SessionId(2), SessionId(2)];
        check(Offer { avoided, ..good.clone() }, OfferError::Avoided(2));
        let avoided: Vec<_> = (0..=AVOIDED_MAX as u64).map(SessionId).collect();
        check(Offer { avoided, ..good }, OfferError::Avoided(AVOIDED_MAX + 1));
    }

    #[test]
    fn callers_and_what_they_report_have_a_bound() {
        let mut offers = Offers::default();
        for caller in 0..CALLERS_MAX as u64 {
            offers.receive(Time::ZERO, offer(caller, &[])).unwrap();
        }
        let one_more = offer(u64::MAX, &[]);
        assert_eq!(offers.receive(Time::ZERO, one_more), Err(OfferError::Callers));
        assert_eq!(offers.receive(Time::ZERO, offer(7, &[])), Ok(()), "known already");
        let many: Vec<(Slice, u64)> = (0..OFFER_MAX as u64).map(|n| (slice(n, n), 1)).collect();
        let refused =
            (0..400).find_map(|caller| offers.receive(Time::ZERO, offer(caller, &many)).err());
        assert_eq!(refused, Some(OfferError::Slices));
    }
}

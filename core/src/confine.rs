//! Keys that kill: which slices go from task to task and take each of them down, and where they are kept instead.
//!
//! A request that crashes the task which serves it is sent again, to whoever was given the slice: a fleet can be marched
//! to its end so. The record here notes what each crashed task held and for how long. A range of keys that several of them
//! held when they crashed, each soon after it had been given it, is suspect; it is confined if that is unlikely to be
//! chance. Confined keys stay with one task, which serves nothing else, and wait for it when it is away.
//!
//! How likely it is by chance that `k` of `m` crashes in a row hit whoever holds one range: any of the `h` ranges that the
//! first one held may be it, each of the others hits its holder, one of `n` tasks, and does so within the time since it got
//! it, of all the time that it lived, or of that in which another crash is due anyway:
//!
//! ```text
//! min(1, h / n^(k-1))  x  product of max(held / lived, held x other crashes a second)  x  (m-1 over k-1)
//! ```
//!
//! In a small fleet, where what one task had is soon spread over all others, only the time tells; tasks that go down one after
//! the other within seconds for another reason, such as load, or a release that crashes everywhere, look the same there. What a wrong verdict costs is bounded: one task
//! serves a few slices alone, until an hour has passed or an operator releases them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::assignment::Assignment;
use crate::generation::Generation;
use crate::key::SliceKey;
use crate::name::TaskName;
use crate::slice::Slice;
use crate::task::{Phase, SessionId};
use crate::time::Time;

/// How long a crash is remembered, and how long keys stay confined after the last one: what Dicer's detector looks back.
pub const REMEMBERED: Duration = Duration::from_secs(3_600);
/// How long a confined range waits for its task to be back under its name, before another is chosen: a supervisor's
/// longest pause between restarts is often less (Kubernetes: 10 s, 20 s, 40 s, ...).
pub const AWAY_MAX: Duration = Duration::from_secs(60);
/// The most confined ranges of a job: with more of them it is not the keys.
pub const CONFINED_MAX: usize = 100;
/// The most crashes that are remembered, and that one confinement shows.
pub const CRASHES_MAX: usize = 32;
/// The most ranges of one crashed task that are remembered.
const HELD_MAX: usize = 4_096;
/// The most generations whose time is remembered; older ones are long ago.
const GENERATIONS_MAX: usize = 4_096;
/// A task that is back later under its name is a new one.
const RETURNS_WITHIN: Duration = Duration::from_secs(600);
/// A task that crashes later than this after it was given a range did not crash of being given it: a request that kills
/// is sent again within seconds.
const SOON: Duration = Duration::from_secs(30);
/// What is more likely by chance than this is taken for it.
const UNLIKELY: f64 = 0.01;

/// A task that crashed while it held a suspect range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Its session.
    pub session: SessionId,
    /// Its name.
    pub task: TaskName,
    /// How long before the confinement.
    pub before: Duration,
    /// How long it had held the range.
    pub held: Duration,
}

/// A range of keys that stays with one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confined {
    /// Which keys.
    pub slice: Slice,
    /// Which task: by name, so that it holds over restarts.
    pub task: TaskName,
    /// The evidence, oldest first.
    pub crashes: Vec<Crash>,
}

/// What should be confined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Which ranges, in order.
    pub slices: Vec<Slice>,
    /// The evidence, oldest first.
    pub crashes: Vec<Crash>,
}

/// What crashed tasks of a job held. Soft: a new leader begins anew.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was there before counts as there since then.
    began: Time,
    generations: BTreeMap<Generation, Time>,
    /// Since when each task is there, and when it last was. By name, for one that crashed and is back is no stranger.
    joined: BTreeMap<TaskName, (Time, Time)>,
    crashes: VecDeque<Noted>,
}

/// Crashes, by their places in the record, each with how long it had held; and the ranges that they have in common.
type Suspect = (Vec<(usize, Duration)>, Vec<Slice>);

#[derive(Clone, Debug)]
struct Noted {
    session: SessionId,
    task: TaskName,
    at: Time,
    lived: Duration,
    /// How many tasks there were.
    tasks: usize,
    /// In order, and for how long.
    held: Vec<(Slice, Duration)>,
}

impl Record {
    /// Begins with no crash.
    pub fn new(now: Time, assignment: &Assignment) -> Self {
        let (generations, joined) = (BTreeMap::new(), BTreeMap::new());
        let mut record = Self { began: now, generations, joined, crashes: VecDeque::new() };
        record.sync(now, assignment);
        record.generations.clear();
        record
    }

    /// Notes when a generation came to be, and who is new in it.
    pub fn sync(&mut self, now: Time, assignment: &Assignment) {
        self.generations.entry(assignment.generation).or_insert(now);
        while self.generations.len() > GENERATIONS_MAX {
            self.generations.pop_first();
        }
        for task in assignment.tasks.values() {
            self.joined.entry(task.info.name.clone()).or_insert((now, now)).1 = now;
        }
        self.joined.retain(|_, (_, last)| now.since(*last) < RETURNS_WITHIN);
    }

    /// Notes that a session crashed at a time, with all that it still has. `grain` is how exactly times are known.
    pub fn crashed(&mut self, at: Time, session: SessionId, of: &Assignment, grain: Duration) {
        let Some(task) = of.tasks.get(&session) else { return };
        let known = self.joined.entry(task.info.name.clone()).or_insert((self.began, at));
        let joined = known.0;
        known.1 = at;
        let since = |generation: Generation| {
            let known = self.generations.range(generation..).next();
            match known {
                Some((known, at)) if *known == generation => *at,
                _ => self.began,
            }
            .max(joined)
        };
        let held =
            of.of(session).map(|(slice, replica)| (slice, at.since(since(replica.since)) + grain));
        let noted = Noted {
            session,
            task: task.info.name.clone(),
            at,
            lived: at.since(joined) + grain,
            tasks: of.tasks.values().filter(|task| task.phase == Phase::Serving).count(),
            held: held.take(HELD_MAX).collect(),
        };
        self.crashes.push_back(noted);
        if self.crashes.len() > CRASHES_MAX {
            self.crashes.pop_front();
        }
    }

    /// Takes a crash back: the session lives.
    pub fn acquit(&mut self, session: SessionId) {
        self.crashes.retain(|crash| crash.session != session);
    }

    /// Blames no keys for the crashes so far: they were acted on, or an operator has seen to it. They still tell how often
    /// tasks crash.
    pub fn settle(&mut self) {
        self.crashes.iter_mut().for_each(|crash| crash.held.clear());
    }

    /// Says which ranges should be confined after so many crashes, if any; zero: never.
    pub fn verdict(&mut self, now: Time, after: u32) -> Option<Verdict> {
        self.crashes.retain(|crash| now.since(crash.at) < REMEMBERED);
        if after == 0 || self.crashes.len() < (after as usize).max(2) {
            return None;
        }
        let suspects = self.suspects();
        let worth = suspects.into_iter().filter(|(crashes, slices)| {
            crashes.len() >= (after as usize).max(2) && self.is_telling(now, crashes, slices)
        });
        let (crashes, slices) = worth.max_by(|(a, left), (b, right)| {
            a.len().cmp(&b.len()).then_with(|| width(right).cmp(&width(left)))
        })?;
        let evidence = |(place, held): &(usize, Duration)| {
            let Noted { session, task, at, .. } = &self.crashes[*place];
            Crash { session: *session, task: task.clone(), before: now.since(*at), held: *held }
        };
        let evidence = crashes.iter().map(evidence).collect();
        Some(Verdict { slices, crashes: evidence })
    }

    /// The ranges that several crashed tasks held, by those tasks: their places in the record, and how long each had held
    /// the range, at the longest.
    fn suspects(&self) -> Vec<Suspect> {
        let mut edges = BTreeSet::new();
        for (slice, _) in self.crashes.iter().flat_map(|crash| &crash.held) {
            edges.insert(slice.first());
            edges.extend(slice.last().next());
        }
        let mut suspects: BTreeMap<Vec<usize>, (Vec<Duration>, Vec<Slice>)> = BTreeMap::new();
        let edges: Vec<_> = edges.into_iter().collect();
        for (at, first) in edges.iter().enumerate() {
            let (places, times) = self.holders(*first);
            if places.len() < 2 {
                continue;
            }
            let next = edges.get(at + 1).and_then(|next| next.previous());
            let last = next.unwrap_or(SliceKey::MAX);
            let range = Slice::new(*first, last).expect("edges are in order");
            let (longest, slices) =
                suspects.entry(places).or_insert_with(|| (times.clone(), Vec::new()));
            for (longest, time) in longest.iter_mut().zip(times) {
                *longest = time.max(*longest);
            }
            match slices.last_mut() {
                Some(before) if before.last().next() == Some(*first) => {
                    *before = Slice::new(before.first(), last).expect("edges are in order");
                }
                _ => slices.push(range),
            }
        }
        suspects
            .into_iter()
            .map(|(places, (times, slices))| (places.into_iter().zip(times).collect(), slices))
            .collect()
    }

    /// The crashed tasks that held a key, and for how long: those to which it went in a row. Only the first of them may
    /// have had it for long, for that is where it came from.
    fn holders(&self, key: SliceKey) -> (Vec<usize>, Vec<Duration>) {
        let held = self.crashes.iter().enumerate();
        let held = held.filter_map(|(place, crash)| Some((place, crash.held_for(key)?)));
        let held: Vec<(usize, Duration)> = held.collect();
        let from = held.iter().rposition(|(_, held)| *held > SOON).unwrap_or(0);
        held[from..].iter().copied().unzip()
    }

    /// Whether so many crashes on a range are beyond chance, went from one task to another, and leave most of what the
    /// tasks had out of it.
    fn is_telling(&self, now: Time, crashes: &[(usize, Duration)], slices: &[Slice]) -> bool {
        let noted = |(place, _): &(usize, Duration)| &self.crashes[*place];
        let (first, last) = (noted(&crashes[0]), noted(&crashes[crashes.len() - 1]));
        let names: BTreeSet<&TaskName> = crashes.iter().map(|crash| &noted(crash).task).collect();
        let had: u128 = last.held.iter().map(|(slice, _)| slice.width()).sum();
        if names.len() < 2 || slices.len() > CONFINED_MAX || width(slices) * 2 > had {
            return false;
        }
        // How often tasks crash for other reasons.
        let others = (self.crashes.len() - crashes.len()) as f64;
        let watched = now.since(self.began).min(REMEMBERED).as_secs_f64().max(1.0);
        let mut hits = first.held.len() as f64;
        let mut soon = 1.0;
        for (place, held) in &crashes[1..] {
            let Noted { lived, tasks, .. } = &self.crashes[*place];
            hits /= (*tasks).max(1) as f64;
            let held = held.as_secs_f64();
            soon *= (held / lived.as_secs_f64().max(held)).max(others / watched * held).min(1.0);
        }
        // The crashes from the first to the last of them, whether they had the range or not.
        let all = crashes[crashes.len() - 1].0 - crashes[0].0 + 1;
        hits.min(1.0) * soon * choices(all - 1, crashes.len() - 1) <= UNLIKELY
    }
}

impl Noted {
    /// How long it had held a key, if it did.
    fn held_for(&self, key: SliceKey) -> Option<Duration> {
        let place = self.held.partition_point(|(slice, _)| slice.last() < key);
        self.held.get(place).filter(|(slice, _)| slice.contains(key)).map(|(_, held)| *held)
    }
}

fn width(slices: &[Slice]) -> u128 {
    slices.iter().map(|slice| slice.width()).sum()
}

/// In how many ways `k` of `m` can be chosen.
fn choices(m: usize, k: usize) -> f64 {
    (0..k).map(|nth| (m - nth) as f64 / (nth + 1) as f64).product()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::assignment::{Assigned, Replica};
    use crate::prng::Prng;
    use crate::slice_map::SliceMap;
    use crate::task::{Task, TaskInfo};

    const GRAIN: Duration = Duration::from_millis(200);
    const SLICES_A_TASK: u64 = 32;

    /// A fleet whose tasks crash, are given what was theirs by turns, and are back a little later.
    struct Fleet {
        record: Record,
        assignment: Assignment,
        last: u64,
        now: Time,
    }

    impl Fleet {
        fn new(tasks: u64) -> Self {
            let mut assignment = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
            let count = tasks * SLICES_A_TASK;
            let run = |nth: u64| {
                let session = SessionId(nth % tasks + 1);
                let replicas = [Replica { session, since: Generation::ZERO }];
                let replicas = replicas.into_iter().collect();
                (SliceKey(nth * (u64::MAX / count)), Assigned { replicas, ..Assigned::default() })
            };
            assignment.slices = SliceMap::from_runs((0..count).map(run).collect()).unwrap();
            let now = Time::from_millis(1_000);
            let record = Record::new(now, &assignment);
            let mut fleet = Self { record, assignment, last: 0, now };
            (0..tasks).for_each(|name| fleet.join(name));
            fleet
        }

        fn step(&mut self) {
            self.assignment.generation = self.assignment.generation.next();
            self.record.sync(self.now, &self.assignment);
        }

        fn join(&mut self, name: u64) {
            self.last += 1;
            let session = SessionId(self.last);
            let (name, address) = (format!("t{name}"), format!("h:{}", name + 1));
            let info = TaskInfo::new(name.parse().unwrap(), self.last, address.parse().unwrap());
            let task = Task { session, info, phase: Phase::Serving, lease: None };
            self.assignment.tasks.insert(session, Arc::new(task));
            self.step();
        }

        fn crash(&mut self, session: SessionId) -> Option<Verdict> {
            self.record.crashed(self.now, session, &self.assignment, GRAIN);
            let name = self.assignment.tasks.remove(&session).unwrap().info.name.to_string();
            let others: Vec<SessionId> = self.assignment.tasks.keys().copied().collect();
            let orphans: Vec<Slice> = self.assignment.of(session).map(|(slice, _)| slice).collect();
            self.step();
            let since = self.assignment.generation;
            for (nth, slice) in orphans.into_iter().enumerate() {
                let replica = Replica { session: others[nth % others.len()], since };
                let replicas = [replica].into_iter().collect();
                self.assignment.slices.set(slice, Assigned { replicas, ..Assigned::default() });
            }
            self.now += GRAIN;
            self.join(name.trim_start_matches('t').parse().unwrap());
            self.record.verdict(self.now, 3)
        }

        fn holder(&self, key: SliceKey) -> SessionId {
            self.assignment.slices.get(key).1.replicas.as_slice()[0].session
        }
    }

    #[test]
    fn a_key_that_kills_is_found_at_the_third_crash() {
        for tasks in [4, 5, 20, 100] {
            let mut fleet = Fleet::new(tasks);
            let key = SliceKey(0x7777_7777_7777_7777);
            fleet.now += Duration::from_secs(60);
            for crash in 1..=3 {
                let verdict = fleet.crash(fleet.holder(key));
                fleet.now += Duration::from_millis(500);
                assert_eq!(verdict.is_some(), crash == 3, "{tasks} tasks, crash {crash}");
                let Some(verdict) = verdict else { continue };
                assert_eq!(verdict.crashes.len(), 3);
                assert!(verdict.slices.iter().any(|slice| slice.contains(key)));
                let share = width(&verdict.slices) as f64 / 2_f64.powi(64);
                assert!(share < 0.05, "{tasks} tasks: {share} of all keys");
            }
        }
    }

    #[test]
    fn another_that_crashes_in_between_does_not_hide_it() {
        let mut fleet = Fleet::new(20);
        let key = SliceKey(0x7777_7777_7777_7777);
        fleet.now += Duration::from_secs(600);
        let mut found = None;
        for crash in 1..=4 {
            let holder = fleet.holder(key);
            let victim = match crash {
                2 => *fleet.assignment.tasks.keys().find(|session| **session != holder).unwrap(),
                _ => holder,
            };
            let verdict = fleet.crash(victim);
            found = found.or(verdict);
            fleet.now += Duration::from_millis(500);
        }
        assert!(found.is_some_and(|found| found.slices.iter().any(|slice| slice.contains(key))));
    }

    /// How many of thirty fleets find keys guilty, whose tasks crash by chance so often.
    fn blamed(
        tasks: u64,
        crashes: u64,
        age: Duration,
        every: Duration,
        choose: impl Fn(&mut Prng, &Fleet) -> usize,
    ) -> u32 {
        let mut blamed = 0;
        for seed in 0..30 {
            let (mut prng, mut fleet) = (Prng::new(seed), Fleet::new(tasks));
            fleet.now += age;
            let mut found = false;
            for _ in 0..crashes {
                let nth = choose(&mut prng, &fleet);
                let session = *fleet.assignment.tasks.keys().nth(nth).unwrap();
                found |= fleet.crash(session).is_some();
                let part = prng.below(2_000) as u32;
                fleet.now += every * part / 1_000;
            }
            blamed += u32::from(found);
        }
        blamed
    }

    #[test]
    fn crashes_by_chance_blame_no_keys() {
        for tasks in [4, 20] {
            for minutes in [5, 20] {
                let any = |prng: &mut Prng, fleet: &Fleet| {
                    prng.below(fleet.assignment.tasks.len() as u64) as usize
                };
                let blamed = blamed(tasks, 8, REMEMBERED, Duration::from_secs(minutes * 60), any);
                assert!(blamed <= 1, "{tasks} tasks, a crash every {minutes} min: {blamed} of 30");
            }
        }
    }

    /// Tasks that have lived for half a minute and crash one after the other for another reason: what no formula can tell apart
    /// by time. Without one 29 of 30 would be blamed.
    #[test]
    fn a_young_fleet_that_crashes_in_a_burst_blames_keys_less_often_than_not() {
        let any = |prng: &mut Prng, fleet: &Fleet| {
            prng.below(fleet.assignment.tasks.len() as u64) as usize
        };
        for seconds in [2, 10] {
            let (age, every) = (Duration::from_secs(30), Duration::from_secs(seconds));
            let blamed = blamed(20, 8, age, every, any);
            assert!(blamed < 15, "a crash every {seconds} s: {blamed} of 30");
        }
    }

    #[test]
    fn one_task_that_crashes_again_and_again_is_no_march() {
        let mut fleet = Fleet::new(4);
        fleet.now += Duration::from_secs(600);
        for _ in 0..6 {
            let same = fleet.assignment.tasks.values().find(|task| task.info.name.as_str() == "t1");
            let same = same.unwrap().session;
            assert_eq!(fleet.crash(same), None);
            fleet.now += Duration::from_secs(1);
        }
    }

    #[test]
    fn crashes_are_forgotten_after_an_hour_and_never_asked_for_with_zero() {
        let mut fleet = Fleet::new(20);
        let key = SliceKey(0x7777_7777_7777_7777);
        fleet.now += Duration::from_secs(600);
        for crash in 1..=3 {
            let verdict = fleet.crash(fleet.holder(key));
            assert_eq!(verdict.is_some(), crash == 3);
            assert_eq!(fleet.record.verdict(fleet.now, 0), None);
        }
        assert_eq!(fleet.record.verdict(fleet.now + REMEMBERED, 3), None);
    }

    #[test]
    fn the_record_has_bounds() {
        let mut fleet = Fleet::new(3);
        for _ in 0..100 {
            fleet.now += Duration::from_secs(1);
            let any = *fleet.assignment.tasks.keys().next().unwrap();
            fleet.crash(any);
        }
        assert!(fleet.record.crashes.len() <= CRASHES_MAX);
    }
}

//! Which of several replicas a caller asks, and whom it avoids for a while.
//!
//! *Which one.* The nearest: those in the caller's zone, else in its region, else any. Of two of them drawn by lot it takes the one
//! with less to do: nearly as even as the least loaded of all, for two looks (M. Mitzenmacher, "The Power of Two Choices in Randomized
//! Load Balancing", 1996), and callers who know the same do not all run to the same replica. A replica's load is what this caller
//! has under way there, and what others have, as far as its answers tell. A farther one is taken only where the near one is overloaded.
//!
//! *Whom to avoid.* A task may live, heartbeat well, and fail every request. Only its callers see that, each for itself, by the two
//! measures of Envoy's outlier detection: so many failures in a row, or a success rate far below that of the others. Such a task is out
//! for a while, for longer each time. It is never more than a part of all tasks that is out: where most of them fail, what is
//! wrong is no task. And a slice whose replicas are all out is asked all the same.
//!
//! Nothing is sent to try a task that was out: the first request after its pause decides. If it fails the task is out again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::region::REGION;
use crate::task::{Capacity, SessionId, Task};
use crate::time::Time;

/// The label of a task that names its zone.
const ZONE: &str = "zone";

/// A near replica is overloaded if it has more than so many times as much to do as a farther one,
const OVERLOADED_TIMES: u64 = 2;
/// and so many requests more, in thousandths: a handful is no load, and a request across zones costs about a millisecond.
const OVERLOADED_MORE: u64 = 4_000;

/// From so many failures in a row on a task is out (Envoy: `consecutive_5xx`).
pub const IN_A_ROW: u32 = 5;
/// Success rates are of so long at least (Envoy: `interval`).
const WINDOW: Duration = Duration::from_secs(10);
/// So many tasks must have had so many requests each, or their rates say little (Envoy: `success_rate_minimum_hosts`,
/// `success_rate_request_volume`).
const RATED_TASKS: usize = 5;
const RATED_REQUESTS: u64 = 100;
/// A task is out whose success rate is so many standard deviations below the mean (Envoy: `success_rate_stdev_factor`).
const DEVIATIONS: f64 = 1.9;
/// How long a task is out, times how often it was (Envoy: `base_ejection_time`); and at most (`max_ejection_time`).
const PAUSE: Duration = Duration::from_secs(30);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// One of so many tasks may be out, or one of a few. Envoy's tenth would be one of three, and still one of twenty; beyond a third
/// the others would have half as much again to do.
const OUT_OF: usize = 3;

/// How often what others send to a task is reckoned anew.
const HEARD_EVERY: Duration = Duration::from_millis(100);
/// For how long that holds: a task that is not asked says nothing new.
pub const HEARD_HOLDS: Duration = Duration::from_secs(5);

/// Where a caller is, as far as it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// As in the tasks' label `zone`.
    pub zone: Option<String>,
    /// As in the tasks' label `region`.
    pub region: Option<String>,
}

/// How near a task is to a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    /// In another region, or nobody knows.
    Far,
    /// In the caller's region.
    Region,
    /// In the caller's zone.
    Zone,
}

impl Place {
    /// Says how near a task is. Zones of two regions may have one name.
    pub fn nearness(&self, task: &Task) -> Nearness {
        let label = |name| task.info.labels.get(name);
        let (zone, region) = (label(ZONE), label(REGION));
        let is_known = self.region.is_some() && region.is_some();
        let is_region = is_known && self.region.as_ref() == region;
        if self.zone.is_some() && self.zone.as_ref() == zone && (is_region || !is_known) {
            Nearness::Zone
        } else if is_region {
            Nearness::Region
        } else {
            Nearness::Far
        }
    }
}

/// A replica that a request may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// How near it is.
    pub nearness: Nearness,
    /// How many requests this caller has under way there.
    pub in_flight: u32,
    /// How many others have, in thousandths: see [`Others`].
    pub others: u32,
    /// What it can carry.
    pub capacity: Capacity,
    /// Whether it is to be avoided.
    pub is_out: bool,
}

impl Candidate {
    /// Thousandths of a request under way, for each that an ordinary task would have.
    fn load(&self) -> u64 {
        let all = u64::from(self.in_flight) * 1_000 + u64::from(self.others);
        all * 1_000 / u64::from(self.capacity.thousandths())
    }
}

/// Chooses a replica by its place among `count`, of which `of` tells; there is at least one. `draws` are two random numbers.
pub fn choose(count: usize, of: impl Fn(usize) -> Candidate, draws: [u32; 2]) -> usize {
    debug_assert!(count > 0, "there is somebody to choose");
    let all_out = (0..count).all(|n| of(n).is_out);
    let at = |nearness| {
        let may = |n: &usize| {
            let candidate = of(*n);
            candidate.nearness == nearness && (all_out || !candidate.is_out)
        };
        let those = (0..count).filter(may);
        let (first, second) = two_of(those.clone().count(), draws)?;
        let (first, second) = (those.clone().nth(first)?, those.clone().nth(second)?);
        Some(if of(second).load() < of(first).load() { second } else { first })
    };
    let tiers = [Nearness::Zone, Nearness::Region, Nearness::Far].into_iter().filter_map(at);
    let nearer = |near: usize, far: usize| {
        let (here, there) = (of(near).load(), of(far).load());
        let is_overloaded =
            here > there.saturating_mul(OVERLOADED_TIMES) && here > there + OVERLOADED_MORE;
        if is_overloaded { far } else { near }
    };
    tiers.reduce(nearer).unwrap_or(0)
}

/// Draws two different ones of so many, or one twice if there is one only.
pub fn two_of(count: usize, [one, other]: [u32; 2]) -> Option<(usize, usize)> {
    // Multiply-shift: an even share for each without a division.
    let below = |draw: u32, bound: usize| ((u64::from(draw) * bound as u64) >> 32) as usize;
    match count {
        0 => None,
        1 => Some((0, 0)),
        _ => {
            let first = below(one, count);
            Some((first, (first + 1 + below(other, count - 1)) % count))
        }
    }
}

/// What others have under way at a task: what it says that it has served in all, less what this caller sent, by how long an answer
/// takes (J. Little, "A Proof for the Queuing Formula L = λW", 1961).
#[derive(Clone, Copy, Debug, Default)]
pub struct Others {
    // What was heard last: when, what the task had served, and what this caller had sent.
    heard: Option<(Time, u64, u64)>,
    per_second: f64,
    seconds: f64,
}

impl Others {
    /// Takes an answer in, which took so long: by now the task has served so much, and this caller sent so much of it. Gives how many
    /// requests others have under way, in thousandths, if there was time to tell.
    pub fn hear(&mut self, now: Time, served: u64, sent: u64, took: Duration) -> Option<u32> {
        // An eighth of what is new, as in TCP's round trip time (RFC 6298).
        let took = took.as_secs_f64();
        self.seconds += if self.seconds == 0.0 { took } else { (took - self.seconds) / 8.0 };
        let Some((at, served_before, sent_before)) = self.heard else {
            self.heard = Some((now, served, sent));
            return None;
        };
        let passed = now.since(at);
        if passed < HEARD_EVERY {
            return None;
        }
        self.heard = Some((now, served, sent));
        let all = served.saturating_sub(served_before);
        let own = sent.saturating_sub(sent_before);
        let rate = all.saturating_sub(own) as f64 / passed.as_secs_f64();
        self.per_second = (self.per_second + rate) / 2.0;
        Some((self.per_second * self.seconds * 1_000.0) as u32)
    }
}

/// What became of a caller's requests to a task. Requests that the task refused, such as for its key's owner, are in none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Failures since the last success.
    pub in_a_row: u32,
    /// All that were served.
    pub served: u64,
    /// All that failed.
    pub failed: u64,
}

/// Why a task is out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Why {
    /// So many requests failed, one after the other.
    InARow(u32),
    /// Of its requests only this share was served, where the others served that share.
    Rate(f64, f64),
}

/// A task that is out from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Out {
    /// Which one.
    pub session: SessionId,
    /// Until when.
    pub until: Time,
    /// Why.
    pub why: Why,
}

/// Says which tasks are out.
#[derive(Clone, Debug, Default)]
pub struct Outliers {
    tasks: BTreeMap<SessionId, Standing>,
    window: Time,
}

#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    // As of when the window began.
    before: Tally,
    // Out until then; and how often it was, less what time has forgiven.
    until: Time,
    times: u32,
}

impl Outliers {
    /// Judges after a failure by what became of all requests, by task, and gives those that are out from now on. Tasks that are not
    /// named are gone.
    pub fn judge(&mut self, now: Time, tallies: &BTreeMap<SessionId, Tally>) -> Vec<Out> {
        self.tasks.retain(|session, _| tallies.contains_key(session));
        let mut found: Vec<(SessionId, Why)> = tallies
            .iter()
            .filter(|(_, tally)| tally.in_a_row >= IN_A_ROW)
            .map(|(session, tally)| (*session, Why::InARow(tally.in_a_row)))
            .collect();
        if now.since(self.window) >= WINDOW {
            found.extend(self.rated(tallies));
            self.window = now;
            for (session, tally) in tallies {
                self.tasks.entry(*session).or_default().before = *tally;
            }
        }
        let mut out: BTreeSet<SessionId> =
            self.tasks.iter().filter(|(_, task)| now < task.until).map(|(s, _)| *s).collect();
        let most = most_out(tallies.len());
        let mut new = Vec::new();
        for (session, why) in found {
            if out.len() < most && out.insert(session) {
                let until = self.tasks.entry(session).or_default().put_out(now);
                new.push(Out { session, until, why });
            }
        }
        new
    }

    /// Finds tasks whose success rate in the window is far below the others', the worst first.
    fn rated(&self, tallies: &BTreeMap<SessionId, Tally>) -> Vec<(SessionId, Why)> {
        let mut rates: Vec<(SessionId, f64)> = Vec::new();
        for (session, tally) in tallies {
            let before = self.tasks.get(session).map_or_else(Tally::default, |task| task.before);
            let served = tally.served.saturating_sub(before.served);
            let all = served + tally.failed.saturating_sub(before.failed);
            if all >= RATED_REQUESTS {
                rates.push((*session, served as f64 / all as f64));
            }
        }
        if rates.len() < RATED_TASKS {
            return vec![];
        }
        let count = rates.len() as f64;
        let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = rates.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / count;
        let least = mean - DEVIATIONS * variance.sqrt();
        rates.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        let far_below = rates.into_iter().filter(|(_, rate)| *rate < least);
        far_below.map(|(session, rate)| (session, Why::Rate(rate, mean))).collect()
    }
}

impl Standing {
    /// Counts that it is out once more, and says until when. Each window of good behaviour is one time forgiven.
    fn put_out(&mut self, now: Time) -> Time {
        let windows = now.since(self.until).as_secs() / WINDOW.as_secs();
        self.times = self.times.saturating_sub(u32::try_from(windows).unwrap_or(u32::MAX)) + 1;
        self.until = now + PAUSE.saturating_mul(self.times).min(PAUSE_MAX);
        self.until
    }
}

/// How many of so many tasks may be out at a time: never all.
fn most_out(tasks: usize) -> usize {
    if tasks < 2 { 0 } else { (tasks / OUT_OF).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prng::Prng;
    use crate::task::TaskInfo;

    const IDLE: Candidate = Candidate {
        nearness: Nearness::Far,
        in_flight: 0,
        others: 0,
        capacity: Capacity::ONE,
        is_out: false,
    };

    fn draws(prng: &mut Prng) -> [u32; 2] {
        [prng.bits() as u32, prng.bits() as u32]
    }

    /// How often each of these is chosen, of a thousand times.
    fn chosen(candidates: &[Candidate]) -> Vec<u32> {
        let (mut prng, mut times) = (Prng::new(5), vec![0; candidates.len()]);
        for _ in 0..1_000 {
            times[choose(candidates.len(), |n| candidates[n], draws(&mut prng))] += 1;
        }
        times
    }

    fn at(second: u64) -> Time {
        Time::from_millis(second * 1_000)
    }

    fn tallies(of: &[(u32, u64, u64)]) -> BTreeMap<SessionId, Tally> {
        let tally = |(n, &(in_a_row, served, failed)): (u64, &(u32, u64, u64))| {
            (SessionId(n), Tally { in_a_row, served, failed })
        };
        (1..).zip(of).map(tally).collect()
    }

    fn sessions(out: &[Out]) -> Vec<u64> {
        out.iter().map(|out| out.session.0).collect()
    }

    #[test]
    fn the_nearest_is_chosen_until_it_is_overloaded() {
        let zone = Candidate { nearness: Nearness::Zone, ..IDLE };
        let region = Candidate { nearness: Nearness::Region, ..IDLE };
        assert_eq!(chosen(&[IDLE, region, zone]), [0, 0, 1_000]);
        assert_eq!(chosen(&[IDLE, region, IDLE]), [0, 1_000, 0]);
        let busy = |in_flight, near: Candidate| Candidate { in_flight, ..near };
        // A few requests are no load, nor is twice what the others have.
        assert_eq!(chosen(&[IDLE, busy(4, zone)]), [0, 1_000]);
        assert_eq!(chosen(&[IDLE, busy(5, zone)]), [1_000, 0]);
        assert_eq!(chosen(&[busy(10, IDLE), busy(20, zone)]), [0, 1_000]);
        assert_eq!(chosen(&[busy(10, IDLE), busy(21, zone)]), [1_000, 0]);
        // The region comes before the rest of the world.
        assert_eq!(chosen(&[IDLE, region, busy(9, zone)]), [0, 1_000, 0]);
        assert_eq!(chosen(&[IDLE, busy(9, region), busy(30, zone)]), [1_000, 0, 0]);
        // What others have there counts as well, and what it can carry.
        assert_eq!(chosen(&[IDLE, Candidate { others: 9_000, ..zone }]), [1_000, 0]);
        let large = Candidate { capacity: Capacity::new(4.0).unwrap(), ..busy(9, zone) };
        assert_eq!(chosen(&[IDLE, large]), [0, 1_000]);
    }

    #[test]
    fn equals_share_evenly_and_who_has_less_to_do_is_taken() {
        let even = chosen(&[IDLE; 4]);
        assert!(even.iter().all(|times| (200..300).contains(times)), "{even:?}");
        assert_eq!(chosen(&[Candidate { in_flight: 1, ..IDLE }, IDLE]), [0, 1_000]);
    }

    #[test]
    fn who_is_out_is_asked_only_where_all_are() {
        let out = Candidate { is_out: true, ..IDLE };
        let near = Candidate { nearness: Nearness::Zone, ..out };
        assert_eq!(chosen(&[IDLE, near]), [1_000, 0]);
        assert_eq!(chosen(&[out, near]), [0, 1_000]);
        assert_eq!(chosen(&[near]), [1_000]);
        let both = chosen(&[out, out]);
        assert!(both.iter().all(|times| *times > 400), "{both:?}");
    }

    /// The most that one of a hundred replicas has at a time, with a thousand requests under way, over a long time.
    fn highest(mut choose: impl FnMut(&[u32], &mut Prng) -> usize) -> u32 {
        let (mut prng, mut load, mut highest) = (Prng::new(1), vec![0_u32; 100], 0);
        let mut under_way = Vec::new();
        for _ in 0..20_000 {
            let chosen = choose(&load, &mut prng);
            load[chosen] += 1;
            under_way.push(chosen);
            if under_way.len() > 1_000 {
                highest = highest.max(*load.iter().max().unwrap());
                let ends = under_way.swap_remove(prng.below(1_001) as usize);
                load[ends] -= 1;
            }
        }
        highest
    }

    #[test]
    fn the_less_loaded_of_two_is_far_more_even_than_chance() {
        let by_lot = highest(|load, prng| prng.below(load.len() as u64) as usize);
        let of_two = highest(|load, prng| {
            let of = |n: usize| Candidate { in_flight: load[n], ..IDLE };
            choose(load.len(), of, draws(prng))
        });
        // Of a mean of 10.
        println!("the highest of a hundred: {by_lot} by lot, {of_two} of two");
        assert!(of_two <= 14 && by_lot >= 20, "{by_lot} by lot, {of_two} of two");
    }

    #[test]
    fn a_zone_is_known_by_its_region_too() {
        let mut info = TaskInfo::new("t".parse().unwrap(), 1, "h:1".parse().unwrap());
        info.labels = [("zone", "a"), ("region", "eu")]
            .map(|(label, value)| (label.to_owned(), value.to_owned()))
            .into();
        let task = Task::new(SessionId(1), info);
        let near = |zone: &str, region: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Place { zone: some(zone), region: some(region) }.nearness(&task)
        };
        assert_eq!(near("a", "eu"), Nearness::Zone);
        assert_eq!(near("a", ""), Nearness::Zone);
        assert_eq!(near("b", "eu"), Nearness::Region);
        assert_eq!(near("a", "us"), Nearness::Far);
        assert_eq!(near("", ""), Nearness::Far);
    }

    #[test]
    fn five_failures_in_a_row_are_too_many_and_each_pause_is_longer() {
        let mut outliers = Outliers::default();
        assert_eq!(outliers.judge(at(1), &tallies(&[(4, 0, 4), (0, 9, 0)])), []);
        let five = tallies(&[(5, 0, 5), (0, 9, 0)]);
        let mut now = at(1);
        for pause in [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300] {
            let out = outliers.judge(now, &five);
            assert_eq!(out[0].until, now + Duration::from_secs(pause));
            assert_eq!((sessions(&out), out[0].why), (vec![1], Why::InARow(5)));
            // Nobody is put out twice, and nobody comes back before their time.
            assert_eq!(outliers.judge(now + Duration::from_secs(pause - 1), &five), []);
            // It comes back, and the first request decides.
            now = out[0].until;
        }
        // After a minute and a half of good behaviour nine times are forgiven.
        let out = outliers.judge(now + Duration::from_secs(90), &five);
        assert_eq!(out[0].until, now + Duration::from_secs(90 + 3 * 30));
    }

    #[test]
    fn never_more_than_a_third_is_out_and_never_the_only_one() {
        for (tasks, most) in [(1, 0), (2, 1), (3, 1), (5, 1), (6, 2), (100, 33)] {
            let all = tallies(&vec![(9, 0, 9); tasks]);
            let mut outliers = Outliers::default();
            assert_eq!(outliers.judge(at(1), &all).len(), most, "{tasks} tasks");
            assert_eq!(outliers.judge(at(2), &all).len(), 0, "{tasks} tasks");
        }
    }

    #[test]
    fn a_success_rate_far_below_the_others_is_found() {
        let mut outliers = Outliers::default();
        let half = [(0, 500, 500), (0, 999, 1), (0, 998, 2), (0, 999, 1), (0, 997, 3)];
        assert_eq!(outliers.judge(at(5), &tallies(&half)), [], "the window is not over");
        let out = outliers.judge(at(10), &tallies(&half));
        assert_eq!(sessions(&out), [1]);
        assert!(matches!(out[0].why, Why::Rate(own, mean) if own < 0.6 && mean > 0.8), "{out:?}");
        // The next window counts from there: too few requests to say anything.
        let few = [(0, 500, 550), (0, 1_000, 1), (0, 1_000, 2), (0, 1_000, 1), (0, 1_000, 3)];
        assert_eq!(outliers.judge(at(60), &tallies(&few)), []);
        // Of four tasks a rate says little, and where all are alike none is far below.
        assert_eq!(Outliers::default().judge(at(10), &tallies(&half[..4])), []);
        let alike = tallies(&[(0, 500, 500); 8]);
        assert_eq!(Outliers::default().judge(at(10), &alike), []);
    }

    #[test]
    fn what_others_have_under_way_shows_by_what_the_task_has_served() {
        let (mut others, took) = (Others::default(), Duration::from_millis(10));
        assert_eq!(others.hear(at(1), 500, 50, took), None);
        assert_eq!(others.hear(at(1) + HEARD_EVERY / 2, 900, 50, took), None, "too soon");
        // 1000 a second more than was sent, 10 ms each: 10 at a time. Half of that counts at first.
        assert_eq!(others.hear(at(2), 1_600, 150, took), Some(5_000));
        assert_eq!(others.hear(at(3), 2_700, 250, took), Some(7_500));
        // Restarted: it has served less than before.
        assert_eq!(others.hear(at(4), 0, 260, took), Some(3_750));
    }
}

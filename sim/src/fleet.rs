//! Who lives in which interval: the tasks of a simulated service, and what happens to them.
//!
//! A fleet is a description and not a state: who lives in interval `t` follows from `t` alone, so that every policy sees the
//! same fleet in whatever order the runs are done.

use mandoline_core::prng::Prng;
use mandoline_core::task::{Capacity, CapacityError};

/// The most tasks that a job may have (`docs`: limits).
pub const TASKS_MAX: u32 = 10_000;

/// A task that lives in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which one: small numbers, so that tables may be indexed by them. A replaced task's successor has a new one; a task
    /// that comes back after a failure has its old one, and holds nothing.
    pub id: u32,
    /// How much it can carry, in thousandths of an ordinary task. Never zero.
    pub capacity: u32,
    /// Which zone it runs in.
    pub zone: u8,
    /// Which region it runs in.
    pub region: u8,
    /// Which version of the program it runs: higher is newer.
    pub revision: u32,
}

/// Why there is no such fleet.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FleetError {
    /// There would have been no task.
    #[error("a fleet of no tasks serves nothing: give 1 to {TASKS_MAX} tasks")]
    NoTasks,
    /// There would have been more than `TASKS_MAX` tasks at a time.
    #[error("{0} tasks at a time are too many: give 1 to {TASKS_MAX}")]
    TooMany(u64),
    /// A capacity was out of range.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// No capacity was given at all.
    #[error("the list of capacities is empty: give one or more, such as 1/2/0.5")]
    NoCapacities,
    /// A share was no number from 0 to 1, or left no task alive.
    #[error("the share {0} is out of range: give more than 0 and less than 1, such as 0.05")]
    Share(f64),
    /// An event would end before it begins.
    #[error("what begins in interval {from} cannot end in interval {until}: give a later end")]
    Order {
        /// Where it begins.
        from: usize,
        /// Where it ends.
        until: usize,
    },
}

/// Who lives when.
#[derive(Clone, Debug, PartialEq)]
pub struct Fleet {
    // Invariant: 1 to TASKS_MAX, with `scale` too.
    tasks: u32,
    seed: u64,
    // Invariant: not empty, none zero. Handed out to the slots in turn.
    capacities: Vec<u32>,
    zones: u8,
    regions: u8,
    fail: Option<Fail>,
    rolling: Option<Rolling>,
    scale: Option<Scale>,
    late: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Fail {
    share: f64,
    from: usize,
    until: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Rolling {
    from: usize,
    over: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Scale {
    times: u32,
    out_at: usize,
    in_at: usize,
}

impl Fleet {
    /// Describes so many ordinary tasks in three zones, to whom nothing happens.
    pub fn steady(tasks: u32) -> Result<Self, FleetError> {
        match tasks {
            0 => Err(FleetError::NoTasks),
            1..=TASKS_MAX => Ok(Self {
                tasks,
                seed: 0,
                capacities: vec![Capacity::ONE.thousandths()],
                zones: 3,
                regions: 1,
                fail: None,
                rolling: None,
                scale: None,
                late: 0.0,
            }),
            _ => Err(FleetError::TooMany(u64::from(tasks))),
        }
    }

    /// Gives the tasks capacities in turn, as multiples of an ordinary task.
    pub fn hetero(mut self, capacities: &[f64]) -> Result<Self, FleetError> {
        let thousandths = |times: &f64| Capacity::new(*times).map(Capacity::thousandths);
        self.capacities = capacities.iter().map(thousandths).collect::<Result<_, _>>()?;
        if self.capacities.is_empty() { Err(FleetError::NoCapacities) } else { Ok(self) }
    }

    /// Spreads the tasks over zones and regions in turn; 0 counts as 1.
    #[must_use]
    pub fn spread(mut self, zones: u8, regions: u8) -> Self {
        (self.zones, self.regions) = (zones.max(1), regions.max(1));
        self
    }

    /// Lets a share of the tasks, at least one, be gone from an interval on until another.
    pub fn fail(mut self, share: f64, from: usize, until: usize) -> Result<Self, FleetError> {
        if !(share > 0.0 && share < 1.0) {
            return Err(FleetError::Share(share));
        }
        if from >= until {
            return Err(FleetError::Order { from, until });
        }
        self.fail = Some(Fail { share, from, until });
        Ok(self)
    }

    /// Replaces every task once by one with a new id and a newer revision, evenly over so many intervals.
    pub fn rolling(mut self, from: usize, over: usize) -> Result<Self, FleetError> {
        if over == 0 {
            return Err(FleetError::Order { from, until: from });
        }
        self.rolling = Some(Rolling { from, over });
        Ok(self)
    }

    /// Multiplies the number of tasks from an interval on until another; those that came then leave.
    pub fn scale(mut self, times: u32, out_at: usize, in_at: usize) -> Result<Self, FleetError> {
        let most = u64::from(self.tasks) * u64::from(times);
        match times {
            0 => return Err(FleetError::NoTasks),
            _ if most > u64::from(TASKS_MAX) => return Err(FleetError::TooMany(most)),
            _ if out_at >= in_at => return Err(FleetError::Order { from: out_at, until: in_at }),
            _ => self.scale = Some(Scale { times, out_at, in_at }),
        }
        Ok(self)
    }

    /// Lets each task's report be late or missing with this chance, in each interval.
    pub fn late(mut self, share: f64) -> Result<Self, FleetError> {
        if !(0.0..1.0).contains(&share) {
            return Err(FleetError::Share(share));
        }
        self.late = share;
        Ok(self)
    }

    /// Draws who fails and who is late by a seed.
    #[must_use]
    pub fn seeded(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Gives the number of tasks at the start.
    pub fn tasks(&self) -> u32 {
        self.tasks
    }

    /// Gives who lives in an interval, sorted by id. Never empty.
    pub fn members(&self, interval: usize) -> Vec<Member> {
        let failed = self.failed(interval);
        let scaled = self.scale.filter(|scale| (scale.out_at..scale.in_at).contains(&interval));
        let slots = self.tasks * scaled.map_or(1, |scale| scale.times);
        let alive = (0..slots).filter(|slot| failed.binary_search(slot).is_err());
        let mut members: Vec<Member> = alive.map(|slot| self.member(slot, interval)).collect();
        members.sort_unstable_by_key(|member| member.id);
        members
    }

    /// Gives the members, sorted, whose report of the interval before is missing or comes too late for this one's plan.
    pub fn silent(&self, interval: usize) -> Vec<u32> {
        if self.late == 0.0 || interval == 0 {
            return Vec::new();
        }
        let mut prng = Prng::new(mix(self.seed ^ LATE, interval as u64));
        let mut members = self.members(interval);
        members.retain(|_| prng.unit() < self.late);
        members.iter().map(|member| member.id).collect()
    }

    /// Gives the share of the load that must move to whoever it was not with before, for a plan that was even and is to be
    /// so again: that of the tasks that are gone since the interval before, or what newcomers are due if that is more.
    pub fn forced(&self, interval: usize) -> f64 {
        let Some(before) = interval.checked_sub(1) else { return 0.0 };
        let (before, now) = (self.members(before), self.members(interval));
        moved_out(&before, &now).max(moved_out(&now, &before))
    }

    fn member(&self, slot: u32, interval: usize) -> Member {
        let capacity = self.capacities[slot as usize % self.capacities.len()];
        let zone = (slot % u32::from(self.zones)) as u8;
        let region = (slot % u32::from(self.regions)) as u8;
        // Slots that came by scaling out run the newest revision, and are not replaced.
        let replaced = self.rolling.is_some_and(|rolling| {
            slot < self.tasks
                && interval >= rolling.from + slot as usize * rolling.over / self.tasks as usize
        });
        let scaled = self.scale.map_or(1, |scale| scale.times);
        let id = if replaced { slot + self.tasks * scaled } else { slot };
        Member { id, capacity, zone, region, revision: u32::from(replaced) }
    }

    /// Gives the slots that have failed in an interval, sorted.
    fn failed(&self, interval: usize) -> Vec<u32> {
        let Some(fail) = self.fail.filter(|fail| (fail.from..fail.until).contains(&interval))
        else {
            return Vec::new();
        };
        let count = ((f64::from(self.tasks) * fail.share).round() as u32).max(1);
        // A fleet of one is left alone: nobody could take over.
        let count = count.min(self.tasks - 1) as usize;
        let mut slots: Vec<u32> = (0..self.tasks).collect();
        let mut prng = Prng::new(mix(self.seed, FAIL));
        for place in 0..count {
            let other = place + prng.below((slots.len() - place) as u64) as usize;
            slots.swap(place, other);
        }
        slots.truncate(count);
        slots.sort_unstable();
        slots
    }
}

/// Gives the share of the capacity of `members` that is of those who are not among `others`; both are sorted by id.
fn moved_out(members: &[Member], others: &[Member]) -> f64 {
    let capacity = |member: &Member| u64::from(member.capacity);
    let alone = |member: &&Member| others.binary_search_by_key(&member.id, |m| m.id).is_err();
    let all: u64 = members.iter().map(capacity).sum();
    members.iter().filter(alone).map(capacity).sum::<u64>() as f64 / all as f64
}

/// Makes a seed of two numbers.
fn mix(a: u64, b: u64) -> u64 {
    Prng::new(Prng::new(a).bits() ^ b).bits()
}

/// Tell the streams of one seed apart: any two numbers would do.
const FAIL: u64 = 1;
const LATE: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(fleet: &Fleet, interval: usize) -> Vec<u32> {
        fleet.members(interval).iter().map(|member| member.id).collect()
    }

    #[test]
    fn those_who_fail_come_back() {
        let fleet = Fleet::steady(40).unwrap().fail(0.05, 20, 40).unwrap().seeded(3);
        assert_eq!(ids(&fleet, 19).len(), 40);
        assert_eq!(ids(&fleet, 20).len(), 38);
        assert_eq!(ids(&fleet, 20), ids(&fleet, 39));
        assert_eq!(ids(&fleet, 40), ids(&fleet, 0));
        assert_ne!(ids(&fleet, 20), ids(&fleet.clone().seeded(4), 20));
    }

    #[test]
    fn a_rolling_restart_replaces_each_task_once() {
        let fleet = Fleet::steady(10).unwrap().rolling(20, 5).unwrap();
        assert_eq!(ids(&fleet, 19), (0..10).collect::<Vec<_>>());
        assert_eq!(ids(&fleet, 20), (2..12).collect::<Vec<_>>());
        assert_eq!(ids(&fleet, 24), (10..20).collect::<Vec<_>>());
        assert!(fleet.members(24).iter().all(|member| member.revision == 1));
    }

    #[test]
    fn scaling_in_the_newest_leave() {
        let fleet = Fleet::steady(3).unwrap().scale(2, 20, 45).unwrap();
        assert_eq!([19, 20, 44, 45].map(|t| ids(&fleet, t).len()), [3, 6, 6, 3]);
        assert_eq!(ids(&fleet, 45), [0, 1, 2]);
    }

    #[test]
    fn what_must_move_is_the_load_of_those_gone_or_the_due_of_newcomers() {
        let steady = Fleet::steady(20).unwrap();
        let scaled = steady.clone().scale(2, 20, 45).unwrap();
        assert_eq!([0, 19, 20, 21, 45].map(|t| scaled.forced(t)), [0.0, 0.0, 0.5, 0.0, 0.5]);
        let failing = steady.clone().fail(0.05, 20, 40).unwrap();
        assert_eq!([20, 40].map(|t| failing.forced(t)), [0.05, 0.05]);
        let rolling = steady.rolling(20, 10).unwrap();
        assert_eq!([20, 29, 30].map(|t| rolling.forced(t)), [0.1, 0.1, 0.0]);
    }

    #[test]
    fn capacities_are_handed_out_in_turn() {
        let fleet = Fleet::steady(4).unwrap().hetero(&[1.0, 2.0, 0.5]).unwrap();
        let capacities: Vec<u32> = fleet.members(0).iter().map(|member| member.capacity).collect();
        assert_eq!(capacities, [1_000, 2_000, 500, 1_000]);
    }

    #[test]
    fn some_are_late_and_others_the_next_time() {
        let fleet = Fleet::steady(1_000).unwrap().late(0.1).unwrap();
        assert!(fleet.silent(0).is_empty());
        assert!((60..150).contains(&fleet.silent(5).len()));
        assert_ne!(fleet.silent(5), fleet.silent(6));
        assert_eq!(fleet.silent(5), fleet.silent(5));
    }

    #[test]
    fn impossible_fleets_are_refused() {
        let fleet = || Fleet::steady(6_000).unwrap();
        assert_eq!(Fleet::steady(0), Err(FleetError::NoTasks));
        assert_eq!(Fleet::steady(10_001), Err(FleetError::TooMany(10_001)));
        assert_eq!(fleet().scale(2, 1, 2), Err(FleetError::TooMany(12_000)));
        assert_eq!(fleet().hetero(&[]), Err(FleetError::NoCapacities));
        assert!(matches!(fleet().hetero(&[1.0, 0.0]), Err(FleetError::Capacity(_))));
        assert!(matches!(fleet().hetero(&[f64::NAN]), Err(FleetError::Capacity(_))));
        assert_eq!(fleet().fail(1.5, 1, 2), Err(FleetError::Share(1.5)));
        assert_eq!(fleet().fail(0.5, 2, 2), Err(FleetError::Order { from: 2, until: 2 }));
    }
}

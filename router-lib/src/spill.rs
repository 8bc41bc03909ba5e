//! Spill on the request path: `core::spill` round a snapshot, for one thread or several.
//!
//! A router has an `Overflow` to itself. A clerk that is asked by many threads keeps one for each lane of threads, behind a lock
//! that hardly anyone else wants. Each is a caller of its own, which knows what it has sent itself and what answers tell: that is
//! what `core::spill` is made for. None is made before the first request of a job that asks for spill.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::spec::Ratio;
use mandoline_core::spill::{Choice, Overflow, Seat};
use mandoline_core::task::{Phase, SessionId, Task};
use mandoline_distributor::clock::Clock;

use crate::counters::{ONE_UNIT, lane, lanes};
use crate::snapshot::{NoTask, Sent, Snapshot};

/// How often a job's load is balanced unless told. A window of spill is no longer, and mostly shorter.
const ROUND: Duration = Duration::from_secs(10);
/// 2^32 divided by the golden ratio: scatters small numbers.
const TURN_STEP: u32 = 0x9E37_79B9;
/// The label over which keys do not spill.
const REGION: &str = "region";

/// What a task has served since it began, as its answers tell: `requests=5120, units=5120.5`.
///
/// Grows for ever, so that whoever hears only now and then misses nothing, and needs no clock in common with the task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Utilisation {
    /// How many requests.
    pub requests: u64,
    /// What they cost together, in thousandths of a unit.
    pub thousandths: u64,
}

impl fmt::Display for Utilisation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.thousandths / ONE_UNIT, self.thousandths % ONE_UNIT);
        write!(f, "requests={}, units={whole}.{rest:03}", self.requests)
    }
}

/// A text tells no utilisation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} tells no load: write `requests=5120, units=5120.5`")]
pub struct UtilisationError(String);

impl FromStr for Utilisation {
    type Err = UtilisationError;

    fn from_str(text: &str) -> Result<Self, UtilisationError> {
        let parse = || {
            let (mut requests, mut thousandths) = (None, None);
            for field in text.split(',') {
                match field.trim().split_once('=')? {
                    ("requests", number) => requests = Some(whole(number)?),
                    ("units", number) => thousandths = Some(fixed(number)?),
                    // What a later version adds.
                    _ => {}
                }
            }
            Some(Self { requests: requests?, thousandths: thousandths? })
        };
        parse().ok_or_else(|| UtilisationError(text.chars().take(100).collect()))
    }
}

/// Digits alone: no sign, and no more than fit.
fn whole(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn fixed(text: &str) -> Option<u64> {
    let (units, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if !(1..=3).contains(&fraction.len()) {
        return None;
    }
    let rest = whole(fraction)? * 10_u64.pow(3 - fraction.len() as u32);
    whole(units)?.checked_mul(ONE_UNIT)?.checked_add(rest)
}

/// Who is to serve a key.
pub(crate) struct Routed {
    /// A task, by its place in the snapshot.
    pub(crate) found: u32,
    pub(crate) sent: Sent,
    pub(crate) is_spilled: bool,
}

/// One caller's spill.
#[derive(Debug)]
pub(crate) struct Spill {
    overflow: Overflow,
    cap: Ratio,
    /// Whom the seats are of.
    seated: Generation,
    clock: Clock,
    lane: u16,
    requests: u64,
    thousandths: u64,
    /// By seat: what was heard last.
    heard: Vec<(SessionId, Utilisation)>,
}

impl Spill {
    fn new(cap: Ratio, lane: u16) -> Self {
        // Callers must not draw alike.
        let seed = RandomState::new().hash_one(lane);
        Self {
            overflow: Overflow::new(cap, ROUND, seed),
            cap,
            seated: Generation::ZERO,
            clock: Clock::start(),
            lane,
            requests: 0,
            thousandths: 0,
            heard: Vec::new(),
        }
    }

    /// Finds who is to serve a key, making what it takes at the first call. `cap` is the snapshot's.
    #[inline(never)]
    pub(crate) fn route(
        spill: &mut Option<Box<Self>>,
        cap: Ratio,
        lane: u16,
        snapshot: &Snapshot,
        key: SliceKey,
    ) -> Result<Routed, NoTask> {
        if spill.as_ref().is_none_or(|spill| spill.cap != cap) {
            *spill = Some(Box::new(Self::new(cap, lane)));
        }
        let spill = spill.as_mut().expect("it was made just now");
        if spill.seated != snapshot.assignment().generation {
            spill.follow(snapshot);
        }
        let holders = snapshot.holders(key)?;
        let mut choice = spill.overflow.choose(spill.clock.now(), key, holders, 1);
        // What is loaded above the cap is one thing, and what fails another.
        if snapshot.is_avoided(choice.seat) {
            let turn = || (choice.seat + 1).wrapping_mul(TURN_STEP);
            choice = Choice { seat: snapshot.find(key, turn)?, spilled: false, ..choice };
        }
        let session = snapshot.tasks()[choice.seat as usize].session;
        let sent = Sent { session, ticket: choice.ticket, lane: spill.lane };
        Ok(Routed { found: choice.seat, sent, is_spilled: choice.spilled })
    }

    /// Takes in what an answer told.
    pub(crate) fn hear(&mut self, sent: Sent, told: Utilisation) {
        let place = self.heard.binary_search_by_key(&sent.session, |(session, _)| *session);
        // A task that is gone by now.
        let Ok(seat) = place else { return };
        self.reckon(seat, told);
        self.overflow.hear(self.clock.now(), seat as u32, sent.ticket, told.thousandths);
    }

    /// Learns what a request costs, from all that tasks have served between two answers.
    fn reckon(&mut self, seat: usize, told: Utilisation) {
        let before = std::mem::replace(&mut self.heard[seat].1, told);
        if before == Utilisation::default() {
            return;
        }
        self.requests += told.requests.saturating_sub(before.requests);
        self.thousandths =
            self.thousandths.saturating_add(told.thousandths.saturating_sub(before.thousandths));
        if self.requests >= COST_REQUESTS {
            self.overflow.reckon(self.thousandths / self.requests);
            // So that what is new counts half.
            (self.requests, self.thousandths) = (self.requests / 2, self.thousandths / 2);
        }
    }

    fn follow(&mut self, snapshot: &Snapshot) {
        let tasks = snapshot.tasks();
        self.overflow.seat(&tasks.iter().map(|task| seat(task)).collect::<Vec<_>>());
        let known = |session| {
            let place = self.heard.binary_search_by_key(&session, |(session, _)| *session);
            place.map_or_else(|_| Utilisation::default(), |place| self.heard[place].1)
        };
        // Tasks are sorted by session.
        self.heard = tasks.iter().map(|task| (task.session, known(task.session))).collect();
        self.seated = snapshot.assignment().generation;
        self.overflow.reckon(self.thousandths.checked_div(self.requests).unwrap_or(ONE_UNIT));
    }
}

/// After how many requests the cost of one is reckoned anew.
const COST_REQUESTS: u64 = 1_000;

fn seat(task: &Task) -> Seat {
    let hash = |text: &str| SliceKey::of(text.as_bytes()).0;
    Seat {
        session: task.session.0,
        name: hash(task.info.name.as_str()),
        capacity: f64::from(task.info.capacity.thousandths()) / 1_000.0,
        region: task.info.labels.get(REGION).map_or(0, |region| hash(region)),
        is_open: task.phase == Phase::Serving,
    }
}

/// The spill of threads that share a clerk.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: Box<[Mutex<Option<Box<Spill>>>]>,
}

impl Lanes {
    pub(crate) fn new() -> Self {
        Self { lanes: (0..lanes()).map(|_| Mutex::default()).collect() }
    }

    pub(crate) fn route(
        &self,
        cap: Ratio,
        snapshot: &Snapshot,
        key: SliceKey,
    ) -> Result<Routed, NoTask> {
        let lane = lane() & (self.lanes.len() - 1);
        let mut spill = self.lanes[lane].lock().unwrap_or_else(PoisonError::into_inner);
        Spill::route(&mut spill, cap, lane as u16, snapshot, key)
    }

    pub(crate) fn hear(&self, sent: Sent, told: Utilisation) {
        let Some(lane) = self.lanes.get(usize::from(sent.lane)) else { return };
        let mut spill = lane.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(spill) = &mut *spill {
            spill.hear(sent, told);
        }
    }
}

/// The lane of a router, which has none.
pub(crate) const ALONE: u16 = u16::MAX;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mandoline_core::assignment::{Assigned, Assignment, Replica};
    use mandoline_core::slice_map::SliceMap;
    use mandoline_core::task::TaskInfo;

    use super::*;
    use crate::clerk::Clerk;
    use crate::slicelet::{Claim, Slicelet};

    /// Three tasks, of which the first serves all keys.
    fn assignment(spill: Option<Ratio>) -> Arc<Assignment> {
        let generation = Generation { incarnation: 1, number: 1 };
        let mut made = Assignment::new("kv".parse().unwrap(), generation);
        for id in 1..=3 {
            let address = format!("10.0.0.{id}:80").parse().unwrap();
            let info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, address);
            let task = Task::new(SessionId(id), info);
            made.tasks.insert(task.session, Arc::new(task));
        }
        let replica = Replica { session: SessionId(1), since: generation };
        made.slices = SliceMap::uniform(Assigned {
            replicas: [replica].into_iter().collect(),
            ..Assigned::default()
        });
        made.spill = spill;
        Arc::new(made)
    }

    const CAP: Option<Ratio> = Some(Ratio::percent(115));

    #[test]
    fn a_utilisation_is_read_as_it_was_written() {
        let told = Utilisation { requests: 5_120, thousandths: 5_120_007 };
        assert_eq!(told.to_string(), "requests=5120, units=5120.007");
        assert_eq!(told.to_string().parse(), Ok(told));
        let short = Utilisation { requests: 1, thousandths: 2_500 };
        assert_eq!("units=2.5,requests=1, later=x".parse(), Ok(short));
        for bad in [
            "",
            "requests=1",
            "units=1",
            "requests=1, units=-1",
            "requests=+1, units=1",
            "requests=1, units=NaN",
            "requests=1, units=1.",
            "requests=1, units=1.0000",
            "requests=1, units=99999999999999999999",
            "requests=1, units=18446744073709551615",
            "requests 1, units 1",
        ] {
            assert!(bad.parse::<Utilisation>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_clerk_and_a_router_spill_what_one_task_cannot_carry() {
        let clerk = Clerk::frozen(assignment(CAP));
        let mut router = clerk.router();
        let (mut by_clerk, mut by_router) = ([0; 3], [0; 3]);
        for n in 0..3_000_u64 {
            let key = n.to_be_bytes();
            let target = clerk.route(&key).unwrap();
            assert_eq!(target.is_spilled(), target.session() != SessionId(1));
            assert_eq!(target.replicas().count(), 1);
            by_clerk[target.session().0 as usize - 1] += 1;
            by_router[router.route(&key).unwrap().session().0 as usize - 1] += 1;
        }
        for counts in [by_clerk, by_router] {
            assert!(counts.iter().all(|count| (800..=1_300).contains(count)), "{counts:?}");
        }
        let holder = router.route_to_holder(SliceKey(1)).unwrap();
        assert!(holder.session() == SessionId(1) && !holder.is_spilled());
    }

    #[test]
    fn what_answers_tell_keeps_a_caller_off_a_loaded_task() {
        let clerk = Clerk::frozen(assignment(CAP));
        let mut router = clerk.router();
        let mut served = [0_u64; 3];
        let mut mine = [0; 3];
        for n in 0..4_000_u64 {
            let target = router.route(&n.to_be_bytes()).unwrap();
            let (sent, task) = (target.sent().unwrap(), target.session().0 as usize - 1);
            served[task] += 1;
            mine[task] += 1;
            // Others load the second task, and each request costs three units.
            served[1] += 1;
            let told = Utilisation { requests: served[task], thousandths: 3_000 * served[task] };
            router.heard(sent, told);
        }
        assert!(mine[1] < 1_000, "{mine:?} of {served:?}");
        // One for a task that is gone, or for a clerk's request: no harm.
        let sent = clerk.route(b"x").unwrap().sent().unwrap();
        router.heard(Sent { session: SessionId(9), ..sent }, Utilisation::default());
        clerk.heard(Sent { lane: 999, ..sent }, Utilisation::default());
        clerk.heard(sent, Utilisation { requests: 1, thousandths: 1_000 });
    }

    #[test]
    fn without_spill_nothing_spills_and_nothing_is_heard() {
        let clerk = Clerk::frozen(assignment(None));
        let target = clerk.route(b"x").unwrap();
        assert!(target.sent().is_none() && !target.is_spilled());
    }

    #[test]
    fn a_task_takes_what_was_spilled_to_it_if_its_job_says_so() {
        let taker = Slicelet::frozen(SessionId(2), assignment(CAP));
        assert!(matches!(taker.claim(b"x"), Claim::Elsewhere(_)));
        assert_eq!(taker.claim_spilled(b"x"), Claim::Mine);
        assert_eq!(taker.claim_spilled_at(SliceKey(1), 2.5), Ok(Claim::Mine));
        assert!(taker.claim_spilled_at(SliceKey(1), -1.0).is_err());
        assert_eq!(taker.utilisation(), Utilisation { requests: 2, thousandths: 3_500 });

        let strict = Slicelet::frozen(SessionId(2), assignment(None));
        assert!(matches!(strict.claim_spilled(b"x"), Claim::Elsewhere(_)));
        assert_eq!(strict.utilisation(), Utilisation::default());
        let owner = Slicelet::frozen(SessionId(1), assignment(None));
        assert_eq!(owner.claim_spilled(b"x"), Claim::Mine, "it is its own");
    }
}

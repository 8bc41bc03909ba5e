//! Pauses as the leader sees them: when each is over, and whether requests are still in flight.
//!
//! All of it is soft. A new leader counts a pause from when it began to lead, and hears of the proxies anew: until each has
//! had time to speak, it says of none that nothing is in flight.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::command::Command;
use crate::flags::{AtEnd, Count, Flags, PAUSES_MAX, PauseId, Phase, Standing};
use crate::generation::Generation;
use crate::offers::{CALLERS_MAX, Caller};
use crate::time::Time;

/// How often a proxy says how it stands, where nothing changes.
pub const STANDING_EVERY: Duration = Duration::from_secs(2);
/// After so long without a word a proxy is taken to be gone; and for so long a new leader waits to hear of those that are there.
/// Four words may be lost.
pub const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);
/// How long a released pause stays beyond its release, so that no proxy is cut short that heard of it late.
const CLEAR_AFTER: Duration = Duration::from_secs(1);
/// How soon what came to nothing is proposed again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How long a proposal is waited for at most: one that is lost on the way is proposed again.
const PROPOSED_FOR: Duration = Duration::from_secs(10);

/// Pauses as the leader sees them.
#[derive(Clone, Debug)]
pub struct Pauses {
    began: Time,
    known: BTreeMap<PauseId, Known>,
    proxies: BTreeMap<Caller, Proxy>,
}

#[derive(Clone, Debug)]
struct Known {
    phase: Phase,
    /// No later than this version it was there.
    version: Generation,
    /// When it has lasted, or is released.
    until: Time,
    /// When that is proposed: then, or later if it was before.
    due: Time,
}

#[derive(Clone, Debug)]
struct Proxy {
    until: Time,
    standing: Standing,
}

/// Why a proxy's word was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StandingError {
    /// It speaks of more pauses than there may be.
    #[error("the proxy speaks of {0} pauses: there are {PAUSES_MAX} at most")]
    Many(usize),
    /// Too many proxies speak.
    #[error("{CALLERS_MAX} proxies follow the flags: one more is not heard, and not waited for")]
    Proxies,
}

/// How a pause is carried out, as far as proxies have said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How long it lasts yet, or how long until it is released.
    pub left: Duration,
    /// Proxies that are there.
    pub proxies: usize,
    /// Those of them where it is in force.
    pub heard: usize,
    /// Requests in its scope, in those.
    pub count: Count,
    /// Whether every proxy has had time to speak since this leader began.
    pub is_sure: bool,
}

impl Progress {
    /// Says whether nothing in its scope is in flight anywhere, and nothing will be until it ends.
    pub fn is_quiet(&self) -> bool {
        self.is_sure && self.heard == self.proxies && self.count.in_flight == 0
    }
}

impl Standing {
    /// Checks what a careful proxy would never send.
    pub fn check(&self) -> Result<(), StandingError> {
        match self.counts.len() {
            many if many > PAUSES_MAX => Err(StandingError::Many(many)),
            _ => Ok(()),
        }
    }
}

impl Pauses {
    /// Begins to lead: each pause counts from now.
    pub fn new(now: Time, flags: &Flags) -> Self {
        let (known, proxies) = (BTreeMap::new(), BTreeMap::new());
        let mut pauses = Self { began: now, known, proxies };
        pauses.sync(now, flags);
        pauses
    }

    /// Looks at the flags after they have changed.
    pub fn sync(&mut self, now: Time, flags: &Flags) {
        self.known.retain(|id, _| flags.pauses.contains_key(id));
        for pause in flags.pauses.values() {
            let before = self.known.get(&pause.id);
            if before.is_some_and(|before| before.phase == pause.phase) {
                continue;
            }
            let until = match pause.phase {
                Phase::Holding => now + pause.order.lasts,
                Phase::Releasing { over } => now + over,
            };
            let version = before.map_or(flags.version, |before| before.version);
            let due = match pause.phase {
                Phase::Holding => until,
                Phase::Releasing { .. } => until + CLEAR_AFTER,
            };
            self.known.insert(pause.id, Known { phase: pause.phase, version, until, due });
        }
    }

    /// Gives what to propose about pauses that are over.
    pub fn over(&mut self, now: Time, flags: &Flags) -> Vec<Command> {
        let due = self.known.iter_mut().filter(|(_, known)| known.due <= now);
        due.filter_map(|(id, known)| {
            known.due = now + PROPOSED_FOR;
            let order = &flags.pauses.get(id)?.order;
            Some(match (known.phase, order.at_end) {
                (Phase::Holding, AtEnd::GoOn) => {
                    Command::EndPause { id: *id, over: order.release_over }
                }
                _ => Command::ClearPause { id: *id },
            })
        })
        .collect()
    }

    /// Hears that a proposal about a pause came to nothing.
    pub fn failed(&mut self, now: Time, id: PauseId) {
        if let Some(known) = self.known.get_mut(&id) {
            known.due = known.due.min(now + AGAIN_AFTER);
        }
    }

    /// Says when to look for pauses that are over.
    pub fn deadline(&self) -> Option<Time> {
        self.known.values().map(|known| known.due).min()
    }

    /// Takes how a proxy stands, in the place of what it said before.
    pub fn receive(
        &mut self,
        now: Time,
        proxy: Caller,
        standing: Standing,
    ) -> Result<(), StandingError> {
        standing.check()?;
        self.forget(now);
        if self.proxies.len() >= CALLERS_MAX && !self.proxies.contains_key(&proxy) {
            return Err(StandingError::Proxies);
        }
        self.proxies.insert(proxy, Proxy { until: now + FORGOTTEN_AFTER, standing });
        Ok(())
    }

    /// Hears that a proxy stops, with nothing in flight.
    pub fn leave(&mut self, proxy: Caller) {
        self.proxies.remove(&proxy);
    }

    /// Says how a pause is carried out.
    pub fn progress(&mut self, now: Time, id: PauseId) -> Option<Progress> {
        self.forget(now);
        let known = self.known.get(&id)?;
        let in_force = |proxy: &Proxy| {
            let count = proxy.standing.counts.get(&id).copied();
            count.filter(|_| proxy.standing.version >= known.version)
        };
        let counts: Vec<Count> = self.proxies.values().filter_map(in_force).collect();
        let add = |sum: Count, count: &Count| Count {
            in_flight: sum.in_flight.saturating_add(count.in_flight),
            held: sum.held.saturating_add(count.held),
        };
        Some(Progress {
            left: known.until.since(now),
            proxies: self.proxies.len(),
            heard: counts.len(),
            count: counts.iter().fold(Count::default(), add),
            is_sure: now >= self.began + FORGOTTEN_AFTER,
        })
    }

    fn forget(&mut self, now: Time) {
        self.proxies.retain(|_, proxy| now < proxy.until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{Pause, PauseOrder, Scope};

    const SECOND: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Time {
        Time::from_millis(seconds * 1_000)
    }

    fn version(number: u64) -> Generation {
        Generation { incarnation: 1, number }
    }

    /// One pause of 30 s that is released over 5 s.
    fn flags(at_end: AtEnd, phase: Phase, number: u64) -> Flags {
        let scope = Scope { path: Some("/".into()), ..Scope::default() };
        let (lasts, release_over) = (SECOND * 30, SECOND * 5);
        let order = PauseOrder { scope, why: "".into(), lasts, at_end, release_over };
        let id = PauseId(7);
        let pauses = [(id, Pause { id, order, phase })].into();
        Flags { version: version(number), pauses }
    }

    fn standing(number: u64, count: Option<(u64, u64)>) -> Standing {
        let count = count.map(|(in_flight, held)| (PauseId(7), Count { in_flight, held }));
        Standing { version: version(number), counts: count.into_iter().collect() }
    }

    #[test]
    fn a_pause_that_has_lasted_is_ended_and_once_released_it_is_taken_away() {
        let holding = flags(AtEnd::GoOn, Phase::Holding, 1);
        let mut pauses = Pauses::new(at(100), &holding);
        assert_eq!(pauses.deadline(), Some(at(130)));
        assert_eq!(pauses.over(at(129), &holding), []);
        let (id, over) = (PauseId(7), SECOND * 5);
        let end = Command::EndPause { id, over };
        let end = [end];
        assert_eq!(pauses.over(at(130), &holding), end);
        assert_eq!(pauses.over(at(131), &holding), [], "it is under way");
        pauses.failed(at(131), id);
        assert_eq!(pauses.over(at(132), &holding), end);
        let releasing = flags(AtEnd::GoOn, Phase::Releasing { over }, 2);
        pauses.sync(at(133), &releasing);
        assert_eq!(pauses.over(at(138), &releasing), [], "who heard late is not done");
        assert_eq!(pauses.over(at(139), &releasing), [Command::ClearPause { id }]);
        pauses.sync(at(139), &Flags { version: version(3), ..Flags::default() });
        assert_eq!((pauses.deadline(), pauses.progress(at(139), id)), (None, None));
    }

    #[test]
    fn a_pause_at_whose_end_requests_fail_is_taken_away_at_once() {
        let holding = flags(AtEnd::Fail, Phase::Holding, 1);
        let mut pauses = Pauses::new(at(0), &holding);
        assert_eq!(pauses.over(at(30), &holding), [Command::ClearPause { id: PauseId(7) }]);
    }

    #[test]
    fn other_changes_do_not_make_a_pause_longer() {
        let holding = flags(AtEnd::GoOn, Phase::Holding, 1);
        let mut pauses = Pauses::new(at(0), &holding);
        pauses.sync(at(20), &flags(AtEnd::GoOn, Phase::Holding, 5));
        assert_eq!(pauses.deadline(), Some(at(30)));
    }

    #[test]
    fn it_is_quiet_once_every_proxy_holds_and_has_nothing_in_flight() {
        let holding = flags(AtEnd::GoOn, Phase::Holding, 4);
        let mut pauses = Pauses::new(at(0), &holding);
        let mut now = 0;
        // What two proxies say, and what comes of it: how many are there, how many hold, in flight, held, quiet.
        let mut check = |said: [Standing; 2], expected: (usize, usize, u64, u64, bool)| {
            now += 9;
            for (caller, standing) in (1..).zip(said) {
                pauses.receive(at(now), Caller(caller), standing).unwrap();
            }
            let p = pauses.progress(at(now), PauseId(7)).unwrap();
            let found = (p.proxies, p.heard, p.count.in_flight, p.count.held, p.is_quiet());
            assert_eq!(found, expected, "at {now}");
        };
        let quiet = || standing(4, Some((0, 1)));
        check([quiet(), quiet()], (2, 2, 0, 2, false)); // a third may not have spoken yet
        check([quiet(), quiet()], (2, 2, 0, 2, true));
        check([quiet(), standing(4, Some((3, 0)))], (2, 2, 3, 1, false));
        check([quiet(), standing(9, Some((0, 0)))], (2, 2, 0, 1, true));
        check([quiet(), standing(3, None)], (2, 1, 0, 1, false)); // has not heard of it
        check([quiet(), standing(3, Some((0, 0)))], (2, 1, 0, 1, false)); // makes no sense
        check([quiet(), standing(4, None)], (2, 1, 0, 1, false)); // has ended it by its own clock
    }

    #[test]
    fn proxies_that_leave_or_fall_silent_are_not_waited_for() {
        let holding = flags(AtEnd::GoOn, Phase::Holding, 1);
        let mut pauses = Pauses::new(at(0), &holding);
        for caller in 1..=3 {
            pauses.receive(at(caller), Caller(caller), standing(1, Some((1, 0)))).unwrap();
        }
        let mut in_flight =
            |now| pauses.progress(at(now), PauseId(7)).map(|p| (p.proxies, p.count.in_flight));
        assert_eq!(in_flight(10), Some((3, 3)));
        assert_eq!(in_flight(11), Some((2, 2)));
        pauses.leave(Caller(3));
        let progress = pauses.progress(at(11), PauseId(7)).unwrap();
        assert_eq!((progress.proxies, progress.left), (1, SECOND * 19));
    }

    #[test]
    fn what_proxies_say_has_a_bound() {
        let mut pauses = Pauses::new(at(0), &Flags::default());
        let counts = (0..=PAUSES_MAX as u64).map(|id| (PauseId(id), Count::default())).collect();
        let many = Standing { version: version(1), counts };
        let refused = pauses.receive(at(0), Caller(1), many);
        assert_eq!(refused, Err(StandingError::Many(PAUSES_MAX + 1)));
        for caller in 0..CALLERS_MAX as u64 {
            pauses
                .proxies
                .insert(Caller(caller), Proxy { until: at(9), standing: Standing::default() });
        }
        let one_more = |pauses: &mut Pauses, now| {
            pauses.receive(at(now), Caller(u64::MAX), Standing::default())
        };
        assert_eq!(one_more(&mut pauses, 1), Err(StandingError::Proxies));
        assert_eq!(one_more(&mut pauses, 9), Ok(()), "the others have fallen silent");
    }
}

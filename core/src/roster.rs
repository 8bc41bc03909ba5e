//! Who is there: sessions that were heard of lately, and those that must be taken for lost.
//!
//! A broken connection is noticed at once but proves nothing: the task gets one heartbeat to come back over another. A
//! silent one gets three. And the watcher doubts itself first: a roster that looks later than it meant to takes what it has
//! not read for said, and one that sees too many tasks vanish at once leaves it to the brake whether to believe that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::brake::{Brake, Hold, Limits, Muster, Word};
use crate::task::SessionId;
use crate::time::Time;

/// Heartbeats that a connected task may miss. Two are lost to one hiccup of a network now and then; three are not.
const SILENT_HEARTBEATS: u32 = 3;
/// Heartbeats that a task whose connection broke has to come back; its first try comes within 200 ms.
const BROKEN_HEARTBEATS: u32 = 1;
/// Half heartbeats of silence after which a task is quiet. One that lives is never silent for so long, and of tasks that
/// vanish together all are, when the first of them is due.
const QUIET_HALVES: u32 = 3;

/// When a job's sessions were last heard of. Soft: a new leader begins anew.
#[derive(Clone, Debug)]
pub struct Roster {
    heartbeat: Duration,
    lives: BTreeMap<SessionId, Life>,
    brake: Brake,
    /// When the missing were last looked through, while there are any.
    looked: Option<Time>,
}

#[derive(Clone, Copy, Debug)]
struct Life {
    /// How long an owner's lease lasts by this clock: until it is over nobody can be given what the owner has.
    lease: Option<Duration>,
    heard: Time,
    /// When it was last known to live: heard of, or its connection broke.
    gone: Time,
    link: Link,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// Not seen since this roster began.
    Unseen,
    /// A connection is open.
    Open,
    /// The connection broke at this time.
    Broken(Time),
    /// Not heard of for too long, and the brake holds.
    Missing,
    /// Given out as lost; what becomes of that is the caller's.
    Judged,
}

impl Roster {
    /// Begins with nobody.
    pub const fn new(heartbeat: Duration, limits: Limits) -> Self {
        let brake = Brake::new(limits);
        Self { heartbeat, lives: BTreeMap::new(), brake, looked: None }
    }

    /// Takes another heartbeat and other limits from the job's spec.
    pub const fn set_limits(&mut self, heartbeat: Duration, limits: Limits) {
        self.heartbeat = heartbeat;
        self.brake.set_limits(limits);
    }

    /// Brings the roster in line with who has a session, and what lease: a newcomer counts as heard of just now, whoever ended is
    /// dropped.
    pub fn sync(
        &mut self,
        now: Time,
        sessions: impl Iterator<Item = (SessionId, Option<Duration>)>,
    ) {
        let mut old = std::mem::take(&mut self.lives);
        self.lives = sessions
            .map(|(session, lease)| {
                let new = Life { lease, heard: now, gone: now, link: Link::Unseen };
                (session, old.remove(&session).unwrap_or(new))
            })
            .collect();
    }

    /// Walks the sessions that it was last brought in line with.
    pub fn sessions(&self) -> impl Iterator<Item = SessionId> {
        self.lives.keys().copied()
    }

    /// Notes that a session opened a connection.
    pub fn attached(&mut self, now: Time, session: SessionId) {
        self.note(now, session);
    }

    /// Notes a sign of life.
    pub fn heard(&mut self, now: Time, session: SessionId) {
        self.note(now, session);
    }

    /// Notes that a session's connection broke.
    pub fn broken(&mut self, now: Time, session: SessionId) {
        if let Some(life) = self.lives.get_mut(&session)
            && !matches!(life.link, Link::Judged | Link::Missing)
        {
            (life.gone, life.link) = (now, Link::Broken(now));
        }
    }

    /// Whatever comes from a session after its connection broke came over a newer one.
    fn note(&mut self, now: Time, session: SessionId) {
        if let Some(life) = self.lives.get_mut(&session)
            && life.link != Link::Judged
        {
            *life = Life { heard: now, gone: now, link: Link::Open, ..*life };
        }
    }

    /// Takes a judgement back: nothing came of it.
    pub fn acquit(&mut self, now: Time, session: SessionId) {
        if let Some(life) = self.lives.get_mut(&session) {
            *life = Life { heard: now, gone: now, link: Link::Unseen, ..*life };
            self.brake.acquit();
        }
    }

    /// Says when a session was last known to live: when it was last heard of, or its connection broke.
    pub fn gone_since(&self, session: SessionId) -> Option<Time> {
        self.lives.get(&session).map(|life| life.gone)
    }

    /// Says whether a connection of this session is open.
    pub fn connected(&self, session: SessionId) -> bool {
        self.lives.get(&session).is_some_and(|life| life.link == Link::Open)
    }

    /// Says whether a session is known to be away: its connection broke and no other was opened, or it was silent for too
    /// long. Of one that nobody has seen yet nothing is known.
    pub fn away(&self, session: SessionId) -> bool {
        let away =
            |life: &Life| matches!(life.link, Link::Broken(_) | Link::Missing | Link::Judged);
        self.lives.get(&session).is_some_and(away)
    }

    /// Gives the hold that is on, where too many are missing.
    pub const fn hold(&self) -> Option<&Hold> {
        self.brake.hold()
    }

    /// Takes what callers say of those that are missing.
    pub fn hear(&mut self, now: Time, words: &BTreeMap<SessionId, Word>) {
        self.brake.hear(now, words);
    }

    /// Gives out, once each, the sessions that must be taken for lost; `believed` are, by an operator's word, if they are
    /// missing.
    pub fn tick(&mut self, now: Time, believed: &BTreeSet<SessionId>) -> Vec<SessionId> {
        let due = |life: &Life| self.loss(life).filter(|at| *at <= now);
        if let Some(first) = self.lives.values().filter_map(due).min() {
            if now.since(first) > self.heartbeat {
                // This loop slept: heartbeats may lie unread in its queue.
                self.pardon(now);
            }
            let is_due = |life: &Life| self.loss(life).is_some_and(|at| at <= now);
            let missing: Vec<SessionId> = self.those(is_due).collect();
            self.mark(missing.iter(), Link::Missing);
        }
        let missing: BTreeSet<SessionId> = self.those(|life| life.link == Link::Missing).collect();
        if missing.is_empty() && self.brake.hold().is_none() {
            self.looked = None;
            return Vec::new();
        }
        let quiet = self.those(|life| self.is_quiet(life, now)).count();
        // Those that were given out are as good as gone.
        let tasks = self.those(|life| life.link != Link::Judged).count();
        let lost = self.brake.judge(now, Muster { missing: &missing, quiet, tasks, believed });
        self.mark(lost.iter(), Link::Judged);
        self.looked = self.brake.hold().map(|_| now);
        lost.into_iter().collect()
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Option<Time> {
        let first = self.lives.values().filter_map(|life| self.loss(life)).min();
        // Whether to go on holding is asked again and again.
        let again = self.looked.map(|looked| looked + self.heartbeat);
        first.into_iter().chain(again).min()
    }

    fn those(&self, which: impl Fn(&Life) -> bool) -> impl Iterator<Item = SessionId> {
        self.lives.iter().filter(move |(_, life)| which(life)).map(|(session, _)| *session)
    }

    fn mark<'a>(&mut self, sessions: impl Iterator<Item = &'a SessionId>, link: Link) {
        for session in sessions {
            self.lives.get_mut(session).expect("it was just found").link = link;
        }
    }

    fn is_quiet(&self, life: &Life, now: Time) -> bool {
        match life.link {
            Link::Broken(_) | Link::Missing => true,
            Link::Open | Link::Unseen => now.since(life.heard) > self.heartbeat * QUIET_HALVES / 2,
            Link::Judged => false,
        }
    }

    fn loss(&self, life: &Life) -> Option<Time> {
        let silent = life.heard + self.heartbeat * SILENT_HEARTBEATS;
        match (life.link, life.lease) {
            (Link::Judged | Link::Missing, _) => None,
            (_, Some(lease)) => Some(silent.max(life.heard + lease)),
            (Link::Broken(at), None) => Some(silent.min(at + self.heartbeat * BROKEN_HEARTBEATS)),
            (Link::Open | Link::Unseen, None) => Some(silent),
        }
    }

    fn pardon(&mut self, now: Time) {
        for life in self.lives.values_mut() {
            match &mut life.link {
                Link::Judged | Link::Missing => continue,
                Link::Broken(at) => *at = now,
                Link::Open | Link::Unseen => {}
            }
            life.heard = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Ratio;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const LIMITS: Limits = Limits { share: Ratio::percent(50), lease: Duration::from_secs(5) };

    fn at(millis: u64) -> Time {
        Time::from_millis(millis)
    }

    fn roster(sessions: u64) -> Roster {
        let mut roster = Roster::new(Duration::from_secs(1), LIMITS);
        roster.sync(at(0), (1..=sessions).map(|session| (SessionId(session), None)));
        for session in 1..=sessions {
            roster.attached(at(0), SessionId(session));
        }
        roster
    }

    #[test]
    fn a_broken_connection_is_confirmed_by_the_missed_heartbeat() {
        let none = BTreeSet::new();
        let mut roster = roster(2);
        roster.broken(at(500), A);
        roster.heard(at(900), B);
        assert_eq!(roster.deadline(), Some(at(1_500)));
        assert_eq!(roster.tick(at(1_499), &none), []);
        assert_eq!(roster.tick(at(1_500), &none), [A]);
        assert_eq!(roster.tick(at(1_501), &none), [], "each is given out once");
    }

    #[test]
    fn a_task_that_comes_back_in_time_is_not_lost() {
        let none = BTreeSet::new();
        let mut roster = roster(2);
        roster.broken(at(500), A);
        roster.attached(at(700), A);
        roster.heard(at(2_000), B);
        assert_eq!(roster.tick(at(1_600), &none), []);
        assert_eq!(
            roster.tick(at(3_700), &none),
            [A],
            "three silent heartbeats after it was last heard of"
        );
    }

    #[test]
    fn a_roster_that_looks_late_pardons_everyone() {
        let none = BTreeSet::new();
        let mut roster = roster(2);
        assert_eq!(roster.tick(at(60_000), &none), []);
        assert_eq!(roster.tick(at(62_999), &none), []);
        assert_eq!(roster.tick(at(63_000), &none), [A, B]);
    }

    #[test]
    fn most_tasks_vanishing_at_once_are_not_believed() {
        for silent in [false, true] {
            let mut roster = roster(5);
            let mut lost = Vec::new();
            for tenth in 0..1_000 {
                let now = at(100 + tenth * 100);
                for session in 1..=5 {
                    // Each beats at a time of its own, and three of them no more.
                    let beats = tenth % 10 == session && (session > 3 || tenth < 20);
                    if beats {
                        roster.heard(now, SessionId(session));
                    }
                    if tenth == 20 && session <= 3 && !silent {
                        roster.broken(now, SessionId(session));
                    }
                }
                if roster.deadline().is_some_and(|deadline| deadline <= now) {
                    lost.extend(roster.tick(now, &BTreeSet::new()));
                }
            }
            assert_eq!(lost, [], "silent: {silent}");
            let hold = roster.hold().unwrap();
            assert_eq!(hold.missing.keys().copied().collect::<Vec<_>>(), [A, B, SessionId(3)]);
            let by_word = roster.tick(at(101_000), &BTreeSet::from([A, B]));
            assert_eq!(by_word, [A, B, SessionId(3)], "one of the three that are left is no mass");
        }
    }

    #[test]
    fn those_that_come_back_end_the_hold_and_are_watched_as_before() {
        let none = BTreeSet::new();
        let mut roster = roster(4);
        for blip in [0, 100_000] {
            let all = (1..=4).map(SessionId);
            all.clone().for_each(|session| roster.attached(at(blip), session));
            all.clone().for_each(|session| roster.broken(at(blip + 100), session));
            assert_eq!(roster.tick(at(blip + 1_100), &none), [], "blip at {blip}");
            assert!(roster.hold().is_some());
            all.for_each(|session| roster.attached(at(blip + 1_200), session));
            assert_eq!(roster.tick(at(blip + 2_000), &none), [], "blip at {blip}");
            assert_eq!((roster.hold(), roster.deadline()), (None, Some(at(blip + 4_200))));
        }
    }

    #[test]
    fn a_judgement_of_which_nothing_came_is_taken_back() {
        let none = BTreeSet::new();
        let mut roster = roster(1);
        assert_eq!(roster.tick(at(3_000), &none), [A]);
        roster.heard(at(3_100), A);
        roster.acquit(at(3_200), A);
        assert_eq!(roster.tick(at(6_199), &none), []);
        assert_eq!(roster.tick(at(6_200), &none), [A]);
    }

    #[test]
    fn ticking_early_or_twice_does_no_harm() {
        let none = BTreeSet::new();
        let mut roster = roster(3);
        for millis in 0..2_999 {
            assert_eq!(roster.tick(at(millis), &none), []);
        }
    }
}

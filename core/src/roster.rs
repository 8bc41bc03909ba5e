//! Who is there: sessions that were heard of lately, and those that must be taken for lost.
//!
//! A broken connection is noticed at once but proves nothing: the task gets one heartbeat to come back over another. A
//! silent one gets three. And the watcher doubts itself first: a roster that looks later than it meant to, or that sees
//! most tasks vanish at once, suspects that it is the blind one.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::task::SessionId;
use crate::time::Time;

/// Heartbeats that a connected task may miss. Two are lost to one hiccup of a network now and then; three are not.
const SILENT_HEARTBEATS: u32 = 3;
/// Heartbeats that a task whose connection broke has to come back; its first try comes within 200 ms.
const BROKEN_HEARTBEATS: u32 = 1;
/// Heartbeats to wait when more than half of the tasks vanish at once.
const BLIND_HEARTBEATS: u32 = 10;
/// Below so many tasks half of them may well be gone.
const BLIND_FROM_TASKS: usize = 4;

/// When a job's sessions were last heard of. Soft: a new leader begins anew.
#[derive(Clone, Debug)]
pub struct Roster {
    heartbeat: Duration,
    /// How long an owner's lease lasts by this clock: until it is over nobody can be given what the owner has.
    lease: Option<Duration>,
    lives: BTreeMap<SessionId, Life>,
    /// While most tasks seem gone: until when not to believe it.
    doubt: Option<Time>,
}

#[derive(Clone, Copy, Debug)]
struct Life {
    heard: Time,
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
    /// Given out as lost; what becomes of that is the caller's.
    Judged,
}

impl Roster {
    /// Begins with nobody.
    pub const fn new(heartbeat: Duration) -> Self {
        Self { heartbeat, lease: None, lives: BTreeMap::new(), doubt: None }
    }

    /// Takes another heartbeat from the job's spec.
    pub const fn set_heartbeat(&mut self, heartbeat: Duration) {
        self.heartbeat = heartbeat;
    }

    /// Takes the lease of an exclusive job's tasks: none is lost before it is over.
    pub const fn set_lease(&mut self, lease: Option<Duration>) {
        self.lease = lease;
    }

    /// Brings the roster in line with who has a session: a newcomer counts as heard of just now, whoever ended is dropped.
    pub fn sync(&mut self, now: Time, sessions: impl Iterator<Item = SessionId>) {
        let mut old = std::mem::take(&mut self.lives);
        let life = |session| {
            (session, old.remove(&session).unwrap_or(Life { heard: now, link: Link::Unseen }))
        };
        self.lives = sessions.map(life).collect();
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
            && life.link != Link::Judged
        {
            life.link = Link::Broken(now);
        }
    }

    /// Whatever comes from a session after its connection broke came over a newer one.
    fn note(&mut self, now: Time, session: SessionId) {
        if let Some(life) = self.lives.get_mut(&session)
            && life.link != Link::Judged
        {
            *life = Life { heard: now, link: Link::Open };
            if self.doubt.is_some() && !self.mostly_quiet(now) {
                self.doubt = None;
            }
        }
    }

    /// More than half have gone quiet.
    fn mostly_quiet(&self, now: Time) -> bool {
        let quiet = |life: &&Life| {
            matches!(life.link, Link::Broken(_) | Link::Judged)
                || now.since(life.heard) > self.heartbeat * 2
        };
        let quiet = self.lives.values().filter(quiet).count();
        self.lives.len() >= BLIND_FROM_TASKS && quiet * 2 > self.lives.len()
    }

    /// Takes a judgement back: nothing came of it.
    pub fn acquit(&mut self, now: Time, session: SessionId) {
        if let Some(life) = self.lives.get_mut(&session) {
            *life = Life { heard: now, link: Link::Unseen };
        }
    }

    /// Says whether a connection of this session is open.
    pub fn connected(&self, session: SessionId) -> bool {
        self.lives.get(&session).is_some_and(|life| life.link == Link::Open)
    }

    /// Gives out, once each, the sessions that must be taken for lost.
    pub fn tick(&mut self, now: Time) -> Vec<SessionId> {
        let due = |life: &Life| self.due(life).filter(|at| *at <= now);
        let Some(first) = self.lives.values().filter_map(due).min() else {
            return Vec::new();
        };
        if now.since(first) > self.heartbeat {
            // This loop slept: heartbeats may lie unread in its queue.
            self.pardon(now);
            return Vec::new();
        }
        let lost: Vec<SessionId> = self
            .lives
            .iter()
            .filter(|(_, life)| due(life).is_some())
            .map(|(session, _)| *session)
            .collect();
        if self.seems_blind(now) {
            return Vec::new();
        }
        for session in &lost {
            self.lives.get_mut(session).expect("it was just found").link = Link::Judged;
        }
        lost
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Option<Time> {
        self.lives.values().filter_map(|life| self.due(life)).min()
    }

    /// When a session is to be taken for lost: not while that is doubted.
    fn due(&self, life: &Life) -> Option<Time> {
        let loss = self.loss(life)?;
        Some(self.doubt.map_or(loss, |doubt| loss.max(doubt)))
    }

    fn loss(&self, life: &Life) -> Option<Time> {
        let silent = life.heard + self.heartbeat * SILENT_HEARTBEATS;
        if let Some(lease) = self.lease
            && life.link != Link::Judged
        {
            return Some(silent.max(life.heard + lease));
        }
        match life.link {
            Link::Judged => None,
            Link::Broken(at) => Some(silent.min(at + self.heartbeat * BROKEN_HEARTBEATS)),
            Link::Open | Link::Unseen => Some(silent),
        }
    }

    fn pardon(&mut self, now: Time) {
        for life in self.lives.values_mut().filter(|life| life.link != Link::Judged) {
            life.heard = now;
            if let Link::Broken(at) = &mut life.link {
                *at = now;
            }
        }
    }

    /// More than half have gone quiet within the time that one of them needs to be judged.
    fn seems_blind(&mut self, now: Time) -> bool {
        if !self.mostly_quiet(now) {
            self.doubt = None;
            return false;
        }
        // Who was heard of when stays as it is: else the dead would look alive, and the doubt never end.
        now < *self.doubt.get_or_insert(now + self.heartbeat * BLIND_HEARTBEATS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    fn at(millis: u64) -> Time {
        Time::from_millis(millis)
    }

    fn roster(sessions: u64) -> Roster {
        let mut roster = Roster::new(Duration::from_secs(1));
        roster.sync(at(0), (1..=sessions).map(SessionId));
        for session in 1..=sessions {
            roster.attached(at(0), SessionId(session));
        }
        roster
    }

    #[test]
    fn a_broken_connection_is_confirmed_by_the_missed_heartbeat() {
        let mut roster = roster(2);
        roster.broken(at(500), A);
        roster.heard(at(900), B);
        assert_eq!(roster.deadline(), Some(at(1_500)));
        assert_eq!(roster.tick(at(1_499)), []);
        assert_eq!(roster.tick(at(1_500)), [A]);
        assert_eq!(roster.tick(at(1_501)), [], "each is given out once");
    }

    #[test]
    fn a_task_that_comes_back_in_time_is_not_lost() {
        let mut roster = roster(2);
        roster.broken(at(500), A);
        roster.attached(at(700), A);
        roster.heard(at(2_000), B);
        assert_eq!(roster.tick(at(1_600)), []);
        assert_eq!(
            roster.tick(at(3_700)),
            [A],
            "three silent heartbeats after it was last heard of"
        );
    }

    #[test]
    fn a_roster_that_looks_late_pardons_everyone() {
        let mut roster = roster(2);
        assert_eq!(roster.tick(at(60_000)), []);
        assert_eq!(roster.tick(at(62_999)), []);
        assert_eq!(roster.tick(at(63_000)), [A, B]);
    }

    #[test]
    fn most_tasks_vanishing_at_once_are_not_believed_for_a_while() {
        let mut roster = roster(4);
        for session in 1..=3 {
            roster.broken(at(100), SessionId(session));
        }
        roster.heard(at(1_000), SessionId(4));
        assert_eq!(roster.tick(at(1_100)), []);
        let deadline = roster.deadline().unwrap();
        assert!(deadline >= at(4_000), "{deadline}");
        let mut lost = Vec::new();
        for second in 2..=20 {
            roster.heard(at(second * 1_000), SessionId(4));
            lost.extend(roster.tick(at(second * 1_000 + 100)));
        }
        assert_eq!(lost, [A, B, SessionId(3)], "but not for ever");
    }

    #[test]
    fn the_dead_that_a_new_leader_never_saw_are_lost_though_others_live() {
        let mut roster = Roster::new(Duration::from_secs(1));
        roster.sync(at(0), (1..=4).map(SessionId));
        let mut lost = Vec::new();
        for millis in (0..=20_000).step_by(250) {
            roster.heard(at(millis), SessionId(4));
            lost.extend(roster.tick(at(millis)));
        }
        assert_eq!(lost, [A, B, SessionId(3)]);
    }

    #[test]
    fn each_time_most_tasks_vanish_it_is_doubted_anew() {
        let mut roster = roster(4);
        for blip in [0, 100_000] {
            let all = (1..=4).map(SessionId);
            all.clone().for_each(|session| roster.attached(at(blip), session));
            all.clone().for_each(|session| roster.broken(at(blip + 100), session));
            assert_eq!(roster.tick(at(blip + 1_100)), [], "blip at {blip}");
            all.for_each(|session| roster.attached(at(blip + 1_200), session));
            assert_eq!(roster.tick(at(blip + 2_000)), [], "blip at {blip}");
        }
    }

    #[test]
    fn a_judgement_of_which_nothing_came_is_taken_back() {
        let mut roster = roster(1);
        assert_eq!(roster.tick(at(3_000)), [A]);
        roster.heard(at(3_100), A);
        roster.acquit(at(3_200), A);
        assert_eq!(roster.tick(at(6_199)), []);
        assert_eq!(roster.tick(at(6_200)), [A]);
    }

    #[test]
    fn ticking_early_or_twice_does_no_harm() {
        let mut roster = roster(3);
        for millis in 0..2_999 {
            assert_eq!(roster.tick(at(millis)), []);
        }
    }
}

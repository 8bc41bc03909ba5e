//! Who may serve, and until when: the lease of an exclusive task, seen from both of its ends.
//!
//! The promise: at no instant do two tasks both believe that they own a key. `Holder` is the task's end, `Ledger` the
//! leader's. The argument, in the order of `docs/protocol.md`, section 2:
//!
//! * The holder counts from when it *sent* a renewal and subtracts the margin; the ledger counts from when the renewal
//!   *came in* and adds it. As long as both clocks' rates are within the margin of true time, the holder's belief ends before
//!   the ledger calls the lease over (rules 2, 5, 6).
//! * The ledger answers only after leadership was confirmed by a quorum round that began after the renewal came in. So a
//!   renewal that an older leader answers was sent before a newer one was elected, and the newer one counts from then
//!   (rules 3, 4).
//! * A grant names the newest generation that the leader had applied. The holder extends only once it has installed
//!   that: so it knows of every release that the leader knew of, and a slice that is being released is extended by no grant made
//!   since (section 3).
//! * Once the leader has proposed to end a session it grants to it no more, whatever becomes of the proposal
//!   ("hole a"). Once a holder has lapsed, it has lapsed for good: a grant that comes after does not revive it.
//!
//! Pure like all of core: time is handed in, and each end counts on its own clock alone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::assignment::{Assigned, Assignment, Replica};
use crate::generation::Generation;
use crate::key::SliceKey;
use crate::name::JobName;
use crate::slice::Slice;
use crate::task::SessionId;
use crate::time::Time;
use crate::transit::{HandOffId, Step, Transit};

/// How far off true time the rate of a clock may be, in parts of so many: 1 %, a hundred times what crystals drift.
const DRIFT_OF: u32 = 100;
/// Renewals that were sent and not answered yet which are remembered: the answer to an older one would hardly extend anything.
const SENT_MAX: usize = 16;

/// How much longer the leader waits than a holder serves. Only tests of tests have another one than the standard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Margin(u32);

impl Margin {
    /// What clocks are trusted to keep.
    pub const STANDARD: Self = Self(1);
    /// None: for tests that show what the margin is for.
    pub const NONE: Self = Self(0);

    /// How long a holder serves after it asked.
    pub fn held(self, lease: Duration) -> Duration {
        lease - lease * self.0 / DRIFT_OF
    }

    /// How long the leader waits after it was asked.
    pub fn waited(self, lease: Duration) -> Duration {
        lease + lease * self.0 / DRIFT_OF
    }
}

// --- The task's end.

/// What happened at a task.
#[derive(Clone, Debug)]
pub enum Event {
    /// The session is on, over a new connection. `lease` is nothing in an affinity job.
    Attached {
        /// Which session.
        session: SessionId,
        /// How long it may serve after it last asked to.
        lease: Option<Duration>,
    },
    /// The leader answered a renewal.
    Granted {
        /// Whose.
        session: SessionId,
        /// Its number.
        request: u64,
        /// The newest generation that the leader had applied.
        generation: Generation,
    },
    /// The session's own stream told of a newer assignment.
    Assigned(Arc<Assignment>),
    /// The application is ready to serve what is on its way here.
    Prepared(HandOffId),
    /// No guard of a slice that is being released is left, and what it held is flushed and sent.
    Released(HandOffId),
    /// The leader said that the session has ended.
    Ended,
}

/// What a task has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a renewal of this number.
    Renew(u64),
    /// Serve what is held until then, on this task's clock.
    Extend(Time),
    /// Hold this from now on, and nothing else.
    Hold(Vec<Held>),
    /// Get ready for a slice, pulling its state from whoever has it.
    Prepare(Coming),
    /// Take no new work on a slice, wait for what is under way, send what changed.
    Release(Going),
    /// Take work on a slice again: its hand-off was called off.
    Resume(HandOffId),
    /// Pull what has changed of a slice on its way here: who has it takes no more work on it.
    Fetch(HandOffId),
    /// Serve from what was prepared: the slice has come by this hand-off.
    Arrived(HandOffId),
    /// Forget what was prepared: the slice does not come, or came by another way.
    Discard(HandOffId),
    /// Say to the leader that the application is ready.
    Ready(HandOffId),
    /// Say to the leader that a slice is let go of.
    Acknowledge(HandOffId),
    /// The lease has run out. Nothing is held; register anew, saying that this session has stopped.
    Lapsed(SessionId),
}

/// A slice that a session holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which keys.
    pub slice: Slice,
    /// Since when without a break.
    pub since: Generation,
    /// Its fencing token.
    pub token: Generation,
    /// Whether it is being released, and when the right to it ends at the latest.
    pub release: Option<(HandOffId, Time)>,
}

/// A slice on its way here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coming {
    /// Which hand-off.
    pub id: HandOffId,
    /// Which keys.
    pub slice: Slice,
    /// Who has it.
    pub from: Option<SessionId>,
}

/// A slice on its way elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Going {
    /// Which hand-off.
    pub id: HandOffId,
    /// Which keys.
    pub slice: Slice,
    /// Who takes it.
    pub to: SessionId,
    /// When the right to it ends, whatever is under way then.
    pub until: Time,
}

/// What a session may serve, by what it knows: the machine of the task's end.
#[derive(Clone, Debug)]
pub struct Holder {
    margin: Margin,
    session: Option<SessionId>,
    lease: Option<Duration>,
    /// Number of the last renewal.
    asked: u64,
    /// Renewals that were not answered yet: number, and when they were sent.
    sent: VecDeque<(u64, Time)>,
    /// Serve while `now < until`. Never later than the leader's own count. Nothing before the first grant.
    until: Option<Time>,
    /// Grants that count once their generation is installed.
    pending: VecDeque<(Time, Generation)>,
    /// The newest assignment from the session's stream.
    known: Option<Arc<Assignment>>,
    releases: BTreeMap<HandOffId, Release>,
    comings: BTreeMap<HandOffId, (Coming, Step)>,
    /// Those of `comings` that the application is ready for.
    ready: BTreeSet<HandOffId>,
}

#[derive(Clone, Copy, Debug)]
struct Release {
    slice: Slice,
    /// Since when the slice is held: what comes back with another one was someone else's in between.
    since: Generation,
    /// When the right to the slice ends: with the last grant made before the release.
    until: Option<Time>,
    acknowledged: bool,
}

impl Holder {
    /// Begins without a session.
    pub const fn new(margin: Margin) -> Self {
        Self {
            margin,
            session: None,
            lease: None,
            asked: 0,
            sent: VecDeque::new(),
            until: None,
            pending: VecDeque::new(),
            known: None,
            releases: BTreeMap::new(),
            comings: BTreeMap::new(),
            ready: BTreeSet::new(),
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        self.tick(now, out);
        match event {
            Event::Attached { session, lease } => self.attached(session, lease, out),
            Event::Granted { session, request, generation } => {
                self.granted(now, session, request, generation, out);
            }
            Event::Assigned(assignment) => self.assigned(now, assignment, out),
            Event::Prepared(id) => {
                if self.comings.contains_key(&id) && self.ready.insert(id) {
                    out.push(Action::Ready(id));
                }
            }
            Event::Released(id) => {
                if let Some(release) = self.releases.get_mut(&id)
                    && !std::mem::replace(&mut release.acknowledged, true)
                {
                    out.push(Action::Acknowledge(id));
                }
            }
            Event::Ended => self.end(out),
        }
    }

    /// Does what the time has come for: a lease that has run out is over for good.
    pub fn tick(&mut self, now: Time, out: &mut Vec<Action>) {
        if let Some(session) = self.session
            && self.until.is_some_and(|until| until <= now)
        {
            self.end(out);
            out.push(Action::Lapsed(session));
        }
    }

    /// Says when to tick next.
    pub const fn deadline(&self) -> Option<Time> {
        self.until
    }

    /// Asks for more time, and says once more what may have been lost on its way. To be called every heartbeat.
    pub fn beat(&mut self, now: Time, out: &mut Vec<Action>) {
        self.tick(now, out);
        if self.session.is_none() {
            return;
        }
        self.asked += 1;
        if self.lease.is_some() {
            self.sent.push_back((self.asked, now));
            if self.sent.len() > SENT_MAX {
                self.sent.pop_front();
            }
        }
        out.push(Action::Renew(self.asked));
        self.repeat(out);
    }

    /// Gives the session, while there is one.
    pub const fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Gives the number of the last renewal.
    pub const fn asked(&self) -> u64 {
        self.asked
    }

    /// Says whether new work on a key may be taken.
    pub fn accepts(&self, now: Time, key: SliceKey) -> bool {
        self.held(now, key).is_some_and(|held| held.release.is_none())
    }

    /// Says whether this task believes that it owns a key: it may still finish work on a slice that it is releasing.
    pub fn believes(&self, now: Time, key: SliceKey) -> bool {
        self.held(now, key).is_some_and(|held| match held.release {
            None => true,
            Some((id, until)) => now < until && !self.releases[&id].acknowledged,
        })
    }

    /// Gives what is held at a key right now.
    pub fn held(&self, now: Time, key: SliceKey) -> Option<Held> {
        if self.lease.is_some() && self.until.is_none_or(|until| until <= now) {
            return None;
        }
        let (slice, assigned) = self.known.as_ref()?.get(key);
        self.hold(slice, assigned)
    }

    fn hold(&self, slice: Slice, assigned: &Assigned) -> Option<Held> {
        let session = self.session?;
        let Replica { since, .. } = assigned.replicas.of(session)?;
        let release = assigned.transit.as_deref().filter(|transit| is_release(transit, session));
        let release = release.map(|transit| {
            let until = self.releases.get(&transit.id).and_then(|release| release.until);
            (transit.id, until.unwrap_or(Time::ZERO))
        });
        Some(Held { slice, since, token: assigned.token, release })
    }

    fn attached(&mut self, session: SessionId, lease: Option<Duration>, out: &mut Vec<Action>) {
        if self.session != Some(session) {
            self.end(out);
            (self.session, self.lease) = (Some(session), lease);
        }
        self.repeat(out);
    }

    /// Says once more what the leader may have missed; it ignores what it knows.
    fn repeat(&self, out: &mut Vec<Action>) {
        out.extend(self.ready.iter().copied().map(Action::Ready));
        let done = self.releases.iter().filter(|(_, release)| release.acknowledged);
        out.extend(done.map(|(id, _)| Action::Acknowledge(*id)));
    }

    fn granted(
        &mut self,
        now: Time,
        session: SessionId,
        request: u64,
        generation: Generation,
        out: &mut Vec<Action>,
    ) {
        let Some(lease) = self.lease.filter(|_| self.session == Some(session)) else { return };
        let Some(place) = self.sent.iter().position(|(number, _)| *number == request) else {
            return;
        };
        let (_, sent) = self.sent[place];
        // Those before would extend less.
        self.sent.drain(..=place);
        let until = sent + self.margin.held(lease);
        if self.known.as_ref().is_some_and(|known| generation <= known.generation) {
            self.extend(now, until, out);
        } else if self.pending.len() < SENT_MAX {
            self.pending.push_back((until, generation));
        }
    }

    fn extend(&mut self, now: Time, until: Time, out: &mut Vec<Action>) {
        if until > now && self.until.is_none_or(|before| before < until) {
            self.until = Some(until);
            out.push(Action::Extend(until));
        }
    }

    fn assigned(&mut self, now: Time, assignment: Arc<Assignment>, out: &mut Vec<Action>) {
        let Some(session) = self.session else { return };
        if self.known.as_ref().is_some_and(|known| assignment.generation <= known.generation) {
            return;
        }
        let (mut releases, mut comings) = (BTreeMap::new(), BTreeMap::new());
        for (slice, assigned) in assignment.slices.iter() {
            let Some(transit) = assigned.transit.as_deref() else { continue };
            if is_release(transit, session) {
                // The last grants counted: those that come with this assignment or after it extend everything else.
                let Some(Replica { since, .. }) = assigned.replicas.of(session) else { continue };
                let first = Release { slice, since, until: self.until, acknowledged: false };
                let known = self.releases.get(&transit.id).copied();
                releases.insert(transit.id, known.unwrap_or(first));
                if known.is_none() {
                    let (id, to) = (transit.id, transit.to);
                    let until = first.until.unwrap_or(Time::ZERO);
                    out.push(Action::Release(Going { id, slice, to, until }));
                }
            } else if transit.to == session {
                let coming = Coming { id: transit.id, slice, from: transit.from };
                comings.insert(transit.id, (coming, transit.step));
                let before = self.comings.get(&transit.id).map(|(_, step)| *step);
                if before.is_none() {
                    out.push(Action::Prepare(coming));
                }
                if transit.step == Step::Releasing && before != Some(Step::Releasing) {
                    out.push(Action::Fetch(transit.id));
                }
            }
        }
        let own = |slice: Slice| assignment.get(slice.first()).1.replicas.of(session);
        for (id, release) in &self.releases {
            let has_it = own(release.slice).is_some_and(|own| own.since == release.since);
            if !releases.contains_key(id) && has_it {
                out.push(Action::Resume(*id));
            }
        }
        for (id, (coming, _)) in &self.comings {
            if !comings.contains_key(id) {
                // By another way than this hand-off it may have come after someone else wrote.
                let by_it = own(coming.slice).is_some_and(|own| own.since == id.began);
                out.push(if by_it { Action::Arrived(*id) } else { Action::Discard(*id) });
            }
        }
        self.ready.retain(|id| comings.contains_key(id));
        (self.releases, self.comings) = (releases, comings);
        let newest = assignment.generation;
        self.known = Some(assignment);
        let all = std::mem::take(&mut self.pending);
        let (due, pending): (VecDeque<_>, _) =
            all.into_iter().partition(|(_, generation)| *generation <= newest);
        self.pending = pending;
        out.push(Action::Hold(self.all_held()));
        due.into_iter().for_each(|(until, _)| self.extend(now, until, out));
    }

    fn all_held(&self) -> Vec<Held> {
        let known = self.known.iter().flat_map(|known| known.slices.iter());
        known.filter_map(|(slice, assigned)| self.hold(slice, assigned)).collect()
    }

    /// Ends the session, if there is one, and with it all that is held.
    fn end(&mut self, out: &mut Vec<Action>) {
        if self.session.is_none() {
            return;
        }
        let asked = self.asked;
        let old = std::mem::replace(self, Self::new(self.margin));
        // Numbers go on: the answer to one that an older session sent means nothing.
        self.asked = asked;
        out.push(Action::Hold(Vec::new()));
        out.extend(old.comings.into_keys().map(Action::Discard));
    }
}

fn is_release(transit: &Transit, session: SessionId) -> bool {
    transit.step == Step::Releasing && transit.from == Some(session)
}

// --- The leader's end.

/// A renewal that waits for the leader to know that it still leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Which job.
    pub job: JobName,
    /// Whose.
    pub session: SessionId,
    /// Its number.
    pub request: u64,
}

/// When the leases of all sessions are over at the latest: the machine of the leader's end.
#[derive(Clone, Debug)]
pub struct Ledger {
    margin: Margin,
    leases: BTreeMap<SessionId, Lease>,
    /// Renewals that came in since the last confirmation began, and those that it is for.
    waiting: Vec<Renewal>,
    confirming: Option<Vec<Renewal>>,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    length: Duration,
    /// When a renewal last came in that may have been granted.
    renewed: Time,
    /// Whether its end was proposed: it is granted nothing any more, whatever becomes of that.
    denied: bool,
}

impl Ledger {
    /// Begins empty.
    pub const fn new(margin: Margin) -> Self {
        Self { margin, leases: BTreeMap::new(), waiting: Vec::new(), confirming: None }
    }

    /// Takes in a session that has not ended: as if it had been renewed right now, since who led before may have just done so.
    pub fn admit(&mut self, now: Time, session: SessionId, length: Duration) {
        self.leases.entry(session).or_insert(Lease { length, renewed: now, denied: false });
    }

    /// Drops a session that has ended.
    pub fn forget(&mut self, session: SessionId) {
        self.leases.remove(&session);
    }

    /// Takes a renewal in, unless the session is being ended. Says whether leadership has to be confirmed.
    pub fn ask(&mut self, now: Time, renewal: Renewal) -> bool {
        let Some(lease) = self.leases.get_mut(&renewal.session).filter(|lease| !lease.denied)
        else {
            return false;
        };
        lease.renewed = now;
        // Only the newest of a session means anything.
        self.waiting.retain(|other| other.session != renewal.session);
        self.waiting.push(renewal);
        self.begin()
    }

    /// Leadership is confirmed since the last confirmation began, or is not. Gives the renewals that may be granted, and says
    /// whether another confirmation has to begin.
    pub fn confirmed(&mut self, leads: bool) -> (Vec<Renewal>, bool) {
        let mut granted = self.confirming.take().unwrap_or_default();
        granted.retain(|renewal| leads && self.may_be_granted(renewal.session));
        (granted, self.begin())
    }

    fn begin(&mut self) -> bool {
        if self.confirming.is_some() || self.waiting.is_empty() {
            return false;
        }
        self.confirming = Some(std::mem::take(&mut self.waiting));
        true
    }

    fn may_be_granted(&self, session: SessionId) -> bool {
        self.leases.get(&session).is_some_and(|lease| !lease.denied)
    }

    /// Says whether a session's lease is surely over. A session that was never admitted has none.
    pub fn is_over(&self, now: Time, session: SessionId) -> bool {
        self.over_at(session).is_none_or(|over| over <= now)
    }

    /// Says when a session's lease is over, if nothing renews it.
    pub fn over_at(&self, session: SessionId) -> Option<Time> {
        let lease = self.leases.get(&session)?;
        Some(lease.renewed + self.margin.waited(lease.length))
    }

    /// Says whether a session is granted nothing more.
    pub fn is_denied(&self, session: SessionId) -> bool {
        self.leases.get(&session).is_some_and(|lease| lease.denied)
    }

    /// Grants nothing more to a session, whose end is about to be proposed.
    pub fn deny(&mut self, session: SessionId) {
        if let Some(lease) = self.leases.get_mut(&session) {
            lease.denied = true;
        }
    }
}

#[cfg(test)]
mod tests;

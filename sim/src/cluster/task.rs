//! A task: its session with the leader, and the holder that says what it may serve.
//!
//! What `router-lib/src/session.rs` does, on the virtual clock: it finds the leader, registers once, attaches the same session again over
//! whatever stream holds, beats, reports, and drains before it stops. What it does with what it holds is `work.rs`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::lease::{Action, Event, Holder, Margin};
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::report::Report;
use mandoline_core::slice::Slice;
use mandoline_core::task::{SessionId, TaskInfo};
use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;

use crate::check::Seen;
use crate::cluster::dialer::{Dialer, Next};
use crate::cluster::flaw::Flaw;
use crate::cluster::ground::{Ground, Heard, Own};
use crate::cluster::load::Field;
use crate::cluster::network::{Side, StreamId};
use crate::cluster::tally::Count;
use crate::cluster::wire::{Letter, Refusal, Say};
use crate::cluster::work::Work;

/// The side of a stream that a task is.
const HERE: Side = 0;
/// How often a task beats, if its lease lets it.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often it reports.
pub const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How long it waits for an assigner to take it on.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);
/// After so many heartbeats without a grant it asks another assigner.
const SILENT_HEARTBEATS: u32 = 2;

/// How much of what it said long ago a task may say again.
const OLD_WORDS: usize = 8;

/// A task.
#[derive(Debug)]
pub struct Task {
    place: usize,
    job: JobName,
    info: TaskInfo,
    dialer: Dialer,
    link: Link,
    holder: Holder,
    work: Work,
    /// A session that lapsed, until another begins.
    stopped: Option<SessionId>,
    /// Whether it may believe more than it did.
    gained: bool,
    /// The newest that was heard on the session's stream.
    known: Arc<Assignment>,
    next_beat: Time,
    next_report: Time,
    asked: u64,
    leaving: Leaving,
    /// What it has ever let go of, the newest of it.
    acknowledged: BTreeSet<HandOffId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Waiting { until: Time },
    Dialing { stream: StreamId, to: usize, since: Time },
    Attached { stream: StreamId, to: usize, unanswered: Option<Time> },
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    Asked,
    Done,
}

impl Task {
    /// A task that has never run.
    pub fn new(place: usize, name: TaskName, job: JobName, assigners: usize, store: usize) -> Self {
        let address = format!("task:{place}").parse().expect("it is a host and a port");
        let known = Assignment::new(job.clone(), Generation::ZERO);
        Self {
            place,
            job,
            info: TaskInfo::new(name, 0, address),
            dialer: Dialer::new((0..assigners).collect()),
            link: Link::Gone,
            holder: Holder::new(Margin::STANDARD),
            work: Work::new(place, store),
            stopped: None,
            gained: false,
            known: Arc::new(known),
            next_beat: Time::ZERO,
            next_report: Time::ZERO,
            asked: 0,
            leaving: Leaving::No,
            acknowledged: BTreeSet::new(),
        }
    }

    /// Starts as a new process, which knows nothing of the one before.
    pub fn start(&mut self, ground: &mut Ground) {
        let now = ground.local(self.place);
        let (dialer, store) = (self.dialer.anew(), self.work.store());
        let (name, job) = (self.info.name.clone(), self.job.clone());
        *self = Self { dialer, ..Self::new(self.place, name, job, 0, store) };
        if ground.flaw == Flaw::NoMargin {
            self.holder = Holder::new(Margin::NONE);
        }
        self.info.incarnation = ground.prng.bits();
        self.info.prepares = true;
        self.link = Link::Waiting { until: now };
        self.next_report = now + REPORT_EVERY;
        ground.see(&Seen::Started { who: self.place });
        self.wake(ground);
    }

    /// Gives what it knows.
    pub const fn known(&self) -> &Arc<Assignment> {
        &self.known
    }

    /// Says whether it has gone, in good order.
    pub fn is_gone(&self) -> bool {
        self.link == Link::Gone
    }

    /// Says whether it has a session.
    pub const fn is_on(&self) -> bool {
        self.holder.session().is_some()
    }

    /// Says whether it may believe more than when this was last asked.
    pub const fn gained(&mut self) -> bool {
        std::mem::replace(&mut self.gained, false)
    }

    /// Walks what it believes to own right now, by its own clock: slices, and keys of guards that are still good.
    pub fn believes(&self, ground: &Ground) -> Vec<Slice> {
        let now = ground.local(self.place);
        let held = self.work.held().iter().map(|held| held.slice);
        let held = held.filter(|slice| self.holder.believes(now, slice.first()));
        let guarded = self.work.guarded(&self.holder, now);
        held.chain(guarded.map(|key| Slice::new(key, key).expect("a key is a slice"))).collect()
    }

    /// Walks what it takes new work on right now.
    pub fn serves(&self, ground: &Ground) -> impl Iterator<Item = Slice> {
        let now = ground.local(self.place);
        let held = self.work.held().iter().map(|held| held.slice);
        held.filter(move |slice| self.holder.accepts(now, slice.first()))
    }

    /// Begins to leave.
    pub fn drain(&mut self, ground: &mut Ground) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Asked;
            self.say(ground, Say::Drain);
        }
    }

    /// Takes in what it hears.
    pub fn hear(&mut self, ground: &mut Ground, field: &Field, heard: Heard) {
        let now = ground.local(self.place);
        // Whatever comes, a lease that has run out is noticed first.
        self.tell(ground, |holder, out| holder.tick(now, out));
        match heard {
            Heard::Said(stream, _, say) if self.stream() == Some(stream) => {
                self.said(ground, stream, say);
            }
            Heard::Said(stream, ..) => ground.close(stream, HERE),
            Heard::Broke(stream, _) if self.stream() == Some(stream) => self.broke(ground),
            Heard::Letter(from, Letter::Request { key }) => {
                ground.tally.count(Count::Requests);
                if !self.work.request(ground, &self.holder, key) {
                    let generation = self.known.generation;
                    ground.post(self.place, from, Letter::Misdirected { generation });
                }
                self.gained |= ground.flaw == Flaw::GrantGivesBack;
            }
            Heard::Letter(from, letter) => {
                self.work.letter(ground, self.holder.session(), from, letter);
            }
            Heard::Own(Own::Done { guard }) => self.work.done(ground, &self.holder, guard),
            Heard::Own(Own::Wake) => self.tick(ground, field),
            _ => {}
        }
        self.follow_work(ground);
        if self.leaving == Leaving::Done && self.work.held().is_empty() {
            self.leave(ground);
        }
        self.wake(ground);
    }

    /// Tells the holder what became of its orders.
    fn follow_work(&mut self, ground: &mut Ground) {
        let (now, news) = (ground.local(self.place), self.work.tick(ground));
        for id in news.prepared {
            self.tell(ground, |holder, out| holder.handle(now, Event::Prepared(id), out));
        }
        for id in news.released {
            self.tell(ground, |holder, out| holder.handle(now, Event::Released(id), out));
        }
    }

    /// Tells the holder something, and does what it says.
    fn tell(&mut self, ground: &mut Ground, say: impl FnOnce(&mut Holder, &mut Vec<Action>)) {
        let mut out = Vec::new();
        say(&mut self.holder, &mut out);
        for action in out {
            match action {
                Action::Renew(request) => {
                    self.asked = request;
                    self.say(ground, Say::Heartbeat { request });
                }
                Action::Extend(_) => self.gained = true,
                Action::Hold(held) => {
                    self.gained = true;
                    self.work.hold(ground, held);
                }
                Action::Prepare(coming) => {
                    let from = coming.from.and_then(|from| self.place_of(from));
                    self.work.prepare(ground, coming, from);
                }
                Action::Release(going) => {
                    ground.note(self.place, Some(going.slice), || {
                        format!("is to let go {}", going.id)
                    });
                    let to = self.place_of(going.to).unwrap_or(self.place);
                    if let Some(by) = self.holder.session() {
                        self.work.release(going, to, by);
                    }
                }
                Action::Resume(id) => self.work.resume(ground, id),
                // Whoever lets go sends what has changed, unasked.
                Action::Fetch(_) => {}
                Action::Arrived(id) => self.work.arrive(id),
                Action::Discard(id) => self.work.discard(ground, id),
                Action::Ready(id) => self.say(ground, Say::Ready(id)),
                Action::Acknowledge(id) => {
                    self.acknowledged.insert(id);
                    ground.note(self.place, None, || format!("has let go {id}"));
                    self.say(ground, Say::Acknowledge(id));
                }
                Action::Lapsed(session) => self.lapsed(ground, session),
            }
        }
    }

    fn lapsed(&mut self, ground: &mut Ground, session: SessionId) {
        ground.note(self.place, None, || format!("finds that the lease of {session} is over"));
        ground.tally.count(Count::Expiries);
        self.work.end(ground);
        self.stopped = Some(session);
        if self.leaving != Leaving::No {
            self.leaving = Leaving::Done;
        }
        self.hang_up(ground);
        self.dial(ground);
    }

    fn place_of(&self, session: SessionId) -> Option<usize> {
        let task = self.known.tasks.get(&session)?;
        place(task.info.address.as_str())
    }

    fn stream(&self) -> Option<StreamId> {
        match self.link {
            Link::Dialing { stream, .. } | Link::Attached { stream, .. } => Some(stream),
            Link::Waiting { .. } | Link::Gone => None,
        }
    }

    fn say(&self, ground: &mut Ground, say: Say) {
        if let Link::Attached { stream, .. } = self.link {
            ground.say(stream, HERE, say);
        }
    }

    fn wake(&self, ground: &mut Ground) {
        let due = match self.link {
            Link::Waiting { until } => until,
            Link::Dialing { since, .. } => since + DIAL_PATIENCE,
            Link::Attached { .. } => self.next_beat.min(self.next_report),
            Link::Gone => return,
        };
        let work = [self.work.deadline(), self.holder.deadline()];
        let due = work.into_iter().flatten().fold(due, Time::min);
        ground.wake(self.place, due);
    }

    fn tick(&mut self, ground: &mut Ground, field: &Field) {
        let now = ground.local(self.place);
        match self.link {
            Link::Waiting { until } if until <= now => self.dial(ground),
            Link::Dialing { since, .. } if since + DIAL_PATIENCE <= now => {
                self.hang_up(ground);
                self.dial(ground);
            }
            Link::Attached { to, unanswered, .. } => {
                if unanswered
                    .is_some_and(|at| now.since(at) >= ground.heartbeat * SILENT_HEARTBEATS)
                {
                    self.dialer.silent(to);
                    self.hang_up(ground);
                    return self.dial(ground);
                }
                if self.next_beat <= now {
                    self.next_beat = now + ground.heartbeat;
                    self.tell(ground, |holder, out| holder.beat(now, out));
                    self.repeat(ground);
                    if let Link::Attached { unanswered, .. } = &mut self.link {
                        unanswered.get_or_insert(now);
                    }
                }
                if self.next_report <= now {
                    self.next_report = now + REPORT_EVERY;
                    self.report(ground, field);
                }
            }
            _ => {}
        }
    }

    /// Says once more what it has said long ago: an old letter, found behind a drawer. Whoever hears it must not care.
    fn repeat(&mut self, ground: &mut Ground) {
        if self.acknowledged.len() > OLD_WORDS {
            self.acknowledged.pop_first();
        }
        if ground.prng.below(4) == 0
            && let Some(id) = self.acknowledged.last().copied()
        {
            self.say(ground, Say::Ready(id));
            self.say(ground, Say::Acknowledge(id));
        }
    }

    fn report(&self, ground: &mut Ground, field: &Field) {
        let Some(session) = self.holder.session() else { return };
        let held = self.work.held().iter();
        let loads: Vec<_> = held.map(|held| (held.slice, field.of(held.slice))).collect();
        let report = Report::new(session, self.known.generation, REPORT_EVERY, loads);
        self.say(ground, Say::Report(Box::new(report)));
    }

    // --- Finding the leader.

    fn dial(&mut self, ground: &mut Ground) {
        let now = ground.local(self.place);
        self.link = match self.dialer.next(&mut ground.prng) {
            Next::Wait(pause) => Link::Waiting { until: now + pause },
            Next::Dial(to) => {
                let stream = ground.open(self.place, to);
                let say = match self.holder.session() {
                    Some(session) => {
                        let incarnation = self.info.incarnation;
                        let known = Some(self.known.generation);
                        Say::Attach { session, incarnation, known }
                    }
                    None => {
                        let info = Box::new(self.info.clone());
                        Say::Register { info, stopped: self.stopped }
                    }
                };
                ground.say(stream, HERE, say);
                Link::Dialing { stream, to, since: now }
            }
        };
    }

    fn hang_up(&self, ground: &mut Ground) {
        if let Some(stream) = self.stream() {
            ground.close(stream, HERE);
        }
    }

    fn broke(&mut self, ground: &mut Ground) {
        if let Link::Attached { to, .. } = self.link {
            self.dialer.broken(to);
        }
        self.dial(ground);
    }

    fn said(&mut self, ground: &mut Ground, stream: StreamId, say: Say) {
        let now = ground.local(self.place);
        let (Link::Dialing { to, .. } | Link::Attached { to, .. }) = self.link else { return };
        match say {
            Say::Attached { session, lease } => {
                self.dialer.attached();
                self.link = Link::Attached { stream, to, unanswered: None };
                self.stopped = None;
                self.tell(ground, |holder, out| {
                    holder.handle(now, Event::Attached { session, lease }, out);
                });
                self.next_beat = now;
                if self.leaving == Leaving::Asked {
                    self.say(ground, Say::Drain);
                }
            }
            Say::Redirect(leader) => {
                if let Some(leader) = leader {
                    self.dialer.redirected(leader);
                }
                ground.close(stream, HERE);
                self.dial(ground);
            }
            Say::Refused(Refusal::Ended) if self.holder.session().is_some() => {
                ground.note(self.place, None, || "hears that its session has ended".to_owned());
                self.tell(ground, |holder, out| holder.handle(now, Event::Ended, out));
                self.work.end(ground);
                ground.close(stream, HERE);
                if self.leaving != Leaving::No {
                    self.leaving = Leaving::Done;
                }
                self.dialer.broken(to);
                self.dial(ground);
            }
            Say::Refused(_) => {
                ground.close(stream, HERE);
                self.dialer.refused(to);
                self.dial(ground);
            }
            Say::Grant { session, request, generation } => {
                if let Link::Attached { unanswered, .. } = &mut self.link
                    && request == self.asked
                {
                    *unanswered = None;
                }
                self.work.granted(ground);
                let event = Event::Granted { session, request, generation };
                self.tell(ground, |holder, out| holder.handle(now, event, out));
            }
            Say::Full(assignment) => self.install(ground, assignment),
            Say::Delta(delta) => match delta.apply_to(&self.known) {
                Ok(next) => self.install(ground, Arc::new(next)),
                Err(_) => self.say(ground, Say::Resync),
            },
            Say::Drained if self.leaving == Leaving::Asked => self.leaving = Leaving::Done,
            _ => {}
        }
    }

    fn install(&mut self, ground: &mut Ground, next: Arc<Assignment>) {
        // What is known never goes back: a leader that has not caught up yet soon will.
        if next.generation <= self.known.generation {
            return;
        }
        self.known = Arc::clone(&next);
        ground.tally.count(Count::Installs);
        ground.see(&Seen::Holds { who: self.place, assignment: &next });
        let now = ground.local(self.place);
        self.tell(ground, |holder, out| holder.handle(now, Event::Assigned(next), out));
    }

    fn leave(&mut self, ground: &mut Ground) {
        ground.note(self.place, None, || "leaves".to_owned());
        let now = ground.local(self.place);
        self.tell(ground, |holder, out| holder.handle(now, Event::Ended, out));
        self.work.end(ground);
        self.say(ground, Say::Leave);
        self.hang_up(ground);
        self.link = Link::Gone;
    }
}

/// The place behind an address: here the one is the other's port.
pub fn place(address: &str) -> Option<usize> {
    address.rsplit_once(':').and_then(|(_, port)| port.parse().ok())
}

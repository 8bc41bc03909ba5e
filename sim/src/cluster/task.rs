//! A task: its session with the leader, and what it serves.
//!
//! What `router-lib/src/session.rs` does, on the virtual clock: it finds the leader, registers once, attaches the same session again over
//! whatever stream holds, beats, reports, and drains before it stops.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::name::JobName;
use mandoline_core::report::Report;
use mandoline_core::slice::Slice;
use mandoline_core::task::{SessionId, TaskInfo};
use mandoline_core::time::Time;

use crate::check::Seen;
use crate::cluster::dialer::{Dialer, Next};
use crate::cluster::ground::{Ground, Heard, Own};
use crate::cluster::load::Field;
use crate::cluster::network::{Side, StreamId};
use crate::cluster::tally::Count;
use crate::cluster::wire::{Letter, Refusal, Say};

/// The side of a stream that a task is.
const HERE: Side = 0;
/// How often a task beats.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often it reports.
pub const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How long it waits for an assigner to take it on.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);
/// After so many heartbeats without a grant it asks another assigner.
const SILENT_HEARTBEATS: u32 = 2;

/// A task.
#[derive(Debug)]
pub struct Task {
    place: usize,
    job: JobName,
    info: TaskInfo,
    dialer: Dialer,
    link: Link,
    session: Option<SessionId>,
    /// The newest that was heard on the session's stream.
    known: Arc<Assignment>,
    next_beat: Time,
    next_report: Time,
    asked: u64,
    leaving: Leaving,
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
    pub fn new(place: usize, job: JobName, assigners: usize) -> Self {
        let name = format!("task-{place}").parse().expect("it is short and plain");
        let address = format!("task:{place}").parse().expect("it is a host and a port");
        let known = Assignment::new(job.clone(), mandoline_core::generation::Generation::ZERO);
        Self {
            place,
            job,
            info: TaskInfo::new(name, 0, address),
            dialer: Dialer::new((0..assigners).collect()),
            link: Link::Gone,
            session: None,
            known: Arc::new(known),
            next_beat: Time::ZERO,
            next_report: Time::ZERO,
            asked: 0,
            leaving: Leaving::No,
        }
    }

    /// Starts as a new process, which knows nothing of the one before.
    pub fn start(&mut self, ground: &mut Ground) {
        let now = ground.local(self.place);
        let assigners = ground.machines.iter().take_while(|m| m.name.starts_with("assigner"));
        let assigners = assigners.count();
        *self = Self::new(self.place, self.job.clone(), assigners);
        self.info.incarnation = ground.prng.bits();
        self.link = Link::Waiting { until: now };
        self.next_report = now + REPORT_EVERY;
        ground.see(&Seen::Started { who: self.place });
        self.wake(ground);
    }

    /// Gives what it holds.
    pub const fn known(&self) -> &Arc<Assignment> {
        &self.known
    }

    /// Says whether it has gone, in good order.
    pub fn is_gone(&self) -> bool {
        self.link == Link::Gone
    }

    /// Walks what it serves, by its own word.
    pub fn serves(&self) -> impl Iterator<Item = Slice> {
        let session = self.session.into_iter();
        session.flat_map(|session| self.known.of(session).map(|(slice, _)| slice))
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
        match heard {
            Heard::Said(stream, _, say) if self.stream() == Some(stream) => {
                self.said(ground, stream, say);
            }
            Heard::Said(stream, ..) => ground.close(stream, HERE),
            Heard::Broke(stream, _) if self.stream() == Some(stream) => self.broke(ground),
            Heard::Letter(from, Letter::Request { key }) => {
                ground.tally.count(Count::Requests);
                let owns = self.serves().any(|slice| slice.contains(key));
                if !owns {
                    let generation = self.known.generation;
                    ground.post(self.place, from, Letter::Misdirected { generation });
                }
            }
            Heard::Own(Own::Wake) => self.tick(ground, field),
            _ => {}
        }
        if self.leaving == Leaving::Done && self.serves().next().is_none() {
            self.leave(ground);
        }
        self.wake(ground);
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
                if unanswered.is_some_and(|at| now.since(at) >= HEARTBEAT * SILENT_HEARTBEATS) {
                    self.dialer.silent(to);
                    self.hang_up(ground);
                    return self.dial(ground);
                }
                if self.next_beat <= now {
                    self.next_beat = now + HEARTBEAT;
                    self.asked += 1;
                    self.say(ground, Say::Heartbeat { request: self.asked });
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

    fn report(&self, ground: &mut Ground, field: &Field) {
        let Some(session) = self.session else { return };
        let loads: Vec<_> = self.serves().map(|slice| (slice, field.of(slice))).collect();
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
                let known = Some(self.known.generation);
                let say = match self.session {
                    Some(session) => {
                        let incarnation = self.info.incarnation;
                        Say::Attach { session, incarnation, known }
                    }
                    None => {
                        let info = Box::new(self.info.clone());
                        Say::Register { info, stopped: None, known }
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
            Say::Attached(session) => {
                self.dialer.attached();
                self.session = Some(session);
                self.link = Link::Attached { stream, to, unanswered: None };
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
            Say::Refused(Refusal::Ended) if self.session.is_some() => {
                ground.note(self.place, None, || "hears that its session has ended".to_owned());
                self.session = None;
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
            Say::Grant { request, .. } if request == self.asked => {
                if let Link::Attached { unanswered, .. } = &mut self.link {
                    *unanswered = None;
                }
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
        if next.generation > self.known.generation {
            self.known = next;
            ground.tally.count(Count::Installs);
            ground.see(&Seen::Holds { who: self.place, assignment: &self.known });
        }
    }

    fn leave(&mut self, ground: &mut Ground) {
        ground.note(self.place, None, || "leaves".to_owned());
        self.say(ground, Say::Leave);
        self.hang_up(ground);
        self.link = Link::Gone;
        self.session = None;
    }
}

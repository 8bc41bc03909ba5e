//! An assigner node: its log, what it has applied, the leader while it leads, and whoever listens to it.
//!
//! What `assigner/src/node.rs` and `assigner/src/api/task.rs` do round the same machines, on the virtual clock: one connection a
//! session, the newest; whoever does not lead says who does; a session that is not known is turned away only once leadership was
//! confirmed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::command::{Command, EndReason};
use mandoline_core::delta::Delta;
use mandoline_core::generation::Generation;
use mandoline_core::leader::{Action, Event, Leader};
use mandoline_core::lease::Margin;
use mandoline_core::name::JobName;
use mandoline_core::state::{Applied, Outcome, Refused, State};
use mandoline_core::task::{Phase, SessionId, TaskInfo};
use mandoline_core::time::Time;
use mandoline_core::transit::{Act, HandOffId, Step, Transit};

use crate::check::Seen;
use crate::cluster::flaw::Flaw;
use crate::cluster::ground::{Ground, Heard, Own};
use crate::cluster::log::{Log, Ticket};
use crate::cluster::network::{Side, StreamId};
use crate::cluster::tally::Count;
use crate::cluster::tamper;
use crate::cluster::wire::{Letter, Refusal, Say};

/// The side of a stream that an assigner is.
const HERE: Side = 1;
/// After so many applied commands the state is written down, so that a restart need not apply everything anew.
const SNAPSHOT_EVERY: usize = 100;
/// How long a proposal waits for its turn at most.
const TURN_MICROS: u64 = 5_000;
/// And where others wait before it.
const QUEUE_MICROS: u64 = 2_000_000;
/// How long a proposal may take before the leader thinks again, as in the shell.
const PROPOSAL_PATIENCE: Duration = Duration::from_secs(5);

/// An assigner node.
#[derive(Debug)]
pub struct Assigner {
    place: usize,
    job: JobName,
    log: Log,
    /// Whether the disk is busy with what the log has written.
    syncing: bool,
    state: State,
    applied: usize,
    snapshot: (usize, State),
    leading: Option<Leading>,
    streams: BTreeMap<StreamId, Stream>,
    /// Proposals by their place in the log, with the term in which they were made.
    waiting: BTreeMap<usize, (u64, Waiter)>,
    /// Whoever waits for leadership to be confirmed.
    asked: BTreeMap<u64, Asked>,
    tickets: u64,
    /// Flawed: hand-offs that were called off.
    aborted: BTreeMap<HandOffId, Transit>,
}

#[derive(Debug)]
struct Leading {
    term: u64,
    leader: Leader,
    /// The newest stream of each session.
    seats: BTreeMap<SessionId, StreamId>,
}

/// Someone who listens.
#[derive(Debug)]
struct Stream {
    session: Option<(SessionId, u64)>,
    known: Option<Generation>,
    /// Whether it has begun to listen.
    listens: bool,
}

/// Whoever proposed something.
#[derive(Debug)]
enum Waiter {
    Leader(Arc<Command>),
    Register { stream: StreamId, info: Box<TaskInfo> },
    Drain(StreamId),
    Nobody,
}

#[derive(Debug)]
enum Asked {
    /// The leader, for renewals.
    Leader,
    /// Whether a session has ended.
    Ended { stream: StreamId, session: SessionId, incarnation: u64, known: Option<Generation> },
}

impl Assigner {
    /// A node that has never run.
    pub fn new(
        place: usize,
        nodes: usize,
        job: JobName,
        founding: &[Arc<Command>],
        flaw: Flaw,
    ) -> Self {
        let log = Log::new(place, nodes, founding).flawed(flaw == Flaw::ConfirmsAlone);
        Self {
            place,
            job,
            log,
            syncing: false,
            state: State::default(),
            applied: 0,
            snapshot: (0, State::default()),
            leading: None,
            streams: BTreeMap::new(),
            waiting: BTreeMap::new(),
            asked: BTreeMap::new(),
            tickets: 0,
            aborted: BTreeMap::new(),
        }
    }

    /// A node of a cluster that was restored, which has never run.
    pub fn restored(place: usize, nodes: usize, job: JobName, state: State, flaw: Flaw) -> Self {
        Self { snapshot: (0, state), ..Self::new(place, nodes, job, &[], flaw) }
    }

    /// Starts, for the first time or again.
    pub fn start(&mut self, ground: &mut Ground) {
        let now = ground.local(self.place);
        ground.see(&Seen::Started { who: self.place });
        (self.applied, self.state) = self.snapshot.clone();
        if ground.machines[self.place].life > 0 {
            self.log.restart(now, self.applied, &mut ground.prng);
        }
        self.syncing = false;
        self.leading = None;
        self.streams.clear();
        self.waiting.clear();
        self.asked.clear();
        self.settle(ground);
    }

    /// Gives what it has applied.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// Gives the assignment, as far as it was applied here.
    pub fn assignment(&self) -> Option<&Arc<Assignment>> {
        self.state.jobs.get(&self.job).map(|job| &job.assignment)
    }

    /// Says whether it leads, as far as it knows.
    pub const fn leads(&self) -> bool {
        self.leading.is_some()
    }

    /// Takes in what it hears.
    pub fn hear(&mut self, ground: &mut Ground, heard: Heard) {
        let now = ground.local(self.place);
        match heard {
            Heard::Letter(from, Letter::Log { cluster, packet }) if cluster == ground.cluster => {
                self.log.hear(now, from, packet, &mut ground.prng);
            }
            Heard::Own(Own::Wake) => {
                if self.log.deadline() <= now {
                    self.log.tick(now, &mut ground.prng);
                }
            }
            Heard::Own(Own::Synced) => {
                self.syncing = false;
                self.log.synced();
            }
            Heard::Own(Own::Planned { term, plan }) => {
                if self.leading.as_ref().is_some_and(|leading| leading.term == term) {
                    let (job, plan) = (self.job.clone(), *plan);
                    self.happen(ground, Event::Planned { job, plan });
                }
            }
            Heard::Own(Own::Proposed { term, command }) => self.proposed(ground, term, command),
            Heard::Own(Own::GivenUp { term, at }) => {
                // Nobody knows what becomes of it; it may be agreed on yet.
                if let Some((_, Waiter::Leader(command))) =
                    self.waiting.remove(&at).filter(|(of, _)| *of == term)
                {
                    self.happen(ground, Event::Failed(Command::clone(&command)));
                }
            }
            Heard::Said(stream, _, say) => self.said(ground, stream, say),
            Heard::Broke(stream, _) => self.broke(ground, stream),
            Heard::Letter(..) | Heard::Own(_) => {}
        }
        self.settle(ground);
    }

    /// Follows what the log has become: who leads, what is agreed on, what is to be sent and written.
    fn settle(&mut self, ground: &mut Ground) {
        self.follow_role(ground);
        self.apply_agreed(ground);
        self.confirmed(ground);
        if self.leading.is_some() {
            self.lead(ground, |leader, now, state, out| leader.tick(now, state, out));
        }
        if self.log.is_dirty() && !self.syncing {
            self.syncing = true;
            let takes = ground.prng.jitter(ground.disk);
            ground.own(self.place, takes, Own::Synced);
        }
        for (to, packet) in self.log.outgoing() {
            let cluster = ground.cluster;
            ground.post(self.place, to, Letter::Log { cluster, packet });
        }
        let deadline = self.leading.as_ref().and_then(|leading| leading.leader.deadline());
        ground.wake(self.place, self.log.deadline());
        if let Some(deadline) = deadline {
            ground.wake(self.place, deadline);
        }
    }

    fn follow_role(&mut self, ground: &mut Ground) {
        let term = self.log.leads();
        if term == self.leading.as_ref().map(|leading| leading.term) {
            return;
        }
        if self.leading.take().is_some() {
            ground.note(self.place, None, || "leads no more".to_owned());
            self.waiting.clear();
            self.asked.clear();
            let leader = self.log.leader();
            let sessions: Vec<StreamId> = self
                .streams
                .iter()
                .filter(|(_, stream)| stream.session.is_some() || !stream.listens)
                .map(|(id, _)| *id)
                .collect();
            for id in sessions {
                self.turn_away(ground, id, Say::Redirect(leader));
            }
        }
        if let Some(term) = term {
            ground.tally.count(Count::LeaderChanges);
            ground.note(self.place, None, || format!("leads in term {term}"));
            let now = ground.local(self.place);
            let leader = match ground.flaw {
                Flaw::NoMargin => Leader::with_margin(now, &self.state, Margin::NONE),
                Flaw::LeaderDoesNotWait => Leader::new(Time::ZERO, &self.state),
                _ => Leader::new(now, &self.state),
            };
            self.leading = Some(Leading { term, leader, seats: BTreeMap::new() });
        }
    }

    fn apply_agreed(&mut self, ground: &mut Ground) {
        while self.applied < self.log.agreed() {
            let at = self.applied;
            let entry = self.log.entry(at).clone();
            self.applied += 1;
            let waiter = self.waiting.remove(&at).filter(|(term, _)| *term == entry.term);
            let Some(command) = entry.command else { continue };
            let before = self.assignment().map(|now| now.generation);
            let applied = self.apply(ground.flaw, &command);
            if let Err(why) = &applied {
                ground.note(self.place, None, || format!("refuses {at}: {command}: {why}"));
            }
            if self.assignment().map(|now| now.generation) != before {
                let assignment = Arc::clone(self.assignment().expect("it has just changed"));
                ground.note(self.place, None, || {
                    format!("applies {at}: {command} -> {}", assignment.generation)
                });
                ground.see(&Seen::Holds { who: self.place, assignment: &assignment });
                let delta = applied.as_ref().ok().and_then(|applied| applied.delta.clone());
                self.publish(ground, &assignment, delta);
            }
            if self.leading.is_some() {
                let job = self.job.clone();
                self.happen(ground, Event::Applied { job });
            }
            if let Some((_, waiter)) = waiter {
                self.answer(ground, waiter, applied);
            }
            if self.applied.is_multiple_of(SNAPSHOT_EVERY) {
                self.snapshot = (self.applied, self.state.clone());
            }
        }
    }

    /// Applies a command, and lets every node go wrong in the same way if that is asked for.
    fn apply(&mut self, flaw: Flaw, command: &Command) -> Result<Applied, Refused> {
        if flaw == Flaw::None {
            return self.state.apply(command.clone());
        }
        let before = self.assignment().cloned();
        let applied = self.state.apply(command.clone());
        let Some(job) = self.state.jobs.get_mut(&self.job) else { return applied };
        match flaw {
            Flaw::GenerationTwice => tamper::generation_twice(job, before.as_deref()),
            Flaw::SplitWhileReleasing => tamper::split_while_releasing(job),
            Flaw::AcknowledgedAfterAbort => {
                tamper::acknowledged_after_abort(
                    job,
                    command,
                    &mut self.aborted,
                    before.as_deref(),
                );
            }
            _ => {}
        }
        applied
    }

    fn answer(&mut self, ground: &mut Ground, waiter: Waiter, applied: Result<Applied, Refused>) {
        match (waiter, applied) {
            (Waiter::Leader(command), Err(_)) => {
                self.happen(ground, Event::Failed(Command::clone(&command)));
            }
            (Waiter::Register { stream, info }, Ok(applied)) => {
                if let Outcome::Session(session) = applied.outcome {
                    ground.tally.count(Count::Sessions);
                    ground.note(self.place, None, || format!("{} is {session}", info.name));
                    self.attach(ground, stream, session, info.incarnation, None);
                }
            }
            (Waiter::Register { stream, .. }, Err(why)) => {
                let refusal = match why {
                    Refused::NameTaken { session, .. } | Refused::AddressTaken { session, .. } => {
                        let job = self.job.clone();
                        self.happen(ground, Event::Succeeded { job, session });
                        Refusal::Taken
                    }
                    _ => Refusal::Other,
                };
                self.turn_away(ground, stream, Say::Refused(refusal));
            }
            (Waiter::Drain(stream), Ok(_)) => self.look_again(ground, stream),
            (Waiter::Leader(_), Ok(_)) | (Waiter::Drain(_) | Waiter::Nobody, _) => {}
        }
    }

    fn confirmed(&mut self, ground: &mut Ground) {
        for ticket in self.log.confirmed(self.applied) {
            match self.asked.remove(&ticket.0) {
                Some(Asked::Ended { stream, session, incarnation, known }) => {
                    if self.lives(session, incarnation) {
                        self.attach(ground, stream, session, incarnation, known);
                    } else {
                        self.turn_away(ground, stream, Say::Refused(Refusal::Ended));
                    }
                }
                Some(Asked::Leader) => self.happen(ground, Event::Confirmed(true)),
                None => {}
            }
        }
    }

    // --- The leader.

    fn happen(&mut self, ground: &mut Ground, event: Event) {
        self.lead(ground, |leader, now, state, out| leader.handle(now, state, event, out));
    }

    fn lead(
        &mut self,
        ground: &mut Ground,
        ask: impl FnOnce(&mut Leader, Time, &State, &mut Vec<Action>),
    ) {
        let Some(leading) = &mut self.leading else { return };
        let (now, term) = (ground.local(self.place), leading.term);
        let mut out = Vec::new();
        ask(&mut leading.leader, now, &self.state, &mut out);
        for action in out {
            match action {
                Action::Propose(command) => {
                    // It waits for its turn, and this node may be deposed and elected again meanwhile.
                    let most = if ground.prng.below(20) == 0 { QUEUE_MICROS } else { TURN_MICROS };
                    let turn = Duration::from_micros(ground.prng.below(most));
                    let command = Arc::new(command);
                    ground.own(self.place, turn, Own::Proposed { term, command });
                }
                Action::Confirm => self.confirm(ground, Asked::Leader),
                Action::Grant { session, request, generation, .. } => {
                    let seat = self.leading.as_ref().and_then(|l| l.seats.get(&session)).copied();
                    if let Some(stream) = seat {
                        ground.say(stream, HERE, Say::Grant { session, request, generation });
                    }
                }
                Action::Plan(round) => ground.plan(self.place, term, &round),
                // No job here is exclusive yet.
                Action::Drained { session, .. } => {
                    let seat = self.leading.as_ref().and_then(|l| l.seats.get(&session)).copied();
                    if let Some(stream) = seat {
                        self.look_again(ground, stream);
                    }
                }
            }
        }
    }

    /// A proposal of the leader has its turn. That a session lapsed is written only in the term in which it was found.
    fn proposed(&mut self, ground: &mut Ground, term: u64, command: Arc<Command>) {
        let lost = matches!(*command, Command::End { reason: EndReason::Lost, .. });
        if self.log.leads().is_none_or(|now| lost && now != term) {
            return self.happen(ground, Event::Failed(Command::clone(&command)));
        }
        let waiter = Waiter::Leader(Arc::clone(&command));
        self.propose(ground, command, waiter);
    }

    fn propose(&mut self, ground: &mut Ground, command: Arc<Command>, waiter: Waiter) {
        let now = ground.local(self.place);
        if let (Some(term), Some(at)) = (self.log.leads(), self.log.propose(now, command)) {
            if matches!(waiter, Waiter::Leader(_)) {
                ground.own(self.place, PROPOSAL_PATIENCE, Own::GivenUp { term, at });
            }
            self.waiting.insert(at, (term, waiter));
        }
    }

    fn confirm(&mut self, ground: &mut Ground, asked: Asked) {
        self.tickets += 1;
        if self.log.confirm(ground.local(self.place), Ticket(self.tickets)) {
            self.asked.insert(self.tickets, asked);
        }
    }

    // --- Whoever listens.

    fn said(&mut self, ground: &mut Ground, id: StreamId, say: Say) {
        let known = self.streams.get(&id).and_then(|stream| stream.session);
        match (say, known) {
            (Say::Watch { known }, None) => {
                let stream = Stream { session: None, known, listens: true };
                self.streams.insert(id, stream);
                ground.say(id, HERE, Say::Opened);
                self.catch_up(ground, id);
            }
            (Say::Register { info, stopped }, None) => {
                let Some(stream) = self.begin(ground, id) else { return };
                self.streams.insert(id, stream);
                if ground.flaw == Flaw::OwnershipByName
                    && let Some(session) = self.named(&info)
                {
                    return self.attach(ground, id, session, info.incarnation, None);
                }
                let (job, told) = (self.job.clone(), Box::clone(&info));
                let command = Command::Register { job, info: *told, stopped };
                let waiter = Waiter::Register { stream: id, info };
                self.propose(ground, Arc::new(command), waiter);
            }
            (Say::Attach { session, incarnation, known }, None) => {
                let Some(stream) = self.begin(ground, id) else { return };
                self.streams.insert(id, stream);
                if self.lives(session, incarnation) {
                    self.attach(ground, id, session, incarnation, known);
                } else {
                    // Only who surely leads can say that a session has ended: another may have begun it meanwhile.
                    let asked = Asked::Ended { stream: id, session, incarnation, known };
                    self.confirm(ground, asked);
                }
            }
            (say, Some((session, _))) => self.said_by(ground, id, session, say),
            // Too early, or by someone who makes no sense.
            _ => {}
        }
    }

    /// A stream that wants a session: only a leader takes it.
    fn begin(&mut self, ground: &mut Ground, id: StreamId) -> Option<Stream> {
        if self.leading.is_some() {
            return Some(Stream { session: None, known: None, listens: false });
        }
        let leader = self.log.leader();
        self.turn_away(ground, id, Say::Redirect(leader));
        None
    }

    fn said_by(&mut self, ground: &mut Ground, id: StreamId, session: SessionId, say: Say) {
        let job = self.job.clone();
        match say {
            Say::Heartbeat { request } if self.lease(session).is_some() => {
                self.happen(ground, Event::Renewed { job, session, request });
            }
            Say::Heartbeat { request } => {
                self.happen(ground, Event::Heard { job, session });
                let generation = self.assignment().map(|now| now.generation).unwrap_or_default();
                ground.say(id, HERE, Say::Grant { session, request, generation });
            }
            Say::Ready(hand_off) => {
                self.happen(ground, Event::Ready { job, session, id: hand_off });
            }
            Say::Acknowledge(hand_off) => {
                let hand_off = self.believed(ground, session, hand_off);
                self.happen(ground, Event::Acknowledged { job, session, id: hand_off });
            }
            Say::Report(report) => self.happen(ground, Event::Reported { job, report: *report }),
            Say::Drain => {
                let command = Arc::new(Command::Drain { job, session });
                self.propose(ground, command, Waiter::Drain(id));
            }
            Say::Leave => {
                let command = Command::End { job, session, reason: EndReason::Left };
                self.propose(ground, Arc::new(command), Waiter::Nobody);
                ground.close(id, HERE);
                self.broke(ground, id);
            }
            Say::Resync => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.known = None;
                    self.catch_up(ground, id);
                }
            }
            _ => {}
        }
    }

    /// Which hand-off an acknowledgement is taken to be of: its own, unless that is what is wrong.
    fn believed(&mut self, ground: &mut Ground, session: SessionId, id: HandOffId) -> HandOffId {
        let Some(now) = self.assignment() else { return id };
        let transit = now.get(id.first).1.transit.as_deref();
        match (ground.flaw, transit) {
            (Flaw::StaleAcknowledgement, Some(other))
                if other.step == Step::Releasing && other.from == Some(session) =>
            {
                other.id
            }
            (Flaw::AcknowledgedAfterAbort, _) if self.aborted.contains_key(&id) => {
                let steps = vec![(id, Act::Acknowledged { by: session })];
                let command = Command::HandOff { job: self.job.clone(), steps };
                self.propose(ground, Arc::new(command), Waiter::Nobody);
                id
            }
            _ => id,
        }
    }

    fn lease(&self, session: SessionId) -> Option<Duration> {
        self.assignment()?.tasks.get(&session)?.lease
    }

    fn named(&self, info: &TaskInfo) -> Option<SessionId> {
        let mut tasks = self.assignment()?.tasks.values();
        tasks.find(|task| task.info.name == info.name).map(|task| task.session)
    }

    fn lives(&self, session: SessionId, incarnation: u64) -> bool {
        let task = self.assignment().and_then(|now| now.tasks.get(&session));
        task.is_some_and(|task| task.info.incarnation == incarnation)
    }

    fn attach(
        &mut self,
        ground: &mut Ground,
        id: StreamId,
        session: SessionId,
        incarnation: u64,
        known: Option<Generation>,
    ) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Some(leading) = &mut self.leading else { return };
        *stream = Stream { session: Some((session, incarnation)), known, listens: true };
        if let Some(before) = leading.seats.insert(session, id) {
            self.streams.remove(&before);
            ground.close(before, HERE);
        }
        let lease = self.lease(session);
        ground.say(id, HERE, Say::Attached { session, lease });
        let job = self.job.clone();
        self.happen(ground, Event::Attached { job, session });
        self.catch_up(ground, id);
        self.look_again(ground, id);
    }

    fn turn_away(&mut self, ground: &mut Ground, id: StreamId, why: Say) {
        ground.say(id, HERE, why);
        ground.close(id, HERE);
        self.streams.remove(&id);
    }

    fn broke(&mut self, ground: &mut Ground, id: StreamId) {
        let Some(Stream { session: Some((session, _)), .. }) = self.streams.remove(&id) else {
            return;
        };
        let Some(leading) = &mut self.leading else { return };
        if leading.seats.get(&session) == Some(&id) {
            leading.seats.remove(&session);
            let job = self.job.clone();
            self.happen(ground, Event::Broken { job, session });
        }
    }

    /// Tells a task that it has nothing left to wait for.
    fn look_again(&self, ground: &mut Ground, id: StreamId) {
        let session = self.streams.get(&id).and_then(|stream| stream.session);
        let (Some((session, _)), Some(now)) = (session, self.assignment()) else { return };
        let leaves = now.tasks.get(&session).is_some_and(|task| task.phase == Phase::Draining);
        if leaves && now.of(session).next().is_none() {
            ground.say(id, HERE, Say::Drained);
        }
    }

    // --- The hub.

    fn publish(&mut self, ground: &mut Ground, now: &Arc<Assignment>, delta: Option<Delta>) {
        let delta = delta.map(Arc::new);
        // Flawed: a change is left out here, and the next is made to fit.
        if ground.flaw == Flaw::DeltaOverGap && now.generation.number % 50 == 20 {
            return;
        }
        let mut over = Vec::new();
        for (id, stream) in self.streams.iter_mut().filter(|(_, stream)| stream.listens) {
            let fits = delta.as_ref().filter(|delta| stream.known == Some(delta.from));
            let say = match (fits, &delta, stream.known) {
                (Some(delta), ..) => Say::Delta(Arc::clone(delta)),
                (None, Some(delta), Some(from)) if ground.flaw == Flaw::DeltaOverGap => {
                    Say::Delta(Arc::new(Delta { from, ..Delta::clone(delta) }))
                }
                _ => Say::Full(Arc::clone(now)),
            };
            stream.known = Some(now.generation);
            ground.say(*id, HERE, say);
            if stream.session.is_some_and(|(session, _)| !now.tasks.contains_key(&session)) {
                over.push(*id);
            }
        }
        for id in over {
            self.turn_away(ground, id, Say::Refused(Refusal::Ended));
        }
    }

    /// Gives a listener everything, unless it has that.
    fn catch_up(&mut self, ground: &mut Ground, id: StreamId) {
        let Some(now) = self.assignment().cloned() else { return };
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.known.replace(now.generation) != Some(now.generation) {
            ground.say(id, HERE, Say::Full(now));
        }
    }
}

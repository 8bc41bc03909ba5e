//! A task's session with the leader, from registration to leaving.
//!
//! One loop on a thread of its own, so that a busy application cannot cost the session. It finds the leader, registers
//! once, and from then on attaches the same session again over whatever connection holds; it says every heartbeat that
//! the task lives, and takes in what comes back. While no assigner answers the task goes on with what it last knew.
//!
//! Only the leader's word that the session has ended makes it register anew; all it owned is dropped first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::generation::Generation;
use mandoline_core::lease::{Action, Event, Going, Holder, Margin};
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, SessionId, TaskInfo};
use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;
use mandoline_distributor::hub::Hub;
use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request;
use mandoline_proto::update::{Assembler, Update};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::boot_clock::Clock;
use crate::dialer::{Dialer, Next, PAUSE_MAX};
use crate::install::{Install, Settle, Work};
use crate::life::{Beats, Pulse};
use crate::link::{Connection, Dialed, Link, Step, Way};
use crate::moving::Moving;
use crate::overheard::Overheard;
use crate::owned::{Owned, Window};
use crate::steps::{Calls, Done, Steps};
use crate::term::Term;

/// How long a goodbye may take to be heard.
const LEAVE_PATIENCE: Duration = Duration::from_millis(500);
/// Heartbeats without a grant after which another assigner is asked.
const SILENT_HEARTBEATS: u32 = 2;
/// Until the leader has said otherwise.
const FIRST_HEARTBEAT: Duration = Duration::from_secs(1);
const FIRST_REPORT_EVERY: Duration = Duration::from_secs(5);

/// How a task stands with the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// In touch: what it owns is what the leader says.
    Attached {
        /// The session, as the leader minted it.
        session: SessionId,
        /// Who leads.
        leader: Address,
    },
    /// Out of touch: it serves what it last knew, and keeps trying.
    Alone {
        /// Since when.
        since: Instant,
        /// What stands in the way, as of the last try.
        why: Why,
    },
    /// Shut down: it owns nothing.
    Stopped,
}

/// Why a task is out of touch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// No assigner has answered yet.
    #[error("no assigner has answered yet")]
    Starting,
    /// An assigner could not be reached, or broke off.
    #[error("cannot talk to assigner {address}: {problem}")]
    Unreachable {
        /// Which one.
        address: Address,
        /// What happened.
        problem: String,
    },
    /// The assigner that was asked does not lead, and knows nobody who does.
    #[error("nobody leads, says assigner {0}")]
    NoLeader(Address),
    /// The leader stopped granting.
    #[error("assigner {0} has not answered two heartbeats")]
    Silent(Address),
    /// The application's runtime does not run its tasks, so the task must not pass for alive.
    #[error("the application's runtime hangs: it ran no task for a heartbeat")]
    Hung,
    /// The lease has run out; a new session is being registered.
    #[error("the lease of {0} has run out: registering anew")]
    Lapsed(SessionId),
    /// The leader ended the session; a new one is being registered.
    #[error("session {0} has ended: registering anew")]
    Ended(SessionId),
    /// Nobody has made the job yet.
    #[error("{0}")]
    NoSuchJob(String),
    /// Another process lives under this task's name.
    #[error("{0}")]
    NameTaken(String),
    /// Another task serves at this task's address.
    #[error("{0}")]
    AddressTaken(String),
    /// The leader refused what the task says of itself.
    #[error("{0}")]
    Refused(String),
}

impl State {
    pub(crate) fn starting() -> Self {
        Self::Alone { since: Instant::now(), why: Why::Starting }
    }
}

impl Why {
    /// Says whether the leader refused the task itself.
    pub(crate) const fn is_refusal(&self) -> bool {
        matches!(self, Self::NameTaken(_) | Self::AddressTaken(_) | Self::Refused(_))
    }
}

/// What the application asks of a session that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Have the slices moved away, then leave.
    Drain,
}

/// What a session is begun with.
pub(crate) struct Setup {
    pub(crate) job: JobName,
    pub(crate) info: TaskInfo,
    pub(crate) assigners: Vec<Address>,
    pub(crate) way: Way,
    /// What leases are counted by.
    pub(crate) clock: Clock,
    pub(crate) owned: Arc<Owned>,
    pub(crate) start: Arc<Assignment>,
    /// The application's runtime, if it is to be watched.
    pub(crate) probe: Option<Handle>,
    pub(crate) orders: mpsc::Receiver<Order>,
    pub(crate) state: watch::Sender<State>,
    /// How many slices this task left that nobody was there to take.
    pub(crate) left: Arc<AtomicUsize>,
    /// Hears of every assignment, for peers.
    pub(crate) hub: Hub,
    /// What the application does at the steps of a hand-off.
    pub(crate) calls: Calls,
    pub(crate) moving: Option<Moving>,
    pub(crate) stop: CancellationToken,
}

/// A task's session with the leader.
pub(crate) struct Session {
    setup: Setup,
    dialer: Dialer,
    link: Link,
    id: Option<SessionId>,
    /// A session of this process that is over, which whoever leads may not know yet.
    stopped: Option<SessionId>,
    /// What may be served, by what is known.
    holder: Holder,
    /// The same, as every check reads it; only where slices have owners.
    term: Option<Arc<Term>>,
    steps: Steps,
    /// Slices that are being released, until their last guard is gone.
    going: BTreeMap<HandOffId, Going>,
    settle: Settle,
    // The newest that was heard; `owned` may still be busy with the one before.
    known: Arc<Assignment>,
    assembler: Assembler,
    /// While out of touch, of a job whose slices have no owners.
    overheard: Option<Overheard>,
    install: Install,
    window: Window,
    heartbeat: Duration,
    report_every: Duration,
    next_beat: Instant,
    next_report: Instant,
    pulse: Option<Pulse>,
    drain: Drain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    No,
    Asked,
    Done,
    /// Nobody is there to take what this task has.
    InVain,
}

enum Heard {
    Stop,
    Order(Order),
    Installed,
    Beat,
    Report,
    Step(Step),
    Overheard(Arc<Assignment>),
    Done(Done),
    Drained,
    Lease,
}

impl Session {
    pub(crate) fn new(setup: Setup) -> Self {
        let now = Instant::now();
        let dialer = Dialer::new(setup.assigners.clone(), setup.info.incarnation);
        let window = Window::begin(&setup.owned, now);
        let pulse = setup.probe.clone().map(Pulse::new);
        let known = Arc::clone(&setup.start);
        let steps = Steps::new(setup.calls.clone(), setup.moving.clone());
        let settle = steps.settle(false);
        Self {
            setup,
            dialer,
            link: Link::wait(Duration::ZERO),
            id: None,
            stopped: None,
            holder: Holder::new(Margin::STANDARD),
            term: None,
            steps,
            going: BTreeMap::new(),
            settle,
            known,
            assembler: Assembler::default(),
            overheard: None,
            install: Install::default(),
            window,
            heartbeat: FIRST_HEARTBEAT,
            report_every: FIRST_REPORT_EVERY,
            next_beat: now,
            next_report: now + FIRST_REPORT_EVERY,
            pulse,
            drain: Drain::No,
        }
    }

    /// Runs until it is stopped, or drained and empty.
    pub(crate) async fn run(mut self) {
        loop {
            let heard = tokio::select! {
                biased;
                () = self.setup.stop.cancelled() => Heard::Stop,
                () = lease_ends(&self.holder, &self.setup.clock) => Heard::Lease,
                () = self.setup.owned.drained.notified() => Heard::Drained,
                done = self.steps.next() => Heard::Done(done),
                Some(order) = self.setup.orders.recv() => Heard::Order(order),
                () = self.install.done() => Heard::Installed,
                () = sleep_until(self.next_beat) => Heard::Beat,
                () = sleep_until(self.next_report) => Heard::Report,
                step = self.link.next() => Heard::Step(step),
                Some(news) = overheard(&mut self.overheard) => Heard::Overheard(news),
            };
            match heard {
                Heard::Stop => break,
                Heard::Order(Order::Drain) => self.drain(),
                Heard::Installed => self.installed(),
                Heard::Lease => self.hold(|holder, now, out| holder.tick(now, out)),
                Heard::Drained => self.let_go(),
                Heard::Done(Done::Prepared(id)) => self.happen(Event::Prepared(id)),
                Heard::Done(Done::Released(id)) => self.happen(Event::Released(id)),
                Heard::Beat => self.beat(),
                Heard::Report => self.report(),
                Heard::Step(Step::Waited) => self.dial(),
                Heard::Step(Step::Dialed(dialed)) => self.dialed(dialed),
                Heard::Step(Step::Reply(reply)) => self.reply(reply),
                Heard::Step(Step::Broke(problem)) => self.broke(problem),
                Heard::Overheard(assignment) => self.learn(assignment, None),
            }
            if self.is_drained() {
                break;
            }
        }
        self.leave().await;
    }

    fn is_drained(&self) -> bool {
        match self.drain {
            Drain::No | Drain::Asked => false,
            Drain::Done => self.install.is_idle() && self.setup.owned.view().owned() == 0,
            Drain::InVain => true,
        }
    }

    // --- Finding the leader.

    fn dial(&mut self) {
        if self.is_hung() {
            // Attaching would say that the task lives.
            self.alone(Why::Hung);
            self.link = Link::wait(self.heartbeat);
            return;
        }
        self.link = match self.dialer.next() {
            Next::Wait(pause) => Link::wait(pause),
            Next::Dial(address) => {
                let way = self.setup.way.clone();
                Link::dial(way, address, self.first_request())
            }
        };
    }

    fn first_request(&self) -> Request {
        let job = self.setup.job.to_string();
        let known =
            (self.known.generation > Generation::ZERO).then(|| self.known.generation.into());
        match self.id {
            Some(SessionId(session)) => {
                let incarnation = self.setup.info.incarnation;
                Request::Attach(pb::Attach { job, session, known, incarnation })
            }
            None => {
                let info = Some((&self.setup.info).into());
                let stopped = self.stopped.map_or(0, |session| session.0);
                Request::Register(pb::Register { job, info, stopped, known })
            }
        }
    }

    fn dialed(&mut self, dialed: Dialed) {
        match dialed {
            Dialed::On(connection, attached) => self.attached(connection, &attached),
            Dialed::Elsewhere(asked, leader) => self.elsewhere(asked, leader),
            Dialed::Refused(asked, refused) => self.refused(asked, refused),
            Dialed::Failed(address, problem) => {
                tracing::debug!(%address, problem, "cannot attach to assigner");
                self.alone(Why::Unreachable { address, problem });
                self.dial();
            }
        }
    }

    fn attached(&mut self, mut connection: Box<Connection>, attached: &pb::Attached) {
        let session = SessionId(attached.session);
        let leader = connection.leader.clone();
        tracing::info!(job = %self.setup.job, task = %self.setup.info.name, %session, %leader, "attached");
        let renewed = self.id.replace(session) != Some(session);
        self.assembler = Assembler::default();
        self.keep_pace(attached);
        connection.beats = Beats::after(self.holder.asked(), Instant::now());
        self.link = Link::Attached(connection);
        self.overheard = None;
        self.setup.state.send_replace(State::Attached { session, leader });
        let lease = (attached.lease_ms > 0).then(|| Duration::from_millis(attached.lease_ms));
        if renewed {
            self.stopped = None;
            self.term = lease.map(|_| Arc::new(Term::leased_by(self.setup.clock.clone(), session)));
            self.settle = self.steps.settle(lease.is_some());
            if let Some(term) = &self.term {
                self.setup.owned.begin(Arc::clone(term), Arc::clone(&self.known));
            }
        }
        self.happen(Event::Attached { session, lease });
        if lease.is_some() {
            // Nothing is served before the first grant.
            self.next_beat = Instant::now();
        }
        if self.drain == Drain::Asked {
            self.send(Request::Drain(pb::Drain {}));
        }
    }

    /// Speaks as often as the job's spec says.
    fn keep_pace(&mut self, attached: &pb::Attached) {
        let now = Instant::now();
        self.heartbeat = millis(attached.heartbeat_ms, FIRST_HEARTBEAT);
        self.next_beat = now + self.heartbeat;
        self.dialer.attached(self.heartbeat);
        let report_every = millis(attached.report_every_ms, FIRST_REPORT_EVERY);
        if report_every != self.report_every {
            self.report_every = report_every;
            self.next_report = now + report_every;
        }
    }

    fn elsewhere(&mut self, asked: Address, leader: Option<Address>) {
        match leader {
            Some(leader) => self.dialer.redirected(leader),
            None => self.alone(Why::NoLeader(asked)),
        }
        self.dial();
    }

    fn refused(&mut self, by: Address, refused: pb::Refused) {
        let code = refused.code();
        let pb::Refused { message, .. } = refused;
        let why = match (code, self.id) {
            (pb::RefusedCode::NoSuchSession, Some(session)) => return self.ended(session, by),
            (pb::RefusedCode::NoSuchJob, _) => Why::NoSuchJob(message),
            (pb::RefusedCode::NameTaken, _) => Why::NameTaken(message),
            (pb::RefusedCode::AddressTaken, _) => Why::AddressTaken(message),
            _ => Why::Refused(message),
        };
        tracing::warn!(assigner = %by, %why, "refused");
        self.alone(why);
        self.dialer.refused(by);
        self.dial();
    }

    /// The session is over: the task owns nothing until a new one is given something.
    fn ended(&mut self, session: SessionId, by: Address) {
        self.happen(Event::Ended);
        self.forget();
        self.alone(Why::Ended(session));
        if self.drain != Drain::No {
            // That was to come anyway.
            self.drain = Drain::Done;
            self.link = Link::wait(PAUSE_MAX);
            return;
        }
        tracing::warn!(job = %self.setup.job, %session, "the session has ended; registering anew");
        self.dialer.broken(by);
        self.dial();
    }

    /// Owns nothing from now on.
    fn forget(&mut self) {
        self.id = None;
        self.overheard = None;
        self.going.clear();
        // A leader that does not know the session may lead another cluster in the place of the one before, whose
        // generations begin anew: what it says next counts, whatever was known.
        let known = std::mem::replace(&mut self.known, Arc::clone(&self.setup.start));
        // Before the application lets go of what peers may be reading.
        self.steps.knows(&self.setup.owned, &self.known);
        match self.term.take() {
            Some(_) => {
                self.setup.owned.lapse(known);
                self.welcome();
            }
            None => self.take_on(known),
        }
    }

    /// The lease has run out: nothing is served any more, and a new session has to begin with nothing.
    fn lapsed(&mut self, session: SessionId) {
        tracing::warn!(job = %self.setup.job, %session, "the lease has run out; registering anew");
        self.stopped = Some(session);
        self.forget();
        self.alone(Why::Lapsed(session));
        if self.drain != Drain::No {
            self.drain = Drain::Done;
            self.link = Link::wait(PAUSE_MAX);
            return;
        }
        self.dial();
    }

    fn broke(&mut self, problem: String) {
        let Link::Attached(connection) = &self.link else { return };
        let address = connection.leader.clone();
        tracing::info!(%address, problem, "the session's connection broke");
        self.dialer.broken(address.clone());
        self.alone(Why::Unreachable { address, problem });
        self.dial();
    }

    /// Says what stands in the way; since when stays. Where slices have no owners, others are listened to meanwhile.
    fn alone(&mut self, why: Why) {
        let listens = self.id.is_some() && self.term.is_none() && why != Why::Hung;
        if listens && self.overheard.is_none() {
            let Setup { job, info, way, assigners, .. } = &self.setup;
            self.overheard = Overheard::begin(job, &info.name, way, assigners, &self.known);
        }
        self.setup.state.send_modify(|state| {
            let since = match state {
                State::Alone { since, .. } => *since,
                State::Attached { .. } | State::Stopped => Instant::now(),
            };
            *state = State::Alone { since, why };
        });
    }

    // --- While attached.

    fn send(&mut self, request: Request) {
        let Link::Attached(connection) = &self.link else { return };
        let request = pb::SessionRequest { request: Some(request) };
        if let Err(error) = connection.requests.try_send(request) {
            self.broke(format!("a request could not be sent: {error}"));
        }
    }

    fn is_hung(&self) -> bool {
        self.pulse.as_ref().is_some_and(|pulse| pulse.is_missed(self.heartbeat / 2))
    }

    fn beat(&mut self) {
        let now = Instant::now();
        self.next_beat = now + self.heartbeat;
        let hung = self.is_hung();
        if let Some(pulse) = &mut self.pulse {
            pulse.beat();
        }
        let Link::Attached(connection) = &mut self.link else { return };
        if hung {
            if connection.beats.pause(now) {
                tracing::error!("the application's runtime hangs: no heartbeat while it does");
            }
            self.alone(Why::Hung);
            return;
        }
        if connection.beats.are_unanswered(now, self.heartbeat * SILENT_HEARTBEATS) {
            let leader = connection.leader.clone();
            tracing::warn!(%leader, "the leader does not answer heartbeats; asking another");
            self.dialer.silent(&leader);
            self.alone(Why::Silent(leader));
            return self.dial();
        }
        connection.beats.next(now);
        if let Some(session) = self.id {
            // Back from a hang.
            let leader = connection.leader.clone();
            self.setup.state.send_if_modified(|state| {
                let back = matches!(state, State::Alone { why: Why::Hung, .. });
                if back {
                    *state = State::Attached { session, leader };
                }
                back
            });
        }
        self.hold(|holder, now, out| holder.beat(now, out));
    }

    // --- What is held.

    fn happen(&mut self, event: Event) {
        self.hold(|holder, now, out| holder.handle(now, event, out));
    }

    /// Asks the holder, and does what it says.
    fn hold(&mut self, ask: impl FnOnce(&mut Holder, Time, &mut Vec<Action>)) {
        let mut out = Vec::new();
        ask(&mut self.holder, self.setup.clock.now(), &mut out);
        for action in out {
            match action {
                Action::Renew(request) => {
                    self.send(Request::Heartbeat(pb::Heartbeat { request }));
                }
                Action::Extend(until) => {
                    // A check that came first may have found that it was over.
                    if self.term.as_ref().is_some_and(|term| !term.extend(until))
                        && let Some(session) = self.id
                    {
                        self.happen(Event::Ended);
                        return self.lapsed(session);
                    }
                }
                Action::Hold(held) => {
                    if self.term.is_some() && self.holder.session().is_some() {
                        self.setup.owned.hold(Arc::clone(&self.known), held);
                        self.welcome();
                    }
                }
                Action::Prepare(coming) => {
                    if let Some(me) = self.id {
                        self.steps.prepare(me, coming, &self.known);
                    }
                }
                Action::Fetch(id) => self.steps.fetch(id),
                Action::Discard(id) => self.steps.discard(id),
                Action::Arrived(id) => self.setup.owned.arrived(id, &self.known),
                Action::Release(going) => drop(self.going.insert(going.id, going)),
                Action::Resume(id) => {
                    self.going.remove(&id);
                    let (slice, _) = self.known.get(id.first);
                    self.steps.resume(id, slice);
                }
                Action::Ready(id) => self.send(Request::Ready(id.into())),
                Action::Acknowledge(id) => self.send(Request::Acknowledge(id.into())),
                Action::Lapsed(session) => return self.lapsed(session),
            }
        }
        self.let_go();
    }

    /// Has the application let go of what is being released, where no guard is left.
    fn let_go(&mut self) {
        if self.going.is_empty() {
            return;
        }
        let view = self.setup.owned.view();
        let is_drained =
            |id: HandOffId| view.tenures().is_none_or(|tenures| tenures.is_drained(id));
        let drained: Vec<HandOffId> =
            self.going.keys().copied().filter(|id| is_drained(*id)).collect();
        drop(view);
        for going in drained.iter().filter_map(|id| self.going.remove(id)) {
            self.steps.release(&self.setup.owned, going);
        }
    }

    fn report(&mut self) {
        let now = Instant::now();
        self.next_report = now + self.report_every;
        // Counted also while nobody listens: a window that spans an outage would blur what comes after it.
        let report = self.window.close(&self.setup.owned, now);
        if let Some(report) = report.filter(|report| Some(report.session) == self.id) {
            self.send(Request::Report((&report).into()));
        }
    }

    fn reply(&mut self, reply: Option<Reply>) {
        let Link::Attached(connection) = &mut self.link else { return };
        match reply {
            Some(Reply::Grant(grant)) => {
                connection.beats.granted(grant.request, Instant::now());
                if let (Some(session), Some(generation)) = (self.id, grant.generation) {
                    let (request, generation) = (grant.request, generation.into());
                    self.happen(Event::Granted { session, request, generation });
                }
            }
            Some(Reply::Update(bytes)) => self.update(&bytes),
            Some(Reply::Redirect(redirect)) => {
                let asked = connection.leader.clone();
                let leader = redirect.address.parse().ok();
                self.alone(Why::NoLeader(asked.clone()));
                self.elsewhere(asked, leader);
            }
            Some(Reply::Refused(refused)) => {
                let by = connection.leader.clone();
                self.refused(by, refused);
            }
            Some(Reply::Drained(pb::Drained { alone })) if self.drain == Drain::Asked => {
                self.drain = if alone { Drain::InVain } else { Drain::Done };
            }
            Some(Reply::Warning(warning)) => {
                tracing::warn!(warning, "the leader refused a message");
            }
            Some(Reply::Attached(attached)) if Some(SessionId(attached.session)) == self.id => {
                self.keep_pace(&attached);
            }
            Some(Reply::Drained(_) | Reply::Attached(_)) | None => {
                tracing::debug!("the leader said something that means nothing here");
            }
        }
    }

    fn update(&mut self, bytes: &Bytes) {
        let (next, delta) = match self.assembler.take_bytes(bytes) {
            Ok(None) => return,
            Ok(Some(Update::Unknown(job))) => {
                tracing::debug!(%job, "the leader has no assignment of the job yet");
                return;
            }
            Ok(Some(Update::Full(full))) => (Arc::new(full), None),
            Ok(Some(Update::Delta(delta))) => match delta.apply_to(&self.known) {
                Ok(next) => (Arc::new(next), Some(delta)),
                Err(error) => return self.resync(&error),
            },
            Err(error) => {
                self.assembler = Assembler::default();
                return self.resync(&error);
            }
        };
        self.learn(next, delta.as_ref());
    }

    /// Works with an assignment from now on, and with the step that led to it if it was one.
    fn learn(&mut self, next: Arc<Assignment>, delta: Option<&Delta>) {
        // What is known never goes back: a leader that has not caught up yet soon will.
        if next.job != self.setup.job || next.generation < self.known.generation {
            return;
        }
        self.setup.hub.publish(Arc::clone(&next), delta);
        self.known = Arc::clone(&next);
        // What is over, before the application lets go of it; and below what has begun, once it is in force.
        self.steps.knows(&self.setup.owned, &next);
        self.happen(Event::Assigned(Arc::clone(&next)));
        self.steps.knows(&self.setup.owned, &next);
        if self.term.is_none() {
            self.take_on(next);
        }
    }

    fn resync(&mut self, error: &dyn std::fmt::Display) {
        tracing::info!(%error, known = %self.known.generation, "asking for the full assignment");
        self.send(Request::Resync(pb::Resync {}));
    }

    // --- Taking assignments on.

    fn take_on(&mut self, assignment: Arc<Assignment>) {
        let work = Work::Install(self.id, assignment, Arc::clone(&self.settle));
        self.install.begin(&self.setup.owned, work);
    }

    /// Of an exclusive job: has the application told of what came and went.
    fn welcome(&mut self) {
        self.install.begin(&self.setup.owned, Work::Welcome(Arc::clone(&self.settle)));
    }

    fn installed(&mut self) {
        self.install.next(&self.setup.owned);
        self.steps.knows(&self.setup.owned, &self.known);
        // Whoever waits to be ready looks again.
        self.setup.state.send_modify(|_| ());
    }

    // --- Leaving.

    fn drain(&mut self) {
        if self.drain == Drain::No {
            self.drain = Drain::Asked;
            self.send(Request::Drain(pb::Drain {}));
        }
        // Nobody has to hear of a task that has nothing; if it is registered it will be found lost.
        if !matches!(self.link, Link::Attached(_)) && self.setup.owned.view().owned() == 0 {
            self.drain = Drain::Done;
        }
    }

    async fn leave(mut self) {
        if self.drain == Drain::InVain {
            self.setup.left.store(self.setup.owned.view().owned(), Ordering::Relaxed);
        }
        // What is owned goes first, so that nobody else serves it while this task still would.
        self.forget();
        while !self.install.is_idle() {
            self.install.done().await;
            self.install.next(&self.setup.owned);
        }
        if let Link::Attached(connection) = self.link {
            let Connection { requests, mut replies, .. } = *connection;
            let goodbye = pb::SessionRequest { request: Some(Request::Leave(pb::Leave {})) };
            let _ = timeout(LEAVE_PATIENCE, async {
                if requests.send(goodbye).await.is_ok() {
                    drop(requests);
                    while let Ok(Some(_)) = replies.message().await {}
                }
            })
            .await;
        }
        self.setup.state.send_replace(State::Stopped);
    }
}

/// Waits until the lease runs out, if there is one. The clock that it runs by counts suspend, which timers do not, so the
/// checks themselves do not rely on this.
async fn lease_ends(holder: &Holder, clock: &Clock) {
    match holder.deadline() {
        Some(ends) => sleep(ends.since(clock.now())).await,
        None => std::future::pending().await,
    }
}

/// What others say, if they are listened to.
async fn overheard(overheard: &mut Option<Overheard>) -> Option<Arc<Assignment>> {
    Some(overheard.as_mut()?.next().await)
}

fn millis(millis: u64, otherwise: Duration) -> Duration {
    // An assigner that says nothing sensible must not make the loop spin.
    if (10..=3_600_000).contains(&millis) { Duration::from_millis(millis) } else { otherwise }
}

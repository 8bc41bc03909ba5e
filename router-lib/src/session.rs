//! A task's session with the leader, from registration to leaving.
//!
//! One loop on a thread of its own, so that a busy application cannot cost the session. It finds the leader, registers
//! once, and from then on attaches the same session again over whatever connection holds; it says every heartbeat that
//! the task lives, and takes in what comes back. While no assigner answers the task goes on with what it last knew.
//!
//! Only the leader's word that the session has ended makes it register anew; all it owned is dropped first.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, SessionId, TaskInfo};
use mandoline_distributor::connect::Connector;
use mandoline_distributor::hub::Hub;
use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request;
use mandoline_proto::update::{Assembler, Update};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::dialer::{Dialer, Next, PAUSE_MAX};
use crate::install::Install;
use crate::life::Pulse;
use crate::link::{Connection, Dialed, Link, Step};
use crate::owned::{Owned, Window};

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
    pub(crate) connector: Connector,
    pub(crate) owned: Arc<Owned>,
    pub(crate) start: Arc<Assignment>,
    /// The application's runtime, if it is to be watched.
    pub(crate) probe: Option<Handle>,
    pub(crate) orders: mpsc::Receiver<Order>,
    pub(crate) state: watch::Sender<State>,
    /// Hears of every assignment, for peers.
    pub(crate) hub: Hub,
    pub(crate) stop: CancellationToken,
}

/// A task's session with the leader.
pub(crate) struct Session {
    setup: Setup,
    dialer: Dialer,
    link: Link,
    id: Option<SessionId>,
    // The newest that was heard; `owned` may still be busy with the one before.
    known: Arc<Assignment>,
    assembler: Assembler,
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
}

enum Heard {
    Stop,
    Order(Order),
    Installed,
    Beat,
    Report,
    Step(Step),
}

impl Session {
    pub(crate) fn new(setup: Setup) -> Self {
        let now = Instant::now();
        let dialer = Dialer::new(setup.assigners.clone(), setup.info.incarnation);
        let window = Window::begin(&setup.owned, now);
        let pulse = setup.probe.clone().map(Pulse::new);
        let known = Arc::clone(&setup.start);
        Self {
            setup,
            dialer,
            link: Link::wait(Duration::ZERO),
            id: None,
            known,
            assembler: Assembler::default(),
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
                Some(order) = self.setup.orders.recv() => Heard::Order(order),
                () = self.install.done() => Heard::Installed,
                () = sleep_until(self.next_beat) => Heard::Beat,
                () = sleep_until(self.next_report) => Heard::Report,
                step = self.link.next() => Heard::Step(step),
            };
            match heard {
                Heard::Stop => break,
                Heard::Order(Order::Drain) => self.drain(),
                Heard::Installed => self.installed(),
                Heard::Beat => self.beat(),
                Heard::Report => self.report(),
                Heard::Step(Step::Waited) => self.dial(),
                Heard::Step(Step::Dialed(dialed)) => self.dialed(dialed),
                Heard::Step(Step::Reply(reply)) => self.reply(reply),
                Heard::Step(Step::Broke(problem)) => self.broke(problem),
            }
            if self.is_drained() {
                break;
            }
        }
        self.leave().await;
    }

    fn is_drained(&self) -> bool {
        self.drain == Drain::Done && self.install.is_idle() && self.setup.owned.view().owned() == 0
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
                let connector = self.setup.connector.clone();
                Link::dial(connector, address, self.first_request())
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
                Request::Register(pb::Register { job, info, stopped: 0, known })
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

    fn attached(&mut self, connection: Box<Connection>, attached: &pb::Attached) {
        let session = SessionId(attached.session);
        let leader = connection.leader.clone();
        tracing::info!(job = %self.setup.job, task = %self.setup.info.name, %session, %leader, "attached");
        let renewed = self.id.replace(session) != Some(session);
        self.assembler = Assembler::default();
        self.keep_pace(attached);
        self.link = Link::Attached(connection);
        self.setup.state.send_replace(State::Attached { session, leader });
        if renewed && self.known.tasks.contains_key(&session) {
            // Registered before, by a process that lost the answer on its way: what is known holds already.
            self.take_on();
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
        self.id = None;
        self.take_on();
        // A leader that does not know the session may lead another cluster in the place of the one before, whose
        // generations begin anew: what it says next counts, whatever was known.
        self.known = Arc::clone(&self.setup.start);
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

    fn broke(&mut self, problem: String) {
        let Link::Attached(connection) = &self.link else { return };
        let address = connection.leader.clone();
        tracing::info!(%address, problem, "the session's connection broke");
        self.dialer.broken(address.clone());
        self.alone(Why::Unreachable { address, problem });
        self.dial();
    }

    /// Says what stands in the way; since when stays.
    fn alone(&self, why: Why) {
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
        let request = connection.beats.next(now);
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
        self.send(Request::Heartbeat(pb::Heartbeat { request }));
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
            Some(Reply::Grant(grant)) => connection.beats.granted(grant.request, Instant::now()),
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
            Some(Reply::Drained(pb::Drained {})) if self.drain == Drain::Asked => {
                self.drain = Drain::Done;
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
        // What is known never goes back: a leader that has not caught up yet soon will.
        if next.job != self.setup.job || next.generation < self.known.generation {
            return;
        }
        self.setup.hub.publish(Arc::clone(&next), delta.as_ref());
        self.known = next;
        self.take_on();
    }

    fn resync(&mut self, error: &dyn std::fmt::Display) {
        tracing::info!(%error, known = %self.known.generation, "asking for the full assignment");
        self.send(Request::Resync(pb::Resync {}));
    }

    // --- Taking assignments on.

    fn take_on(&mut self) {
        self.install.begin(&self.setup.owned, self.id, &self.known);
    }

    fn installed(&mut self) {
        self.install.next(&self.setup.owned);
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
        // What is owned goes first, so that nobody else serves it while this task still would.
        self.id = None;
        self.take_on();
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

fn millis(millis: u64, otherwise: Duration) -> Duration {
    // An assigner that says nothing sensible must not make the loop spin.
    if (10..=3_600_000).contains(&millis) { Duration::from_millis(millis) } else { otherwise }
}

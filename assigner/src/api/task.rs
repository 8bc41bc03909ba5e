//! The task's end of the world: `mandoline.v1.Tasks`, served by the node that leads.
//!
//! A stream begins with who speaks (`Register` or `Attach`), goes on with heartbeats and reports, and is told grants and
//! assignments. It ends when the task leaves, when another connection takes its session, when the session has ended, when
//! this node stops leading, or when the task does not read. Whoever does not lead says who does, and is done.
//!
//! What a task says is parsed here, once. What is wrong with the first message ends the stream by name
//! (`INVALID_ARGUMENT`); what is wrong later is answered with a warning, and costs no session.

use std::collections::VecDeque;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::{Command, EndReason};
use mandoline_core::generation::Generation;
use mandoline_core::leader::Event;
use mandoline_core::name::JobName;
use mandoline_core::offers::{Offer, OfferError};
use mandoline_core::spec::JobSpec;
use mandoline_core::state::{Applied, Outcome, Refused};
use mandoline_core::task::{Phase, SessionId, TaskInfo};
use mandoline_core::transit::HandOffId;
use mandoline_distributor::hub::{Hub, Subscription};
use mandoline_proto::assignment::{job_name, session};
use mandoline_proto::error::{WireError, need};
use mandoline_proto::pb;
use mandoline_proto::pb::offer_reply::Reply as OfferAnswer;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request as Asked;
use mandoline_proto::pb::tasks_server::{Tasks, TasksServer};
use mandoline_proto::task::{offer, report};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::node::{Node, term_of};
use crate::raft::{Consensus, ProposeError, Role};
use crate::sessions::{Grant, Seat, Sessions};

/// How long a stream may take to say who speaks.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a registration may take: an election away at worst; the task asks again.
const REGISTER_PATIENCE: Duration = Duration::from_secs(5);
/// How long a task may not read while something waits for it. Its heartbeats are heard meanwhile, but a task that cannot
/// hear what it owns must not stay.
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// How long a node that leads no more waits to hear who does.
const HAND_OVER_PATIENCE: Duration = Duration::from_millis(200);
/// What may be on its way to the connection: parts are up to 1 MiB.
const OUT_MAX: usize = 2;
/// Replies that wait behind that. A task that asks faster than it reads has itself cut off.
const WAITING_MAX: usize = 64;

type Replies = mpsc::Sender<Result<pb::SessionReply, Status>>;

/// Serves task sessions while this node leads, and says who leads while it does not.
#[derive(Clone)]
pub struct TaskService {
    inner: Arc<Inner>,
}

struct Inner {
    consensus: Consensus,
    hub: Hub,
    node: Node,
    sessions: Sessions,
    streams: TaskTracker,
    stop: CancellationToken,
    read_patience: Duration,
}

impl TaskService {
    /// Serves until `stop`; the streams are `streams`, to be waited for.
    pub fn new(
        consensus: Consensus,
        hub: Hub,
        node: Node,
        sessions: Sessions,
        streams: TaskTracker,
        stop: CancellationToken,
    ) -> TasksServer<Self> {
        let read_patience = READ_PATIENCE;
        let inner = Inner { consensus, hub, node, sessions, streams, stop, read_patience };
        TasksServer::new(Self { inner: Arc::new(inner) })
    }
}

#[tonic::async_trait]
impl Tasks for TaskService {
    type SessionStream = ReceiverStream<Result<pb::SessionReply, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut asked = request.into_inner();
        let first = timeout(FIRST_PATIENCE, asked.message()).await.map_err(|_| {
            Status::deadline_exceeded(format!("nobody said who speaks within {FIRST_PATIENCE:?}"))
        })??;
        let first =
            First::read(first).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let (replies, stream) = mpsc::channel(OUT_MAX);
        match self.inner.open(first).await {
            Ok(session) => {
                self.inner.streams.spawn(session.run(asked, replies));
            }
            Err(turned_away) => {
                let reply = pb::SessionReply { reply: Some(turned_away) };
                replies.try_send(Ok(reply)).expect("a new queue has room");
            }
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn offer(&self, request: Request<pb::Offer>) -> Result<Response<pb::OfferReply>, Status> {
        let (job, offer) = offer(request.into_inner())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let reply = self.inner.offer(job, offer).await?;
        Ok(Response::new(pb::OfferReply { reply: Some(reply) }))
    }
}

/// What a stream begins with, checked.
enum First {
    Register {
        job: JobName,
        info: Box<TaskInfo>,
        stopped: Option<SessionId>,
        known: Option<Generation>,
    },
    Attach {
        who: Who,
        known: Option<Generation>,
    },
}

/// A session, and the process that it belongs to.
#[derive(Clone)]
struct Who {
    job: JobName,
    session: SessionId,
    incarnation: u64,
}

impl First {
    fn read(message: Option<pb::SessionRequest>) -> Result<Self, WireError> {
        let message = need(message, "first message")?;
        match need(message.request, "request")? {
            Asked::Register(register) => {
                Self::register(register).map_err(|error| error.within("register"))
            }
            Asked::Attach(attach) => Self::attach(&attach).map_err(|error| error.within("attach")),
            _ => Err(WireError::new("request", "must begin with register or attach")),
        }
    }

    fn register(register: pb::Register) -> Result<Self, WireError> {
        let info = TaskInfo::try_from(need(register.info, "info")?);
        Ok(Self::Register {
            job: job_name(&register.job)?,
            info: Box::new(info.map_err(|error| error.within("info"))?),
            stopped: (register.stopped != 0).then_some(SessionId(register.stopped)),
            known: register.known.map(Generation::from),
        })
    }

    fn attach(attach: &pb::Attach) -> Result<Self, WireError> {
        let who = Who {
            job: job_name(&attach.job)?,
            session: session(attach.session, "session")?,
            incarnation: attach.incarnation,
        };
        Ok(Self::Attach { who, known: attach.known.map(Generation::from) })
    }
}

impl Inner {
    /// Finds or makes the session, or says why not.
    async fn open(self: &Arc<Self>, first: First) -> Result<Session, Reply> {
        let role = self.consensus.role();
        let Some(term) = term_of(&role.borrow()) else { return Err(redirect(&role.borrow())) };
        let (who, known) = match first {
            First::Attach { who, known } => (who, known),
            First::Register { job, info, stopped, known } => {
                let incarnation = info.incarnation;
                let register = Command::Register { job: job.clone(), info: *info, stopped };
                (Who { session: self.register(&job, register).await?, job, incarnation }, known)
            }
        };
        let known_of = self.find(&who).await?;
        let subscription = self
            .hub
            .subscribe(&who.job, known)
            .map_err(|error| refused(pb::RefusedCode::Limit, error.to_string()))?;
        let seat = self.sessions.take(&who.job, who.session);
        Ok(Session::new(Arc::clone(self), term, role, who, subscription, seat, &known_of))
    }

    /// Hands on what a caller offered, or says who leads.
    async fn offer(&self, job: JobName, offer: Offer) -> Result<OfferAnswer, Status> {
        let role = self.consensus.role();
        if term_of(&role.borrow()).is_none() {
            return Ok(OfferAnswer::Redirect(leader_of(&role.borrow())));
        }
        let state = self.consensus.state();
        let known = state.job(&job).map_err(|why| Status::not_found(why.to_string()))?;
        let report_every_ms = whole_millis(known.spec.report_every);
        match self.node.offer(job, offer).await {
            Some(Ok(())) => Ok(OfferAnswer::Taken(pb::Taken { report_every_ms })),
            Some(Err(error @ (OfferError::Callers | OfferError::Slices))) => {
                Err(Status::resource_exhausted(error.to_string()))
            }
            Some(Err(error)) => Err(Status::invalid_argument(error.to_string())),
            // It leads no more, or not yet, or the job is that new: the next one will be heard.
            None => Ok(OfferAnswer::Redirect(pb::Redirect::default())),
        }
    }

    async fn register(&self, job: &JobName, register: Command) -> Result<SessionId, Reply> {
        match timeout(REGISTER_PATIENCE, self.consensus.propose(register)).await {
            Ok(Ok(Applied { outcome: Outcome::Session(session), .. })) => Ok(session),
            Ok(Ok(applied)) => {
                let message = format!("registration led to {:?}", applied.outcome);
                Err(refused(pb::RefusedCode::Invalid, message))
            }
            Ok(Err(ProposeError::Refused(why))) => {
                if let Refused::NameTaken { session, .. } | Refused::AddressTaken { session, .. } =
                    why
                {
                    self.node.tell(Event::Succeeded { job: job.clone(), session }).await;
                }
                Err(refused(code_of(&why), why.to_string()))
            }
            // Whoever leads by now, if anyone: the task asks again.
            Ok(Err(error)) => {
                tracing::info!(%error, "a registration found no leader");
                Err(redirect(&self.consensus.role().borrow()))
            }
            Err(_) => Err(Reply::Redirect(pb::Redirect::default())),
        }
    }

    /// Gives the spec of a job whose session has not ended.
    async fn find(&self, who: &Who) -> Result<Known, Reply> {
        if let Ok(known) = self.look(who) {
            return Ok(known);
        }
        // Only who surely leads can say that a session has ended: another may have begun it meanwhile.
        if self.consensus.confirm_leadership().await.is_err() {
            return Err(redirect(&self.consensus.role().borrow()));
        }
        self.look(who).map_err(|why| refused(code_of(&why), why.to_string()))
    }

    fn look(&self, who: &Who) -> Result<Known, Refused> {
        let state = self.consensus.state();
        let known = state.job(&who.job)?;
        match known.assignment.tasks.get(&who.session) {
            Some(task) if task.info.incarnation == who.incarnation => {
                Ok(Known { spec: known.spec.clone(), lease: task.lease })
            }
            _ => {
                let (job, session) = (who.job.clone(), who.session);
                Err(Refused::NoSuchSession { job, session })
            }
        }
    }
}

fn refused(code: pb::RefusedCode, message: String) -> Reply {
    Reply::Refused(pb::Refused { code: code.into(), message })
}

const fn code_of(why: &Refused) -> pb::RefusedCode {
    match why {
        Refused::NoSuchJob(_) => pb::RefusedCode::NoSuchJob,
        Refused::NameTaken { .. } => pb::RefusedCode::NameTaken,
        Refused::AddressTaken { .. } => pb::RefusedCode::AddressTaken,
        Refused::NoSuchSession { .. } => pb::RefusedCode::NoSuchSession,
        Refused::Limit { .. } => pb::RefusedCode::Limit,
        _ => pb::RefusedCode::Invalid,
    }
}

/// Who leads, as far as is known.
fn redirect(role: &Role) -> Reply {
    Reply::Redirect(leader_of(role))
}

pub(crate) fn leader_of(role: &Role) -> pb::Redirect {
    match role {
        Role::Follower { leader: Some(leader) } => {
            pb::Redirect { node: leader.node.0, address: leader.client.clone() }
        }
        Role::Follower { leader: None } | Role::Leader { .. } => pb::Redirect::default(),
    }
}

fn whole_millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

fn attached(session: SessionId, known: &Known) -> pb::Attached {
    let Known { spec, lease } = known;
    let (heartbeat_ms, report_every_ms) =
        (whole_millis(spec.heartbeat), whole_millis(spec.report_every));
    let lease_ms = lease.map_or(0, whole_millis);
    pb::Attached { session: session.0, heartbeat_ms, report_every_ms, lease_ms }
}

/// What a session is told of itself.
struct Known {
    spec: JobSpec,
    /// As it was when the task registered.
    lease: Option<Duration>,
}

type Proposal = Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send>>;

/// One connection of a session.
struct Session {
    inner: Arc<Inner>,
    /// The term in which this node leads: a new one is a new beginning.
    term: u64,
    role: watch::Receiver<Role>,
    who: Who,
    seat: Seat,
    subscription: Subscription,
    /// How often to speak, as the task was last told.
    attached: pb::Attached,
    waiting: VecDeque<Reply>,
    /// Since when something waits and nothing was read.
    stuck_at: Instant,
    draining: Option<Proposal>,
    ending: Option<End>,
}

/// Why a connection ends.
enum End {
    /// The task closed it, or it broke.
    Broken,
    /// The task leaves.
    Left,
    /// Another connection took the session, or the session has ended: the last reply says so.
    Over,
    /// The task does not read.
    Stuck,
    /// This node stops, or leads no more.
    Unseated,
}

impl Session {
    fn new(
        inner: Arc<Inner>,
        term: u64,
        role: watch::Receiver<Role>,
        who: Who,
        subscription: Subscription,
        seat: Seat,
        known: &Known,
    ) -> Self {
        let attached = attached(who.session, known);
        let stuck_at = Instant::now() + inner.read_patience;
        Self {
            inner,
            term,
            role,
            who,
            seat,
            subscription,
            waiting: VecDeque::from([Reply::Attached(attached)]),
            attached,
            stuck_at,
            draining: None,
            ending: None,
        }
    }

    async fn run(mut self, mut asked: Streaming<pb::SessionRequest>, replies: Replies) {
        let Who { job, session, .. } = self.who.clone();
        tracing::info!(%job, %session, "session attached");
        self.inner.node.tell(Event::Attached { job: job.clone(), session }).await;
        self.look_again();
        let end = loop {
            if self.ending.is_some() && self.waiting.is_empty() {
                break self.ending.take().expect("it was just seen");
            }
            let goes_on = self.ending.is_none();
            tokio::select! {
                () = self.inner.stop.cancelled(), if goes_on => self.unseat().await,
                changed = self.role.changed(), if goes_on => self.role_changed(changed.is_ok()).await,
                () = self.seat.replaced.cancelled(), if goes_on => self.ending = Some(End::Over),
                permit = replies.reserve(), if !self.waiting.is_empty() => match permit {
                    Ok(permit) => {
                        let reply = self.waiting.pop_front();
                        permit.send(Ok(pb::SessionReply { reply }));
                        self.stuck_at = Instant::now() + self.inner.read_patience;
                    }
                    Err(_) => break End::Broken,
                },
                () = sleep_until(self.stuck_at), if !self.waiting.is_empty() => break End::Stuck,
                drained = settled(&mut self.draining) => self.drain_settled(drained).await,
                () = self.seat.look_again.notified(), if goes_on => self.look_again(),
                message = asked.message(), if goes_on => match message {
                    Ok(Some(message)) => self.hear(message).await,
                    Ok(None) | Err(_) => break End::Broken,
                },
                frame = self.subscription.next(), if goes_on && self.waiting.is_empty() => {
                    self.say(Reply::Update(frame.message()));
                    self.end_if_over();
                }
            }
        };
        self.finish(end, &replies).await;
    }

    /// Takes in what the task says.
    async fn hear(&mut self, message: pb::SessionRequest) {
        let Who { job, session, .. } = self.who.clone();
        match message.request {
            Some(Asked::Heartbeat(heartbeat)) => {
                let request = heartbeat.request;
                if self.attached.lease_ms > 0 {
                    // An owner's grant waits until a quorum has confirmed that this node leads.
                    self.inner.node.tell(Event::Renewed { job, session, request }).await;
                } else {
                    self.inner.node.tell(Event::Heard { job, session }).await;
                    let newest = self.inner.hub.get(&self.who.job);
                    self.grant(request, newest.map(|newest| newest.generation.into()));
                }
            }
            Some(Asked::Report(measured)) => match report(session, measured) {
                Ok(mut report) => {
                    let clamped = report.clamp();
                    if clamped > 0 {
                        let problem = format!(
                            "{clamped} hot keys carried more than their slices, and were lowered to that"
                        );
                        self.warn(&WireError::new("report", problem));
                    }
                    self.inner.node.tell(Event::Reported { job, report }).await;
                }
                Err(error) => self.warn(&error),
            },
            Some(Asked::Drain(pb::Drain {})) => {
                // The one before is on its way still: twice leads to the same.
                let inner = Arc::clone(&self.inner);
                let drain = Command::Drain { job, session };
                self.draining = Some(Box::pin(async move { inner.consensus.propose(drain).await }));
            }
            Some(Asked::Ready(id)) => match HandOffId::try_from(id) {
                Ok(id) => self.inner.node.tell(Event::Ready { job, session, id }).await,
                Err(error) => self.warn(&error.within("ready")),
            },
            Some(Asked::Acknowledge(id)) => match HandOffId::try_from(id) {
                Ok(id) => self.inner.node.tell(Event::Acknowledged { job, session, id }).await,
                Err(error) => self.warn(&error.within("acknowledge")),
            },
            Some(Asked::Leave(pb::Leave {})) => self.ending = Some(End::Left),
            Some(Asked::Resync(pb::Resync {})) => self.resync(),
            Some(Asked::Register(_) | Asked::Attach(_)) => {
                self.warn(&WireError::new("request", "this stream has a session already"));
            }
            None => self.warn(&WireError::new("request", "is none that this version knows")),
        }
    }

    fn grant(&mut self, request: u64, generation: Option<pb::Generation>) {
        // Only the newest grant means anything.
        self.waiting.retain(|reply| !matches!(reply, Reply::Grant(_)));
        self.say(Reply::Grant(pb::Grant { request, generation }));
    }

    fn warn(&mut self, problem: &dyn std::fmt::Display) {
        tracing::warn!(job = %self.who.job, session = %self.who.session, error = %problem, "a message was refused");
        self.say(Reply::Warning(problem.to_string()));
    }

    fn resync(&mut self) {
        match self.inner.hub.subscribe(&self.who.job, None) {
            Ok(fresh) => self.subscription = fresh,
            Err(error) => self.warn(&error),
        }
    }

    fn say(&mut self, reply: Reply) {
        if self.waiting.is_empty() {
            self.stuck_at = Instant::now() + self.inner.read_patience;
        }
        self.waiting.push_back(reply);
        if self.waiting.len() > WAITING_MAX {
            self.waiting.clear();
            self.ending = Some(End::Stuck);
        }
    }

    /// Ends with a last word.
    fn end(&mut self, end: End, last: Option<Reply>) {
        last.into_iter().for_each(|last| self.say(last));
        self.ending = Some(end);
    }

    async fn role_changed(&mut self, known: bool) {
        let still_leads = known && term_of(&self.role.borrow_and_update()) == Some(self.term);
        if !still_leads {
            self.unseat().await;
        }
    }

    /// Sends the task to who leads now. A hand-over takes a moment, and is worth waiting for.
    async fn unseat(&mut self) {
        let known = self.role.wait_for(|role| matches!(role, Role::Follower { leader: Some(_) }));
        let redirect = match timeout(HAND_OVER_PATIENCE, known).await {
            Ok(Ok(role)) => redirect(&role),
            Ok(Err(_)) | Err(_) => Reply::Redirect(pb::Redirect::default()),
        };
        self.end(End::Unseated, Some(redirect));
    }

    async fn drain_settled(&mut self, drained: Result<Applied, ProposeError>) {
        self.draining = None;
        match drained {
            Ok(_) => self.look_again(),
            Err(ProposeError::Refused(why)) => self.warn(&why),
            // The task says it again where it attaches next; here it may wait for ever.
            Err(_) => self.unseat().await,
        }
    }

    /// Tells the task what it should know beside its assignment: how often to speak, and that it has nothing left to
    /// wait for. A task may come back to hear what it missed, so this looks at the state and not at events.
    fn look_again(&mut self) {
        if let Some(Grant { request, generation }) = self.seat.granted() {
            self.grant(request, Some(generation.into()));
        }
        let state = self.inner.consensus.state();
        let Ok(job) = state.job(&self.who.job) else { return };
        let attached = match self.inner.look(&self.who) {
            Ok(known) => attached(self.who.session, &known),
            Err(_) => self.attached,
        };
        if self.attached != attached {
            self.attached = attached;
            self.say(Reply::Attached(attached));
        }
        let task = job.assignment.tasks.get(&self.who.session);
        if task.is_none_or(|task| task.phase != Phase::Draining) {
            return;
        }
        let alone = job.assignment.tasks.values().all(|task| task.phase == Phase::Draining);
        let has_none = job.assignment.has_nothing_for(self.who.session);
        if has_none || alone {
            self.say(Reply::Drained(pb::Drained { alone: !has_none }));
        }
    }

    fn end_if_over(&mut self) {
        if let Err(why) = self.inner.look(&self.who) {
            self.end(End::Over, Some(refused(code_of(&why), why.to_string())));
        }
    }

    async fn finish(self, end: End, replies: &Replies) {
        let Self { inner, who: Who { job, session, .. }, seat, .. } = self;
        match end {
            End::Left => {
                let (job, reason) = (job.clone(), EndReason::Left);
                let left = inner.consensus.propose(Command::End { job, session, reason });
                // If nobody hears of it, the task is found lost before long.
                if !matches!(timeout(REGISTER_PATIENCE, left).await, Ok(Ok(_))) {
                    tracing::warn!(%session, "a task left, and it could not be written down");
                }
            }
            End::Stuck => {
                let message = format!("the task did not read for {:?}", inner.read_patience);
                // Where even this does not fit, the end of the stream says enough.
                drop(replies.try_send(Err(Status::resource_exhausted(message))));
            }
            End::Broken | End::Over | End::Unseated => {}
        }
        tracing::info!(%job, %session, "session detached");
        if let Some(room) = inner.node.room().await {
            seat.leave(|| room.tell(Event::Broken { job, session }));
        }
    }
}

/// Waits for what is under way, for ever if nothing is.
async fn settled<F: Future + Unpin>(under_way: &mut Option<F>) -> F::Output {
    match under_way {
        Some(future) => future.await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::key::SliceKey;
    use mandoline_core::load::Load;
    use mandoline_core::plan::{Edit, Plan};
    use mandoline_core::spec::Ratio;
    use mandoline_proto::pb::tasks_client::TasksClient;
    use tokio_stream::wrappers::TcpListenerStream;

    use super::*;
    use crate::node::{Changes, listener};
    use crate::raft::config::{Config, FirstStart, Snapshots, Timings, Transport};
    use crate::raft::disk::Storage;
    use crate::raft::types::Member;

    #[tokio::test]
    async fn a_task_that_does_not_read_is_cut_off() {
        let data = tempfile::tempdir().unwrap();
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap().to_string();
        let config = Config {
            storage: Storage::Dir(data.path().to_owned()),
            member: Member { client: address.clone(), peer: "127.0.0.1:1".to_owned() },
            first: FirstStart::Alone,
            timings: Timings::default(),
            snapshots: Snapshots::default(),
            transport: Transport::plain(),
        };
        let (hub, changes, stop) = (Hub::new(), Changes::default(), CancellationToken::new());
        let told = listener(hub.clone(), changes.clone());
        let consensus = Consensus::start(config, told, stop.clone()).await.unwrap();
        consensus.role().wait_for(|role| term_of(role).is_some()).await.unwrap();
        let (sessions, streams) = (Sessions::default(), TaskTracker::new());
        let (node, leads) = Node::new(consensus.clone(), sessions.clone(), changes);
        let leads = tokio::spawn(leads.run(stop.clone()));
        let inner = Inner {
            consensus: consensus.clone(),
            hub,
            node,
            sessions: sessions.clone(),
            streams: streams.clone(),
            stop: stop.clone(),
            read_patience: Duration::from_millis(200),
        };
        let service = TasksServer::new(TaskService { inner: Arc::new(inner) });
        let stopped = stop.clone().cancelled_owned();
        let server = tonic::transport::Server::builder().add_service(service);
        let server = server.serve_with_incoming_shutdown(TcpListenerStream::new(socket), stopped);
        let server = tokio::spawn(server);

        // An assignment that no window of HTTP/2 takes in whole, and a task that may be silent for an hour.
        let job: JobName = "kv".parse().unwrap();
        let heartbeat = Duration::from_secs(3_600);
        let spec = JobSpec { heartbeat, ..JobSpec::new(job.clone()) };
        consensus.propose(Command::ApplyJob { spec, if_version: None }).await.unwrap();
        let base = consensus.state().job(&job).unwrap().assignment.generation;
        let split = |nth: u64| Edit::Split { at: SliceKey(nth << 48), low: Load::ZERO };
        let (edits, none) = ((1..20_000).map(split).collect(), Ratio::from_millionths(0));
        let plan = Plan { base, edits, imbalance: (none, none), total: Load::ZERO };
        consensus.propose(Command::Change { job, plan }).await.unwrap();

        let (requests, queue) = mpsc::channel(64);
        let info = pb::TaskInfo {
            name: "t".to_owned(),
            address: "h:1".to_owned(),
            ..pb::TaskInfo::default()
        };
        let register =
            pb::Register { job: "kv".to_owned(), info: Some(info), ..pb::Register::default() };
        let say = |asked| requests.try_send(pb::SessionRequest { request: Some(asked) }).unwrap();
        say(Asked::Register(register));
        let mut client = TasksClient::connect(format!("http://{address}")).await.unwrap();
        let unread = client.session(ReceiverStream::new(queue)).await.unwrap();
        let cut_off = async {
            streams.close();
            // Each time it asks there is more that it does not read.
            while !streams.is_empty() {
                let resync = Some(Asked::Resync(pb::Resync {}));
                drop(requests.try_send(pb::SessionRequest { request: resync }));
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), cut_off).await.expect("the stream was never cut off");
        assert_eq!(sessions.count(), 0);
        drop((unread, client));
        stop.cancel();
        timeout(Duration::from_secs(20), leads).await.expect("the loop never stopped").unwrap();
        server.abort();
    }
}

//! A leader of one node without a log: what `core::State` says, over real sockets. It can be told to misbehave.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::command::{Command, EndReason};
use mandoline_core::generation::Generation;
use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::plan::{Edit, Move, Plan, Reason};
use mandoline_core::slice::Slice;
use mandoline_core::spec::{JobSpec, Ratio};
use mandoline_core::state::{Outcome, Refused, State};
use mandoline_core::task::{SessionId, Task};
use mandoline_distributor::hub::Hub;
use mandoline_distributor::serve::WatchService;
use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request as Asked;
use mandoline_proto::pb::tasks_server::{Tasks, TasksServer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// A leader of one node without a log.
#[derive(Clone)]
pub(crate) struct Leader {
    pub(crate) address: String,
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    hub: Hub,
    heard: watch::Sender<Vec<Asked>>,
    /// Who is said to lead instead.
    elsewhere: Mutex<Option<String>>,
    /// No heartbeat is granted.
    mute: AtomicBool,
    /// This many updates are lost on their way.
    lose: AtomicU64,
    /// Told once to whoever sends the next heartbeat, of whatever job it is.
    impostor: Mutex<Option<Arc<Assignment>>>,
    cut: Mutex<CancellationToken>,
    stop: Mutex<CancellationToken>,
}

pub(crate) fn kv() -> JobName {
    "kv".parse().unwrap()
}

/// A job whose tasks speak often, so that tests are quick.
pub(crate) fn quick() -> JobSpec {
    JobSpec {
        heartbeat: Duration::from_millis(100),
        report_every: Duration::from_millis(200),
        ..JobSpec::new(kv())
    }
}

impl Leader {
    /// Starts with a job.
    pub(crate) async fn start() -> Self {
        let leader = Self::start_empty().await;
        leader.apply(Command::ApplyJob { spec: quick(), if_version: None }).unwrap();
        leader
    }

    /// Starts without any.
    pub(crate) async fn start_empty() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let inner = Arc::new(Inner {
            state: Mutex::default(),
            hub: Hub::new(),
            heard: watch::Sender::new(Vec::new()),
            elsewhere: Mutex::default(),
            mute: AtomicBool::new(false),
            lose: AtomicU64::new(0),
            impostor: Mutex::default(),
            cut: Mutex::default(),
            stop: Mutex::default(),
        });
        let leader = Self { address, inner };
        leader.serve(listener);
        leader
    }

    fn serve(&self, listener: TcpListener) {
        let stop = self.inner.stop.lock().unwrap().clone();
        let service = TasksServer::new(self.clone());
        let watch = WatchService::new(self.inner.hub.clone(), stop.clone());
        tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .add_service(watch)
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled())
                .await
                .unwrap();
        });
    }

    /// Takes the leader away: nobody listens any more.
    pub(crate) fn stop(&self) {
        self.inner.stop.lock().unwrap().cancel();
        self.cut();
    }

    /// Brings it back at the same address, with all that it knew.
    pub(crate) async fn restart(&self) {
        *self.inner.stop.lock().unwrap() = CancellationToken::new();
        // The server before lets go of the port when its last connection has noticed.
        let bound = async {
            loop {
                match TcpListener::bind(&self.address).await {
                    Ok(listener) => break listener,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        let listener = tokio::time::timeout(Duration::from_secs(10), bound).await;
        self.serve(listener.expect("the port is free again"));
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        std::mem::take(&mut *self.inner.cut.lock().unwrap()).cancel();
    }

    /// Says that another leads, to whoever asks from now on.
    pub(crate) fn point_at(&self, other: &str) {
        *self.inner.elsewhere.lock().unwrap() = Some(other.to_owned());
    }

    pub(crate) fn mute(&self, mute: bool) {
        self.inner.mute.store(mute, Ordering::Relaxed);
    }

    /// Answers the next heartbeat by an assignment that nobody asked for.
    pub(crate) fn tell(&self, assignment: Assignment) {
        *self.inner.impostor.lock().unwrap() = Some(Arc::new(assignment));
    }

    /// Whether that has been told.
    pub(crate) fn has_told(&self) -> bool {
        self.inner.impostor.lock().unwrap().is_none()
    }

    pub(crate) fn lose_updates(&self, count: u64) {
        self.inner.lose.store(count, Ordering::Relaxed);
    }

    /// Shares what another leader knows, as if both had the same log.
    pub(crate) fn learn(&self, other: &Self) {
        *self.inner.state.lock().unwrap() = other.inner.state.lock().unwrap().clone();
        let assignment = Arc::clone(&self.inner.state.lock().unwrap().jobs[&kv()].assignment);
        self.inner.hub.publish(assignment, None);
    }

    /// Forgets everything but the job's name, as if its data had been deleted.
    pub(crate) fn begin_anew(&self) {
        *self.inner.state.lock().unwrap() = State::default();
        self.inner.hub.forget(&kv());
        self.apply(Command::ApplyJob { spec: quick(), if_version: None }).unwrap();
    }

    pub(crate) fn apply(&self, command: Command) -> Result<Outcome, Refused> {
        let mut state = self.inner.state.lock().unwrap();
        let applied = state.apply(command)?;
        if let Some(job) = state.jobs.get(&kv()) {
            self.inner.hub.publish(Arc::clone(&job.assignment), applied.delta.as_ref());
        }
        Ok(applied.outcome)
    }

    pub(crate) fn generation(&self) -> Generation {
        self.inner.state.lock().unwrap().jobs[&kv()].assignment.generation
    }

    /// How many watch what this one knows, tasks that hold a session here among them.
    pub(crate) fn watchers(&self) -> usize {
        self.inner.hub.watchers()
    }

    /// The sessions of the job, oldest first.
    pub(crate) fn sessions(&self) -> Vec<SessionId> {
        self.inner.state.lock().unwrap().jobs[&kv()].assignment.tasks.keys().copied().collect()
    }

    fn lease_ms(&self) -> u64 {
        let state = self.inner.state.lock().unwrap();
        let lease = state.jobs.get(&kv()).and_then(|job| job.spec.owner_lease());
        lease.map_or(0, |lease| lease.as_millis().try_into().unwrap())
    }

    pub(crate) fn end(&self, session: SessionId) {
        self.apply(Command::End { job: kv(), session, reason: EndReason::Lost }).unwrap();
    }

    /// Gives a slice, which is made if it has to be, to a task.
    pub(crate) fn give(&self, slice: Slice, to: SessionId) {
        let assignment = Arc::clone(&self.inner.state.lock().unwrap().jobs[&kv()].assignment);
        let mut slices = assignment.slices.clone();
        let mut edits = Vec::new();
        for at in [Some(slice.first()), slice.last().next()].into_iter().flatten() {
            if slices.get(at).0.first() != at {
                slices.split(at);
                edits.push(Edit::Split { at, low: Load::ZERO });
            }
        }
        for (slice, assigned) in slices.touching(slice) {
            let from = assigned.replicas.as_slice().first().map(|replica| replica.session);
            if from != Some(to) {
                let (load, reason) = (Load::ZERO, Reason::First);
                let step =
                    Move { slice, from, to: Some(to), reason, load, before: load, after: load };
                edits.push(Edit::Move(step));
            }
        }
        let none = Ratio::from_millionths(0);
        let plan =
            Plan { base: assignment.generation, edits, imbalance: (none, none), total: Load::ZERO };
        self.apply(Command::Change { job: kv(), plan }).unwrap();
    }

    /// Waits until something was heard, and gives it.
    pub(crate) async fn hears<T>(&self, what: &str, pick: impl Fn(&Asked) -> Option<T>) -> T {
        let mut heard = self.inner.heard.subscribe();
        let found = async {
            loop {
                if let Some(found) = heard.borrow_and_update().iter().find_map(&pick) {
                    return found;
                }
                heard.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(10), found)
            .await
            .unwrap_or_else(|_| panic!("the leader never heard {what}"))
    }

    pub(crate) fn has_heard(&self, what: impl Fn(&Asked) -> bool) -> bool {
        self.inner.heard.borrow().iter().any(what)
    }

    pub(crate) fn forget_heard(&self) {
        self.inner.heard.send_modify(Vec::clear);
    }

    fn open(&self, first: &Asked) -> Result<(JobName, SessionId, Option<Generation>), Reply> {
        if let Some(address) = self.inner.elsewhere.lock().unwrap().clone() {
            return Err(Reply::Redirect(pb::Redirect { node: 2, address }));
        }
        let refused = |why: Refused| {
            let code = match &why {
                Refused::NoSuchJob(_) => pb::RefusedCode::NoSuchJob,
                Refused::NameTaken { .. } => pb::RefusedCode::NameTaken,
                Refused::AddressTaken { .. } => pb::RefusedCode::AddressTaken,
                Refused::NoSuchSession { .. } => pb::RefusedCode::NoSuchSession,
                _ => pb::RefusedCode::Invalid,
            };
            Reply::Refused(pb::Refused { code: code.into(), message: why.to_string() })
        };
        match first.clone() {
            Asked::Register(register) => {
                let job: JobName = register.job.parse().unwrap();
                let info = register.info.unwrap().try_into().unwrap();
                let command = Command::Register { job: job.clone(), info, stopped: None };
                match self.apply(command).map_err(refused)? {
                    Outcome::Session(session) => Ok((job, session, register.known.map(Into::into))),
                    other => panic!("a registration led to {other:?}"),
                }
            }
            Asked::Attach(attach) => {
                let (job, session) = (attach.job.parse().unwrap(), SessionId(attach.session));
                let tasks = self.inner.state.lock().unwrap().jobs[&kv()].assignment.tasks.clone();
                let same = |task: &Arc<Task>| task.info.incarnation == attach.incarnation;
                if !tasks.get(&session).is_some_and(same) {
                    return Err(refused(Refused::NoSuchSession { job, session }));
                }
                Ok((job, session, attach.known.map(Into::into)))
            }
            other => panic!("a stream began with {other:?}"),
        }
    }

    async fn run(
        self,
        (job, session, known): (JobName, SessionId, Option<Generation>),
        mut asked: Streaming<pb::SessionRequest>,
        replies: mpsc::Sender<Result<pb::SessionReply, Status>>,
    ) {
        let cut = self.inner.cut.lock().unwrap().clone();
        let mut subscription = self.inner.hub.subscribe(&job, known).unwrap();
        let mut draining = false;
        loop {
            let reply = tokio::select! {
                () = cut.cancelled() => return,
                message = asked.message() => {
                    let Ok(Some(message)) = message else { return };
                    let asked = message.request.unwrap();
                    self.inner.heard.send_modify(|heard| heard.push(asked.clone()));
                    let beats = matches!(asked, Asked::Heartbeat(_));
                    let impostor = self.inner.impostor.lock().unwrap().take_if(|_| beats);
                    match (asked, impostor) {
                        (Asked::Heartbeat(_), Some(impostor)) => {
                            let (hub, job) = (Hub::new(), impostor.job.clone());
                            hub.publish(impostor, None);
                            let mut told = hub.subscribe(&job, None).unwrap();
                            Some(Reply::Update(told.next().await.message()))
                        }
                        (Asked::Heartbeat(beat), None) if !self.inner.mute.load(Ordering::Relaxed) => {
                            let generation = Some(self.generation().into());
                            Some(Reply::Grant(pb::Grant { request: beat.request, generation }))
                        }
                        (Asked::Drain(_), _) => {
                            self.apply(Command::Drain { job: job.clone(), session }).unwrap();
                            draining = true;
                            None
                        }
                        (Asked::Leave(_), _) => {
                            let (job, reason) = (job.clone(), EndReason::Left);
                            self.apply(Command::End { job, session, reason }).unwrap();
                            return;
                        }
                        (Asked::Resync(_), _) => {
                            subscription = self.inner.hub.subscribe(&job, None).unwrap();
                            None
                        }
                        _ => None,
                    }
                }
                frame = subscription.next() => {
                    let lose = |left: u64| left.checked_sub(1);
                    let lost = self.inner.lose.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lose);
                    lost.is_err().then(|| Reply::Update(frame.message()))
                }
            };
            let assignment = Arc::clone(&self.inner.state.lock().unwrap().jobs[&job].assignment);
            let drained = draining && assignment.of(session).next().is_none();
            for reply in
                reply.into_iter().chain(drained.then_some(Reply::Drained(pb::Drained::default())))
            {
                if replies.send(Ok(pb::SessionReply { reply: Some(reply) })).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[tonic::async_trait]
impl Tasks for Leader {
    type SessionStream = ReceiverStream<Result<pb::SessionReply, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut asked = request.into_inner();
        let first = asked.message().await?.unwrap().request.unwrap();
        self.inner.heard.send_modify(|heard| heard.push(first.clone()));
        let (replies, stream) = mpsc::channel(16);
        let opened = self.open(&first);
        let reply = match &opened {
            Ok((_, session, _)) => Reply::Attached(pb::Attached {
                session: session.0,
                heartbeat_ms: 100,
                report_every_ms: 200,
                lease_ms: self.lease_ms(),
            }),
            Err(turned_away) => turned_away.clone(),
        };
        replies.try_send(Ok(pb::SessionReply { reply: Some(reply) })).unwrap();
        if let Ok(opened) = opened {
            tokio::spawn(self.clone().run(opened, asked, replies));
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn offer(&self, _: Request<pb::Offer>) -> Result<Response<pb::OfferReply>, Status> {
        Err(Status::unimplemented("this leader hears tasks alone"))
    }
}

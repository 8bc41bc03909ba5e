//! The leader's loop: hears what tasks say and what was applied, asks `core::leader` what to do, and has it done.
//!
//! The loop never waits for anything but its next event: proposals and plans run beside it and come back as events. While
//! another node leads it only listens.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mandoline_core::balance::{self, Round};
use mandoline_core::brake::Hold;
use mandoline_core::command::Command;
use mandoline_core::flags::{PauseId, Standing};
use mandoline_core::leader::{Action, Event, Leader};
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::offers::{Caller, Offer, OfferError, Totals};
use mandoline_core::pauses::{Progress, StandingError};
use mandoline_core::plan::Plan;
use mandoline_core::restart::NotNow;
use mandoline_core::spec::Ratio;
use mandoline_core::state::{Refused, State};
use mandoline_core::task::SessionId;
use mandoline_core::time::Time;
use mandoline_distributor::hub::Hub;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::raft::machine;
use crate::raft::{Consensus, Role};
use crate::sessions::{Grant, Sessions};

/// What may wait to be heard. Sessions wait when it is full, and their tasks with them: heartbeats of ten thousand tasks
/// are a tenth of a second's work.
const ASKS_MAX: usize = 1_024;
/// How many of them are taken before the loop looks at anything else.
const ASKS_AT_ONCE: usize = 256;
/// Proposals on their way into the log at once; more would only wait there.
const PROPOSALS_MAX: usize = 64;
/// Proposals that wait for their turn. Past it they fail at once, and the leader thinks again.
const QUEUE_MAX: usize = 20_000;
/// How long a proposal may take before the leader thinks again.
const PROPOSAL_PATIENCE: Duration = Duration::from_secs(5);

/// What the loop may be asked.
#[derive(Debug)]
enum Ask {
    Event(Box<Event>),
    Measure(JobName, oneshot::Sender<BTreeMap<SessionId, Measure>>),
    Offer(JobName, Box<Offer>, oneshot::Sender<Taken>),
    MayRestart(JobName, TaskName, oneshot::Sender<Gate>),
    Stand(Caller, Option<Standing>, oneshot::Sender<Stood>),
    Progress(Vec<PauseId>, oneshot::Sender<BTreeMap<PauseId, Progress>>),
}

/// What the leader says to a task that wants to restart: nothing where this node does not lead, a refusal where there is no
/// such task.
pub type Gate = Option<Result<Result<(), NotNow>, Refused>>;

/// What became of an offer: nothing where this node does not lead, or there is no such job.
pub type Taken = Option<Result<(), OfferError>>;

/// What became of a proxy's word: nothing where this node does not lead.
pub type Stood = Option<Result<(), StandingError>>;

/// What only the leader knows of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Its load as of the last round.
    pub load: Load,
    /// Whether a connection of it is open.
    pub connected: bool,
    /// Whether it says far more than its callers offered it.
    pub suspect: bool,
    /// How many callers avoid it, since it fails though it lives.
    pub avoided_by: usize,
}

/// A brake that holds.
#[derive(Clone, Debug)]
pub struct Held {
    /// What is known of it.
    pub hold: Hold,
    /// When that was.
    now: Time,
    seen: Instant,
}

impl Held {
    /// How long it has been on.
    pub fn held(&self) -> Duration {
        self.since(self.hold.since)
    }

    /// How long ago something was that it knows of.
    pub fn since(&self, then: Time) -> Duration {
        self.now.since(then) + self.seen.elapsed()
    }
}

/// Speaks with the leader's loop.
#[derive(Clone, Debug)]
pub struct Node {
    asks: mpsc::Sender<Ask>,
    offered: Arc<Mutex<BTreeMap<JobName, Totals>>>,
    brakes: Arc<Mutex<BTreeMap<JobName, Held>>>,
}

impl Node {
    /// Makes a loop, to be run, and what speaks with it.
    pub fn new(consensus: Consensus, sessions: Sessions, changes: Changes) -> (Self, Loop) {
        let (asks, heard) = mpsc::channel(ASKS_MAX);
        let (offered, brakes) = (Arc::default(), Arc::default());
        let shown = (Arc::clone(&offered), Arc::clone(&brakes));
        let run = Loop::new(consensus, sessions, changes, heard, shown);
        (Self { asks, offered, brakes }, run)
    }

    /// Tells the loop what happened; waits while it has too much to hear.
    pub async fn tell(&self, event: Event) {
        // A loop that is gone leads nothing.
        drop(self.asks.send(Ask::Event(Box::new(event))).await);
    }

    /// Waits for room to tell the loop something; nothing where there is no loop any more.
    pub async fn room(&self) -> Option<Room<'_>> {
        self.asks.reserve().await.ok().map(Room)
    }

    /// Tells the leader what a caller offered.
    pub async fn offer(&self, job: JobName, offer: Offer) -> Taken {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask::Offer(job, Box::new(offer), answer)).await.ok()?;
        answered.await.ok()?
    }

    /// Asks the leader whether a task may restart now.
    pub async fn may_restart(&self, job: JobName, task: TaskName) -> Gate {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask::MayRestart(job, task, answer)).await.ok()?;
        answered.await.ok()?
    }

    /// Tells the leader how a proxy stands towards the flags; nothing if it stops.
    pub async fn stand(&self, proxy: Caller, standing: Option<Standing>) -> Stood {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask::Stand(proxy, standing, answer)).await.ok()?;
        answered.await.ok()?
    }

    /// Asks the leader how pauses are carried out; of none where this node does not lead.
    pub async fn progress(&self, pauses: Vec<PauseId>) -> BTreeMap<PauseId, Progress> {
        let (answer, answered) = oneshot::channel();
        if self.asks.send(Ask::Progress(pauses, answer)).await.is_err() {
            return BTreeMap::new();
        }
        answered.await.unwrap_or_default()
    }

    /// Gives what callers of each job offered in all, as of its last round; nothing where this node does not lead.
    pub fn offered(&self) -> BTreeMap<JobName, Totals> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives the brakes that hold, by job; nothing where this node does not lead.
    pub fn brakes(&self) -> BTreeMap<JobName, Held> {
        self.brakes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks what the leader knows of a job's tasks; nothing where this node does not lead.
    pub async fn measure(&self, job: JobName) -> BTreeMap<SessionId, Measure> {
        let (answer, answered) = oneshot::channel();
        if self.asks.send(Ask::Measure(job, answer)).await.is_err() {
            return BTreeMap::new();
        }
        answered.await.unwrap_or_default()
    }
}

/// Room for one event.
#[derive(Debug)]
pub struct Room<'a>(mpsc::Permit<'a, Ask>);

impl Room<'_> {
    /// Tells the loop what happened, without waiting.
    pub fn tell(self, event: Event) {
        self.0.send(Ask::Event(Box::new(event)));
    }
}

/// Jobs that were touched and not looked at since, and whether the flags were: raft's callback notes them without ever waiting,
/// and a job noted twice is looked at once. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Changes(Arc<Noted>);

#[derive(Debug, Default)]
struct Noted {
    touched: Mutex<Touched>,
    news: Notify,
}

/// What was touched.
#[derive(Debug, Default, PartialEq, Eq)]
struct Touched {
    jobs: BTreeSet<JobName>,
    flags: bool,
}

impl Changes {
    /// Notes that a job was touched.
    pub fn note(&self, job: JobName) {
        self.touch(|touched| {
            touched.jobs.insert(job);
        });
    }

    /// Notes that the flags were touched.
    pub fn note_flags(&self) {
        self.touch(|touched| touched.flags = true);
    }

    fn touch(&self, touch: impl FnOnce(&mut Touched)) {
        touch(&mut self.0.touched.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.news.notify_one();
    }

    /// Waits until something was touched. Safe to cancel.
    async fn next(&self) -> Touched {
        loop {
            let touched =
                std::mem::take(&mut *self.0.touched.lock().unwrap_or_else(PoisonError::into_inner));
            if touched != Touched::default() {
                return touched;
            }
            self.0.news.notified().await;
        }
    }
}

/// Makes what raft calls for each command that it applies: watchers are told by the hub, the loop by `changes`.
pub fn listener(hub: Hub, changes: Changes) -> machine::Listener {
    Box::new(move |event| match event {
        machine::Event::Applied { delta, assignment, .. } => {
            changes.note(assignment.job.clone());
            hub.publish(assignment, delta.as_ref());
        }
        machine::Event::Flagged { flags } => {
            changes.note_flags();
            hub.publish_flags(flags);
        }
        machine::Event::Installed { state } => {
            changes.note_flags();
            hub.publish_flags(Arc::clone(&state.flags));
            for job in hub.jobs().iter().filter(|job| !state.jobs.contains_key(job)) {
                hub.forget(job);
            }
            for (name, job) in &state.jobs {
                changes.note(name.clone());
                hub.publish(Arc::clone(&job.assignment), None);
            }
        }
    })
}

/// Gives the term in which a node leads.
pub(crate) const fn term_of(role: &Role) -> Option<u64> {
    match role {
        Role::Leader { term } => Some(*term),
        Role::Follower { .. } => None,
    }
}

/// What pages show of each job.
type Shown = (Arc<Mutex<BTreeMap<JobName, Totals>>>, Arc<Mutex<BTreeMap<JobName, Held>>>);

/// The leader's loop.
pub struct Loop {
    consensus: Consensus,
    role: watch::Receiver<Role>,
    sessions: Sessions,
    changes: Changes,
    asks: mpsc::Receiver<Ask>,
    clock: Clock,
    // Of each job's spec: sessions are told when it says something else.
    versions: BTreeMap<JobName, u64>,
    // What pages show, as of each job's last round.
    offered: Arc<Mutex<BTreeMap<JobName, Totals>>>,
    // The same of brakes.
    brakes: Arc<Mutex<BTreeMap<JobName, Held>>>,
    leading: Option<Leading>,
}

/// What there is while this node leads.
struct Leading {
    term: u64,
    leader: Leader,
    out: Vec<Action>,
    queue: VecDeque<Command>,
    proposals: JoinSet<Option<Command>>,
    plans: JoinSet<Event>,
    confirmations: JoinSet<bool>,
}

impl Loop {
    fn new(
        consensus: Consensus,
        sessions: Sessions,
        changes: Changes,
        asks: mpsc::Receiver<Ask>,
        (offered, brakes): Shown,
    ) -> Self {
        let role = consensus.role();
        let (clock, versions, leading) = (Clock::new(), BTreeMap::new(), None);
        Self { consensus, role, sessions, changes, asks, clock, versions, offered, brakes, leading }
    }

    /// Runs until told to stop, or until nobody is left who could ask.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut asks = Vec::with_capacity(ASKS_AT_ONCE);
        loop {
            self.follow_role();
            let deadline = self.deadline();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                changed = self.role.changed() => if changed.is_err() { break },
                touched = self.changes.next() => self.applied(touched),
                settled = Leading::settled(&mut self.leading) => self.settled(settled),
                count = self.asks.recv_many(&mut asks, ASKS_AT_ONCE) => match count {
                    0 => break,
                    _ => self.asked(asks.drain(..)),
                },
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => self.tick(),
            }
        }
    }

    /// Begins or ceases to lead, as raft says. A new term is a new beginning, even on the same node.
    fn follow_role(&mut self) {
        let term = term_of(&self.role.borrow_and_update());
        if term == self.leading.as_ref().map(|leading| leading.term) {
            return;
        }
        if term.is_none() {
            self.offered.lock().unwrap_or_else(PoisonError::into_inner).clear();
            self.brakes.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        self.leading = term.map(|term| {
            tracing::info!(term, "leading");
            Leading::new(term, Leader::new(self.clock.now(), &self.consensus.state()))
        });
    }

    fn deadline(&self) -> Option<Instant> {
        let deadline = self.leading.as_ref()?.leader.deadline()?;
        Some(self.clock.instant(deadline))
    }

    fn asked(&mut self, asks: impl Iterator<Item = Ask>) {
        let mut events = Vec::new();
        for ask in asks {
            match ask {
                Ask::Event(event) => events.push(*event),
                // Whoever asked may have gone.
                Ask::Measure(job, answer) => drop(answer.send(self.measure(&job))),
                Ask::Offer(job, offer, answer) => {
                    let now = self.clock.now();
                    let leader = self.leading.as_mut().map(|leading| &mut leading.leader);
                    let taken = leader.and_then(|leader| leader.offer(now, &job, *offer));
                    let _: Result<(), Taken> = answer.send(taken);
                }
                Ask::MayRestart(job, task, answer) => {
                    let now = self.clock.now();
                    let leader = self.leading.as_mut().map(|leading| &mut leading.leader);
                    let state = self.consensus.state();
                    let gate = leader.map(|leader| leader.may_restart(now, &state, &job, &task));
                    drop(answer.send(gate));
                }
                Ask::Stand(proxy, standing, answer) => {
                    let now = self.clock.now();
                    let leader = self.leading.as_mut().map(|leading| &mut leading.leader);
                    let stood = leader.map(|leader| leader.stands(now, proxy, standing));
                    let _: Result<(), Stood> = answer.send(stood);
                }
                Ask::Progress(pauses, answer) => {
                    let now = self.clock.now();
                    let leader = self.leading.as_mut().map(|leading| &mut leading.leader);
                    let known = leader.map(|leader| {
                        let one = |id| Some((id, leader.progress(now, id)?));
                        pauses.into_iter().filter_map(one).collect()
                    });
                    drop(answer.send(known.unwrap_or_default()));
                }
            }
        }
        self.happened(events);
    }

    fn measure(&self, job: &JobName) -> BTreeMap<SessionId, Measure> {
        let state = self.consensus.state();
        let (Some(Leading { leader, .. }), Ok(known)) = (&self.leading, state.job(job)) else {
            return BTreeMap::new();
        };
        let measure = |session| {
            let (load, connected) = (leader.load_of(job, session), leader.connected(job, session));
            let offered = leader.offered(job);
            let suspect = offered.is_some_and(|all| all.suspects.contains(&session));
            let avoided_by =
                offered.and_then(|all| all.outliers.get(&session)).copied().unwrap_or_default();
            (session, Measure { load, connected, suspect, avoided_by })
        };
        known.assignment.tasks.keys().copied().map(measure).collect()
    }

    fn applied(&mut self, touched: Touched) {
        let Touched { jobs, flags } = touched;
        for job in &jobs {
            let version = self.consensus.state().job(job).map_or(0, |job| job.version);
            if self.versions.insert(job.clone(), version) != Some(version) {
                self.sessions.look_again(job);
            }
        }
        let jobs = jobs.into_iter().map(|job| Event::Applied { job });
        self.happened(jobs.chain(flags.then_some(Event::Flagged)));
    }

    fn settled(&mut self, event: Option<Event>) {
        self.happened(event);
        if let Some(leading) = &mut self.leading {
            leading.refill(&self.consensus);
        }
    }

    /// Tells the leader of events, together: each look at the state may make raft copy it with the next command.
    fn happened(&mut self, events: impl IntoIterator<Item = Event>) {
        // An event may be here before the news that this node leads.
        self.follow_role();
        let mut events = events.into_iter().peekable();
        if events.peek().is_some() {
            self.lead(|leader, now, state, out| {
                events.for_each(|event| leader.handle(now, state, event, out));
            });
        }
    }

    fn tick(&mut self) {
        self.lead(|leader, now, state, out| leader.tick(now, state, out));
        self.show_offered();
        self.show_brakes();
    }

    /// Puts brakes that hold where pages find them, and says aloud when one begins and ends.
    fn show_brakes(&self) {
        let mut shown = self.brakes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(leading) = &self.leading else { return shown.clear() };
        let (now, seen) = (self.clock.now(), Instant::now());
        shown.retain(|job, _| {
            let holds = leading.leader.hold(job).is_some();
            if !holds {
                tracing::info!(%job, "The brake is off");
            }
            holds
        });
        for (job, hold) in leading.leader.holds() {
            if !shown.contains_key(job) {
                let (missing, tasks) = (hold.missing.len(), hold.tasks);
                tracing::warn!(%job, missing, tasks, "Too many tasks are missing at once; nothing is reassigned until they return, their callers' requests fail, or `mandoline task believe-lost` says that they are lost");
            }
            shown.insert(job.clone(), Held { hold: hold.clone(), now, seen });
        }
    }

    /// Puts what callers offered where pages find it, and says of which tasks' word it is doubted.
    fn show_offered(&self) {
        let mut shown = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(leading) = &self.leading else { return shown.clear() };
        shown.retain(|job, _| leading.leader.offered(job).is_some());
        for (job, totals) in leading.leader.all_offered() {
            let before = shown.get(job);
            if before == Some(totals) {
                continue;
            }
            let known = |session| before.is_some_and(|before| before.suspects.contains(session));
            for session in totals.suspects.iter().filter(|session| !known(session)) {
                tracing::warn!(%job, %session, "A task reports far more load than its callers offered it; it is believed as far as they bear it out");
            }
            let avoided = |session| before.is_some_and(|b| b.outliers.contains_key(session));
            for (session, callers) in totals.outliers.iter().filter(|(s, _)| !avoided(s)) {
                tracing::warn!(%job, %session, callers, "Callers avoid a task: their requests to it fail, though it heartbeats; look at its logs, and restart or drain it if it does not recover");
            }
            shown.insert(job.clone(), totals.clone());
        }
    }

    /// Asks the leader, if this node leads, and has done what it says.
    fn lead(&mut self, ask: impl FnOnce(&mut Leader, Time, &State, &mut Vec<Action>)) {
        let Some(leading) = &mut self.leading else { return };
        let mut out = std::mem::take(&mut leading.out);
        ask(&mut leading.leader, self.clock.now(), &self.consensus.state(), &mut out);
        for action in out.drain(..) {
            match action {
                Action::Propose(command) => leading.propose(&self.consensus, command),
                Action::Plan(round) => leading.plan(round),
                Action::Confirm => leading.confirm(&self.consensus),
                Action::Grant { job, session, request, generation } => {
                    self.sessions.grant(&job, session, Grant { request, generation });
                }
                // The session looks at the state and finds that it has nothing left.
                Action::Drained { job, session } => self.sessions.look_again_at(&job, session),
            }
        }
        leading.out = out;
        leading.refill(&self.consensus);
    }
}

impl Leading {
    fn new(term: u64, leader: Leader) -> Self {
        let (out, queue) = (Vec::new(), VecDeque::new());
        let (proposals, plans, confirmations) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        Self { term, leader, out, queue, proposals, plans, confirmations }
    }

    fn propose(&mut self, consensus: &Consensus, command: Command) {
        if self.queue.len() < QUEUE_MAX {
            self.queue.push_back(command);
            self.refill(consensus);
        } else {
            tracing::warn!(%command, "too many proposals wait; this one fails");
            self.proposals.spawn(async move { Some(command) });
        }
    }

    /// Sends proposals on their way while there is room.
    fn refill(&mut self, consensus: &Consensus) {
        while self.proposals.len() < PROPOSALS_MAX
            && let Some(command) = self.queue.pop_front()
        {
            let consensus = consensus.clone();
            self.proposals.spawn(propose(consensus, self.term, command));
        }
    }

    /// Asks a quorum whether this node leads. For owners whose leases run out meanwhile it is urgent, so it runs beside all else.
    fn confirm(&mut self, consensus: &Consensus) {
        let consensus = consensus.clone();
        self.confirmations.spawn(async move { consensus.confirm_leadership().await.is_ok() });
    }

    fn plan(&mut self, round: Box<Round>) {
        self.plans.spawn_blocking(move || plan(&round));
    }

    /// Waits for something that was begun to end; for ever where nothing was. Safe to cancel.
    async fn settled(leading: &mut Option<Self>) -> Option<Event> {
        let Some(leading) = leading else { return std::future::pending().await };
        let settled = tokio::select! {
            Some(failed) = leading.proposals.join_next() => failed.map(|it| it.map(Event::Failed)),
            Some(planned) = leading.plans.join_next() => planned.map(Some),
            Some(confirmed) = leading.confirmations.join_next() => {
                Ok(Some(Event::Confirmed(confirmed.unwrap_or(false))))
            }
            else => std::future::pending().await,
        };
        settled.unwrap_or_else(|error| {
            tracing::error!(%error, "a proposal or a plan was lost");
            None
        })
    }
}

/// Puts a command into the log, and gives it back if that came to nothing.
async fn propose(consensus: Consensus, term: u64, command: Command) -> Option<Command> {
    match timeout(PROPOSAL_PATIENCE, consensus.propose_in(term, command.clone())).await {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => {
            tracing::debug!(%command, %error, "proposal refused");
            Some(command)
        }
        Err(_) => {
            tracing::warn!(%command, "nobody knows what became of a proposal");
            Some(command)
        }
    }
}

fn plan(round: &Round) -> Event {
    let (job, base) = (round.assignment.job.clone(), round.assignment.generation);
    // A planner's bug must not stop the job for good: nothing moves this time, and the next round tries again.
    let plan = catch_unwind(AssertUnwindSafe(|| balance::plan(round))).unwrap_or_else(|_| {
        tracing::error!(%job, generation = %base, "the planner panicked; nothing moves this round");
        let none = Ratio::from_millionths(0);
        Plan { base, edits: Vec::new(), imbalance: (none, none), total: Load::ZERO }
    });
    Event::Planned { job, plan }
}

/// The node's clock, as `core` counts: the one place where both meet.
#[derive(Clone, Copy, Debug)]
struct Clock {
    origin: Instant,
}

impl Clock {
    fn new() -> Self {
        Self { origin: Instant::now() }
    }

    fn now(self) -> Time {
        Time::ZERO + self.origin.elapsed()
    }

    fn instant(self, time: Time) -> Instant {
        self.origin + time.since(Time::ZERO)
    }
}

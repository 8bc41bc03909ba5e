//! The control plane of a test service: core's state and leader over a log of one node, which agrees with itself at once.
//!
//! Every call runs to its end under one lock: a command is applied as soon as it is proposed, a plan is made where it is asked
//! for. So whatever has happened is decided on when a call returns, and only time and tasks can bring news.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::balance;
use mandoline_core::command::Command;
use mandoline_core::generation::Generation;
use mandoline_core::leader::{Action, Event, Leader};
use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::report::Report;
use mandoline_core::slice::Slice;
use mandoline_core::spec::JobSpec;
use mandoline_core::state::{Job, Outcome, Refused, State};
use mandoline_core::task::SessionId;
use mandoline_core::time::Time;
use mandoline_distributor::hub::Hub;
use tokio::sync::mpsc;

/// What a session's connection is told beside assignments.
#[derive(Clone, Copy, Debug)]
pub(super) enum Notice {
    /// An owner's renewal was granted.
    Grant { request: u64, generation: Generation },
    /// The state should be looked at again.
    LookAgain,
}

/// Decides for one job.
pub(super) struct Desk {
    pub(super) job: JobName,
    pub(super) hub: Hub,
    nanos: Arc<AtomicU64>,
    inner: Mutex<Inner>,
}

struct Inner {
    state: State,
    leader: Leader,
    /// What each session said last.
    reports: BTreeMap<SessionId, Report>,
    /// The newest connection of each session, by number. What waits there is at most what one session asked for.
    seats: BTreeMap<SessionId, (u64, mpsc::UnboundedSender<Notice>)>,
    last_seat: u64,
}

impl Desk {
    /// Makes the job and begins to lead, at the time that `nanos` says.
    pub(super) fn new(spec: JobSpec, nanos: Arc<AtomicU64>) -> Result<Self, Refused> {
        let (job, hub, mut state) = (spec.name.clone(), Hub::new(), State::default());
        state.apply(Command::ApplyJob { spec, if_version: None })?;
        hub.publish(Arc::clone(&state.job(&job)?.assignment), None);
        let leader = Leader::new(read(&nanos), &state);
        let (reports, seats) = (BTreeMap::new(), BTreeMap::new());
        let inner = Mutex::new(Inner { state, leader, reports, seats, last_seat: 0 });
        Ok(Self { job, hub, nanos, inner })
    }

    pub(super) fn assignment(&self) -> Arc<Assignment> {
        self.read(|job| Arc::clone(&job.assignment))
    }

    /// Looks at what is agreed on.
    pub(super) fn read<R>(&self, look: impl FnOnce(&Job) -> R) -> R {
        look(self.lock().state.job(&self.job).expect("the job was made with the desk"))
    }

    /// Carries commands out, all before the leader hears of any; up to the first that is refused.
    pub(super) fn propose(
        &self,
        commands: impl IntoIterator<Item = Command>,
    ) -> Result<Outcome, Refused> {
        let inner = &mut *self.lock();
        let mut outcome = Ok(Outcome::Done);
        for command in commands {
            outcome = self.apply(inner, command);
            if outcome.is_err() {
                break;
            }
        }
        self.happen(inner, Event::Applied { job: self.job.clone() });
        outcome
    }

    /// Tells the leader what happened.
    pub(super) fn tell(&self, event: Event) {
        let inner = &mut *self.lock();
        if let Event::Reported { report, .. } = &event {
            inner.reports.insert(report.session, report.clone());
        }
        self.happen(inner, event);
    }

    /// Lets the leader look at the clock.
    pub(super) fn tick(&self) {
        let (inner, mut out) = (&mut *self.lock(), Vec::new());
        inner.leader.tick(self.now(), &inner.state, &mut out);
        let events = out.into_iter().filter_map(|action| self.act(inner, action)).collect();
        self.settle(inner, events);
    }

    /// Begins a round of balancing now.
    pub(super) fn rebalance(&self) {
        self.lock().leader.hasten(self.now(), &self.job);
        self.tick();
    }

    /// Adds up what living tasks last reported for keys within `slice`.
    pub(super) fn attributed(&self, slice: Slice) -> Load {
        let inner = self.lock();
        let job = inner.state.job(&self.job).expect("the job was made with the desk");
        let living = inner.reports.values();
        let living = living.filter(|report| job.assignment.tasks.contains_key(&report.session));
        living
            .flat_map(|report| {
                let parts = report.slices.iter().filter_map(move |(part, _)| part.overlap(slice));
                parts.filter_map(|part| report.load_of(part))
            })
            .sum()
    }

    /// Takes a session on over a new connection; one that there was before ends.
    pub(super) fn take_seat(&self, session: SessionId) -> (u64, mpsc::UnboundedReceiver<Notice>) {
        let mut inner = self.lock();
        let (notices, noticed) = mpsc::unbounded_channel();
        inner.last_seat += 1;
        let seat = inner.last_seat;
        inner.seats.insert(session, (seat, notices));
        self.happen(&mut inner, Event::Attached { job: self.job.clone(), session });
        (seat, noticed)
    }

    /// Notes that a connection is over.
    pub(super) fn leave_seat(&self, session: SessionId, seat: u64) {
        let mut inner = self.lock();
        if inner.seats.get(&session).is_some_and(|(newest, _)| *newest == seat) {
            inner.seats.remove(&session);
            self.happen(&mut inner, Event::Broken { job: self.job.clone(), session });
        }
    }

    pub(super) fn spec(&self) -> JobSpec {
        self.read(|job| job.spec.clone())
    }

    fn now(&self) -> Time {
        read(&self.nanos)
    }

    fn happen(&self, inner: &mut Inner, event: Event) {
        self.settle(inner, VecDeque::from([event]));
    }

    /// Has the leader hear what happened and what came of it, until nothing more does.
    fn settle(&self, inner: &mut Inner, mut events: VecDeque<Event>) {
        let mut out = Vec::new();
        while let Some(event) = events.pop_front() {
            inner.leader.handle(self.now(), &inner.state, event, &mut out);
            for action in out.drain(..) {
                events.extend(self.act(inner, action));
            }
        }
    }

    /// Does what the leader says, and gives what came of it.
    fn act(&self, inner: &mut Inner, action: Action) -> Option<Event> {
        match action {
            Action::Propose(command) => Some(match self.apply(inner, command.clone()) {
                Ok(_) => Event::Applied { job: self.job.clone() },
                Err(_) => Event::Failed(command),
            }),
            // The only node of a cluster leads for as long as there is one.
            Action::Confirm => Some(Event::Confirmed(true)),
            Action::Plan(round) => {
                Some(Event::Planned { job: self.job.clone(), plan: balance::plan(&round) })
            }
            Action::Grant { session, request, generation, .. } => {
                notify(inner, session, Notice::Grant { request, generation });
                None
            }
            Action::Drained { session, .. } => {
                notify(inner, session, Notice::LookAgain);
                None
            }
        }
    }

    fn apply(&self, inner: &mut Inner, command: Command) -> Result<Outcome, Refused> {
        let applied = inner.state.apply(command)?;
        if let Some(delta) = &applied.delta {
            let assignment = Arc::clone(&inner.state.job(&self.job)?.assignment);
            self.hub.publish(assignment, Some(delta));
        }
        Ok(applied.outcome)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn notify(inner: &Inner, session: SessionId, notice: Notice) {
    if let Some((_, notices)) = inner.seats.get(&session) {
        // A connection that is over hears nothing.
        let _gone = notices.send(notice);
    }
}

fn read(nanos: &AtomicU64) -> Time {
    Time::ZERO + Duration::from_nanos(nanos.load(Ordering::SeqCst))
}

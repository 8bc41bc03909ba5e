//! When to plan and what to propose: what only the leader does, on soft knowledge that it gathers anew each time.
//!
//! The shell tells it what happened (`handle`), looks in when it asked to be looked in on (`tick`, `deadline`), and carries
//! out its actions. It exists only while its node leads. One plan or change of a job is under way at a time; whatever
//! happens meanwhile is taken up when that is settled.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::assignment::Assignment;
use crate::balance::{InFlight, Policy, Round};
use crate::brake::{Hold, Limits};
use crate::command::{Command, EndReason};
use crate::confine::{self, Record};
use crate::forecast::Forecast;
use crate::generation::Generation;
use crate::handoff::HandOffs;
use crate::lease::{Ledger, Margin, Renewal};
use crate::load::Load;
use crate::name::{JobName, TaskName};
use crate::offers::{Offer, OfferError, Offers, Totals};
use crate::plan::{Move, Plan};
use crate::report::{LoadTable, Report, ReportError};
use crate::restart::{NotNow, Restarts};
use crate::roster::Roster;
use crate::sizes::Sizes;
use crate::spec::{Consistency, LEASE_MAX};
use crate::state::{Job, Refused, State};
use crate::task::{Phase, SessionId};
use crate::time::Time;
use crate::transit::HandOffId;
use crate::ward::{Due, Wards};

/// How often loads are stored with the assignment: what a new leader starts from is no older, and the log hardly grows.
const STORE_EVERY: Duration = Duration::from_secs(60);

/// How long after a change came to nothing the next one is planned: soon, yet no busy loop if it is refused for ever.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How soon the end of a restore's hold-off is proposed again, if nothing came of it.
const SETTLE_AGAIN: Duration = Duration::from_millis(100);

/// How many rounds wait for a task to come back: one that flaps must not keep the others from being evened out for ever.
const HELD_ROUNDS: u32 = 3;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A session's connection was opened here.
    Attached {
        /// Which job.
        job: JobName,
        /// Whose.
        session: SessionId,
    },
    /// A session gave a sign of life.
    Heard {
        /// Which job.
        job: JobName,
        /// Whose.
        session: SessionId,
    },
    /// An owner asked for more time.
    Renewed {
        /// Which job.
        job: JobName,
        /// Whose.
        session: SessionId,
        /// Its number, which the grant repeats.
        request: u64,
    },
    /// The confirmation that was asked for came out: this node led at some time since, or it is not known to.
    Confirmed(bool),
    /// A task is ready for a slice that is on its way there.
    Ready {
        /// Which job.
        job: JobName,
        /// Which task.
        session: SessionId,
        /// Which hand-off.
        id: HandOffId,
    },
    /// A task has let go of a slice.
    Acknowledged {
        /// Which job.
        job: JobName,
        /// Which task.
        session: SessionId,
        /// Which hand-off.
        id: HandOffId,
    },
    /// A session's connection broke.
    Broken {
        /// Which job.
        job: JobName,
        /// Whose.
        session: SessionId,
    },
    /// A session reported its load.
    Reported {
        /// Which job.
        job: JobName,
        /// What it measured.
        report: Report,
    },
    /// A plan that was asked for is made.
    Planned {
        /// Which job.
        job: JobName,
        /// What it says.
        plan: Plan,
    },
    /// Another process wants to register under the name of a session: whoever started it thinks that the one before is gone.
    Succeeded {
        /// Which job.
        job: JobName,
        /// Whose name it is.
        session: SessionId,
    },
    /// A command of this job was applied: its assignment or its spec may have changed.
    Applied {
        /// Which job.
        job: JobName,
    },
    /// A proposal came to nothing: it was refused, or nobody knows.
    Failed(Command),
}

/// Something to do.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there are few at a time, and each is gone in a moment"
)]
pub enum Action {
    /// Put this into the log. If that fails, say so.
    Propose(Command),
    /// Confirm by a quorum that begins now that this node leads, and come back with what came out.
    Confirm,
    /// Answer an owner's renewal.
    Grant {
        /// Which job.
        job: JobName,
        /// Whose.
        session: SessionId,
        /// The number of its renewal.
        request: u64,
        /// The newest generation that is applied.
        generation: Generation,
    },
    /// Run `balance::plan` on a worker and come back with what it says.
    Plan(Box<Round>),
    /// Tell a leaving task that its last slice is gone, or that nobody is there to take what it has.
    Drained {
        /// Which job.
        job: JobName,
        /// Which task.
        session: SessionId,
    },
}

/// What only the leader does.
#[derive(Clone, Debug)]
pub struct Leader {
    jobs: BTreeMap<JobName, Lead>,
    /// Of all jobs together: one confirmation serves all renewals that wait.
    ledger: Ledger,
    margin: Margin,
    /// When a restored cluster's exclusive slices may get owners.
    settles: Option<Time>,
    /// Whether that is still to come.
    hold_off: bool,
}

impl Leader {
    /// Begins to lead: every session that has not ended counts as heard of just now.
    pub fn new(now: Time, state: &State) -> Self {
        Self::with_margin(now, state, Margin::STANDARD)
    }

    /// Begins to lead with another margin for clocks, for tests that show what it is for.
    pub fn with_margin(now: Time, state: &State, margin: Margin) -> Self {
        let settles = state.hold_off.then(|| now + margin.waited(LEASE_MAX));
        let (jobs, ledger) = (BTreeMap::new(), Ledger::new(margin));
        let mut leader = Self { jobs, ledger, margin, settles, hold_off: state.hold_off };
        for job in state.jobs.keys() {
            leader.lead(now, state, job);
        }
        leader
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, state: &State, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Attached { job, session } => {
                self.with(&job, |lead| lead.roster.attached(now, session));
            }
            Event::Heard { job, session } => {
                self.with(&job, |lead| lead.roster.heard(now, session));
            }
            Event::Renewed { job, session, request } => {
                self.with(&job, |lead| lead.roster.heard(now, session));
                if self.ledger.ask(now, Renewal { job, session, request }) {
                    out.push(Action::Confirm);
                }
            }
            Event::Confirmed(leads) => self.confirmed(leads, state, out),
            Event::Ready { job, session, id } => {
                self.with(&job, |lead| lead.hand_offs.ready(session, id));
                self.step(now, &job, out);
            }
            Event::Acknowledged { job, session, id } => {
                self.with(&job, |lead| lead.hand_offs.acknowledged(session, id));
                self.step(now, &job, out);
            }
            Event::Broken { job, session } => {
                self.with(&job, |lead| lead.roster.broken(now, session));
            }
            Event::Succeeded { job, session } => {
                self.with(&job, |lead| {
                    lead.succeeded.insert(session);
                });
            }
            Event::Reported { job, report } => self.with(&job, |lead| lead.report(report)),
            Event::Planned { job, plan } => {
                if let Some(lead) = self.lead(now, state, &job) {
                    lead.planned(now, state, &job, plan, out);
                }
            }
            Event::Applied { job } => {
                if let Some(lead) = self.lead(now, state, &job) {
                    lead.applied(now, state, &job, out);
                }
            }
            Event::Failed(Command::End { job, session, .. }) => {
                self.with(&job, |lead| {
                    lead.roster.acquit(now, session);
                    lead.record.acquit(session);
                });
            }
            Event::Failed(Command::Change { job, .. }) => self.with(&job, |lead| lead.retry(now)),
            Event::Failed(Command::HandOff { job, .. }) => {
                self.with(&job, |lead| lead.hand_offs.failed(now + RETRY_AFTER));
            }
            // Stored loads are renewed before long, and so is that a grace is over; the rest is proposed by others, who hear of it
            // themselves.
            Event::Failed(_) => {}
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Time, state: &State, out: &mut Vec<Action>) {
        self.settle(now, state, out);
        for (name, lead) in &mut self.jobs {
            let Ok(job) = state.job(name) else { continue };
            for session in lead.lost(now, job) {
                if !self.ledger.is_over(now, session) {
                    // It may still believe that it owns.
                    lead.roster.acquit(now, session);
                    continue;
                }
                self.ledger.deny(session);
                lead.crashed(now, session, job, out);
                let (job, reason) = (name.clone(), EndReason::Lost);
                out.push(Action::Propose(Command::End { job, session, reason }));
            }
            out.extend(lead.hand_offs.propose(now, name).map(Action::Propose));
            for (task, session) in lead.restarts.over(now) {
                let job = name.clone();
                out.push(Action::Propose(Command::Forget { job, task, session }));
            }
            if lead.next_round <= now {
                lead.round(now, job, out);
            }
            if lead.next_store <= now {
                lead.store(now, &job.assignment, out);
            }
        }
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Option<Time> {
        self.jobs.values().map(Lead::deadline).chain(self.settles).min()
    }

    /// Ends the time after a restore, and once that is agreed on plans for what waited.
    fn settle(&mut self, now: Time, state: &State, out: &mut Vec<Action>) {
        if self.settles.is_some_and(|settles| settles <= now) {
            self.settles = state.hold_off.then(|| now + SETTLE_AGAIN);
            if state.hold_off {
                out.push(Action::Propose(Command::Settle { incarnation: state.incarnation }));
            }
        }
        if std::mem::replace(&mut self.hold_off, state.hold_off) && !state.hold_off {
            let jobs: Vec<JobName> = self.jobs.keys().cloned().collect();
            for job in jobs {
                self.handle(now, state, Event::Applied { job }, out);
            }
        }
    }

    /// Answers the renewals that waited for a confirmation, and begins the next one for those that came since.
    fn confirmed(&mut self, leads: bool, state: &State, out: &mut Vec<Action>) {
        let (renewals, again) = self.ledger.confirmed(leads);
        for Renewal { job, session, request } in renewals {
            let Ok(known) = state.job(&job) else { continue };
            let Assignment { generation, tasks, .. } = known.assignment.as_ref();
            if tasks.contains_key(&session) {
                let generation = *generation;
                out.push(Action::Grant { job, session, request, generation });
            }
        }
        if again {
            out.push(Action::Confirm);
        }
    }

    /// Proposes what is due of a job's hand-offs.
    fn step(&mut self, now: Time, job: &JobName, out: &mut Vec<Action>) {
        let lead = self.jobs.get_mut(job);
        let due = lead.and_then(|lead| lead.hand_offs.propose(now, job));
        out.extend(due.map(Action::Propose));
    }

    /// Gives the load of a task as of the last round.
    pub fn load_of(&self, job: &JobName, session: SessionId) -> Load {
        self.jobs.get(job).and_then(|lead| lead.loads.get(&session)).copied().unwrap_or_default()
    }

    /// Says whether a task's connection is open here.
    pub fn connected(&self, job: &JobName, session: SessionId) -> bool {
        self.jobs.get(job).is_some_and(|lead| lead.roster.connected(session))
    }

    /// Says whether a task may restart now, and counts it as leaving if so.
    pub fn may_restart(
        &mut self,
        now: Time,
        state: &State,
        job: &JobName,
        task: &TaskName,
    ) -> Result<Result<(), NotNow>, Refused> {
        let known = state.job(job)?;
        if !known.assignment.tasks.values().any(|known| known.info.name == *task) {
            return Err(Refused::NoSuchTask { job: job.clone(), task: task.clone() });
        }
        let lead = self.lead(now, state, job).expect("the job is there");
        Ok(lead.restarts.may_restart(now, known, task))
    }

    /// Gives the hold of a job's brake, while one is on.
    pub fn hold(&self, job: &JobName) -> Option<&Hold> {
        self.jobs.get(job)?.roster.hold()
    }

    /// Gives all holds that are on.
    pub fn holds(&self) -> impl Iterator<Item = (&JobName, &Hold)> {
        self.jobs.iter().filter_map(|(job, lead)| Some((job, lead.roster.hold()?)))
    }

    /// Takes what a caller of a job has offered. `None` if there is no such job.
    pub fn offer(
        &mut self,
        now: Time,
        job: &JobName,
        offer: Offer,
    ) -> Option<Result<(), OfferError>> {
        Some(self.jobs.get_mut(job)?.offers.receive(now, offer))
    }

    /// Gives what callers of each job have offered in all, as of its last round.
    pub fn all_offered(&self) -> impl Iterator<Item = (&JobName, &Totals)> {
        self.jobs.iter().map(|(job, lead)| (job, lead.offers.totals()))
    }

    /// Gives what callers of a job have offered in all, as of the last round.
    pub fn offered(&self, job: &JobName) -> Option<&Totals> {
        Some(self.jobs.get(job)?.offers.totals())
    }

    fn with(&mut self, job: &JobName, act: impl FnOnce(&mut Lead)) {
        // An event of a job that is gone is late, and means nothing.
        if let Some(lead) = self.jobs.get_mut(job) {
            act(lead);
        }
    }

    fn lead(&mut self, now: Time, state: &State, name: &JobName) -> Option<&mut Lead> {
        let job = state.jobs.get(name)?;
        let lead = self.jobs.entry(name.clone()).or_insert_with(|| Lead::new(now, job));
        lead.roster.set_limits(job.spec.heartbeat, Limits::from(&job.spec));
        lead.roster.set_lease(job.spec.owner_lease().map(|lease| self.margin.waited(lease)));
        lead.hold_off = state.hold_off && job.spec.consistency == Consistency::Exclusive;
        let tasks = &job.assignment.tasks;
        for session in lead.roster.sessions().filter(|session| !tasks.contains_key(session)) {
            self.ledger.forget(session);
        }
        for task in tasks.values() {
            if let Some(lease) = task.lease {
                self.ledger.admit(now, task.session, lease);
            }
        }
        let prepare = job.spec.prepare_within;
        lead.hand_offs.sync(now, &job.assignment, prepare, self.margin);
        Some(lead)
    }
}

/// What the leader knows of one job.
#[derive(Clone, Debug)]
struct Lead {
    roster: Roster,
    restarts: Restarts,
    /// Sessions under whose names others knock.
    succeeded: BTreeSet<SessionId>,
    /// When callers are asked again what became of the tasks that are missing.
    next_words: Time,
    /// What tasks that crashed held.
    record: Record,
    wards: Wards,
    table: LoadTable,
    /// The newest generation that each task is known to serve by.
    served: BTreeMap<SessionId, Generation>,
    /// The generation when this leader began: what was moved before has long been heard of.
    began: Generation,
    offers: Offers,
    hand_offs: HandOffs,
    /// Whether nothing may be given to anyone: a backup was restored.
    hold_off: bool,
    forecast: Forecast,
    sizes: Sizes,
    loads: BTreeMap<SessionId, Load>,
    next_round: Time,
    next_store: Time,
    /// What is under way, so that nothing else of this job is.
    busy: Option<Busy>,
    /// Rounds in a row that evened nothing out, since a task could not hear of it.
    held: u32,
    /// Leaving tasks that were told that they have nothing left.
    told: BTreeSet<SessionId>,
    /// Leaving tasks that were told that nobody is there to take what they have.
    alone: BTreeSet<SessionId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Busy {
    /// A plan for this generation is being made.
    Planning(Generation),
    /// A change of this generation is proposed.
    Proposed(Generation),
}

impl Lead {
    fn new(now: Time, job: &Job) -> Self {
        let (spec, assignment) = (&job.spec, job.assignment.as_ref());
        let mut roster = Roster::new(spec.heartbeat, Limits::from(spec));
        roster.sync(now, assignment.tasks.keys().copied());
        Self {
            roster,
            restarts: Restarts::new(now, job),
            succeeded: BTreeSet::new(),
            next_words: now,
            record: Record::new(now, assignment),
            wards: Wards::default(),
            table: LoadTable::default(),
            served: BTreeMap::new(),
            began: assignment.generation,
            offers: Offers::default(),
            hand_offs: HandOffs::default(),
            hold_off: false,
            forecast: Forecast::new(assignment),
            sizes: Sizes::default(),
            loads: BTreeMap::new(),
            // What the leader before could not finish cannot wait for a round.
            next_round: if is_urgent(job) { now } else { now + spec.balance_every },
            next_store: now + STORE_EVERY,
            busy: None,
            held: 0,
            told: BTreeSet::new(),
            alone: BTreeSet::new(),
        }
    }

    fn deadline(&self) -> Time {
        let (roster, hand_offs) = (self.roster.deadline(), self.hand_offs.deadline());
        let soon = [roster, hand_offs, self.restarts.deadline()];
        let due = soon.into_iter().flatten().chain([self.next_round, self.next_store]).min();
        due.expect("there is always a next round")
    }

    /// The sessions that must be taken for lost. While the brake holds, callers are heard about those that are missing.
    fn lost(&mut self, now: Time, job: &Job) -> Vec<SessionId> {
        if let Some(hold) = self.roster.hold()
            && self.next_words <= now
        {
            // Callers do not report more often.
            self.next_words = now + job.spec.report_every;
            let missing: BTreeSet<SessionId> = hold.missing.keys().copied().collect();
            self.roster.hear(now, &self.offers.words(now, &job.assignment, &missing));
        }
        let believed = job.believed.union(&self.succeeded).copied().collect();
        self.roster.tick(now, &believed)
    }

    /// Notes what a task held that crashed, and proposes to confine what crashes follow: before its end is proposed, and so
    /// before anything of it is given to another.
    fn crashed(&mut self, now: Time, session: SessionId, job: &Job, out: &mut Vec<Action>) {
        let at = self.roster.gone_since(session).unwrap_or(now);
        let Some(task) = job.assignment.tasks.get(&session) else { return };
        if self.wards.crashed(now, &task.info.name) {
            // What it had is known to kill.
            return;
        }
        self.record.crashed(at, session, &job.assignment, job.spec.heartbeat);
        let Some(confine::Verdict { slices, crashes }) =
            self.record.verdict(now, job.spec.confine_after)
        else {
            return;
        };
        self.record.settle();
        let (job, task) = (job.spec.name.clone(), task.info.name.clone());
        out.push(Action::Propose(Command::Confine { job, slices, task, crashes }));
    }

    /// Takes back what is over: an operator's word on tasks that are there again, and confinements after an hour without a
    /// crash. Confined keys whose task does not come back are given to another.
    fn tidy(&mut self, now: Time, job: &Job, out: &mut Vec<Action>) {
        let name = &job.spec.name;
        let back = |session: &SessionId| self.roster.connected(*session);
        if !job.believed.is_empty() && job.believed.iter().all(back) {
            let (job, sessions) = (name.clone(), Vec::new());
            out.push(Action::Propose(Command::BelieveLost { job, sessions }));
        }
        for (task, due) in self.wards.due(now) {
            let of_task = job.confined.iter().filter(|confined| confined.task == task);
            let slices: Vec<_> = of_task.map(|confined| confined.slice).collect();
            match due {
                Due::Release => {
                    let release = |slice| Command::Unconfine { job: name.clone(), slice };
                    out.extend(slices.into_iter().map(|slice| Action::Propose(release(slice))));
                }
                Due::Replace => {
                    let Some(task) = self.keeper(job) else { continue };
                    let (job, crashes) = (name.clone(), Vec::new());
                    out.push(Action::Propose(Command::Confine { job, slices, task, crashes }));
                }
            }
        }
    }

    /// The serving task with the least load that keeps nothing confined yet.
    fn keeper(&self, job: &Job) -> Option<TaskName> {
        let free = job.assignment.tasks.values().filter(|task| {
            task.phase == Phase::Serving
                && !job.confined.iter().any(|confined| confined.task == task.info.name)
        });
        let load = |session| self.loads.get(&session).copied().unwrap_or_default();
        let least =
            free.min_by_key(|task| (load(task.session), std::cmp::Reverse(task.session)))?;
        Some(least.info.name.clone())
    }

    fn report(&mut self, report: Report) {
        let served = self.served.entry(report.session).or_default();
        *served = report.generation.max(*served);
        let checked: Result<(), ReportError> = self.table.receive(report);
        // The edge has refused bad reports before, and told their sender.
        debug_assert!(checked.is_ok(), "reports are checked where they come in");
    }

    /// A command of this job was applied. Emergencies are planned for at once, everything else at the next round.
    fn applied(&mut self, now: Time, state: &State, name: &JobName, out: &mut Vec<Action>) {
        let job = &state.jobs[name];
        let assignment = &job.assignment;
        self.next_round = self.next_round.min(now + job.spec.balance_every);
        self.roster.sync(now, assignment.tasks.keys().copied());
        self.restarts.sync(now, job);
        // Whoever stays after all may leave another time.
        self.told.retain(|session| is_leaving(assignment, *session));
        self.record.sync(now, assignment);
        if self.wards.sync(now, job) {
            // An operator, or time, let go of what crashes so far tell of.
            self.record.settle();
        }
        self.succeeded.retain(|session| assignment.tasks.contains_key(session));
        self.served.retain(|session, _| assignment.tasks.contains_key(session));
        if matches!(self.busy, Some(Busy::Proposed(base)) if base < assignment.generation) {
            self.busy = None;
        }
        for session in drained(assignment) {
            if self.told.insert(session) {
                out.push(Action::Drained { job: name.clone(), session });
            }
        }
        self.tell_the_last(assignment, out);
        out.extend(self.hand_offs.propose(now, name).map(Action::Propose));
        if self.busy.is_none() && (self.wards.unplanned || is_urgent(job)) {
            self.plan(now, job, false, out);
        }
    }

    /// Where all tasks leave nobody waits for anybody.
    fn tell_the_last(&mut self, assignment: &Assignment, out: &mut Vec<Action>) {
        let tasks = assignment.tasks.values();
        if tasks.clone().any(|task| task.phase == Phase::Serving) {
            self.alone.clear();
            return;
        }
        let job = &assignment.job;
        self.alone.retain(|session| assignment.tasks.contains_key(session));
        let news = tasks.map(|task| task.session).filter(|session| self.alone.insert(*session));
        out.extend(news.map(|session| Action::Drained { job: job.clone(), session }));
    }

    /// The time for evening out has come: the newest measurements go into the forecast, and that into a plan.
    fn round(&mut self, now: Time, job: &Job, out: &mut Vec<Action>) {
        let assignment = &job.assignment;
        self.next_round = now + job.spec.balance_every;
        self.tidy(now, job, out);
        self.offers.weigh(now, assignment, &mut self.table);
        self.forecast.update(assignment, &self.table);
        self.sizes.update(assignment, &self.table);
        self.table.clear();
        self.loads.clear();
        for (slice, assigned) in assignment.slices.iter() {
            let replicas = assigned.replicas.as_slice();
            let each = self.forecast.load_of(slice).share(1, replicas.len().max(1) as u128);
            for replica in replicas {
                *self.loads.entry(replica.session).or_default() += each;
            }
        }
        if self.busy.is_none() {
            // A task whose connection is not open hears late of what it is given, if ever: evening out can wait for it.
            let mut serving = assignment.tasks.values().filter(|task| task.phase == Phase::Serving);
            let all_hear = serving.all(|task| self.roster.connected(task.session));
            self.held = if all_hear { 0 } else { self.held + 1 };
            // While the brake holds nobody knows who will be there to take anything.
            let even = all_hear || (self.held > HELD_ROUNDS && self.roster.hold().is_none());
            let even = even && !self.restarts.holds(now);
            self.plan(now, job, even, out);
        }
    }

    fn plan(&mut self, now: Time, job: &Job, even: bool, out: &mut Vec<Action>) {
        if self.hold_off {
            return;
        }
        let (of, moving) = settled(job, &self.hand_offs);
        let of = &of;
        if of.tasks.values().all(|task| task.phase != Phase::Serving) {
            return;
        }
        let loads: Vec<Load> =
            of.slices.iter().map(|(slice, _)| self.forecast.load_of(slice)).collect();
        // Before anything was measured nothing is lost by moving it: a job that just began becomes even at once.
        let fresh = self.forecast.is_fresh();
        let policy = Policy {
            pins: job.pins.clone(),
            confined: job.confined.clone(),
            frozen: job.frozen,
            ..Policy::from(&job.spec)
        };
        let in_flight = self.in_flight(job);
        let round = Round {
            now,
            in_flight,
            usual: of.slices.iter().map(|(slice, _)| self.forecast.usual_of(slice)).collect(),
            hot: self.forecast.hot().to_vec(),
            further: self.sizes.further(of, &job.spec.metrics),
            costs: self.sizes.costs(of),
            forecast_error: self.forecast.error(),
            surprise: self.forecast.surprise(),
            fresh,
            moving,
            rollout: self.restarts.before(),
            ..Round::new(Arc::clone(of), loads, policy)
        };
        self.wards.unplanned = false;
        self.busy = Some(Busy::Planning(of.generation));
        out.push(Action::Plan(Box::new(if even || fresh {
            round
        } else {
            round.emergencies_only()
        })));
    }

    /// Slices that were moved to a task that has not reported since: callers may still look for them where they were.
    fn in_flight(&self, job: &Job) -> Vec<InFlight> {
        let served = |session| self.served.get(&session).copied().unwrap_or(self.began);
        let flying = |(moved, step): &(Generation, Move)| match (step.from, step.to) {
            (Some(from), Some(to)) if served(to) < *moved => {
                Some(InFlight { slice: step.slice, from })
            }
            _ => None,
        };
        job.history.iter().filter_map(flying).collect()
    }

    fn planned(
        &mut self,
        now: Time,
        state: &State,
        job: &JobName,
        plan: Plan,
        out: &mut Vec<Action>,
    ) {
        if self.busy != Some(Busy::Planning(plan.base)) {
            return;
        }
        self.busy = None;
        if state.jobs[job].assignment.generation != plan.base {
            // Something came first; what was urgent still is, and the rest cannot wait a whole round for a quiet moment.
            self.retry(now);
            self.applied(now, state, job, out);
        } else if !plan.edits.is_empty() {
            self.busy = Some(Busy::Proposed(plan.base));
            out.push(Action::Propose(Command::Change { job: job.clone(), plan }));
        }
    }

    /// A change came to nothing, mostly because another came first: look again soon.
    fn retry(&mut self, now: Time) {
        self.busy = None;
        self.next_round = self.next_round.min(now + RETRY_AFTER);
    }

    fn store(&mut self, now: Time, assignment: &Assignment, out: &mut Vec<Action>) {
        self.next_store = now + STORE_EVERY;
        let loads: Vec<Load> =
            assignment.slices.iter().map(|(slice, _)| self.forecast.load_of(slice)).collect();
        if assignment.slices.iter().zip(&loads).any(|((_, assigned), load)| assigned.load != *load)
        {
            let (job, base) = (assignment.job.clone(), assignment.generation);
            out.push(Action::Propose(Command::StoreLoads { job, base, loads }));
        }
    }
}

/// The assignment as it will be once all hand-offs are over, and the places of the slices that are in one, or that wait for
/// their task.
fn settled(job: &Job, hand_offs: &HandOffs) -> (Arc<Assignment>, Vec<u32>) {
    let (assignment, waiting) = (&job.assignment, job.waiting());
    let places = waiting.iter().map(|slice| assignment.slices.index_of(slice.first()) as u32);
    let mut moving: Vec<u32> = places.collect();
    if hand_offs.is_empty() {
        return (Arc::clone(assignment), moving);
    }
    let mut settled = assignment.as_ref().clone();
    for (at, assigned) in settled.slices.values_mut().enumerate() {
        if let Some(replicas) = assigned.settled() {
            assigned.replicas = replicas;
            moving.push(at as u32);
        }
    }
    (Arc::new(settled), moving)
}

/// Leaving tasks that serve nothing any more, and to which nothing is on its way either.
fn drained(assignment: &Assignment) -> impl Iterator<Item = SessionId> {
    let leaving = assignment.tasks.values().filter(|task| task.phase == Phase::Draining);
    let mut left: BTreeSet<SessionId> = leaving.map(|task| task.session).collect();
    if !left.is_empty() {
        for (_, assigned) in assignment.slices.iter() {
            let comes = assigned.transit.as_deref().map(|transit| transit.to);
            let serve = assigned.replicas.as_slice().iter().map(|replica| replica.session);
            for session in serve.chain(comes) {
                left.remove(&session);
            }
        }
    }
    left.into_iter()
}

fn is_leaving(assignment: &Assignment, session: SessionId) -> bool {
    assignment.tasks.get(&session).is_some_and(|task| task.phase == Phase::Draining)
}

/// Whether something cannot wait for the next round: a slice that nobody serves, a leaving task that still serves, or a
/// task that has nothing.
fn is_urgent(job: &Job) -> bool {
    let (assignment, waiting) = (&job.assignment, job.waiting());
    let mut busy = BTreeSet::new();
    for (slice, assigned) in assignment.slices.iter() {
        if assigned.replicas.as_slice().is_empty() && !waiting.contains(&slice) {
            return true;
        }
        // What is on its way is planned for.
        let settled = assigned.settled();
        let replicas = settled.as_ref().unwrap_or(&assigned.replicas).as_slice();
        busy.extend(replicas.iter().map(|replica| replica.session));
    }
    assignment.tasks.values().any(|task| match task.phase {
        Phase::Draining => busy.contains(&task.session),
        Phase::Serving => !busy.contains(&task.session),
    })
}

#[cfg(test)]
mod rollouts;

#[cfg(test)]
mod tests {
    mod stage;
    mod leases;
    mod handoffs;

    use super::*;
    use crate::balance;
    use crate::key::SliceKey;
    use crate::offers::{Caller, SliceOffer};
    use crate::report::Size;
    use crate::slice::Slice;
    use crate::spec::{Band, BandOf, JobSpec, Metric, Ratio};
    use crate::state::{Outcome, Refused};
    use crate::task::TaskInfo;
    use crate::transit::{Step, Transit};

    /// A leader, and a log of one node that applies at once.
    pub(super) struct Scene {
        pub(super) state: State,
        pub(super) leader: Leader,
        pub(super) now: Time,
        pub(super) drained: Vec<SessionId>,
        granted: Vec<(SessionId, u64)>,
    }

    pub(super) fn kv() -> JobName {
        "kv".parse().unwrap()
    }

    impl Scene {
        pub(super) fn new() -> Self {
            let (state, now) = (State::default(), Time::from_millis(1_000));
            let leader = Leader::new(now, &state);
            let mut scene = Self { state, leader, now, drained: Vec::new(), granted: Vec::new() };
            scene.propose(Command::ApplyJob { spec: JobSpec::new(kv()), if_version: None });
            scene
        }

        pub(super) fn propose(&mut self, command: Command) -> Option<SessionId> {
            let applied = self.state.apply(command.clone());
            let event =
                if applied.is_ok() { Event::Applied { job: kv() } } else { Event::Failed(command) };
            self.happen(event);
            match applied.ok()?.outcome {
                Outcome::Session(session) => Some(session),
                _ => None,
            }
        }

        fn happen(&mut self, event: Event) {
            let mut out = Vec::new();
            self.leader.handle(self.now, &self.state, event, &mut out);
            self.carry_out(out);
        }

        fn carry_out(&mut self, actions: Vec<Action>) {
            for action in actions {
                match action {
                    Action::Propose(command) => drop(self.propose(command)),
                    Action::Plan(round) => {
                        let plan = balance::plan(&round);
                        self.happen(Event::Planned { job: kv(), plan });
                    }
                    Action::Drained { session, .. } => self.drained.push(session),
                    Action::Confirm => self.happen(Event::Confirmed(true)),
                    Action::Grant { session, request, .. } => self.granted.push((session, request)),
                }
            }
        }

        /// Lets time pass; all tasks but `silent` beat, and report the load that `load` gives each key.
        pub(super) fn pass(
            &mut self,
            seconds: u64,
            silent: &[SessionId],
            load: impl Fn(Slice) -> u64,
        ) {
            for second in 0..seconds * 10 {
                self.now += Duration::from_millis(100);
                let assignment = Arc::clone(&self.state.jobs[&kv()].assignment);
                for session in
                    assignment.tasks.keys().copied().filter(|session| !silent.contains(session))
                {
                    self.happen(Event::Heard { job: kv(), session });
                    if second % 50 == 0 {
                        let slices = assignment
                            .of(session)
                            .map(|(s, _)| (s, Load::from_milli(load(s))))
                            .collect();
                        let (generation, window) = (assignment.generation, Duration::from_secs(5));
                        self.happen(Event::Reported {
                            job: kv(),
                            report: Report::new(session, generation, window, slices),
                        });
                    }
                }
                let mut out = Vec::new();
                if self.leader.deadline().is_some_and(|deadline| deadline <= self.now) {
                    self.leader.tick(self.now, &self.state, &mut out);
                }
                self.carry_out(out);
            }
        }

        fn register(&mut self, id: u64) -> SessionId {
            let info = TaskInfo::new(
                format!("t{id}").parse().unwrap(),
                id,
                format!("h:{id}").parse().unwrap(),
            );
            self.join(info)
        }

        pub(super) fn join(&mut self, info: TaskInfo) -> SessionId {
            let session =
                self.propose(Command::Register { job: kv(), info, stopped: None }).unwrap();
            self.happen(Event::Attached { job: kv(), session });
            session
        }

        pub(super) fn load_of(&self, session: SessionId) -> f64 {
            self.leader.load_of(&kv(), session).units()
        }

        pub(super) fn keys_of(&self, session: SessionId) -> f64 {
            let keys: u128 =
                self.state.jobs[&kv()].assignment.of(session).map(|(slice, _)| slice.width()).sum();
            keys as f64 / (1_u128 << 64) as f64
        }
    }

    #[test]
    fn the_first_task_gets_everything_and_the_next_ones_their_part_at_once() {
        let mut scene = Scene::new();
        let first = scene.register(1);
        assert_eq!(scene.keys_of(first), 1.0);
        let more: Vec<SessionId> = (2..=4).map(|id| scene.register(id)).collect();
        for session in more {
            assert!((0.22..0.28).contains(&scene.keys_of(session)), "{}", scene.keys_of(session));
        }
    }

    #[test]
    fn a_lost_task_is_replaced_by_the_others() {
        let mut scene = Scene::new();
        let (lost, other) = (scene.register(1), scene.register(2));
        scene.pass(20, &[], |_| 100_000);
        scene.happen(Event::Broken { job: kv(), session: lost });
        scene.pass(2, &[lost], |_| 100_000);
        assert_eq!(scene.keys_of(other), 1.0);
        assert!(!scene.state.jobs[&kv()].assignment.tasks.contains_key(&lost));
    }

    #[test]
    fn a_newcomer_under_load_is_filled_round_by_round() {
        let mut scene = Scene::new();
        let spec = JobSpec { churn_budget: Ratio::percent(5), ..JobSpec::new(kv()) };
        scene.propose(Command::ApplyJob { spec, if_version: None });
        let _ = [scene.register(1), scene.register(2)];
        let even = |slice: Slice| (slice.width() >> 44) as u64;
        scene.pass(20, &[], even);
        let newcomer = scene.register(3);
        assert_eq!(scene.keys_of(newcomer), 0.0, "no more than emergencies between rounds");
        scene.pass(10, &[], even);
        assert!((0.01..0.06).contains(&scene.keys_of(newcomer)), "{}", scene.keys_of(newcomer));
        scene.pass(100, &[], even);
        assert!(scene.keys_of(newcomer) > 0.25, "{}", scene.keys_of(newcomer));
    }

    /// How many moves a new leader makes in its first round, when one of two tasks reports nearly all load.
    fn moves_of_a_new_leader(with_away: bool) -> u64 {
        let mut scene = Scene::new();
        let (hot, away) = (scene.register(1), scene.register(2));
        scene.leader = Leader::new(scene.now, &scene.state);
        for session in [hot, away].into_iter().take(if with_away { 2 } else { 1 }) {
            scene.happen(Event::Attached { job: kv(), session });
        }
        let assignment = Arc::clone(&scene.state.jobs[&kv()].assignment);
        for (session, milli) in [(hot, 900_000), (away, 100)] {
            let slices = assignment.of(session).map(|(slice, _)| (slice, Load::from_milli(milli)));
            let (generation, window) = (assignment.generation, Duration::from_secs(5));
            let report = Report::new(session, generation, window, slices.collect());
            scene.happen(Event::Reported { job: kv(), report });
        }
        let before = scene.state.jobs[&kv()].churn.moves;
        scene.now += Duration::from_secs(10);
        let mut out = Vec::new();
        scene.leader.tick(scene.now, &scene.state, &mut out);
        scene.carry_out(out);
        scene.state.jobs[&kv()].churn.moves - before
    }

    /// How uneven the memory of two tasks is in the end, whose load is even all the time, where one begins with three times as
    /// much.
    fn memory_of_the_fuller(metrics: Vec<Metric>) -> f64 {
        let mut scene = Scene::new();
        // As wide as it takes: each move of memory moves load, too.
        let band = Band::Fixed { ratio: Ratio::percent(50), of: BandOf::Mean };
        let spec = JobSpec { band, metrics, ..JobSpec::new(kv()) };
        scene.propose(Command::ApplyJob { spec, if_version: None });
        let tasks = [scene.register(1), scene.register(2)];
        // What the first task has at the start is large.
        let start = Arc::clone(&scene.state.jobs[&kv()].assignment);
        let memory = |slice: Slice| match start.get(slice.first()).1.replicas.of(tasks[0]) {
            Some(_) => 30_000,
            None => 10_000,
        };
        let mut held = [0.0; 2];
        for _ in 0..10 {
            let assignment = Arc::clone(&scene.state.jobs[&kv()].assignment);
            for (at, session) in tasks.into_iter().enumerate() {
                let slices: Vec<_> = assignment.of(session).map(|(slice, _)| slice).collect();
                let load = |slice: Slice| Load::from_milli((slice.width() >> 44) as u64);
                let loads = slices.iter().map(|slice| (*slice, load(*slice))).collect();
                let window = Duration::from_secs(5);
                let mut report = Report::new(session, assignment.generation, window, loads);
                let milli =
                    |slice: Slice| ((memory(slice) as u128 * (slice.width() >> 32)) >> 32) as u64;
                let size = |slice: &Slice| Size {
                    slice: *slice,
                    metrics: vec![Load::from_milli(milli(*slice))],
                    move_cost: None,
                };
                report.sizes = slices.iter().map(size).collect();
                held[at] = slices.iter().map(|slice| milli(*slice)).sum::<u64>() as f64;
                scene.happen(Event::Reported { job: kv(), report });
            }
            scene.pass(10, &[], |slice| (slice.width() >> 44) as u64);
        }
        held[0].max(held[1]) * 2.0 / (held[0] + held[1])
    }

    #[test]
    fn a_further_metric_is_kept_in_its_band_as_well() {
        let memory = Metric { name: "memory".to_owned(), band: Ratio::percent(10) };
        let (without, with) = (memory_of_the_fuller(vec![]), memory_of_the_fuller(vec![memory]));
        assert!(with < 1.12 && without > 1.3, "{with} with the metric, {without} without");
    }

    #[test]
    fn load_is_not_evened_out_while_a_task_cannot_hear_of_it() {
        assert!(moves_of_a_new_leader(true) > 0);
        assert_eq!(moves_of_a_new_leader(false), 0);
    }

    #[test]
    fn a_leaving_task_hears_when_its_last_slice_is_gone() {
        let mut scene = Scene::new();
        let (leaving, _) = (scene.register(1), scene.register(2));
        scene.propose(Command::Drain { job: kv(), session: leaving });
        assert_eq!((scene.keys_of(leaving), scene.drained.as_slice()), (0.0, [leaving].as_slice()));
    }

    #[test]
    fn a_plan_that_something_overtook_is_dropped_and_made_anew() {
        let mut scene = Scene::new();
        let first = scene.register(1);
        // A plan is under way when a task registers.
        let info = TaskInfo::new("t2".parse().unwrap(), 2, "h:2".parse().unwrap());
        let mut out = Vec::new();
        let drain = scene.state.apply(Command::Drain { job: kv(), session: first });
        assert!(drain.is_ok());
        scene.leader.handle(scene.now, &scene.state, Event::Applied { job: kv() }, &mut out);
        let told = std::mem::take(&mut out);
        assert!(
            matches!(told.as_slice(), [Action::Drained { session, .. }] if *session == first),
            "there is nobody to take over: {told:?}"
        );
        scene.state.apply(Command::Register { job: kv(), info, stopped: None }).unwrap();
        scene.leader.handle(scene.now, &scene.state, Event::Applied { job: kv() }, &mut out);
        let [Action::Plan(round)] = out.as_slice() else { panic!("a plan is asked for: {out:?}") };
        let stale = balance::plan(round);
        scene.state.apply(Command::Undrain { job: kv(), session: first }).unwrap();
        let mut out = Vec::new();
        scene.leader.handle(
            scene.now,
            &scene.state,
            Event::Planned { job: kv(), plan: stale },
            &mut out,
        );
        assert!(matches!(out.as_slice(), [Action::Plan(_)]), "{out:?}");
    }

    #[test]
    fn a_new_leader_finishes_what_cannot_wait() {
        let mut scene = Scene::new();
        let (gone, other) = (scene.register(1), scene.register(2));
        // The leader died after the end was agreed on and before anyone planned for it.
        scene
            .state
            .apply(Command::End { job: kv(), session: gone, reason: EndReason::Lost })
            .unwrap();
        scene.leader = Leader::new(scene.now, &scene.state);
        scene.pass(1, &[], |_| 0);
        assert_eq!(scene.keys_of(other), 1.0);
    }

    #[test]
    fn a_new_leader_begins_with_the_stored_loads_and_gives_everyone_time() {
        let mut scene = Scene::new();
        let (one, two) = (scene.register(1), scene.register(2));
        scene.pass(70, &[], |_| 100_000);
        let stored: Load =
            scene.state.jobs[&kv()].assignment.slices.iter().map(|(_, a)| a.load).sum();
        assert!(stored > Load::ZERO);
        scene.now += Duration::from_secs(100);
        scene.leader = Leader::new(scene.now, &scene.state);
        scene.pass(2, &[one, two], |_| 0);
        assert_eq!(scene.state.jobs[&kv()].assignment.tasks.len(), 2);
        scene.pass(2, &[one, two], |_| 0);
        assert_eq!(
            scene.state.jobs[&kv()].assignment.tasks.len(),
            0,
            "three heartbeats, and not for ever"
        );
    }

    fn even(slice: Slice) -> u64 {
        (slice.width() >> 44) as u64
    }

    /// Five tasks that serve, of which three fall silent for two minutes.
    fn three_of_five_fall_silent(spec: JobSpec) -> (Scene, Vec<SessionId>) {
        let mut scene = Scene::new();
        scene.propose(Command::ApplyJob { spec, if_version: None });
        let tasks: Vec<SessionId> = (1..=5).map(|id| scene.register(id)).collect();
        scene.pass(20, &[], even);
        let before = scene.state.jobs[&kv()].churn.moves;
        scene.pass(120, &tasks[..3], even);
        let after = &scene.state.jobs[&kv()];
        assert_eq!((after.assignment.tasks.len(), after.churn.moves), (5, before));
        let hold = scene.leader.hold(&kv()).unwrap();
        assert_eq!(hold.missing.keys().copied().collect::<Vec<_>>(), tasks[..3]);
        (scene, tasks)
    }

    #[test]
    fn most_tasks_gone_at_once_are_waited_for_and_are_well_when_they_return() {
        let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
        let before = scene.state.jobs[&kv()].churn.moves;
        scene.pass(5, &[], even);
        assert!(scene.leader.hold(&kv()).is_none());
        let after = &scene.state.jobs[&kv()];
        assert_eq!((after.assignment.tasks.len(), after.churn.moves), (tasks.len(), before));
    }

    #[test]
    fn an_exclusive_job_is_held_likewise() {
        // A session's task has its lease from when it registered.
        let mut scene = Scene::new();
        let spec = JobSpec {
            name: "own".parse().unwrap(),
            consistency: Consistency::Exclusive,
            ..JobSpec::new(kv())
        };
        let own = spec.name.clone();
        scene.propose(Command::ApplyJob { spec, if_version: None });
        let mut tasks = Vec::new();
        for id in 1..=5_u64 {
            let (name, address) = (format!("t{id}"), format!("h:{id}"));
            let info = TaskInfo::new(name.parse().unwrap(), id, address.parse().unwrap());
            let command = Command::Register { job: own.clone(), info, stopped: None };
            let applied = scene.state.apply(command).unwrap();
            let Outcome::Session(session) = applied.outcome else { panic!("{applied:?}") };
            tasks.push(session);
            scene.happen(Event::Applied { job: own.clone() });
        }
        for second in 0..120 {
            scene.now += Duration::from_secs(1);
            for session in &tasks[3..] {
                let (job, session) = (own.clone(), *session);
                scene.happen(Event::Renewed { job, session, request: second });
            }
            let mut out = Vec::new();
            scene.leader.tick(scene.now, &scene.state, &mut out);
            let ends = |action: &Action| matches!(action, Action::Propose(Command::End { .. }));
            assert!(!out.iter().any(ends), "second {second}");
        }
        assert_eq!(scene.leader.hold(&own).unwrap().missing.len(), 3);
        let believe = Command::BelieveLost { job: own, sessions: tasks[..3].to_vec() };
        scene.state.apply(believe).unwrap();
        scene.now += Duration::from_secs(1);
        let mut out = Vec::new();
        scene.leader.tick(scene.now, &scene.state, &mut out);
        let ends = out.iter().filter(|a| matches!(a, Action::Propose(Command::End { .. })));
        assert_eq!(ends.count(), 3, "their leases are long over");
    }

    #[test]
    fn an_operator_says_that_they_are_lost_and_the_word_is_used_up() {
        let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
        // A new leader knows of the word.
        let sessions = tasks[..3].to_vec();
        scene.propose(Command::BelieveLost { job: kv(), sessions });
        scene.leader = Leader::new(scene.now, &scene.state);
        scene.pass(10, &tasks[..3], even);
        let job = &scene.state.jobs[&kv()];
        assert_eq!((job.assignment.tasks.len(), job.believed.len()), (2, 0));
        assert!(scene.leader.hold(&kv()).is_none());
        assert!(job.assignment.slices.iter().all(|(_, a)| !a.replicas.as_slice().is_empty()));
        let unknown = Command::BelieveLost { job: kv(), sessions: tasks[..1].to_vec() };
        assert!(matches!(scene.state.apply(unknown), Err(Refused::NoSuchSession { .. })));
    }

    #[test]
    fn a_word_on_tasks_that_come_back_is_taken_back() {
        let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
        for session in &tasks {
            scene.happen(Event::Heard { job: kv(), session: *session });
        }
        scene.propose(Command::BelieveLost { job: kv(), sessions: tasks[..3].to_vec() });
        scene.pass(20, &[], even);
        let job = &scene.state.jobs[&kv()];
        assert_eq!((job.assignment.tasks.len(), job.believed.len()), (5, 0));
    }

    #[test]
    fn those_under_whose_names_others_knock_are_lost() {
        let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
        scene.happen(Event::Succeeded { job: kv(), session: tasks[0] });
        scene.happen(Event::Succeeded { job: kv(), session: tasks[4] });
        scene.pass(2, &tasks[..3], even);
        let left: Vec<SessionId> =
            scene.state.jobs[&kv()].assignment.tasks.keys().copied().collect();
        assert!(!left.contains(&tasks[0]) && left.contains(&tasks[4]), "{left:?}");
    }

    #[test]
    fn callers_say_whether_tasks_that_are_not_heard_are_gone() {
        for (failed, left) in [(100, 2), (10, 5)] {
            let (mut scene, tasks) = three_of_five_fall_silent(JobSpec::new(kv()));
            for _ in 0..6 {
                let assignment = Arc::clone(&scene.state.jobs[&kv()].assignment);
                let part = |(slice, _): (Slice, _)| SliceOffer {
                    slice,
                    load: Load::from_milli(100_000),
                    failed: Load::from_milli(failed * 1_000),
                };
                let mut slices: Vec<_> = tasks[..3]
                    .iter()
                    .flat_map(|session| assignment.of(*session))
                    .map(part)
                    .collect();
                slices.sort_by_key(|part| part.slice);
                let window = Duration::from_secs(5);
                let caller = Caller(1);
                let offer = Offer { caller, window, slices, hot: vec![] };
                scene.leader.offer(scene.now, &kv(), offer).unwrap().unwrap();
                scene.pass(3, &tasks[..3], even);
            }
            let tasks = scene.state.jobs[&kv()].assignment.tasks.len();
            assert_eq!(tasks, left, "{failed} of 100 fail");
        }
    }

    /// Who serves a key; nobody while it waits.
    fn holder(scene: &Scene, key: SliceKey) -> Option<SessionId> {
        let job = &scene.state.jobs[&kv()];
        job.assignment.slices.get(key).1.replicas.as_slice().first().map(|replica| replica.session)
    }

    fn name_of(scene: &Scene, session: SessionId) -> u64 {
        let task = &scene.state.jobs[&kv()].assignment.tasks[&session];
        task.info.name.as_str()[1..].parse().unwrap()
    }

    /// Whoever serves the key crashes and is back a second later under its name; gives the names of those that crashed.
    fn poison(scene: &mut Scene, key: SliceKey, seconds: u64) -> Vec<u64> {
        let mut crashed = Vec::new();
        for second in 0..seconds {
            if let Some(session) = holder(scene, key) {
                let name = name_of(scene, session);
                crashed.push(name);
                scene.happen(Event::Broken { job: kv(), session });
                scene.pass(2, &[session], even);
                let (process, job, stopped) = (1_000 + second, kv(), None);
                let (name, address) = (format!("t{name}"), format!("h:{name}"));
                let info = TaskInfo::new(name.parse().unwrap(), process, address.parse().unwrap());
                let session = scene.propose(Command::Register { job, info, stopped }).unwrap();
                scene.happen(Event::Attached { job: kv(), session });
            }
            scene.pass(1, &[], even);
        }
        crashed
    }

    #[test]
    fn a_key_that_kills_stays_with_one_task_after_the_third() {
        let mut scene = Scene::new();
        let key = SliceKey(0x7777_7777_7777_7777);
        for id in 1..=4 {
            scene.register(id);
        }
        scene.pass(60, &[], even);
        let crashed = poison(&mut scene, key, 60);
        let confined = &scene.state.jobs[&kv()].confined;
        assert!(!confined.is_empty(), "{crashed:?}");
        assert!(confined.iter().any(|confined| confined.slice.contains(key)));
        assert_eq!(confined[0].crashes.len(), 3, "{crashed:?} {confined:?}");
        let keeper = crashed[2];
        assert_eq!(confined[0].task.as_str(), format!("t{keeper}"));
        assert!(crashed[3..].iter().all(|name| *name == keeper), "{crashed:?}");
        // It serves nothing else, and the others all that is not confined.
        scene.pass(30, &[], even);
        let job = &scene.state.jobs[&kv()];
        for (slice, assigned) in job.assignment.slices.iter() {
            let [replica] = assigned.replicas.as_slice() else { panic!("{slice}: {assigned:?}") };
            let inside = job.confined.iter().any(|c| c.slice.overlap(slice).is_some());
            assert_eq!(name_of(&scene, replica.session) == keeper, inside, "{slice}");
        }
        // A new leader goes on so.
        scene.leader = Leader::new(scene.now, &scene.state);
        let crashed = poison(&mut scene, key, 20);
        assert!(crashed.iter().all(|name| *name == keeper), "{crashed:?}");
    }

    #[test]
    fn confined_keys_are_released_by_word_or_after_an_hour_and_move_on_from_a_task_that_is_gone() {
        let mut scene = Scene::new();
        let key = SliceKey(0x7777_7777_7777_7777);
        let tasks: Vec<SessionId> = (1..=4).map(|id| scene.register(id)).collect();
        scene.pass(20, &[], even);
        let slices = vec![Slice::new(key, key).unwrap()];
        let confine = |task: &str, slices: &[Slice]| Command::Confine {
            job: kv(),
            slices: slices.to_vec(),
            task: task.parse().unwrap(),
            crashes: vec![],
        };
        scene.propose(confine("t2", &slices));
        assert_eq!(holder(&scene, key), Some(tasks[1]));
        assert_eq!(scene.state.jobs[&kv()].assignment.of(tasks[1]).count(), 1);
        // Its task goes for good: another is found, and meanwhile they wait.
        let reason = EndReason::Lost;
        scene.propose(Command::End { job: kv(), session: tasks[1], reason });
        assert_eq!(holder(&scene, key), None);
        scene.pass(40, &[], even);
        assert_eq!(holder(&scene, key), None);
        scene.pass(40, &[], even);
        assert!(holder(&scene, key).is_some());
        // By word.
        let release = Command::Unconfine { job: kv(), slice: slices[0] };
        scene.propose(release.clone());
        assert!(scene.state.jobs[&kv()].confined.is_empty());
        let refused = scene.state.apply(release).unwrap_err();
        assert!(matches!(refused, Refused::NoSuchConfined { .. }), "{refused}");
        let wide = Slice::FULL;
        scene.propose(confine("t1", &slices));
        let refused = scene.state.apply(confine("t1", &[wide])).unwrap_err();
        assert_eq!(refused, Refused::Confined(wide));
        // After an hour.
        scene.pass(3_620, &[], even);
        assert!(scene.state.jobs[&kv()].confined.is_empty());
    }

    #[test]
    fn a_newcomer_under_load_is_filled_at_a_bounded_rate_and_to_the_mean() {
        let mut scene = Scene::new();
        let spec = JobSpec { fill_rate: Ratio::percent(20), ..JobSpec::new(kv()) };
        scene.propose(Command::ApplyJob { spec, if_version: None });
        for id in 1..=4 {
            scene.register(id);
        }
        scene.pass(30, &[], even);
        let newcomer = scene.register(5);
        let mut before = scene.keys_of(newcomer);
        for _ in 0..30 {
            scene.pass(10, &[], even);
            let now = scene.keys_of(newcomer);
            assert!(now - before <= 0.2 * 0.2 + 0.001, "{before} {now}");
            before = now;
        }
        assert!((0.17..0.22).contains(&before), "{before}");
    }
}

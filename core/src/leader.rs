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
use crate::flags::{PauseId, Standing};
use crate::forecast::Forecast;
use crate::generation::Generation;
use crate::handoff::HandOffs;
use crate::lease::{Ledger, Margin, Renewal};
use crate::load::Load;
use crate::name::{JobName, TaskName};
use crate::offers::{Caller, Offer, OfferError, Offers, Totals};
use crate::pauses::{Pauses, Progress, StandingError};
use crate::plan::{Move, Plan};
use crate::report::{LoadTable, Report, ReportError};
use crate::restart::{NotNow, Restarts};
use crate::roster::Roster;
use crate::sizes::Sizes;
use crate::spec::{Consistency, LEASE_MAX};
use crate::state::{Job, Refused, State};
use crate::task::{Phase, SessionId, Task};
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
    /// The flags have changed.
    Flagged,
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
    pauses: Pauses,
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
        let pauses = Pauses::new(now, &state.flags);
        let mut leader = Self { jobs, ledger, margin, settles, hold_off: state.hold_off, pauses };
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
            Event::Flagged => self.pauses.sync(now, &state.flags),
            Event::Failed(Command::EndPause { id, .. } | Command::ClearPause { id }) => {
                self.pauses.failed(now, id);
            }
            Event::Failed(Command::End { job, session, .. }) => {
                let denied = self.ledger.is_denied(session);
                self.with(&job, |lead| lead.not_ended(now, session, denied));
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
        out.extend(self.pauses.over(now, &state.flags).into_iter().map(Action::Propose));
        for (name, lead) in &mut self.jobs {
            let Ok(job) = state.job(name) else { continue };
            for session in lead.condemned(now) {
                let (job, reason) = (name.clone(), EndReason::Lost);
                out.push(Action::Propose(Command::End { job, session, reason }));
            }
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
            out.extend(lead.hand_over(now, name).map(Action::Propose));
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

    /// Has a job's round of balancing due now; `tick` begins it.
    pub fn hasten(&mut self, now: Time, job: &JobName) {
        self.with(job, |lead| lead.next_round = now);
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Option<Time> {
        let jobs = self.jobs.values().map(Lead::deadline);
        jobs.chain(self.settles).chain(self.pauses.deadline()).min()
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
        let due = lead.and_then(|lead| lead.hand_over(now, job));
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
        let Lead { restarts, roster, .. } = lead;
        Ok(restarts.may_restart(now, known, task, |session| roster.connected(session)))
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

    /// Takes how a proxy stands towards the flags; nothing if it stops.
    pub fn stands(
        &mut self,
        now: Time,
        proxy: Caller,
        standing: Option<Standing>,
    ) -> Result<(), StandingError> {
        match standing {
            Some(standing) => self.pauses.receive(now, proxy, standing),
            None => {
                self.pauses.leave(proxy);
                Ok(())
            }
        }
    }

    /// Says how a pause is carried out; nothing if there is none of this id.
    pub fn progress(&mut self, now: Time, id: PauseId) -> Option<Progress> {
        self.pauses.progress(now, id)
    }

    fn with(&mut self, job: &JobName, act: impl FnOnce(&mut Lead)) {
        // An event of a job that is gone is late, and means nothing.
        if let Some(lead) = self.jobs.get_mut(job) {
            act(lead);
        }
    }

    fn lead(&mut self, now: Time, state: &State, name: &JobName) -> Option<&mut Lead> {
        let job = state.jobs.get(name)?;
        let lead =
            self.jobs.entry(name.clone()).or_insert_with(|| Lead::new(now, job, self.margin));
        lead.roster.set_limits(job.spec.heartbeat, Limits::from(&job.spec));
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
    margin: Margin,
    roster: Roster,
    restarts: Restarts,
    /// Owners whose end came to nothing, and when it is proposed again.
    condemned: BTreeMap<SessionId, Time>,
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
    fn new(now: Time, job: &Job, margin: Margin) -> Self {
        let (spec, assignment) = (&job.spec, job.assignment.as_ref());
        let mut roster = Roster::new(spec.heartbeat, Limits::from(spec));
        roster.sync(now, leases(assignment, margin));
        Self {
            margin,
            roster,
            restarts: Restarts::new(now, job),
            condemned: BTreeMap::new(),
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
        let condemned = self.condemned.values().copied().min();
        let soon = [roster, hand_offs, self.restarts.deadline(), condemned];
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

    /// A session's end came to nothing. One that may be granted more is watched anew; one that was denied is over, whatever is
    /// heard of it: else it might keep for ever what it cannot serve, so its end is proposed until it happens.
    fn not_ended(&mut self, now: Time, session: SessionId, denied: bool) {
        if denied {
            self.condemned.insert(session, now + RETRY_AFTER);
        } else {
            self.roster.acquit(now, session);
            self.record.acquit(session);
        }
    }

    /// The owners whose end is to be proposed once more.
    fn condemned(&mut self, now: Time) -> Vec<SessionId> {
        self.condemned.extract_if(.., |_, at| *at <= now).map(|(session, _)| session).collect()
    }

    /// The next step of this job's hand-offs, if one is due.
    fn hand_over(&mut self, now: Time, job: &JobName) -> Option<Command> {
        let Self { hand_offs, roster, .. } = self;
        hand_offs.propose(now, job, |session| roster.away(session))
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
        self.roster.sync(now, leases(assignment, self.margin));
        self.restarts.sync(now, job);
        // Whoever stays after all may leave another time.
        self.told.retain(|session| is_leaving(assignment, *session));
        self.record.sync(now, assignment);
        if self.wards.sync(now, job) {
            // An operator, or time, let go of what crashes so far tell of.
            self.record.settle();
        }
        self.succeeded.retain(|session| assignment.tasks.contains_key(session));
        self.condemned.retain(|session, _| assignment.tasks.contains_key(session));
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
        out.extend(self.hand_over(now, name).map(Action::Propose));
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
        // Before anything was measured nothing is lost by moving it: a job that just began becomes even at once, if its tasks
        // are there to hear of it.
        let fresh = self.forecast.is_fresh() && self.roster.hold().is_none();
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
            away: of.tasks.keys().copied().filter(|session| self.roster.away(*session)).collect(),
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

/// The sessions, each with how long its lease lasts by the leader's clock: as it was when it registered, whatever the spec says
/// since.
fn leases(
    assignment: &Assignment,
    margin: Margin,
) -> impl Iterator<Item = (SessionId, Option<Duration>)> {
    let lease = move |task: &Task| task.lease.map(|lease| margin.waited(lease));
    assignment.tasks.values().map(move |task| (task.session, lease(task)))
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
mod tests;

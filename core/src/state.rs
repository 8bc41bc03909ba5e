//! What the cluster has agreed on: commands go in, in the order of the log, and come out as changed assignments.
//!
//! Every node applies the same commands and gets the same state. Generations and sessions are minted here and nowhere
//! else. A command that no longer fits is refused, and leaves the state as it was.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::assignment::{Assigned, Assignment, Replica};
use crate::command::{ClusterId, Command, EndReason, NodeId};
use crate::confine::{CONFINED_MAX, CRASHES_MAX, Confined, Crash};
use crate::delta::{Delta, TaskChange};
use crate::generation::Generation;
use crate::kept::Kept;
use crate::load::Load;
use crate::name::{JobName, TaskName};
use crate::pin::{PINS_MAX, Pin};
use crate::plan::{self, EditError, Move, Plan, SLICES_MAX};
use crate::slice::Slice;
use crate::spec::{Consistency, JobSpec, Ratio, SpecError};
use crate::task::{Address, Phase, SessionId, TASKS_MAX, Task, TaskInfo, TaskInfoError};
use crate::transit::{Act, HandOffId, Step, Transit};

/// The most jobs of a cluster: beyond that, run another cluster.
pub const JOBS_MAX: usize = 1_000;
/// How many sessions a cluster mints at most between a backup and what is restored from it: one a millisecond for seven weeks.
const RESTORE_GAP: u64 = 1 << 32;
/// How many moves of a job are remembered, the newest: an hour at a move every four seconds.
pub const HISTORY_MAX: usize = 1_000;

/// What the cluster has agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Its identity, once it has one.
    pub cluster: Option<ClusterId>,
    /// Raised when a backup is restored.
    pub incarnation: u64,
    /// The session that was minted last.
    pub last_session: u64,
    /// The node id that was minted last.
    pub last_node: u64,
    /// Whether a backup was restored so lately that a task of the cluster before may still believe that it owns: no exclusive
    /// slice gets an owner until a leader has waited that out.
    pub hold_off: bool,
    /// The jobs by name.
    pub jobs: BTreeMap<JobName, Job>,
}

/// What the cluster has agreed on about one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What is asked of it.
    pub spec: JobSpec,
    /// Grows with each change of the spec, from one.
    pub version: u64,
    /// Who serves what.
    pub assignment: Arc<Assignment>,
    /// Whether slices stay where they are, emergencies apart: by an operator's word.
    pub frozen: bool,
    /// What an operator nailed to tasks, in order, without overlap.
    pub pins: Vec<Pin>,
    /// What waits for tasks that stopped without drain, by their names.
    pub kept: BTreeMap<TaskName, Kept>,
    /// What crashes tasks and stays with one, in order, without overlap.
    pub confined: Vec<Confined>,
    /// Sessions that an operator says are lost, until they end.
    pub believed: BTreeSet<SessionId>,
    /// What all plans together have moved.
    pub churn: Churn,
    /// The newest moves, oldest first, each with the generation that it led to.
    pub history: VecDeque<(Generation, Move)>,
}

/// What all plans of a job together have moved, since the job began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Churn {
    /// Replicas that came, went or moved.
    pub moves: u64,
    /// The key space that someone began to serve, in millionths of all keys.
    pub keys: u64,
    /// The load that someone began to serve, in millionths of the load at the time.
    pub load: u64,
}

/// What a command led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The change that watchers are told of, if an assignment changed.
    pub delta: Option<Delta>,
    /// What the command's sender is told.
    pub outcome: Outcome,
}

/// What a command's sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The node's new id.
    Node(NodeId),
    /// The session of the task, new or as before.
    Session(SessionId),
    /// The version that the job's spec has now.
    Version(u64),
}

/// Why a command was refused. The state is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The cluster has an identity already.
    #[error("the cluster was founded before, as {0}")]
    Founded(ClusterId),
    /// No job has this name.
    #[error("there is no job {0}: `mandoline job apply` makes one")]
    NoSuchJob(JobName),
    /// The spec has a value that makes no sense.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The spec was changed since the operator looked at it.
    #[error("job {job} is at version {version}, not {expected}: look at it again")]
    Version {
        /// Which job.
        job: JobName,
        /// Its version.
        version: u64,
        /// The version that was expected.
        expected: u64,
    },
    /// What two owners may do a moment long, one owner may not: what is written under one rule cannot go on under the other.
    #[error(
        "job {job} is {kind} and cannot become {asked}: make another job, and move callers to it"
    )]
    Consistency {
        /// Which job.
        job: JobName,
        /// What it is.
        kind: Consistency,
        /// What it was to be.
        asked: Consistency,
    },
    /// The task's description has a value that makes no sense.
    #[error(transparent)]
    Task(#[from] TaskInfoError),
    /// Another process lives under this name.
    #[error("task {name} lives at {address} as {session}: stop it, or wait until it is found lost")]
    NameTaken {
        /// The name.
        name: TaskName,
        /// Who has it.
        session: SessionId,
        /// Where that one serves.
        address: Address,
    },
    /// Another task serves at this address.
    #[error("address {address} belongs to task {name}, {session}: give each task its own")]
    AddressTaken {
        /// The address.
        address: Address,
        /// Who has it.
        session: SessionId,
        /// That one's name.
        name: TaskName,
    },
    /// The session has ended, or never was.
    #[error("job {job} has no session {session}: it has ended, register anew")]
    NoSuchSession {
        /// Which job.
        job: JobName,
        /// Which session.
        session: SessionId,
    },
    /// No task of the job has this name.
    #[error("job {job} has no task {task}: `mandoline task list` shows those that are")]
    NoSuchTask {
        /// Which job.
        job: JobName,
        /// Which task.
        task: TaskName,
    },
    /// Some of the keys are pinned as part of another slice.
    #[error("{slice} overlaps {pinned}, which is pinned to {task}: unpin that first")]
    Pinned {
        /// What was to be pinned.
        slice: Slice,
        /// What is.
        pinned: Slice,
        /// To whom.
        task: TaskName,
    },
    /// Nothing is pinned there.
    #[error("job {job} has no pin of {slice}: `mandoline assignment show {job}` lists its pins")]
    NoSuchPin {
        /// Which job.
        job: JobName,
        /// Which keys.
        slice: Slice,
    },
    /// Nothing is confined there.
    #[error("job {job} has not confined {slice}: `mandoline status` lists what it has")]
    NoSuchConfined {
        /// Which job.
        job: JobName,
        /// Which keys.
        slice: Slice,
    },
    /// Some of the keys are confined as part of another range, or the ranges are out of order.
    #[error("{0} overlaps what is confined already, or is out of order")]
    Confined(Slice),
    /// The plan or the loads were made for another assignment.
    #[error("made for generation {base} of job {job}, which is at {newest}")]
    Stale {
        /// Which job.
        job: JobName,
        /// What it was made for.
        base: Generation,
        /// What there is.
        newest: Generation,
    },
    /// The plan does not fit the assignment that it was made for: a bug in the planner.
    #[error("the plan does not fit: {0}")]
    Edit(#[from] EditError),
    /// The plan gives a slice to a task that is not there or is about to stop: a bug in the planner.
    #[error("the plan gives {slice} to {session}, which is not there or is about to stop")]
    Taker {
        /// Which slice.
        slice: Slice,
        /// Which task.
        session: SessionId,
    },
    /// No hand-off is as any of the steps expects: it is over, further, another's, or never was.
    #[error(
        "{id} is no hand-off of job {job} that can be taken on by {act}: it is over, or not that far"
    )]
    StaleHandOff {
        /// Which job.
        job: JobName,
        /// The first of them.
        id: HandOffId,
        /// What should have happened to it.
        act: Act,
    },
    /// A backup was restored lately.
    #[error(
        "no slice of {0} gets an owner yet: a backup was restored, and tasks of the cluster before may still serve"
    )]
    HoldOff(JobName),
    /// There was no restore, or another one since.
    #[error("no restore {0} is waited out")]
    NoHoldOff(u64),
    /// There are as many loads as slices, or the command is wrong.
    #[error("{found} loads for {expected} slices")]
    Loads {
        /// How many slices.
        expected: usize,
        /// How many loads.
        found: usize,
    },
    /// A limit is reached.
    #[error("{what}: the limit is {max}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much there may be.
        max: usize,
    },
}

impl Default for State {
    fn default() -> Self {
        Self {
            cluster: None,
            incarnation: 1,
            last_session: 0,
            last_node: 0,
            hold_off: false,
            jobs: BTreeMap::new(),
        }
    }
}

impl State {
    /// Looks a job up.
    pub fn job(&self, name: &JobName) -> Result<&Job, Refused> {
        self.jobs.get(name).ok_or_else(|| Refused::NoSuchJob(name.clone()))
    }

    /// Carries a command out, or refuses it and leaves everything as it was.
    pub fn apply(&mut self, command: Command) -> Result<Applied, Refused> {
        match command {
            Command::FoundCluster { id, nodes, incarnation } => self.found(id, nodes, incarnation),
            Command::MintNode => {
                self.last_node += 1;
                Ok(Outcome::Node(NodeId(self.last_node)).into())
            }
            Command::ApplyJob { spec, if_version } => self.apply_job(spec, if_version),
            Command::Register { job, info, stopped } => self.register(&job, info, stopped),
            Command::Drain { job, session } => self.set_phase(&job, session, Phase::Draining),
            Command::Undrain { job, session } => self.set_phase(&job, session, Phase::Serving),
            Command::Forget { job, task, session } => self.job_mut(&job)?.forget(&task, session),
            Command::End { job, session, reason } => {
                let job = self.job_mut(&job)?;
                job.task(session)?;
                if reason == EndReason::Lost {
                    job.keep(session);
                }
                Ok(Applied { delta: Some(job.end(session)), outcome: Outcome::Done })
            }
            Command::Change { job, plan } => {
                let hold_off = self.hold_off;
                self.job_mut(&job)?.change(&plan, hold_off)
            }
            Command::HandOff { job, steps } => self.job_mut(&job)?.hand_off(&steps),
            Command::Settle { incarnation } => self.settle(incarnation),
            Command::StoreLoads { job, base, loads } => {
                self.job_mut(&job)?.store_loads(base, &loads)
            }
            Command::Freeze { job } => self.set_frozen(&job, true),
            Command::Unfreeze { job } => self.set_frozen(&job, false),
            Command::Pin { job, slice, task } => self.job_mut(&job)?.pin(slice, task),
            Command::Unpin { job, slice } => self.job_mut(&job)?.unpin(slice),
            Command::BelieveLost { job, sessions } => self.job_mut(&job)?.believe(sessions),
            Command::Confine { job, slices, task, crashes } => {
                self.job_mut(&job)?.confine(&slices, &task, &crashes)
            }
            Command::Unconfine { job, slice } => self.job_mut(&job)?.unconfine(slice),
        }
    }

    fn found(&mut self, id: ClusterId, nodes: u64, incarnation: u64) -> Result<Applied, Refused> {
        if let Some(known) = self.cluster {
            return Err(Refused::Founded(known));
        }
        self.cluster = Some(id);
        self.last_node = self.last_node.max(nodes);
        self.incarnation = self.incarnation.max(incarnation);
        Ok(Outcome::Done.into())
    }

    /// Gives what a restored backup begins with, as cluster `id`: greater generations than any that were given before it is
    /// `incarnation`, no session, and no owner of an exclusive slice until the tasks of the cluster before have surely lapsed.
    #[must_use]
    pub fn restored(&self, id: ClusterId, incarnation: u64) -> Self {
        let incarnation = incarnation.max(self.incarnation + 1);
        // The backup is older than the last session that the cluster before has minted: none may be minted again, also where
        // the clock that the incarnation was read from went back.
        let last_session = (self.last_session + RESTORE_GAP).max(incarnation);
        let (cluster, hold_off) = (Some(id), true);
        let mut state = Self { cluster, incarnation, last_session, hold_off, ..self.clone() };
        for job in state.jobs.values_mut() {
            job.restart(Generation { incarnation, number: 1 });
        }
        state
    }

    fn settle(&mut self, incarnation: u64) -> Result<Applied, Refused> {
        if !self.hold_off || incarnation != self.incarnation {
            return Err(Refused::NoHoldOff(incarnation));
        }
        self.hold_off = false;
        Ok(Outcome::Done.into())
    }

    fn job_mut(&mut self, name: &JobName) -> Result<&mut Job, Refused> {
        self.jobs.get_mut(name).ok_or_else(|| Refused::NoSuchJob(name.clone()))
    }

    fn apply_job(&mut self, spec: JobSpec, if_version: Option<u64>) -> Result<Applied, Refused> {
        spec.check()?;
        let version = self.jobs.get(&spec.name).map_or(0, |job| job.version);
        if let Some(expected) = if_version.filter(|expected| *expected != version) {
            return Err(Refused::Version { job: spec.name, version, expected });
        }
        let kind = self.jobs.get(&spec.name).map(|job| job.spec.consistency);
        if let Some(kind) = kind.filter(|kind| *kind != spec.consistency) {
            return Err(Refused::Consistency { job: spec.name, kind, asked: spec.consistency });
        }
        if version == 0 && self.jobs.len() >= JOBS_MAX {
            return Err(Refused::Limit { what: "jobs of a cluster", max: JOBS_MAX });
        }
        let first = Generation { incarnation: self.incarnation, number: 1 };
        let job =
            self.jobs.entry(spec.name.clone()).or_insert_with(|| Job::new(spec.clone(), first));
        job.spec = spec;
        job.version = version + 1;
        // Callers know of the cap by the assignment alone.
        let differs = job.assignment.spill != job.spill();
        let delta = differs.then(|| job.step(vec![], vec![]));
        Ok(Applied { delta, outcome: Outcome::Version(job.version) })
    }

    fn register(
        &mut self,
        job: &JobName,
        info: TaskInfo,
        stopped: Option<SessionId>,
    ) -> Result<Applied, Refused> {
        info.check()?;
        let minted = SessionId(self.last_session + 1);
        let job = self.job_mut(job)?;
        let same_process =
            |task: &Task| task.info.name == info.name && task.info.incarnation == info.incarnation;
        // Whoever says that its own session has stopped, which lapsed, wants a new one.
        let goes_on = |task: &Task| same_process(task) && Some(task.session) != stopped;
        if let Some(same) = job.find(goes_on) {
            return Ok(Outcome::Session(same.session).into());
        }
        // Only a predecessor may be said to have stopped: whoever bore this name. Of an owner only the process itself may:
        // nobody else can know that it serves no more.
        let may_say = |task: &Task| match task.lease {
            None => task.info.name == info.name,
            Some(_) => same_process(task),
        };
        let stopped = stopped.filter(|session| job.task(*session).is_ok_and(may_say));
        let in_the_way = |task: &&Task| Some(task.session) != stopped;
        if let Some(other) = job.find(|task| task.info.name == info.name).filter(in_the_way) {
            let (session, address) = (other.session, other.info.address.clone());
            return Err(Refused::NameTaken { name: info.name, session, address });
        }
        if let Some(other) = job.find(|task| task.info.address == info.address).filter(in_the_way) {
            let (session, name) = (other.session, other.info.name.clone());
            return Err(Refused::AddressTaken { address: info.address, session, name });
        }
        if job.assignment.tasks.len() >= TASKS_MAX {
            return Err(Refused::Limit { what: "tasks of a job", max: TASKS_MAX });
        }
        let delta =
            job.begin(Task { lease: job.spec.owner_lease(), ..Task::new(minted, info) }, stopped);
        self.last_session = minted.0;
        Ok(Applied { delta: Some(delta), outcome: Outcome::Session(minted) })
    }

    fn set_frozen(&mut self, job: &JobName, frozen: bool) -> Result<Applied, Refused> {
        self.job_mut(job)?.frozen = frozen;
        Ok(Outcome::Done.into())
    }

    fn set_phase(
        &mut self,
        job: &JobName,
        session: SessionId,
        phase: Phase,
    ) -> Result<Applied, Refused> {
        let job = self.job_mut(job)?;
        let task = job.task(session)?;
        if task.phase == phase {
            return Ok(Outcome::Done.into());
        }
        let task = Arc::new(Task { phase, ..task.clone() });
        let delta = job.step(vec![TaskChange::Set(task)], vec![]);
        Ok(Applied { delta: Some(delta), outcome: Outcome::Done })
    }
}

impl Job {
    /// Nails keys to a task that is there. The same keys once more go to the newly named task.
    fn pin(&mut self, slice: Slice, task: TaskName) -> Result<Applied, Refused> {
        if self.find(|known| known.info.name == task).is_none() {
            return Err(Refused::NoSuchTask { job: self.spec.name.clone(), task });
        }
        // Pins neither overlap nor lie out of order, so what could touch this one stands right here.
        let place = self.pins.partition_point(|pin| pin.slice.last() < slice.first());
        let full = self.pins.len() >= PINS_MAX;
        match self.pins.get_mut(place) {
            Some(pin) if pin.slice == slice => pin.task = task,
            Some(pin) if pin.slice.overlap(slice).is_some() => {
                let (pinned, task) = (pin.slice, pin.task.clone());
                return Err(Refused::Pinned { slice, pinned, task });
            }
            _ if full => return Err(Refused::Limit { what: "pins of a job", max: PINS_MAX }),
            _ => self.pins.insert(place, Pin { slice, task }),
        }
        Ok(Outcome::Done.into())
    }

    fn unpin(&mut self, slice: Slice) -> Result<Applied, Refused> {
        let place = self.pins.iter().position(|pin| pin.slice == slice);
        let job = &self.spec.name;
        let place = place.ok_or_else(|| Refused::NoSuchPin { job: job.clone(), slice })?;
        self.pins.remove(place);
        Ok(Outcome::Done.into())
    }

    /// Takes an operator's word that sessions are lost.
    fn believe(&mut self, sessions: Vec<SessionId>) -> Result<Applied, Refused> {
        for session in &sessions {
            self.task(*session)?;
        }
        self.believed = sessions.into_iter().collect();
        Ok(Outcome::Done.into())
    }

    /// Keeps ranges with one task. A plan that is under way does not know of it: the new generation makes it stale.
    fn confine(
        &mut self,
        slices: &[Slice],
        task: &TaskName,
        crashes: &[Crash],
    ) -> Result<Applied, Refused> {
        let mut after = self.confined.clone();
        for slice in slices {
            let evidence = crashes.iter().take(CRASHES_MAX).cloned();
            let place = after.partition_point(|known| known.slice.last() < slice.first());
            match after.get_mut(place) {
                Some(known) if known.slice == *slice => {
                    known.task = task.clone();
                    if !crashes.is_empty() {
                        known.crashes = evidence.collect();
                    }
                }
                Some(known) if known.slice.overlap(*slice).is_some() => {
                    return Err(Refused::Confined(*slice));
                }
                _ => after.insert(
                    place,
                    Confined { slice: *slice, task: task.clone(), crashes: evidence.collect() },
                ),
            }
        }
        if after.len() > CONFINED_MAX {
            return Err(Refused::Limit { what: "confined ranges of a job", max: CONFINED_MAX });
        }
        self.confined = after;
        Ok(Applied { delta: Some(self.step(vec![], vec![])), outcome: Outcome::Done })
    }

    fn unconfine(&mut self, slice: Slice) -> Result<Applied, Refused> {
        let place = self.confined.iter().position(|known| known.slice == slice);
        let job = &self.spec.name;
        let place = place.ok_or_else(|| Refused::NoSuchConfined { job: job.clone(), slice })?;
        self.confined.remove(place);
        Ok(Outcome::Done.into())
    }

    /// Begins a job that nobody serves.
    pub fn new(spec: JobSpec, first: Generation) -> Self {
        let mut assignment = match spec.consistency {
            Consistency::Affinity => Assignment::new(spec.name.clone(), first),
            Consistency::Exclusive => Assignment::exclusive(spec.name.clone(), first),
        };
        assignment.spill = spec.spill.map(|spill| spill.cap);
        let assignment = Arc::new(assignment);
        Self {
            spec,
            version: 0,
            assignment,
            frozen: false,
            pins: Vec::new(),
            kept: BTreeMap::new(),
            confined: Vec::new(),
            believed: BTreeSet::new(),
            churn: Churn::default(),
            history: VecDeque::new(),
        }
    }

    /// The cap for spill that the spec asks for.
    fn spill(&self) -> Option<Ratio> {
        self.spec.spill.map(|spill| spill.cap)
    }

    fn find(&self, wanted: impl Fn(&Task) -> bool) -> Option<&Task> {
        self.assignment.tasks.values().map(Arc::as_ref).find(|task| wanted(task))
    }

    fn task(&self, session: SessionId) -> Result<&Task, Refused> {
        let task = self.assignment.tasks.get(&session).map(Arc::as_ref);
        task.ok_or_else(|| Refused::NoSuchSession { job: self.spec.name.clone(), session })
    }

    fn begin(&mut self, task: Task, stopped: Option<SessionId>) -> Delta {
        let stopped = stopped.filter(|session| self.assignment.tasks.contains_key(session));
        let gone = stopped.map(TaskChange::Gone);
        let kept = self.kept.remove(&task.info.name);
        let kept = stopped.and_then(|session| self.kept_of(session)).or(kept);
        let left = stopped.map_or_else(Vec::new, |session| self.without(session));
        let slices = self.given_back(left, kept.as_ref(), task.session);
        self.step(gone.into_iter().chain([TaskChange::Set(Arc::new(task))]).collect(), slices)
    }

    /// Has the slices of a session that is about to end wait for its task.
    fn keep(&mut self, session: SessionId) {
        let Some(kept) = self.kept_of(session) else { return };
        let name = self.assignment.tasks[&session].info.name.clone();
        if self.kept.len() < TASKS_MAX {
            self.kept.insert(name, kept);
        }
    }

    /// What would wait for a task that stops now: nothing of one that drains, and nothing that is on its way to another.
    fn kept_of(&self, session: SessionId) -> Option<Kept> {
        if self.spec.grace.is_zero() || !self.may_take(session) {
            return None;
        }
        let slices = self.assignment.slices.iter().filter(|(_, assigned)| {
            assigned.transit.is_none() && assigned.replicas.of(session).is_some()
        });
        Kept::new(session, slices.map(|(slice, _)| slice).collect())
    }

    /// The slices of `left`, and those that were kept, with a session that serves the latter from now on.
    fn given_back(
        &self,
        left: Vec<(Slice, Assigned)>,
        kept: Option<&Kept>,
        session: SessionId,
    ) -> Vec<(Slice, Assigned)> {
        let token = self.assignment.generation.next();
        let mut slices: BTreeMap<Slice, Assigned> = left.into_iter().collect();
        for slice in kept.into_iter().flat_map(|kept| &kept.slices) {
            let (whole, known) = self.assignment.get(slice.first());
            let old = slices.get(slice).unwrap_or(known);
            let to = Replica { session, since: token };
            if let Some(replicas) = old.replicas.moved(None, Some(to)).filter(|_| whole == *slice) {
                slices.insert(*slice, Assigned { replicas, token, ..old.clone() });
            }
        }
        slices.into_iter().collect()
    }

    /// Lets go of what waits for a task.
    fn forget(&mut self, task: &TaskName, session: SessionId) -> Result<Applied, Refused> {
        if self.kept.get(task).is_none_or(|kept| kept.session != session) {
            return Err(Refused::NoSuchSession { job: self.spec.name.clone(), session });
        }
        self.kept.remove(task);
        // A generation of its own, so that a plan that was made while they waited is stale.
        Ok(Applied { delta: Some(self.step(vec![], vec![])), outcome: Outcome::Done })
    }

    /// The slices that wait for a task.
    pub fn waiting(&self) -> BTreeSet<Slice> {
        self.kept.values().flat_map(|kept| kept.slices.iter().copied()).collect()
    }

    fn end(&mut self, session: SessionId) -> Delta {
        let left = self.without(session);
        self.step(vec![TaskChange::Gone(session)], left)
    }

    /// The slices that `session` serves or is about to, as they are without it.
    fn without(&self, session: SessionId) -> Vec<(Slice, Assigned)> {
        let now = self.assignment.generation.next();
        let without = |old: &Assigned| {
            let transit = old.transit.as_deref();
            if transit.is_some_and(|transit| transit.to == session) {
                // Whoever has it keeps it, or has it back.
                return Some(Assigned { transit: None, ..old.clone() });
            }
            old.replicas.of(session)?;
            let left = old.replicas.moved(Some(session), None).expect("it serves the slice");
            let was_last = left.as_slice().is_empty();
            match transit {
                Some(to) if to.from == Some(session) || was_last => {
                    if self.may_take(to.to) {
                        let to = Transit { from: Some(session), ..*to };
                        return Some(switched(old, &to, now));
                    }
                    Some(Assigned { replicas: left, token: now, transit: None, load: old.load })
                }
                _ => Some(Assigned { replicas: left, token: now, ..old.clone() }),
            }
        };
        let slices = self.assignment.slices.iter();
        slices.filter_map(|(slice, old)| Some((slice, without(old)?))).collect()
    }

    fn may_take(&self, session: SessionId) -> bool {
        self.task(session).is_ok_and(|task| task.phase == Phase::Serving)
    }

    /// Says whether a move begins a hand-off: an owner has to let go first, a task that prepares is waited for.
    fn hands_over(&self, step: &Move, assigned: &Assigned) -> bool {
        let Some(to) = step.to.and_then(|to| self.task(to).ok()) else { return false };
        match self.spec.consistency {
            Consistency::Exclusive => step.from.is_some(),
            Consistency::Affinity => {
                let is_served = !assigned.replicas.as_slice().is_empty();
                to.info.prepares && is_served && !self.spec.prepare_within.is_zero()
            }
        }
    }

    /// Takes hand-offs further, those that are as the steps expect. Each goes one step at most: nobody can have acted on one
    /// that no assignment has shown.
    fn hand_off(&mut self, steps: &[(HandOffId, Act)]) -> Result<Applied, Refused> {
        let now = self.assignment.generation.next();
        let mut changed: BTreeMap<Slice, Assigned> = BTreeMap::new();
        for (id, act) in steps {
            let (slice, old) = self.assignment.get(id.first);
            let transit = old.transit.as_deref().filter(|transit| transit.id == *id);
            if let Some(new) = transit.and_then(|transit| acted(old, transit, *act, now)) {
                changed.entry(slice).or_insert(new);
            }
        }
        if changed.is_empty() {
            let job = self.spec.name.clone();
            let Some((id, act)) = steps.first().copied() else { return Ok(Outcome::Done.into()) };
            return Err(Refused::StaleHandOff { job, id, act });
        }
        let delta = self.step(vec![], changed.into_iter().collect());
        Ok(Applied { delta: Some(delta), outcome: Outcome::Done })
    }

    /// Begins anew after a restore: the tasks that were are unknown, and so is who serves.
    fn restart(&mut self, first: Generation) {
        let mut assignment = self.assignment.as_ref().clone();
        assignment.generation = first;
        assignment.tasks.clear();
        for assigned in assignment.slices.values_mut() {
            let nobody = assigned.replicas.nobody();
            *assigned = Assigned { replicas: nobody, token: first, transit: None, ..*assigned };
        }
        self.assignment = Arc::new(assignment);
        self.kept.clear();
    }

    /// Moves the assignment one generation on.
    fn step(&mut self, tasks: Vec<TaskChange>, slices: Vec<(Slice, Assigned)>) -> Delta {
        let from = self.assignment.generation;
        let (job, spill) = (self.spec.name.clone(), self.spill());
        let delta = Delta { job, from, to: from.next(), tasks, slices, spill };
        self.assignment =
            Arc::new(delta.apply_to(&self.assignment).expect("a step is made for what there is"));
        // What was said of a session is used up with it.
        self.believed.retain(|session| self.assignment.tasks.contains_key(session));
        delta
    }

    fn current(&self, base: Generation) -> Result<(), Refused> {
        let newest = self.assignment.generation;
        if base == newest {
            Ok(())
        } else {
            Err(Refused::Stale { job: self.spec.name.clone(), base, newest })
        }
    }

    fn change(&mut self, plan: &Plan, hold_off: bool) -> Result<Applied, Refused> {
        self.current(plan.base)?;
        let mut takes = plan.moves().filter_map(|step| Some((step.slice, step.to?)));
        if let Some((slice, session)) = takes.find(|(_, session)| !self.may_take(*session)) {
            return Err(Refused::Taker { slice, session });
        }
        if hold_off
            && self.spec.consistency == Consistency::Exclusive
            && plan.moves().any(|step| step.to.is_some())
        {
            return Err(Refused::HoldOff(self.spec.name.clone()));
        }
        let now = plan.base.next();
        let hands_over = |step: &Move, assigned: &Assigned| self.hands_over(step, assigned);
        let (slices, touched) =
            plan::apply(&plan.edits, &self.assignment.slices, now, &hands_over)?;
        if slices.count() > SLICES_MAX {
            return Err(Refused::Limit { what: "slices of a job", max: SLICES_MAX });
        }
        self.churn.add(plan);
        self.history.extend(plan.moves().map(|step| (now, *step)));
        self.history.drain(..self.history.len().saturating_sub(HISTORY_MAX));
        let touched = union(touched);
        self.kept.retain(|_, kept| kept.release(&touched));
        let changed = touched.into_iter().flat_map(|range| {
            slices
                .touching(range)
                .map(|(slice, assigned)| (slice, assigned.clone()))
                .collect::<Vec<_>>()
        });
        let delta = self.step(vec![], changed.collect());
        debug_assert_eq!(self.assignment.slices, slices, "a delta leads where the edits lead");
        Ok(Applied { delta: Some(delta), outcome: Outcome::Done })
    }

    fn store_loads(&mut self, base: Generation, loads: &[Load]) -> Result<Applied, Refused> {
        self.current(base)?;
        let expected = self.assignment.slices.count();
        if loads.len() != expected {
            return Err(Refused::Loads { expected, found: loads.len() });
        }
        let assignment = Arc::make_mut(&mut self.assignment);
        for (assigned, load) in assignment.slices.values_mut().zip(loads) {
            assigned.load = *load;
        }
        Ok(Outcome::Done.into())
    }
}

impl Churn {
    fn add(&mut self, plan: &Plan) {
        self.moves += plan.moves().count() as u64;
        let keys: u128 =
            plan.moves().filter(|step| step.to.is_some()).map(|step| step.slice.width()).sum();
        // In millionths of 2^64 keys.
        self.keys += (((keys >> 24) * 1_000_000) >> 40) as u64;
        let total = u128::from(plan.total.milli()).max(1);
        self.load += (u128::from(plan.moved().milli()) * 1_000_000 / total) as u64;
    }
}

/// What a slice in hand-off becomes; nothing where the act does not fit.
fn acted(old: &Assigned, transit: &Transit, act: Act, now: Generation) -> Option<Assigned> {
    let exclusive = old.replicas.is_exclusive();
    match (act, transit.step) {
        (Act::Abort, _) => Some(Assigned { transit: None, ..old.clone() }),
        (Act::Release, Step::Preparing) if exclusive => {
            let transit = Transit { step: Step::Releasing, ..*transit };
            Some(Assigned { transit: Some(Arc::new(transit)), ..old.clone() })
        }
        (Act::Switch, Step::Preparing) if !exclusive => Some(switched(old, transit, now)),
        (Act::Acknowledged { by }, Step::Releasing) if transit.from == Some(by) => {
            Some(switched(old, transit, now))
        }
        (Act::Lapsed, Step::Releasing) => Some(switched(old, transit, now)),
        _ => None,
    }
}

/// A slice whose hand-off is over: the next one serves it.
fn switched(old: &Assigned, transit: &Transit, now: Generation) -> Assigned {
    let to = Replica { session: transit.to, since: transit.id.began };
    let replicas = old.replicas.moved(transit.from, Some(to)).expect("a hand-off fits its slice");
    Assigned { replicas, token: now, transit: None, ..old.clone() }
}

impl From<Outcome> for Applied {
    fn from(outcome: Outcome) -> Self {
        Self { delta: None, outcome }
    }
}

/// Joins ranges that overlap, so that each slice is told of once.
fn union(mut ranges: Vec<Slice>) -> Vec<Slice> {
    ranges.sort_unstable();
    let mut joined: Vec<Slice> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(before) if range.first() <= before.last() => {
                *before = Slice::new(before.first(), before.last().max(range.last()))
                    .expect("the end only grows");
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests;

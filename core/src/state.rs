//! What the cluster has agreed on: commands go in, in the order of the log, and come out as changed assignments.
//!
//! Every node applies the same commands and gets the same state. Generations and sessions are minted here and nowhere
//! else. A command that no longer fits is refused, and leaves the state as it was.

mod job;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::command::{ClusterId, Command, EndReason, NodeId};
use crate::delta::{Delta, TaskChange};
use crate::flags::Phase as PausePhase;
use crate::flags::{Flags, PAUSES_MAX, Pause, PauseError, PauseId, PauseOrder, check_release};
use crate::generation::Generation;
use crate::name::{JobName, TaskName};
use crate::plan::EditError;
use crate::slice::Slice;
use crate::spec::{Consistency, JobSpec, SpecError};
use crate::task::{Address, Phase, SessionId, TASKS_MAX, Task, TaskInfo, TaskInfoError};
use crate::transit::{Act, HandOffId};

pub use job::{Churn, HISTORY_MAX, Job};

/// The most jobs of a cluster: beyond that, run another cluster.
pub const JOBS_MAX: usize = 1_000;
/// How many sessions a cluster mints at most between a backup and what is restored from it: one a millisecond for seven weeks.
const RESTORE_GAP: u64 = 1 << 32;

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
    /// What every proxy is told. Their version is of this incarnation.
    pub flags: Arc<Flags>,
    /// The pause that was minted last.
    pub last_pause: u64,
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
    /// The new pause.
    Pause(PauseId),
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
    /// The pause makes no sense, or has no end.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// The pause is over, or never was.
    #[error("there is no pause {0}: `mandoline pause list` shows those that are")]
    NoSuchPause(PauseId),
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
            flags: Arc::new(no_flags(1)),
            last_pause: 0,
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
            Command::AddPause { order } => self.add_pause(order),
            Command::EndPause { id, over } => self.end_pause(id, over),
            Command::ClearPause { id } => self.clear_pause(id),
        }
    }

    fn found(&mut self, id: ClusterId, nodes: u64, incarnation: u64) -> Result<Applied, Refused> {
        if let Some(known) = self.cluster {
            return Err(Refused::Founded(known));
        }
        self.cluster = Some(id);
        self.last_node = self.last_node.max(nodes);
        self.incarnation = self.incarnation.max(incarnation);
        // Newer than those of a cluster before, whose proxies may still be there.
        Arc::make_mut(&mut self.flags).version.incarnation = self.incarnation;
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
        // Pauses are short: those of the backup are long over.
        let (flags, last_pause) = (Arc::new(no_flags(incarnation)), self.last_pause + RESTORE_GAP);
        let (cluster, hold_off) = (Some(id), true);
        let mut state = Self {
            cluster,
            incarnation,
            last_session,
            hold_off,
            flags,
            last_pause,
            ..self.clone()
        };
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

    fn add_pause(&mut self, order: PauseOrder) -> Result<Applied, Refused> {
        order.check()?;
        if let Some(job) = &order.scope.job {
            self.job(job)?;
        }
        if self.flags.pauses.len() >= PAUSES_MAX {
            return Err(Refused::Limit { what: "pauses of a cluster", max: PAUSES_MAX });
        }
        self.last_pause += 1;
        let id = PauseId(self.last_pause);
        let pause = Pause { id, order, phase: PausePhase::Holding };
        self.flag(|pauses| drop(pauses.insert(id, pause)));
        Ok(Outcome::Pause(id).into())
    }

    fn end_pause(&mut self, id: PauseId, over: Duration) -> Result<Applied, Refused> {
        check_release(over)?;
        let known = self.flags.pauses.get(&id).ok_or(Refused::NoSuchPause(id))?;
        let phase = PausePhase::Releasing { over };
        if known.phase != phase {
            self.flag(|pauses| {
                pauses.entry(id).and_modify(|pause| pause.phase = phase);
            });
        }
        Ok(Outcome::Done.into())
    }

    fn clear_pause(&mut self, id: PauseId) -> Result<Applied, Refused> {
        if !self.flags.pauses.contains_key(&id) {
            return Err(Refused::NoSuchPause(id));
        }
        self.flag(|pauses| drop(pauses.remove(&id)));
        Ok(Outcome::Done.into())
    }

    /// Changes the flags, which mints their next version.
    fn flag(&mut self, change: impl FnOnce(&mut BTreeMap<PauseId, Pause>)) {
        let flags = Arc::make_mut(&mut self.flags);
        flags.version = flags.version.next();
        change(&mut flags.pauses);
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

impl From<Outcome> for Applied {
    fn from(outcome: Outcome) -> Self {
        Self { delta: None, outcome }
    }
}

/// What a cluster begins with.
pub fn no_flags(incarnation: u64) -> Flags {
    Flags { version: Generation { incarnation, number: 0 }, ..Flags::default() }
}

#[cfg(test)]
mod tests;

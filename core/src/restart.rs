//! Tasks that stop and come back: whether a rollout runs, which tasks are new in it, and whether one more may restart now.
//!
//! **A rollout** runs from its first step (a task begins to drain, or one of another revision registers) until nothing of it is
//! left to wait for. While it runs load is not evened out: whatever were moved now is moved again when its task restarts. A task
//! that is back stays empty, and is first to get what leaves next; so each slice moves once, those of the first task
//! twice, and the last task is filled when the rollout is over. That is not known but guessed, from how long nothing has
//! happened: three rounds where nobody is away, `STALLED_AFTER` where somebody is, or revisions differ. A rollout that goes on
//! and on, such as one of a revision that crashes, holds for `HOLDS_AT_MOST`.
//!
//! **May it restart?** Not while with it more tasks than the spec allows were unavailable: those that leave, those that went
//! and are not back, those that are not heard and may have gone, and those that were told yes and are still there.
//!
//! When things happened is soft. A new leader takes what it finds for the start of a rollout and those that are gone for just
//! gone, and says no until whoever was told yes by the one before has gone or given up.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::name::TaskName;
use crate::slice::Slice;
use crate::spec::{Consistency, JobSpec};
use crate::state::Job;
use crate::task::{Phase, SessionId};
use crate::time::Time;

/// How many rounds a task that is back stays empty, in case that the next one leaves: who restarts tasks one after another waits
/// for each to be ready, which is probed every ten seconds or so, as often as load is balanced.
const REST_ROUNDS: u32 = 3;
/// The same at most, however rare rounds are.
const REST_MAX: Duration = Duration::from_secs(60);
/// How long a rollout may stand still before load is evened out again: images are fetched, tasks start slowly; yet a canary
/// that stays beside the old revision for days holds nothing up.
const STALLED_AFTER: Duration = Duration::from_secs(300);
/// How long load is held at most, however long a rollout goes on.
const HOLDS_AT_MOST: Duration = Duration::from_secs(3_600);
/// How long a task that went counts as one that comes back. After that it was taken away for good.
const AWAY_FOR: Duration = Duration::from_secs(120);
/// How long a task that was told yes is expected to go: it is asked in the very script that stops it.
const TOLD_FOR: Duration = Duration::from_secs(10);
/// How soon it is said again that a grace is over, if nothing came of it.
const FORGET_AGAIN: Duration = Duration::from_millis(100);
/// How many tasks a refusal names.
const NAMED_MAX: usize = 5;

/// What the leader remembers of a job's tasks that stop and come back.
#[derive(Clone, Debug)]
pub struct Restarts {
    /// The tasks as they were when last looked at.
    seen: BTreeMap<TaskName, Seen>,
    /// Tasks that went and are not back.
    away: BTreeMap<TaskName, Away>,
    /// Tasks that were told yes and are still there, and until when they are expected to go.
    told: BTreeMap<TaskName, (SessionId, Time)>,
    /// What waits for its task, and until when.
    graces: BTreeMap<TaskName, (SessionId, Time)>,
    rollout: Option<Rollout>,
    /// Whether something of a rollout is in sight: a task that leaves, two revisions, slices that wait for their task.
    open: bool,
    /// How long the last of a rollout rests.
    rest: Duration,
    /// Until when whoever was told yes by the leader before may still go.
    strange_until: Option<Time>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    session: SessionId,
    leaves: bool,
    revision: String,
}

#[derive(Clone, Copy, Debug)]
struct Away {
    since: Time,
    drained: bool,
}

#[derive(Clone, Copy, Debug)]
struct Rollout {
    began: Time,
    /// The newest session when it began.
    before: SessionId,
    stepped: Time,
}

/// Why a task had better not restart now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotNow {
    /// So many others are away or about to be as may be.
    #[error("{limit} may be unavailable at once, and {} (`max_unavailable` in the job's spec)", Listed(.others))]
    Others {
        /// How many tasks may be unavailable.
        limit: usize,
        /// Who is.
        others: Vec<(TaskName, Unavailable)>,
    },
    /// The slices of an exclusive or replicated job would have nobody to go to.
    #[error("no other task could take its slices: add one first, or wait until one is back")]
    Alone,
    /// All other tasks that serve one of its slices are away or about to be.
    #[error("no other task that stays serves {0}: wait until its other replicas are back")]
    LastReplica(Slice),
    /// Who leads has just begun to.
    #[error(
        "the leader began lately and does not know yet who is about to restart: ask again in {0:?}"
    )]
    Unknown(Duration),
}

/// How a task is unavailable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// Its slices are moving away.
    Leaves,
    /// It was told that it may restart, and is still there.
    Told,
    /// It has gone and is not back.
    Away,
    /// It is not heard: its end may not be known yet, or a brake holds.
    Silent,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Leaves => "drains",
            Self::Told => "was told that it may restart",
            Self::Away => "is not back yet",
            Self::Silent => "is not heard",
        })
    }
}

struct Listed<'a>(&'a [(TaskName, Unavailable)]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, how)) in self.0.iter().take(NAMED_MAX).enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{name} {how}")?;
        }
        match self.0.len().saturating_sub(NAMED_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl Restarts {
    /// Begins with what there is: tasks that nobody has seen go or come.
    pub fn new(now: Time, job: &Job) -> Self {
        let has_tasks = !job.assignment.tasks.is_empty();
        let mut restarts = Self {
            seen: BTreeMap::new(),
            away: BTreeMap::new(),
            told: BTreeMap::new(),
            graces: BTreeMap::new(),
            rollout: None,
            open: false,
            rest: rest(&job.spec),
            strange_until: has_tasks.then_some(now + TOLD_FOR),
        };
        restarts.sync(now, job);
        let just_gone = Away { since: now, drained: false };
        restarts.away = job.gone.iter().map(|name| (name.clone(), just_gone)).collect();
        restarts
    }

    /// Takes in who is there now.
    pub fn sync(&mut self, now: Time, job: &Job) {
        self.rest = rest(&job.spec);
        self.expire(now);
        let tasks: BTreeMap<TaskName, Seen> = job
            .assignment
            .tasks
            .values()
            .map(|task| {
                let leaves = task.phase == Phase::Draining;
                let revision = task.info.revision.clone();
                (task.info.name.clone(), Seen { session: task.session, leaves, revision })
            })
            .collect();
        self.sync_graces(now, job);
        if tasks == self.seen {
            return;
        }
        let newest =
            |tasks: &BTreeMap<TaskName, Seen>| tasks.values().map(|seen| seen.session).max();
        let before = newest(&self.seen).or_else(|| newest(&tasks)).unwrap_or(SessionId(0));
        let seen = std::mem::replace(&mut self.seen, tasks);
        let came = self.seen.keys().filter(|name| !seen.contains_key(*name));
        for name in came {
            // Where names are drawn anew, such as by a Kubernetes Deployment, a newcomer stands for who has been away longest.
            let longest = self.away.iter().min_by_key(|(_, away)| away.since).map(|(name, _)| name);
            let stands_for = self.away.contains_key(name).then_some(name).or(longest).cloned();
            stands_for.map(|name| self.away.remove(&name));
        }
        for (name, seen) in seen {
            if !self.seen.contains_key(&name) {
                self.away.insert(name, Away { since: now, drained: seen.leaves });
            }
        }
        let tasks = &self.seen;
        self.told.retain(|name, (session, _)| {
            tasks.get(name).is_some_and(|seen| seen.session == *session && !seen.leaves)
        });
        self.look(now, before, !job.kept.is_empty());
    }

    /// Something has changed: a step of a rollout, if one runs or this begins one.
    fn look(&mut self, now: Time, before: SessionId, waits: bool) {
        let mut revisions = self.seen.values().map(|seen| &seen.revision);
        let first = revisions.next();
        let several = revisions.any(|revision| Some(revision) != first);
        self.open = several || waits || self.seen.values().any(|seen| seen.leaves);
        let runs = self.open || self.away.values().any(|away| away.drained);
        match &mut self.rollout {
            Some(rollout) => rollout.stepped = now,
            None if runs => self.rollout = Some(Rollout { began: now, before, stepped: now }),
            None => {}
        }
    }

    /// Slices that wait for their task: each wait counts from when it was first seen.
    fn sync_graces(&mut self, now: Time, job: &Job) {
        let kept = |name: &TaskName| job.kept.get(name).map(|kept| kept.session);
        self.graces.retain(|name, (session, _)| kept(name) == Some(*session));
        for (name, kept) in &job.kept {
            let grace = (kept.session, now + job.spec.grace);
            self.graces.entry(name.clone()).or_insert(grace);
        }
    }

    /// Forgets what was too long ago.
    fn expire(&mut self, now: Time) {
        self.away.retain(|_, away| now.since(away.since) < AWAY_FOR);
        self.told.retain(|_, (_, until)| now < *until);
        self.strange_until = self.strange_until.filter(|until| now < *until);
        let waits = self.open || self.away.values().any(|away| away.drained);
        let quiet = if waits { STALLED_AFTER } else { self.rest };
        self.rollout = self.rollout.filter(|rollout| now < rollout.stepped + quiet);
    }

    /// Says whether load stays where it is, since a rollout runs.
    pub fn holds(&mut self, now: Time) -> bool {
        self.expire(now);
        self.rollout.is_some_and(|rollout| now < rollout.began + HOLDS_AT_MOST)
    }

    /// Gives the session after which tasks are new in the rollout that runs.
    pub fn before(&self) -> Option<SessionId> {
        self.rollout.map(|rollout| rollout.before)
    }

    /// Gives, again and again until it is done, whose grace is over.
    pub fn over(&mut self, now: Time) -> Vec<(TaskName, SessionId)> {
        let mut over = Vec::new();
        for (name, (session, until)) in &mut self.graces {
            if *until <= now {
                *until = now + FORGET_AGAIN;
                over.push((name.clone(), *session));
            }
        }
        over
    }

    /// Says when to look for graces that are over.
    pub fn deadline(&self) -> Option<Time> {
        self.graces.values().map(|(_, until)| *until).min()
    }

    /// Says whether a task that is there may restart now, and counts it from then on. `hears` says which tasks are connected.
    pub fn may_restart(
        &mut self,
        now: Time,
        job: &Job,
        task: &TaskName,
        hears: impl Fn(SessionId) -> bool,
    ) -> Result<(), NotNow> {
        self.expire(now);
        if let Some(until) = self.strange_until {
            return Err(NotNow::Unknown(until.since(now)));
        }
        let others = self.others(job, task, &hears);
        let tasks = job.assignment.tasks.len() + self.away.len();
        let limit = job.spec.max_unavailable.of(tasks);
        if others.len() >= limit {
            return Err(NotNow::Others { limit, others: others.into_iter().collect() });
        }
        let stays = |session: SessionId| {
            let other = &job.assignment.tasks[&session];
            other.phase == Phase::Serving
                && other.info.name != *task
                && hears(session)
                && !self.told.contains_key(&other.info.name)
        };
        let replicated = job.spec.replicas.min > 1;
        let exclusive = job.spec.consistency == Consistency::Exclusive;
        if (replicated || exclusive) && !job.assignment.tasks.keys().any(|other| stays(*other)) {
            return Err(NotNow::Alone);
        }
        if replicated && let Some(slice) = last_replica(job, task, stays) {
            return Err(NotNow::LastReplica(slice));
        }
        if let Some(seen) = self.seen.get(task) {
            self.told.insert(task.clone(), (seen.session, now + TOLD_FOR));
        }
        Ok(())
    }

    /// Who else is unavailable, and how.
    fn others(
        &self,
        job: &Job,
        task: &TaskName,
        hears: impl Fn(SessionId) -> bool,
    ) -> BTreeMap<TaskName, Unavailable> {
        let waited = job.kept.keys().filter(|name| !self.seen.contains_key(*name));
        let away = self.away.keys().chain(waited).map(|name| (name, Unavailable::Away));
        let silent = self.seen.iter().filter(|(_, seen)| !hears(seen.session));
        let silent = silent.map(|(name, _)| (name, Unavailable::Silent));
        let told = self.told.keys().map(|name| (name, Unavailable::Told));
        let leaving = self.seen.iter().filter(|(_, seen)| seen.leaves);
        let leaving = leaving.map(|(name, _)| (name, Unavailable::Leaves));
        let all = away.chain(silent).chain(told).chain(leaving).filter(|(name, _)| *name != task);
        all.map(|(name, how)| (name.clone(), how)).collect()
    }
}

/// Finds a slice of a task that no other serves which stays.
fn last_replica(job: &Job, task: &TaskName, stays: impl Fn(SessionId) -> bool) -> Option<Slice> {
    let tasks = &job.assignment.tasks;
    let own = tasks.values().find(|known| known.info.name == *task)?.session;
    let mut slices = job.assignment.slices.iter();
    let last = slices.find(|(_, assigned)| {
        let mut others = assigned.replicas.as_slice().iter();
        assigned.replicas.of(own).is_some() && !others.any(|replica| stays(replica.session))
    });
    last.map(|(slice, _)| slice)
}

fn rest(spec: &JobSpec) -> Duration {
    (spec.balance_every * REST_ROUNDS).min(REST_MAX)
}

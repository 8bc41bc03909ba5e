//! Who serves every slice of a job, as of one generation.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::name::JobName;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::Ratio;
use crate::task::{SessionId, Task};

/// One of the tasks that a slice is assigned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Who.
    pub session: SessionId,
    /// Since when without a break, kept over splits and merges that moved nothing.
    pub since: Generation,
}

/// The replicas of a slice, none to many. One, by far the most common, needs no allocation.
#[derive(Clone, Debug, Default)]
pub enum Replicas {
    /// Nobody serves the slice: there is no task.
    #[default]
    None,
    /// One task does.
    One(Replica),
    /// Several do, in the order in which they were added.
    Many(Arc<[Replica]>),
}

impl Replicas {
    /// Gives them as a list.
    pub fn as_slice(&self) -> &[Replica] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// Finds one by its task.
    pub fn of(&self, session: SessionId) -> Option<Replica> {
        self.as_slice().iter().copied().find(|replica| replica.session == session)
    }
}

impl FromIterator<Replica> for Replicas {
    fn from_iter<I: IntoIterator<Item = Replica>>(replicas: I) -> Self {
        let mut replicas = replicas.into_iter();
        match (replicas.next(), replicas.next()) {
            (None, _) => Self::None,
            (Some(one), None) => Self::One(one),
            (Some(first), Some(second)) => {
                Self::Many([first, second].into_iter().chain(replicas).collect())
            }
        }
    }
}

impl PartialEq for Replicas {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Replicas {}

/// What an assignment says of one slice.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Assigned {
    /// Who serves it.
    pub replicas: Replicas,
    /// Its load as last stored: soft knowledge that lets a new leader start, never fresher than its last reporting period.
    pub load: Load,
    /// Grows each time the slice changes hands, for storage to reject a late writer.
    pub token: Generation,
}

/// Who serves every slice of a job, as of one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Which job.
    pub job: JobName,
    /// As of when.
    pub generation: Generation,
    /// The tasks that replicas may name.
    pub tasks: BTreeMap<SessionId, Arc<Task>>,
    /// Each slice's replicas. Invariant: they name tasks in `tasks`, each at most once a slice.
    pub slices: SliceMap<Assigned>,
    /// What callers need of the spec: the load of a task in relation to the mean above which they may pass it over, if they
    /// may at all.
    pub spill: Option<Ratio>,
}

impl Assignment {
    /// Begins a job: no task, and so nobody who serves.
    pub fn new(job: JobName, generation: Generation) -> Self {
        Self {
            job,
            generation,
            tasks: BTreeMap::new(),
            slices: SliceMap::uniform(Assigned::default()),
            spill: None,
        }
    }

    /// Looks up the slice of `key` and what the assignment says of it.
    pub fn get(&self, key: SliceKey) -> (Slice, &Assigned) {
        self.slices.get(key)
    }

    /// Walks the slices that `session` serves.
    pub fn of(&self, session: SessionId) -> impl Iterator<Item = (Slice, Replica)> {
        self.slices
            .iter()
            .filter_map(move |(slice, assigned)| Some((slice, assigned.replicas.of(session)?)))
    }

    /// Finds a slice whose replica names a task that the assignment does not have, or names one twice.
    pub fn broken_slice(&self) -> Option<Slice> {
        let broken = |assigned: &Assigned| {
            let replicas = assigned.replicas.as_slice();
            replicas.iter().enumerate().any(|(index, replica)| {
                !self.tasks.contains_key(&replica.session)
                    || replicas[..index].iter().any(|other| other.session == replica.session)
            })
        };
        self.slices.iter().find(|(_, assigned)| broken(assigned)).map(|(slice, _)| slice)
    }
}

/// A line a slice, as transcripts show it.
impl fmt::Display for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.job, self.generation)?;
        for (slice, assigned) in self.slices.iter() {
            write!(f, "  {slice}")?;
            for replica in assigned.replicas.as_slice() {
                let task = self.tasks.get(&replica.session);
                write!(
                    f,
                    " {}@{}",
                    task.map_or("?", |task| task.info.name.as_str()),
                    replica.since
                )?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

//! Assignments, deltas and what they are made of.

use std::sync::Arc;

use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::delta::{Delta, TaskChange};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::Ratio;
use mandoline_core::task::{SessionId, Task};
use mandoline_core::transit::{HandOffId, Step, Transit};

use crate::error::{WireError, each, need};
use crate::pb;

impl From<Generation> for pb::Generation {
    fn from(generation: Generation) -> Self {
        Self { incarnation: generation.incarnation, number: generation.number }
    }
}

impl From<pb::Generation> for Generation {
    fn from(generation: pb::Generation) -> Self {
        Self { incarnation: generation.incarnation, number: generation.number }
    }
}

impl From<HandOffId> for pb::HandOffId {
    fn from(id: HandOffId) -> Self {
        Self { began: Some(id.began.into()), first: id.first.0 }
    }
}

impl TryFrom<pb::HandOffId> for HandOffId {
    type Error = WireError;

    fn try_from(id: pb::HandOffId) -> Result<Self, WireError> {
        Ok(Self { began: need(id.began, "began")?.into(), first: SliceKey(id.first) })
    }
}

impl From<Slice> for pb::Slice {
    fn from(slice: Slice) -> Self {
        Self { first: slice.first().0, last: slice.last().0 }
    }
}

impl TryFrom<pb::Slice> for Slice {
    type Error = WireError;

    fn try_from(slice: pb::Slice) -> Result<Self, WireError> {
        let (first, last) = (SliceKey(slice.first), SliceKey(slice.last));
        Self::new(first, last)
            .ok_or_else(|| WireError::new("slice", format!("{first} lies behind {last}")))
    }
}

/// Reads a job's name.
pub fn job_name(name: &str) -> Result<JobName, WireError> {
    JobName::new(name).map_err(|error| WireError::new("job", error))
}

/// Reads a task's name.
pub fn task_name(name: &str) -> Result<TaskName, WireError> {
    TaskName::new(name).map_err(|error| WireError::new("task", error))
}

/// Reads a session, which is never zero.
pub fn session(id: u64, field: &str) -> Result<SessionId, WireError> {
    if id == 0 { Err(WireError::new(field, "is zero")) } else { Ok(SessionId(id)) }
}

impl From<&Assigned> for pb::Assigned {
    fn from(assigned: &Assigned) -> Self {
        let replica = |replica: &Replica| pb::Replica {
            session: replica.session.0,
            since: Some(replica.since.into()),
        };
        Self {
            replicas: assigned.replicas.as_slice().iter().map(replica).collect(),
            load: assigned.load.milli(),
            token: Some(assigned.token.into()),
            exclusive: assigned.replicas.is_exclusive(),
            transit: assigned.transit.as_deref().map(pb::Transit::from),
        }
    }
}

impl From<&Transit> for pb::Transit {
    fn from(transit: &Transit) -> Self {
        let step = match transit.step {
            Step::Preparing => pb::Step::Preparing,
            Step::Releasing => pb::Step::Releasing,
        };
        Self {
            id: Some(transit.id.into()),
            from: transit.from.map_or(0, |from| from.0),
            to: transit.to.0,
            step: step.into(),
        }
    }
}

impl TryFrom<pb::Transit> for Transit {
    type Error = WireError;

    fn try_from(transit: pb::Transit) -> Result<Self, WireError> {
        let step = match transit.step() {
            pb::Step::Preparing => Step::Preparing,
            pb::Step::Releasing => Step::Releasing,
            pb::Step::Unspecified => {
                return Err(WireError::new("step", "is not one of those that this version knows"));
            }
        };
        let id =
            HandOffId::try_from(need(transit.id, "id")?).map_err(|error| error.within("id"))?;
        let from = (transit.from != 0).then_some(SessionId(transit.from));
        Ok(Self { id, from, to: session(transit.to, "to")?, step })
    }
}

impl TryFrom<pb::Replica> for Replica {
    type Error = WireError;

    fn try_from(replica: pb::Replica) -> Result<Self, WireError> {
        Ok(Self {
            session: session(replica.session, "session")?,
            since: need(replica.since, "since")?.into(),
        })
    }
}

impl TryFrom<pb::Assigned> for Assigned {
    type Error = WireError;

    fn try_from(assigned: pb::Assigned) -> Result<Self, WireError> {
        let replicas = assigned.replicas.into_iter().map(Replica::try_from);
        let replicas =
            replicas.collect::<Result<Vec<_>, _>>().map_err(|error| error.within("replicas"))?;
        let replicas = match (assigned.exclusive, replicas.as_slice()) {
            (false, _) => replicas.into_iter().collect::<Replicas>(),
            (true, []) => Replicas::Owner(None),
            (true, [owner]) => Replicas::Owner(Some(*owner)),
            (true, _) => {
                let many = format!("are {} of a slice that has one owner at most", replicas.len());
                return Err(WireError::new("replicas", many));
            }
        };
        let transit = assigned.transit.map(Transit::try_from).transpose();
        Ok(Self {
            replicas,
            load: Load::from_milli(assigned.load),
            token: need(assigned.token, "token")?.into(),
            transit: transit.map_err(|error| error.within("transit"))?.map(Arc::new),
        })
    }
}

impl From<&Assignment> for pb::Assignment {
    fn from(assignment: &Assignment) -> Self {
        let run = |(slice, assigned): (Slice, &Assigned)| pb::Run {
            first: slice.first().0,
            assigned: Some(assigned.into()),
        };
        Self {
            job: assignment.job.to_string(),
            generation: Some(assignment.generation.into()),
            tasks: assignment.tasks.values().map(|task| task.as_ref().into()).collect(),
            slices: assignment.slices.iter().map(run).collect(),
            spill_cap: assignment.spill.map_or(0, Ratio::millionths),
        }
    }
}

/// Reads a cap; one at the mean or below would have most tasks passed over.
fn spill(cap: u32) -> Result<Option<Ratio>, WireError> {
    match cap {
        0 => Ok(None),
        1..=1_000_000 => {
            let cap = Ratio::from_millionths(cap);
            Err(WireError::new("spill_cap", format!("is {cap}, which is not above 100%")))
        }
        cap => Ok(Some(Ratio::from_millionths(cap))),
    }
}

struct Run(SliceKey, Assigned);

impl TryFrom<pb::Run> for Run {
    type Error = WireError;

    fn try_from(run: pb::Run) -> Result<Self, WireError> {
        Ok(Self(SliceKey(run.first), need(run.assigned, "assigned")?.try_into()?))
    }
}

impl TryFrom<pb::Assignment> for Assignment {
    type Error = WireError;

    fn try_from(assignment: pb::Assignment) -> Result<Self, WireError> {
        let runs = each::<_, Run>(assignment.slices, "slices")?
            .into_iter()
            .map(|Run(first, value)| (first, value));
        let tasks: Vec<Task> = each(assignment.tasks, "tasks")?;
        let slices =
            SliceMap::from_runs(runs.collect()).map_err(|error| WireError::new("slices", error))?;
        let assignment = Self {
            job: job_name(&assignment.job)?,
            generation: need(assignment.generation, "generation")?.into(),
            tasks: tasks.into_iter().map(|task| (task.session, Arc::new(task))).collect(),
            slices,
            spill: spill(assignment.spill_cap)?,
        };
        match assignment.broken_slice() {
            Some(slice) => Err(WireError::new(
                "slices",
                format!(
                    "{slice} names a task that is unknown or named twice, or its hand-off does not fit"
                ),
            )),
            None => Ok(assignment),
        }
    }
}

impl From<&Delta> for pb::Delta {
    fn from(delta: &Delta) -> Self {
        let change = |change: &TaskChange| pb::TaskChange {
            change: Some(match change {
                TaskChange::Set(task) => pb::task_change::Change::Set(task.as_ref().into()),
                TaskChange::Gone(session) => pb::task_change::Change::Gone(session.0),
            }),
        };
        let patch = |(slice, assigned): &(Slice, Assigned)| pb::Patch {
            slice: Some((*slice).into()),
            assigned: Some(assigned.into()),
        };
        Self {
            job: delta.job.to_string(),
            from: Some(delta.from.into()),
            to: Some(delta.to.into()),
            tasks: delta.tasks.iter().map(change).collect(),
            slices: delta.slices.iter().map(patch).collect(),
            spill_cap: delta.spill.map_or(0, Ratio::millionths),
        }
    }
}

impl TryFrom<pb::TaskChange> for TaskChange {
    type Error = WireError;

    fn try_from(change: pb::TaskChange) -> Result<Self, WireError> {
        Ok(match need(change.change, "change")? {
            pb::task_change::Change::Set(task) => Self::Set(Arc::new(task.try_into()?)),
            pb::task_change::Change::Gone(gone) => Self::Gone(session(gone, "gone")?),
        })
    }
}

struct Patch(Slice, Assigned);

impl TryFrom<pb::Patch> for Patch {
    type Error = WireError;

    fn try_from(patch: pb::Patch) -> Result<Self, WireError> {
        Ok(Self(
            need(patch.slice, "slice")?.try_into()?,
            need(patch.assigned, "assigned")?.try_into()?,
        ))
    }
}

impl TryFrom<pb::Delta> for Delta {
    type Error = WireError;

    fn try_from(delta: pb::Delta) -> Result<Self, WireError> {
        let slices = each::<_, Patch>(delta.slices, "slices")?
            .into_iter()
            .map(|Patch(slice, value)| (slice, value));
        Ok(Self {
            job: job_name(&delta.job)?,
            from: need(delta.from, "from")?.into(),
            to: need(delta.to, "to")?.into(),
            tasks: each(delta.tasks, "tasks")?,
            slices: slices.collect(),
            spill: spill(delta.spill_cap)?,
        })
    }
}

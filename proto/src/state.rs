//! The whole state, as snapshots hold it.

use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::confine::Confined;
use mandoline_core::flags::Flags;
use mandoline_core::generation::Generation;
use mandoline_core::kept::Kept;
use mandoline_core::name::TaskName;
use mandoline_core::pin::Pin;
use mandoline_core::plan::Move;
use mandoline_core::slice::Slice;
use mandoline_core::state::{Churn, Job, State, no_flags};

use crate::assignment::{session, task_name};
use crate::brake::sessions;
use crate::command::{cluster_bytes, cluster_id};
use crate::error::{WireError, each, need};
use crate::pb;

impl From<Churn> for pb::Churn {
    fn from(churn: Churn) -> Self {
        Self { moves: churn.moves, keys: churn.keys, load: churn.load }
    }
}

impl From<pb::Churn> for Churn {
    fn from(churn: pb::Churn) -> Self {
        Self { moves: churn.moves, keys: churn.keys, load: churn.load }
    }
}

impl From<&Job> for pb::Job {
    fn from(job: &Job) -> Self {
        let past = |(generation, step): &(Generation, Move)| pb::PastMove {
            generation: Some((*generation).into()),
            r#move: Some(step.into()),
        };
        Self {
            spec: Some((&job.spec).into()),
            version: job.version,
            assignment: Some(job.assignment.as_ref().into()),
            churn: Some(job.churn.into()),
            history: job.history.iter().map(past).collect(),
            frozen: job.frozen,
            pins: job.pins.iter().map(pb::Pin::from).collect(),
            kept: job.kept.iter().map(kept).collect(),
            confined: job.confined.iter().map(pb::Confined::from).collect(),
            believed: job.believed.iter().map(|session| session.0).collect(),
            gone: job.gone.iter().map(TaskName::to_string).collect(),
        }
    }
}

impl From<&Pin> for pb::Pin {
    fn from(pin: &Pin) -> Self {
        Self { slice: Some(pin.slice.into()), task: pin.task.to_string() }
    }
}

impl TryFrom<pb::Pin> for Pin {
    type Error = WireError;

    fn try_from(pin: pb::Pin) -> Result<Self, WireError> {
        Ok(Self { slice: need(pin.slice, "slice")?.try_into()?, task: task_name(&pin.task)? })
    }
}

fn pins(pins: Vec<pb::Pin>) -> Result<Vec<Pin>, WireError> {
    let pins: Vec<Pin> = each(pins, "pins")?;
    let odd = pins.windows(2).find(|pair| pair[0].slice.last() >= pair[1].slice.first());
    match odd {
        Some(pair) => {
            Err(WireError::new("pins", format!("{} is out of order or overlaps", pair[1].slice)))
        }
        None => Ok(pins),
    }
}

fn kept((task, kept): (&TaskName, &Kept)) -> pb::Kept {
    pb::Kept {
        task: task.to_string(),
        session: kept.session.0,
        slices: kept.slices.iter().map(|slice| (*slice).into()).collect(),
    }
}

struct Waits(TaskName, Kept);

impl TryFrom<pb::Kept> for Waits {
    type Error = WireError;

    fn try_from(kept: pb::Kept) -> Result<Self, WireError> {
        let slices: Vec<Slice> = each(kept.slices, "slices")?;
        if slices.windows(2).any(|pair| pair[0].last() >= pair[1].first()) {
            return Err(WireError::new("slices", "are out of order or overlap"));
        }
        let task = task_name(&kept.task)?;
        let kept = Kept::new(session(kept.session, "session")?, slices);
        Ok(Self(task, need(kept, "slices")?))
    }
}

fn confined(confined: Vec<pb::Confined>) -> Result<Vec<Confined>, WireError> {
    let confined: Vec<Confined> = each(confined, "confined")?;
    let odd = confined.windows(2).find(|pair| pair[0].slice.last() >= pair[1].slice.first());
    odd.map_or(Ok(()), |pair| {
        let text = format!("{} is out of order or overlaps", pair[1].slice);
        Err(WireError::new("confined", text))
    })?;
    Ok(confined)
}

struct PastMove(Generation, Move);

impl TryFrom<pb::PastMove> for PastMove {
    type Error = WireError;

    fn try_from(past: pb::PastMove) -> Result<Self, WireError> {
        Ok(Self(
            need(past.generation, "generation")?.into(),
            need(past.r#move, "move")?.try_into()?,
        ))
    }
}

impl TryFrom<pb::Job> for Job {
    type Error = WireError;

    fn try_from(job: pb::Job) -> Result<Self, WireError> {
        let assignment = Assignment::try_from(need(job.assignment, "assignment")?);
        let history = each::<_, PastMove>(job.history, "history")?
            .into_iter()
            .map(|PastMove(at, step)| (at, step));
        Ok(Self {
            spec: need(job.spec, "spec")?.try_into()?,
            version: job.version,
            assignment: Arc::new(assignment.map_err(|error| error.within("assignment"))?),
            churn: need(job.churn, "churn")?.into(),
            history: history.collect(),
            frozen: job.frozen,
            pins: pins(job.pins)?,
            kept: each::<_, Waits>(job.kept, "kept")?
                .into_iter()
                .map(|Waits(task, kept)| (task, kept))
                .collect(),
            confined: confined(job.confined)?,
            believed: sessions(&job.believed)?.into_iter().collect(),
            gone: job.gone.iter().map(|name| task_name(name)).collect::<Result<_, _>>()?,
        })
    }
}

impl From<&State> for pb::State {
    fn from(state: &State) -> Self {
        Self {
            cluster: state.cluster.map_or_else(bytes::Bytes::new, cluster_bytes),
            incarnation: state.incarnation,
            last_session: state.last_session,
            last_node: state.last_node,
            hold_off: state.hold_off,
            jobs: state.jobs.values().map(pb::Job::from).collect(),
            // What a cluster begins with need not be said: it is of its incarnation.
            flags: (*state.flags != no_flags(state.incarnation)).then(|| (&*state.flags).into()),
            last_pause: state.last_pause,
        }
    }
}

impl TryFrom<pb::State> for State {
    type Error = WireError;

    fn try_from(state: pb::State) -> Result<Self, WireError> {
        let jobs: Vec<Job> = each(state.jobs, "jobs")?;
        let flags = state.flags.map(Flags::try_from).transpose();
        let flags = flags.map_err(|error| error.within("flags"))?;
        Ok(Self {
            cluster: (!state.cluster.is_empty()).then(|| cluster_id(&state.cluster)).transpose()?,
            incarnation: state.incarnation,
            last_session: state.last_session,
            last_node: state.last_node,
            hold_off: state.hold_off,
            jobs: jobs.into_iter().map(|job| (job.spec.name.clone(), job)).collect(),
            flags: Arc::new(flags.unwrap_or_else(|| no_flags(state.incarnation))),
            last_pause: state.last_pause,
        })
    }
}

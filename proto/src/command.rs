//! Commands, as the log holds them.

use std::time::Duration;

use mandoline_core::command::{ClusterId, Command, EndReason};
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::plan::{Edit, Move, Plan, Reason};
use mandoline_core::spec::Ratio;
use mandoline_core::task::SessionId;
use mandoline_core::transit::{Act, HandOffId};

use crate::assignment::{job_name, session, task_name};
use crate::brake::sessions;
use crate::error::{WireError, each, need};
use crate::flags::{millis, pause_id};
use crate::pb;
use crate::pb::command::Command as Kind;
use crate::pb::edit::Edit as EditKind;

impl From<&Command> for pb::Command {
    fn from(command: &Command) -> Self {
        let of = |job: &dyn ToString, session: &SessionId| pb::SessionOf {
            job: job.to_string(),
            session: session.0,
        };
        let command = match command {
            Command::FoundCluster { id, nodes, incarnation } => {
                Kind::FoundCluster(pb::FoundCluster {
                    id: cluster_bytes(*id),
                    nodes: *nodes,
                    incarnation: *incarnation,
                })
            }
            Command::MintNode => Kind::MintNode(pb::MintNode {}),
            Command::ApplyJob { spec, if_version } => {
                Kind::ApplyJob(pb::ApplyJob { spec: Some(spec.into()), if_version: *if_version })
            }
            Command::Register { job, info, stopped } => Kind::Register(pb::RegisterTask {
                job: job.to_string(),
                info: Some(info.into()),
                stopped: stopped.map_or(0, |session| session.0),
            }),
            Command::Drain { job, session } => Kind::Drain(of(job, session)),
            Command::Undrain { job, session } => Kind::Undrain(of(job, session)),
            Command::Forget { job, task, session } => Kind::Forget(pb::Forget {
                job: job.to_string(),
                task: task.to_string(),
                session: session.0,
            }),
            Command::End { job, session, reason } => Kind::End(pb::EndSession {
                job: job.to_string(),
                session: session.0,
                reason: pb::EndReason::from(*reason).into(),
            }),
            Command::Change { job, plan } => {
                Kind::Change(pb::Change { job: job.to_string(), plan: Some(plan.into()) })
            }
            Command::HandOff { job, steps } => Kind::HandOff(pb::HandOff {
                job: job.to_string(),
                steps: steps.iter().map(pb::HandOffStep::from).collect(),
            }),
            Command::Settle { incarnation } => Kind::Settle(*incarnation),
            Command::StoreLoads { job, base, loads } => Kind::StoreLoads(pb::StoreLoads {
                job: job.to_string(),
                base: Some((*base).into()),
                loads: loads.iter().map(|load| load.milli()).collect(),
            }),
            Command::Freeze { job } => Kind::Freeze(pb::JobOf { job: job.to_string() }),
            Command::Unfreeze { job } => Kind::Unfreeze(pb::JobOf { job: job.to_string() }),
            Command::Pin { job, slice, task } => Kind::Pin(pb::PinSlice {
                job: job.to_string(),
                slice: Some((*slice).into()),
                task: task.to_string(),
            }),
            Command::Unpin { job, slice } => Kind::Unpin(pb::PinSlice {
                job: job.to_string(),
                slice: Some((*slice).into()),
                task: String::new(),
            }),
            Command::BelieveLost { job, sessions } => Kind::BelieveLost(pb::BelieveLost {
                job: job.to_string(),
                sessions: sessions.iter().map(|session| session.0).collect(),
            }),
            Command::Confine { job, slices, task, crashes } => Kind::Confine(pb::Confine {
                job: job.to_string(),
                slices: slices.iter().map(|slice| (*slice).into()).collect(),
                task: task.to_string(),
                crashes: crashes.iter().map(pb::Crash::from).collect(),
            }),
            Command::Unconfine { job, slice } => Kind::Unconfine(pb::PinSlice {
                job: job.to_string(),
                slice: Some((*slice).into()),
                task: String::new(),
            }),
            Command::AddPause { order } => Kind::AddPause(order.into()),
            Command::EndPause { id, over } => {
                Kind::EndPause(pb::EndPause { id: id.0, over_ms: millis(*over) })
            }
            Command::ClearPause { id } => Kind::ClearPause(id.0),
        };
        Self { command: Some(command) }
    }
}

impl TryFrom<pb::Command> for Command {
    type Error = WireError;

    fn try_from(command: pb::Command) -> Result<Self, WireError> {
        Ok(match need(command.command, "command")? {
            Kind::FoundCluster(found) => Self::FoundCluster {
                id: cluster_id(&found.id)?,
                nodes: found.nodes,
                incarnation: found.incarnation,
            },
            Kind::MintNode(pb::MintNode {}) => Self::MintNode,
            Kind::ApplyJob(apply) => Self::ApplyJob {
                spec: need(apply.spec, "spec")?.try_into()?,
                if_version: apply.if_version,
            },
            Kind::Register(register) => Self::Register {
                job: job_name(&register.job)?,
                info: need(register.info, "info")?.try_into()?,
                stopped: maybe_session(register.stopped),
            },
            Kind::Drain(of) => {
                Self::Drain { job: job_name(&of.job)?, session: session(of.session, "session")? }
            }
            Kind::Undrain(of) => {
                Self::Undrain { job: job_name(&of.job)?, session: session(of.session, "session")? }
            }
            Kind::Forget(forget) => Self::Forget {
                job: job_name(&forget.job)?,
                task: task_name(&forget.task)?,
                session: session(forget.session, "session")?,
            },
            Kind::End(end) => Self::End {
                job: job_name(&end.job)?,
                session: session(end.session, "session")?,
                reason: end.reason().try_into()?,
            },
            Kind::Change(change) => Self::Change {
                job: job_name(&change.job)?,
                plan: need(change.plan, "plan")?.try_into()?,
            },
            Kind::HandOff(hand_off) => Self::HandOff {
                job: job_name(&hand_off.job)?,
                steps: each::<_, Step>(hand_off.steps, "steps")?
                    .into_iter()
                    .map(|Step(id, act)| (id, act))
                    .collect(),
            },
            Kind::Settle(incarnation) => Self::Settle { incarnation },
            Kind::StoreLoads(store) => Self::StoreLoads {
                job: job_name(&store.job)?,
                base: need(store.base, "base")?.into(),
                loads: store.loads.into_iter().map(Load::from_milli).collect(),
            },
            Kind::Freeze(of) => Self::Freeze { job: job_name(&of.job)? },
            Kind::Unfreeze(of) => Self::Unfreeze { job: job_name(&of.job)? },
            Kind::Pin(pin) => Self::Pin {
                job: job_name(&pin.job)?,
                slice: need(pin.slice, "slice")?.try_into()?,
                task: task_name(&pin.task)?,
            },
            Kind::Unpin(pin) => Self::Unpin {
                job: job_name(&pin.job)?,
                slice: need(pin.slice, "slice")?.try_into()?,
            },
            Kind::BelieveLost(believe) => Self::BelieveLost {
                job: job_name(&believe.job)?,
                sessions: sessions(&believe.sessions)?,
            },
            Kind::Confine(confine) => Self::Confine {
                job: job_name(&confine.job)?,
                slices: each(confine.slices, "slices")?,
                task: task_name(&confine.task)?,
                crashes: each(confine.crashes, "crashes")?,
            },
            Kind::Unconfine(of) => Self::Unconfine {
                job: job_name(&of.job)?,
                slice: need(of.slice, "slice")?.try_into()?,
            },
            Kind::AddPause(order) => Self::AddPause { order: order.try_into()? },
            Kind::EndPause(end) => Self::EndPause {
                id: pause_id(end.id, "id")?,
                over: Duration::from_millis(end.over_ms),
            },
            Kind::ClearPause(id) => Self::ClearPause { id: pause_id(id, "clear_pause")? },
        })
    }
}

impl From<&(HandOffId, Act)> for pb::HandOffStep {
    fn from((id, act): &(HandOffId, Act)) -> Self {
        let (act, by) = match act {
            Act::Release => (pb::Act::Release, 0),
            Act::Acknowledged { by } => (pb::Act::Acknowledged, by.0),
            Act::Lapsed => (pb::Act::Lapsed, 0),
            Act::Switch => (pb::Act::Switch, 0),
            Act::Abort => (pb::Act::Abort, 0),
        };
        Self { id: Some((*id).into()), act: act.into(), by }
    }
}

struct Step(HandOffId, Act);

impl TryFrom<pb::HandOffStep> for Step {
    type Error = WireError;

    fn try_from(step: pb::HandOffStep) -> Result<Self, WireError> {
        let act = match step.act() {
            pb::Act::Release => Act::Release,
            pb::Act::Acknowledged => Act::Acknowledged { by: session(step.by, "by")? },
            pb::Act::Lapsed => Act::Lapsed,
            pb::Act::Switch => Act::Switch,
            pb::Act::Abort => Act::Abort,
            pb::Act::Unspecified => return Err(unknown("act")),
        };
        Ok(Self(need(step.id, "id")?.try_into()?, act))
    }
}

/// Writes a cluster's id as 16 bytes.
pub fn cluster_bytes(id: ClusterId) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&id.0.to_be_bytes())
}

/// Reads a cluster's id from 16 bytes.
pub fn cluster_id(bytes: &[u8]) -> Result<ClusterId, WireError> {
    let id = bytes
        .try_into()
        .map_err(|_| WireError::new("cluster", format!("has {} bytes, not 16", bytes.len())))?;
    Ok(ClusterId(u128::from_be_bytes(id)))
}

fn maybe_session(id: u64) -> Option<SessionId> {
    (id != 0).then_some(SessionId(id))
}

impl From<EndReason> for pb::EndReason {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Left => Self::Left,
            EndReason::Lost => Self::Lost,
            EndReason::Replaced => Self::Replaced,
        }
    }
}

impl TryFrom<pb::EndReason> for EndReason {
    type Error = WireError;

    fn try_from(reason: pb::EndReason) -> Result<Self, WireError> {
        match reason {
            pb::EndReason::Left => Ok(Self::Left),
            pb::EndReason::Lost => Ok(Self::Lost),
            pb::EndReason::Replaced => Ok(Self::Replaced),
            pb::EndReason::Unspecified => Err(unknown("reason")),
        }
    }
}

fn unknown(field: &str) -> WireError {
    WireError::new(field, "is not one of those that this version knows")
}

impl From<Reason> for pb::Reason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::First => Self::First,
            Reason::Lost => Self::Lost,
            Reason::Drain => Self::Drain,
            Reason::Load => Self::Load,
            Reason::Displace => Self::Displace,
            Reason::Pin => Self::Pin,
            Reason::Home => Self::Home,
            Reason::Confine => Self::Confine,
            Reason::Fill => Self::Fill,
            Reason::Replicate => Self::Replicate,
            Reason::Dereplicate => Self::Dereplicate,
            Reason::Merge => Self::Merge,
        }
    }
}

impl TryFrom<pb::Reason> for Reason {
    type Error = WireError;

    fn try_from(reason: pb::Reason) -> Result<Self, WireError> {
        match reason {
            pb::Reason::First => Ok(Self::First),
            pb::Reason::Lost => Ok(Self::Lost),
            pb::Reason::Drain => Ok(Self::Drain),
            pb::Reason::Load => Ok(Self::Load),
            pb::Reason::Displace => Ok(Self::Displace),
            pb::Reason::Pin => Ok(Self::Pin),
            pb::Reason::Home => Ok(Self::Home),
            pb::Reason::Confine => Ok(Self::Confine),
            pb::Reason::Fill => Ok(Self::Fill),
            pb::Reason::Replicate => Ok(Self::Replicate),
            pb::Reason::Dereplicate => Ok(Self::Dereplicate),
            pb::Reason::Merge => Ok(Self::Merge),
            pb::Reason::Unspecified => Err(unknown("reason")),
        }
    }
}

impl From<&Move> for pb::Move {
    fn from(step: &Move) -> Self {
        let id = |session: Option<SessionId>| session.map_or(0, |session| session.0);
        Self {
            slice: Some(step.slice.into()),
            from: id(step.from),
            to: id(step.to),
            reason: pb::Reason::from(step.reason).into(),
            load: step.load.milli(),
            before: step.before.milli(),
            after: step.after.milli(),
        }
    }
}

impl TryFrom<pb::Move> for Move {
    type Error = WireError;

    fn try_from(step: pb::Move) -> Result<Self, WireError> {
        Ok(Self {
            reason: step.reason().try_into()?,
            slice: need(step.slice, "slice")?.try_into()?,
            from: maybe_session(step.from),
            to: maybe_session(step.to),
            load: Load::from_milli(step.load),
            before: Load::from_milli(step.before),
            after: Load::from_milli(step.after),
        })
    }
}

impl From<&Edit> for pb::Edit {
    fn from(edit: &Edit) -> Self {
        let edit = match edit {
            Edit::Split { at, low } => EditKind::Split(pb::Split { at: at.0, low: low.milli() }),
            Edit::Merge(slice) => EditKind::Merge((*slice).into()),
            Edit::Move(step) => EditKind::Move(step.into()),
        };
        Self { edit: Some(edit) }
    }
}

impl TryFrom<pb::Edit> for Edit {
    type Error = WireError;

    fn try_from(edit: pb::Edit) -> Result<Self, WireError> {
        Ok(match need(edit.edit, "edit")? {
            EditKind::Split(split) => {
                Self::Split { at: SliceKey(split.at), low: Load::from_milli(split.low) }
            }
            EditKind::Merge(slice) => Self::Merge(slice.try_into()?),
            EditKind::Move(step) => Self::Move(step.try_into()?),
        })
    }
}

impl From<&Plan> for pb::Plan {
    fn from(plan: &Plan) -> Self {
        Self {
            base: Some(plan.base.into()),
            edits: plan.edits.iter().map(pb::Edit::from).collect(),
            imbalance_before: plan.imbalance.0.millionths(),
            imbalance_after: plan.imbalance.1.millionths(),
            total: plan.total.milli(),
        }
    }
}

impl TryFrom<pb::Plan> for Plan {
    type Error = WireError;

    fn try_from(plan: pb::Plan) -> Result<Self, WireError> {
        let imbalance = (plan.imbalance_before, plan.imbalance_after);
        Ok(Self {
            base: need(plan.base, "base")?.into(),
            edits: each(plan.edits, "edits")?,
            imbalance: (Ratio::from_millionths(imbalance.0), Ratio::from_millionths(imbalance.1)),
            total: Load::from_milli(plan.total),
        })
    }
}

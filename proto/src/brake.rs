//! What the brakes know: tasks that are lost by word, and keys that stay with one task, with the evidence.

use std::time::Duration;

use mandoline_core::confine::{Confined, Crash};
use mandoline_core::task::SessionId;

use crate::assignment::{session, task_name};
use crate::error::{WireError, each, need};
use crate::pb;

impl From<&Confined> for pb::Confined {
    fn from(confined: &Confined) -> Self {
        Self {
            slice: Some(confined.slice.into()),
            task: confined.task.to_string(),
            crashes: confined.crashes.iter().map(pb::Crash::from).collect(),
        }
    }
}

impl TryFrom<pb::Confined> for Confined {
    type Error = WireError;

    fn try_from(confined: pb::Confined) -> Result<Self, WireError> {
        Ok(Self {
            slice: need(confined.slice, "slice")?.try_into()?,
            task: task_name(&confined.task)?,
            crashes: each(confined.crashes, "crashes")?,
        })
    }
}

impl From<&Crash> for pb::Crash {
    fn from(crash: &Crash) -> Self {
        Self {
            session: crash.session.0,
            task: crash.task.to_string(),
            before_ms: millis(crash.before),
            held_ms: millis(crash.held),
        }
    }
}

impl TryFrom<pb::Crash> for Crash {
    type Error = WireError;

    fn try_from(crash: pb::Crash) -> Result<Self, WireError> {
        Ok(Self {
            session: session(crash.session, "session")?,
            task: task_name(&crash.task)?,
            before: Duration::from_millis(crash.before_ms),
            held: Duration::from_millis(crash.held_ms),
        })
    }
}

/// Gives whole milliseconds.
pub fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// Sessions that are named once each.
pub fn sessions(ids: &[u64]) -> Result<Vec<SessionId>, WireError> {
    ids.iter().map(|id| session(*id, "sessions")).collect()
}

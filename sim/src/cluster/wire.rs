//! What processes say to each other: on streams, as `mandoline.v1` has it, and in letters.

use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::report::Report;
use mandoline_core::task::{SessionId, TaskInfo};

use crate::cluster::log::Packet;

/// What is said on a stream.
#[derive(Clone, Debug)]
pub enum Say {
    /// A task wants a session.
    Register {
        /// What it says of itself.
        info: Box<TaskInfo>,
        /// A session of its own that has stopped.
        stopped: Option<SessionId>,
        /// The newest assignment that it holds.
        known: Option<Generation>,
    },
    /// A task is back with its session.
    Attach {
        /// Which.
        session: SessionId,
        /// Which process.
        incarnation: u64,
        /// The newest assignment that it holds.
        known: Option<Generation>,
    },
    /// A task lives.
    Heartbeat {
        /// Which of them.
        request: u64,
    },
    /// A task has measured.
    Report(Box<Report>),
    /// A task is about to stop.
    Drain,
    /// A task stops.
    Leave,
    /// Everything, please.
    Resync,
    /// A clerk watches.
    Watch {
        /// What it holds.
        known: Option<Generation>,
    },
    /// The watch is heard.
    Opened,
    /// The session is this one.
    Attached(SessionId),
    /// No.
    Refused(Refusal),
    /// Another leads, if anyone.
    Redirect(Option<usize>),
    /// The heartbeat was heard.
    Grant {
        /// Which of them.
        request: u64,
        /// The newest assignment there is.
        generation: Generation,
    },
    /// An assignment.
    Full(Arc<Assignment>),
    /// What changed.
    Delta(Arc<Delta>),
    /// The task's last slice is gone.
    Drained,
}

/// Why a task is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The session has ended.
    Ended,
    /// Another lives under the name or at the address.
    Taken,
    /// Something else.
    Other,
}

/// What is said in letters.
#[derive(Clone, Debug)]
pub enum Letter {
    /// Assigners among each other.
    Log(Packet),
    /// A clerk asks a task for a key.
    Request {
        /// Which.
        key: SliceKey,
    },
    /// A task does not own a key, by an assignment of this generation.
    Misdirected {
        /// Which.
        generation: Generation,
    },
}

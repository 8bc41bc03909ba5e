//! What processes say to each other: on streams, as `mandoline.v1` has it, and in letters.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::report::Report;
use mandoline_core::slice::Slice;
use mandoline_core::task::{SessionId, TaskInfo};
use mandoline_core::transit::HandOffId;

use crate::cluster::data::Data;
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
    /// A task is ready for a slice.
    Ready(HandOffId),
    /// A task has let go of a slice.
    Acknowledge(HandOffId),
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
    Attached {
        /// Which.
        session: SessionId,
        /// How long it may serve after it last asked to; nothing in an affinity job.
        lease: Option<Duration>,
    },
    /// No.
    Refused(Refusal),
    /// Another leads, if anyone.
    Redirect(Option<usize>),
    /// The heartbeat was heard.
    Grant {
        /// Whose.
        session: SessionId,
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
    Log {
        /// Of which cluster: a restored one is another.
        cluster: u64,
        /// What it says.
        packet: Packet,
    },
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
    /// A task wants the state of a slice that is to come, as it is by now.
    Pull(HandOffId),
    /// Here it is.
    Bulk {
        /// For which hand-off.
        id: HandOffId,
        /// By whose word.
        by: SessionId,
        /// All of it.
        data: Data,
    },
    /// Here it is for good: nothing changes it any more.
    Last {
        /// For which hand-off.
        id: HandOffId,
        /// By whose word.
        by: SessionId,
        /// All of it, unless the stream broke off.
        data: Data,
        /// How many keys there are.
        length: usize,
        /// And what they sum up to.
        checksum: u64,
    },
    /// It came.
    Got(HandOffId),
    /// A new owner tells the storage of itself, and reads.
    Advance {
        /// Which keys.
        slice: Slice,
        /// Its token.
        token: Generation,
    },
    /// A new owner reads, and tells nobody.
    Read {
        /// Which keys.
        slice: Slice,
        /// Its token.
        token: Generation,
    },
    /// It may begin.
    Advanced {
        /// Which keys.
        slice: Slice,
        /// Its token.
        token: Generation,
    },
    /// An owner writes.
    Write {
        /// Which key.
        key: SliceKey,
        /// Its token.
        token: Generation,
    },
}

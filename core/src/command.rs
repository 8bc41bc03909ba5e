//! What the log holds: decisions, never observations.

use std::fmt;
use std::time::Duration;

use crate::confine::Crash;
use crate::flags::{PauseId, PauseOrder};
use crate::generation::Generation;
use crate::load::Load;
use crate::name::{JobName, TaskName};
use crate::plan::Plan;
use crate::slice::Slice;
use crate::spec::JobSpec;
use crate::task::{SessionId, TaskInfo};
use crate::transit::{Act, HandOffId};

/// Which cluster: drawn once by the node that starts it, so that nodes of another are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub u128);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Which member of the cluster: taken from the log, never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The task said that it stops.
    Left,
    /// The task was not heard of for too long.
    Lost,
    /// A newer process registered and said that this one has stopped.
    Replaced,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Left => "left",
            Self::Lost => "lost",
            Self::Replaced => "replaced",
        })
    }
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Gives the cluster its identity: the first command of its life. A second one is refused.
    FoundCluster {
        /// Drawn by whoever starts the cluster.
        id: ClusterId,
        /// The greatest node id that the first members took; fresh ones begin above it.
        nodes: u64,
        /// The first incarnation, greater than that of any cluster before: milliseconds since 1970. A cluster whose disks were
        /// wiped and that is founded anew is newer for all who outlived it.
        incarnation: u64,
    },
    /// Mints an id for a node that wants to join.
    MintNode,
    /// Makes a job, or changes what is asked of it.
    ApplyJob {
        /// What is asked.
        spec: JobSpec,
        /// The version that the operator looked at; refused if there is a newer one. Zero: the job must be new.
        if_version: Option<u64>,
    },
    /// Begins a session: the task may be given slices from now on. The same process again gets the session that it has.
    Register {
        /// Which job.
        job: JobName,
        /// What the process says of itself.
        info: TaskInfo,
        /// A session of the same name that has stopped for sure, by the word of whoever started this process.
        stopped: Option<SessionId>,
    },
    /// Marks a task as about to stop.
    Drain {
        /// Which job.
        job: JobName,
        /// Which task.
        session: SessionId,
    },
    /// Takes a drain back.
    Undrain {
        /// Which job.
        job: JobName,
        /// Which task.
        session: SessionId,
    },
    /// Lets go of the slices that wait for a task: its grace is over.
    Forget {
        /// Which job.
        job: JobName,
        /// Which task.
        task: TaskName,
        /// The session of it that ended.
        session: SessionId,
    },
    /// Ends a session: its slices are nobody's until the next plan.
    End {
        /// Which job.
        job: JobName,
        /// Which task.
        session: SessionId,
        /// Why.
        reason: EndReason,
    },
    /// Says by an operator's word that sessions are lost, however many are missing at once: the leader ends those that are
    /// when their leases are over. In the place of what was said before; nobody takes it back.
    BelieveLost {
        /// Which job.
        job: JobName,
        /// Which tasks.
        sessions: Vec<SessionId>,
    },
    /// Carries a plan out, if the assignment is still the one that it was made for.
    Change {
        /// Which job.
        job: JobName,
        /// What the balancer decided.
        plan: Plan,
    },
    /// Takes hand-offs a step further. A step that does not fit its hand-off any more is left out.
    HandOff {
        /// Which job.
        job: JobName,
        /// Which hand-offs, and what happens to each.
        steps: Vec<(HandOffId, Act)>,
    },
    /// Ends the time after a restore in which exclusive slices have no owner.
    Settle {
        /// The incarnation that the restore began.
        incarnation: u64,
    },
    /// Stores the load of every slice, in order, so that a new leader starts from it.
    StoreLoads {
        /// Which job.
        job: JobName,
        /// The assignment whose slices these are.
        base: Generation,
        /// One a slice.
        loads: Vec<Load>,
    },
    /// Keeps a job's slices where they are, emergencies apart.
    Freeze {
        /// Which job.
        job: JobName,
    },
    /// Takes a freeze back.
    Unfreeze {
        /// Which job.
        job: JobName,
    },
    /// Nails keys to a task.
    Pin {
        /// Which job.
        job: JobName,
        /// Which keys.
        slice: Slice,
        /// Which task.
        task: TaskName,
    },
    /// Takes a pin back.
    Unpin {
        /// Which job.
        job: JobName,
        /// Which keys, exactly as they were pinned.
        slice: Slice,
    },
    /// Keeps ranges of keys that crash tasks with one of them, which serves nothing else; confined ranges get another task so.
    Confine {
        /// Which job.
        job: JobName,
        /// Which ranges, in order.
        slices: Vec<Slice>,
        /// Which task.
        task: TaskName,
        /// The evidence, oldest first; what was known stays where there is none.
        crashes: Vec<Crash>,
    },
    /// Lets go of a confined range.
    Unconfine {
        /// Which job.
        job: JobName,
        /// Which keys, exactly as they were confined.
        slice: Slice,
    },
    /// Has every proxy hold requests.
    AddPause {
        /// Which, for how long, and what happens then.
        order: PauseOrder,
    },
    /// Lets go of what a pause holds. Once more with another time: over that one, from then on.
    EndPause {
        /// Which pause.
        id: PauseId,
        /// Over how long.
        over: Duration,
    },
    /// Takes a pause away that is over.
    ClearPause {
        /// Which pause.
        id: PauseId,
    },
}

/// In a few words, for logs.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FoundCluster { id, .. } => write!(f, "found cluster {id}"),
            Self::MintNode => write!(f, "mint node"),
            Self::ApplyJob { spec, .. } => write!(f, "apply job {}", spec.name),
            Self::Register { job, info, .. } => {
                write!(f, "register {job}/{} at {}", info.name, info.address)
            }
            Self::Drain { job, session } => write!(f, "drain {job}/{session}"),
            Self::Undrain { job, session } => write!(f, "undrain {job}/{session}"),
            Self::Forget { job, task, session } => {
                write!(f, "let go of what waits for {job}/{task}, which was {session}")
            }
            Self::End { job, session, reason } => write!(f, "end {job}/{session} ({reason})"),
            Self::BelieveLost { job, sessions } => {
                write!(f, "believe {} sessions of {job} lost", sessions.len())
            }
            Self::Change { job, plan } => {
                write!(f, "change {job} {} by {} edits", plan.base, plan.edits.len())
            }
            Self::HandOff { job, steps } => {
                write!(f, "take {} hand-offs of {job} further", steps.len())?;
                steps.first().map_or(Ok(()), |(id, act)| write!(f, ", such as {id}: {act}"))
            }
            Self::Settle { incarnation } => write!(f, "settle after restore {incarnation}"),
            Self::StoreLoads { job, loads, .. } => {
                write!(f, "store {} loads of {job}", loads.len())
            }
            Self::Freeze { job } => write!(f, "freeze {job}"),
            Self::Unfreeze { job } => write!(f, "unfreeze {job}"),
            Self::Pin { job, slice, task } => write!(f, "pin {slice} of {job} to {task}"),
            Self::Unpin { job, slice } => write!(f, "unpin {slice} of {job}"),
            Self::Confine { job, slices, task, .. } => {
                write!(f, "confine {} ranges of {job} to {task}", slices.len())
            }
            Self::Unconfine { job, slice } => write!(f, "release {slice} of {job}"),
            Self::AddPause { order } => write!(f, "pause {} for {:?}", order.scope, order.lasts),
            Self::EndPause { id, over } => write!(f, "end pause {id} over {over:?}"),
            Self::ClearPause { id } => write!(f, "clear pause {id}"),
        }
    }
}

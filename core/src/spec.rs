//! What an operator asks of a job. Each field stands in `docs/job-spec.md` with when to change it.

mod check;

use std::fmt;
use std::time::Duration;

use crate::load::Load;
use crate::name::JobName;
use crate::slice::Slice;
use crate::task::TASKS_MAX;

/// The most homes of a job: a spec of them all still fits one message of the wire beside everything else.
pub const HOMES_MAX: usize = 10_000;
/// The most loads beside the main one: each costs the planner a column, and every report a number a slice.
pub const METRICS_MAX: usize = 4;

/// The longest lease: what a restored cluster waits out before anyone owns anything.
pub const LEASE_MAX: Duration = Duration::from_secs(60);

/// A share or a ratio in millionths, so that it is exact and the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ratio(u32);

impl Ratio {
    /// Takes millionths.
    pub const fn from_millionths(millionths: u32) -> Self {
        Self(millionths)
    }

    /// Takes percent.
    pub const fn percent(percent: u32) -> Self {
        Self(percent * 10_000)
    }

    /// Gives millionths.
    pub const fn millionths(self) -> u32 {
        self.0
    }

    /// Gives this ratio of a whole, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        u64::try_from(u128::from(whole) * u128::from(self.0) / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// Percent.
impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 10_000.0)
    }
}

/// How many tasks may serve one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaBounds {
    /// Each slice has as many, if there are as many tasks.
    pub min: u32,
    /// A slice that one task cannot carry may have as many.
    pub max: u32,
}

impl ReplicaBounds {
    /// As many as there can be tasks: what `max: all` means.
    pub const ALL: u32 = TASKS_MAX as u32;
}

/// How far above the mean a task's load may lie before slices are moved off it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Band {
    /// This far above the capacity-weighted mean at least, and further where loads are hard to foresee.
    Adaptive(Ratio),
    /// Exactly so far, whatever the loads do.
    Fixed {
        /// How far above the mean.
        ratio: Ratio,
        /// What the ratio is of.
        of: BandOf,
    },
}

impl Band {
    /// Gives the ratio that was asked for, adaptive or not.
    pub const fn ratio(self) -> Ratio {
        match self {
            Self::Adaptive(ratio) | Self::Fixed { ratio, .. } => ratio,
        }
    }
}

/// What a fixed band is a ratio of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BandOf {
    /// The capacity-weighted mean load of a task.
    #[default]
    Mean,
    /// The load that a task can take, `max_load_hint`: the band does not shrink when the job is idle.
    Hint,
}

impl fmt::Display for BandOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Mean => "mean",
            Self::Hint => "hint",
        })
    }
}

/// Keys that live in tasks of one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// Which keys.
    pub slice: Slice,
    /// The value of the label `region` of the tasks that may serve them.
    pub region: String,
}

/// A further load, such as memory or connections, that each task is kept within a band of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    /// What reports call it.
    pub name: String,
    /// How far above its mean a task may lie.
    pub band: Ratio,
}

/// Whether a key may for a moment be served by two tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// It may, while an assignment spreads; everything goes on without the control plane.
    #[default]
    Affinity,
    /// Never do two tasks both believe that they own a key; who cannot renew its lease stops.
    Exclusive,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Affinity => "affinity",
            Self::Exclusive => "exclusive",
        })
    }
}

/// How many tasks of a job may be away or leaving at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// So many.
    Tasks(u32),
    /// This share of the job's tasks, rounded down, but one at least.
    Share(Ratio),
}

impl Unavailable {
    /// Gives how many that is of so many tasks.
    pub fn of(self, tasks: usize) -> usize {
        match self {
            Self::Tasks(count) => count as usize,
            Self::Share(share) => {
                usize::try_from(share.of(tasks as u64)).unwrap_or(usize::MAX).max(1)
            }
        }
    }
}

/// `3`, or `10%`.
impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tasks(count) => count.fmt(f),
            Self::Share(share) => share.fmt(f),
        }
    }
}

/// Lets a caller send a key elsewhere while the task that serves it is loaded beyond the cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spill {
    /// The load of a task in relation to the mean, above which it is passed over.
    pub cap: Ratio,
}

/// What an operator asks of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// The job's name.
    pub name: JobName,
    /// How far above the capacity-weighted mean a task's load may lie before slices are moved off it.
    pub band: Band,
    /// How much of the job's load one balancing round may move, emergencies apart.
    pub churn_budget: Ratio,
    /// How much of the mean task load a newcomer is given in one round at most.
    pub fill_rate: Ratio,
    /// The load that an ordinary task, one of capacity 1, can take.
    pub max_load_hint: Option<Load>,
    /// Load that is reckoned with although nobody measured it, lying evenly over all keys: this share of what all tasks can take.
    pub reservation: Ratio,
    /// How many tasks may serve one slice.
    pub replicas: ReplicaBounds,
    /// The label over whose values the replicas of a slice are spread, such as `zone`.
    pub spread: Option<String>,
    /// Keys that live in one region, in order, without overlap.
    pub homes: Vec<Home>,
    /// Further loads that each task is kept within a band of.
    pub metrics: Vec<Metric>,
    /// Whether, and from which load on, a caller may send a key to another task than its own.
    pub spill: Option<Spill>,
    /// Whether a key may for a moment be served by two tasks. It stays what it was when the job was made.
    pub consistency: Consistency,
    /// How long an owner may serve after it last asked to: of exclusive jobs. Also the time in which lost tasks are counted for
    /// the brake.
    pub lease: Duration,
    /// How long a new owner may take to get ready before a move goes on without it.
    pub prepare_within: Duration,
    /// How long the slices of a task that stopped without drain wait for it to be back under its name.
    pub grace: Duration,
    /// The share of tasks that is lost within one lease, from which on nothing is reassigned for a while; all of them: never.
    pub brake: Ratio,
    /// How many tasks may be away or leaving at once when another asks whether it may restart.
    pub max_unavailable: Unavailable,
    /// After so many crashes of tasks that served the same keys, these keys are confined; 0: never.
    pub confine_after: u32,
    /// How often a task says that it lives.
    pub heartbeat: Duration,
    /// How often a task reports its load.
    pub report_every: Duration,
    /// How often the load is balanced.
    pub balance_every: Duration,
}

/// Why a spec was refused. The one before it stays in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {hint}")]
pub struct SpecError {
    /// Which field.
    pub field: &'static str,
    /// What it held.
    pub value: String,
    /// What it may hold.
    pub hint: &'static str,
}

impl JobSpec {
    /// Gives the defaults under a name.
    pub const fn new(name: JobName) -> Self {
        Self {
            name,
            // The planner's own floor: below it the noise of counting alone moves slices.
            band: Band::Adaptive(Ratio::percent(2)),
            // No bound: a doubled job is even after one round (docs/adr/0010).
            churn_budget: Ratio::percent(100),
            fill_rate: Ratio::percent(100),
            max_load_hint: None,
            reservation: Ratio::percent(0),
            replicas: ReplicaBounds { min: 1, max: 1 },
            spread: None,
            homes: Vec::new(),
            metrics: Vec::new(),
            spill: None,
            consistency: Consistency::Affinity,
            // Slicer's clients and Chubby's sessions live with more; three heartbeats and two elections fit in.
            lease: Duration::from_secs(5),
            prepare_within: Duration::from_secs(10),
            // None, so that what a crash took away is served elsewhere at once.
            grace: Duration::ZERO,
            brake: Ratio::percent(50),
            max_unavailable: Unavailable::Tasks(1),
            // One crash is chance and two may be: from three on it is the keys.
            confine_after: 3,
            heartbeat: Duration::from_secs(1),
            report_every: Duration::from_secs(5),
            balance_every: Duration::from_secs(10),
        }
    }

    /// Gives the lease of the job's tasks, if it is one whose slices have owners.
    pub fn owner_lease(&self) -> Option<Duration> {
        (self.consistency == Consistency::Exclusive).then_some(self.lease)
    }

    /// Checks that each value lies where it makes sense, alone and beside the others.
    pub fn check(&self) -> Result<(), SpecError> {
        check::check(self)
    }
}

//! All that a plan depends on.

use std::sync::Arc;

use crate::assignment::Assignment;
use crate::load::Load;
use crate::spec::{JobSpec, Ratio, ReplicaBounds};
use crate::time::Time;

/// What the spec says about balance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How far above the mean a task's load may lie.
    pub band: Ratio,
    /// The share of the load that evening out may move in one round.
    pub churn_budget: Ratio,
    /// How many tasks may serve one slice.
    pub replicas: ReplicaBounds,
}

impl From<&JobSpec> for Policy {
    fn from(spec: &JobSpec) -> Self {
        Self { band: spec.band.ratio(), churn_budget: spec.churn_budget, replicas: spec.replicas }
    }
}

/// All that a plan depends on.
#[derive(Clone, Debug)]
pub struct Round {
    /// When it is planned; for the log, no decision looks at it.
    pub now: Time,
    /// Who serves what, and the tasks.
    pub assignment: Arc<Assignment>,
    /// The forecast load of each slice, in the assignment's order.
    pub loads: Vec<Load>,
    /// How far off task loads' forecasts lately were, in relation to the mean: widens the band.
    pub forecast_error: Ratio,
    /// Whether the job's load was never measured: then moving costs nothing, and even is even in keys. A job that is
    /// idle for a while is not fresh.
    pub fresh: bool,
    /// What the spec asks.
    pub policy: Policy,
}

impl Round {
    /// Makes the same round one for emergencies alone: nothing moves to even out load.
    #[must_use]
    pub const fn emergencies_only(mut self) -> Self {
        self.policy.churn_budget = Ratio::from_millionths(0);
        self
    }
}

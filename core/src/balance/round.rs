//! All that a plan depends on.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::assignment::Assignment;
use crate::confine::Confined;
use crate::load::Load;
use crate::pin::Pin;
use crate::report::HotKey;
use crate::slice::Slice;
use crate::spec::{Band, Home, JobSpec, Ratio, ReplicaBounds};
use crate::task::SessionId;
use crate::time::Time;

/// What the operator asks, as far as it is about balance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How far above the mean a task's load may lie, and below it where that is asked for.
    pub band: Band,
    /// The load that an ordinary task can take.
    pub max_load_hint: Option<Load>,
    /// The share of the hint, for each task, that is added as load lying evenly over all keys.
    pub reservation: Ratio,
    /// The share of the load that evening out may move in one round.
    pub churn_budget: Ratio,
    /// How much of the mean a newcomer is given in one round.
    pub fill_rate: Ratio,
    /// How many tasks may serve one slice.
    pub replicas: ReplicaBounds,
    /// The label over whose values the replicas of a slice are spread.
    pub spread: Option<String>,
    /// Keys that live in one region, in order.
    pub homes: Vec<Home>,
    /// Keys that one task serves by the operator's word, in order.
    pub pins: Vec<Pin>,
    /// Keys that crash tasks: each range stays with one, which serves nothing else.
    pub confined: Vec<Confined>,
    /// Whether nothing moves but what must.
    pub frozen: bool,
}

impl From<&JobSpec> for Policy {
    fn from(spec: &JobSpec) -> Self {
        Self {
            band: spec.band,
            max_load_hint: spec.max_load_hint,
            reservation: spec.reservation,
            churn_budget: spec.churn_budget,
            fill_rate: spec.fill_rate,
            replicas: spec.replicas,
            spread: spec.spread.clone(),
            homes: spec.homes.clone(),
            pins: Vec::new(),
            confined: Vec::new(),
            frozen: false,
        }
    }
}

/// A further load, such as memory: each task is kept within a band of it as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Further {
    /// How far above the mean a task may lie.
    pub band: Ratio,
    /// One a slice, in the assignment's order.
    pub loads: Vec<Load>,
}

/// A slice that was moved, while callers may still go to the task that had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Which slice.
    pub slice: Slice,
    /// Who had it.
    pub from: SessionId,
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
    /// What each slice's load is in the long run; empty where that is not known, then it is `loads`.
    pub usual: Vec<Load>,
    /// Keys that draw much load, in order; each is part of its slice's load.
    pub hot: Vec<HotKey>,
    /// Further loads that each task is kept within a band of.
    pub further: Vec<Further>,
    /// What moving each slice costs, in the application's own currency; empty where it says nothing, then it is the load.
    pub costs: Vec<u64>,
    /// Slices that were moved and that callers may still look for where they were.
    pub in_flight: Vec<InFlight>,
    /// The places of slices that are on their way: they stand where they are going, and nothing touches them.
    pub moving: Vec<u32>,
    /// Tasks that are not heard right now: what cannot wait goes to others, as long as there are any.
    pub away: BTreeSet<SessionId>,
    /// While a rollout runs, the session that was the newest when it began: tasks of later ones are new in it.
    pub rollout: Option<SessionId>,
    /// How far off task loads' forecasts lately were, in relation to the mean: widens an adaptive band.
    pub forecast_error: Ratio,
    /// How far a task's load lately lay above what was forecast where that was worst, beyond what chance explains: no plan
    /// could have been better, so an adaptive band need not be narrower than a part of it.
    pub surprise: Ratio,
    /// Whether the job's load was never measured: then moving costs nothing, and even is even in keys. A job that is
    /// idle for a while is not fresh.
    pub fresh: bool,
    /// What the operator asks.
    pub policy: Policy,
}

impl Round {
    /// Makes a round of nothing but an assignment, its loads and what is asked.
    pub fn new(assignment: Arc<Assignment>, loads: Vec<Load>, policy: Policy) -> Self {
        Self {
            now: Time::ZERO,
            assignment,
            loads,
            usual: Vec::new(),
            hot: Vec::new(),
            further: Vec::new(),
            costs: Vec::new(),
            in_flight: Vec::new(),
            moving: Vec::new(),
            away: BTreeSet::new(),
            rollout: None,
            forecast_error: Ratio::from_millionths(0),
            surprise: Ratio::from_millionths(0),
            fresh: false,
            policy,
        }
    }

    /// Makes the same round one for emergencies alone: nothing moves to even out load.
    #[must_use]
    pub fn emergencies_only(mut self) -> Self {
        self.policy.frozen = true;
        self
    }
}

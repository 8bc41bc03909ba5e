//! Job specs.

use std::time::Duration;

use mandoline_core::name::JobName;
use mandoline_core::spec::{JobSpec, Ratio, ReplicaBounds};

use crate::error::WireError;
use crate::pb;

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

impl From<&JobSpec> for pb::JobSpec {
    fn from(spec: &JobSpec) -> Self {
        Self {
            name: spec.name.to_string(),
            band: spec.band.millionths(),
            churn_budget: spec.churn_budget.millionths(),
            replicas_min: spec.replicas.min,
            replicas_max: spec.replicas.max,
            heartbeat_ms: millis(spec.heartbeat),
            report_every_ms: millis(spec.report_every),
            balance_every_ms: millis(spec.balance_every),
        }
    }
}

impl TryFrom<pb::JobSpec> for JobSpec {
    type Error = WireError;

    fn try_from(spec: pb::JobSpec) -> Result<Self, WireError> {
        let spec = Self {
            name: JobName::new(&spec.name).map_err(|error| WireError::new("name", error))?,
            band: Ratio::from_millionths(spec.band),
            churn_budget: Ratio::from_millionths(spec.churn_budget),
            replicas: ReplicaBounds { min: spec.replicas_min, max: spec.replicas_max },
            heartbeat: Duration::from_millis(spec.heartbeat_ms),
            report_every: Duration::from_millis(spec.report_every_ms),
            balance_every: Duration::from_millis(spec.balance_every_ms),
        };
        spec.check().map_err(|error| WireError::new("spec", error))?;
        Ok(spec)
    }
}

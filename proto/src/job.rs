//! Job specs. A field that an older writer did not know is absent, and means what it meant then.

use std::time::Duration;

use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::spec::{
    Band, BandOf, Consistency, Home, JobSpec, Metric, Ratio, ReplicaBounds, Spill, Unavailable,
};

use crate::error::{WireError, each, need};
use crate::pb;

// What absent fields mean. They are the defaults of today, and stay when those change: logs keep their meaning.
const FILL_RATE: u32 = 1_000_000;
const LEASE_MS: u64 = 5_000;
const PREPARE_WITHIN_MS: u64 = 10_000;
const GRACE_MS: u64 = 0;
const BRAKE: u32 = 500_000;
const MAX_UNAVAILABLE: Unavailable = Unavailable::Tasks(1);
const CONFINE_AFTER: u32 = 3;

/// What is written of a value: nothing where absence means it, so that logs keep the bytes they had before there was such a field.
fn unless<V: PartialEq>(absent: V, value: V) -> Option<V> {
    Some(value).filter(|value| *value != absent)
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

impl From<&JobSpec> for pb::JobSpec {
    fn from(spec: &JobSpec) -> Self {
        Self {
            name: spec.name.to_string(),
            // Also of a fixed band: a node that does not know of those takes the next best.
            band: spec.band.ratio().millionths(),
            band_of: pb::BandOf::from(spec.band).into(),
            churn_budget: spec.churn_budget.millionths(),
            fill_rate: unless(FILL_RATE, spec.fill_rate.millionths()),
            max_load_hint: spec.max_load_hint.map(Load::milli),
            reservation: spec.reservation.millionths(),
            replicas_min: spec.replicas.min,
            replicas_max: spec.replicas.max,
            spread: spec.spread.clone().unwrap_or_default(),
            homes: spec.homes.iter().map(pb::Home::from).collect(),
            metrics: spec.metrics.iter().map(pb::Metric::from).collect(),
            spill: spec.spill.map(|spill| pb::Spill { cap: spill.cap.millionths() }),
            consistency: pb::Consistency::from(spec.consistency).into(),
            lease_ms: unless(LEASE_MS, millis(spec.lease)),
            prepare_within_ms: unless(PREPARE_WITHIN_MS, millis(spec.prepare_within)),
            grace_ms: unless(GRACE_MS, millis(spec.grace)),
            brake: unless(BRAKE, spec.brake.millionths()),
            max_unavailable: unless(MAX_UNAVAILABLE, spec.max_unavailable)
                .map(pb::Unavailable::from),
            confine_after: unless(CONFINE_AFTER, spec.confine_after),
            heartbeat_ms: millis(spec.heartbeat),
            report_every_ms: millis(spec.report_every),
            balance_every_ms: millis(spec.balance_every),
        }
    }
}

impl TryFrom<pb::JobSpec> for JobSpec {
    type Error = WireError;

    fn try_from(spec: pb::JobSpec) -> Result<Self, WireError> {
        let ratio = Ratio::from_millionths;
        let spec = Self {
            name: JobName::new(&spec.name).map_err(|error| WireError::new("name", error))?,
            band: band(ratio(spec.band), spec.band_of)?,
            churn_budget: ratio(spec.churn_budget),
            fill_rate: ratio(spec.fill_rate.unwrap_or(FILL_RATE)),
            max_load_hint: spec.max_load_hint.map(Load::from_milli),
            reservation: ratio(spec.reservation),
            replicas: ReplicaBounds { min: spec.replicas_min, max: spec.replicas_max },
            spread: (!spec.spread.is_empty()).then_some(spec.spread),
            homes: each(spec.homes, "homes")?,
            metrics: spec.metrics.into_iter().map(Metric::from).collect(),
            spill: spec.spill.map(|spill| Spill { cap: ratio(spill.cap) }),
            consistency: consistency(spec.consistency)?,
            lease: Duration::from_millis(spec.lease_ms.unwrap_or(LEASE_MS)),
            prepare_within: Duration::from_millis(
                spec.prepare_within_ms.unwrap_or(PREPARE_WITHIN_MS),
            ),
            grace: Duration::from_millis(spec.grace_ms.unwrap_or(GRACE_MS)),
            brake: ratio(spec.brake.unwrap_or(BRAKE)),
            max_unavailable: spec.max_unavailable.map_or(Ok(MAX_UNAVAILABLE), |given| {
                given.try_into().map_err(|error: WireError| error.within("max_unavailable"))
            })?,
            confine_after: spec.confine_after.unwrap_or(CONFINE_AFTER),
            heartbeat: Duration::from_millis(spec.heartbeat_ms),
            report_every: Duration::from_millis(spec.report_every_ms),
            balance_every: Duration::from_millis(spec.balance_every_ms),
        };
        spec.check().map_err(|error| WireError::new("spec", error))?;
        Ok(spec)
    }
}

impl From<Band> for pb::BandOf {
    fn from(band: Band) -> Self {
        match band {
            Band::Adaptive(_) => Self::Unspecified,
            Band::Fixed { of: BandOf::Mean, .. } => Self::Mean,
            Band::Fixed { of: BandOf::Hint, .. } => Self::Hint,
        }
    }
}

fn band(ratio: Ratio, of: i32) -> Result<Band, WireError> {
    let unknown = |_| WireError::new("band_of", "is not one of those that this version knows");
    Ok(match pb::BandOf::try_from(of).map_err(unknown)? {
        pb::BandOf::Unspecified => Band::Adaptive(ratio),
        pb::BandOf::Mean => Band::Fixed { ratio, of: BandOf::Mean },
        pb::BandOf::Hint => Band::Fixed { ratio, of: BandOf::Hint },
    })
}

impl From<Consistency> for pb::Consistency {
    fn from(consistency: Consistency) -> Self {
        match consistency {
            Consistency::Affinity => Self::Affinity,
            Consistency::Exclusive => Self::Exclusive,
        }
    }
}

fn consistency(given: i32) -> Result<Consistency, WireError> {
    let unknown = |_| WireError::new("consistency", "is not one of those that this version knows");
    Ok(match pb::Consistency::try_from(given).map_err(unknown)? {
        pb::Consistency::Affinity => Consistency::Affinity,
        pb::Consistency::Exclusive => Consistency::Exclusive,
    })
}

impl From<Unavailable> for pb::Unavailable {
    fn from(unavailable: Unavailable) -> Self {
        let of = match unavailable {
            Unavailable::Tasks(count) => pb::unavailable::Of::Tasks(count),
            Unavailable::Share(share) => pb::unavailable::Of::Share(share.millionths()),
        };
        Self { of: Some(of) }
    }
}

impl TryFrom<pb::Unavailable> for Unavailable {
    type Error = WireError;

    fn try_from(unavailable: pb::Unavailable) -> Result<Self, WireError> {
        Ok(match need(unavailable.of, "of")? {
            pb::unavailable::Of::Tasks(count) => Self::Tasks(count),
            pb::unavailable::Of::Share(share) => Self::Share(Ratio::from_millionths(share)),
        })
    }
}

impl From<&Home> for pb::Home {
    fn from(home: &Home) -> Self {
        Self { slice: Some(home.slice.into()), region: home.region.clone() }
    }
}

impl TryFrom<pb::Home> for Home {
    type Error = WireError;

    fn try_from(home: pb::Home) -> Result<Self, WireError> {
        Ok(Self { slice: need(home.slice, "slice")?.try_into()?, region: home.region })
    }
}

impl From<&Metric> for pb::Metric {
    fn from(metric: &Metric) -> Self {
        Self { name: metric.name.clone(), band: metric.band.millionths() }
    }
}

impl From<pb::Metric> for Metric {
    fn from(metric: pb::Metric) -> Self {
        Self { name: metric.name, band: Ratio::from_millionths(metric.band) }
    }
}

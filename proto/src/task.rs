//! Tasks, and what they report.

use std::time::Duration;

use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::offers::{Caller, Offer, SliceOffer};
use mandoline_core::report::{HotKey, Report, Size};
use mandoline_core::slice::Slice;
use mandoline_core::task::{Address, Capacity, Phase, SessionId, Task, TaskInfo};

use crate::assignment::{job_name, session};
use crate::error::{WireError, each, need};
use crate::pb;

impl From<&TaskInfo> for pb::TaskInfo {
    fn from(info: &TaskInfo) -> Self {
        Self {
            name: info.name.to_string(),
            incarnation: info.incarnation,
            address: info.address.to_string(),
            watch: info.watch.as_ref().map_or_else(String::new, Address::to_string),
            labels: info.labels.clone(),
            capacity: info.capacity.thousandths(),
            revision: info.revision.clone(),
            prepares: info.prepares,
        }
    }
}

impl TryFrom<pb::TaskInfo> for TaskInfo {
    type Error = WireError;

    fn try_from(info: pb::TaskInfo) -> Result<Self, WireError> {
        let address = |text: &str, field| {
            text.parse::<Address>().map_err(|error| WireError::new(field, error))
        };
        let capacity = match info.capacity {
            0 => Capacity::ONE,
            thousandths => Capacity::new(f64::from(thousandths) / 1_000.0)
                .map_err(|error| WireError::new("capacity", error))?,
        };
        let info = Self {
            name: TaskName::new(&info.name).map_err(|error| WireError::new("name", error))?,
            incarnation: info.incarnation,
            address: address(&info.address, "address")?,
            watch: (!info.watch.is_empty()).then(|| address(&info.watch, "watch")).transpose()?,
            labels: info.labels,
            capacity,
            revision: info.revision,
            prepares: info.prepares,
        };
        info.check().map_err(|error| WireError::new("task", error))?;
        Ok(info)
    }
}

impl From<&Task> for pb::Task {
    fn from(task: &Task) -> Self {
        let phase = match task.phase {
            Phase::Serving => pb::Phase::Serving,
            Phase::Draining => pb::Phase::Draining,
        };
        Self {
            session: task.session.0,
            info: Some((&task.info).into()),
            phase: phase.into(),
            lease_ms: task.lease.map_or(0, whole_millis),
        }
    }
}

impl TryFrom<pb::Task> for Task {
    type Error = WireError;

    fn try_from(task: pb::Task) -> Result<Self, WireError> {
        let phase = match task.phase() {
            pb::Phase::Serving => Phase::Serving,
            pb::Phase::Draining => Phase::Draining,
            pb::Phase::Unspecified => {
                return Err(WireError::new("phase", "is not one of those that this version knows"));
            }
        };
        let info =
            TaskInfo::try_from(need(task.info, "info")?).map_err(|error| error.within("info"))?;
        let lease = (task.lease_ms != 0).then(|| Duration::from_millis(task.lease_ms));
        Ok(Self { session: session(task.session, "session")?, info, phase, lease })
    }
}

fn whole_millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

impl From<&Report> for pb::Report {
    fn from(report: &Report) -> Self {
        let load = |(slice, load): &(Slice, Load)| pb::SliceLoad {
            slice: Some((*slice).into()),
            load: load.units(),
        };
        Self {
            generation: Some(report.generation.into()),
            window_ms: u64::try_from(report.window.as_millis()).unwrap_or(u64::MAX),
            slices: report.slices.iter().map(load).collect(),
            hot: report.hot.iter().map(pb::HotKey::from).collect(),
            sizes: report.sizes.iter().map(pb::Size::from).collect(),
        }
    }
}

impl From<&HotKey> for pb::HotKey {
    fn from(hot: &HotKey) -> Self {
        Self { key: hot.key.0, load: hot.load.units() }
    }
}

impl TryFrom<pb::HotKey> for HotKey {
    type Error = WireError;

    fn try_from(hot: pb::HotKey) -> Result<Self, WireError> {
        Ok(Self { key: SliceKey(hot.key), load: load(hot.load, "load")? })
    }
}

impl From<&Size> for pb::Size {
    fn from(size: &Size) -> Self {
        Self {
            slice: Some(size.slice.into()),
            metrics: size.metrics.iter().map(|metric| metric.units()).collect(),
            move_cost: size.move_cost,
        }
    }
}

impl TryFrom<pb::Size> for Size {
    type Error = WireError;

    fn try_from(size: pb::Size) -> Result<Self, WireError> {
        let metrics = size.metrics.iter().map(|metric| load(*metric, "metrics"));
        Ok(Self {
            slice: need(size.slice, "slice")?.try_into()?,
            metrics: metrics.collect::<Result<_, _>>()?,
            move_cost: size.move_cost,
        })
    }
}

fn load(units: f64, field: &str) -> Result<Load, WireError> {
    Load::from_units(units).map_err(|error| WireError::new(field, error))
}

struct SliceLoad(Slice, Load);

impl TryFrom<pb::SliceLoad> for SliceLoad {
    type Error = WireError;

    fn try_from(measured: pb::SliceLoad) -> Result<Self, WireError> {
        let load = load(measured.load, "load")?;
        Ok(Self(need(measured.slice, "slice")?.try_into()?, load))
    }
}

/// Reads what `session` reports.
pub fn report(session: SessionId, report: pb::Report) -> Result<Report, WireError> {
    let slices = each::<_, SliceLoad>(report.slices, "slices")?
        .into_iter()
        .map(|SliceLoad(slice, load)| (slice, load));
    let report = Report {
        session,
        generation: need(report.generation, "generation")?.into(),
        window: Duration::from_millis(report.window_ms),
        slices: slices.collect(),
        hot: each(report.hot, "hot")?,
        sizes: each(report.sizes, "sizes")?,
    };
    report.check().map_err(|error| WireError::new("report", error))?;
    Ok(report)
}

/// Writes what a caller offered to the tasks of `job`.
pub fn offer_message(job: &JobName, offer: &Offer) -> pb::Offer {
    let part = |part: &SliceOffer| pb::SliceOffer {
        slice: Some(part.slice.into()),
        load: part.load.units(),
        failed: part.failed.units(),
    };
    pb::Offer {
        job: job.to_string(),
        caller: offer.caller.0,
        window_ms: u64::try_from(offer.window.as_millis()).unwrap_or(u64::MAX),
        slices: offer.slices.iter().map(part).collect(),
        hot: offer.hot.iter().map(pb::HotKey::from).collect(),
        avoided: offer.avoided.iter().map(|session| session.0).collect(),
    }
}

/// Reads what a caller offered, and to which job.
pub fn offer(offer: pb::Offer) -> Result<(JobName, Offer), WireError> {
    let job = job_name(&offer.job)?;
    let offer = Offer {
        caller: Caller(offer.caller),
        window: Duration::from_millis(offer.window_ms),
        slices: each(offer.slices, "slices")?,
        hot: each(offer.hot, "hot")?,
        avoided: offer.avoided.into_iter().map(SessionId).collect(),
    };
    offer.check().map_err(|error| WireError::new("offer", error))?;
    Ok((job, offer))
}

impl TryFrom<pb::SliceOffer> for SliceOffer {
    type Error = WireError;

    fn try_from(part: pb::SliceOffer) -> Result<Self, WireError> {
        Ok(Self {
            slice: need(part.slice, "slice")?.try_into()?,
            load: load(part.load, "load")?,
            failed: load(part.failed, "failed")?,
        })
    }
}

//! Flags, as the log, watchers and disks hold them, and what proxies say of them.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use mandoline_core::flags::{
    AtEnd, Count, Flags, PAUSES_MAX, Pause, PauseId, PauseOrder, Phase, Scope, Standing,
};
use mandoline_core::generation::Generation;
use mandoline_core::offers::Caller;
use prost::Message;

use crate::assignment::job_name;
use crate::error::{WireError, each, need};
use crate::pb;

/// Writes a length of time.
pub fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// Reads a pause's id.
pub fn pause_id(id: u64, field: &str) -> Result<PauseId, WireError> {
    match id {
        0 => Err(WireError::new(field, "is zero")),
        id => Ok(PauseId(id)),
    }
}

/// Encodes all flags into the message that carries them.
pub fn encode_flags(flags: &Flags) -> Bytes {
    pb::Flags::from(flags).encode_to_vec().into()
}

impl From<&Scope> for pb::Scope {
    fn from(scope: &Scope) -> Self {
        let text = |part: &Option<Box<str>>| part.as_deref().unwrap_or_default().to_owned();
        Self {
            job: scope.job.as_ref().map_or_else(String::new, ToString::to_string),
            slice: scope.slice.map(Into::into),
            host: text(&scope.host),
            path: text(&scope.path),
            methods: scope.methods.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Any text for which there is room may be a part: whether the scope makes sense is asked of the whole order.
impl TryFrom<pb::Scope> for Scope {
    type Error = WireError;

    fn try_from(scope: pb::Scope) -> Result<Self, WireError> {
        let text = |part: String| (!part.is_empty()).then(|| part.into_boxed_str());
        Ok(Self {
            job: (!scope.job.is_empty()).then(|| job_name(&scope.job)).transpose()?,
            slice: scope.slice.map(TryInto::try_into).transpose()?,
            host: text(scope.host),
            path: text(scope.path),
            methods: scope.methods.into_iter().map(String::into_boxed_str).collect(),
        })
    }
}

impl From<&PauseOrder> for pb::PauseOrder {
    fn from(order: &PauseOrder) -> Self {
        let at_end = match order.at_end {
            AtEnd::GoOn => pb::AtEnd::GoOn,
            AtEnd::Fail => pb::AtEnd::Fail,
        };
        Self {
            scope: Some((&order.scope).into()),
            why: order.why.to_string(),
            lasts_ms: millis(order.lasts),
            at_end: at_end.into(),
            release_over_ms: millis(order.release_over),
        }
    }
}

impl TryFrom<pb::PauseOrder> for PauseOrder {
    type Error = WireError;

    fn try_from(order: pb::PauseOrder) -> Result<Self, WireError> {
        let at_end = match order.at_end() {
            pb::AtEnd::GoOn => AtEnd::GoOn,
            pb::AtEnd::Fail => AtEnd::Fail,
            pb::AtEnd::Unspecified => {
                return Err(WireError::new(
                    "at_end",
                    "is not one of those that this version knows",
                ));
            }
        };
        let scope = Scope::try_from(need(order.scope, "scope")?);
        let order = Self {
            scope: scope.map_err(|error| error.within("scope"))?,
            why: order.why.into(),
            lasts: Duration::from_millis(order.lasts_ms),
            at_end,
            release_over: Duration::from_millis(order.release_over_ms),
        };
        order.check().map_err(|error| WireError::new("pause", error))?;
        Ok(order)
    }
}

impl From<&Pause> for pb::Pause {
    fn from(pause: &Pause) -> Self {
        let releasing_over_ms = match pause.phase {
            Phase::Holding => None,
            Phase::Releasing { over } => Some(millis(over)),
        };
        Self { id: pause.id.0, order: Some((&pause.order).into()), releasing_over_ms }
    }
}

impl TryFrom<pb::Pause> for Pause {
    type Error = WireError;

    fn try_from(pause: pb::Pause) -> Result<Self, WireError> {
        let order = PauseOrder::try_from(need(pause.order, "order")?);
        let over = pause.releasing_over_ms.map(Duration::from_millis);
        Ok(Self {
            id: pause_id(pause.id, "id")?,
            order: order.map_err(|error| error.within("order"))?,
            phase: over.map_or(Phase::Holding, |over| Phase::Releasing { over }),
        })
    }
}

impl From<&Flags> for pb::Flags {
    fn from(flags: &Flags) -> Self {
        Self {
            version: Some(flags.version.into()),
            pauses: flags.pauses.values().map(pb::Pause::from).collect(),
        }
    }
}

impl TryFrom<pb::Flags> for Flags {
    type Error = WireError;

    fn try_from(flags: pb::Flags) -> Result<Self, WireError> {
        let pauses: Vec<Pause> = each(flags.pauses, "pauses")?;
        in_order(pauses.iter().map(|pause| pause.id), "pauses")?;
        let version: Generation = need(flags.version, "version")?.into();
        let pauses = pauses.into_iter().map(|pause| (pause.id, pause)).collect();
        Ok(Self { version, pauses })
    }
}

/// Checks that there are not too many pauses, and each once.
fn in_order(ids: impl Iterator<Item = PauseId>, field: &str) -> Result<(), WireError> {
    let ids: Vec<PauseId> = ids.collect();
    if ids.len() > PAUSES_MAX {
        let problem = format!("has {} entries: there are {PAUSES_MAX} at most", ids.len());
        return Err(WireError::new(field, problem));
    }
    match ids.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => Err(WireError::new(field, format!("{} is out of order", pair[1]))),
        None => Ok(()),
    }
}

/// Writes how a proxy stands; nothing if it stops.
pub fn standing_message(proxy: Caller, standing: Option<&Standing>) -> pb::Standing {
    let count = |(pause, count): (&PauseId, &Count)| pb::PauseCount {
        pause: pause.0,
        in_flight: count.in_flight,
        held: count.held,
    };
    let counts = standing.map(|standing| standing.counts.iter().map(count).collect());
    pb::Standing {
        proxy: proxy.0,
        version: standing.map(|standing| standing.version.into()),
        counts: counts.unwrap_or_default(),
        leaves: standing.is_none(),
    }
}

/// Reads how a proxy stands; nothing if it stops.
pub fn standing(standing: pb::Standing) -> Result<(Caller, Option<Standing>), WireError> {
    let proxy = Caller(standing.proxy);
    if standing.leaves {
        return Ok((proxy, None));
    }
    in_order(standing.counts.iter().map(|count| PauseId(count.pause)), "counts")?;
    let count = |count: pb::PauseCount| {
        let pb::PauseCount { pause, in_flight, held } = count;
        Ok((pause_id(pause, "counts")?, Count { in_flight, held }))
    };
    let counts: Result<BTreeMap<_, _>, WireError> =
        standing.counts.into_iter().map(count).collect();
    let version = need(standing.version, "version")?.into();
    Ok((proxy, Some(Standing { version, counts: counts? })))
}

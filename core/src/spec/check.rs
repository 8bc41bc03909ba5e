//! Which specs make sense: each rule names its field, what stood there, and what may.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::load::{LOAD_MAX_UNITS, Load};
use crate::spec::{
    Band, BandOf, Consistency, HOMES_MAX, Home, JobSpec, LEASE_MAX, METRICS_MAX, Metric, Ratio,
    ReplicaBounds, SpecError, Unavailable,
};
use crate::task::{LABEL_MAX_BYTES, TASKS_MAX};

const NONE: Ratio = Ratio::percent(0);
const TINY: Ratio = Ratio::from_millionths(1);
const ALL: Ratio = Ratio::percent(100);
const TEN_TIMES: Ratio = Ratio::percent(1_000);
const HOUR: Duration = Duration::from_secs(3_600);
/// Shorter, one election costs every owner its slices; longer, so does one crash for minutes.
const LEASES: RangeInclusive<Duration> = Duration::from_secs(2)..=LEASE_MAX;
/// Beyond so many crashes nobody waits for one more.
const CONFINE_AFTER_MAX: u32 = 1_000;

pub(super) fn check(spec: &JobSpec) -> Result<(), SpecError> {
    let band = spec.band.ratio();
    bounded("band", band, TINY, TEN_TIMES, "give more than 0% and at most 1000%")?;
    let part = "give more than 0% and at most 100%";
    bounded("churn_budget", spec.churn_budget, TINY, ALL, part)?;
    bounded("fill_rate", spec.fill_rate, TINY, ALL, part)?;
    bounded("reservation", spec.reservation, NONE, ALL, "give 0% to 100%")?;
    hint(spec)?;
    replicas(spec.replicas)?;
    if let Some(label) = &spec.spread {
        key("spread", label)?;
    }
    homes(&spec.homes)?;
    metrics(&spec.metrics)?;
    if let Some(spill) = spec.spill {
        // At the mean or below, most tasks would be passed over.
        let above = Ratio::from_millionths(1_000_001);
        let hint = "give more than 100% and at most 1000%, such as 115%";
        bounded("spill.cap", spill.cap, above, TEN_TIMES, hint)?;
    }
    for (field, length) in [
        ("heartbeat", spec.heartbeat),
        ("report_every", spec.report_every),
        ("balance_every", spec.balance_every),
    ] {
        if !(Duration::from_millis(100)..=HOUR).contains(&length) {
            return refuse(field, format!("{length:?}"), "give 100ms to 1h");
        }
    }
    bounded("brake", spec.brake, TINY, ALL, "give more than 0% and at most 100%, which is never")?;
    change(spec)?;
    match spec.consistency {
        Consistency::Affinity => Ok(()),
        Consistency::Exclusive => exclusive(spec),
    }
}

/// What is asked of moves, restarts and crashes.
fn change(spec: &JobSpec) -> Result<(), SpecError> {
    if !LEASES.contains(&spec.lease) {
        return refuse("lease", format!("{:?}", spec.lease), "give 2s to 60s");
    }
    for (field, length) in [("prepare_within", spec.prepare_within), ("grace", spec.grace)] {
        if length > HOUR {
            return refuse(field, format!("{length:?}"), "give 0s to 1h");
        }
    }
    let is_some = match spec.max_unavailable {
        Unavailable::Tasks(count) => (1..=TASKS_MAX).contains(&(count as usize)),
        Unavailable::Share(share) => (TINY..=ALL).contains(&share),
    };
    if !is_some {
        let hint = "give 1 to 10000 tasks, or more than 0% and at most 100%";
        return refuse("max_unavailable", spec.max_unavailable.to_string(), hint);
    }
    if spec.confine_after > CONFINE_AFTER_MAX {
        let value = spec.confine_after.to_string();
        return refuse("confine_after", value, "give 1 to 1000, or 0 for never");
    }
    Ok(())
}

/// What cannot be had where a key has one owner at most.
fn exclusive(spec: &JobSpec) -> Result<(), SpecError> {
    let ReplicaBounds { min, max } = spec.replicas;
    if (min, max) != (1, 1) {
        let value = format!("min {min}, max {max} in an exclusive job");
        return refuse("replicas", value, "give min 1, max 1: an exclusive slice has one owner");
    }
    if let Some(spill) = spec.spill {
        let value = format!("{} in an exclusive job", spill.cap);
        return refuse("spill.cap", value, "leave spill out: only the owner may answer");
    }
    if spec.heartbeat * 3 > spec.lease {
        let value = format!("{:?} beside a lease of {:?}", spec.heartbeat, spec.lease);
        let hint = "give at most a third of lease, so that two lost heartbeats do not end it";
        return refuse("heartbeat", value, hint);
    }
    Ok(())
}

fn refuse(field: &'static str, value: String, hint: &'static str) -> Result<(), SpecError> {
    Err(SpecError { field, value, hint })
}

fn bounded(
    field: &'static str,
    ratio: Ratio,
    min: Ratio,
    max: Ratio,
    hint: &'static str,
) -> Result<(), SpecError> {
    if (min..=max).contains(&ratio) { Ok(()) } else { refuse(field, ratio.to_string(), hint) }
}

/// What a task can take is never guessed: who asks for something of it says how much it is.
fn hint(spec: &JobSpec) -> Result<(), SpecError> {
    let needs = "give max_load_hint too, the load that an ordinary task can take";
    match spec.max_load_hint {
        Some(load) if load == Load::ZERO || load.units() > LOAD_MAX_UNITS => refuse(
            "max_load_hint",
            load.to_string(),
            "give more than 0 and at most 1e9 units a second",
        ),
        Some(_) => Ok(()),
        None if matches!(spec.band, Band::Fixed { of: BandOf::Hint, .. }) => {
            refuse("band", format!("{} of hint", spec.band.ratio()), needs)
        }
        None if spec.reservation > NONE => {
            refuse("reservation", spec.reservation.to_string(), needs)
        }
        None => Ok(()),
    }
}

fn replicas(ReplicaBounds { min, max }: ReplicaBounds) -> Result<(), SpecError> {
    if (1..=max).contains(&min) && max <= ReplicaBounds::ALL {
        return Ok(());
    }
    refuse("replicas", format!("min {min}, max {max}"), "give 1 <= min <= max <= 10000")
}

/// What may name a label or a metric: it fits a Kubernetes label and a metric's label alike.
fn key(field: &'static str, text: &str) -> Result<(), SpecError> {
    let usual = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    if (1..=LABEL_MAX_BYTES).contains(&text.len()) && text.chars().all(usual) {
        return Ok(());
    }
    let hint = "give 1 to 128 of a-z, A-Z, 0-9, '-', '_', '.' and '/'";
    refuse(field, format!("{:?}", shortened(text)), hint)
}

fn homes(homes: &[Home]) -> Result<(), SpecError> {
    if homes.len() > HOMES_MAX {
        return refuse("homes", format!("a list of {}", homes.len()), "give at most 10000");
    }
    if let Some(pair) = homes.windows(2).find(|pair| pair[0].slice.last() >= pair[1].slice.first())
    {
        let value = format!("{} and then {}", pair[0].slice, pair[1].slice);
        return refuse("homes", value, "give them in order, without overlap");
    }
    for home in homes {
        // As the label of a task: any text, of which an empty one means nothing.
        if !(1..=LABEL_MAX_BYTES).contains(&home.region.len()) {
            let value = format!("{:?}", shortened(&home.region));
            return refuse(
                "homes.region",
                value,
                "give 1 to 128 bytes, as the tasks' label has it",
            );
        }
    }
    Ok(())
}

fn metrics(metrics: &[Metric]) -> Result<(), SpecError> {
    if metrics.len() > METRICS_MAX {
        return refuse("metrics", format!("a list of {}", metrics.len()), "give at most 4");
    }
    for (index, metric) in metrics.iter().enumerate() {
        key("metrics.name", &metric.name)?;
        let hint = "give more than 0% and at most 1000%";
        bounded("metrics.band", metric.band, TINY, TEN_TIMES, hint)?;
        if metrics[..index].iter().any(|other| other.name == metric.name) {
            return refuse("metrics", format!("{:?} twice", metric.name), "name each once");
        }
    }
    Ok(())
}

/// What an error shows of a text that may be anything.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use crate::key::SliceKey;
    use crate::slice::Slice;
    use crate::spec::Spill;

    use super::*;

    fn good() -> JobSpec {
        JobSpec::new("kv".parse().unwrap())
    }

    fn home(first: u64, last: u64, region: &str) -> Home {
        let slice = Slice::new(SliceKey(first), SliceKey(last)).unwrap();
        Home { slice, region: region.to_owned() }
    }

    fn metric(name: &str, percent: u32) -> Metric {
        Metric { name: name.to_owned(), band: Ratio::percent(percent) }
    }

    fn check(spec: &JobSpec, message: &str) {
        let error = spec.check().unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }

    #[test]
    fn all_that_may_be_asked_at_once_makes_sense() {
        let spec = JobSpec {
            band: Band::Fixed { ratio: Ratio::percent(2), of: BandOf::Hint },
            churn_budget: Ratio::percent(5),
            fill_rate: Ratio::percent(50),
            max_load_hint: Some(Load::from_milli(1)),
            reservation: Ratio::percent(100),
            replicas: ReplicaBounds { min: 3, max: ReplicaBounds::ALL },
            spread: Some("topology.kubernetes.io/zone".to_owned()),
            homes: vec![home(0, 9, "eu"), home(10, 10, "us"), home(12, u64::MAX, "eu")],
            metrics: vec![metric("memory", 20), metric("connections", 1_000)],
            spill: Some(Spill { cap: Ratio::percent(115) }),
            lease: Duration::from_secs(60),
            prepare_within: Duration::ZERO,
            grace: HOUR,
            brake: ALL,
            max_unavailable: Unavailable::Share(ALL),
            confine_after: 0,
            ..good()
        };
        assert_eq!(spec.check(), Ok(()));
        assert_eq!(good().check(), Ok(()));
    }

    #[test]
    fn values_out_of_range_are_named() {
        let bounds = |min, max| JobSpec { replicas: ReplicaBounds { min, max }, ..good() };
        let band = |percent| Band::Adaptive(Ratio::percent(percent));
        let unavailable = |max_unavailable| JobSpec { max_unavailable, ..good() };
        let spill = |percent| Some(Spill { cap: Ratio::percent(percent) });
        for (spec, message) in [
            (JobSpec { band: band(0), ..good() }, "band is 0%"),
            (JobSpec { band: band(1_001), ..good() }, "band is 1001%"),
            (JobSpec { churn_budget: Ratio::percent(101), ..good() }, "churn_budget is 101%"),
            (JobSpec { fill_rate: NONE, ..good() }, "fill_rate is 0%"),
            (JobSpec { max_load_hint: Some(Load::ZERO), ..good() }, "max_load_hint is 0: give"),
            (
                JobSpec { max_load_hint: Some(Load::from_milli(u64::MAX)), ..good() },
                "max_load_hint is 1844",
            ),
            (bounds(0, 1), "replicas is min 0, max 1"),
            (bounds(3, 2), "replicas is min 3, max 2"),
            (bounds(1, 10_001), "replicas is min 1, max 10001"),
            (JobSpec { spill: spill(100), ..good() }, "spill.cap is 100%"),
            (JobSpec { spill: spill(1_001), ..good() }, "spill.cap is 1001%"),
            (JobSpec { heartbeat: Duration::from_millis(1), ..good() }, "heartbeat is 1ms"),
            (JobSpec { report_every: Duration::from_secs(3_601), ..good() }, "report_every is 36"),
            (JobSpec { balance_every: Duration::ZERO, ..good() }, "balance_every is 0ns"),
            (JobSpec { lease: Duration::from_millis(1_999), ..good() }, "lease is 1.999s: give 2s"),
            (JobSpec { lease: Duration::from_secs(61), ..good() }, "lease is 61s: give 2s to 60s"),
            (JobSpec { prepare_within: HOUR * 2, ..good() }, "prepare_within is 7200s: give 0s"),
            (JobSpec { grace: HOUR * 2, ..good() }, "grace is 7200s: give 0s to 1h"),
            (JobSpec { brake: NONE, ..good() }, "brake is 0%: give more than 0%"),
            (JobSpec { brake: Ratio::percent(101), ..good() }, "brake is 101%"),
            (unavailable(Unavailable::Tasks(0)), "max_unavailable is 0: give 1 to 10000 tasks"),
            (unavailable(Unavailable::Tasks(10_001)), "max_unavailable is 10001"),
            (unavailable(Unavailable::Share(NONE)), "max_unavailable is 0%"),
            (unavailable(Unavailable::Share(Ratio::percent(101))), "max_unavailable is 101%"),
            (JobSpec { confine_after: 1_001, ..good() }, "confine_after is 1001: give 1 to 1000"),
        ] {
            check(&spec, message);
        }
    }

    #[test]
    fn an_exclusive_slice_has_one_owner_who_is_heard_of_often() {
        let exclusive = || JobSpec { consistency: Consistency::Exclusive, ..good() };
        assert_eq!(exclusive().check(), Ok(()));
        let spread = Some("zone".to_owned());
        let tight = JobSpec {
            lease: Duration::from_secs(3),
            heartbeat: Duration::from_secs(1),
            spread,
            ..exclusive()
        };
        assert_eq!(tight.check(), Ok(()));
        let slow = JobSpec { lease: Duration::from_millis(2_999), ..tight };
        check(&slow, "heartbeat is 1s beside a lease of 2.999s: give at most a third of lease");
        assert_eq!(JobSpec { consistency: Consistency::Affinity, ..slow }.check(), Ok(()));
        let replicas = ReplicaBounds { min: 1, max: 2 };
        let two = JobSpec { replicas, ..exclusive() };
        check(&two, "replicas is min 1, max 2 in an exclusive job: give min 1, max 1");
        let spill = Some(Spill { cap: Ratio::percent(115) });
        check(&JobSpec { spill, ..exclusive() }, "spill.cap is 115% in an exclusive job: leave");
    }

    #[test]
    fn a_share_of_the_tasks_is_one_at_least() {
        let tenth = Unavailable::Share(Ratio::percent(10));
        assert_eq!([0, 9, 19, 20, 100].map(|tasks| tenth.of(tasks)), [1, 1, 1, 2, 10]);
        assert_eq!(Unavailable::Tasks(3).of(1), 3);
    }

    #[test]
    fn what_a_task_can_take_is_never_guessed() {
        let of_hint = Band::Fixed { ratio: Ratio::percent(2), of: BandOf::Hint };
        let band = JobSpec { band: of_hint, ..good() };
        check(&band, "band is 2% of hint: give max_load_hint");
        let reservation = JobSpec { reservation: Ratio::percent(10), ..good() };
        check(&reservation, "reservation is 10%: give max_load_hint");
        let hint = Some(Load::from_milli(1_000));
        for spec in [band, reservation.clone()] {
            assert_eq!(JobSpec { max_load_hint: hint, ..spec }.check(), Ok(()));
        }
        let all = JobSpec { max_load_hint: hint, reservation: Ratio::percent(101), ..reservation };
        check(&all, "reservation is 101%: give 0% to 100%");
    }

    #[test]
    fn homes_are_in_order_and_somewhere() {
        let homes = |homes: Vec<Home>| JobSpec { homes, ..good() };
        for (list, message) in [
            (
                vec![home(0, 9, "eu"), home(9, 10, "us")],
                "homes is 0000000000000000..0000000000000009",
            ),
            (vec![home(5, 9, "eu"), home(0, 1, "us")], "homes is 0000000000000005"),
            (vec![home(0, 9, "")], "homes.region is \"\""),
            (vec![home(0, 9, &"x".repeat(129))], "homes.region is \"xxx"),
            (vec![home(0, 9, "eu"); HOMES_MAX + 1], "homes is a list of 10001"),
        ] {
            check(&homes(list), message);
        }
    }

    #[test]
    fn labels_and_metrics_have_names_that_fit_everywhere() {
        for (label, message) in [("", "spread is \"\""), ("a zone", "spread is \"a zone\"")] {
            check(&JobSpec { spread: Some(label.to_owned()), ..good() }, message);
        }
        for (metrics, message) in [
            (vec![metric("", 1)], "metrics.name is \"\""),
            (vec![metric("memory", 0)], "metrics.band is 0%"),
            (vec![metric("memory", 1), metric("memory", 2)], "metrics is \"memory\" twice"),
            (
                ["a", "b", "c", "d", "e"].map(|name| metric(name, 1)).into(),
                "metrics is a list of 5",
            ),
        ] {
            check(&JobSpec { metrics, ..good() }, message);
        }
    }
}

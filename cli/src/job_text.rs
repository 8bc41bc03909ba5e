//! A job's spec as it is shown, in the very form that files have: what is printed can be edited and applied.

use std::fmt::Write;

use mandoline_core::spec::{Band, BandOf, Home, JobSpec, ReplicaBounds, Unavailable};
use mandoline_proto::pb;
use serde_json::{Value, json};

use crate::units::Span;

/// Every field that is set, in the order of the documentation.
fn fields(spec: &JobSpec) -> Vec<(&'static str, Value)> {
    let count = |count: u32| match count {
        ReplicaBounds::ALL => json!("all"),
        count => json!(count),
    };
    let home = |home: &Home| json!({ "slice": home.slice.to_string(), "region": home.region });
    let band = match spec.band {
        Band::Adaptive(floor) => json!(floor.to_string()),
        Band::Fixed { ratio, of: BandOf::Mean } => json!({ "fixed": ratio.to_string() }),
        Band::Fixed { ratio, of } => json!({ "fixed": ratio.to_string(), "of": of.to_string() }),
    };
    let unavailable = match spec.max_unavailable {
        Unavailable::Tasks(count) => json!(count),
        Unavailable::Share(share) => json!(share.to_string()),
    };
    let (min, max) = (count(spec.replicas.min), count(spec.replicas.max));
    let mut fields = vec![
        ("name", json!(spec.name.as_str())),
        ("band", band),
        ("churn_budget", json!(spec.churn_budget.to_string())),
        ("fill_rate", json!(spec.fill_rate.to_string())),
        ("reservation", json!(spec.reservation.to_string())),
        ("replicas", json!({ "min": min, "max": max })),
        ("consistency", json!(spec.consistency.to_string())),
        ("lease", json!(Span(spec.lease).to_string())),
        ("prepare_within", json!(Span(spec.prepare_within).to_string())),
        ("grace", json!(Span(spec.grace).to_string())),
        ("brake", json!(spec.brake.to_string())),
        ("max_unavailable", unavailable),
        ("confine_after", json!(spec.confine_after)),
        ("heartbeat", json!(Span(spec.heartbeat).to_string())),
        ("report_every", json!(Span(spec.report_every).to_string())),
        ("balance_every", json!(Span(spec.balance_every).to_string())),
    ];
    if let Some(hint) = spec.max_load_hint {
        fields.push(("max_load_hint", json!(hint.units())));
    }
    if let Some(label) = &spec.spread {
        fields.push(("spread", json!(label)));
    }
    if let Some(spill) = spec.spill {
        fields.push(("spill", json!({ "cap": spill.cap.to_string() })));
    }
    if !spec.metrics.is_empty() {
        let metric = |metric: &mandoline_core::spec::Metric| {
            (metric.name.clone(), json!({ "band": metric.band.to_string() }))
        };
        fields.push(("metrics", Value::Object(spec.metrics.iter().map(metric).collect())));
    }
    if !spec.homes.is_empty() {
        fields.push(("homes", spec.homes.iter().map(home).collect()));
    }
    fields
}

/// As JSON. Of a spec that a newer assigner sent and that makes no sense here, only the name.
pub(crate) fn json(spec: Option<&pb::JobSpec>) -> Value {
    read(spec).into_iter().map(|(field, value)| (field.to_owned(), value)).collect()
}

/// As YAML, a line a field.
pub(crate) fn yaml(spec: Option<&pb::JobSpec>) -> String {
    let mut page = String::new();
    for (field, value) in read(spec) {
        match value {
            Value::Array(list) => {
                page.push_str(field);
                page.push_str(":\n");
                for value in &list {
                    writeln!(page, "  - {}", flow(value)).expect("a string takes all");
                }
            }
            value => writeln!(page, "{field}: {}", flow(&value)).expect("a string takes all"),
        }
    }
    page
}

fn read(spec: Option<&pb::JobSpec>) -> Vec<(&'static str, Value)> {
    let spec = spec.cloned().unwrap_or_default();
    let name = spec.name.clone();
    JobSpec::try_from(spec).map_or_else(|_| vec![("name", json!(name))], |spec| fields(&spec))
}

fn flow(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let fields = map.iter().map(|(name, value)| format!("{name}: {}", flow(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        Value::String(text) if is_plain(text) => text.clone(),
        // JSON is YAML.
        value => value.to_string(),
    }
}

/// Whether YAML reads it as text without quotes: it begins as no number does, or ends in a unit.
fn is_plain(text: &str) -> bool {
    let usual = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '%');
    let begins = |c: char| c.is_ascii_alphabetic();
    let is_word = !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
        .iter()
        .any(|word| text.eq_ignore_ascii_case(word));
    text.chars().all(usual)
        && is_word
        && (text.starts_with(begins) || text.ends_with(['%', 's', 'm', 'h']))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mandoline_core::slice::Slice;
    use mandoline_core::spec::{Consistency, Metric, Ratio, Spill};

    use super::*;
    use crate::job_file;

    fn check(spec: &JobSpec) {
        let message = pb::JobSpec::from(spec);
        for text in [json(Some(&message)).to_string(), yaml(Some(&message))] {
            let read =
                job_file::parse(&text, "-").unwrap_or_else(|error| panic!("{text}\n{error}"));
            assert_eq!(read, *spec, "{text}");
        }
    }

    #[test]
    fn what_is_shown_can_be_applied() {
        let plain = JobSpec::new("kv".parse().unwrap());
        check(&plain);
        check(&JobSpec::new("7".parse().unwrap()));
        check(&JobSpec::new("no".parse().unwrap()));
        check(&JobSpec {
            band: Band::Fixed { ratio: Ratio::from_millionths(25_000), of: BandOf::Hint },
            churn_budget: Ratio::from_millionths(5),
            max_load_hint: Some(mandoline_core::load::Load::from_milli(1_500)),
            reservation: Ratio::percent(10),
            replicas: ReplicaBounds { min: 2, max: ReplicaBounds::ALL },
            spread: Some("0/zone".to_owned()),
            homes: ["eu", "eu-west: 1", "1e3"]
                .iter()
                .enumerate()
                .map(|(at, region)| {
                    let first = mandoline_core::key::SliceKey(2 * at as u64);
                    let slice = Slice::new(first, first).unwrap();
                    Home { slice, region: (*region).to_owned() }
                })
                .collect(),
            metrics: vec![
                Metric { name: "1".to_owned(), band: Ratio::percent(20) },
                Metric { name: "memory".to_owned(), band: Ratio::percent(20) },
            ],
            spill: Some(Spill { cap: Ratio::percent(115) }),
            lease: Duration::from_millis(2_500),
            prepare_within: Duration::from_secs(120),
            grace: Duration::from_secs(30),
            brake: Ratio::percent(100),
            max_unavailable: Unavailable::Share(Ratio::from_millionths(12_500)),
            confine_after: 0,
            ..plain.clone()
        });
        check(&JobSpec {
            consistency: Consistency::Exclusive,
            max_unavailable: Unavailable::Tasks(12),
            ..plain
        });
        let fixed = Band::Fixed { ratio: Ratio::percent(2), of: BandOf::Mean };
        check(&JobSpec { band: fixed, ..JobSpec::new("kv".parse().unwrap()) });
    }

    #[test]
    fn a_spec_from_the_future_has_a_name_at_least() {
        let spec = pb::JobSpec { name: "kv".to_owned(), band_of: 9, ..Default::default() };
        assert_eq!(yaml(Some(&spec)), "name: kv\n");
    }
}

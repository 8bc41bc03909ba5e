//! A job's spec as operators write it, in YAML or JSON. What is left out has its default; what is not known is refused.

use mandoline_core::name::JobName;
use mandoline_core::spec::{JobSpec, ReplicaBounds};
use serde::Deserialize;

use crate::failure::Failure;
use crate::file;
use crate::units::{Share, Span};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobFile {
    name: String,
    band: Option<Share>,
    churn_budget: Option<Share>,
    replicas: Option<Replicas>,
    heartbeat: Option<Span>,
    report_every: Option<Span>,
    balance_every: Option<Span>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replicas {
    min: Option<u32>,
    max: Option<u32>,
}

/// Reads a spec from a text that came from `name`.
pub(crate) fn parse(text: &str, name: &str) -> Result<JobSpec, Failure> {
    let file: JobFile = file::parse(text, name)?;
    let job =
        JobName::new(&file.name).map_err(|error| Failure::new(format!("{name}: name: {error}")))?;
    let base = JobSpec::new(job);
    let span = |given: Option<Span>, base| given.map_or(base, |Span(length)| length);
    let share = |given: Option<Share>, base| given.map_or(base, |Share(ratio)| ratio);
    let min = file.replicas.as_ref().and_then(|replicas| replicas.min).unwrap_or(base.replicas.min);
    let max = file.replicas.as_ref().and_then(|replicas| replicas.max);
    let spec = JobSpec {
        band: share(file.band, base.band),
        churn_budget: share(file.churn_budget, base.churn_budget),
        replicas: ReplicaBounds { min, max: max.unwrap_or_else(|| min.max(base.replicas.max)) },
        heartbeat: span(file.heartbeat, base.heartbeat),
        report_every: span(file.report_every, base.report_every),
        balance_every: span(file.balance_every, base.balance_every),
        name: base.name,
    };
    spec.check().map_err(|error| Failure::new(format!("{name}: {error}")))?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_spec_is_read_from_yaml_and_json() {
        let yaml =
            "name: kv\nband: 12.5%\nchurn_budget: 5%\nreplicas: {min: 2}\nheartbeat: 500ms\n";
        let json = r#"{"name":"kv","band":"12.5%","replicas":{"min":2},"heartbeat":"500ms"}"#;
        let spec = parse(yaml, "kv.yaml").unwrap();
        assert_eq!(spec.band.millionths(), 125_000);
        assert_eq!(spec.replicas, ReplicaBounds { min: 2, max: 2 });
        assert_eq!(spec.heartbeat, Duration::from_millis(500));
        assert_eq!(spec.report_every, Duration::from_secs(5));
        assert_eq!(parse(json, "kv.json").unwrap(), spec);
        assert_eq!(parse("name: kv", "-").unwrap(), JobSpec::new("kv".parse().unwrap()));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let cases = [
            ("name: kv\nreplicas: {min: 3, max: 2}", "kv.yaml: replicas is min 3, max 2"),
            ("name: kv\nreplicas: {mim: 3}", "kv.yaml:2:12: unknown field \"mim\""),
            ("name: kv\nband: 0%", "kv.yaml: band is 0%"),
            ("name: kv\nheartbeat: 1", "kv.yaml:2:12: heartbeat: \"1\" is no duration"),
            ("name: a/b", "kv.yaml: name: the name \"a/b\" has '/'"),
            ("band: 10%", "kv.yaml:1:1: the field \"name\" is missing"),
        ];
        for (text, expected) in cases {
            let failure = parse(text, "kv.yaml").unwrap_err().to_string();
            assert!(failure.starts_with(&format!("error: {expected}")), "{failure}");
        }
        let long = format!("name: {}", "x".repeat(64));
        assert!(parse(&long, "-").unwrap_err().to_string().contains("64 bytes long"));
    }
}

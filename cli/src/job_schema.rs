//! The JSON Schema of job specs: what editors and other programs need to know of the form.
//!
//! It and the parser say the same, tested: each example that one takes, the other takes, and the fields are the same
//! ones. The documentation's examples are examples, too.

/// The schema, as `mandoline job schema` prints it.
pub(crate) const SCHEMA: &str = include_str!("../job.schema.json");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::SCHEMA;
    use crate::job_file::parse;
    use crate::schema::fits;
    use crate::{file, job_text};

    fn schema() -> Value {
        serde_json::from_str(SCHEMA).unwrap()
    }

    /// Says whether both take a spec; they must agree.
    fn taken(yaml: &str) -> bool {
        let value: Value = file::parse(yaml, "-").unwrap();
        let by_schema = fits(&schema(), &schema(), &value);
        let by_parser = parse(yaml, "-");
        assert_eq!(by_schema, by_parser.is_ok(), "{yaml}\n{by_parser:?}");
        by_schema
    }

    #[test]
    fn the_schema_and_the_parser_take_the_same() {
        for good in [
            "name: kv",
            "{name: kv, band: 12.5%}",
            "{name: kv, band: .5 %}",
            "{name: kv, band: {fixed: 1%}}",
            "{name: kv, band: {fixed: 1%, of: mean}}",
            "{name: kv, band: {fixed: 1%, of: hint}, max_load_hint: 0.5}",
            "{name: kv, churn_budget: 5%, fill_rate: 25%, reservation: 0%}",
            "{name: kv, max_load_hint: 1000, reservation: 100%}",
            "{name: kv, replicas: {}}",
            "{name: kv, replicas: {min: 2}}",
            "{name: kv, replicas: {min: 2, max: all}}",
            "{name: kv, replicas: {min: all, max: 10000}}",
            "{name: kv, spread: topology.kubernetes.io/zone}",
            "{name: kv, homes: []}",
            "{name: kv, homes: [{slice: 0..ff, region: eu}, {group: a, region: us}]}",
            "{name: kv, metrics: {}}",
            "{name: kv, metrics: {a: {band: 1%}, b: {band: 2%}, c: {band: 3%}, d: {band: 4%}}}",
            "{name: kv, spill: {cap: 1.15}}",
            "{name: kv, spill: {cap: 115%}}",
            "{name: kv, spill: {cap: 10}}",
            "{name: kv, consistency: exclusive, lease: 5s, replicas: {min: 1, max: 1}}",
            "{name: kv, consistency: affinity, lease: 1m, prepare_within: 0s, grace: 1h}",
            "{name: kv, brake: 100%, max_unavailable: 1, confine_after: 0}",
            "{name: kv, max_unavailable: 10%, confine_after: 1000}",
            "{name: kv, heartbeat: 500ms, report_every: 1.5s, balance_every: 1m}",
        ] {
            assert!(taken(good), "{good}");
        }
        for bad in [
            "{band: 10%}",
            "{name: a b}",
            "{name: -a}",
            "{name: kv, bnad: 10%}",
            "{name: kv, band: 10}",
            "{name: kv, band: 1e1%}",
            "{name: kv, band: {of: mean}}",
            "{name: kv, band: {fixed: 1%, of: max}}",
            "{name: kv, band: {fixed: 1%, off: mean}}",
            "{name: kv, fill_rate: [1%]}",
            "{name: kv, max_load_hint: 0}",
            "{name: kv, max_load_hint: -1}",
            "{name: kv, max_load_hint: 2e9}",
            "{name: kv, max_load_hint: many}",
            "{name: kv, replicas: 3}",
            "{name: kv, replicas: {min: 0}}",
            "{name: kv, replicas: {max: 10001}}",
            "{name: kv, replicas: {max: many}}",
            "{name: kv, replicas: {mx: 1}}",
            "{name: kv, spread: a zone}",
            "{name: kv, spread: ''}",
            "{name: kv, homes: {}}",
            "{name: kv, homes: [{slice: 0..ff}]}",
            "{name: kv, homes: [{region: eu}]}",
            "{name: kv, homes: [{slice: 0..ff, group: a, region: eu}]}",
            "{name: kv, homes: [{slice: 0-ff, region: eu}]}",
            "{name: kv, homes: [{slice: 0..ff, region: ''}]}",
            "{name: kv, metrics: {memory: 1%}}",
            "{name: kv, metrics: {memory: {}}}",
            "{name: kv, metrics: {'a b': {band: 1%}}}",
            "{name: kv, metrics: {a: {band: 1%}, b: {band: 1%}, c: {band: 1%}, d: {band: 1%}, e: {band: 1%}}}",
            "{name: kv, spill: 1.15}",
            "{name: kv, spill: {}}",
            "{name: kv, spill: {cap: 1}}",
            "{name: kv, spill: {cap: 11}}",
            "{name: kv, spill: {cap: much}}",
            "{name: kv, consistency: eventual}",
            "{name: kv, consistency: Exclusive}",
            "{name: kv, lease: 5}",
            "{name: kv, prepare_within: never}",
            "{name: kv, grace: -1s}",
            "{name: kv, brake: 0.5}",
            "{name: kv, max_unavailable: 0}",
            "{name: kv, max_unavailable: 10001}",
            "{name: kv, max_unavailable: few}",
            "{name: kv, max_unavailable: 1.5}",
            "{name: kv, confine_after: -1}",
            "{name: kv, confine_after: 1001}",
            "{name: kv, confine_after: never}",
            "{name: kv, heartbeat: 5}",
            "{name: kv, heartbeat: 5 parsecs}",
        ] {
            assert!(!taken(bad), "{bad}");
        }
    }

    #[test]
    fn what_only_the_parser_can_tell_it_tells() {
        // No schema says how large the number before a unit is, or that one field needs another.
        for bad in [
            "{name: kv, band: 0%}",
            "{name: kv, churn_budget: 101%}",
            "{name: kv, heartbeat: 1ms}",
            "{name: kv, lease: 1s}",
            "{name: kv, grace: 2h}",
            "{name: kv, brake: 0%}",
            "{name: kv, max_unavailable: 0%}",
            "{name: kv, consistency: exclusive, replicas: {min: 2}}",
            "{name: kv, consistency: exclusive, spill: {cap: 1.15}}",
            "{name: kv, consistency: exclusive, heartbeat: 2s}",
            "{name: kv, reservation: 10%}",
            "{name: kv, replicas: {min: 3, max: 2}}",
            "{name: kv, spill: {cap: 15%}}",
            "{name: kv, homes: [{slice: 1..0, region: eu}]}",
        ] {
            let value: Value = file::parse(bad, "-").unwrap();
            assert!(fits(&schema(), &schema(), &value), "{bad}");
            assert!(parse(bad, "-").is_err(), "{bad}");
        }
    }

    #[test]
    fn the_fields_are_the_parsers() {
        let unknown = parse("{name: kv, nothing_like_it: 1}", "-").unwrap_err().to_string();
        let known = unknown.split("known here: ").nth(1).unwrap().lines().next().unwrap();
        let by_parser: BTreeSet<&str> = known.split(", ").collect();
        let schema = schema();
        let fields = schema["properties"].as_object().unwrap();
        assert_eq!(fields.keys().map(String::as_str).collect::<BTreeSet<_>>(), by_parser);
        let page = include_str!("../../docs/job-spec.md");
        for (field, rules) in fields {
            assert!(
                page.contains(&format!("| `{field}` |")),
                "docs/job-spec.md has no row for {field}"
            );
            let section = page.contains(&format!("\n### `{field}`\n"));
            assert!(section || field == "name", "docs/job-spec.md has no section on {field}");
            assert!(rules["description"].is_string(), "the schema does not say what {field} is");
        }
    }

    #[test]
    fn the_defaults_are_the_parsers() {
        let spec = parse("name: kv", "-").unwrap();
        let shown = job_text::json(Some(&(&spec).into()));
        let schema = schema();
        for (field, rules) in schema["properties"].as_object().unwrap() {
            if let Some(default) = rules.get("default") {
                assert_eq!(*default, shown[field], "{field}");
            }
        }
        for end in ["min", "max"] {
            let rules = &schema["properties"]["replicas"]["properties"][end];
            assert_eq!(rules["default"], shown["replicas"][end], "{end}");
        }
    }

    #[test]
    fn the_documentation_has_good_examples() {
        let page = include_str!("../../docs/job-spec.md");
        let examples: Vec<&str> =
            page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert!(examples.len() > 5, "{examples:?}");
        for example in examples {
            assert!(taken(example), "{example}");
        }
    }
}

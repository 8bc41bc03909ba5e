//! A job's spec as operators write it, in YAML or JSON. What is left out has its default; what is not known is refused.
//!
//! `docs/job-spec.md` says what each field does, and `job.schema.json` what it may hold, for editors.

use std::collections::BTreeMap;
use std::fmt;

use mandoline_core::load::Load;
use mandoline_core::name::JobName;
use mandoline_core::slice::Slice;
use mandoline_core::spec::{
    Band, BandOf, Consistency, Home, JobSpec, Metric, ReplicaBounds, Spill, Unavailable,
};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::failure::Failure;
use crate::file;
use crate::text::Text;
use crate::units::{Factor, Share, Span};

/// The fields, each as a file gives it. The schema is tested to have the same.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct JobFile {
    name: String,
    band: Option<BandFile>,
    churn_budget: Option<Share>,
    fill_rate: Option<Share>,
    max_load_hint: Option<f64>,
    reservation: Option<Share>,
    replicas: Option<Replicas>,
    spread: Option<String>,
    homes: Option<Vec<HomeFile>>,
    metrics: Option<BTreeMap<String, MetricFile>>,
    spill: Option<SpillFile>,
    consistency: Option<Kind>,
    lease: Option<Span>,
    prepare_within: Option<Span>,
    grace: Option<Span>,
    brake: Option<Share>,
    max_unavailable: Option<UnavailableFile>,
    confine_after: Option<u32>,
    heartbeat: Option<Span>,
    report_every: Option<Span>,
    balance_every: Option<Span>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Replicas {
    min: Option<Count>,
    max: Option<Count>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Fixed {
    fixed: Share,
    of: Option<Of>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Of {
    Mean,
    Hint,
}

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Affinity,
    Exclusive,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct HomeFile {
    slice: Option<Text<Slice>>,
    group: Option<String>,
    region: String,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricFile {
    band: Share,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SpillFile {
    cap: Factor,
}

/// `10%`, or `{fixed: 2.5%, of: hint}`.
#[derive(Debug)]
struct BandFile(Band);

impl<'de> Deserialize<'de> for BandFile {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = BandFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("percent, such as 10%, or {fixed: 2.5%, of: mean}")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<BandFile, E> {
                let Share(floor) = text.parse().map_err(E::custom)?;
                Ok(BandFile(Band::Adaptive(floor)))
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<BandFile, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<BandFile, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<BandFile, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<BandFile, A::Error> {
                let file = Fixed::deserialize(MapAccessDeserializer::new(map))?;
                let Share(ratio) = file.fixed;
                let of = match file.of {
                    None | Some(Of::Mean) => BandOf::Mean,
                    Some(Of::Hint) => BandOf::Hint,
                };
                Ok(BandFile(Band::Fixed { ratio, of }))
            }
        }

        from.deserialize_any(Form)
    }
}

/// A number of replicas, or `all`: as many as there are tasks.
#[derive(Clone, Copy, Debug)]
struct Count(u32);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Form;

        impl Visitor<'_> for Form {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of tasks, or all")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Count, E> {
                match text {
                    "all" => Ok(Count(ReplicaBounds::ALL)),
                    _ => Err(E::custom(format_args!("{text:?} is no number of tasks, nor all"))),
                }
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Count, E> {
                // Beyond 32 bits is beyond what is allowed, too.
                Ok(Count(u32::try_from(number).unwrap_or(u32::MAX)))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Count, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::custom(format_args!("{number} is no number of tasks"))),
                }
            }
        }

        from.deserialize_any(Form)
    }
}

/// A number of tasks, or a share of them.
#[derive(Clone, Copy, Debug)]
struct UnavailableFile(Unavailable);

impl<'de> Deserialize<'de> for UnavailableFile {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Form;

        impl Visitor<'_> for Form {
            type Value = UnavailableFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of tasks, such as 1, or a share of them, such as 10%")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<UnavailableFile, E> {
                let Share(share) = text.parse().map_err(E::custom)?;
                Ok(UnavailableFile(Unavailable::Share(share)))
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<UnavailableFile, E> {
                // Beyond 32 bits is beyond what is allowed, too.
                let count = u32::try_from(number).unwrap_or(u32::MAX);
                Ok(UnavailableFile(Unavailable::Tasks(count)))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<UnavailableFile, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::custom(format_args!("{number} is no number of tasks"))),
                }
            }
        }

        from.deserialize_any(Form)
    }
}

/// Reads a spec from a text that came from `name`.
pub(crate) fn parse(text: &str, name: &str) -> Result<JobSpec, Failure> {
    let file: JobFile = file::parse(text, name)?;
    let spec = file.into_spec().map_err(|problem| Failure::new(format!("{name}: {problem}")))?;
    spec.check().map_err(|error| Failure::new(format!("{name}: {error}")))?;
    Ok(spec)
}

impl JobFile {
    fn into_spec(self) -> Result<JobSpec, String> {
        let job = JobName::new(&self.name).map_err(|error| format!("name: {error}"))?;
        let base = JobSpec::new(job);
        let span = |given: Option<Span>, base| given.map_or(base, |Span(length)| length);
        let share = |given: Option<Share>, base| given.map_or(base, |Share(ratio)| ratio);
        let hint = self.max_load_hint.map(Load::from_units).transpose();
        let homes = self.homes.unwrap_or_default().into_iter().map(HomeFile::into_home);
        let mut homes = homes.collect::<Result<Vec<Home>, _>>()?;
        homes.sort_by_key(|home| home.slice);
        let metric = |(name, MetricFile { band: Share(band) })| Metric { name, band };
        Ok(JobSpec {
            band: self.band.map_or(base.band, |BandFile(band)| band),
            churn_budget: share(self.churn_budget, base.churn_budget),
            fill_rate: share(self.fill_rate, base.fill_rate),
            max_load_hint: hint.map_err(|error| format!("max_load_hint: {error}"))?,
            reservation: share(self.reservation, base.reservation),
            replicas: self.replicas.map_or(base.replicas, |given| given.bounds(base.replicas)),
            spread: self.spread,
            homes,
            metrics: self.metrics.unwrap_or_default().into_iter().map(metric).collect(),
            spill: self.spill.map(|SpillFile { cap: Factor(cap) }| Spill { cap }),
            consistency: match self.consistency {
                None | Some(Kind::Affinity) => Consistency::Affinity,
                Some(Kind::Exclusive) => Consistency::Exclusive,
            },
            lease: span(self.lease, base.lease),
            prepare_within: span(self.prepare_within, base.prepare_within),
            grace: span(self.grace, base.grace),
            brake: share(self.brake, base.brake),
            max_unavailable: self
                .max_unavailable
                .map_or(base.max_unavailable, |UnavailableFile(given)| given),
            confine_after: self.confine_after.unwrap_or(base.confine_after),
            heartbeat: span(self.heartbeat, base.heartbeat),
            report_every: span(self.report_every, base.report_every),
            balance_every: span(self.balance_every, base.balance_every),
            name: base.name,
        })
    }
}

impl Replicas {
    /// Whoever asks for two at least has asked for two at most, too.
    fn bounds(&self, base: ReplicaBounds) -> ReplicaBounds {
        let min = self.min.map_or(base.min, |Count(min)| min);
        let max = self.max.map_or_else(|| min.max(base.max), |Count(max)| max);
        ReplicaBounds { min, max }
    }
}

impl HomeFile {
    fn into_home(self) -> Result<Home, String> {
        let slice = match (self.slice, self.group) {
            (Some(Text(slice)), None) => slice,
            (None, Some(group)) => Slice::of_group(group.as_bytes()),
            (Some(_), Some(group)) => {
                return Err(format!("homes: group {group:?} has a slice too: give one of them"));
            }
            (None, None) => {
                let region = self.region;
                return Err(format!("homes: of region {region:?}: give a slice or a group"));
            }
        };
        Ok(Home { slice, region: self.region })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mandoline_core::spec::Ratio;

    use super::*;

    fn kv() -> JobSpec {
        JobSpec::new("kv".parse().unwrap())
    }

    #[test]
    fn a_spec_is_read_from_yaml_and_json() {
        let yaml =
            "name: kv\nband: 12.5%\nchurn_budget: 5%\nreplicas: {min: 2}\nheartbeat: 500ms\n";
        let json = r#"{"name":"kv","band":"12.5%","churn_budget":"5%","replicas":{"min":2},"heartbeat":"500ms"}"#;
        let spec = JobSpec {
            band: Band::Adaptive(Ratio::from_millionths(125_000)),
            churn_budget: Ratio::percent(5),
            replicas: ReplicaBounds { min: 2, max: 2 },
            heartbeat: Duration::from_millis(500),
            ..kv()
        };
        assert_eq!(parse(yaml, "kv.yaml").unwrap(), spec);
        assert_eq!(parse(json, "kv.json").unwrap(), spec);
        assert_eq!(parse("name: kv", "-").unwrap(), kv());
    }

    #[test]
    fn everything_can_be_asked_for() {
        let yaml = "\
name: kv
band: {fixed: 2.5%, of: hint}
fill_rate: 50%
max_load_hint: 1000
reservation: 10%
replicas: {min: 2, max: all}
spread: zone
homes:
  - {group: tenant-7, region: us}
  - {slice: 0000000000000000..00000000ffffffff, region: eu}
metrics: {memory: {band: 20%}, connections: {band: 50%}}
spill: {cap: 1.15}
lease: 1m
prepare_within: 0s
grace: 1h
brake: 100%
max_unavailable: 10%
confine_after: 0
";
        let home = |slice, region: &str| Home { slice, region: region.to_owned() };
        let metric =
            |name: &str, percent| Metric { name: name.to_owned(), band: Ratio::percent(percent) };
        let expected = JobSpec {
            band: Band::Fixed { ratio: Ratio::from_millionths(25_000), of: BandOf::Hint },
            fill_rate: Ratio::percent(50),
            max_load_hint: Some(Load::from_milli(1_000_000)),
            reservation: Ratio::percent(10),
            replicas: ReplicaBounds { min: 2, max: ReplicaBounds::ALL },
            spread: Some("zone".to_owned()),
            homes: vec![
                home("0..ffffffff".parse().unwrap(), "eu"),
                home(Slice::of_group(b"tenant-7"), "us"),
            ],
            metrics: vec![metric("connections", 50), metric("memory", 20)],
            spill: Some(Spill { cap: Ratio::percent(115) }),
            lease: Duration::from_secs(60),
            prepare_within: Duration::ZERO,
            grace: Duration::from_secs(3_600),
            brake: Ratio::percent(100),
            max_unavailable: Unavailable::Share(Ratio::percent(10)),
            confine_after: 0,
            ..kv()
        };
        assert_eq!(parse(yaml, "kv.yaml").unwrap(), expected);
        let owned = parse("name: kv\nconsistency: exclusive\nmax_unavailable: 7", "-").unwrap();
        let (consistency, max_unavailable) = (Consistency::Exclusive, Unavailable::Tasks(7));
        assert_eq!(owned, JobSpec { consistency, max_unavailable, ..kv() });
        assert_eq!(parse("name: kv\nconsistency: affinity", "-").unwrap(), kv());
        let of_mean = parse("name: kv\nband: {fixed: 10%}", "-").unwrap().band;
        assert_eq!(of_mean, Band::Fixed { ratio: Ratio::percent(10), of: BandOf::Mean });
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let cases = [
            ("name: kv\nreplicas: {min: 3, max: 2}", "kv.yaml: replicas is min 3, max 2"),
            ("name: kv\nreplicas: {mim: 3}", "kv.yaml:2:12: unknown field \"mim\""),
            (
                "name: kv\nreplicas: {max: many}",
                "kv.yaml:2:17: replicas: \"many\" is no number of tasks, nor all",
            ),
            ("name: kv\nreplicas: {max: -1}", "kv.yaml:2:17: replicas: -1 is no number of tasks"),
            ("name: kv\nreplicas: {max: 9999999999}", "kv.yaml: replicas is min 1, max 4294967295"),
            ("name: kv\nband: 0%", "kv.yaml: band is 0%"),
            ("name: kv\nband: 0.1", "kv.yaml:2:7: band: \"0.1\" is no share: give percent"),
            ("name: kv\nband: [1%]", "kv.yaml:2:1: band: invalid type: sequence, expected percent"),
            ("name: kv\nband: {fixd: 1%}", "kv.yaml:2:8: unknown field \"fixd\""),
            ("name: kv\nband: {of: hint}", "kv.yaml:2:8: the field \"fixed\" is missing"),
            ("name: kv\nband: {fixed: 1%, of: max}", "kv.yaml:2:23: band: unknown variant `max`"),
            (
                "name: kv\nband: {fixed: 1%, of: hint}",
                "kv.yaml: band is 1% of hint: give max_load_hint too",
            ),
            ("name: kv\nmax_load_hint: .nan", "kv.yaml: max_load_hint: NaN is no load"),
            ("name: kv\nmax_load_hint: -1", "kv.yaml: max_load_hint: -1 is no load"),
            ("name: kv\nmax_load_hint: many", "kv.yaml:2:16: max_load_hint: "),
            ("name: kv\nspill: {cap: 15%}", "kv.yaml: spill.cap is 15%: give more than 100%"),
            ("name: kv\nspill: {cap: x}", "kv.yaml:2:14: spill: \"x\" is no factor: give"),
            ("name: kv\nspill: 1.15", "kv.yaml:2:8: spill: "),
            ("name: kv\nspread: a zone", "kv.yaml: spread is \"a zone\""),
            (
                "name: kv\nhomes: [{region: eu}]",
                "kv.yaml: homes: of region \"eu\": give a slice or a group",
            ),
            (
                "name: kv\nhomes: [{slice: 0..1, group: a, region: eu}]",
                "kv.yaml: homes: group \"a\" has a slice too",
            ),
            (
                "name: kv\nhomes: [{slice: 1..0, region: eu}]",
                "kv.yaml:2:17: homes: \"1..0\" is no slice: give FIRST..LAST in hex",
            ),
            (
                "name: kv\nhomes: [{slice: 0..1, region: eu}, {slice: 1..2, region: us}]",
                "kv.yaml: homes is 0000000000000000..0000000000000001 and then",
            ),
            ("name: kv\nmetrics: {memory: 20%}", "kv.yaml:2:19: metrics: "),
            (
                "name: kv\nmetrics: {m: {band: 1%}, m: {band: 2%}}",
                "kv.yaml:2:26: metrics: duplicate",
            ),
            ("name: kv\nconsistency: eventual", "kv.yaml:2:14: consistency: unknown variant `even"),
            (
                "name: kv\nconsistency: exclusive\nreplicas: {min: 2}",
                "kv.yaml: replicas is min 2, max 2 in an exclusive job: give min 1, max 1",
            ),
            (
                "name: kv\nconsistency: exclusive\nspill: {cap: 1.15}",
                "kv.yaml: spill.cap is 115% in an exclusive job: leave spill out",
            ),
            (
                "name: kv\nconsistency: exclusive\nlease: 2s",
                "kv.yaml: heartbeat is 1s beside a lease of 2s: give at most a third of lease",
            ),
            ("name: kv\nlease: 5", "kv.yaml:2:8: lease: \"5\" is no duration"),
            ("name: kv\nlease: 1s", "kv.yaml: lease is 1s: give 2s to 60s"),
            ("name: kv\ngrace: 2h", "kv.yaml: grace is 7200s: give 0s to 1h"),
            ("name: kv\nbrake: 0%", "kv.yaml: brake is 0%: give more than 0%"),
            ("name: kv\nmax_unavailable: 0", "kv.yaml: max_unavailable is 0: give 1 to 10000"),
            ("name: kv\nmax_unavailable: -1", "kv.yaml:2:18: max_unavailable: -1 is no number"),
            (
                "name: kv\nmax_unavailable: few",
                "kv.yaml:2:18: max_unavailable: \"few\" is no share",
            ),
            ("name: kv\nconfine_after: -1", "kv.yaml:2:16: confine_after: "),
            ("name: kv\nheartbeat: 1", "kv.yaml:2:12: heartbeat: \"1\" is no duration"),
            ("name: a/b", "kv.yaml: name: the name \"a/b\" has '/'"),
            ("band: 10%", "kv.yaml:1:1: the field \"name\" is missing"),
        ];
        for (text, expected) in cases {
            let failure = parse(text, "kv.yaml").unwrap_err().to_string();
            assert!(failure.starts_with(&format!("error: {expected}")), "{text}\n{failure}");
        }
        let long = format!("name: {}", "x".repeat(64));
        assert!(parse(&long, "-").unwrap_err().to_string().contains("64 bytes long"));
    }
}

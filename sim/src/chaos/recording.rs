//! A recorded round: one JSON object a line, with what Dicer was given and how well its answer did.
//!
//! Keys of the recording are byte strings. A slice of ours begins at a place among 2^64, so a string of up to eight bytes
//! is its place, and a longer one begins just behind the place of its first eight: a single hot key, recorded as the run
//! from `k` to `k` and a zero byte, becomes a run one place wide.

use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::{NameError, TaskName};
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::{Ratio, ReplicaBounds};
use serde::Deserialize;

use crate::chaos::measures::Measures;

/// Thousandths of a unit to one unit of the recording: so fine that rounding down moves no figure.
const MILLI_PER_UNIT: f64 = 1e6;
/// The most load of a run, and the greatest hint, in units of the recording: what a `Load` can hold at that fineness.
const UNITS_MAX: f64 = 1e6;

/// One recorded round.
#[derive(Clone, Debug)]
pub(in crate::chaos) struct Recorded {
    pub(in crate::chaos) tasks: Vec<TaskName>,
    /// The load of each run of keys, within which it lies evenly.
    pub(in crate::chaos) loads: SliceMap<Load>,
    pub(in crate::chaos) max_load_hint: Load,
    /// How far from the mean a task may lie, in relation to the hint.
    pub(in crate::chaos) tolerance: Ratio,
    /// How much even load is added for each task, in relation to the hint.
    pub(in crate::chaos) reservation: Ratio,
    pub(in crate::chaos) replicas: ReplicaBounds,
    /// How Dicer did.
    pub(in crate::chaos) dicer: Measures,
}

/// What is wrong with a recorded round.
#[derive(Debug, thiserror::Error)]
pub enum RoundProblem {
    /// It is no JSON, or lacks a field.
    #[error("the line is no recorded round: {0}")]
    Json(serde_json::Error),
    /// There is nobody to serve.
    #[error("`resources` is empty: a round needs a task")]
    NoTask,
    /// A task's name is none.
    #[error("`resources` has {name:?}: {error}")]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        error: NameError,
    },
    /// A task is there twice.
    #[error("`resources` has {0} twice")]
    Twice(TaskName),
    /// A run begins at something that is no key.
    #[error("`load_map` has the key {0:?}: give an even number of hex digits")]
    Key(String),
    /// The first run does not begin at the first key.
    #[error("`load_map` does not begin at \"\", the first key")]
    Start,
    /// A run begins at or before the one that it follows.
    #[error("`load_map` has the key {0:?} out of order")]
    Order(String),
    /// A number is out of range.
    #[error("`{field}` is {value}: give {allowed}")]
    Range {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: f64,
        /// What it may hold.
        allowed: &'static str,
    },
}

impl Recorded {
    /// Reads a line.
    pub(in crate::chaos) fn parse(line: &[u8]) -> Result<Self, RoundProblem> {
        let fields: Fields = serde_json::from_slice(line).map_err(RoundProblem::Json)?;
        let hint = number("max_load_hint", fields.max_load_hint, 1.0 / MILLI_PER_UNIT, UNITS_MAX)?;
        let share = |field, value: f64| {
            number(field, value, 0.0, 10.0)
                .map(|share| Ratio::from_millionths((share * 1e6).round() as u32))
        };
        let dicer = fields.dicer;
        let figure = |field, value: f64| number(field, value, 0.0, f64::MAX);
        Ok(Self {
            tasks: names(&fields.resources)?,
            loads: load_map(&fields.load_map)?,
            max_load_hint: units(hint),
            tolerance: share("tolerance", fields.tolerance)?,
            reservation: share("reservation_ratio", fields.reservation_ratio)?,
            replicas: ReplicaBounds { min: fields.min_replicas, max: fields.max_replicas },
            dicer: Measures {
                over: figure("dicer.over", dicer.over)?,
                under: figure("dicer.under", dicer.under)?,
                // By cause, each counted once: their sum is all the load that is newly on a task.
                churn: figure("dicer.churn_add", dicer.churn_add)?
                    + figure("dicer.churn_rem", dicer.churn_rem)?
                    + figure("dicer.churn_lb", dicer.churn_lb)?,
                ms: figure("dicer.ms", dicer.ms)?,
            },
        })
    }
}

/// What a line holds; what else it may hold is not needed.
#[derive(Deserialize)]
struct Fields {
    resources: Vec<String>,
    load_map: Vec<(String, f64)>,
    max_load_hint: f64,
    tolerance: f64,
    reservation_ratio: f64,
    min_replicas: u32,
    max_replicas: u32,
    dicer: DicerFields,
}

#[derive(Deserialize)]
struct DicerFields {
    over: f64,
    under: f64,
    churn_add: f64,
    churn_rem: f64,
    churn_lb: f64,
    ms: f64,
}

fn number(field: &'static str, value: f64, min: f64, max: f64) -> Result<f64, RoundProblem> {
    let allowed = match field {
        "max_load_hint" => "more than 0 and at most 1e6",
        "load_map" => "loads from 0 to 1e6",
        "tolerance" | "reservation_ratio" => "a share from 0 to 10",
        _ => "a number from 0",
    };
    let good = (min..=max).contains(&value);
    if good { Ok(value) } else { Err(RoundProblem::Range { field, value, allowed }) }
}

fn units(units: f64) -> Load {
    Load::from_milli((units * MILLI_PER_UNIT).round() as u64)
}

fn names(given: &[String]) -> Result<Vec<TaskName>, RoundProblem> {
    let mut names: Vec<TaskName> = Vec::with_capacity(given.len());
    for name in given {
        let task = TaskName::new(name)
            .map_err(|error| RoundProblem::Name { name: name.clone(), error })?;
        if names.contains(&task) {
            return Err(RoundProblem::Twice(task));
        }
        names.push(task);
    }
    if names.is_empty() { Err(RoundProblem::NoTask) } else { Ok(names) }
}

fn load_map(given: &[(String, f64)]) -> Result<SliceMap<Load>, RoundProblem> {
    if given.first().is_none_or(|(key, _)| !key.is_empty()) {
        return Err(RoundProblem::Start);
    }
    let mut runs: Vec<(SliceKey, Load)> = Vec::with_capacity(given.len());
    let mut before: Option<Vec<u8>> = None;
    for (text, load) in given {
        let order = || RoundProblem::Order(text.clone());
        let bytes = hex(text).ok_or_else(|| RoundProblem::Key(text.clone()))?;
        if before.as_ref().is_some_and(|before| *before >= bytes) {
            return Err(order());
        }
        // Two strings may share a place ("" and "00"); then the greater one begins at the next.
        let last = runs.last().map(|(first, _)| *first);
        let place = place(&bytes).ok_or_else(order)?;
        let first = match last.filter(|last| *last >= place) {
            Some(last) => last.next().ok_or_else(order)?,
            None => place,
        };
        runs.push((first, units(number("load_map", *load, 0.0, UNITS_MAX)?)));
        before = Some(bytes);
    }
    Ok(SliceMap::from_runs(runs).expect("each run begins after the one before"))
}

/// Where a byte string lies; none if that is behind the last place.
fn place(bytes: &[u8]) -> Option<SliceKey> {
    let mut first = [0; 8];
    let taken = bytes.len().min(8);
    first[..taken].copy_from_slice(&bytes[..taken]);
    let place = SliceKey(u64::from_be_bytes(first));
    if bytes.len() > 8 { place.next() } else { Some(place) }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.is_ascii() && text.len().is_multiple_of(2);
    let pairs = text.as_bytes().chunks(2).map(|pair| {
        let digit = |byte: u8| char::from(byte).to_digit(16);
        Some((digit(pair[0])? * 16 + digit(pair[1])?) as u8)
    });
    if digits { pairs.collect() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"round":0,"resources":["a","b"],"hot":true,"total":30.0,"reservation_ratio":0.1,
        "max_load_hint":1000.0,"tolerance":0.025,"churn_penalty":0.25,"min_replicas":1,"max_replicas":2,
        "load_map":[["",10.0],["8000000000000000",15.0],["800000000000000000",5.0]],
        "dicer":{"over":0.1,"under":0.2,"churn_add":0.125,"churn_rem":0.25,"churn_lb":0.5,"ms":7.5,"slices":9}}"#;

    #[test]
    fn a_round_is_read_and_a_hot_key_is_one_place_wide() {
        let round = Recorded::parse(GOOD.as_bytes()).unwrap();
        let (hot, load) = round.loads.get(SliceKey(1 << 63));
        assert_eq!((hot.width(), load.milli()), (1, 15_000_000));
        assert_eq!(round.tolerance, Ratio::from_millionths(25_000));
        assert_eq!(round.dicer, Measures { over: 0.1, under: 0.2, churn: 0.875, ms: 7.5 });
    }

    #[test]
    fn a_hot_key_at_the_very_first_place_is_told_from_what_follows() {
        let text = GOOD.replace(
            r#"["8000000000000000",15.0],["800000000000000000",5.0]"#,
            r#"["00",15.0],["0000000000000009",5.0]"#,
        );
        let round = Recorded::parse(text.as_bytes()).unwrap();
        let firsts: Vec<u64> = round.loads.iter().map(|(slice, _)| slice.first().0).collect();
        assert_eq!(firsts, [0, 1, 9]);
    }

    #[test]
    fn what_is_no_round_is_named() {
        let cases = [
            (r#""resources":["a","b"]"#, r#""resources":[]"#, "`resources` is empty"),
            (r#""resources":["a","b"]"#, r#""resources":["a","a"]"#, "`resources` has a twice"),
            (r#""resources":["a","b"]"#, r#""resources":["a/b"]"#, "`resources` has \"a/b\": "),
            (r#"["",10.0],"#, "", "`load_map` does not begin"),
            (r#"["",10.0]"#, r#"["",-1.0]"#, "`load_map` is -1: give loads from 0"),
            (r#"["8000000000000000",15.0]"#, r#"["8x",15.0]"#, "`load_map` has the key \"8x\""),
            (r#"["8000000000000000",15.0]"#, r#"["9000",15.0]"#, "`load_map` has the key \"8000"),
            (r#""max_load_hint":1000.0"#, r#""max_load_hint":0"#, "`max_load_hint` is 0: give"),
            (r#""tolerance":0.025"#, r#""tolerance":-1"#, "`tolerance` is -1: give a share"),
            (r#""tolerance":0.025,"#, "", "the line is no recorded round: missing field"),
            (r#""ms":7.5"#, r#""ms":-7"#, "`dicer.ms` is -7: give a number from 0"),
        ];
        for (from, to, expected) in cases {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from}");
            let problem = Recorded::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(problem.starts_with(expected), "{problem}");
        }
        for bad in ["", "[]", "0 key", "{\"round\":1e999}", "\u{feff}{}"] {
            assert!(Recorded::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}

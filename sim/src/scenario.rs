//! What policies are tried on: a load, interval by interval, and a fleet.
//!
//! A made-up scenario is written as one line, its words separated by commas, such as `zipf:0.99,keys=1000000,drift,fail`:
//!
//! | word | meaning |
//! |---|---|
//! | `zipf:ALPHA` or `uniform` | first: how unevenly keys are asked for |
//! | `keys=N` | how many keys there are: 100,000 unless told |
//! | `rate=N` | requests a task an interval, by the tasks at the start: 20,000 unless told, 100 with `uniform` |
//! | `intervals=N` | how many intervals: 60 unless told |
//! | `warmup=N` | how many of the first do not count: 10 unless told, a sixth of all if that is fewer |
//! | `drift`, `drift=SHARE` | that share (0.02) of the load goes over to other keys each interval |
//! | `flash` | in five steps, a key goes to 10 % of all load and 20 others to 1 % each |
//! | `diurnal` | four regions take turns: amplitude 0.6, period 48 intervals |
//! | `growing` | the load doubles over the run |
//! | `alternating` | two sets of hot keys take turns, five intervals each |
//! | `static` | none of these: the default |
//! | `fail`, `fail=SHARE` | that share (0.05) of the tasks is gone from interval 20 to 40 |
//! | `rolling` | every task is replaced once, from interval 20 over 30 intervals |
//! | `scale`, `scale=TIMES` | so many times (2) the tasks from interval 20 to 45 |
//! | `hetero`, `hetero=A/B/C` | tasks have these capacities in turn (1/2/0.5) |
//! | `late`, `late=SHARE` | that share (0.05) of the reports is late or missing |
//!
//! `synthetic.rs` has what exactly the load does. The words from `fail` on can be put to a trace too.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::fleet::{Fleet, FleetError};
use crate::interval::{FoldError, Interval, Intervals};
use crate::replay::Replay;
use crate::synthetic::{Shape, Synthetic};
use crate::workload::{Workload, WorkloadError};

/// The most keys of a made-up scenario: at some 70 bytes a key, 1.4 GB.
pub const KEYS_MAX: u64 = 20_000_000;
/// The most requests a task an interval.
pub const RATE_MAX: f64 = 1e9;
/// The most intervals of a made-up scenario.
pub const INTERVALS_MAX: usize = 100_000;

/// What happens to the tasks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Events {
    /// This share of the tasks is gone from interval 20 to 40.
    pub fail: Option<f64>,
    /// Every task is replaced once, from interval 20 over 30 intervals.
    pub rolling: bool,
    /// There are so many times the tasks from interval 20 to 45.
    pub scale: Option<u32>,
    /// Tasks have these capacities in turn.
    pub hetero: Option<Vec<f64>>,
    /// This share of the reports is late or missing.
    pub late: Option<f64>,
}

const FAIL: (usize, usize) = (20, 40);
const ROLLING: (usize, usize) = (20, 30);
const SCALE: (usize, usize) = (20, 45);

impl Events {
    /// Describes a fleet of so many tasks to whom this happens.
    pub fn fleet(&self, tasks: u32) -> Result<Fleet, FleetError> {
        let mut fleet = Fleet::steady(tasks)?.spread(3, 4);
        if let Some(capacities) = &self.hetero {
            fleet = fleet.hetero(capacities)?;
        }
        if let Some(share) = self.fail {
            fleet = fleet.fail(share, FAIL.0, FAIL.1)?;
        }
        if self.rolling {
            fleet = fleet.rolling(ROLLING.0, ROLLING.1)?;
        }
        if let Some(times) = self.scale {
            fleet = fleet.scale(times, SCALE.0, SCALE.1)?;
        }
        if let Some(share) = self.late {
            fleet = fleet.late(share)?;
        }
        Ok(fleet)
    }

    /// Takes a word; false if it is none of an event.
    fn take(&mut self, word: &str, value: Option<&str>) -> Result<bool, ScenarioError> {
        match word {
            "fail" => self.fail = Some(number(word, value, 0.05, 0.0, 1.0)?),
            "rolling" => {
                bare(word, value)?;
                self.rolling = true;
            }
            "scale" => self.scale = Some(whole(word, value, 2, 1, 100)? as u32),
            "hetero" => {
                let list = value.unwrap_or("1/2/0.5").split('/');
                let times = |text| number(word, Some(text), 1.0, 0.001, 1_000_000.0);
                self.hetero = Some(list.map(times).collect::<Result<_, _>>()?);
            }
            "late" => self.late = Some(number(word, value, 0.05, 0.0, 1.0)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// From the words of events alone, such as `fail,late=0.1`.
impl FromStr for Events {
    type Err = ScenarioError;

    fn from_str(text: &str) -> Result<Self, ScenarioError> {
        let mut events = Self::default();
        for (word, value) in words(text) {
            if !events.take(word, value)? {
                return Err(unknown(word, &EVENT_WORDS));
            }
        }
        Ok(events)
    }
}

/// A made-up scenario, as `--workload` takes it, for any number of tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    // As it was written.
    text: String,
    // Of one task's requests.
    shape: Shape,
    events: Events,
}

/// Why a text is no scenario, or a scenario cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// It did not begin with what the keys are.
    #[error(
        "{0:?} does not say first how unevenly keys are asked for: begin with zipf:ALPHA or uniform, such as \
         zipf:0.99,keys=1000000,drift"
    )]
    Start(String),
    /// A word was none of those known.
    #[error("there is no {word:?} in a workload: {}", advise(.near, .known))]
    Word {
        /// The word.
        word: String,
        /// What may have been meant.
        near: Option<&'static str>,
        /// All words that may stand there.
        known: &'static [&'static str],
    },
    /// A word was given a value and takes none.
    #[error("{0:?} takes no value: write the word alone")]
    Bare(String),
    /// A value was missing, no number, or out of range.
    #[error("{word}={value:?} is out of range: give a number from {least} to {most}")]
    Number {
        /// The word.
        word: String,
        /// Its value.
        value: String,
        /// The least that may be given.
        least: f64,
        /// The most that may be given.
        most: f64,
    },
    /// No interval would have counted.
    #[error("no interval would count: warmup={warmup} is not less than intervals={intervals}")]
    Warmup {
        /// How many were not to count.
        warmup: usize,
        /// Of how many.
        intervals: usize,
    },
    /// Zipf's exponent was out of range.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// There is no such fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// A trace could not be read or cut into intervals.
    #[error(transparent)]
    Fold(#[from] FoldError),
}

fn advise(near: &Option<&'static str>, known: &[&str]) -> String {
    match near {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("use {}", known.join(", ")),
    }
}

const LOAD_WORDS: [&str; 15] = [
    "keys",
    "rate",
    "intervals",
    "warmup",
    "drift",
    "flash",
    "diurnal",
    "growing",
    "alternating",
    "static",
    "fail",
    "rolling",
    "scale",
    "hetero",
    "late",
];
const EVENT_WORDS: [&str; 5] = ["fail", "rolling", "scale", "hetero", "late"];

impl FromStr for Recipe {
    type Err = ScenarioError;

    fn from_str(text: &str) -> Result<Self, ScenarioError> {
        let (first, rest) = text.split_once(',').unwrap_or((text, ""));
        let (law, rate) = match first.trim() {
            "uniform" => ("zipf:0", 100.0),
            law if law.starts_with("zipf:") => (law, 20_000.0),
            _ => return Err(ScenarioError::Start(text.to_owned())),
        };
        let mut shape = Shape {
            keys: law.parse()?,
            requests: rate,
            intervals: 60,
            warmup: usize::MAX,
            drift: None,
            flash: false,
            diurnal: false,
            growing: false,
            alternating: false,
        };
        let mut events = Events::default();
        for (word, value) in words(rest) {
            let flag = match word {
                "keys" => {
                    let keys = whole(word, value, 0, 1, KEYS_MAX)?;
                    shape.keys = format!("{law},keys={keys}").parse::<Workload>()?;
                    continue;
                }
                "rate" => {
                    shape.requests = number(word, value, f64::NAN, 0.001, RATE_MAX)?;
                    continue;
                }
                "intervals" => {
                    shape.intervals = whole(word, value, 0, 1, INTERVALS_MAX as u64)? as usize;
                    continue;
                }
                "warmup" => {
                    shape.warmup = whole(word, value, u64::MAX, 0, INTERVALS_MAX as u64)? as usize;
                    continue;
                }
                "drift" => {
                    shape.drift = Some(number(word, value, 0.02, 0.0, 1.0)?);
                    continue;
                }
                "flash" => &mut shape.flash,
                "diurnal" => &mut shape.diurnal,
                "growing" => &mut shape.growing,
                "alternating" => &mut shape.alternating,
                "static" => {
                    bare(word, value)?;
                    continue;
                }
                _ if events.take(word, value)? => continue,
                _ => return Err(unknown(word, &LOAD_WORDS)),
            };
            bare(word, value)?;
            *flag = true;
        }
        if shape.warmup == usize::MAX {
            shape.warmup = (shape.intervals / 6).min(10);
        }
        if shape.warmup >= shape.intervals {
            let (warmup, intervals) = (shape.warmup, shape.intervals);
            return Err(ScenarioError::Warmup { warmup, intervals });
        }
        Ok(Self { text: text.to_owned(), shape, events })
    }
}

impl Recipe {
    /// Counts the keys.
    pub fn keys(&self) -> u64 {
        self.shape.keys.keys()
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

/// Splits a line into words and their values.
fn words(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(|word| word.split_once('=').map_or((word, None), |(word, value)| (word, Some(value))))
}

fn bare(word: &str, value: Option<&str>) -> Result<(), ScenarioError> {
    value.map_or(Ok(()), |_| Err(ScenarioError::Bare(word.to_owned())))
}

/// Reads a number; without a value it is `default`, which is out of range where a value must be given.
fn number(
    word: &str,
    value: Option<&str>,
    default: f64,
    least: f64,
    most: f64,
) -> Result<f64, ScenarioError> {
    let parsed = value.map_or(Some(default), |value| value.parse().ok());
    parsed.filter(|number| (least..=most).contains(number)).ok_or_else(|| ScenarioError::Number {
        word: word.to_owned(),
        value: value.unwrap_or_default().to_owned(),
        least,
        most,
    })
}

fn whole(
    word: &str,
    value: Option<&str>,
    default: u64,
    least: u64,
    most: u64,
) -> Result<u64, ScenarioError> {
    let parsed = value.map_or(Some(default), |value| value.parse().ok());
    parsed.filter(|number| (least..=most).contains(number)).ok_or_else(|| ScenarioError::Number {
        word: word.to_owned(),
        value: value.unwrap_or_default().to_owned(),
        least: least as f64,
        most: most as f64,
    })
}

fn unknown(word: &str, known: &'static [&'static str]) -> ScenarioError {
    ScenarioError::Word { word: word.to_owned(), near: nearest(word, known), known }
}

/// Gives which of the known words was probably meant, if one comes near.
pub(crate) fn nearest(word: &str, known: &[&'static str]) -> Option<&'static str> {
    let near = known.iter().map(|known| (distance(word, known), *known)).min();
    near.filter(|(distance, _)| *distance <= 2).map(|(_, known)| known)
}

/// Counts the letters to put in, take out or change until `a` is `b`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (above, letter) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], above + 1);
        for (at, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *other);
            diagonal = row[at + 1];
            row[at + 1] = changed.min(row[at] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A load and a fleet, the same for every policy.
#[derive(Clone, Debug)]
pub struct Scenario {
    name: String,
    fleet: Fleet,
    load: Load,
    warmup: usize,
}

#[derive(Clone, Debug)]
enum Load {
    Made(Shape),
    Recorded(Arc<[Interval]>),
}

impl Scenario {
    /// Makes a scenario up for so many tasks.
    pub fn made(recipe: &Recipe, tasks: u32) -> Result<Self, ScenarioError> {
        let fleet = recipe.events.fleet(tasks)?;
        let requests = recipe.shape.requests * f64::from(tasks);
        let shape = Shape { requests, ..recipe.shape };
        Ok(Self { name: recipe.to_string(), fleet, warmup: shape.warmup, load: Load::Made(shape) })
    }

    /// Takes recorded intervals. The first does not count: there a plan has seen nothing yet.
    pub fn recorded(name: &str, intervals: Vec<Interval>, fleet: Fleet) -> Self {
        Self { name: name.to_owned(), fleet, load: Load::Recorded(intervals.into()), warmup: 1 }
    }

    /// Cuts a trace or an access log into intervals, which are kept in memory: 16 bytes for each key of each interval.
    pub fn replayed(
        name: &str,
        replay: Replay,
        length: Duration,
        fleet: Fleet,
    ) -> Result<Self, ScenarioError> {
        let intervals = Intervals::new(replay, length)?.collect::<Result<_, _>>()?;
        Ok(Self::recorded(name, intervals, fleet))
    }

    /// Gives its name: for a made-up one, how it was written.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives who lives when. A seed decides who fails and who is late.
    pub fn fleet(&self, seed: u64) -> Fleet {
        self.fleet.clone().seeded(seed)
    }

    /// Counts the intervals.
    pub fn count(&self) -> usize {
        match &self.load {
            Load::Made(shape) => shape.intervals,
            Load::Recorded(intervals) => intervals.len(),
        }
    }

    /// Counts the first intervals that do not count.
    pub fn warmup(&self) -> usize {
        self.warmup
    }

    /// Gives the intervals of a seed, one after the other; those of a recorded load are the same for all.
    pub fn intervals(&self, seed: u64) -> impl Iterator<Item = Cow<'_, Interval>> {
        let (made, recorded) = match &self.load {
            Load::Made(shape) => (Some(Synthetic::new(*shape, seed)), None),
            Load::Recorded(intervals) => (None, Some(intervals.iter())),
        };
        made.into_iter()
            .flatten()
            .map(Cow::Owned)
            .chain(recorded.into_iter().flatten().map(Cow::Borrowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real;

    fn recipe(text: &str) -> Recipe {
        text.parse().unwrap()
    }

    fn error(text: &str) -> String {
        text.parse::<Recipe>().unwrap_err().to_string()
    }

    #[test]
    fn a_workload_is_one_line_of_words() {
        let all = recipe("zipf:1.2,keys=500, rate=30,drift=0.1,flash,fail,hetero=1/3");
        assert_eq!((all.shape.keys.alpha(), all.shape.keys.keys()), (1.2, 500));
        assert_eq!((all.shape.requests, all.shape.drift, all.shape.flash), (30.0, Some(0.1), true));
        let events = Events { fail: Some(0.05), hetero: Some(vec![1.0, 3.0]), ..Events::default() };
        assert_eq!(all.events, events);
        let plain = recipe("uniform");
        assert_eq!((plain.shape.keys.alpha(), plain.shape.requests), (0.0, 100.0));
        assert_eq!((plain.shape.intervals, plain.shape.warmup), (60, 10));
        let short = recipe("zipf:1,intervals=6").shape;
        assert_eq!((short.intervals, short.warmup), (6, 1));
        assert_eq!(recipe("zipf:0.99,static").shape, recipe("zipf:0.99").shape);
        assert_eq!("rolling,scale=3".parse::<Events>().unwrap().scale, Some(3));
    }

    #[test]
    fn what_is_wrong_with_a_workload_is_said() {
        assert!(error("drift").contains("begin with zipf:ALPHA"));
        assert!(error("zipf:x").contains("exponent"));
        assert!(error("zipf:1,drfit").ends_with("did you mean \"drift\"?"));
        assert!(error("zipf:1,sunshine").contains("use keys, rate"));
        assert!(error("zipf:1,flash=2").contains("takes no value"));
        for bad in ["keys", "keys=0", "keys=1e9", "rate=NaN", "rate=-1", "intervals=0", "drift=2"] {
            assert!(error(&format!("zipf:1,{bad}")).contains("out of range"), "{bad}");
        }
        assert!(error("zipf:1,intervals=9,warmup=9").contains("no interval would count"));
        assert!("fail,flash".parse::<Events>().is_err());
        for bad in ["zipf:1,hetero=1/0", "zipf:1,scale=0", "zipf:1,fail=x"] {
            assert!(error(bad).contains("out of range"), "{bad}");
        }
    }

    #[test]
    fn a_scenario_that_cannot_be_is_refused() {
        let refused = |text, tasks| Scenario::made(&recipe(text), tasks).unwrap_err().to_string();
        assert!(refused("zipf:1", 0).contains("no tasks"));
        assert!(refused("zipf:1", 10_001).contains("too many"));
        assert!(refused("zipf:1,scale", 5_001).contains("10002 tasks"));
    }

    #[test]
    fn load_is_by_the_tasks_at_the_start() {
        let scenario = Scenario::made(&recipe("zipf:1,keys=100,rate=500,scale"), 4).unwrap();
        let totals: Vec<u64> = scenario.intervals(1).map(|interval| interval.total()).collect();
        assert_eq!((totals.len(), scenario.count(), scenario.warmup()), (60, 60, 10));
        assert!(totals.iter().all(|total| (1_700..2_300).contains(total)), "{totals:?}");
        assert_eq!(scenario.fleet(1).members(20).len(), 8);
    }

    #[test]
    fn a_trace_is_a_scenario() {
        let Some(path) = real::trace("nasa_http_19950801.tsv.zst") else { return };
        let replay = || Replay::open(&path, None).unwrap();
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let fleet = Fleet::steady(5).unwrap();
        let scenario = Scenario::replayed("nasa", replay(), minutes(15), fleet.clone()).unwrap();
        assert_eq!((scenario.count(), scenario.warmup()), (52, 1));
        let requests: u64 = scenario.intervals(1).map(|interval| interval.total()).sum();
        assert_eq!(requests, 30_969);
        assert!(Scenario::replayed("nasa", replay(), Duration::ZERO, fleet).is_err());
    }
}

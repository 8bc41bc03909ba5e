//! Dicer's chaos test with our planner in Dicer's place: recorded rounds, each with another load, other tasks and another
//! spec, answered one after the other.
//!
//! Every round's `tolerance`, `max_load_hint`, `reservation_ratio`, `min_replicas` and `max_replicas` become the job's
//! spec (`spec_of`, the one place), and nothing else about the planner is set. The rounds run through `State`, so that a
//! plan which the assigner would refuse is refused here. Ours is measured on the load map of the round; Dicer's figures
//! are as recorded.

pub mod measures;
pub mod recording;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::balance::{self, Policy, Round};
use mandoline_core::command::{Command, EndReason};
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::report::HotKey;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::{Band, BandOf, JobSpec, Ratio};
use mandoline_core::state::{Refused, State};
use mandoline_core::task::TaskInfo;

use crate::chaos::measures::{Measures, Weighed};
use crate::chaos::recording::{Recorded, RoundProblem};
use crate::lines::{InputError, Line, Lines};
use crate::percentile::Percentiles;

/// Why a recording could not be replayed (any further).
#[derive(Debug, thiserror::Error)]
pub enum ChaosError {
    /// The file could not be read.
    #[error(transparent)]
    Input(#[from] InputError),
    /// There was no round in it.
    #[error("{}: there is no round in it: give one JSON object a line, a round each", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A line is no round.
    #[error("{}:{line}: {problem}", path.display())]
    Round {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: u64,
        /// What is wrong with it.
        problem: RoundProblem,
    },
    /// The round asks for what a job may not be asked, or the plan does not fit.
    #[error("{}:{line}: {refused}", path.display())]
    Refused {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: u64,
        /// Why.
        refused: Refused,
    },
}

/// How one side did over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Side {
    /// The hottest task above the mean, in relation to the hint.
    pub over: Percentiles,
    /// The coldest task below the mean, in relation to the hint.
    pub under: Percentiles,
    /// The share of the load that is newly on a task.
    pub churn: Percentiles,
    /// The time that a plan took, in milliseconds.
    pub ms: Percentiles,
}

impl Side {
    fn of(rounds: &[Measures]) -> Self {
        let of = |field: fn(&Measures) -> f64| {
            Percentiles::of(rounds.iter().map(field).collect()).unwrap_or_default()
        };
        Self {
            over: of(|round| round.over),
            under: of(|round| round.under),
            churn: of(|round| round.churn),
            ms: of(|round| round.ms),
        }
    }
}

/// How both sides did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chaos {
    /// How many rounds there were.
    pub rounds: usize,
    /// Our planner, on the load maps given.
    pub mandoline: Side,
    /// The same answers on the load with the reservation added, in relation to the hint or the mean, whichever is
    /// greater: the recorded means show that Dicer's figures are made so.
    pub reserved: Side,
    /// Dicer, as recorded.
    pub dicer: Side,
}

/// One round's answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answers {
    /// Ours, on the load map given.
    pub mandoline: Measures,
    /// Ours, with the reservation.
    pub reserved: Measures,
    /// Dicer's, as recorded.
    pub dicer: Measures,
}

/// Replays a recording, plain or zstd. `clock` gives the processor time of this thread; `each` hears of every round.
pub fn replay(
    path: &Path,
    clock: &mut dyn FnMut() -> Duration,
    each: &mut dyn FnMut(&Answers),
) -> Result<Chaos, ChaosError> {
    let mut lines = Lines::open(path)?;
    let mut line = Line::default();
    let mut service = Service::default();
    let mut rounds: Vec<Answers> = Vec::new();
    while lines.next_into(&mut line)? {
        let (path, number) = (|| path.to_owned(), line.number);
        let recorded = Recorded::parse(&line.bytes).map_err(|problem| ChaosError::Round {
            path: path(),
            line: number,
            problem,
        })?;
        let answers = service.answer(&recorded, clock).map_err(|refused| ChaosError::Refused {
            path: path(),
            line: number,
            refused,
        })?;
        each(&answers);
        rounds.push(answers);
    }
    if rounds.is_empty() {
        return Err(ChaosError::Empty { path: path.to_owned() });
    }
    let side = |of: fn(&Answers) -> Measures| Side::of(&rounds.iter().map(of).collect::<Vec<_>>());
    Ok(Chaos {
        rounds: rounds.len(),
        mandoline: side(|answers| answers.mandoline),
        reserved: side(|answers| answers.reserved),
        dicer: side(|answers| answers.dicer),
    })
}

/// The job that the recorded rounds are about, kept from round to round.
#[derive(Default)]
struct Service {
    state: State,
    /// Registrations so far: each is another process.
    registered: u64,
}

impl Service {
    fn answer(
        &mut self,
        recorded: &Recorded,
        clock: &mut dyn FnMut() -> Duration,
    ) -> Result<Answers, Refused> {
        let is_new = self.state.jobs.is_empty();
        self.state.apply(Command::ApplyJob { spec: spec_of(recorded), if_version: None })?;
        if is_new {
            // As a job begins: assigned before there is any load. The recording begins from an assignment, too.
            self.enrol(&recorded.tasks)?;
            self.plan(None, clock)?;
        }
        let before = self.assignment()?;
        self.enrol(&recorded.tasks)?;
        let ms = self.plan(Some(recorded), clock)?.as_secs_f64() * 1e3;
        let after = self.assignment()?;

        let hint = recorded.max_load_hint.milli() as f64;
        let plain = Weighed::new(&recorded.loads, &before, &after);
        let reserved = Weighed::new(&with_reservation(recorded), &before, &after);
        Ok(Answers {
            mandoline: plain.measures(hint, ms),
            reserved: reserved.measures(hint.max(reserved.mean()), ms),
            dicer: recorded.dicer,
        })
    }

    fn assignment(&self) -> Result<Arc<Assignment>, Refused> {
        Ok(Arc::clone(&self.state.job(&job())?.assignment))
    }

    /// Ends the sessions of tasks that are not among `tasks`, and begins those that are new.
    fn enrol(&mut self, tasks: &[TaskName]) -> Result<(), Refused> {
        let assignment = self.assignment()?;
        let known = |name: &TaskName| assignment.tasks.values().any(|task| task.info.name == *name);
        for task in assignment.tasks.values().filter(|task| !tasks.contains(&task.info.name)) {
            let (session, reason) = (task.session, EndReason::Lost);
            self.state.apply(Command::End { job: job(), session, reason })?;
        }
        for name in tasks.iter().filter(|name| !known(name)) {
            self.registered += 1;
            let address = format!("{name}:1").parse().expect("a task's name is a host's");
            let info = TaskInfo::new(name.clone(), self.registered, address);
            self.state.apply(Command::Register { job: job(), info, stopped: None })?;
        }
        Ok(())
    }

    /// Plans a round and carries the plan out; gives the time that planning took. Without a record there is no load.
    fn plan(
        &mut self,
        recorded: Option<&Recorded>,
        clock: &mut dyn FnMut() -> Duration,
    ) -> Result<Duration, Refused> {
        let round = self.round(recorded)?;
        let begun = clock();
        let plan = balance::plan(&round);
        let took = clock().saturating_sub(begun);
        self.state.apply(Command::Change { job: job(), plan })?;
        Ok(took)
    }

    fn round(&self, recorded: Option<&Recorded>) -> Result<Round, Refused> {
        let spec = &self.state.job(&job())?.spec;
        let assignment = self.assignment()?;
        let loads = match recorded {
            Some(recorded) => loads_of(&assignment, &recorded.loads),
            None => vec![Load::ZERO; assignment.slices.count()],
        };
        // A run one place wide is a hot key; it is known as tasks would name it, by its own load.
        let hot = recorded.map_or_else(Vec::new, |recorded| {
            let keys = recorded.loads.iter().filter(|(slice, _)| slice.width() == 1);
            keys.map(|(slice, load)| HotKey { key: slice.first(), load: *load }).collect()
        });
        let fresh = recorded.is_none();
        Ok(Round { hot, fresh, ..Round::new(assignment, loads, Policy::from(spec)) })
    }
}

fn job() -> JobName {
    "chaos".parse().expect("it is a name")
}

/// What the round asks of the job. The churn budget is all there is: Dicer has none.
fn spec_of(recorded: &Recorded) -> JobSpec {
    JobSpec {
        band: Band::Fixed { ratio: recorded.tolerance, of: BandOf::Hint },
        max_load_hint: Some(recorded.max_load_hint),
        reservation: recorded.reservation,
        churn_budget: Ratio::percent(100),
        replicas: recorded.replicas,
        ..JobSpec::new(job())
    }
}

/// The load of each slice, in order.
fn loads_of(assignment: &Assignment, loads: &SliceMap<Load>) -> Vec<Load> {
    let of = |slice: Slice| {
        let parts = loads.touching(slice).map(|(run, load)| {
            let common = run.overlap(slice).expect("it touches the slice");
            load.share(common.width(), run.width())
        });
        parts.sum()
    };
    assignment.slices.iter().map(|(slice, _)| of(slice)).collect()
}

/// The load map with the reservation, which lies evenly over all keys.
fn with_reservation(recorded: &Recorded) -> SliceMap<Load> {
    let each = recorded.reservation.of(recorded.max_load_hint.milli());
    let reservation = Load::from_milli(each * recorded.tasks.len() as u64);
    recorded.loads.map(|run, load| *load + reservation.share(run.width(), Slice::FULL.width()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::real;

    fn still() -> impl FnMut() -> Duration {
        || Duration::ZERO
    }

    fn round(resources: &str, load_map: &str, replicas: (u32, u32)) -> String {
        let (min, max) = replicas;
        format!(
            r#"{{"resources":{resources},"load_map":{load_map},"max_load_hint":1000,"tolerance":0.025,"reservation_ratio":0.1,"min_replicas":{min},"max_replicas":{max},"dicer":{{"over":0.5,"under":0.25,"churn_add":0.125,"churn_rem":0.125,"churn_lb":0.25,"ms":3}}}}"#
        )
    }

    fn check(text: &str) -> Result<Chaos, ChaosError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        replay(file.path(), &mut still(), &mut |_| {})
    }

    #[test]
    fn tasks_join_and_leave_between_rounds() {
        let even = r#"[["",800.0]]"#;
        let text = [
            round(r#"["a","b"]"#, even, (1, 1)),
            round(r#"["a","b","c","d"]"#, even, (1, 1)),
            round(r#"["c","d"]"#, even, (2, 2)),
            round(r#"["a","c"]"#, r#"[["",0.0]]"#, (1, 2)),
        ];
        let found = check(&text.join("\n")).unwrap();
        assert_eq!(found.rounds, 4);
        assert!(found.mandoline.over.max < 0.05, "{found:?}");
        // At the third round a and b leave and each slice is asked for twice: half of all load is newly on c, half on d.
        assert!(found.mandoline.churn.max >= 0.5, "{found:?}");
        assert_eq!(found.dicer.churn.p50, 0.5);
    }

    #[test]
    fn a_bad_round_is_named_by_its_line() {
        let good = round(r#"["a"]"#, r#"[["",1.0]]"#, (1, 1));
        let cases = [
            (String::new(), ": there is no round in it"),
            (format!("{good}\n\n{{}}\n"), ":3: the line is no recorded round: missing field"),
            (format!("{good}\n0.5 key 1"), ":2: the line is no recorded round: "),
            (round(r#"["a"]"#, r#"[["",1.0]]"#, (3, 2)), ":1: replicas is min 3, max 2"),
            (round("[]", r#"[["",1.0]]"#, (1, 1)), ":1: `resources` is empty"),
        ];
        for (text, expected) in cases {
            let error = check(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_recording_says_of_dicer_what_is_published_of_it() {
        let Some(path) = real::trace("dicer_chaos_seed1.jsonl.zst") else { return };
        let mut rounds = 0;
        let found = replay(&path, &mut still(), &mut |_| rounds += 1).unwrap();
        assert_eq!((found.rounds, rounds), (1_000, 1_000));
        let near =
            |found: f64, expected: f64| assert!((found - expected).abs() < 0.0005, "{found}");
        near(found.dicer.over.p50, 0.0137);
        near(found.dicer.over.p90, 0.0247);
        near(found.dicer.over.p99, 0.0984);
        near(found.dicer.over.max, 0.4648);
        near(found.dicer.under.p50, 0.0155);
        near(found.dicer.under.p99, 0.0471);
        near(found.dicer.churn.p50, 0.5523);
        near(found.dicer.churn.p99, 0.852);
    }
}

//! `mandoline sim balance`: policies against each other on one load, judged by the same measures.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use mandoline_sim::access_log::KeyPart;
use mandoline_sim::contest::{Contest, Entry, Outcome};
use mandoline_sim::field::{self, Name, Terms};
use mandoline_sim::scenario::{Events, Recipe, Scenario, ScenarioError};
use serde::Serialize;

use crate::failure::Failure;
use crate::sim::input::{self, Reading};
use crate::sim::progress::Progress;
use crate::sim::{self, clock, failure, plot};
use crate::table::Table;
use crate::units::Span;

/// Runs balancing policies against each other on the same load
///
/// Interval by interval each policy sees the load of the interval before, decides who serves which
/// keys, and is judged on what comes next: how evenly, and at the price of how much moving.
///
/// The load is made up (--workload) or recorded (--trace). A made-up one is a line of words:
///   zipf:ALPHA or uniform     first: how unevenly keys are asked for
///   keys=N rate=N             how many keys; requests a task an interval
///   intervals=N warmup=N      how many intervals; how many of the first do not count
///   drift[=SHARE] flash diurnal growing alternating
///                             what the load does over time
///   fail[=SHARE] rolling scale[=TIMES] hetero[=A/B/C] late[=SHARE]
///                             what happens to the tasks; --events puts these to any load
///
/// Examples:
///   mandoline sim balance --tasks 100 --workload zipf:0.99,keys=1000000,drift
///   mandoline sim balance --tasks 20 --workload zipf:1.2,fail --policy mandoline --policy ring
///   mandoline sim balance --tasks 20 --trace trace.tsv.zst --interval 5m --plot out.svg
///   mandoline sim balance --tasks 8 --trace access.log --key query:user --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct BalanceArgs {
    /// Who takes part; may be given several times [default: all]
    #[arg(long = "policy", value_name = "NAME", long_help = policy_help())]
    policies: Vec<Name>,
    /// Made-up load [default: zipf:0.99]
    #[arg(long, value_name = "WORDS", conflicts_with = "trace")]
    workload: Option<Recipe>,
    /// Recorded load: a trace (`seconds key [weight [bytes]]`) or an access log, plain or zstd
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Which part of an access log's line is the key: path, target, host, user, referer, agent, path:N, query:NAME
    #[arg(long, value_name = "PART", requires = "trace")]
    key: Option<KeyPart>,
    /// Passes over broken lines of a trace, and counts them
    #[arg(long, requires = "trace")]
    lenient: bool,
    /// How long an interval of a recorded load is: how often its load is balanced
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    interval: Span,
    /// How many intervals at most [default: all of a recording, 60 of a made-up load]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    intervals: Option<u32>,
    /// How many tasks serve
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    tasks: u32,
    /// What happens to the tasks, such as fail,late=0.1
    #[arg(long, value_name = "WORDS")]
    events: Option<String>,
    /// How many tasks may serve one key [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    replicas_max: Option<u32>,
    /// What is drawn by chance is drawn from these: 5 for the seeds 1 to 5, 7,8 for those two
    #[arg(long, value_name = "SEEDS", default_value = "1")]
    seeds: Seeds,
    /// How to print
    #[arg(short = 'o', long, value_enum, default_value_t)]
    output: Output,
    /// The same as --output json
    #[arg(long, conflicts_with = "output")]
    json: bool,
    /// Draws imbalance against churn, and over time
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

fn policy_help() -> String {
    let mut help = "Who takes part; may be given several times [default: all]\n".to_owned();
    for (name, what) in field::ALL {
        let _ = write!(help, "\n{name:<15} {what}");
    }
    help
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Aligned columns, a policy a row.
    #[default]
    Table,
    /// Comma-separated values, a policy and an interval a row.
    Csv,
    /// One JSON object on a line.
    Json,
}

/// What chance is drawn from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seeds(Vec<u64>);

/// A text gives no seeds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} gives no seeds: give how many, 1 to {SEEDS_MAX}, or a list of numbers such as 7,8")]
struct SeedsError(String);

/// More would take days, and say no more.
const SEEDS_MAX: usize = 1_000;

impl FromStr for Seeds {
    type Err = SeedsError;

    fn from_str(text: &str) -> Result<Self, SeedsError> {
        let bad = || SeedsError(text.to_owned());
        let number = |text: &str| text.trim().parse::<u64>().map_err(|_| bad());
        let seeds: Vec<u64> = match text.strip_suffix(',').unwrap_or(text).split(',') {
            _ if !text.contains(',') => (1..=number(text)?.min(SEEDS_MAX as u64 + 1)).collect(),
            list => list.map(number).collect::<Result<_, _>>()?,
        };
        if (1..=SEEDS_MAX).contains(&seeds.len()) { Ok(Self(seeds)) } else { Err(bad()) }
    }
}

/// Runs all policies, and prints.
pub(crate) fn run(args: &BalanceArgs) -> Result<ExitCode, Failure> {
    let scenario = scenario(args)?;
    let (count, warmup) = (scenario.count(), scenario.warmup());
    if count <= warmup {
        let few = format!("{count} interval(s) are too few: the first {warmup} are for warming up");
        return Err(Failure::new(few).try_this(
            "more --intervals, fewer in warmup=N of --workload, or a shorter --interval",
        ));
    }
    let all = || field::ALL.iter().map(|(name, _)| *name).collect();
    let mut names: Vec<Name> = if args.policies.is_empty() { all() } else { vec![] };
    args.policies.iter().for_each(|name| {
        if !names.contains(name) {
            names.push(*name);
        }
    });
    let terms = Terms { replicas_max: args.replicas_max };
    let policies: Vec<Entry<'_>> = names.iter().map(|name| name.entry(terms)).collect();
    let Seeds(seeds) = &args.seeds;
    let total = (policies.len() * seeds.len() * count) as u64;
    let progress = Progress::new("intervals", Some(total));
    let mut outcomes = Contest {
        scenario: &scenario,
        policies: &policies,
        seeds,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        clock: &clock::cpu_time,
        progress: &|_| progress.add(1),
    }
    .run();
    drop(progress);
    // As they were asked for.
    outcomes.iter_mut().zip(&names).for_each(|(outcome, name)| outcome.policy = name.to_string());

    if let Some(path) = &args.plot {
        let title = format!("{}, {} tasks", scenario.name(), args.tasks);
        std::fs::write(path, plot::svg(&title, &outcomes, warmup)).map_err(|error| {
            Failure::new(format!("cannot write {}", path.display())).because(error)
        })?;
    }
    match args.output {
        _ if args.json => print_json(&outcomes)?,
        Output::Json => print_json(&outcomes)?,
        Output::Csv => sim::print(&csv(&outcomes))?,
        Output::Table => {
            let name = scenario.name();
            let head =
                format!("{name}: {} tasks, {count} intervals, {warmup} to warm up", args.tasks);
            sim::print(&format!("{head}\n\n{}", table(&outcomes)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn scenario(args: &BalanceArgs) -> Result<Scenario, Failure> {
    let refuse = |error: ScenarioError| failure(&error);
    let Some(path) = &args.trace else {
        let mut words =
            args.workload.as_ref().map_or_else(|| "zipf:0.99".to_owned(), Recipe::to_string);
        if let Some(events) = &args.events {
            // On their own first, so that a word for the load is refused here.
            events.parse::<Events>().map_err(refuse)?;
            words = format!("{words},{events}");
        }
        if let Some(intervals) = args.intervals {
            words = format!("{words},intervals={intervals}");
        }
        let recipe: Recipe = words.parse().map_err(refuse)?;
        input::remark(input::few_keys(recipe.keys(), args.tasks));
        return Scenario::made(&recipe, args.tasks).map_err(refuse);
    };
    let events: Events = args.events.as_deref().unwrap_or("").parse().map_err(refuse)?;
    let fleet = events.fleet(args.tasks).map_err(|error| failure(&error))?;
    let Span(interval) = args.interval;
    let (key, lenient) = (args.key.as_ref(), args.lenient);
    let intervals_max = args.intervals.map(|count| count as usize);
    let recording = Reading { path, key, lenient, interval, intervals_max }.read(&mut |_| {})?;
    input::remark(recording.skipped());
    input::remark(input::few_keys(recording.keys() as u64, args.tasks));
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    Ok(Scenario::recorded(&name, recording.intervals, fleet))
}

/// The JSON form.
#[derive(Serialize)]
struct Form<'a> {
    policies: Vec<PolicyForm<'a>>,
}

/// How a policy did.
#[derive(Serialize)]
pub(crate) struct PolicyForm<'a> {
    policy: &'a str,
    /// Nothing where there was no load at all.
    imbalance: Option<ImbalanceForm>,
    load_churn: f64,
    key_churn: f64,
    moves: u64,
    plan_ms: Option<PlanForm>,
    slices: usize,
}

#[derive(Serialize)]
struct ImbalanceForm {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

#[derive(Serialize)]
struct PlanForm {
    p50: f64,
    p99: f64,
}

impl<'a> From<&'a Outcome> for PolicyForm<'a> {
    fn from(outcome: &'a Outcome) -> Self {
        Self {
            policy: &outcome.policy,
            imbalance: outcome.imbalance.map(|i| ImbalanceForm {
                p50: i.p50,
                p90: i.p90,
                p99: i.p99,
                max: i.max,
            }),
            load_churn: outcome.load_churn,
            key_churn: outcome.key_churn,
            moves: outcome.moves,
            plan_ms: outcome.plan_ms.map(|ms| PlanForm { p50: ms.p50, p99: ms.p99 }),
            slices: outcome.slices,
        }
    }
}

fn print_json(outcomes: &[Outcome]) -> Result<(), Failure> {
    sim::print_json(&Form { policies: outcomes.iter().map(PolicyForm::from).collect() })
}

fn csv(outcomes: &[Outcome]) -> String {
    let mut text =
        "policy,seed,interval,imbalance,load_churn,forced_churn,key_churn,moves,plan_ms,slices,unserved\n"
            .to_owned();
    for outcome in outcomes {
        for point in &outcome.series {
            let imbalance = point.imbalance.map_or(String::new(), |value| value.to_string());
            let _ = writeln!(
                text,
                "{},{},{},{imbalance},{},{},{},{},{},{},{}",
                outcome.policy,
                point.seed,
                point.interval,
                point.load_churn,
                point.forced_churn,
                point.key_churn,
                point.moves,
                point.plan_ms,
                point.slices,
                point.unserved
            );
        }
    }
    text
}

/// The results as a table, with what its columns mean.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let mut table = Table::new(&[
        "POLICY", "P50", "P90", "P99", "MAX", "LOAD%", "KEYS%", "MOVES", "MS50", "MS99", "SLICES",
    ]);
    for outcome in outcomes {
        let imbalance = outcome.imbalance.map_or_else(Default::default, |i| {
            [i.p50, i.p90, i.p99, i.max].map(|value| format!("{value:.3}"))
        });
        let plan = outcome.plan_ms.map_or_else(Default::default, |ms| {
            [ms.p50, ms.p99].map(|value| format!("{value:.2}"))
        });
        let churn =
            [outcome.load_churn, outcome.key_churn].map(|share| format!("{:.3}", share * 100.0));
        let counts = [outcome.moves.to_string()];
        let cells = [outcome.policy.clone()].into_iter().chain(imbalance).chain(churn);
        table.row(cells.chain(counts).chain(plan).chain([outcome.slices.to_string()]));
    }
    let mut text = format!(
        "{table}\nP50 to MAX: the busiest task's load over the mean, over the intervals. LOAD%, KEYS%: the share of load and\n\
         of key space that is newly on a task, a mean an interval. MS: processor time of a plan.\n"
    );
    for outcome in outcomes.iter().filter(|outcome| outcome.unserved > 0.0) {
        let share = outcome.unserved * 100.0;
        let _ = writeln!(text, "{} left {share:.3} % of the load to nobody.", outcome.policy);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_a_number_or_a_list() {
        let cases = [("3", vec![1, 2, 3]), ("7,", vec![7]), ("7,8", vec![7, 8]), ("0,", vec![0])];
        for (text, seeds) in cases {
            assert_eq!(text.parse(), Ok(Seeds(seeds)), "{text}");
        }
        for bad in ["", "0", "-1", "a", "1,,2", ",", "1001", "18446744073709551615", "1.5"] {
            assert!(bad.parse::<Seeds>().is_err(), "{bad}");
        }
    }
}

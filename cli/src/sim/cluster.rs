//! `mandoline sim cluster`: a whole cluster on a virtual clock over a bad network, seed after seed, and what must always hold.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use mandoline_sim::cluster::flaw::Flaw;
use mandoline_sim::cluster::scenario::{Kind, Scenario, ScenarioError};
use mandoline_sim::cluster::sweep::{self, Sweep, Swept, Violation};
use mandoline_sim::cluster::world;
use serde::Serialize;

use crate::failure::Failure;
use crate::sim::progress::Progress;
use crate::sim::{self, failure};

/// How many lines of a trace are shown of what led to a violation.
const LINES: usize = 60;
/// How many violations are shown with their trace; of the rest the seeds say enough.
const TRACED: usize = 3;

/// How many seeds a way to break the protocol may take to show.
const HUNT_SEEDS: u64 = 400;

/// Whether whoever started a sweep has had enough.
static STOP: AtomicBool = AtomicBool::new(false);

/// Runs whole clusters of the real machines on a virtual clock over a bad network
///
/// Three assigners, four to seven tasks and some clerks, made of the very machines that decide in
/// the product, for so many simulated minutes a seed. Scenarios: calm, crashes, partitions, pauses,
/// drift (clocks further off than the protocol allows: there will be two owners, and fencing must
/// hold), restore, mixed (every fault).
///
/// The same seed does the same on every machine. A seed that breaks something is run once more, and
/// what led to it is printed with the command that repeats it. Ctrl-C ends a sweep and prints what
/// was found until then. Exit code: 0, 1 (something was broken), 2 (error).
///
/// Example: mandoline sim cluster --scenario mixed --seeds 300 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ClusterArgs {
    /// What the clusters have to bear
    #[arg(long, default_value = "mixed", value_parser = scenario)]
    scenario: Scenario,
    /// How many clusters
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The seed of the first one; the others follow
    #[arg(long, default_value_t = 1)]
    first_seed: u64,
    /// How many simulated minutes each of them lasts
    #[arg(long, default_value_t = 20)]
    minutes: u32,
    /// How many threads; as many as there are processors by default
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Prints one JSON object on a line
    #[arg(long)]
    json: bool,
    /// Breaks the protocol on purpose, in each of the known ways, and fails unless a check catches it
    #[arg(long, conflicts_with = "trace")]
    self_test: bool,
    /// Prints all that happened in the first seed, line by line, and runs no other
    #[arg(long, conflicts_with = "json")]
    trace: bool,
}

fn scenario(text: &str) -> Result<Scenario, ScenarioError> {
    text.parse()
}

/// Ends a sweep soon; it prints what it has found.
pub(crate) fn stop() {
    STOP.store(true, Ordering::Relaxed);
}

/// Runs all seeds.
pub(crate) fn run(args: &ClusterArgs) -> Result<ExitCode, Failure> {
    let length = Duration::from_secs(60 * u64::from(args.minutes));
    let sweep = Sweep::new(args.scenario, args.first_seed, args.seeds, length)
        .map_err(|error| failure(&error))?;
    if args.trace {
        return trace(args, length);
    }
    if args.self_test {
        return self_test(args);
    }
    let threads = args.threads.map_or_else(std::thread::available_parallelism, Ok);
    let threads = threads.unwrap_or(NonZeroUsize::MIN);
    let progress = Progress::new("seeds", Some(args.seeds));
    let swept = sweep.run(threads, &STOP, &|| progress.add(1));
    drop(progress);
    if args.json {
        sim::print_json(&Form::from(&swept))?;
    } else {
        sim::print(&as_text(args, &swept))?;
    }
    for violation in swept.violations.iter().take(TRACED) {
        eprint!("{}", explain(args, violation, length));
    }
    Ok(if swept.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Breaks the protocol in each known way until a check notices.
fn self_test(args: &ClusterArgs) -> Result<ExitCode, Failure> {
    let mut missed = 0;
    for flaw in Flaw::ALL {
        let found = sweep::hunt(flaw, HUNT_SEEDS, &STOP);
        missed += u32::from(found.is_none());
        let seed = found.as_ref().map(|violation| violation.seed);
        let check = found.as_ref().map(|violation| violation.breach.check);
        if args.json {
            sim::print_json(&Caught { flaw: flaw.name(), check, seed })?;
        } else {
            let by = check.unwrap_or("nobody");
            let seed = seed.map_or_else(String::new, |seed| format!(" at seed {seed}"));
            sim::print(&format!("{}: caught by {by}{seed}\n", flaw.name()))?;
        }
    }
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// The JSON form of a way to break the protocol, and who noticed.
#[derive(Serialize)]
struct Caught {
    flaw: &'static str,
    check: Option<&'static str>,
    seed: Option<u64>,
}

/// Runs one seed, and prints all of it.
fn trace(args: &ClusterArgs, length: Duration) -> Result<ExitCode, Failure> {
    let ran = world::run(args.scenario, args.first_seed, length, true);
    for line in ran.trace.lines() {
        sim::print(&format!("{line}\n"))?;
    }
    let Some(breach) = ran.breach else { return Ok(ExitCode::SUCCESS) };
    sim::print(&format!("{:>12} BROKEN     {}: {}\n", breach.at, breach.check, breach.message))?;
    Ok(ExitCode::from(1))
}

/// What a seed broke, what led to it, and how to see it again.
fn explain(args: &ClusterArgs, violation: &Violation, length: Duration) -> String {
    let Violation { seed, breach } = violation;
    let ran = world::run(args.scenario, *seed, length, true);
    let mut text =
        format!("\nseed {seed} at {}: {}: {}\n", breach.at, breach.check, breach.message);
    for line in ran.trace.about(breach.slice, LINES) {
        writeln!(text, "  {line}").expect("a string takes it");
    }
    let (scenario, minutes) = (args.scenario, args.minutes);
    writeln!(
        text,
        "  again: mandoline sim cluster --scenario {scenario} --first-seed {seed} --seeds 1 --minutes {minutes} --trace"
    )
    .expect("a string takes it");
    text
}

/// The JSON form.
#[derive(Serialize)]
struct Form {
    seeds: u64,
    violations: Vec<ViolationForm>,
    simulated_hours: f64,
    faults: BTreeMap<&'static str, u64>,
    #[serde(flatten)]
    counts: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct ViolationForm {
    seed: u64,
    check: &'static str,
    message: String,
}

impl From<&Swept> for Form {
    fn from(swept: &Swept) -> Self {
        let violation = |violation: &Violation| ViolationForm {
            seed: violation.seed,
            check: violation.breach.check,
            message: violation.breach.message.clone(),
        };
        let kinds = Kind::ALL.iter().zip(swept.tally.faults);
        Self {
            seeds: swept.seeds,
            violations: swept.violations.iter().map(violation).collect(),
            simulated_hours: swept.simulated.as_secs_f64() / 3_600.0,
            faults: kinds.map(|(kind, count)| (kind.name(), count)).collect(),
            counts: swept.tally.counts().collect(),
        }
    }
}

fn as_text(args: &ClusterArgs, swept: &Swept) -> String {
    let hours = swept.simulated.as_secs_f64() / 3_600.0;
    let mut text = format!(
        "{} seeds of {}, {hours:.1} simulated hours: {} violations\n",
        swept.seeds,
        args.scenario,
        swept.violations.len()
    );
    let kinds = Kind::ALL.iter().zip(swept.tally.faults).map(|(kind, count)| (kind.name(), count));
    for (name, count) in kinds.chain(swept.tally.counts()).filter(|(_, count)| *count > 0) {
        writeln!(text, "  {count:>12} {}", name.replace('_', " ")).expect("a string takes it");
    }
    text
}

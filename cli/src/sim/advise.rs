//! `mandoline sim advise`: what sharding a user's own load would give, in plain words.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use mandoline_core::name::JobName;
use mandoline_sim::access_log::KeyPart;
use mandoline_sim::advise::{Advice, Survey};
use mandoline_sim::contest::{Contest, Entry, Outcome};
use mandoline_sim::field::{Name, Terms};
use mandoline_sim::fleet::Fleet;
use mandoline_sim::scenario::Scenario;
use serde::Serialize;

use crate::failure::Failure;
use crate::sim::balance::{self, PolicyForm};
use crate::sim::input::{self, Reading};
use crate::sim::progress::Progress;
use crate::sim::{self, clock, failure};
use crate::units::Span;

/// Reads your access log, and says what sharding it by a key would give
///
/// How even the load would be with our balancer and with other ways, how much would move for it,
/// which keys are hottest, how many tasks help, and a job spec to begin with.
///
/// The key is the part of a request whose requests should meet in one task: a user, a tenant, a
/// document. Try several, and compare.
///
/// Examples:
///   mandoline sim advise --log access.log --key path:1 --tasks 20
///   mandoline sim advise --log access.log --key query:user --tasks 20 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct AdviseArgs {
    /// An access log (common or combined) or a trace (`seconds key [weight [bytes]]`), plain or zstd
    #[arg(long, value_name = "FILE")]
    log: PathBuf,
    /// Which part of a log's line is the key: path, target, host, user, referer, agent, path:N, query:NAME [default: path]
    #[arg(long, value_name = "PART")]
    key: Option<KeyPart>,
    /// How many tasks are to serve
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    tasks: u32,
    /// How long an interval is [default: by the log's length, 10s to 7 days]
    #[arg(long, value_name = "DURATION")]
    interval: Option<Span>,
    /// Passes over broken lines of a trace, and counts them
    #[arg(long)]
    lenient: bool,
    /// The job's name in the suggested spec
    #[arg(long, value_name = "NAME", default_value = "my-service")]
    job: JobName,
    /// Prints one JSON object on a line
    #[arg(long)]
    json: bool,
}

/// Reads, tries and advises.
pub(crate) fn run(args: &AdviseArgs) -> Result<ExitCode, Failure> {
    let mut survey = Survey::default();
    let reading = Reading {
        path: &args.log,
        key: args.key.as_ref(),
        lenient: args.lenient,
        interval: args.interval.map_or(WHOLE, |Span(interval)| interval),
        intervals_max: None,
    };
    let mut recording = reading.read(&mut |event| survey.take(event))?;
    let mut interval = reading.interval;
    if args.interval.is_none() {
        // How long intervals should be is known once the log was read.
        interval = survey.interval(args.tasks);
        recording = Reading { interval, ..reading }.read(&mut |_| {})?;
    }
    input::remark(recording.skipped());
    let advice = Advice::new(&survey, &recording.intervals, interval, args.tasks);

    let fleet = Fleet::steady(args.tasks).map_err(|error| failure(&error))?;
    let scenario = Scenario::recorded("log", recording.intervals, fleet);
    let outcomes = contest(&scenario, advice.replicas > 1);
    if args.json {
        sim::print_json(&form(args, &survey, &advice, &outcomes))?;
    } else {
        sim::print(&text(args, &survey, &advice, &outcomes))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Longer than any log: one interval.
const WHOLE: Duration = Duration::from_secs(u32::MAX as u64 * 1_000);

/// Runs those policies that one might choose. Nothing is found where there is no interval to be judged on.
fn contest(scenario: &Scenario, with_one: bool) -> Vec<Outcome> {
    if scenario.count() <= scenario.warmup() {
        return vec![];
    }
    let name = |text: &str| -> Name { text.parse().expect("it is a policy's name") };
    let (many, one) = (Terms { replicas_max: None }, Terms { replicas_max: Some(1) });
    let mut entries = vec![("mandoline", name("mandoline"), many)];
    if with_one {
        entries.push(("mandoline, one task a key", name("mandoline"), one));
    }
    let others = ["mandoline+spill", "slicer+band", "dicer", "ring", "bounded-ring", "static"];
    entries.extend(others.map(|other| (other, name(other), many)));
    let policies: Vec<Entry<'_>> =
        entries.iter().map(|(_, name, terms)| name.entry(*terms)).collect();
    let progress = Progress::new("intervals", Some((policies.len() * scenario.count()) as u64));
    let mut outcomes = Contest {
        scenario,
        policies: &policies,
        seeds: &[1],
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        clock: &clock::cpu_time,
        progress: &|_| progress.add(1),
    }
    .run();
    let named = outcomes.iter_mut().zip(&entries);
    named.for_each(|(outcome, (name, ..))| outcome.policy = (*name).to_owned());
    outcomes
}

fn text(args: &AdviseArgs, survey: &Survey, advice: &Advice, outcomes: &[Outcome]) -> String {
    let mut parts = vec![advice.describe(survey)];
    if !outcomes.is_empty() {
        let tasks = args.tasks;
        parts.push(format!("With {tasks} tasks:\n\n{}", balance::table(outcomes)));
        parts.push(advice.compare(outcomes));
    }
    if !advice.warnings.is_empty() {
        parts.push(format!("Beware:\n- {}\n", advice.warnings.join("\n- ")));
    }
    let spec = advice.spec(args.job.as_str(), outcomes);
    parts.push(format!("A job spec to begin with (`mandoline job apply FILE`):\n\n{spec}"));
    parts.join("\n")
}

/// The JSON form.
#[derive(Serialize)]
struct Form<'a> {
    requests: u64,
    keys: usize,
    seconds: f64,
    interval_seconds: f64,
    intervals: usize,
    tasks: u32,
    hottest: Vec<KeyForm<'a>>,
    /// Of an interval's load, that its hottest key draws.
    hottest_share: ShareForm,
    tasks_bound: u64,
    replicas_needed: u32,
    imbalance_floor: f64,
    policies: Vec<PolicyForm<'a>>,
    warnings: &'a [String],
    spec: String,
}

#[derive(Serialize)]
struct KeyForm<'a> {
    key: &'a str,
    share: f64,
}

#[derive(Serialize)]
struct ShareForm {
    p50: f64,
    p99: f64,
}

fn form<'a>(
    args: &AdviseArgs,
    survey: &'a Survey,
    advice: &'a Advice,
    outcomes: &'a [Outcome],
) -> Form<'a> {
    let (intervals, length) = advice.intervals;
    let hottest = survey.hottest(20).into_iter().map(|(key, share)| KeyForm { key, share });
    Form {
        requests: survey.requests,
        keys: survey.keys(),
        seconds: survey.span.as_secs_f64(),
        interval_seconds: length.as_secs_f64(),
        intervals,
        tasks: advice.tasks,
        hottest: hottest.collect(),
        hottest_share: ShareForm { p50: advice.hottest_share.p50, p99: advice.hottest_share.p99 },
        tasks_bound: advice.tasks_bound,
        replicas_needed: advice.replicas,
        imbalance_floor: advice.floor,
        policies: outcomes.iter().map(PolicyForm::from).collect(),
        warnings: &advice.warnings,
        spec: advice.spec(args.job.as_str(), outcomes),
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::key::SliceKey;
    use mandoline_core::spec::ReplicaBounds;
    use mandoline_sim::event::Event;
    use mandoline_sim::interval::Interval;

    use super::*;
    use crate::job_file;

    #[test]
    fn the_suggested_spec_is_one() {
        let mut survey = Survey::default();
        survey.take(&Event { at: Duration::ZERO, key: "k".into(), weight: 1, bytes: None });
        let hot = Interval::new(vec![(SliceKey(1), 9), (SliceKey(2), 1)]);
        let intervals = vec![hot; 5];
        let advice = Advice::new(&survey, &intervals, Duration::from_secs(10), 4);
        let scenario = Scenario::recorded("t", intervals, Fleet::steady(4).unwrap());
        let mut outcomes = contest(&scenario, true);
        assert_eq!(outcomes[1].policy, "mandoline, one task a key");
        let spec = job_file::parse(&advice.spec("kv", &outcomes), "advice").unwrap();
        assert_eq!(spec.replicas, ReplicaBounds { min: 1, max: 4 });
        outcomes[0].imbalance.as_mut().unwrap().p99 = 2.0;
        let spec = job_file::parse(&advice.spec("kv", &outcomes), "advice").unwrap();
        assert!(spec.spill.is_some(), "{spec:?}");
    }
}

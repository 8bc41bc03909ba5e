//! `mandoline dev`: everything in one process on loopback, as a cluster would have it on many machines: assigner nodes, a job,
//! tasks of the sample service, a proxy, and load if asked for. Nothing here is a shortcut: the parts speak over sockets.

mod nodes;
mod newest;
mod town;
mod report;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use mandoline_core::spec::JobSpec;
use mandoline_sim::access_log::KeyPart;
use mandoline_sim::workload::Workload;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::dev::report::Report;
use crate::dev::town::Town;
use crate::drive::{Driver, Limits, Load, Pace, Rate, Speed};
use crate::failure::Failure;
use crate::task::demo_job;
use crate::units::Span;
use crate::{file, job_file, stop};

/// Starts everything in one process on loopback: assigners, tasks, a proxy, and load if asked for
///
/// Examples:
///   mandoline dev                                        # and try the lines that it prints
///   mandoline dev --load zipf:0.99 --rate 2000           # a skewed load, and how it is spread
///   mandoline dev --replay access.log --key path --speed 60 --for 2m --json
///   mandoline dev --data-dir ./dev                       # a restart finds everything again
///
/// With load there is a line a second: requests a second, the share that went to the right task at the first try, the
/// load of the busiest task by the mean, slices, moves, what was moved of all load, and the generation.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct DevArgs {
    /// How many tasks serve
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=200))]
    tasks: u16,
    /// How many assigner nodes decide; 3 go on without one, 5 without two
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    assigners: u16,
    /// Where the assigners keep their logs, to be found again by a restart [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Made-up load: keys by Zipf's law, such as zipf:0.99 or zipf:1.2,keys=1000
    #[arg(long, value_name = "LAW", conflicts_with = "replay")]
    load: Option<Workload>,
    /// Recorded load: a trace (`seconds key [weight [bytes]]`) or an access log, plain or zstd
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Which part of an access log's line is the key: path, target, host, user, referer, agent, path:N, query:NAME
    #[arg(long, value_name = "PART", requires = "replay")]
    key: Option<KeyPart>,
    /// Requests a second [default: 1000]
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<Rate>,
    /// A recording by its own times, so many times faster
    #[arg(long, value_name = "TIMES", requires = "replay", conflicts_with = "rate")]
    speed: Option<Speed>,
    /// What made-up load is drawn from: the same number draws the same keys
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Ends by itself after so long; a recording is repeated until then
    #[arg(long = "for", value_name = "DURATION")]
    length: Option<Span>,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
    /// The first node's port for callers; peers use the next, and each further node ten more; 0 takes free ones
    #[arg(long, default_value_t = 7400, value_name = "PORT")]
    port_base: u16,
    /// Where the proxy listens [default: 127.0.0.1:8080, or a free port with --port-base 0]
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// What is asked of the job, as `job apply` reads it; what the file leaves out has the defaults of a job, not those of dev
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// How often tasks report their load [default: 500ms, or what the spec says]
    #[arg(long, value_name = "DURATION")]
    report_every: Option<Span>,
    /// How often the load is balanced [default: 1s, or what the spec says]
    #[arg(long, value_name = "DURATION")]
    balance_every: Option<Span>,
    /// One more task joins after so long
    #[arg(long, value_name = "DURATION")]
    add_task_at: Option<Span>,
    /// One task drains and stops after so long
    #[arg(long, value_name = "DURATION")]
    drain_task_at: Option<Span>,
}

impl DevArgs {
    /// What is asked of the job.
    fn spec(&self) -> Result<JobSpec, Failure> {
        let mut spec = match &self.spec {
            Some(path) => job_file::parse(&file::read_text(path)?, &path.display().to_string())?,
            // A person looks on: rounds are short.
            None => JobSpec {
                report_every: Duration::from_millis(500),
                balance_every: Duration::from_secs(1),
                ..JobSpec::new(demo_job())
            },
        };
        if let Some(Span(length)) = self.report_every {
            spec.report_every = length;
        }
        if let Some(Span(length)) = self.balance_every {
            spec.balance_every = length;
        }
        spec.check().map_err(Failure::new)?;
        Ok(spec)
    }

    fn load(&self) -> Option<Load> {
        if let Some(path) = &self.replay {
            let pace = match (self.rate, self.speed) {
                (Some(rate), _) => Pace::Rate(rate),
                (None, Some(speed)) => Pace::Speed(speed),
                (None, None) => Pace::Rate(usual_rate()),
            };
            return Some(Load::Recorded { path: path.clone(), key: self.key.clone(), pace });
        }
        let workload = self.load?;
        let rate = self.rate.unwrap_or_else(usual_rate);
        Some(Load::Made { workload, seed: self.seed, rate })
    }
}

fn usual_rate() -> Rate {
    "1000".parse().expect("a thousand is a rate")
}

/// Runs until told to stop, or for as long as asked.
pub(crate) async fn run(args: DevArgs) -> Result<ExitCode, Failure> {
    let stop = stop::on_signal()?;
    let say = |text: String| if args.json { eprintln!("{text}") } else { println!("{text}") };
    let began = Instant::now();
    let mut town = tokio::select! {
        town = Town::start(&args) => town?,
        () = stop.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    say(town.describe(began.elapsed()));
    let driver = match args.load() {
        Some(load) => {
            let length = args.length.map(|Span(length)| length);
            let limits = Limits { length, ..Limits::default() };
            let started = Driver::start(town.proxy_address(), load, limits, &stop).await;
            match started {
                Ok(driver) => Some(driver),
                Err(error) => {
                    town.stop().await;
                    return Err(Failure::new("the load cannot be read").caused_by(&error));
                }
            }
        }
        None => None,
    };
    let mut report = Report::new(&town);
    let ended = watch(&args, &mut town, driver, &mut report, &stop, &say).await;
    if stop.is_cancelled() {
        say("stopping".to_owned());
    }
    let summary = report.finish(&town);
    let stopping = Instant::now();
    town.stop().await;
    say(format!("stopped in {:.1} s", stopping.elapsed().as_secs_f64()));
    ended?;
    if args.json {
        println!("{summary}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets time pass: a line a second, a task that comes, a task that goes, until the end.
async fn watch(
    args: &DevArgs,
    town: &mut Town,
    mut driver: Option<Driver>,
    report: &mut Report,
    stop: &CancellationToken,
    say: &impl Fn(String),
) -> Result<(), Failure> {
    let start = Instant::now();
    let at = |span: Option<Span>| span.map_or(start + FOR_GOOD, |Span(after)| start + after);
    let (mut add_at, mut drain_at, end) =
        (at(args.add_task_at), at(args.drain_task_at), at(args.length));
    let mut seconds = tokio::time::interval_at(start + SECOND, SECOND);
    let error = loop {
        let ended = ended(driver.as_mut(), end);
        let next = tokio::select! {
            error = ended => break error,
            () = stop.cancelled(), if args.load().is_none() => break None,
            _ = seconds.tick() => Next::Second,
            () = tokio::time::sleep_until(add_at) => Next::Add,
            () = tokio::time::sleep_until(drain_at) => Next::Drain,
        };
        match (next, &driver) {
            (Next::Second, Some(driver)) => say(report.second(town, driver)),
            (Next::Second, None) => {}
            (Next::Add, _) => {
                add_at = start + FOR_GOOD;
                say(town.add_task()?);
            }
            (Next::Drain, _) => {
                drain_at = start + FOR_GOOD;
                say(town.drain_task());
            }
        }
    };
    if let Some(driver) = &driver {
        report.end(driver);
        say(driver.totals().to_string());
    }
    error.map_or(Ok(()), Err)
}

/// What happens next in a run.
enum Next {
    Second,
    Add,
    Drain,
}

/// Waits for the end of the load, or where there is none for `end`; with an error if the load could not be read.
async fn ended(driver: Option<&mut Driver>, end: Instant) -> Option<Failure> {
    let Some(driver) = driver else {
        tokio::time::sleep_until(end).await;
        return None;
    };
    let (_, error) = driver.finished().await;
    error.map(|error| Failure::new("the load cannot be read to its end").caused_by(error))
}

const SECOND: Duration = Duration::from_secs(1);
/// Longer than anyone waits, and short enough to be added to any time.
const FOR_GOOD: Duration = Duration::from_secs(30 * 365 * 24 * 3_600);

//! `mandoline distributor`: the fan-out tier alone. It follows the assigners, or another distributor, and tells any number of
//! clerks, proxies and tasks what it hears, so that assigners have few watchers and callers go on when none of them is left.

mod metrics;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use clap::Args;
use mandoline::Hub;
use mandoline::clerk::{Clerk, State};
use mandoline::flags::Follower;
use mandoline_assigner::access::connector;
use mandoline_assigner::server::serve_watch_and_pages;
use mandoline_core::name::JobName;
use mandoline_core::task::Address;
use serde::Deserialize;

use crate::access_args::AccessArgs;
use crate::distributor::metrics::Metrics;
use crate::failure::Failure;
use crate::task::default_assigners;
use crate::text::{self, Text, overlay};
use crate::units::Span;
use crate::{file, ports, stop};

/// Tells many callers who owns what: the fan-out tier, between the assigners and those who watch
///
/// Examples:
///   mandoline distributor --job kv --upstream 127.0.0.1:7400
///   mandoline distributor --job kv,carts --upstream a:7400,b:7400 --listen 0.0.0.0:7600 --cache-dir /var/lib/mandoline
///   mandoline proxy --job kv --assigners 127.0.0.1:7600       # anything that watches takes it for an assigner
///
/// It holds the assignments of its jobs in memory and sends each change once to every watcher. When all assigners are gone it
/// goes on telling what it knows, to those who come new as well; with --cache-dir even after a restart. Tasks register with
/// assigners, and load is reported to them: give those beside it where a caller does either.
///
/// On the same port: /livez, /readyz (every job is known; ?verbose says how well) and /metrics.
#[derive(Debug, Default, Args, Deserialize)]
#[command(verbatim_doc_comment)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct DistributorArgs {
    /// A YAML file with these options; flags and environment win over it
    #[arg(long, env = "MANDOLINE_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// The jobs that it tells of
    #[arg(long = "job", env = "MANDOLINE_JOB", value_name = "JOB,..", value_delimiter = ',')]
    jobs: Option<Vec<Text<JobName>>>,
    /// Whom it follows: assigners or other distributors, each as good as the others [default: 127.0.0.1:7400]
    #[arg(long, env = "MANDOLINE_UPSTREAM", value_name = "HOST:PORT,..", value_delimiter = ',')]
    upstream: Option<Vec<Text<Address>>>,
    /// Where it is watched [default: 127.0.0.1:7600]
    #[arg(long, env = "MANDOLINE_LISTEN", value_name = "IP:PORT")]
    listen: Option<Text<SocketAddr>>,
    /// Keeps the last assignment of each job in this folder, to start from it while nobody answers [default: nowhere]
    #[arg(long, env = "MANDOLINE_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Runs until told to stop.
pub(crate) async fn run(mut args: DistributorArgs) -> Result<ExitCode, Failure> {
    if let Some(path) = &args.config {
        let from_file: DistributorArgs = file::read(path)?;
        overlay!(args, from_file; jobs, upstream, listen, cache_dir);
        args.access.overlay(from_file.access);
    }
    let jobs = jobs(args.jobs)?;
    let listen = args.listen.map_or_else(|| SocketAddr::from(([127, 0, 0, 1], 7600)), |t| t.0);
    let access = args.access.load()?;
    access.check(listen).map_err(|error| {
        Failure::new("the distributor's address is open to strangers").because(error)
    })?;
    if let Some(dir) = &args.cache_dir {
        std::fs::create_dir_all(dir).map_err(|error| {
            Failure::new(format!("cannot keep assignments in {}", dir.display())).because(error)
        })?;
    }
    let stop = stop::on_signal()?;
    let listener = ports::bind(listen, "those who watch")?;
    let listen = listener.local_addr().unwrap_or(listen);
    let hub = Hub::new();
    let upstream = args.upstream.map_or_else(default_assigners, text::plain);
    let follow = |job: &JobName| {
        let mut builder = Clerk::builder(job.clone())
            .sources(upstream.iter().cloned())
            .connector(connector(&access))
            .named(format!("distributor {listen}"))
            .publish_to(hub.clone());
        if let Some(dir) = &args.cache_dir {
            builder = builder.cache(dir.join(format!("{job}.assignment")));
        }
        builder.start().map_err(|error| {
            Failure::new(format!("job {job} cannot be followed")).caused_by(&error)
        })
    };
    let mut flags = Follower::builder()
        .sources(upstream.iter().cloned())
        .connector(connector(&access))
        .named(format!("distributor {listen}"))
        .publish_to(hub.clone())
        .silent();
    if let Some(dir) = &args.cache_dir {
        flags = flags.cache(dir.join("flags"));
    }
    let _flags = flags
        .start()
        .map_err(|error| Failure::new("pauses cannot be followed").caused_by(&error))?;
    let followed = jobs.iter().map(follow).collect::<Result<Vec<Clerk>, _>>()?;
    let names: Vec<&str> = jobs.iter().map(JobName::as_str).collect();
    eprintln!("distributor: tells of {} at {listen}", names.join(", "));
    let pages = pages(Arc::new(Followed { jobs: followed, hub: hub.clone() }));
    serve_watch_and_pages(listener, hub, pages, &access, stop)
        .await
        .map_err(|error| Failure::new("watching cannot be served").caused_by(&error))?;
    eprintln!("distributor: stopped");
    Ok(ExitCode::SUCCESS)
}

fn jobs(given: Option<Vec<Text<JobName>>>) -> Result<Vec<JobName>, Failure> {
    let mut jobs = given.map_or_else(Vec::new, text::plain);
    jobs.sort();
    jobs.dedup();
    if jobs.is_empty() {
        return Err(Failure::new("the distributor has no job to tell of")
            .try_this("--job kv, or several: --job kv,carts (`mandoline job list` names them)"));
    }
    Ok(jobs)
}

/// What is told, and how well it is known.
struct Followed {
    jobs: Vec<Clerk>,
    hub: Hub,
}

fn pages(followed: Arc<Followed>) -> Router {
    let (ready, counted) = (Arc::clone(&followed), followed);
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(async move || ready.readiness()))
        .route("/metrics", get(async move || counted.metrics()))
}

impl Followed {
    /// Ready once every job is known. What is known and no longer told from above is good enough to go on by, and said.
    fn readiness(&self) -> Response {
        let mut good = true;
        let mut text = String::new();
        for clerk in &self.jobs {
            let job = clerk.job();
            let line = match (clerk.assignment(), clerk.state()) {
                (None, State::Empty { why, .. }) => {
                    good = false;
                    format!("[failed] {job}: nothing is known yet: {why}\n")
                }
                (None, _) => {
                    good = false;
                    format!("[failed] {job}: nothing is known yet\n")
                }
                (Some(known), State::Stale { lasting, why }) => {
                    let lasting = Span(lasting);
                    format!(
                        "[ok] {job}: at {}, not told anew for {lasting}: {why}\n",
                        known.generation
                    )
                }
                (Some(known), _) => format!("[ok] {job}: at {}\n", known.generation),
            };
            text.push_str(&line);
        }
        text.push_str(if good { "ok\n" } else { "not ready\n" });
        let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (status, text).into_response()
    }

    fn metrics(&self) -> Response {
        let metrics = Metrics::default();
        metrics.watchers.set(i64::try_from(self.hub.watchers()).unwrap_or(i64::MAX));
        for clerk in &self.jobs {
            metrics.job(clerk.job(), clerk.assignment().as_deref(), &clerk.state());
        }
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(CONTENT_TYPE, kind)], metrics.text()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distributor_needs_a_job() {
        let none = jobs(None).unwrap_err().to_string();
        assert!(none.contains("no job to tell of") && none.contains("--job kv"), "{none}");
        let some = vec!["kv".parse().unwrap(), "a".parse().unwrap(), "kv".parse().unwrap()];
        assert_eq!(jobs(Some(some)).unwrap(), ["a", "kv"].map(|name| name.parse().unwrap()));
    }

    #[test]
    fn a_distributor_is_described_by_a_file() {
        let yaml = "jobs: [kv, carts]\nupstream: ['a:7400']\nlisten: 127.0.0.1:1\ncache_dir: c\n";
        let args: DistributorArgs = file::parse(yaml, "d.yaml").unwrap();
        assert_eq!(args.jobs.unwrap().len(), 2);
        let slip = file::parse::<DistributorArgs>("upstreem: []\n", "d.yaml").unwrap_err();
        assert!(slip.to_string().contains("did you mean \"upstream\""), "{slip}");
    }
}

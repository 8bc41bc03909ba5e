//! Everything that `dev` starts, held together: nodes, tasks and a proxy, and the order in which they stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mandoline::clerk::Clerk;
use mandoline::flags::Follower;
use mandoline::http::key::KeyFrom;
use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::spec::JobSpec;
use mandoline_core::state::Churn;
use mandoline_core::task::Address;
use mandoline_proto::pb;
use mandoline_proxy::config::Config as ProxyConfig;
use mandoline_proxy::proxy::Proxy;
use mandoline_proxy::router::Router;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::client::{Admin, Client};
use crate::dev::DevArgs;
use crate::dev::newest::{Newest, Tally};
use crate::dev::nodes::{self, Node};
use crate::failure::Failure;
use crate::ports;
use crate::task::{Setup, Task};

/// Everything that `dev` starts.
#[derive(Debug)]
pub(crate) struct Town {
    job: JobName,
    nodes: Vec<Node>,
    tasks: Vec<(String, Task)>,
    draining: JoinSet<()>,
    proxy: Proxy,
    flags: Follower,
    telling: JoinHandle<()>,
    clerk: Clerk,
    newest: Newest,
    tally: Arc<Tally>,
    next_task: usize,
    data: PathBuf,
    // Removed when dropped, after all who write into it.
    temporary: Option<tempfile::TempDir>,
}

impl Town {
    /// Starts everything, and waits until every key is served.
    pub(crate) async fn start(args: &DevArgs) -> Result<Self, Failure> {
        let spec = args.spec()?;
        let temporary = match &args.data_dir {
            Some(_) if args.port_base == 0 => {
                return Err(Failure::new("--data-dir and --port-base 0 do not go together")
                    .because("nodes that are found again need the same ports each time")
                    .try_this("leave --port-base out, or give a number"));
            }
            Some(_) => None,
            None => Some(tempfile::tempdir().map_err(|error| {
                Failure::new("cannot make a temporary directory").because(error)
            })?),
        };
        let data = match (&args.data_dir, &temporary) {
            (Some(dir), _) => dir.clone(),
            (None, Some(dir)) => dir.path().to_owned(),
            (None, None) => unreachable!("one of the two is there"),
        };
        let listen = args.listen.unwrap_or_else(|| {
            SocketAddr::from(([127, 0, 0, 1], if args.port_base == 0 { 0 } else { 8080 }))
        });
        // The proxy binds with SO_REUSEPORT, beside whoever did so too: find that out first.
        drop(ports::bind(listen, "requests to the proxy")?);

        let job = spec.name.clone();
        let nodes = nodes::start(args.assigners, args.port_base, &data).await?;
        let newest = Newest::follow(&job, nodes.iter().map(|node| &node.hub));
        let assigners: Vec<Address> = nodes.iter().map(|node| node.seat.client.clone()).collect();
        apply_job(&spec, &assigners).await?;

        let mut tasks = vec![];
        for index in 0..usize::from(args.tasks) {
            tasks.push(start_task(index, &job, &assigners)?);
        }
        let served = tokio::time::timeout(START_WITHIN, newest.served_by(tasks.len()));
        served.await.map_err(|_| {
            Failure::new("the tasks were not given all slices")
                .because(format!("not within {} s", START_WITHIN.as_secs()))
                .try_this("MANDOLINE_LOG=info shows what they do")
        })?;

        let clerk = Clerk::builder(job.clone())
            .sources(assigners.clone())
            .named("dev")
            .report_offered(true)
            .start()
            .map_err(|error| Failure::new("the clerk did not start").caused_by(&error))?;
        // The node that it asks may lag behind the one that says what is newest.
        let generation = newest.get().map_or(Generation::ZERO, |newest| newest.generation);
        clerk.wait_for(generation, START_WITHIN).await.map_err(|error| {
            Failure::new("the proxy was not told who serves the job").caused_by(&error)
        })?;
        let tally = Arc::new(Tally::default());
        let flags = Follower::builder()
            .sources(assigners)
            .named("dev")
            .start()
            .map_err(|error| Failure::new("pauses cannot be followed").caused_by(&error))?;
        let config = ProxyConfig {
            observer: Some(tally.observer(&newest)),
            flags: flags.flags(),
            ..ProxyConfig::new(listen, KeyFrom::path(1), Router::new(clerk.clone()))
        };
        let proxy = crate::proxy::start(config, &CancellationToken::new())?;
        let telling = tokio::spawn(proxy.pauses().tell(flags.standing()));
        let next_task = tasks.len();
        Ok(Self {
            job,
            nodes,
            tasks,
            draining: JoinSet::new(),
            proxy,
            flags,
            telling,
            clerk,
            newest,
            tally,
            next_task,
            data,
            temporary,
        })
    }

    /// Says where everything is, and what to try.
    pub(crate) fn describe(&self, took: Duration) -> String {
        let nodes: Vec<&str> = self.nodes.iter().map(|node| node.seat.client.as_str()).collect();
        let tasks: Vec<String> =
            self.tasks.iter().map(|(name, task)| format!("{name} {}", task.address())).collect();
        let kept = if self.temporary.is_some() { ", removed at the end" } else { ", kept" };
        let program = std::env::args().next().unwrap_or_else(|| "mandoline".to_owned());
        let (proxy, first) = (self.proxy.local_addr(), nodes[0]);
        format!(
            "mandoline dev is up after {:.1} s: {} assigners, {} tasks of job {}, one proxy\n\
             \x20 assigners  {}\n\
             \x20 tasks      {}\n\
             \x20 proxy      {proxy}\n\
             \x20 data       {}{kept}\n\
             try:\n\
             \x20 curl -i -X PUT -d hello http://{proxy}/kv/greeting\n\
             \x20 curl -i http://{proxy}/kv/greeting\n\
             \x20 curl -s 'http://{first}/readyz?verbose'\n\
             \x20 {program} status --assigners {first}\n\
             Ctrl-C stops it all.",
            took.as_secs_f64(),
            nodes.len(),
            tasks.len(),
            self.job,
            nodes.join("  "),
            tasks.join("  "),
            self.data.display(),
        )
    }

    /// Gives where requests go.
    pub(crate) fn proxy_address(&self) -> SocketAddr {
        self.proxy.local_addr()
    }

    /// Gives the newest assignment that was committed.
    pub(crate) fn newest(&self) -> Option<Arc<Assignment>> {
        self.newest.get()
    }

    /// Gives how many requests there were, and how many of them went right at the first try.
    pub(crate) fn first_tries(&self) -> (u64, u64) {
        self.tally.sums()
    }

    /// Gives what was moved since the job began.
    pub(crate) fn churn(&self) -> Churn {
        let states = self.nodes.iter().map(|node| node.consensus.state());
        let of_job = states.filter_map(|state| {
            state.jobs.get(&self.job).map(|job| (job.assignment.generation, job.churn))
        });
        of_job.max_by_key(|(generation, _)| *generation).map(|(_, churn)| churn).unwrap_or_default()
    }

    /// Has one more task join, and says so.
    pub(crate) fn add_task(&mut self) -> Result<String, Failure> {
        let assigners = self.nodes.iter().map(|node| node.seat.client.clone()).collect::<Vec<_>>();
        let (name, task) = start_task(self.next_task, &self.job, &assigners)?;
        let text = format!("task {name} joins at {}", task.address());
        self.next_task += 1;
        self.tasks.push((name, task));
        Ok(text)
    }

    /// Has the first task drain and stop, and says so.
    pub(crate) fn drain_task(&mut self) -> String {
        if self.tasks.len() < 2 {
            return "no task drains: it is the last one".to_owned();
        }
        let (name, task) = self.tasks.remove(0);
        let text = format!("task {name} drains");
        self.draining.spawn(async move {
            let how = task.drain().await;
            tracing::info!(task = name, ?how, "The task has stopped");
        });
        text
    }

    /// Stops everything: those who ask before those who answer.
    pub(crate) async fn stop(self) {
        self.proxy.stop().await;
        self.telling.abort();
        drop(self.flags);
        drop(self.clerk);
        let mut stopping = self.draining;
        stopping.abort_all();
        for (_, task) in self.tasks {
            stopping.spawn(task.end());
        }
        while stopping.join_next().await.is_some() {}
        // So that a restart finds no task that it must first find lost.
        drop(tokio::time::timeout(LEAVE_WITHIN, self.newest.without_tasks()).await);
        nodes::stop(self.nodes).await;
    }
}

/// Makes the job as asked, unless it is so already.
async fn apply_job(spec: &JobSpec, assigners: &[Address]) -> Result<(), Failure> {
    let (job, spec) = (&spec.name, pb::JobSpec::from(spec));
    let client = Client::to(assigners.to_vec(), START_WITHIN);
    let known = client
        .ask(pb::ListJobsRequest {}, async |mut admin, request| admin.list_jobs(request).await)
        .await?;
    if known.jobs.iter().any(|status| status.spec.as_ref() == Some(&spec)) {
        return Ok(());
    }
    let request = pb::ApplyJobRequest { spec: Some(spec), if_version: None };
    let look = format!("mandoline job get {job}");
    let call = async |mut admin: Admin, request| admin.apply_job(request).await;
    client.change(request, &look, call).await?;
    Ok(())
}

fn start_task(
    index: usize,
    job: &JobName,
    assigners: &[Address],
) -> Result<(String, Task), Failure> {
    let name = format!("kv-{index}");
    let listener = ports::bind(SocketAddr::from(([127, 0, 0, 1], 0)), "a task")?;
    let parsed = name.parse().expect("kv and a number are a name");
    let task = Task::start(Setup::new(parsed, job.clone(), listener, assigners.to_vec()))?;
    Ok((name, task))
}

/// Leaving takes one commit a task.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// A start takes a second or two; past this something is wrong that waiting does not mend.
const START_WITHIN: Duration = Duration::from_secs(30);

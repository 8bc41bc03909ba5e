//! What operators type: `status`, `job`, `task`, `cluster`. Each asks any assigner, prints the answer, and ends with 0 for
//! yes, 1 for no, 2 for an error.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use mandoline_assigner::config::Seat;
use mandoline_core::name::{JobName, TaskName};
use mandoline_proto::pb;
use serde_json::json;
use tokio::time::Instant;

use crate::client::{Admin, Client, ClientArgs};
use crate::failure::Failure;
use crate::job_file;
use crate::job_schema;
use crate::show::{self, Format};
use crate::text::Text;
use crate::units::Span;

/// How an answer is printed, and whom to ask.
#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Format,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

/// Shows nodes, leader, jobs, tasks, load and generations
///
/// Example: mandoline status -o json | jq '.jobs[].generation'
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    ask: AskArgs,
}

/// Jobs: one for each sharded service
#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// Makes a job, or changes it, as a file says
    ///
    /// A spec is YAML or JSON; what is left out has its default. The fields that matter most, as they are by default:
    ///
    ///   name: kv
    ///   band: 2%                # how far above the mean a task may lie at least
    ///   churn_budget: 100%      # how much load one round may move
    ///   replicas: {min: 1, max: 1}
    ///   heartbeat: 1s
    ///   report_every: 5s
    ///   balance_every: 10s
    ///
    /// All of them: docs/job-spec.md.
    ///
    /// Examples:
    ///   mandoline job apply kv.yaml
    ///   echo 'name: kv' | mandoline job apply -
    #[command(verbatim_doc_comment)]
    Apply {
        /// The spec; `-` reads standard input
        file: PathBuf,
        /// Refuse unless the job is at this version; 0: unless it is new
        #[arg(long, value_name = "VERSION")]
        if_version: Option<u64>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Checks a spec as `apply` does, and asks nobody
    Validate {
        /// The spec; `-` reads standard input
        file: PathBuf,
    },
    /// Prints the JSON Schema of specs, for editors
    ///
    /// Example: mandoline job schema > job.schema.json
    Schema,
    /// Shows a job, its tasks and what they carry; ends with 1 if there is no such job
    Get {
        /// The job's name
        name: Text<JobName>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Lists the jobs
    List {
        #[command(flatten)]
        ask: AskArgs,
    },
}

/// Tasks: the processes that serve a job
#[derive(Debug, Subcommand)]
pub(crate) enum TaskCommand {
    /// Lists the tasks of all jobs, or of one
    List {
        /// Of this job alone
        #[arg(long)]
        job: Option<Text<JobName>>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Moves a task's slices away, and gives it no more
    ///
    /// Example: mandoline task drain kv-3 --wait && kill $PID
    Drain {
        #[command(flatten)]
        which: TaskOf,
        /// Wait until it has none; ends with 1 if it still has some after --within
        #[arg(long)]
        wait: bool,
        /// How long to wait
        #[arg(long, default_value = "1m", value_name = "DURATION")]
        within: Span,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Says whether a task may stop and restart now; ends with 1 and the reason if not
    ///
    /// A task that is told yes counts as leaving for ten seconds, so that two that ask at once are not both told so.
    ///
    /// Example: until mandoline task may-restart kv-3; do sleep 2; done && kill $PID
    MayRestart {
        #[command(flatten)]
        which: TaskOf,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Says that the tasks which a job's brake waits for are lost: what they served goes to the others
    ///
    /// Too many tasks were missing at once, so nothing was reassigned; `mandoline status` shows them. Say so only if you know
    /// that they do not serve: an owner of exclusive keys is waited for until its lease is over in any case.
    ///
    /// Example: mandoline task believe-lost --job kv
    #[command(verbatim_doc_comment)]
    BelieveLost {
        /// Which job
        #[arg(long)]
        job: Text<JobName>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Takes a drain back
    Undrain {
        #[command(flatten)]
        which: TaskOf,
        #[command(flatten)]
        ask: AskArgs,
    },
}

/// Which task.
#[derive(Debug, Args)]
pub(crate) struct TaskOf {
    /// The task's name
    name: Text<TaskName>,
    /// Its job; may be left out if one job alone has a task of this name
    #[arg(long)]
    job: Option<Text<JobName>>,
}

impl TaskOf {
    /// Gives the task's job.
    async fn job(&self, client: &Client) -> Result<String, Failure> {
        match &self.job {
            Some(job) => Ok(job.to_string()),
            None => job_of(client, self.name.0.as_str()).await,
        }
    }
}

/// The assigner nodes themselves
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Shows the nodes, who leads, and how far each has the log
    Status {
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Makes a node that runs already a voting member
    ///
    /// A new node adds itself: start it with `mandoline assigner --join HOST:7401`. This is for one that was removed or
    /// has remained a learner.
    Add {
        /// The node's number, as `cluster status` shows it
        #[arg(value_parser = node)]
        node: u64,
        /// Where it is: HOST, HOST:PEER_PORT or HOST:CLIENT_PORT/PEER_PORT
        seat: Text<Seat>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Takes a node out of the cluster, for good: its number is not used again
    Remove {
        /// The node's number, as `cluster status` shows it
        #[arg(value_parser = node)]
        node: u64,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Hands leadership over, in milliseconds
    Transfer {
        /// To this node; to any that is up to date if left out
        #[arg(value_parser = node)]
        node: Option<u64>,
        #[command(flatten)]
        ask: AskArgs,
    },
}

/// Reads `3` or `n3`.
fn node(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix('n').unwrap_or(text).parse().ok().filter(|node| *node > 0);
    number.ok_or_else(|| format!("{text:?} is no node: give its number, such as n3"))
}

/// Answers `status`.
pub(crate) async fn status(args: StatusArgs) -> Result<ExitCode, Failure> {
    let AskArgs { output, client } = args.ask;
    let status = fetch(&Client::new(&client)?).await?;
    output.print(&show::status_json(&status), show::status_table(&status));
    Ok(ExitCode::SUCCESS)
}

/// Answers `job`.
pub(crate) async fn job(command: JobCommand) -> Result<ExitCode, Failure> {
    match command {
        JobCommand::Apply { file, if_version, ask } => {
            let (text, name) = read(&file)?;
            let spec = job_file::parse(&text, &name)?;
            let request = pb::ApplyJobRequest { spec: Some((&spec).into()), if_version };
            let client = Client::new(&ask.client)?;
            let look = format!("mandoline job get {}", spec.name);
            let call = async |mut admin: Admin, request| admin.apply_job(request).await;
            let reply = client.change(request, &look, call);
            let version = reply.await?.version;
            let json = json!({ "name": spec.name.as_str(), "version": version });
            ask.output.print(&json, format!("job {} is at version {version}\n", spec.name));
        }
        JobCommand::Validate { file } => {
            let (text, name) = read(&file)?;
            let spec = job_file::parse(&text, &name)?;
            show::text(&format!("{name}: job {} can be applied\n", spec.name));
        }
        JobCommand::Schema => show::text(job_schema::SCHEMA),
        JobCommand::Get { name, ask } => {
            let jobs = list(&Client::new(&ask.client)?).await?;
            let found = jobs.iter().find(|job| job_name(job) == name.0.as_str());
            let Some(job) = found else {
                eprintln!("no job {name}: `mandoline job list` shows those that are");
                return Ok(ExitCode::from(1));
            };
            ask.output.print(&show::job_json(job), show::job_page(job));
        }
        JobCommand::List { ask } => {
            let jobs = list(&Client::new(&ask.client)?).await?;
            let json = jobs.iter().map(show::job_json).collect();
            ask.output.print(&json, show::job_table(&jobs));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Answers `task`.
pub(crate) async fn task(command: TaskCommand) -> Result<ExitCode, Failure> {
    match command {
        TaskCommand::List { job, ask } => {
            let jobs = list(&Client::new(&ask.client)?).await?;
            let wanted = |status: &&pb::JobStatus| {
                job.as_ref().is_none_or(|job| job_name(status) == job.0.as_str())
            };
            let jobs: Vec<&pb::JobStatus> = jobs.iter().filter(wanted).collect();
            if jobs.is_empty() && job.is_some() {
                eprintln!("there is no such job: `mandoline job list` shows those that are");
                return Ok(ExitCode::from(1));
            }
            let json = jobs.iter().flat_map(|status| {
                status.tasks.iter().map(|task| {
                    let mut json = show::task_json(task);
                    json["job"] = job_name(status).into();
                    json
                })
            });
            ask.output.print(&json.collect(), show::task_table(jobs.iter().copied()));
        }
        TaskCommand::Drain { which, wait, within, ask } => {
            let client = Client::new(&ask.client)?;
            let job = set_phase(&client, &which, false).await?;
            let left = if wait {
                wait_drained(&client, &job, &which.name.0, within.0).await?
            } else {
                None
            };
            let json = json!({ "job": job, "task": which.name.0.as_str(), "slices": left });
            let text = match left {
                Some(0) => format!("task {} is drained: stop it whenever you like\n", which.name),
                Some(left) => format!("task {} still has {left} slices\n", which.name),
                None => format!("task {} drains\n", which.name),
            };
            ask.output.print(&json, text);
            if left.is_some_and(|left| left > 0) {
                return Ok(ExitCode::from(1));
            }
        }
        TaskCommand::MayRestart { which, ask } => {
            let client = Client::new(&ask.client)?;
            let (job, task) = (which.job(&client).await?, which.name.0.to_string());
            let request = pb::MayRestartRequest { job: job.clone(), task: task.clone() };
            let call = async |mut admin: Admin, request| admin.may_restart(request).await;
            let pb::MayRestartReply { yes, reason } = client.ask(request, call).await?;
            let shown = (!yes).then_some(&reason);
            let json = json!({ "job": job, "task": task, "may_restart": yes, "reason": shown });
            let text = match yes {
                true => format!("task {task} may restart\n"),
                false => format!("task {task} may not restart now: {reason}\n"),
            };
            ask.output.print(&json, text);
            if !yes {
                return Ok(ExitCode::from(1));
            }
        }
        TaskCommand::BelieveLost { job, ask } => {
            let request = pb::BelieveLostRequest { job: job.to_string() };
            let look = format!("mandoline job get {job}");
            let call = async |mut admin: Admin, request| admin.believe_lost(request).await;
            let tasks = Client::new(&ask.client)?.change(request, &look, call).await?.tasks;
            let json = json!({ "job": job.0.as_str(), "tasks": tasks });
            ask.output.print(&json, format!("taken for lost: {}\n", tasks.join(", ")));
        }
        TaskCommand::Undrain { which, ask } => {
            let job = set_phase(&Client::new(&ask.client)?, &which, true).await?;
            let json = json!({ "job": job, "task": which.name.0.as_str() });
            ask.output.print(&json, format!("task {} may have slices again\n", which.name));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Answers `cluster`.
pub(crate) async fn cluster(command: ClusterCommand) -> Result<ExitCode, Failure> {
    match command {
        ClusterCommand::Status { ask } => {
            let mut status = fetch(&Client::new(&ask.client)?).await?;
            status.jobs.clear();
            ask.output.print(&show::status_json(&status), show::node_table(&status.nodes));
        }
        ClusterCommand::Add { node, seat, ask } => {
            let request = pb::AddMemberRequest {
                node,
                client_address: seat.0.client.to_string(),
                peer_address: seat.0.peer.to_string(),
            };
            let client = Client::new(&ask.client)?;
            let call = async |mut admin: Admin, request| admin.add_member(request).await;
            let reply = client.change(request, LOOK_AT_NODES, call);
            let node = reply.await?.node;
            ask.output.print(&json!({ "node": node }), format!("node n{node} is a member\n"));
        }
        ClusterCommand::Remove { node, ask } => {
            let client = Client::new(&ask.client)?;
            let request = pb::RemoveMemberRequest { node };
            let call = async |mut admin: Admin, request| admin.remove_member(request).await;
            client.change(request, LOOK_AT_NODES, call).await?;
            ask.output.print(&json!({ "node": node }), format!("node n{node} is no member now\n"));
        }
        ClusterCommand::Transfer { node, ask } => {
            let client = Client::new(&ask.client)?;
            let request = pb::TransferRequest { node: node.unwrap_or_default() };
            let call = async |mut admin: Admin, request| admin.transfer(request).await;
            let reply = client.change(request, LOOK_AT_NODES, call);
            let leader = reply.await?.leader;
            ask.output.print(&json!({ "leader": leader }), format!("node n{leader} leads\n"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What shows whether a change of the cluster was carried out.
const LOOK_AT_NODES: &str = "mandoline cluster status";

async fn fetch(client: &Client) -> Result<pb::StatusReply, Failure> {
    client.ask(pb::StatusRequest {}, async |mut admin, request| admin.status(request).await).await
}

/// The jobs by `Status` and not by `ListJobs`: it alone asks the leader for what others do not know, loads and connections.
async fn list(client: &Client) -> Result<Vec<pb::JobStatus>, Failure> {
    Ok(fetch(client).await?.jobs)
}

/// Drains a task, or takes that back, and gives the job that it belongs to.
async fn set_phase(client: &Client, which: &TaskOf, undrain: bool) -> Result<String, Failure> {
    let (name, job) = (which.name.0.as_str(), which.job(client).await?);
    let request = pb::DrainTaskRequest { job: job.clone(), task: name.to_owned(), undrain };
    let look = format!("mandoline task list --job {job}");
    let call = async |mut admin: Admin, request| admin.drain_task(request).await;
    client.change(request, &look, call).await?;
    Ok(job)
}

/// Finds the one job that has a task of this name.
async fn job_of(client: &Client, task: &str) -> Result<String, Failure> {
    let jobs = list(client).await?;
    let has = |job: &&pb::JobStatus| job.tasks.iter().any(|status| task_name(status) == task);
    let having: Vec<&str> = jobs.iter().filter(has).map(job_name).collect();
    match having[..] {
        [job] => Ok(job.to_owned()),
        [] => Err(Failure::new(format!("no job has a task {task}"))
            .try_this("`mandoline task list` shows those that are")),
        _ => Err(Failure::new(format!("{} jobs have a task {task}", having.len()))
            .because(having.join(", "))
            .try_this("say which by --job")),
    }
}

/// Waits until a task has no slice, and gives how many it has at the end. A task that is gone has none.
async fn wait_drained(
    client: &Client,
    job: &str,
    task: &TaskName,
    within: Duration,
) -> Result<Option<u64>, Failure> {
    let end = Instant::now() + within;
    loop {
        let jobs = list(client).await?;
        let found = jobs.iter().find(|status| job_name(status) == job);
        let mut tasks = found.into_iter().flat_map(|status| &status.tasks);
        let left = tasks.find(|status| task_name(status) == task.as_str()).map_or(0, |t| t.slices);
        if left == 0 || Instant::now() >= end {
            return Ok(Some(left));
        }
        // As often as a person would notice.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn job_name(job: &pb::JobStatus) -> &str {
    job.spec.as_ref().map_or("", |spec| &spec.name)
}

fn task_name(status: &pb::TaskStatus) -> &str {
    let info = status.task.as_ref().and_then(|task| task.info.as_ref());
    info.map_or("", |info| &info.name)
}

fn read(file: &Path) -> Result<(String, String), Failure> {
    if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin()
            .take(1 << 20)
            .read_to_string(&mut text)
            .map_err(|error| Failure::new("cannot read standard input").because(error))?;
        return Ok((text, "standard input".to_owned()));
    }
    Ok((crate::file::read_text(file)?, file.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_a_number() {
        assert_eq!(node("n3"), Ok(3));
        assert_eq!(node("12"), Ok(12));
        for bad in ["", "n", "0", "-1", "x"] {
            assert!(node(bad).is_err(), "{bad}");
        }
    }
}

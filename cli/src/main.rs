//! The one binary, `mandoline`: assigner, proxy, sample task and everything an operator types. Noun, then verb.

mod failure;
mod units;
mod text;
mod file;
mod job_file;
mod job_text;
#[cfg(test)]
mod schema;
mod job_schema;
mod keys;
mod ports;
mod log;
mod stop;
mod table;
mod show;
mod access_args;
mod client;
mod operate;
mod pause;
mod assignment;
mod demo;
mod drive;
mod node;
mod task;
mod agent;
mod proxy;
mod distributor;
mod dev;
mod bench;
mod sim;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mandoline_assigner::raft::LOG_TARGET;

use crate::failure::Failure;
use crate::log::LogFormat;

/// Spreads the keys of a stateful service over its tasks, and tells every caller where each key lives
///
/// Start with `mandoline dev`: it runs everything on this machine and says what to try.
#[derive(Debug, Parser)]
#[command(name = "mandoline", version, propagate_version = true)]
struct Cli {
    /// What logs look like; MANDOLINE_LOG says how much, such as info or mandoline_assigner=debug
    #[arg(long, global = true, value_enum, default_value_t, env = "MANDOLINE_LOG_FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Dev(Box<dev::DevArgs>),
    Status(operate::StatusArgs),
    #[command(subcommand)]
    Job(operate::JobCommand),
    #[command(subcommand)]
    Task(operate::TaskCommand),
    #[command(subcommand)]
    Assignment(assignment::AssignmentCommand),
    Moves(assignment::MovesArgs),
    #[command(subcommand)]
    Pause(pause::PauseCommand),
    #[command(subcommand)]
    Cluster(operate::ClusterCommand),
    Assigner(Box<node::NodeArgs>),
    Proxy(Box<proxy::ProxyCommand>),
    Agent(Box<agent::AgentArgs>),
    Distributor(Box<distributor::DistributorArgs>),
    #[command(subcommand)]
    Demo(DemoCommand),
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    #[command(subcommand)]
    Sim(sim::SimCommand),
}

/// The sample service
#[derive(Debug, Subcommand)]
enum DemoCommand {
    Task(Box<task::TaskArgs>),
}

impl Command {
    /// How much is logged unless asked for: a server says what it does, a command only what it cannot do.
    fn usual_log(&self) -> String {
        let (ours, raft) = match self {
            Self::Assigner(_)
            | Self::Proxy(_)
            | Self::Agent(_)
            | Self::Distributor(_)
            | Self::Demo(_) => ("info", "warn"),
            // In one process all nodes stop at once, which Raft laments.
            _ => ("warn", "off"),
        };
        format!("{ours},{LOG_TARGET}={raft}")
    }
}

fn main() -> ExitCode {
    // What is wrong with flags, clap says itself, and ends with 2 as we do.
    let cli = Cli::parse();
    match start(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(2)
        }
    }
}

fn start(cli: Cli) -> Result<ExitCode, Failure> {
    log::start(cli.log_format, &cli.command.usual_log())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("the system gives no threads").because(error))?;
    let code = runtime.block_on(async {
        // Boxed: these futures are large, and main's stack has a bound.
        match cli.command {
            Command::Dev(args) => Box::pin(dev::run(*args)).await,
            Command::Status(args) => Box::pin(operate::status(args)).await,
            Command::Job(command) => Box::pin(operate::job(command)).await,
            Command::Task(command) => Box::pin(operate::task(command)).await,
            Command::Assignment(command) => Box::pin(assignment::assignment(command)).await,
            Command::Moves(args) => Box::pin(assignment::moves(args)).await,
            Command::Pause(command) => Box::pin(pause::pause(command)).await,
            Command::Cluster(command) => Box::pin(operate::cluster(command)).await,
            Command::Assigner(args) => Box::pin(node::run(*args)).await,
            Command::Proxy(args) => Box::pin(proxy::run(*args)).await,
            Command::Agent(args) => Box::pin(agent::run(*args)).await,
            Command::Distributor(args) => Box::pin(distributor::run(*args)).await,
            Command::Demo(DemoCommand::Task(args)) => Box::pin(task::run(*args)).await,
            Command::Bench(command) => Box::pin(bench::run(command)).await,
            Command::Sim(command) => Box::pin(sim::run(command)).await,
        }
    });
    // What has not ended by now must not keep the process: its work is done.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    code
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_is_for() {
        fn check(command: &clap::Command) {
            for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
                assert!(below.get_about().is_some(), "{}", below.get_name());
                check(below);
            }
        }
        check(&Cli::command());
    }
}

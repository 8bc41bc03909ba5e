//! `mandoline sim`: the decisions of the real thing on a virtual clock, on recorded and made-up load, beside other ways to
//! decide.
//!
//! All of it computes and waits for nothing, so it runs beside the runtime, and Ctrl-C ends it where it stands: there is
//! nothing to put in order.

mod progress;
mod clock;
mod input;
mod plot;
mod balance;
mod chaos;
mod sensitivity;
mod advise;
mod cluster;

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use clap::Subcommand;
use serde::Serialize;

use crate::failure::Failure;

/// Tries balancers on recorded or made-up load, with no cluster
#[derive(Debug, Subcommand)]
pub(crate) enum SimCommand {
    Balance(Box<balance::BalanceArgs>),
    DicerChaos(chaos::ChaosArgs),
    Sensitivity(sensitivity::SensitivityArgs),
    Advise(advise::AdviseArgs),
    Cluster(cluster::ClusterArgs),
}

/// Answers `sim`.
pub(crate) async fn run(command: SimCommand) -> Result<ExitCode, Failure> {
    // What a sweep has found so far is worth having.
    let sweeps = matches!(command, SimCommand::Cluster(_));
    let mut work = tokio::task::spawn_blocking(|| match command {
        SimCommand::Balance(args) => balance::run(&args),
        SimCommand::DicerChaos(args) => chaos::run(&args),
        SimCommand::Sensitivity(args) => sensitivity::run(&args),
        SimCommand::Advise(args) => advise::run(&args),
        SimCommand::Cluster(args) => cluster::run(&args),
    });
    tokio::select! {
        done = &mut work => done.expect("the simulator does not panic"),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.map_err(|error| Failure::new("cannot listen for Ctrl-C").because(error))?;
            progress::clear();
            if sweeps {
                cluster::stop();
                return work.await.expect("the simulator does not panic");
            }
            // What a shell reports for a process that Ctrl-C ended. The work has no end that could be waited for.
            std::process::exit(130);
        }
    }
}

/// Prints results. Whoever stops reading them has seen enough: that is no failure.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new("cannot write the results").because(error))
        }
        _ => Ok(()),
    }
}

/// Prints a result in its JSON form, on one line.
fn print_json(form: &impl Serialize) -> Result<(), Failure> {
    let json = serde_json::to_string(form).expect("numbers and names have a JSON form");
    print(&format!("{json}\n"))
}

/// An error of the simulator as a failure: what lies below it is why.
fn failure(error: &dyn std::error::Error) -> Failure {
    let failure = Failure::new(error);
    match error.source() {
        Some(source) => failure.caused_by(source),
        None => failure,
    }
}

//! `mandoline sim sensitivity`: what the constants of balancers are worth, as a page of the documentation.

use std::process::ExitCode;

use clap::Args;
use mandoline_sim::sensitivity::Study;

use crate::failure::Failure;
use crate::sim::progress::Progress;
use crate::sim::{self, clock, failure};

/// Studies how much the constants of Slicer's algorithm and of ours matter
///
/// All combinations of Slicer's slices a task, budgets and split factor, its suppression of moves
/// at low load, and each constant of ours at half and at twice what it is, on six made-up loads.
/// Prints Markdown; the same page each time. Takes some minutes, --quick some seconds.
///
/// Example: mandoline sim sensitivity > docs/sensitivity.md
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct SensitivityArgs {
    /// A few tasks and intervals: to see that it works, for the figures say little
    #[arg(long)]
    quick: bool,
}

/// Runs the study, and prints the page.
pub(crate) fn run(args: &SensitivityArgs) -> Result<ExitCode, Failure> {
    let study = Study::new(args.quick).map_err(|error| failure(&error))?;
    let progress = Progress::new("intervals", Some(study.intervals() as u64));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let page = study.markdown(threads, &clock::cpu_time, &|_| progress.add(1));
    drop(progress);
    sim::print(&page)?;
    Ok(ExitCode::SUCCESS)
}

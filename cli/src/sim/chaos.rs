//! `mandoline sim dicer-chaos`: rounds that Dicer's own code once answered, answered by our planner.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use mandoline_sim::chaos::{self, Chaos, Side};
use mandoline_sim::percentile::Percentiles;
use serde::Serialize;

use crate::failure::Failure;
use crate::sim::progress::Progress;
use crate::sim::{self, clock};
use crate::table::Table;

/// Answers the recorded rounds of Dicer's chaos test, and compares
///
/// Each line of the file is a round: a load map, the tasks that are alive, what is asked of the
/// job, and how well Dicer's own algorithm did. The rounds follow each other, and all is different
/// in each. Plain and zstd files are read.
///
/// over, under: the hottest task above and the coldest below the mean load, in relation to
///              max_load_hint
/// churn:       the share of the load that is newly on a task (of r replicas each counts 1/r)
/// ms:          processor time of a plan; Dicer's is as recorded, on another machine
///
/// Percentiles are by nearest rank.
///
/// Example: mandoline sim dicer-chaos dicer_chaos_seed1.jsonl.zst --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ChaosArgs {
    /// The recorded rounds, plain or zstd
    file: PathBuf,
    /// Prints one JSON object on a line
    #[arg(long)]
    json: bool,
}

/// Runs to the end of the file.
pub(crate) fn run(args: &ChaosArgs) -> Result<ExitCode, Failure> {
    let progress = Progress::new("rounds", None);
    let found = chaos::replay(&args.file, &mut clock::cpu_time, &mut |_| progress.add(1));
    drop(progress);
    let found = found.map_err(|error| sim::failure(&error))?;
    if args.json {
        sim::print_json(&Form::from(&found))?;
    } else {
        sim::print(&as_text(&found))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The JSON form: both sides alike.
#[derive(Serialize)]
struct Form {
    mandoline: SideForm,
    dicer: SideForm,
}

#[derive(Serialize)]
struct SideForm {
    over: PercentilesForm,
    under: PercentilesForm,
    churn: PercentilesForm,
    ms: PercentilesForm,
}

#[derive(Serialize)]
struct PercentilesForm {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl From<Percentiles> for PercentilesForm {
    fn from(Percentiles { p50, p90, p99, max }: Percentiles) -> Self {
        Self { p50, p90, p99, max }
    }
}

impl From<Side> for SideForm {
    fn from(Side { over, under, churn, ms }: Side) -> Self {
        Self { over: over.into(), under: under.into(), churn: churn.into(), ms: ms.into() }
    }
}

impl From<&Chaos> for Form {
    fn from(found: &Chaos) -> Self {
        Self { mandoline: found.mandoline.into(), dicer: found.dicer.into() }
    }
}

fn as_text(found: &Chaos) -> String {
    let mut table = Table::new(&["FIGURE", "SIDE", "P50", "P90", "P99", "MAX"]);
    let mut rows = |figure: &str, digits, of: fn(&Side) -> Percentiles| {
        for (name, side) in [("mandoline", &found.mandoline), ("dicer", &found.dicer)] {
            let Percentiles { p50, p90, p99, max } = of(side);
            let figures = [p50, p90, p99, max].map(|value| format!("{value:.digits$}"));
            table.row([figure.to_owned(), name.to_owned()].into_iter().chain(figures));
        }
    };
    rows("over", 4, |side| side.over);
    rows("under", 4, |side| side.under);
    rows("churn", 4, |side| side.churn);
    rows("ms", 3, |side| side.ms);
    let Side { over, under, .. } = &found.reserved;
    format!(
        "{table}\n{} rounds. With the reservation counted as load, mandoline is over by {:.4} {:.4} {:.4} {:.4} and under by {:.4} {:.4} {:.4} {:.4}.\n",
        found.rounds,
        over.p50,
        over.p90,
        over.p99,
        over.max,
        under.p50,
        under.p90,
        under.p99,
        under.max,
    )
}

//! `mandoline proxy check`: whether a configuration file can work, before any proxy goes by it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use mandoline_proxy::tls::certificates;

use crate::failure::Failure;
use crate::proxy::ProxyArgs;
use crate::proxy::kept::Kept;
use crate::proxy::settings::Settings;
use crate::table::Table;

/// Says whether a configuration file can work, and which route comes before which
///
/// Asks nobody: an assigner or a task that is not there is no fault of the file. Exits with 2 if it cannot work, and says at which
/// line and column, and what was probably meant.
///
/// Example:
///   mandoline proxy check proxy.yaml
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct CheckArgs {
    /// The file
    file: PathBuf,
}

pub(crate) fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let settings =
        Settings::of(ProxyArgs { config: Some(args.file.clone()), ..ProxyArgs::default() })?;
    let mut kept = Kept::idle();
    let checked = settings.check(settings.config(&mut kept)?)?;
    for listener in &checked.listeners {
        certificates::check(listener).map_err(|error| {
            Failure::new(format!("TLS cannot be spoken at {}", listener.address)).because(error)
        })?;
    }
    let mut table = Table::new(&["#", "ROUTE", "TAKES", "TO", "KEY"]);
    for (rank, place) in checked.table().order().enumerate() {
        let route = &checked.routes[place];
        let (to, key) = route.to.describe();
        let (rank, takes) = ((rank + 1).to_string(), route.matches.to_string());
        let key = match &route.lookup {
            None => key,
            Some(lookup) => format!("{key}, by lookup {}", lookup.name()),
        };
        table.row([rank, route.name.to_string(), takes, to, key]);
    }
    print!("{table}");
    println!(
        "{} can work: a request takes the first of these routes that fits it",
        args.file.display()
    );
    Ok(ExitCode::SUCCESS)
}

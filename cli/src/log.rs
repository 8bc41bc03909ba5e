//! Where logs go: stderr, as text for people or JSON for machines. `MANDOLINE_LOG` says how much, such as `info` or
//! `mandoline_assigner=debug,info`.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// What logs look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// A line of text each.
    Text,
    /// A JSON object each.
    Json,
}

/// Begins to log; `usual` is how much where `MANDOLINE_LOG` does not say.
pub(crate) fn start(format: LogFormat, usual: &str) -> Result<(), Failure> {
    let wanted = std::env::var("MANDOLINE_LOG").ok().filter(|text| !text.trim().is_empty());
    let filter =
        EnvFilter::builder().parse(wanted.as_deref().unwrap_or(usual)).map_err(|error| {
            Failure::new("MANDOLINE_LOG is no filter").because(error).try_this(
                "a level (error, warn, info, debug, trace), or mandoline_assigner=debug,info",
            )
        })?;
    let terminal = std::io::stderr().is_terminal();
    let base = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Where nobody reads the log any more it says so on the same pipe, which panics: whoever logs must live on.
        .log_internal_errors(false)
        .with_ansi(terminal);
    let done = match (format, terminal) {
        (LogFormat::Json, _) | (LogFormat::Auto, false) => base.json().try_init(),
        (LogFormat::Text, _) | (LogFormat::Auto, true) => base.try_init(),
    };
    done.map_err(|error| Failure::new("logging was started twice").because(error))
}

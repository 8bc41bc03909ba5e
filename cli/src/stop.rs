//! Stopping: the first Ctrl-C or SIGTERM asks everything to end in good order, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// Gives a token that is cancelled by Ctrl-C or SIGTERM. The watching task lives as long as the process.
pub(crate) fn on_signal() -> Result<CancellationToken, Failure> {
    let listen = |kind| {
        signal(kind).map_err(|error| Failure::new("cannot listen for signals").because(error))
    };
    let (mut interrupt, mut terminate) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let token = CancellationToken::new();
    let stop = token.clone();
    drop(tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            }
        };
        let which = next().await;
        stop.cancel();
        tracing::info!(signal = which, "Stopping: once more ends at once");
        next().await;
        // What a shell reports for a process that Ctrl-C ended.
        std::process::exit(130);
    }));
    Ok(token)
}

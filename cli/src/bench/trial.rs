//! How a bench runs: until it has found something, or is told to stop.

use crate::failure::Failure;
use crate::stop;

/// How a bench ends that was told to stop.
pub(crate) const STOPPED: u8 = 130;

/// Measures, and gives nothing when told to stop. Whichever way it ends, processes are killed with the handles that `measure` holds.
pub(crate) async fn until_stopped<T>(
    measure: impl Future<Output = anyhow::Result<T>>,
) -> Result<Option<T>, Failure> {
    let stop = stop::on_signal()?;
    tokio::select! {
        found = measure => found.map(Some).map_err(failed),
        () = stop.cancelled() => Ok(None),
    }
}

/// Says why nothing was found.
pub(crate) fn failed(error: anyhow::Error) -> Failure {
    Failure::new("the bench could not be run").because(format!("{error:#}"))
}

//! Where a proxy's sockets come from: from the service manager that holds them, from the process that serves now, or bound anew.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mandoline_proxy::config::Checked;
use mandoline_proxy::handover::{self, Offer, Taken};
use mandoline_proxy::sockets::Sockets;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::proxy::kept::Kept;
use crate::proxy::no_sockets;
use crate::proxy::settings::Settings;

/// How long a process that takes over may need to learn who serves what. Below the half minute for which the old one waits for it.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A proxy before it serves.
pub(crate) struct Standby {
    place: Option<PathBuf>,
    held: Option<Vec<TcpListener>>,
    taken: Option<Taken>,
}

impl Standby {
    /// Looks for sockets that listen already. Where another process serves from them, this waits until it can do as well: a process
    /// that cannot leaves the other as it is.
    pub(crate) async fn new(settings: &Settings, kept: &Kept) -> Result<Self, Failure> {
        let held = handover::from_manager().map_err(|error| {
            Failure::new("the service manager's sockets cannot be used").because(error)
        })?;
        let place = settings.handover().map(PathBuf::from);
        let taken = match (&held, &place) {
            (None, Some(path)) => handover::take(path).map_err(|error| {
                Failure::new(format!(
                    "the process that serves does not hand over at {}",
                    path.display()
                ))
                .because(error)
                .try_this("it goes on; stop it first, or look at its log")
            })?,
            _ => None,
        };
        if taken.is_some() {
            kept.ready(READY_WITHIN).await?;
        }
        Ok(Self { place, held, taken })
    }

    /// Gives the sockets to serve from.
    pub(crate) fn sockets(&mut self, config: &Checked) -> Result<Sockets, Failure> {
        let sockets = match (&mut self.taken, self.held.take()) {
            (Some(taken), _) => Sockets::take_over(config, std::mem::take(&mut taken.sockets)),
            (None, Some(held)) => Sockets::adopt(config, held),
            (None, None) => Sockets::bind(config),
        };
        sockets.map_err(no_sockets)
    }

    /// Tells the process that served until now that it may end, and lets the next one take over from this one.
    pub(crate) fn serves(
        self,
        sockets: Sockets,
        stop: &CancellationToken,
    ) -> Result<Option<Offer>, Failure> {
        let nobody = |path: &Path, error| {
            Failure::new(format!("nobody can take over at {}", path.display()))
                .because(error)
                .try_this("give --handover a file in a folder that exists and that this user may write to")
        };
        let place = self.place.as_deref();
        let prepared =
            place.map(|path| handover::prepare(path).map_err(|error| nobody(path, error)));
        let prepared = prepared.transpose()?;
        if let Some(taken) = self.taken {
            taken.serves().map_err(|error| {
                Failure::new("the process that served before did not wait").because(error)
            })?;
        }
        let (Some(path), Some(prepared)) = (place, prepared) else { return Ok(None) };
        prepared.offer(sockets, stop.clone()).map(Some).map_err(|error| nobody(path, error))
    }
}

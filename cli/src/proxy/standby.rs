//! Where a proxy's sockets come from: from the service manager that holds them, from the process that serves now, or bound anew.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use mandoline_proxy::config::Checked;
use mandoline_proxy::handover::{self, Offer, Taken};
use mandoline_proxy::sockets::Sockets;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::proxy::clerks::Clerks;
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
    pub(crate) async fn new(settings: &Settings, clerks: &Clerks) -> Result<Self, Failure> {
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
            clerks.ready(READY_WITHIN).await?;
        }
        Ok(Self { place, held, taken })
    }

    /// Gives the sockets to serve from.
    pub(crate) fn sockets(&mut self, config: &Checked) -> Result<Sockets, Failure> {
        let given = match &mut self.taken {
            Some(taken) => Some(std::mem::take(&mut taken.sockets)),
            None => self.held.take(),
        };
        match given {
            Some(given) => Sockets::adopt(config, given),
            None => Sockets::bind(config),
        }
        .map_err(no_sockets)
    }

    /// Tells the process that served until now that it may end, and lets the next one take over from this one.
    pub(crate) fn serves(
        self,
        sockets: Sockets,
        stop: &CancellationToken,
    ) -> Result<Option<Offer>, Failure> {
        if let Some(taken) = self.taken {
            taken.serves().map_err(|error| {
                Failure::new("the process that served before did not wait").because(error)
            })?;
        }
        let Some(path) = self.place else { return Ok(None) };
        let offer = handover::offer(&path, sockets, stop.clone());
        offer.map(Some).map_err(|error| {
            Failure::new(format!("nobody can take over at {}", path.display()))
                .because(error)
                .try_this("give --handover a file in a folder that exists and that this user may write to")
        })
    }
}

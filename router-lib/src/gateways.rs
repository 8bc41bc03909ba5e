//! The gateways of other regions, as one process knows them: which way a request goes, and who did not answer lately.
//!
//! What to decide is `mandoline_core::region`'s; this adds the clock, a lock for the few lines in which something changes, and a line
//! of log when a gateway goes or comes back. Only requests that leave the region take the lock.
//!
//! ```
//! use mandoline::gateways::Gateways;
//!
//! let gateways = ["us=gw1.us.example:8080".parse()?, "us=gw2.us.example:8080".parse()?];
//! let gateways = Gateways::new("eu".parse()?, gateways)?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

use std::error::Error;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mandoline_core::key::SliceKey;
use mandoline_core::task::{Address, SessionId, Task};
use mandoline_distributor::clock::Clock;
use tracing::{info, warn};

use mandoline_core::region::Links;
pub use mandoline_core::region::{
    Gateway, GatewayError, Link, Region, RegionError, Regions, RegionsError, Way,
};

use crate::snapshot::{Snapshot, Target};

/// The gateways of other regions. Clones are the same: what one learns of a gateway, all know.
#[derive(Clone)]
pub struct Gateways(Arc<Inner>);

struct Inner {
    regions: Regions,
    clock: Clock,
    known: Mutex<Known>,
}

struct Known {
    links: Links,
    lost: u64,
}

/// What became of requests that left the region, since the process began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayStats {
    /// Requests that no gateway of their region accepted.
    pub lost: u64,
    /// Each gateway, by region.
    pub gateways: Vec<(Gateway, Link)>,
}

impl Gateways {
    /// Takes the own region and the gateways of others, those of one region in any order.
    pub fn new(
        home: Region,
        gateways: impl IntoIterator<Item = Gateway>,
    ) -> Result<Self, RegionsError> {
        let regions = Regions::new(home, gateways)?;
        let known = Mutex::new(Known { links: Links::new(&regions), lost: 0 });
        Ok(Self(Arc::new(Inner { regions, clock: Clock::start(), known })))
    }

    /// Says whether two handles share what they learn.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Names the own region.
    pub fn home(&self) -> &Region {
        self.0.regions.home()
    }

    /// Says which way a request goes whose look-up found `task` among `replicas`, of which `failed` did not answer a moment ago.
    pub fn way<'a>(
        &'a self,
        task: &'a Arc<Task>,
        replicas: impl ExactSizeIterator<Item = &'a Arc<Task>> + Clone,
        failed: Option<SessionId>,
    ) -> Way<'a> {
        self.0.regions.way(task, replicas, failed)
    }

    /// Says which way a request goes whose look-up found `target`. A clerk that knows its own region has chosen by that, and a replica
    /// far away is meant: those at home are overloaded, or fail. `failed` did not answer a moment ago.
    pub fn way_of<'a, H: Deref<Target = Snapshot>>(
        &'a self,
        target: &'a Target<H>,
        failed: Option<SessionId>,
    ) -> Way<'a> {
        if target.is_by_region() && failed != Some(target.session()) {
            return self.way(target.task(), std::iter::once(target.task()), failed);
        }
        self.way(target.task(), target.replicas(), failed)
    }

    /// Says which gateway of a region a request is sent to, after those in `tried`; none, at once, while none of them answers. To
    /// be followed by `answered`, `failed` or, after the last, `lost`.
    pub fn next(&self, region: &Region, key: SliceKey, tried: &[Address]) -> Option<Gateway> {
        let Inner { regions, clock, .. } = &*self.0;
        let address = self.known().links.next(regions, region, key, tried, clock.now())?;
        Some(Gateway { region: region.clone(), address })
    }

    /// A gateway has accepted a request.
    pub fn answered(&self, gateway: &Gateway) {
        if self.known().links.answered(gateway) {
            info!(%gateway, "Gateway is back");
        }
    }

    /// A gateway did not accept a connection.
    pub fn failed(&self, gateway: &Gateway, error: &(dyn Error + 'static)) {
        if self.known().links.failed(gateway, self.0.clock.now()) {
            warn!(%gateway, error, "Gateway does not answer, and is passed over");
        }
    }

    /// No gateway of its region accepted a request.
    pub fn lost(&self) {
        self.known().lost += 1;
    }

    /// Gives what became of requests that left the region.
    pub fn stats(&self) -> GatewayStats {
        let known = self.known();
        let gateways = known.links.iter().map(|(gateway, link)| (gateway.clone(), link));
        GatewayStats { lost: known.lost, gateways: gateways.collect() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Gateways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gateways").field(&self.0.regions).finish()
    }
}

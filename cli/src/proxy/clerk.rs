//! What the clerk of a proxy's job is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;

use mandoline::Hub;
use mandoline::clerk::Clerk;
use mandoline::gateways::Region;
use mandoline_assigner::access::connector;
use mandoline_assigner::config::Access;
use mandoline_core::name::JobName;
use mandoline_core::task::Address;

use crate::failure::Failure;

/// What a clerk is told when it starts: one with the same order is the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClerkOrder {
    pub(crate) job: JobName,
    pub(crate) assigners: Vec<Address>,
    pub(crate) peers: Vec<Address>,
    pub(crate) zone: Option<String>,
    pub(crate) region: Option<Region>,
    pub(crate) cache: Option<PathBuf>,
    /// The address that requests come to, by which the assigner names the proxy.
    pub(crate) listen: SocketAddr,
}

impl ClerkOrder {
    /// Starts a clerk; one that asks nobody where it is to be idle.
    pub(crate) fn start(
        &self,
        access: &Access,
        hub: Option<&Hub>,
        is_idle: bool,
    ) -> Result<Clerk, Failure> {
        let failed = |error| Failure::new("the clerk did not start").caused_by(&error);
        if is_idle {
            return Clerk::follow_hub(&Hub::new(), self.job.clone()).map_err(failed);
        }
        let mut builder = Clerk::builder(self.job.clone())
            .sources(self.assigners.clone())
            .peers(self.peers.clone())
            .connector(connector(access))
            .named(format!("proxy {}", self.listen))
            .report_offered(true);
        if let Some(zone) = &self.zone {
            builder = builder.zone(zone.clone());
        }
        if let Some(region) = &self.region {
            builder = builder.region(region.to_string());
        }
        if let Some(path) = &self.cache {
            builder = builder.cache(path);
        }
        if let Some(hub) = hub {
            builder = builder.publish_to(hub.clone());
        }
        builder.start().map_err(failed)
    }
}

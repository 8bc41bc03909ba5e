//! What a proxy's configuration needs that runs beside it: the clerks of its jobs, whoever follows the flags, and who writes its access
//! log. Started when a configuration asks for it, kept over reloads as long as it asks for the same.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mandoline::Hub;
use mandoline::clerk::Clerk;
use mandoline::gateways::{Gateway, Gateways, Region};
use mandoline_assigner::access::connector;
use mandoline_assigner::config::Access;
use mandoline_core::flags::Flags;
use mandoline_core::name::JobName;
use mandoline_core::task::Address;
use mandoline_proxy::access_log::writer::{Place, Writer};
use mandoline_proxy::config::ProxyId;
use mandoline_proxy::config::transport::Transport;
use mandoline_proxy::lookup::{Limits, Lookup};
use mandoline_proxy::pauses::Pauses;
use mandoline_proxy::router::Router;
use mandoline_proxy::tables::{StartError, Table};
use mandoline_proxy::trace::Sink;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::failure::Failure;
use crate::proxy::flags::{FlagsOrder, Following};
use crate::proxy::otlp;
use crate::proxy::pools::{Pool, PoolFile};

/// What a clerk is told when it starts: one with the same order is the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) job: JobName,
    pub(crate) assigners: Vec<Address>,
    pub(crate) peers: Vec<Address>,
    pub(crate) zone: Option<String>,
    pub(crate) region: Option<Region>,
    pub(crate) cache: Option<PathBuf>,
    /// The address that requests come to, by which the assigner names the proxy.
    pub(crate) listen: SocketAddr,
}

/// The clerks that run, and the gateways that are known.
pub(crate) struct Clerks {
    access: Access,
    // Who may watch through this proxy, if anyone.
    hub: Option<Hub>,
    running: BTreeMap<JobName, (Order, Clerk)>,
    // Those of a configuration that was refused stay until another comes into force.
    pools: Vec<Running>,
    gateways: Option<(Region, Vec<Gateway>, Gateways)>,
    following: Option<Following>,
    // The proxy that goes by the flags, once it runs.
    pauses: Option<Pauses>,
    log: Option<(Place, Writer)>,
    traces: Option<(String, Sink)>,
    lookups: BTreeMap<Box<str>, (Table, Limits, Lookup)>,
    idle: bool,
}

/// A pool that runs, and what it was made from.
struct Running {
    name: JobName,
    file: PoolFile,
    transport: Transport,
    pool: Pool,
}

impl Clerks {
    pub(crate) fn new(access: Access, hub: Option<Hub>) -> Self {
        Self {
            access,
            hub,
            running: BTreeMap::new(),
            pools: Vec::new(),
            gateways: None,
            following: None,
            pauses: None,
            log: None,
            traces: None,
            lookups: BTreeMap::new(),
            idle: false,
        }
    }

    /// Asks nobody: for a look at a configuration.
    pub(crate) fn idle() -> Self {
        let access = Access { tls: None, token: None, insecure: false };
        Self { idle: true, ..Self::new(access, None) }
    }

    /// Gives the clerk for an order, a new one unless it runs.
    pub(crate) fn router(&mut self, order: Order) -> Result<Router, Failure> {
        if let Some((known, clerk)) = self.running.get(&order.job)
            && *known == order
        {
            return Ok(Router::new(clerk.clone()));
        }
        let clerk = self.start(&order)?;
        let router = Router::new(clerk.clone());
        self.running.insert(order.job.clone(), (order, clerk));
        Ok(router)
    }

    /// Gives a pool that runs: the one that does already, if nothing has changed.
    pub(crate) fn pool(
        &mut self,
        name: &JobName,
        file: &PoolFile,
        transport: &Transport,
    ) -> Result<&Pool, Failure> {
        let is_it = |known: &Running| {
            known.name == *name && known.file == *file && known.transport.is(transport)
        };
        let place = match self.pools.iter().position(is_it) {
            Some(place) => place,
            None => {
                let pool = Pool::start(name, file, transport, !self.idle)?;
                let (name, file, transport) = (name.clone(), file.clone(), transport.clone());
                self.pools.push(Running { name, file, transport, pool });
                self.pools.len() - 1
            }
        };
        Ok(&self.pools[place].pool)
    }

    fn start(&self, order: &Order) -> Result<Clerk, Failure> {
        let failed = |error| Failure::new("the clerk did not start").caused_by(&error);
        if self.idle {
            return Clerk::follow_hub(&Hub::new(), order.job.clone()).map_err(failed);
        }
        let mut builder = Clerk::builder(order.job.clone())
            .sources(order.assigners.clone())
            .peers(order.peers.clone())
            .connector(connector(&self.access))
            .named(format!("proxy {}", order.listen))
            .report_offered(true);
        if let Some(zone) = &order.zone {
            builder = builder.zone(zone.clone());
        }
        if let Some(region) = &order.region {
            builder = builder.region(region.to_string());
        }
        if let Some(path) = &order.cache {
            builder = builder.cache(path);
        }
        if let Some(hub) = &self.hub {
            builder = builder.publish_to(hub.clone());
        }
        builder.start().map_err(failed)
    }

    /// Gives what operators tell proxies, from whoever is asked already if nothing has changed.
    pub(crate) fn flags(
        &mut self,
        order: FlagsOrder,
    ) -> Result<watch::Receiver<Arc<Flags>>, Failure> {
        if self.idle {
            return Ok(watch::channel(Arc::default()).1);
        }
        if let Some(following) = self.following.as_ref().filter(|known| known.suits(&order)) {
            return Ok(following.flags());
        }
        let mut following = Following::start(order, &self.access, self.hub.as_ref())?;
        if let Some(pauses) = &self.pauses {
            following.tell_of(pauses.clone());
        }
        Ok(self.following.insert(following).flags())
    }

    /// Waits for a moment until the flags are known.
    pub(crate) async fn heard_flags(&self) {
        if let Some(following) = &self.following {
            following.heard().await;
        }
    }

    /// Says back how a proxy stands towards the flags, from now on.
    pub(crate) fn tell_of(&mut self, pauses: Pauses) {
        if let Some(following) = &mut self.following {
            following.tell_of(pauses.clone());
        }
        self.pauses = Some(pauses);
    }

    /// Lets go of all that runs, and says so to whoever would wait for it.
    pub(crate) async fn leave(self) {
        if let Some(following) = self.following {
            following.leave().await;
        }
    }

    /// Gives what is to be known of regions: the same handle as long as the same is asked for.
    pub(crate) fn gateways(
        &mut self,
        region: Option<Region>,
        given: Vec<Gateway>,
    ) -> Result<Option<Gateways>, Failure> {
        let Some(region) = region else {
            return match given.first() {
                None => Ok(None),
                Some(gateway) => Err(Failure::new(format!(
                    "gateway {gateway} is of another region than what? Give --region: the one that this proxy is in"
                ))),
            };
        };
        if let Some((home, known, gateways)) = &self.gateways
            && (home, known) == (&region, &given)
        {
            return Ok(Some(gateways.clone()));
        }
        let gateways = Gateways::new(region.clone(), given.clone())
            .map_err(|error| Failure::new("these gateways cannot be used").because(error))?;
        self.gateways = Some((region, given, gateways.clone()));
        Ok(Some(gateways))
    }

    /// Waits until each knows who serves what.
    pub(crate) async fn ready(&self, within: Duration) -> Result<(), Failure> {
        for (job, (_, clerk)) in &self.running {
            if timeout(within, clerk.ready()).await.is_err() {
                return Err(Failure::new(format!(
                    "nobody has told who serves job {job} for {within:?}"
                ))
                .because("the process that serves now knows, so it goes on")
                .try_this("see that an assigner answers, or give --cache"));
            }
        }
        Ok(())
    }

    /// Gives who writes the access log at a place: the same one as long as the place is the same.
    pub(crate) fn log(&mut self, place: &Place) -> Result<Writer, Failure> {
        if self.idle {
            return Ok(Writer::idle());
        }
        if let Some((known, writer)) = &self.log
            && known == place
        {
            return Ok(writer.clone());
        }
        let writer = Writer::open(place.clone()).map_err(|error| {
            Failure::new(format!("the access log {place} cannot be opened")).because(error)
        })?;
        self.log = Some((place.clone(), writer.clone()));
        Ok(writer)
    }

    /// Gives where spans go for a collector: the same as long as the collector is the same.
    pub(crate) fn sink(&mut self, collector: &str, id: &ProxyId) -> Result<Sink, Failure> {
        if let Some((known, sink)) = &self.traces
            && known == collector
        {
            return Ok(sink.clone());
        }
        let sink = otlp::start(collector, id.to_string())?;
        self.traces = Some((collector.to_owned(), sink.clone()));
        Ok(sink)
    }

    /// Gives what translates keys through a table: the same, with all that it knows, as long as the same is asked for.
    pub(crate) fn lookup(
        &mut self,
        name: &str,
        table: Table,
        limits: Limits,
    ) -> Result<Lookup, Failure> {
        table.check().map_err(not_started)?;
        if self.idle {
            return Ok(Lookup::idle(name, limits));
        }
        if let Some((known, known_limits, lookup)) = self.lookups.get(name)
            && known.is(&table)
            && *known_limits == limits
        {
            return Ok(lookup.clone());
        }
        let lookup = table.clone().start(name, limits).map_err(not_started)?;
        self.lookups.insert(name.into(), (table, limits, lookup.clone()));
        Ok(lookup)
    }

    /// Lets go of the lookups that are not among these.
    pub(crate) fn keep_lookups(&mut self, lookups: &BTreeMap<Box<str>, Lookup>) {
        self.lookups.retain(|name, _| lookups.contains_key(name));
    }

    /// Lets go of the clerks of jobs that are not among these.
    pub(crate) fn keep(&mut self, jobs: &BTreeMap<JobName, Router>) {
        self.running.retain(|job, _| jobs.contains_key(job));
        self.pools.retain(|Running { name, pool, .. }| {
            jobs.get(name).is_some_and(|router| router.is(&pool.router()))
        });
    }
}

fn not_started(error: StartError) -> Failure {
    match error {
        StartError::NotBuilt { what, feature } => {
            Failure::new(format!("this mandoline was built without {what}")).try_this(format!(
                "build one with it: cargo build --release -p mandoline-cli --features {feature}"
            ))
        }
        StartError::Thread(_) => Failure::new("the lookup did not start").caused_by(&error),
    }
}

//! What runs beside a proxy, as its configuration asks: the clerks of its jobs, its pools and lookups, whoever follows the flags, and who
//! writes its access log and traces. Started when it is asked for, and the same over reloads as long as the same is asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mandoline::Hub;
use mandoline::clerk::Clerk;
use mandoline::gateways::{Gateway, Gateways, Region};
use mandoline_assigner::config::Access;
use mandoline_core::flags::Flags;
use mandoline_core::name::JobName;
use mandoline_proxy::access_log::writer::{Output, Writer};
use mandoline_proxy::config::id::ProxyId;
use mandoline_proxy::config::transport::Transport;
use mandoline_proxy::lookup::{Limits, Lookup};
use mandoline_proxy::pauses::Pauses;
use mandoline_proxy::router::Router;
use mandoline_proxy::tables::{StartError, Table};
use mandoline_proxy::trace::Sink;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use crate::failure::Failure;
use crate::proxy::clerk::ClerkOrder;
use crate::proxy::flags::{FlagsOrder, Following};
use crate::proxy::otlp;
use crate::proxy::pools::{Pool, PoolFile};

/// What runs beside a proxy, and is the same as long as its configuration asks for the same.
pub(crate) struct Kept {
    access: Access,
    // Who may watch through this proxy, if anyone.
    hub: Option<Hub>,
    // The proxy that goes by the flags, once it runs.
    pauses: Option<Pauses>,
    parts: Parts,
    idle: bool,
}

/// What runs. A configuration that is refused leaves what ran before.
#[derive(Clone, Default)]
pub(crate) struct Parts {
    running: BTreeMap<JobName, (ClerkOrder, Clerk)>,
    pools: Vec<Arc<Running>>,
    gateways: Option<(Region, Vec<Gateway>, Gateways)>,
    following: Option<Arc<Following>>,
    log: Option<(Output, Writer)>,
    traces: Option<(String, Sink)>,
    lookups: BTreeMap<Box<str>, (Table, Limits, Lookup)>,
}

/// A pool that runs, and what it was made from.
struct Running {
    name: JobName,
    file: PoolFile,
    transport: Transport,
    pool: Pool,
}

impl Kept {
    pub(crate) fn new(access: Access, hub: Option<Hub>) -> Self {
        Self { access, hub, pauses: None, parts: Parts::default(), idle: false }
    }

    /// Asks nobody: for a look at a configuration.
    pub(crate) fn idle() -> Self {
        let access = Access { tls: None, token: None, insecure: false };
        Self { idle: true, ..Self::new(access, None) }
    }

    /// Gives the clerk for an order, a new one unless it runs.
    pub(crate) fn router(&mut self, order: ClerkOrder) -> Result<Router, Failure> {
        if let Some((known, clerk)) = self.parts.running.get(&order.job)
            && *known == order
        {
            return Ok(Router::new(clerk.clone()));
        }
        let clerk = order.start(&self.access, self.hub.as_ref(), self.idle)?;
        let router = Router::new(clerk.clone());
        self.parts.running.insert(order.job.clone(), (order, clerk));
        Ok(router)
    }

    /// Gives a pool that runs: the one that does already, if nothing has changed.
    pub(crate) fn pool(
        &mut self,
        name: &JobName,
        file: &PoolFile,
        transport: &Transport,
    ) -> Result<&Pool, Failure> {
        let is_it = |known: &Arc<Running>| {
            known.name == *name && known.file == *file && known.transport.is(transport)
        };
        let place = match self.parts.pools.iter().position(is_it) {
            Some(place) => place,
            None => {
                let pool = Pool::start(name, file, transport, !self.idle)?;
                let (name, file, transport) = (name.clone(), file.clone(), transport.clone());
                self.parts.pools.push(Arc::new(Running { name, file, transport, pool }));
                self.parts.pools.len() - 1
            }
        };
        Ok(&self.parts.pools[place].pool)
    }

    /// Gives what operators tell proxies, from whoever is asked already if nothing has changed.
    pub(crate) fn flags(
        &mut self,
        order: FlagsOrder,
    ) -> Result<watch::Receiver<Arc<Flags>>, Failure> {
        if self.idle {
            return Ok(watch::channel(Arc::default()).1);
        }
        if let Some(following) = self.parts.following.as_ref().filter(|known| known.suits(&order)) {
            return Ok(following.flags());
        }
        let following = Following::start(order, &self.access, self.hub.as_ref())?;
        if let Some(pauses) = &self.pauses {
            following.tell_of(pauses.clone());
        }
        Ok(self.parts.following.insert(Arc::new(following)).flags())
    }

    /// Waits for a moment until the flags are known.
    pub(crate) async fn heard_flags(&self) {
        if let Some(following) = &self.parts.following {
            following.heard().await;
        }
    }

    /// Says back how a proxy stands towards the flags, from now on.
    pub(crate) fn tell_of(&mut self, pauses: Pauses) {
        if let Some(following) = &self.parts.following {
            following.tell_of(pauses.clone());
        }
        self.pauses = Some(pauses);
    }

    /// Lets go of all that runs, and says so to whoever would wait for it.
    pub(crate) async fn leave(self) {
        if let Some(following) = self.parts.following.and_then(Arc::into_inner) {
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
        if let Some((home, known, gateways)) = &self.parts.gateways
            && (home, known) == (&region, &given)
        {
            return Ok(Some(gateways.clone()));
        }
        let gateways = Gateways::new(region.clone(), given.clone())
            .map_err(|error| Failure::new("these gateways cannot be used").because(error))?;
        self.parts.gateways = Some((region, given, gateways.clone()));
        Ok(Some(gateways))
    }

    /// Gives what runs now, to go back to.
    pub(crate) fn parts(&self) -> Parts {
        self.parts.clone()
    }

    /// Goes back to what ran, and lets go of what was started since.
    pub(crate) fn go_back(&mut self, parts: Parts) {
        self.parts = parts;
    }

    /// Waits until those know who serves what that take the place of one that knew.
    pub(crate) async fn ready_in_place_of(
        &self,
        before: &Parts,
        within: Duration,
    ) -> Result<(), Failure> {
        let until = Instant::now() + within;
        for (job, (order, clerk)) in &self.parts.running {
            let known = before.running.get(job).filter(|(known, _)| known != order);
            let Some((_, known)) = known else { continue };
            if known.assignment().is_some() && timeout_at(until, clerk.ready()).await.is_err() {
                return Err(Failure::new(format!(
                    "nobody has told who serves job {job} for {within:?}, with what this configuration says of whom to ask"
                ))
                .try_this("see that those who are named as assigners answer, then reload again"));
            }
        }
        Ok(())
    }

    /// Waits until each knows who serves what.
    pub(crate) async fn ready(&self, within: Duration) -> Result<(), Failure> {
        for (job, (_, clerk)) in &self.parts.running {
            if timeout(within, clerk.ready()).await.is_err() {
                return Err(Failure::new(format!(
                    "nobody has told who serves job {job} for {within:?}"
                ))
                .because("the process that serves now goes on")
                .try_this("see that an assigner answers, or give --cache: what is not known here would not be served"));
            }
        }
        Ok(())
    }

    /// Gives who writes the access log to an output: the same one as long as that is the same.
    pub(crate) fn log(&mut self, output: &Output) -> Result<Writer, Failure> {
        if self.idle {
            return Ok(Writer::idle());
        }
        if let Some((known, writer)) = &self.parts.log
            && known == output
        {
            return Ok(writer.clone());
        }
        let writer = Writer::open(output.clone()).map_err(|error| {
            Failure::new(format!("the access log {output} cannot be opened")).because(error)
        })?;
        self.parts.log = Some((output.clone(), writer.clone()));
        Ok(writer)
    }

    /// Gives where spans go for a collector: the same as long as the collector is the same.
    pub(crate) fn sink(&mut self, collector: &str, id: &ProxyId) -> Result<Sink, Failure> {
        if let Some((known, sink)) = &self.parts.traces
            && known == collector
        {
            return Ok(sink.clone());
        }
        let sink = otlp::start(collector, id.to_string())?;
        self.parts.traces = Some((collector.to_owned(), sink.clone()));
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
        if let Some((known, known_limits, lookup)) = self.parts.lookups.get(name)
            && known.is(&table)
            && *known_limits == limits
        {
            return Ok(lookup.clone());
        }
        let lookup = table.clone().start(name, limits).map_err(not_started)?;
        self.parts.lookups.insert(name.into(), (table, limits, lookup.clone()));
        Ok(lookup)
    }

    /// Lets go of the lookups that are not among these.
    pub(crate) fn keep_lookups(&mut self, lookups: &BTreeMap<Box<str>, Lookup>) {
        self.parts.lookups.retain(|name, _| lookups.contains_key(name));
    }

    /// Lets go of the clerks of jobs that are not among these.
    pub(crate) fn keep(&mut self, jobs: &BTreeMap<JobName, Router>) {
        self.parts.running.retain(|job, _| jobs.contains_key(job));
        self.parts.pools.retain(|known| {
            jobs.get(&known.name).is_some_and(|router| router.is(&known.pool.router()))
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

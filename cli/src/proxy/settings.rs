//! What flags, environment and file say together, and the configuration that a proxy makes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use mandoline::http::key::KeyFrom;
use mandoline_assigner::config::Access;
use mandoline_core::name::JobName;
use mandoline_proxy::config::error::ConfigError;
use mandoline_proxy::config::id::ProxyId;
use mandoline_proxy::config::listener::{Address, Listener};
use mandoline_proxy::config::matching::{Ambiguous, Match};
use mandoline_proxy::config::route::{Destination, Route};
use mandoline_proxy::config::transport::Transport;
use mandoline_proxy::config::{Checked, Config};
use mandoline_proxy::lookup::Lookup;
use mandoline_proxy::router::Router;
use serde_saphyr::Spanned;

use crate::failure::Failure;
use crate::file::{self, closest};
use crate::proxy::ProxyArgs;
use crate::proxy::clerk::ClerkOrder;
use crate::proxy::file::forwarded::ForwardedFile;
use crate::proxy::file::observe::DebugFile;
use crate::proxy::file::route::RouteFile;
use crate::proxy::flags::FlagsOrder;
use crate::proxy::kept::Kept;
use crate::proxy::lookups::LookupName;
use crate::proxy::pools::PoolFile;
use crate::task::{default_assigners, demo_job};
use crate::text::{Text, overlay, plain};
use crate::units::{Size, Span};

/// What flags, environment and file say together.
pub(crate) struct Settings {
    args: ProxyArgs,
    /// The file, for messages.
    name: Option<PathBuf>,
}

/// A pool of the file, and how its servers are spoken to.
struct Pool<'a> {
    name: &'a JobName,
    file: &'a Spanned<PoolFile>,
    transport: Transport,
}

impl Settings {
    /// Reads the file, if there is one. Flags and environment win over it.
    pub(crate) fn of(mut args: ProxyArgs) -> Result<Self, Failure> {
        let name = args.config.clone();
        if let Some(path) = &name {
            let from_file: ProxyArgs = file::read(path)?;
            overlay!(
                args, from_file;
                listen, listeners, admin, job, key, assigners, watch_peers, watch_listen, region, gateways, cache,
                workers, hold_wait, hold_requests, hold_bytes, zone, max_staleness, id, handover,
                routes, jobs, pools, lookups, timeouts, limits, pauses, access_log, debug, traces, forwarded,
            );
            args.access.overlay(from_file.access);
        }
        args.id.get_or_insert_with(|| Text(ProxyId::random()));
        let settings = Self { args, name };
        settings.routes_or_job()?;
        Ok(settings)
    }

    /// Refuses a configuration that says two things of where requests come in or go.
    fn routes_or_job(&self) -> Result<(), Failure> {
        let ProxyArgs { routes, job, key, cache, listen, listeners, .. } = &self.args;
        if listen.is_some() && listeners.is_some() {
            return Err(Failure::new("both listen and listeners are given")
                .try_this("put the address among the listeners"));
        }
        let single = [("job", job.is_some()), ("key", key.is_some()), ("cache", cache.is_some())];
        match (routes, single.iter().find(|(_, given)| *given)) {
            (Some(_), Some((what, _))) => Err(Failure::new(format!(
                "both routes and {what} are given"
            ))
            .try_this(
                "give each route its job and key, and a job's cache under jobs, or have no routes",
            )),
            (Some(routes), None) if routes.is_empty() => Err(Failure::new("routes is empty")
                .try_this("give at least one route, or leave routes out for one job")),
            _ => Ok(()),
        }
    }

    /// Gives the first address with a port, by which others name the proxy.
    pub(crate) fn listen(&self) -> SocketAddr {
        let ported = self.listeners().into_iter().find_map(|listener| match listener.address {
            Address::Tcp(address) => Some(address),
            Address::Unix { .. } => None,
        });
        ported.unwrap_or_else(|| local(None, 8080))
    }

    /// Gives every place where requests come in.
    pub(crate) fn listeners(&self) -> Vec<Listener> {
        match &self.args.listeners {
            Some(listeners) => listeners.iter().map(|one| one.listener(self.beside())).collect(),
            None => vec![local(self.args.listen.as_ref(), 8080).into()],
        }
    }

    /// The folder of the file, in which other files are looked for.
    fn beside(&self) -> &Path {
        self.name.as_deref().and_then(Path::parent).unwrap_or_else(|| Path::new(""))
    }

    pub(crate) fn id(&self) -> ProxyId {
        let Text(id) = self.args.id.as_ref().expect("one was drawn if none was given");
        id.clone()
    }

    /// Where the next process takes over from this one.
    pub(crate) fn handover(&self) -> Option<&Path> {
        self.args.handover.as_deref()
    }

    pub(crate) fn watch_listen(&self) -> Option<SocketAddr> {
        self.args.watch_listen.as_ref().map(|Text(address)| *address)
    }

    pub(crate) fn access(&self) -> Result<Access, Failure> {
        self.args.access.load()
    }

    /// Names what differs from the settings that the proxy was started with and only a restart can change, beside what the proxy itself
    /// sees to.
    pub(crate) fn fixed(&self, started: &Self) -> Option<&'static str> {
        let (old, new) = (&started.args, &self.args);
        let changes = [
            ("watch_listen", started.watch_listen() != self.watch_listen()),
            ("handover", old.handover != new.handover),
            ("tls_cert", old.access.tls_cert != new.access.tls_cert),
            ("tls_key", old.access.tls_key != new.access.tls_key),
            ("tls_ca", old.access.tls_ca != new.access.tls_ca),
            ("token_file", old.access.token_file != new.access.token_file),
            ("insecure", old.access.insecure != new.access.insecure),
        ];
        changes.into_iter().find_map(|(what, changed)| changed.then_some(what))
    }

    /// Names the jobs and pools, for messages.
    pub(crate) fn jobs(&self) -> String {
        let jobs = self.job_names().into_iter().map(|job| format!("job {job}"));
        let pools = self.args.pools.iter().flatten().map(|(pool, _)| format!("pool {pool}"));
        jobs.chain(pools).collect::<Vec<String>>().join(", ")
    }

    fn job_names(&self) -> BTreeSet<JobName> {
        match &self.args.routes {
            Some(routes) => routes.iter().filter_map(|route| route.value.job().cloned()).collect(),
            None => [self.job()].into(),
        }
    }

    fn job(&self) -> JobName {
        self.args.job.clone().map_or_else(demo_job, |Text(job)| job)
    }

    /// Makes the configuration, and starts what it needs beside it.
    pub(crate) fn config(&self, kept: &mut Kept) -> Result<Config, Failure> {
        let args = &self.args;
        let region = args.region.clone().map(|Text(region)| region);
        let gateways = plain(args.gateways.clone().unwrap_or_default());
        let gateways = kept.gateways(region, gateways)?;
        let lookups = self.lookups(kept)?;
        let routes = self.routes(&lookups)?;
        let jobs = self.job_names().into_iter().map(|job| {
            let router = kept.router(self.order(job.clone()))?;
            Ok((job, router))
        });
        let mut jobs: BTreeMap<JobName, Router> = jobs.collect::<Result<_, Failure>>()?;
        let mut pools = Vec::new();
        for Pool { name, file: pool, transport } in self.pools()? {
            if jobs.contains_key(name) {
                return Err(Failure::new(format!("there are a job and a pool called {name}"))
                    .at(self.place(pool))
                    .try_this("call the pool something else"));
            }
            let runs = kept.pool(name, &pool.value, &transport);
            let runs = runs.map_err(|failure| failure.at(self.place(pool)))?;
            jobs.insert(name.clone(), runs.router());
            pools.push((name.clone(), transport, runs.servers()));
        }
        let mut config = Config::with(self.listen(), jobs, routes);
        config.listeners = self.listeners();
        config.lookups = lookups;
        config.flags = kept.flags(self.flags_order())?;
        config.admin = Some(local(args.admin.as_ref(), 7480));
        config.gateways = gateways;
        config.max_staleness = args.max_staleness.map(|Span(most)| most);
        if let Some(workers) = args.workers {
            config.workers = workers;
        }
        config.id = self.id();
        for (Text(job), own) in args.jobs.iter().flatten() {
            config.transports.insert(job.clone(), own.transport(self.beside())?);
        }
        for (pool, transport, servers) in pools {
            config.transports.insert(pool.clone(), transport);
            config.pools.insert(pool, servers);
        }
        if let Some(timeouts) = args.timeouts {
            timeouts.apply(&mut config.timeouts);
        }
        if let Some(limits) = args.limits {
            limits.apply(&mut config.limits);
        }
        if let Some(pauses) = &args.pauses {
            pauses.apply(&mut config, self.beside())?;
        }
        if let Some(log) = &args.access_log {
            let writer = kept.log(log.output())?;
            config.access_log = Some(log.access_log(writer, |text| self.place(text))?);
        }
        if let Some(traces) = &args.traces {
            let sink = kept.sink(&traces.otlp, &self.id())?;
            config.traces = Some(traces.traces(sink)?);
        }
        config.forwarded =
            args.forwarded.as_ref().map(ForwardedFile::forwarded).unwrap_or_default();
        config.debug = args.debug.as_ref().map(DebugFile::debug);
        if let Some(Span(wait)) = args.hold_wait {
            config.timeouts.hold = wait;
        }
        if let Some(requests) = args.hold_requests {
            config.limits.held_requests = requests;
        }
        if let Some(Size(bytes)) = args.hold_bytes {
            config.limits.held_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        Ok(config)
    }

    /// Gives the pools and how their servers are spoken to, once it is clear that routes lead to no other.
    fn pools(&self) -> Result<Vec<Pool<'_>>, Failure> {
        let pools = || self.args.pools.iter().flatten().map(|(Text(name), pool)| (name, pool));
        let names: Vec<&str> = pools().map(|(name, _)| name.as_str()).collect();
        for route in self.args.routes.iter().flatten() {
            let unknown = route.value.pool().filter(|pool| !names.contains(&pool.as_str()));
            let Some(pool) = unknown else { continue };
            let failure = Failure::new(format!("there is no pool {pool}")).at(self.place(route));
            return Err(match closest(pool.as_str(), &names) {
                Some(meant) => failure.try_this(format!("did you mean {meant:?}?")),
                None => failure.try_this("name its servers under pools"),
            });
        }
        let spoken = pools().map(|(name, pool)| {
            let transport = pool.value.transport(self.beside());
            let transport = transport.map_err(|failure| failure.at(self.place(pool)))?;
            Ok(Pool { name, file: pool, transport })
        });
        spoken.collect()
    }

    fn order(&self, job: JobName) -> ClerkOrder {
        let args = &self.args;
        let cache = match &args.routes {
            None => args.cache.clone(),
            Some(_) => {
                let own = args.jobs.as_ref().and_then(|jobs| jobs.get(&Text(job.clone())));
                own.and_then(|own| own.cache.clone())
            }
        };
        ClerkOrder {
            job,
            assigners: args.assigners.clone().map_or_else(default_assigners, plain),
            peers: args.watch_peers.clone().map_or_else(Vec::new, plain),
            zone: args.zone.clone(),
            region: args.region.clone().map(|Text(region)| region),
            cache,
            listen: self.listen(),
        }
    }

    fn flags_order(&self) -> FlagsOrder {
        let args = &self.args;
        let given = args.pauses.as_ref().and_then(|pauses| pauses.cache.clone());
        // Beside the assignment of the one job, where that is kept.
        let beside = args.cache.as_ref().map(|path| path.with_added_extension("flags"));
        FlagsOrder {
            assigners: args.assigners.clone().map_or_else(default_assigners, plain),
            cache: given.or(beside),
            name: format!("proxy {}", self.listen()),
        }
    }

    fn lookups(&self, kept: &mut Kept) -> Result<BTreeMap<Box<str>, Lookup>, Failure> {
        let made = self.args.lookups.iter().flatten().map(|(Text(LookupName(name)), file)| {
            let at = |failure: Failure| failure.at(self.place(file));
            let limits = file.value.limits().map_err(at)?;
            let table = file.value.table(self.beside()).map_err(at)?;
            Ok((name.clone(), kept.lookup(name, table, limits).map_err(at)?))
        });
        made.collect()
    }

    /// Finds what translates the keys of a route.
    fn lookup_of(
        &self,
        route: &RouteFile,
        lookups: &BTreeMap<Box<str>, Lookup>,
    ) -> Result<Option<Lookup>, Failure> {
        let Some(name) = route.lookup() else { return Ok(None) };
        if let Some(lookup) = lookups.get(name.value.as_str()) {
            return Ok(Some(lookup.clone()));
        }
        let known: Vec<&str> = lookups.keys().map(|name| &**name).collect();
        let failure = Failure::new(format!("there is no lookup {:?}", name.value));
        let failure = match known.is_empty() {
            true => failure.because("the file has no lookups"),
            false => failure.because(format!("the lookups are {}", known.join(", "))),
        };
        Err(match closest(&name.value, &known) {
            Some(meant) => failure.try_this(format!("did you mean {meant:?}?")),
            None => failure,
        }
        .at(self.place(name)))
    }

    fn routes(&self, lookups: &BTreeMap<Box<str>, Lookup>) -> Result<Vec<Route>, Failure> {
        let Some(routes) = &self.args.routes else {
            let job = self.job();
            let key = self.args.key.clone().map_or_else(|| KeyFrom::path(1), |Text(key)| key);
            let name = job.as_str().into();
            let to = Destination::Job { job, key };
            return Ok(vec![Route { name, ..Route::new(Match::default(), to) }]);
        };
        let mut made: Vec<Route> = Vec::with_capacity(routes.len());
        for route in routes {
            let mut one = route.value.route().map_err(|failure| failure.at(self.place(route)))?;
            one.lookup = self.lookup_of(&route.value, lookups)?;
            if let Some(earlier) = made.iter().position(|earlier| earlier.name == one.name)
                && earlier_differs(&made[earlier], &one)
            {
                let place = self.place(&routes[earlier]);
                return Err(Failure::new(format!("two routes are called {:?}", one.name))
                    .because(format!("the other is at {place}"))
                    .at(self.place(route)));
            }
            made.push(one);
        }
        Ok(made)
    }

    /// Says where in the file something is.
    fn place<T>(&self, what: &Spanned<T>) -> String {
        let name = self.name.as_ref().map_or_else(|| "-".into(), |path| path.display().to_string());
        format!("{name}:{}:{}", what.referenced.line(), what.referenced.column())
    }

    /// Checks what was made of it; where two routes are to blame, it says where both are.
    pub(crate) fn check(&self, config: Config) -> Result<Checked, Failure> {
        config.check().map_err(|error| self.explain(&error))
    }

    /// Says in words, and with places of the file, why a configuration cannot work.
    pub(crate) fn explain(&self, error: &ConfigError) -> Failure {
        let failure = Failure::new("the configuration cannot work").because(error);
        match (error, &self.args.routes) {
            (ConfigError::Ambiguous(Ambiguous { first, second, .. }), Some(routes)) => {
                let (one, other) =
                    (self.place(&routes[first - 1]), self.place(&routes[second - 1]));
                Failure::new(error).because(format!("one is at {one}")).at(other)
            }
            _ => failure,
        }
    }
}

/// Two routes that are one by all they say have no names to blame.
fn earlier_differs(earlier: &Route, later: &Route) -> bool {
    earlier.matches != later.matches
}

fn local(given: Option<&Text<SocketAddr>>, port: u16) -> SocketAddr {
    given.map_or_else(|| SocketAddr::from(([127, 0, 0, 1], port)), |Text(address)| *address)
}

//! Fixed pools: servers that the configuration names and that nobody shards. Each is a job of this proxy's own, whose assignment is made
//! here: every healthy server serves every key. So the choice among servers, outliers, second tries, connections and metrics are
//! those of jobs, and there is one way to forward.

use std::future::pending;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mandoline::Hub;
use mandoline::clerk::Clerk;
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::generation::Generation;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{Address, SessionId, Task, TaskInfo};
use mandoline_proxy::config::tls::Tls;
use mandoline_proxy::config::transport::{Protocol, Transport};
use mandoline_proxy::router::Router;
use mandoline_proxy::servers::{Server, Servers};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::agent::check::Check;
use crate::agent::judge::{Judge, Limits};
use crate::failure::Failure;
use crate::proxy::file::job::{self, TaskTlsFile};
use crate::text::{Text, plain};
use crate::units::Span;

/// Servers that the file names.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct PoolFile {
    servers: Vec<Text<Address>>,
    health: Option<HealthFile>,
    protocol: Option<Text<Protocol>>,
    tls: Option<TaskTlsFile>,
}

/// How servers are asked whether they are healthy.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct HealthFile {
    check: Text<Check>,
    every: Option<Span>,
    within: Option<Span>,
    good: Option<u32>,
    bad: Option<u32>,
}

/// How often a server is asked unless the file says so: as often as HAProxy and Envoy's examples do within a factor of two.
const EVERY: Duration = Duration::from_secs(5);
/// How long it may take to answer.
const WITHIN: Duration = Duration::from_secs(2);
/// So many good answers in a row make a server healthy, so many bad ones end that.
const GOOD: u32 = 1;
const BAD: u32 = 3;
/// With less than one of so many healthy, all are asked: then it is most likely the checks that are wrong, and some answer is better
/// than none (Envoy's panic threshold, a half).
const PANIC: usize = 2;

/// A pool that runs: its servers are watched for as long as this lives.
pub(crate) struct Pool {
    router: Router,
    servers: watch::Receiver<Arc<Servers>>,
    // Ends with it.
    _checks: JoinSet<()>,
}

/// A pool's servers, and who is told how they are.
struct Desk {
    pool: JobName,
    servers: Servers,
    number: u64,
    hub: Hub,
    tell: watch::Sender<Arc<Servers>>,
}

impl PoolFile {
    /// Reads how its servers are spoken to. Files are looked for beside the configuration's.
    pub(crate) fn transport(&self, beside: &Path) -> Result<Transport, Failure> {
        job::transport(self.protocol.as_ref(), self.tls.as_ref(), beside)
    }
}

impl Pool {
    /// Starts to watch a pool's servers, unless nobody is to be asked. All count as healthy until they have shown that they are not.
    pub(crate) fn start(
        pool: &JobName,
        file: &PoolFile,
        transport: &Transport,
        asks: bool,
    ) -> Result<Self, Failure> {
        let addresses = plain(file.servers.clone());
        if addresses.is_empty() {
            return Err(Failure::new(format!("pool {pool} has no servers"))
                .try_this("give at least one, such as servers: ['10.0.0.7:8080']"));
        }
        if let Some(twice) = twice(&addresses) {
            return Err(Failure::new(format!("pool {pool} has the server {twice} twice")));
        }
        let rounds = file.health.as_ref().map(|health| health.rounds(pool)).transpose()?;
        let hub = Hub::new();
        let clerk = Clerk::follow_hub(&hub, pool.clone()).map_err(|error| {
            Failure::new(format!("pool {pool} did not start")).caused_by(&error)
        })?;
        let servers = addresses.into_iter().map(|address| Server { address, fault: None });
        let servers = Servers { servers: servers.collect(), is_panic: false };
        let (tell, told) = watch::channel(Arc::default());
        let mut desk = Desk { pool: pool.clone(), servers, number: 0, hub, tell };
        desk.tell();
        let mut checks = JoinSet::new();
        match rounds.filter(|_| asks) {
            Some(rounds) => checks.spawn(watch_health(desk, rounds, transport.tls.clone())),
            // Nothing will change, but those who follow would take a hub that is gone for the end.
            None => checks.spawn(async move {
                let _desk = desk;
                pending::<()>().await;
            }),
        };
        Ok(Self { router: Router::new(clerk), servers: told, _checks: checks })
    }

    pub(crate) fn router(&self) -> Router {
        self.router.clone()
    }

    /// Gives how its servers are, now and from now on.
    pub(crate) fn servers(&self) -> watch::Receiver<Arc<Servers>> {
        self.servers.clone()
    }
}

fn twice(addresses: &[Address]) -> Option<&Address> {
    addresses.iter().enumerate().find(|(n, one)| addresses[..*n].contains(one)).map(|(_, one)| one)
}

/// When to ask what.
#[derive(Clone)]
struct Rounds {
    check: Check,
    every: Duration,
    within: Duration,
    limits: Limits,
}

impl HealthFile {
    fn rounds(&self, pool: &JobName) -> Result<Rounds, Failure> {
        let span = |given: Option<Span>, usual| given.map_or(usual, |Span(length)| length);
        let Text(check) = self.check.clone();
        let (every, within) = (span(self.every, EVERY), span(self.within, WITHIN));
        let limits = Limits { good: self.good.unwrap_or(GOOD), bad: self.bad.unwrap_or(BAD) };
        let refuse = |why| Err(Failure::new(format!("the health checks of pool {pool}: {why}")));
        if every.is_zero() || within.is_zero() {
            return refuse("every and within are longer than 0s");
        }
        if limits.good == 0 || limits.bad == 0 {
            return refuse("good and bad are at least 1");
        }
        Ok(Rounds { check, every, within, limits })
    }
}

/// Asks every server again and again, each in its own time.
async fn watch_health(mut desk: Desk, rounds: Rounds, tls: Option<Arc<Tls>>) {
    let servers = desk.servers.servers.iter().map(|server| server.address.clone());
    let (tell, mut told) = mpsc::channel(desk.servers.servers.len());
    let mut checks = JoinSet::new();
    for (place, server) in servers.enumerate() {
        let (rounds, tls, tell) = (rounds.clone(), tls.clone(), tell.clone());
        checks.spawn(async move {
            let mut tick = interval(rounds.every);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut judge = Judge::healthy(rounds.limits);
            loop {
                tick.tick().await;
                let asked = rounds.check.ask_by(&server, tls.as_ref(), rounds.within).await;
                let is_healthy = judge.hear(asked.is_ok());
                if tell.send((place, is_healthy, asked.err())).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(tell);
    while let Some((place, is_healthy, why)) = told.recv().await {
        desk.hear(place, is_healthy, why);
    }
}

impl Desk {
    /// Takes in what a server counts as, and what its last check had to say.
    fn hear(&mut self, place: usize, is_healthy: bool, why: Option<String>) {
        let server = &mut self.servers.servers[place];
        let fault = match (is_healthy, why) {
            (true, _) => None,
            // The check was good, but not often enough in a row.
            (false, None) => server.fault.clone(),
            (false, why) => why,
        };
        if server.fault.is_none() == fault.is_none() {
            return;
        }
        let (pool, address) = (&self.pool, &server.address);
        match &fault {
            Some(why) => warn!(%pool, server = %address, why, "A server of a pool is not healthy"),
            None => info!(%pool, server = %address, "A server of a pool is healthy again"),
        }
        server.fault = fault;
        self.tell();
    }

    /// Has requests go to the servers that are healthy; to all where hardly any is.
    fn tell(&mut self) {
        let Servers { servers, is_panic } = &mut self.servers;
        let healthy = servers.iter().filter(|server| server.fault.is_none()).count();
        let was_panic = std::mem::replace(is_panic, healthy * PANIC < servers.len());
        match (was_panic, *is_panic) {
            (false, true) => {
                warn!(pool = %self.pool, healthy, "Few servers of a pool are healthy: all of them are asked");
            }
            (true, false) => {
                info!(pool = %self.pool, healthy, "Healthy servers alone are asked again");
            }
            _ => {}
        }
        self.number += 1;
        let generation = |number| Generation { incarnation: 1, number };
        let mut assignment = Assignment::new(self.pool.clone(), generation(self.number));
        let mut replicas = Vec::new();
        for Server { address, fault } in &*servers {
            let session = session(&self.pool, address);
            let info = TaskInfo::new(name(address), 1, address.clone());
            assignment.tasks.insert(session, Arc::new(Task::new(session, info)));
            if *is_panic || fault.is_none() {
                replicas.push(Replica { session, since: generation(1) });
            }
        }
        let replicas: Replicas = replicas.into_iter().collect();
        assignment.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
        self.hub.publish(Arc::new(assignment), None);
        self.tell.send_replace(Arc::new(self.servers.clone()));
    }
}

/// A number for a server that no session of a cluster has: those are counted from one.
fn session(pool: &JobName, address: &Address) -> SessionId {
    let mut hasher = DefaultHasher::new();
    (pool.as_str(), address.as_str()).hash(&mut hasher);
    SessionId(hasher.finish() | 1 << 63)
}

/// A name that tasks may have, of an address that may have other letters.
fn name(address: &Address) -> TaskName {
    let fits = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let name: String = address.as_str().chars().map(fits).take(NAME_MAX_BYTES).collect();
    format!("s{name}").parse().expect("letters, digits, dots and dashes are a name")
}

/// Leaves room for the letter that names begin with.
const NAME_MAX_BYTES: usize = 62;

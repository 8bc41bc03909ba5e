//! One node, put together: consensus, the hub that it feeds, the leader's loop, and two ports; and the order in which that
//! stops.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::task::Address;
use mandoline_distributor::hub::Hub;
use mandoline_distributor::serve::{FlagsService, WatchService};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tracing::{info, warn};

use crate::access::{Guard, connector, transport};
use crate::api::admin::AdminService;
use crate::api::feed::{self, Teller};
use crate::api::gate;
use crate::api::proxies::ProxyService;
use crate::api::task::TaskService;
use crate::config::{Config, ConfigError, Seat, Start};
use crate::http::{self, Check, Pages};
use crate::metrics::{JobLabels, Metrics, render};
use crate::node::{Changes, Node, listener};
use crate::raft::config::{Config as RaftConfig, FirstStart, Snapshots, Timings};
use crate::raft::disk::Storage;
use crate::raft::types::Member;
use crate::raft::{self, Consensus, Role};
use crate::server::{ServeError, serve};
use crate::sessions::Sessions;

/// The sockets of a node, bound by whoever starts it, who can say best what to do about a port that is taken.
#[derive(Debug)]
pub struct Listeners {
    /// For callers and operators.
    pub client: TcpListener,
    /// For peers.
    pub peer: TcpListener,
}

/// A node under way. Ends when the token that it was given is cancelled: await `finished`.
#[derive(Debug)]
pub struct Assigner {
    client: SocketAddr,
    peer: SocketAddr,
    consensus: Consensus,
    hub: Hub,
    stop: CancellationToken,
    // Ends what serves, once leadership is handed over.
    closing: CancellationToken,
    servers: [JoinHandle<Result<(), ServeError>>; 2],
    leader: JoinHandle<()>,
    streams: TaskTracker,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration cannot be right.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A socket is of no use.
    #[error("a socket cannot be used")]
    Socket(#[from] std::io::Error),
    /// The disk, or what it says of the cluster.
    #[error(transparent)]
    Raft(#[from] raft::start::StartError),
}

/// Why a node ended that nobody told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its disk or its place in the cluster.
    #[error(transparent)]
    Raft(#[from] raft::Failure),
    /// A port.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A bug.
    #[error("a part of the node has panicked")]
    Panicked,
}

impl Assigner {
    /// Starts a node. It serves when this returns, though it may take a while to become a member.
    pub async fn start(
        config: Config,
        listeners: Listeners,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        config.check()?;
        if config.access.insecure {
            warn!(listen = %config.listen, "Insecure: no token and no TLS is asked for, whoever reaches this commands it");
        }
        let (client, peer) = (listeners.client.local_addr()?, listeners.peer.local_addr()?);
        let seat = config.advertise.clone().unwrap_or_else(|| seat(client, peer));
        let (hub, changes) = (Hub::new(), Changes::default());
        // Stopped by hand: it hands leadership over before anything else ends.
        let own = CancellationToken::new();
        let consensus = Consensus::start(
            raft_config(&config, &seat),
            listener(hub.clone(), changes.clone()),
            own,
        )
        .await?;

        let access = Arc::new(config.access);
        let (closing, streams) = (CancellationToken::new(), TaskTracker::new());
        let (sessions, metrics) = (Sessions::default(), Metrics::default());
        let (node, leader) = Node::new(consensus.clone(), sessions.clone(), changes);
        let guard = Guard::new(&access);
        let tasks = TaskService::new(
            consensus.clone(),
            hub.clone(),
            node.clone(),
            sessions.clone(),
            streams.clone(),
            closing.clone(),
        );
        let (connector, counted) = (connector(&access), metrics.clone());
        let admin = AdminService::new(consensus.clone(), node.clone(), connector, counted);
        let watch = WatchService::new(hub.clone(), closing.clone());
        let flags = FlagsService::new(hub.clone(), closing.clone());
        let proxies = ProxyService::new(consensus.clone(), node.clone());
        let feed = feed::routes(
            Teller::Node(consensus.clone()),
            hub.clone(),
            guard.clone(),
            closing.clone(),
        );
        let pages = Arc::new(NodePages {
            consensus: consensus.clone(),
            hub: hub.clone(),
            node,
            sessions,
            registry: metrics.registry(),
            metrics,
        });
        let mut routes = Routes::new(InterceptedService::new(tasks, guard.clone()))
            .add_service(InterceptedService::new(admin.clone().server(), guard.clone()))
            .add_service(InterceptedService::new(proxies, guard.clone()))
            .add_service(InterceptedService::new(watch, guard.clone()))
            .add_service(InterceptedService::new(flags, guard.clone()));
        let router = std::mem::take(routes.axum_router_mut());
        let gate = gate::routes(admin, guard.clone());
        *routes.axum_router_mut() = router.merge(http::routes(pages)).merge(gate).merge(feed);
        let peers = Routes::new(InterceptedService::new(consensus.service(), guard));
        let run = |socket, routes| {
            let (access, closing) = (Arc::clone(&access), closing.clone());
            tokio::spawn(async move { serve(socket, routes, &access, closing).await })
        };
        let servers = [run(listeners.client, routes), run(listeners.peer, peers)];
        info!(address = %client, peers = %peer, data = %config.data.display(), "Assigner listens");
        let leader = tokio::spawn(leader.run(closing.clone()));
        Ok(Self { client, peer, consensus, hub, stop, closing, servers, leader, streams })
    }

    /// Gives where callers and operators reach it.
    pub const fn client_address(&self) -> SocketAddr {
        self.client
    }

    /// Gives where peers reach it.
    pub const fn peer_address(&self) -> SocketAddr {
        self.peer
    }

    /// Gives its part in the agreement.
    pub const fn consensus(&self) -> &Consensus {
        &self.consensus
    }

    /// Gives what it knows of every job, for watchers in this process.
    pub const fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Waits until it was told to stop, or cannot go on, and has stopped: leadership first, then streams, then ports.
    pub async fn finished(self) -> Result<(), RunError> {
        let Self { consensus, stop, closing, servers, mut leader, streams, .. } = self;
        let [mut callers, mut peers] = servers;
        let early = tokio::select! {
            () = stop.cancelled() => None,
            failure = consensus.failed() => Some(RunError::Raft(failure)),
            ended = &mut callers => Some(broken(ended)),
            ended = &mut peers => Some(broken(ended)),
            // It ends with the role that it follows, a moment before the node says why that has ended.
            ended = &mut leader => Some(match timeout(END_WITHIN, consensus.failed()).await {
                Ok(failure) if ended.is_ok() => RunError::Raft(failure),
                Ok(_) | Err(_) => RunError::Panicked,
            }),
        };
        info!("Stopping");
        consensus.stop().await;
        closing.cancel();
        streams.close();
        let ended = async {
            streams.wait().await;
            for task in [callers, peers] {
                if !task.is_finished() {
                    drop(task.await);
                }
            }
            if !leader.is_finished() {
                drop(leader.await);
            }
        };
        if timeout(END_WITHIN, ended).await.is_err() {
            warn!("Some calls did not end in time and are cut off");
        }
        info!("Stopped");
        early.map_or(Ok(()), Err)
    }
}

fn broken(ended: Result<Result<(), ServeError>, tokio::task::JoinError>) -> RunError {
    match ended {
        Ok(Err(error)) => RunError::Serve(error),
        Ok(Ok(())) | Err(_) => RunError::Panicked,
    }
}

fn seat(client: SocketAddr, peer: SocketAddr) -> Seat {
    let address = |socket: SocketAddr| -> Address {
        socket.to_string().parse().expect("a socket's address is an address")
    };
    Seat { client: address(client), peer: address(peer) }
}

fn raft_config(config: &Config, seat: &Seat) -> RaftConfig {
    let member = |seat: &Seat| Member {
        client: seat.client.as_str().to_owned(),
        peer: seat.peer.as_str().to_owned(),
    };
    let first = match &config.start {
        Start::Init => FirstStart::Alone,
        Start::Peers(seats) => FirstStart::Together(seats.iter().map(member).collect()),
        Start::Join(address) => FirstStart::Join(vec![address.as_str().to_owned()]),
        Start::Known => FirstStart::Refuse,
    };
    RaftConfig {
        storage: Storage::Dir(config.data.clone()),
        member: member(seat),
        first,
        timings: Timings::default(),
        snapshots: Snapshots::default(),
        transport: transport(&config.access),
    }
}

/// What the pages of a node are made of.
struct NodePages {
    consensus: Consensus,
    hub: Hub,
    node: Node,
    sessions: Sessions,
    metrics: Metrics,
    registry: prometheus_client::registry::Registry,
}

impl Pages for NodePages {
    fn checks(&self) -> Vec<Check> {
        let status = self.consensus.status();
        let member = Check {
            name: "member",
            good: status.node.is_some(),
            detail: status.node.map_or_else(
                || "has not joined a cluster yet".to_owned(),
                |node| format!("{node} of {} members", status.members.len()),
            ),
        };
        let leader = match &status.role {
            Role::Leader { term } => Ok(format!("this node leads, term {term}")),
            Role::Follower { leader: Some(leader) } => Ok(format!("follows {leader}")),
            Role::Follower { leader: None } => Err("nobody leads".to_owned()),
        };
        let applied = Check {
            name: "applied",
            good: status.applied.is_some(),
            detail: format!(
                "{} of {} log entries",
                status.applied.unwrap_or_default(),
                status.last_log.unwrap_or_default(),
            ),
        };
        let good = leader.is_ok();
        let detail = leader.unwrap_or_else(|why| why);
        vec![member, Check { name: "leader", good, detail }, applied]
    }

    fn metrics(&self) -> String {
        let (status, state) = (self.consensus.status(), self.consensus.state());
        let number =
            |value: Option<u64>| i64::try_from(value.unwrap_or_default()).unwrap_or(i64::MAX);
        let m = &self.metrics;
        m.leading.set(i64::from(matches!(status.role, Role::Leader { .. })));
        m.term.set(number(Some(status.term)));
        m.last_log.set(number(status.last_log));
        m.applied.set(number(status.applied));
        m.members.set(number(Some(status.members.len() as u64)));
        m.watchers.set(number(Some(self.hub.watchers() as u64)));
        m.pauses.set(number(Some(state.flags.pauses.len() as u64)));
        m.sessions.set(number(Some(self.sessions.count() as u64)));
        let (offered, brakes) = (self.node.offered(), self.node.brakes());
        for (name, job) in &state.jobs {
            let labels = JobLabels { job: name.to_string() };
            let set = |family: &prometheus_client::metrics::family::Family<
                _,
                prometheus_client::metrics::gauge::Gauge,
            >,
                       value| {
                family.get_or_create(&labels).set(number(Some(value)));
            };
            let unserved =
                job.assignment.slices.iter().filter(|(_, a)| a.replicas.as_slice().is_empty());
            set(&m.generation, job.assignment.generation.number);
            set(&m.tasks, job.assignment.tasks.len() as u64);
            set(&m.slices, job.assignment.slices.count() as u64);
            set(&m.unserved, unserved.count() as u64);
            set(&m.frozen, u64::from(job.frozen));
            set(&m.pins, job.pins.len() as u64);
            set(&m.confined, job.confined.len() as u64);
            let brake = brakes.get(name);
            set(&m.brake, u64::from(brake.is_some()));
            set(&m.brake_missing, brake.map_or(0, |brake| brake.hold.missing.len() as u64));
            set(&m.brake_seconds, brake.map_or(0, |brake| brake.held().as_secs()));
            set(&m.moves, job.churn.moves);
            let offered = offered.get(name).cloned().unwrap_or_default();
            set(&m.callers, offered.callers as u64);
            set(&m.suspects, offered.suspects.len() as u64);
            set(&m.outliers, offered.outliers.len() as u64);
            m.offered.get_or_create(&labels).set(offered.load.units());
            m.failed.get_or_create(&labels).set(offered.failed.units());
            m.load_churn.get_or_create(&labels).set(job.churn.load as f64 / 1e6);
            m.key_churn.get_or_create(&labels).set(job.churn.keys as f64 / 1e6);
        }
        render(&self.registry)
    }
}

/// How long streams and calls may take to end once leadership is handed over.
const END_WITHIN: Duration = Duration::from_secs(2);

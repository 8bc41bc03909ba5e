//! Assigner nodes as `mandoline assigner` runs them, each on a runtime of its own, so that one can be killed.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use mandoline_assigner::assigner::{Assigner, Listeners};
use mandoline_assigner::config::{Access, Config, Seat, Start};
use mandoline_assigner::raft::{Consensus, Role};
use mandoline_core::assignment::Assignment;
use mandoline_core::command::Command;
use mandoline_core::name::JobName;
use mandoline_core::spec::JobSpec;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Long enough for a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn kv() -> JobName {
    "kv".parse().unwrap()
}

/// A job whose tasks speak often, so that tests are quick.
pub(crate) fn quick() -> JobSpec {
    JobSpec {
        heartbeat: Duration::from_millis(200),
        report_every: Duration::from_millis(200),
        balance_every: Duration::from_millis(500),
        ..JobSpec::new(kv())
    }
}

pub(crate) struct Node {
    pub(crate) address: String,
    pub(crate) consensus: Consensus,
    stop: CancellationToken,
    finished: Option<oneshot::Receiver<()>>,
    runtime: Option<Runtime>,
    _data: tempfile::TempDir,
}

impl Node {
    fn start(listeners: Listeners, start: Start) -> Self {
        let data = tempfile::tempdir().unwrap();
        let config = Config {
            listen: listeners.client.local_addr().unwrap(),
            peer_listen: listeners.peer.local_addr().unwrap(),
            advertise: None,
            data: data.path().to_owned(),
            start,
            access: Access::default(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stop = CancellationToken::new();
        let (started, assigner) = std::sync::mpsc::channel();
        let (over, finished) = oneshot::channel();
        let stopping = stop.clone();
        runtime.spawn(async move {
            let assigner = Assigner::start(config, listeners, stopping).await.unwrap();
            let about = (assigner.client_address().to_string(), assigner.consensus().clone());
            started.send(about).unwrap();
            assigner.finished().await.unwrap();
            over.send(()).unwrap();
        });
        let (address, consensus) = assigner.recv_timeout(PATIENCE).expect("the node starts");
        let (finished, runtime) = (Some(finished), Some(runtime));
        Self { address, consensus, stop, finished, runtime, _data: data }
    }

    pub(crate) fn leads(&self) -> bool {
        matches!(*self.consensus.role().borrow(), Role::Leader { .. })
    }

    /// Ends the node as SIGKILL would.
    pub(crate) fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    /// Ends the node as it would like to.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        let finished = tokio::time::timeout(PATIENCE, self.finished.take().unwrap()).await;
        finished.expect("the node stops").unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
}

impl Cluster {
    /// Starts nodes, and waits until one leads.
    pub(crate) async fn start(count: usize) -> Self {
        let socket = || TcpListener::bind("127.0.0.1:0").unwrap();
        let sockets: Vec<Listeners> =
            (0..count).map(|_| Listeners { client: socket(), peer: socket() }).collect();
        let address =
            |socket: &TcpListener| socket.local_addr().unwrap().to_string().parse().unwrap();
        let seat = |it: &Listeners| Seat { client: address(&it.client), peer: address(&it.peer) };
        let seats: Vec<Seat> = sockets.iter().map(seat).collect();
        let start = if count == 1 { Start::Init } else { Start::Peers(seats) };
        let nodes = sockets.into_iter().map(|it| Node::start(it, start.clone())).collect();
        let cluster = Self { nodes };
        cluster.leader().await;
        cluster
    }

    /// Starts nodes with a job.
    pub(crate) async fn with_job(count: usize) -> Self {
        let cluster = Self::start(count).await;
        cluster.propose(Command::ApplyJob { spec: quick(), if_version: None }).await;
        cluster
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.address.clone()).collect()
    }

    /// Waits until a node leads.
    pub(crate) async fn leader(&self) -> &Node {
        eventually("a leader", || self.nodes.iter().find(|node| node.leads())).await
    }

    pub(crate) async fn follower(&self) -> &Node {
        self.leader().await;
        self.nodes.iter().find(|node| !node.leads()).unwrap()
    }

    /// Takes the leader out.
    pub(crate) async fn take_leader(&mut self) -> Node {
        let address = self.leader().await.address.clone();
        let place = self.nodes.iter().position(|node| node.address == address).unwrap();
        self.nodes.swap_remove(place)
    }

    pub(crate) async fn propose(&self, command: Command) {
        self.leader().await.consensus.propose(command).await.unwrap();
    }

    /// What the leader knows of the job.
    pub(crate) async fn assignment(&self) -> Arc<Assignment> {
        Arc::clone(&self.leader().await.consensus.state().jobs[&kv()].assignment)
    }
}

/// Asks until there is an answer; what it asks for cannot be waited for otherwise.
pub(crate) async fn eventually<T>(what: &str, answer: impl Fn() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = answer() {
                return found;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("there never was {what}"))
}

//! Nodes for tests: real ones, over real sockets, each on a runtime of its own so that it can be killed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_core::command::Command;
use mandoline_core::name::JobName;
use mandoline_core::spec::{Band, JobSpec, Ratio};
use mandoline_core::state::{Applied, Outcome};
use tokio::runtime::Runtime;
use tokio::time::Instant;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use crate::raft::config::{Config, FirstStart, Snapshots, Timings, Transport};
use crate::raft::disk::{DiskError, Storage};
use crate::raft::machine::Event;
use crate::raft::start::StartError;
use crate::raft::types::Member;
use crate::raft::{Consensus, ProposeError, Role};

/// Nothing here takes longer, on a busy machine either.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Faster than by default, so that tests are.
pub(super) const TIMINGS: Timings = Timings {
    heartbeat: Duration::from_millis(50),
    election_min: Duration::from_millis(200),
    election_max: Duration::from_millis(400),
    propose: Duration::from_secs(10),
};

/// Waits until something is so, and says what if it never is.
pub(super) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(super) fn job(name: &str) -> JobName {
    JobName::new(name).unwrap()
}

/// A command that makes a job, or raises its version.
pub(super) fn apply(name: &str) -> Command {
    // The defaults of the first release: the bytes in `golden/` hold them.
    let spec = JobSpec {
        band: Band::Adaptive(Ratio::percent(10)),
        churn_budget: Ratio::percent(5),
        ..JobSpec::new(job(name))
    };
    Command::ApplyJob { spec, if_version: None }
}

pub(super) fn version(applied: &Applied) -> u64 {
    match applied.outcome {
        Outcome::Version(version) => version,
        other => panic!("a job was applied, and gave {other:?}"),
    }
}

/// A place for a node: its socket's address and its directory outlive it.
pub(super) struct Place {
    pub(super) member: Member,
    pub(super) dir: PathBuf,
    /// Held until the node takes it, so that nobody else gets the port.
    listener: Option<std::net::TcpListener>,
}

impl Place {
    pub(super) fn new(dir: &Path, name: &str) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap().to_string();
        let member = Member { client: format!("client-of-{name}:1"), peer };
        Self { member, dir: dir.join(name), listener: Some(listener) }
    }
}

/// A node that runs.
pub(super) struct Running {
    pub(super) consensus: Consensus,
    pub(super) events: Arc<Mutex<Vec<Event>>>,
    runtime: Option<Runtime>,
}

pub(super) struct Options {
    pub(super) first: FirstStart,
    pub(super) storage: Option<Storage>,
    pub(super) snapshots: Snapshots,
    pub(super) transport: Transport,
}

impl Options {
    pub(super) fn new(first: FirstStart) -> Self {
        Self {
            first,
            storage: None,
            snapshots: Snapshots::default(),
            transport: Transport::plain(),
        }
    }
}

/// Starts a node at its place, on a runtime of its own.
pub(super) async fn start(place: &mut Place, options: Options) -> Result<Running, StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("node")
        .enable_all()
        .build()
        .unwrap();
    let address: SocketAddr = place.member.peer.parse().unwrap();
    let listener = place.listener.take();
    let events: Arc<Mutex<Vec<Event>>> = Arc::default();
    let heard = events.clone();
    let Options { first, storage, snapshots, transport } = options;
    let config = |storage| Config {
        storage,
        member: place.member.clone(),
        first: first.clone(),
        timings: TIMINGS,
        snapshots,
        transport: transport.clone(),
    };
    let deadline = Instant::now() + PATIENCE;
    let mut storage = storage;
    let consensus = loop {
        let config = config(storage.take().unwrap_or_else(|| Storage::Dir(place.dir.clone())));
        let heard = heard.clone();
        let listener = Box::new(move |event| heard.lock().unwrap().push(event));
        let started = runtime
            .spawn(Consensus::start(config, listener, CancellationToken::new()))
            .await
            .unwrap();
        match started {
            // The node that was killed here lets go of its file when the last of its threads has noticed.
            Err(StartError::Disk(DiskError::InUse { .. })) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => {
                runtime.shutdown_background();
                return Err(error);
            }
            Ok(consensus) => break consensus,
        }
    };
    let service = consensus.service();
    runtime.spawn(async move {
        let listener = match listener {
            Some(listener) => {
                listener.set_nonblocking(true).unwrap();
                tokio::net::TcpListener::from_std(listener).unwrap()
            }
            None => loop {
                match tokio::net::TcpListener::bind(address).await {
                    Ok(listener) => break listener,
                    // The runtime that was killed has not closed its socket yet.
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            },
        };
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    });
    Ok(Running { consensus, events, runtime: Some(runtime) })
}

impl Running {
    pub(super) fn leads(&self) -> bool {
        matches!(*self.consensus.role().borrow(), Role::Leader { .. })
    }

    pub(super) async fn propose(&self, command: Command) -> Result<Applied, ProposeError> {
        let consensus = self.consensus.clone();
        self.spawn(async move { consensus.propose(command).await }).await
    }

    /// Runs something on the node's own runtime.
    pub(super) async fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> T {
        self.runtime.as_ref().expect("it runs").spawn(task).await.unwrap()
    }

    /// Ends the node as SIGKILL would: nothing is finished, nothing is told.
    pub(super) fn kill(mut self) {
        self.runtime.take().expect("it runs").shutdown_background();
    }

    /// Ends the node as it would like to.
    pub(super) async fn stop(mut self) {
        let consensus = self.consensus.clone();
        self.spawn(async move { consensus.stop().await }).await;
        self.runtime.take().expect("it runs").shutdown_background();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Several nodes, by place; an empty one is down.
pub(super) struct Cluster {
    pub(super) places: Vec<Place>,
    pub(super) nodes: Vec<Option<Running>>,
    pub(super) snapshots: Snapshots,
    pub(super) dir: tempfile::TempDir,
}

impl Cluster {
    /// Starts so many nodes for the first time, with the same list of peers.
    pub(super) async fn start(count: usize, snapshots: Snapshots) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places: Vec<_> =
            (1..=count).map(|n| Place::new(dir.path(), &format!("n{n}"))).collect();
        let mut cluster =
            Self { places, nodes: (0..count).map(|_| None).collect(), snapshots, dir };
        for at in 0..count {
            cluster.up(at).await;
        }
        cluster.leader().await;
        cluster
    }

    pub(super) fn list(&self) -> FirstStart {
        FirstStart::Together(self.places.iter().map(|place| place.member.clone()).collect())
    }

    /// Starts the node at a place.
    pub(super) async fn up(&mut self, at: usize) {
        let options = Options { snapshots: self.snapshots, ..Options::new(self.list()) };
        self.nodes[at] = Some(start(&mut self.places[at], options).await.unwrap());
    }

    pub(super) fn kill(&mut self, at: usize) {
        self.nodes[at].take().expect("it is up").kill();
    }

    pub(super) fn running(&self) -> impl Iterator<Item = (usize, &Running)> {
        self.nodes.iter().enumerate().filter_map(|(at, node)| Some((at, node.as_ref()?)))
    }

    pub(super) fn node(&self, at: usize) -> &Running {
        self.nodes[at].as_ref().expect("it is up")
    }

    /// Waits for a leader that may propose, and gives its place.
    pub(super) async fn leader(&self) -> usize {
        until("a leader", || self.running().any(|(_, node)| node.leads())).await;
        self.running().find(|(_, node)| node.leads()).expect("there was one").0
    }

    /// Proposes wherever the leader is, until it is done.
    pub(super) async fn propose(&self, command: Command) -> Applied {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let at = self.leader().await;
            match self.node(at).propose(command.clone()).await {
                Ok(applied) => return applied,
                Err(error) => assert!(
                    Instant::now() < deadline,
                    "waited for a command to be accepted: {error}"
                ),
            }
        }
    }

    /// Waits until all nodes that are up have the job at this version.
    pub(super) async fn all_have(&self, name: &str, version: u64) {
        for (at, node) in self.running() {
            let has = || {
                node.consensus
                    .state()
                    .jobs
                    .get(&job(name))
                    .is_some_and(|job| job.version >= version)
            };
            until(&format!("n{} to have {name} at version {version}", at + 1), has).await;
        }
    }
}

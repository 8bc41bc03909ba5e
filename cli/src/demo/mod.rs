//! The sample service: an in-memory cache of values by key, sharded by Mandoline. A task serves the keys that it owns.
//!
//! It is what `mandoline demo task` runs, and `mandoline dev` several times in one process; and it shows how a service
//! uses the library: bind, start a slicelet, ask it about each request, drop what left, and drain before the end.

pub(crate) mod store;
pub(crate) mod server;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mandoline::slicelet::{Shutdown, Slicelet, StartError};
use mandoline_core::name::{NameError, TaskName};
use mandoline_distributor::connect::Connector;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

use crate::demo::server::Server;
use crate::demo::store::Store;

/// What a task is told when it starts.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// The job that it is a task of.
    pub(crate) job: String,
    /// Its stable name.
    pub(crate) name: String,
    /// Where it listens; port 0 takes a free one.
    pub(crate) listen: SocketAddr,
    /// Where others reach it, if that is not where it listens.
    pub(crate) advertise: Option<String>,
    /// Assigners to ask.
    pub(crate) assigners: Vec<String>,
    /// How to reach them.
    pub(crate) connector: Connector,
    /// Where peers may watch assignments, if they may.
    pub(crate) watch: Option<String>,
    /// What placement may look at, such as `zone`.
    pub(crate) labels: Vec<(String, String)>,
    /// How much it can carry, as a multiple of an ordinary task.
    pub(crate) capacity: f64,
    /// How much memory its values may take.
    pub(crate) store_max_bytes: usize,
    /// How long a drain waits for its slices to move away.
    pub(crate) grace: Duration,
}

impl Setup {
    /// Describes an ordinary task on a free port of loopback.
    pub(crate) fn new(job: &str, name: &str, assigners: Vec<String>) -> Self {
        Self {
            job: job.to_owned(),
            name: name.to_owned(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            assigners,
            connector: Connector::default(),
            watch: None,
            labels: Vec::new(),
            capacity: 1.0,
            store_max_bytes: STORE_MAX_BYTES,
            grace: GRACE,
        }
    }
}

/// Why a task did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// Its name is no name.
    #[error("task {0:?}")]
    Name(String, #[source] NameError),
    /// It cannot listen where it should.
    #[error("cannot listen on {0}: give a free port, or 0 for any")]
    Listen(SocketAddr, #[source] io::Error),
    /// Its slicelet did not start.
    #[error(transparent)]
    Slicelet(#[from] StartError),
}

/// A task that serves. Dropping it ends it at once, in the background.
#[derive(Debug)]
pub(crate) struct Task {
    slicelet: Arc<Slicelet>,
    server: Server,
    store: Arc<Store>,
    stop: DropGuard,
}

impl Task {
    /// Listens, registers, and serves what it is given. Returns once it listens: `slicelet().ready()` says when it has
    /// registered.
    pub(crate) async fn start(setup: Setup) -> Result<Self, TaskError> {
        let name = TaskName::new(&setup.name)
            .map_err(|error| TaskError::Name(setup.name.clone(), error))?;
        let refused = |error| TaskError::Listen(setup.listen, error);
        let listener = TcpListener::bind(setup.listen).await.map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let store = Arc::new(Store::new(setup.store_max_bytes));

        let reached_at = setup.advertise.unwrap_or_else(|| address.to_string());
        let left = Arc::clone(&store);
        let mut slicelet = Slicelet::builder(&setup.job, &setup.name, &reached_at)
            .assigners(&setup.assigners)
            .capacity(setup.capacity)
            .revision(env!("CARGO_PKG_VERSION"))
            .connector(setup.connector)
            .grace(setup.grace)
            .probe(Handle::current())
            .on_removed(move |slices| {
                for slice in slices {
                    let values = left.forget(*slice);
                    debug!(%slice, values, "Slice left");
                }
            });
        for (key, value) in &setup.labels {
            slicelet = slicelet.label(key, value);
        }
        if let Some(watch) = &setup.watch {
            slicelet = slicelet.watch_address(watch);
        }
        let slicelet = Arc::new(slicelet.start()?);

        let stop = CancellationToken::new();
        let (shard, values) = (Arc::clone(&slicelet), Arc::clone(&store));
        let server =
            Server::start(&name, listener, shard, values, stop.clone()).map_err(refused)?;
        Ok(Self { slicelet, server, store, stop: stop.drop_guard() })
    }

    /// Gives where it listens.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Gives what it knows of its slices.
    pub(crate) fn slicelet(&self) -> &Slicelet {
        &self.slicelet
    }

    /// Gives how many values it holds, and their bytes.
    pub(crate) fn stored(&self) -> (usize, usize) {
        self.store.size()
    }

    /// Leaves in good order: serves until its slices have moved away, or the grace period ends.
    pub(crate) async fn drain(self) -> Shutdown {
        let how = self.slicelet.shutdown().await;
        // Callers that have not heard of the move yet are told 421, rather than find nobody.
        tokio::time::sleep(LINGER).await;
        self.stop().await;
        how
    }

    /// Stops now: its slices are others' once the leader has noticed.
    pub(crate) async fn stop(self) {
        drop((self.slicelet, self.stop));
        self.server.finished().await;
    }
}

/// Values of some hundred bytes for half a million keys.
const STORE_MAX_BYTES: usize = 128 * 1024 * 1024;
/// Kubernetes kills after 30 s.
const GRACE: Duration = Duration::from_secs(25);
/// How long a drained task still answers: many times what an assignment takes to spread.
const LINGER: Duration = Duration::from_millis(500);

#[cfg(test)]
pub(crate) mod testing {
    //! A shard that an assignment never changes.

    use std::sync::Mutex;

    use mandoline::slicelet::{Claim, CostError, Owner};
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::slice::Slice;

    use crate::demo::server::Shard;

    pub(crate) struct Part {
        slice: Slice,
        counted: Mutex<f64>,
    }

    impl Part {
        pub(crate) fn new(slice: Slice) -> Self {
            Self { slice, counted: Mutex::default() }
        }

        pub(crate) fn counted(&self) -> f64 {
            *self.counted.lock().unwrap()
        }
    }

    impl Shard for Part {
        fn claim(&self, key: &[u8], cost: f64) -> Result<Claim, CostError> {
            if !(0.0..=1e6).contains(&cost) {
                return Err(CostError(cost));
            }
            *self.counted.lock().unwrap() += cost;
            if self.slice.contains(SliceKey::of(key)) {
                return Ok(Claim::Mine);
            }
            let address = Some("10.0.0.7:9000".parse().unwrap());
            Ok(Claim::Elsewhere(Owner {
                address,
                generation: Generation { incarnation: 1, number: 42 },
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_cannot_start_says_why() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let setup = Setup::new("kv", "t1", vec!["127.0.0.1:1".to_owned()]);
        let on_taken = Setup { listen: taken.local_addr().unwrap(), ..setup.clone() };
        assert!(
            Task::start(on_taken)
                .await
                .unwrap_err()
                .to_string()
                .starts_with("cannot listen on 127.0.0.1:")
        );
        let no_name = Setup { name: "a/b".to_owned(), ..setup.clone() };
        assert!(matches!(Task::start(no_name).await, Err(TaskError::Name(..))));
        let no_assigner = Setup { assigners: Vec::new(), ..setup };
        assert!(matches!(
            Task::start(no_assigner).await,
            Err(TaskError::Slicelet(StartError::NoAssigners))
        ));
    }

    #[tokio::test]
    async fn a_task_that_nobody_gave_anything_turns_requests_away_and_stops() {
        let task =
            Task::start(Setup::new("kv", "t1", vec!["127.0.0.1:1".to_owned()])).await.unwrap();
        assert_eq!(ask(task.address(), "/kv/a").await, 421);
        assert_eq!(ask(task.address(), "/livez").await, 200);
        assert_eq!(task.stored().0, 0);
        tokio::time::timeout(Duration::from_secs(10), task.stop())
            .await
            .expect("it stops within 10 s");
    }

    async fn ask(address: SocketAddr, path: &str) -> u16 {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply.split(' ').nth(1).unwrap().parse().unwrap()
    }
}

//! A job's tasks in this process, each behind a socket of its own, and a gRPC service with all four kinds of calls.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use mandoline_distributor::hub::Hub;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

use crate::clerk::Clerk;
use crate::http::replay::BoxError;
use crate::slicelet::Slicelet;

/// Longer than anything here takes; only what hangs gets there.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Tasks of one job: session n is task `t<n>`.
pub(super) struct Fleet {
    pub(super) hub: Hub,
    pub(super) clerk: Clerk,
    pub(super) tasks: Vec<Member>,
    exclusive: bool,
    generation: AtomicU64,
}

pub(super) struct Member {
    pub(super) session: SessionId,
    pub(super) slicelet: Arc<Slicelet>,
    pub(super) address: SocketAddr,
    /// What it says of where it is, from the next assignment on.
    pub(super) region: Option<&'static str>,
    listener: Option<TcpListener>,
    server: Option<JoinHandle<()>>,
}

impl Member {
    pub(super) fn name(&self) -> String {
        format!("t{}", self.session.0)
    }

    /// Serves this from now on.
    pub(super) fn serve<S, B>(&mut self, service: S)
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let listener = self.listener.take().expect("it serves once");
        self.server = Some(tokio::spawn(accept(listener, service)));
    }

    /// Stops serving, and breaks off what is under way.
    pub(super) fn stop(&mut self) {
        drop(self.listener.take());
        self.server.take().inspect(JoinHandle::abort);
    }

    /// Says whether nobody listens at its address.
    pub(super) fn is_stopped(&self) -> bool {
        std::net::TcpStream::connect(self.address).is_err()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn accept<S, B>(listener: TcpListener, service: S)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError> + Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    // Goes with the connections in it.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let service = TowerToHyperService::new(service.clone());
        connections.spawn(async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            // What clients do to a connection is theirs.
            let _over = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
        });
    }
}

impl Fleet {
    /// Begins with these many tasks, of which the first owns everything.
    pub(super) async fn of(tasks: u64) -> Self {
        Self::new(tasks, false).await
    }

    /// Does the same for an exclusive job.
    pub(super) async fn exclusive(tasks: u64) -> Self {
        Self::new(tasks, true).await
    }

    async fn new(tasks: u64, exclusive: bool) -> Self {
        let hub = Hub::new();
        let clerk = Clerk::follow_hub(&hub, "kv".parse().unwrap()).unwrap();
        let mut fleet =
            Self { hub, clerk, tasks: Vec::new(), exclusive, generation: AtomicU64::new(0) };
        for n in 1..=tasks {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let session = SessionId(n);
            let start = Arc::new(fleet.assignment(&[], 0));
            let slicelet = Arc::new(Slicelet::frozen(session, start));
            let listener = Some(listener);
            fleet.tasks.push(Member {
                session,
                slicelet,
                address,
                region: None,
                listener,
                server: None,
            });
        }
        fleet.give(&[(SliceKey::MIN, 1)]).await;
        fleet
    }

    fn assignment(&self, runs: &[(SliceKey, u64)], number: u64) -> Assignment {
        let (job, generation) = ("kv".parse().unwrap(), Generation { incarnation: 1, number });
        let mut made = match self.exclusive {
            true => Assignment::exclusive(job, generation),
            false => Assignment::new(job, generation),
        };
        for Member { session, address, region, .. } in &self.tasks {
            if runs.iter().any(|(_, owner)| *owner == session.0) {
                let name = format!("t{}", session.0).parse().unwrap();
                let mut info = TaskInfo::new(name, session.0, address.to_string().parse().unwrap());
                let region = region.map(|region| ("region".to_owned(), region.to_owned()));
                info.labels.extend(region);
                made.tasks.insert(*session, Arc::new(Task::new(*session, info)));
            }
        }
        let run = |(first, owner): &(SliceKey, u64)| {
            let owner = Replica { session: SessionId(*owner), since: generation };
            let replicas = match self.exclusive {
                true => Replicas::Owner(Some(owner)),
                false => Replicas::One(owner),
            };
            (*first, Assigned { replicas, token: generation, ..Assigned::default() })
        };
        if !runs.is_empty() {
            made.slices = SliceMap::from_runs(runs.iter().map(run).collect()).unwrap();
        }
        made
    }

    /// Gives each run to a task, and tells the tasks, but no caller.
    pub(super) fn give_quietly(&self, runs: &[(SliceKey, u64)]) -> Arc<Assignment> {
        let number = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        let made = Arc::new(self.assignment(runs, number));
        for task in &self.tasks {
            task.slicelet.take(task.session, Arc::clone(&made));
        }
        made
    }

    /// Gives each run to a task, and tells everyone.
    pub(super) async fn give(&self, runs: &[(SliceKey, u64)]) {
        let made = self.give_quietly(runs);
        self.hub.publish(Arc::clone(&made), None);
        self.clerk.wait_for(made.generation, PATIENCE).await.unwrap();
    }
}

/// The upper half of all keys.
pub(super) const MIDDLE: SliceKey = SliceKey(1 << 63);

/// Finds a key of a half.
pub(super) fn key_in(upper: bool) -> String {
    let mut keys = (0..).map(|n| format!("key-{n}"));
    keys.find(|key| (SliceKey::of(key.as_bytes()) >= MIDDLE) == upper).unwrap()
}

/// Waits until something is so.
pub(super) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let wait = async {
        while !so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("waited for {what}"));
}

type Strings = Pin<Box<dyn Stream<Item = Result<String, Status>> + Send>>;

/// A gRPC service that says its name before each message: one answer for each message, or by `/t.Echo/All` one for all.
#[derive(Clone)]
pub(super) struct Echo(pub(super) String);

impl<B> Service<Request<B>> for Echo
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError> + Send,
{
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let name = self.0.clone();
        let request = request.map(tonic::body::Body::new);
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<String, String>::default());
            if request.uri().path() == "/t.Echo/All" {
                let all = service_fn(move |request: tonic::Request<Streaming<String>>| {
                    let name = name.clone();
                    async move {
                        let all: Vec<String> =
                            request.into_inner().map(Result::unwrap).collect().await;
                        Ok::<_, Status>(tonic::Response::new(format!("{name}:{}", all.concat())))
                    }
                });
                return Ok(grpc.client_streaming(all, request).await);
            }
            let each = service_fn(move |request: tonic::Request<Streaming<String>>| {
                let name = name.clone();
                async move {
                    let each = request.into_inner();
                    let each = each.map(move |text| text.map(|text| format!("{name}:{text}")));
                    Ok::<_, Status>(tonic::Response::new(Box::pin(each) as Strings))
                }
            });
            Ok(grpc.streaming(each, request).await)
        })
    }
}

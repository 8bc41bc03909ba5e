//! Assignments to tell, and nodes that serve them on real sockets and can die.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use mandoline_core::assignment::{Assigned, Assignment, Replica};
use mandoline_core::delta::{Delta, TaskChange};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::task::{Address, SessionId, Task, TaskInfo};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Status};

use crate::hub::Hub;
use crate::serve::{FlagsService, WatchService};

/// How long anything here may take before the test is called hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something with a name, and fails the test when it does not come.
pub(crate) async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(it) => it,
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

pub(crate) fn generation(number: u64) -> Generation {
    Generation { incarnation: 1, number }
}

pub(crate) fn empty(job: &str, number: u64) -> Arc<Assignment> {
    Arc::new(Assignment::new(job.parse().unwrap(), generation(number)))
}

/// Takes an assignment one generation on: a task joins and takes some slice.
pub(crate) fn step(old: &Assignment) -> (Arc<Assignment>, Delta) {
    let to = old.generation.next();
    let id = to.number;
    let address = format!("127.0.0.1:{}", 1 + id % 65_000).parse().unwrap();
    let info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, address);
    let task = Task::new(SessionId(id), info);
    let first = SliceKey(id.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 1);
    let slice = Slice::new(first, SliceKey(first.0 + 0xFFFF)).unwrap();
    let replica = Replica { session: SessionId(id), since: to };
    let assigned = Assigned { replicas: [replica].into_iter().collect(), ..Assigned::default() };
    let delta = Delta {
        job: old.job.clone(),
        from: old.generation,
        to,
        tasks: vec![TaskChange::Set(Arc::new(task))],
        slices: vec![(slice, assigned)],
        spill: old.spill,
    };
    (Arc::new(delta.apply_to(old).unwrap()), delta)
}

/// Takes a hub's job one generation on.
pub(crate) fn advance(hub: &Hub, job: &str) -> Arc<Assignment> {
    let old = hub.get(&job.parse().unwrap()).expect("the job was published before");
    let (new, delta) = step(&old);
    hub.publish(Arc::clone(&new), Some(&delta));
    new
}

/// An assignment of several parts.
pub(crate) fn large(job: &str, number: u64) -> Arc<Assignment> {
    let mut made = Assignment::clone(&empty(job, number));
    for n in 1..100_000_u64 {
        made.slices.split(SliceKey(n << 44));
    }
    Arc::new(made)
}

/// A server on a runtime of its own, so that it can die with all its connections at once.
pub(crate) struct Node {
    pub(crate) address: Address,
    stop: CancellationToken,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Node {
    pub(crate) fn serve(hub: &Hub) -> Self {
        Self::serve_on(std::net::TcpListener::bind("127.0.0.1:0").unwrap(), hub)
    }

    /// Comes back where a node died, as soon as its socket is gone.
    pub(crate) async fn serve_at(address: &Address, hub: &Hub) -> Self {
        let bound = async {
            loop {
                match std::net::TcpListener::bind(address.as_str()) {
                    Ok(listener) => return listener,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        Self::serve_on(soon("the address of a dead node", bound).await, hub)
    }

    fn serve_on(listener: std::net::TcpListener, hub: &Hub) -> Self {
        let stop = CancellationToken::new();
        let routes = Routes::new(WatchService::new(hub.clone(), stop.clone()))
            .add_service(FlagsService::new(hub.clone(), stop.clone()));
        Self::serve_with(listener, routes, stop)
    }

    /// Serves these bytes to everyone who watches, and then stays silent.
    pub(crate) fn liar(frames: Vec<Bytes>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::serve_with(listener, Routes::new(Liar(frames)), CancellationToken::new())
    }

    /// Serves only those who show this token.
    pub(crate) fn guarded(hub: &Hub, token: &'static str) -> Self {
        let stop = CancellationToken::new();
        let guard = move |request: Request<()>| match request.metadata().get("authorization") {
            Some(shown) if shown == format!("Bearer {token}").as_str() => Ok(request),
            _ => Err(Status::unauthenticated("the token is not this cluster's")),
        };
        let service = WatchService::new(hub.clone(), stop.clone());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::serve_with(listener, Routes::new(InterceptedService::new(service, guard)), stop)
    }

    fn serve_with(
        listener: std::net::TcpListener,
        routes: Routes,
        stop: CancellationToken,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let stopped = stop.clone();
        // Ends with the runtime, which the node holds.
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            let server = Server::builder().add_routes(routes);
            server.serve_with_incoming_shutdown(incoming, stopped.cancelled()).await.unwrap();
        });
        Self { address, stop, runtime: Some(runtime) }
    }

    /// Stops as told: streams end with a status.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }
}

/// Dies with all its connections.
impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Passes bytes on to a node, until it is told to go silent without a word.
pub(crate) struct Relay {
    pub(crate) address: Address,
    silent: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn to(node: &Node) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let (silent, target) = (CancellationToken::new(), node.address.clone());
        let silenced = silent.clone();
        let task = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut far = tokio::net::TcpStream::connect(target.as_str()).await.unwrap();
                // Both stay open in silence: nobody hears of an end.
                let both = tokio::io::copy_bidirectional(&mut near, &mut far);
                tokio::select! {
                    _ = both => {}
                    () = silenced.cancelled() => {}
                }
                held.push((near, far));
            }
        });
        Self { address, silent, task }
    }

    pub(crate) fn go_silent(&self) {
        self.silent.cancel();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Liar(Vec<Bytes>);

impl NamedService for Liar {
    const NAME: &'static str = "mandoline.v1.Assignments";
}

impl tower::Service<http::Request<Body>> for Liar {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        let said = stream::iter(self.0.clone()).chain(stream::pending());
        let frames = said.map(|bytes| Ok::<_, Status>(http_body::Frame::data(bytes)));
        let body = Body::new(http_body_util::StreamBody::new(frames));
        let head = http::Response::builder().header("content-type", "application/grpc");
        std::future::ready(Ok(head.body(body).unwrap()))
    }
}

//! Tasks, clients and assignments for the tests: each wait has a deadline and says what it waited for.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mandoline::{Clerk, Hub};
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::Ratio;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use mandoline_core::transit::{HandOffId, Step, Transit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::config::route::Destination;
use crate::metrics::stats::Stats;
use crate::proxy::Proxy;
use crate::router::Router;

/// Longer than anything here takes, and short enough that a hang gets its name.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// Waits, but not for ever.
pub(super) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(done) => done,
        Err(_) => panic!("waited {DEADLINE:?} for {what}"),
    }
}

/// Looks again and again until it is so.
pub(super) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let mut again = tokio::time::interval(Duration::from_millis(1));
    within(what, async {
        while !so() {
            again.tick().await;
        }
    })
    .await;
}

pub(super) fn generation(number: u64) -> Generation {
    Generation { incarnation: 1, number }
}

/// The assignment that a test decides.
pub(super) struct Owners {
    hub: Hub,
    clerk: Clerk,
}

impl Owners {
    /// Nothing is known.
    pub(super) fn none() -> Self {
        Self::none_of("kv")
    }

    /// Nothing is known of this job.
    pub(super) fn none_of(job: &str) -> Self {
        let hub = Hub::new();
        let clerk = Clerk::follow_hub(&hub, job.parse().unwrap()).unwrap();
        Self { hub, clerk }
    }

    pub(super) async fn all(address: SocketAddr) -> Self {
        let owners = Self::none();
        owners.give(1, &[(0, 1, address)]).await;
        owners
    }

    /// One task serves everything, at an address that need not be a socket's.
    pub(super) async fn all_at(address: &str) -> Self {
        let owners = Self::none();
        let mut assignment = made(1, &[(0, 1, SocketAddr::from(([127, 0, 0, 1], 1)))]);
        let info = TaskInfo::new("t1".parse().unwrap(), 1, address.parse().unwrap());
        assignment.tasks.insert(SessionId(1), Arc::new(Task::new(SessionId(1), info)));
        owners.tell(assignment).await;
        owners
    }

    /// From each place on, up to the next, a session at an address serves.
    pub(super) async fn give(&self, number: u64, runs: &[(u64, u64, SocketAddr)]) {
        self.publish(number, runs, None).await;
    }

    /// The same, and keys of a task above the cap may go to another.
    pub(super) async fn give_with_spill(&self, number: u64, runs: &[(u64, u64, SocketAddr)]) {
        self.publish(number, runs, Some(Ratio::percent(115))).await;
    }

    /// The same, and each session is in a region.
    pub(super) async fn give_in(&self, number: u64, runs: &[(u64, u64, SocketAddr, &str)]) {
        self.tell(made_in(number, runs)).await;
    }

    /// All of these sessions serve every key, each in a region.
    pub(super) async fn give_all<'a>(&self, number: u64, tasks: &[(u64, SocketAddr, &'a str)]) {
        let place = |(at, (id, address, region)): (usize, &(u64, SocketAddr, &'a str))| {
            (at as u64, *id, *address, *region)
        };
        let runs: Vec<_> = tasks.iter().enumerate().map(place).collect();
        let mut assignment = made_in(number, &runs);
        let since = assignment.generation;
        let replica =
            |(id, ..): &(u64, SocketAddr, &'a str)| Replica { session: SessionId(*id), since };
        let replicas: Replicas = tasks.iter().map(replica).collect();
        assignment.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
        self.tell(assignment).await;
    }

    /// All that this session has is on its way to another.
    pub(super) async fn hand_over(
        &self,
        number: u64,
        step: Step,
        (from, at): (u64, SocketAddr),
        (to, there): (u64, SocketAddr),
    ) {
        let mut assignment = made(number, &[(0, to, there)]);
        let [from, to] = [from, to].map(SessionId);
        let task = TaskInfo::new("old".parse().unwrap(), 1, at.to_string().parse().unwrap());
        assignment.tasks.insert(from, Arc::new(Task::new(from, task)));
        let id = HandOffId { began: generation(number), first: SliceKey(0) };
        let since = assignment.generation;
        assignment.slices = SliceMap::uniform(Assigned {
            replicas: Replicas::One(Replica { session: from, since }),
            transit: Some(Arc::new(Transit { id, from: Some(from), to, step })),
            ..Assigned::default()
        });
        self.tell(assignment).await;
    }

    async fn publish(&self, number: u64, runs: &[(u64, u64, SocketAddr)], spill: Option<Ratio>) {
        self.tell(Assignment { spill, ..made(number, runs) }).await;
    }

    async fn tell(&self, mut assignment: Assignment) {
        assignment.job = self.clerk.job().clone();
        let generation = assignment.generation;
        self.hub.publish(Arc::new(assignment), None);
        self.clerk.wait_for(generation, DEADLINE).await.unwrap();
    }

    pub(super) fn router(&self) -> Router {
        Router::new(self.clerk.clone())
    }
}

fn made(number: u64, runs: &[(u64, u64, SocketAddr)]) -> Assignment {
    let mut assignment = Assignment::new(job(), generation(number));
    let mut slices = Vec::new();
    for &(first, session, address) in runs {
        let (name, address) =
            (format!("t{session}").parse().unwrap(), address.to_string().parse().unwrap());
        let (session, info) = (SessionId(session), TaskInfo::new(name, 1, address));
        assignment.tasks.insert(session, Arc::new(Task::new(session, info)));
        let replicas = Replicas::One(Replica { session, since: assignment.generation });
        slices.push((SliceKey(first), Assigned { replicas, ..Assigned::default() }));
    }
    if !slices.is_empty() {
        assignment.slices = SliceMap::from_runs(slices).unwrap();
    }
    assignment
}

fn made_in(number: u64, runs: &[(u64, u64, SocketAddr, &str)]) -> Assignment {
    let plain: Vec<_> = runs.iter().map(|(first, id, at, _)| (*first, *id, *at)).collect();
    let mut assignment = made(number, &plain);
    for (_, session, _, region) in runs {
        let task = assignment.tasks.get_mut(&SessionId(*session)).unwrap();
        let labels = &mut Arc::make_mut(task).info.labels;
        labels.insert("region".to_owned(), (*region).to_owned());
    }
    assignment
}

fn job() -> JobName {
    "kv".parse().unwrap()
}

/// A proxy and the assignment it goes by.
pub(super) struct Stage {
    pub(super) proxy: Proxy,
    pub(super) owners: Owners,
}

impl Stage {
    pub(super) fn new(owners: Owners) -> Self {
        Self::with(owners, |_| {})
    }

    pub(super) fn with(owners: Owners, change: impl FnOnce(&mut Config)) -> Self {
        let config = config(&owners, change);
        let proxy = Proxy::start(config, &CancellationToken::new()).unwrap();
        Self { proxy, owners }
    }

    pub(super) fn stats(&self) -> Stats {
        self.proxy.stats()
    }

    /// Sends bytes and reads what comes until the proxy closes.
    pub(super) async fn talk(&self, request: &str) -> String {
        talk(self.proxy.local_addr(), request.as_bytes()).await
    }

    pub(super) async fn connect(&self) -> Wire {
        Wire::connect(self.proxy.local_addr()).await
    }
}

pub(super) fn config(owners: &Owners, change: impl FnOnce(&mut Config)) -> Config {
    let (listen, key) = ("127.0.0.1:0".parse().unwrap(), "path:1".parse().unwrap());
    let mut config = Config::new(listen, key, owners.router());
    config.workers = NonZeroUsize::MIN;
    config.id = "p1".parse().unwrap();
    change(&mut config);
    config
}

/// Has the only route find its key elsewhere.
pub(super) fn key_at(config: &mut Config, place: &str) {
    let Destination::Job { key, .. } = &mut config.routes[0].to else { unreachable!() };
    *key = place.parse().unwrap();
}

pub(super) async fn talk(address: SocketAddr, request: &[u8]) -> String {
    let mut wire = Wire::connect(address).await;
    wire.send(request).await;
    wire.rest().await
}

/// A client of raw bytes.
pub(super) struct Wire {
    pub(super) stream: TcpStream,
    read: Vec<u8>,
}

impl Wire {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await.unwrap();
        Self { stream, read: Vec::new() }
    }

    pub(super) fn of(stream: TcpStream) -> Self {
        Self { stream, read: Vec::new() }
    }

    pub(super) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        within("the other side to read", self.stream.write_all(bytes.as_ref())).await.unwrap();
    }

    /// Reads up to and with `end`.
    pub(super) async fn read_to(&mut self, end: &str) -> String {
        loop {
            let found = self.read.windows(end.len()).position(|window| window == end.as_bytes());
            if let Some(at) = found {
                let rest = self.read.split_off(at + end.len());
                return String::from_utf8(std::mem::replace(&mut self.read, rest)).unwrap();
            }
            let mut buffer = [0; 4096];
            let got = within(&format!("{end:?}"), self.stream.read(&mut buffer)).await.unwrap();
            assert!(got > 0, "closed before {end:?}: {}", String::from_utf8_lossy(&self.read));
            self.read.extend_from_slice(&buffer[..got]);
        }
    }

    /// Gives what was read and not yet looked at.
    pub(super) fn unread(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.read)
    }

    /// Reads the head of a message.
    pub(super) async fn head(&mut self) -> String {
        self.read_to("\r\n\r\n").await
    }

    /// Reads until the other side closes, or resets.
    pub(super) async fn rest(mut self) -> String {
        let mut read = std::mem::take(&mut self.read);
        // What came before a reset counts as well.
        drop(within("the end", self.stream.read_to_end(&mut read)).await);
        String::from_utf8_lossy(&read).into_owned()
    }
}

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

pub(super) fn text(text: impl Into<Bytes>) -> Response<Body> {
    Response::new(Full::new(text.into()).boxed_unsync())
}

pub(super) fn status(status: u16, lines: &[(&str, &str)]) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in lines {
        response = response.header(*name, *value);
    }
    response.body(Full::default().boxed_unsync()).unwrap()
}

/// A task: a real HTTP server that does as the test says.
pub(super) struct Backend {
    pub(super) address: SocketAddr,
    // Ends with the test.
    _tasks: JoinSet<()>,
}

impl Backend {
    pub(super) async fn serve<F>(
        answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::raw(move |stream| {
            let answer = answer.clone();
            async move {
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let serving = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                // The proxy may close whenever it likes.
                drop(serving.await);
            }
        })
        .await
    }

    /// The same, by HTTP/2 in clear text.
    pub(super) async fn serve_http2<F>(
        answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::raw(move |stream| {
            let answer = answer.clone();
            async move {
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service);
                drop(serving.await);
            }
        })
        .await
    }

    /// A task that answers with its name, a space, and the request as it saw it.
    pub(super) async fn echo(name: &'static str) -> Self {
        Self::serve(move |request| async move { text(format!("{name} {}", show(request).await)) })
            .await
    }

    /// A task that does with its connections what it likes.
    pub(super) async fn raw<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(handle(stream));
            }
        });
        Self { address, _tasks: tasks }
    }

    /// A task that sends these bytes once it has read the head of a request, and closes.
    pub(super) async fn script(bytes: &'static str) -> Self {
        Self::raw(move |stream| async move {
            let mut wire = Wire::of(stream);
            wire.head().await;
            wire.send(bytes).await;
        })
        .await
    }

    /// An address where nobody listens.
    pub(super) async fn nobody() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    }
}

/// Writes a request down as it came.
pub(super) async fn show(request: Request<Incoming>) -> String {
    let (head, body) = request.into_parts();
    let mut lines = vec![format!("{} {} {:?}", head.method, head.uri, head.version)];
    for (name, value) in &head.headers {
        lines.push(format!("{name}: {}", value.to_str().unwrap()));
    }
    let body = body.collect().await.unwrap();
    if let Some(trailers) = body.trailers() {
        lines.extend(
            trailers
                .iter()
                .map(|(name, value)| format!("trailer {name}: {}", value.to_str().unwrap())),
        );
    }
    lines.push(format!("[{}]", String::from_utf8_lossy(&body.to_bytes())));
    lines.join("\n")
}

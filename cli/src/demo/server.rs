//! The HTTP side of the sample service: `GET`, `PUT` and `DELETE` of `/kv/KEY`, for the keys that this task owns.
//!
//! A request for another's key is answered 421 with what this task knows of the owner, so that the caller can go there.
//! Where the job lets callers spill, a request that came here for its owner's load (`mandoline-spill`) is served; each answer
//! says what the task has served (`mandoline-load`). The header `mandoline-cost` says how much a request counts as load: 1 unless told.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mandoline::Utilisation;
use mandoline::http::names::{LOAD, SPILL};
use mandoline::http::refused::Refused;
use mandoline::slicelet::{Claim, CostError, Guard, NotOwner, Slicelet};
use mandoline_core::extract::{Extract, Headers, Miss, Parts};
use mandoline_core::key::SliceKey;
use mandoline_core::name::TaskName;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::demo::store::Store;

/// Says which requests are this task's, and counts them.
pub(crate) trait Shard: Send + Sync + 'static {
    /// What says that a key is this task's while a request is under way.
    type Guard: Send;

    /// Takes a request in, and counts its cost as load on the key's slice.
    fn acquire(&self, key: &[u8], cost: f64) -> Result<Self::Guard, NotOwner>;

    /// Says whether the key is this task's still, without a break: for the moment before an answer.
    fn still_owned(guard: &Self::Guard) -> bool;

    /// Does the same as `acquire` with a request that its caller has spilled here.
    fn claim_spilled(&self, key: &[u8], cost: f64) -> Result<Claim, CostError>;

    /// Gives what this task has served.
    fn utilisation(&self) -> Utilisation;
}

impl Shard for Slicelet {
    type Guard = Guard;

    fn acquire(&self, key: &[u8], cost: f64) -> Result<Guard, NotOwner> {
        self.acquire_at(SliceKey::of(key), cost)
    }

    fn still_owned(guard: &Guard) -> bool {
        guard.still_owned()
    }

    fn claim_spilled(&self, key: &[u8], cost: f64) -> Result<Claim, CostError> {
        self.claim_spilled_at(SliceKey::of(key), cost)
    }

    fn utilisation(&self) -> Utilisation {
        Self::utilisation(self)
    }
}

/// A server under way. Ends when the token that it was given is cancelled.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    run: JoinHandle<()>,
}

impl Server {
    /// Serves what comes in at `listener`.
    pub(crate) fn start<S: Shard>(
        name: &TaskName,
        listener: TcpListener,
        shard: Arc<S>,
        store: Arc<Store>,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let name = HeaderValue::try_from(name.as_str()).expect("a name is visible ASCII");
        let task = Arc::new(Task { name, shard, store });
        Ok(Self { address, run: tokio::spawn(accept(listener, task, stop)) })
    }

    /// Gives where it listens.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it has stopped and every connection is closed.
    pub(crate) async fn finished(self) {
        self.run.await.expect("the server does not panic, and nobody aborts it");
    }
}

async fn accept<S: Shard>(listener: TcpListener, task: Arc<Task<S>>, stop: CancellationToken) {
    let connections = TaskTracker::new();
    // Past it, callers wait in the kernel's backlog, and beyond that they are refused.
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let serve_all = async {
        loop {
            let permit =
                Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (task, stop) = (Arc::clone(&task), stop.clone());
                    connections.spawn(async move {
                        serve(stream, task, stop).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: some will be given back.
                    warn!(%error, "Accepting a connection failed");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = serve_all => {}
        () = stop.cancelled() => {}
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Serves one connection; once told to stop, lets the request under way end.
async fn serve<S: Shard>(stream: TcpStream, task: Arc<Task<S>>, stop: CancellationToken) {
    // A failure shows at the first write.
    stream.set_nodelay(true).ok();
    let service = service_fn(move |request| {
        let task = Arc::clone(&task);
        async move { Ok::<_, Infallible>(task.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // Callers come and go; what they did to the connection is theirs.
        _ = connection.as_mut() => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            drop(timeout(STOP_PATIENCE, connection).await);
        }
    }
}

struct Task<S> {
    name: HeaderValue,
    shard: Arc<S>,
    store: Arc<Store>,
}

type Reply = Response<Full<Bytes>>;

impl<S: Shard> Task<S> {
    async fn answer(&self, request: Request<Incoming>) -> Reply {
        let reply = self.route(request).await;
        let mut reply = reply.unwrap_or_else(|Refusal(status, why)| text(status, why));
        reply.headers_mut().insert(&TASK, self.name.clone());
        let load = HeaderValue::try_from(self.shard.utilisation().to_string());
        reply.headers_mut().insert(LOAD, load.expect("numbers fit a header"));
        reply
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Reply, Refusal> {
        let path = request.uri().path();
        if path == "/livez" {
            return Ok(text(StatusCode::OK, "ok\n"));
        }
        if path == "/" {
            let (values, bytes) = self.store.size();
            let name = self.name.to_str().expect("a name is visible ASCII");
            return Ok(text(
                StatusCode::OK,
                format!("task {name} holds {values} values in {bytes} bytes\n"),
            ));
        }
        if !path.starts_with("/kv/") || path.matches('/').count() > 2 {
            let why = "nothing here: ask for /kv/KEY\n";
            return Err(Refusal(StatusCode::NOT_FOUND, why.to_owned()));
        }
        let (parts, body) = request.into_parts();
        // The proxy finds the key by the same code, so both mean the same one.
        let target = Parts { path: parts.uri.path(), query: None, host: None, headers: &NoHeaders };
        let key = Extract::Path(1).key(&target)?;
        let cost = cost_of(&parts.headers)?;
        if parts.headers.contains_key(SPILL) && self.shard.claim_spilled(&key, cost)? == Claim::Mine
        {
            return self.act(&key, parts.method, body).await;
        }
        if parts.method == Method::PUT {
            // Whoever sends slowly must not keep a slice from moving on.
            return match self.shard.acquire(&key, cost) {
                Ok(_) => {
                    let value = read_value(body).await?;
                    match self.shard.acquire(&key, 0.0) {
                        Ok(guard) => {
                            self.store.write(&key, &value);
                            self.reply(&key, &guard, empty(StatusCode::NO_CONTENT))
                        }
                        Err(why) => not_owner(why),
                    }
                }
                Err(why) => not_owner(why),
            };
        }
        match self.shard.acquire(&key, cost) {
            Ok(guard) => {
                let reply = self.act(&key, parts.method, body).await?;
                self.reply(&key, &guard, reply)
            }
            Err(why) => not_owner(why),
        }
    }

    /// Answers, if the key has been this task's to the end. Else what was read may be old, and what was written stays behind with
    /// the slice: whoever has it now is to be asked.
    fn reply(&self, key: &[u8], guard: &S::Guard, reply: Reply) -> Result<Reply, Refusal> {
        if S::still_owned(guard) {
            return Ok(reply);
        }
        match self.shard.acquire(key, 0.0) {
            Err(why) => not_owner(why),
            Ok(_) => {
                let why = "the key went and came back while the request was under way: ask again\n";
                let mut reply = text(StatusCode::SERVICE_UNAVAILABLE, why);
                reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
                Ok(reply)
            }
        }
    }

    async fn act(&self, key: &[u8], method: Method, body: Incoming) -> Result<Reply, Refusal> {
        match method {
            Method::GET => Ok(match self.store.read(key) {
                Some(value) => Response::new(Full::new(value)),
                None => text(StatusCode::NOT_FOUND, "no such key\n"),
            }),
            Method::PUT => {
                let value = read_value(body).await?;
                self.store.write(key, &value);
                Ok(empty(StatusCode::NO_CONTENT))
            }
            Method::DELETE => Ok(match self.store.delete(key) {
                true => empty(StatusCode::NO_CONTENT),
                false => text(StatusCode::NOT_FOUND, "no such key\n"),
            }),
            _ => {
                let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "use GET, PUT or DELETE\n");
                let allowed = HeaderValue::from_static("GET, PUT, DELETE");
                reply.headers_mut().insert(ALLOW, allowed);
                Ok(reply)
            }
        }
    }
}

/// Says why a request was not taken, so that its caller knows where to go and when.
fn not_owner(why: NotOwner) -> Result<Reply, Refusal> {
    match why {
        NotOwner::Cost(error) => Err(error.into()),
        why => Ok(Refused::from(why).answer(false).map(Full::new)),
    }
}

/// Why a request was not looked at any further: a status, and a sentence for the caller.
struct Refusal(StatusCode, String);

impl From<Miss> for Refusal {
    fn from(miss: Miss) -> Self {
        let status = match miss {
            Miss::TooLong(_) => StatusCode::URI_TOO_LONG,
            // It has no body that could be too long: its key is in the path.
            Miss::NoKey
            | Miss::Empty
            | Miss::Twice
            | Miss::Encoding(_)
            | Miss::Unreadable
            | Miss::LongBody(_) => StatusCode::BAD_REQUEST,
        };
        Self(status, format!("{miss}\n"))
    }
}

impl From<CostError> for Refusal {
    fn from(error: CostError) -> Self {
        Self(StatusCode::BAD_REQUEST, format!("{COST}: {error}\n"))
    }
}

/// For a key in the path, no header is looked at.
struct NoHeaders;

impl Headers for NoHeaders {
    fn values<'a>(&'a self, _: &str) -> impl Iterator<Item = &'a [u8]> {
        std::iter::empty()
    }
}

fn cost_of(headers: &HeaderMap) -> Result<f64, Refusal> {
    let Some(value) = headers.get(&COST) else { return Ok(1.0) };
    value.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
        Refusal(StatusCode::BAD_REQUEST, format!("{COST}: {value:?} is no number\n"))
    })
}

async fn read_value(body: Incoming) -> Result<Bytes, Refusal> {
    let too_large = || {
        let why = format!("the value is too large: the most is {VALUE_MAX_BYTES} bytes\n");
        Refusal(StatusCode::PAYLOAD_TOO_LARGE, why)
    };
    // What says that it is too large need not be sent.
    if body.size_hint().lower() > VALUE_MAX_BYTES as u64 {
        return Err(too_large());
    }
    match Limited::new(body, VALUE_MAX_BYTES).collect().await {
        Ok(value) => Ok(value.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        // The caller has gone, or sent what is no HTTP: nothing was written.
        Err(error) => {
            Err(Refusal(StatusCode::BAD_REQUEST, format!("the value broke off: {error}\n")))
        }
    }
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(text.into()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    reply
}

fn empty(status: StatusCode) -> Reply {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = status;
    reply
}

/// Says how much a request counts as load.
pub(crate) const COST: HeaderName = HeaderName::from_static("mandoline-cost");
/// Says which task answered.
pub(crate) const TASK: HeaderName = HeaderName::from_static("mandoline-task");
/// A value may be 1 MiB: with `CONNECTIONS_MAX` of them on their way, memory stays within some gigabytes at worst.
pub(crate) const VALUE_MAX_BYTES: usize = 1024 * 1024;
/// Twice what the driver has in flight by default, four times over for other callers.
const CONNECTIONS_MAX: usize = 4_096;
/// How long a request under way may take once the server was told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use mandoline_core::slice::Slice;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::demo::testing::Part;

    async fn serve(part: Slice) -> (Server, Arc<Part>, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (part, stop) = (Arc::new(Part::new(part)), CancellationToken::new());
        let store = Arc::new(Store::new(2 << 20));
        let name = "task-1".parse().unwrap();
        (
            Server::start(&name, listener, Arc::clone(&part), store, stop.clone()).unwrap(),
            part,
            stop,
        )
    }

    /// Sends what a caller would type, and gives the reply without its date and what changes from one to the next.
    async fn say(server: &Server, request: &str) -> String {
        let exchange = async {
            let mut stream = TcpStream::connect(server.address()).await.unwrap();
            let request =
                request.replacen('\n', " HTTP/1.1\r\nhost: t\r\nconnection: close\r\n", 1);
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut reply = Vec::new();
            // A server that refuses a large body may reset the connection after its reply.
            while let Ok(1..) = stream.read_buf(&mut reply).await {}
            String::from_utf8(reply).unwrap()
        };
        let reply =
            timeout(Duration::from_secs(10), exchange).await.expect("an answer within 10 s");
        let lines = reply
            .lines()
            .filter(|line| !line.starts_with("date: ") && *line != "connection: close")
            .filter(|line| !line.starts_with("mandoline-load: requests="));
        lines.collect::<Vec<_>>().join("|")
    }

    async fn check(server: &Server, request: &str, reply: &str) {
        assert_eq!(say(server, request).await, reply, "{request:?}");
    }

    #[tokio::test]
    async fn a_value_is_written_read_and_deleted() {
        let (server, part, stop) = serve(Slice::FULL).await;
        let put = "PUT /kv/a%20b\ncontent-length: 5\r\nmandoline-cost: 2.5\r\n\r\nhello";
        let none = "HTTP/1.1 404 Not Found|content-type: text/plain; charset=utf-8|mandoline-task: task-1|content-length: 12||no such key";
        let done = "HTTP/1.1 204 No Content|mandoline-task: task-1|";
        check(&server, "GET /kv/a%20b\n\r\n", none).await;
        check(&server, put, done).await;
        check(
            &server,
            "GET /kv/%61%20b\n\r\n",
            "HTTP/1.1 200 OK|mandoline-task: task-1|content-length: 5||hello",
        )
        .await;
        check(&server, "DELETE /kv/a%20b\n\r\n", done).await;
        check(&server, "DELETE /kv/a%20b\n\r\n", none).await;
        assert_eq!(part.counted(), 6.5, "four at 1 and one at 2.5");
        stop.cancel();
        timeout(Duration::from_secs(10), server.finished()).await.expect("it stops within 10 s");
    }

    #[tokio::test]
    async fn anothers_key_is_answered_with_what_is_known_of_its_owner() {
        // "a" lies at e6c632b61e964e1f, "abc" at 78af5f94892f3950.
        let lower = Slice::new("0".parse().unwrap(), "7fffffffffffffff".parse().unwrap()).unwrap();
        let (server, part, _stop) = serve(lower).await;
        let reply = "HTTP/1.1 421 Misdirected Request|mandoline-generation: 1.42|mandoline-owner: 10.0.0.7:9000|\
                     content-type: text/plain; charset=utf-8|mandoline-task: task-1|content-length: 71||\
                     this task does not own the key: 10.0.0.7:9000 does, as far as it knows";
        check(&server, "GET /kv/a\n\r\n", reply).await;
        assert!(
            say(&server, "PUT /kv/a\ncontent-length: 1\r\n\r\nx").await.starts_with("HTTP/1.1 421")
        );
        assert!(say(&server, "GET /kv/abc\n\r\n").await.starts_with("HTTP/1.1 404"));
        assert_eq!(part.counted(), 3.0, "what came to the wrong task costs it too");
    }

    #[tokio::test]
    async fn a_key_that_goes_while_a_request_is_under_way_is_not_answered_for() {
        for request in ["GET /kv/a\n\r\n", "PUT /kv/a\ncontent-length: 1\r\n\r\nx"] {
            let (server, part, _stop) = serve(Slice::FULL).await;
            let entries = if request.starts_with("PUT") { 2 } else { 1 };
            part.goes_after(entries);
            let reply = say(&server, request).await;
            assert!(reply.starts_with("HTTP/1.1 421"), "{reply}");
            // It is back, but nobody knows what has been in between.
            part.goes_after(entries);
            part.comes_back();
            let reply = say(&server, request).await;
            assert!(
                reply.starts_with("HTTP/1.1 503") && reply.contains("retry-after: 1"),
                "{reply}"
            );
        }
    }

    #[tokio::test]
    async fn what_a_task_cannot_take_is_refused_by_name() {
        let (server, part, _stop) = serve(Slice::FULL).await;
        let chunked = format!(
            "PUT /kv/a\ntransfer-encoding: chunked\r\n\r\n100001\r\n{}\r\n0\r\n\r\n",
            "x".repeat(0x10_0001)
        );
        let most = format!("PUT /kv/a\ncontent-length: 1048576\r\n\r\n{}", "x".repeat(0x10_0000));
        let long = format!("GET /kv/{}\n\r\n", "k".repeat(8_193));
        for (request, status, text) in [
            (
                "PUT /kv/a\ncontent-length: 1048577\r\n\r\n",
                "413",
                "the value is too large: the most is 1048576 bytes",
            ),
            (&chunked, "413", "the value is too large"),
            (&most, "204", ""),
            (&long, "414", "the key is 8193 bytes long"),
            ("GET /kv/\n\r\n", "400", "the key is empty"),
            ("GET /kv/%zz\n\r\n", "400", "a % at byte 0"),
            ("GET /kv/a/b\n\r\n", "404", "ask for /kv/KEY"),
            ("GET /k\n\r\n", "404", "ask for /kv/KEY"),
            ("GET /\n\r\n", "200", "task task-1 holds 1 values"),
            ("POST /kv/a\n\r\n", "405", "use GET, PUT or DELETE"),
            ("GET /kv/a\nmandoline-cost: NaN\r\n\r\n", "400", "mandoline-cost: "),
            ("GET /kv/a\nmandoline-cost: -1\r\n\r\n", "400", "mandoline-cost: "),
            ("GET /livez\n\r\n", "200", "ok"),
        ] {
            let reply = say(&server, request).await;
            let shown: String = request.chars().take(60).collect();
            assert!(
                reply.starts_with(&format!("HTTP/1.1 {status} ")) && reply.contains(text),
                "{shown:?}: {reply}"
            );
        }
        assert!(part.counted() < 10.0);
    }
}

//! HTTP/2 from clients, in the clear: what tasks see of it, what becomes of floods and slow ones, and how connections end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::harness::{Backend, Body, Owners, Stage, Wire, status, text, until, within};
use super::tunnels;

/// A client of HTTP/2.
pub(super) struct Client {
    sender: SendRequest<Body>,
    pub(super) connection: JoinHandle<()>,
}

impl Client {
    pub(super) async fn over(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let made = handshake(TokioExecutor::new(), TokioIo::new(io));
        let (sender, connection) = within("a connection", made).await.unwrap();
        // However it ends, the requests say so.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Self { sender, connection }
    }

    pub(super) async fn connect(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap()).await
    }

    pub(super) async fn send(&mut self, request: Request<Body>) -> Response<Bytes> {
        let answer = within("an answer", self.sender.send_request(request)).await.unwrap();
        let (head, body) = answer.into_parts();
        let body = within("the rest", body.collect()).await.unwrap().to_bytes();
        Response::from_parts(head, body)
    }

    pub(super) async fn get(&mut self, path: &str) -> String {
        let answer = self.send(asked("GET", path).body(empty()).unwrap()).await;
        assert_eq!(answer.status(), StatusCode::OK);
        String::from_utf8(answer.into_body().to_vec()).unwrap()
    }
}

fn asked(method: &str, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(format!("http://shop.example{path}"))
}

fn empty() -> Body {
    Empty::new().boxed_unsync()
}

#[tokio::test]
async fn both_versions_are_spoken_on_one_port() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    let seen = client.get("/k/a").await;
    assert!(seen.starts_with("task GET /k/a HTTP/1.1\n"), "{seen}");
    assert!(seen.contains("host: shop.example\n"), "{seen}");
    assert!(seen.contains("via: 2 mandoline-p1\n"), "{seen}");
    let old = stage.talk("GET /k/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(old.contains("via: 1.1 mandoline-p1"), "{old}");
    assert_eq!(stage.stats().http2_connections, 1);
    // The first bytes alone may come one by one.
    let mut slow = stage.connect().await;
    for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" {
        slow.send([*byte]).await;
    }
    slow.send(frame(4, 0, 0, &[])).await;
    until("it to count", || stage.stats().http2_connections == 2).await;
}

#[tokio::test]
async fn what_differs_between_versions_is_translated() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    let crumbs = asked("GET", "/k/a").header("cookie", "a=1").header("cookie", "b=2");
    let seen = client.send(crumbs.body(empty()).unwrap()).await;
    let seen = String::from_utf8_lossy(seen.body()).into_owned();
    assert!(seen.contains("cookie: a=1; b=2\n"), "{seen}");
    // A body without a length.
    let pieces = [Ok::<_, Infallible>(hyper::body::Frame::data(Bytes::from("hello")))];
    let body = http_body_util::StreamBody::new(futures_util::stream::iter(pieces)).boxed_unsync();
    let seen = client.send(asked("GET", "/k/a").body(body).unwrap()).await;
    let seen = String::from_utf8_lossy(seen.body()).into_owned();
    assert!(seen.contains("transfer-encoding: chunked\n") && seen.ends_with("[hello]"), "{seen}");
    let body = Full::from("hello").boxed_unsync();
    let seen = client.send(asked("POST", "/k/a").body(body).unwrap()).await;
    let seen = String::from_utf8_lossy(seen.body()).into_owned();
    assert!(seen.contains("content-length: 5\n") && seen.ends_with("[hello]"), "{seen}");
}

#[tokio::test]
async fn trailers_come_through() {
    let backend = Backend::script(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: grpc-status\r\n\r\n2\r\nhi\r\n0\r\ngrpc-status: 0\r\n\r\n",
    )
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    let request = asked("GET", "/k/a").header("te", "trailers").body(empty()).unwrap();
    let answer = within("an answer", client.sender.send_request(request)).await.unwrap();
    let body = within("the rest", answer.into_body().collect()).await.unwrap();
    assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(body.to_bytes(), "hi");
}

#[tokio::test]
async fn requests_that_say_two_things_are_refused() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    let other = asked("GET", "/k/a").header("host", "bank.example").body(empty()).unwrap();
    assert_eq!(client.send(other).await.status(), StatusCode::BAD_REQUEST);
    let same = asked("GET", "/k/a").header("host", "Shop.Example").body(empty()).unwrap();
    assert_eq!(client.send(same).await.status(), StatusCode::OK);
    let trace = asked("TRACE", "/k/a").body(empty()).unwrap();
    assert_eq!(client.send(trace).await.status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    let stage = Stage::new(Owners::none());
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    let answer = client.send(asked("HEAD", "/k/a").body(empty()).unwrap()).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.body().is_empty());
}

#[tokio::test]
async fn a_request_under_way_is_answered_before_the_proxy_ends() {
    let (asked_for, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&asked_for), Arc::clone(&go));
    let backend = Backend::serve(move |_| {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        async move {
            tell.notify_one();
            wait.notified().await;
            text("done")
        }
    })
    .await;
    let Stage { proxy, owners: _owners } = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(proxy.local_addr()).await;
    let mut other = Client { sender: client.sender.clone(), connection: tokio::spawn(async {}) };
    let answer = tokio::spawn(async move { other.get("/k/a").await });
    within("the request", asked_for.notified()).await;
    let stopping = tokio::spawn(proxy.stop());
    go.notify_one();
    assert_eq!(within("the answer", answer).await.unwrap(), "done");
    within("the proxy's end", stopping).await.unwrap();
    within("the connection's end", &mut client.connection).await.unwrap();
}

#[tokio::test]
async fn floods_end_their_connection_and_no_other() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    client.get("/k/a").await;
    // :method GET, :scheme http, :path /, :authority a
    let head = [0x82, 0x86, 0x84, 0x41, 1, b'a'];
    let resets = (0..2000).map(|n| 2 * n + 1).flat_map(|stream| {
        [frame(1, 0x5, stream, &head), frame(3, 0, stream, &[0, 0, 0, 8])].concat()
    });
    let pieces = (0..20_000).flat_map(|_| frame(9, 0, 1, &[]));
    let continuations = frame(1, 0x1, 1, &head[..1]).into_iter().chain(pieces);
    let floods: [Vec<u8>; 2] = [resets.collect(), continuations.collect()];
    // Those that are counted by the second are in `frames`, where the clock is the test's.
    for (n, flood) in floods.into_iter().enumerate() {
        let mut stream = TcpStream::connect(stage.proxy.local_addr()).await.unwrap();
        let begin = [PREFACE, &frame(4, 0, 0, &[])].concat();
        stream.write_all(&begin).await.unwrap();
        // The proxy may close before all has been sent.
        drop(within("the flood", stream.write_all(&flood)).await);
        let wire = Wire::of(stream);
        wire.rest().await;
        let ended = || stage.stats().floods + stage.stats().malformed > n as u64;
        until(&format!("flood {n} to end"), ended).await;
    }
    assert!(stage.stats().floods >= 1, "{:?}", stage.stats());
    client.get("/k/a").await;
}

#[tokio::test]
async fn streams_that_are_reset_as_they_are_opened_cost_no_task_a_request() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send([PREFACE, &frame(4, 0, 0, &[])].concat()).await;
    // :method GET, :scheme http, :path /k, :authority a
    let head = [0x82, 0x86, 0x04, 2, b'/', b'k', 0x41, 1, b'a'];
    for batch in 0..16_u32 {
        let pair = |n| {
            let stream = 2 * (10 * batch + n) + 1;
            [frame(1, 0x5, stream, &head), frame(3, 0, stream, &[0, 0, 0, 8])].concat()
        };
        wire.send((0..10).flat_map(pair).collect::<Vec<u8>>()).await;
        let ended = || stage.stats().abandoned >= 10 * (u64::from(batch) + 1);
        until("the streams to end", ended).await;
    }
    let tried = stage.stats().tasks.values().map(|task| task.tried).sum::<u64>();
    assert!(tried <= 20, "{tried} of 160");
}

#[tokio::test]
async fn slow_and_idle_clients_are_let_go() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.timeouts.header = Duration::from_millis(100);
        config.timeouts.client_idle = Duration::from_secs(1);
    });
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    client.get("/k/a").await;
    within("the idle connection's end", &mut client.connection).await.unwrap();
    // The last says that it is a whole head, and does not go on within it.
    let cut = frame(1, 4, 1, &[0x82; 20]);
    for begun in [
        PREFACE.to_vec(),
        [PREFACE, &frame(1, 0, 1, &[0x82])].concat(),
        [PREFACE, &frame(4, 0, 0, &[]), &cut[..12]].concat(),
    ] {
        let mut wire = stage.connect().await;
        wire.send(begun).await;
        wire.rest().await;
    }
    assert_eq!(stage.stats().malformed, 3);
}

#[tokio::test]
async fn http2_can_be_left_out() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.listeners[0].http2 = None;
    });
    let answer = stage.talk("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(stage.stats().malformed, 1);
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[tokio::test]
async fn a_body_without_a_length_is_cut_off_where_it_gets_too_long() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.limits.body_bytes = 9000);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    for (pieces, status) in [(3, 200), (4, 413), (2, 200)] {
        let piece = || Ok(http_body::Frame::data(Bytes::from_static(&[b'x'; 3000])));
        let body = futures_util::stream::iter((0..pieces).map(move |_| piece()));
        let body: Body = http_body_util::StreamBody::new(body).boxed_unsync();
        let answer = client.send(asked("PUT", "/k/a").body(body).unwrap()).await;
        assert_eq!(answer.status().as_u16(), status, "{pieces}");
    }
    assert_eq!(stage.stats().long_bodies, 1);
}

/// Asks for a tunnel on a stream.
fn connects(protocol: &'static str) -> Request<Body> {
    let request = asked("CONNECT", "/k/a").header("sec-websocket-version", "13");
    request.extension(hyper::ext::Protocol::from_static(protocol)).body(empty()).unwrap()
}

#[tokio::test]
async fn a_stream_becomes_a_websocket_beside_other_requests() {
    let backend = tunnels::echo().await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    let mut tunnels = Vec::new();
    for number in 1..=3 {
        let asking = client.sender.send_request(connects("websocket"));
        let mut answer = within("an answer", asking).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert!(!answer.headers().contains_key("sec-websocket-accept"), "{answer:?}");
        let stream = within("a stream", hyper::upgrade::on(&mut answer)).await.unwrap();
        tunnels.push(TokioIo::new(stream));
        until("the tunnel to be open", || stage.stats().tunnels == number).await;
    }
    assert_eq!(stage.stats().connections, 1);
    let long = "x".repeat(300_000);
    for (number, tunnel) in tunnels.iter_mut().enumerate() {
        let text = format!("hello {number} {long}");
        let (mut read, mut write) = tokio::io::split(&mut *tunnel);
        let mut back = vec![0; text.len()];
        let (sent, got) = within("bytes there and back", async {
            tokio::join!(write.write_all(text.as_bytes()), read.read_exact(&mut back))
        })
        .await;
        sent.unwrap();
        got.unwrap();
        assert!(back == text.as_bytes());
    }
    // One is ended in order, one is dropped, and one lasts until the proxy stops.
    let mut rest = String::new();
    tunnels[0].shutdown().await.unwrap();
    within("the end", tunnels[0].read_to_string(&mut rest)).await.unwrap();
    until("the tunnel to end", || stage.stats().tunnels == 2).await;
    drop(tunnels.remove(1));
    until("the tunnel to end", || stage.stats().tunnels == 1).await;
    let tally = stage.proxy.tally();
    let stopping = tokio::spawn(stage.proxy.stop());
    within("the end", tunnels[1].read_to_string(&mut rest)).await.unwrap();
    within("the proxy to stop", stopping).await.unwrap();
    assert_eq!(rest, "");
    let stats = tally.stats();
    assert_eq!((stats.tunnels, stats.tunnels_cut, stats.in_flight), (0, 1, 0));
}

#[tokio::test]
async fn a_stream_that_is_refused_is_an_answer_like_any_other() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.routes[0].upgrades = Box::default();
    });
    let mut client = Client::connect(stage.proxy.local_addr()).await;
    for (protocol, status) in [("websocket", 501), ("connect-udp", 405)] {
        let answer = client.send(connects(protocol)).await;
        assert_eq!(answer.status().as_u16(), status, "{protocol}");
    }
    // What the task says is the answer, unless the client would take it for a tunnel.
    for (says, gets) in [(426, 426), (503, 503), (302, 302), (200, 502), (204, 502)] {
        let backend = Backend::serve(move |_| async move { status(says, &[]) }).await;
        let stage = Stage::new(Owners::all(backend.address).await);
        let mut client = Client::connect(stage.proxy.local_addr()).await;
        assert_eq!(client.send(connects("websocket")).await.status().as_u16(), gets, "{says}");
        let next = asked("GET", "/k/b").body(empty()).unwrap();
        assert_eq!(client.send(next).await.status().as_u16(), says);
        assert_eq!(stage.stats().tunnels, 0);
    }
}

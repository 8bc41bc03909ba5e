//! What is too much or too slow ends, with an answer where one is possible.

use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::harness::{Backend, Owners, Stage, Wire, talk, text, until, within};

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
const SHORT: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let backend = Backend::echo("task").await;
    let cases = [
        (
            "one long line",
            format!("GET /kv/a HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(40 << 10)),
            "431",
        ),
        (
            "far too long a line",
            format!("GET /kv/a HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(1 << 20)),
            "431",
        ),
        (
            "far too long a key",
            format!("GET /kv/{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(1 << 20)),
            "431",
        ),
        (
            "many lines",
            format!("GET /kv/a HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: 1\r\n".repeat(101)),
            "431",
        ),
        (
            "a long target",
            format!("GET /kv/{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(40 << 10)),
            "431",
        ),
    ];
    for (what, request, wanted) in cases {
        let stage = Stage::new(Owners::all(backend.address).await);
        let answer = stage.talk(&request).await;
        // Nobody reads the rest of a head that is far too large, so its answer may be lost in the reset.
        let fine = answer.starts_with(&format!("HTTP/1.1 {wanted} "));
        assert!(fine || (what.starts_with("far") && answer.is_empty()), "{what}: {answer}");
        assert_eq!(stage.stats().connects, 0, "{what}");
    }
    let stage = Stage::new(Owners::all(backend.address).await);
    let most = format!(
        "GET /kv/a HTTP/1.1\r\nhost: a\r\nx: {}\r\nconnection: close\r\n\r\n",
        "x".repeat(30 << 10)
    );
    assert!(stage.talk(&most).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_answer_whose_head_is_too_large_is_refused() {
    let backend = Backend::raw(|stream| async {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send(format!(
            "HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 0\r\n\r\n",
            "x".repeat(40 << 10)
        ))
        .await;
        wire.rest().await;
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage.talk(GET).await;
    assert!(
        answer.starts_with("HTTP/1.1 502") && answer.contains("error=http_protocol_error"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_slow_head_ends_the_connection() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.header = SHORT);
    for begun in ["", "GET /kv/a HT", "GET /kv/a HTTP/1.1\r\nhost: a\r\n"] {
        let mut wire = stage.connect().await;
        wire.send(begun).await;
        assert_eq!(wire.rest().await, "", "{begun}");
    }
    until("the connections to be counted", || stage.stats().connections == 0).await;
    // A connection that never said a word had no head to be malformed.
    assert_eq!((stage.stats().requests, stage.stats().malformed), (0, 2));
}

#[tokio::test]
async fn a_connection_that_is_kept_may_be_idle_for_longer_than_a_head_may_take() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.timeouts.header = SHORT;
        config.timeouts.client_idle = 4 * SHORT;
    });
    let mut wire = stage.connect().await;
    let mut pause = tokio::time::interval(2 * SHORT);
    for body in ["", "hello"] {
        pause.tick().await;
        let length = body.len();
        wire.send(format!(
            "PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await;
        wire.read_to(&format!("[{body}]")).await;
    }
    // A head that has begun and does not end still has the shorter time.
    let before = Instant::now();
    wire.send("GET").await;
    assert_eq!(wire.rest().await, "");
    assert!(before.elapsed() < 3 * SHORT, "{:?}", before.elapsed());

    let mut wire = stage.connect().await;
    wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
    wire.read_to("[]").await;
    let before = Instant::now();
    assert_eq!(wire.rest().await, "");
    assert!(before.elapsed() >= 3 * SHORT, "{:?}", before.elapsed());
}

#[tokio::test]
async fn a_task_that_accepts_and_never_answers_gets_a_504() {
    let backend = Backend::raw(|stream| async {
        Wire::of(stream).rest().await;
    })
    .await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.response = SHORT);
    for method in ["GET", "POST"] {
        let answer = stage.talk(&GET.replace("GET", method)).await;
        assert!(answer.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"), "{answer}");
        assert!(
            answer.contains("proxy-status: mandoline; error=http_response_timeout"),
            "{answer}"
        );
    }
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.retried, stats.in_flight), (2, 0, 0));
}

#[tokio::test]
async fn an_answer_that_stops_coming_breaks_off() {
    let backend = Backend::raw(|stream| async {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        let mut beat = tokio::time::interval(SHORT / 2);
        for _ in 0..6 {
            beat.tick().await;
            wire.send("1\r\nx\r\n").await;
        }
        wire.rest().await;
    })
    .await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.stall = SHORT);
    let answer = stage.talk(GET).await;
    // All that came in time got through, though it took longer than the limit in all.
    assert!(answer.starts_with("HTTP/1.1 200") && answer.matches("x\r\n").count() == 6, "{answer}");
    assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
    assert_eq!((stage.stats().failed, stage.stats().answered), (1, 0));
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let backend = Backend::serve(|_| async { text(vec![0; 64 << 20]) }).await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.stall = 2 * SHORT);
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    until("the client to be given up", || stage.stats().abandoned == 1).await;
}

#[tokio::test]
async fn a_body_that_keeps_coming_is_not_late() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.response = SHORT);
    let mut wire = stage.connect().await;
    wire.send("PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\nconnection: close\r\n\r\n")
        .await;
    let mut beat = tokio::time::interval(SHORT / 4);
    for _ in 0..10 {
        beat.tick().await;
        wire.send("x").await;
    }
    let answer = wire.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("[xxxxxxxxxx]"), "{answer}");
}

#[tokio::test]
async fn a_body_that_stops_coming_gets_a_408() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.response = SHORT);
    let mut wire = stage.connect().await;
    wire.send("PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc").await;
    let answer = wire.rest().await;
    assert!(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{answer}");
    assert_eq!((stage.stats().refused, stage.stats().failed), (1, 0));
}

#[tokio::test]
async fn a_task_that_does_not_accept_is_given_up() {
    // A socket whose queue is full: it holds one connection more than it was told, and ignores the rest.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut fill = Vec::new();
    while let Ok(Ok(stream)) = tokio::time::timeout(SHORT, TcpStream::connect(address)).await {
        fill.push(stream);
    }
    let stage = Stage::with(Owners::all(address).await, |config| config.timeouts.connect = SHORT);
    let before = Instant::now();
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("cannot be reached"), "{answer}");
    assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.limits.connections = 2);
    let (mut one, two) = (stage.connect().await, stage.connect().await);
    until("both to be accepted", || stage.stats().connections == 2).await;
    let answer = talk(stage.proxy.local_addr(), b"").await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("error=connection_limit_reached"),
        "{answer}"
    );
    assert!(answer.contains("retry-after: 1\r\n"), "{answer}");
    one.send(GET).await;
    assert!(one.rest().await.starts_with("HTTP/1.1 200"));
    until("a place", || stage.stats().connections == 1).await;
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    drop(two);
    until("no connection to be left", || stage.stats().connections == 0).await;
}

#[tokio::test]
async fn a_connection_to_a_task_that_has_nothing_to_do_is_closed() {
    let (tell, mut closed) = tokio::sync::mpsc::unbounded_channel();
    let backend = Backend::raw(move |stream| {
        let tell = tell.clone();
        async move {
            let mut wire = Wire::of(stream);
            wire.head().await;
            wire.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            let mut nothing = [0];
            tell.send(wire.stream.read(&mut nothing).await.unwrap()).unwrap();
        }
    })
    .await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.timeouts.idle = SHORT);
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    assert_eq!(within("the connection to be closed", closed.recv()).await, Some(0));
}

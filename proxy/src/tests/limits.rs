//! What is too much or too slow ends, with an answer where one is possible.

use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::harness::{Backend, Owners, Stage, Wire, key_at, talk, text, until, within};

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
    wire.send("PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\nconnection: close\r\n\r\n")
        .await;
    let mut beat = tokio::time::interval(SHORT / 4);
    for _ in 0..10 {
        beat.tick().await;
        wire.send([b'x'; 100]).await;
    }
    let answer = wire.rest().await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with(&format!("[{}]", "x".repeat(1000))),
        "{answer}"
    );
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
    assert_eq!(stage.stats().slow_bodies, 1);
}

#[tokio::test]
async fn a_body_that_trickles_gets_a_408_and_a_call_of_grpc_does_not() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.timeouts.response = 2 * SHORT;
        // So much that no busy machine comes near it, and a byte at a time does not either.
        config.limits.body_rate = 1000;
    });
    // Longer than two of these windows, and never silent for one of them.
    let bytes = 24;
    for (kind, status) in [("text/plain", "408"), ("application/grpc", "200")] {
        let mut wire = stage.connect().await;
        wire.send(format!("{PUT}content-type: {kind}\r\ncontent-length: {bytes}\r\n\r\n")).await;
        let mut beat = tokio::time::interval(SHORT / 4);
        for _ in 0..bytes {
            beat.tick().await;
            // The proxy may have closed by then.
            drop(wire.stream.write_all(b"x").await);
        }
        let answer = wire.rest().await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{kind}: {answer}");
    }
    assert_eq!((stage.stats().slow_bodies, stage.stats().refused), (1, 1));
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

const PUT: &str = "PUT /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n";

/// A body of so many bytes that does not say how many they are.
fn chunked(bytes: usize) -> String {
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
    format!("{PUT}transfer-encoding: chunked\r\n\r\n{}0\r\n\r\n", chunk.repeat(bytes / 1024))
}

#[tokio::test]
async fn a_body_that_says_that_it_is_too_long_is_refused_before_it_is_asked_for() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.limits.body_bytes = 10);
    let put = |length: usize, more: &str, body: &str| {
        format!("{PUT}content-length: {length}\r\n{more}\r\n{body}")
    };
    let refused = [put(11, "", "0123456789x"), put(1 << 40, "expect: 100-continue\r\n", "")];
    for (n, request) in refused.into_iter().enumerate() {
        let answer = stage.talk(&request).await;
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("10 bytes"), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        assert_eq!((stage.stats().connects, stage.stats().long_bodies), (0, n as u64 + 1));
    }
    let answer = stage.talk(&put(10, "", "0123456789")).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("[0123456789]"), "{answer}");
    let stats = stage.stats();
    assert_eq!((stats.long_bodies, stats.refused, stats.answered), (2, 2, 1));
}

#[tokio::test]
async fn a_body_that_turns_out_too_long_is_cut_off_and_its_task_sees_that() {
    let (tell, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let backend = Backend::raw(move |stream| {
        let tell = tell.clone();
        async move {
            let mut wire = Wire::of(stream);
            wire.head().await;
            tell.send(wire.rest().await).unwrap();
        }
    })
    .await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.limits.body_bytes = 128 << 10;
    });
    let answer = stage.talk(&chunked(256 << 10)).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let body = within("the task to see the end", seen.recv()).await.unwrap();
    assert!(!body.ends_with("0\r\n\r\n"), "the task takes it for whole");
    assert!(body.matches('x').count() <= 128 << 10);
    assert_eq!((stage.stats().long_bodies, stage.stats().refused), (1, 1));
}

#[tokio::test]
async fn a_body_as_long_as_may_be_is_passed_on_and_a_route_may_take_more_or_less() {
    let backend = Backend::echo("task").await;
    for (usual, own, bytes, status) in [
        (64 << 10, None, 64 << 10, 200),
        (64 << 10, None, 65 << 10, 413),
        (64 << 10, Some(128 << 10), 128 << 10, 200),
        (64 << 10, Some(1024), 2048, 413),
        (64 << 10, Some(0), 1024, 413),
    ] {
        let stage = Stage::with(Owners::all(backend.address).await, |config| {
            config.limits.body_bytes = usual;
            config.routes[0].forwarding.body_bytes = own;
        });
        let answer = stage.talk(&chunked(bytes)).await;
        let case = format!("{usual} {own:?} {bytes}: {answer:.200}");
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{case}");
    }
}

#[tokio::test]
async fn an_answer_that_has_begun_breaks_off_where_its_request_is_too_long() {
    let backend = Backend::raw(|stream| async move {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n").await;
        wire.rest().await;
    })
    .await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.limits.body_bytes = 2048);
    let mut wire = stage.connect().await;
    let request = chunked(4096);
    wire.send(&request[..1200]).await;
    wire.read_to("hi\r\n").await;
    wire.send(&request[1200..]).await;
    let rest = wire.rest().await;
    assert!(!rest.ends_with("0\r\n\r\n"), "{rest}");
    until("the request to end", || stage.stats().in_flight == 0).await;
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.long_bodies), (1, 1));
}

#[tokio::test]
async fn streams_of_grpc_are_as_long_as_they_like_unless_their_route_says_so() {
    let backend = Backend::echo("task").await;
    for (own, status) in [(None, None), (Some(1024), Some("grpc-status: 8"))] {
        let stage = Stage::with(Owners::all(backend.address).await, |config| {
            config.limits.body_bytes = 1024;
            config.routes[0].forwarding.body_bytes = own;
        });
        let request = chunked(4096).replace("host: a", "host: a\r\ncontent-type: application/grpc");
        let answer = stage.talk(&request).await;
        match status {
            None => assert!(answer.contains("task PUT"), "{answer}"),
            Some(status) => assert!(answer.contains(status), "{answer}"),
        }
    }
}

#[tokio::test]
async fn a_body_that_holds_the_key_or_waits_is_bounded_too() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.limits.body_bytes = 1024;
        key_at(config, "json(/user)");
    });
    let answer = stage.talk(&chunked(2048)).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let short = "{\"user\": \"bob\"}";
    let answer = stage.talk(&format!("{PUT}content-length: {}\r\n\r\n{short}", short.len())).await;
    assert!(answer.contains(short), "{answer}");

    // Nobody serves the key yet, so that the request waits.
    let other = Backend::echo("other").await;
    let owners = Owners::none();
    let step = mandoline_core::transit::Step::Releasing;
    owners.hand_over(1, step, (1, backend.address), (2, other.address)).await;
    let stage = Stage::with(owners, |config| config.limits.body_bytes = 1024);
    let answer = stage.talk(&chunked(2048)).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!((stage.stats().connects, stage.stats().long_bodies), (0, 1));
}

fn holds_key(body: &str) -> String {
    let length = body.len();
    format!(
        "PUT /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn json_of(length: usize) -> String {
    format!("{{\"user\": \"bob\", \"x\": \"{}\"}}", "x".repeat(length - 24))
}

#[tokio::test]
async fn a_body_that_holds_the_key_has_a_room_of_its_own() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        key_at(config, "json(/user)");
        config.limits.replay_bytes = 0;
    });
    for length in [24, 60_000] {
        let body = json_of(length);
        let answer = stage.talk(&holds_key(&body)).await;
        assert!(answer.contains(&body), "{answer}");
    }
    let long = stage.talk(&holds_key(&json_of(65_537))).await;
    assert!(long.starts_with("HTTP/1.1 400 ") && long.contains("65536"), "{long}");
}

#[tokio::test]
async fn a_body_that_holds_the_key_may_come_in_single_bytes() {
    let backend = Backend::echo("task").await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| key_at(config, "json(/user)"));
    for (length, status) in [(5000, "200"), (65_536, "200"), (65_537, "400")] {
        let chunks: String = json_of(length).chars().map(|c| format!("1\r\n{c}\r\n")).collect();
        let request = format!("{PUT}transfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n");
        let answer = stage.talk(&request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{length}: {answer}");
        assert_eq!(answer.contains(&json_of(length)), status == "200");
    }
}

#[tokio::test]
async fn without_room_for_a_body_that_holds_the_key_there_is_a_503() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        key_at(config, "json(/user)");
        config.limits.key_bytes = 64 << 10;
    });
    let (mut first, body) = (stage.connect().await, json_of(60_000));
    let request = holds_key(&body);
    let (begin, end) = request.split_at(request.len() - 10);
    first.send(begin).await;
    until("its bytes to be kept", || stage.stats().requests == 1).await;
    let ask = || async { stage.talk(&holds_key(&json_of(60_000))).await };
    let mut answer = ask().await;
    while answer.starts_with("HTTP/1.1 200 ") {
        // The first one's bytes are yet to be read.
        answer = ask().await;
    }
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: 1\r\n"),
        "{answer}"
    );
    let stats = stage.stats();
    assert_eq!((stats.key_bodies_refused, stats.failed), (1, 1));
    // A short one fits beside it, and whoever was let in gets through.
    assert!(stage.talk(&holds_key(&json_of(30))).await.starts_with("HTTP/1.1 200 "));
    first.send(end).await;
    assert!(first.rest().await.contains(&body));
    until("the room to be free again", || stage.stats().answered >= 2).await;
    assert!(ask().await.starts_with("HTTP/1.1 200 "));
}

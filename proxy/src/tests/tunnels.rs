//! Connections that switch to another protocol: what is asked for and agreed to, what goes through, and how it ends.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::{SinkExt, StreamExt};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{accept_async, client_async};

use super::harness::{Backend, Owners, Stage, Wire, until, within};
use crate::ask::Ask;
use crate::config::transport::{Protocol, Transport};
use crate::record::{Observer, Outcome, Record};

pub(super) const ASK: &str = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: WebSocket\r\nsec-websocket-key: x\r\n\r\n";
const AGREE: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: y\r\n\r\n";

/// A task that agrees to everything, and sends back what it gets until that ends.
pub(super) async fn echo() -> Backend {
    Backend::raw(|stream| async move {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send(AGREE).await;
        let ahead = wire.unread();
        wire.send(ahead).await;
        let (mut read, mut write) = wire.stream.split();
        drop(tokio::io::copy(&mut read, &mut write).await);
        drop(write.shutdown().await);
    })
    .await
}

/// Opens a tunnel.
pub(super) async fn open(stage: &Stage) -> Wire {
    let mut wire = stage.connect().await;
    wire.send(ASK).await;
    let head = wire.head().await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    wire
}

pub(super) async fn says(wire: &mut Wire, text: &str) {
    wire.send(text).await;
    assert_eq!(wire.read_to(text).await, text);
}

/// What becomes of each request, when it has ended.
fn observed(config: &mut crate::config::Config) -> Arc<Mutex<Vec<Record>>> {
    let records = Arc::<Mutex<Vec<Record>>>::default();
    let noted = Arc::clone(&records);
    let note = move |record: &Record| noted.lock().unwrap().push(record.clone());
    config.observer = Some(Observer::new(note));
    records
}

#[tokio::test]
async fn websockets_talk_through_the_proxy() {
    let backend = Backend::raw(|stream| async move {
        let mut socket = accept_async(stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() || message.is_binary() {
                socket.send(message).await.unwrap();
            }
        }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let stream = TcpStream::connect(stage.proxy.local_addr()).await.unwrap();
    let (mut socket, answer) =
        within("a WebSocket", client_async("ws://a/kv/a", stream)).await.unwrap();
    assert!(answer.headers().contains_key("sec-websocket-accept"), "{answer:?}");
    for length in [0, 5, 70_000] {
        let message = Message::text("x".repeat(length));
        within("a message to be taken", socket.send(message.clone())).await.unwrap();
        let back = within("the message back", socket.next()).await.unwrap().unwrap();
        assert_eq!(back, message);
    }
    assert_eq!(stage.stats().tunnels, 1);
    within("goodbye", socket.close(None)).await.unwrap();
    while within("the end", socket.next()).await.is_some() {}
    drop(socket);
    // Its place is given back before its request is counted as answered.
    until("the tunnel to end", || stage.stats().tunnels + stage.stats().in_flight == 0).await;
    let stats = stage.stats();
    assert_eq!((stats.requests, stats.answered, stats.in_flight), (1, 1, 0));
    assert!(stats.tunnel_bytes.iter().all(|bytes| *bytes > 70_000), "{stats:?}");
}

#[tokio::test]
async fn both_sides_hear_of_one_hop_and_of_nothing_else() {
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&heads);
    let backend = Backend::raw(move |stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut wire = Wire::of(stream);
            let head = wire.head().await;
            seen.lock().unwrap().push(head);
            // The first bytes come in one piece with the head.
            wire.send(format!(
                "{}welcome\n",
                AGREE.replace("\r\n\r\n", "\r\ncontent-length: 5\r\n\r\n")
            ))
            .await;
            wire.read_to("early\n").await;
            wire.send("heard\n").await;
        }
    })
    .await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        // A job whose tasks are spoken to in HTTP/2 is spoken to in HTTP/1.1 for this.
        let transport = Transport { protocol: Protocol::Http2, tls: None };
        config.transports.insert("kv".parse().unwrap(), transport);
    });
    let mut wire = stage.connect().await;
    wire.send(format!("{}early\n", ASK.replace("\r\n\r\n", "\r\nte: trailers\r\n\r\n"))).await;
    let head = wire.head().await;
    for line in [
        "upgrade: websocket",
        "connection: upgrade",
        "sec-websocket-accept: y",
        "via: 1.1 mandoline-p1",
    ] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "{line}: {head}");
    }
    assert!(!head.contains("content-length") && !head.contains("close"), "{head}");
    assert_eq!(wire.rest().await, "welcome\nheard\n");
    let heads = heads.lock().unwrap();
    let [head] = &heads[..] else { panic!("{heads:?}") };
    for line in [
        "upgrade: websocket",
        "connection: upgrade",
        "sec-websocket-key: x",
        "via: 1.1 mandoline-p1",
    ] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "{line}: {head}");
    }
    assert!(!head.contains("content-length") && !head.contains("chunked"), "{head}");
}

#[tokio::test]
async fn each_side_ends_its_own_half() {
    let backend = Backend::raw(|stream| async move {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send(AGREE).await;
        let heard = wire.read_to("bye").await;
        let mut rest = [0; 1];
        assert_eq!(wire.stream.read(&mut rest).await.unwrap(), 0);
        wire.send(format!("{heard} yourself")).await;
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = open(&stage).await;
    wire.send("bye").await;
    wire.stream.shutdown().await.unwrap();
    assert_eq!(wire.rest().await, "bye yourself");
    until("the tunnel to end", || stage.stats().answered == 1).await;
    assert_eq!(stage.stats().tunnels, 0);
}

#[tokio::test]
async fn much_goes_through_at_the_pace_of_whoever_takes_it() {
    const BYTES: usize = 8 << 20;
    let backend = echo().await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let wire = open(&stage).await;
    let sent: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    let (mut read, mut write) = wire.stream.into_split();
    let sending = tokio::spawn({
        let sent = sent.clone();
        async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        }
    });
    // Nobody takes anything until all that fits on the way is on it.
    until("the way to be full", || stage.stats().tunnel_bytes[0] > 1 << 20).await;
    let mut got = BytesMut::with_capacity(BYTES);
    while within("more", read.read_buf(&mut got)).await.unwrap() > 0 {}
    within("all to be sent", sending).await.unwrap();
    assert!(got == sent, "{} of {BYTES} bytes came back", got.len());
    assert_eq!(stage.stats().tunnel_bytes, [BYTES as u64; 2]);
}

#[tokio::test]
async fn a_task_that_does_not_agree_answers_like_any_other() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    // What comes behind is the next request, whatever the client thinks it has switched to.
    wire.send(format!("{ASK}GET /kv/b HTTP/1.1\r\nhost: a\r\n\r\n")).await;
    let first = wire.read_to("[]").await;
    assert!(first.starts_with("HTTP/1.1 200 ") && first.contains("task GET /kv/a "), "{first}");
    assert!(first.contains("\nupgrade: websocket\n"), "{first}");
    let second = wire.read_to("[]").await;
    assert!(second.contains("task GET /kv/b ") && !second.contains("upgrade"), "{second}");
    wire.send("GET /kv/c HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(wire.rest().await.contains("task GET /kv/c "));
    let stats = stage.stats();
    assert_eq!((stats.answered, stats.tunnels, stats.connects), (3, 0, 1));
}

#[tokio::test]
async fn a_task_that_agrees_to_something_else_has_failed() {
    for (asked, agreed) in [
        ("GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", AGREE.to_owned()),
        (ASK, AGREE.replace("websocket\r", "x-tunnel\r")),
        (ASK, AGREE.replace("websocket\r", "websocket, x-tunnel\r")),
        (ASK, AGREE.replace("upgrade: websocket\r\n", "")),
        (ASK, AGREE.replace("connection: upgrade\r\n", "")),
    ] {
        let text = agreed.clone();
        let backend = Backend::raw(move |stream| {
            let text = text.clone();
            async move {
                let mut wire = Wire::of(stream);
                wire.head().await;
                wire.send(text).await;
                // Nothing of the client's comes this way.
                assert_eq!(wire.rest().await, "");
            }
        })
        .await;
        let stage = Stage::new(Owners::all(backend.address).await);
        let mut wire = stage.connect().await;
        wire.send(asked).await;
        let head = wire.head().await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{asked}{agreed}{head}");
        assert_eq!((stage.stats().failed, stage.stats().tunnels), (1, 0), "{agreed}");
    }
}

#[tokio::test]
async fn only_what_a_route_names_is_asked_for() {
    let backend = Backend::echo("task").await;
    let ask = |upgrade: &str| {
        format!(
            "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close, upgrade\r\nupgrade: {upgrade}\r\n\r\n"
        )
    };
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.routes[0].upgrades = Box::new(["x-tunnel/2".parse().unwrap()]);
    });
    let granted = stage.talk(&ask("X-Tunnel/2")).await;
    assert!(granted.contains("\nupgrade: x-tunnel/2\n"), "{granted}");
    for other in ["websocket", "x-tunnel", "x-tunnel/2, websocket", "web socket", "h2"] {
        let refused = stage.talk(&ask(other)).await;
        assert!(refused.starts_with("HTTP/1.1 501 ") && refused.contains("upgrades"), "{refused}");
    }
    let passed_over = stage.talk(&ask("h2c")).await;
    assert!(passed_over.contains("task GET") && !passed_over.contains("h2c"), "{passed_over}");

    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.routes[0].upgrades = Box::default();
    });
    assert!(stage.talk(&ask("websocket")).await.starts_with("HTTP/1.1 501 "));
    assert_eq!(stage.stats().refused, 1);
}

#[tokio::test]
async fn a_tunnel_in_which_nobody_says_anything_ends() {
    let backend = echo().await;
    let mut records = None;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.timeouts.tunnel = Duration::from_millis(300);
        records = Some(observed(config));
    });
    let mut wire = open(&stage).await;
    // One that talks lives longer than that.
    let mut every = tokio::time::interval(Duration::from_millis(20));
    for _ in 0..30 {
        every.tick().await;
        says(&mut wire, "x").await;
    }
    assert_eq!(stage.stats().tunnels, 1);
    assert_eq!(wire.rest().await, "");
    until("the tunnel to end", || stage.stats().answered == 1).await;
    assert_eq!(stage.stats().tunnels_silent, 1);
    let records = records.unwrap();
    let records = records.lock().unwrap();
    assert_eq!((records[0].status, records[0].bytes_out), (Some(101), 30));
}

#[tokio::test]
async fn a_proxy_that_stops_lets_tunnels_end_and_cuts_those_that_do_not() {
    let backend = echo().await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.timeouts.grace = Duration::from_secs(2);
    });
    let (mut ends, mut stays) = (open(&stage).await, open(&stage).await);
    let tally = stage.proxy.tally();
    let stopping = tokio::spawn(stage.proxy.stop());
    until("the port to be closed", || tally.stats().connections == 2).await;
    says(&mut ends, "still here").await;
    ends.stream.shutdown().await.unwrap();
    assert_eq!(ends.rest().await, "");
    says(&mut stays, "still here").await;
    assert_eq!(stays.rest().await, "");
    within("the proxy to stop", stopping).await.unwrap();
    let stats = tally.stats();
    assert_eq!((stats.answered, stats.tunnels, stats.tunnels_cut), (2, 0, 1));
}

#[tokio::test]
async fn a_side_that_breaks_off_ends_the_tunnel_for_the_other() {
    let breaks = Backend::raw(|stream| async move {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send(AGREE).await;
        wire.read_to("break").await;
        SockRef::from(&wire.stream).set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    let mut records = None;
    let stage = Stage::with(Owners::all(breaks.address).await, |config| {
        records = Some(observed(config));
    });
    let records = records.unwrap();
    let mut wire = open(&stage).await;
    wire.send("break").await;
    assert_eq!(wire.rest().await, "");
    let outcomes = || records.lock().unwrap().iter().map(|r| r.outcome).collect::<Vec<_>>();
    until("the tunnel to end", || outcomes() == [Outcome::Failed]).await;

    let wire = open(&stage).await;
    SockRef::from(&wire.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(wire);
    until("the tunnel to end", || outcomes() == [Outcome::Failed, Outcome::Abandoned]).await;
    let stats = stage.stats();
    assert_eq!((stats.tunnels, stats.failed, stats.abandoned), (0, 1, 1));
}

#[tokio::test]
async fn a_connection_that_has_switched_is_used_for_nothing_else() {
    let backend = echo().await;
    let stage = Stage::new(Owners::all(backend.address).await);
    for number in 1..=3 {
        let mut wire = open(&stage).await;
        says(&mut wire, "hello").await;
        wire.stream.shutdown().await.unwrap();
        assert_eq!(wire.rest().await, "");
        until("the tunnel to end", || stage.stats().answered == number).await;
        assert_eq!(stage.stats().connects, number);
    }
}

#[tokio::test]
async fn there_are_as_many_tunnels_as_there_may_be() {
    let backend = echo().await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| config.limits.tunnels = 2);
    let (first, mut second) = (open(&stage).await, open(&stage).await);
    let refused = stage.talk(&ASK.replace("connection: ", "connection: close, ")).await;
    assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("retry-after"), "{refused}");
    assert_eq!(stage.stats().tunnels_refused, 1);
    drop(first);
    until("the tunnel to end", || stage.stats().tunnels == 1).await;
    says(&mut second, "still here").await;
    let mut third = open(&stage).await;
    says(&mut third, "hello").await;
}

#[tokio::test]
async fn an_explanation_says_what_may_be_switched_to_and_how_long_a_body_may_be() {
    let backend = echo().await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let explained = async |upgrade: &str| {
        let upgrade = format!("upgrade: {upgrade}");
        let headers = [("header", "connection: upgrade"), ("header", &*upgrade)];
        let query = Ask::query([("url", "http://a/kv/a")].into_iter().chain(headers));
        let Ask { head, client } = Ask::of(&query).unwrap();
        stage.proxy.reloader().explain(head, client).await.unwrap().0.to_string()
    };
    let granted = explained("WebSocket").await;
    assert!(granted.contains("may switch to websocket"), "{granted}");
    assert!(granted.contains("may have 104857600 bytes"), "{granted}");
    let refused = explained("x-tunnel").await;
    assert!(refused.contains("answers 501"), "{refused}");
}

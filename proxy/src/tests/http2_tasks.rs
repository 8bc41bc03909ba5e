//! Tasks that speak HTTP/2, whatever the client speaks.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::config::Config;
use crate::config::transport::{Protocol, Transport};
use crate::tests::harness::{Backend, Body, Owners, Stage, show, status, text, within};

const GET: &str = "GET /0/k HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n";

fn by_http2(config: &mut Config) {
    let transport = Transport { protocol: Protocol::Http2, tls: None };
    config.transports.insert("kv".parse().unwrap(), transport);
}

async fn before(task: &Backend) -> Stage {
    Stage::with(Owners::all(task.address).await, by_http2)
}

#[tokio::test]
async fn a_request_of_http_1_is_said_in_http_2() {
    let task = Backend::serve_http2(|request| async move { text(show(request).await) }).await;
    let stage = before(&task).await;
    let answer = stage
        .talk(
            "POST /0/k/x?y=1 HTTP/1.1\r\nhost: a.example:81\r\nte: trailers\r\nconnection: close, te, x-hop\r\nx-hop: 1\r\n\
             cookie: a=1; b=2\r\ntransfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n3\r\nabc\r\n0\r\nx-end: 7\r\n\r\n",
        )
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains("via: 2 mandoline-p1"), "{answer}");
    assert!(answer.contains("POST http://a.example:81/0/k/x?y=1 HTTP/2.0"), "{answer}");
    for line in ["te: trailers", "cookie: a=1; b=2", "trailer x-end: 7", "[abc]"] {
        assert!(answer.contains(line), "{line} in {answer}");
    }
    let (_, seen) = answer.split_once("HTTP/2.0").unwrap();
    for gone in ["host:", "connection:", "transfer-encoding:", "x-hop"] {
        assert!(!seen.to_lowercase().contains(&format!("\n{gone}")), "{gone} in {seen}");
    }
    // The length that was said is the length that is passed on.
    let answer = stage
        .talk("POST /0/k HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi")
        .await;
    assert!(answer.contains("content-length: 2") && answer.contains("[hi]"), "{answer}");
}

#[tokio::test]
async fn many_requests_at_a_time_share_a_connection() {
    let (arrived, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let (all, start) = (Arc::clone(&arrived), Arc::clone(&go));
    let task = Backend::serve_http2(move |_| {
        let (all, start) = (Arc::clone(&all), Arc::clone(&start));
        async move {
            let started = start.notified();
            if all.fetch_add(1, Relaxed) + 1 == 50 {
                start.notify_waiters();
            } else {
                started.await;
            }
            text("ok")
        }
    })
    .await;
    let stage = before(&task).await;
    let answers = join_all((0..50).map(|_| stage.talk(GET))).await;
    assert!(answers.iter().all(|answer| answer.ends_with("ok")), "{answers:?}");
    assert_eq!(stage.stats().connects, 1, "one connection carried fifty");
}

/// A task on which each connection is served by hand.
async fn by_hand<F>(
    serve: impl Fn(usize, h2::server::Connection<TcpStream, Bytes>) -> F + Send + Sync + 'static,
) -> Backend
where
    F: Future<Output = ()> + Send + 'static,
{
    let (serve, count) = (Arc::new(serve), Arc::new(AtomicUsize::new(0)));
    Backend::raw(move |stream| {
        let (serve, n) = (Arc::clone(&serve), count.fetch_add(1, Relaxed));
        async move {
            let connection = h2::server::handshake(stream).await.unwrap();
            serve(n, connection).await;
        }
    })
    .await
}

fn ok() -> Response<()> {
    Response::new(())
}

#[tokio::test]
async fn a_stream_that_was_refused_is_tried_again() {
    let task = by_hand(|_, mut connection| async move {
        let mut refused = false;
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            if std::mem::replace(&mut refused, true) {
                respond.send_response(ok(), true).unwrap();
            } else {
                // The first one ever is taken, so that the connection counts as one that was used.
                respond.send_reset(h2::Reason::REFUSED_STREAM);
            }
        }
    })
    .await;
    let stage = before(&task).await;
    // It is not even idempotent: nobody has looked at it.
    let post = GET.replace("GET", "POST");
    let first = stage.talk(&post).await;
    let second = stage.talk(&post).await;
    assert!(first.starts_with("HTTP/1.1 503") || first.starts_with("HTTP/1.1 200"), "{first}");
    assert!(second.starts_with("HTTP/1.1 200"), "{second}");
}

#[tokio::test]
async fn a_connection_that_goes_away_is_left_and_nothing_is_lost() {
    let task = by_hand(|_, mut connection| async move {
        let mut served = 0;
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_response(ok(), true).unwrap();
            served += 1;
            if served == 3 {
                connection.graceful_shutdown();
            }
        }
    })
    .await;
    let stage = before(&task).await;
    for n in 0..20 {
        let answer = stage.talk(&GET.replace("GET", "POST")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{n}: {answer}");
    }
    assert!((6..=7).contains(&stage.stats().connects), "{}", stage.stats().connects);
    assert_eq!(stage.stats().failed, 0);
}

#[tokio::test]
async fn a_stream_that_is_reset_is_not_repeated_unless_that_does_no_harm() {
    let task = by_hand(|_, mut connection| async move {
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_reset(h2::Reason::INTERNAL_ERROR);
        }
    })
    .await;
    let stage = before(&task).await;
    let answer = stage.talk(&GET.replace("GET", "POST")).await;
    assert!(
        answer.starts_with("HTTP/1.1 502") && answer.contains("carried out or not"),
        "{answer}"
    );
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("try again"), "{answer}");
}

#[tokio::test]
async fn a_client_that_takes_nothing_holds_up_nobody_else() {
    let task = Backend::serve_http2(|request| async move {
        let bytes = if request.uri().path() == "/0/large" { 4 << 20 } else { 3 };
        text(vec![b'x'; bytes])
    })
    .await;
    let stage = before(&task).await;
    // As many as share a connection, less one, who read no further than the head.
    let mut slow = Vec::new();
    for _ in 0..99 {
        let mut wire = stage.connect().await;
        wire.send("GET /0/large HTTP/1.1\r\nhost: a\r\n\r\n").await;
        wire.head().await;
        slow.push(wire);
    }
    let answer = within("an answer beside them", stage.talk(GET)).await;
    assert!(answer.ends_with("xxx"), "{answer}");
    assert_eq!(stage.stats().connects, 1);
}

#[tokio::test]
async fn a_task_that_speaks_http_1_alone_is_no_task_of_http_2() {
    let task = Backend::script("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
    let stage = before(&task).await;
    let answer = within("an end", stage.talk(GET)).await;
    assert!(answer.starts_with("HTTP/1.1 50"), "{answer}");
}

fn grpc(extra: &str) -> String {
    format!(
        "POST /pkg.Service/Call HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\nte: trailers\r\n\
         connection: close, te\r\ncontent-length: 5\r\n{extra}\r\n\0\0\0\0\0"
    )
}

fn ended(code: &'static str) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(code));
    let frames = [
        Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"\0\0\0\0\0"))),
        Ok(Frame::trailers(trailers)),
    ];
    let mut response =
        Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert("trailer", HeaderValue::from_static("grpc-status"));
    response
}

#[tokio::test]
async fn the_end_of_a_call_says_how_it_went() {
    let task = Backend::serve_http2(|request| async move {
        let code = if request.headers().contains_key("x-fail") { "13" } else { "0" };
        ended(code)
    })
    .await;
    let stage = before(&task).await;
    let answer = stage.talk(&grpc("")).await;
    assert!(answer.contains("grpc-status: 0"), "trailers: {answer}");
    let answer = stage.talk(&grpc("x-fail: 1\r\n")).await;
    assert!(answer.contains("grpc-status: 13"), "trailers: {answer}");
    let stats = stage.stats();
    let task = stats.tasks.values().next().unwrap();
    assert_eq!((task.tried, task.answered, task.failed), (2, 1, 1));
}

#[tokio::test]
async fn what_the_proxy_says_to_a_client_of_grpc_is_a_status_of_grpc() {
    let stage = Stage::with(Owners::all(Backend::nobody().await).await, by_http2);
    let answer = stage.talk(&grpc("")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("grpc-status: 14"), "{answer}");
    assert!(answer.contains("grpc-message: mandoline: whoever serves this request"), "{answer}");
    assert!(answer.contains("content-type: application/grpc"), "{answer}");
    assert_eq!(stage.stats().failed, 1);
}

#[tokio::test]
async fn a_call_that_waits_too_long_ends_when_its_client_says() {
    let task = Backend::serve_http2(|_| std::future::pending()).await;
    let stage = before(&task).await;
    let answer = stage.talk(&grpc("grpc-timeout: 50m\r\n")).await;
    assert!(answer.contains("grpc-status: 4"), "{answer}");
}

#[tokio::test]
async fn a_refusal_in_words_of_grpc_leads_to_the_owner() {
    let old = Backend::serve_http2(|_| async {
        status(
            200,
            &[
                ("content-type", "application/grpc"),
                ("grpc-status", "9"),
                ("mandoline-generation", "1.2"),
            ],
        )
    })
    .await;
    let new = Backend::serve_http2(|_| async { ended("0") }).await;
    let owners = Owners::none();
    owners.give(1, &[(0, 1, old.address)]).await;
    let stage = Stage::with(owners, by_http2);
    let call = grpc("");
    let (answer, ()) = tokio::join!(stage.talk(&call), async {
        stage.owners.give(2, &[(0, 2, new.address)]).await;
    });
    assert!(answer.contains("grpc-status: 0"), "{answer}");
    assert_eq!(stage.stats().answered, 1);
}

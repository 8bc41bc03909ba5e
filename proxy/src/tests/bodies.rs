//! Bodies stream both ways, at the pace of the slower side, and break where the other side breaks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::harness::{Backend, Body, Owners, Stage, Wire, until, within};
use crate::record::Outcome;

/// A body that the test writes piece by piece.
fn piecewise() -> (mpsc::Sender<Bytes>, Response<Body>) {
    let (pieces, mut next) = mpsc::channel::<Bytes>(1);
    let stream = futures_util::stream::poll_fn(move |context| {
        next.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    });
    (pieces, Response::new(StreamBody::new(stream).boxed_unsync()))
}

#[tokio::test]
async fn each_piece_goes_through_before_the_next_is_sent() {
    let backend = Backend::serve(|request| async {
        let (pieces, answer) = piecewise();
        let mut body = request.into_body();
        tokio::spawn(async move {
            while let Some(Ok(frame)) = body.frame().await {
                pieces.send(frame.into_data().unwrap()).await.unwrap();
            }
        });
        answer
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("POST /kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await;
    assert!(wire.head().await.contains("\r\ntransfer-encoding: chunked\r\n"));
    for n in 0..100 {
        wire.send(format!("3\r\n{n:03}\r\n")).await;
        assert_eq!(wire.read_to(&format!("{n:03}\r\n")).await, format!("3\r\n{n:03}\r\n"));
    }
    wire.send("0\r\n\r\n").await;
    assert_eq!(wire.read_to("\r\n\r\n").await, "0\r\n\r\n");
    until("the request to be counted", || stage.stats().answered == 1).await;
}

#[tokio::test]
async fn a_long_body_goes_through_whole_in_both_directions() {
    let backend = Backend::serve(|request| async {
        let length = request.headers()["content-length"].clone();
        let body = request.into_body().collect().await.unwrap();
        let mut answer = Response::new(body.map_err(|never| match never {}).boxed_unsync());
        answer.headers_mut().insert("content-length", length);
        answer
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let sent: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut wire = stage.connect().await;
    let head = format!("PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", sent.len());
    wire.send(head).await;
    wire.send(&sent).await;
    let head = wire.head().await;
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-length: 8000000"), "{head}");
    let mut got = wire.unread();
    let from = got.len();
    got.resize(sent.len(), 0);
    within("the whole answer", wire.stream.read_exact(&mut got[from..])).await.unwrap();
    assert!(got == sent);
}

#[tokio::test]
async fn a_task_that_does_not_read_holds_the_client_back() {
    let forever = CancellationToken::new();
    let hold = forever.clone();
    let backend = Backend::raw(move |stream| {
        let hold = hold.clone();
        async move {
            hold.cancelled().await;
            drop(stream);
        }
    })
    .await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.limits.body_bytes = u64::MAX;
    });
    let mut wire = stage.connect().await;
    wire.send("PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000\r\n\r\n").await;
    // The kernel's buffers on the way take a few megabytes; what the proxy holds on top is far less.
    let chunk = vec![0; 1 << 20];
    let mut taken = 0;
    while tokio::time::timeout(Duration::from_millis(300), wire.stream.write_all(&chunk))
        .await
        .is_ok()
    {
        taken += chunk.len();
        assert!(taken < 100 << 20, "the proxy took {taken} bytes that nobody read");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_task_back() {
    let (told, mut sent) = mpsc::unbounded_channel();
    let backend = Backend::serve(move |_| {
        let told = told.clone();
        async move {
            let (pieces, answer) = piecewise();
            tokio::spawn(async move {
                while pieces.send(Bytes::from_static(&[0; 1 << 16])).await.is_ok() {
                    told.send(1 << 16).unwrap();
                }
            });
            answer
        }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut total = 0_usize;
    while let Ok(Some(bytes)) = tokio::time::timeout(Duration::from_millis(300), sent.recv()).await
    {
        total += bytes;
        assert!(total < 100 << 20, "the proxy took {total} bytes that nobody read");
    }
}

/// Tells when it is dropped.
struct Dropped(Arc<Notify>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_request_with_it() {
    let (began, left) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begun, gone) = (Arc::clone(&began), Arc::clone(&left));
    let backend = Backend::serve(move |_| {
        let (begun, gone) = (Arc::clone(&begun), Dropped(Arc::clone(&gone)));
        async move {
            begun.notify_one();
            std::future::pending::<()>().await;
            drop(gone);
            unreachable!("the task never answers")
        }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
    within("the task to begin", began.notified()).await;
    drop(wire);
    within("the task to see that the client left", left.notified()).await;
    until("the request to be counted", || stage.stats().abandoned == 1).await;
    assert_eq!(stage.stats().failed, 0);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_an_answer_ends_it() {
    let (pieces, answer) = piecewise();
    let answer = Arc::new(std::sync::Mutex::new(Some(answer)));
    let backend = Backend::serve(move |_| {
        let answer = answer.lock().unwrap().take().unwrap();
        async move { answer }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
    within("room", pieces.send(Bytes::from_static(b"hi"))).await.unwrap();
    wire.read_to("hi\r\n").await;
    drop(wire);
    within("the task to see that the client left", pieces.closed()).await;
    until("the request to be counted", || stage.stats().abandoned == 1).await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_does_not_seem_whole() {
    let cases = [
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\nx\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhi",
    ];
    for script in cases {
        let backend = Backend::script(script).await;
        let (told, mut records) = mpsc::unbounded_channel();
        let stage = Stage::with(Owners::all(backend.address).await, |config| {
            config.observer = Some(crate::record::Observer::new(move |record| {
                told.send(record.clone()).unwrap();
            }));
        });
        let answer = stage.talk("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{script}: {answer}");
        assert!(!answer.ends_with("0\r\n\r\n"), "{script}: {answer}");
        assert!(answer.ends_with("hi") || answer.ends_with("hi\r\n"), "{script}: {answer}");
        let record = within("the record", records.recv()).await.unwrap();
        assert_eq!((record.outcome, record.status), (Outcome::Failed, Some(200)), "{script}");
        assert_eq!(stage.stats().failed, 1, "{script}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_does_not_seem_whole_to_http_1_0_either() {
    let backend =
        Backend::script("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("GET /kv/a HTTP/1.0\r\n\r\n").await;
    let end = within("the end", wire.stream.read_to_end(&mut Vec::new())).await;
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_task_that_answers_before_the_body_is_there_is_heard() {
    let backend = Backend::raw(|stream| async {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send(
            "HTTP/1.1 413 Content Too Large\r\ncontent-length: 4\r\nconnection: close\r\n\r\nlong",
        )
        .await;
        wire.rest().await;
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nabc").await;
    assert!(wire.head().await.starts_with("HTTP/1.1 413"));
    assert_eq!(wire.read_to("long").await, "long");
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let stage = Stage::new(Owners::none());
    let body = "x".repeat(900_000);
    let head = format!(
        "PUT /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let answer = stage.talk(&format!("{head}{body}")).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
}

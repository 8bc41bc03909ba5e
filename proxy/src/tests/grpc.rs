//! Calls of gRPC whose streams last, between a client and a task that both speak HTTP/2: what either side says reaches the other at
//! once, and whoever stops waiting, by leaving or by the clock, ends the call for both.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use super::harness::{Backend, Body, Owners, Stage, status, until, within};
use super::pauses::{Operator, held, in_force, order};
use crate::config::transport::{Protocol, Transport};

/// A message of gRPC: whether it is compressed, its length, and what it says.
fn message(says: &'static str) -> Bytes {
    let mut message = vec![0, 0, 0, 0, u8::try_from(says.len()).unwrap()];
    message.extend_from_slice(says.as_bytes());
    message.into()
}

/// A stream with a hand on it: it goes on until the hand lets go of it, and then ends well.
fn stream() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (hand, frames) = mpsc::channel(8);
    let frames = futures_util::stream::unfold(frames, |mut frames| async {
        let frame = frames.recv().await?;
        Some((Ok::<_, Infallible>(frame), frames))
    });
    (hand, StreamBody::new(frames).boxed_unsync())
}

fn trailers(code: &'static str) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(code));
    Frame::trailers(trailers)
}

fn answer(body: Body) -> Response<Body> {
    let mut answer = Response::new(body);
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    answer
}

async fn before(task: &Backend) -> Stage {
    Stage::with(Owners::all(task.address).await, |config| {
        let transport = Transport { protocol: Protocol::Http2, tls: None };
        config.transports.insert("kv".parse().unwrap(), transport);
    })
}

async fn client(stage: &Stage) -> SendRequest<Body> {
    let io = TokioIo::new(TcpStream::connect(stage.proxy.local_addr()).await.unwrap());
    let (client, connection) = handshake(TokioExecutor::new(), io).await.unwrap();
    drop(tokio::spawn(connection));
    client
}

fn call(timeout: Option<&str>, body: Body) -> Request<Body> {
    let mut call = Request::post("http://shop.example/kv/a")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(timeout) = timeout {
        call = call.header("grpc-timeout", timeout);
    }
    call.body(body).unwrap()
}

async fn next(body: &mut Incoming) -> Option<Result<Frame<Bytes>, hyper::Error>> {
    within("a frame", body.frame()).await
}

/// A task that answers each message with the same, while more may come, and says when a call to it broke off.
async fn echo() -> (Backend, Arc<Notify>) {
    let broke = Arc::new(Notify::new());
    let told = Arc::clone(&broke);
    let task = Backend::serve_http2(move |request| {
        let broke = Arc::clone(&told);
        async move {
            let (hand, body) = stream();
            let mut asked = request.into_body();
            tokio::spawn(async move {
                loop {
                    let frame = tokio::select! {
                        frame = asked.frame() => frame,
                        () = hand.closed() => Some(Ok(trailers("1"))),
                    };
                    match frame {
                        Some(Ok(frame)) if frame.is_data() => drop(hand.send(frame).await),
                        None => return drop(hand.send(trailers("0")).await),
                        Some(_) => return broke.notify_one(),
                    }
                }
            });
            answer(body)
        }
    })
    .await;
    (task, broke)
}

#[tokio::test]
async fn both_sides_of_a_call_stream_at_the_same_time() {
    let (task, _) = echo().await;
    let stage = before(&task).await;
    let (hand, body) = stream();
    let asking = client(&stage).await.send_request(call(None, body)).into_future();
    let answer = within("an answer before the call has said anything", asking).await.unwrap();
    let mut heard = answer.into_body();
    for says in ["one", "two", "three"] {
        hand.send(Frame::data(message(says))).await.unwrap();
        let frame = next(&mut heard).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), message(says));
    }
    drop(hand);
    let end = next(&mut heard).await.unwrap().unwrap();
    assert_eq!(end.into_trailers().unwrap()["grpc-status"], "0");
    assert!(next(&mut heard).await.is_none());
    until("the call to count", || stage.stats().answered == 1).await;
}

#[tokio::test]
async fn an_error_that_is_nothing_but_trailers_is_passed_on() {
    let task = Backend::serve_http2(|_| async {
        let lines = [("content-type", "application/grpc"), ("grpc-status", "5")];
        status(200, &[&lines[..], &[("grpc-message", "no such cart")]].concat())
    })
    .await;
    let stage = before(&task).await;
    let (hand, body) = stream();
    drop(hand);
    let answer = client(&stage).await.send_request(call(None, body)).await.unwrap();
    assert_eq!(answer.headers()["grpc-status"], "5");
    assert_eq!(answer.headers()["grpc-message"], "no such cart");
    assert!(next(&mut answer.into_body()).await.is_none());
    // It is the task's word: the proxy has done its part.
    until("the call to count", || stage.stats().answered == 1).await;
}

#[tokio::test]
async fn a_client_that_cancels_a_call_ends_it_at_the_task_and_no_other() {
    let (task, broke) = echo().await;
    let stage = before(&task).await;
    let mut client = client(&stage).await;
    let mut calls = Vec::new();
    for _ in 0..2 {
        let (hand, body) = stream();
        let mut heard = client.send_request(call(None, body)).await.unwrap().into_body();
        hand.send(Frame::data(message("one"))).await.unwrap();
        next(&mut heard).await.unwrap().unwrap();
        calls.push((hand, heard));
    }
    drop(calls.remove(0));
    within("the task to hear", broke.notified()).await;
    until("the call to count", || stage.stats().in_flight == 1).await;
    assert_eq!(stage.stats().abandoned, 1);
    let (hand, mut heard) = calls.remove(0);
    hand.send(Frame::data(message("two"))).await.unwrap();
    assert_eq!(next(&mut heard).await.unwrap().unwrap().into_data().unwrap(), message("two"));
}

#[tokio::test]
async fn a_call_whose_time_is_over_in_the_middle_ends_for_both() {
    let (task, broke) = echo().await;
    let stage = before(&task).await;
    let mut client = client(&stage).await;
    let (hand, body) = stream();
    let asking = client.send_request(call(Some("3S"), body));
    let mut heard = within("an answer", asking).await.unwrap().into_body();
    // One that has no time-out goes by beside it.
    let (other, body) = stream();
    let mut others = client.send_request(call(None, body)).await.unwrap().into_body();
    hand.send(Frame::data(message("one"))).await.unwrap();
    next(&mut heard).await.unwrap().unwrap();
    assert!(next(&mut heard).await.unwrap().is_err(), "half a stream must not seem whole");
    within("the task to hear", broke.notified()).await;
    until("the call to count", || stage.stats().failed == 1).await;
    other.send(Frame::data(message("two"))).await.unwrap();
    assert_eq!(next(&mut others).await.unwrap().unwrap().into_data().unwrap(), message("two"));
}

#[tokio::test]
async fn a_call_that_a_pause_holds_goes_on_with_its_stream_or_leaves() {
    let (task, _) = echo().await;
    let (operator, told) = Operator::new();
    let stage = Stage::with(Owners::all(task.address).await, |config| {
        let transport = Transport { protocol: Protocol::Http2, tls: None };
        config.transports.insert("kv".parse().unwrap(), transport);
        config.flags = told;
    });
    operator.add(1, order("job=kv", Duration::from_secs(600)));
    in_force(&stage, 1).await;
    let mut client = client(&stage).await;
    let [(leaves, first), (stays, second)] = [stream(), stream()];
    let leaving = tokio::spawn(client.send_request(call(None, first)));
    let staying = tokio::spawn(client.send_request(call(None, second)));
    leaves.send(Frame::data(message("one"))).await.unwrap();
    stays.send(Frame::data(message("two"))).await.unwrap();
    held(&stage, 2).await;
    leaving.abort();
    held(&stage, 1).await;
    assert_eq!(stage.stats().pauses[0].left, 1);
    operator.end(1, Duration::ZERO);
    let mut heard = within("an answer", staying).await.unwrap().unwrap().into_body();
    assert_eq!(next(&mut heard).await.unwrap().unwrap().into_data().unwrap(), message("two"));
    drop(stays);
    let end = next(&mut heard).await.unwrap().unwrap();
    assert_eq!(end.into_trailers().unwrap()["grpc-status"], "0");
}

//! Backhaul over real sockets: what streams, what is upgraded, what goes round in circles, and what breaks off.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::{CONNECTION, ETAG, UPGRADE, VIA};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mandoline_core::key::SliceKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tonic::client::Grpc;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;
use tower::{Layer, ServiceExt, service_fn};

use super::kit::{Echo, Fleet, MIDDLE, PATIENCE, key_in};
use crate::http::backhaul::BackhaulLayer;
use crate::http::key::KeyFrom;
use crate::http::names::{HOPS, PROXY_STATUS};
use crate::http::replay::BoxError;

type Any = UnsyncBoxBody<Bytes, BoxError>;

fn any<B>(body: B) -> Any
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    body.map_err(Into::into).boxed_unsync()
}

/// Says who it is and what it was sent, by path: `/kv/KEY` at once, `/echo/KEY` as it comes, `/upgrade/KEY` after an upgrade.
async fn handle(name: String, request: Request<Incoming>) -> Result<Response<Any>, Infallible> {
    let via = request.headers().get(VIA).cloned();
    let path = request.uri().path().to_owned();
    let mut answer = if path.starts_with("/upgrade") {
        tokio::spawn(async move {
            let upgraded = hyper::upgrade::on(request).await.unwrap();
            let mut upgraded = TokioIo::new(upgraded);
            let mut word = [0; 5];
            upgraded.read_exact(&mut word).await.unwrap();
            upgraded.write_all(&word).await.unwrap();
            upgraded.shutdown().await.unwrap();
        });
        let answer = Response::builder().status(101);
        let answer = answer.header(CONNECTION, "upgrade").header(UPGRADE, "words");
        answer.body(any(Empty::new())).unwrap()
    } else if path.starts_with("/echo") {
        let trailers = HeaderMap::from_iter([(ETAG, "end".parse().unwrap())]);
        let end = stream::once(std::future::ready(Ok(Frame::trailers(trailers))));
        let frames = request.into_body().into_data_stream().map(|data| data.map(Frame::data));
        Response::new(any(StreamBody::new(frames.chain(end))))
    } else {
        Response::new(any(Full::new(Bytes::from(name))))
    };
    if let Some(via) = via {
        answer.headers_mut().insert(VIA, via);
    }
    Ok(answer)
}

/// Two tasks that forward, with a half of the keys each.
async fn two_halves() -> Fleet {
    let mut fleet = Fleet::of(2).await;
    let clerk = fleet.clerk.clone();
    for task in &mut fleet.tasks {
        let name = task.name();
        let layer =
            BackhaulLayer::new(&name, Arc::clone(&task.slicelet), clerk.clone(), KeyFrom::path(1));
        task.serve(layer.layer(service_fn(move |request| handle(name.clone(), request))));
    }
    fleet.give(&[(SliceKey::MIN, 1), (MIDDLE, 2)]).await;
    fleet
}

fn client() -> Client<HttpConnector, Any> {
    Client::builder(TokioExecutor::new()).build_http()
}

/// Asks task `at` for something.
async fn ask(fleet: &Fleet, at: usize, path: &str, body: Any) -> Response<Incoming> {
    let uri = format!("http://{}{path}", fleet.tasks[at].address);
    let request = Request::post(uri).body(body).unwrap();
    tokio::time::timeout(PATIENCE, client().request(request)).await.unwrap().unwrap()
}

async fn text(answer: Response<Incoming>) -> String {
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test]
async fn whoever_is_asked_the_owner_answers() {
    let fleet = two_halves().await;
    for at in [0, 1] {
        for (upper, owner) in [(false, "t1"), (true, "t2")] {
            let path = format!("/kv/{}", key_in(upper));
            let answer = ask(&fleet, at, &path, any(Empty::new())).await;
            let via = answer.headers().get(VIA).map(|via| via.to_str().unwrap().to_owned());
            let is_forwarded = fleet.tasks[at].name() != owner;
            assert_eq!(via, is_forwarded.then(|| format!("1.1 t{}", at + 1)));
            assert_eq!(text(answer).await, owner);
        }
    }
    // A key that has moved, though the clerk does not know: the old owner says so, and the clerk hears of it meanwhile.
    let made = fleet.give_quietly(&[(SliceKey::MIN, 1)]);
    let path = format!("/kv/{}", key_in(true));
    let (answer, ()) = tokio::join!(ask(&fleet, 1, &path, any(Empty::new())), async {
        fleet.hub.publish(made, None);
    });
    assert_eq!(text(answer).await, "t1");
}

#[tokio::test]
async fn bodies_stream_both_ways_with_their_trailers() {
    const PARTS: usize = 256;
    let fleet = two_halves().await;
    let part = Bytes::from(vec![7; 64 * 1024]);
    let parts = stream::iter((0..PARTS).map(move |_| Ok::<_, BoxError>(Frame::data(part.clone()))));
    let path = format!("/echo/{}", key_in(true));
    let mut answer = ask(&fleet, 0, &path, any(StreamBody::new(parts))).await;
    let (mut bytes, mut trailers) = (0, None);
    while let Some(frame) = answer.body_mut().frame().await {
        match frame.unwrap().into_data() {
            Ok(data) => bytes += data.len(),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    assert_eq!(bytes, PARTS * 64 * 1024);
    // HTTP/1.1 carries trailers only where they were announced; HTTP/2 below carries them always.
    assert!(trailers.is_none_or(|trailers| trailers[ETAG] == "end"));
}

#[tokio::test]
async fn who_reads_slowly_slows_the_sender_down() {
    let fleet = two_halves().await;
    let (send, receive) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let receive = stream::unfold(receive, |mut receive| async {
        receive.recv().await.map(|frame| (frame, receive))
    });
    let path = format!("/echo/{}", key_in(true));
    let mut answer = ask(&fleet, 0, &path, any(StreamBody::new(receive))).await;
    // Nobody reads the answer: what fits between is buffers of the kernel and of HTTP, on each leg.
    let part = Bytes::from(vec![7; 64 * 1024]);
    let mut sent = 0;
    while let Ok(Ok(())) =
        tokio::time::timeout(Duration::from_millis(500), send.send(Ok(Frame::data(part.clone()))))
            .await
    {
        sent += part.len();
        assert!(sent < 64 << 20, "nothing holds the sender back");
    }
    // Whoever reads lets it go on.
    let mut read = 0;
    let first = send.send(Ok(Frame::data(part.clone())));
    let reading = async {
        while read < sent {
            read += answer.body_mut().frame().await.unwrap().unwrap().into_data().unwrap().len();
        }
    };
    let (sent_on, ()) =
        tokio::time::timeout(PATIENCE, async { tokio::join!(first, reading) }).await.unwrap();
    sent_on.unwrap();
    // And if it leaves, the sender hears of it.
    drop(answer);
    let gone = async { while send.send(Ok(Frame::data(part.clone()))).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("it is told to stop");
}

#[tokio::test]
async fn grpc_is_forwarded_with_its_trailers() {
    let mut fleet = Fleet::of(2).await;
    let clerk = fleet.clerk.clone();
    for task in &mut fleet.tasks {
        let name = task.name();
        let key = KeyFrom::metadata("x-shard-key");
        let layer = BackhaulLayer::new(&name, Arc::clone(&task.slicelet), clerk.clone(), key);
        task.serve(layer.layer(Echo(name)));
    }
    fleet.give(&[(SliceKey::MIN, 2)]).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", fleet.tasks[0].address)).unwrap();
    let mut client = Grpc::new(endpoint.connect_lazy());
    let codec = || ProstCodec::<String, String>::default();
    let words = stream::iter(["a", "b"].map(String::from));
    let mut request = tonic::Request::new(words);
    request.metadata_mut().insert("x-shard-key", "k".parse().unwrap());
    client.ready().await.unwrap();
    let answers =
        client.streaming(request, "/t.Echo/Each".parse().unwrap(), codec()).await.unwrap();
    // Without the trailers, tonic would say that the status is missing.
    let answers: Vec<_> = answers.into_inner().collect().await;
    let answers: Vec<String> = answers.into_iter().map(Result::unwrap).collect();
    assert_eq!(answers, ["t2:a", "t2:b"]);
    // Nobody there: a status of gRPC.
    fleet.tasks[1].stop();
    let mut request = tonic::Request::new("a".to_owned());
    request.metadata_mut().insert("x-shard-key", "k".parse().unwrap());
    client.ready().await.unwrap();
    let call = client.unary(request, "/t.Echo/Each".parse().unwrap(), codec());
    let (status, ()) = tokio::join!(call, async {
        // Sooner than patience ends.
        fleet.hub.publish(fleet.give_quietly(&[(SliceKey::MIN, 1)]), None);
    });
    let answer = status.unwrap().into_inner();
    assert_eq!(answer, "t1:a", "and the task that was asked has it by now");
}

#[tokio::test]
async fn an_upgraded_connection_is_joined_to_the_owner_s() {
    let fleet = two_halves().await;
    let uri = format!("http://{}/upgrade/{}", fleet.tasks[0].address, key_in(true));
    let request = Request::get(uri).header(CONNECTION, "Upgrade").header(UPGRADE, "words");
    let answer = client().request(request.body(any(Empty::new())).unwrap()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(answer.headers()[UPGRADE], "words");
    let mut upgraded = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    upgraded.write_all(b"hello").await.unwrap();
    let mut echoed = Vec::new();
    upgraded.read_to_end(&mut echoed).await.unwrap();
    assert_eq!(echoed, b"hello");
}

#[tokio::test]
async fn what_was_forwarded_is_not_forwarded_again_nor_round_in_circles() {
    let fleet = two_halves().await;
    let uri = format!("http://{}/kv/{}", fleet.tasks[0].address, key_in(true));
    let send = |request: http::request::Builder| {
        let request = request.uri(&uri).body(any(Empty::new())).unwrap();
        client().request(request)
    };
    let answer = send(Request::builder().header(HOPS, "0")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST);
    let answer = send(Request::builder().header(VIA, "1.1 edge, 1.1 t1")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(answer.headers()[PROXY_STATUS], "t1; error=proxy_loop_detected");
    // Nonsense is the least that there is; and 1 is enough for one hop.
    let answer = send(Request::builder().header(HOPS, "many")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST);
    let answer = send(Request::builder().header(HOPS, "1")).await.unwrap();
    assert_eq!((answer.status(), text(answer).await.as_str()), (StatusCode::OK, "t2"));
}

#[tokio::test]
async fn a_client_that_came_by_tls_is_forwarded_and_its_host_goes_on() {
    let fleet = two_halves().await;
    let clerk = fleet.clerk.clone();
    let slicelet = Arc::clone(&fleet.tasks[0].slicelet);
    let layer = BackhaulLayer::new("t1", slicelet, clerk, KeyFrom::path(1));
    let here = layer.layer(service_fn(|_: Request<Any>| async {
        Ok::<_, Infallible>(Response::new(any(Full::new(Bytes::from_static(b"here")))))
    }));
    // As hyper's server has it from HTTP/2 behind TLS.
    let uri = format!("https://kv.example/kv/{}", key_in(true));
    let request = Request::get(uri).version(http::Version::HTTP_2).body(any(Empty::new())).unwrap();
    let answer = tokio::time::timeout(PATIENCE, here.oneshot(request)).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "t2");
}

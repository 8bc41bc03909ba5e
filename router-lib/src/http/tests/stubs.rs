//! The gRPC channel: every kind of call, every kind of trouble.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::uri::PathAndQuery;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use mandoline_core::transit::HandOffId;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tonic::client::Grpc;
use tonic::transport::ClientTlsConfig;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use tower::{Layer, ServiceExt, service_fn};

use super::kit::{Echo, Fleet, MIDDLE, PATIENCE, key_in, until};
use crate::clerk::Clerk;
use crate::http::channel::Channel;
use crate::http::key::{Key, KeyFrom};
use crate::http::own::OwnLayer;
use crate::http::refused::Refused;
use crate::http::route::Idempotent;

const KEY: &str = "x-shard-key";

fn codec() -> ProstCodec<String, String> {
    ProstCodec::default()
}

fn request<T>(key: &str, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert(KEY, key.parse().unwrap());
    request
}

async fn say(channel: &Channel, request: tonic::Request<String>) -> Result<String, Status> {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let each = PathAndQuery::from_static("/t.Echo/Each");
    Ok(client.unary(request, each, codec()).await?.into_inner())
}

fn channel(fleet: &Fleet) -> Channel {
    fleet.clerk.channel(KeyFrom::metadata(KEY))
}

/// Two tasks that take in only their own, with a half of the keys each.
async fn two_halves() -> Fleet {
    let mut fleet = Fleet::of(2).await;
    for task in &mut fleet.tasks {
        let own = OwnLayer::new(Arc::clone(&task.slicelet), KeyFrom::metadata(KEY));
        task.serve(own.layer(Echo(task.name())));
    }
    fleet.give(&[(SliceKey::MIN, 1), (MIDDLE, 2)]).await;
    fleet
}

#[tokio::test]
async fn calls_of_all_kinds_go_to_their_keys_owners() {
    let fleet = two_halves().await;
    let channel = channel(&fleet);
    for (upper, name) in [(false, "t1"), (true, "t2")] {
        let key = key_in(upper);
        assert_eq!(say(&channel, request(&key, "a".into())).await.unwrap(), format!("{name}:a"));
        let mut client = Grpc::new(channel.clone());
        let (each, all) = ("/t.Echo/Each", "/t.Echo/All");
        let [each, all] = [each, all].map(PathAndQuery::from_static);
        let words = || stream::iter(["a", "b"].map(String::from));
        client.ready().await.unwrap();
        let streamed = client.client_streaming(request(&key, words()), all, codec()).await.unwrap();
        assert_eq!(streamed.into_inner(), format!("{name}:ab"));
        let answers =
            client.streaming(request(&key, words()), each.clone(), codec()).await.unwrap();
        let answers: Vec<String> = answers.into_inner().map(Result::unwrap).collect().await;
        assert_eq!(answers, [format!("{name}:a"), format!("{name}:b")]);
        let one = request(&key, "a".into());
        let answers = client.server_streaming(one, each, codec()).await.unwrap();
        let answers: Vec<String> = answers.into_inner().map(Result::unwrap).collect().await;
        assert_eq!(answers, [format!("{name}:a")]);
    }
    let typed = fleet.clerk.channel(KeyFrom::typed());
    let mut call = request(&key_in(true), "a".into());
    call.extensions_mut().insert(Key::of(key_in(true).as_bytes()));
    assert_eq!(say(&typed, call).await.unwrap(), "t2:a");
}

#[tokio::test]
async fn a_key_that_has_moved_is_found_before_the_caller_notices() {
    let fleet = two_halves().await;
    let channel = channel(&fleet);
    let made = fleet.give_quietly(&[(SliceKey::MIN, 2)]);
    let key = key_in(false);
    // The tasks know, the clerk does not: it hears so from the task that refuses.
    let news = async {
        tokio::task::yield_now().await;
        fleet.hub.publish(made, None);
    };
    let (answer, ()) = tokio::join!(say(&channel, request(&key, "a".into())), news);
    assert_eq!(answer.unwrap(), "t2:a");
    // A call that streams is sent again with what it has streamed so far.
    fleet.give(&[(SliceKey::MIN, 1)]).await;
    let made = fleet.give_quietly(&[(SliceKey::MIN, 2)]);
    let mut client = Grpc::new(channel);
    client.ready().await.unwrap();
    let words = stream::iter((0..50).map(|n| n.to_string()));
    let all = PathAndQuery::from_static("/t.Echo/All");
    let call = client.client_streaming(request(&key, words), all, codec());
    let (answer, ()) = tokio::join!(call, async { fleet.hub.publish(made, None) });
    let expected: String = (0..50).map(|n| n.to_string()).collect();
    assert_eq!(answer.unwrap().into_inner(), format!("t2:{expected}"));
}

#[tokio::test]
async fn a_slice_on_its_way_is_waited_for() {
    let mut fleet = Fleet::of(2).await;
    let id = HandOffId { began: Generation { incarnation: 1, number: 1 }, first: SliceKey::MIN };
    fleet.tasks[0].serve(service_fn(move |_: Request<Incoming>| async move {
        let refused = Refused::InTransit { id, generation: id.began };
        Ok::<_, Infallible>(refused.answer(true).map(http_body_util::Full::new))
    }));
    fleet.tasks[1].serve(Echo("t2".to_owned()));
    let channel = channel(&fleet);
    let call = say(&channel, request("a", "a".into()));
    let (answer, ()) = tokio::join!(call, async {
        tokio::task::yield_now().await;
        fleet.give(&[(SliceKey::MIN, 2)]).await;
    });
    assert_eq!(answer.unwrap(), "t2:a");
}

#[tokio::test]
async fn a_task_that_is_gone_is_waited_out() {
    let mut fleet = Fleet::of(2).await;
    fleet.tasks[0].stop();
    fleet.tasks[1].serve(Echo("t2".to_owned()));
    let channel = channel(&fleet);
    let call = say(&channel, request("a", "a".into()));
    let (answer, ()) = tokio::join!(call, async {
        tokio::task::yield_now().await;
        fleet.give(&[(SliceKey::MIN, 2)]).await;
    });
    assert_eq!(answer.unwrap(), "t2:a");
    // And nobody comes: the error says who was asked.
    fleet.give(&[(SliceKey::MIN, 1)]).await;
    let short = Channel::builder(fleet.clerk.clone(), KeyFrom::metadata(KEY));
    let short = short.patience(Duration::from_millis(30)).build();
    let status = say(&short, request("a", "a".into())).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let address = fleet.tasks[0].address.to_string();
    assert!(status.message().contains(&address), "{status}");
}

#[tokio::test]
async fn what_may_have_had_an_effect_is_not_done_again_unasked() {
    let mut fleet = Fleet::of(1).await;
    let count = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&count);
    fleet.tasks[0].serve(service_fn(move |_: Request<Incoming>| {
        counted.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Err::<Response<Empty<Bytes>>, _>("it breaks off"))
    }));
    let channel = channel(&fleet);
    let status = say(&channel, request("a", "a".into())).await.unwrap_err();
    assert!(status.message().contains(&fleet.tasks[0].address.to_string()), "{status}");
    assert_eq!(count.load(Ordering::Relaxed), 1, "{status}");
    let mut twice_is_fine = request("a", "a".into());
    twice_is_fine.extensions_mut().insert(Idempotent);
    say(&channel, twice_is_fine).await.unwrap_err();
    // As often as the budget lets it.
    assert!(count.load(Ordering::Relaxed) > 3, "{count:?}");
}

#[tokio::test]
async fn a_task_that_never_answers_costs_the_call_s_own_time() {
    let mut fleet = Fleet::of(1).await;
    fleet.tasks[0].serve(service_fn(|_: Request<Incoming>| {
        std::future::pending::<Result<Response<Empty<Bytes>>, Infallible>>()
    }));
    let mut call = request("a", "a".into());
    call.set_timeout(Duration::from_millis(50));
    let answer = tokio::time::timeout(PATIENCE, say(&channel(&fleet), call)).await;
    let status = answer.expect("the call has a deadline").unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
}

#[tokio::test]
async fn connections_go_with_their_tasks() {
    let fleet = two_halves().await;
    let channel = channel(&fleet);
    for upper in [false, true] {
        say(&channel, request(&key_in(upper), "a".into())).await.unwrap();
    }
    assert_eq!(channel.connected(), 2);
    fleet.give(&[(SliceKey::MIN, 2)]).await;
    until("the connection to be closed", || channel.connected() == 1).await;
    say(&channel, request(&key_in(false), "a".into())).await.unwrap();
    fleet.give(&[(SliceKey::MIN, 1)]).await;
    until("the other to be closed", || channel.connected() == 0).await;
    assert_eq!(say(&channel, request(&key_in(true), "a".into())).await.unwrap(), "t1:a");
    fleet.give(&[(SliceKey::MIN, 2)]).await;
    until("the follower to have begun anew", || channel.connected() == 0).await;
}

#[tokio::test]
async fn a_call_without_a_usable_key_is_refused_by_stub_and_server_alike() {
    let fleet = two_halves().await;
    let channel = channel(&fleet);
    let unkeyed = say(&channel, tonic::Request::new("a".to_owned())).await.unwrap_err();
    let empty = say(&channel, request("", "a".into())).await.unwrap_err();
    let mut twice = request("a", "a".to_owned());
    twice.metadata_mut().append(KEY, "b".parse().unwrap());
    let twice = say(&channel, twice).await.unwrap_err();
    for (status, why) in [(unkeyed, "no key"), (empty, "empty"), (twice, "more than one")] {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(why), "{status}");
    }
    // Straight at a server: by a status of gRPC too.
    let plain = Request::post("/t.Echo/Each").header("content-type", "application/grpc");
    let own = OwnLayer::new(Arc::clone(&fleet.tasks[0].slicelet), KeyFrom::metadata(KEY));
    let answer = own.layer(Echo(String::new())).oneshot(plain.body(Empty::new()).unwrap()).await;
    let answer = answer.unwrap();
    assert_eq!(answer.headers()["grpc-status"], (Code::InvalidArgument as i32).to_string());
    assert!(answer.into_body().collect().await.is_ok());
}

#[tokio::test]
async fn a_channel_that_is_to_speak_tls_does() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let generation = Generation { incarnation: 1, number: 1 };
    let info = TaskInfo::new("t1".parse().unwrap(), 1, address.parse().unwrap());
    let mut made = Assignment::new("kv".parse().unwrap(), generation);
    made.tasks.insert(SessionId(1), Arc::new(Task::new(SessionId(1), info)));
    let replicas = Replicas::One(Replica { session: SessionId(1), since: generation });
    made.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
    let clerk = Clerk::frozen(Arc::new(made));
    let (tls, patience) = (ClientTlsConfig::new(), Duration::from_millis(50));
    let builder = Channel::builder(clerk, KeyFrom::metadata(KEY)).tls(tls).patience(patience);
    let channel = builder.build();
    // Whoever comes once more finds nobody.
    let first_byte = async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_u8().await.unwrap()
    };
    let (said, first) = tokio::join!(say(&channel, request("k", "a".into())), first_byte);
    assert_eq!(first, 22, "TLS begins with a handshake record, HTTP/2 with P");
    assert_eq!(said.unwrap_err().code(), Code::Unavailable);
}

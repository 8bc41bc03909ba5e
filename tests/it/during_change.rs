//! Tasks are added, drained and killed under load: whoever routes hides it from those that it routes for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mandoline::Clerk;
use mandoline::http::channel::Channel;
use mandoline::http::key::KeyFrom;
use mandoline::http::route::{Idempotent, RouteLayer, Routing};
use mandoline_core::spec::JobSpec;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;
use tower::{Layer, ServiceExt};

use crate::callers::{PATIENCE, my_turn, program};
use crate::processes::{Cluster, ProxyKnows};

const KEY: &str = "x-shard-key";
/// How long a call may take: a crashed task is missed for some seconds.
const DEADLINE: Duration = Duration::from_secs(30);
/// Between two calls of one caller, so that a debug build on two cores is idle for most of the time.
const CALL_EVERY: Duration = Duration::from_millis(10);

/// What one caller was told.
#[derive(Debug, Default)]
struct Told {
    /// By the name of the task that answered.
    answers: BTreeMap<String, u64>,
    errors: Vec<String>,
}

/// Ends a caller, and is told of its answers meanwhile.
#[derive(Clone, Debug, Default)]
struct Hand {
    stop: CancellationToken,
    answers: Arc<AtomicU64>,
}

/// Calls for one key after the other until it is told to stop.
async fn keep_calling(hand: Hand, call: impl AsyncFn(String) -> Result<String, String>) -> Told {
    let mut told = Told::default();
    let mut tick = interval(CALL_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for n in 0_u64.. {
        tokio::select! {
            () = hand.stop.cancelled() => break,
            _ = tick.tick() => {}
        }
        match timeout(DEADLINE, call(format!("key-{}", n % 997))).await {
            Ok(Ok(name)) => {
                hand.answers.fetch_add(1, Ordering::Relaxed);
                *told.answers.entry(name).or_default() += 1;
            }
            Ok(Err(error)) => told.errors.push(error),
            Err(_) => told.errors.push(format!("no answer within {DEADLINE:?}")),
        }
    }
    told
}

fn get(uri: String, key: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).header(KEY, key).body(Empty::new()).unwrap()
}

async fn text(answer: Result<Response<Incoming>, impl std::fmt::Debug>) -> Result<String, String> {
    let answer = answer.map_err(|error| format!("{error:?}"))?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
    let text = String::from_utf8_lossy(&body).into_owned();
    if status == StatusCode::OK { Ok(text) } else { Err(format!("{status}: {text}")) }
}

/// A gRPC stub.
async fn by_stub(hand: Hand, channel: Channel) -> Told {
    keep_calling(hand, async move |key| {
        let mut client = Grpc::new(channel.clone());
        client.ready().await.map_err(|status| status.to_string())?;
        let mut request = tonic::Request::new(String::new());
        request.metadata_mut().insert(KEY, key.parse().unwrap());
        request.extensions_mut().insert(Idempotent);
        let path = PathAndQuery::from_static("/t.Echo/Say");
        let codec = ProstCodec::<String, String>::default();
        let answer = client.unary(request, path, codec).await;
        Ok(answer.map_err(|status| status.to_string())?.into_inner())
    })
    .await
}

/// An HTTP client with the layer.
async fn by_layer(hand: Hand, clerk: Clerk) -> Told {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let routing = Routing::with_patience(clerk, KeyFrom::header(KEY), DEADLINE);
    let client = RouteLayer::from(routing).layer(client);
    let call = async move |key: String| {
        text(client.clone().oneshot(get("/".to_owned(), &key)).await).await
    };
    keep_calling(hand, call).await
}

/// An HTTP client that asks whoever is at an address, and once more where it is told to.
async fn at(hand: Hand, address: SocketAddr) -> Told {
    let client = Client::builder(TokioExecutor::new()).build_http();
    keep_calling(hand, async move |key| {
        loop {
            let uri = format!("http://{address}/kv/{key}");
            let answer = client.request(get(uri, &key)).await;
            let again = answer.as_ref().is_ok_and(|answer| {
                answer.status() == StatusCode::SERVICE_UNAVAILABLE
                    && answer.headers().contains_key("retry-after")
            });
            if !again {
                return text(answer).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_come_leave_and_crash_and_no_caller_sees_an_error() {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    let spec = JobSpec {
        heartbeat: Duration::from_millis(500),
        balance_every: Duration::from_millis(200),
        ..JobSpec::new("kv".parse().unwrap())
    };
    cluster.apply(&(&spec).into(), PATIENCE).await.unwrap();
    let entrance = cluster.start_echo("kv-0").unwrap();
    let (mut leaves, mut crashes) =
        (cluster.start_echo("kv-1").unwrap(), cluster.start_echo("kv-2").unwrap());
    cluster.served("kv", 3, PATIENCE).await.unwrap();
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).start().unwrap();
    clerk.ready().await;
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();

    let (mut hands, mut callers) = (Vec::new(), JoinSet::new());
    for _ in 0..2 {
        let channel = Channel::builder(clerk.clone(), KeyFrom::metadata(KEY)).patience(DEADLINE);
        let [a, b, c, d] = std::array::from_fn(|_| Hand::default());
        hands.extend([&a, &b, &c, &d].map(Hand::clone));
        let (stub, layer) = (by_stub(a, channel.build()), by_layer(b, clerk.clone()));
        let (backhaul, proxy) = (at(c, entrance.address), at(d, proxy.address));
        callers.spawn(async move { ("stub", stub.await) });
        callers.spawn(async move { ("layer", layer.await) });
        callers.spawn(async move { ("backhaul", backhaul.await) });
        callers.spawn(async move { ("proxy", proxy.await) });
    }
    let answered = |hand: &Hand| hand.answers.load(Ordering::Relaxed);
    // Every caller has had a good many answers since.
    let go_on = async || {
        let before: Vec<u64> = hands.iter().map(answered).collect();
        let all = async |_: &Cluster| {
            let mut each = hands.iter().map(answered).zip(&before);
            each.all(|(now, before)| now >= before + 40).then_some(())
        };
        cluster.until("every caller to be answered", PATIENCE, all).await.unwrap();
    };
    go_on().await;
    let _added = cluster.start_echo("kv-3").unwrap();
    cluster.served("kv", 4, PATIENCE).await.unwrap();
    go_on().await;
    leaves.process.terminate().unwrap();
    leaves.process.wait_ended(PATIENCE).await.unwrap();
    cluster.served("kv", 3, PATIENCE).await.unwrap();
    go_on().await;
    crashes.process.kill();
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    go_on().await;
    hands.iter().for_each(|hand| hand.stop.cancel());
    while let Some(caller) = callers.join_next().await {
        let (which, told) = caller.unwrap();
        assert!(told.errors.is_empty(), "{which}: {:?} of {told:?}", told.errors.first());
        assert!(told.answers.len() >= 3, "{which}: {told:?}");
    }
}

//! Backhaul and routes over regions: by which gateway, how far, and what is said when nobody answers there.

use std::sync::Arc;

use bytes::Bytes;
use http::header::VIA;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use tonic::Code;
use tonic::client::Grpc;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;
use tower::{Layer, ServiceExt, service_fn};

use super::kit::{Echo, Fleet, MIDDLE, PATIENCE, key_in, until};
use crate::clerk::Clerk;
use crate::gateways::Gateways;
use crate::http::backhaul::BackhaulLayer;
use crate::http::key::KeyFrom;
use crate::http::names::{GENERATION, HOPS, PROXY_STATUS};
use crate::http::replay::{BoxError, Replay};
use crate::http::route::{RouteError, RouteLayer, Routing};

fn gateways(home: &str, beyond: &[String]) -> Gateways {
    let beyond = beyond.iter().map(|text| text.parse().unwrap());
    Gateways::new(home.parse().unwrap(), beyond).unwrap()
}

/// Task `t1` is in eu and has the lower half of the keys; `t2` in us has the upper, and `t3` there is what `t1` goes by.
async fn two_regions() -> Fleet {
    let mut fleet = Fleet::of(3).await;
    for (task, region) in fleet.tasks.iter_mut().zip(["eu", "us", "us"]) {
        task.region = Some(region);
    }
    let nobody = "us=127.0.0.1:1".to_owned();
    let gateway = format!("us={}", fleet.tasks[2].address);
    let clerk = fleet.clerk.clone();
    for task in &mut fleet.tasks {
        let name = task.name();
        let gateways = match name.as_str() {
            "t1" => gateways("eu", &[nobody.clone(), gateway.clone()]),
            _ => gateways("us", &["eu=127.0.0.1:1".to_owned()]),
        };
        let slicelet = Arc::clone(&task.slicelet);
        let key = KeyFrom::path(1);
        let routing = Routing::new(clerk.clone(), key).by_gateways(gateways);
        let layer = BackhaulLayer::routed(&name, slicelet, routing);
        task.serve(layer.layer(service_fn(move |request: Request<Incoming>| {
            let via = request.headers().get_all(VIA).iter().map(|via| via.to_str().unwrap());
            let hops = request.headers().get(HOPS).map_or("-", |hops| hops.to_str().unwrap());
            let seen = format!("{name} {hops} [{}]", via.collect::<Vec<_>>().join(", "));
            async { Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(seen)))) }
        })));
    }
    fleet.give(&[(SliceKey::MIN, 1), (MIDDLE, 2), (SliceKey::MAX, 3)]).await;
    fleet
}

async fn ask(fleet: &Fleet, at: usize, path: &str, hops: Option<&str>) -> Response<Incoming> {
    let mut request = Request::get(format!("http://{}{path}", fleet.tasks[at].address));
    if let Some(hops) = hops {
        request = request.header(HOPS, hops);
    }
    let request = request.body(Full::<Bytes>::default()).unwrap();
    let client = Client::builder(TokioExecutor::new()).build_http();
    tokio::time::timeout(PATIENCE, client.request(request)).await.unwrap().unwrap()
}

async fn text(answer: Response<Incoming>) -> String {
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test]
async fn what_lives_beyond_goes_by_a_gateway_that_answers() {
    let mut fleet = two_regions().await;
    let (here, there) = (format!("/kv/{}", key_in(false)), format!("/kv/{}", key_in(true)));
    assert_eq!(text(ask(&fleet, 0, &here, None).await).await, "t1 - []");
    for _ in 0..5 {
        let answer = text(ask(&fleet, 0, &there, None).await).await;
        assert_eq!(answer, "t2 0 [1.1 t1, 1.1 t3]");
    }
    assert_eq!(text(ask(&fleet, 2, &there, None).await).await, "t2 0 [1.1 t3]");
    // None of them answers: said at once, and nothing else is touched.
    fleet.tasks[2].stop();
    let path = format!("{there}?again");
    until("the connections to it to be gone", || fleet.tasks[2].is_stopped()).await;
    let lost = loop {
        let answer = ask(&fleet, 0, &path, None).await;
        // One that was under way broke off.
        if answer.status() != StatusCode::BAD_GATEWAY {
            break answer;
        }
    };
    assert_eq!(lost.status(), StatusCode::SERVICE_UNAVAILABLE);
    let status = "t1; error=destination_unavailable; details=\"region us\"";
    assert_eq!(lost.headers()[PROXY_STATUS], status);
    assert!(text(lost).await.contains("region us, where this key lives, cannot be reached"));
    assert_eq!(text(ask(&fleet, 0, &here, None).await).await, "t1 - []");
}

#[tokio::test]
async fn what_crossed_once_is_not_sent_across_again() {
    let fleet = two_regions().await;
    let there = format!("/kv/{}", key_in(true));
    for hops in ["0", "1", "many"] {
        let answer = ask(&fleet, 0, &there, Some(hops)).await;
        assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST, "{hops}");
        assert!(answer.headers().contains_key(GENERATION), "{hops}");
    }
    let answer = ask(&fleet, 2, &there, Some("1")).await;
    assert_eq!(text(answer).await, "t2 0 [1.1 t3]");
}

#[tokio::test]
async fn a_gateway_that_leads_back_is_named() {
    let mut fleet = Fleet::of(3).await;
    for (task, region) in fleet.tasks.iter_mut().zip(["eu", "eu", "us"]) {
        task.region = Some(region);
    }
    let clerk = fleet.clerk.clone();
    // The first takes the second for a gateway, and the second itself.
    let second = format!("us={}", fleet.tasks[1].address);
    for task in &mut fleet.tasks[..2] {
        let (name, slicelet) = (task.name(), Arc::clone(&task.slicelet));
        let gateways = gateways("eu", std::slice::from_ref(&second));
        let routing = Routing::new(clerk.clone(), KeyFrom::path(1)).by_gateways(gateways);
        let layer = BackhaulLayer::routed(&name, slicelet, routing);
        task.serve(layer.layer(service_fn(|_: Request<Incoming>| async {
            Ok::<_, std::convert::Infallible>(Response::new(Full::<Bytes>::default()))
        })));
    }
    fleet.give(&[(SliceKey::MIN, 3)]).await;
    for (at, says) in [(0, "does not take keys of that region"), (1, "has been here before")] {
        let answer = ask(&fleet, at, "/kv/a", None).await;
        assert_eq!(answer.status(), StatusCode::BAD_GATEWAY, "{at}");
        let status = format!("t{}; error=proxy_loop_detected", 1 + at);
        let status_of = answer.headers()[PROXY_STATUS].to_str().unwrap().to_owned();
        let text = text(answer).await;
        // What the second says of itself reaches the client as it is.
        assert!(status_of == status && text.contains(says), "{at}: {status_of} {text}");
    }
}

#[tokio::test]
async fn a_grpc_call_to_a_lost_region_is_unavailable_and_names_it() {
    let mut fleet = Fleet::of(2).await;
    let clerk = fleet.clerk.clone();
    fleet.tasks[0].region = Some("eu");
    fleet.tasks[1].region = Some("us");
    for task in &mut fleet.tasks {
        let (name, slicelet) = (task.name(), Arc::clone(&task.slicelet));
        let key = KeyFrom::metadata("x-shard-key");
        let gateways = gateways("eu", &["us=nowhere.invalid:1".to_owned()]);
        let routing = Routing::new(clerk.clone(), key).by_gateways(gateways);
        let layer = BackhaulLayer::routed(&name, slicelet, routing);
        task.serve(layer.layer(Echo(name)));
    }
    fleet.give(&[(SliceKey::MIN, 2)]).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", fleet.tasks[0].address)).unwrap();
    let mut client = Grpc::new(endpoint.connect_lazy());
    for _ in 0..3 {
        let mut request = tonic::Request::new("a".to_owned());
        request.metadata_mut().insert("x-shard-key", "k".parse().unwrap());
        client.ready().await.unwrap();
        let codec = ProstCodec::<String, String>::default();
        let call = client.unary(request, "/t.Echo/Each".parse().unwrap(), codec);
        let status = tokio::time::timeout(PATIENCE, call).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("region us"), "{status}");
    }
}

#[tokio::test]
async fn a_replica_far_away_is_asked_once_the_one_at_home_did_not_answer() {
    let (job, since) = ("kv".parse().unwrap(), Generation { incarnation: 1, number: 1 });
    let mut made = Assignment::new(job, since);
    for (id, region) in [(1, "us"), (2, "eu")] {
        let address = format!("10.0.0.{id}:80").parse().unwrap();
        let mut info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, address);
        info.labels.insert("region".to_owned(), region.to_owned());
        let session = SessionId(id);
        made.tasks.insert(session, Arc::new(Task::new(session, info)));
    }
    let replicas: Replicas =
        [1, 2].map(|id| Replica { session: SessionId(id), since }).into_iter().collect();
    made.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
    let clerk = Clerk::frozen(Arc::new(made));
    let gateways = gateways("eu", &["us=10.8.0.1:80".to_owned()]);
    for (broken, by) in [("nobody", "10.0.0.2:80 -"), ("10.0.0.2:80", "10.8.0.1:80 1")] {
        let client = service_fn(move |request: Request<Replay<Full<Bytes>>>| async move {
            let at = request.uri().authority().unwrap().to_string();
            let hops = request.headers().get(HOPS).map_or("-", |hops| hops.to_str().unwrap());
            if at == broken {
                return Err(BoxError::from("it broke off"));
            }
            Ok(Response::new(format!("{at} {hops}")))
        });
        let layer = RouteLayer::new(clerk.clone(), KeyFrom::path(1)).by_gateways(gateways.clone());
        for n in 0..10 {
            let request = Request::get(format!("/kv/{n}")).body(Full::<Bytes>::default()).unwrap();
            let answer = layer.layer(client).oneshot(request).await.unwrap();
            assert_eq!(answer.body(), by, "{broken} is gone");
        }
    }
}

#[tokio::test]
async fn an_http_client_goes_by_gateways_too() {
    let fleet = two_regions().await;
    let gateways = gateways("eu", &[format!("us={}", fleet.tasks[2].address)]);
    let client = Client::builder(TokioExecutor::new()).build_http();
    let layer =
        RouteLayer::new(fleet.clerk.clone(), KeyFrom::path(1)).by_gateways(gateways.clone());
    let client = layer.layer(client);
    let get = |path: String| Request::get(path).body(Full::<Bytes>::default()).unwrap();
    let send = |path| client.clone().oneshot(get(path));
    let answer = send(format!("/kv/{}", key_in(true))).await.unwrap();
    assert_eq!(text(answer).await, "t2 0 [1.1 t3]");
    let answer = send(format!("/kv/{}", key_in(false))).await.unwrap();
    assert_eq!(text(answer).await, "t1 - []");
    let stats = gateways.stats();
    assert_eq!((stats.lost, stats.gateways[0].1.sent), (0, 1));
    // And says which region it cannot reach.
    let nobody = self::gateways("eu", &["us=127.0.0.1:1".to_owned()]);
    let layer = RouteLayer::new(fleet.clerk.clone(), KeyFrom::path(1)).by_gateways(nobody.clone());
    let client = layer.layer(Client::builder(TokioExecutor::new()).build_http());
    let lost = client.oneshot(get(format!("/kv/{}", key_in(true)))).await.unwrap_err();
    assert!(matches!(&lost, RouteError::Lost(region) if region.as_str() == "us"), "{lost}");
    assert_eq!(nobody.stats().lost, 1);
}

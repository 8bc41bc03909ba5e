//! What cannot be right, by every way into a task: each row of the table in `docs/in-your-program.md`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, VIA};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::extract::Miss;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use mandoline_distributor::hub::Hub;
use mandoline_distributor::serve::WatchService;
use mandoline_proto::pb;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::server::NamedService;
use tonic::transport::{Endpoint, Server};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use tower::{Layer, Service, ServiceExt, service_fn};

use super::kit::{Echo, Fleet, MIDDLE, PATIENCE};
use crate::clerk::{Clerk, State};
use crate::http::backhaul::BackhaulLayer;
use crate::http::channel::Channel;
use crate::http::key::KeyFrom;
use crate::http::names::{HOPS, PROXY_STATUS};
use crate::http::own::OwnLayer;
use crate::http::route::{RouteError, RouteLayer, Routing};
use crate::slicelet::Slicelet;
use crate::snapshot::NoTask;
use crate::tries::GaveUp;

const KEY: &str = "x-shard-key";
/// For requests that nobody can take.
const SHORT: Duration = Duration::from_millis(50);

fn key() -> KeyFrom {
    KeyFrom::header(KEY)
}

fn with_keys(keys: &[&str]) -> Request<Empty<Bytes>> {
    let mut request = Request::get("/").body(Empty::new()).unwrap();
    for key in keys {
        request.headers_mut().append(KEY, HeaderValue::from_str(key).unwrap());
    }
    request
}

fn as_grpc(mut request: Request<Empty<Bytes>>) -> Request<Empty<Bytes>> {
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request
}

/// A task that says its name, whatever it is asked.
fn named(
    name: &'static str,
) -> impl Service<
    Request<Empty<Bytes>>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future: Send,
> + Clone {
    service_fn(move |_| async move { Ok(Response::new(Full::new(Bytes::from(name)))) })
}

/// Routes by a clerk, and gives up soon.
fn routing(clerk: &Clerk) -> Routing {
    Routing::with_patience(clerk.clone(), key(), SHORT)
}

/// Asks by `RouteLayer`.
async fn route(clerk: &Clerk, keys: &[&str]) -> Result<Response<Incoming>, RouteError> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    RouteLayer::from(routing(clerk)).layer(client).oneshot(with_keys(keys)).await
}

/// Makes one call by a channel for stubs.
async fn call(clerk: &Clerk, keys: &[&str]) -> Status {
    let channel = Channel::builder(clerk.clone(), key()).patience(SHORT).build();
    let mut client = Grpc::new(channel);
    client.ready().await.unwrap();
    let mut request = tonic::Request::new("a".to_owned());
    for key in keys {
        request.metadata_mut().append(KEY, key.parse().unwrap());
    }
    let path = PathAndQuery::from_static("/t.Echo/Each");
    let codec = ProstCodec::<String, String>::default();
    client.unary(request, path, codec).await.expect_err("nobody can take it")
}

/// Asks an application that forwards: what HTTP says, and what gRPC says.
async fn backhaul(layer: &BackhaulLayer, request: Request<Empty<Bytes>>) -> [Response<()>; 2] {
    let plain = layer.layer(named("here")).oneshot(request.clone()).await.unwrap();
    let grpc = layer.layer(named("here")).oneshot(as_grpc(request)).await.unwrap();
    [plain, grpc].map(|answer| answer.map(drop))
}

fn code(answer: &Response<()>) -> Code {
    let status = answer.headers().get(Status::GRPC_STATUS).expect("it is an answer of gRPC");
    Code::from_bytes(status.as_bytes())
}

/// Task `t1` serves everything at this address.
fn all_at(address: &str) -> Arc<Assignment> {
    let generation = Generation { incarnation: 1, number: 1 };
    let mut made = Assignment::new("kv".parse().unwrap(), generation);
    let session = SessionId(1);
    let info = TaskInfo::new("t1".parse().unwrap(), 1, address.parse().unwrap());
    made.tasks.insert(session, Arc::new(Task::new(session, info)));
    let replicas = Replicas::One(Replica { session, since: generation });
    made.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
    Arc::new(made)
}

/// An application of task `t2`, which owns nothing of `assignment`.
fn forwards(clerk: &Clerk, assignment: &Arc<Assignment>) -> BackhaulLayer {
    let slicelet = Arc::new(Slicelet::frozen(SessionId(2), Arc::clone(assignment)));
    BackhaulLayer::routed("t2", slicelet, routing(clerk))
}

#[tokio::test]
async fn a_request_without_one_usable_key_is_refused_alike_by_all() {
    let fleet = Fleet::of(2).await;
    fleet.give(&[(SliceKey::MIN, 1), (MIDDLE, 2)]).await;
    let slicelet = &fleet.tasks[0].slicelet;
    let long = "x".repeat(1 << 20);
    let cases: [(&[&str], Miss, u16); 5] = [
        (&[], Miss::NoKey, 400),
        (&["a", "b"], Miss::Twice, 400),
        (&["a", "a"], Miss::Twice, 400),
        (&[""], Miss::Empty, 400),
        (&[&long], Miss::TooLong(1 << 20), 431),
    ];
    for (keys, miss, status) in cases {
        let by_route = route(&fleet.clerk, keys).await.unwrap_err();
        assert!(matches!(by_route, RouteError::Key(found) if found == miss), "{by_route}");
        let by_channel = call(&fleet.clerk, keys).await;
        assert_eq!(by_channel.code(), Code::InvalidArgument, "{by_channel}");
        assert!(by_channel.message().contains(&miss.to_string()), "{by_channel}");

        let own = OwnLayer::new(Arc::clone(slicelet), key());
        let answer = own.layer(named("here")).oneshot(with_keys(keys)).await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{miss}");
        let answer = own.layer(named("here")).oneshot(as_grpc(with_keys(keys))).await.unwrap();
        assert_eq!(code(&answer.map(drop)), Code::InvalidArgument, "{miss}");

        let layer = BackhaulLayer::new("t1", Arc::clone(slicelet), fleet.clerk.clone(), key());
        let [plain, grpc] = backhaul(&layer, with_keys(keys)).await;
        assert_eq!(plain.status().as_u16(), status, "{miss}");
        assert_eq!(code(&grpc), Code::InvalidArgument, "{miss}");
    }
}

#[tokio::test]
async fn an_address_that_does_not_resolve_is_an_owner_that_is_not_reached() {
    // Longer than a label of a host name may be, so that nobody has to be asked for it.
    let address = format!("{}.example:80", "x".repeat(64));
    let assignment = all_at(&address);
    let clerk = Clerk::frozen(Arc::clone(&assignment));
    let error = route(&clerk, &["a"]).await.unwrap_err();
    let RouteError::Task { address: asked, source } = &error else { panic!("{error}") };
    assert_eq!(asked.as_str(), address);
    assert!(format!("{source:?}").contains("dns"), "{source:?}");
    let status = call(&clerk, &["a"]).await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains(&address), "{status}");
    let [plain, grpc] = backhaul(&forwards(&clerk, &assignment), with_keys(&["a"])).await;
    assert_eq!(plain.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(plain.headers()[PROXY_STATUS], "t2; error=connection_terminated");
    assert_eq!(code(&grpc), Code::Unavailable);
}

/// Says so when it is dropped.
struct Leaves(mpsc::UnboundedSender<()>);

impl Drop for Leaves {
    fn drop(&mut self) {
        // The test may be over.
        self.0.send(()).ok();
    }
}

#[tokio::test]
async fn a_task_that_accepts_and_never_answers_costs_the_caller_s_own_time() {
    let mut fleet = Fleet::of(2).await;
    let (left, mut has_left) = mpsc::unbounded_channel();
    let (asked, mut was_asked) = mpsc::unbounded_channel();
    fleet.tasks[0].serve(service_fn(move |_: Request<Incoming>| {
        let leaves = Leaves(left.clone());
        asked.send(()).unwrap();
        async move {
            let _leaves = leaves;
            std::future::pending::<Result<Response<Empty<Bytes>>, Infallible>>().await
        }
    }));
    let slicelet = Arc::clone(&fleet.tasks[1].slicelet);
    let layer = BackhaulLayer::new("t2", slicelet, fleet.clerk.clone(), key());
    fleet.tasks[1].serve(layer.layer(service_fn(|_: Request<Incoming>| async {
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    })));
    let mut soon = async |what: &str| {
        let gone = async { (was_asked.recv().await, has_left.recv().await) };
        tokio::time::timeout(PATIENCE, gone).await.unwrap_or_else(|_| panic!("{what} hangs"));
    };
    // A caller of its own patience, straight and by way of an application: the owner hears that it has left.
    let late = tokio::time::timeout(SHORT, route(&fleet.clerk, &["a"])).await;
    assert!(late.is_err(), "the owner never answers");
    soon("straight").await;
    let mut request = with_keys(&["a"]);
    *request.uri_mut() = format!("http://{}/", fleet.tasks[1].address).parse().unwrap();
    let client = Client::builder(TokioExecutor::new()).build_http();
    assert!(tokio::time::timeout(SHORT, client.request(request)).await.is_err());
    soon("forwarded").await;
    // gRPC says how long, and both ends go by it.
    let forwarding = format!("http://{}", fleet.tasks[1].address);
    let forwarding = Endpoint::from_shared(forwarding).unwrap().connect_lazy();
    for (straight, what) in [(true, "by the stub"), (false, "forwarded by gRPC")] {
        let mut request = tonic::Request::new("a".to_owned());
        request.metadata_mut().insert(KEY, "a".parse().unwrap());
        request.set_timeout(SHORT);
        let (path, codec) = (PathAndQuery::from_static("/t.Echo/Each"), ProstCodec::default());
        let status = if straight {
            let mut client = Grpc::new(fleet.clerk.channel(key()));
            client.ready().await.unwrap();
            client.unary::<String, String, _>(request, path, codec).await
        } else {
            let mut client = Grpc::new(forwarding.clone());
            client.ready().await.unwrap();
            client.unary::<String, String, _>(request, path, codec).await
        };
        let status = status.expect_err("the owner never answers");
        assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
        soon(what).await;
    }
}

/// A source that tells everybody of job `impostor`, whatever is asked for.
#[derive(Clone)]
struct Impostor(WatchService);

impl NamedService for Impostor {
    const NAME: &'static str = WatchService::NAME;
}

impl Service<Request<Body>> for Impostor {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = <WatchService as Service<Request<Body>>>::Future;

    fn poll_ready(
        &mut self,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let asks = pb::WatchRequest { job: "impostor".to_owned(), ..Default::default() };
        let message = asks.encode_to_vec();
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend(message);
        self.0.call(request.map(|_| Body::new(Full::new(Bytes::from(framed)))))
    }
}

/// Serves watches, and says where.
async fn source<S>(service: S) -> String
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = Server::builder().add_service(service);
    // Ends with the test's runtime.
    drop(tokio::spawn(serve.serve_with_incoming(TcpListenerStream::new(listener))));
    address
}

#[tokio::test]
async fn an_assignment_from_an_impostor_job_is_not_routed_by() {
    // It names a task that would answer.
    let mut fleet = Fleet::of(1).await;
    fleet.tasks[0].serve(Echo("t1".to_owned()));
    let honest = all_at(&fleet.tasks[0].address.to_string());
    let hub = Hub::new();
    let newer = Generation { incarnation: 1, number: 1_000 };
    let job = "impostor".parse().unwrap();
    hub.publish(Arc::new(Assignment { job, generation: newer, ..(*honest).clone() }), None);
    let service = WatchService::new(hub, CancellationToken::new());
    let impostor = source(Impostor(service)).await;
    let builder = Clerk::builder("kv");
    let clerk = builder.sources([&impostor]).start().unwrap();
    let told = async {
        loop {
            match clerk.state() {
                State::Empty { why, .. } if why.contains("told of job impostor") => break,
                State::Empty { .. } => tokio::task::yield_now().await,
                other => panic!("it was believed: {other:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("it is told");

    let error = route(&clerk, &["a"]).await.unwrap_err();
    assert!(matches!(error, RouteError::GaveUp(GaveUp::NoTask(NoTask::Unknown))), "{error}");
    let status = call(&clerk, &["a"]).await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("no assignment is known"), "{status}");
    let [plain, grpc] = backhaul(&forwards(&clerk, &honest), with_keys(&["a"])).await;
    assert_eq!(plain.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(plain.headers()[PROXY_STATUS], "t2; error=destination_unavailable");
    assert_eq!(code(&grpc), Code::Unavailable);

    // Beside an honest source it does no harm.
    let hub = Hub::new();
    hub.publish(Arc::clone(&honest), None);
    let honest = source(WatchService::new(hub, CancellationToken::new())).await;
    let sources = [impostor, honest];
    let clerk = Clerk::builder("kv").sources(sources).start().unwrap();
    tokio::time::timeout(PATIENCE, clerk.ready()).await.expect("the honest one is heard");
    assert_eq!(clerk.route(b"a").unwrap().generation().number, 1);
}

#[tokio::test]
async fn a_forwarded_request_that_comes_back_ends() {
    // Each holds the other for the owner: the second is asked as the last, and says that it is not.
    let mut fleet = Fleet::of(2).await;
    for task in &mut fleet.tasks {
        let (name, clerk) = (task.name(), fleet.clerk.clone());
        let layer = BackhaulLayer::routed(&name, Arc::clone(&task.slicelet), routing(&clerk));
        task.serve(layer.layer(service_fn(|_: Request<Incoming>| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("here"))))
        })));
    }
    fleet.give(&[(SliceKey::MIN, 2)]).await;
    let elsewhere = all_at(&fleet.tasks[0].address.to_string());
    fleet.tasks[1].slicelet.take(
        SessionId(2),
        Arc::new(Assignment {
            generation: Generation { incarnation: 1, number: 9 },
            ..(*elsewhere).clone()
        }),
    );
    let mut request = with_keys(&["a"]);
    *request.uri_mut() = format!("http://{}/", fleet.tasks[0].address).parse().unwrap();
    let client = Client::builder(TokioExecutor::new()).build_http();
    let answer = client.request(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.headers()[PROXY_STATUS], "t1; error=destination_unavailable");
    let sentence = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(sentence.starts_with(b"no task took key"), "{sentence:?}");
    // One that has been here is a loop, and one that may go no further is refused by whoever owns nothing of it.
    let layer = forwards(&Clerk::frozen(Arc::clone(&elsewhere)), &elsewhere);
    let mut request = with_keys(&["a"]);
    request.headers_mut().insert(VIA, HeaderValue::from_static("2 t7, 2 t2"));
    let [plain, grpc] = backhaul(&layer, request).await;
    assert_eq!(plain.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(plain.headers()[PROXY_STATUS], "t2; error=proxy_loop_detected");
    assert_eq!(code(&grpc), Code::Internal);
    let mut request = with_keys(&["a"]);
    request.headers_mut().insert(HOPS, HeaderValue::from_static("0"));
    let [plain, grpc] = backhaul(&layer, request).await;
    assert_eq!(plain.status(), StatusCode::MISDIRECTED_REQUEST);
    assert_eq!(code(&grpc), Code::FailedPrecondition);
}

//! What a server's layers take in, refuse and count.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use tokio::time::Instant;
use tonic::Status;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

use super::kit::{Fleet, MIDDLE, key_in};
use crate::guard::Guard;
use crate::http::key::KeyFrom;
use crate::http::load::{Cost, LoadLayer};
use crate::http::names::{GENERATION, OWNER};
use crate::http::own::{Own, OwnLayer};
use crate::http::refused::Refused;
use crate::owned::Window;
use crate::tries::Refusal;

fn ask(key: &str) -> Request<Full<Bytes>> {
    Request::get(format!("/kv/{key}")).body(Full::default()).unwrap()
}

fn key() -> KeyFrom {
    KeyFrom::path(1)
}

#[tokio::test]
async fn what_another_task_owns_is_refused_with_its_name() {
    let fleet = Fleet::of(2).await;
    fleet.give(&[(SliceKey::MIN, 1), (MIDDLE, 2)]).await;
    let handler = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"mine"))))
    });
    let service = OwnLayer::new(Arc::clone(&fleet.tasks[0].slicelet), key()).layer(handler);
    let answer = service.clone().oneshot(ask(&key_in(false))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "mine");
    let answer = service.clone().oneshot(ask(&key_in(true))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST);
    assert_eq!(answer.headers()[OWNER], fleet.tasks[1].address.to_string());
    assert_eq!(answer.headers()[GENERATION], "1.2");
    let sentence = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(sentence.starts_with(b"this task does not own the key"), "{sentence:?}");
    for (path, status) in [("/kv", 400), ("/kv/", 400), ("/kv/%zz", 400)] {
        let request = Request::get(path).body(Full::default()).unwrap();
        assert_eq!(service.clone().oneshot(request).await.unwrap().status().as_u16(), status);
    }
}

#[tokio::test]
async fn the_guard_is_held_to_the_last_byte() {
    let fleet = Fleet::exclusive(1).await;
    let seen: Arc<Mutex<Weak<Guard>>> = Arc::default();
    let handler = {
        let seen = Arc::clone(&seen);
        service_fn(move |request: Request<Full<Bytes>>| {
            let Own(guard) = request.extensions().get().expect("it is this task's");
            assert!(guard.still_owned());
            *seen.lock().unwrap() = Arc::downgrade(guard);
            async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"mine")))) }
        })
    };
    let service = OwnLayer::new(Arc::clone(&fleet.tasks[0].slicelet), key()).layer(handler);
    let answer = service.oneshot(ask("a")).await.unwrap();
    let guard = seen.lock().unwrap().clone();
    assert_eq!(guard.strong_count(), 1, "the answer is not read yet");
    answer.into_body().collect().await.unwrap();
    assert_eq!(guard.strong_count(), 0);
}

#[tokio::test]
async fn each_request_is_counted_once_at_what_it_cost() {
    let fleet = Fleet::of(1).await;
    tokio::time::pause();
    let slicelet = &fleet.tasks[0].slicelet;
    let mut window = Window::begin(slicelet.owned_for_tests(), Instant::now());
    let handler = service_fn(|request: Request<Full<Bytes>>| async move {
        let mut answer = Response::new(Full::<Bytes>::default());
        if let Some(cost) = request.headers().get("cost") {
            answer.extensions_mut().insert(Cost(cost.to_str().unwrap().parse().unwrap()));
        }
        Ok::<_, Infallible>(answer)
    });
    let load = LoadLayer::new(Arc::clone(slicelet), key());
    let own = OwnLayer::new(Arc::clone(slicelet), key());
    let both = ServiceBuilder::new().layer(load.clone()).layer(own.clone()).service(handler);
    let turned = ServiceBuilder::new().layer(own).layer(load.clone()).service(handler);
    let costly = |cost: &str| {
        let mut request = ask("a");
        request.headers_mut().insert("cost", cost.parse().unwrap());
        request
    };
    drop(load.layer(handler).oneshot(ask("a")).await.unwrap());
    drop(both.clone().oneshot(costly("2.5")).await.unwrap());
    drop(turned.oneshot(costly("4")).await.unwrap());
    // A cost that is none counts as one; a client that leaves before the answer has cost something too.
    drop(both.clone().oneshot(costly("-7")).await.unwrap());
    drop(both.oneshot(ask("a")));
    tokio::time::advance(Duration::from_secs(1)).await;
    let report = window.close(slicelet.owned_for_tests(), Instant::now()).unwrap();
    let counted: u64 = report.slices.iter().map(|(_, load)| Load::milli(*load)).sum();
    assert_eq!(counted, 8_500);
}

#[tokio::test]
async fn another_job_s_refusal_is_not_passed_on_as_this_task_s() {
    let fleet = Fleet::of(1).await;
    let generation = Generation { incarnation: 1, number: 7 };
    let refused = Refused::NotOwner { owner: None, generation };
    let own = OwnLayer::new(Arc::clone(&fleet.tasks[0].slicelet), key());
    let asked = |made: Response<Bytes>| {
        let handler = service_fn(move |_: Request<Full<Bytes>>| {
            let made = made.clone().map(Full::new);
            async { Ok::<_, Infallible>(made) }
        });
        let service = own.layer(handler);
        async move { service.oneshot(ask("a")).await.unwrap() }
    };
    // As a client of the other job has it: what does not travel is not there.
    for is_grpc in [false, true] {
        let mut heard = refused.answer(is_grpc);
        heard.extensions_mut().clear();
        assert!(Refused::read(&heard).is_some());
        let answer = asked(heard.clone()).await;
        assert_eq!(answer.status(), heard.status());
        assert_eq!(Refused::read(&answer), None, "the handler has done something by then");
        let status = Status::from_header_map(heard.headers());
        let passed_on = status.map(|status| asked(status.into_http()));
        if let Some(answer) = passed_on {
            assert_eq!(Refused::read(&answer.await), None);
        }
    }
    // And as a handler makes it that found its key gone before it did anything.
    let made = [refused.answer(false), refused.answer(true), Status::from(&refused).into_http()];
    for made in made {
        assert_eq!(Refused::read(&asked(made).await), Some(Refusal::NotOwner(generation)));
    }
}

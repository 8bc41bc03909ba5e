//! Which replica requests go to: one loop behind stubs, HTTP clients and applications that forward, so it is asked here once.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::generation::Generation;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use tower::{Layer, ServiceExt, service_fn};

use crate::clerk::Clerk;
use crate::http::key::KeyFrom;
use crate::http::replay::Replay;
use crate::http::route::{RouteLayer, ToTask};

type Answers = fn() -> Result<Response<()>, String>;

/// Three tasks that serve everything together.
fn clerk() -> Clerk {
    let generation = Generation { incarnation: 1, number: 1 };
    let mut made = Assignment::new("kv".parse().unwrap(), generation);
    for id in 1..=3 {
        let info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, "h:1".parse().unwrap());
        made.tasks.insert(SessionId(id), Arc::new(Task::new(SessionId(id), info)));
    }
    let replica = |id| Replica { session: SessionId(id), since: generation };
    let replicas: Replicas = (1..=3).map(replica).collect();
    made.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
    Clerk::frozen(Arc::new(made))
}

/// Sends a few hundred requests one after the other, of which the second task answers all so; gives how many that were.
async fn answered_so(answer: Answers) -> usize {
    let clerk = clerk();
    let client = service_fn(move |request: Request<Replay<Empty<Bytes>>>| async move {
        let to = request.extensions().get::<ToTask>().unwrap();
        if to.session == SessionId(2) { answer() } else { Ok(Response::new(())) }
    });
    let route = RouteLayer::new(clerk, KeyFrom::path(0)).layer(client);
    let mut answered = 0;
    for key in 0..300 {
        let request = Request::post(format!("/{key}")).body(Empty::<Bytes>::new()).unwrap();
        let told = route.clone().oneshot(request).await;
        let is_it = told.as_ref().map_or(true, |told| {
            told.headers().contains_key("grpc-status") || !told.status().is_success()
        });
        answered += usize::from(is_it);
    }
    answered
}

#[tokio::test]
async fn a_task_that_fails_is_left_after_five_failures_in_a_row() {
    let fails: [Answers; 3] = [
        || Ok(Response::builder().status(500).body(()).unwrap()),
        || Ok(Response::builder().header("grpc-status", "13").body(()).unwrap()),
        || Err("it broke off".to_owned()),
    ];
    for answer in fails {
        assert_eq!(answered_so(answer).await, 5);
    }
    let answers: [Answers; 3] = [
        || Ok(Response::builder().status(404).body(()).unwrap()),
        || Ok(Response::builder().status(501).body(()).unwrap()),
        || Ok(Response::builder().header("grpc-status", "5").body(()).unwrap()),
    ];
    for answer in answers {
        let times = answered_so(answer).await;
        assert!((90..=110).contains(&times), "{times}");
    }
}

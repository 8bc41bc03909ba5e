//! Spill: what is above the cap goes to another task, marked; and to the owner where that one will not have it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use http::header::HeaderValue;

use super::harness::{Backend, Owners, Stage, generation, status, text};
use mandoline::http::names::{LOAD, SPILL};

/// A client that claims that it spills: nobody believes it.
const GET: &str =
    "GET /kv/a HTTP/1.1\r\nhost: a\r\nmandoline-spill: 9.9\r\nconnection: close\r\n\r\n";

/// A task that says by which generation a request was spilled to it, and tells its load.
async fn loaded(name: &'static str) -> Backend {
    let served = Arc::new(AtomicU64::new(0));
    Backend::serve(move |request| {
        let served = served.fetch_add(1, SeqCst) + 1;
        let spill = request.headers().get(SPILL).map(|value| value.to_str().unwrap().to_owned());
        async move {
            let mut answer = text(format!("{name} {}", spill.as_deref().unwrap_or("unmarked")));
            let load = format!("requests={served}, units={served}");
            answer.headers_mut().insert(LOAD, HeaderValue::try_from(load).unwrap());
            answer
        }
    })
    .await
}

#[tokio::test]
async fn what_is_above_the_cap_goes_elsewhere_marked_and_loads_stay_between_tasks_and_proxy() {
    let (owner, other) = (loaded("owner").await, loaded("other").await);
    let stage = Stage::new(Owners::none());
    let runs = [(0, 1, owner.address), (u64::MAX, 2, other.address)];
    stage.owners.give_with_spill(3, &runs).await;
    let (mut by_owner, mut by_other) = (0, 0);
    for _ in 0..200 {
        let answer = stage.talk(GET).await;
        assert!(!answer.contains("mandoline-load"), "{answer}");
        if answer.ends_with("owner unmarked") {
            by_owner += 1;
        } else {
            assert!(answer.ends_with("other 1.3"), "{answer}");
            by_other += 1;
        }
    }
    assert!((60..=150).contains(&by_owner), "{by_owner} of 200, {by_other} spilled");
    let stats = stage.stats();
    assert_eq!((stats.spilled, stats.retried, stats.failed), (by_other, 0, 0));
}

#[tokio::test]
async fn what_a_task_will_not_take_goes_to_the_owner() {
    let owner = loaded("owner").await;
    let strict = Backend::serve(async move |_| {
        status(421, &[("mandoline-generation", &generation(3).to_string())])
    })
    .await;
    let stage = Stage::new(Owners::none());
    let runs = [(0, 1, owner.address), (u64::MAX, 2, strict.address)];
    stage.owners.give_with_spill(3, &runs).await;
    for _ in 0..50 {
        assert!(stage.talk(GET).await.ends_with("owner unmarked"));
    }
    let stats = stage.stats();
    assert!(stats.spilled > 0 && stats.retried == stats.spilled, "{stats:?}");
    assert_eq!((stats.answered, stats.failed), (50, 0));
}

#[tokio::test]
async fn without_spill_a_load_is_kept_from_clients_too() {
    let owner = loaded("owner").await;
    let stage = Stage::new(Owners::all(owner.address).await);
    let answer = stage.talk(GET).await;
    assert!(answer.ends_with("owner unmarked") && !answer.contains("mandoline-load"), "{answer}");
    assert_eq!(stage.stats().spilled, 0);
}

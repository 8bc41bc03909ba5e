//! The second try: when there is one, where it goes, and when there must be none.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use http::StatusCode;
use mandoline_core::task::SessionId;
use tokio::sync::{Notify, mpsc};

use super::harness::{Backend, Owners, Stage, Wire, generation, show, status, text, until, within};
use crate::record::{Observer, Record};

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

fn post(body: &str) -> String {
    format!(
        "POST /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A task that says that nothing is its own, as of a generation, and how often it was asked.
async fn misdirecting(number: u64) -> (Backend, Arc<AtomicUsize>, Arc<Notify>) {
    let (asked, told) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let (count, tell) = (Arc::clone(&asked), Arc::clone(&told));
    let backend = Backend::serve(move |request| {
        let (count, tell) = (Arc::clone(&count), Arc::clone(&tell));
        async move {
            drop(show(request).await);
            count.fetch_add(1, SeqCst);
            tell.notify_one();
            status(421, &[("mandoline-generation", &generation(number).to_string())])
        }
    })
    .await;
    (backend, asked, told)
}

#[tokio::test]
async fn a_misdirected_request_goes_to_the_owner_that_the_newer_assignment_names() {
    for request in [
        GET.to_owned(),
        post("hello"),
        post("hello")
            .replace("content-length: 5", "transfer-encoding: chunked")
            .replace("hello", "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
    ] {
        let (old, asked, told) = misdirecting(2).await;
        let new = Backend::echo("new").await;
        let (send, mut records) = mpsc::unbounded_channel::<Record>();
        let stage = Stage::with(Owners::all(old.address).await, |config| {
            config.observer = Some(Observer::new(move |record| send.send(record.clone()).unwrap()));
        });
        let moves = async {
            within("the old owner to be asked", told.notified()).await;
            stage.owners.give(2, &[(0, 2, new.address)]).await;
        };
        let (answer, ()) = tokio::join!(stage.talk(&request), moves);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("\r\n\r\nnew ") || answer.contains("\nnew "), "{answer}");
        assert_eq!(answer.contains("[hello]"), request.starts_with("POST"), "{answer}");
        assert_eq!(asked.load(SeqCst), 1);
        let record = within("the record", records.recv()).await.unwrap();
        assert_eq!((record.first, record.last), (Some(SessionId(1)), Some(SessionId(2))));
        assert_eq!(
            (record.generation, record.retried(), record.first_try_right),
            (generation(1), true, false)
        );
        let stats = stage.stats();
        assert_eq!(
            (stats.retried, stats.first_try_right, stats.answered, stats.failed),
            (1, 0, 1, 0)
        );
        assert_eq!(
            (stats.tasks[&SessionId(1)].misdirected, stats.tasks[&SessionId(2)].answered),
            (1, 1)
        );
    }
}

#[tokio::test]
async fn a_task_that_lags_behind_is_asked_again() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let backend = Backend::serve(move |_| {
        let first = count.fetch_add(1, SeqCst) == 0;
        async move {
            if first { status(421, &[("mandoline-generation", "1.1")]) } else { text("mine now") }
        }
    })
    .await;
    let stage = Stage::new(Owners::none());
    stage.owners.give(5, &[(0, 1, backend.address)]).await;
    assert!(stage.talk(GET).await.ends_with("mine now"));
    assert_eq!(asked.load(SeqCst), 2);
}

#[tokio::test]
async fn a_refusal_keeps_its_connection_unless_it_is_long() {
    // What is said, and how many connections ten tries need.
    for (said, connects) in [(0, 1), (1_000, 1), (1 << 20, 10)] {
        let backend = Backend::serve(move |_| async move {
            let mut refusal = text("x".repeat(said));
            *refusal.status_mut() = StatusCode::MISDIRECTED_REQUEST;
            refusal.headers_mut().insert("mandoline-generation", "1.1".parse().unwrap());
            refusal
        })
        .await;
        let stage = Stage::new(Owners::none());
        stage.owners.give(5, &[(0, 1, backend.address)]).await;
        assert!(stage.talk(GET).await.starts_with("HTTP/1.1 503"));
        assert_eq!(stage.stats().connects, connects, "{said} bytes");
    }
}

#[tokio::test]
async fn a_task_that_never_catches_up_ends_in_a_503() {
    let (backend, asked, _) = misdirecting(1).await;
    let stage = Stage::new(Owners::none());
    stage.owners.give(5, &[(0, 1, backend.address)]).await;
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("moving"), "{answer}");
    // Once, and once more after each of nine pauses.
    assert_eq!(asked.load(SeqCst), 10);
    let stats = stage.stats();
    assert_eq!((stats.requests, stats.failed, stats.retried), (1, 1, 1));
}

#[tokio::test]
async fn a_fresh_owner_that_lags_behind_is_asked_again() {
    let (old, _, told) = misdirecting(2).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let new = Backend::serve(move |_| {
        let lags = count.fetch_add(1, SeqCst) < 2;
        async move {
            if lags { status(421, &[("mandoline-generation", "1.1")]) } else { text("mine now") }
        }
    })
    .await;
    let stage = Stage::new(Owners::all(old.address).await);
    let moves = async {
        within("the old owner to be asked", told.notified()).await;
        stage.owners.give(2, &[(0, 2, new.address)]).await;
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(answer.ends_with("mine now"), "{answer}");
    assert_eq!((asked.load(SeqCst), stage.stats().retried), (3, 1));
}

#[tokio::test]
async fn two_tasks_that_both_refuse_end_in_a_503_and_not_in_a_loop() {
    let ((old, old_asked, _), (new, new_asked, _)) = (misdirecting(2).await, misdirecting(2).await);
    let stage = Stage::new(Owners::all(old.address).await);
    let moves = async {
        until("the old owner to be asked", || old_asked.load(SeqCst) == 1).await;
        stage.owners.give(2, &[(0, 2, new.address)]).await;
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(
        answer.contains("error=destination_unavailable") && answer.contains("moving"),
        "{answer}"
    );
    assert_eq!((old_asked.load(SeqCst), new_asked.load(SeqCst)), (1, 1));
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.retried, stats.first_try_right), (1, 1, 0));
}

#[tokio::test]
async fn a_body_that_is_too_long_to_keep_is_not_sent_twice() {
    let (backend, asked, _) = misdirecting(1).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage.talk(&post(&"x".repeat(100_000))).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert_eq!(asked.load(SeqCst), 1);
    assert_eq!(stage.stats().retried, 0);
}

#[tokio::test]
async fn a_body_for_which_there_is_no_room_is_not_sent_twice() {
    let (backend, asked, _) = misdirecting(1).await;
    let stage =
        Stage::with(Owners::all(backend.address).await, |config| config.limits.replay_bytes = 10);
    for (body, wanted) in [("0123456789", 2), ("0123456789x", 3), ("0123456789", 5)] {
        assert!(stage.talk(&post(body)).await.starts_with("HTTP/1.1 503"));
        // Room that was taken is given back, or the third would not be sent twice.
        assert_eq!(asked.load(SeqCst), wanted);
    }
}

#[tokio::test]
async fn a_task_that_cannot_be_reached_is_replaced_by_the_fresh_owner() {
    let (gone, new) = (Backend::nobody().await, Backend::echo("new").await);
    for request in [GET.to_owned(), post("hello")] {
        let stage = Stage::new(Owners::all(gone).await);
        let moves = async {
            let failures =
                || stage.stats().tasks.get(&SessionId(1)).is_some_and(|task| task.failed == 1);
            until("the old owner to refuse", failures).await;
            stage.owners.give(2, &[(0, 2, new.address)]).await;
        };
        let (answer, ()) = tokio::join!(stage.talk(&request), moves);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("new "), "{answer}");
        let stats = stage.stats();
        assert_eq!((stats.retried, stats.first_try_right, stats.failed), (1, 0, 0));
    }
}

#[tokio::test]
async fn a_task_that_cannot_be_reached_and_has_no_successor_gets_a_503() {
    let stage = Stage::new(Owners::all(Backend::nobody().await).await);
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(answer.contains("proxy-status: mandoline; error=connection_refused"), "{answer}");
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.retried, stats.first_try_right), (1, 0, 0));
}

#[tokio::test]
async fn a_task_whose_address_does_not_resolve_gets_a_503() {
    // Longer than a label of a host name may be, so that nobody has to be asked for it.
    let stage = Stage::new(Owners::all_at(&format!("{}.example:80", "x".repeat(64))).await);
    for request in [GET.to_owned(), post("hello")] {
        let answer = stage.talk(&request).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("\r\nretry-after: 1\r\n"), "{answer}");
        assert!(answer.contains("proxy-status: mandoline; error=connection_refused"), "{answer}");
    }
    assert_eq!((stage.stats().failed, stage.stats().retried), (2, 0));
}

#[tokio::test]
async fn a_task_that_leaves_without_a_successor_gets_a_503() {
    let (old, _, told) = misdirecting(2).await;
    let stage = Stage::new(Owners::all(old.address).await);
    let moves = async {
        within("the old owner to be asked", told.notified()).await;
        stage.owners.give(2, &[]).await;
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("no task serves this key"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_task_that_breaks_off_is_replaced_only_if_twice_is_as_good_as_once() {
    let new = Backend::echo("new").await;
    let put = post("hello").replace("POST", "PUT");
    let cases =
        [(GET.to_owned(), "HTTP/1.1 200"), (put, "HTTP/1.1 200"), (post("hello"), "HTTP/1.1 502")];
    for (request, wanted) in cases {
        let told = Arc::new(Notify::new());
        let tell = Arc::clone(&told);
        let old = Backend::raw(move |stream| {
            let tell = Arc::clone(&tell);
            async move {
                Wire::of(stream).head().await;
                tell.notify_one();
            }
        })
        .await;
        let stage = Stage::new(Owners::all(old.address).await);
        let moves = async {
            within("the old owner to be asked", told.notified()).await;
            stage.owners.give(2, &[(0, 2, new.address)]).await;
        };
        let (answer, ()) = tokio::join!(stage.talk(&request), moves);
        assert!(answer.starts_with(wanted), "{request}: {answer}");
        if wanted.ends_with("502") {
            assert!(
                answer.contains("proxy-status: mandoline; error=connection_terminated"),
                "{answer}"
            );
            assert_eq!(stage.stats().retried, 0);
        }
    }
}

#[tokio::test]
async fn a_task_that_breaks_off_and_has_no_successor_gets_a_503_if_asking_again_does_no_harm() {
    let backend = Backend::script("").await;
    for (request, wanted) in [(GET.to_owned(), "HTTP/1.1 503"), (post("hello"), "HTTP/1.1 502")] {
        let stage = Stage::new(Owners::all(backend.address).await);
        let answer = stage.talk(&request).await;
        assert!(answer.starts_with(wanted), "{answer}");
        assert!(
            answer.contains("proxy-status: mandoline; error=connection_terminated"),
            "{answer}"
        );
        assert_eq!(answer.contains("retry-after: 1"), wanted.ends_with("503"), "{answer}");
    }
}

#[tokio::test]
async fn a_connection_is_used_again_and_a_closed_one_is_not() {
    let ports = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&ports);
    // Answers two requests on each connection, and then closes it without having said so.
    let backend = Backend::raw(move |stream| {
        let seen = Arc::clone(&seen);
        async move {
            let port = stream.peer_addr().unwrap().port();
            let mut wire = Wire::of(stream);
            for _ in 0..2 {
                wire.head().await;
                seen.lock().unwrap().push(port);
                wire.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
            }
        }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    for _ in 0..10 {
        let answer = stage.talk(GET).await;
        assert!(answer.ends_with("hi"), "{answer}");
    }
    let ports = ports.lock().unwrap().clone();
    assert_eq!((ports.len(), ports.iter().collect::<BTreeSet<_>>().len()), (10, 5));
    assert_eq!(stage.stats().connects, 5);
}

#[tokio::test]
async fn a_kept_connection_that_breaks_when_used_costs_a_repeatable_request_nothing() {
    // Answers the first request on a connection, reads the second, and breaks off: what a task does that closes a kept
    // connection at the moment when it is used.
    let backend = Backend::raw(|stream| async {
        let mut wire = Wire::of(stream);
        wire.head().await;
        wire.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
        wire.head().await;
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    for _ in 0..5 {
        assert!(stage.talk(GET).await.ends_with("hi"));
    }
    let stats = stage.stats();
    assert_eq!((stats.retried, stats.failed, stats.first_try_right), (0, 0, 5));
    // A request that must not be sent twice is not.
    assert!(stage.talk(&post("")).await.starts_with("HTTP/1.1 502"));
}

#[tokio::test]
async fn a_session_that_comes_back_elsewhere_gets_no_old_connection() {
    let (one, two) = (Backend::echo("one").await, Backend::echo("two").await);
    let stage = Stage::new(Owners::all(one.address).await);
    assert!(stage.talk(GET).await.contains("one "));
    stage.owners.give(2, &[(0, 1, two.address)]).await;
    assert!(stage.talk(GET).await.contains("two "));
    stage.owners.give(3, &[(0, 2, one.address)]).await;
    assert!(stage.talk(GET).await.contains("one "));
    assert_eq!(stage.stats().connects, 3);
}

#[tokio::test]
async fn an_answer_of_503_is_passed_on_and_was_not_right_at_first_try() {
    let backend = Backend::serve(|_| async { status(503, &[("x-own", "1")]) }).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-own: 1"), "{answer}");
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.retried, stats.first_try_right), (1, 0, 0));
}

#[tokio::test]
async fn a_second_task_may_answer_before_it_has_the_body() {
    let (old, _, told) = misdirecting(2).await;
    let new = Backend::serve(|_| async { status(413, &[]) }).await;
    let stage = Stage::new(Owners::all(old.address).await);
    let moves = async {
        within("the old owner to be asked", told.notified()).await;
        stage.owners.give(2, &[(0, 2, new.address)]).await;
    };
    let request = post(&"x".repeat(60_000));
    let (answer, ()) = tokio::join!(stage.talk(&request), moves);
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(stage.stats().retried, 1);
}

#[tokio::test]
async fn trailers_are_sent_again_too() {
    let (old, _, told) = misdirecting(2).await;
    let new = Backend::echo("new").await;
    let stage = Stage::new(Owners::all(old.address).await);
    let moves = async {
        within("the old owner to be asked", told.notified()).await;
        stage.owners.give(2, &[(0, 2, new.address)]).await;
    };
    let request = "POST /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntrailer: x-sum\r\n\
                   transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n";
    let (answer, ()) = tokio::join!(stage.talk(request), moves);
    assert!(answer.contains("\ntrailer x-sum: 7\n[hi]"), "{answer}");
}

#[tokio::test]
async fn waiting_for_a_newer_assignment_has_an_end() {
    // It names a generation that never comes.
    let (backend, asked, _) = misdirecting(99).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let before = tokio::time::Instant::now();
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 503"));
    let took = before.elapsed();
    assert!((Duration::from_millis(190)..Duration::from_secs(10)).contains(&took), "{took:?}");
    assert_eq!(asked.load(SeqCst), 2);
}

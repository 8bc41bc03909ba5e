//! Requests that meet a slice on its way to another task: held, in order, bounded, forgotten with their client, and let go on.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Response;
use mandoline_core::key::SliceKey;
use mandoline_core::task::SessionId;
use mandoline_core::transit::Step;
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use super::harness::{
    Backend, Body, Owners, Stage, Wire, config, generation, show, status, talk, text, until, within,
};

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
const SHORT: Duration = Duration::from_millis(200);

fn post(body: &str) -> String {
    format!(
        "POST /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// What a task says that gives its slice away, as of a generation.
fn in_transit(number: u64) -> Response<Body> {
    let known = generation(number).to_string();
    let id = "1.1/0000000000000000";
    status(503, &[("mandoline-transit", id), ("mandoline-generation", &known)])
}

/// A task that gives everything away, as of a generation, and how often it was asked.
async fn releasing(number: u64) -> (Backend, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let backend = Backend::serve(move |request| {
        let count = Arc::clone(&count);
        async move {
            drop(show(request).await);
            count.fetch_add(1, SeqCst);
            in_transit(number)
        }
    })
    .await;
    (backend, asked)
}

/// Waits until so many requests are held.
async fn held(stage: &Stage, number: u64) {
    until("requests to be held", || stage.stats().held == number).await;
}

#[tokio::test]
async fn a_request_that_meets_a_slice_in_transit_goes_to_the_new_owner_once_it_is_there() {
    let chunked = post("hello")
        .replace("content-length: 5", "transfer-encoding: chunked")
        .replace("hello", "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n");
    for request in [GET.to_owned(), post("hello"), chunked] {
        let ((old, asked), new) = (releasing(2).await, Backend::echo("new").await);
        let stage = Stage::new(Owners::all(old.address).await);
        let moves = async {
            held(&stage, 1).await;
            // The release itself changes nothing: the old owner has it still.
            stage.owners.give(2, &[(0, 1, old.address)]).await;
            assert_eq!(stage.stats().held, 1);
            stage.owners.give(3, &[(0, 2, new.address)]).await;
        };
        let (answer, ()) = tokio::join!(stage.talk(&request), moves);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("new "), "{answer}");
        assert_eq!(answer.contains("[hello]"), request.starts_with("POST"), "{answer}");
        assert!(!answer.contains("mandoline-transit"), "{answer}");
        assert_eq!(asked.load(SeqCst), 1);
        let stats = stage.stats();
        assert_eq!((stats.holds, stats.holds_released, stats.held), (1, 1, 0));
        assert_eq!((stats.answered, stats.failed, stats.retried, stats.held_bytes), (1, 0, 1, 0));
        let task = &stats.tasks[&SessionId(1)];
        assert_eq!((task.releasing, task.misdirected, task.failed), (1, 0, 0));
    }
}

#[tokio::test]
async fn a_request_that_meets_one_after_a_reload_is_held_by_what_it_began_with() {
    let (go, new) = (Arc::new(Notify::new()), Backend::echo("new").await);
    let wait = Arc::clone(&go);
    let old = Backend::serve(move |_| {
        let wait = Arc::clone(&wait);
        async move {
            wait.notified().await;
            in_transit(2)
        }
    })
    .await;
    let stage = Stage::new(Owners::all(old.address).await);
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    until("the request to be under way", || stage.stats().in_flight == 1).await;
    // By then its job has another clerk, and nobody waits for anything.
    let config = config(&stage.owners, |_| {});
    stage.proxy.reloader().reload(config).await.unwrap();
    go.notify_one();
    held(&stage, 1).await;
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    let answer = wire.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("new "), "{answer}");
}

#[tokio::test]
async fn where_the_assignment_says_so_the_old_owner_is_not_asked() {
    let ((old, asked), new) = (releasing(2).await, Backend::echo("new").await);
    let stage = Stage::new(Owners::all(old.address).await);
    let (from, to) = ((1, old.address), (2, new.address));
    stage.owners.hand_over(2, Step::Releasing, from, to).await;
    let moves = async {
        held(&stage, 1).await;
        stage.owners.hand_over(3, Step::Releasing, from, to).await;
        assert_eq!(stage.stats().holds_released, 0);
        stage.owners.give(4, &[(0, 2, new.address)]).await;
    };
    let request = post(&"x".repeat(100_000));
    let (answer, ()) = tokio::join!(stage.talk(&request), moves);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("new "), "{answer}");
    assert_eq!(asked.load(SeqCst), 0);
    let stats = stage.stats();
    assert_eq!((stats.holds, stats.retried, stats.first_try_right), (1, 0, 1));
}

#[tokio::test]
async fn while_the_next_owner_prepares_the_old_one_serves() {
    let (old, new) = (Backend::echo("old").await, Backend::echo("new").await);
    let stage = Stage::new(Owners::all(old.address).await);
    stage.owners.hand_over(2, Step::Preparing, (1, old.address), (2, new.address)).await;
    assert!(stage.talk(GET).await.contains("old "));
    assert_eq!(stage.stats().holds, 0);
}

#[tokio::test]
async fn an_owner_that_stops_while_it_lets_go_leaves_its_requests_held() {
    let (old, new) = (Backend::raw(|_| async {}).await, Backend::echo("new").await);
    let stage = Stage::new(Owners::all(old.address).await);
    stage.owners.hand_over(2, Step::Preparing, (1, old.address), (2, new.address)).await;
    let moves = async {
        let failures =
            || stage.stats().tasks.get(&SessionId(1)).is_some_and(|task| task.failed > 0);
        until("the old owner to break off", failures).await;
        stage.owners.hand_over(3, Step::Releasing, (1, old.address), (2, new.address)).await;
        held(&stage, 1).await;
        stage.owners.give(4, &[(0, 2, new.address)]).await;
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("new "), "{answer}");
}

#[tokio::test]
async fn a_slice_that_has_settled_meanwhile_holds_nobody_up() {
    let ((old, _), new) = (releasing(2).await, Backend::echo("new").await);
    // The old owner answers by 1.2, though all know 1.3 by then.
    let (go, wait) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, met) = (Arc::clone(&go), Arc::clone(&wait));
    let slow = Backend::serve(move |_| {
        let (tell, met) = (Arc::clone(&tell), Arc::clone(&met));
        async move {
            tell.notify_one();
            met.notified().await;
            in_transit(2)
        }
    })
    .await;
    drop(old);
    let stage = Stage::new(Owners::all(slow.address).await);
    let moves = async {
        within("the old owner to be asked", go.notified()).await;
        stage.owners.give(3, &[(0, 2, new.address)]).await;
        wait.notify_one();
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("new "), "{answer}");
}

#[tokio::test]
async fn a_hand_off_that_is_called_off_leaves_requests_with_the_old_owner() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let backend = Backend::serve(move |_| {
        // It hears of the end a moment after the proxy.
        let answer = match count.fetch_add(1, SeqCst) {
            0..3 => in_transit(2),
            _ => text("mine again"),
        };
        async move { answer }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let aborts = async {
        held(&stage, 1).await;
        stage.owners.give(3, &[(0, 1, backend.address)]).await;
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), aborts);
    assert!(answer.ends_with("mine again"), "{answer}");
    assert_eq!((asked.load(SeqCst), stage.stats().holds), (4, 1));
}

#[tokio::test]
async fn a_new_owner_that_has_not_heard_yet_is_asked_again() {
    let (old, _) = releasing(2).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let new = Backend::serve(move |_| {
        let lags = count.fetch_add(1, SeqCst) < 4;
        async move {
            if lags { status(421, &[("mandoline-generation", "1.2")]) } else { text("mine now") }
        }
    })
    .await;
    let stage = Stage::new(Owners::all(old.address).await);
    let moves = async {
        held(&stage, 1).await;
        stage.owners.give(3, &[(0, 2, new.address)]).await;
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(answer.ends_with("mine now"), "{answer}");
    assert_eq!((asked.load(SeqCst), stage.stats().failed), (5, 0));
}

#[tokio::test]
async fn requests_go_on_in_the_order_in_which_they_came() {
    const CLIENTS: u64 = 100;
    let (old, asked) = releasing(2).await;
    // Connections are accepted in the order in which they were opened, and each carries one request.
    let (tell, mut arrived) = mpsc::unbounded_channel();
    let nth = AtomicUsize::new(0);
    let new = Backend::raw(move |stream| {
        let (tell, nth) = (tell.clone(), nth.fetch_add(1, SeqCst));
        async move {
            let mut wire = Wire::of(stream);
            tell.send((nth, wire.head().await)).unwrap();
            wire.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
        }
    })
    .await;
    let stage = Stage::new(Owners::all(old.address).await);
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let request = GET.replace("\r\n\r\n", &format!("\r\nx-nth: {n}.\r\n\r\n"));
        let address = stage.proxy.local_addr();
        clients.spawn(async move { talk(address, request.as_bytes()).await });
        held(&stage, n + 1).await;
    }
    // Whoever comes after the first waits behind it, and does not ask.
    assert_eq!(asked.load(SeqCst), 1);
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    while let Some(answer) = clients.join_next().await {
        assert!(answer.unwrap().starts_with("HTTP/1.1 200"));
    }
    for _ in 0..CLIENTS {
        let (nth, head) = within("a request", arrived.recv()).await.unwrap();
        assert!(head.contains(&format!("x-nth: {nth}.\r\n")), "{nth}: {head}");
    }
}

#[tokio::test]
async fn other_keys_are_not_held_up() {
    let (old, _) = releasing(2).await;
    let other = Backend::echo("other").await;
    let key = SliceKey::of(b"a").0;
    let stage = Stage::new(Owners::none());
    let runs = [(0, 2, other.address), (key, 1, old.address), (key + 1, 2, other.address)];
    stage.owners.give(1, &runs).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    assert!(stage.talk(&GET.replace("/a ", "/b ")).await.contains("other "));
    // Nor does news of others let it go.
    stage.owners.give(2, &runs).await;
    assert!(stage.talk(&GET.replace("/a ", "/c ")).await.contains("other "));
    assert_eq!(stage.stats().held, 1);
}

#[tokio::test]
async fn a_client_that_leaves_is_forgotten() {
    let (old, _) = releasing(2).await;
    let stage = Stage::new(Owners::all(old.address).await);
    let mut first = stage.connect().await;
    first.send(GET).await;
    held(&stage, 1).await;
    let began = "POST /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 10000000\r\n\r\n";
    let requests = [
        ("without a body", GET.to_owned()),
        ("with a body that was read", post("hello")),
        ("with the next request behind it", format!("{}{}", post("hello"), post("hello"))),
        ("with a body of which nothing has come", began.to_owned()),
        ("with a body of which some is unread", format!("{began}{}", "x".repeat(1000))),
    ];
    for (n, (what, request)) in requests.iter().enumerate() {
        let mut wire = stage.connect().await;
        wire.send(request).await;
        held(&stage, 2).await;
        drop(wire);
        until(what, || stage.stats().holds_left == n as u64 + 1).await;
        assert_eq!(stage.stats().held, 1);
    }
    // And one whose unread body fills the socket. A mere close would wait behind it in the client's kernel.
    let mut wire = stage.connect().await;
    wire.send(began).await;
    held(&stage, 2).await;
    let full = async { while wire.stream.write_all(&[b'x'; 1 << 16]).await.is_ok() {} };
    assert!(tokio::time::timeout(SHORT, full).await.is_err());
    SockRef::from(&wire.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(wire);
    until("the last to be forgotten", || stage.stats().held == 1).await;

    drop(first);
    until("all to be forgotten", || stage.stats().connections == 0).await;
    let stats = stage.stats();
    assert_eq!((stats.held, stats.held_bytes, stats.in_flight), (0, 0, 0));
    assert_eq!((stats.failed, stats.abandoned), (0, stats.requests));
}

#[tokio::test]
async fn past_its_number_a_queue_takes_nobody_more() {
    let ((old, _), new) = (releasing(2).await, Backend::echo("new").await);
    let stage = Stage::with(Owners::all(old.address).await, |config| {
        config.limits.held_requests = 2;
    });
    let (mut one, mut two) = (stage.connect().await, stage.connect().await);
    one.send(GET).await;
    held(&stage, 1).await;
    two.send(GET).await;
    held(&stage, 2).await;
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(answer.contains("error=destination_unavailable"), "{answer}");
    assert!(answer.contains("too many requests wait"), "{answer}");
    assert_eq!((stage.stats().holds_refused, stage.stats().held), (1, 2));
    // Whoever leaves makes room.
    drop(two);
    held(&stage, 1).await;
    let mut three = stage.connect().await;
    three.send(GET).await;
    held(&stage, 2).await;
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    for wire in [one, three] {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn with_no_room_at_all_nobody_is_held() {
    let (old, _) = releasing(2).await;
    let stage = Stage::with(Owners::all(old.address).await, |config| {
        config.limits.held_requests = 0;
    });
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 503"));
    assert_eq!((stage.stats().holds, stage.stats().holds_refused), (0, 1));
}

#[tokio::test]
async fn past_its_bytes_a_queue_takes_nobody_more() {
    let ((old, _), new) = (releasing(2).await, Backend::echo("new").await);
    let stage = Stage::with(Owners::all(old.address).await, |config| {
        config.limits.held_bytes = 20_000;
    });
    let mut one = stage.connect().await;
    one.send(post(&"x".repeat(12_000))).await;
    held(&stage, 1).await;
    assert!((12_000..13_000).contains(&stage.stats().held_bytes), "{:?}", stage.stats());
    let long = GET.replace("host: a", &format!("host: a\r\nx-long: {}", "x".repeat(9_000)));
    assert!(stage.talk(&long).await.starts_with("HTTP/1.1 503"));
    let mut two = stage.connect().await;
    two.send(GET).await;
    held(&stage, 2).await;
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    for wire in [one, two] {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
    assert_eq!(stage.stats().held_bytes, 0);
}

#[tokio::test]
async fn holding_a_request_has_an_end() {
    let (old, asked) = releasing(2).await;
    let stage = Stage::with(Owners::all(old.address).await, |config| config.timeouts.hold = SHORT);
    let before = tokio::time::Instant::now();
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(answer.contains("for too long"), "{answer}");
    assert!(before.elapsed() >= SHORT, "{:?}", before.elapsed());
    let stats = stage.stats();
    assert_eq!((stats.holds_late, stats.failed, stats.held), (1, 1, 0));
    assert_eq!(asked.load(SeqCst), 1);
}

#[tokio::test]
async fn the_time_in_which_a_request_is_held_is_not_the_tasks() {
    let ((old, _), new) = (releasing(2).await, Backend::echo("new").await);
    let stage = Stage::with(Owners::all(old.address).await, |config| {
        config.timeouts.response = SHORT;
    });
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    let mut pause = tokio::time::interval(2 * SHORT);
    pause.tick().await;
    pause.tick().await;
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    let answer = wire.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_body_that_cannot_be_sent_again_is_not_held() {
    let (old, asked) = releasing(2).await;
    let stage = Stage::new(Owners::all(old.address).await);
    let answer = stage.talk(&post(&"x".repeat(100_000))).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert_eq!((asked.load(SeqCst), stage.stats().holds), (1, 0));
}

#[tokio::test]
async fn a_body_that_has_not_been_sent_yet_is_held_however_long() {
    let ((old, _), new) = (releasing(2).await, Backend::echo("new").await);
    let stage = Stage::new(Owners::all(old.address).await);
    let (mut one, mut two) = (stage.connect().await, stage.connect().await);
    one.send(GET).await;
    held(&stage, 1).await;
    let body = "x".repeat(1_000_000);
    let sends = async {
        two.send(post(&body)).await;
        two.rest().await
    };
    let moves = async {
        held(&stage, 2).await;
        // It is read on while it is held, so that a client that leaves is noticed.
        assert!(stage.stats().held_bytes <= 1_010_000, "{:?}", stage.stats());
        stage.owners.give(3, &[(0, 2, new.address)]).await;
    };
    let (answer, ()) = tokio::join!(sends, moves);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&body), "{}", answer.len());
    assert!(one.rest().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn tasks_that_give_a_slice_away_for_ever_do_not_keep_a_request_for_ever() {
    let now = Arc::new(Mutex::new(2));
    let asked = Arc::new(AtomicUsize::new(0));
    let (told, count) = (Arc::clone(&now), Arc::clone(&asked));
    let backend = Backend::serve(move |_| {
        count.fetch_add(1, SeqCst);
        let number = *told.lock().unwrap();
        async move { in_transit(number) }
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let moves = async {
        for round in 1_u64.. {
            until("the request to be held again", || {
                let stats = stage.stats();
                stats.holds == round || stats.failed == 1
            })
            .await;
            if stage.stats().failed == 1 {
                return;
            }
            let number = 2 + round;
            *now.lock().unwrap() = number;
            stage.owners.give(number, &[(0, 1 + round % 2, backend.address)]).await;
        }
    };
    let (answer, ()) = tokio::join!(stage.talk(GET), moves);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("moving"), "{answer}");
    // Each time but the last it was held once more.
    assert_eq!((asked.load(SeqCst), stage.stats().holds), (20, 19));
}

#[tokio::test]
async fn a_503_that_names_no_hand_off_is_passed_on() {
    for line in ["", "1.1", "1.1/zz", "nonsense"] {
        let backend = Backend::serve(move |_| async move {
            status(503, &[("mandoline-transit", line), ("x-own", "1")])
        })
        .await;
        let stage = Stage::new(Owners::all(backend.address).await);
        let answer = stage.talk(GET).await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-own: 1"), "{answer}");
        assert_eq!((stage.stats().holds, stage.stats().retried), (0, 0));
    }
}

#[tokio::test]
async fn a_proxy_that_stops_lets_those_it_holds_go_on() {
    let ((old, _), new) = (releasing(2).await, Backend::echo("new").await);
    let Stage { proxy, owners } = Stage::new(Owners::all(old.address).await);
    let mut wire = Wire::connect(proxy.local_addr()).await;
    wire.send(GET).await;
    let tally = proxy.tally();
    until("the request to be held", || tally.stats().held == 1).await;
    let moves = async {
        until("the port to be closed", || {
            std::net::TcpStream::connect(wire.stream.peer_addr().unwrap()).is_err()
        })
        .await;
        owners.give(3, &[(0, 2, new.address)]).await;
        wire.rest().await
    };
    let ((), answer) = tokio::join!(proxy.stop(), moves);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

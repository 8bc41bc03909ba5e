//! Requests that a pause holds: by any scope, for a time or until it is ended, bounded, forgotten with their client, let go slowly
//! and in order, and sent to whoever serves them then.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_core::flags::{
    AtEnd, Count, Flags, Pause, PauseId, PauseOrder, Phase, Scope, Standing,
};
use mandoline_core::key::SliceKey;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::harness::{Backend, Owners, Stage, Wire, talk, text, until, within};
use super::tunnels;
use crate::config::{Config, Exempt};
use crate::metrics::stats::PauseStats;

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
const SHORT: Duration = Duration::from_millis(200);
/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

/// A scope by its parts: `path=/kv host=a method=GET slice=0..ff job=kv`.
fn scope(text: &str) -> Scope {
    let mut scope = Scope::default();
    for part in text.split(' ') {
        let (name, value) = part.split_once('=').unwrap();
        match name {
            "job" => scope.job = Some(value.parse().unwrap()),
            "slice" => scope.slice = Some(value.parse().unwrap()),
            "host" => scope.host = Some(value.into()),
            "path" => scope.path = Some(value.into()),
            "method" => scope.methods = vec![value.into()],
            _ => panic!("{name}"),
        }
    }
    scope
}

pub(super) fn order(text: &str, lasts: Duration) -> PauseOrder {
    let (why, release_over) = ("maintenance".into(), Duration::ZERO);
    PauseOrder { scope: scope(text), why, lasts, at_end: AtEnd::GoOn, release_over }
}

/// What tells a proxy of pauses.
pub(super) struct Operator {
    flags: watch::Sender<Arc<Flags>>,
}

impl Operator {
    pub(super) fn new() -> (Self, watch::Receiver<Arc<Flags>>) {
        let (flags, told) = watch::channel(Arc::default());
        (Self { flags }, told)
    }

    fn change(&self, change: impl FnOnce(&mut Flags)) {
        self.flags.send_modify(|flags| {
            let flags = Arc::make_mut(flags);
            flags.version = flags.version.next();
            change(flags);
        });
    }

    pub(super) fn add(&self, id: u64, order: PauseOrder) {
        let (id, phase) = (PauseId(id), Phase::Holding);
        self.change(|flags| drop(flags.pauses.insert(id, Pause { id, order, phase })));
    }

    pub(super) fn end(&self, id: u64, over: Duration) {
        self.change(|flags| {
            flags.pauses.get_mut(&PauseId(id)).unwrap().phase = Phase::Releasing { over };
        });
    }

    fn forget(&self, id: u64) {
        self.change(|flags| drop(flags.pauses.remove(&PauseId(id))));
    }
}

/// A proxy, and who tells it of pauses.
async fn paused_stage(owners: Owners, change: impl FnOnce(&mut Config)) -> (Stage, Operator) {
    let (operator, told) = Operator::new();
    let stage = Stage::with(owners, |config| {
        config.flags = told;
        change(config);
    });
    (stage, operator)
}

fn stats(stage: &Stage, id: u64) -> Option<PauseStats> {
    stage.stats().pauses.into_iter().find(|pause| pause.id == PauseId(id))
}

/// Waits until every worker goes by a pause.
pub(super) async fn in_force(stage: &Stage, id: u64) {
    until("the pause to be in force", || stats(stage, id).is_some_and(|pause| pause.in_force))
        .await;
}

pub(super) async fn held(stage: &Stage, number: u64) {
    until("requests to be held", || stage.stats().held == number).await;
}

fn get(target: &str) -> String {
    GET.replace("/kv/a", target)
}

#[tokio::test]
async fn a_pause_holds_what_is_in_its_scope_and_nothing_else() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    let b = SliceKey::of(b"b");
    let slice = format!("slice={b}..{b}");
    let cases = [
        ("path=/kv/a", get("/kv/a"), get("/kv/ab")),
        ("path=/kv/a", get("/kv/%61"), get("/kv/b")),
        ("path=/kv/a", get("/kv/a/b?c"), get("/kv/a%2fb")),
        ("host=a.b", GET.replace("host: a", "host: A.B:80"), GET.to_owned()),
        ("method=POST", GET.replace("GET", "POST"), GET.to_owned()),
        (&slice, get("/kv/b"), get("/kv/a")),
        ("job=kv method=PUT", GET.replace("GET", "PUT"), GET.to_owned()),
        ("job=kv path=/kv/a method=GET", get("/kv/a"), GET.replace("GET", "PUT")),
    ];
    for (id, (scope, inside, outside)) in (1..).zip(cases) {
        operator.add(id, order(scope, LONG));
        in_force(&stage, id).await;
        let mut wire = stage.connect().await;
        wire.send(&inside).await;
        held(&stage, 1).await;
        let answer = stage.talk(&outside).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{scope}: {answer}");
        operator.end(id, Duration::ZERO);
        let answer = wire.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("task "), "{scope}");
        until("the pause to be over", || !stats(&stage, id).unwrap().in_force).await;
    }
    operator.add(99, order("job=other", LONG));
    in_force(&stage, 99).await;
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    let stats = stage.stats();
    assert_eq!((stats.holds, stats.holds_released, stats.failed), (8, 8, 0));
}

#[tokio::test]
async fn a_pause_ends_by_the_proxys_own_clock_and_does_not_begin_anew() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(7, order("job=kv", 2 * SHORT));
    in_force(&stage, 7).await;
    let before = Instant::now();
    // Nobody tells of its end: whoever could is gone, or the flags still name it.
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(before.elapsed() >= SHORT);
    operator.add(8, order("job=other", LONG));
    in_force(&stage, 8).await;
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    let pause = stats(&stage, 7).unwrap();
    assert!(pause.ended && !pause.in_force, "{pause:?}");
    assert_eq!((pause.holds, pause.released, pause.held), (1, 1, 0));
    drop(operator);
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_pause_without_anyone_left_to_tell_of_it_has_an_end() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(7, order("job=kv", 2 * SHORT));
    in_force(&stage, 7).await;
    drop(operator);
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    assert_eq!(stage.stats().holds_released, 1);
}

#[tokio::test]
async fn a_pause_that_is_told_of_no_longer_is_over() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    operator.forget(1);
    assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    // And one that is told of no longer while its requests are let go lets the rest go.
    operator.add(2, order("job=kv", LONG));
    in_force(&stage, 2).await;
    let mut wires = Vec::new();
    for n in 1..=5 {
        let mut wire = stage.connect().await;
        wire.send(GET).await;
        wires.push(wire);
        held(&stage, n).await;
    }
    operator.end(2, LONG);
    until("the release to begin", || stats(&stage, 2).unwrap().ended).await;
    operator.forget(2);
    for wire in wires {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn a_pause_may_refuse_what_it_holds_in_the_end() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(3, PauseOrder { at_end: AtEnd::Fail, ..order("job=kv", SHORT) });
    in_force(&stage, 3).await;
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(answer.contains("the pause p3") && answer.contains("to refuse"), "{answer}");
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    let pause = stats(&stage, 3).unwrap();
    assert_eq!((pause.failed, pause.released, pause.held), (1, 0, 0));
    assert_eq!((stage.stats().holds_failed, stage.stats().held), (1, 0));
    // Ended by its operator it lets them go.
    operator.add(4, PauseOrder { at_end: AtEnd::Fail, ..order("job=kv", LONG) });
    in_force(&stage, 4).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    operator.end(4, Duration::ZERO);
    assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
}

/// A task that writes down which requests it was asked, in their order.
async fn recorder() -> (Backend, Arc<Mutex<Vec<(Instant, String)>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&asked);
    let backend = Backend::serve(move |request| {
        let notes = Arc::clone(&notes);
        async move {
            let target = request.uri().to_string();
            notes.lock().unwrap().push((Instant::now(), target));
            text("ok")
        }
    })
    .await;
    (backend, asked)
}

#[tokio::test]
async fn those_held_go_slowly_in_order_and_others_come_behind_them() {
    let (backend, asked) = recorder().await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut wires = Vec::new();
    for n in 0..40 {
        let mut wire = stage.connect().await;
        wire.send(get(&format!("/kv/{}?{n}", n % 4))).await;
        wires.push(wire);
        held(&stage, n + 1).await;
    }
    let (over, began) = (Duration::from_secs(2), Instant::now());
    operator.end(1, over);
    until("the first to go", || stats(&stage, 1).unwrap().released > 0).await;
    // One more comes: it joins the end, and lets one more go at once.
    let mut late = stage.connect().await;
    late.send(get("/kv/0?40")).await;
    wires.push(late);
    for wire in wires {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
    let took = began.elapsed();
    // The last has its moment in the last fortieth of the time. How much later it comes says more of this machine.
    assert!(took >= over.mul_f64(0.93), "{took:?}");
    let asked = std::mem::take(&mut *asked.lock().unwrap());
    let order: Vec<usize> = asked
        .iter()
        .map(|(_, target)| target.rsplit_once('?').unwrap().1.parse().unwrap())
        .collect();
    assert_eq!(order, (0..=40).collect::<Vec<_>>());
    // By half of the time about half had gone.
    let half = asked.iter().filter(|(at, _)| *at < began + over / 2).count();
    assert!((14..=24).contains(&half), "{half}");
    let pause = stats(&stage, 1).unwrap();
    assert_eq!((pause.holds, pause.released), (41, 41));
    until("the pause to be over", || !stats(&stage, 1).unwrap().in_force).await;
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    assert_eq!(stage.stats().holds, 41);
}

#[tokio::test]
async fn a_release_may_be_made_faster_while_it_goes_on() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut wires = Vec::new();
    for n in 1..=20 {
        let mut wire = stage.connect().await;
        wire.send(GET).await;
        wires.push(wire);
        held(&stage, n).await;
    }
    operator.end(1, LONG);
    until("the release to begin", || stats(&stage, 1).unwrap().ended).await;
    assert!(stats(&stage, 1).unwrap().lasts_yet > LONG / 2);
    operator.end(1, SHORT);
    for wire in wires {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn those_held_go_to_whoever_serves_them_then() {
    let (old, new) = (Backend::raw(|_| async {}).await, Backend::echo("new").await);
    let (stage, operator) = paused_stage(Owners::all(old.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    stage.owners.give(2, &[]).await;
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    operator.end(1, Duration::ZERO);
    assert!(wire.rest().await.contains("new "));
    assert_eq!((stage.stats().retried, stage.stats().first_try_right), (0, 1));
}

#[tokio::test]
async fn a_request_that_two_pauses_hold_waits_for_both() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    operator.add(2, order("path=/kv/a", LONG));
    in_force(&stage, 2).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    assert_eq!(stats(&stage, 1).unwrap().held, 1);
    operator.end(1, Duration::ZERO);
    until("the other to hold it", || stats(&stage, 2).unwrap().held == 1).await;
    assert!(stage.talk(&get("/kv/b")).await.starts_with("HTTP/1.1 200"));
    operator.end(2, Duration::ZERO);
    assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    assert_eq!((stage.stats().holds, stage.stats().holds_released), (2, 2));
}

#[tokio::test]
async fn past_its_bounds_a_pause_holds_nobody_more_and_says_for_how_long() {
    let backend = Backend::echo("task").await;
    let bounds = |config: &mut Config| {
        (config.limits.paused_requests, config.limits.held_requests) = (2, 3);
    };
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, bounds).await;
    let lasts = Duration::from_secs(100);
    operator.add(1, PauseOrder { release_over: lasts, ..order("path=/kv/a", lasts) });
    operator.add(2, order("path=/kv/b", LONG));
    in_force(&stage, 2).await;
    let mut wires = Vec::new();
    for n in 1..=2 {
        let mut wire = stage.connect().await;
        wire.send(GET).await;
        wires.push(wire);
        held(&stage, n).await;
    }
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let (_, after) = answer.split_once("retry-after: ").unwrap();
    let seconds: u64 = after.split_once("\r\n").unwrap().0.parse().unwrap();
    assert!((180..=200).contains(&seconds), "{answer}");
    assert!(answer.contains("held by the pause p1, and as many wait as may (2)"), "{answer}");
    assert!(answer.contains("`mandoline pause end p1`"), "{answer}");
    // What one pause does not hold another may.
    let mut wire = stage.connect().await;
    wire.send(get("/kv/b")).await;
    wires.push(wire);
    held(&stage, 3).await;
    let answer = stage.talk(&get("/kv/b")).await;
    assert!(answer.contains("by the pause p2, and as many wait as may (3)"), "{answer}");
    assert_eq!((stats(&stage, 1).unwrap().refused, stats(&stage, 2).unwrap().refused), (1, 1));
    assert_eq!(stage.stats().holds_refused, 2);
    // Whoever leaves makes room.
    drop(wires.remove(0));
    held(&stage, 2).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    wires.push(wire);
    held(&stage, 3).await;
    operator.end(1, Duration::ZERO);
    operator.end(2, Duration::ZERO);
    for wire in wires {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn past_its_bytes_a_pause_holds_nobody_more() {
    let backend = Backend::echo("task").await;
    let bounds = |config: &mut Config| config.limits.paused_bytes = 10_000;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, bounds).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let long = GET.replace("host: a", &format!("host: a\r\nx-long: {}", "x".repeat(9_000)));
    let mut wire = stage.connect().await;
    wire.send(&long).await;
    held(&stage, 1).await;
    let answer = stage.talk(&long).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("(10000 bytes)"), "{answer}");
    operator.end(1, Duration::ZERO);
    assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    assert_eq!((stage.stats().held_bytes, stats(&stage, 1).unwrap().held_bytes), (0, 0));
}

#[tokio::test]
async fn no_request_is_held_for_longer_than_it_may_be() {
    let backend = Backend::echo("task").await;
    let bounds = |config: &mut Config| config.timeouts.pause = SHORT;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, bounds).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let before = Instant::now();
    let answer = stage.talk(GET).await;
    assert!(before.elapsed() >= SHORT);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("has waited"), "{answer}");
    let pause = stats(&stage, 1).unwrap();
    assert_eq!((pause.late, pause.held, pause.held_bytes), (1, 0, 0));
}

#[tokio::test]
async fn a_client_that_leaves_is_forgotten_also_behind_its_body() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let post = |length: usize| {
        format!("POST /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n")
    };
    let chunked = "POST /kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let open = GET.replace("connection: close\r\n", "");
    let (million, mebi) = ("x".repeat(1_000_000), "x".repeat(1 << 20));
    let requests = [
        ("without a body", GET.to_owned()),
        ("with another request behind it", open.repeat(2)),
        ("with a line's end behind it", open + "\r\n"),
        ("with a million bytes of body", post(1_000_000) + &million),
        ("with a mebibyte of body", post(1 << 20) + &mebi),
        ("with a million of ten million bytes", post(10_000_000) + &million),
        ("with a body in chunks", format!("{chunked}f4240\r\n{million}\r\n0\r\n\r\n")),
        ("with a body in chunks that is not over", format!("{chunked}f4240\r\n{million}\r\n")),
        ("that waits for leave", post(9).replace("host: a", "host: a\r\nexpect: 100-continue")),
    ];
    for (n, (what, request)) in (1..).zip(&requests) {
        let mut wire = stage.connect().await;
        // All of it goes out: it is read while the request is held.
        wire.send(request).await;
        held(&stage, 1).await;
        drop(wire);
        until(what, || stats(&stage, 1).unwrap().left == n).await;
        assert_eq!(stage.stats().held, 0);
    }
    until("all to be forgotten", || stage.stats().connections == 0).await;
    let stats = stage.stats();
    assert_eq!((stats.held_bytes, stats.in_flight, stats.failed), (0, 0, 0));
    assert_eq!((stats.abandoned, stats.refused), (stats.requests, 0));
}

#[tokio::test]
async fn what_was_read_of_a_body_while_it_was_held_is_sent_on_whole() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |config| {
        config.limits.held_bytes = 4 << 20;
    })
    .await;
    for (id, length) in (1..).zip([10, 100_000, 1 << 20, 5_000_000]) {
        operator.add(id, order("job=kv", LONG));
        in_force(&stage, id).await;
        let body: String = (0..length).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
        let head = format!(
            "POST /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        );
        let mut wire = stage.connect().await;
        let sends = async {
            wire.send(head + &body).await;
            wire.rest().await
        };
        let ends = async {
            held(&stage, 1).await;
            // At most half of the room goes to what is read on.
            assert!(stage.stats().held_bytes <= 2 << 20);
            operator.end(id, Duration::ZERO);
        };
        let (answer, ()) = tokio::join!(sends, ends);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&body), "{length}");
    }
    assert_eq!(stage.stats().held_bytes, 0);
}

#[tokio::test]
async fn a_body_that_is_none_is_refused_while_it_is_held() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let head = "POST /kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = stage.talk(&format!("{head}2\r\nab\r\nnonsense\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!((stage.stats().held, stats(&stage, 1).unwrap().left), (0, 1));
}

#[tokio::test]
async fn a_client_of_grpc_is_held_for_as_long_as_it_waits() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let call = |timeout: &str| {
        GET.replace("GET", "POST").replace(
            "host: a",
            &format!("host: a\r\ncontent-type: application/grpc\r\ngrpc-timeout: {timeout}"),
        )
    };
    let answer = stage.talk(&call("200m")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("grpc-status: 4"), "{answer}");
    assert!(answer.contains("content-type: application/grpc"), "{answer}");
    assert_eq!((stats(&stage, 1).unwrap().late, stage.stats().failed), (1, 1));
    // Whoever waits for longer is let go, and the task is told what is left of it.
    let mut wire = stage.connect().await;
    wire.send(call("50S")).await;
    held(&stage, 1).await;
    operator.end(1, Duration::ZERO);
    let answer = wire.rest().await;
    let (_, left) = answer.split_once("grpc-timeout: ").unwrap();
    let left: u64 = left.split_once("u\n").unwrap().0.parse().unwrap();
    assert!((30_000_000..50_000_000).contains(&left), "{left}");
}

#[tokio::test]
async fn probes_and_those_who_show_a_secret_are_not_held() {
    let backend = Backend::echo("task").await;
    let exempt = |config: &mut Config| {
        let header = ("x-pass".parse().unwrap(), "secret".parse().unwrap());
        let paths = vec!["/kv/health".into()];
        config.exempt = Exempt { paths, header: Some(header) };
    };
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, exempt).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let shows = |secret: &str| GET.replace("host: a", &format!("host: a\r\nx-pass: {secret}"));
    for request in [get("/kv/health"), get("/kv/health?deep"), shows("secret")] {
        let answer = stage.talk(&request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(!answer.contains("x-pass"), "{answer}");
    }
    let mut wires = Vec::new();
    for (n, request) in (1..).zip([get("/kv/health/x"), shows("secre"), shows("secrets")]) {
        let mut wire = stage.connect().await;
        wire.send(&request).await;
        wires.push(wire);
        held(&stage, n).await;
    }
    operator.end(1, Duration::ZERO);
    for wire in wires {
        let answer = wire.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("x-pass"), "{answer}");
    }
}

#[tokio::test]
async fn a_pause_knows_what_began_before_it_and_has_not_ended() {
    let go = Arc::new(Notify::new());
    let wait = Arc::clone(&go);
    let backend = Backend::serve(move |request| {
        let wait = Arc::clone(&wait);
        async move {
            if request.uri().path() != "/kv/quick" {
                wait.notified().await;
            }
            text("ok")
        }
    })
    .await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    let mut wires = Vec::new();
    for (n, target) in (1..).zip(["/kv/a", "/kv/b", "/kv/a"]) {
        let mut wire = stage.connect().await;
        wire.send(get(target)).await;
        wires.push(wire);
        until("the task to be asked", || {
            stage.stats().tasks.values().map(|task| task.tried).sum::<u64>() == n
        })
        .await;
    }
    assert!(stage.talk(&get("/kv/quick")).await.starts_with("HTTP/1.1 200"));
    operator.add(1, order("path=/kv/a", LONG));
    in_force(&stage, 1).await;
    assert_eq!(stats(&stage, 1).unwrap().in_flight, 2);
    // What it holds is not under way.
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    assert_eq!(stats(&stage, 1).unwrap().in_flight, 2);
    // One ends by its client's leave, one with its answer.
    drop(wires.remove(0));
    until("the one to be gone", || stats(&stage, 1).unwrap().in_flight == 1).await;
    go.notify_waiters();
    for wire in wires {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
    let mut pauses = stage.proxy.pauses();
    within("all to be gone", async {
        while pauses.stats()[0].in_flight > 0 {
            pauses.changed().await;
        }
    })
    .await;
    assert_eq!(pauses.version().number, 1);
    let (tell, mut told) = watch::channel(Standing::default());
    let telling = tokio::spawn(pauses.tell(tell));
    let known = within("what is told", told.wait_for(|told| told.version.number == 1)).await;
    assert_eq!(known.unwrap().counts, [(PauseId(1), Count { in_flight: 0, held: 1 })].into());
    telling.abort();
    operator.end(1, Duration::ZERO);
    until("the last to go on", || stats(&stage, 1).unwrap().released == 1).await;
    go.notify_one();
    assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn several_workers_hold_and_let_go_as_one() {
    let (backend, asked) = recorder().await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |config| {
        config.workers = 3.try_into().unwrap();
        config.limits.paused_requests = 60;
    })
    .await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut clients = JoinSet::new();
    for n in 0..60 {
        let address = stage.proxy.local_addr();
        clients.spawn(async move { talk(address, get(&format!("/kv/{n}")).as_bytes()).await });
    }
    held(&stage, 60).await;
    // The bound is that of all workers together.
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 503"));
    let (over, began) = (Duration::from_secs(1), Instant::now());
    operator.end(1, over);
    while let Some(answer) = within("an answer", clients.join_next()).await {
        assert!(answer.unwrap().starts_with("HTTP/1.1 200"));
    }
    let asked = asked.lock().unwrap();
    let half = asked.iter().filter(|(at, _)| *at < began + over / 2).count();
    assert!((15..=40).contains(&half), "{half}");
    assert!(began.elapsed() >= over.mul_f64(0.8));
}

#[tokio::test]
async fn a_reload_may_tell_of_pauses_from_elsewhere() {
    let backend = Backend::echo("task").await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    let (other, told) = Operator::new();
    let mut config = super::harness::config(&stage.owners, |config| config.flags = told);
    config.listeners = vec!["127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()];
    stage.proxy.reloader().reload(config).await.unwrap();
    // Nobody there has said anything yet, so nothing has ended. Another request comes in under the configuration of now.
    let mut late = stage.connect().await;
    late.send(GET).await;
    held(&stage, 2).await;
    // What both tell of goes on, and is ended by those who are asked now.
    other.add(1, order("job=kv", LONG));
    other.add(2, order("path=/elsewhere", LONG));
    in_force(&stage, 2).await;
    held(&stage, 2).await;
    other.end(1, Duration::ZERO);
    for wire in [wire, late] {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }

    // What they do not tell of has ended, but not by what they said before it was told of: as from a file of last week.
    let (third, told) = Operator::new();
    let mut config = super::harness::config(&stage.owners, |config| config.flags = told);
    config.listeners = vec!["127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()];
    other.add(3, order("job=kv", LONG));
    in_force(&stage, 3).await;
    let mut wire = stage.connect().await;
    wire.send(GET).await;
    held(&stage, 1).await;
    third.add(4, order("path=/elsewhere", LONG));
    stage.proxy.reloader().reload(config).await.unwrap();
    in_force(&stage, 4).await;
    held(&stage, 1).await;
    // Until they have caught up.
    for id in 5..=8 {
        third.add(id, order("path=/elsewhere", LONG));
    }
    assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_proxy_that_stops_lets_those_go_on_whose_pause_ends_in_time() {
    let backend = Backend::echo("task").await;
    let (Stage { proxy, owners: _owners }, operator) =
        paused_stage(Owners::all(backend.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    let tally = proxy.tally();
    until("the pause", || tally.stats().pauses.iter().any(|pause| pause.in_force)).await;
    let mut wire = Wire::connect(proxy.local_addr()).await;
    wire.send(GET).await;
    until("the request to be held", || tally.stats().held == 1).await;
    let ends = async {
        until("the port to be closed", || {
            std::net::TcpStream::connect(wire.stream.peer_addr().unwrap()).is_err()
        })
        .await;
        operator.end(1, Duration::ZERO);
        wire.rest().await
    };
    let ((), answer) = tokio::join!(proxy.stop(), ends);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_proxy_that_stops_tells_those_whose_pause_does_not_end_in_time() {
    let backend = Backend::echo("task").await;
    let grace = |config: &mut Config| config.timeouts.grace = Duration::from_secs(2);
    let (Stage { proxy, owners: _owners }, operator) =
        paused_stage(Owners::all(backend.address).await, grace).await;
    operator.add(1, order("job=kv", LONG));
    let tally = proxy.tally();
    until("the pause", || tally.stats().pauses.iter().any(|pause| pause.in_force)).await;
    let mut wire = Wire::connect(proxy.local_addr()).await;
    wire.send(GET).await;
    until("the request to be held", || tally.stats().held == 1).await;
    let ((), answer) = tokio::join!(proxy.stop(), wire.rest());
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("this proxy stops") && answer.contains("retry-after: "), "{answer}");
}

#[tokio::test]
async fn a_hand_off_in_a_pause_keeps_the_order_of_both() {
    // Released from the pause while the slice is on its way, requests wait for that too.
    let (old, (new, asked)) = (Backend::raw(|_| async {}).await, recorder().await);
    let (stage, operator) = paused_stage(Owners::all(old.address).await, |_| {}).await;
    operator.add(1, order("job=kv", LONG));
    in_force(&stage, 1).await;
    let mut wires = Vec::new();
    for n in 1..=9 {
        let mut wire = stage.connect().await;
        wire.send(get(&format!("/kv/a?{n}"))).await;
        wires.push(wire);
        held(&stage, n).await;
    }
    let (from, to) = ((1, old.address), (2, new.address));
    stage.owners.hand_over(2, mandoline_core::transit::Step::Releasing, from, to).await;
    operator.end(1, Duration::ZERO);
    until("all to wait for their slice", || {
        stage.stats().held == 9 && stats(&stage, 1).unwrap().released == 9
    })
    .await;
    stage.owners.give(3, &[(0, 2, new.address)]).await;
    for wire in wires {
        assert!(wire.rest().await.starts_with("HTTP/1.1 200"));
    }
    assert_eq!(asked.lock().unwrap().len(), 9);
}

#[tokio::test]
async fn a_pause_holds_those_who_want_a_tunnel_and_leaves_alone_those_who_have_one() {
    let backend = tunnels::echo().await;
    let (stage, operator) = paused_stage(Owners::all(backend.address).await, |_| {}).await;
    let mut open = tunnels::open(&stage).await;
    operator.add(7, order("job=kv", LONG));
    in_force(&stage, 7).await;
    assert_eq!(stats(&stage, 7).unwrap().in_flight, 0);
    let mut waits = stage.connect().await;
    waits.send(tunnels::ASK).await;
    held(&stage, 1).await;
    tunnels::says(&mut open, "still here").await;
    operator.end(7, Duration::ZERO);
    assert!(waits.head().await.starts_with("HTTP/1.1 101 "));
    tunnels::says(&mut waits, "here at last").await;
    assert_eq!((stage.stats().tunnels, stage.stats().in_flight), (2, 2));
}

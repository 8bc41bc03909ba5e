//! What is told of a request: in metrics by route, in the access log, and to a trusted client with its answer.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select;
use http::Method;
use http::header::HeaderName;
use mandoline_core::flags::{AtEnd, Flags, Pause, PauseId, PauseOrder, Phase, Scope};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::harness::{Backend, Owners, Stage, status, talk, until, within};
use crate::access_log::AccessLog;
use crate::access_log::format::Format;
use crate::access_log::writer::{Output, Writer};
use crate::ask::Ask;
use crate::config::{Config, DebugHeader};
use crate::record::Outcome;

fn get(target: &str, more: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nhost: shop.example\r\n{more}connection: close\r\n\r\n")
}

fn debug(network: &str) -> Option<DebugHeader> {
    let header = HeaderName::from_static("mandoline-explain");
    Some(DebugHeader { networks: vec![network.parse().unwrap()], header })
}

#[tokio::test]
async fn each_route_counts_what_became_of_its_requests() {
    let task = Backend::serve(|request| async move {
        let code = request.uri().path().rsplit('/').next().unwrap().parse().unwrap();
        status(code, &[])
    })
    .await;
    let stage = Stage::new(Owners::all(task.address).await);
    for code in [200, 404, 500] {
        stage.talk(&get(&format!("/kv/{code}"), "")).await;
    }
    // Without a key.
    stage.talk(&get("/kv", "")).await;
    let stats = stage.stats();
    let route = &stats.routes["kv"];
    let ended: Vec<_> = route.ended.iter().map(|(ended, count)| (*ended, *count)).collect();
    let expected = [
        ((Outcome::Answered, 2), 1),
        ((Outcome::Answered, 4), 1),
        ((Outcome::Refused, 4), 1),
        ((Outcome::Failed, 5), 1),
    ];
    assert_eq!(ended, expected);
    assert_eq!(route.in_flight, 0);
    assert!(Duration::ZERO < route.upstream && route.upstream < route.duration, "{route:?}");
}

#[tokio::test]
async fn the_access_log_tells_of_each_request_and_nobody_can_forge_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let writer = Writer::open(Output::File(path.clone())).unwrap();
    let format =
        "{client} {method} {path} {status} {outcome} {tries} {bytes_out} \"{header:x-a}\" {reason}";
    let format: Format = format.parse().unwrap();
    let task = Backend::echo("a").await;
    let owners = Owners::all(task.address).await;
    let stage = Stage::with(owners, |config| {
        config.access_log = Some(AccessLog::new(writer.clone(), format));
    });
    let answer = stage.talk(&get("/kv/a?secret=1", "x-a: \"\\\t1\r\nauthorization: x\r\n")).await;
    let length = answer.split("\r\n\r\n").nth(1).unwrap().len();
    stage.talk(&get("/kv", "")).await;
    stage.talk("GET /kv/b HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n").await;
    // A client that does not wait: hyper drops its request.
    until("the requests to end", || stage.stats().in_flight == 0).await;
    writer.flush(Duration::from_secs(10));
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let first = format!("127.0.0.1 GET /kv/a 200 answered 1 {length} \"\\x22\\x5C\\x091\" -");
    assert_eq!(lines[0], first);
    assert!(lines[1].starts_with("127.0.0.1 GET /kv 400 refused 0 "), "{text}");
    assert!(lines[1].contains("\"-\" the request has no key; "), "{text}");
    assert!(lines[2].ends_with("the request has more than one Host"), "{text}");
    assert_eq!(lines.len(), 3);
}

#[tokio::test]
async fn a_trusted_client_is_told_what_became_of_its_request() {
    let task = Backend::echo("a").await;
    let asks = get("/kv/a", "mandoline-explain: 1\r\n");
    let trusts = |network: &'static str| {
        let address = task.address;
        async move {
            let owners = Owners::all(address).await;
            Stage::with(owners, |config| config.debug = debug(network))
        }
    };
    let stage = trusts("127.0.0.0/8").await;
    let answer = stage.talk(&asks).await;
    let key = mandoline_core::key::SliceKey::of(b"a").0;
    let told = format!(
        "mandoline-explain: route=\"kv\"; key={key:016x}; owner=s1; generation=1.1; tries=1; held=0.000000; upstream_time=0."
    );
    let (head, seen) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&told), "{answer}");
    // The task is not asked.
    assert!(!seen.contains("mandoline-explain"), "{seen}");
    // Of a refusal, too.
    let answer = stage.talk(&get("/kv", "mandoline-explain: 1\r\n")).await;
    assert!(answer.contains("mandoline-explain: route=\"kv\"; tries=0; held="), "{answer}");
    // Only who asks is told.
    assert!(!stage.talk(&get("/kv/a", "")).await.contains("mandoline-explain"));
    // Only who is trusted is told.
    let stage = trusts("10.0.0.0/8").await;
    assert!(!stage.talk(&asks).await.contains("mandoline-explain"));
}

/// Asks the admin address.
async fn admin(stage: &Stage, target: &str) -> String {
    let address = stage.proxy.admin_addr().unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    talk(address, request.as_bytes()).await
}

async fn explained(stage: &Stage, target: &str) -> Value {
    let answer = admin(stage, &format!("/explain?{target}")).await;
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

fn with_admin(config: &mut Config) {
    config.admin = Some("127.0.0.1:0".parse().unwrap());
}

#[tokio::test]
async fn an_explanation_says_what_then_happens() {
    let (low, high) = (Backend::echo("low").await, Backend::echo("high").await);
    let owners = Owners::none();
    owners.give(1, &[(0, 1, low.address), (1 << 63, 2, high.address)]).await;
    let stage = Stage::with(owners, |config| {
        with_admin(config);
        let mut other = config.routes[0].clone();
        other.name = "posts".into();
        other.matches.methods = vec![Method::POST];
        other.matches.path = Some("/posts/*".parse().unwrap());
        other.forwarding.response = Some(Duration::from_secs(7));
        other.forwarding.total = Some(Duration::from_secs(9));
        config.routes[0].matches.path = Some("/kv/*".parse().unwrap());
        config.routes.push(other);
    });
    for target in [
        "/kv/a", "/kv/b", "/kv/c", "/kv/d", "/kv", "/kv/", "/kv/../a", "/other", "/posts/1",
        "/kv/%61",
    ] {
        let told = explained(&stage, &Ask::query([("url", &*format!("http://a{target}"))])).await;
        let answer = stage.talk(&get(target, "")).await;
        let happened: u64 = answer.split(' ').nth(1).unwrap().parse().unwrap();
        match told["end"]["sent_to"]["session"].as_str() {
            Some(session) => {
                let task = if session == "s1" { "low" } else { "high" };
                assert!(
                    answer.contains(&format!("\r\n\r\n{task} GET ")),
                    "{target}: {told} {answer}"
                );
            }
            None => {
                let answers = &told["end"]["answers"];
                assert_eq!(answers["status"], happened, "{target}: {told}");
                let text = answers["text"].as_str().unwrap();
                assert!(
                    answer.ends_with(&format!("mandoline: {text}\n")),
                    "{target}: {told} {answer}"
                );
            }
        }
    }
    let told = explained(&stage, "url=http://a/posts/1").await;
    assert_eq!(told["stages"][1]["others"][0]["why"], "it takes POST");
    let told = explained(&stage, "url=http://a/posts/1&method=POST").await;
    assert_eq!(told["stages"][1]["route"], "posts");
    let timeouts = &told["stages"][5]["timeouts"];
    assert_eq!((&timeouts["response"], &timeouts["total"]), (&json!(7.0), &json!(9.0)), "{told}");
    // Nothing of it counted as a request.
    assert_eq!(stage.stats().requests, 10);
    let bad = admin(&stage, "/explain?url=here").await;
    assert!(bad.starts_with("HTTP/1.1 400 ") && bad.contains("\"here\" is no URL"), "{bad}");
}

#[tokio::test]
async fn whoever_asks_for_a_reload_that_others_wait_for_is_told_so_at_once() {
    let stage = Stage::with(Owners::none(), with_admin);
    let address = stage.proxy.admin_addr().unwrap();
    let ask = || talk(address, b"POST /reload HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    assert!(ask().await.starts_with("HTTP/1.1 501 "));
    let mut asked = stage.proxy.reloader().asked();
    // Nobody reads the first, so there is no room for the second.
    let both = select(Box::pin(ask()), Box::pin(ask()));
    let (refused, other) = within("a refusal", both).await.factor_first();
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    within("a question", asked.recv()).await.unwrap().answer(Ok(()));
    assert!(other.await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn an_explanation_names_the_pause_that_holds() {
    let task = Backend::echo("a").await;
    let owners = Owners::all(task.address).await;
    let flags = watch::Sender::new(Arc::new(Flags::default()));
    let stage = Stage::with(owners, |config| {
        with_admin(config);
        config.flags = flags.subscribe();
    });
    let order = PauseOrder {
        scope: Scope { host: Some("a".into()), ..Scope::default() },
        why: "maintenance".into(),
        lasts: Duration::from_secs(600),
        at_end: AtEnd::GoOn,
        release_over: Duration::ZERO,
    };
    flags.send_modify(|flags| {
        let flags = Arc::make_mut(flags);
        flags.version = flags.version.next();
        let id = PauseId(1);
        flags.pauses.insert(id, Pause { id, order, phase: Phase::Holding });
    });
    until("the pause to be in force", || stage.stats().pauses.iter().any(|pause| pause.in_force))
        .await;
    let told = explained(&stage, "url=http://a/kv/a").await;
    let pause = &told["stages"][3]["pauses"][0];
    assert_eq!(pause["pause"], "p1", "{told}");
    assert!(told["stages"][3]["says"][0].as_str().unwrap().starts_with("the pause p1 ("), "{told}");
}

#[tokio::test]
async fn the_page_shows_how_things_are() {
    let task = Backend::echo("a").await;
    let stage = Stage::with(Owners::all(task.address).await, with_admin);
    stage.talk(&get("/kv/a", "")).await;
    until("the request to end", || stage.stats().answered == 1).await;
    let answer = admin(&stage, "/api/state").await;
    let state: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(state["routes"][0]["route"], "kv");
    assert_eq!(state["routes"][0]["answered"], 1);
    assert_eq!(state["jobs"][0]["generation"], "1.1");
    assert_eq!(state["tasks"][0]["requests"], 1);
    assert_eq!(state["configuration"]["last_refused"], false);
    let page = admin(&stage, "/").await;
    assert!(page.contains("content-type: text/html"), "{page}");
    for part in ["<h2>routes</h2>", "<td>kv</td>", "<td>1.1</td>", env!("CARGO_PKG_VERSION")] {
        assert!(page.contains(part), "{part} in {page}");
    }
}

//! What is told of a request: in metrics by route, in the access log, and to a trusted client with its answer.

use std::time::Duration;

use http::header::HeaderName;

use super::harness::{Backend, Owners, Stage, status, until};
use crate::access_log::AccessLog;
use crate::access_log::format::Format;
use crate::access_log::writer::{Place, Writer};
use crate::config::DebugHeader;
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
    let writer = Writer::open(Place::File(path.clone())).unwrap();
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

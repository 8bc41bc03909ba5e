//! What a route changes in heads on their way.

use super::harness::{Backend, Owners, Stage, generation};
use crate::config::headers::HeaderRules;

fn rules(remove: &[&str], set: &[(&str, &str)]) -> HeaderRules {
    let set = set.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
    HeaderRules { remove: remove.iter().map(|n| n.parse().unwrap()).collect(), set: set.collect() }
}

#[tokio::test]
async fn heads_are_changed_both_ways_and_nobody_can_forge_what_is_set() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        let route = &mut config.routes[0];
        route.request = rules(
            &["x-internal"],
            &[
                ("x-client", "{client}"),
                ("x-place", "{route} {key}"),
                ("x-owner", "{task}"),
                ("x-all", "{{{host}}} {generation}"),
                ("x-request-id", "{request_id}"),
            ],
        );
        route.response =
            rules(&["content-type"], &[("x-served-by", "{task}"), ("x-id", "{request_id}")]);
    });
    let head =
        "GET /kv/a HTTP/1.1\r\nhost: h\r\nx-internal: 1\r\nx-client: forged\r\nx-client: twice\r\n";
    let answer = stage.talk(&format!("{head}connection: close\r\n\r\n")).await;
    let key = mandoline_core::key::SliceKey::of(b"a");
    for line in [
        "\nx-client: 127.0.0.1\n".to_owned(),
        format!("\nx-place: kv {key}\n"),
        "\nx-owner: t1\n".to_owned(),
        format!("\nx-all: {{h}} {}\n", generation(1)),
        "\r\nx-served-by: t1\r\n".to_owned(),
    ] {
        assert!(answer.contains(&line), "{line} in {answer}");
    }
    for gone in ["x-internal", "forged", "twice", "content-type"] {
        assert!(!answer.contains(gone), "{gone} in {answer}");
    }
    let id = |answer: &str, field: &str| {
        let line = answer.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().to_owned()
    };
    let (sent, told) = (id(&answer, "x-request-id:"), id(&answer, "x-id:"));
    assert_eq!(sent, told);
    assert!(sent.len() == 32 && sent.bytes().all(|b| b.is_ascii_hexdigit()), "{sent}");
    let next = stage.talk(&format!("{head}connection: close\r\n\r\n")).await;
    assert_ne!(id(&next, "x-id:"), told);

    // A client's own number is kept if it is one that can be passed on.
    let own = stage.talk(&format!("{head}x-request-id: abc-1\r\nconnection: close\r\n\r\n")).await;
    assert_eq!(id(&own, "x-id:"), "abc-1");
    let odd = stage.talk(&format!("{head}x-request-id: a b\r\nconnection: close\r\n\r\n")).await;
    assert_eq!(id(&odd, "x-id:").len(), 32);
}

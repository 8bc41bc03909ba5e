//! Where a request comes from: what strangers say is taken away, and what trusted proxies say goes on to keys, logs and tasks.

use super::harness::{Backend, Owners, Stage, key_at};
use crate::ask::Ask;
use crate::config::Config;
use crate::config::error::ConfigError;
use crate::config::forwarded::Forwarded;

async fn stage(
    trusted: &[&str],
    headers: &[&str],
    change: impl FnOnce(&mut Config),
) -> (Backend, Stage) {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.forwarded = Forwarded {
            trusted: trusted.iter().map(|network| network.parse().unwrap()).collect(),
            headers: headers.iter().map(|name| name.parse().unwrap()).collect(),
            x_forwarded: true,
        };
        change(config);
    });
    (backend, stage)
}

/// Asks, and gives what the task was told of where the request comes from.
async fn told(stage: &Stage, lines: &[&str]) -> Vec<String> {
    let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let request = format!("GET /kv/a HTTP/1.1\r\nhost: a.org\r\nconnection: close\r\n{lines}\r\n");
    let answer = stage.talk(&request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let is_word = |line: &&str| {
        let line = line.replace('_', "-");
        ["forwarded:", "x-forwarded-", "x-real-ip:"].iter().any(|name| line.starts_with(name))
    };
    let mut all: Vec<String> = answer.lines().filter(is_word).map(str::to_owned).collect();
    all.sort();
    all
}

const FORGED: [&str; 9] = [
    "forwarded: for=6.6.6.6;proto=https;host=evil",
    "x-forwarded-for: 6.6.6.6",
    "x-forwarded-for: 7.7.7.7",
    "x-forwarded-proto: https",
    "x-forwarded-host: evil",
    "x-forwarded-prefix: /evil",
    "x-real-ip: 6.6.6.6",
    "x_forwarded_for: 6.6.6.6",
    "X-Forwarded_Host: evil",
];

#[tokio::test]
async fn what_strangers_say_is_taken_away() {
    let own = [
        "forwarded: for=127.0.0.1;proto=http;host=a.org",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-host: a.org",
        "x-forwarded-proto: http",
    ];
    let (_backend, open) = stage(&[], &["x-forwarded-for"], |_| {}).await;
    assert_eq!(told(&open, &FORGED).await, own);
    assert_eq!(told(&open, &[]).await, own);
    // Neither is it one of the trusted who connects, whatever it says.
    let (_backend, other) = stage(&["10.0.0.0/8"], &["x-forwarded-for"], |_| {}).await;
    assert_eq!(told(&other, &FORGED).await, own);
    assert_eq!(told(&other, &["x-forwarded-for: 10.0.0.1"]).await, own);
    let (_backend, terse) = stage(&[], &[], |config| config.forwarded.x_forwarded = false).await;
    assert_eq!(told(&terse, &FORGED).await, own[..1]);
    assert_eq!(open.stats().bad_chains + other.stats().bad_chains, 0);
}

#[tokio::test]
async fn what_trusted_proxies_say_goes_on_and_no_more_than_they_set_themselves() {
    let local = ["127.0.0.0/8", "10.0.0.0/8"];
    let (_backend, usual) = stage(&local, &["x-forwarded-for", "x-forwarded-proto"], |_| {}).await;
    let mut lines = FORGED.to_vec();
    lines.push("x-forwarded-for: 192.0.2.1, 10.0.0.1");
    let expected = [
        "forwarded: for=192.0.2.1;proto=https, for=10.0.0.1, for=127.0.0.1;proto=http;host=a.org",
        "x-forwarded-for: 192.0.2.1, 10.0.0.1, 127.0.0.1",
        "x-forwarded-host: a.org",
        "x-forwarded-proto: https",
    ];
    assert_eq!(told(&usual, &lines).await, expected);

    let all = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-prefix"];
    let (_backend, more) = stage(&local, &all, |_| {}).await;
    let lines =
        ["x-forwarded-for: 2001:db8::1", "x-forwarded-host: b.org:8", "x-forwarded-prefix: /b"];
    let expected = [
        "forwarded: for=\"[2001:db8::1]\";host=\"b.org:8\", for=127.0.0.1;proto=http;host=a.org",
        "x-forwarded-for: 2001:db8::1, 127.0.0.1",
        "x-forwarded-host: b.org:8",
        "x-forwarded-prefix: /b",
        "x-forwarded-proto: http",
    ];
    assert_eq!(told(&more, &lines).await, expected);

    let (_backend, rfc) = stage(&local, &["forwarded"], |_| {}).await;
    let lines = [
        "forwarded: for=6.6.6.6, for=192.0.2.1;proto=https;host=b.org",
        "x-forwarded-for: 7.7.7.7",
    ];
    let expected = [
        "forwarded: for=192.0.2.1;proto=https;host=b.org, for=127.0.0.1;proto=http;host=a.org",
        "x-forwarded-for: 192.0.2.1, 127.0.0.1",
        "x-forwarded-host: b.org",
        "x-forwarded-proto: https",
    ];
    assert_eq!(told(&rfc, &lines).await, expected);
    let stats = [usual.stats(), more.stats(), rfc.stats()];
    assert_eq!(stats.map(|stats| stats.bad_chains), [0; 3]);
}

#[tokio::test]
async fn a_chain_that_makes_no_sense_is_followed_as_far_as_it_does() {
    let (_backend, stage) =
        stage(&["127.0.0.0/8"], &["x-forwarded-for", "x-forwarded-proto"], |_| {}).await;
    let far = format!("x-forwarded-for: 192.0.2.1, {}", ["127.0.0.9"; 16].join(", "));
    for (n, (line, chain)) in [
        ("x-forwarded-for: 192.0.2.1, unknown", "127.0.0.1".to_owned()),
        ("x-forwarded-for: 192.0.2.1, <script>, 127.0.0.2", "127.0.0.2, 127.0.0.1".to_owned()),
        (&far, format!("{}, 127.0.0.1", ["127.0.0.9"; 16].join(", "))),
        ("x-forwarded-proto: https, http", "127.0.0.1".to_owned()),
    ]
    .into_iter()
    .enumerate()
    {
        let words = told(&stage, &[line]).await;
        assert_eq!(words[1], format!("x-forwarded-for: {chain}"), "{line}");
        assert_eq!(words[3], "x-forwarded-proto: http");
        assert_eq!(stage.stats().bad_chains, n as u64 + 1, "{line}");
    }
}

#[tokio::test]
async fn the_client_is_whom_a_trusted_proxy_speaks_for() {
    let (_backend, stage) = stage(&["127.0.0.1"], &["x-forwarded-for"], |config| {
        key_at(config, "client");
        config.routes[0].request.set =
            vec![("x-client".parse().unwrap(), "{client} {key}".parse().unwrap())];
    })
    .await;
    let asked = async |client: &str| {
        let request = format!(
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-forwarded-for: 6.6.6.6, {client}\r\n\r\n"
        );
        let answer = stage.talk(&request).await;
        answer.lines().find_map(|line| line.strip_prefix("x-client: ")).unwrap().to_owned()
    };
    let (one, other) = (asked("192.0.2.1").await, asked("192.0.2.2").await);
    assert!(one.starts_with("192.0.2.1 ") && other.starts_with("192.0.2.2 "), "{one} {other}");
    // They are keys of their own.
    assert_ne!(one.split(' ').nth(1), other.split(' ').nth(1));
}

#[tokio::test]
async fn an_explanation_believes_whom_requests_believe() {
    let (_backend, stage) =
        stage(&["10.0.0.0/8"], &["x-forwarded-for"], |config| key_at(config, "client")).await;
    let explained = async |client: &str| {
        let query = Ask::query([
            ("url", "http://a.org/"),
            ("client", client),
            ("header", "x-forwarded-for: 192.0.2.1"),
        ]);
        let Ask { head, client } = Ask::of(&query).unwrap();
        stage.proxy.reloader().explain(head, client).await.unwrap().0
    };
    let (believed, stranger) = (explained("10.0.0.1").await, explained("6.6.6.6").await);
    assert!(believed.to_string().contains("speaks for 192.0.2.1"), "{believed}");
    assert!(!stranger.to_string().contains("192.0.2.1"), "{stranger}");
}

#[tokio::test]
async fn two_headers_that_say_who_asked_are_one_too_many() {
    let owners = Owners::none();
    let config = super::harness::config(&owners, |config| {
        config.forwarded.headers =
            ["x-forwarded-for", "forwarded"].map(|name| name.parse().unwrap()).into();
    });
    assert_eq!(config.check().unwrap_err(), ConfigError::TwoChains);
}

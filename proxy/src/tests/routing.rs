//! Which task gets a request, what it sees of it, and what the client sees of the answer.

use mandoline_core::key::SliceKey;

use super::harness::{Backend, Owners, Stage, key_at, status};

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: shop.example\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn each_key_goes_to_its_owner() {
    let (low, high) = (Backend::echo("low").await, Backend::echo("high").await);
    let owners = Owners::none();
    owners.give(1, &[(0, 1, low.address), (1 << 63, 2, high.address)]).await;
    let stage = Stage::new(owners);
    for n in 0..50 {
        let request = format!("GET /kv/key%20{n} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let answer = stage.talk(&request).await;
        let owner =
            if SliceKey::of(format!("key {n}").as_bytes()).0 < 1 << 63 { "low" } else { "high" };
        assert!(answer.contains(&format!("\r\n\r\n{owner} GET /kv/key%20{n} ")), "{n}: {answer}");
    }
    let stats = stage.stats();
    assert_eq!(
        (stats.requests, stats.first_try_right, stats.answered, stats.failed),
        (50, 50, 50, 0)
    );
    assert_eq!(stats.tasks.values().map(|task| task.tried).sum::<u64>(), 50);
    assert!(stats.tasks.values().all(|task| task.tried > 5));
}

#[tokio::test]
async fn a_task_sees_who_asked_and_nothing_that_was_meant_for_the_proxy() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage
        .talk(
            "GET /kv/a?b=%20c HTTP/1.1\r\nHost: shop.example:81\r\nVia: 1.0 edge\r\nForwarded: for=192.0.2.1\r\n\
             Connection: close, x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers, gzip\r\n\
             Proxy-Authorization: x\r\nX-Keep: 1\r\nCookie: a=1\r\nCookie: b=2\r\n\r\n",
        )
        .await;
    let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
    let mut lines: Vec<&str> = seen.lines().collect();
    lines[1..].sort_unstable();
    let wanted = [
        "task GET /kv/a?b=%20c HTTP/1.1",
        "[]",
        "connection: te",
        "cookie: a=1",
        "cookie: b=2",
        "forwarded: for=127.0.0.1;proto=http;host=\"shop.example:81\"",
        "host: shop.example:81",
        "te: trailers",
        "via: 1.0 edge",
        "via: 1.1 mandoline-p1",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-host: shop.example:81",
        "x-forwarded-proto: http",
        "x-keep: 1",
    ];
    assert_eq!(lines, wanted);
}

#[tokio::test]
async fn a_client_sees_nothing_that_was_meant_for_the_proxy() {
    let backend = Backend::serve(|_| async {
        let lines = [
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-authenticate", "x"),
            ("via", "1.1 cache"),
            ("x-keep", "1"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
        ];
        status(201, &lines)
    })
    .await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage.talk(GET).await;
    let mut lines: Vec<&str> = answer.lines().filter(|line| !line.starts_with("date: ")).collect();
    lines[1..].sort_unstable();
    let wanted = [
        "HTTP/1.1 201 Created",
        "",
        "connection: close",
        "content-length: 0",
        "set-cookie: a=1",
        "set-cookie: b=2",
        "via: 1.1 cache",
        "via: 1.1 mandoline-p1",
        "x-keep: 1",
    ];
    assert_eq!(lines, wanted);
}

#[tokio::test]
async fn a_request_that_comes_back_is_refused() {
    let stage = Stage::new(Owners::none());
    // The address of the task leads to the proxy itself.
    stage.owners.give(1, &[(0, 1, stage.proxy.local_addr())]).await;
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 508 Loop Detected\r\n"), "{answer}");
    assert!(
        answer.contains("\r\nproxy-status: mandoline; error=proxy_loop_detected\r\n"),
        "{answer}"
    );
    assert_eq!(stage.stats().requests, 2);
}

#[tokio::test]
async fn another_proxys_name_in_via_is_no_loop() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    for via in ["1.1 mandoline-p2", "1.1 mandoline-p11 (mandoline-p1)", "mandoline-p1 x"] {
        let request = GET.replace("connection", &format!("via: {via}\r\nconnection"));
        assert!(stage.talk(&request).await.starts_with("HTTP/1.1 200"), "{via}");
    }
    let request = GET.replace("connection", "via: 1.0 a, HTTP/1.1  mandoline-p1 (x)\r\nconnection");
    assert!(stage.talk(&request).await.starts_with("HTTP/1.1 508"));
}

#[tokio::test]
async fn an_absolute_target_outweighs_host() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        key_at(config, "host");
    });
    let cases = [
        ("http://Shop.example:81/kv/a?b", "GET /kv/a?b HTTP/1.1", "host: Shop.example:81"),
        ("http://user:pw@shop.example", "GET / HTTP/1.1", "host: shop.example"),
        ("http://shop.example?q", "GET /?q HTTP/1.1", "host: shop.example"),
    ];
    for (target, line, host) in cases {
        let request = format!("GET {target} HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n");
        let answer = stage.talk(&request).await;
        assert!(answer.contains(&format!("task {line}\n")), "{target}: {answer}");
        assert!(
            answer.contains(&format!("\n{host}\n")) && !answer.contains("other"),
            "{target}: {answer}"
        );
    }
}

#[tokio::test]
async fn the_key_is_taken_from_where_the_configuration_says() {
    let backend = Backend::echo("task").await;
    let cases = [
        ("header:x-shard", "x-shard: 7\r\nconnection: x-shard"),
        ("cookie:session", "cookie: a=b; session=7"),
        ("query:user", "x: y"),
        ("host", "x: y"),
        ("header:x-tenant/query:user", "x-tenant: 1"),
    ];
    for (key, line) in cases {
        let stage = Stage::with(Owners::all(backend.address).await, |config| {
            key_at(config, key);
        });
        let good =
            format!("GET /?user=7 HTTP/1.1\r\nhost: 7\r\n{line}\r\nconnection: close\r\n\r\n");
        assert!(stage.talk(&good).await.starts_with("HTTP/1.1 200"), "{key}");
        let bad = "GET /?other=7 HTTP/1.0\r\n\r\n";
        let answer = stage.talk(bad).await;
        assert!(answer.starts_with("HTTP/1.0 400"), "{key}: {answer}");
        assert!(answer.contains("the request has no key; the key is the "), "{key}: {answer}");
    }
}

#[tokio::test]
async fn a_request_without_one_usable_key_is_told_what_was_expected() {
    let backend = Backend::echo("task").await;
    let cases = [
        (
            "path:1",
            "GET /kv HTTP/1.1",
            "",
            "the request has no key; the key is segment 1 of the path, counted from 0, as in /0/KEY",
        ),
        ("path:1", "GET /kv/ HTTP/1.1", "", "the key is empty; "),
        (
            "path:1",
            "GET /kv/%x HTTP/1.1",
            "",
            "the key has a % at byte 0 that two hex digits do not follow",
        ),
        (
            "query:u",
            "GET /?u=1&u=2 HTTP/1.1",
            "",
            "the request has more than one key; the key is the value of the query parameter u",
        ),
        ("header:k", "GET / HTTP/1.1", "k: 1\r\nk: 1\r\n", "the request has more than one key; "),
        (
            "cookie:k",
            "GET / HTTP/1.1",
            "cookie: k=1;k=2\r\n",
            "the request has more than one key; ",
        ),
    ];
    for (key, line, extra, wanted) in cases {
        let stage = Stage::with(Owners::all(backend.address).await, |config| {
            key_at(config, key);
        });
        let answer =
            stage.talk(&format!("{line}\r\nhost: a\r\n{extra}connection: close\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{line}: {answer}");
        assert!(
            answer.contains("\r\nproxy-status: mandoline; error=http_request_error\r\n"),
            "{line}: {answer}"
        );
        assert!(answer.contains(wanted), "{line}: {answer}");
        let stats = stage.stats();
        assert_eq!((stats.refused, stats.failed, stats.connects), (1, 0, 0), "{line}");
    }
    let stage = Stage::new(Owners::all(backend.address).await);
    let long =
        format!("GET /kv/{} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "x".repeat(8193));
    assert!(
        stage.talk(&long).await.contains("the key is 8193 bytes long: at most 8192 are allowed")
    );
}

#[tokio::test]
async fn a_key_that_nobody_serves_gets_a_503_at_once() {
    let stage = Stage::new(Owners::none());
    let before = tokio::time::Instant::now();
    let answer = stage.talk(GET).await;
    // No waiting for better times: that is the client's choice.
    assert!(before.elapsed() < std::time::Duration::from_millis(200), "{:?}", before.elapsed());
    assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
    assert!(answer.contains("\r\nretry-after: 1\r\n"), "{answer}");
    assert!(
        answer.contains("\r\nproxy-status: mandoline; error=destination_unavailable\r\n"),
        "{answer}"
    );
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.unserved, stats.first_try_right), (1, 1, 0));
}

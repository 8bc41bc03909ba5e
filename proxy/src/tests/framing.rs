//! Where one request ends and the next begins: what is in doubt is refused, and never reaches a task.

use super::harness::{Backend, Owners, Stage, Wire, show, status, text, until};

/// What the proxy answers to raw bytes, by the first line.
async fn check(cases: &[(&str, &str)], wanted: &str) {
    let backend = Backend::echo("task").await;
    for (what, request) in cases {
        let stage = Stage::new(Owners::all(backend.address).await);
        let answer = stage.talk(request).await;
        assert!(answer.starts_with(wanted), "{what}: {answer}");
        let stats = stage.stats();
        assert_eq!(stats.connects, 0, "{what} reached the task");
        until("the head to be counted", || stage.stats().refused + stage.stats().malformed == 1)
            .await;
    }
}

#[tokio::test]
async fn what_is_no_http_is_refused() {
    let cases = [
        ("no version", "GET /kv/a\r\nhost: a\r\n\r\n"),
        ("an unknown version", "GET /kv/a HTTP/1.2\r\nhost: a\r\n\r\n"),
        ("noise", "\x16\x03\x01\x02\r\n\r\n"),
        ("a space in the target", "GET /kv/a b HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("a space before the colon", "GET /kv/a HTTP/1.1\r\nhost : a\r\n\r\n"),
        ("a folded line", "GET /kv/a HTTP/1.1\r\nhost: a\r\nx: 1\r\n 2\r\n\r\n"),
        ("a line without a colon", "GET /kv/a HTTP/1.1\r\nhost: a\r\nx\r\n\r\n"),
        ("a zero byte", "GET /kv/a HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n"),
        (
            "a bare carriage return",
            "GET /kv/a HTTP/1.1\r\nhost: a\r\nx: 1\rtransfer-encoding: chunked\r\n\r\n",
        ),
        ("a space before the first header", "GET /kv/a HTTP/1.1\r\n host: a\r\n\r\n"),
        ("a target that is no path", "GET kv/a HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("an asterisk for one key", "GET * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"),
        ("no host", "GET /kv/a HTTP/1.1\r\n\r\n"),
        ("two hosts", "GET /kv/a HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n"),
        ("a host that is none", "GET /kv/a HTTP/1.1\r\nhost: a/b\r\n\r\n"),
        ("a quoted host", "GET /kv/a HTTP/1.1\r\nhost: a\";for=1\r\n\r\n"),
    ];
    check(&cases, "HTTP/1.1 400 Bad Request\r\n").await;
}

#[tokio::test]
async fn a_length_that_is_in_doubt_is_refused() {
    let post = |lines: &str| format!("POST /kv/a HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n0\r\n\r\n");
    let cases = [
        ("two lengths", post("content-length: 5\r\ncontent-length: 6")),
        ("two lengths in a list", post("content-length: 5, 5")),
        ("a signed length", post("content-length: +5")),
        ("a negative length", post("content-length: -5")),
        ("a length with a space", post("content-length: 5 5")),
        ("a length in hex", post("content-length: 0x5")),
        ("an empty length", post("content-length:")),
        ("a length beyond any number", post("content-length: 99999999999999999999")),
        (
            "a coding in HTTP/1.0",
            post("transfer-encoding: chunked").replace("HTTP/1.1", "HTTP/1.0"),
        ),
        ("chunked, then not", post("transfer-encoding: chunked, gzip")),
        ("not chunked", post("transfer-encoding: identity")),
        ("a misspelt coding", post("transfer-encoding: xchunked")),
        ("a coding that hides", post("transfer-encoding: chunked;a=b")),
        ("a coding in quotes", post("transfer-encoding: \"chunked\"")),
    ];
    for (what, request) in &cases {
        check(&[(what, request)], "HTTP/1.1 400 Bad Request\r\n").await;
    }
    let cases = [
        ("chunked twice", post("transfer-encoding: chunked\r\ntransfer-encoding: chunked")),
        ("chunked twice in a list", post("transfer-encoding: chunked, chunked")),
        ("a coding below chunked", post("transfer-encoding: gzip, chunked")),
        ("two lines", post("transfer-encoding: identity\r\ntransfer-encoding: chunked")),
    ];
    for (what, request) in &cases {
        check(&[(what, request)], "HTTP/1.1 501 Not Implemented\r\n").await;
    }
}

#[tokio::test]
async fn a_head_with_two_readings_is_refused() {
    let post = |lines: &str| {
        format!(
            "POST /kv/a HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n0\r\n\r\nGET /kv/b HTTP/1.1\r\nhost: a\r\n\r\n"
        )
    };
    let cases = [
        ("length, then coding", post("content-length: 4\r\ntransfer-encoding: chunked")),
        ("coding, then length", post("Transfer-Encoding: chunked\r\nContent-Length: 4")),
        ("line feeds alone", "GET /kv/a HTTP/1.1\nhost: a\n\n".to_owned()),
        ("one line feed alone", "GET /kv/a HTTP/1.1\r\nhost: a\nx: 1\r\n\r\n".to_owned()),
        ("an empty line that ends early", "GET /kv/a HTTP/1.1\r\nhost: a\r\n\n".to_owned()),
    ];
    for (what, request) in &cases {
        check(&[(what, request)], "HTTP/1.1 400 Bad Request\r\n").await;
    }
}

#[tokio::test]
async fn a_head_with_two_readings_is_refused_later_on_a_connection_too() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    for body in ["", "a\n\nb", "content-length: 1\r\n\r\n"] {
        let length = body.len();
        wire.send(format!(
            "PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await;
        wire.read_to(&format!("[{body}]")).await;
        wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
        wire.read_to("[]").await;
    }
    wire.send("POST /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").await;
    let answer = wire.rest().await;
    assert!(
        answer.starts_with("HTTP/1.1 400")
            && answer.contains("both Content-Length and Transfer-Encoding"),
        "{answer}"
    );
}

/// Where the watch may miss a head, behind a body that came in the same piece, hyper settles it: the coding wins, the
/// length is dropped, and the connection ends after the answer (RFC 9112, 6.1).
#[tokio::test]
async fn a_head_with_two_readings_behind_a_body_cannot_smuggle_a_third_request() {
    let backend = Backend::echo("task").await;
    for lines in [
        "content-length: 4\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 4",
    ] {
        let stage = Stage::new(Owners::all(backend.address).await);
        let first = "PUT /kv/first HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi";
        let second =
            format!("POST /kv/second HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n2\r\nhi\r\n0\r\n\r\n");
        let third = "GET /kv/third HTTP/1.1\r\nhost: a\r\n\r\n";
        let answer = stage.talk(&format!("{first}{second}{third}")).await;
        assert!(answer.contains("/kv/first") && !answer.contains("third"), "{answer}");
        assert!(!answer.contains("\ncontent-length: 4\n"), "{answer}");
        assert_eq!(stage.stats().requests, 2);
    }
}

#[tokio::test]
async fn a_body_that_breaks_its_framing_ends_the_request_and_the_connection() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    for body in [
        "x\r\nhi\r\n0\r\n\r\n",
        "2\r\nhi!\r\n0\r\n\r\n",
        "-1\r\nhi\r\n",
        "fffffffffffffffff\r\nhi\r\n",
    ] {
        let request = format!(
            "POST /kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{body}{}",
            "GET /kv/b HTTP/1.1\r\nhost: a\r\n\r\n"
        );
        let answer = stage.talk(&request).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{body:?}: {answer}");
        assert!(!answer.contains("/kv/b"), "{body:?}: {answer}");
    }
}

#[tokio::test]
async fn methods_and_upgrades_for_other_kinds_of_proxies_are_refused() {
    check(
        &[("connect", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\nconnection: close\r\n\r\n")],
        "HTTP/1.1 405 Method Not Allowed\r\n",
    )
    .await;
    check(
        &[("trace", "TRACE /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")],
        "HTTP/1.1 405",
    )
    .await;
    let upgrade =
        "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n";
    check(&[("upgrade", upgrade)], "HTTP/1.1 501 Not Implemented\r\n").await;
    let expect = "POST /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 200-ok\r\ncontent-length: 1\r\n\r\n";
    check(&[("expectation", expect)], "HTTP/1.1 417 Expectation Failed\r\n").await;
}

#[tokio::test]
async fn a_wish_for_http_2_is_passed_over() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let request = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings, close\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n\r\n";
    let answer = stage.talk(request).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && !answer.contains("h2c") && !answer.contains("AAMA"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_connection_goes_on_after_a_wish_for_http_2() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    for _ in 0..3 {
        wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            .await;
        wire.read_to("[]").await;
    }
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_that_row() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let one = |key: &str, body: &str| {
        format!(
            "POST /kv/{key} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let last = "GET /kv/c HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let answer = stage
        .talk(&format!("{}{}{last}", one("a", "first"), one("b", "GET /kv/x HTTP/1.1\r\n\r\n")))
        .await;
    let places: Vec<_> = ["/kv/a ", "[first]", "/kv/b ", "[GET /kv/x", "/kv/c "]
        .map(|part| answer.find(part))
        .into();
    assert!(places.is_sorted() && places.iter().all(Option::is_some), "{places:?} {answer}");
    let stats = stage.stats();
    assert_eq!((stats.requests, stats.connects), (3, 1));
}

#[tokio::test]
async fn a_get_with_a_body_keeps_it() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    for body in
        ["content-length: 2\r\n\r\nhi", "transfer-encoding: Chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"]
    {
        let answer = stage
            .talk(&format!("GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{body}"))
            .await;
        assert!(answer.ends_with("[hi]"), "{answer}");
    }
}

#[tokio::test]
async fn trailers_go_through_both_ways() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let request = "POST /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n";
    let answer = stage.talk(request).await;
    assert!(answer.contains("\ntrailer x-sum: 7\n"), "{answer}");

    let sums = "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n";
    let backend = Backend::script(sums).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage
        .talk("GET /kv/a HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te, close\r\n\r\n")
        .await;
    assert!(answer.ends_with("2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn a_client_of_http_1_0_gets_what_it_understands() {
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    let backend = Backend::script(chunked).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage.talk("GET /kv/a HTTP/1.0\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("\r\n\r\nhi"),
        "{answer}"
    );

    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let answer = stage.talk("GET /kv/a HTTP/1.0\r\nhost: old\r\n\r\n").await;
    assert!(
        answer.contains("GET /kv/a HTTP/1.1\n") && answer.contains("\nvia: 1.0 mandoline-p1\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_client_of_http_1_0_may_keep_its_connection() {
    let backend = Backend::echo("task").await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    for _ in 0..2 {
        wire.send("GET /kv/a HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").await;
        let head = wire.head().await;
        assert!(head.contains("\r\nconnection: keep-alive\r\n"), "{head}");
        wire.read_to("[]").await;
    }
}

#[tokio::test]
async fn answers_without_a_body_end_where_they_should() {
    let cases = [
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", "HTTP/1.1 200", true),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204", false),
        (
            "GET",
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\netag: x\r\n\r\n",
            "HTTP/1.1 304",
            false,
        ),
        (
            "GET",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
            "HTTP/1.1 204",
            false,
        ),
    ];
    for (method, script, wanted, length) in cases {
        let backend = Backend::script(script).await;
        let stage = Stage::new(Owners::all(backend.address).await);
        let answer = stage
            .talk(&format!("{method} /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"))
            .await;
        assert!(answer.starts_with(wanted) && answer.ends_with("\r\n\r\n"), "{script}: {answer}");
        assert_eq!(answer.contains("content-length: 5\r\n"), length, "{script}: {answer}");
        assert_eq!(stage.stats().answered, 1, "{script}");
    }
}

#[tokio::test]
async fn an_answer_whose_end_is_in_doubt_is_not_passed_on() {
    let cases = [
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi!", "502"),
        ("HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nhi", "502"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", "502"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nhi", "502"),
        ("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", "502"),
        ("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", "502"),
        ("HTTP/1.1 200 OK\r\nx : 1\r\n\r\n", "502"),
        ("nonsense\r\n\r\n", "502"),
        // These have one reading, and go out in their plain form.
        ("HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nhi", "200"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nhi", "200"),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            "200",
        ),
        ("HTTP/1.1 200 OK\r\n\r\nhi", "200"),
    ];
    for (script, wanted) in cases {
        let backend = Backend::script(script).await;
        let stage = Stage::new(Owners::all(backend.address).await);
        let answer = stage.talk("GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {wanted} ")), "{script}: {answer}");
        assert_eq!(
            answer.matches("content-length").count() + answer.matches("transfer-encoding").count(),
            1,
            "{answer}"
        );
    }
}

#[tokio::test]
async fn the_proxy_asks_for_a_body_that_waits_for_leave() {
    let backend = Backend::serve(|request| async { text(show(request).await) }).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire: Wire = stage.connect().await;
    wire.send("PUT /kv/a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        .await;
    assert_eq!(wire.head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    wire.send("hi").await;
    let head = wire.head().await;
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    let seen = wire.read_to("[hi]").await;
    assert!(!seen.contains("expect"), "{seen}");
}

#[tokio::test]
async fn a_body_that_nobody_will_take_is_not_asked_for() {
    let backend = Backend::serve(|_| async { status(200, &[]) }).await;
    let stage = Stage::new(Owners::all(backend.address).await);
    let mut wire = stage.connect().await;
    wire.send("PUT /kv HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        .await;
    assert!(wire.head().await.starts_with("HTTP/1.1 400"));
}

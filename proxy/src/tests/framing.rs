//! Where one request ends and the next begins, beside what the corpus has: what takes more than one exchange to see, and what
//! clients of other versions get.

use super::harness::{Backend, Owners, Stage, Wire, show, status, text};

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

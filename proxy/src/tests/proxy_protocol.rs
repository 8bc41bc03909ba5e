//! The PROXY header on real connections: from whom it is believed, and what becomes of those who get it wrong.

use std::time::Duration;

use super::harness::{Backend, Owners, Stage, until};

const GET: &str = "GET /k/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

async fn behind(networks: &[&str]) -> (Backend, Stage) {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.listeners[0].proxy_protocol =
            networks.iter().map(|network| network.parse().unwrap()).collect();
        config.timeouts.header = Duration::from_millis(200);
    });
    (backend, stage)
}

async fn told(stage: &Stage, bytes: &[u8]) -> String {
    let mut wire = stage.connect().await;
    wire.send(bytes).await;
    wire.rest().await
}

#[tokio::test]
async fn trusted_senders_say_whom_they_speak_for() {
    let (_backend, stage) = behind(&["10.0.0.0/8", "127.0.0.0/8"]).await;
    let v2 = |command: u8, family: u8, body: &[u8]| {
        let length = [0, u8::try_from(body.len()).unwrap()];
        [SIGNATURE, &[command, family], &length, body, GET.as_bytes()].concat()
    };
    let four = [192, 0, 2, 7, 198, 51, 100, 1, 0, 80, 1, 187];
    for (bytes, client) in [
        (format!("PROXY TCP4 192.0.2.7 198.51.100.1 5000 80\r\n{GET}").into_bytes(), "192.0.2.7"),
        (format!("PROXY TCP6 2001:db8::7 ::1 5000 80\r\n{GET}").into_bytes(), "\"[2001:db8::7]\""),
        (format!("PROXY UNKNOWN\r\n{GET}").into_bytes(), "127.0.0.1"),
        (v2(0x21, 0x11, &four), "192.0.2.7"),
        (v2(0x20, 0x11, &four), "127.0.0.1"),
        (v2(0x21, 0x00, &[]), "127.0.0.1"),
    ] {
        let answer = told(&stage, &bytes).await;
        assert!(answer.contains(&format!("forwarded: for={client};proto=http")), "{answer}");
    }
    assert_eq!(stage.stats().proxy_headers_refused, 0);
}

#[tokio::test]
async fn what_comes_with_the_header_is_read_whole_however_much_it_is() {
    let (_backend, stage) = behind(&["127.0.0.1"]).await;
    for length in [100, 2_000, 2_048, 3_500, 10_000] {
        let body: String = (0..length).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
        let head = "POST /k/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n";
        let request = format!("{head}content-length: {length}\r\n\r\n{body}");
        let line = "PROXY TCP4 192.0.2.7 198.51.100.1 5000 80\r\n";
        let answer = told(&stage, format!("{line}{request}").as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.contains(&body),
            "{length}: {answer}"
        );
    }
}

#[tokio::test]
async fn trusted_senders_that_say_nothing_or_nonsense_are_let_go() {
    let (_backend, stage) = behind(&["127.0.0.1"]).await;
    let bad: [&[u8]; 6] = [
        GET.as_bytes(),
        b"PROXY TCP4 nobody 198.51.100.1 5000 80\r\n",
        b"PROXY TCP4 192.0.2.7",
        &[SIGNATURE, &[0x21, 0x11, 0, 4], &[0; 4]].concat(),
        &[SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat(),
        &[SIGNATURE, &[0x21]].concat(),
    ];
    for (n, bytes) in bad.into_iter().enumerate() {
        assert_eq!(told(&stage, bytes).await, "", "{n}");
        until("it to count", || stage.stats().proxy_headers_refused == n as u64 + 1).await;
    }
    assert_eq!(stage.stats().requests, 0);
}

#[tokio::test]
async fn from_others_it_is_a_bad_request() {
    let (_backend, stage) = behind(&["10.0.0.0/8"]).await;
    let line = format!("PROXY TCP4 192.0.2.7 198.51.100.1 5000 80\r\n{GET}");
    let bytes = [SIGNATURE, &[0x20, 0, 0, 0], GET.as_bytes()].concat();
    for bad in [line.as_bytes(), &bytes] {
        let answer = told(&stage, bad).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    let answer = told(&stage, GET.as_bytes()).await;
    assert!(answer.contains("forwarded: for=127.0.0.1;proto=http"), "{answer}");
    assert_eq!(stage.stats().malformed, 2);
}

//! Starting, stopping, and what operators see.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::harness::{Backend, Owners, Stage, Wire, config, talk, text, until, within};
use crate::proxy::{Proxy, StartError};
use crate::sockets::SocketsError;

const GET: &str = "GET /kv/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

/// A task that answers when it is told to.
async fn waiting() -> (Backend, Arc<Notify>, Arc<Notify>) {
    let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&asked), Arc::clone(&go));
    let backend = Backend::serve(move |_| {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        async move {
            tell.notify_one();
            wait.notified().await;
            text("done")
        }
    })
    .await;
    (backend, asked, go)
}

#[tokio::test]
async fn a_taken_address_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let owners = Owners::none();
    let start = |config| Proxy::start(config, &CancellationToken::new());
    for config in [
        config(&owners, |config| config.listeners = vec![address.into()]),
        config(&owners, |config| config.admin = Some(address)),
    ] {
        let Err(StartError::Sockets(SocketsError::Bind { address: named, .. })) = start(config)
        else {
            panic!("the address is taken")
        };
        assert_eq!(named, address);
    }
    // Neither is a port shared with another proxy, though workers share theirs.
    let first =
        start(config(&owners, |config| config.workers = NonZeroUsize::new(2).unwrap())).unwrap();
    let second =
        start(config(&owners, |config| config.listeners = vec![first.local_addr().into()]));
    let error = second.unwrap_err().to_string();
    let wanted = format!(
        "the proxy cannot listen on {}: give another address, or stop what listens there",
        first.local_addr()
    );
    assert_eq!(error, wanted);
}

#[tokio::test]
async fn a_configuration_that_cannot_work_is_refused() {
    let config = config(&Owners::none(), |config| config.limits.connections = 0);
    let refused = Proxy::start(config, &CancellationToken::new());
    assert!(matches!(refused, Err(StartError::Config(_))));
}

#[tokio::test]
async fn every_worker_serves_and_all_are_added_up() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        config.workers = NonZeroUsize::new(4).unwrap();
    });
    for _ in 0..64 {
        assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    }
    let stats = stage.stats();
    assert_eq!((stats.requests, stats.answered), (64, 64));
    // The kernel spreads clients by their ports: that one of four workers gets them all is out of the question.
    assert!(stats.connects >= 2, "{stats:?}");
}

#[tokio::test]
async fn a_proxy_that_stops_finishes_what_it_has_begun() {
    let (backend, asked, go) = waiting().await;
    let Stage { proxy, owners: _owners } = Stage::new(Owners::all(backend.address).await);
    let address = proxy.local_addr();
    let idle = within("a connection", TcpStream::connect(address)).await.unwrap();
    let request = tokio::spawn(talk(address, b"GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n".as_slice()));
    within("the request to reach the task", asked.notified()).await;
    let tally = proxy.tally();
    let stopping = tokio::spawn(proxy.stop());
    until("the idle connection to be closed", || tally.stats().connections == 1).await;
    within("the port to be closed", async { while TcpStream::connect(address).await.is_ok() {} })
        .await;
    go.notify_one();
    let answer = within("the answer", request).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    within("the proxy to stop", stopping).await.unwrap();
    assert_eq!(tally.stats().answered, 1);
    drop(idle);
}

#[tokio::test]
async fn a_proxy_that_stops_answers_once_more_on_a_connection_that_is_kept() {
    let backend = Backend::echo("task").await;
    let Stage { proxy, owners: _owners } = Stage::new(Owners::all(backend.address).await);
    let address = proxy.local_addr();
    let mut wire = Wire::connect(address).await;
    for body in ["", "hello"] {
        let length = body.len();
        wire.send(format!(
            "PUT /kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await;
        wire.read_to(&format!("[{body}]")).await;
    }
    let stopping = tokio::spawn(proxy.stop());
    within("the port to be closed", async { while TcpStream::connect(address).await.is_ok() {} })
        .await;
    wire.send("GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let answer = wire.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
    within("the proxy to stop", stopping).await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_stops_cuts_off_what_takes_too_long() {
    let (backend, asked, _go) = waiting().await;
    let Stage { proxy, owners: _owners } =
        Stage::with(Owners::all(backend.address).await, |config| {
            config.timeouts.grace = Duration::from_millis(100);
        });
    let address = proxy.local_addr();
    let request = tokio::spawn(talk(address, GET.as_bytes()));
    within("the request to reach the task", asked.notified()).await;
    within("the proxy to stop", proxy.stop()).await;
    assert_eq!(within("the client to see it", request).await.unwrap(), "");
}

#[tokio::test]
async fn operators_see_whether_it_lives_is_ready_and_what_it_does() {
    let backend = Backend::echo("task").await;
    let owners = Owners::none();
    let stage = Stage::with(owners, |config| config.admin = Some("127.0.0.1:0".parse().unwrap()));
    let admin = stage.proxy.admin_addr().unwrap();
    let ask = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        async move { talk(admin, request.as_bytes()).await }
    };
    assert!(ask("/livez").await.starts_with("HTTP/1.1 200"));
    let answer = ask("/readyz").await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("no assignment has come in yet"),
        "{answer}"
    );
    stage.owners.give(7, &[(0, 3, backend.address)]).await;
    assert!(ask("/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(stage.talk(GET).await.starts_with("HTTP/1.1 200"));
    let metrics = ask("/metrics").await;
    assert!(metrics.contains("content-type: application/openmetrics-text"), "{metrics}");
    let address = backend.address;
    for line in [
        "mandoline_proxy_requests_total 1".to_owned(),
        "mandoline_proxy_requests_answered_total 1".to_owned(),
        "mandoline_proxy_assignment_generation{job=\"kv\"} 7".to_owned(),
        format!("mandoline_proxy_task_requests_total{{task=\"s3\",address=\"{address}\"}} 1"),
    ] {
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    assert!(ask("/else").await.starts_with("HTTP/1.1 404"));
    let post =
        "POST /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    assert!(talk(admin, post.as_bytes()).await.starts_with("HTTP/1.1 405"));
    // The admin address is not on the clients' side.
    assert!(
        stage
            .talk("GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 400")
    );
}

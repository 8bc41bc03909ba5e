//! TLS towards tasks: whom the proxy believes, whom it says that it is, and what is spoken then.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::config::Config;
use crate::config::tls::{Tls, TlsFiles};
use crate::config::transport::{Protocol, Transport};
use crate::tests::harness::{Backend, Owners, Stage, show, text};
use crate::tests::reloads::with_route;

const GET: &str = "GET /0/k HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n";

fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tests/pem").join(name)
}

fn chain(name: &str) -> Vec<CertificateDer<'static>> {
    vec![CertificateDer::from_pem_file(pem(&format!("{name}.pem"))).unwrap()]
}

/// A task that shows a certificate, and asks callers for one if it is to. What it is sent it shows, and who sent it.
async fn task(shows: &str, alpn: &[&str], asks: bool) -> Backend {
    let key = PrivateKeyDer::from_pem_file(pem(&format!("{shows}.key"))).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = if asks {
        let mut roots = RootCertStore::empty();
        roots.add(chain("authority").remove(0)).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        builder.with_client_cert_verifier(verifier.build().unwrap())
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_single_cert(chain(shows), key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    Backend::raw(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            // Who does not believe it leaves.
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let (_, session) = stream.get_ref();
            let is_http2 = session.alpn_protocol() == Some(b"h2");
            let showed = session.peer_certificates().is_some();
            let service = service_fn(move |request| async move {
                let seen = show(request).await;
                Ok::<_, Infallible>(text(format!("certificate: {showed}\n{seen}")))
            });
            let stream = TokioIo::new(stream);
            // The proxy may close whenever it likes.
            if is_http2 {
                let builder = http2::Builder::new(TokioExecutor::new());
                drop(builder.serve_connection(stream, service).await);
            } else {
                drop(http1::Builder::new().serve_connection(stream, service).await);
            }
        }
    })
    .await
}

/// TLS as an operator sets it: for a name, and with a certificate of the proxy's own or without.
fn tls(name: &str, shows: Option<&str>) -> Tls {
    let file = |name: &str, kind: &str| pem(&format!("{name}.{kind}"));
    let files = TlsFiles {
        authorities: pem("authority.pem"),
        identity: shows.map(|name| (file(name, "pem"), file(name, "key"))),
        name: Some(name.to_owned()),
    };
    Tls::load(files).unwrap()
}

async fn before(task: &Backend, protocol: Protocol, tls: Tls) -> Stage {
    let by_tls = |config: &mut Config| {
        let transport = Transport { protocol, tls: Some(Arc::new(tls)) };
        config.transports.insert("kv".parse().unwrap(), transport);
    };
    Stage::with(Owners::all(task.address).await, by_tls)
}

#[tokio::test]
async fn a_task_is_spoken_to_by_tls_in_the_version_that_both_choose() {
    for (protocol, alpn, version) in [
        (Protocol::Auto, &["h2", "http/1.1"][..], "HTTP/2.0"),
        (Protocol::Auto, &["http/1.1"], "HTTP/1.1"),
        (Protocol::Auto, &[], "HTTP/1.1"),
        (Protocol::Http1, &["h2", "http/1.1"], "HTTP/1.1"),
        (Protocol::Http2, &["h2", "http/1.1"], "HTTP/2.0"),
    ] {
        let task = task("first", alpn, false).await;
        let stage = before(&task, protocol, tls("first.example", None)).await;
        for _ in 0..2 {
            let answer = stage.talk(GET).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{protocol:?} {alpn:?}: {answer}");
            assert!(answer.contains(version), "{protocol:?} {alpn:?}: {answer}");
        }
        // The handshake was for both.
        assert_eq!(stage.stats().connects, 1, "{protocol:?} {alpn:?}");
    }
}

#[tokio::test]
async fn a_task_that_asks_who_calls_is_told_and_turns_strangers_away() {
    let task = task("first", &["http/1.1"], true).await;
    let stage = before(&task, Protocol::Auto, tls("first.example", Some("client"))).await;
    let answer = stage.talk(GET).await;
    assert!(answer.contains("certificate: true"), "{answer}");
    for shows in [None, Some("impostor")] {
        let stage = before(&task, Protocol::Auto, tls("first.example", shows)).await;
        let answer = stage.talk(GET).await;
        // By TLS 1.3 the proxy's side of the handshake is over before the task has turned it away.
        let is_told = answer.starts_with("HTTP/1.1 503") || answer.starts_with("HTTP/1.1 502");
        assert!(is_told, "{shows:?}: {answer}");
        assert_eq!(stage.stats().answered, 0, "{shows:?}");
    }
}

#[tokio::test]
async fn an_own_certificate_that_has_expired_costs_only_those_who_ask_for_it() {
    let (asks, other) = (task("first", &["http/1.1"], true).await, Backend::echo("other").await);
    let silent = task("first", &["http/1.1"], false).await;
    let carts = Owners::none_of("carts");
    carts.give(1, &[(0, 2, other.address)]).await;
    let before = async |task: &Backend| {
        let owners = Owners::all(task.address).await;
        Stage::with(owners, |config| {
            with_route(config, "other.example", &carts);
            let tls = Some(Arc::new(tls("first.example", Some("expired"))));
            let transport = Transport { tls, ..Transport::default() };
            config.transports.insert("kv".parse().unwrap(), transport);
        })
    };
    let stage = before(&asks).await;
    for _ in 0..3 {
        let answer = stage.talk(GET).await;
        let is_told = answer.starts_with("HTTP/1.1 503") || answer.starts_with("HTTP/1.1 502");
        assert!(is_told, "{answer}");
        // Of another job.
        let answer = stage.talk(&GET.replace("a.example", "other.example")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let stats = stage.stats();
    assert_eq!((stats.failed, stats.answered), (3, 3), "{stats:?}");
    // Who does not ask for it does not mind.
    let answer = before(&silent).await.talk(GET).await;
    assert!(answer.contains("certificate: false"), "{answer}");
}

#[tokio::test]
async fn a_task_whose_certificate_does_not_fit_is_sent_nothing() {
    for (shows, name, why) in [
        ("first", "second.example", "another name"),
        ("expired", "first.example", "of a time that is over"),
        ("early", "first.example", "of a time to come"),
        ("impostor", "shop.example", "of an authority that nobody trusts"),
    ] {
        let task = task(shows, &["h2", "http/1.1"], false).await;
        for protocol in [Protocol::Auto, Protocol::Http1, Protocol::Http2] {
            let stage = before(&task, protocol, tls(name, None)).await;
            let answer = stage.talk(GET).await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{why}, {protocol:?}: {answer}");
            assert!(answer.contains("proxy-status: "), "{why}: {answer}");
            let stats = stage.stats();
            assert_eq!((stats.connects, stats.answered), (0, 0), "{why}, {protocol:?}");
            assert!(stats.connect_failures >= 1, "{why}, {protocol:?}");
        }
    }
}

#[tokio::test]
async fn a_task_that_will_not_speak_http_2_by_tls_is_none_where_that_is_asked_for() {
    let task = task("first", &["http/1.1"], false).await;
    let stage = before(&task, Protocol::Http2, tls("first.example", None)).await;
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
}

#[tokio::test]
async fn a_task_in_the_clear_is_not_taken_for_one_with_tls() {
    let task = Backend::echo("plain").await;
    let stage = before(&task, Protocol::Auto, tls("first.example", None)).await;
    let answer = stage.talk(GET).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
}

#[test]
fn files_that_are_of_no_use_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let half = folder.path().join("half.pem");
    let whole = std::fs::read_to_string(pem("first.pem")).unwrap();
    std::fs::write(&half, &whole[..whole.len() / 2]).unwrap();
    let files = |authorities: PathBuf, identity: Option<(PathBuf, PathBuf)>| TlsFiles {
        authorities,
        identity,
        name: None,
    };
    let (good, key) = (pem("authority.pem"), pem("first.key"));
    for (files, says) in [
        (files(folder.path().join("none.pem"), None), "cannot be read"),
        (files(half.clone(), None), "half.pem"),
        (files(key.clone(), None), "holds no certificate"),
        (files(good.clone(), Some((half, key.clone()))), "half.pem"),
        // A key of another certificate.
        (files(good.clone(), Some((pem("second.pem"), key))), "second.pem cannot be used"),
        (files(good, Some((pem("first.pem"), pem("first.pem")))), "holds no private key"),
    ] {
        let error = Tls::load(files.clone()).unwrap_err().to_string();
        assert!(error.contains(says), "{files:?}: {error}");
    }
}

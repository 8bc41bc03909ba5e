//! TLS towards clients: which certificate is shown, whom the proxy lets in, and what becomes of files that change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::harness::{Backend, Owners, Stage, config, until, within};
use super::http2::Client;
use super::pauses::{Operator, held, in_force, order};
use super::tunnels;
use crate::config::Config;
use crate::config::listener::{CertificateFiles, ClientCertificates, Tls};
use crate::config::tls::{Tls as TaskTls, TlsFiles};
use crate::config::transport::Transport;
use crate::proxy::Proxy;

/// Made once, valid until 2120, but for those that are not: see their names.
pub(super) fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tests/pem").join(name)
}

fn files(name: &str) -> CertificateFiles {
    CertificateFiles { chain: pem(&format!("{name}.pem")), key: pem(&format!("{name}.key")) }
}

fn certificate(name: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(pem(&format!("{name}.pem"))).unwrap()
}

fn with_tls(config: &mut Config, certificates: Vec<CertificateFiles>) {
    config.listeners[0].tls = Some(Tls { certificates, clients: ClientCertificates::Off });
}

/// A client that trusts the tests' authority, and shows a certificate if it has one.
async fn dial(
    stage: &Stage,
    name: &str,
    alpn: &[&str],
    shows: Option<&str>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate("authority")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shows {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let key = PrivateKeyDer::from_pem_file(pem(&format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(vec![certificate(name)], key).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(stage.proxy.local_addr()).await.unwrap();
    let connecting = TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from(name.to_owned()).unwrap(), stream);
    within("a handshake", connecting).await
}

async fn ask(mut stream: TlsStream<TcpStream>) -> std::io::Result<String> {
    let request = b"GET /k/a HTTP/1.1\r\nhost: shop.example\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await?;
    Ok(answer)
}

fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

#[tokio::test]
async fn tls_ends_here_and_the_task_is_told_so() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        with_tls(config, vec![files("first")]);
    });
    let answer = ask(dial(&stage, "first.example", &[], None).await.unwrap()).await.unwrap();
    assert!(answer.contains("forwarded: for=127.0.0.1;proto=https;host=shop.example"), "{answer}");
    let stream = dial(&stage, "first.example", &["h2", "http/1.1"], None).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let seen = Client::over(stream).await.get("/k/a").await;
    assert!(seen.contains("via: 2 mandoline-p1"), "{seen}");
    assert_eq!(stage.stats().http2_connections, 1);
}

#[tokio::test]
async fn the_certificate_is_chosen_by_the_name_that_is_asked_for() {
    let stage = Stage::with(Owners::none(), |config| {
        with_tls(config, vec![files("first"), files("second")]);
    });
    for (name, wanted) in
        [("first.example", "first"), ("SECOND.example", "second"), ("a.wild.example", "second")]
    {
        let stream = dial(&stage, name, &[], None).await.unwrap();
        assert_eq!(shown(&stream), certificate(wanted), "{name}");
    }
    // The first is for everyone else, who sees that it is not theirs.
    for other in ["a.b.wild.example", "other.example"] {
        let error = dial(&stage, other, &[], None).await.unwrap_err().to_string();
        assert!(error.contains("not valid for name"), "{error}");
    }
}

#[tokio::test]
async fn files_that_cannot_work_are_named_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.pem");
    let whole = std::fs::read(pem("first.pem")).unwrap();
    std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let cases = [
        ((pem("none.pem"), pem("first.key")), "none.pem cannot be read"),
        ((pem("first.pem"), pem("second.key")), "second.key does not belong to the certificate"),
        ((pem("first.pem"), pem("first.pem")), "first.pem holds no private key"),
        ((pem("first.key"), pem("first.key")), "first.key holds no certificate"),
        ((cut, pem("first.key")), "cut.pem is no PEM, or was not written to its end"),
        ((pem("expired.pem"), pem("expired.key")), "expired.pem has expired"),
        ((pem("early.pem"), pem("early.key")), "early.pem is not valid before"),
    ];
    for ((chain, key), wanted) in cases {
        let config = config(&Owners::none(), |config| {
            with_tls(config, vec![CertificateFiles { chain, key }]);
        });
        let error = Proxy::start(config, &CancellationToken::new()).unwrap_err();
        let said = std::error::Error::source(&error).unwrap().to_string();
        assert!(said.contains(wanted), "{said}");
    }
    let none = config(&Owners::none(), |config| with_tls(config, Vec::new()));
    let error = Proxy::start(none, &CancellationToken::new()).unwrap_err();
    assert!(format!("{error:?}").contains("NoCertificate"), "{error:?}");
}

#[tokio::test]
async fn changed_files_come_into_force_if_they_work() {
    let folder = tempfile::tempdir().unwrap();
    let [chain, key] = ["chain.pem", "key.pem"].map(|name| folder.path().join(name));
    let put = |name: &str| {
        // One after the other, as careless tools do.
        std::fs::copy(pem(&format!("{name}.pem")), &chain).unwrap();
        std::fs::copy(pem(&format!("{name}.key")), &key).unwrap();
    };
    put("first");
    let stage = Stage::with(Owners::none(), |config| {
        let (chain, key) = (chain.clone(), key.clone());
        with_tls(config, vec![CertificateFiles { chain, key }]);
    });
    let state = || stage.stats().tls[0].clone();
    let refused_after = async |change: &dyn Fn()| {
        let before = state().refused;
        change();
        until("the files to be refused", || state().refused > before).await;
        assert!(state().last_refused);
        let stream = dial(&stage, "first.example", &[], None).await.unwrap();
        assert_eq!(shown(&stream), certificate("first"), "the one before stays in force");
    };
    refused_after(&|| put("expired")).await;
    refused_after(&|| put("early")).await;
    refused_after(&|| {
        std::fs::copy(pem("second.pem"), &chain).unwrap();
    })
    .await;
    refused_after(&|| std::fs::write(&chain, "-----BEGIN CERTIFICATE-----\nMIIB").unwrap()).await;
    refused_after(&|| std::fs::remove_file(&key).unwrap()).await;
    put("second");
    until("the new files to be in force", || state().taken == 1 && !state().last_refused).await;
    let stream = dial(&stage, "second.example", &[], None).await.unwrap();
    assert_eq!(shown(&stream), certificate("second"));
    assert_eq!(state().valid_until, [(chain.clone(), 4_733_510_400)]);
}

#[tokio::test]
async fn clients_show_certificates_where_they_are_asked_to() {
    let backend = Backend::echo("task").await;
    let authorities = pem("authority.pem");
    for (clients, without) in [
        (ClientCertificates::Required { authorities: authorities.clone() }, false),
        (ClientCertificates::Optional { authorities }, true),
    ] {
        let stage = Stage::with(Owners::all(backend.address).await, |config| {
            with_tls(config, vec![files("first")]);
            config.listeners[0].tls.as_mut().unwrap().clients = clients.clone();
            let set = [("x-who", "{client_subject}"), ("x-names", "{client_names}")];
            config.routes[0].request.set =
                set.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).into();
        });
        // Within TLS 1.3 a client learns only with the first answer whether it was let in.
        let answer = async |shows| match dial(&stage, "first.example", &[], shows).await {
            Ok(stream) => ask(stream).await.ok(),
            Err(_) => None,
        };
        let known = answer(Some("client")).await.unwrap();
        assert!(
            known.contains("x-who: CN=client, O=Mandoline tests\n")
                || known.contains("x-who: O=Mandoline tests, CN=client\n"),
            "{known}"
        );
        assert!(
            known.contains("x-names: URI:spiffe://example.org/shop, DNS:shop.example\n"),
            "{known}"
        );
        assert_eq!(answer(Some("impostor")).await, None);
        let nobody = answer(None).await;
        assert_eq!(nobody.is_some(), without, "{nobody:?}");
        if let Some(nobody) = nobody {
            assert!(nobody.contains("x-who: \n"), "{nobody}");
        }
        until("failures to count", || stage.stats().tls_failures == 2 - u64::from(without)).await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_shake_hands_is_let_go() {
    let stage = Stage::with(Owners::none(), |config| {
        with_tls(config, vec![files("first")]);
        config.timeouts.header = Duration::from_millis(100);
    });
    stage.connect().await.rest().await;
    until("it to count", || stage.stats().tls_failures == 1).await;
    let answer = stage.talk("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!answer.contains("HTTP"), "{answer}");
    until("it to count", || stage.stats().tls_failures == 2).await;
}

#[tokio::test]
async fn one_handshake_too_many_is_closed_at_once_and_disturbs_nobody() {
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        with_tls(config, vec![files("first")]);
        config.listeners[0].handshakes = 2;
        config.timeouts.header = Duration::from_secs(600);
    });
    let inside = dial(&stage, "first.example", &[], None).await.unwrap();
    let slow = [stage.connect().await, stage.connect().await];
    // Whether the two are through the door yet, only the door knows.
    within("the third to be closed", async {
        while dial(&stage, "first.example", &[], None).await.is_ok() {}
    })
    .await;
    until("it to count", || stage.stats().tls_failures >= 1).await;
    // Who is inside is served, and so is the next one once there is room.
    assert!(ask(inside).await.unwrap().starts_with("HTTP/1.1 200 "));
    drop(slow);
    within("room for another", async {
        while dial(&stage, "first.example", &[], None).await.is_err() {}
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_is_encrypted_as_its_connection_is() {
    let backend = tunnels::echo().await;
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        with_tls(config, vec![files("first")]);
    });
    let mut stream = dial(&stage, "first.example", &[], None).await.unwrap();
    stream.write_all(format!("{}early", tunnels::ASK).as_bytes()).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"early") {
        let got = within("more", stream.read_buf(&mut read)).await.unwrap();
        assert!(got > 0, "{}", String::from_utf8_lossy(&read));
    }
    assert!(read.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&read));
    stream.write_all(b"bye").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    // It ends in order, so that neither side takes it for cut short.
    within("the end", stream.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "bye");
}

#[tokio::test]
async fn a_task_that_speaks_both_versions_by_tls_is_asked_for_a_tunnel_in_the_older() {
    let backend = tunnels::echo().await;
    // A proxy before the task takes HTTP/2 as gladly.
    let far = Stage::with(Owners::all(backend.address).await, |config| {
        config.id = "far".parse().unwrap();
        with_tls(config, vec![files("first")]);
    });
    let stage = Stage::with(Owners::all(far.proxy.local_addr()).await, |config| {
        let name = Some("first.example".to_owned());
        let files = TlsFiles { authorities: pem("authority.pem"), identity: None, name };
        let tls = Some(Arc::new(TaskTls::load(files).unwrap()));
        config.transports.insert("kv".parse().unwrap(), Transport { tls, ..Transport::default() });
    });
    let mut tunnel = tunnels::open(&stage).await;
    tunnels::says(&mut tunnel, "hello").await;
    assert_eq!((stage.stats().tunnels, far.stats().tunnels), (1, 1));
    assert_eq!(far.stats().http2_connections, 0);
}

#[tokio::test]
async fn a_client_that_leaves_while_it_is_held_is_forgotten_by_tls_too() {
    let backend = Backend::echo("task").await;
    let (operator, told) = Operator::new();
    let stage = Stage::with(Owners::all(backend.address).await, |config| {
        with_tls(config, vec![files("first")]);
        config.flags = told;
    });
    operator.add(1, order("job=kv", Duration::from_secs(600)));
    in_force(&stage, 1).await;
    let left = || stage.stats().pauses[0].left;
    for (n, length) in (1..).zip([0, 300_000]) {
        let mut stream = dial(&stage, "first.example", &[], None).await.unwrap();
        let head = format!("POST /k/a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&vec![b'x'; length]).await.unwrap();
        held(&stage, 1).await;
        drop(stream);
        until("it to be forgotten", || left() == n).await;
    }
    // By HTTP/2 a request leaves alone, or with its connection.
    let stream = dial(&stage, "first.example", &["h2"], None).await.unwrap();
    let mut client = Client::over(stream).await;
    for n in 3..5 {
        tokio::select! {
            _ = client.get("/k/a") => panic!("it is held"),
            () = held(&stage, 1) => {}
        }
        until("it to be forgotten", || left() == n).await;
    }
    tokio::select! {
        _ = client.get("/k/a") => panic!("it is held"),
        () = held(&stage, 1) => client.connection.abort(),
    }
    until("it to be forgotten", || left() == 5 && stage.stats().connections == 0).await;
    assert_eq!((stage.stats().held, stage.stats().held_bytes, stage.stats().in_flight), (0, 0, 0));
}

//! Fixed pools behind a proxy, as operators have them: TLS on both sides, servers that fall ill and recover, that die, and that all fail.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::kit::{Process, ask, free_ports, local, run, text, until};

fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/it/tls").join(name)
}

fn chain() -> Vec<CertificateDer<'static>> {
    vec![CertificateDer::from_pem_file(pem("node.pem")).unwrap()]
}

/// A server that says its name; it lives until dropped, and so do its connections.
struct Server {
    name: &'static str,
    address: SocketAddr,
    state: Arc<State>,
    _running: JoinSet<()>,
}

struct State {
    is_well: AtomicBool,
    /// Requests that were no checks.
    asked: AtomicU64,
}

impl Server {
    async fn start(name: &'static str, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State { is_well: true.into(), asked: AtomicU64::new(0) });
        let mut running = JoinSet::new();
        let own = Arc::clone(&state);
        running.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (tls, state) = (tls.clone(), Arc::clone(&own));
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, name, state).await,
                        Some(tls) => {
                            // Checks that only connect say nothing.
                            let Ok(stream) = tls.accept(stream).await else { return };
                            serve(stream, name, state).await;
                        }
                    }
                });
            }
        });
        Self { name, address, state, _running: running }
    }

    fn asked(&self) -> u64 {
        self.state.asked.load(Relaxed)
    }

    fn is_well(&self, is_well: bool) {
        self.state.is_well.store(is_well, Relaxed);
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    name: &'static str,
    state: Arc<State>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let state = Arc::clone(&state);
        async move {
            let mut response = Response::new(Full::new(Bytes::from_static(name.as_bytes())));
            if request.uri().path() == "/livez" {
                if !state.is_well.load(Relaxed) {
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                }
            } else {
                state.asked.fetch_add(1, Relaxed);
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new();
    // It ends when the proxy lets go of it, however that goes.
    served.serve_connection(TokioIo::new(stream), service).await.ok();
}

/// A proxy with a file of its own.
struct Front {
    listen: SocketAddr,
    admin: SocketAddr,
    file: PathBuf,
    _process: Process,
    _folder: tempfile::TempDir,
}

impl Front {
    fn start(yaml: impl Fn(SocketAddr) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("proxy.yaml");
        let ports = free_ports(3);
        let (listen, admin) = (local(ports[0]), local(ports[1]));
        std::fs::write(&file, yaml(listen)).unwrap();
        // Nobody answers there, and nobody has to: a pool needs no assigner.
        let assigners = local(ports[2]).to_string();
        let (path, at) = (file.display().to_string(), admin.to_string());
        let flags = ["proxy", "--config", &path, "--admin", &at, "--assigners", &assigners];
        let process = Process::start(&flags);
        let front = Self { listen, admin, file, _process: process, _folder: folder };
        until("the proxy to be ready", || {
            ask(admin, "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
        front
    }

    /// What the page says of a server.
    fn server(&self, server: &Server) -> Value {
        let state = ask(self.admin, "GET", "/api/state", "").unwrap().body;
        let state: Value = serde_json::from_str(&state).unwrap();
        let servers = state["pools"].as_array().unwrap();
        let address = server.address.to_string();
        servers.iter().find(|line| line["server"] == address.as_str()).unwrap().clone()
    }

    fn until_healthy(&self, server: &Server, healthy: bool) {
        until(&format!("{} to count as healthy: {healthy}", server.name), || {
            (self.server(server)["healthy"] == healthy).then_some(())
        });
    }

    fn metrics(&self) -> String {
        ask(self.admin, "GET", "/metrics", "").unwrap().body
    }

    /// Who answers so many requests; none fails.
    async fn answers(&self, client: &mut SendRequest<Empty<Bytes>>, count: usize) -> Vec<String> {
        let mut names = Vec::new();
        for n in 0..count {
            let request = Request::get(format!("/pictures/{n}")).header("host", "localhost");
            let request = request.body(Empty::new()).unwrap();
            client.ready().await.unwrap();
            let answer = client.send_request(request).await.unwrap();
            let (status, text) = (answer.status(), answer.collect().await.unwrap().to_bytes());
            assert_eq!(status, 200, "{text:?}");
            names.push(String::from_utf8(text.to_vec()).unwrap());
        }
        names
    }
}

async fn client(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> SendRequest<Empty<Bytes>> {
    let stream = TokioIo::new(stream);
    let (client, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    drop(tokio::spawn(connection));
    client
}

async fn plain_client(address: SocketAddr) -> SendRequest<Empty<Bytes>> {
    client(TcpStream::connect(address).await.unwrap()).await
}

async fn tls_client(address: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pem("authority.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    client(TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()).await
}

fn acceptor() -> TlsAcceptor {
    let key = PrivateKeyDer::from_pem_file(pem("node.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain(), key);
    TlsAcceptor::from(Arc::new(config.unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_health_checks() {
    let [a, b, c] = ["a", "b", "c"].map(|name| Server::start(name, Some(acceptor())));
    let (a, b, c) = (a.await, b.await, c.await);
    let path = |name| pem(name).display().to_string();
    let (authority, certificate, key) = (path("authority.pem"), path("node.pem"), path("node.key"));
    let front = Front::start(|listen| {
        format!(
            "listeners:
  - address: {listen}
    tls: {{certificates: [{{chain: {certificate}, key: {key}}}]}}
routes:
  - {{path: /pictures/*, pool: pictures}}
pools:
  pictures:
    servers: ['{}', '{}', '{}']
    tls: {{ca: {authority}}}
    health: {{check: /livez, every: 50ms, within: 5s, good: 2, bad: 2}}
",
            a.address, b.address, c.address
        )
    });
    let mut client = tls_client(front.listen).await;
    let names = front.answers(&mut client, 60).await;
    for server in [&a, &b, &c] {
        assert!(names.iter().any(|name| name == server.name), "{} is left out", server.name);
        assert_eq!(front.server(server)["fault"], Value::Null);
    }

    a.is_well(false);
    front.until_healthy(&a, false);
    let fault = front.server(&a)["fault"].as_str().unwrap().to_owned();
    assert!(fault.contains("answers GET /livez with 503"), "{fault}");
    assert!(front.metrics().contains("mandoline_proxy_pool_servers_healthy{pool=\"pictures\"} 2"));
    let before = a.asked();
    let names = front.answers(&mut client, 60).await;
    assert!(!names.iter().any(|name| name == "a"), "one that is ill is asked: {names:?}");
    assert_eq!(a.asked(), before);

    a.is_well(true);
    front.until_healthy(&a, true);
    let names = front.answers(&mut client, 60).await;
    assert!(names.iter().any(|name| name == "a"), "one that has recovered is left out: {names:?}");

    // It is gone before a check says so: requests that meet it are sent to another.
    drop(b);
    let names = front.answers(&mut client, 200).await;
    assert!(!names.iter().any(|name| name == "b"), "{names:?}");

    // What would become of a request is said of pools as well.
    let admin = front.admin.to_string();
    let url = format!("https://localhost:{}/pictures/7", front.listen.port());
    let explained = run(&["proxy", "explain", "--proxy", &admin, "--url", &url]);
    let explained = text(&explained.stdout);
    assert!(explained.contains("any server of the pool pictures"), "{explained}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_server_of_a_pool_fails_no_request_and_is_avoided() {
    let alive = Server::start("alive", None).await;
    let dead = free_ports(1)[0];
    let front = Front::start(|listen| {
        format!(
            "listen: {listen}
routes:
  - {{pool: pictures}}
pools:
  pictures: {{servers: ['127.0.0.1:{dead}', '{}']}}
",
            alive.address
        )
    });
    let mut client = plain_client(front.listen).await;
    let names = front.answers(&mut client, 100).await;
    assert!(names.iter().all(|name| name == "alive"), "{names:?}");
    // After a few in a row it is not asked any more.
    let tried = front.metrics();
    let line = tried
        .lines()
        .find(|line| {
            line.starts_with("mandoline_proxy_task_requests_total")
                && line.contains(&dead.to_string())
        })
        .unwrap();
    let tries: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!((1..=20).contains(&tries), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_hardly_a_healthy_server_all_of_a_pool_are_asked() {
    let (a, b) = (Server::start("a", None).await, Server::start("b", None).await);
    a.is_well(false);
    b.is_well(false);
    let yaml = |listen: SocketAddr, servers: &str| {
        format!(
            "listen: {listen}
routes:
  - {{pool: pictures}}
pools:
  pictures:
    servers: [{servers}]
    health: {{check: /livez, every: 50ms, bad: 1}}
"
        )
    };
    let both = format!("'{}', '{}'", a.address, b.address);
    let front = Front::start(|listen| yaml(listen, &both));
    front.until_healthy(&a, false);
    front.until_healthy(&b, false);
    assert!(front.metrics().contains("mandoline_proxy_pool_panic{pool=\"pictures\"} 1"));
    let mut client = plain_client(front.listen).await;
    let names = front.answers(&mut client, 60).await;
    for name in ["a", "b"] {
        assert!(names.iter().any(|other| other == name), "{name} is left out: {names:?}");
    }

    // A file that cannot work leaves the pool as it is, and somebody looks after it still.
    std::fs::write(&front.file, yaml(front.listen, "'here'")).unwrap();
    until("the file to be refused", || {
        front.metrics().contains("mandoline_proxy_reload_last_refused 1").then_some(())
    });
    b.is_well(true);
    front.until_healthy(&b, true);
    assert!(front.metrics().contains("mandoline_proxy_pool_panic{pool=\"pictures\"} 0"));
    let names = front.answers(&mut client, 60).await;
    assert!(names.iter().all(|name| name == "b"), "{names:?}");

    // One server fewer, while requests go on.
    std::fs::write(&front.file, yaml(front.listen, &format!("'{}'", b.address))).unwrap();
    until("the pool to have one server", || {
        front.metrics().contains("mandoline_proxy_pool_servers{pool=\"pictures\"} 1").then_some(())
    });
    b.is_well(false);
    let ended = tokio::time::timeout(Duration::from_secs(30), front.answers(&mut client, 60)).await;
    assert!(ended.unwrap().iter().all(|name| name == "b"));
}

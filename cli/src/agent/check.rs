//! Asking a server whether it is healthy: by a connection, by HTTP or by gRPC's own health service.
//!
//! Each check opens a connection of its own: one that is kept would not notice that nobody is accepted any more.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mandoline_core::task::Address;
use mandoline_proxy::config::tls::Tls;
use mandoline_proxy::probe;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::failure::chain;
use crate::units::Span;

/// How a server is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// It accepts a connection.
    Connect,
    /// It answers a GET of this path with a status of 200 to 299: at its own address, or at this one.
    Http { at: Option<Address>, path: String },
    /// It says SERVING of this service, or of itself where there is no name: `grpc.health.v1`.
    Grpc { service: String },
}

/// A text says no check.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no health check: {problem}")]
pub(crate) struct CheckError {
    found: String,
    problem: String,
}

impl FromStr for Check {
    type Err = CheckError;

    fn from_str(text: &str) -> Result<Self, CheckError> {
        let refuse = |problem: String| CheckError { found: text.to_owned(), problem };
        match text {
            "tcp" => return Ok(Self::Connect),
            "grpc" => return Ok(Self::Grpc { service: String::new() }),
            _ => {}
        }
        if let Some(service) = text.strip_prefix("grpc:").filter(|rest| !rest.starts_with("//")) {
            return Ok(Self::Grpc { service: service.to_owned() });
        }
        let (at, path) = if text.starts_with('/') {
            (None, text)
        } else if let Some(rest) = text.strip_prefix("http://") {
            let end = rest.find('/').unwrap_or(rest.len());
            let (host, path) = rest.split_at(end);
            let at = host.parse().map_err(|error| refuse(format!("{error}")))?;
            (Some(at), if path.is_empty() { "/" } else { path })
        } else if text.starts_with("https://") {
            let why =
                "checks go by plain HTTP; give a plain address, or tcp to ask for a connection";
            return Err(refuse(why.to_owned()));
        } else {
            let known = "give tcp, grpc, grpc:SERVICE, /PATH or http://HOST:PORT/PATH";
            return Err(refuse(known.to_owned()));
        };
        path.parse::<http::uri::PathAndQuery>()
            .map_err(|error| refuse(format!("its path: {error}")))?;
        Ok(Self::Http { at, path: path.to_owned() })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("tcp"),
            Self::Http { at: None, path } => f.write_str(path),
            Self::Http { at: Some(at), path } => write!(f, "http://{at}{path}"),
            Self::Grpc { service } if service.is_empty() => f.write_str("grpc"),
            Self::Grpc { service } => write!(f, "grpc:{service}"),
        }
    }
}

impl Check {
    /// Asks once; says what is wrong, if something is.
    pub(crate) async fn ask(&self, server: &Address, within: Duration) -> Result<(), String> {
        self.ask_by(server, None, within).await
    }

    /// Asks once, by TLS where the server has it. An address of the check's own is asked in the clear.
    pub(crate) async fn ask_by(
        &self,
        server: &Address,
        tls: Option<&Arc<Tls>>,
        within: Duration,
    ) -> Result<(), String> {
        let asked = async {
            match self {
                Self::Connect => connect(server, tls, false).await.map(drop),
                Self::Http { at: None, path } => get(server, tls, path).await,
                Self::Http { at: Some(at), path } => get(at, None, path).await,
                Self::Grpc { service } => serving(server, tls, service).await,
            }
        };
        timeout(within, asked)
            .await
            .unwrap_or_else(|_| Err(format!("{server}: no answer within {}", Span(within))))
    }
}

async fn connect(
    address: &Address,
    tls: Option<&Arc<Tls>>,
    http2: bool,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, String> {
    let stream = probe::connect(address, tls.map(Arc::as_ref), http2).await;
    stream.map_err(|error| chain(&error))
}

async fn get(address: &Address, tls: Option<&Arc<Tls>>, path: &str) -> Result<(), String> {
    let broke = |error: hyper::Error| format!("{address}: {}", chain(&error));
    let stream = connect(address, tls, false).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
    let request = http::Request::get(path)
        .header("host", address.as_str())
        .header("user-agent", "mandoline-health")
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("{address}: {error}"))?;
    let asked = async { sender.send_request(request).await.map_err(broke) };
    let answer = tokio::select! {
        answer = asked => answer?,
        // It ends by itself only when broken, or when the answer is there as well.
        Err(error) = connection => return Err(broke(error)),
    };
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    Err(format!("{address} answers GET {path} with {status}"))
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthReply {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SERVING` of `grpc.health.v1`.
const SERVING: i32 = 1;

async fn serving(address: &Address, tls: Option<&Arc<Tls>>, service: &str) -> Result<(), String> {
    let broke = |error: tonic::transport::Error| format!("{address}: {}", chain(&error));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(broke)?;
    let (server, tls) = (address.clone(), tls.cloned());
    let connector = service_fn(move |_: http::Uri| {
        let (server, tls) = (server.clone(), tls.clone());
        async move { connect(&server, tls.as_ref(), true).await.map(TokioIo::new) }
    });
    let channel = endpoint.connect_with_connector(connector).await.map_err(broke)?;
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.map_err(broke)?;
    let request = Request::new(HealthRequest { service: service.to_owned() });
    let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec = ProstCodec::<HealthRequest, HealthReply>::default();
    match grpc.unary(request, path, codec).await {
        Ok(reply) if reply.get_ref().status == SERVING => Ok(()),
        Ok(reply) => {
            let status = reply.get_ref().status;
            Err(format!("{address} says that it does not serve (grpc.health.v1 status {status})"))
        }
        Err(status) if status.code() == Code::Unimplemented => {
            Err(format!("{address} has no grpc.health.v1: add that service, or give --health tcp"))
        }
        Err(status) if status.code() == Code::NotFound => {
            Err(format!("{address} knows no service {service:?} by grpc.health.v1"))
        }
        Err(status) => Err(format!("{address}: {}", chain(&status))),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn checks_are_read_and_slips_are_named() {
        for text in ["tcp", "grpc", "grpc:kv.v1.Kv", "/livez?full=1", "http://a:9000/livez"] {
            assert_eq!(text.parse::<Check>().unwrap().to_string(), text);
        }
        assert_eq!("http://a:1".parse::<Check>().unwrap().to_string(), "http://a:1/");
        let slips = [
            ("livez", "give tcp, grpc, grpc:SERVICE, /PATH or http://HOST:PORT/PATH"),
            ("http://a/livez", "\"a\" is no address: give host:port"),
            ("https://a:1/livez", "checks go by plain HTTP"),
            ("/a b", "its path: "),
        ];
        for (text, says) in slips {
            let error = text.parse::<Check>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?} is no health check")), "{error}");
            assert!(error.contains(says), "{error}");
        }
    }

    /// A server that gives everyone this answer, or none.
    async fn server(answer: Option<&'static str>) -> Address {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        drop(tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                drop(tokio::spawn(async move {
                    let mut request = [0; 4_096];
                    let _bytes = stream.read(&mut request).await.unwrap();
                    match answer {
                        Some(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
                        None => std::future::pending().await,
                    }
                }));
            }
        }));
        address
    }

    #[tokio::test]
    async fn a_check_says_what_is_wrong() {
        let good = server(Some("HTTP/1.1 204 No Content\r\n\r\n")).await;
        let bad =
            server(Some("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")).await;
        let odd = server(Some("nonsense\r\n\r\n")).await;
        let mute = server(None).await;
        let gone: Address = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().to_string().parse().unwrap()
        };
        let check = async |check: &str, server: &Address, within| {
            check.parse::<Check>().unwrap().ask(server, within).await
        };
        assert_eq!(check("/livez", &good, SOON).await, Ok(()));
        assert_eq!(check("tcp", &mute, SOON).await, Ok(()), "it accepts");
        let elsewhere = format!("http://{good}/livez");
        assert_eq!(check(&elsewhere, &gone, SOON).await, Ok(()), "asked at an address of its own");
        let short = Duration::from_millis(100);
        for (text, server, within, says) in [
            ("/livez", &bad, SOON, "answers GET /livez with 503"),
            ("/livez", &odd, SOON, "invalid HTTP"),
            ("/livez", &mute, short, "no answer within 100ms"),
            ("tcp", &gone, SOON, "refused"),
            ("grpc", &mute, short, "no answer within 100ms"),
        ] {
            let why = check(text, server, within).await.unwrap_err();
            assert!(why.contains(says) && why.contains(server.as_str()), "{text}: {why}");
        }
    }

    /// A gRPC server whose every call answers with this message, or with this status.
    async fn grpc(message: &'static [u8], status: &'static str) -> Address {
        let answer = axum::routing::post(async move || {
            let mut frame = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
            frame.extend_from_slice(message);
            let body = if status == "0" { frame } else { Vec::new() };
            ([("content-type", "application/grpc"), ("grpc-status", status)], body)
        });
        let router = axum::Router::new().route("/grpc.health.v1.Health/Check", answer);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder()
            .add_routes(tonic::service::Routes::from(router))
            .serve_with_incoming(incoming);
        drop(tokio::spawn(server));
        address
    }

    #[tokio::test]
    async fn a_grpc_server_is_asked_by_its_health_service() {
        let check: Check = "grpc:kv.v1.Kv".parse().unwrap();
        let serving = grpc(&[8, 1], "0").await;
        assert_eq!(check.ask(&serving, SOON).await, Ok(()));
        for (message, status, says) in [
            (&[8, 2][..], "0", "does not serve (grpc.health.v1 status 2)"),
            (&[], "0", "does not serve (grpc.health.v1 status 0)"),
            (&[], "12", "has no grpc.health.v1: add that service, or give --health tcp"),
            (&[], "5", "knows no service \"kv.v1.Kv\""),
        ] {
            let why = check.ask(&grpc(message, status).await, SOON).await.unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }
}

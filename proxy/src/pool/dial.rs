//! Getting through to a task, a gateway or a server: a socket, and TLS on it where that is asked for.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::warn;

use crate::config::tls::Tls;
use crate::config::transport::Endpoint;
use crate::send::poll_write_pieces;
use crate::tls::certificates::now;
use crate::tls::der;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("{0} does not accept connections")]
    Refused(Endpoint, #[source] io::Error),
    #[error("{0} did not accept a connection in time")]
    Late(Endpoint),
    #[error("{0} closed a new connection before a request was written")]
    Closed(Endpoint),
    #[error("{0} could not be reached a moment ago, by a request that this one waited for")]
    Along(Endpoint),
    #[error("{0} cannot be believed: its certificate, or the wish for ours, does not fit")]
    Tls(Endpoint, #[source] io::Error),
    #[error("{0} does not speak HTTP/2 by TLS: it did not choose h2 (ALPN)")]
    NoHttp2(Endpoint),
}

/// What is spoken on a connection: one request at a time (HTTP/1.1), many (HTTP/2), or what the other side chooses by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speech {
    One,
    Many,
    Either,
}

/// A connection.
pub(crate) enum Io {
    Plain(Plain),
    Tls(Box<TlsStream<Plain>>),
}

/// A socket.
pub(crate) enum Plain {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Connects, and says whether HTTP/2 is spoken.
pub(crate) async fn dial(
    endpoint: &Endpoint,
    tls: Option<&Tls>,
    speech: Speech,
) -> Result<(Io, bool), ConnectError> {
    let refused = |error| ConnectError::Refused(endpoint.clone(), error);
    let plain = match endpoint {
        Endpoint::Tcp(address) => {
            let stream = TcpStream::connect(address.as_str()).await.map_err(refused)?;
            stream.set_nodelay(true).map_err(refused)?;
            Plain::Tcp(stream)
        }
        Endpoint::Unix(path) => Plain::Unix(UnixStream::connect(path).await.map_err(refused)?),
    };
    let Some(tls) = tls else { return Ok((Io::Plain(plain), speech == Speech::Many)) };
    complain_of_own(tls, endpoint);
    let failed = |error| ConnectError::Tls(endpoint.clone(), error);
    let name = match &tls.name {
        Some(name) => name.clone(),
        None => name_of(endpoint).map_err(failed)?,
    };
    let config = match speech {
        Speech::One => &tls.http1,
        Speech::Many => &tls.http2,
        Speech::Either => &tls.either,
    };
    let stream =
        TlsConnector::from(Arc::clone(config)).connect(name, plain).await.map_err(failed)?;
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    if speech == Speech::Many && !is_http2 {
        return Err(ConnectError::NoHttp2(endpoint.clone()));
    }
    Ok((Io::Tls(Box::new(stream)), is_http2))
}

/// Says in the log that the proxy's own certificate is of a time that is over or to come. The other side may not ask for it, so the
/// connection is tried all the same; and if it does, this tells whoever runs the proxy what the other side's word does not.
fn complain_of_own(tls: &Tls, endpoint: &Endpoint) {
    let Some((chain, _)) = &tls.files().identity else { return };
    let Some(why) = tls.own.as_ref().and_then(|own| own_fault(own, now())) else { return };
    if tls.complaints.is_due(Instant::now()) {
        let file = chain.display();
        warn!(%file, to = %endpoint, "The proxy's own certificate {why}: whoever asks for it turns the proxy away");
    }
}

fn own_fault(own: &CertificateDer<'_>, now: i64) -> Option<&'static str> {
    let own = der::read(own)?;
    match (own.not_before > now, own.not_after < now) {
        (_, true) => Some("has expired"),
        (true, _) => Some("is not valid yet"),
        _ => None,
    }
}

/// The name that whoever listens there must have.
pub(crate) fn name_of(endpoint: &Endpoint) -> io::Result<ServerName<'static>> {
    let host = match endpoint {
        Endpoint::Tcp(address) => {
            let host = address.as_str().rsplit_once(':').map_or("", |(host, _)| host);
            host.trim_start_matches('[').trim_end_matches(']').to_owned()
        }
        // A path is no name; whoever speaks TLS there has one, and the configuration must say it.
        Endpoint::Unix(_) => String::new(),
    };
    ServerName::try_from(host).map_err(io::Error::other)
}

impl Io {
    /// Has the kernel notice an other side that has vanished: one that does not answer its probes, or takes nothing for `stall`.
    pub(crate) fn keep_alive(&self, stall: Duration) -> io::Result<()> {
        let plain = match self {
            Self::Plain(plain) => plain,
            Self::Tls(stream) => stream.get_ref().0,
        };
        let Plain::Tcp(stream) = plain else { return Ok(()) };
        let socket = SockRef::from(stream);
        #[cfg(target_os = "linux")]
        socket.set_tcp_user_timeout(Some(stall))?;
        #[cfg(not(target_os = "linux"))]
        let _ = stall; // only the probes end it there
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
    }
}

/// How long a connection is silent before the kernel asks whether the other side is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_write_vectored(context, buffers),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(plain) => plain.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl AsyncRead for Plain {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Plain {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => poll_write_pieces(Pin::new(stream), context, buffers),
            Self::Unix(stream) => poll_write_pieces(Pin::new(stream), context, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject as _;

    use super::*;

    #[test]
    fn an_own_certificate_is_of_use_in_its_time_alone() {
        let fault = |name: &str, now| {
            let path = format!("{}/src/tests/pem/{name}.pem", env!("CARGO_MANIFEST_DIR"));
            own_fault(&CertificateDer::from_pem_file(path).unwrap(), now)
        };
        assert_eq!(fault("client", now()), None);
        assert_eq!(fault("expired", now()), Some("has expired"));
        assert_eq!(fault("early", now()), Some("is not valid yet"));
        // The first second of 2021, and the one after.
        assert_eq!(fault("expired", 1_609_459_200), None);
        assert_eq!(fault("expired", 1_609_459_201), Some("has expired"));
    }
}

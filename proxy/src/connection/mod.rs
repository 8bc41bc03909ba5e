//! One client's connection: whom it is for, how it is encrypted, which HTTP is spoken on it, and its requests until it ends.

mod frames;
mod usher;
mod streams;
mod http1;
mod http2;

use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::client::{Client, Scheme};
use crate::config::listener::{Http2, Listener};
use crate::connection::http1::{last_request, serve_http1};
use crate::connection::http2::serve_http2;
use crate::metrics::names::Count;
use crate::permit::Permit;
use crate::proxy_protocol::{self, Header, HeaderError};
use crate::stream::{Plain, Socket, Stream};
use crate::tls::certificates::H2;
use crate::tls::terminator::{Identity, Terminator};
use crate::wire::SlowHead;
use crate::worker::Worker;

/// A listener, and what its connections share over all workers.
pub(crate) struct Entrance {
    pub(crate) listener: Listener,
    pub(crate) tls: Option<Terminator>,
    handshakes: Arc<AtomicUsize>,
}

impl Entrance {
    pub(crate) fn new(listener: Listener, tls: Option<Terminator>) -> Self {
        Self { listener, tls, handshakes: Arc::default() }
    }

    /// Says whether whoever connects from there must say whom the connection is for.
    fn expects_header(&self, address: Option<IpAddr>) -> bool {
        let trusted = &self.listener.proxy_protocol;
        match address {
            None => !trusted.is_empty(),
            Some(address) => trusted.iter().any(|network| network.contains(address)),
        }
    }
}

/// A connection whose requests can be served.
struct Opened {
    stream: Stream,
    client: Client,
    http2: Option<Http2>,
}

/// A connection ended before its first request.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("the client left before it was served")]
    Left(#[source] io::Error),
    #[error("the client said nothing")]
    Silent,
    #[error(transparent)]
    Slow(#[from] SlowHead),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("the PROXY header did not come in time")]
    SlowHeader,
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    #[error("the TLS handshake took too long")]
    SlowHandshake,
    #[error("too many TLS handshakes are under way")]
    Handshakes,
}

impl OpenError {
    const fn count(&self) -> Option<Count> {
        match self {
            Self::Left(_) | Self::Silent => None,
            Self::Slow(_) => Some(Count::Malformed),
            Self::Header(_) | Self::SlowHeader => Some(Count::ProxyHeaders),
            Self::Handshake(_) | Self::SlowHandshake | Self::Handshakes => Some(Count::TlsFailures),
        }
    }
}

/// Serves one client's requests until either side ends the connection.
pub(crate) async fn connection(
    worker: &Rc<Worker>,
    socket: Socket,
    peer: Option<IpAddr>,
    entrance: &Entrance,
    stop: &CancellationToken,
) {
    let opened = tokio::select! {
        opened = Box::pin(open(worker, socket, peer, entrance)) => opened,
        // Who has said nothing by then has nothing to lose.
        () = last_request(stop) => return,
    };
    match opened {
        Ok(Opened { stream, client, http2: None }) => {
            serve_http1(worker, stream, client, stop).await;
        }
        Ok(Opened { stream, client, http2: Some(limits) }) => {
            worker.counters.count(Count::Http2Connections);
            Box::pin(serve_http2(worker, stream, client, limits, stop)).await;
        }
        Err(error) => {
            if let Some(what) = error.count() {
                worker.counters.count(what);
            }
            debug!(error = &error as &dyn Error, ?peer, "Client was not served");
        }
    }
}

async fn open(
    worker: &Worker,
    socket: Socket,
    peer: Option<IpAddr>,
    entrance: &Entrance,
) -> Result<Opened, OpenError> {
    let wait = worker.setup().config.timeouts.header;
    let (mut plain, mut address) = (Plain::new(socket), peer);
    if entrance.expects_header(peer) {
        let header = timeout(wait, proxy_header(&mut plain)).await;
        address = header.map_err(|_| OpenError::SlowHeader)??.source.or(peer);
    }
    let http2 = entrance.listener.http2;
    let Some(tls) = &entrance.tls else {
        let speaks_http2 = http2.is_some() && begins_http2(&mut plain, wait).await?;
        let client = Client::new(address, Scheme::Http, None);
        let stream = Stream::Clear(plain);
        return Ok(Opened { stream, client, http2: http2.filter(|_| speaks_http2) });
    };
    let permit = Permit::take(&entrance.handshakes, entrance.listener.handshakes);
    let _permit = permit.ok_or(OpenError::Handshakes)?;
    let accepted = timeout(wait, TlsAcceptor::from(tls.config()).accept(plain)).await;
    let stream = accepted.map_err(|_| OpenError::SlowHandshake)?.map_err(OpenError::Handshake)?;
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().and_then(<[_]>::first);
    let client = Client::new(address, Scheme::Https, shown.and_then(Identity::of));
    let http2 = http2.filter(|_| session.alpn_protocol() == Some(H2));
    Ok(Opened { stream: Stream::Tls(Box::new(stream)), client, http2 })
}

/// Reads the header that a trusted sender must begin with.
async fn proxy_header(plain: &mut Plain) -> Result<Header, OpenError> {
    let mut read = BytesMut::with_capacity(proxy_protocol::LENGTH_MAX);
    loop {
        if plain.read_buf(&mut read).await.map_err(OpenError::Left)? == 0 {
            return Err(HeaderError::Malformed("it was cut short").into());
        }
        if let Some(header) = proxy_protocol::parse(&read)? {
            plain.unread(read.split_off(header.length).freeze());
            return Ok(header);
        }
    }
}

/// Says whether the client begins with what a client of HTTP/2 begins with, and puts back what was read.
async fn begins_http2(plain: &mut Plain, wait: Duration) -> Result<bool, OpenError> {
    let until = Instant::now() + wait;
    let mut read = BytesMut::with_capacity(FIRST_READ_BYTES);
    let begins = loop {
        let Ok(got) = timeout_at(until, plain.read_buf(&mut read)).await else {
            return Err(if read.is_empty() {
                OpenError::Silent
            } else {
                OpenError::Slow(SlowHead)
            });
        };
        let got = got.map_err(OpenError::Left)?;
        let common = read.len().min(PREFACE.len());
        if got == 0 || read[..common] != PREFACE[..common] {
            break false;
        }
        if common == PREFACE.len() {
            break true;
        }
    };
    plain.unread(read.freeze());
    Ok(begins)
}

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Most heads fit, so that the look at the first bytes costs no read of its own.
const FIRST_READ_BYTES: usize = 2048;

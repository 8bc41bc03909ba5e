//! The HTTP/1.1 client of the driver: connections to one place, kept alive, the last used first.
//!
//! A request is sent again only if hyper says that not a byte of it went out. Anything else that breaks is a failure, for
//! that is what is measured.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes};
use http::header::{HOST, HeaderValue};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::demo::server::{COST, TASK};

/// What was answered.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    /// The task that answered, if the reply names it.
    pub(crate) task: Option<Box<str>>,
    // The first of the body, if it is an error.
    excerpt: String,
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status, self.excerpt.trim())
    }
}

/// Connections to one place.
#[derive(Debug)]
pub(crate) struct Client {
    target: SocketAddr,
    host: HeaderValue,
    // As many as were in use at once, at most.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    connections: TaskTracker,
    dials: Semaphore,
    stop: CancellationToken,
}

impl Client {
    pub(crate) fn new(target: SocketAddr) -> Self {
        let host = HeaderValue::try_from(target.to_string()).expect("an address is visible ASCII");
        let (idle, dials) = (Mutex::default(), Semaphore::new(DIALS_MAX));
        let (connections, stop) = (TaskTracker::new(), CancellationToken::new());
        Self { target, host, idle, connections, dials, stop }
    }

    /// Sends a request and reads the whole answer. The error says why there is none.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        cost: u64,
        body: Bytes,
    ) -> Result<Reply, String> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.host)
            .header(&COST, cost)
            .body(Full::new(body))
            .expect("a percent-encoded path of at most 24 KiB and numbers make a request");
        let (mut sender, response) = self.send_on_some(request).await?;
        let status = response.status();
        let task = response.headers().get(&TASK).and_then(|name| name.to_str().ok()).map(Box::from);
        let excerpt = read_out(response.into_body(), status)
            .await
            .map_err(|error| format!("the answer broke off: {error}"))?;
        // Not every connection outlives its answer.
        if sender.ready().await.is_ok() {
            self.lock().push(sender);
        }
        Ok(Reply { status, task, excerpt })
    }

    async fn send_on_some(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(SendRequest<Full<Bytes>>, http::Response<Incoming>), String> {
        loop {
            let (mut sender, is_fresh) = self.connection().await?;
            let mut error = match sender.try_send_request(request).await {
                Ok(response) => return Ok((sender, response)),
                Err(error) => error,
            };
            // An idle connection that was closed meanwhile: another, or a fresh one.
            match error.take_message().filter(|_| !is_fresh) {
                Some(unsent) => request = unsent,
                None => return Err(format!("no answer: {}", with_source(&error.into_error()))),
            }
        }
    }

    /// Takes the connection that was used last, or makes one; says whether it is fresh.
    async fn connection(&self) -> Result<(SendRequest<Full<Bytes>>, bool), String> {
        if let Some(sender) = self.pop() {
            return Ok((sender, false));
        }
        let _turn = self.dials.acquire().await.expect("the semaphore is never closed");
        // One may have come back meanwhile.
        if let Some(sender) = self.pop() {
            return Ok((sender, false));
        }
        let dialled = self.dial().await;
        let sender =
            dialled.map_err(|error| format!("no connection to {}: {error}", self.target))?;
        Ok((sender, true))
    }

    async fn dial(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let stream = TcpStream::connect(self.target).await.map_err(|error| error.to_string())?;
        // Small requests must not wait for each other's acknowledgements.
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| with_source(&error))?;
        let stop = self.stop.clone();
        self.connections.spawn(async move {
            tokio::select! {
                // How it ended is told to whoever waits for an answer on it.
                _ = connection => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(sender)
    }

    fn pop(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.lock();
        while let Some(sender) = idle.pop() {
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    /// Closes every connection.
    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.lock().clear();
        self.connections.close();
        self.connections.wait().await;
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a body to its end; keeps the first of it if it explains an error.
async fn read_out(mut body: Incoming, status: StatusCode) -> Result<String, hyper::Error> {
    let mut excerpt = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(mut data) = frame?.into_data() else { continue };
        if status.is_server_error() {
            let room = EXCERPT_BYTES.saturating_sub(excerpt.len()).min(data.remaining());
            excerpt.extend_from_slice(&data.copy_to_bytes(room));
        }
    }
    Ok(String::from_utf8_lossy(&excerpt).into_owned())
}

/// hyper's messages name the step, and their source the reason.
fn with_source(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Connections that are being made at once: a burst of hundreds overruns a server's backlog, and each that is dropped
/// there comes again after a whole second.
const DIALS_MAX: usize = 32;
/// How much of an error's body is kept: a line or two.
const EXCERPT_BYTES: usize = 200;

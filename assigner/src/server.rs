//! Sockets to services: gRPC and plain HTTP on one port, by TLS or without, until told to stop.

use std::io;
use std::net::TcpListener;
use std::time::Duration;

use mandoline_distributor::hub::Hub;
use mandoline_distributor::serve::{FlagsService, WatchService};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;

use crate::access::{Guard, server_tls};
use crate::api::feed::{self, Teller};
use crate::config::Access;

/// Why a port is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket is of no use.
    #[error("the socket cannot be used")]
    Socket(#[from] io::Error),
    /// The certificate, its key or the connection's set-up is wrong.
    #[error("the server cannot be set up: check the certificate and its key")]
    Setup(#[source] tonic::transport::Error),
    /// The server broke.
    #[error("the server has ended")]
    Serve(#[source] tonic::transport::Error),
}

/// Serves `routes` on a socket until `stop`, then lets calls under way end, within reason.
pub(crate) async fn serve(
    listener: TcpListener,
    routes: Routes,
    access: &Access,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    listener.set_nonblocking(true)?;
    let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener)?);
    let mut server = Server::builder()
        .accept_http1(true)
        .tcp_nodelay(true)
        // Streams of watchers are many on one connection; the hub bounds them.
        .max_concurrent_streams(None)
        .http2_keepalive_interval(Some(KEEP_ALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_WITHIN));
    if let Some(tls) = &access.tls {
        server = server.tls_config(server_tls(tls)).map_err(ServeError::Setup)?;
    }
    let incoming = tokio_stream::StreamExt::map(incoming, |accepted| {
        accepted.inspect(|stream| drop(stream.set_nodelay(true)))
    });
    let serving = server
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tokio::select! {
        done = serving => done.map_err(ServeError::Serve),
        () = async {
            stop.cancelled().await;
            tokio::time::sleep(GRACE).await;
        } => Ok(()),
    }
}

/// Serves watches from a hub and nothing else, by gRPC and by server-sent events, until `stop`: what proxies do for their peers.
pub async fn serve_watch(
    listener: TcpListener,
    hub: Hub,
    access: &Access,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    serve_watch_and_pages(listener, hub, axum::Router::new(), access, stop).await
}

/// Serves watches from a hub, by gRPC and by server-sent events, with pages of plain HTTP beside them, until `stop`: what a
/// distributor does. The pages ask for no token.
pub async fn serve_watch_and_pages(
    listener: TcpListener,
    hub: Hub,
    pages: axum::Router,
    access: &Access,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let guard = Guard::new(access);
    let feed = feed::routes(Teller::Follower, hub.clone(), guard.clone(), stop.clone());
    let flags = FlagsService::new(hub.clone(), stop.clone());
    let flags = InterceptedService::new(flags, guard.clone());
    let watch = InterceptedService::new(WatchService::new(hub, stop.clone()), guard);
    let mut routes = Routes::new(watch).add_service(flags);
    let router = std::mem::take(routes.axum_router_mut());
    *routes.axum_router_mut() = router.merge(feed).merge(pages);
    serve(listener, routes, access, stop).await
}

/// How long calls under way may take once the server was told to stop: streams end at once, other calls are short.
const GRACE: Duration = Duration::from_secs(1);
/// How often a connection that is silent is asked whether it is there.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
/// How long the answer to that may take.
const KEEP_ALIVE_WITHIN: Duration = Duration::from_secs(5);

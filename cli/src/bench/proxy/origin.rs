//! The four tasks behind every proxy that is compared: one process with one thread that answers all alike, so that a request costs as
//! little as may be where nobody measures.
//!
//! It answers any request by 512 bytes, and gRPC by one message of 64 bytes with its trailers, once the request's body has come: a task
//! that did not read it would look broken to nginx.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::ExitCode;

use bytes::Bytes;
use clap::Args;
use futures_util::stream;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Either, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mandoline::Slicelet;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::stop;

/// Runs the tasks that `bench proxy` sends requests to
#[derive(Debug, Args)]
pub(crate) struct OriginArgs {
    /// Where they serve, one address a task
    #[arg(long, value_delimiter = ',')]
    listen: Vec<SocketAddr>,
    /// Where an assigner answers
    #[arg(long)]
    assigner: SocketAddr,
}

/// What a task is called.
pub(crate) fn name(nth: usize) -> String {
    format!("kv-{nth}")
}

/// Serves until told to stop.
pub(crate) async fn run(args: OriginArgs) -> Result<ExitCode, Failure> {
    let stop = stop::on_signal()?;
    let failed =
        |error: &dyn std::error::Error| Failure::new("the tasks did not start").because(error);
    let served = stop.clone();
    let listen = args.listen.clone();
    let serving = tokio::task::spawn_blocking(move || serve(&listen, &served));
    let mut slicelets = Vec::new();
    for (nth, address) in args.listen.iter().enumerate() {
        let builder = Slicelet::builder("kv", &name(nth), &address.to_string());
        let started = builder.assigners([args.assigner.to_string()]).start();
        slicelets.push(started.map_err(|error| failed(&error))?);
    }
    let served = serving.await.map_err(|error| failed(&error))?;
    drop(slicelets);
    served.map(|()| ExitCode::SUCCESS).map_err(|error| failed(&error))
}

/// Serves all tasks from this thread.
fn serve(listen: &[SocketAddr], stop: &CancellationToken) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for address in listen {
            let listener = TcpListener::bind(address).await?;
            drop(tokio::spawn(accept(listener)));
        }
        stop.cancelled().await;
        Ok(())
    })
}

async fn accept(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        drop(stream.set_nodelay(true));
        drop(tokio::spawn(async move {
            let server = auto::Builder::new(TokioExecutor::new());
            // A client that leaves at the end of a round is none of our business.
            drop(server.serve_connection(TokioIo::new(stream), service_fn(answer)).await);
        }));
    }
}

type Answer = Either<Full<Bytes>, StreamBody<stream::Iter<std::array::IntoIter<Piece, 2>>>>;
type Piece = Result<Frame<Bytes>, Infallible>;

async fn answer(request: Request<Incoming>) -> Result<Response<Answer>, hyper::Error> {
    let is_grpc = request.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == GRPC);
    if !request.body().is_end_stream() {
        request.into_body().collect().await?;
    }
    if !is_grpc {
        return Ok(Response::new(Either::Left(Full::new(Bytes::from_static(&[b'x'; 512])))));
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let message = Frame::data(Bytes::from_static(MESSAGE));
    let pieces = [Ok(message), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(Either::Right(StreamBody::new(stream::iter(pieces))));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    Ok(response)
}

/// A gRPC message: not compressed, 64 bytes.
pub(crate) const MESSAGE: &[u8; 69] = &{
    let mut message = [b'x'; 69];
    let prefix = [0, 0, 0, 0, 64];
    let mut at = 0;
    while at < prefix.len() {
        message[at] = prefix[at];
        at += 1;
    }
    message
};
/// What says that a request is gRPC.
pub(crate) const GRPC: &str = "application/grpc";

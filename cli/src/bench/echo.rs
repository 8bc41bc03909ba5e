//! The application that benches and tests send requests to: a task that forwards what it does not own, and says its name. What it is
//! asked for is in the path; the key is in the header `x-shard-key`, or wherever its caller says.
//!
//! | asked for | does |
//! |---|---|
//! | `/t.Echo/Say` by gRPC | answers a word with its name |
//! | `/take` | reads the body to its end, and says how many bytes it was |
//! | `/give/N` | answers N bytes |
//! | `/left` | says how many bodies it was sent or had to send broke off on the way |
//! | anything else | answers with its name |

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use clap::Args;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::http::replay::BoxError;
use mandoline::{Address, Clerk, Slicelet};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::Status;
use tonic_prost::ProstCodec;
use tower::{Layer, Service, service_fn};

use crate::failure::Failure;
use crate::stop;

/// Where the key is, unless something else is said.
pub(crate) const KEY: &str = "x-shard-key";
/// What is sent and read at a time.
const PART_BYTES: usize = 64 * 1_024;

/// A body of any kind.
pub(crate) type Any = UnsyncBoxBody<Bytes, BoxError>;

/// Runs the task that the benches send requests to
#[derive(Debug, Args)]
pub(crate) struct EchoArgs {
    /// What it is called
    #[arg(long)]
    name: String,
    /// Where it serves
    #[arg(long)]
    listen: SocketAddr,
    /// Where assigners answer; without any it serves every key
    #[arg(long, value_delimiter = ',')]
    assigners: Vec<Address>,
}

/// Serves until told to stop, then lets its slices go.
pub(crate) async fn run(args: EchoArgs) -> Result<ExitCode, Failure> {
    let stop = stop::on_signal()?;
    let failed =
        |error: &dyn std::error::Error| Failure::new("the task did not start").because(error);
    let listener = TcpListener::bind(args.listen).await.map_err(|error| failed(&error))?;
    let app = App::new(&args.name);
    if args.assigners.is_empty() {
        let serving = serve(listener, service_fn(move |request| app.clone().answer(request)));
        tokio::select! {
            () = serving => {}
            () = stop.cancelled() => {}
        }
        return Ok(ExitCode::SUCCESS);
    }
    let slicelet =
        Slicelet::builder("kv", &args.name, &args.listen.to_string()).assigners(&args.assigners);
    let slicelet = Arc::new(slicelet.start().map_err(|error| failed(&error))?);
    let clerk = Clerk::builder("kv").sources(&args.assigners).start();
    let clerk = clerk.map_err(|error| failed(&error))?;
    let service = app.forwarding(&slicelet, clerk, KeyFrom::header(KEY));
    let serving = tokio::spawn(serve(listener, service));
    stop.cancelled().await;
    slicelet.shutdown().await;
    serving.abort();
    Ok(ExitCode::SUCCESS)
}

/// The application.
#[derive(Clone, Debug)]
pub(crate) struct App {
    name: Arc<str>,
    left: Arc<AtomicU64>,
}

impl App {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.into(), left: Arc::default() }
    }

    /// Serves what `slicelet` owns, and forwards the rest.
    pub(crate) fn forwarding(
        self,
        slicelet: &Arc<Slicelet>,
        clerk: Clerk,
        key: KeyFrom,
    ) -> impl Service<
        Request<Incoming>,
        Response = Response<impl Body<Data = Bytes, Error: Into<BoxError>> + Send + use<>>,
        Error = Infallible,
        Future: Send,
    > + Clone
    + Send
    + use<> {
        let layer = BackhaulLayer::new(&self.name, Arc::clone(slicelet), clerk, key);
        layer.layer(service_fn(move |request| self.clone().answer(request)))
    }

    /// Does what it is asked for.
    pub(crate) async fn answer<B>(self, request: Request<B>) -> Result<Response<Any>, Infallible>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send,
    {
        let path = request.uri().path();
        if path == "/t.Echo/Say" {
            return Ok(self.say(request).await);
        }
        if let Some(bytes) = path.strip_prefix("/give/") {
            let bytes = bytes.parse().unwrap_or(0);
            return Ok(Response::new(any(Given { left: bytes, whole: Whole(Some(self.left)) })));
        }
        let text = match path {
            "/take" => {
                let mut whole = Whole(Some(self.left));
                let (mut body, mut bytes) = (Box::pin(request.into_body()), 0);
                loop {
                    match body.frame().await {
                        Some(Ok(frame)) => bytes += frame.data_ref().map_or(0, Bytes::len),
                        Some(Err(_)) => break,
                        None => {
                            whole.0 = None;
                            break;
                        }
                    }
                }
                bytes.to_string()
            }
            "/left" => self.left.load(Ordering::Relaxed).to_string(),
            _ => self.name.to_string(),
        };
        Ok(Response::new(any(Full::new(Bytes::from(text)))))
    }

    async fn say<B>(self, request: Request<B>) -> Response<Any>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send,
    {
        let say = service_fn(move |_: tonic::Request<String>| {
            let name = self.name.to_string();
            async move { Ok::<_, Status>(tonic::Response::new(name)) }
        });
        let mut grpc = tonic::server::Grpc::new(ProstCodec::<String, String>::default());
        grpc.unary(say, request.map(tonic::body::Body::new)).await.map(any)
    }
}

/// Counts a body that was not carried to its end.
struct Whole(Option<Arc<AtomicU64>>);

impl Drop for Whole {
    fn drop(&mut self) {
        if let Some(left) = self.0.take() {
            left.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// So many bytes.
struct Given {
    left: u64,
    whole: Whole,
}

/// A body of so many bytes.
pub(crate) fn given(bytes: u64) -> Any {
    any(Given { left: bytes, whole: Whole(None) })
}

impl Body for Given {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            self.whole.0 = None;
            return Poll::Ready(None);
        }
        let bytes = self.left.min(PART_BYTES as u64);
        self.left -= bytes;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&PART[..bytes as usize])))))
    }
}

/// What bodies are made of.
static PART: [u8; PART_BYTES] = [0; PART_BYTES];

/// A body of any kind.
pub(crate) fn any<B>(body: B) -> Any
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    body.map_err(Into::into).boxed_unsync()
}

/// Serves HTTP/1.1 and HTTP/2 for as long as it is polled.
pub(crate) async fn serve<S, B>(listener: TcpListener, service: S)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    // Goes with the connections in it.
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        // What was accepted is served all the same.
        stream.set_nodelay(true).ok();
        let service = TowerToHyperService::new(service.clone());
        connections.spawn(async move {
            // What a body costs in memory is as much the server's to say as the layer's.
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder.http1().max_buf_size(PART_BYTES);
            let window = 4 * PART_BYTES as u32;
            builder
                .http2()
                .initial_stream_window_size(window)
                .initial_connection_window_size(2 * window)
                .max_send_buf_size(PART_BYTES);
            // What clients do to a connection is theirs.
            drop(builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await);
        });
        while connections.try_join_next().is_some() {}
    }
}

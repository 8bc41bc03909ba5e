//! Exports a proxy's spans by OTLP over gRPC, in batches, to a collector.
//!
//! The messages are the part of OpenTelemetry's protocol (opentelemetry-proto 1.x, `trace.proto`) that spans need, written down by hand:
//! the crates that have all of it would be the largest dependency of the proxy. A collector that is not there costs a counter, and what
//! was to be exported: no request waits, and nothing is sent twice.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::uri::PathAndQuery;
use mandoline_proxy::trace::{Attribute, Counter, Handed, Kind, Sink, Span};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use tracing::warn;

use crate::failure::{Failure, chain};

/// Spans in one message: far below the 4 MiB that collectors take.
const BATCH_MAX: usize = 512;
/// How long spans wait for others to go with.
const BATCH_WAIT: Duration = Duration::from_secs(1);
/// How long a collector is given to take them.
const EXPORT_WAIT: Duration = Duration::from_secs(10);

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// Starts to export to a collector, and gives where spans go. Ends when nobody has that any more.
pub(crate) fn start(collector: &str, instance: String) -> Result<Sink, Failure> {
    let refuse = || {
        Failure::new(format!("{collector:?} is no collector of traces")).try_this(
            "give http://HOST:PORT, where it takes OTLP over gRPC, such as http://127.0.0.1:4317",
        )
    };
    if !collector.starts_with("http://") {
        return Err(refuse());
    }
    let endpoint = Endpoint::from_shared(collector.to_owned()).map_err(|_| refuse())?;
    let channel = endpoint.connect_timeout(EXPORT_WAIT).timeout(EXPORT_WAIT).connect_lazy();
    let (sink, handed) = Sink::new();
    // It must not keep its own queue open.
    let counts = sink.counter();
    tokio::spawn(run(channel, handed, counts, instance));
    Ok(sink)
}

async fn run(
    channel: Channel,
    mut handed: mpsc::Receiver<Handed>,
    counts: Counter,
    instance: String,
) {
    let mut grpc = Grpc::new(channel);
    let mut was_told = false;
    while let Some(first) = handed.recv().await {
        let (batch, flush) = gather(first, &mut handed).await;
        let count = batch.len();
        if count > 0 {
            match export(&mut grpc, batch, &instance).await {
                Ok(()) => {
                    counts.exported(count);
                    was_told = false;
                }
                Err(status) => {
                    counts.failed(count);
                    if !std::mem::replace(&mut was_told, true) {
                        warn!(error = chain(&status), "Spans could not be exported");
                    }
                }
            }
        }
        drop(flush);
    }
}

/// Takes what comes within a while, up to a batch.
async fn gather(
    first: Handed,
    handed: &mut mpsc::Receiver<Handed>,
) -> (Vec<Span>, Option<oneshot::Sender<()>>) {
    let deadline = Instant::now() + BATCH_WAIT;
    let mut batch = Vec::new();
    let mut next = Some(first);
    while let Some(one) = next {
        match one {
            Handed::Spans(spans) => batch.extend(spans),
            Handed::Flush(done) => return (batch, Some(done)),
        }
        if batch.len() >= BATCH_MAX {
            break;
        }
        next = timeout_at(deadline, handed.recv()).await.ok().flatten();
    }
    (batch, None)
}

async fn export(grpc: &mut Grpc<Channel>, batch: Vec<Span>, instance: &str) -> Result<(), Status> {
    grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
    let spans = batch.into_iter().map(pb_span).collect();
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let scope = Scope { name: "mandoline-proxy".to_owned(), version };
    let attributes = vec![
        text("service.name", "mandoline-proxy".to_owned()),
        text("service.instance.id", instance.to_owned()),
    ];
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
    let resource = Some(Resource { attributes });
    let request = ExportRequest { resource_spans: vec![ResourceSpans { resource, scope_spans }] };
    let codec = ProstCodec::<ExportRequest, ExportReply>::default();
    let path = PathAndQuery::from_static(EXPORT);
    grpc.unary(Request::new(request), path, codec).await.map(drop)
}

fn pb_span(span: Span) -> PbSpan {
    let Span { context, parent, name, kind, began, lasted, attributes, failed } = span;
    let nanos = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    PbSpan {
        trace_id: context.trace.to_be_bytes().into(),
        span_id: context.span.to_be_bytes().into(),
        parent_span_id: parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().into()),
        name,
        kind: match kind {
            Kind::Internal => 1,
            Kind::Server => 2,
            Kind::Client => 3,
        },
        start_time_unix_nano: nanos(began),
        end_time_unix_nano: nanos(began + lasted),
        attributes: attributes.into_iter().map(|(name, value)| pb_attribute(name, value)).collect(),
        status: failed.then_some(PbStatus { code: STATUS_ERROR }),
        flags: context.flags.into(),
    }
}

fn pb_attribute(name: &str, value: Attribute) -> KeyValue {
    match value {
        Attribute::Text(value) => text(name, value),
        Attribute::Number(number) => {
            let value = Some(AnyValue { value: Some(Of::Int(number)) });
            KeyValue { key: name.to_owned(), value }
        }
    }
}

fn text(name: &str, value: String) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(Of::Text(value)) }) }
}

const STATUS_ERROR: i32 = 2;

/// `ExportTraceServiceRequest`
#[derive(Clone, PartialEq, Message)]
struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

/// `ExportTraceServiceResponse`
#[derive(Clone, PartialEq, Message)]
struct ExportReply {}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<PbSpan>,
}

/// `InstrumentationScope`
#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

/// `Span`
#[derive(Clone, PartialEq, Message)]
struct PbSpan {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<PbStatus>,
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

/// `Status`
#[derive(Clone, PartialEq, Message)]
struct PbStatus {
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Of", tags = "1, 3")]
    value: Option<Of>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Of {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(int64, tag = "3")]
    Int(i64),
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use http::Response;
    use http_body_util::BodyExt as _;
    use mandoline_core::spec::Ratio;
    use mandoline_proxy::config::Config;
    use mandoline_proxy::proxy::Proxy;
    use mandoline_proxy::router::Router;
    use mandoline_proxy::trace::Traces;
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tokio_util::sync::CancellationToken;
    use tower::{Service, service_fn};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A collector: tells of each export.
    #[derive(Clone)]
    struct Collector(mpsc::UnboundedSender<ExportRequest>);

    impl tonic::server::NamedService for Collector {
        const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
    }

    impl Service<http::Request<tonic::body::Body>> for Collector {
        type Response = Response<tonic::body::Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
            assert_eq!(request.uri().path(), EXPORT);
            let tell = self.0.clone();
            Box::pin(async move {
                let codec = ProstCodec::<ExportReply, ExportRequest>::default();
                let take = service_fn(move |request: Request<ExportRequest>| {
                    tell.send(request.into_inner()).unwrap();
                    async { Ok::<_, Status>(tonic::Response::new(ExportReply {})) }
                });
                Ok(tonic::server::Grpc::new(codec).unary(take, request).await)
            })
        }
    }

    async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
        tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited for {what}"))
    }

    #[tokio::test]
    async fn spans_of_a_request_reach_a_collector() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, mut exports) = mpsc::unbounded_channel();
        let server = tonic::transport::Server::builder().add_service(Collector(tell));
        let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

        let sink = start(&format!("http://{address}"), "p1".to_owned()).unwrap();
        // Nobody serves any key, which is enough for a trace.
        let job = "kv".parse().unwrap();
        let clerk = mandoline::Clerk::follow_hub(&mandoline::Hub::new(), job).unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let mut config = Config::new(listen, "path:1".parse().unwrap(), Router::new(clerk));
        config.traces = Some(Traces { share: Ratio::percent(0), sink: sink.clone() });
        let proxy = Proxy::start(config, &CancellationToken::new()).unwrap();
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let stream = tokio::net::TcpStream::connect(proxy.local_addr()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
                .await
                .unwrap();
        let connection = tokio::spawn(connection);
        let request = http::Request::get("/kv/a")
            .header("host", "a")
            .header("traceparent", format!("00-{trace}-{parent}-01"))
            .body(http_body_util::Empty::<bytes::Bytes>::new())
            .unwrap();
        let answer = within("an answer", sender.send_request(request)).await.unwrap();
        assert_eq!(answer.status(), 503);
        drop(answer.into_body().collect().await);

        let export = within("an export", exports.recv()).await.unwrap();
        let [group] = &export.resource_spans[..] else { panic!("{export:?}") };
        let named = |attributes: &[KeyValue], name: &str| {
            let value = attributes.iter().find(|known| known.key == name)?.value.clone()?.value?;
            Some(match value {
                Of::Text(text) => text,
                Of::Int(number) => number.to_string(),
            })
        };
        let resource = &group.resource.as_ref().unwrap().attributes;
        assert_eq!(named(resource, "service.instance.id").as_deref(), Some("p1"));
        let [span] = &group.scope_spans[0].spans[..] else { panic!("{export:?}") };
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!((hex(&span.trace_id), hex(&span.parent_span_id)), (trace.into(), parent.into()));
        assert_eq!(
            (&*span.name, span.kind, span.status.clone()),
            ("GET kv", 2, Some(PbStatus { code: 2 }))
        );
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        let said = |name| named(&span.attributes, name);
        assert_eq!(said("http.response.status_code").as_deref(), Some("503"));
        assert_eq!(said("url.path").as_deref(), Some("/kv/a"));

        // A collector that has gone costs a counter, and no more.
        serving.abort();
        drop(serving.await);
        within("the proxy to stop", proxy.stop()).await;
        connection.abort();
        assert_eq!(sink.stats().exported, 1);
    }

    #[tokio::test]
    async fn a_collector_that_is_not_there_costs_a_counter() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nobody = listener.local_addr().unwrap();
        drop(listener);
        let endpoint = Endpoint::from_shared(format!("http://{nobody}")).unwrap();
        let mut grpc = Grpc::new(endpoint.connect_lazy());
        let refused = within("an error", export(&mut grpc, Vec::new(), "p1")).await;
        assert!(refused.is_err());
    }

    #[tokio::test]
    async fn what_is_no_collector_is_refused() {
        for bad in ["", "127.0.0.1:4317", "https://a:4317", "http://a b"] {
            let failure = start(bad, "p1".to_owned()).unwrap_err().to_string();
            assert!(failure.contains("is no collector of traces"), "{failure}");
        }
    }
}

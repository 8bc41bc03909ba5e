//! Traces: a request's context is followed and passed on, and its spans are handed over.

use std::time::Duration;

use mandoline_core::spec::Ratio;
use tokio::sync::mpsc;

use super::harness::{Backend, Owners, Stage, within};
use crate::trace::{Attribute, Handed, Kind, Sink, Span, Traces};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

async fn traced(share: u32) -> (Stage, Backend, mpsc::Receiver<Handed>) {
    let task = Backend::echo("a").await;
    let (sink, handed) = Sink::new();
    let stage = Stage::with(Owners::all(task.address).await, |config| {
        config.traces = Some(Traces { share: Ratio::percent(share), sink });
    });
    (stage, task, handed)
}

fn get(more: &str) -> String {
    format!("GET /kv/a HTTP/1.1\r\nhost: a\r\n{more}connection: close\r\n\r\n")
}

/// What the task saw in a field of the request.
fn seen<'a>(answer: &'a str, field: &str) -> Option<&'a str> {
    answer.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(": "))
}

async fn spans(handed: &mut mpsc::Receiver<Handed>) -> Vec<Span> {
    let Some(Handed::Spans(spans)) = within("spans", handed.recv()).await else {
        panic!("the proxy runs")
    };
    spans
}

#[tokio::test]
async fn a_callers_trace_goes_on_at_the_task_with_a_span_of_ours_between() {
    let (stage, _task, mut handed) = traced(0).await;
    let header = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: x=y\r\n");
    let answer = stage.talk(&get(&header)).await;
    let spans = spans(&mut handed).await;
    let [tried, request] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(format!("{:032x}", request.context.trace), TRACE);
    assert_eq!(request.parent.map(|parent| format!("{parent:016x}")).as_deref(), Some(PARENT));
    assert_eq!((&*request.name, request.kind, request.failed), ("GET kv", Kind::Server, false));
    assert_eq!((&*tried.name, tried.kind), ("try", Kind::Client));
    assert_eq!(tried.parent, Some(request.context.span));
    assert!(tried.began >= request.began && tried.lasted <= request.lasted);
    let said =
        |name| request.attributes.iter().find(|(known, _)| *known == name).unwrap().1.clone();
    assert_eq!(said("http.response.status_code"), Attribute::Number(200));
    assert_eq!(said("url.path"), Attribute::Text("/kv/a".to_owned()));
    // The task is inside the try.
    assert_eq!(seen(&answer, "traceparent"), Some(&*tried.context.to_string()));
    assert_eq!(seen(&answer, "tracestate"), Some("x=y"));
}

#[tokio::test]
async fn a_request_that_is_not_recorded_keeps_its_context_and_one_without_gets_one() {
    let (stage, _task, mut handed) = traced(0).await;
    let header = format!("traceparent: 00-{TRACE}-{PARENT}-00\r\n");
    let answer = stage.talk(&get(&header)).await;
    assert_eq!(seen(&answer, "traceparent"), Some(&*format!("00-{TRACE}-{PARENT}-00")));
    let answer = stage.talk(&get("")).await;
    assert!(seen(&answer, "traceparent").unwrap().ends_with("-00"), "{answer}");
    // Neither is recorded.
    assert!(handed.try_recv().is_err());
    let (stage, _task, mut handed) = traced(100).await;
    let answer = stage.talk(&get("traceparent: 00-nonsense\r\ntracestate: x=y\r\n")).await;
    let spans = spans(&mut handed).await;
    assert_eq!(seen(&answer, "traceparent"), Some(&*spans[0].context.to_string()));
    assert_eq!(seen(&answer, "tracestate"), None);
    assert_eq!(spans[1].parent, None);
}

#[tokio::test]
async fn each_try_is_a_span_and_a_refusal_ends_the_trace() {
    let nobody = Backend::nobody().await;
    let (sink, mut handed) = Sink::new();
    let stage = Stage::with(Owners::all(nobody).await, |config| {
        config.traces = Some(Traces { share: Ratio::percent(100), sink });
    });
    let answer = stage.talk(&get("")).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let spans = spans(&mut handed).await;
    let request = spans.last().unwrap();
    assert!(request.failed, "{spans:?}");
    let tries = spans.iter().filter(|span| span.kind == Kind::Client).count();
    assert_eq!((tries, spans.len()), (1, 2));
    // Nobody takes the flush, and the proxy stops all the same.
    drop(handed);
    tokio::time::timeout(Duration::from_secs(10), stage.proxy.stop()).await.unwrap();
}

//! One request's path, from its head to the head of its answer.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use mandoline::http::refused::is_grpc;
use tokio::task::yield_now;
use tokio::time::timeout;

use crate::admit::admit;
use crate::client::Client;
use crate::download::{Download, Stream};
use crate::forward::forward;
use crate::identify::identify;
use crate::key::key;
use crate::metrics::names::Count;
use crate::passage::Passage;
use crate::pause::pause;
use crate::record::Outcome;
use crate::refusal::Refusal;
use crate::route::route;
use crate::rules::Values;
use crate::tunnel::{Switch, Tunnel};
use crate::upload::Tape;
use crate::wire::Seen;
use crate::worker::Worker;

/// Answers one request, whatever comes. What the request becomes is moved into the future once, so that it is not kept twice.
pub(crate) fn serve(
    worker: Rc<Worker>,
    client: Rc<Client>,
    request: Request<Incoming>,
    seen: Seen,
    switch: Option<Switch>,
) -> impl Future<Output = Result<Response<Download>, Infallible>> {
    let (doubt, may_be_reset) = (seen.doubt, seen.may_be_reset);
    let (is_http2, is_head) =
        (request.version() == Version::HTTP_2, request.method() == Method::HEAD);
    let mut passage = Passage::begin(worker, client, request, seen, switch);
    async move {
        if may_be_reset {
            // Whoever polls this looks then whether it is still wanted, before it costs a task anything.
            yield_now().await;
        }
        let stopping = Rc::clone(&passage.worker);
        let passed = match doubt {
            Some(doubt) => Err(Refusal::Doubt(doubt)),
            None => stages(&mut passage).await,
        };
        let mut response = match passed {
            Ok(()) => pass_on(passage),
            Err(refusal) => refuse(passage, &refusal),
        };
        if is_http2 {
            // Unlike in HTTP/1.1 nobody else sees to it that an answer to HEAD has no body.
            if is_head && let Download::Own(text) = response.body_mut() {
                text.take();
            }
        } else if stopping.stopping.get() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }
}

/// The stages in their order. Each may end the request, and a route has only those that it needs.
async fn stages(passage: &mut Passage) -> Result<(), Refusal> {
    identify(passage)?;
    admit(passage)?;
    key(passage).await?;
    pause(passage).await?;
    route(passage)?;
    forward(passage).await
}

/// Passes a task's answer on. The exchange ends with its last byte, and is observed then.
fn pass_on(passage: Passage) -> Response<Download> {
    let route = passage.route();
    let Passage { worker, answer, mut exchange, abort, upgrade, switch, permit, .. } = passage;
    let (mut response, checkout) = answer.expect("forward has got an answer");
    let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let task = switches.then(|| hyper::upgrade::on(&mut response));
    let (mut head, body) = response.into_parts();
    let values = Values {
        request_id: &passage.request_id,
        client: &passage.client,
        host: &passage.host,
        route: &route.name,
        key: passage.key,
        translation: passage.translated.as_ref().map(|translated| &*translated.answer),
        task: Some(&checkout.upstream.name),
        generation: exchange.generation(),
    };
    route.response.apply(&mut head.headers, &values);
    head.headers.append(header::VIA, worker.via(head.version));
    // What came by HTTP/2 goes on as the client's connection has it.
    head.version = Version::HTTP_11;
    if let Some(task) = task {
        let switch = switch.expect("only who can switch has asked to");
        if switch.is_stream() {
            // A stream of HTTP/2 becomes a tunnel by a common answer, and the client has given no key to answer to (RFC 8441, 5).
            head.status = StatusCode::OK;
            head.headers.remove(header::SEC_WEBSOCKET_ACCEPT);
        } else {
            let protocol = upgrade.expect("a task that switches unasked has failed");
            head.headers.insert(header::UPGRADE, protocol);
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        exchange.answers(head.status, &mut head.headers);
        exchange.switches();
        let permit = permit.expect("who has asked to has leave");
        switch.set(Tunnel::new(worker, task, exchange, permit));
        return Response::from_parts(head, Download::Own(None));
    }
    exchange.answers(head.status, &mut head.headers);
    let outcome = if head.status.is_server_error() { Outcome::Failed } else { Outcome::Answered };
    let stream = Stream::new(body, checkout, worker, exchange, outcome, abort);
    Response::from_parts(head, Download::Task(Box::new(stream)))
}

/// Answers in the task's place.
fn refuse(passage: Passage, refusal: &Refusal) -> Response<Download> {
    let Passage { worker, mut exchange, tape, waits_for_leave, stays, head, .. } = passage;
    // A client that waits for leave to send its body will see the answer first.
    if !waits_for_leave && *refusal != Refusal::Left {
        linger(&worker, tape);
    }
    match refusal {
        Refusal::Unserved => worker.counters.count(Count::Unserved),
        Refusal::SlowBody => worker.counters.count(Count::SlowBodies),
        _ => {}
    }
    let is_grpc = is_grpc(&head.headers);
    let mut response = if is_grpc { refusal.grpc_response() } else { refusal.response() };
    let status = response.status();
    exchange.refuses(refusal, stays.held);
    exchange.answers(status, response.headers_mut());
    exchange.hands_on(response.body().len() as u64);
    exchange.ends(refusal.outcome());
    response.map(|text: Bytes| Download::Own(Some(text)))
}

/// Reads on for a moment. To close a socket with unread bytes would reset it, and the client might lose the answer.
fn linger(worker: &Worker, tape: Tape) {
    if tape.is_empty() {
        return;
    }
    worker.pool.spawn(async move {
        // Whether it ended or not, enough was done.
        let _: Result<(), _> = timeout(LINGER_WAIT, tape.discard(LINGER_BYTES)).await;
    });
}

/// How long and how much is read of a body that nobody wants: a few round trips' worth, so that refusing stays cheap.
const LINGER_WAIT: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 1 << 20;

//! One request's path, from its head to the head of its answer.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mandoline_core::key::SliceKey;
use tokio::time::timeout;

use crate::config::Config;
use crate::download::{Download, Stream};
use crate::exchange::Exchange;
use crate::forward::{Answer, forward};
use crate::identify::{Client, Host, identify, sign};
use crate::metrics::Count;
use crate::pause::Held;
use crate::record::Outcome;
use crate::refusal::Refusal;
use crate::upload::Tape;
use crate::wire::{Abort, Line, Seen};
use crate::worker::Worker;

/// Answers one request, whatever comes.
pub(crate) async fn serve(
    worker: Rc<Worker>,
    client: Rc<Client>,
    request: Request<Incoming>,
    seen: Seen,
) -> Result<Response<Download>, Infallible> {
    let mut exchange = Exchange::begin(&worker);
    let (mut head, body) = request.into_parts();
    let waits_for_leave = head.headers.contains_key(header::EXPECT);
    let tape = Tape::new(body, &worker.replay_room, seen.body);
    let answer = match seen.doubt {
        Some(doubt) => Err(Refusal::Doubt(doubt)),
        None => stages(&worker, &client, &mut head, &tape, &seen.line, &mut exchange).await,
    };
    let mut response = match answer {
        Ok(answer) => pass_on(&worker, answer, exchange, seen.abort),
        Err(refusal) => {
            // A client that waits for leave to send its body will see the answer first.
            if !waits_for_leave && refusal != Refusal::Left {
                linger(&worker, tape);
            }
            refuse(&worker, &refusal, exchange)
        }
    };
    if worker.stopping.get() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

/// The stages in their order. Each may end the request.
async fn stages(
    worker: &Worker,
    client: &Client,
    head: &mut Parts,
    tape: &Tape,
    line: &Line,
    exchange: &mut Exchange,
) -> Result<Answer, Refusal> {
    let host = identify(&worker.pseudonym, head)?;
    let key = key(&worker.config, head, &host)?;
    exchange.has_key(key);
    let mut held = Held::new(&worker.hold, key, tape, line);
    if held.in_turn(head).await? {
        exchange.goes_on();
    }
    let target = worker.lookup.route(key, &worker.pool).ok_or(Refusal::Unserved)?;
    if let Some(most) = worker.config.max_staleness {
        worker.lookup.check_age(most).map_err(Refusal::TooOld)?;
    }
    sign(worker, client, &host, head);
    forward(worker, key, target, head, tape, &mut held, exchange).await
}

/// Finds the key where the configuration says that it is.
pub(crate) fn key(config: &Config, head: &Parts, host: &Host) -> Result<SliceKey, Refusal> {
    let key = config.key.find_of(head, host.as_str());
    key.map_err(|miss| Refusal::Key(format!("{miss}; the key is {}", config.key.describe())))
}

/// Passes a task's answer on.
fn pass_on(
    worker: &Rc<Worker>,
    (response, lease): Answer,
    mut exchange: Exchange,
    abort: Option<Abort>,
) -> Response<Download> {
    let (mut head, body) = response.into_parts();
    head.headers.append(header::VIA, worker.via(head.version));
    exchange.answers(head.status);
    let outcome = if head.status.is_server_error() { Outcome::Failed } else { Outcome::Answered };
    let stream = Stream::new(body, lease, Rc::clone(worker), exchange, outcome, abort);
    Response::from_parts(head, Download::Task(Box::new(stream)))
}

/// Answers in the task's place.
fn refuse(worker: &Rc<Worker>, refusal: &Refusal, mut exchange: Exchange) -> Response<Download> {
    if matches!(refusal, Refusal::Unserved) {
        worker.counters.count(Count::Unserved);
    }
    exchange.answers(refusal.status());
    exchange.ends(refusal.outcome());
    refusal.response().map(|text: Bytes| Download::Own(Some(text)))
}

/// Reads on for a moment. To close a socket with unread bytes would reset it, and the client might lose the answer.
fn linger(worker: &Worker, tape: Tape) {
    let Some(mut upload) = tape.play() else { return };
    tape.settle();
    if tape.is_empty() || tape.is_broken() {
        return;
    }
    worker.pool.spawn(async move {
        let mut left = LINGER_BYTES;
        let reading = async {
            while let Some(Ok(frame)) = upload.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(rest) = left.checked_sub(length) else { break };
                left = rest;
            }
        };
        // Whether it ended or not, enough was done.
        let _: Result<(), _> = timeout(LINGER_WAIT, reading).await;
    });
}

/// How long and how much is read of a body that nobody wants: a few round trips' worth, so that refusing stays cheap.
const LINGER_WAIT: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 1 << 20;

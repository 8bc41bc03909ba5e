//! One request sent to one task, gateway or server, and its answer: by a connection that was kept, or by a new one.
//!
//! A kept connection may be closing at the moment when it is used. Where the other side has not looked at the request, or to ask
//! again does no harm, it is sent once more by another.

use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderValue};
use mandoline::Utilisation;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::config::route::Forwarding;
use crate::forward::message::{self, Marks, Original};
use crate::forward::setback::Setback;
use crate::hold::grpc::patience;
use crate::observe::Exchange;
use crate::passage::Answer;
use crate::pool::dial::{ConnectError, Speech};
use crate::pool::http2::Fate;
use crate::pool::upstream::Upstream;
use crate::refusal::Refusal;
use crate::setup::Setup;
use crate::upload::Tape;
use crate::worker::Worker;

/// What is the same for every try.
pub(crate) struct Trip<'a> {
    pub(crate) worker: &'a Worker,
    pub(crate) setup: &'a Setup,
    pub(crate) original: Original<'a>,
    pub(crate) tape: &'a Tape,
    pub(crate) forwarding: &'a Forwarding,
    /// What the connection is to be switched to, if anything.
    pub(crate) upgrade: Option<&'a HeaderValue>,
    pub(crate) is_grpc: bool,
    /// Whether it is gRPC that came by HTTP/2, and so knows nothing else.
    pub(crate) needs_http2: bool,
    /// Whether an answer may say that the task does not own the key. Servers of a pool know of no keys.
    pub(crate) may_misdirect: bool,
    /// When nobody waits for the answer any longer, by the client's own word or the route's.
    pub(crate) deadline: Option<Instant>,
}

/// How often a connection may turn out of no use before the task counts as not reached: one that lets each request go by GOAWAY or
/// REFUSED_STREAM is no better than one that accepts none.
const UNTOUCHED_MAX: usize = 4;

/// Sends a request, and waits for the head of its answer since `since` at the earliest. `heard` is told what the task says of its load.
pub(crate) async fn exchange(
    trip: &Trip<'_>,
    upstream: &Rc<Upstream>,
    marks: Marks,
    since: Instant,
    heard: impl Fn(Utilisation),
) -> Result<Answer, Setback> {
    let Trip { worker, original, tape, .. } = trip;
    let speech = match trip.upgrade {
        // Only a connection that carries nothing else can be switched.
        Some(_) => Speech::One,
        None => upstream.speech(trip.forwarding.protocol, trip.needs_http2),
    };
    let limit = trip.forwarding.response.unwrap_or(trip.setup.config.timeouts.response);
    let mut kept_may_do = true;
    let mut untouched = 0;
    loop {
        // A kept connection that turns out closed costs nothing but the look, so this loop ends with a new one.
        let kept = if kept_may_do { worker.pool.kept(upstream, speech) } else { None };
        let mut checkout = match kept {
            Some(checkout) => checkout,
            // What is seldom needed has a box of its own, so that every request is not as large as it.
            None => Box::pin(worker.pool.connect(upstream, speech)).await.map_err(|error| {
                debug!(%error, "Task not reached");
                Setback::Unreached(error)
            })?,
        };
        let Some(upload) = tape.play() else { return Err(Setback::Broken) };
        let request = message::request(original, marks, &checkout, upload)?;
        let answer = {
            let sent = pin!(checkout.send(request));
            // A stream of gRPC may say nothing for as long as both sides like.
            let rate = if trip.is_grpc { 0 } else { trip.setup.config.limits.body_rate };
            within(sent, limit, since, trip.deadline, tape, rate).await
        };
        let answer = answer.map_err(Setback::Final)?;
        let error = match answer {
            Ok(mut response) => {
                if let Some(load) = message::load(&mut response) {
                    heard(load);
                }
                if trip.may_misdirect
                    && let Some(setback) = message::refused(&response, trip.is_grpc)
                {
                    worker.pool.give_back_unread(response.into_body(), checkout);
                    return Err(setback);
                }
                checkout.until = trip.deadline;
                return message::accept(response, checkout, trip.upgrade);
            }
            Err(error) => error,
        };
        let unsent = error.message().is_some();
        let error = error.into_error();
        let fate = if unsent { Fate::Untouched } else { checkout.failed(&error) };
        debug!(%error, ?fate, reused = checkout.reused, "Connection to a task broke");
        if let Some(fault) = tape.fault() {
            return Err(Setback::Final(fault));
        }
        match (fate, checkout.reused) {
            (Fate::Garbled, _) => {
                return Err(Setback::Final(Refusal::Garbled(
                    "its head cannot be parsed, or is too large",
                )));
            }
            (Fate::Untouched, true) if untouched < UNTOUCHED_MAX || !checkout.is_shared() => {
                untouched += 1;
            }
            (Fate::Untouched, _) => {
                return Err(Setback::Unreached(ConnectError::Closed(upstream.endpoint.clone())));
            }
            // The task closed a connection that it had kept, at the moment when it was used.
            (Fate::Unknown, true) if kept_may_do && original.head.method.is_idempotent() => {
                kept_may_do = false;
            }
            (Fate::Unknown, _) => return Err(Setback::Broken),
        }
    }
}

/// Says when nobody waits for an answer any longer: the client of gRPC, by its own word, or the route's owner.
pub(crate) fn deadline(
    observed: &Exchange,
    forwarding: &Forwarding,
    grpc: Option<&HeaderMap>,
) -> Option<Instant> {
    let patience = grpc.and_then(patience);
    let longest = [patience, forwarding.total].into_iter().flatten().min()?;
    observed.began().checked_add(longest)
}

/// Waits for an answer as long as the body gets on at that rate at least, in bytes per second, and for `limit` after it last did; in no case
/// longer than to the deadline.
async fn within<T>(
    mut answer: Pin<&mut impl Future<Output = T>>,
    limit: Duration,
    since: Instant,
    deadline: Option<Instant>,
    tape: &Tape,
    rate: u64,
) -> Result<T, Refusal> {
    let late = || if tape.is_waiting() { Refusal::SlowBody } else { Refusal::Late };
    let mut until = since + limit;
    let mut before = tape.pace();
    loop {
        let first = deadline.map_or(until, |deadline| deadline.min(until));
        if let Ok(answer) = timeout_at(first, answer.as_mut()).await {
            return Ok(answer);
        }
        if Some(first) == deadline {
            return Err(late());
        }
        let moved = tape.moved().map(|moved| moved + limit);
        until = moved.filter(|moved| *moved > until).ok_or_else(late)?;
        let pace = tape.pace();
        if pace.is_below(rate, &before, limit / 2) {
            return Err(Refusal::SlowBody);
        }
        before = pace;
    }
}

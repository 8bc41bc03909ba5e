//! From a target to an answer: one try, and a second on the fresh owner where the first may be repeated. An owner that has
//! not heard yet that it is one is given a moment, and where the old owner is giving the slice away the request is held until
//! the new one has it.
//!
//! A request may be sent again when no task has acted on it: the task could not be reached, the connection was closed
//! before the request was written, or the task answered 421, or 503 with `mandoline-transit`, which say so. After a connection that broke off before the
//! answer it may be sent again only if its method promises that twice is as good as once (RFC 9110, 9.2.2). In each case
//! its body must still be at hand.

use std::rc::Rc;
use std::time::Duration;

use http::{Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use mandoline::Verdict;
use mandoline::gateways::Region;
use mandoline::http::names::hops;
use mandoline::http::refused::is_grpc;
use mandoline::http::verdict::verdict;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use crate::forward::exchange::{Trip, deadline, exchange};
use crate::forward::message::{Marks, Original};
use crate::forward::setback::{Setback, refusal};
use crate::hold::{Held, Waiter};
use crate::job::Job;
use crate::metrics::names::{Count, TaskCount};
use crate::observe::Exchange;
use crate::passage::{Answer, Passage};
use crate::pool::upstream::Upstream;
use crate::refusal::Refusal;
use crate::rules::Values;
use crate::setup::{EVERYTHING, To};
use crate::target::{self, Target};

/// A trip to whoever owns a key.
struct Owned<'a> {
    trip: Trip<'a>,
    job: &'a Job,
    key: SliceKey,
}

/// How long a task that lags behind the proxy is given to hear that it owns the key, before it is asked again, and again.
/// News reach tasks and proxies at the same moment, so the first pause does nearly always. The sum is longer than the election after
/// a leader that died when it had told its last change to proxies alone.
const LAG_PAUSES_MS: [u64; 9] = [5, 10, 20, 40, 80, 160, 320, 640, 1280];

/// How often a request is sent in all. A move costs two or three tries, so this is a slice that moves again and again as the
/// request looks for it, or tasks that contradict each other.
const TRIES_MAX: usize = 20;

/// Sends a request to its task, and once more to the fresh owner if it may be repeated. What is seldom needed has a box of its own.
///
/// An owner, fresh or not, that answers by an older assignment than the proxy's is asked again after a pause: in a move the
/// old owner, the proxy and the new owner hear of it in any order. One that is giving the slice away is not asked, or not
/// again: the request is held. Two that refuse it by one assignment are the end, and so are news that do not come.
pub(crate) async fn to_owner(
    passage: &mut Passage,
    job: &Job,
    mut target: Target,
) -> Result<Answer, Refusal> {
    let route = passage.route();
    let waits_for_leave = passage.waits_for_leave;
    let Passage { worker, setup, head, tape, presence, key, stays, exchange, is_http2, .. } =
        passage;
    let values = Values {
        request_id: &passage.request_id,
        client: &passage.client,
        host: &passage.host,
        route: &route.name,
        key: *key,
        translation: passage.translated.as_ref().map(|translated| &*translated.answer),
        task: None,
        generation: Generation::ZERO,
    };
    let key = key.unwrap_or(EVERYTHING);
    let held =
        &mut Held::new(&job.hold, key, Waiter { head, tape, presence, stays, waits_for_leave });
    let is_grpc = is_grpc(&head.headers);
    let trip = Trip {
        worker,
        setup,
        original: Original { head, rules: &route.request, values },
        tape,
        forwarding: &route.forwarding,
        upgrade: passage.upgrade.as_ref(),
        is_grpc,
        needs_http2: is_grpc && *is_http2,
        may_misdirect: matches!(route.to, To::Job { .. }),
        deadline: deadline(exchange, &route.forwarding, is_grpc.then_some(&head.headers)),
    };
    let trip = &Owned { trip, job, key };
    let mut pauses = LAG_PAUSES_MS.into_iter();
    let (mut is_fresh, mut in_vain) = (false, false);
    let mut tries = 0;
    loop {
        if target.is_releasing {
            target = Box::pin(next_owner(trip, target.generation, held, exchange)).await?;
            continue;
        }
        tries += 1;
        exchange.tries(&target);
        let attempted = attempt(trip, &target, exchange).await;
        exchange.tried();
        let setback = match attempted {
            Ok(answer) => {
                if answer.0.status() != StatusCode::SERVICE_UNAVAILABLE {
                    exchange.is_taken();
                }
                tape.settle();
                return Ok(answer);
            }
            Err(setback) => setback,
        };
        let may_be_repeated = match setback {
            Setback::Misdirected(_) | Setback::InTransit(_) | Setback::Unreached(_) => {
                tape.is_whole()
            }
            Setback::Broken => tape.is_whole() && head.method.is_idempotent(),
            Setback::Final(_) => false,
        };
        if !may_be_repeated || tries == TRIES_MAX {
            return Err(refusal(setback, head));
        }
        let told = match &setback {
            Setback::Misdirected(told) => *told,
            Setback::InTransit(told) => Some(*told),
            _ => None,
        };
        let lags = told.is_some_and(|told| told < target.generation);
        let has_news = told.is_some_and(|told| told > target.generation);
        let next = match setback {
            // A task that cannot take what was spilled to it says nothing about the owner, who has not been asked yet.
            _ if target.is_spilled => job.owners.route_to_owner(key, &worker.pool),
            _ if lags => {
                let Some(pause) = pauses.next() else { return Err(refusal(setback, head)) };
                sleep(Duration::from_millis(pause)).await;
                job.owners.route_to_owner(key, &worker.pool)
            }
            Setback::InTransit(told) => {
                is_fresh = false;
                Some(Box::pin(next_owner(trip, told, held, exchange)).await?)
            }
            _ if in_vain || (is_fresh && !has_news) => return Err(refusal(setback, head)),
            _ => {
                is_fresh = true;
                let fresh = job.owners.fresh(key, &worker.pool, &target, told);
                let next = Box::pin(fresh).await;
                in_vain = next.as_ref().is_some_and(|next| Some(next.generation) < told);
                next
            }
        };
        let Some(next) = next else { return Err(Refusal::Unserved) };
        // Only a task that was heard may say something else a moment later, and one that lets go is not asked.
        let was_heard = matches!(setback, Setback::Misdirected(_) | Setback::InTransit(_));
        if next.session() == target.session() && !was_heard && !next.is_releasing {
            return Err(refusal(setback, head));
        }
        if next.generation > target.generation {
            pauses = LAG_PAUSES_MS.into_iter();
        }
        debug!(%key, from = %target.session(), to = %next.session(), "Request is tried again");
        target = next;
    }
}

/// Holds a request until its slice has settled by an assignment newer than `told`, and finds who owns that then.
async fn next_owner(
    trip: &Owned<'_>,
    told: Generation,
    held: &mut Held<'_>,
    exchange: &mut Exchange,
) -> Result<Target, Refusal> {
    held.settled(told).await?;
    exchange.goes_on(held.so_far());
    trip.job.owners.route_to_owner(trip.key, &trip.trip.worker.pool).ok_or(Refusal::Unserved)
}

async fn attempt(
    trip: &Owned<'_>,
    target: &Target,
    exchange: &Exchange,
) -> Result<Answer, Setback> {
    let upstream = match &target.to {
        target::To::Task(upstream) => upstream,
        target::To::Region(region) => {
            return Box::pin(by_gateway(trip, region, target, exchange)).await;
        }
    };
    upstream.counters.count(TaskCount::Tried);
    if target.is_spilled {
        trip.trip.worker.counters.count(Count::Spilled);
    }
    let mut answer = exchange_messages(trip, target, upstream, exchange).await;
    if let Ok((response, checkout)) = &mut answer
        && trip.trip.is_grpc
        && says_at_its_end(response)
    {
        checkout.judge = target.call.take();
        // Whether it has answered or failed, its end tells.
        if checkout.judge.is_some() {
            return answer;
        }
    }
    if let (Some(call), Some(verdict)) = (target.call.take(), judged(&answer)) {
        call.ends(verdict);
    }
    upstream.counters.count(match &answer {
        Ok((response, _)) if response.status().is_server_error() => TaskCount::Failed,
        Ok(_) => TaskCount::Answered,
        Err(Setback::Misdirected(_)) => TaskCount::Misdirected,
        Err(Setback::InTransit(_)) => TaskCount::Releasing,
        Err(_) => TaskCount::Failed,
    });
    answer
}

/// What an answer, or none, says of the task; nothing if it is not the task that failed.
fn judged(answer: &Result<Answer, Setback>) -> Option<Verdict> {
    match answer {
        Ok((response, _)) => Some(verdict(response)),
        Err(Setback::Unreached(_) | Setback::Broken) => Some(Verdict::Failed),
        Err(Setback::Final(Refusal::Late | Refusal::Garbled(_))) => Some(Verdict::Failed),
        Err(Setback::Misdirected(_) | Setback::InTransit(_) | Setback::Final(_)) => None,
    }
}

/// Sends a request to a gateway of the region that its key lives in, and to the next where one is not reached. There it may be
/// forwarded once more, to its task.
async fn by_gateway(
    trip: &Owned<'_>,
    region: &Region,
    target: &Target,
    exchange: &Exchange,
) -> Result<Answer, Setback> {
    let Owned { trip: Trip { worker, tape, original, .. }, job, key } = trip;
    let head = original.head;
    if hops(&head.headers).is_some_and(|left| left < 2) {
        let (region, generation) = (region.clone(), target.generation);
        return Err(Setback::Final(Refusal::Crossed { region, generation }));
    }
    let gateways = job.owners.gateways().expect("who has no gateways goes straight");
    let mut tried = Vec::new();
    while let Some(gateway) = gateways.next(region, *key, &tried) {
        let upstream = worker.pool.gateway(&gateway.address);
        let answer = exchange_messages(trip, target, &upstream, exchange).await;
        match answer {
            Err(Setback::Unreached(error)) => {
                gateways.failed(&gateway, &error);
                tried.push(gateway.address);
                if !tape.is_whole() {
                    break;
                }
            }
            // It knows what we know, and takes itself for no gateway of the region.
            Err(Setback::Misdirected(Some(told))) if told == target.generation => {
                gateways.answered(&gateway);
                let refusal = Refusal::Astray(gateway);
                if worker.astray.is_due(Instant::now()) {
                    warn!(error = %refusal, "Requests for another region are lost");
                }
                return Err(Setback::Final(refusal));
            }
            Ok(_) | Err(Setback::Misdirected(_) | Setback::InTransit(_)) => {
                gateways.answered(&gateway);
                return answer;
            }
            Err(_) => return answer,
        }
    }
    gateways.lost();
    Err(Setback::Final(Refusal::Lost(region.clone())))
}

async fn exchange_messages(
    trip: &Owned<'_>,
    target: &Target,
    upstream: &Rc<Upstream>,
    observed: &Exchange,
) -> Result<Answer, Setback> {
    let marks = Marks {
        generation: target.generation,
        may_forward: matches!(target.to, target::To::Region(_)),
        is_spilled: target.is_spilled,
        trace: observed.trace(),
    };
    let heard = |load| trip.job.owners.heard(target, load);
    exchange(&trip.trip, upstream, marks, observed.waits_since(), heard).await
}

/// Says whether only the end of an answer tells how the call went: gRPC's, if its head holds no status.
fn says_at_its_end(response: &Response<Incoming>) -> bool {
    response.status() == StatusCode::OK
        && !response.headers().contains_key("grpc-status")
        && !response.body().is_end_stream()
}

//! From a target to an answer: one try, and a second on the fresh owner where the first may be repeated. An owner that has
//! not heard yet that it is one is given a moment, and where the old owner is giving the slice away the request is held until
//! the new one has it.
//!
//! A request may be sent again when no task has acted on it: the task could not be reached, the connection was closed
//! before the request was written, or the task answered 421, or 503 with `mandoline-transit`, which say so. After a connection that broke off before the
//! answer it may be sent again only if its method promises that twice is as good as once (RFC 9110, 9.2.2). In each case
//! its body must still be at hand.

use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use mandoline::http::verdict::verdict;
use mandoline::{Utilisation, Verdict};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::transit::HandOffId;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

use crate::hold::{Held, Waiter};
use crate::identify::sign;
use crate::job::Job;
use crate::metrics::{Count, TaskCount};
use crate::observe::Exchange;
use crate::passage::{Answer, Passage};
use crate::pool::{ConnectError, Lease, Upstream};
use crate::refusal::Refusal;
use crate::rules::{Facts, Rules};
use crate::setup::{Setup, To};
use crate::target::{self, Target};
use crate::upload::{Tape, Upload};
use crate::worker::Worker;
use mandoline::gateways::Region;
use mandoline::http::names::{GENERATION, HOPS, LOAD, SPILL, TRANSIT, hops, strip_hop_by_hop};

/// What is the same for every try.
struct Trip<'a> {
    worker: &'a Worker,
    setup: &'a Setup,
    job: &'a Job,
    key: SliceKey,
    head: &'a Parts,
    tape: &'a Tape,
    rules: &'a Rules,
    facts: Facts<'a>,
}

/// What one try came to, if not an answer to pass on.
enum Setback {
    /// The task was not reached, or was not sent the request.
    Unreached(ConnectError),
    /// The task says that the key is not its own, and by which assignment.
    Misdirected(Option<Generation>),
    /// The task is giving the key's slice away, by this assignment or an older one.
    InTransit(Generation),
    /// The task broke off before it answered.
    Broken,
    /// There is no use in trying again.
    Final(Refusal),
}

/// How long a task that lags behind the proxy is given to hear that it owns the key, before it is asked again, and again.
/// News reach tasks and proxies at the same moment, so the first pause does nearly always. The sum is longer than the election after
/// a leader that died when it had told its last change to proxies alone.
const LAG_PAUSES_MS: [u64; 9] = [5, 10, 20, 40, 80, 160, 320, 640, 1280];

/// How often a request is sent in all. A move costs two or three tries, so this is a slice that moves again and again as the
/// request looks for it, or tasks that contradict each other.
const TRIES_MAX: usize = 20;

/// The stage `forward`: gets an answer from the task.
pub(crate) async fn forward(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.route();
    let To::Job { job, .. } = &route.to;
    let target = passage.target.take().expect("route has found the task");
    sign(passage);
    passage.answer = Some(to_owner(passage, job, target).await?);
    Ok(())
}

/// Sends a request to its task, and once more to the fresh owner if it may be repeated.
///
/// An owner, fresh or not, that answers by an older assignment than the proxy's is asked again after a pause: in a move the
/// old owner, the proxy and the new owner hear of it in any order. One that is giving the slice away is not asked, or not
/// again: the request is held. Two that refuse it by one assignment are the end, and so are news that do not come.
async fn to_owner(passage: &mut Passage, job: &Job, mut target: Target) -> Result<Answer, Refusal> {
    let route = passage.route();
    let waits_for_leave = passage.waits_for_leave;
    let Passage { worker, setup, head, tape, line, key, stays, exchange, .. } = passage;
    let facts = Facts {
        request_id: &passage.request_id,
        client: &passage.client,
        host: &passage.host,
        route: &route.name,
        key: *key,
        task: None,
        generation: Generation::ZERO,
    };
    let key = key.expect("key has found the key");
    let held = &mut Held::new(&job.hold, key, Waiter { head, tape, line, stays, waits_for_leave });
    let trip = &Trip { worker, setup, job, key, head, tape, rules: &route.request, facts };
    let mut pauses = LAG_PAUSES_MS.into_iter();
    let (mut is_fresh, mut in_vain) = (false, false);
    let mut tries = 0;
    loop {
        if target.is_releasing {
            target = next_owner(trip, target.generation, held, exchange).await?;
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
            _ if target.is_spilled => job.lookup.route_to_owner(key, &worker.pool),
            _ if lags => {
                let Some(pause) = pauses.next() else { return Err(refusal(setback, head)) };
                sleep(Duration::from_millis(pause)).await;
                job.lookup.route_to_owner(key, &worker.pool)
            }
            Setback::InTransit(told) => {
                is_fresh = false;
                Some(next_owner(trip, told, held, exchange).await?)
            }
            _ if in_vain || (is_fresh && !has_news) => return Err(refusal(setback, head)),
            _ => {
                is_fresh = true;
                let next = job.lookup.fresh(key, &worker.pool, &target, told).await;
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
    trip: &Trip<'_>,
    told: Generation,
    held: &mut Held<'_>,
    exchange: &mut Exchange,
) -> Result<Target, Refusal> {
    held.settled(told).await?;
    exchange.goes_on(held.so_far());
    trip.job.lookup.route_to_owner(trip.key, &trip.worker.pool).ok_or(Refusal::Unserved)
}

/// What the client is told of a setback that ends its request.
fn refusal(setback: Setback, head: &Parts) -> Refusal {
    match setback {
        Setback::Unreached(_) => Refusal::Unreached,
        Setback::Misdirected(_) | Setback::InTransit(_) => Refusal::Moving,
        Setback::Broken if head.method.is_idempotent() => Refusal::BrokenRepeatable,
        Setback::Broken => Refusal::Broken,
        Setback::Final(refusal) => refusal,
    }
}

async fn attempt(trip: &Trip<'_>, target: &Target, exchange: &Exchange) -> Result<Answer, Setback> {
    let upstream = match &target.to {
        target::To::Task(upstream) => upstream,
        target::To::Region(region) => {
            return by_gateway(trip, region, target, exchange).await;
        }
    };
    upstream.counters.count(TaskCount::Tried);
    if target.is_spilled {
        trip.worker.counters.count(Count::Spilled);
    }
    let answer = exchange_messages(trip, target, upstream, exchange).await;
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
    trip: &Trip<'_>,
    region: &Region,
    target: &Target,
    exchange: &Exchange,
) -> Result<Answer, Setback> {
    let Trip { worker, job, key, head, tape, .. } = *trip;
    if hops(&head.headers).is_some_and(|left| left < 2) {
        let (region, generation) = (region.clone(), target.generation);
        return Err(Setback::Final(Refusal::Crossed { region, generation }));
    }
    let gateways = job.lookup.gateways().expect("who has no gateways goes straight");
    let mut tried = Vec::new();
    while let Some(gateway) = gateways.next(region, key, &tried) {
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
                return Err(Setback::Final(Refusal::Astray(gateway)));
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
    trip: &Trip<'_>,
    target: &Target,
    upstream: &Rc<Upstream>,
    exchange: &Exchange,
) -> Result<Answer, Setback> {
    let Trip { worker, setup, job, head, tape, .. } = *trip;
    let mut kept_may_do = true;
    loop {
        // A kept connection that turns out closed costs nothing but the look, so this loop ends with a new one.
        let kept = if kept_may_do { worker.pool.kept(upstream) } else { None };
        let mut lease = match kept {
            Some(lease) => lease,
            None => worker.pool.connect(upstream).await.map_err(|error| {
                debug!(%error, "Task not reached");
                Setback::Unreached(error)
            })?,
        };
        let Some(upload) = tape.play() else { return Err(Setback::Broken) };
        let sent = lease.sender.try_send_request(request(trip, target, upstream, upload));
        let limit = setup.config.timeouts.response;
        let Some(answer) = within(sent, limit, exchange.waits_since(), tape).await else {
            let late = if tape.is_waiting() { Refusal::SlowBody } else { Refusal::Late };
            return Err(Setback::Final(late));
        };
        let error = match answer {
            Ok(mut response) => {
                if let Some(load) = load(&mut response) {
                    job.lookup.heard(target, load);
                }
                if let Some(setback) = refused(&response) {
                    worker.pool.give_back_unread(response.into_body(), lease);
                    return Err(setback);
                }
                return accept(response, lease);
            }
            Err(error) => error,
        };
        let unsent = error.message().is_some();
        let error = error.into_error();
        debug!(%error, unsent, reused = lease.reused, "Connection to a task broke");
        if tape.is_broken() {
            return Err(Setback::Final(Refusal::Malformed(
                "the body of the request broke off or is not well formed",
            )));
        }
        if error.is_parse() {
            return Err(Setback::Final(Refusal::Garbled(
                "its head cannot be parsed, or is too large",
            )));
        }
        match (unsent, lease.reused) {
            (true, true) => {}
            (true, false) => {
                return Err(Setback::Unreached(ConnectError::Closed(upstream.address().clone())));
            }
            // The task closed a connection that it had kept, at the moment when it was used.
            (false, true) if head.method.is_idempotent() => kept_may_do = false,
            (false, _) => return Err(Setback::Broken),
        }
    }
}

fn request(
    trip: &Trip<'_>,
    target: &Target,
    upstream: &Upstream,
    upload: Upload,
) -> Request<Upload> {
    let Trip { head, rules, facts, .. } = *trip;
    let mut request = Request::new(upload);
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = head.uri.clone();
    *request.headers_mut() = head.headers.clone();
    let task = Some(&upstream.name);
    rules.apply(request.headers_mut(), &Facts { task, generation: target.generation, ..facts });
    if matches!(target.to, target::To::Region(_)) {
        request.headers_mut().insert(HOPS, HeaderValue::from_static("1"));
    } else if let Some(left) = request.headers_mut().get_mut(HOPS) {
        *left = HeaderValue::from_static("0");
    }
    if target.is_spilled {
        let generation = HeaderValue::try_from(target.generation.to_string());
        request.headers_mut().insert(SPILL, generation.expect("a generation fits a header"));
    }
    request
}

/// Takes out of an answer what its task says of its load. What cannot be read is as good as nothing, for the client waits.
fn load(response: &mut Response<Incoming>) -> Option<Utilisation> {
    response.headers_mut().remove(LOAD)?.to_str().ok()?.parse().ok()
}

/// Waits for an answer as long as the body gets on, and for `limit` after it last did.
async fn within<T>(
    answer: impl Future<Output = T>,
    limit: Duration,
    since: Instant,
    tape: &Tape,
) -> Option<T> {
    let mut answer = pin!(answer);
    let mut deadline = since + limit;
    loop {
        if let Ok(answer) = timeout_at(deadline, answer.as_mut()).await {
            return Some(answer);
        }
        let moved = tape.moved().map(|moved| moved + limit);
        deadline = moved.filter(|moved| *moved > deadline)?;
    }
}

/// Finds in an answer that the task took no part in the request: 421, and 503 in a hand-off, lead to another try.
fn refused(response: &Response<Incoming>) -> Option<Setback> {
    let headers = response.headers();
    match response.status() {
        StatusCode::MISDIRECTED_REQUEST => Some(Setback::Misdirected(named(headers, &GENERATION))),
        StatusCode::SERVICE_UNAVAILABLE => {
            let id: HandOffId = named(headers, &TRANSIT)?;
            Some(Setback::InTransit(named(headers, &GENERATION).unwrap_or(id.began)))
        }
        _ => None,
    }
}

/// Takes an answer over: what belongs to this hop ends here.
fn accept(mut response: Response<Incoming>, lease: Lease) -> Result<Answer, Setback> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Setback::Final(Refusal::Garbled(
            "it switched protocols though nobody had asked",
        )));
    }
    framing(&mut response)?;
    strip_hop_by_hop(response.headers_mut());
    *response.version_mut() = Version::HTTP_11;
    Ok((response, lease))
}

/// Reads what a task says in a field of its answer. What cannot be read is as good as nothing.
fn named<T: FromStr>(headers: &HeaderMap, field: &HeaderName) -> Option<T> {
    headers.get(field)?.to_str().ok()?.parse().ok()
}

/// Leaves one reading of where the answer ends: hyper has chosen it by the rules, so what speaks against it goes.
fn framing(response: &mut Response<Incoming>) -> Result<(), Setback> {
    let no_body = matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let headers = response.headers();
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let chunked = match (codings.next(), codings.next()) {
        (None, _) => false,
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => true,
        _ => {
            return Err(Setback::Final(Refusal::Garbled(
                "its transfer coding is not chunked alone",
            )));
        }
    };
    let length = one_length(headers)?;
    let headers = response.headers_mut();
    if chunked || no_body {
        headers.remove(header::CONTENT_LENGTH);
    } else if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length);
    }
    Ok(())
}

/// Finds the length that an answer states, in a plain form if it was stated twice alike.
fn one_length(headers: &HeaderMap) -> Result<Option<HeaderValue>, Setback> {
    let mut lines = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = lines.next() else { return Ok(None) };
    let all =
        [first].into_iter().chain(lines).flat_map(|line| line.as_bytes().split(|b| *b == b','));
    let mut lengths = all.map(<[u8]>::trim_ascii);
    let length = lengths.next().unwrap_or_default();
    let plain = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
    if !plain || lengths.any(|other| other != length) {
        return Err(Setback::Final(Refusal::Garbled(
            "its Content-Length is no number, or says two things",
        )));
    }
    Ok(HeaderValue::from_bytes(length).ok())
}

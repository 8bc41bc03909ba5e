//! The stage `admit`: which route takes the request, if any.

use std::rc::Rc;

use http::request::Parts;
use mandoline::http::refused::is_grpc;

use crate::config::headers::Value;
use crate::config::matching::Astray;
use crate::metrics::names::Count;
use crate::passage::Passage;
use crate::permit::Permit;
use crate::refusal::Refusal;
use crate::setup::{Route, Setup};
use crate::upgrade::granted;

/// Finds the route that takes the request.
pub(crate) fn admit(passage: &mut Passage) -> Result<(), Refusal> {
    let route = passage.setup.route(&passage.head, passage.host.as_str()).map_err(refusal)?;
    if route.names(Value::RequestId) {
        passage.request_id = passage.worker.request_ids.of(&passage.head.headers);
    }
    let route = Rc::clone(route);
    passage.exchange.takes(&route);
    passage.route = Some(Rc::clone(&route));
    if let Some(wish) = &mut passage.upgrade {
        *wish = granted(wish, &route.upgrades)?.clone();
        let most = passage.setup.config.limits.tunnels;
        let permit = Permit::take(&passage.worker.tunnels, most);
        if permit.is_none() {
            passage.worker.counters.count(Count::TunnelsRefused);
        }
        passage.permit = Some(permit.ok_or(Refusal::TunnelsFull)?);
    }
    if passage.tape.is_empty() {
        return Ok(());
    }
    match body_bytes(&route, &passage.setup, &passage.head) {
        Some(most) => passage.tape.bound(most, &passage.worker.counters),
        None => Ok(()),
    }
}

/// Says how long a request's body may be, if it is bounded. A stream of gRPC is a body that may last for as long as both sides like.
pub(crate) fn body_bytes(route: &Route, setup: &Setup, head: &Parts) -> Option<u64> {
    let usual = setup.config.limits.body_bytes;
    route.forwarding.body_bytes.or_else(|| (!is_grpc(&head.headers)).then_some(usual))
}

pub(crate) fn refusal(astray: Astray) -> Refusal {
    match astray {
        Astray::NoRoute => Refusal::NoRoute,
        Astray::Method(methods) => Refusal::OtherMethods(methods),
        Astray::Dots => Refusal::Malformed(
            "the path has . or .. between slashes: send the path that it leads to",
        ),
    }
}

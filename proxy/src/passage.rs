//! One request on its way through the stages: what each of them finds out, for those that come after it.

use std::rc::Rc;
use std::sync::Arc;

use http::header::HeaderValue;
use http::request::Parts;
use http::{Request, Response, Version, header};
use hyper::body::Incoming;
use mandoline_core::key::SliceKey;
use tokio::time::Instant;

use crate::chain::{asker, strip};
use crate::client::{Client, Host};
use crate::hold::Stays;
use crate::observe::Exchange;
use crate::permit::Permit;
use crate::pool::upstream::Checkout;
use crate::setup::{Route, Setup};
use crate::target::Target;
use crate::tunnel::Switch;
use crate::upload::Tape;
use crate::wire::{Abort, Presence, Seen};
use crate::worker::Worker;

/// A task's answer and the connection it comes on.
pub(crate) type Answer = (Response<Incoming>, Checkout);

/// One request on its way through the stages.
pub(crate) struct Passage {
    pub(crate) worker: Rc<Worker>,
    /// What was in force when the request came in.
    pub(crate) setup: Rc<Setup>,
    pub(crate) client: Rc<Client>,
    pub(crate) head: Parts,
    pub(crate) tape: Tape,
    pub(crate) presence: Presence,
    pub(crate) abort: Option<Abort>,
    pub(crate) exchange: Exchange,
    /// Whether the client waits for leave to send its body.
    pub(crate) waits_for_leave: bool,
    /// A tunnel's, from `admit` on, where it wants to switch.
    pub(crate) permit: Option<Permit>,
    /// What its connection may be switched by.
    pub(crate) switch: Option<Switch>,
    /// Whether it came by HTTP/2.
    pub(crate) is_http2: bool,
    /// From `identify` on.
    pub(crate) host: Host,
    /// The protocol that the client wants to switch to: as it says, from `identify` on; as the route names it, from `admit` on.
    pub(crate) upgrade: Option<HeaderValue>,
    /// From `admit` on.
    pub(crate) route: Option<Rc<Route>>,
    /// The request's number, from `admit` on, where the route names it.
    pub(crate) request_id: HeaderValue,
    /// From `key` on, where the route leads to a job.
    pub(crate) key: Option<SliceKey>,
    /// From `key` on, where the route has a lookup.
    pub(crate) translated: Option<Translated>,
    /// What its waits have come to so far.
    pub(crate) stays: Stays,
    /// From `route` on.
    pub(crate) target: Option<Target>,
    /// From `forward` on.
    pub(crate) answer: Option<Answer>,
}

/// A key that was looked up.
pub(crate) struct Translated {
    pub(crate) looked_up: Vec<u8>,
    /// What stands for it, and is the key.
    pub(crate) answer: Arc<[u8]>,
    /// The end of the last pause after which the table was asked, if there was one.
    pub(crate) since: Option<Instant>,
}

impl Translated {
    pub(crate) fn key(&self) -> SliceKey {
        SliceKey::of(&self.answer)
    }
}

impl Passage {
    /// Begins with a head that was parsed.
    pub(crate) fn begin(
        worker: Rc<Worker>,
        client: Rc<Client>,
        request: Request<Incoming>,
        seen: Seen,
        switch: Option<Switch>,
    ) -> Self {
        let setup = worker.setup();
        let (mut head, body) = request.into_parts();
        let (forwarded, connected) = (&setup.config.forwarded, client.address());
        let client = asker(client, &head.headers, forwarded, &worker.counters);
        let exchange = Exchange::begin(&worker, &setup, &client, &mut head);
        strip(&mut head.headers, connected, forwarded);
        Self {
            setup,
            client,
            is_http2: head.version == Version::HTTP_2,
            waits_for_leave: head.headers.contains_key(header::EXPECT),
            head,
            tape: Tape::new(body, &worker.replay_room, seen.body),
            presence: seen.presence,
            abort: seen.abort,
            switch,
            exchange,
            host: Host::unknown(),
            upgrade: None,
            permit: None,
            route: None,
            request_id: HeaderValue::from_static(""),
            key: None,
            translated: None,
            stays: Stays::default(),
            target: None,
            answer: None,
            worker,
        }
    }

    /// Gives the route that the request takes. Each stage after `admit` may ask.
    pub(crate) fn route(&self) -> Rc<Route> {
        Rc::clone(self.route.as_ref().expect("admit has found the route"))
    }
}

//! The stage `observe`: one request from its head to the last byte of its answer. Whatever happens, its end is counted once: when the exchange
//! is dropped, with the last thing that was known.
//!
//! What only a log or a trusted client wants to know is kept only where there is one.

use std::fmt::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::task::SessionId;
use tokio::time::Instant;

use crate::client::Client;
use crate::hold::flights::{Facts, Flight};
use crate::job::Job;
use crate::metrics::names::Count;
use crate::record::{Outcome, Record, RequestInfo};
use crate::setup::{Route, Setup};
use crate::target::{self, Target};
use crate::trace::{Attribute, Context, Traced, Trail};
use crate::worker::Worker;

/// Those that RFC 9110 and RFC 5789 define and that come this far.
const USUAL_METHODS: [Method; 7] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::DELETE,
    Method::OPTIONS,
    Method::PATCH,
];

/// One request, under way.
pub(crate) struct Exchange {
    worker: Rc<Worker>,
    // What was in force when it began.
    setup: Rc<Setup>,
    route: Option<Rc<Route>>,
    // Where it counts as offered, once it has a key.
    job: Option<Rc<Job>>,
    began: Instant,
    // When it began, or was last let go on.
    waits_since: Instant,
    held: Duration,
    // While whom it was sent to is waited for.
    try_began: Option<Instant>,
    upstream: Duration,
    key: Option<SliceKey>,
    generation: Generation,
    first: Option<SessionId>,
    last: Option<SessionId>,
    tries: u32,
    first_try_right: bool,
    status: Option<StatusCode>,
    outcome: Outcome,
    bytes_out: u64,
    // Once no pause holds it.
    flight: Option<Flight>,
    // Where there is a trace.
    trail: Option<Box<Trail>>,
    // Where there is a log or a trace.
    asked: Option<Box<RequestInfo>>,
    // Where a trusted client asks what becomes of it.
    shown_in: Option<HeaderName>,
}

impl Exchange {
    pub(crate) fn begin(
        worker: &Rc<Worker>,
        setup: &Rc<Setup>,
        client: &Client,
        head: &mut Parts,
    ) -> Self {
        worker.counters.count(Count::Requests);
        let began = Instant::now();
        let traced =
            setup.config.traces.as_ref().map(|traces| {
                traces.begin(&mut head.headers, began, &mut worker.chance.borrow_mut())
            });
        let trail = match traced {
            Some(Traced::Recorded(trail)) => Some(trail),
            Some(Traced::AsItCame) | None => None,
        };
        let log = setup.config.access_log.as_ref();
        let asked = (log.is_some() || trail.is_some()).then(|| {
            let headers = log.map(|log| log.format.headers(&head.headers)).unwrap_or_default();
            let mut asked = Box::new(RequestInfo::of(client.address(), head, headers));
            let trace = trail.as_ref().map(|trail| trail.request);
            let trace = trace.or_else(|| log.and_then(|_| Context::of(&head.headers)));
            asked.trace = trace.map(|context| format!("{:032x}", context.trace));
            asked
        });
        let shown_in = setup.config.debug.as_ref().and_then(|debug| {
            // Whoever may not ask, asks in vain, and so does whoever asks the task.
            head.headers.remove(&debug.header)?;
            debug.trusts(client.address()).then(|| debug.header.clone())
        });
        Self {
            worker: Rc::clone(worker),
            setup: Rc::clone(setup),
            route: None,
            job: None,
            began,
            waits_since: began,
            held: Duration::ZERO,
            try_began: None,
            upstream: Duration::ZERO,
            key: None,
            generation: Generation::ZERO,
            first: None,
            last: None,
            tries: 0,
            first_try_right: false,
            status: None,
            outcome: Outcome::Abandoned,
            bytes_out: 0,
            flight: None,
            trail,
            asked,
            shown_in,
        }
    }

    /// Says when its head was there.
    pub(crate) const fn began(&self) -> Instant {
        self.began
    }

    /// Says from when on an answer is waited for: the beginning, or the end of the last hold.
    pub(crate) const fn waits_since(&self) -> Instant {
        self.waits_since
    }

    /// A route takes the request.
    pub(crate) fn takes(&mut self, route: &Rc<Route>) {
        route.counters.takes();
        self.route = Some(Rc::clone(route));
    }

    /// The request was held for so long in all, and is let go on.
    pub(crate) fn goes_on(&mut self, held: Duration) {
        self.waits_since = Instant::now();
        self.was_held(held);
    }

    fn was_held(&mut self, held: Duration) {
        let lasted = held.saturating_sub(std::mem::replace(&mut self.held, held));
        if let Some(trail) = self.trail.as_mut().filter(|_| !lasted.is_zero()) {
            trail.was_held(lasted, &mut self.worker.chance.borrow_mut());
        }
    }

    /// The request's key is known: from here on it counts as offered, second tries apart.
    pub(crate) fn has_key(&mut self, key: SliceKey, job: &Rc<Job>) {
        self.key = Some(key);
        job.owners.offered(key);
        self.job = Some(Rc::clone(job));
    }

    /// The request's key stands for something else by now.
    pub(crate) const fn has_other_key(&mut self, key: SliceKey) {
        self.key = Some(key);
    }

    /// No pause holds it any more: whoever begins one may wait for its end.
    pub(crate) fn is_past_pauses(&mut self, facts: Facts) {
        self.flight = Some(self.worker.gates.flights.begins(facts));
    }

    /// Gives the assignment that the first task was chosen by.
    pub(crate) const fn generation(&self) -> Generation {
        self.generation
    }

    /// The request is about to be sent.
    pub(crate) fn tries(&mut self, target: &Target) {
        if self.first.is_none() {
            self.first = Some(target.session());
            self.generation = target.generation;
        }
        self.tries += 1;
        self.last = Some(target.session());
        self.try_began = Some(Instant::now());
        if let Some(trail) = &mut self.trail {
            trail.tries(&mut self.worker.chance.borrow_mut());
        }
        if let (Some(asked), target::To::Task(upstream)) = (&mut self.asked, &target.to) {
            asked.address = upstream.address().cloned();
        }
    }

    /// Whom it was sent to has begun to answer, or will not.
    pub(crate) fn tried(&mut self) {
        let Some(began) = self.try_began.take() else { return };
        self.upstream += began.elapsed();
        if let Some(trail) = &mut self.trail {
            let address = self.asked.as_ref().and_then(|asked| asked.address.as_ref());
            let texts = [
                ("server.address", address.map(ToString::to_string)),
                ("mandoline.task", self.last.map(|task| task.to_string())),
            ];
            let texts = texts.into_iter().filter_map(|(name, text)| Some((name, text?)));
            let mut said: Vec<_> =
                texts.map(|(name, text)| (name, Attribute::Text(text))).collect();
            said.push(("http.request.resend_count", Attribute::Number(i64::from(self.tries) - 1)));
            trail.tried(said);
        }
    }

    /// Says where the try under way is in a trace, if the request is recorded.
    pub(crate) fn trace(&self) -> Option<Context> {
        self.trail.as_ref().map(|trail| trail.here())
    }

    /// The task that was tried last takes the request.
    pub(crate) const fn is_taken(&mut self) {
        self.first_try_right = self.tries == 1;
    }

    /// The head of the answer goes out; until the rest has, it counts as abandoned.
    pub(crate) fn answers(&mut self, status: StatusCode, headers: &mut HeaderMap) {
        self.status = Some(status);
        if let Some(name) = self.shown_in.take() {
            headers.insert(name, self.shown());
        }
    }

    /// The proxy answers itself, after it has held the request for so long in all.
    pub(crate) fn refuses(&mut self, why: &impl ToString, held: Duration) {
        self.was_held(held);
        self.ends_since(why);
    }

    /// The connection switches protocols, and the request lasts for as long as its tunnel. Whoever waits for what is in flight waits
    /// for answers, and this has one.
    pub(crate) fn switches(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.worker.gates.flights.ends(flight);
        }
    }

    /// Says why it ends as it does.
    pub(crate) fn ends_since(&mut self, why: &impl ToString) {
        if let Some(asked) = &mut self.asked {
            asked.reason = Some(why.to_string());
        }
    }

    /// So much of the answer's body is handed on.
    pub(crate) const fn hands_on(&mut self, bytes: u64) {
        self.bytes_out += bytes;
    }

    pub(crate) const fn ends(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// Says in a line what has become of the request so far.
    fn shown(&self) -> HeaderValue {
        let mut line = String::new();
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                let space = if line.is_empty() { "" } else { "; " };
                write!(line, "{space}{name}={value}").expect("a string takes it");
            }
        };
        let seconds = |length: Duration| Some(format!("{:.6}", length.as_secs_f64()));
        // A route's name is the operator's, and anything at all.
        let quoted = |route: &Rc<Route>| format!("\"{}\"", route.counters.name.escape_default());
        add("route", self.route.as_ref().map(quoted));
        add("key", self.key.map(|key| format!("{:016x}", key.0)));
        add("owner", self.last.map(|task| task.to_string()));
        add("generation", self.first.map(|_| self.generation.to_string()));
        add("tries", Some(self.tries.to_string()));
        add("held", seconds(self.held));
        add("upstream_time", seconds(self.upstream));
        HeaderValue::try_from(line).expect("what is not printable is escaped")
    }

    /// Says in a trace what became of the request.
    fn leaves_trace(&mut self, record: &Record) {
        let (Some(trail), Some(asked)) = (self.trail.take(), &self.asked) else { return };
        // Any text can be a method, and spans are told apart by few names.
        let is_usual = USUAL_METHODS.contains(&asked.method);
        let method = if is_usual { asked.method.as_str() } else { "HTTP" };
        let route = record.route.as_deref();
        let name = route.map_or_else(|| method.to_owned(), |route| format!("{method} {route}"));
        let texts = [
            ("http.request.method", Some(asked.method.to_string())),
            ("url.path", Some(asked.uri.path().to_owned())),
            ("client.address", Some(asked.client.to_string())),
            ("http.route", route.map(str::to_owned)),
            ("mandoline.key", record.key.map(|key| key.to_string())),
            ("mandoline.generation", record.first.map(|_| record.generation.to_string())),
            ("mandoline.outcome", Some(record.outcome.as_str().to_owned())),
            ("mandoline.reason", asked.reason.clone()),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name, text?)));
        let mut said: Vec<_> = texts.map(|(name, text)| (name, Attribute::Text(text))).collect();
        if let Some(status) = record.status {
            said.push(("http.response.status_code", Attribute::Number(status.into())));
        }
        trail.ends(name, record.duration, record.outcome == Outcome::Failed, said);
    }

    /// Says what there is to say at its end.
    fn record(&self) -> Record {
        Record {
            route: self.route.as_ref().map(|route| Arc::clone(&route.counters.name)),
            key: self.key,
            generation: self.generation,
            first: self.first,
            last: self.last,
            first_try_right: self.first_try_right,
            tries: self.tries,
            status: self.status.map(|status| status.as_u16()),
            outcome: self.outcome,
            held: self.held,
            upstream: self.upstream,
            duration: self.began.elapsed(),
            bytes_out: self.bytes_out,
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.tried();
        let record = self.record();
        if let (Some(key), Some(job), Outcome::Failed) = (self.key, &self.job, self.outcome) {
            job.owners.failed(key);
        }
        if let Some(flight) = self.flight.take() {
            self.worker.gates.flights.ends(flight);
        }
        let route = self.route.as_ref().map(|route| &*route.counters);
        self.worker.counters.record(&record, route);
        if let Some(observer) = &self.worker.setup().config.observer {
            observer.observe(&record);
        }
        self.leaves_trace(&record);
        if let (Some(asked), Some(log)) = (&mut self.asked, &self.setup.config.access_log) {
            asked.job = self.job.as_ref().map(|job| (*job.name).clone());
            log.tell(&record, asked, &mut self.worker.chance.borrow_mut());
        }
    }
}

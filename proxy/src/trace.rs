//! Traces: which one a request belongs to (W3C Trace Context), and spans of ours in it, handed to whoever exports them.
//!
//! A caller's `traceparent` decides whether its request is recorded; for those without one a share is drawn. A request that is not
//! recorded costs the look at that header. One that is gathers its spans by itself, a few in number, and hands them over when it has
//! ended; where whoever exports does not keep up they are dropped and counted, and nobody waits.

use std::fmt;
use std::str;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use mandoline_core::prng::Prng;
use mandoline_core::spec::Ratio;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

/// Requests whose spans may wait to be exported: a few seconds' worth of a busy proxy with a share of one per cent.
const QUEUE: usize = 4096;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Which requests are traced, and who exports their spans.
#[derive(Clone, Debug)]
pub struct Traces {
    /// The share of requests without a `traceparent` that is recorded. Others say themselves.
    pub share: Ratio,
    /// Where their spans go.
    pub sink: Sink,
}

/// A place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: u128,
    /// The span.
    pub span: u64,
    /// Whether the trace is recorded, and what else its header says.
    pub flags: u8,
}

/// The bit of the flags that says that a trace is recorded.
const SAMPLED: u8 = 1;

impl Context {
    /// Reads the context of a request: nothing if it has none, or none that can be trusted to be one.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut lines = headers.get_all(&TRACEPARENT).iter();
        let (Some(line), None) = (lines.next(), lines.next()) else { return None };
        Self::read(line.as_bytes())
    }

    /// `00-<trace>-<span>-<flags>`; a later version may say more behind a dash.
    fn read(line: &[u8]) -> Option<Self> {
        let (known, more) = line.split_at_checked(55)?;
        let version = hex(&known[..2])?;
        let is_whole =
            if version == 0 { more.is_empty() } else { more.is_empty() || more[0] == b'-' };
        let dashes = [known[2], known[35], known[52]].iter().all(|b| *b == b'-');
        let (trace, span) = (hex(&known[3..35])?, hex(&known[36..52])? as u64);
        let flags = hex(&known[53..])? as u8;
        let good = version != 0xff && is_whole && dashes && trace != 0 && span != 0;
        good.then_some(Self { trace, span, flags })
    }

    /// Says so in a head.
    pub(crate) fn put(self, headers: &mut HeaderMap) {
        let line = HeaderValue::try_from(self.to_string());
        headers.insert(TRACEPARENT, line.expect("it is digits and dashes"));
    }

    const fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }
}

fn hex(digits: &[u8]) -> Option<u128> {
    // Upper case is not allowed there.
    let good = digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let text = str::from_utf8(digits).ok().filter(|_| good)?;
    u128::from_str_radix(text, 16).ok()
}

/// `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`
impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

/// Something that lasted, in a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where it is.
    pub context: Context,
    /// In which other span, if in any.
    pub parent: Option<u64>,
    /// What it is called: of few kinds.
    pub name: String,
    /// Whose side it is seen from.
    pub kind: Kind,
    /// When it began.
    pub began: SystemTime,
    /// How long it lasted.
    pub lasted: Duration,
    /// What there is to say of it.
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Whether it failed.
    pub failed: bool,
}

/// Whose side a span is seen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request as it came in.
    Server,
    /// A request as it was sent on.
    Client,
    /// What happened in between.
    Internal,
}

/// Something to say of a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// A text.
    Text(String),
    /// A number.
    Number(i64),
}

/// Takes the spans of requests that have ended. Clones are the same.
#[derive(Clone)]
pub struct Sink {
    queue: mpsc::Sender<Handed>,
    counts: Arc<Counts>,
}

/// What whoever exports is handed.
#[derive(Debug)]
pub enum Handed {
    /// The spans of a request.
    Spans(Vec<Span>),
    /// To be dropped once what came before is exported.
    Flush(oneshot::Sender<()>),
}

/// Counts what became of spans, for whoever exports them.
#[derive(Clone)]
pub struct Counter(Arc<Counts>);

#[derive(Default)]
struct Counts {
    exported: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

/// What became of the spans so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceStats {
    /// Spans that were exported.
    pub exported: u64,
    /// Spans that were dropped, since whoever exports did not keep up.
    pub dropped: u64,
    /// Spans that could not be exported.
    pub failed: u64,
}

impl Sink {
    /// Makes a queue of spans: its beginning, and its end for whoever exports.
    pub fn new() -> (Self, mpsc::Receiver<Handed>) {
        let (queue, handed) = mpsc::channel(QUEUE);
        (Self { queue, counts: Arc::default() }, handed)
    }

    fn hand(&self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        if self.queue.try_send(Handed::Spans(spans)).is_err() {
            self.counts.dropped.fetch_add(count, Relaxed);
        }
    }

    /// Gives what counts. It does not keep the queue open.
    pub fn counter(&self) -> Counter {
        Counter(Arc::clone(&self.counts))
    }

    /// Says what became of the spans so far.
    pub fn stats(&self) -> TraceStats {
        let Counts { exported, dropped, failed } = &*self.counts;
        TraceStats {
            exported: exported.load(Relaxed),
            dropped: dropped.load(Relaxed),
            failed: failed.load(Relaxed),
        }
    }

    /// Waits until what was handed over is exported, but no longer than `most`.
    pub async fn flush(&self, most: Duration) {
        let (done, is_done) = oneshot::channel();
        let flushed = async {
            // Whoever exports may have ended.
            drop(self.queue.send(Handed::Flush(done)).await);
            drop(is_done.await);
        };
        // Late or not, there is nothing more to do.
        let _: Result<(), _> = timeout(most, flushed).await;
    }
}

impl Counter {
    /// Counts spans that were exported.
    pub fn exported(&self, count: usize) {
        self.0.exported.fetch_add(count as u64, Relaxed);
    }

    /// Counts spans that could not be exported.
    pub fn failed(&self, count: usize) {
        self.0.failed.fetch_add(count as u64, Relaxed);
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sink").field(&self.stats()).finish()
    }
}

/// A request's part of a trace.
pub(crate) struct Trail {
    sink: Sink,
    /// The span of the whole request.
    pub(crate) request: Context,
    parent: Option<u64>,
    // The same moment by both clocks.
    began: (Instant, SystemTime),
    // The try under way.
    tries: Option<(u64, Instant)>,
    spans: Vec<Span>,
}

/// What becomes of a request's context.
pub(crate) enum Traced {
    /// It is passed on as it came, and nothing is recorded.
    AsItCame,
    /// This request is recorded.
    Recorded(Box<Trail>),
}

impl Traces {
    /// Says whether a request is recorded. One without a context, or with none that can be read, gets one.
    pub(crate) fn begin(&self, headers: &mut HeaderMap, now: Instant, chance: &mut Prng) -> Traced {
        let given = Context::of(headers);
        let is_recorded = match given {
            Some(given) => given.is_sampled(),
            None => chance.below(1_000_000) < self.share.millionths().into(),
        };
        let request = match given {
            Some(given) => Context { span: draw(chance), ..given },
            None => {
                let trace = (u128::from(draw(chance)) << 64) | u128::from(draw(chance));
                Context { trace, span: draw(chance), flags: u8::from(is_recorded) * SAMPLED }
            }
        };
        if given.is_none() {
            // What belongs to a context that cannot be read belongs to none.
            headers.remove(&TRACESTATE);
            request.put(headers);
        }
        if !is_recorded {
            return Traced::AsItCame;
        }
        let began = (now, SystemTime::now());
        let (sink, parent) = (self.sink.clone(), given.map(|given| given.span));
        let (tries, spans) = (None, Vec::new());
        Traced::Recorded(Box::new(Trail { sink, request, parent, began, tries, spans }))
    }
}

/// Draws an identifier. None is zero.
const fn draw(chance: &mut Prng) -> u64 {
    let drawn = chance.bits();
    if drawn == 0 { 1 } else { drawn }
}

impl Trail {
    /// The request was held for so long, until now.
    pub(crate) fn was_held(&mut self, lasted: Duration, chance: &mut Prng) {
        let began = self.wall(Instant::now()).checked_sub(lasted).unwrap_or(self.began.1);
        self.inside(draw(chance), "hold", Kind::Internal, (began, lasted), Vec::new());
    }

    /// The request is about to be sent.
    pub(crate) fn tries(&mut self, chance: &mut Prng) {
        self.tries = Some((draw(chance), Instant::now()));
    }

    /// Says where the try under way is.
    pub(crate) fn here(&self) -> Context {
        let span = self.tries.map_or(self.request.span, |(span, _)| span);
        Context { span, ..self.request }
    }

    /// The try under way is over.
    pub(crate) fn tried(&mut self, attributes: Vec<(&'static str, Attribute)>) {
        let Some((span, began)) = self.tries.take() else { return };
        let times = (self.wall(began), began.elapsed());
        self.inside(span, "try", Kind::Client, times, attributes);
    }

    fn inside(
        &mut self,
        span: u64,
        name: &str,
        kind: Kind,
        (began, lasted): (SystemTime, Duration),
        attributes: Vec<(&'static str, Attribute)>,
    ) {
        let (context, parent) = (Context { span, ..self.request }, Some(self.request.span));
        let (name, failed) = (name.to_owned(), false);
        self.spans.push(Span { context, parent, name, kind, began, lasted, attributes, failed });
    }

    fn wall(&self, moment: Instant) -> SystemTime {
        let (instant, wall) = self.began;
        wall + moment.saturating_duration_since(instant)
    }

    /// The request has ended.
    pub(crate) fn ends(
        mut self,
        name: String,
        lasted: Duration,
        failed: bool,
        attributes: Vec<(&'static str, Attribute)>,
    ) {
        let (context, parent, kind) = (self.request, self.parent, Kind::Server);
        let began = self.began.1;
        self.spans.push(Span { context, parent, name, kind, began, lasted, attributes, failed });
        self.sink.hand(self.spans);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn traces(share: u32) -> (Traces, mpsc::Receiver<Handed>) {
        let (sink, handed) = Sink::new();
        (Traces { share: Ratio::percent(share), sink }, handed)
    }

    fn headers(lines: &[&str]) -> HeaderMap {
        let line = |line: &&str| (TRACEPARENT, HeaderValue::from_str(line).unwrap());
        let mut headers = HeaderMap::new();
        headers.extend(lines.iter().map(line));
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        headers
    }

    #[test]
    fn a_context_is_read_strictly() {
        let read = |line: &str| Context::read(line.as_bytes());
        assert_eq!(read(GOOD).unwrap().to_string(), GOOD);
        let later = GOOD.replacen("00", "01", 1);
        assert!(read(&later).is_some() && read(&format!("{later}-more")).is_some());
        for bad in [
            "",
            "00",
            &GOOD.to_uppercase(),
            &GOOD.replacen("00", "ff", 1),
            &format!("{GOOD}-more"),
            &format!("{later}more"),
            &GOOD.replace('-', "_"),
            &GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &GOOD.replace("00f067aa0ba902b7", &"0".repeat(16)),
            &GOOD.replace("-01", "-0g"),
            &GOOD[..54],
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(Context::of(&headers(&[GOOD, GOOD])), None);
    }

    #[test]
    fn a_parent_decides_and_else_the_share() {
        let unsampled = GOOD.replace("-01", "-00");
        for (share, lines, recorded) in [
            (0, &[GOOD][..], true),
            (100, &[&*unsampled], false),
            (100, &[], true),
            (0, &[], false),
            (100, &["bad"], true),
            (100, &[GOOD, GOOD], true),
        ] {
            let (traces, _handed) = traces(share);
            let mut given = headers(lines);
            let traced = traces.begin(&mut given, Instant::now(), &mut Prng::new(7));
            assert_eq!(matches!(traced, Traced::Recorded(_)), recorded, "{share} {lines:?}");
            let now = Context::of(&given).unwrap();
            assert_eq!(now.is_sampled(), recorded, "{share} {lines:?}");
            match lines {
                [line] if *line != "bad" => assert_eq!(now.to_string(), *line),
                // A new trace, and nothing of what came.
                _ => assert!(!given.contains_key(TRACESTATE), "{share} {lines:?}"),
            }
        }
    }

    #[test]
    fn spans_that_nobody_takes_are_dropped_and_counted() {
        let (traces, mut handed) = traces(100);
        for _ in 0..QUEUE + 3 {
            let mut headers = HeaderMap::new();
            let traced = traces.begin(&mut headers, Instant::now(), &mut Prng::new(7));
            let Traced::Recorded(trail) = traced else { panic!("all are recorded") };
            trail.ends("GET".to_owned(), Duration::ZERO, false, Vec::new());
        }
        assert_eq!(traces.sink.stats().dropped, 3);
        assert!(matches!(handed.try_recv(), Ok(Handed::Spans(spans)) if spans.len() == 1));
    }
}

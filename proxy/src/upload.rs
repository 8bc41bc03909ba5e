//! A request's body on its way to a task, kept while it is short so that it can be sent again to another one.
//!
//! A `Tape` belongs to the request, an `Upload` to one try. A try that was given up may still be asked for frames by a
//! connection that is about to end: it gets an error, never a frame that the next try is waiting for.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::metrics::counters::Counters;
use crate::metrics::names::Count;
use crate::refusal::Refusal;
use crate::room::Room;
use crate::trailers;
use crate::wire::BodyMark;

/// The longest body that is kept, in bytes: most writes of a cache or a shop fit, and a slower client's does not pile up.
pub(crate) const REPLAY_MAX_BYTES: usize = 64 << 10;

/// The most pieces that are kept, so that a body of single bytes does not cost more to list than to keep.
const PIECES_MAX: usize = 1024;

/// Pieces shorter than this are joined where there are too many. Longer ones are not copied again, so that each byte is copied a few
/// times at most, however a body is cut.
const JOINED_BYTES: usize = 4 << 10;

/// As much as comes in one piece where heads have the usual bound: hyper's buffer is twice that.
const PIECE_MAX_BYTES: usize = 64 << 10;

/// The body of one request.
pub(crate) struct Tape {
    reel: Option<Rc<RefCell<Reel>>>,
}

/// The body of one request, for one try.
pub(crate) struct Upload {
    reel: Option<Rc<RefCell<Reel>>>,
    take: u32,
    sent: u64,
    ended: bool,
}

/// Why a body stopped coming.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    /// The client left or broke the framing.
    #[error("the client's body broke off")]
    Client(#[source] hyper::Error),
    /// Its end has more than one reading.
    #[error("the client's body has no clear end")]
    Doubt,
    /// It is longer than a body may be.
    #[error("the client's body is too long")]
    Long,
    /// This try was given up.
    #[error("the body is sent elsewhere by now")]
    GivenUp,
}

/// What came of reading on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gathered {
    /// The body has ended, or as much was read as was asked for.
    Enough,
    /// There is no room for more.
    Full,
    /// The client has left.
    Gone,
    /// What it sends is no body, or too long a one.
    Broken,
}

/// How much of a body has come, and how long its client was waited for. What a task that does not read takes is not the client's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    bytes: u64,
    waited: Duration,
}

impl Pace {
    /// Says whether since then the client brought less than so many bytes in each second that it was waited for: for `within` at the least,
    /// so that a moment is not taken for a habit.
    pub(crate) fn is_below(&self, rate: u64, then: &Self, within: Duration) -> bool {
        let waited = self.waited.saturating_sub(then.waited);
        let wanted = u128::from(rate) * waited.as_millis() / 1000;
        waited >= within && u128::from(self.bytes.saturating_sub(then.bytes)) < wanted
    }
}

struct Reel {
    source: Incoming,
    length: Option<u64>,
    ended: bool,
    // What was read from the source; `kept[..at]` was sent in this try.
    kept: VecDeque<Bytes>,
    at: usize,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    // False once something was sent that is not kept.
    whole: bool,
    // Which try may take frames.
    take: u32,
    moved: Instant,
    waiting: bool,
    pace: Pace,
    // Since when the client is waited for, if it is.
    asked: Option<Instant>,
    // Why there will be no more of it, if its end was not the reason.
    fault: Option<Refusal>,
    // There for a body that does not say how long it is.
    bound: Option<Bound>,
    // Where what is kept is counted.
    room: Rc<Room>,
    mark: Option<BodyMark>,
}

/// How long a body may be, and how much of that is left.
struct Bound {
    most: u64,
    left: u64,
    counters: Arc<Counters>,
}

impl Bound {
    fn too_long(&self) -> Refusal {
        self.counters.count(Count::LongBodies);
        Refusal::LongBody(self.most)
    }
}

impl Tape {
    pub(crate) fn new(source: Incoming, room: &Rc<Room>, mark: Option<BodyMark>) -> Self {
        if source.is_end_stream() {
            return Self { reel: None };
        }
        let reel = Reel {
            length: source.size_hint().exact(),
            source,
            ended: false,
            kept: VecDeque::new(),
            at: 0,
            kept_bytes: 0,
            trailers: None,
            whole: true,
            take: 0,
            moved: Instant::now(),
            waiting: false,
            pace: Pace::default(),
            asked: None,
            fault: None,
            bound: None,
            room: Rc::clone(room),
            mark,
        };
        Self { reel: Some(Rc::new(RefCell::new(reel))) }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.reel.is_none()
    }

    /// Refuses a body that says that it is longer than this, and cuts off one that turns out to be.
    pub(crate) fn bound(&self, most: u64, counters: &Arc<Counters>) -> Result<(), Refusal> {
        let Some(reel) = &self.reel else { return Ok(()) };
        let mut reel = reel.borrow_mut();
        let bound = Bound { most, left: most, counters: Arc::clone(counters) };
        match reel.length {
            Some(length) if length > most => Err(bound.too_long()),
            Some(_) => Ok(()),
            None => {
                reel.bound = Some(bound);
                Ok(())
            }
        }
    }

    /// Starts a try from the beginning, unless part of the body was sent and not kept. Earlier tries get nothing more.
    pub(crate) fn play(&self) -> Option<Upload> {
        let Some(reel) = &self.reel else {
            return Some(Upload { reel: None, take: 0, sent: 0, ended: true });
        };
        let mut inner = reel.borrow_mut();
        if !inner.whole {
            return None;
        }
        inner.take += 1;
        inner.at = 0;
        // Nobody has waited for the client since the last try was given up.
        inner.asked = None;
        Some(Upload { reel: Some(Rc::clone(reel)), take: inner.take, sent: 0, ended: false })
    }

    /// Says whether the body can be sent from its beginning.
    pub(crate) fn is_whole(&self) -> bool {
        self.reel.as_ref().is_none_or(|reel| reel.borrow().whole)
    }

    /// Keeps nothing from now on: there will be no other try.
    pub(crate) fn settle(&self) {
        if let Some(reel) = &self.reel {
            reel.borrow_mut().forget();
        }
    }

    /// Says when the body last got on, if it is still under way.
    pub(crate) fn moved(&self) -> Option<Instant> {
        self.reel.as_ref().map(|reel| reel.borrow().moved)
    }

    /// Says how fast the body has come so far.
    pub(crate) fn pace(&self) -> Pace {
        let Some(reel) = &self.reel else { return Pace::default() };
        let reel = reel.borrow();
        let waits = reel.asked.map(|asked| asked.elapsed()).unwrap_or_default();
        Pace { waited: reel.pace.waited + waits, ..reel.pace }
    }

    /// Says whether the client is the one to send next.
    pub(crate) fn is_waiting(&self) -> bool {
        self.reel.as_ref().is_some_and(|reel| reel.borrow().waiting)
    }

    /// Says how much of the body is kept, in bytes.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.reel.as_ref().map_or(0, |reel| reel.borrow().kept_bytes)
    }

    /// Says how long the body is, if that was said beforehand.
    pub(crate) fn length(&self) -> Option<u64> {
        self.reel.as_ref().map_or(Some(0), |reel| reel.borrow().length)
    }

    /// Counts what is kept in this room from now on.
    pub(crate) fn count_in(&self, room: &Rc<Room>) {
        let Some(reel) = &self.reel else { return };
        let mut reel = reel.borrow_mut();
        room.take(reel.kept_bytes);
        let before = std::mem::replace(&mut reel.room, Rc::clone(room));
        before.give_back(reel.kept_bytes);
    }

    /// Says whether the client has more to send than was read.
    pub(crate) fn is_coming(&self) -> bool {
        self.reel.as_ref().is_some_and(|reel| {
            let reel = reel.borrow();
            !reel.ended && !reel.source.is_end_stream()
        })
    }

    /// Reads on while nobody takes the body, up to about `most` bytes and only where there is room: `reserve` is asked for it
    /// beforehand. May be given up at any time.
    pub(crate) async fn gather(
        &self,
        most: usize,
        mut reserve: impl FnMut(usize) -> bool,
    ) -> Gathered {
        let Some(reel) = &self.reel else { return Gathered::Enough };
        let mut room = 0;
        loop {
            let rest = reel.borrow().rest();
            if rest == 0 || reel.borrow().kept_bytes > most {
                return Gathered::Enough;
            }
            let next = PIECE_MAX_BYTES.min(rest);
            if !reel.borrow().room.fits(next) {
                return Gathered::Full;
            }
            if room < next {
                if !reserve(next - room) {
                    return Gathered::Full;
                }
                room = next;
            }
            let gathered = poll_fn(|context| reel.borrow_mut().poll_gather(context)).await;
            match gathered {
                // A piece that is longer than was thought is here: it stays, and no more is read beside it.
                Ok(length) if length > room && !reserve(length - room) => return Gathered::Full,
                // Others have read at the same time, and what fitted one by one did not fit together.
                Ok(_) if !reel.borrow().room.fits(0) => return Gathered::Full,
                Ok(length) => room = room.saturating_sub(length),
                Err(gathered) => return gathered,
            }
        }
    }

    /// Gives the body, if it has been read to its end and is kept.
    pub(crate) fn gathered(&self) -> Option<Vec<u8>> {
        let Some(reel) = &self.reel else { return Some(Vec::new()) };
        let reel = reel.borrow();
        let is_over = reel.ended || reel.source.is_end_stream();
        (is_over && reel.whole).then(|| reel.kept.iter().flatten().copied().collect())
    }

    /// Says what is wrong with the client's body, if anything is so far.
    pub(crate) fn fault(&self) -> Option<Refusal> {
        self.reel.as_ref().and_then(|reel| reel.borrow().fault.clone())
    }

    /// Reads what is left, up to `most` bytes, and throws it away. No try gets any more.
    pub(crate) async fn discard(self, most: usize) {
        let Some(reel) = self.reel else { return };
        {
            let mut reel = reel.borrow_mut();
            reel.take += 1;
            reel.at = reel.kept.len();
            reel.forget();
            if reel.ended || matches!(reel.fault, Some(Refusal::Malformed(_))) {
                return;
            }
        }
        let mut left = most;
        while let Some(Ok(frame)) =
            poll_fn(|context| Pin::new(&mut reel.borrow_mut().source).poll_frame(context)).await
        {
            let length = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(length) else { return };
            left = rest;
        }
    }
}

const BROKEN: Refusal =
    Refusal::Malformed("the body of the request broke off or is not well formed");

/// Says whether a body broke off, or is not well formed.
fn why_broken(error: &hyper::Error) -> Gathered {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        // What hyper makes of chunks that are none.
        Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => Gathered::Broken,
        _ => Gathered::Gone,
    }
}

/// Joins short pieces that follow each other, into longer ones.
fn join(pieces: &mut VecDeque<Bytes>) {
    let mut joined = BytesMut::new();
    for piece in std::mem::take(pieces) {
        if piece.len() < JOINED_BYTES {
            joined.extend_from_slice(&piece);
            if joined.len() >= JOINED_BYTES {
                pieces.push_back(joined.split().freeze());
            }
            continue;
        }
        if !joined.is_empty() {
            pieces.push_back(joined.split().freeze());
        }
        pieces.push_back(piece);
    }
    if !joined.is_empty() {
        pieces.push_back(joined.freeze());
    }
}

impl Reel {
    fn keep(&mut self, data: &Bytes) {
        if !self.whole {
            return;
        }
        let is_full =
            self.kept_bytes + data.len() > REPLAY_MAX_BYTES || self.kept.len() >= PIECES_MAX;
        if is_full || !self.room.fits(data.len()) {
            self.forget();
            return;
        }
        self.room.take(data.len());
        self.kept_bytes += data.len();
        self.kept.push_back(data.clone());
        self.at += 1;
    }

    /// Says how much may come, in bytes; nothing if there is no use in reading on.
    fn rest(&self) -> usize {
        let is_over = self.ended || self.fault.is_some() || self.source.is_end_stream();
        if is_over || !self.whole {
            return 0;
        }
        let exact = self.source.size_hint().exact();
        exact.map_or(usize::MAX, |rest| usize::try_from(rest).unwrap_or(usize::MAX))
    }

    /// Reads on, and notes how the body ends.
    fn poll_source(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Frame<Bytes>>, UploadError>> {
        let Poll::Ready(polled) = Pin::new(&mut self.source).poll_frame(context) else {
            self.asked.get_or_insert_with(Instant::now);
            return Poll::Pending;
        };
        self.moved = Instant::now();
        self.pace.waited += self.asked.take().map_or(Duration::ZERO, |asked| self.moved - asked);
        let mut frame = match polled.transpose() {
            Ok(frame) => frame,
            Err(error) => {
                self.fault = Some(BROKEN);
                return Poll::Ready(Err(UploadError::Client(error)));
            }
        };
        let data = frame.as_ref().and_then(Frame::data_ref);
        self.pace.bytes += data.map_or(0, |data| data.len() as u64);
        if let (Some(bound), Some(data)) =
            (&mut self.bound, frame.as_ref().and_then(Frame::data_ref))
        {
            let Some(left) = bound.left.checked_sub(data.len() as u64) else {
                self.fault = Some(bound.too_long());
                return Poll::Ready(Err(UploadError::Long));
            };
            bound.left = left;
        }
        if frame.as_ref().is_none_or(Frame::is_trailers) {
            if self.mark.as_ref().is_some_and(BodyMark::is_in_doubt) {
                self.fault = Some(BROKEN);
                return Poll::Ready(Err(UploadError::Doubt));
            }
            if let Some(trailers) = frame.as_mut().and_then(Frame::trailers_mut) {
                trailers::strip(trailers);
                self.trailers = Some(trailers.clone());
            }
            self.ended = true;
        }
        Poll::Ready(Ok(frame))
    }

    /// Reads a piece that no try has asked for yet, and says how long it is.
    fn poll_gather(&mut self, context: &mut Context<'_>) -> Poll<Result<usize, Gathered>> {
        let frame = match ready!(self.poll_source(context)) {
            Ok(frame) => frame,
            Err(UploadError::Client(error)) => return Poll::Ready(Err(why_broken(&error))),
            Err(_) => return Poll::Ready(Err(Gathered::Broken)),
        };
        let Some(data) = frame.as_ref().and_then(Frame::data_ref) else {
            return Poll::Ready(Err(Gathered::Enough));
        };
        self.room.take(data.len());
        self.kept_bytes += data.len();
        self.kept.push_back(data.clone());
        if self.kept.len() > PIECES_MAX {
            // An earlier try would lose its place; it was given up.
            self.take += 1;
            self.at = 0;
            join(&mut self.kept);
        }
        Poll::Ready(Ok(data.len()))
    }

    /// Lets go of what was sent. What this try has yet to send stays until then.
    fn forget(&mut self) {
        self.whole = false;
        for data in self.kept.drain(..self.at) {
            self.kept_bytes -= data.len();
            self.room.give_back(data.len());
        }
        self.at = 0;
    }

    /// Gives the next piece that an earlier try has read already.
    fn again(&mut self) -> Option<Bytes> {
        let data = self.kept.get(self.at)?.clone();
        self.at += 1;
        if !self.whole {
            self.forget();
        }
        Some(data)
    }
}

impl Drop for Reel {
    fn drop(&mut self) {
        self.room.give_back(self.kept_bytes);
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        let this = &mut *self;
        let Some(reel) = this.reel.as_ref().filter(|_| !this.ended) else {
            return Poll::Ready(None);
        };
        let reel = &mut *reel.borrow_mut();
        if reel.take != this.take {
            return Poll::Ready(Some(Err(UploadError::GivenUp)));
        }
        let frame = if let Some(data) = reel.again() {
            Some(Frame::data(data))
        } else if reel.ended {
            reel.trailers.clone().map(Frame::trailers)
        } else {
            reel.waiting = true;
            let polled = ready!(reel.poll_source(context));
            reel.waiting = false;
            match polled {
                Ok(frame) => {
                    if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
                        reel.keep(data);
                    }
                    frame
                }
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        };
        match frame.as_ref().and_then(Frame::data_ref) {
            Some(data) => this.sent += data.len() as u64,
            None => this.ended = true,
        }
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        // With a known length the last byte is the end; the end of a chunked body shows only when it is asked for.
        let Some(reel) = &self.reel else { return true };
        self.ended || reel.borrow().length.is_some_and(|length| self.sent >= length)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.reel {
            None => SizeHint::with_exact(0),
            Some(reel) => match reel.borrow().length {
                Some(length) => SizeHint::with_exact(length.saturating_sub(self.sent)),
                None => SizeHint::default(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_measured_over_the_time_that_the_client_was_waited_for() {
        let pace = |bytes, seconds| Pace { bytes, waited: Duration::from_secs(seconds) };
        let (then, half) = (pace(1_000_000, 100), Duration::from_secs(30));
        let is_below = |now: Pace| now.is_below(256, &then, half);
        assert!(is_below(pace(1_000_060, 160)) && is_below(pace(1_015_359, 160)));
        assert!(!is_below(pace(1_015_360, 160)));
        // A task that takes nothing makes the client wait; when it does at last, the client is not to blame.
        assert!(!is_below(pace(1_000_000, 129)));
        assert!(!pace(1_000_000, 160).is_below(0, &then, half));
    }

    #[test]
    fn short_pieces_are_joined_in_their_order_and_long_ones_stay() {
        let long = Bytes::from(vec![b'l'; JOINED_BYTES]);
        let mut pieces: VecDeque<Bytes> =
            (0..JOINED_BYTES + 3).map(|n| Bytes::from(vec![n as u8])).collect();
        pieces.push_back(long.clone());
        pieces.push_back(Bytes::from_static(b"end"));
        let whole: Vec<u8> = pieces.iter().flatten().copied().collect();
        join(&mut pieces);
        let lengths: Vec<usize> = pieces.iter().map(Bytes::len).collect();
        assert_eq!(lengths, [JOINED_BYTES, 3, JOINED_BYTES, 3]);
        assert_eq!(pieces[2].as_ptr(), long.as_ptr(), "it is not copied");
        assert!(pieces.iter().flatten().eq(&whole));
    }
}

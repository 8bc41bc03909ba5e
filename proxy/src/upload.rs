//! A request's body on its way to a task, kept while it is short so that it can be sent again to another one.
//!
//! A `Tape` belongs to the request, an `Upload` to one try. A try that was given up may still be asked for frames by a
//! connection that is about to end: it gets an error, never a frame that the next try is waiting for.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::metrics::{Count, Counters};
use crate::refusal::Refusal;
use crate::trailers;
use crate::wire::BodyMark;

/// The longest body that is kept, in bytes: most writes of a cache or a shop fit, and a slower client's does not pile up.
pub(crate) const REPLAY_MAX_BYTES: usize = 64 << 10;

/// The most pieces that are kept, so that a body of single bytes does not cost more to list than to keep.
const PIECES_MAX: usize = 1024;

/// More than comes in one piece: hyper's buffer is twice the longest head.
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
    /// The body has ended, or there is no room for more.
    Enough,
    /// The client has left.
    Gone,
    /// What it sends is no body, or too long a one.
    Broken,
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
    // Why there will be no more of it, if its end was not the reason.
    fault: Option<Refusal>,
    // There for a body that does not say how long it is.
    bound: Option<Bound>,
    // What all requests of this worker may still keep.
    room: Rc<Cell<usize>>,
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
    pub(crate) fn new(source: Incoming, room: &Rc<Cell<usize>>, mark: Option<BodyMark>) -> Self {
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

    /// Says whether the client is the one to send next.
    pub(crate) fn is_waiting(&self) -> bool {
        self.reel.as_ref().is_some_and(|reel| reel.borrow().waiting)
    }

    /// Says how much of the body is kept, in bytes.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.reel.as_ref().map_or(0, |reel| reel.borrow().kept_bytes)
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
            if room < next {
                if !reserve(next - room) {
                    return Gathered::Enough;
                }
                room = next;
            }
            let gathered = poll_fn(|context| reel.borrow_mut().poll_gather(context)).await;
            match gathered {
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

impl Reel {
    fn keep(&mut self, data: &Bytes) {
        if !self.whole {
            return;
        }
        let room = self.room.get();
        let is_full =
            self.kept_bytes + data.len() > REPLAY_MAX_BYTES || self.kept.len() == PIECES_MAX;
        if is_full || data.len() > room {
            self.forget();
            return;
        }
        self.room.set(room - data.len());
        self.kept_bytes += data.len();
        self.kept.push_back(data.clone());
        self.at += 1;
    }

    /// Says how much may come that can be kept, in bytes; nothing if there is no use in reading on.
    fn rest(&self) -> usize {
        let is_over = self.ended || self.fault.is_some() || self.source.is_end_stream();
        let no_room = self.kept.len() >= PIECES_MAX || self.room.get() < PIECE_MAX_BYTES;
        if is_over || no_room || !self.whole {
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
        let polled = ready!(Pin::new(&mut self.source).poll_frame(context));
        self.moved = Instant::now();
        let mut frame = match polled.transpose() {
            Ok(frame) => frame,
            Err(error) => {
                self.fault = Some(BROKEN);
                return Poll::Ready(Err(UploadError::Client(error)));
            }
        };
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
        self.room.set(self.room.get().saturating_sub(data.len()));
        self.kept_bytes += data.len();
        self.kept.push_back(data.clone());
        Poll::Ready(Ok(data.len()))
    }

    /// Lets go of what was sent. What this try has yet to send stays until then.
    fn forget(&mut self) {
        self.whole = false;
        for data in self.kept.drain(..self.at) {
            self.kept_bytes -= data.len();
            self.room.set(self.room.get() + data.len());
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
        self.room.set(self.room.get() + self.kept_bytes);
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

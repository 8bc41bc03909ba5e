//! A request's body that can be sent again: what was sent is kept, as long as it is little.
//!
//! A request that a task did not take is sent to another, and its body with it. The first sending streams; what it has read so far is
//! kept up to a bound, and a second sending begins with that and streams on. Past the bound nothing is kept, and the body can
//! be sent but once.

use std::error::Error;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::HeaderMap;
use http_body::{Body, Frame, SizeHint};

/// Any error.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What is kept of a body at most.
const KEPT_MAX_BYTES: usize = 64 * 1024;

/// Someone else sends the body by now.
#[derive(Debug, thiserror::Error)]
#[error("the request is being sent to another task")]
struct Superseded;

/// A body, and what was read of it.
pub(crate) struct Reel<B>(Arc<Mutex<Inner<B>>>);

/// One sending of it. Ends with an error when another begins.
pub struct Replay<B> {
    inner: Arc<Mutex<Inner<B>>>,
    sending: u64,
    at: usize,
}

struct Inner<B> {
    source: Pin<Box<B>>,
    kept: Vec<Kept>,
    bytes: usize,
    /// Whether all that was read is in `kept`.
    is_whole: bool,
    /// Whether it may have to be sent again.
    keeps: bool,
    has_ended: bool,
    sending: u64,
}

enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl<B> Reel<B> {
    /// Takes a body.
    pub(crate) fn new(body: B) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            source: Box::pin(body),
            kept: Vec::new(),
            bytes: 0,
            is_whole: true,
            keeps: true,
            has_ended: false,
            sending: 0,
        })))
    }

    /// Begins to send it, from its beginning if that is at hand.
    pub(crate) fn play(&self) -> Replay<B> {
        let mut inner = lock(&self.0);
        inner.sending += 1;
        Replay { inner: Arc::clone(&self.0), sending: inner.sending, at: 0 }
    }

    /// Ends the sending under way if another can begin, and says whether it can: both at once, or the one under way might read past
    /// what is kept before the other begins, which would begin in the middle.
    pub(crate) fn rewind(&self) -> bool {
        let mut inner = lock(&self.0);
        inner.sending += u64::from(inner.is_whole);
        inner.is_whole
    }
}

/// Whoever had it sent has an answer: nothing is kept any more.
impl<B> Drop for Reel<B> {
    fn drop(&mut self) {
        lock(&self.0).keeps = false;
    }
}

fn lock<B>(inner: &Mutex<Inner<B>>) -> MutexGuard<'_, Inner<B>> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Body<Data = Bytes>> Inner<B> {
    /// Reads on, and keeps what is read.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let frame = match ready!(self.source.as_mut().poll_frame(cx)) {
            None => {
                self.has_ended = true;
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                self.is_whole = false;
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => frame,
        };
        self.keep(&frame);
        Poll::Ready(Some(Ok(frame)))
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        let length = frame.data_ref().map_or(0, Bytes::len);
        if frame.is_data() && length == 0 {
            // Says nothing, and any number of them would fit.
            return;
        }
        if !(self.keeps && self.is_whole && self.bytes + length <= KEPT_MAX_BYTES) {
            self.is_whole = false;
            return;
        }
        self.bytes += length;
        if let Some(data) = frame.data_ref() {
            self.kept.push(Kept::Data(data.clone()));
        } else if let Some(trailers) = frame.trailers_ref() {
            self.kept.push(Kept::Trailers(trailers.clone()));
        }
    }
}

impl<B> Body for Replay<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let at = self.at;
        let mut inner = lock(&self.inner);
        if inner.sending != self.sending {
            return Poll::Ready(Some(Err(Superseded.into())));
        }
        let frame = match inner.kept.get(at) {
            Some(Kept::Data(data)) => Frame::data(data.clone()),
            Some(Kept::Trailers(trailers)) => Frame::trailers(trailers.clone()),
            None => {
                if !inner.is_whole {
                    // Nobody will ask for it again.
                    inner.kept = Vec::new();
                }
                let read = ready!(inner.poll_next(cx));
                let place = inner.kept.len();
                drop(inner);
                self.at = place;
                return Poll::Ready(read.map(|frame| frame.map_err(Into::into)));
            }
        };
        drop(inner);
        self.at += 1;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        let inner = lock(&self.inner);
        let ends = inner.has_ended || inner.source.is_end_stream();
        ends && self.at >= inner.kept.len()
    }

    fn size_hint(&self) -> SizeHint {
        let inner = lock(&self.inner);
        let ahead = inner.kept.get(self.at..).unwrap_or_default();
        let ahead = ahead.iter().map(|kept| match kept {
            Kept::Data(data) => data.len() as u64,
            Kept::Trailers(_) => 0,
        });
        let ahead: u64 = ahead.sum();
        let rest = if inner.has_ended { SizeHint::with_exact(0) } else { inner.source.size_hint() };
        let mut hint = SizeHint::new();
        hint.set_lower(ahead + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(ahead + upper);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http_body_util::{BodyExt, Full, StreamBody};

    use super::*;

    type Frames = Vec<Result<Frame<Bytes>, Infallible>>;

    fn body(parts: usize, bytes: usize) -> impl Body<Data = Bytes, Error = Infallible> {
        let part = |n: usize| Ok(Frame::data(Bytes::from(vec![n as u8; bytes])));
        let mut frames: Frames = (0..parts).map(part).collect();
        let trailers = HeaderMap::from_iter([(http::header::ETAG, "x".parse().unwrap())]);
        frames.push(Ok(Frame::trailers(trailers)));
        StreamBody::new(stream::iter(frames))
    }

    async fn read(replay: Replay<impl Body<Data = Bytes, Error = Infallible>>) -> (usize, bool) {
        let all = replay.collect().await.unwrap();
        let trailers = all.trailers().is_some_and(|trailers| trailers.contains_key("etag"));
        (all.to_bytes().len(), trailers)
    }

    #[tokio::test]
    async fn a_small_body_is_sent_again_from_its_beginning() {
        let reel = Reel::new(body(10, 100));
        let mut first = reel.play();
        for _ in 0..3 {
            first.frame().await.unwrap().unwrap();
        }
        assert!(reel.rewind());
        assert_eq!(read(reel.play()).await, (1_000, true));
        assert!(first.frame().await.unwrap().is_err(), "another sending has begun");
        assert_eq!(read(reel.play()).await, (1_000, true), "and again");
    }

    #[tokio::test]
    async fn a_large_body_streams_once_and_is_not_kept() {
        let reel = Reel::new(body(100, 1_000));
        let mut first = reel.play();
        let mut bytes = 0;
        while let Some(frame) = first.frame().await {
            bytes += frame.unwrap().data_ref().map_or(0, Bytes::len);
            assert!(lock(&reel.0).bytes <= KEPT_MAX_BYTES);
        }
        assert_eq!((bytes, reel.rewind()), (100_000, false));
        assert!(lock(&reel.0).kept.is_empty());
    }

    #[tokio::test]
    async fn a_sending_that_was_refused_reads_no_further() {
        let reel = Reel::new(body(100, 1_000));
        let mut first = reel.play();
        first.frame().await.unwrap().unwrap();
        assert!(reel.rewind());
        // The refused task's connection would read on while the caller waits for the next owner.
        while first.frame().await.is_some_and(|frame| frame.is_ok()) {}
        assert_eq!(read(reel.play()).await, (100_000, true), "all of it, not what was left");
    }

    #[tokio::test]
    async fn empty_frames_are_not_kept() {
        let reel = Reel::new(body(1_000, 0));
        let mut first = reel.play();
        while first.frame().await.is_some() {}
        assert_eq!(lock(&reel.0).kept.len(), 1, "the trailers");
    }

    #[tokio::test]
    async fn what_is_left_is_known_at_each_point() {
        let reel = Reel::new(Full::new(Bytes::from_static(b"hello")));
        let replay = reel.play();
        assert_eq!((replay.size_hint().exact(), replay.is_end_stream()), (Some(5), false));
        assert_eq!(replay.collect().await.unwrap().to_bytes(), "hello");
        let again = reel.play();
        assert_eq!((again.size_hint().exact(), again.is_end_stream()), (Some(5), false));
        assert!(Reel::new(Full::<Bytes>::default()).play().is_end_stream());
    }
}

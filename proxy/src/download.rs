//! A response's body on its way to the client: the proxy's own few words, or a task's stream with the connection it comes
//! on, which is kept for the next request once the stream has been read to the end.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::observe::Exchange;
use crate::pool::upstream::Checkout;
use crate::record::Outcome;
use crate::trailers;
use crate::wire::Abort;
use crate::worker::Worker;

/// The body of an answer.
pub(crate) enum Download {
    /// The proxy's own words.
    Own(Option<Bytes>),
    /// A task's stream.
    Task(Box<Stream>),
}

/// A task's stream, the connection it comes on, and the exchange that it ends.
pub(crate) struct Stream {
    source: Incoming,
    checkout: Option<Checkout>,
    worker: Rc<Worker>,
    exchange: Exchange,
    outcome: Outcome,
    abort: Option<Abort>,
    stall: Option<Pin<Box<Sleep>>>,
    // Whether something has come since the timer was set.
    moved: bool,
}

impl Stream {
    pub(crate) fn new(
        source: Incoming,
        checkout: Checkout,
        worker: Rc<Worker>,
        exchange: Exchange,
        outcome: Outcome,
        abort: Option<Abort>,
    ) -> Self {
        let mut stream = Self {
            source,
            checkout: Some(checkout),
            worker,
            exchange,
            outcome,
            abort,
            stall: None,
            moved: false,
        };
        if stream.source.is_end_stream() {
            stream.finish();
        }
        stream
    }

    fn finish(&mut self) {
        self.exchange.ends(self.outcome);
        if let Some(mut checkout) = self.checkout.take() {
            checkout.broke();
            self.worker.pool.give_back(checkout);
        }
    }
}

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DownloadError {
    /// The task broke off.
    #[error("the task's answer broke off")]
    Task(#[source] hyper::Error),
    /// The task fell silent.
    #[error("the task's answer stopped coming")]
    Stalled,
}

impl Stream {
    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, DownloadError>>> {
        let mut frame = match Pin::new(&mut self.source).poll_frame(context) {
            Poll::Ready(frame) => frame.map(|frame| frame.map_err(DownloadError::Task)),
            Poll::Pending => {
                ready!(self.poll_stall(context));
                Some(Err(DownloadError::Stalled))
            }
        };
        self.moved = true;
        if let Some(Ok(frame)) = &mut frame {
            if let Some(trailers) = frame.trailers_mut() {
                trailers::strip(trailers);
                if let Some(checkout) = &mut self.checkout {
                    checkout.hears(trailers);
                }
            }
            self.exchange.hands_on(frame.data_ref().map_or(0, Bytes::len) as u64);
        }
        match &frame {
            // The client sees its connection break too: an answer must not seem whole when it is not.
            Some(Err(_)) => {
                self.exchange.ends(Outcome::Failed);
                if let Some(mut checkout) = self.checkout.take() {
                    checkout.broke();
                }
                if let Some(abort) = &self.abort {
                    abort.abort();
                }
            }
            Some(Ok(_)) if !self.source.is_end_stream() => {}
            _ => self.finish(),
        }
        Poll::Ready(frame)
    }

    /// Is ready when nothing has come for too long. The timer is set when the first piece has to be waited for, and again
    /// only when it has run out, so that a piece costs no more than a flag.
    fn poll_stall(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let limit = self.worker.setup().config.timeouts.stall;
        let until = self.checkout.as_ref().and_then(|checkout| checkout.until);
        let next = || {
            let stalled = Instant::now() + limit;
            until.map_or(stalled, |until| until.min(stalled))
        };
        let stall = self.stall.get_or_insert_with(|| {
            self.moved = false;
            Box::pin(sleep_until(next()))
        });
        loop {
            ready!(stall.as_mut().poll(context));
            let is_over = until.is_some_and(|until| until <= Instant::now());
            if !std::mem::take(&mut self.moved) || is_over {
                return Poll::Ready(());
            }
            stall.as_mut().reset(next());
        }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = DownloadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, DownloadError>>> {
        match &mut *self {
            Self::Own(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Task(stream) => stream.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(text) => text.is_none(),
            Self::Task(stream) => stream.source.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(text) => {
                SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64))
            }
            Self::Task(stream) => stream.source.size_hint(),
        }
    }
}

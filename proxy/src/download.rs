//! A response's body on its way to the client: the proxy's own few words, or a task's stream with the connection it comes
//! on, which is kept for the next request once the stream has been read to the end.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::exchange::Exchange;
use crate::pool::Lease;
use crate::record::Outcome;
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
    lease: Option<Lease>,
    worker: Rc<Worker>,
    exchange: Exchange,
    outcome: Outcome,
    abort: Option<Abort>,
}

impl Stream {
    pub(crate) fn new(
        source: Incoming,
        lease: Lease,
        worker: Rc<Worker>,
        exchange: Exchange,
        outcome: Outcome,
        abort: Option<Abort>,
    ) -> Self {
        let mut stream = Self { source, lease: Some(lease), worker, exchange, outcome, abort };
        if stream.source.is_end_stream() {
            stream.finish();
        }
        stream
    }

    fn finish(&mut self) {
        self.exchange.ends(self.outcome);
        if let Some(lease) = self.lease.take() {
            self.worker.pool.give_back(lease);
        }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut *self {
            Self::Own(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Task(stream) => {
                let frame = ready!(Pin::new(&mut stream.source).poll_frame(context));
                match &frame {
                    // The client sees its connection break too: an answer must not seem whole when it is not.
                    Some(Err(_)) => {
                        stream.exchange.ends(Outcome::Failed);
                        stream.lease = None;
                        if let Some(abort) = &stream.abort {
                            abort.abort();
                        }
                    }
                    Some(Ok(_)) if stream.source.is_end_stream() => stream.finish(),
                    Some(Ok(_)) => {}
                    None => stream.finish(),
                }
                Poll::Ready(frame)
            }
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

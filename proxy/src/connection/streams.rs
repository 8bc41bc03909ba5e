//! The requests of one connection of HTTP/2 while they are served: how many there are, since when, and whether each gets on.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::{Instant, sleep_until};

use crate::connection::usher::Usher;

/// The requests of one connection, each a task of its own.
#[derive(Clone)]
pub(crate) struct Streams(Rc<Load>);

struct Load {
    open: Cell<usize>,
    // When one last began or ended.
    since: Cell<Instant>,
    patience: Duration,
    usher: Rc<Usher>,
}

impl Streams {
    /// None yet. One that makes no progress for longer than `patience` is reset.
    pub(crate) fn new(patience: Duration) -> Self {
        let now = Instant::now();
        let usher = Usher::new(now);
        Self(Rc::new(Load { open: Cell::new(0), since: Cell::new(now), patience, usher }))
    }

    /// Waits until there has been no request for so long.
    pub(crate) async fn idle(&self, limit: Duration) {
        let Load { open, since, .. } = &*self.0;
        loop {
            let at = since.get() + limit;
            sleep_until(at.max(Instant::now() + limit / 8)).await;
            if open.get() == 0 && since.get() + limit <= Instant::now() {
                return;
            }
        }
    }
}

/// A request that has begun and not ended.
struct Open(Rc<Load>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.since.set(Instant::now());
    }
}

impl<F: Future + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let load = &self.0;
        load.open.set(load.open.get() + 1);
        let now = Instant::now();
        load.since.set(now);
        let open = Open(Rc::clone(load));
        // In a box of its own: a future that is awaited is kept twice, as an argument and as what is awaited.
        let stream = Box::pin(stream);
        let served = async move {
            patiently(stream, open.0.patience).await;
            drop(open);
        };
        load.usher.admit(now, served);
    }
}

/// Goes on with a stream as long as anything happens to it at least so often. Dropping it resets it.
async fn patiently(mut stream: Pin<Box<impl Future>>, limit: Duration) {
    let mut moved = Instant::now();
    let mut given_up = pin!(sleep_until(moved + limit));
    poll_fn(|context| {
        if stream.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        let now = Instant::now();
        while given_up.as_mut().poll(context).is_ready() {
            if moved + limit <= now {
                return Poll::Ready(());
            }
            given_up.as_mut().reset(moved + limit);
        }
        moved = now;
        Poll::Pending
    })
    .await;
}

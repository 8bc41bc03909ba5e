//! Requests that are held while the slice of their key is on its way to another task.
//!
//! For some milliseconds in a hand-off nobody serves an exclusive slice. A request that meets it then had no effect, so it waits
//! here instead of failing, until an assignment newer than the one that the old owner judged by shows the slice settled. Then it
//! goes on to whoever has the slice by that assignment: for each key in the order of arrival, and a batch at a time, so that the
//! new owner is not buried under all that came meanwhile. What wakes the queue is the assignment; nobody asks again and again.
//!
//! The queue is bounded in number and bytes, and each request in time; past a bound it is answered 503. A request whose client
//! leaves is forgotten at once: hyper drops it where the body has been read to its end, and `Line` tells where it has not.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use mandoline::clerk::is_settled;
use mandoline::{Assignment, Clerk};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::Config;
use crate::metrics::{Count, Counters};
use crate::refusal::Refusal;
use crate::router::Router;
use crate::upload::Tape;
use crate::wire::Line;

/// How many are let go at once, and the pause after so many. Moves that hold fewer cost no pause; a full queue of 10,000 takes a
/// third of a second, in which a task can accept the connections that it takes.
const BATCH: usize = 32;
const BATCH_PAUSE: Duration = Duration::from_millis(1);

/// One worker's requests that are held.
pub(crate) struct Hold {
    clerk: Clerk,
    requests_max: usize,
    bytes_max: usize,
    wait_max: Duration,
    queue: RefCell<Queue>,
    joined: Notify,
    retired: Cell<bool>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Queue {
    // By key, and for each key in the order of arrival.
    waiting: BTreeMap<Place, Waiting>,
    arrivals: u64,
    bytes: usize,
}

type Place = (SliceKey, u64);

struct Waiting {
    // It waits for something newer.
    told: Generation,
    bytes: usize,
    go: oneshot::Sender<()>,
}

/// A request as far as holding it is concerned. Whatever it meets, it is held for so long in all.
pub(crate) struct Held<'a> {
    hold: &'a Hold,
    key: SliceKey,
    tape: &'a Tape,
    line: &'a Line,
    until: &'a mut Option<Instant>,
}

/// A request's stay in the queue. However it ends, it is counted once.
struct Stay<'a> {
    hold: &'a Hold,
    place: Place,
    since: Instant,
    go: oneshot::Receiver<()>,
    ended: Count,
}

impl Hold {
    /// Makes the queue of one worker of several, with its share of the bounds.
    pub(crate) fn new(config: &Config, router: &Router, counters: Arc<Counters>) -> Self {
        let workers = config.workers.get();
        Self {
            clerk: router.clerk().clone(),
            requests_max: config.limits.held_requests.div_ceil(workers),
            bytes_max: config.limits.held_bytes.div_ceil(workers),
            wait_max: config.timeouts.hold,
            queue: RefCell::default(),
            joined: Notify::new(),
            retired: Cell::new(false),
            counters,
        }
    }

    /// Takes no more requests: once those that are held have gone, nobody looks after the queue any more.
    pub(crate) fn retire(&self) {
        self.retired.set(true);
        self.joined.notify_one();
    }

    /// Lets requests go on when their slices have settled, until it is retired.
    pub(crate) async fn release(&self) {
        let mut changes = self.clerk.changes();
        let mut has_news = true;
        loop {
            let newest = changes.borrow_and_update().clone();
            if newest.is_some_and(|newest| self.release_some(&newest)) {
                sleep(BATCH_PAUSE).await;
                continue;
            }
            // A request that began before may still come.
            if self.retired.get() && self.queue.borrow().waiting.is_empty() {
                return;
            }
            tokio::select! {
                // With the clerk's thread gone nothing changes any more.
                changed = changes.changed(), if has_news => has_news = changed.is_ok(),
                () = self.joined.notified() => {}
            }
        }
    }

    /// Lets a batch go, and says whether there are more to let go.
    fn release_some(&self, newest: &Assignment) -> bool {
        let mut queue = self.queue.borrow_mut();
        let settled = queue
            .waiting
            .iter()
            .filter(|((key, _), waiting)| is_settled(newest, *key, waiting.told));
        let places: Vec<Place> = settled.map(|(place, _)| *place).take(BATCH + 1).collect();
        for place in places.iter().take(BATCH) {
            if let Some(waiting) = queue.leave(*place) {
                // Whoever left meanwhile does not hear it.
                let _: Result<(), ()> = waiting.go.send(());
            }
        }
        self.counters.holds_bytes(queue.bytes);
        places.len() > BATCH
    }

    /// Takes a request in, if there is room.
    fn enter(&self, key: SliceKey, told: Generation, bytes: usize) -> Option<Stay<'_>> {
        let mut queue = self.queue.borrow_mut();
        if queue.waiting.len() >= self.requests_max || queue.bytes + bytes > self.bytes_max {
            self.counters.count(Count::HoldsRefused);
            return None;
        }
        queue.arrivals += 1;
        queue.bytes += bytes;
        let place = (key, queue.arrivals);
        let (tell, go) = oneshot::channel();
        queue.waiting.insert(place, Waiting { told, bytes, go: tell });
        self.counters.count(Count::Holds);
        self.counters.holds_bytes(queue.bytes);
        self.joined.notify_one();
        Some(Stay { hold: self, place, since: Instant::now(), go, ended: Count::HoldsLeft })
    }
}

impl Queue {
    fn leave(&mut self, place: Place) -> Option<Waiting> {
        let waiting = self.waiting.remove(&place)?;
        self.bytes -= waiting.bytes;
        Some(waiting)
    }

    /// Gives what the last in the line for a key waits for.
    fn last(&self, key: SliceKey) -> Option<Generation> {
        let line = self.waiting.range((key, 0)..=(key, u64::MAX));
        line.last().map(|(_, waiting)| waiting.told)
    }
}

impl<'a> Held<'a> {
    pub(crate) const fn new(
        hold: &'a Hold,
        key: SliceKey,
        tape: &'a Tape,
        line: &'a Line,
        until: &'a mut Option<Instant>,
    ) -> Self {
        Self { hold, key, tape, line, until }
    }

    /// Lets a request pass unless others with its key are held: then it waits behind them. Says whether it did.
    pub(crate) async fn in_turn(&mut self, head: &Parts) -> Result<bool, Refusal> {
        let behind = self.hold.queue.borrow().last(self.key);
        let Some(told) = behind else { return Ok(false) };
        self.settled(told, head).await?;
        Ok(true)
    }

    /// Holds the request until there is an assignment newer than `told` by which the slice of its key has settled.
    pub(crate) async fn settled(&mut self, told: Generation, head: &Parts) -> Result<(), Refusal> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + self.hold.wait_max);
        let bytes = head_bytes(head) + self.tape.kept_bytes();
        let Some(mut stay) = self.hold.enter(self.key, told, bytes) else {
            return Err(Refusal::HeldFull);
        };
        // What the task goes by exists, so the clerk's source should have it soon.
        self.hold.clerk.refresh(told);
        tokio::select! {
            biased;
            // The sender is gone only when the queue is, with the worker.
            _ = &mut stay.go => {
                stay.ended = Count::HoldsReleased;
                Ok(())
            }
            () = self.left() => Err(Refusal::Left),
            () = sleep_until(until) => {
                stay.ended = Count::HoldsLate;
                Err(Refusal::HeldLong)
            }
        }
    }

    /// Waits until the client has left, where hyper does not notice.
    async fn left(&self) {
        if self.tape.is_coming() {
            self.line.hung_up().await;
        } else {
            pending::<()>().await;
        }
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        let mut queue = self.hold.queue.borrow_mut();
        if queue.leave(self.place).is_some() {
            self.hold.counters.holds_bytes(queue.bytes);
        }
        self.hold.counters.hold_ended(self.ended, self.since.elapsed());
    }
}

/// What a head takes, roughly: its texts, and its entries in the maps.
fn head_bytes(head: &Parts) -> usize {
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    let lines = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    target + lines.sum::<usize>() + head.headers.len() * HEADER_ENTRY_BYTES
}

/// An entry of `http`'s header map, and its place in the index.
const HEADER_ENTRY_BYTES: usize = 112;

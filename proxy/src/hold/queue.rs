//! A line of one worker with what bounds it and what wakes whoever lets it go; and a request's stay in it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use mandoline_core::key::SliceKey;
use mandoline_core::ramp::Ramp;
use mandoline_core::time::Time;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::hold::book::{Account, Book, End};
use crate::hold::line::{Line, Turn};
use crate::hold::room::Full;
use crate::metrics::counters::Counters;
use crate::metrics::names::Count;

/// What all lines of one worker share.
pub(crate) struct House {
    pub(crate) book: Arc<Book>,
    pub(crate) counters: Arc<Counters>,
    /// Which worker it is.
    pub(crate) worker: usize,
    origin: Instant,
    arrivals: Cell<u64>,
}

/// A line of one worker, and those who are not in it for want of room.
pub(crate) struct Queue<F> {
    house: Rc<House>,
    // The pause that holds them, if one does.
    account: Option<Arc<Account>>,
    line: RefCell<Line<F>>,
    // Wakes whoever lets them go.
    stirred: Rc<Notify>,
}

/// A request's stay in a line. However it ends, it is counted once.
pub(crate) struct Stay<'a, F> {
    queue: &'a Queue<F>,
    arrival: u64,
    bytes: Cell<usize>,
    since: Instant,
    /// How it ends.
    pub(crate) end: End,
}

impl House {
    pub(crate) fn new(book: Arc<Book>, counters: Arc<Counters>) -> Self {
        let worker = book.enlist();
        Self { book, counters, worker, origin: Instant::now(), arrivals: Cell::new(0) }
    }

    /// Gives the time as ramps count it.
    pub(crate) fn time(&self, now: Instant) -> Time {
        Time::ZERO + now.saturating_duration_since(self.origin)
    }

    /// Gives the moment of such a time; nothing if no clock reaches it.
    pub(crate) fn instant(&self, time: Time) -> Option<Instant> {
        self.origin.checked_add(time.since(Time::ZERO))
    }

    fn arrives(&self) -> u64 {
        self.arrivals.set(self.arrivals.get() + 1);
        self.arrivals.get()
    }
}

impl<F> Queue<F> {
    pub(crate) fn new(
        house: Rc<House>,
        account: Option<Arc<Account>>,
        stirred: Rc<Notify>,
    ) -> Self {
        let line = RefCell::new(Line::new(Ramp::fastest(Time::ZERO)));
        Self { house, account, line, stirred }
    }

    /// Takes a request in, if there is room: at the place of its arrival if it has waited before, or else at the end. What comes with
    /// its stay says what becomes of it, when it is its turn.
    pub(crate) fn enter(
        &self,
        place: &mut Option<u64>,
        bytes: usize,
        join: impl FnOnce(&mut Line<F>, u64) -> oneshot::Receiver<Turn>,
    ) -> Result<(Stay<'_, F>, oneshot::Receiver<Turn>), Full> {
        self.admit(bytes).inspect_err(|_| {
            self.house.counters.count(Count::HoldsRefused);
            if let Some(account) = &self.account {
                account.refuses();
            }
        })?;
        let arrival = *place.get_or_insert_with(|| self.house.arrives());
        let turn = join(&mut self.line.borrow_mut(), arrival);
        self.house.counters.count(Count::Holds);
        self.stirred.notify_one();
        let (bytes, since) = (Cell::new(bytes), Instant::now());
        Ok((Stay { queue: self, arrival, bytes, since, end: End::Left }, turn))
    }

    fn admit(&self, bytes: usize) -> Result<(), Full> {
        let room = &self.house.book.room;
        room.enter(bytes)?;
        match &self.account {
            None => Ok(()),
            Some(account) => account.enter(bytes).inspect_err(|_| room.leave(bytes)),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.line.borrow().is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.line.borrow().len()
    }

    /// Changes the pace.
    pub(crate) fn goes_by(&self, ramp: Ramp) {
        self.line.borrow_mut().goes_by(ramp);
    }

    /// Tells those whose turn it is, of those for whom all is ready. Says when to look in next, if more of them wait.
    pub(crate) fn let_go(
        &self,
        now: Instant,
        turn: Turn,
        is_ready: impl Fn(SliceKey, &F) -> bool,
    ) -> Option<Instant> {
        let due = self.line.borrow_mut().let_go(self.house.time(now), turn, is_ready);
        due.and_then(|due| self.house.instant(due))
    }
}

impl<F: Copy> Queue<F> {
    /// Gives what the last with this key waits for.
    pub(crate) fn last(&self, key: SliceKey) -> Option<F> {
        self.line.borrow().last(key).copied()
    }
}

impl<F> Stay<'_, F> {
    /// Takes in more of the request, if there is room.
    pub(crate) fn grow(&self, more: usize) -> bool {
        let room = &self.queue.house.book.room;
        if !room.grow(more) {
            return false;
        }
        if self.queue.account.as_ref().is_some_and(|account| !account.grow(more)) {
            room.shrink(more);
            return false;
        }
        self.bytes.set(self.bytes.get() + more);
        true
    }
}

impl<F> Drop for Stay<'_, F> {
    fn drop(&mut self) {
        let (queue, bytes) = (self.queue, self.bytes.get());
        queue.line.borrow_mut().leave(self.arrival);
        if queue.is_empty() {
            // Nobody has to look after it any more.
            queue.stirred.notify_one();
        }
        queue.house.book.room.leave(bytes);
        if let Some(account) = &queue.account {
            account.leave(bytes, self.end);
        }
        let end = match self.end {
            End::Released => Count::HoldsReleased,
            End::Failed => Count::HoldsFailed,
            End::Late => Count::HoldsLate,
            End::Left => Count::HoldsLeft,
        };
        queue.house.counters.hold_ended(end, self.since.elapsed());
    }
}

//! The pauses that one worker goes by, and the one loop that ends them.
//!
//! A pause is a gate: it is closed from when the worker hears of it until its end, then open but for those who wait at it, and
//! gone with the last of them. News of pauses, the end of one and the next moment of a ramp wake the loop; nobody asks again
//! and again.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::flags::{AtEnd, Flags, Pause, PauseId, Phase};
use mandoline_core::generation::Generation;
use mandoline_core::ramp::Ramp;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info};

use crate::hold::book::{Account, Release};
use crate::hold::ends::Ends;
use crate::hold::flights::{Facts, Flights};
use crate::hold::line::Turn;
use crate::hold::queue::{House, Queue};

/// The pauses that one worker goes by.
pub(crate) struct Gates {
    house: Rc<House>,
    /// The requests that are past all of them.
    pub(crate) flights: Flights,
    /// Those that are over.
    pub(crate) ends: Ends,
    flags: RefCell<watch::Receiver<Arc<Flags>>>,
    gates: RefCell<Vec<Rc<Gate>>>,
    // Whether there is any: what nearly every request asks, and no more.
    is_any: Cell<bool>,
    stirred: Rc<Notify>,
    // When the proxy stops: whoever is held then is told so.
    stops_at: Cell<Option<Instant>>,
}

/// A pause that a worker goes by, until the last whom it held has gone.
pub(crate) struct Gate {
    pub(crate) account: Arc<Account>,
    /// Those whom it holds.
    pub(crate) queue: Queue<()>,
    // What was last told of it, and by which version of the flags.
    phase: Cell<Phase>,
    told_by: Cell<Generation>,
    // How those go whom it holds, once it is open.
    release: Cell<Option<Release>>,
}

impl Gates {
    pub(crate) fn new(house: Rc<House>, flags: watch::Receiver<Arc<Flags>>) -> Self {
        Self {
            house,
            flights: Flights::default(),
            ends: Ends::default(),
            flags: RefCell::new(flags),
            gates: RefCell::default(),
            is_any: Cell::new(false),
            stirred: Rc::new(Notify::new()),
            stops_at: Cell::new(None),
        }
    }

    /// Goes by what is told there from now on.
    pub(crate) fn follow(&self, flags: watch::Receiver<Arc<Flags>>) {
        let is_same = self.flags.borrow().same_channel(&flags);
        if !is_same {
            *self.flags.borrow_mut() = flags;
            self.stirred.notify_one();
        }
    }

    /// Refuses those who are held then, for the proxy is about to stop.
    pub(crate) fn stop_at(&self, then: Instant) {
        self.stops_at.set(Some(then));
        self.stirred.notify_one();
    }

    /// Begins and ends pauses as it is told, and ends them by the clock, for as long as the worker lives.
    pub(crate) async fn run(&self) {
        let mut flags = self.flags.borrow().clone();
        let (mut has_news, mut is_told) = (true, true);
        loop {
            if std::mem::take(&mut is_told) {
                let told = Arc::clone(&flags.borrow_and_update());
                self.heed(&told);
            }
            let due = self.turn(Instant::now());
            tokio::select! {
                // With nobody left to tell of pauses, those that are known end by the clock.
                changed = flags.changed(), if has_news => {
                    has_news = changed.is_ok();
                    is_told = has_news;
                }
                () = self.stirred.notified() => {}
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            let newest = self.flags.borrow();
            if !newest.same_channel(&flags) {
                flags = newest.clone();
                (has_news, is_told) = (true, true);
            }
        }
    }

    /// Closes gates for pauses that are new, and opens those of pauses that were ended.
    fn heed(&self, flags: &Flags) {
        let mut gates = self.gates.borrow_mut();
        for pause in flags.pauses.values() {
            let account = self.house.book.told(pause);
            match gates.iter().find(|gate| gate.account.id == pause.id) {
                Some(gate) => gate.is_told(pause.phase, flags.version),
                None => match account.ended(Instant::now()) {
                    // What has ended here does not begin anew, whoever still tells of it.
                    Some(release) => {
                        self.ends.note(pause.id, &pause.order.scope, release.began);
                    }
                    None => gates.push(Rc::new(self.close(account, pause, flags.version))),
                },
            }
        }
        // Whoever is asked since a reload may have heard nothing yet, or lag behind whoever was asked before: a pause has not ended
        // because it is missing in what was said before it was told of.
        let is_missing = |gate: &&Rc<Gate>| {
            !flags.pauses.contains_key(&gate.account.id) && flags.version > gate.told_by.get()
        };
        for gate in gates.iter().filter(is_missing) {
            match gate.phase.get() {
                // It has lasted by the leader's clock.
                Phase::Holding => {
                    gate.account.lapse();
                }
                // So has its release.
                Phase::Releasing { .. } => {
                    let now = self.house.time(Instant::now());
                    gate.queue.goes_by(Ramp::fastest(now));
                }
            }
        }
        self.is_any.set(!gates.is_empty());
        let House { book, worker, .. } = &*self.house;
        book.tidy(flags);
        book.goes_by(*worker, flags.version);
    }

    fn close(&self, account: Arc<Account>, pause: &Pause, told_by: Generation) -> Gate {
        self.flights.await_ends(&pause.order.scope, &account);
        account.is_taken_up();
        let lasts = account.until.saturating_duration_since(Instant::now());
        info!(pause = %pause.id, scope = %pause.order.scope, ?lasts, "Pause begins");
        let (house, stirred) = (Rc::clone(&self.house), Rc::clone(&self.stirred));
        let queue = Queue::new(house, Some(Arc::clone(&account)), stirred);
        let (phase, told_by, release) =
            (Cell::new(pause.phase), Cell::new(told_by), Cell::default());
        Gate { account, queue, phase, told_by, release }
    }

    /// Opens gates whose time has come, and tells those to go whose turn it is. Says when to look in next, if there is a time.
    fn turn(&self, now: Instant) -> Option<Instant> {
        let mut gates = self.gates.borrow_mut();
        let stops_at = self.stops_at.get();
        let due = gates.iter().filter_map(|gate| match stops_at {
            Some(then) if then <= now => gate.refuse(now, &self.house),
            _ => gate.turn(now, self),
        });
        let due = due.chain(stops_at.filter(|then| now < *then)).min();
        gates.retain(|gate| {
            let is_over = gate.is_open() && gate.queue.is_empty();
            if is_over {
                gate.account.is_let_off();
                info!(pause = %gate.account.id, "Pause is over");
            }
            !is_over
        });
        self.is_any.set(!gates.is_empty());
        due
    }

    /// Says whether any pause is in force, or holds anyone still.
    pub(crate) const fn is_any(&self) -> bool {
        self.is_any.get()
    }

    /// Finds the oldest gate that holds a request, of those at which it has not waited.
    pub(crate) fn holding(&self, facts: &Facts, waited_at: &[PauseId]) -> Option<Rc<Gate>> {
        let gates = self.gates.borrow();
        let mut others =
            gates.iter().filter(|gate| !waited_at.contains(&gate.account.id) && !gate.fails());
        let holds = |gate: &&Rc<Gate>| facts.ask(|asked| gate.account.order.scope.covers(asked));
        others.find(holds).map(Rc::clone)
    }
}

impl Gate {
    /// Says whether those whom it held are being let go.
    pub(crate) const fn is_open(&self) -> bool {
        self.release.get().is_some()
    }

    /// Says since when it has ended, if it has.
    pub(crate) fn opened(&self) -> Option<Instant> {
        self.release.get().map(|release| release.began)
    }

    /// Says whether those whom it held are being refused. It holds nobody more.
    pub(crate) fn fails(&self) -> bool {
        self.release.get().is_some_and(|release| release.at_end == AtEnd::Fail)
    }

    fn is_told(&self, phase: Phase, by: Generation) {
        self.phase.set(phase);
        self.told_by.set(self.told_by.get().max(by));
    }

    /// Tells those whom it holds that they are refused, and says when to look in next.
    fn refuse(&self, now: Instant, house: &House) -> Option<Instant> {
        self.queue.goes_by(Ramp::fastest(house.time(now)));
        self.queue.let_go(now, Turn::Fail, |_, ()| true)
    }

    /// Opens when it is time, and tells those to go whose turn it is. Says when to look in next, if there is a time.
    fn turn(&self, now: Instant, gates: &Gates) -> Option<Instant> {
        let Some(release) = self.account.ended(now) else { return Some(self.account.until) };
        let (turn, over) = match release.at_end {
            AtEnd::GoOn => (Turn::Go, release.over),
            AtEnd::Fail => (Turn::Fail, Duration::ZERO),
        };
        if self.release.replace(Some(release)) != Some(release) {
            // The standard library's hasher is the one source of randomness that needs no dependency.
            let (waiting, seed) = (self.queue.len(), RandomState::new().hash_one(now));
            debug!(pause = %self.account.id, waiting, ?over, ?turn, seed, "Pause ends");
            self.queue.goes_by(Ramp::new(gates.house.time(now), waiting, over, seed));
            gates.ends.note(self.account.id, &self.account.order.scope, release.began);
        }
        self.queue.let_go(now, turn, |_, ()| true)
    }
}

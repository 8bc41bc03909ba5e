//! The requests of one connection of HTTP/2, let in a few at a time, so that a hundred that come at once do not stand before everyone
//! else's.
//!
//! A worker goes round over whatever is ready, in the order in which it became so. A client that asks for a hundred things by HTTP/1.1
//! has a hundred connections or waits for itself; by HTTP/2 all of them are ready at once, from one read. So of each connection
//! a few begin in one round, and the rest in the rounds after it: where nobody else has anything to do they follow at once.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::{spawn_local, yield_now};
use tokio::time::Instant;

/// The requests of one connection, before they begin.
pub(crate) struct Usher {
    // When the round began, as far as can be told without asking, and how many have begun in it.
    since: Cell<Instant>,
    begun: Cell<usize>,
    waiting: RefCell<VecDeque<Waiting>>,
}

type Waiting = Pin<Box<dyn Future<Output = ()>>>;

/// Begin in one round: what they cost before they wait for their tasks is a quarter of a millisecond at most.
const AT_ONCE: usize = 4;
/// A round is over by then, or so short that it does not matter.
const ROUND: Duration = Duration::from_millis(1);

impl Usher {
    pub(crate) fn new(now: Instant) -> Rc<Self> {
        Rc::new(Self { since: Cell::new(now), begun: Cell::new(0), waiting: RefCell::default() })
    }

    /// Begins a request, now or when it is its turn. They begin in the order in which they came.
    pub(crate) fn admit(
        self: &Rc<Self>,
        now: Instant,
        request: impl Future<Output = ()> + 'static,
    ) {
        if now >= self.since.get() + ROUND {
            self.since.set(now);
            self.begun.set(0);
        }
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() && self.begun.get() < AT_ONCE {
            self.begun.set(self.begun.get() + 1);
            drop(spawn_local(request));
            return;
        }
        waiting.push_back(Box::pin(request));
        if waiting.len() == 1 {
            drop(spawn_local(Rc::clone(self).run()));
        }
    }

    /// Lets in who waits, until nobody does.
    async fn run(self: Rc<Self>) {
        loop {
            yield_now().await;
            let mut waiting = self.waiting.borrow_mut();
            let next = AT_ONCE.min(waiting.len());
            waiting.drain(..next).for_each(|request| drop(spawn_local(request)));
            if waiting.is_empty() {
                // Whoever comes in this round comes after these.
                self.since.set(Instant::now());
                self.begun.set(next);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_few_begin_in_each_round_in_their_order_and_others_get_on_between() {
        let begun = Rc::new(RefCell::new(Vec::new()));
        LocalSet::new()
            .run_until(async {
                let usher = Usher::new(Instant::now());
                let admit = |number: usize| {
                    let begun = Rc::clone(&begun);
                    let now = usher.since.get();
                    usher.admit(now, async move { begun.borrow_mut().push(number) });
                };
                (0..103).for_each(admit);
                let mut before = 0;
                while begun.borrow().len() < 103 {
                    yield_now().await;
                    let now = begun.borrow().len();
                    assert!(now - before <= 2 * AT_ONCE, "{before}, {now}");
                    before = now;
                }
                admit(103);
                while begun.borrow().len() < 104 {
                    yield_now().await;
                }
            })
            .await;
        assert_eq!(*begun.borrow(), (0..104).collect::<Vec<_>>());
    }
}

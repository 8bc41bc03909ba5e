//! The thread on which a test service runs: one runtime whose clock stands still until it is told to go on.
//!
//! tokio lets a paused clock jump to the next timer whenever nothing else is to be done, unless a blocking task runs: one that
//! only waits for the end keeps time where it is.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::sync::{mpsc, oneshot};

use crate::testing::desk::Desk;

/// How often whatever is ready may run before time goes on. A heartbeat and all that comes of it takes about ten turns.
const TURNS: usize = 64;

/// Something to run.
type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

enum Order {
    Run(Work),
    Step(Duration, oneshot::Sender<()>),
}

/// Runs a service's tasks, and tells them the time.
pub(super) struct World {
    // It is asked by one test, which waits for each answer.
    orders: mpsc::UnboundedSender<Order>,
}

impl World {
    /// Starts the thread. It ends when this is dropped.
    pub(super) fn start(desk: Arc<Desk>, nanos: Arc<AtomicU64>) -> io::Result<Self> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().start_paused(true).build()?;
        let (orders, mut asked) = mpsc::unbounded_channel();
        let run = async move {
            let (_held, until_dropped) = std::sync::mpsc::channel::<()>();
            let still = tokio::task::spawn_blocking(move || until_dropped.recv().is_ok());
            while let Some(order) = asked.recv().await {
                match order {
                    Order::Run(work) => drop(tokio::spawn(work)),
                    Order::Step(length, done) => {
                        step(&desk, &nanos, length).await;
                        let _whoever_asked_left = done.send(());
                    }
                }
            }
            drop(still);
        };
        let thread = std::thread::Builder::new().name("mandoline-testing".to_owned());
        thread.spawn(move || {
            runtime.block_on(run);
            // A callback that blocks must not keep the test from ending.
            runtime.shutdown_background();
        })?;
        Ok(Self { orders })
    }

    /// Runs something beside the rest.
    pub(super) fn run(&self, work: impl Future<Output = ()> + Send + 'static) {
        let _the_thread_is_there = self.orders.send(Order::Run(Box::pin(work)));
    }

    /// Lets time go on by so much, in one step.
    pub(super) async fn step(&self, length: Duration) {
        let (done, stepped) = oneshot::channel();
        let _the_thread_is_there = self.orders.send(Order::Step(length, done));
        stepped.await.expect("the thread lives as long as the service");
    }
}

async fn step(desk: &Desk, nanos: &AtomicU64, length: Duration) {
    turn().await;
    let added = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
    nanos.fetch_add(added, Ordering::SeqCst);
    if !length.is_zero() {
        tokio::time::advance(length).await;
    }
    turn().await;
    desk.tick();
    turn().await;
}

async fn turn() {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
}

/// Whether a task's session may run: a process that was stopped keeps its connection and says nothing.
#[derive(Default)]
pub(super) struct Switch {
    paused: AtomicBool,
    waker: AtomicWaker,
}

impl Switch {
    pub(super) fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    pub(super) fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
        self.waker.wake();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Runs something, except while paused.
    pub(super) async fn run(self: Arc<Self>, work: impl Future<Output = ()>) {
        let mut work = pin!(work);
        std::future::poll_fn(|context| {
            self.waker.register(context.waker());
            if self.is_paused() {
                return std::task::Poll::Pending;
            }
            work.as_mut().poll(context)
        })
        .await;
    }
}

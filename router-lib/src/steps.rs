//! The application's part in hand-offs: its callbacks, each on a thread of its own, and word to the session when they are done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use mandoline_core::lease::{Coming, Going};
use mandoline_core::slice::Slice;
use mandoline_core::transit::HandOffId;
use tokio::sync::mpsc;

/// What the application does with one slice.
pub(crate) type Call = Arc<dyn Fn(Slice) + Send + Sync>;

/// What the application does at the steps of a hand-off.
#[derive(Clone, Default)]
pub(crate) struct Calls {
    pub(crate) prepare: Option<Call>,
    pub(crate) release: Option<Call>,
    pub(crate) resume: Option<Call>,
}

/// What has been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// The application is ready for a slice on its way here.
    Prepared(HandOffId),
    /// It has let go of a slice on its way elsewhere.
    Released(HandOffId),
}

/// The application's part in hand-offs.
pub(crate) struct Steps {
    calls: Calls,
    // As many as there are hand-offs: each says each of them once.
    done: mpsc::UnboundedSender<Done>,
    heard: mpsc::UnboundedReceiver<Done>,
}

impl Steps {
    pub(crate) fn new(calls: Calls) -> Self {
        let (done, heard) = mpsc::unbounded_channel();
        Self { calls, done, heard }
    }

    /// Waits for something to be done. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Done {
        self.heard.recv().await.expect("the sender lives here")
    }

    /// Gets the application ready for a slice.
    pub(crate) fn prepare(&self, coming: &Coming) {
        self.run(self.calls.prepare.clone(), coming.slice, Done::Prepared(coming.id));
    }

    /// Has the application flush a slice of which no guard is left.
    pub(crate) fn release(&self, going: &Going) {
        self.run(self.calls.release.clone(), going.slice, Done::Released(going.id));
    }

    /// Tells the application that a slice which it released stays.
    pub(crate) fn resume(&self, slice: Slice) {
        if let Some(call) = self.calls.resume.clone() {
            drop(tokio::task::spawn_blocking(move || attempt(&call, slice)));
        }
    }

    fn run(&self, call: Option<Call>, slice: Slice, done: Done) {
        let sender = self.done.clone();
        // Nobody listens once the session has ended.
        let say = move || {
            let _unheard = sender.send(done);
        };
        let Some(call) = call else { return say() };
        drop(tokio::task::spawn_blocking(move || {
            attempt(&call, slice);
            say();
        }));
    }
}

/// The callback is the application's: its panic must not cost the session, nor keep the hand-off from going on.
fn attempt(call: &Call, slice: Slice) {
    if catch_unwind(AssertUnwindSafe(|| call(slice))).is_err() {
        tracing::error!(%slice, "a callback of a hand-off panicked; going on without it");
    }
}

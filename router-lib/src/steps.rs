//! The application's part in hand-offs: its callbacks, each on a thread of its own, and word to the session when they are done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::lease::{Coming, Going};
use mandoline_core::slice::Slice;
use mandoline_core::task::SessionId;
use mandoline_core::transit::HandOffId;
use tokio::sync::mpsc;

use crate::install::Settle;
use crate::moving::Moving;
use crate::owned::{Aside, Owned};
use crate::transfer::pull::Origin;

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
    /// Where the application's state moves with its slices.
    moving: Option<Moving>,
    // As many as there are hand-offs: each says each of them once.
    done: mpsc::UnboundedSender<Done>,
    heard: mpsc::UnboundedReceiver<Done>,
}

impl Steps {
    pub(crate) fn new(calls: Calls, moving: Option<Moving>) -> Self {
        let (done, heard) = mpsc::unbounded_channel();
        Self { calls, moving, done, heard }
    }

    /// Takes in what is in force now.
    pub(crate) fn knows(&self, owned: &Owned) {
        if let Some(moving) = &self.moving {
            moving.knows(&owned.view());
        }
    }

    /// Gives what decides on state that was set aside.
    pub(crate) fn settle(&self, is_owner: bool) -> Settle {
        let Some(moving) = self.moving.clone() else { return Arc::new(|_| ()) };
        Arc::new(move |aside| match aside {
            Aside::Keep(id) => moving.keep(id, is_owner),
            Aside::Discard(id) => moving.discard(id),
        })
    }

    /// Whoever has a slice on its way here takes no more work on it.
    pub(crate) fn fetch(&self, id: HandOffId) {
        if let Some(moving) = &self.moving {
            moving.fetch(id);
        }
    }

    /// A slice on its way here does not come.
    pub(crate) fn discard(&self, id: HandOffId) {
        if let Some(moving) = &self.moving {
            moving.discard(id);
        }
    }

    /// Waits for something to be done. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Done {
        self.heard.recv().await.expect("the sender lives here")
    }

    /// Gets the application ready for a slice: its callback first, then its state.
    pub(crate) fn prepare(&self, me: SessionId, coming: Coming, known: &Assignment) {
        let from = coming.from.and_then(|from| Origin::of(known.tasks.get(&from)?));
        let moving = self.moving.clone().filter(|_| coming.from.is_some());
        let call = self.calls.prepare.clone();
        self.run(call, coming.slice, Done::Prepared(coming.id), async move {
            if let Some(moving) = moving {
                moving.prepare(me, &coming, from).await;
            }
        });
    }

    /// Has the application flush a slice of which no guard is left, and sends what has changed of its state.
    pub(crate) fn release(&self, owned: &Arc<Owned>, going: Going) {
        let (moving, owned) = (self.moving.clone(), Arc::clone(owned));
        let call = self.calls.release.clone();
        self.run(call, going.slice, Done::Released(going.id), async move {
            if let Some(moving) = moving {
                moving.send(&owned, going.id).await;
            }
        });
    }

    /// Tells the application that a slice which it released stays.
    pub(crate) fn resume(&self, slice: Slice) {
        if let Some(call) = self.calls.resume.clone() {
            drop(tokio::task::spawn_blocking(move || attempt(&call, slice)));
        }
    }

    fn run(
        &self,
        call: Option<Call>,
        slice: Slice,
        done: Done,
        then: impl Future<Output = ()> + Send + 'static,
    ) {
        let sender = self.done.clone();
        // It ends with the hand-off: the session's runtime drops what is left.
        drop(tokio::spawn(async move {
            if let Some(call) = call {
                // A panic was caught there.
                let _called = tokio::task::spawn_blocking(move || attempt(&call, slice)).await;
            }
            then.await;
            // Nobody listens once the session has ended.
            let _unheard = sender.send(done);
        }));
    }
}

/// The callback is the application's: its panic must not cost the session, nor keep the hand-off from going on.
fn attempt(call: &Call, slice: Slice) {
    if catch_unwind(AssertUnwindSafe(|| call(slice))).is_err() {
        tracing::error!(%slice, "a callback of a hand-off panicked; going on without it");
    }
}

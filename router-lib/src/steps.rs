//! The application's part in hand-offs: its callbacks, each on a thread of its own, and word to the session when they are done.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::lease::{Coming, Going};
use mandoline_core::slice::Slice;
use mandoline_core::task::SessionId;
use mandoline_core::transit::HandOffId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

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
    /// Releases, each with what says that the application has returned from it.
    releases: BTreeMap<HandOffId, CancellationToken>,
    // As many as there are hand-offs: each says each of them once.
    done: mpsc::UnboundedSender<Done>,
    heard: mpsc::UnboundedReceiver<Done>,
}

impl Steps {
    pub(crate) fn new(calls: Calls, moving: Option<Moving>) -> Self {
        let (done, heard) = mpsc::unbounded_channel();
        Self { calls, moving, releases: BTreeMap::new(), done, heard }
    }

    /// Takes in what is in force now, and the newest that is known.
    pub(crate) fn knows(&self, owned: &Owned, newest: &Assignment) {
        if let Some(moving) = &self.moving {
            moving.knows(&owned.view(), newest);
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
        let done = self.heard.recv().await.expect("the sender lives here");
        if let Done::Released(id) = done {
            self.releases.remove(&id);
        }
        done
    }

    /// Gets the application ready for a slice: its callback first, then its state.
    pub(crate) fn prepare(&self, me: SessionId, coming: Coming, known: &Assignment) {
        let Coming { id, slice, from } = coming;
        let call = called(self.calls.prepare.clone(), slice);
        match self.moving.as_ref().filter(|_| from.is_some()) {
            Some(moving) => {
                let origin = from.and_then(|from| Origin::of(known.tasks.get(&from)?));
                self.run(Done::Prepared(id), moving.prepare(me, &coming, origin, call));
            }
            None => self.run(Done::Prepared(id), call),
        }
    }

    /// Has the application flush a slice of which no guard is left, and sends what has changed of its state.
    pub(crate) fn release(&mut self, owned: &Arc<Owned>, going: Going) {
        let (moving, owned) = (self.moving.clone(), Arc::clone(owned));
        let call = called(self.calls.release.clone(), going.slice);
        let returned = CancellationToken::new();
        self.releases.insert(going.id, returned.clone());
        self.run(Done::Released(going.id), async move {
            call.await;
            returned.cancel();
            if let Some(moving) = moving {
                moving.send(&owned, going.id).await;
            }
        });
    }

    /// Tells the application that a slice which it released stays, once it has returned from releasing it.
    pub(crate) fn resume(&mut self, id: HandOffId, slice: Slice) {
        let returned = self.releases.remove(&id);
        let Some(call) = self.calls.resume.clone() else { return };
        drop(tokio::spawn(async move {
            if let Some(returned) = returned {
                returned.cancelled().await;
            }
            called(Some(call), slice).await;
        }));
    }

    fn run(&self, done: Done, work: impl Future<Output = ()> + Send + 'static) {
        let sender = self.done.clone();
        // It ends with the hand-off: the session's runtime drops what is left.
        drop(tokio::spawn(async move {
            work.await;
            // Nobody listens once the session has ended.
            let _unheard = sender.send(done);
        }));
    }
}

/// Calls the application, if it wants to be called, on a thread of its own.
async fn called(call: Option<Call>, slice: Slice) {
    if let Some(call) = call {
        // A panic was caught there.
        let _called = tokio::task::spawn_blocking(move || attempt(&call, slice)).await;
    }
}

/// The callback is the application's: its panic must not cost the session, nor keep the hand-off from going on.
fn attempt(call: &Call, slice: Slice) {
    if catch_unwind(AssertUnwindSafe(|| call(slice))).is_err() {
        tracing::error!(%slice, "a callback of a hand-off panicked; going on without it");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc as std_mpsc};
    use std::time::Duration;

    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::time::Time;
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const SOON: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_slice_that_stays_is_told_of_once_the_application_has_returned_from_releasing_it() {
        let (go, may_return) = std_mpsc::channel::<()>();
        let (note, mut noted) = mpsc::unbounded_channel();
        let (released, resumed) = (note.clone(), note);
        let may_return = Mutex::new(may_return);
        let calls = Calls {
            release: Some(Arc::new(move |_| {
                let _told = released.send("releases");
                let _gone = may_return.lock().unwrap().recv();
                let _told = released.send("has released");
            })),
            resume: Some(Arc::new(move |_| {
                let _told = resumed.send("resumes");
            })),
            ..Calls::default()
        };
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let owned = Arc::new(Owned::new(start, Box::new(|_| ()), Box::new(|_| ())));
        let id =
            HandOffId { began: Generation { incarnation: 1, number: 7 }, first: SliceKey::MIN };
        let going = Going { id, slice: Slice::FULL, to: SessionId(2), until: Time::ZERO };

        let mut steps = Steps::new(calls, None);
        steps.release(&owned, going);
        assert_eq!(timeout(PATIENCE, noted.recv()).await.unwrap(), Some("releases"));
        steps.resume(id, Slice::FULL);
        assert!(timeout(SOON, noted.recv()).await.is_err(), "it has not returned");
        go.send(()).unwrap();
        for expected in ["has released", "resumes"] {
            assert_eq!(timeout(PATIENCE, noted.recv()).await.unwrap(), Some(expected));
        }
        assert_eq!(timeout(PATIENCE, steps.next()).await.unwrap(), Done::Released(id));
    }
}

//! Moves state with slices: what the session drives of the two sides of a transfer (docs/state-transfer.md).
//!
//! One task a hand-off that leads here: it pulls in bulk, waits until whoever has the slice takes no more work, pulls what has
//! changed, and then holds what was set aside until the slice has come or will not. On the other side the exports answer by
//! what the assignment says and by which slices are quiet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::lease::Coming;
use mandoline_core::name::JobName;
use mandoline_core::task::SessionId;
use mandoline_core::transit::HandOffId;
use mandoline_distributor::connect::Connector;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::owned::{Owned, View};
use crate::transfer::pull::{Import, Origin, Puller};
use crate::transfer::serve::{Exports, Outgoing};
use crate::transfer::{HandOff, Party, State};

/// How long a pass may take at most; the hand-off's own deadlines are mostly shorter, and end it sooner.
const PASS_WITHIN: Duration = Duration::from_secs(600);
/// How long a slice that has come waits for the rest of its state, before it starts empty.
const KEEP_WITHIN: Duration = Duration::from_secs(5);
/// How long a slice that is let go of waits for the other side to take what has changed. Nobody serves it meanwhile.
const SEND_WITHIN: Duration = Duration::from_secs(2);

/// What a pull is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// Bring everything, then wait.
    Bulk,
    /// Bring what has changed: whoever has the slice takes no more work.
    Last,
    /// Hand over what there is: the slice has come.
    Done,
}

struct Pull {
    goal: watch::Sender<Goal>,
    task: JoinHandle<Option<Import>>,
}

/// Moves state with slices. Clones are the same.
#[derive(Clone)]
pub(crate) struct Moving(Arc<Inner>);

struct Inner {
    incarnation: u64,
    puller: Puller,
    exports: Exports,
    outgoing: watch::Sender<Outgoing>,
    quiet: Mutex<BTreeSet<HandOffId>>,
    pulls: Mutex<BTreeMap<HandOffId, Pull>>,
}

impl Moving {
    pub(crate) fn new(
        job: &JobName,
        incarnation: u64,
        state: &Arc<dyn State>,
        connector: Connector,
    ) -> Self {
        let (outgoing, watched) = watch::channel(Outgoing::default());
        let exports = Exports::new(job.clone(), Some(Arc::clone(state)), watched);
        let puller = Puller::new(job.clone(), Arc::clone(state), connector);
        let (quiet, pulls) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { incarnation, puller, exports, outgoing, quiet, pulls }))
    }

    /// Gives the side that answers, to be served to peers.
    pub(crate) fn exports(&self) -> &Exports {
        &self.0.exports
    }

    /// Takes in what is in force now. What has come and is not taken into use yet cannot be told of: whoever asks for it waits.
    pub(crate) fn knows(&self, view: &View) {
        let Some(session) = view.session else { return };
        let mut quiet = lock(&self.0.quiet);
        let mut outgoing =
            Outgoing::of(view.assignment(), self.party(session), |id| quiet.contains(&id));
        quiet.retain(|id| outgoing.hand_offs.contains_key(id));
        drop(quiet);
        let mut known = outgoing.known;
        outgoing.hand_offs.retain(|id, leaving| {
            let is_ready = view.has(leaving.slice.first());
            if !is_ready {
                // Not over, but yet to come.
                let Generation { incarnation, number } = id.began;
                known = known.min(Generation { incarnation, number: number.saturating_sub(1) });
            }
            is_ready
        });
        outgoing.known = known;
        self.0.outgoing.send_replace(outgoing);
    }

    fn party(&self, session: SessionId) -> Party {
        Party { session, incarnation: self.0.incarnation }
    }

    /// Begins to pull the state of a slice that is on its way here. Returns when the bulk of it is here, or will not be.
    pub(crate) async fn prepare(&self, me: SessionId, coming: &Coming, from: Option<Origin>) {
        let (id, slice) = (coming.id, coming.slice);
        let mut import = self.0.puller.begin(self.party(me), from, HandOff { id, slice });
        let (goal, mut wanted) = watch::channel(Goal::Bulk);
        let (told, prepared) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let bulk = tokio::select! {
                moved = import.bulk(Instant::now() + PASS_WITHIN) => moved,
                // It is too late for it.
                _ = wanted.wait_for(|goal| *goal != Goal::Bulk) => return None,
            };
            let _gone = told.send(());
            if let Err(error) = bulk {
                tracing::warn!(%id, %slice, %error, "the slice's state could not be moved; it starts empty");
                return None;
            }
            let goal = *wanted.wait_for(|goal| *goal != Goal::Bulk).await.ok()?;
            if goal == Goal::Last
                && let Err(error) = import.last(Instant::now() + PASS_WITHIN).await
            {
                tracing::warn!(%id, %slice, %error, "what changed last could not be moved; the slice starts empty");
                return None;
            }
            Some(import)
        });
        lock(&self.0.pulls).insert(id, Pull { goal, task });
        // An error says that it ended without it.
        let _ended = prepared.await;
    }

    /// Brings what has changed.
    pub(crate) fn fetch(&self, id: HandOffId) {
        if let Some(pull) = lock(&self.0.pulls).get(&id) {
            pull.goal.send_replace(Goal::Last);
        }
    }

    /// Forgets what was set aside.
    pub(crate) fn discard(&self, id: HandOffId) {
        if let Some(pull) = lock(&self.0.pulls).remove(&id) {
            pull.task.abort();
        }
    }

    /// Takes into use what was set aside, now that the slice has come by this hand-off. Blocks, on a thread of its own.
    pub(crate) fn keep(&self, id: HandOffId, is_owner: bool) {
        let Some(pull) = lock(&self.0.pulls).remove(&id) else { return };
        pull.goal.send_if_modified(|goal| {
            let waits = *goal == Goal::Bulk;
            if waits {
                *goal = Goal::Done;
            }
            waits
        });
        let kept = Handle::current().block_on(async {
            let abort = pull.task.abort_handle();
            let Ok(import) = timeout(KEEP_WITHIN, pull.task).await else {
                abort.abort();
                return Err("it did not come in time".to_owned());
            };
            match import.ok().flatten() {
                // It has said why.
                None => Ok(()),
                Some(import) if is_owner => import.keep().await.map_err(|error| error.to_string()),
                Some(import) => import.keep_bulk().await.map_err(|error| error.to_string()),
            }
        });
        if let Err(problem) = kept {
            tracing::warn!(%id, problem, "a slice's state was not kept; it starts empty");
        }
    }

    /// Sends what has changed of a slice on which nothing is under way any more. Returns when the other side has it, or will not
    /// take it.
    pub(crate) async fn send(&self, owned: &Owned, id: HandOffId) {
        lock(&self.0.quiet).insert(id);
        self.knows(&owned.view());
        match timeout(SEND_WITHIN, self.0.exports.sent(id)).await {
            Ok(Ok(moved)) => tracing::debug!(%id, bytes = moved.bytes, "a slice's state has moved"),
            Ok(Err(why)) => tracing::info!(%id, %why, "a slice moves on without its state"),
            Err(_) => {
                tracing::warn!(%id, "nobody took what changed of a slice; it moves on without its state");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

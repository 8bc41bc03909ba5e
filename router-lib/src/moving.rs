//! Moves state with slices: what the session drives of the two sides of a transfer (docs/state-transfer.md).
//!
//! One task a hand-off that leads here: it pulls in bulk, waits until whoever has the slice takes no more work, pulls what has
//! changed, and then holds what was set aside until the slice has come or will not. On the other side the exports answer by
//! what the assignment says and by which slices are quiet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_core::assignment::Assignment;
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

    /// Takes in what is in force now, and the newest assignment that is known. What has come and is not taken into use yet cannot be
    /// told of: whoever asks for it waits. What `newest` calls over is over, for the application may be letting go of it.
    pub(crate) fn knows(&self, view: &View, newest: &Assignment) {
        let Some(session) = view.session else {
            self.0.outgoing.send_replace(Outgoing::default());
            return;
        };
        let mut quiet = lock(&self.0.quiet);
        let mut outgoing =
            Outgoing::of(view.assignment(), self.party(session), |id| quiet.contains(&id));
        outgoing.hand_offs.retain(|id, _| {
            let (_, assigned) = newest.get(id.first);
            assigned.transit.as_deref().is_some_and(|transit| transit.id == *id)
        });
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

    /// Pulls the state of a slice that is on its way here, once the application is `ready` for it. What this gives ends when the bulk
    /// of it is here, or will not be.
    ///
    /// The hand-off is known here from now on: it may be over before the application is ready.
    pub(crate) fn prepare<R: Future<Output = ()> + Send + 'static>(
        &self,
        me: SessionId,
        coming: &Coming,
        from: Option<Origin>,
        ready: R,
    ) -> impl Future<Output = ()> + Send + use<R> {
        let (id, slice) = (coming.id, coming.slice);
        let mut import = self.0.puller.begin(self.party(me), from, HandOff { id, slice });
        let (goal, mut wanted) = watch::channel(Goal::Bulk);
        let (told, prepared) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let bulk = async {
                ready.await;
                import.bulk(Instant::now() + PASS_WITHIN).await
            };
            let bulk = tokio::select! {
                moved = bulk => moved,
                _ = wanted.wait_for(|goal| *goal != Goal::Bulk) => {
                    tracing::warn!(%id, %slice, "a slice went on before the bulk of its state had come; it starts empty");
                    return None;
                }
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
        async move {
            // An error says that it ended without it.
            let _ended = prepared.await;
        }
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
        let view = owned.view();
        self.knows(&view, view.assignment());
        drop(view);
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

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::io;

    use mandoline_core::assignment::{Assigned, Replica, Replicas};
    use mandoline_core::key::SliceKey;
    use mandoline_core::slice::Slice;
    use mandoline_core::task::{Task, TaskInfo};
    use mandoline_core::transit::{Step, Transit};

    use super::*;
    use crate::transfer::{Pass, Sink, Source};

    const PATIENCE: Duration = Duration::from_secs(20);
    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    /// Has nothing.
    struct Empty;

    impl State for Empty {
        fn export(&self, _: &HandOff, _: Pass, _: &mut Sink) -> io::Result<()> {
            Ok(())
        }

        fn import(&self, _: &HandOff, _: Pass, _: &mut Source) -> io::Result<()> {
            Ok(())
        }

        fn keep(&self, _: &HandOff) {}

        fn discard(&self, _: &HandOff) {}
    }

    fn moving() -> Moving {
        let state: Arc<dyn State> = Arc::new(Empty);
        Moving::new(&"kv".parse().unwrap(), 1, &state, Connector::default())
    }

    fn number(number: u64) -> Generation {
        Generation { incarnation: 1, number }
    }

    fn id() -> HandOffId {
        HandOffId { began: number(7), first: SliceKey::MIN }
    }

    /// All keys are A's, and on their way to B or not.
    fn assignment(generation: u64, is_leaving: bool) -> Arc<Assignment> {
        let mut made = Assignment::new("kv".parse().unwrap(), number(generation));
        for session in [A, B] {
            let (name, address) = (format!("t{}", session.0), format!("h:{}", session.0));
            let info = TaskInfo::new(name.parse().unwrap(), 1, address.parse().unwrap());
            made.tasks.insert(session, Arc::new(Task::new(session, info)));
        }
        let transit = Transit { id: id(), from: Some(A), to: B, step: Step::Preparing };
        let assigned = Assigned {
            replicas: Replicas::One(Replica { session: A, since: number(2) }),
            transit: is_leaving.then(|| Arc::new(transit)),
            ..Assigned::default()
        };
        made.slices.set(Slice::FULL, assigned);
        Arc::new(made)
    }

    #[tokio::test]
    async fn a_hand_off_may_be_over_or_go_on_before_the_application_is_ready_for_it() {
        let coming = Coming { id: id(), slice: Slice::FULL, from: Some(A) };
        for what in [Moving::discard, Moving::fetch] {
            let moving = moving();
            let prepared = moving.prepare(B, &coming, None, pending());
            what(&moving, id());
            timeout(PATIENCE, prepared).await.expect("nothing is pulled any more");
        }
    }

    #[tokio::test]
    async fn nothing_is_exported_that_the_application_may_be_letting_go_of() {
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let owned = Owned::new(start, Box::new(|_| ()), Box::new(|_| ()));
        let leaving = assignment(7, true);
        owned.install(Some(A), Arc::clone(&leaving), |_| ());
        let moving = moving();
        let told = || moving.0.outgoing.borrow().hand_offs.len();
        moving.knows(&owned.view(), &leaving);
        assert_eq!(told(), 1);
        // It is over by what is known, though not in force yet.
        moving.knows(&owned.view(), &assignment(8, false));
        assert_eq!(told(), 0);
        moving.knows(&owned.view(), &leaving);
        assert_eq!(told(), 1);
        // The session has ended.
        owned.install(None, leaving, |_| ());
        moving.knows(&owned.view(), owned.view().assignment());
        assert_eq!(*moving.0.outgoing.borrow(), Outgoing::default());
    }
}

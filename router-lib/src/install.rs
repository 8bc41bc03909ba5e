//! Takes assignments into force beside the session, since the application's callbacks may take their time.

use std::future::pending;
use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::task::SessionId;
use tokio::task::JoinHandle;

use crate::owned::{Aside, Owned};

/// At most one assignment is being installed; the newest waits behind it, and what came between is skipped.
#[derive(Default)]
pub(crate) struct Install {
    running: Option<JoinHandle<()>>,
    newest: Option<Work>,
}

/// What runs the application's callbacks.
pub(crate) enum Work {
    /// Of an affinity job: an assignment comes into force when they have run.
    Install(Option<SessionId>, Arc<Assignment>, Settle),
    /// Of an exclusive job: what is held is in force, and what is new waits for them.
    Welcome(Settle),
}

/// Takes state that was set aside into use, or lets go of it.
pub(crate) type Settle = Arc<dyn Fn(Aside) + Send + Sync>;

impl Install {
    /// Says whether the newest is installed.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_none()
    }

    /// Takes the newest assignment, and begins with it unless one is under way.
    pub(crate) fn begin(&mut self, owned: &Arc<Owned>, work: Work) {
        self.newest = Some(work);
        if self.is_idle() {
            self.next(owned);
        }
    }

    /// Goes on with the newest, if it has not been begun with.
    pub(crate) fn next(&mut self, owned: &Arc<Owned>) {
        if let Some(work) = self.newest.take() {
            let owned = Arc::clone(owned);
            self.running = Some(tokio::task::spawn_blocking(move || match work {
                Work::Install(session, assignment, settle) => {
                    owned.install(session, assignment, &*settle);
                }
                Work::Welcome(settle) => owned.welcome(&*settle),
            }));
        }
    }

    /// Waits until what is under way is done; for ever where nothing is. Safe to cancel.
    pub(crate) async fn done(&mut self) {
        match &mut self.running {
            Some(running) => {
                if let Err(error) = running.await {
                    tracing::error!(%error, "installing an assignment failed");
                }
                self.running = None;
            }
            None => pending().await,
        }
    }
}

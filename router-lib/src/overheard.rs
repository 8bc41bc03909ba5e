//! What a task that is out of touch with the leader hears of its job from others.
//!
//! The last assignment of a leader that died may have reached the callers and not the tasks, which would then turn requests away
//! until somebody leads again. Where two may serve a slice for a moment, an assignment is as good from any assigner as from the
//! leader, so such a task watches as callers do until it is in touch. Ownership of exclusive slices is never taken from here.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::name::{JobName, TaskName};
use mandoline_core::task::Address;
use mandoline_distributor::clock::Clock;
use mandoline_distributor::follow::{Follower, News, Upstream};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::link::Way;

/// A leader that hands over is back within this, and then nobody needs to be asked.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens to others until it is dropped.
pub(crate) struct Overheard {
    news: watch::Receiver<Option<Arc<Assignment>>>,
    _stop: DropGuard,
}

impl Overheard {
    /// Begins to listen, where there are others.
    pub(crate) fn begin(
        job: &JobName,
        task: &TaskName,
        way: &Way,
        assigners: &[Address],
        known: &Arc<Assignment>,
    ) -> Option<Self> {
        let connector = way.connector()?;
        let upstream = Upstream {
            sources: assigners.to_vec(),
            peers: vec![],
            connector: connector.clone(),
            watcher: format!("task {task}"),
        };
        // Nobody tells of generations that were seen elsewhere.
        let (_, seen) = watch::channel::<Option<Generation>>(None);
        let known = (known.generation > Generation::ZERO).then(|| Arc::clone(known));
        let follower = Follower::new(job.clone(), upstream, known, seen, Clock::start()).ok()?;
        let (tell, news) = watch::channel(None);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            if stopped.run_until_cancelled(sleep(PAUSE)).await.is_none() {
                return;
            }
            let tell = move |heard: News<'_>| {
                if let News::Install { assignment, .. } = heard {
                    tell.send_replace(Some(Arc::clone(assignment)));
                }
            };
            follower.run(tell, stopped).await;
        });
        Some(Self { news, _stop: stop.drop_guard() })
    }

    /// Waits for the next assignment; what came between is skipped. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Arc<Assignment> {
        loop {
            if self.news.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Some(assignment) = self.news.borrow_and_update().clone() {
                return assignment;
            }
        }
    }
}

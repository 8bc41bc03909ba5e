//! How a proxy stands towards the pauses that it was told of: what whoever tells of them wants to hear back.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::flags::{Count, Standing};
use mandoline_core::generation::Generation;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::hold::book::Book;
use crate::metrics::stats::PauseStats;

/// How a proxy stands towards the pauses that it was told of. To be asked at any time from any thread, also when the proxy has
/// stopped.
#[derive(Clone)]
pub struct Pauses {
    book: Arc<Book>,
    changes: watch::Receiver<()>,
}

impl Pauses {
    pub(crate) fn new(book: Arc<Book>) -> Self {
        let changes = book.changes();
        Self { book, changes }
    }

    /// Gives the version of the flags that every worker goes by: no request begins any more that a pause in it holds. Those that had
    /// begun are counted by then.
    pub fn version(&self) -> Generation {
        self.book.version()
    }

    /// Says what whoever told of the pauses wants to hear: what is in force in all of the proxy, and what each pause covers there.
    pub fn standing(&self) -> Standing {
        // In this order: what is counted for a version must have begun to be.
        let version = self.version();
        let in_force = self.stats().into_iter().filter(|pause| pause.in_force && !pause.ended);
        let count = |pause: &PauseStats| Count { in_flight: pause.in_flight, held: pause.held };
        let counts = in_force.map(|pause| (pause.id, count(&pause))).collect();
        Standing { version, counts }
    }

    /// Says it to whoever listens there, whenever it changes. Ends never: whoever stops the proxy drops it.
    pub async fn tell(mut self, standing: watch::Sender<Standing>) {
        loop {
            let now = self.standing();
            standing.send_if_modified(|told| {
                let is_new = *told != now;
                *told = now;
                is_new
            });
            tokio::select! {
                () = self.changed() => {}
                () = sleep(TELL_EVERY) => {}
            }
        }
    }

    /// Says how things are with each pause: those in force, and the last few that are over.
    pub fn stats(&self) -> Vec<PauseStats> {
        self.book.stats()
    }

    /// Waits until there is something to tell at once: another version, or a pause that nothing is in flight for any more.
    pub async fn changed(&mut self) {
        self.changes.changed().await.expect("the sender is in the book, which is here");
    }
}

impl fmt::Debug for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pauses").field(&self.stats()).finish()
    }
}

/// How soon counts are told that nobody waits for: who watches a pause looks about as often.
const TELL_EVERY: Duration = Duration::from_millis(500);

//! How a proxy stands towards the pauses that it was told of: what whoever tells of them wants to hear back.

use std::fmt;
use std::sync::Arc;

use mandoline_core::generation::Generation;
use tokio::sync::watch;

use crate::hold::book::Book;
use crate::metrics::PauseStats;

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

    /// Says how things are with each pause: those in force, and the last few that are over.
    pub fn stats(&self) -> Vec<PauseStats> {
        self.book.stats()
    }

    /// Waits until there is something to tell at once: another version, or a pause that nothing is in flight for any more. False
    /// once the proxy is gone, and nothing changes any more.
    pub async fn changed(&mut self) -> bool {
        self.changes.changed().await.is_ok()
    }
}

impl fmt::Debug for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pauses").field(&self.stats()).finish()
    }
}

//! What lies between the connection and an import: one chunk that is ready, and one that is being read.

use std::io::{self, BufRead, Read};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

/// What the connection says to the import.
pub(crate) enum Feed {
    Chunk(Bytes),
    /// All came, and as it was sent.
    End,
}

/// Makes both ends. A chunk that lies ready makes the connection wait; dropping the sender breaks the source off.
pub(crate) fn feed() -> (mpsc::Sender<Feed>, Source) {
    let (sender, feed) = mpsc::channel(1);
    (sender, Source { feed, chunk: Bytes::new(), is_whole: false })
}

/// Where an import reads from.
///
/// Its end comes only when every byte has arrived as it was sent. An error of kind `ConnectionAborted` comes when they will not:
/// return it.
pub struct Source {
    feed: mpsc::Receiver<Feed>,
    chunk: Bytes,
    is_whole: bool,
}

impl Source {
    /// Checks that nothing was left unread, once the application has returned.
    pub(crate) fn rest(mut self) -> io::Result<()> {
        match self.fill_buf()?.len() {
            0 => Ok(()),
            some => Err(io::Error::other(format!("the import left {some} bytes or more unread"))),
        }
    }
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.chunk.is_empty() && !self.is_whole {
            match self.feed.blocking_recv() {
                Some(Feed::Chunk(chunk)) => self.chunk = chunk,
                Some(Feed::End) => self.is_whole = true,
                None => {
                    let broken = "the transfer broke off: nothing of it may be used";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, broken));
                }
            }
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, amount: usize) {
        self.chunk.advance(amount);
    }
}

impl Read for Source {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let found = self.fill_buf()?;
        let len = found.len().min(into.len());
        into[..len].copy_from_slice(&found[..len]);
        self.consume(len);
        Ok(len)
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("is_whole", &self.is_whole).finish_non_exhaustive()
    }
}

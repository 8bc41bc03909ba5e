//! What lies between an export and the connection: bounded, and kept until the other side says that it has it.
//!
//! One bound does two things. An export that is so far ahead waits, and a connection that breaks loses nothing: whatever the
//! other side has not acknowledged is still here, so it can go on where it was. Older bytes are gone; nothing is spooled.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use mandoline_proto::transfer::{CHUNK_MAX_BYTES, Refusal, RefusalCode};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use xxhash_rust::xxh3::Xxh3;

use crate::transfer::{Limits, WINDOW_BYTES};

/// Bytes of one attempt at a pass.
pub(crate) struct Window {
    limits: Limits,
    inner: Mutex<Inner>,
    // For the export's thread: there is room, or nobody wants the rest.
    room: Condvar,
    // For the connection: there is more, or an end.
    news: Notify,
}

struct Inner {
    // Not acknowledged. Invariant: together from `start` to `end`.
    chunks: VecDeque<Bytes>,
    start: u64,
    end: u64,
    // Of all up to `end`.
    checksum: Xxh3,
    outcome: Outcome,
    // Which connection reads: the newest alone.
    reader: u64,
    // Since when none does.
    alone: Option<Instant>,
}

enum Outcome {
    Writing,
    Whole,
    Failed(Refusal),
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Chunk(Bytes),
    End { length: u64, checksum: u64 },
}

/// Stands for a connection that reads; when it is dropped the export waits for another one.
pub(crate) struct Reader {
    window: Arc<Window>,
    number: u64,
    at: u64,
}

impl Window {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        let inner = Inner {
            chunks: VecDeque::new(),
            start: 0,
            end: 0,
            checksum: Xxh3::new(),
            outcome: Outcome::Writing,
            reader: 0,
            alone: Some(Instant::now()),
        };
        let (room, news) = (Condvar::new(), Notify::new());
        Arc::new(Self { limits, inner: Mutex::new(inner), room, news })
    }

    /// Reads from `offset` on, in the place of whoever has read so far; nothing if that is gone or has not come.
    pub(crate) fn read_from(self: &Arc<Self>, offset: u64) -> Option<Reader> {
        let mut inner = self.lock();
        if !(inner.start..=inner.end).contains(&offset) {
            return None;
        }
        inner.acknowledge(offset);
        inner.reader += 1;
        inner.alone = None;
        let number = inner.reader;
        drop(inner);
        self.room.notify_one();
        self.news.notify_waiters();
        Some(Reader { window: Arc::clone(self), number, at: offset })
    }

    /// Lets nobody write or read any more.
    pub(crate) fn close(&self, code: RefusalCode, message: impl Into<String>) {
        let mut inner = self.lock();
        if !matches!(inner.outcome, Outcome::Failed(_)) {
            inner.outcome = Outcome::Failed(Refusal { code, message: message.into() });
        }
        inner.chunks.clear();
        inner.start = inner.end;
        drop(inner);
        self.room.notify_one();
        self.news.notify_waiters();
    }

    /// Puts a chunk in, as soon as there is room.
    fn push(&self, chunk: Bytes) -> io::Result<()> {
        let mut inner = self.lock();
        loop {
            if !matches!(inner.outcome, Outcome::Writing) {
                return Err(gone());
            }
            if inner.held() + chunk.len() <= WINDOW_BYTES {
                break;
            }
            let waits =
                inner.alone.map(|alone| self.limits.resume_within.checked_sub(alone.elapsed()));
            inner = match waits {
                None => self.room.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some(Some(left)) => {
                    let waited = self.room.wait_timeout(inner, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(None) => {
                    drop(inner);
                    self.close(RefusalCode::CannotResume, "the puller was away for too long");
                    return Err(gone());
                }
            };
        }
        inner.end += chunk.len() as u64;
        inner.checksum.update(&chunk);
        inner.chunks.push_back(chunk);
        drop(inner);
        self.news.notify_waiters();
        Ok(())
    }

    fn finish(&self, outcome: Outcome) {
        let mut inner = self.lock();
        if matches!(inner.outcome, Outcome::Writing) {
            inner.outcome = outcome;
        }
        drop(inner);
        self.news.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is whole before anything in it could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn held(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Lets go of what the other side has.
    fn acknowledge(&mut self, taken: u64) {
        while let Some(chunk) = self.chunks.front_mut()
            && self.start < taken
        {
            let len = (taken - self.start).min(chunk.len() as u64);
            self.start += len;
            drop(chunk.split_to(len as usize));
            if chunk.is_empty() {
                self.chunks.pop_front();
            }
        }
    }

    /// Finds what stands at an offset that is held.
    fn at(&self, offset: u64) -> Option<Bytes> {
        let mut skip = (offset - self.start) as usize;
        for chunk in &self.chunks {
            if skip < chunk.len() {
                return Some(chunk.slice(skip..));
            }
            skip -= chunk.len();
        }
        None
    }
}

impl Reader {
    /// Waits for what comes next. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<Piece, Refusal> {
        loop {
            let news = self.window.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            let is_export_due = {
                let inner = self.window.lock();
                if inner.reader != self.number {
                    let message = "a newer pull of this hand-off has taken over".to_owned();
                    return Err(Refusal { code: RefusalCode::Superseded, message });
                }
                if let Outcome::Failed(refusal) = &inner.outcome {
                    return Err(refusal.clone());
                }
                if let Some(bytes) = inner.at(self.at) {
                    self.at += bytes.len() as u64;
                    return Ok(Piece::Chunk(bytes));
                }
                if matches!(inner.outcome, Outcome::Whole) {
                    let (length, checksum) = (inner.end, inner.checksum.digest());
                    return Ok(Piece::End { length, checksum });
                }
                inner.held() + CHUNK_MAX_BYTES <= WINDOW_BYTES
            };
            if !is_export_due {
                news.await;
            } else if timeout(self.window.limits.stall, news).await.is_err() {
                let stall = self.window.limits.stall;
                let why = format!("the export has written nothing for {stall:?}");
                self.window.close(RefusalCode::ExportStalled, why);
            }
        }
    }

    /// Says how far the reading is.
    pub(crate) const fn at(&self) -> u64 {
        self.at
    }

    /// Lets nobody write or read any more.
    pub(crate) fn close(&self, refusal: &Refusal) {
        self.window.close(refusal.code, &*refusal.message);
    }

    /// Lets go of what the other side has: at most what was read.
    pub(crate) fn acknowledge(&self, taken: u64) {
        let mut inner = self.window.lock();
        if inner.reader == self.number {
            inner.acknowledge(taken.min(self.at));
        }
        drop(inner);
        self.window.room.notify_one();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut inner = self.window.lock();
        if inner.reader == self.number {
            inner.alone = Some(Instant::now());
        }
        drop(inner);
        // It waits for a limited time from now on.
        self.window.room.notify_one();
    }
}

/// Where an export writes to.
///
/// Bytes leave in chunks of 256 KiB; flushing does nothing. Writing waits while the other side is far behind, and fails when
/// nobody wants the rest.
pub struct Sink {
    window: Arc<Window>,
    buffer: BytesMut,
    is_done: bool,
}

impl Sink {
    pub(crate) fn new(window: Arc<Window>) -> Self {
        Self { window, buffer: BytesMut::new(), is_done: false }
    }

    /// Ends the pass as the application's export did.
    pub(crate) fn finish(mut self, result: io::Result<()>) {
        self.is_done = true;
        let sent = result.and_then(|()| self.send());
        self.window.finish(match sent {
            Ok(()) => Outcome::Whole,
            Err(error) => {
                let message = format!("the export failed: {error}");
                Outcome::Failed(Refusal { code: RefusalCode::ExportFailed, message })
            }
        });
    }

    fn send(&mut self) -> io::Result<()> {
        match self.buffer.split().freeze() {
            nothing if nothing.is_empty() => Ok(()),
            chunk => self.window.push(chunk),
        }
    }
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == CHUNK_MAX_BYTES {
            self.send()?;
        }
        if self.buffer.capacity() == 0 {
            self.buffer.reserve(CHUNK_MAX_BYTES);
        }
        let taken = bytes.len().min(CHUNK_MAX_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Sink {
    /// An export that panics drops its sink unfinished.
    fn drop(&mut self) {
        if !self.is_done {
            let message = "the export panicked".to_owned();
            let code = RefusalCode::ExportPanicked;
            self.window.finish(Outcome::Failed(Refusal { code, message }));
        }
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").finish_non_exhaustive()
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "nobody wants the rest of this export")
}

/// How long, for tests that must not wait.
#[cfg(test)]
pub(crate) const SOON: std::time::Duration = std::time::Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn chunk(byte: u8) -> Vec<u8> {
        vec![byte; CHUNK_MAX_BYTES]
    }

    #[tokio::test]
    async fn what_was_not_acknowledged_is_read_again_and_what_was_is_gone() {
        let window = Window::new(Limits::default());
        let mut sink = Sink::new(Arc::clone(&window));
        sink.write_all(&chunk(1)).unwrap();
        sink.write_all(&chunk(2)).unwrap();
        sink.write_all(b"end").unwrap();
        sink.finish(Ok(()));
        let mut first = window.read_from(0).unwrap();
        assert_eq!(first.next().await, Ok(Piece::Chunk(chunk(1).into())));
        assert_eq!(first.next().await, Ok(Piece::Chunk(chunk(2).into())));
        first.acknowledge(CHUNK_MAX_BYTES as u64);
        // The other side has three bytes more than it could say.
        let mut second = window.read_from(CHUNK_MAX_BYTES as u64 + 3).unwrap();
        assert_eq!(first.next().await.unwrap_err().code, RefusalCode::Superseded);
        assert_eq!(second.next().await, Ok(Piece::Chunk(chunk(2)[3..].to_vec().into())));
        assert_eq!(second.next().await, Ok(Piece::Chunk(Bytes::from_static(b"end"))));
        let all = [chunk(1), chunk(2), b"end".to_vec()].concat();
        let (length, checksum) = (all.len() as u64, xxhash_rust::xxh3::xxh3_64(&all));
        assert_eq!(second.next().await, Ok(Piece::End { length, checksum }));
        assert!(window.read_from(0).is_none() && window.read_from(length + 1).is_none());
        assert!(window.read_from(length).is_some());
    }

    #[tokio::test]
    async fn an_export_waits_for_room_and_for_a_puller_that_may_come_back_but_not_for_ever() {
        let limits = Limits { resume_within: SOON, ..Limits::default() };
        let window = Window::new(limits);
        let mut sink = Sink::new(Arc::clone(&window));
        let reader = window.read_from(0).unwrap();
        let export = tokio::task::spawn_blocking(move || {
            let result = (0..100).try_for_each(|_| sink.write_all(&chunk(0)));
            let kind = result.as_ref().map_err(io::Error::kind).copied();
            sink.finish(result);
            kind
        });
        drop(reader);
        assert_eq!(export.await.unwrap(), Err(io::ErrorKind::BrokenPipe));
        assert_eq!(window.lock().held(), 0);
        let end = window.lock().end;
        let mut reader = window.read_from(end).unwrap();
        assert_eq!(reader.next().await.unwrap_err().code, RefusalCode::CannotResume);
    }

    #[tokio::test]
    async fn an_export_that_is_dropped_has_panicked() {
        let window = Window::new(Limits::default());
        drop(Sink::new(Arc::clone(&window)));
        let mut reader = window.read_from(0).unwrap();
        assert_eq!(reader.next().await.unwrap_err().code, RefusalCode::ExportPanicked);
    }
}

//! The log as openraft wants it: readable at once, durable when the writer says so.
//!
//! The newest entries are kept in memory, since Raft reads an entry right after it gave it, to send and to apply it; older
//! ones are read from disk. Without that bound the memory of a node would hold every command since the last snapshot.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::{LogState, OptionalSend};
use tokio::sync::Notify;

use crate::raft::disk::{Change, Disk, Loaded};
use crate::raft::record::{self, Kind};
use crate::raft::types::{Entry, LogId, Types, Vote};
use crate::raft::wire;
use crate::raft::writer::Writer;

/// How many entries, and how many bytes of them, stay in memory once they are on disk: a follower a few seconds behind
/// reads from memory.
const KEPT_ENTRIES: usize = 1_024;
const KEPT_BYTES: usize = 8 << 20;
/// How many bytes of entries go to a peer in one request: they travel in parts anyway, but must all be in memory.
const REQUEST_BYTES: usize = 1 << 20;

/// The log of one node.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    disk: Arc<Disk>,
    writer: Writer,
    tail: Arc<Mutex<Tail>>,
    grown: Grown,
}

/// Tells when the log has grown so much that it is worth a snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Grown {
    limit: u64,
    news: Arc<Notify>,
    bytes: Arc<AtomicU64>,
}

impl Grown {
    fn new(limit: u64) -> Self {
        Self { limit, news: Arc::default(), bytes: Arc::default() }
    }

    /// Waits until there is reason for a snapshot.
    pub(crate) async fn enough(&self) {
        self.news.notified().await;
    }

    fn by(&self, bytes: u64) {
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes >= self.limit {
            self.bytes.store(0, Ordering::Relaxed);
            self.news.notify_one();
        }
    }
}

/// What is known without looking at the disk.
#[derive(Debug, Default)]
struct Tail {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
    /// The newest entries with the bytes of their records. Invariant: without a hole, up to `last`, and all that is not
    /// on disk yet.
    entries: VecDeque<(Entry, usize)>,
    bytes: usize,
    /// Entries below this index are on disk.
    flushed: u64,
    /// Counts truncations: a sync that was asked for before one says nothing of the entries that came after it.
    cuts: u64,
}

impl Log {
    /// Goes on with what was loaded; says so whenever it has grown by so many bytes.
    pub(crate) fn new(disk: Arc<Disk>, writer: Writer, loaded: &Loaded, grown_bytes: u64) -> Self {
        let tail = Tail {
            vote: loaded.vote,
            committed: loaded.committed,
            purged: loaded.purged,
            last: loaded.last,
            flushed: next(loaded.last),
            ..Tail::default()
        };
        Self { disk, writer, tail: Arc::new(Mutex::new(tail)), grown: Grown::new(grown_bytes) }
    }

    /// Tells when a snapshot is due by size.
    pub(crate) fn grown(&self) -> Grown {
        self.grown.clone()
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, range: Range<u64>, mut budget: usize) -> io::Result<Vec<Entry>> {
        let (older, newer) = {
            let tail = self.tail();
            let range = range.start.max(tail.purged.map_or(0, |id| id.index + 1))
                ..range.end.min(next(tail.last));
            let first = tail.first();
            let newer: Vec<_> = tail.within(range.start.max(first)..range.end).cloned().collect();
            (range.start..range.end.min(first), newer)
        };
        let mut entries = Vec::new();
        if !older.is_empty() {
            let end = older.end;
            entries = self.disk.entries(older, budget)?;
            if entries.last().is_some_and(|entry| entry.log_id.index + 1 < end) {
                return Ok(entries);
            }
        }
        for (entry, weight) in newer {
            if !entries.is_empty() && budget < weight {
                break;
            }
            budget = budget.saturating_sub(weight);
            entries.push(entry);
        }
        Ok(entries)
    }
}

impl Tail {
    fn first(&self) -> u64 {
        self.entries.front().map_or_else(|| next(self.last), |(entry, _)| entry.log_id.index)
    }

    fn within(&self, range: Range<u64>) -> impl Iterator<Item = &(Entry, usize)> {
        let skipped =
            usize::try_from(range.start.saturating_sub(self.first())).unwrap_or(usize::MAX);
        self.entries
            .iter()
            .skip(skipped)
            .take_while(move |(entry, _)| entry.log_id.index < range.end)
    }

    fn push(&mut self, entry: Entry, weight: usize) {
        self.last = Some(entry.log_id);
        self.bytes += weight;
        self.entries.push_back((entry, weight));
    }

    fn drop_first(&mut self) {
        if let Some((_, weight)) = self.entries.pop_front() {
            self.bytes -= weight;
        }
    }

    /// Forgets the oldest entries that are on disk, beyond what is kept.
    fn trim(&mut self) {
        while (self.entries.len() > KEPT_ENTRIES || self.bytes > KEPT_BYTES)
            && self.first() < self.flushed
        {
            self.drop_first();
        }
    }

    fn truncate(&mut self, last: Option<LogId>) {
        if self.last <= last {
            return;
        }
        while self.entries.back().is_some_and(|(entry, _)| entry.log_id.index >= next(last)) {
            let (_, weight) = self.entries.pop_back().expect("there is a last one");
            self.bytes -= weight;
        }
        self.last = last;
        self.flushed = self.flushed.min(next(last));
        self.cuts += 1;
    }

    fn purge(&mut self, upto: LogId) {
        while !self.entries.is_empty() && self.first() <= upto.index {
            self.drop_first();
        }
        self.purged = self.purged.max(Some(upto));
        self.last = self.last.max(Some(upto));
        self.flushed = self.flushed.max(upto.index + 1);
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let start = match range.start_bound() {
            Bound::Included(at) => *at,
            Bound::Excluded(at) => at + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(at) => at + 1,
            Bound::Excluded(at) => *at,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start..end, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read(start..end, REQUEST_BYTES)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.tail().vote)
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let tail = self.tail();
        Ok(LogState { last_purged_log_id: tail.purged, last_log_id: tail.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.writer
            .written(Change::Vote(record::seal(Kind::Vote, 0, &wire::pb_vote(vote))))
            .await?;
        self.tail().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        if let Some(committed) = committed {
            self.writer.committed(record::seal(Kind::Committed, 0, &wire::pb_log_id(&committed)));
        }
        self.tail().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.tail().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let sealed = |entry: Entry| (seal_entry(&entry), entry);
        let entries: Vec<(Bytes, Entry)> = entries.into_iter().map(sealed).collect();
        let records: Vec<(u64, Bytes)> =
            entries.iter().map(|(record, entry)| (entry.log_id.index, record.clone())).collect();
        let cuts = {
            let mut tail = self.tail();
            for (record, entry) in entries {
                let due = tail.last.map_or(entry.log_id.index, |last| last.index + 1);
                assert_eq!(entry.log_id.index, due, "Raft appends without a hole");
                tail.push(entry, record.len());
            }
            tail.cuts
        };
        self.grown.by(records.iter().map(|(_, record)| record.len() as u64).sum());
        let (end, tail) = (next(self.tail().last), self.tail.clone());
        self.writer.write(Change::Append(records), move |result| {
            if result.is_ok() {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                if tail.cuts == cuts {
                    tail.flushed = tail.flushed.max(end);
                }
                tail.trim();
            }
            callback.io_completed(result);
        });
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.tail().truncate(last);
        self.writer.written(Change::Truncate(next(last))).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        self.tail().purge(upto);
        let record = record::seal(Kind::Purged, 0, &wire::pb_log_id(&upto));
        self.writer.written(Change::Purge(upto.index, record)).await
    }
}

/// Seals an entry as it stands on disk.
pub(crate) fn seal_entry(entry: &Entry) -> Bytes {
    record::seal(Kind::Entry, entry.log_id.index, &wire::pb_entry(entry))
}

fn next(last: Option<LogId>) -> u64 {
    last.map_or(0, |last| last.index + 1)
}

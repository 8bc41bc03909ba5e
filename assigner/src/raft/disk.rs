//! The one file of a node: identity, vote, log and snapshot in one redb database.
//!
//! One file, so that what is written together is there together. Each commit is made in two phases: redb then knows
//! which of its two roots is whole without guessing, so a damaged file is an error and never a silent step back to the
//! commit before (the price is a second fsync, a tenth of a millisecond). On opening, redb checks every page, and then
//! each record is read, its checksum compared and the log looked through for holes. Whatever is wrong is a [`DiskError`]
//! that names the file and the place; nothing is repaired by leaving something out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use crate::raft::record::{self, Kind, RecordError};
use crate::raft::types::{Entry, LogId, Vote};
use crate::raft::wire::{self, Head, Identity};
use mandoline_proto::pb;

/// The file in the data directory.
pub(crate) const FILE: &str = "raft.redb";
/// Under this name the file is made, so that under its own it is always whole.
const UNFINISHED: &str = "raft.redb.new";
/// The layout of the tables. Records have a format of their own.
const LAYOUT: u64 = 1;
/// The bytes of a snapshot are `mandoline.v1.State`.
pub(crate) const SNAPSHOT_FORMAT: u32 = 1;
/// A snapshot lies and travels in parts, so that no message and no page run is larger.
pub(crate) const PART_BYTES: usize = 1 << 20;
/// What redb may keep in memory: the log's tail is in memory anyway, and older entries are rarely read.
const CACHE_BYTES: usize = 16 << 20;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const PARTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("snapshot");

const LAYOUT_KEY: &str = "layout";
const IDENTITY_KEY: &str = "identity";
const VOTE_KEY: &str = "vote";
const COMMITTED_KEY: &str = "committed";
const PURGED_KEY: &str = "purged";
const SNAPSHOT_KEY: &str = "snapshot";

/// Where a node keeps what it must not forget.
#[derive(Debug)]
pub enum Storage {
    /// In a directory, which is made if it is not there.
    Dir(PathBuf),
    /// In a backend of the caller's, such as [`crate::raft::faulty::Media`]. The name is for messages.
    Backend(String, Box<dyn StorageBackend>),
}

/// Why a node's file cannot be used. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The directory cannot be made, or the file in it not opened.
    #[error("{file}: {source}: check that the directory is there and belongs to this user")]
    Open {
        /// Which file.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// Another process, or another node in this one, has the file open.
    #[error(
        "{file}: another process has it open: stop that one first, or give this one its own directory"
    )]
    InUse {
        /// Which file.
        file: String,
    },
    /// The file, or something in it, was written by a newer version.
    #[error(
        "{file}: {what} has format {found}, and this version knows formats up to {known}: start the version that wrote \
         it, or give this one an empty directory and let it join anew"
    )]
    Newer {
        /// Which file.
        file: String,
        /// What in it.
        what: String,
        /// The format found.
        found: u64,
        /// The newest format known.
        known: u64,
    },
    /// The file, or something in it, is not as it was written.
    #[error(
        "{file}: {what} is damaged: {problem}: keep the file aside, check the disk, and let the node join anew from an \
         empty directory (`mandoline assigner --join`); the other members have everything that was acknowledged"
    )]
    Damaged {
        /// Which file.
        file: String,
        /// What in it, such as `log entry 17`.
        what: String,
        /// What is wrong.
        problem: String,
    },
    /// Reading or writing failed. The node stops: after a failed sync nobody knows what is on disk.
    #[error("{file}: {source}: make room or replace the disk, then start the node again")]
    Io {
        /// Which file.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// The file was closed, since the node stops.
    #[error("{file}: closed")]
    Closed {
        /// Which file.
        file: String,
    },
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        let kind = match &error {
            DiskError::Open { source, .. } | DiskError::Io { source, .. } => source.kind(),
            DiskError::Newer { .. } | DiskError::Damaged { .. } => io::ErrorKind::InvalidData,
            DiskError::InUse { .. } => io::ErrorKind::ResourceBusy,
            DiskError::Closed { .. } => io::ErrorKind::BrokenPipe,
        };
        Self::new(kind, error)
    }
}

/// What the file held when it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    pub(crate) identity: Option<Identity>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    pub(crate) purged: Option<LogId>,
    /// The last entry, or what was purged if there is none.
    pub(crate) last: Option<LogId>,
    pub(crate) snapshot: Option<Head>,
}

/// One thing to write. Those that are given together are written together, in order.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Identity(Bytes),
    Vote(Bytes),
    Committed(Bytes),
    /// Sealed entries, each under its index.
    Append(Vec<(u64, Bytes)>),
    /// Removes what comes from this index on.
    Truncate(u64),
    /// Removes what comes up to this index, itself included.
    Purge(u64, Bytes),
    Snapshot {
        head: Bytes,
        parts: Vec<Bytes>,
    },
}

/// The file of a node.
#[derive(Debug)]
pub(crate) struct Disk {
    file: String,
    /// Taken out when the node stops, so that the file is free whoever still holds a reader.
    db: Mutex<Option<Arc<Database>>>,
}

impl Disk {
    /// Opens the file, or makes it, and reads all of it once.
    pub(crate) fn open(storage: Storage) -> Result<(Self, Loaded), DiskError> {
        let (file, db) = match storage {
            Storage::Dir(dir) => open_in(&dir)?,
            Storage::Backend(name, backend) => {
                let db = builder()
                    .create_with_backend(Boxed(backend))
                    .map_err(|error| Trouble::from(error).at(&name))?;
                (name, db)
            }
        };
        let disk = Self { file, db: Mutex::new(Some(Arc::new(db))) };
        disk.lay_out()?;
        let loaded = disk.load()?;
        Ok((disk, loaded))
    }

    /// Writes changes, all or none, and returns once they are on disk.
    pub(crate) fn commit<'a>(
        &self,
        changes: impl IntoIterator<Item = &'a Change>,
    ) -> Result<(), DiskError> {
        let write = || -> Result<(), Trouble> {
            let mut transaction = self.db()?.begin_write()?;
            transaction.set_two_phase_commit(true);
            {
                let mut meta = transaction.open_table(META)?;
                let mut log = transaction.open_table(LOG)?;
                let mut parts = transaction.open_table(PARTS)?;
                for change in changes {
                    match change {
                        Change::Identity(record) => drop(meta.insert(IDENTITY_KEY, &record[..])?),
                        Change::Vote(record) => drop(meta.insert(VOTE_KEY, &record[..])?),
                        Change::Committed(record) => drop(meta.insert(COMMITTED_KEY, &record[..])?),
                        Change::Append(entries) => {
                            for (index, record) in entries {
                                log.insert(index, &record[..])?;
                            }
                        }
                        Change::Truncate(from) => log.retain_in::<u64, _>(*from.., |_, _| false)?,
                        Change::Purge(upto, record) => {
                            log.retain_in::<u64, _>(..=*upto, |_, _| false)?;
                            meta.insert(PURGED_KEY, &record[..])?;
                        }
                        Change::Snapshot { head, parts: new } => {
                            parts.retain(|_, _| false)?;
                            for (number, part) in (0_u64..).zip(new) {
                                parts.insert(number, &part[..])?;
                            }
                            meta.insert(SNAPSHOT_KEY, &head[..])?;
                        }
                    }
                }
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|trouble| trouble.at(&self.file))
    }

    /// Reads entries; fewer than asked for if the log has fewer, or if those before weigh `budget` bytes already.
    pub(crate) fn entries(
        &self,
        range: Range<u64>,
        mut budget: usize,
    ) -> Result<Vec<Entry>, DiskError> {
        let mut read = || -> Result<Vec<Entry>, Trouble> {
            let log = self.db()?.begin_read()?.open_table(LOG)?;
            let mut entries = Vec::new();
            for row in log.range(range.clone())? {
                let (index, record) = row?;
                if !entries.is_empty() && budget < record.value().len() {
                    break;
                }
                budget = budget.saturating_sub(record.value().len());
                entries.push(read_entry(index.value(), record.value())?);
            }
            Ok(entries)
        };
        read().map_err(|trouble| trouble.at(&self.file))
    }

    /// Reads the snapshot, if there is one.
    pub(crate) fn snapshot(&self) -> Result<Option<(Head, Bytes)>, DiskError> {
        let read = || -> Result<Option<(Head, Bytes)>, Trouble> {
            let transaction = self.db()?.begin_read()?;
            let Some(record) = transaction.open_table(META)?.get(SNAPSHOT_KEY)? else {
                return Ok(None);
            };
            let head = read_head(record.value())?;
            let mut bytes =
                BytesMut::with_capacity(usize::try_from(head.length).unwrap_or(0).min(1 << 30));
            for row in transaction.open_table(PARTS)?.range::<u64>(..)? {
                let (number, part) = row?;
                let what = || format!("snapshot part {}", number.value());
                let part = record::open(Kind::SnapshotPart, number.value(), part.value())
                    .map_err(named(what))?;
                bytes.extend_from_slice(part);
            }
            check_snapshot(&head, &bytes)
                .map_err(|problem| Trouble::Damaged("the snapshot".to_owned(), problem))?;
            Ok(Some((head, bytes.freeze())))
        };
        read().map_err(|trouble| trouble.at(&self.file))
    }

    /// Lets go of the file once those who read from it now are done.
    pub(crate) fn close(&self) {
        drop(self.db.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn db(&self) -> Result<Arc<Database>, Trouble> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Trouble::Closed)
    }

    /// Makes the tables of a new file, or refuses a file that is laid out otherwise.
    fn lay_out(&self) -> Result<(), DiskError> {
        let check = || -> Result<(), Trouble> {
            let db = self.db()?;
            let tables = db.begin_read()?.list_tables()?.count();
            if tables > 0 {
                let meta = db.begin_read()?.open_table(META)?;
                let found = meta
                    .get(LAYOUT_KEY)?
                    .and_then(|bytes| bytes.value().try_into().ok().map(u64::from_le_bytes));
                return match found {
                    Some(LAYOUT) => Ok(()),
                    Some(found) if found > LAYOUT => {
                        Err(Trouble::Newer("the file".to_owned(), found, LAYOUT))
                    }
                    _ => Err(Trouble::Damaged(
                        "the file".to_owned(),
                        "it does not say how it is laid out".to_owned(),
                    )),
                };
            }
            let mut transaction = db.begin_write()?;
            transaction.set_two_phase_commit(true);
            transaction.open_table(META)?.insert(LAYOUT_KEY, &LAYOUT.to_le_bytes()[..])?;
            drop(transaction.open_table(LOG)?);
            drop(transaction.open_table(PARTS)?);
            transaction.commit()?;
            Ok(())
        };
        check().map_err(|trouble| trouble.at(&self.file))
    }

    fn load(&self) -> Result<Loaded, DiskError> {
        let snapshot = self.snapshot()?.map(|(head, _)| head);
        let read = || -> Result<Loaded, Trouble> {
            let transaction = self.db()?.begin_read()?;
            let meta = transaction.open_table(META)?;
            let record = |key| {
                meta.get(key)
                    .map(|found| found.map(|record| Bytes::copy_from_slice(record.value())))
            };
            let log_id = |kind, what: &'static str, record: Bytes| {
                let wire: pb::RaftLogId =
                    record::open_as(kind, 0, &record).map_err(named(|| what.to_owned()))?;
                Ok::<_, Trouble>(wire::log_id(wire))
            };
            let purged = record(PURGED_KEY)?
                .map(|r| log_id(Kind::Purged, "the purged mark", r))
                .transpose()?;
            let committed = record(COMMITTED_KEY)?
                .map(|r| log_id(Kind::Committed, "the committed mark", r))
                .transpose()?;
            let last = read_log(&transaction.open_table(LOG)?, purged)?;
            let known = last.max(snapshot.as_ref().and_then(|head| head.meta.last_log_id));
            if committed.map(|id| id.index) > known.map(|id| id.index) {
                let problem = format!(
                    "it ends at {}, but entries up to {} were committed",
                    show(known),
                    show(committed)
                );
                return Err(Trouble::Damaged("the log".to_owned(), problem));
            }
            Ok(Loaded {
                identity: record(IDENTITY_KEY)?.map(|r| read_identity(&r)).transpose()?,
                vote: record(VOTE_KEY)?.map(|r| read_vote(&r)).transpose()?,
                committed,
                purged,
                last,
                snapshot: snapshot.clone(),
            })
        };
        read().map_err(|trouble| trouble.at(&self.file))
    }
}

/// Says whether a snapshot's bytes are those that its head tells of.
pub(crate) fn check_snapshot(head: &Head, bytes: &[u8]) -> Result<(), String> {
    if head.length != bytes.len() as u64 {
        return Err(format!("it has {} bytes, where its head says {}", bytes.len(), head.length));
    }
    if head.checksum != record::sum(bytes) {
        return Err("its checksum does not fit its bytes".to_owned());
    }
    Ok(())
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

fn open_in(dir: &Path) -> Result<(String, Database), DiskError> {
    let path = dir.join(FILE);
    let file = path.display().to_string();
    let failed = |source| DiskError::Open { file: file.clone(), source };
    let trouble = |trouble: Trouble| match trouble {
        Trouble::Io(source) => failed(source),
        other => other.at(&file),
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    if path.try_exists().map_err(failed)? {
        // redb would take an empty file for a new one, and what was lost would go unnoticed.
        if path.metadata().map_err(failed)?.len() == 0 {
            return Err(trouble(Trouble::damaged("it is empty")));
        }
        let db = builder().open(&path).map_err(|error| trouble(error.into()))?;
        return Ok((file, db));
    }
    // Made under another name, so that a file that was never finished is not taken for one that was damaged. Whoever
    // starts two nodes in a new directory gets an error from one of them: redb locks the file.
    let unfinished = dir.join(UNFINISHED);
    let made = match builder().create(&unfinished).map_err(Trouble::from) {
        Err(Trouble::Damaged(..)) => {
            std::fs::remove_file(&unfinished).map_err(failed)?;
            builder().create(&unfinished).map_err(Trouble::from)
        }
        made => made,
    };
    let db = made.map_err(trouble)?;
    if path.try_exists().map_err(failed)? {
        return Err(DiskError::InUse { file });
    }
    std::fs::rename(&unfinished, &path).map_err(failed)?;
    // A name is on disk once its directory is, and so on upwards.
    let sync = |dir: &Path| File::open(dir).and_then(|dir| dir.sync_all());
    sync(dir).map_err(failed)?;
    if let Some(parent) = dir.canonicalize().map_err(failed)?.parent() {
        sync(parent).map_err(failed)?;
    }
    Ok((file, db))
}

fn read_log(
    log: &impl ReadableTable<u64, &'static [u8]>,
    purged: Option<LogId>,
) -> Result<Option<LogId>, Trouble> {
    let mut last = purged;
    for row in log.iter()? {
        let (index, record) = row?;
        let index = index.value();
        let due = last.map_or(index, |last| last.index + 1);
        let entry = read_entry(index, record.value())?;
        if index != due {
            let problem = format!("entry {due} is missing: the next one is {index}");
            return Err(Trouble::Damaged("the log".to_owned(), problem));
        }
        if last.is_some_and(|last| entry.log_id <= last) {
            let problem = format!("{} comes after {}", entry.log_id, show(last));
            return Err(Trouble::Damaged(format!("log entry {index}"), problem));
        }
        last = Some(entry.log_id);
    }
    Ok(last)
}

fn read_entry(index: u64, record: &[u8]) -> Result<Entry, Trouble> {
    let what = || format!("log entry {index}");
    let wire: pb::RaftEntry = record::open_as(Kind::Entry, index, record).map_err(named(what))?;
    let entry = wire::entry(wire).map_err(|error| Trouble::Damaged(what(), error.to_string()))?;
    if entry.log_id.index == index {
        Ok(entry)
    } else {
        Err(Trouble::Damaged(what(), format!("it says that it is entry {}", entry.log_id.index)))
    }
}

fn read_identity(record: &[u8]) -> Result<Identity, Trouble> {
    let what = || "the node's identity".to_owned();
    let wire = record::open_as(Kind::Identity, 0, record).map_err(named(what))?;
    wire::identity(wire).map_err(|error| Trouble::Damaged(what(), error.to_string()))
}

fn read_vote(record: &[u8]) -> Result<Vote, Trouble> {
    record::open_as(Kind::Vote, 0, record).map(wire::vote).map_err(named(|| "the vote".to_owned()))
}

fn read_head(record: &[u8]) -> Result<Head, Trouble> {
    let what = || "the snapshot".to_owned();
    let wire = record::open_as(Kind::SnapshotHead, 0, record).map_err(named(what))?;
    let head = wire::head(wire).map_err(|error| Trouble::Damaged(what(), error.to_string()))?;
    if head.format > SNAPSHOT_FORMAT {
        return Err(Trouble::Newer(what(), u64::from(head.format), u64::from(SNAPSHOT_FORMAT)));
    }
    Ok(head)
}

fn show(id: Option<LogId>) -> String {
    id.map_or_else(|| "nothing".to_owned(), |id| id.to_string())
}

fn named(what: impl FnOnce() -> String) -> impl FnOnce(RecordError) -> Trouble {
    move |error| match error {
        RecordError::Newer { found } => {
            Trouble::Newer(what(), u64::from(found), u64::from(record::FORMAT))
        }
        RecordError::Damaged(problem) => Trouble::Damaged(what(), problem),
    }
}

/// What went wrong, before it is said in which file.
enum Trouble {
    InUse,
    Closed,
    Newer(String, u64, u64),
    Damaged(String, String),
    Io(io::Error),
}

impl Trouble {
    fn damaged(problem: impl Into<String>) -> Self {
        Self::Damaged("the file".to_owned(), problem.into())
    }

    fn at(self, file: &str) -> DiskError {
        let file = file.to_owned();
        match self {
            Self::InUse => DiskError::InUse { file },
            Self::Closed => DiskError::Closed { file },
            Self::Newer(what, found, known) => DiskError::Newer { file, what, found, known },
            Self::Damaged(what, problem) => DiskError::Damaged { file, what, problem },
            Self::Io(source) => DiskError::Io { file, source },
        }
    }
}

impl<E: Into<redb::Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        match error.into() {
            redb::Error::DatabaseAlreadyOpen => Self::InUse,
            redb::Error::Corrupted(problem) => Self::damaged(problem),
            redb::Error::Io(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                ) =>
            {
                Self::damaged(source.to_string())
            }
            redb::Error::Io(source) => Self::Io(source),
            other @ (redb::Error::TableDoesNotExist(_) | redb::Error::TableTypeMismatch { .. }) => {
                Self::damaged(other.to_string())
            }
            other => Self::Io(io::Error::other(other)),
        }
    }
}

/// Lets a backend in a box be a backend.
#[derive(Debug)]
struct Boxed(Box<dyn StorageBackend>);

impl StorageBackend for Boxed {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

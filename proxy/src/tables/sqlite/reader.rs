//! Reads a file of SQLite.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::lookup::desk::Desk;
use crate::lookup::{Fault, Found, Source, Told};
use crate::tables::sqlite::Sqlite;

/// How often the file is looked at while nobody asks for anything.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a writer may hold the file before the question fails.
const BUSY: Duration = Duration::from_millis(250);
/// Which part of what a request waits a question may take, so that those behind one that hangs have their turn in time.
const SHARE: u32 = 4;
/// After how many of its steps SQLite says that it still runs: every few milliseconds at most.
const STEPS: i32 = 10_000;

/// Reads a file of SQLite.
pub(super) struct Reader {
    table: Sqlite,
    open: Option<Open>,
    /// Whether it was closed since something failed, and what changed until it was open again has not been told of.
    missed: Missed,
    began: Instant,
    /// When a question has taken too long, in nanoseconds after `began`.
    until: Arc<AtomicU64>,
}

/// What nobody has seen of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missed {
    Nothing,
    /// It is closed.
    Goes,
    /// It was closed.
    Went,
}

struct Open {
    connection: Connection,
    inode: u64,
    version: i64,
}

impl Reader {
    pub(super) fn new(table: Sqlite) -> Self {
        let until = Arc::new(AtomicU64::new(u64::MAX));
        Self { table, open: None, missed: Missed::Nothing, began: Instant::now(), until }
    }

    fn inode(&self) -> Option<u64> {
        fs::metadata(&self.table.file).ok().map(|file| file.ino())
    }

    fn opened(&mut self, within: Duration) -> Result<&mut Open, rusqlite::Error> {
        if self.open.is_none() {
            let inode = self.inode().unwrap_or(0);
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let mut connection = Connection::open_with_flags(&self.table.file, flags)?;
            connection.busy_timeout(within.min(BUSY))?;
            let (began, until) = (self.began, Arc::clone(&self.until));
            let is_late = move || nanos(began.elapsed()) >= until.load(Relaxed);
            connection.progress_handler(STEPS, Some(is_late))?;
            let version = version(&connection)?;
            self.open = Some(Open { connection, inode, version });
            if self.missed == Missed::Goes {
                self.missed = Missed::Went;
            }
        }
        Ok(self.open.as_mut().expect("it was just opened"))
    }

    fn find(&mut self, key: &[u8], within: Duration) -> Found {
        self.until.store(nanos(self.began.elapsed() + within), Relaxed);
        let found = self.ask(key, within);
        self.until.store(u64::MAX, Relaxed);
        found.unwrap_or_else(|error| match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted | ErrorCode::DatabaseBusy) => Err(Fault::Late),
            _ => {
                if self.open.take().is_some() {
                    self.missed = Missed::Goes;
                }
                Err(Fault::Down(error.to_string()))
            }
        })
    }

    fn ask(&mut self, key: &[u8], within: Duration) -> Result<Found, rusqlite::Error> {
        let query = self.table.query.clone();
        let connection = &self.opened(within)?.connection;
        let mut query = connection.prepare(&query)?;
        // Domains are stored as text, to which a blob is never equal.
        let mut rows = match str::from_utf8(key) {
            Ok(text) => query.query([text])?,
            Err(_) => query.query([key])?,
        };
        let Some(row) = rows.next()? else { return Ok(Ok(None)) };
        let answer = match row.get_ref(0)? {
            ValueRef::Null => None,
            ValueRef::Integer(number) => Some(number.to_string().into_bytes()),
            ValueRef::Real(number) => Some(number.to_string().into_bytes()),
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(bytes.to_vec()),
        };
        Ok(if rows.next()?.is_some() { Err(Fault::Two) } else { Ok(answer) })
    }

    /// Says whether anything may have changed since this was last asked.
    fn has_changed(&mut self) -> bool {
        // While the file is gone the old answers are all there is.
        let Some(inode) = self.inode() else { return false };
        let Some(open) = &mut self.open else { return false };
        if self.missed == Missed::Went {
            self.missed = Missed::Nothing;
            return true;
        }
        if inode == open.inode {
            match version(&open.connection) {
                Ok(version) if version == open.version => return false,
                Ok(version) => {
                    open.version = version;
                    return true;
                }
                Err(_) => {}
            }
        }
        // Another file has taken its place, or it cannot be read any more.
        self.open = None;
        true
    }
}

/// Changes with each change that another connection has made. Read on the connection that also reads the table, and before it: what is
/// read afterwards is no older than the change.
fn version(connection: &Connection) -> Result<i64, rusqlite::Error> {
    connection.query_row("pragma data_version", [], |row| row.get(0))
}

fn nanos(length: Duration) -> u64 {
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
}

impl Source for Reader {
    async fn serve(mut self, mut desk: Desk) {
        let (teller, within) = (desk.teller(), desk.within() / SHARE);
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let key = tokio::select! {
                key = desk.next() => match key {
                    Some(key) => Some(key),
                    None => return,
                },
                _ = look.tick() => None,
            };
            if self.has_changed() {
                teller.flush();
            }
            let Some(key) = key else { continue };
            teller.asks(&key);
            while teller.answer(&key, self.find(&key, within)) == Told::Again {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lookup::{Limits, Lookup};

    const WITHIN: Duration = Duration::from_secs(10);
    const QUERY: &str = "select shard from shops where domain = ?1";

    fn shops(path: &std::path::Path) -> Connection {
        let db = Connection::open(path).unwrap();
        db.execute_batch(
            "create table shops (domain text, shard); insert into shops values \
             ('a.org', 7), ('b.org', 'eu-1'), ('c.org', x'00ff'), ('two.org', 1), ('two.org', 2), \
             ('empty.org', ''), ('null.org', null), ('null2.org', null), ('null2.org', 3)",
        )
        .unwrap();
        db
    }

    #[test]
    fn rows_are_found_and_two_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shops.db");
        let mut table = Reader::new(Sqlite { file: path.clone(), query: QUERY.to_owned() });
        // Not there at the start.
        assert!(matches!(table.find(b"a.org", WITHIN), Err(Fault::Down(_))));
        let _db = shops(&path);
        for (key, wanted) in [
            ("a.org", Ok(Some(b"7".to_vec()))),
            ("b.org", Ok(Some(b"eu-1".to_vec()))),
            ("c.org", Ok(Some(vec![0, 255]))),
            ("two.org", Err(Fault::Two)),
            ("empty.org", Ok(Some(Vec::new()))),
            ("null.org", Ok(None)),
            ("null2.org", Err(Fault::Two)),
            ("none.org", Ok(None)),
            ("' or 1=1 --", Ok(None)),
        ] {
            assert_eq!(table.find(key.as_bytes(), WITHIN), wanted, "{key}");
        }
    }

    /// Waits until a key has the answer, for at most ten seconds.
    async fn until(lookup: &Lookup, answer: &[u8]) {
        let start = Instant::now();
        while lookup.find(b"a.org").await.as_deref() != Ok(answer) {
            assert!(start.elapsed() < Duration::from_secs(10), "{answer:?} does not come");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_change_is_noticed_long_before_answers_grow_old() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shops.db");
        let db = shops(&path);
        let limits = Limits { ttl: Duration::from_secs(3600), ..Limits::default() };
        let table = Sqlite { file: path.clone(), query: QUERY.to_owned() };
        let lookup = Lookup::start("shops", limits, Reader::new(table)).unwrap();
        until(&lookup, b"7").await;
        db.execute_batch("update shops set shard = 8 where domain = 'a.org'").unwrap();
        until(&lookup, b"8").await;
        // Another file in its place.
        let other = folder.path().join("other.db");
        shops(&other).execute_batch("update shops set shard = 9 where domain = 'a.org'").unwrap();
        fs::rename(&other, &path).unwrap();
        until(&lookup, b"9").await;
        // The file is gone: what was known still serves.
        fs::remove_file(&path).unwrap();
        until(&lookup, b"9").await;
    }

    #[tokio::test]
    async fn a_change_beside_a_question_that_fails_is_noticed_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shops.db");
        let db = shops(&path);
        let limits = Limits { ttl: Duration::from_secs(3600), ..Limits::default() };
        let query = "select case ?1 when 'bad' then json_extract(?1, '$') else shard end \
                     from shops where domain = ?1 or ?1 = 'bad'";
        let table = Sqlite { file: path.clone(), query: query.to_owned() };
        let lookup = Lookup::start("shops", limits, Reader::new(table)).unwrap();
        until(&lookup, b"7").await;
        assert!(matches!(lookup.find(b"bad").await, Err(Fault::Down(_))));
        db.execute_batch("update shops set shard = 8 where domain = 'a.org'").unwrap();
        // The next question opens it again.
        assert_eq!(lookup.find(b"b.org").await.as_deref(), Ok(&b"eu-1"[..]));
        until(&lookup, b"8").await;
    }

    #[tokio::test]
    async fn a_question_that_takes_too_long_ends_and_the_next_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shops.db");
        let _db = shops(&path);
        let query = "with recursive n(x) as (select 1 union all select x + 1 from n) \
                     select x from n where ?1 <> 'for ever' or x < 0 limit 1";
        let mut table = Reader::new(Sqlite { file: path, query: query.to_owned() });
        let short = Duration::from_millis(50);
        assert_eq!(table.find(b"for ever", short), Err(Fault::Late));
        assert_eq!(table.find(b"at once", WITHIN), Ok(Some(b"1".to_vec())));
    }
}

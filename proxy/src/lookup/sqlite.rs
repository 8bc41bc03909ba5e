//! A table in a file of SQLite. Another process may write it at any time: what was kept is then forgotten.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};

use crate::lookup::{Fault, Table};

/// How long a writer may hold the file before the question fails.
const BUSY: Duration = Duration::from_millis(250);

/// A table in a file of SQLite.
#[derive(Debug)]
pub struct Sqlite {
    path: PathBuf,
    query: String,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    connection: Connection,
    inode: u64,
    version: i64,
}

impl Sqlite {
    /// Names a file, and a query with one parameter (the key) and one column, such as `select shard from shops where domain = ?1`.
    /// The file is opened when it is first asked, and again after each fault.
    pub fn new(path: impl Into<PathBuf>, query: impl Into<String>) -> Self {
        Self { path: path.into(), query: query.into(), open: None }
    }

    fn inode(&self) -> Option<u64> {
        fs::metadata(&self.path).ok().map(|file| file.ino())
    }

    fn opened(&mut self) -> Result<&mut Open, rusqlite::Error> {
        if self.open.is_none() {
            let inode = self.inode().unwrap_or(0);
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(&self.path, flags)?;
            connection.busy_timeout(BUSY)?;
            let version = version(&connection)?;
            self.open = Some(Open { connection, inode, version });
        }
        Ok(self.open.as_mut().expect("it was just opened"))
    }

    fn ask(&mut self, key: &[u8]) -> Result<Result<Option<Vec<u8>>, Fault>, rusqlite::Error> {
        let query = self.query.clone();
        let connection = &self.opened()?.connection;
        let mut query = connection.prepare(&query)?;
        // Domains are stored as text, to which a blob is never equal.
        let mut rows = match str::from_utf8(key) {
            Ok(text) => query.query([text])?,
            Err(_) => query.query([key])?,
        };
        let Some(row) = rows.next()? else { return Ok(Ok(None)) };
        let answer = match row.get_ref(0)? {
            ValueRef::Null => return Ok(Ok(None)),
            ValueRef::Integer(number) => number.to_string().into_bytes(),
            ValueRef::Real(number) => number.to_string().into_bytes(),
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.to_vec(),
        };
        Ok(if rows.next()?.is_some() { Err(Fault::Two) } else { Ok(Some(answer)) })
    }
}

/// Changes with each change that another connection has made.
fn version(connection: &Connection) -> Result<i64, rusqlite::Error> {
    connection.query_row("pragma data_version", [], |row| row.get(0))
}

impl Table for Sqlite {
    fn find(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
        self.ask(key).unwrap_or_else(|error| {
            self.open = None;
            Err(Fault::Down(error.to_string()))
        })
    }

    fn has_changed(&mut self) -> bool {
        // While the file is gone the old answers are all there is.
        let Some(inode) = self.inode() else { return false };
        let Some(open) = &mut self.open else { return false };
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

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::lookup::{Limits, Lookup};

    const QUERY: &str = "select shard from shops where domain = ?1";

    fn shops(path: &std::path::Path) -> Connection {
        let db = Connection::open(path).unwrap();
        db.execute_batch(
            "create table shops (domain text, shard); insert into shops values \
             ('a.org', 7), ('b.org', 'eu-1'), ('c.org', x'00ff'), ('two.org', 1), ('two.org', 2), \
             ('empty.org', ''), ('null.org', null)",
        )
        .unwrap();
        db
    }

    #[test]
    fn rows_are_found_and_two_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shops.db");
        let mut table = Sqlite::new(&path, QUERY);
        // Not there at the start.
        assert!(matches!(table.find(b"a.org"), Err(Fault::Down(_))));
        let _db = shops(&path);
        for (key, wanted) in [
            ("a.org", Ok(Some(b"7".to_vec()))),
            ("b.org", Ok(Some(b"eu-1".to_vec()))),
            ("c.org", Ok(Some(vec![0, 255]))),
            ("two.org", Err(Fault::Two)),
            ("empty.org", Ok(Some(Vec::new()))),
            ("null.org", Ok(None)),
            ("none.org", Ok(None)),
            ("' or 1=1 --", Ok(None)),
        ] {
            assert_eq!(table.find(key.as_bytes()), wanted, "{key}");
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
        let lookup = Lookup::start(Sqlite::new(&path, QUERY), limits).unwrap();
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
}

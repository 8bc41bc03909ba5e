//! The SQLite recipe of docs/fencing.md, run as it is printed there: the test reads its SQL from the page.
//!
//! Owners are connections of their own to one database on disk, as they would be in life.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use mandoline::fence::{Fence, Token};
use mandoline::{Slice, SliceKey};
use mandoline_core::prng::Prng;
use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Statement};

const PAGE: &str = include_str!("../../docs/fencing.md");

/// Gives the statements of one of the page's blocks.
fn recipe(name: &str) -> Vec<&'static str> {
    let opening = format!("```sql\n-- {name}\n");
    let block = PAGE.split(&opening).nth(1).unwrap_or_else(|| panic!("the page has no {name}"));
    let block = block.split("```").next().unwrap();
    block.split(';').map(str::trim).filter(|statement| !statement.is_empty()).collect()
}

/// One owner's connection.
struct Owner(Connection);

/// A token that the database found too old, or no longer newest.
#[derive(Debug, PartialEq, Eq)]
struct Stale;

impl Owner {
    fn connect(path: &Path) -> Self {
        let connection = Connection::open(path).unwrap();
        connection.busy_timeout(Duration::ZERO).unwrap();
        Self(connection)
    }

    /// The recipe's transaction, statement by statement.
    fn advance(&self, range: Slice, token: Token) -> Result<(), Stale> {
        self.try_advance(range, token).unwrap()
    }

    fn try_advance(&self, range: Slice, token: Token) -> rusqlite::Result<Result<(), Stale>> {
        let place = |key: Option<SliceKey>| key.map_or(Value::Null, blob);
        let values = [
            (":first", blob(range.first())),
            (":last", blob(range.last())),
            (":before", place(range.first().previous())),
            (":after", place(range.last().next())),
            (":token", Value::Blob(token.to_be_bytes().into())),
        ];
        for text in recipe("sqlite: advance") {
            let mut statement = self.0.prepare(text)?;
            bind(&mut statement, &values)?;
            let newer = statement.raw_query().next()?.is_some();
            if newer {
                drop(statement);
                self.0.execute_batch("ROLLBACK")?;
                return Ok(Err(Stale));
            }
        }
        Ok(Ok(()))
    }

    /// Writes a number where the key lies; the key of an item is its place here.
    fn write(&self, key: SliceKey, value: i64, token: Token) -> Result<(), Stale> {
        let [text] = recipe("sqlite: write")[..] else { panic!("a write is one statement") };
        let mut statement = self.0.prepare(text).unwrap();
        let values = [
            (":key", blob(key)),
            (":value", Value::Integer(value)),
            (":place", blob(key)),
            (":token", Value::Blob(token.to_be_bytes().into())),
        ];
        bind(&mut statement, &values).unwrap();
        match statement.raw_execute().unwrap() {
            0 => Err(Stale),
            1 => Ok(()),
            more => panic!("{more} rows changed"),
        }
    }

    fn read(&self, key: SliceKey) -> Option<i64> {
        let value = |row: &Row<'_>| row.get(0);
        let found = self.0.query_row("SELECT value FROM item WHERE key = ?", [blob(key)], value);
        found.optional().unwrap()
    }

    /// The table, joined as `Fence` joins. Panics unless it covers every key once.
    fn tokens(&self) -> Vec<(Slice, Token)> {
        let mut select =
            self.0.prepare("SELECT first, last, token FROM fence ORDER BY first").unwrap();
        let key = |row: &Row<'_>, at| row.get(at).map(|bytes| SliceKey(u64::from_be_bytes(bytes)));
        let row =
            |row: &Row<'_>| Ok((key(row, 0)?, key(row, 1)?, Token::from_be_bytes(row.get(2)?)));
        let mut next = Some(SliceKey::MIN);
        let mut joined: Vec<(Slice, Token)> = Vec::new();
        for (first, last, token) in select.query_map([], row).unwrap().map(Result::unwrap) {
            assert_eq!(next, Some(first), "no gap and no overlap");
            next = last.next();
            match joined.last_mut() {
                Some((range, known)) if *known == token => {
                    *range = Slice::new(range.first(), last).unwrap();
                }
                _ => joined.push((Slice::new(first, last).unwrap(), token)),
            }
        }
        assert_eq!(next, None, "the last key is covered");
        joined
    }
}

fn bind(statement: &mut Statement<'_>, values: &[(&str, Value)]) -> rusqlite::Result<()> {
    for (name, value) in values {
        if let Some(index) = statement.parameter_index(name)? {
            statement.raw_bind_parameter(index, value)?;
        }
    }
    Ok(())
}

fn blob(key: SliceKey) -> Value {
    Value::Blob(key.0.to_be_bytes().into())
}

fn slice(first: u64, last: u64) -> Slice {
    Slice::new(SliceKey(first), SliceKey(last)).unwrap()
}

fn token(number: u64) -> Token {
    Token { incarnation: 1, number }
}

/// A database on disk and two owners' connections to it.
fn owners() -> (tempfile::TempDir, Owner, Owner) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("storage.db");
    let (old, new) = (Owner::connect(&path), Owner::connect(&path));
    old.0.execute_batch("CREATE TABLE item (key BLOB PRIMARY KEY, value INTEGER)").unwrap();
    old.0.execute_batch(&recipe("sqlite: schema").join(";")).unwrap();
    (folder, old, new)
}

const KEY: SliceKey = SliceKey(7);

#[test]
fn a_delayed_write_is_refused_after_advance() {
    let (_folder, old, new) = owners();
    old.advance(slice(0, 99), token(1)).unwrap();
    old.write(KEY, 10, token(1)).unwrap();
    // Here the old owner sends 50, and it is delayed. The slice moves.
    new.advance(slice(0, 99), token(2)).unwrap();
    let seen = new.read(KEY).unwrap();
    assert_eq!(old.write(KEY, 50, token(1)), Err(Stale), "it arrives, and is told so");
    new.write(KEY, seen + 1, token(2)).unwrap();
    assert_eq!(new.read(KEY), Some(11));
    assert_eq!(old.write(KEY, 50, token(1)), Err(Stale));
}

#[test]
fn without_advance_the_delayed_write_gets_through_and_is_lost() {
    let (_folder, old, new) = owners();
    old.advance(slice(0, 99), token(1)).unwrap();
    old.write(KEY, 10, token(1)).unwrap();
    // The same sequence. The new owner has a greater token, and shows it with its writes only.
    let seen = new.read(KEY).unwrap();
    assert_eq!(old.write(KEY, 50, token(1)), Ok(()), "acknowledged");
    new.write(KEY, seen + 1, token(2)).unwrap();
    assert_eq!(new.read(KEY), Some(11), "computed from 10: the 50 is lost");
    assert_eq!(old.write(KEY, 60, token(1)), Ok(()), "and it goes on");
}

#[test]
fn a_delayed_write_that_comes_before_advance_is_read() {
    let (_folder, old, new) = owners();
    old.advance(slice(0, 99), token(1)).unwrap();
    old.write(KEY, 50, token(1)).unwrap();
    new.advance(slice(0, 99), token(2)).unwrap();
    assert_eq!(new.read(KEY), Some(50));
}

#[test]
fn advance_waits_for_a_write_that_was_let_in() {
    let (_folder, old, new) = owners();
    old.advance(slice(0, 99), token(1)).unwrap();
    old.0.execute_batch("BEGIN").unwrap();
    old.write(KEY, 50, token(1)).unwrap();
    let busy = new.try_advance(slice(0, 99), token(2)).unwrap_err();
    assert_eq!(busy.sqlite_error_code(), Some(ErrorCode::DatabaseBusy));
    old.0.execute_batch("COMMIT").unwrap();
    new.advance(slice(0, 99), token(2)).unwrap();
    assert_eq!(new.read(KEY), Some(50));
}

#[test]
fn ranges_split_and_merge() {
    let (_folder, old, new) = owners();
    old.advance(slice(0, 99), token(1)).unwrap();
    new.advance(slice(20, 39), token(2)).unwrap();
    for (key, stale) in [(19, false), (20, true), (39, true), (40, false), (99, false)] {
        assert_eq!(old.write(SliceKey(key), 1, token(1)).is_err(), stale, "{key}");
    }
    assert_eq!(old.advance(slice(0, 99), token(1)), Err(Stale), "the middle has a newer owner");
    assert_eq!(old.advance(slice(0, 19), token(1)), Ok(()), "a range of its own it may have again");
    // All of it goes to one owner, whole.
    new.advance(slice(0, 99), token(3)).unwrap();
    let unowned = (slice(100, u64::MAX), Token::ZERO);
    assert_eq!(new.tokens(), [(slice(0, 99), token(3)), unowned]);
    let rows: i64 = new.0.query_row("SELECT count(*) FROM fence", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 2);
}

#[test]
fn a_restored_cluster_is_newer_than_the_one_before() {
    let (_folder, old, new) = owners();
    old.advance(Slice::FULL, token(900)).unwrap();
    let restored = Token { incarnation: 2, number: 1 };
    new.advance(Slice::FULL, restored).unwrap();
    assert_eq!(old.write(KEY, 50, token(901)), Err(Stale), "the old cluster still runs");
    assert_eq!(old.advance(Slice::FULL, token(902)), Err(Stale));
    new.write(KEY, 51, restored).unwrap();
}

#[test]
fn keys_compare_as_unsigned_numbers() {
    let (_folder, owner, _) = owners();
    owner.advance(slice(1 << 63, u64::MAX), token(2)).unwrap();
    assert_eq!(owner.write(SliceKey((1 << 63) - 1), 1, token(1)), Ok(()));
    assert_eq!(owner.write(SliceKey(1 << 63), 1, token(1)), Err(Stale));
    assert_eq!(owner.write(SliceKey::MAX, 1, token(1)), Err(Stale));
}

#[test]
fn bytes_of_a_wrong_length_are_refused() {
    let (_folder, owner, _) = owners();
    for bad in ["(x'00', x'ff', zeroblob(16))", "(zeroblob(8), zeroblob(8), zeroblob(15))"] {
        let insert = format!("INSERT OR REPLACE INTO fence VALUES {bad}");
        let error = owner.0.execute_batch(&insert).unwrap_err();
        assert_eq!(error.sqlite_error_code(), Some(ErrorCode::ConstraintViolation), "{bad}");
    }
}

#[test]
fn the_table_and_the_fence_in_memory_agree() {
    const KEYS: u64 = 16;
    for seed in 0..5 {
        let (_folder, owner, _) = owners();
        owner.0.execute_batch("PRAGMA synchronous = OFF").unwrap();
        let mut fence = Fence::new();
        let mut prng = Prng::new(seed);
        // Both ends of the line are among the places.
        let place = |n| if n < KEYS / 2 { n } else { u64::MAX - (KEYS - 1 - n) };
        for step in 0..60 {
            let (one, other) = (place(prng.below(KEYS)), place(prng.below(KEYS)));
            let range = slice(one.min(other), one.max(other));
            let token = token(prng.below(step / 4 + 2));
            let expected = fence.advance(range, token).map_err(|_| Stale);
            assert_eq!(owner.advance(range, token), expected, "seed {seed}, step {step}");
            assert_eq!(owner.tokens(), fence.tokens().collect::<Vec<_>>(), "seed {seed}");
            let key = SliceKey(place(prng.below(KEYS)));
            let expected = fence.check(key, token).map_err(|_| Stale);
            assert_eq!(owner.write(key, 1, token), expected, "seed {seed}, step {step}");
        }
    }
}

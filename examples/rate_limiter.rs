//! A rate limiter: each user's bucket of tokens has one owner, which decides in memory, and a row in a database, which outlives it.
//!
//! The job is exclusive, so no two tasks hand out the tokens of one user. A grant is written down before it is given, so the next
//! owner goes on where this one ended. A write that comes late is refused by the row, which knows its newest owner (docs/fencing.md).
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by
//! `printf 'name: limits\nconsistency: exclusive\n' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example rate_limiter -- limits-0 127.0.0.1:9020 buckets.db
//!     cargo run -p examples --example rate_limiter -- limits-1 127.0.0.1:9021 buckets.db
//!     curl -i -X POST http://127.0.0.1:9020/take/ann
//!
//! Ask either, a dozen times. The database belongs to its cluster: begin a new file with a new cluster.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Extension, Router};
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::http::own::Own;
use mandoline::{Clerk, Slicelet};
use rusqlite::{Connection, OptionalExtension, params};
use tokio::net::TcpListener;

const USAGE: &str = "usage: rate_limiter NAME ADDRESS DATABASE   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

/// What a bucket holds at most, and what flows into it each second.
const BURST: f64 = 10.0;
const PER_SECOND: f64 = 0.5;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS bucket
    (user TEXT PRIMARY KEY, tokens REAL NOT NULL, at REAL NOT NULL, owner BLOB NOT NULL) STRICT";
/// Takes a bucket over and reads it, in one step: what an owner before has written is read, what it writes from now on is refused.
const TAKE_OVER: &str = "INSERT INTO bucket VALUES (?1, ?2, ?3, ?4)
    ON CONFLICT (user) DO UPDATE SET owner = excluded.owner WHERE owner <= excluded.owner
    RETURNING tokens, at";
const WRITE: &str = "UPDATE bucket SET tokens = ?2, at = ?3 WHERE user = ?1 AND owner = ?4";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [name, address, database] = words.as_slice() else { return Err(USAGE.into()) };
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?.to_string();
    let limiter = Arc::new(Mutex::new(Limiter::open(database)?));

    let slicelet = Slicelet::builder("limits", name, &address).assigners(&assigners);
    let slicelet = Arc::new(slicelet.start()?);
    let clerk = Clerk::builder("limits").sources(&assigners).start()?;
    let backhaul = BackhaulLayer::new(name, Arc::clone(&slicelet), clerk, KeyFrom::path(1));
    let app = Router::new().route("/take/{user}", post(take)).with_state(limiter).layer(backhaul);
    let serving = tokio::spawn(async { axum::serve(listener, app).await });
    slicelet.ready().await?;
    println!("{name} serves at {address}");

    // Ctrl-C hands the slices over before the task goes; requests for them wait until the next owner has them.
    tokio::signal::ctrl_c().await?;
    slicelet.shutdown().await;
    serving.abort();
    Ok(())
}

async fn take(
    State(limiter): State<Arc<Mutex<Limiter>>>,
    Extension(Own(guard)): Extension<Own>,
    Path(user): Path<String>,
) -> (StatusCode, String) {
    let owner = guard.fencing_token().to_be_bytes();
    let taken = tokio::task::block_in_place(|| {
        limiter.lock().expect("nobody panics in here").take(&user, owner)
    });
    match taken {
        // A lease can run out at any moment: nothing is said about a bucket that may be another's by now.
        Ok(_) if !guard.still_owned() => again("the lease has run out"),
        Ok(true) => (StatusCode::OK, format!("a token for {user}\n")),
        Ok(false) => (StatusCode::TOO_MANY_REQUESTS, format!("{user} has no token left\n")),
        Err(error) => again(&error.to_string()),
    }
}

fn again(why: &str) -> (StatusCode, String) {
    (StatusCode::SERVICE_UNAVAILABLE, format!("ask again: {why}\n"))
}

/// The buckets of this task, as they are on disk. Those that are full again could be forgotten; these are kept.
struct Limiter {
    disk: Connection,
    buckets: HashMap<String, Bucket>,
}

#[derive(Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: f64,
    owner: [u8; 16],
}

impl Limiter {
    fn open(path: &str) -> Result<Self, rusqlite::Error> {
        let disk = Connection::open(path)?;
        disk.pragma_update(None, "journal_mode", "wal")?;
        disk.execute(SCHEMA, [])?;
        Ok(Self { disk, buckets: HashMap::new() })
    }

    /// Takes a token out, if there is one. Without one nothing is written: floods stay in memory.
    fn take(&mut self, user: &str, owner: [u8; 16]) -> Result<bool, Box<dyn Error>> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        let known = self.buckets.get(user).filter(|bucket| bucket.owner == owner).copied();
        let Bucket { tokens, at, .. } = match known {
            Some(bucket) => bucket,
            None => self.take_over(user, owner, now)?,
        };
        let tokens = (tokens + (now - at).max(0.0) * PER_SECOND).min(BURST);
        if tokens < 1.0 {
            return Ok(false);
        }
        let bucket = Bucket { tokens: tokens - 1.0, at: now, owner };
        if self.disk.execute(WRITE, params![user, bucket.tokens, now, owner])? == 0 {
            return Err("another task has the bucket".into());
        }
        self.buckets.insert(user.to_owned(), bucket);
        Ok(true)
    }

    fn take_over(
        &mut self,
        user: &str,
        owner: [u8; 16],
        now: f64,
    ) -> Result<Bucket, Box<dyn Error>> {
        let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
        let read = self.disk.query_row(TAKE_OVER, params![user, BURST, now, owner], read);
        let (tokens, at) = read.optional()?.ok_or("another task has the bucket")?;
        let bucket = Bucket { tokens, at, owner };
        self.buckets.insert(user.to_owned(), bucket);
        Ok(bucket)
    }
}

//! Keys that are translated through a table, such as a shop's domain to its shard, before a task is looked for.
//!
//! A table may be slow, or block whoever asks it: it is asked on a thread of its own, and each question once however many requests
//! have it. What it said is kept for a while, also that it knew nothing.

mod cache;
pub mod desk;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::key::KEY_MAX_BYTES;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Sender};
use tokio::task::LocalSet;
use tokio::time::{Instant, timeout};
use tracing::warn;

use crate::lookup::cache::Known;
use crate::lookup::desk::{Desk, Teller};
use crate::seldom::Seldom;

/// What a table says of a key: what stands for it, or that it has nothing.
pub type Answer = Option<Arc<[u8]>>;

/// How many different keys may wait for the table: as many as requests may be held, which ask at once when they go on. Beyond
/// them it does not keep up.
const WAITING_MAX: usize = 10_000;

/// How a lookup is kept within bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a request waits for the table.
    pub within: Duration,
    /// How long an answer is good.
    pub ttl: Duration,
    /// How long it is good that the table has nothing.
    pub negative_ttl: Duration,
    /// For how long beyond its time an answer is good while the table gives none.
    pub stale: Duration,
    /// How many bytes of keys and answers are kept.
    pub cache_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            within: Duration::from_secs(1),
            ttl: Duration::from_secs(60),
            negative_ttl: Duration::from_secs(5),
            stale: Duration::from_secs(600),
            cache_bytes: 16 << 20,
        }
    }
}

/// Why a key has no translation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The table has nothing for it.
    #[error("the table has nothing for this key")]
    Unknown,
    /// The table has more than one answer.
    #[error("the table has two answers for this key: see that it can have only one")]
    Two,
    /// The answer cannot be a key.
    #[error("the table's answer is {0} bytes long: 1 to {KEY_MAX_BYTES} make a key")]
    Length(usize),
    /// The table cannot be asked.
    #[error("the table cannot be asked at the moment: {0}")]
    Down(String),
    /// The table did not answer in time.
    #[error("the table has not answered in time")]
    Late,
    /// It is not known, and nobody is to ask.
    #[error(
        "what stands for this key is not known at the moment, and to explain a request the table is not asked"
    )]
    Unasked,
    /// Too many questions wait for the table.
    #[error("too many questions wait for the table")]
    Busy,
}

/// What a table has for a key, if anything.
pub type Found = Result<Option<Vec<u8>>, Fault>;

/// Whether a question has its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It has.
    Enough,
    /// The key was changed while it was asked for: it is to be asked for again.
    Again,
}

/// What a lookup has done so far, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupStats {
    /// Requests for a key whose answer was kept.
    pub hits: u64,
    /// Requests for a key of which it was kept that the table has nothing.
    pub negative_hits: u64,
    /// Requests that had to wait for the table.
    pub misses: u64,
    /// Questions that the table was asked.
    pub questions: u64,
    /// Requests that got an old answer, since the table gave none.
    pub stale: u64,
    /// Requests to which the table did not answer in time.
    pub late: u64,
    /// Requests for which too many questions waited already.
    pub busy: u64,
    /// Requests for which the table could not be asked.
    pub down: u64,
    /// Requests for a key that has two answers.
    pub two: u64,
    /// Requests for a key whose answer cannot be a key.
    pub length: u64,
    /// Times that a key was forgotten, since it had changed.
    pub forgotten: u64,
    /// Times that all keys were.
    pub flushes: u64,
    /// Keys whose answers are kept, now.
    pub keys: usize,
    /// What they take, in bytes, now.
    pub bytes: usize,
}

/// Whoever has a table.
pub trait Source: Send + 'static {
    /// Answers what is asked until nobody is left who could ask. Runs on a thread of its own, so it may block.
    fn serve(self, desk: Desk) -> impl Future<Output = ()>;
}

/// A table with a cache before it. Clones share both.
#[derive(Clone, Debug)]
pub struct Lookup {
    name: Arc<str>,
    limits: Limits,
    teller: Teller,
    ask: Sender<Box<[u8]>>,
    complaints: Arc<Seldom>,
}

impl Lookup {
    /// Starts the thread that asks a table. It ends with the last clone.
    pub fn start(name: &str, limits: Limits, source: impl Source) -> io::Result<Self> {
        let (lookup, desk) = Self::with_desk(name, limits);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new()
            .name(format!("lookup {name}"))
            .spawn(move || LocalSet::new().block_on(&runtime, source.serve(desk)))?;
        Ok(lookup)
    }

    /// Makes a lookup that knows nothing and asks nobody: for a look at a configuration.
    pub fn idle(name: &str, limits: Limits) -> Self {
        Self::with_desk(name, limits).0
    }

    fn with_desk(name: &str, limits: Limits) -> (Self, Desk) {
        let (ask, asked) = mpsc::channel(WAITING_MAX);
        let teller = Teller::new(limits);
        let desk = Desk { asked, teller: teller.clone(), limits };
        let complaints = Arc::default();
        (Self { name: name.into(), limits, teller, ask, complaints }, desk)
    }

    /// Gives its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Translates a key.
    pub async fn find(&self, key: &[u8]) -> Result<Arc<[u8]>, Fault> {
        self.find_by(key, None).await
    }

    /// Translates a key by what the table says after something has happened. An answer of before does not serve, however good it
    /// would be, nor in place of one that the table does not give.
    pub async fn find_since(&self, key: &[u8], since: Instant) -> Result<Arc<[u8]>, Fault> {
        self.find_by(key, Some(since)).await
    }

    async fn find_by(&self, key: &[u8], since: Option<Instant>) -> Result<Arc<[u8]>, Fault> {
        match self.answer(key, since).await {
            Ok(answer) => answer.ok_or(Fault::Unknown),
            Err(fault) => {
                let now = Instant::now();
                self.complain(&fault, now);
                self.teller.cache().fails(key, now, since, fault)
            }
        }
    }

    async fn answer(&self, key: &[u8], since: Option<Instant>) -> Result<Answer, Fault> {
        let hears = {
            let mut cache = self.teller.cache();
            match cache.get(key, Instant::now(), since) {
                Known::Fresh(answer) => return Ok(answer),
                Known::Faulty(fault) => return Err(fault),
                Known::Asked(hears) => hears,
                Known::Nothing(hears) => match self.ask.try_send(key.into()) {
                    Ok(()) => hears,
                    Err(error) => {
                        cache.drop_question(key);
                        return Err(match error {
                            TrySendError::Full(_) => Fault::Busy,
                            TrySendError::Closed(_) => ended(),
                        });
                    }
                },
            }
        };
        match timeout(self.limits.within, hears).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ended()),
            Err(_) => Err(Fault::Late),
        }
    }

    /// Tells whoever runs the proxy why the table gives nothing: clients do not hear of it.
    fn complain(&self, fault: &Fault, now: Instant) {
        let is_tables = matches!(fault, Fault::Down(_) | Fault::Late | Fault::Busy);
        if is_tables && self.complaints.is_due(now) {
            // A server's own words may hold what a client sent.
            let error = fault.to_string();
            warn!(lookup = %self.name, error = %error.escape_debug(), "A lookup's table does not answer");
        }
    }

    /// Gives what is known without asking the table; of after something has happened, if that is given.
    pub fn known(&self, key: &[u8], since: Option<Instant>) -> Result<Arc<[u8]>, Fault> {
        match self.teller.cache().fresh(key, Instant::now(), since) {
            Some(answer) => answer.ok_or(Fault::Unknown),
            None => Err(Fault::Unasked),
        }
    }

    /// Forgets one key, so that the table is asked for it again.
    pub fn forget(&self, key: &[u8]) {
        self.teller.forget(key);
    }

    /// Forgets every key, so that the table is asked again.
    pub fn flush(&self) {
        self.teller.flush();
    }

    /// Says what it has done so far.
    pub fn stats(&self) -> LookupStats {
        self.teller.cache().stats()
    }
}

fn ended() -> Fault {
    Fault::Down("its thread has ended".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Answers only when it is let, with what the test says.
    struct Slow {
        asked: Arc<AtomicUsize>,
        answers: mpsc::UnboundedReceiver<Found>,
    }

    impl Source for Slow {
        async fn serve(mut self, mut desk: Desk) {
            let teller = desk.teller();
            while let Some(key) = desk.next().await {
                teller.asks(&key);
                loop {
                    self.asked.fetch_add(1, Ordering::SeqCst);
                    let Some(found) = self.answers.recv().await else { return };
                    if teller.answer(&key, found) == Told::Enough {
                        break;
                    }
                }
            }
        }
    }

    type Answers = mpsc::UnboundedSender<Found>;

    fn slow(limits: Limits) -> (Lookup, Answers, Arc<AtomicUsize>) {
        let (send, answers) = mpsc::unbounded_channel();
        let asked = Arc::new(AtomicUsize::new(0));
        let table = Slow { asked: Arc::clone(&asked), answers };
        (Lookup::start("shops", limits, table).unwrap(), send, asked)
    }

    #[tokio::test]
    async fn a_thousand_requests_for_one_name_ask_once() {
        let (lookup, answers, asked) =
            slow(Limits { within: Duration::from_secs(60), ..Limits::default() });
        let all = futures_util::future::join_all((0..1000).map(|_| lookup.find(b"a.org")));
        let (all, ()) = tokio::join!(all, async { answers.send(Ok(Some(b"7".to_vec()))).unwrap() });
        assert!(all.iter().all(|answer| answer.as_deref() == Ok(&b"7"[..])));
        assert_eq!(lookup.find(b"a.org").await.as_deref(), Ok(&b"7"[..]));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn what_is_not_there_is_remembered_too_until_a_flush() {
        let (lookup, answers, asked) = slow(Limits::default());
        answers.send(Ok(None)).unwrap();
        assert_eq!(lookup.find(b"a").await, Err(Fault::Unknown));
        assert_eq!(lookup.find(b"a").await, Err(Fault::Unknown));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert_eq!(lookup.known(b"a", None), Err(Fault::Unknown));
        lookup.flush();
        assert_eq!(lookup.known(b"a", None), Err(Fault::Unasked));
        answers.send(Ok(Some(b"1".to_vec()))).unwrap();
        assert_eq!(lookup.find(b"a").await.as_deref(), Ok(&b"1"[..]));
    }

    #[tokio::test]
    async fn a_table_that_hangs_holds_nobody_for_longer_than_is_set() {
        let (lookup, answers, asked) =
            slow(Limits { within: Duration::from_millis(20), ..Limits::default() });
        assert_eq!(lookup.find(b"a").await, Err(Fault::Late));
        // It still hangs: whoever comes now need not wait to learn that.
        assert_eq!(lookup.find(b"a").await, Err(Fault::Late));
        assert!(asked.load(Ordering::SeqCst) <= 1);
        drop(answers);
    }

    #[tokio::test]
    async fn a_table_that_does_not_keep_up_is_not_asked_for_more() {
        let (lookup, answers, asked) =
            slow(Limits { within: Duration::from_secs(60), ..Limits::default() });
        // One is with the table, and as many wait as may.
        let mut waiting = tokio::task::JoinSet::new();
        let mut ask = |n: usize| {
            let lookup = lookup.clone();
            waiting.spawn(async move { lookup.find(&n.to_be_bytes()).await });
        };
        ask(0);
        while asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        (1..=WAITING_MAX).for_each(ask);
        while lookup.stats().misses <= WAITING_MAX as u64 {
            tokio::task::yield_now().await;
        }
        assert_eq!(lookup.find(b"one more").await, Err(Fault::Busy));
        assert_eq!(lookup.stats().busy, 1);
        for _ in 0..=WAITING_MAX {
            answers.send(Ok(Some(b"1".to_vec()))).unwrap();
        }
        assert!(waiting.join_all().await.iter().all(Result::is_ok));
        answers.send(Ok(Some(b"2".to_vec()))).unwrap();
        assert!(lookup.find(b"one more").await.is_ok());
    }

    #[tokio::test]
    async fn an_answer_that_is_no_key_is_refused_and_not_kept() {
        let (lookup, answers, _) = slow(Limits::default());
        for (answer, fault) in [
            (Ok(Some(Vec::new())), Fault::Length(0)),
            (Ok(Some(vec![0; KEY_MAX_BYTES + 1])), Fault::Length(KEY_MAX_BYTES + 1)),
            (Err(Fault::Two), Fault::Two),
        ] {
            answers.send(answer).unwrap();
            assert_eq!(lookup.find(b"a").await, Err(fault.clone()));
            // Nor is it asked for again at once.
            assert_eq!(lookup.find(b"a").await, Err(fault));
            lookup.forget(b"a");
        }
        answers.send(Ok(Some(b"1".to_vec()))).unwrap();
        assert!(lookup.find(b"a").await.is_ok());
    }

    #[tokio::test]
    async fn an_old_answer_serves_while_the_table_is_down() {
        let (lookup, answers, _) = slow(Limits { ttl: Duration::ZERO, ..Limits::default() });
        let down = || Err(Fault::Down("gone".to_owned()));
        answers.send(Ok(Some(b"1".to_vec()))).unwrap();
        assert!(lookup.find(b"a").await.is_ok());
        answers.send(down()).unwrap();
        assert_eq!(lookup.find(b"a").await.as_deref(), Ok(&b"1"[..]));
        answers.send(down()).unwrap();
        assert!(matches!(lookup.find(b"b").await, Err(Fault::Down(_))));
        // What has happened meanwhile may have made it wrong.
        answers.send(down()).unwrap();
        assert!(matches!(lookup.find_since(b"a", Instant::now()).await, Err(Fault::Down(_))));
    }
}

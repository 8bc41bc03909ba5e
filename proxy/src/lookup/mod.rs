//! Keys that are translated through a table, such as a shop's domain to its shard, before a task is looked for.
//!
//! A table may be slow, or block whoever asks it: it is asked on a thread of its own, one question at a time, and each question
//! once however many requests have it. What it said is kept for a while, also that it knew nothing.

mod cache;
#[cfg(feature = "sqlite")]
pub mod sqlite;

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_core::key::KEY_MAX_BYTES;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::lookup::cache::{Cache, Known};

/// What a table says of a key: what stands for it, or that it has nothing.
pub type Answer = Option<Arc<[u8]>>;

/// How many different keys may wait for the table: beyond them it does not keep up.
const WAITING_MAX: usize = 1024;
/// How often a table is asked whether it has changed while nobody asks it for anything else.
const POLL: Duration = Duration::from_millis(100);

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
    #[error("the table has no row for this key")]
    Unknown,
    /// The table has more than one answer.
    #[error("the table has two answers for this key: make the column that is asked for unique")]
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

/// Where translations are kept. Asked on a thread of its own, so it may block.
pub trait Table: Send + 'static {
    /// Finds what stands for a key.
    fn find(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, Fault>;
    /// Says whether anything may have changed since this was last asked.
    fn has_changed(&mut self) -> bool;
}

/// A table with a cache before it. Clones share both.
#[derive(Clone, Debug)]
pub struct Lookup {
    limits: Limits,
    cache: Arc<Mutex<Cache>>,
    ask: SyncSender<Box<[u8]>>,
}

impl Lookup {
    /// Starts the thread that asks a table. It ends with the last clone.
    pub fn start(table: impl Table, limits: Limits) -> std::io::Result<Self> {
        let cache = Arc::new(Mutex::new(Cache::new(limits)));
        let (ask, asked) = sync_channel(WAITING_MAX);
        let answers = Arc::clone(&cache);
        std::thread::Builder::new()
            .name("lookup".to_owned())
            .spawn(move || serve(table, &asked, &answers))?;
        Ok(Self { limits, cache, ask })
    }

    /// Translates a key.
    pub async fn find(&self, key: &[u8]) -> Result<Arc<[u8]>, Fault> {
        let waiting = {
            let mut cache = lock(&self.cache);
            let now = Instant::now();
            match cache.get(key, now) {
                Known::Fresh(answer) => return answer.ok_or(Fault::Unknown),
                Known::Overdue => return cache.stale(key, now, Fault::Late),
                Known::Asked(waiting) => waiting,
                Known::Nothing(waiting) => match self.ask.try_send(key.into()) {
                    Ok(()) => waiting,
                    Err(TrySendError::Full(_)) => {
                        cache.forget_question(key);
                        return cache.stale(key, now, Fault::Busy);
                    }
                    Err(TrySendError::Disconnected(_)) => {
                        cache.forget_question(key);
                        let fault = Fault::Down("its thread has ended".to_owned());
                        return cache.stale(key, now, fault);
                    }
                },
            }
        };
        let fault = match timeout(self.limits.within, waiting).await {
            Ok(Ok(Ok(answer))) => return answer.ok_or(Fault::Unknown),
            Ok(Ok(Err(fault))) => fault,
            Ok(Err(_)) => Fault::Down("its thread has ended".to_owned()),
            Err(_) => Fault::Late,
        };
        lock(&self.cache).stale(key, Instant::now(), fault)
    }

    /// Gives what is known without asking the table.
    pub fn known(&self, key: &[u8]) -> Result<Arc<[u8]>, Fault> {
        match lock(&self.cache).fresh(key, Instant::now()) {
            Some(answer) => answer.ok_or(Fault::Unknown),
            None => Err(Fault::Unasked),
        }
    }

    /// Forgets every answer, so that the table is asked again.
    pub fn flush(&self) {
        lock(&self.cache).flush();
    }
}

/// What a waiting request hears.
type Said = oneshot::Sender<Result<Answer, Fault>>;

fn lock(cache: &Mutex<Cache>) -> MutexGuard<'_, Cache> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut table: impl Table, asked: &Receiver<Box<[u8]>>, cache: &Mutex<Cache>) {
    loop {
        let key = match asked.recv_timeout(POLL) {
            Ok(key) => Some(key),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        // On the thread that also reads, and before it reads: what is read afterwards is no older than the change.
        if table.has_changed() {
            lock(cache).flush();
        }
        let Some(key) = key else { continue };
        let answer = table.find(&key).and_then(|answer| match answer {
            Some(answer) if !(1..=KEY_MAX_BYTES).contains(&answer.len()) => {
                Err(Fault::Length(answer.len()))
            }
            answer => Ok(answer.map(Arc::from)),
        });
        lock(cache).answer(&key, answer, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    /// Answers only when it is let, with what the test says.
    struct Slow {
        asked: Arc<AtomicUsize>,
        answers: Receiver<Result<Option<Vec<u8>>, Fault>>,
    }

    impl Table for Slow {
        fn find(&mut self, _: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            self.answers.recv().unwrap_or(Err(Fault::Unknown))
        }

        fn has_changed(&mut self) -> bool {
            false
        }
    }

    type Answers = mpsc::Sender<Result<Option<Vec<u8>>, Fault>>;

    fn slow(limits: Limits) -> (Lookup, Answers, Arc<AtomicUsize>) {
        let (send, answers) = mpsc::channel();
        let asked = Arc::new(AtomicUsize::new(0));
        let table = Slow { asked: Arc::clone(&asked), answers };
        (Lookup::start(table, limits).unwrap(), send, asked)
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
        assert_eq!(lookup.known(b"a"), Err(Fault::Unknown));
        lookup.flush();
        assert_eq!(lookup.known(b"a"), Err(Fault::Unasked));
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
    async fn an_answer_that_is_no_key_is_refused_and_not_kept() {
        let (lookup, answers, _) = slow(Limits::default());
        for (answer, fault) in [
            (Ok(Some(Vec::new())), Fault::Length(0)),
            (Ok(Some(vec![0; KEY_MAX_BYTES + 1])), Fault::Length(KEY_MAX_BYTES + 1)),
            (Err(Fault::Two), Fault::Two),
        ] {
            answers.send(answer).unwrap();
            assert_eq!(lookup.find(b"a").await, Err(fault));
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
    }
}

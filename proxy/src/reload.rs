//! The configuration in force, and how another one takes its place: between two requests of each worker, in all workers, or not
//! at all. What cannot change while the proxy runs is refused by name, and what was in force stays.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use http::request::Parts;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tracing::info;

use crate::config::error::ConfigError;
use crate::config::{Checked, Config};
use crate::dry_run::Explanation;
use crate::hold::book::Book;
use crate::metrics::stats::{Knowledge, Reloads};
use crate::router::Router;

/// The configuration in force, and the workers that go by it. Clones are the same.
#[derive(Clone)]
pub struct Reloader(Arc<Inner>);

struct Inner {
    // Whoever changes it holds it until all workers were told.
    in_force: Mutex<Arc<Checked>>,
    workers: Vec<mpsc::UnboundedSender<Message>>,
    taken: AtomicU64,
    refused: AtomicU64,
    last_refused: AtomicBool,
    // Who reads the configuration again when asked.
    reader: Mutex<Option<mpsc::Sender<ReloadRequest>>>,
}

/// Somebody asks for the configuration to be read again, and waits for what comes of it.
#[derive(Debug)]
pub struct ReloadRequest(oneshot::Sender<Result<(), String>>);

impl ReloadRequest {
    /// Says what came of it: nothing, or why the configuration before stays in force.
    pub fn answer(self, done: Result<(), String>) {
        // Whoever asked may have gone.
        drop(self.0.send(done));
    }
}

/// What came of asking.
pub(crate) enum Asked {
    /// It was read, and is in force or not.
    Done(Result<(), String>),
    /// It is being read, and others wait.
    Busy,
    /// Nobody reads it.
    Nobody,
}

/// What a worker is told.
pub(crate) enum Message {
    /// To go by another configuration.
    Change(Change),
    /// To say what would become of a request.
    Question(Box<Question>),
}

/// A request of which somebody wants to know what would become of it.
pub(crate) struct Question {
    pub(crate) head: Parts,
    pub(crate) client: IpAddr,
    pub(crate) answer: oneshot::Sender<Explanation>,
}

/// What a worker is to go by from now on.
pub(crate) struct Change {
    pub(crate) config: Arc<Checked>,
    /// Dropped when it does.
    _done: oneshot::Sender<()>,
}

/// Why a configuration did not come into force. The one before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReloadError {
    /// It holds what cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It changes what only a restart can change.
    #[error("{0} cannot change while the proxy runs: restart it for that, or leave {0} as it was")]
    Restart(&'static str),
}

impl Reloader {
    pub(crate) fn new(
        config: Arc<Checked>,
        workers: usize,
    ) -> (Self, Vec<mpsc::UnboundedReceiver<Message>>) {
        let (workers, changes) = (0..workers).map(|_| mpsc::unbounded_channel()).unzip();
        let in_force = Mutex::new(config);
        let (taken, refused, last_refused, reader) = Default::default();
        let inner = Inner { in_force, workers, taken, refused, last_refused, reader };
        (Self(Arc::new(inner)), changes)
    }

    /// Hears of those who ask, at the admin address, for the configuration to be read again. Only the last to call this does.
    pub fn asked(&self) -> mpsc::Receiver<ReloadRequest> {
        let (tell, asked) = mpsc::channel(1);
        *self.0.reader.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(tell);
        asked
    }

    /// Asks for the configuration to be read again, unless others wait for that already.
    pub(crate) async fn ask(&self) -> Asked {
        let reader = self.0.reader.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let (tell, told) = oneshot::channel();
        let Some(reader) = reader else { return Asked::Nobody };
        match reader.try_send(ReloadRequest(tell)) {
            Ok(()) => told.await.map_or(Asked::Nobody, Asked::Done),
            Err(TrySendError::Full(_)) => Asked::Busy,
            Err(TrySendError::Closed(_)) => Asked::Nobody,
        }
    }

    /// Brings a configuration into force: each request that comes in after this has returned goes by it.
    pub async fn reload(&self, config: Config) -> Result<(), ReloadError> {
        let told = self.tell(config).inspect_err(|_| self.refused())?;
        for worker in told {
            // A worker that has ended needs no configuration.
            let _: Result<(), _> = worker.await;
        }
        Ok(())
    }

    /// Counts a configuration that could not even be read.
    pub fn refused(&self) {
        self.0.refused.fetch_add(1, Relaxed);
        self.0.last_refused.store(true, Relaxed);
    }

    fn tell(&self, config: Config) -> Result<Vec<oneshot::Receiver<()>>, ReloadError> {
        let config = Arc::new(config.check()?);
        let mut in_force = self.lock();
        if let Some(what) = fixed(&in_force, &config) {
            return Err(ReloadError::Restart(what));
        }
        *in_force = Arc::clone(&config);
        let told = self.0.workers.iter().map(|worker| {
            let (done, is_done) = oneshot::channel();
            // Whoever cannot be told has ended.
            let change = Change { config: Arc::clone(&config), _done: done };
            drop(worker.send(Message::Change(change)));
            is_done
        });
        let told = told.collect();
        self.0.taken.fetch_add(1, Relaxed);
        self.0.last_refused.store(false, Relaxed);
        info!(routes = config.routes.len(), "Configuration is in force");
        Ok(told)
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Checked>> {
        self.0.in_force.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Asks a worker what would become of a request; nothing if none runs any more.
    pub(crate) async fn explain(&self, head: Parts, client: IpAddr) -> Option<Explanation> {
        let (answer, answered) = oneshot::channel();
        let worker = self.0.workers.first()?;
        let question = Box::new(Question { head, client, answer });
        worker.send(Message::Question(question)).ok()?;
        answered.await.ok()
    }

    /// Opens the access log anew, for whoever moves it away from time to time.
    pub fn reopen_log(&self) {
        if let Some(log) = &self.in_force().access_log {
            log.writer.reopen();
        }
    }

    /// Gives the configuration in force.
    pub(crate) fn in_force(&self) -> Arc<Checked> {
        Arc::clone(&self.lock())
    }

    pub(crate) fn knowledge(&self, book: &Book) -> Knowledge {
        let config = self.in_force();
        Knowledge {
            jobs: config.jobs.values().map(Router::known).collect(),
            pools: config
                .pools
                .iter()
                .map(|(pool, servers)| (pool.clone(), Arc::clone(&servers.borrow())))
                .collect(),
            gateways: config.gateways.clone(),
            reloads: Reloads {
                taken: self.0.taken.load(Relaxed),
                refused: self.0.refused.load(Relaxed),
                last_refused: self.0.last_refused.load(Relaxed),
            },
            held_bytes: book.room.bytes() as u64,
            pauses: book.stats(),
            lookups: config.lookups.iter().map(|(name, one)| (name.clone(), one.stats())).collect(),
            log: config.access_log.as_ref().map(|log| log.writer.stats()),
            tls: Vec::new(),
            traces: config.traces.as_ref().map(|traces| traces.sink.stats()),
        }
    }
}

/// Names what differs and only a restart can change: sockets and threads.
fn fixed(old: &Config, new: &Config) -> Option<&'static str> {
    let changes = [
        ("listen", old.listeners != new.listeners),
        ("admin", old.admin != new.admin),
        ("workers", old.workers != new.workers),
        ("id", old.id != new.id),
    ];
    changes.into_iter().find_map(|(what, changed)| changed.then_some(what))
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloader").field("in_force", &self.in_force()).finish_non_exhaustive()
    }
}

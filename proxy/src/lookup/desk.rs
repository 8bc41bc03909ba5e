//! Where questions come in for whoever has a table, and answers go out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::lookup::cache::Cache;
use crate::lookup::{Found, Limits, Told};

/// Where questions come in.
#[derive(Debug)]
pub struct Desk {
    pub(super) asked: mpsc::Receiver<Box<[u8]>>,
    pub(super) teller: Teller,
    pub(super) limits: Limits,
}

impl Desk {
    /// Waits for the next key to ask for. None once nobody is left who could ask.
    pub async fn next(&mut self) -> Option<Box<[u8]>> {
        self.asked.recv().await
    }

    /// Gives where answers go.
    pub fn teller(&self) -> Teller {
        self.teller.clone()
    }

    /// Says for how long a request waits: no question need take longer.
    pub const fn within(&self) -> Duration {
        self.limits.within
    }
}

/// Where answers go. Clones are the same.
#[derive(Clone, Debug)]
pub struct Teller(Arc<Mutex<Cache>>);

impl Teller {
    pub(super) fn new(limits: Limits) -> Self {
        Self(Arc::new(Mutex::new(Cache::new(limits))))
    }

    pub(super) fn cache(&self) -> MutexGuard<'_, Cache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the table is asked for a key now.
    pub fn asks(&self, key: &[u8]) {
        self.cache().asks(key, Instant::now());
    }

    /// Says what the table has for a key.
    pub fn answer(&self, key: &[u8], found: Found) -> Told {
        self.cache().answer(key, found, Instant::now())
    }

    /// Forgets one key, which has changed.
    pub fn forget(&self, key: &[u8]) {
        self.cache().forget(key);
    }

    /// Forgets every key, since any may have changed.
    pub fn flush(&self) {
        self.cache().flush();
    }
}

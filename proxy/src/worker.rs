//! What one core has to itself: its connections, its counters, and what is the same for every request it serves.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use http::Version;
use http::header::HeaderValue;

use crate::config::Config;
use crate::metrics::Counters;
use crate::pause::Hold;
use crate::pool::Pool;
use crate::route::{Lookup, Router};

/// What one core has to itself.
pub(crate) struct Worker {
    pub(crate) config: Arc<Config>,
    pub(crate) lookup: Lookup,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pool: Pool,
    /// Requests that wait for the slices of their keys to settle.
    pub(crate) hold: Hold,
    /// Bytes of request bodies that may still be kept for a second try.
    pub(crate) replay_room: Rc<Cell<usize>>,
    /// Whether the proxy is stopping, so that each connection ends with its next answer.
    pub(crate) stopping: Cell<bool>,
    /// What the proxy calls itself in `Via`.
    pub(crate) pseudonym: String,
    via_10: HeaderValue,
    via_11: HeaderValue,
}

impl Worker {
    pub(crate) fn new(config: Arc<Config>, router: &Router, counters: Arc<Counters>) -> Self {
        let pseudonym = format!("mandoline-{}", config.id);
        let via = |version: &str| {
            HeaderValue::try_from(format!("{version} {pseudonym}"))
                .expect("a proxy's name fits a header")
        };
        let (via_10, via_11) = (via("1.0"), via("1.1"));
        let pool = Pool::new(config.timeouts, config.limits, Arc::clone(&counters));
        let replay_room = Rc::new(Cell::new(config.limits.replay_bytes));
        let lookup = Lookup::new(router, config.gateways.clone());
        let hold = Hold::new(&config, router, Arc::clone(&counters));
        let stopping = Cell::new(false);
        Self {
            config,
            lookup,
            counters,
            pool,
            hold,
            replay_room,
            stopping,
            pseudonym,
            via_10,
            via_11,
        }
    }

    /// Gives the `Via` entry for a message that came in by `version`.
    pub(crate) fn via(&self, version: Version) -> HeaderValue {
        if version == Version::HTTP_10 { self.via_10.clone() } else { self.via_11.clone() }
    }
}

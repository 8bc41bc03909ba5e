//! What one core has to itself: its connections, its counters, and what is the same for every request it serves.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use http::Version;
use http::header::HeaderValue;
use mandoline_core::prng::Prng;

use crate::config::Checked;
use crate::hold::book::Book;
use crate::hold::gates::Gates;
use crate::hold::queue::House;
use crate::metrics::Counters;
use crate::pool::Pool;
use crate::rules::RequestIds;
use crate::setup::Setup;

/// What one core has to itself.
pub(crate) struct Worker {
    setup: RefCell<Rc<Setup>>,
    house: Rc<House>,
    /// The pauses that it goes by.
    pub(crate) gates: Rc<Gates>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pool: Pool,
    /// Bytes of request bodies that may still be kept for a second try.
    pub(crate) replay_room: Rc<Cell<usize>>,
    /// How many tunnels there are, over all workers.
    pub(crate) tunnels: Arc<AtomicUsize>,
    /// Whether the proxy is stopping, so that each connection ends with its next answer.
    pub(crate) stopping: Cell<bool>,
    /// Draws what is told of in logs and traces.
    pub(crate) chance: RefCell<Prng>,
    /// What the proxy calls itself in `Via`.
    pub(crate) pseudonym: String,
    pub(crate) request_ids: RequestIds,
    via_10: HeaderValue,
    via_11: HeaderValue,
    via_2: HeaderValue,
}

impl Worker {
    /// Makes a worker that does nothing yet. To be called on the worker's own thread, for it starts tasks there.
    pub(crate) fn new(
        config: Arc<Checked>,
        counters: Arc<Counters>,
        book: Arc<Book>,
        tunnels: Arc<AtomicUsize>,
    ) -> Self {
        let pseudonym = format!("mandoline-{}", config.id);
        let via = |version: &str| {
            HeaderValue::try_from(format!("{version} {pseudonym}"))
                .expect("a proxy's name fits a header")
        };
        let [via_10, via_11, via_2] = ["1.0", "1.1", "2"].map(via);
        let pool = Pool::new(config.timeouts, config.limits, Arc::clone(&counters));
        let replay_room = Rc::new(Cell::new(config.limits.replay_bytes));
        let house = Rc::new(House::new(book, Arc::clone(&counters)));
        let gates = Rc::new(Gates::new(Rc::clone(&house), config.flags.clone()));
        let setup = Rc::new(Setup::new(config, None, &house));
        let setup = RefCell::new(setup);
        let stopping = Cell::new(false);
        // The standard library's hasher is the one source of randomness that needs no dependency.
        let request_ids = RequestIds::new(RandomState::new().hash_one(&pseudonym));
        let seed = RandomState::new().hash_one(std::thread::current().id());
        let chance = RefCell::new(Prng::new(seed));
        let worker = Self {
            setup,
            house,
            gates,
            counters,
            pool,
            replay_room,
            tunnels,
            stopping,
            chance,
            pseudonym,
            request_ids,
            via_10,
            via_11,
            via_2,
        };
        worker.begin(&worker.setup(), None);
        let gates = Rc::clone(&worker.gates);
        worker.pool.spawn(async move { gates.run().await });
        worker
    }

    /// Gives the configuration in force.
    pub(crate) fn setup(&self) -> Rc<Setup> {
        Rc::clone(&self.setup.borrow())
    }

    /// Goes by another configuration from now on. Requests under way end by the one that they began with.
    pub(crate) fn reload(&self, config: Arc<Checked>) {
        let before = self.setup();
        self.pool.set(config.timeouts, config.limits);
        self.house.book.set(config.limits);
        self.gates.follow(config.flags.clone());
        let kept = before.config.limits.replay_bytes.saturating_sub(self.replay_room.get());
        self.replay_room.set(config.limits.replay_bytes.saturating_sub(kept));
        let setup = Rc::new(Setup::new(config, Some(&before), &self.house));
        self.begin(&setup, Some(&before));
        before.jobs_not_in(Some(&setup)).for_each(|job| job.hold.retire());
        self.counters.keep_routes(setup.config.routes.iter().map(|route| &*route.name));
        self.setup.replace(setup);
    }

    /// Starts what lives beside the requests of each new job.
    fn begin(&self, setup: &Setup, before: Option<&Setup>) {
        for job in setup.jobs_not_in(before) {
            let job = Rc::clone(job);
            self.pool.spawn(async move { job.hold.release().await });
        }
    }

    /// Gives the `Via` entry for a message that came in by `version`.
    pub(crate) fn via(&self, version: Version) -> HeaderValue {
        match version {
            Version::HTTP_10 => self.via_10.clone(),
            Version::HTTP_2 => self.via_2.clone(),
            _ => self.via_11.clone(),
        }
    }
}

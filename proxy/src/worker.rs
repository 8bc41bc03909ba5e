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
use crate::metrics::counters::Counters;
use crate::pool::ConnectionPool;
use crate::room::Room;
use crate::rules::RequestIds;
use crate::seldom::Seldom;
use crate::setup::Setup;

/// What one core has to itself.
pub(crate) struct Worker {
    setup: RefCell<Rc<Setup>>,
    house: Rc<House>,
    /// The pauses that it goes by.
    pub(crate) gates: Rc<Gates>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pool: ConnectionPool,
    /// For request bodies that are kept for a second try.
    pub(crate) replay_room: Rc<Room>,
    /// For those that are read since they hold the key.
    pub(crate) key_room: Rc<Room>,
    /// How many tunnels there are, over all workers.
    pub(crate) tunnels: Arc<AtomicUsize>,
    /// Whether the proxy is stopping, so that each connection ends with its next answer.
    pub(crate) stopping: Cell<bool>,
    /// Draws what is told of in logs and traces.
    pub(crate) chance: RefCell<Prng>,
    /// What the proxy calls itself in `Via`.
    pub(crate) pseudonym: String,
    pub(crate) request_ids: RequestIds,
    /// When to write again that a gateway takes nothing.
    pub(crate) astray: Seldom,
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
        let pool = ConnectionPool::new(config.timeouts, config.limits, Arc::clone(&counters));
        let replay_room = Rc::new(Room::new(config.limits.replay_bytes));
        let key_room = Rc::new(Room::new(config.limits.key_bytes));
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
            key_room,
            tunnels,
            stopping,
            chance,
            pseudonym,
            request_ids,
            astray: Seldom::default(),
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
        let (was, is) = (before.config.limits, config.limits);
        self.replay_room.resize(was.replay_bytes, is.replay_bytes);
        self.key_room.resize(was.key_bytes, is.key_bytes);
        let setup = Rc::new(Setup::new(config, Some(&before), &self.house));
        self.begin(&setup, Some(&before));
        self.counters.keep_routes(setup.config.routes.iter().map(|route| &*route.name));
        self.setup.replace(setup);
    }

    /// Starts what lives beside the requests of each new job: as long as one of them is left, whatever is in force by then.
    fn begin(&self, setup: &Setup, before: Option<&Setup>) {
        for job in setup.jobs_not_in(before) {
            let hold = Rc::clone(&job.hold);
            self.pool.spawn(async move { hold.release().await });
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

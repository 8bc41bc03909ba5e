//! The half of the library inside a caller: who owns this key?
//!
//! A clerk holds the newest assignment that it heard of as a `Snapshot`, and one thread of its own that keeps it up to
//! date, so that callers need no runtime and a busy one does not delay news. Lookups never wait for that thread: they read
//! whatever snapshot is there. With every source down a clerk goes on with what it knows, says so in its state, and asks
//! again and again, with pauses of random length.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use arc_swap::Guard;
use mandoline_core::assignment::Assignment;
use mandoline_core::choice::Place;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::name::{JobName, NameError};
use mandoline_core::spec::Ratio;
use mandoline_core::task::{Address, AddressError, Task};
use mandoline_core::time::Time;
use mandoline_core::watch;
use mandoline_distributor::clock::Clock;
use mandoline_distributor::connect::Connector;
use mandoline_distributor::follow::{Follower, News, NobodyToAsk, Upstream};
use mandoline_distributor::hub::Hub;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::cache;
use crate::choice::Gauges;
use crate::counters::{CostError, thousandths};
use crate::dialer::drawn;
use crate::offered::{Offered, Reporter};
use crate::shown::{Seen, Shown};
use crate::snapshot::{NoTask, Sent, Snapshot, Target};
use crate::spill::{ALONE, Lanes, Routed, Spill, Utilisation};

const THREAD: &str = "mandoline-clerk";
/// The least time between two writes of the cache: a restart loses little by an assignment a second old.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Knows who owns every key of a job. Clones are the same clerk; its thread ends with the last of them.
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// let clerk = mandoline::Clerk::builder("shop")
///     .sources(["10.0.0.1:7400", "10.0.0.2:7400"])
///     .cache("/var/lib/shop/assignment")
///     .start()?;
/// clerk.ready().await;
/// let target = clerk.route(b"cart/4711")?;
/// println!("{} serves it at {}", target.name(), target.address());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Clerk {
    inner: Arc<Inner>,
}

struct Inner {
    job: JobName,
    snapshot: Arc<Shown>,
    current: channel::Receiver<Option<Arc<Assignment>>>,
    state: channel::Receiver<watch::State>,
    seen: channel::Sender<Option<Generation>>,
    clock: Clock,
    /// When somebody was last known to tell what changes.
    heard: Arc<Heard>,
    /// The spill of callers without a router, from the first request of a job with spill on.
    lanes: OnceLock<Lanes>,
    /// What callers of this clerk offer, if that is counted.
    offered: Option<Arc<Offered>>,
    /// What is counted of each task outlives the snapshots.
    _gauges: Arc<Gauges>,
    stop: CancellationToken,
    /// What keeps the rest up to date; none where nothing changes. It ends by itself, soon after `stop`.
    thread: Option<thread::JoinHandle<()>>,
}

/// How well a clerk is placed, and for how long it has been so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is known yet: every lookup fails.
    Empty {
        /// For how long.
        lasting: Duration,
        /// What went wrong last.
        why: String,
    },
    /// Someone tells what changes.
    Live {
        /// For how long.
        lasting: Duration,
    },
    /// Lookups go by the last that was heard, and nobody tells what changes.
    Stale {
        /// For how long.
        lasting: Duration,
        /// What went wrong last.
        why: String,
    },
}

/// Why a clerk did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The job's name is no name.
    #[error("job {0:?}")]
    Job(String, #[source] NameError),
    /// What a source or a peer is given by is no address.
    #[error("the address of whom to ask")]
    Address(#[from] AddressError),
    /// There was neither a source nor a peer.
    #[error(transparent)]
    NobodyToAsk(#[from] NobodyToAsk),
    /// The system gave no thread.
    #[error("the clerk's thread did not start")]
    Thread(#[from] io::Error),
}

/// The generation that was waited for did not come in time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("generation {wanted} did not come within {waited:?}: {state:?}")]
pub struct TimedOut {
    /// What was waited for.
    pub wanted: Generation,
    /// For how long.
    pub waited: Duration,
    /// How the clerk was placed then.
    pub state: State,
}

/// The slice of a key was still on its way to another task when the caller's time was over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotMoved {
    /// No assignment newer than `told` came in time that shows the slice settled.
    #[error("key {key} was still moving {waited:?} after a task had said so by {told}: {state:?}")]
    TimedOut {
        /// Whose slice it is.
        key: SliceKey,
        /// The assignment that the task judged by.
        told: Generation,
        /// For how long it was waited.
        waited: Duration,
        /// How the clerk was placed then.
        state: State,
    },
    /// The slice has settled, and nobody serves it.
    #[error(transparent)]
    NoTask(#[from] NoTask),
}

/// What is known may be older than the caller allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooOld {
    /// What the caller allows.
    pub most: Duration,
    /// How long ago somebody was last heard who tells what changes; nothing if nobody was since the clerk started.
    pub heard: Option<Duration>,
    /// How long ago the clerk started.
    pub lasting: Duration,
    /// What is known.
    pub generation: Generation,
    /// How the clerk is placed.
    pub state: State,
}

impl std::error::Error for TooOld {}

impl fmt::Display for TooOld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { most, heard, lasting, generation, state } = self;
        write!(f, "the assignment may be older than {most:?}: nobody has told what changes ")?;
        match heard {
            Some(ago) => write!(f, "for {:.1}s", ago.as_secs_f64())?,
            None => write!(f, "since the clerk started, {:.1}s ago", lasting.as_secs_f64())?,
        }
        match state {
            State::Live { .. } => write!(f, "; known is generation {generation}"),
            State::Empty { why, .. } | State::Stale { why, .. } => {
                write!(f, "; known is generation {generation} ({why})")
            }
        }
    }
}

/// Why no task was found by [`Clerk::route_within`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotWithin {
    /// What is known may be too old.
    #[error(transparent)]
    TooOld(#[from] TooOld),
    /// Nobody serves the key.
    #[error(transparent)]
    NoTask(#[from] NoTask),
}

/// Says whether an assignment shows the slice of a key settled after a task said that it was giving that away, judging by
/// generation `told`: it is newer, and the slice is not being released by it.
pub fn is_settled(assignment: &Assignment, key: SliceKey, told: Generation) -> bool {
    assignment.generation > told && !assignment.get(key).1.is_releasing()
}

impl Clerk {
    /// Begins to describe a clerk of a job.
    pub fn builder(job: impl AsRef<str>) -> Builder {
        Builder {
            job: job.as_ref().to_owned(),
            sources: Vec::new(),
            peers: Vec::new(),
            connector: Connector::default(),
            name: String::new(),
            cache: None,
            hub: None,
            report_offered: false,
            place: Place::default(),
        }
    }

    /// Makes a clerk that knows this assignment and never another, for tests and tools.
    pub fn frozen(assignment: Arc<Assignment>) -> Self {
        let live = watch::State::Live { since: Time::ZERO, source: 0 };
        let (inner, _desk, _seen) =
            Inner::new(assignment.job.clone(), Some(assignment), live, Place::default());
        Self { inner: Arc::new(inner) }
    }

    /// Makes a clerk that goes by a hub of the same process.
    pub fn follow_hub(hub: &Hub, job: JobName) -> Result<Self, StartError> {
        let mut changes = hub.watch_changes(&job);
        let known = changes.borrow().clone();
        let (mut inner, mut desk, seen) =
            Inner::new(job, known, nobody_asked(false), Place::default());
        let stop = inner.stop.clone();
        let follow = async move {
            let _seen = seen; // a hub has no second source to ask
            loop {
                let newest = changes.borrow_and_update().clone();
                if let Some(assignment) = newest {
                    desk.tell(News::Install { assignment: &assignment, delta: None });
                    let since = desk.clock.now();
                    desk.tell(News::State(&watch::State::Live { since, source: 0 }));
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        };
        inner.thread = Some(spawn(THREAD, follow)?);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Finds the task that serves a key.
    ///
    /// Never waits, and never allocates but at a thread's first call. The answer keeps its snapshot for as long as it lives,
    /// so let it go soon. A thread that asks often is faster with a `router` of its own.
    #[inline]
    pub fn route(&self, key: &[u8]) -> Result<Target<Held>, NoTask> {
        self.route_at(SliceKey::of(key))
    }

    /// Finds the task that serves a slice key, such as a grouped one.
    #[inline]
    pub fn route_at(&self, key: SliceKey) -> Result<Target<Held>, NoTask> {
        let held = Held(self.inner.snapshot.load());
        let Some(cap) = held.spill() else {
            let found = held.find(key, next_turn)?;
            return Ok(Target::new(held, key, found));
        };
        let routed = self.spill(cap, &held, key)?;
        Ok(Target::new(held, key, routed.found).with_spill(routed.sent, routed.is_spilled))
    }

    /// Finds the task that serves a key, unless what is known may be older than `most`: see [`Clerk::check_age`].
    pub fn route_within(&self, key: &[u8], most: Duration) -> Result<Target<Held>, NotWithin> {
        let target = self.route(key)?;
        self.check_age(most)?;
        Ok(target)
    }

    /// Says no if what is known may be older than `most`: if for so long nobody has told what changes, or never since the clerk
    /// started. While somebody does, nothing is old, however long ago the last change was.
    pub fn check_age(&self, most: Duration) -> Result<(), TooOld> {
        let now = self.inner.clock.now();
        let heard = match self.inner.heard.read() {
            Last::Now => return Ok(()),
            Last::At(at) => Some(now.since(at)),
            Last::Never => None,
        };
        if heard.is_some_and(|ago| ago <= most) {
            return Ok(());
        }
        let generation = self.inner.snapshot.load().assignment().generation;
        Err(TooOld { most, heard, lasting: now.since(Time::ZERO), generation, state: self.state() })
    }

    /// Gives the tasks that are avoided now, since requests to them fail; see [`Target::begin`].
    pub fn avoided(&self) -> Vec<Arc<Task>> {
        self.inner.snapshot.load().avoided().map(Arc::clone).collect()
    }

    /// Out of line, so that jobs without spill pay for one comparison only.
    #[cold]
    #[inline(never)]
    fn spill(&self, cap: Ratio, snapshot: &Snapshot, key: SliceKey) -> Result<Routed, NoTask> {
        self.inner.lanes.get_or_init(Lanes::new).route(cap, snapshot, key)
    }

    /// Tells what a task has served, as its answer to a request said (`mandoline-load`), for jobs with spill: the more answers
    /// are told, the better callers know who is loaded above the cap.
    pub fn heard(&self, sent: Sent, told: Utilisation) {
        if let Some(lanes) = self.inner.lanes.get() {
            lanes.hear(sent, told);
        }
    }

    /// Counts a request that is sent on its way, and what it costs: 1 unless tasks count something else. Does nothing unless
    /// the clerk reports (see [`Builder::report_offered`]); never waits and never allocates.
    pub fn offer(&self, key: &[u8], cost: f64) -> Result<(), CostError> {
        self.offer_at(SliceKey::of(key), cost)
    }

    /// Counts a request for a slice key, such as a grouped one.
    pub fn offer_at(&self, key: SliceKey, cost: f64) -> Result<(), CostError> {
        let cost = thousandths(cost)?;
        if let Some(offered) = &self.inner.offered {
            offered.offer(key, cost);
        }
        Ok(())
    }

    /// Counts that a request which was offered has failed: refused, timed out, or never answered.
    pub fn failed(&self, key: &[u8], cost: f64) -> Result<(), CostError> {
        self.failed_at(SliceKey::of(key), cost)
    }

    /// Counts that a request for a slice key has failed.
    pub fn failed_at(&self, key: SliceKey, cost: f64) -> Result<(), CostError> {
        let cost = thousandths(cost)?;
        if let Some(offered) = &self.inner.offered {
            offered.fail(key, cost);
        }
        Ok(())
    }

    /// Makes a handle for one thread or one connection: 11 ns a lookup where `route` takes 14 (10,000 slices, 16-byte keys).
    pub fn router(&self) -> Router {
        let seen = Seen::of(&self.inner.snapshot);
        Router { clerk: self.clone(), seen, turn: next_turn(), spill: None }
    }

    /// Names the job.
    pub fn job(&self) -> &JobName {
        &self.inner.job
    }

    /// Says whether two handles are on one clerk.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Gives the newest assignment that is known.
    pub fn assignment(&self) -> Option<Arc<Assignment>> {
        self.inner.current.borrow().clone()
    }

    /// Watches the assignment: the receiver holds the newest, and wakes when there is a newer one.
    pub fn changes(&self) -> channel::Receiver<Option<Arc<Assignment>>> {
        self.inner.current.clone()
    }

    /// Waits until an assignment is known, however old.
    pub async fn ready(&self) -> Arc<Assignment> {
        self.reached(Generation::ZERO).await
    }

    /// Waits until a generation is known, or a later one. Needs a tokio runtime with time.
    pub async fn wait_for(
        &self,
        wanted: Generation,
        patience: Duration,
    ) -> Result<Arc<Assignment>, TimedOut> {
        self.refresh(wanted);
        let reached = tokio::time::timeout(patience, self.reached(wanted)).await;
        reached.map_err(|_| TimedOut { wanted, waited: patience, state: self.state() })
    }

    /// Waits until the slice of a key has settled, after a task answered that it is giving that away, and says who serves it now.
    ///
    /// `told` is the generation that the task judged by: it goes with the answer, as `mandoline-generation` beside
    /// `mandoline-transit` (503) in HTTP. The request had no effect, so it may be sent to the new owner whatever it is. Needs a
    /// tokio runtime with time. [`crate::tries::Tries`] does this and the rest of a request's way.
    pub async fn wait_moved(
        &self,
        key: SliceKey,
        told: Generation,
        patience: Duration,
    ) -> Result<Target<Held>, NotMoved> {
        self.refresh(told);
        let settled = self.first(|newest| is_settled(newest, key, told));
        match tokio::time::timeout(patience, settled).await {
            Ok(_) => Ok(self.route_at(key)?),
            Err(_) => {
                let state = self.state();
                Err(NotMoved::TimedOut { key, told, waited: patience, state })
            }
        }
    }

    /// Tells the clerk that a generation was seen elsewhere, such as on a request that a task turned away. Should its
    /// source not have it soon, it asks another one.
    pub fn refresh(&self, seen: Generation) {
        let known = self.inner.snapshot.load().assignment().generation;
        let news = |told: &mut Option<Generation>| {
            *told = (*told).max(Some(seen));
            seen > known
        };
        self.inner.seen.send_if_modified(news);
    }

    /// Says how well the clerk is placed.
    pub fn state(&self) -> State {
        let now = self.inner.clock.now();
        match self.inner.state.borrow().clone() {
            watch::State::Empty { since, why } => State::Empty { lasting: now.since(since), why },
            watch::State::Live { since, .. } => State::Live { lasting: now.since(since) },
            watch::State::Stale { since, why } => State::Stale { lasting: now.since(since), why },
        }
    }

    async fn reached(&self, wanted: Generation) -> Arc<Assignment> {
        self.first(|newest| newest.generation >= wanted).await
    }

    /// Waits for an assignment of which something is so.
    async fn first(&self, so: impl Fn(&Assignment) -> bool) -> Arc<Assignment> {
        let mut current = self.inner.current.clone();
        let so = |current: &Option<Arc<Assignment>>| current.as_deref().is_some_and(&so);
        let newest = match current.wait_for(so).await {
            Ok(newest) => newest.clone(),
            Err(_) => None, // nothing changes any more
        };
        match newest {
            Some(newest) => newest,
            None => std::future::pending().await,
        }
    }
}

impl fmt::Debug for Clerk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let generation = self.inner.snapshot.load().assignment().generation;
        write!(f, "clerk of {} at {generation}, {:?}", self.inner.job, self.state())
    }
}

impl Inner {
    fn new(
        job: JobName,
        known: Option<Arc<Assignment>>,
        state: watch::State,
        place: Place,
    ) -> (Self, Desk, channel::Receiver<Option<Generation>>) {
        let nothing = || Arc::new(Assignment::new(job.clone(), Generation::ZERO));
        let gauges = Gauges::new(place);
        let first = Snapshot::counted(known.clone().unwrap_or_else(nothing), &gauges);
        let snapshot = Arc::new(Shown::new(first));
        let (known, current) = channel::channel(known);
        let heard = Arc::new(Heard::new(&state));
        let (well, state) = channel::channel(state);
        let (seen, sightings) = channel::channel(None);
        let (clock, stop) = (Clock::start(), CancellationToken::new());
        let desk = Desk {
            snapshot: Arc::clone(&snapshot),
            offered: None,
            gauges: Arc::clone(&gauges),
            heard: Arc::clone(&heard),
            current: known,
            state: well,
            clock,
        };
        let (lanes, offered, thread) = (OnceLock::new(), None, None);
        let inner = Self {
            job,
            snapshot,
            current,
            state,
            seen,
            clock,
            heard,
            lanes,
            offered,
            _gauges: gauges,
            stop,
            thread,
        };
        (inner, desk, sightings)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A snapshot that stays as it is while this lives.
pub struct Held(Guard<Arc<Snapshot>>);

impl Deref for Held {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.0
    }
}

/// A handle on a clerk for one thread or one connection: it keeps the snapshot at hand and asks only whether it is the
/// newest.
///
/// An idle one keeps the snapshot that it used last.
pub struct Router {
    clerk: Clerk,
    seen: Seen,
    turn: u32,
    /// Of jobs with spill, from the first request on.
    spill: Option<Box<Spill>>,
}

impl Router {
    /// Finds the task that serves a key. Never waits and never allocates.
    #[inline]
    pub fn route(&mut self, key: &[u8]) -> Result<Target<&Snapshot>, NoTask> {
        self.route_at(SliceKey::of(key))
    }

    /// Finds the task that serves a slice key, such as a grouped one.
    #[inline]
    pub fn route_at(&mut self, key: SliceKey) -> Result<Target<&Snapshot>, NoTask> {
        let snapshot = self.seen.newest();
        if let Some(cap) = snapshot.spill() {
            return route_or_spill(&mut self.spill, cap, snapshot, key);
        }
        let found = snapshot.find(key, || next_of(&mut self.turn))?;
        Ok(Target::new(snapshot, key, found))
    }

    /// Finds a task that serves a slice key by the assignment, however loaded: for a second try, where a task would not take
    /// what was spilled to it.
    #[inline]
    pub fn route_to_holder(&mut self, key: SliceKey) -> Result<Target<&Snapshot>, NoTask> {
        let snapshot = self.seen.newest();
        let found = snapshot.find(key, || next_of(&mut self.turn))?;
        Ok(Target::new(snapshot, key, found))
    }

    /// Tells what a task has served, as its answer to a request of this router said: see [`Clerk::heard`].
    pub fn heard(&mut self, sent: Sent, told: Utilisation) {
        if let Some(spill) = &mut self.spill {
            spill.hear(sent, told);
        }
    }

    /// Gives the clerk that this is a handle on.
    pub fn clerk(&self) -> &Clerk {
        &self.clerk
    }
}

/// Out of line, so that jobs without spill pay for one comparison only.
#[cold]
#[inline(never)]
fn route_or_spill<'a>(
    spill: &mut Option<Box<Spill>>,
    cap: Ratio,
    snapshot: &'a Snapshot,
    key: SliceKey,
) -> Result<Target<&'a Snapshot>, NoTask> {
    let routed = Spill::route(spill, cap, ALONE, snapshot, key)?;
    Ok(Target::new(snapshot, key, routed.found).with_spill(routed.sent, routed.is_spilled))
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "router of {:?}", self.clerk)
    }
}

/// 2^32 divided by the golden ratio: steps of it visit the replicas of a slice evenly, whatever their number.
const TURN_STEP: u32 = 0x9E37_79B9;

/// Says whose turn it is among replicas.
#[inline]
fn next_of(turn: &mut u32) -> u32 {
    *turn = turn.wrapping_add(TURN_STEP);
    *turn
}

/// Says whose turn it is among replicas, for callers without a router.
fn next_turn() -> u32 {
    thread_local! {
        static TURN: Cell<u32> = const { Cell::new(0) };
    }
    TURN.with(|turn| {
        turn.set(turn.get().wrapping_add(TURN_STEP));
        turn.get()
    })
}

/// Describes a clerk.
#[derive(Debug)]
pub struct Builder {
    job: String,
    sources: Vec<String>,
    peers: Vec<String>,
    connector: Connector,
    name: String,
    cache: Option<PathBuf>,
    hub: Option<Hub>,
    report_offered: bool,
    place: Place,
}

impl Builder {
    /// Asks these, each as good as the others: assigner nodes or distributors.
    #[must_use]
    pub fn sources(mut self, sources: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.sources.extend(sources.into_iter().map(|source| source.as_ref().to_owned()));
        self
    }

    /// Asks these while no source answers: slicelets or proxies.
    #[must_use]
    pub fn peers(mut self, peers: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.peers.extend(peers.into_iter().map(|peer| peer.as_ref().to_owned()));
        self
    }

    /// Says in which zone the clerk is, as in the tasks' label `zone`: of several replicas those in its zone are asked first, unless
    /// they are overloaded.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.place.zone = Some(zone.into());
        self
    }

    /// Says in which region the clerk is, as in the tasks' label `region`: replicas there come after those in its zone, and before all
    /// others.
    #[must_use]
    pub fn region(mut self, region: impl Into<String>) -> Self {
        self.place.region = Some(region.into());
        self
    }

    /// Reaches them so, such as with TLS and a token.
    #[must_use]
    pub fn connector(mut self, connector: Connector) -> Self {
        self.connector = connector;
        self
    }

    /// Says who asks, for the logs of those who serve.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Keeps the last assignment in this file and starts from it: one file a job, for one process at a time.
    #[must_use]
    pub fn cache(mut self, path: impl Into<PathBuf>) -> Self {
        self.cache = Some(path.into());
        self
    }

    /// Tells a hub what comes, so that peers can be served from it.
    #[must_use]
    pub fn publish_to(mut self, hub: Hub) -> Self {
        self.hub = Some(hub);
        self
    }

    /// Has what is counted with [`Clerk::offer`] told to the leader, which then knows what tasks refuse or never hear of. Off
    /// unless asked for: without counting there is nothing to tell. Goes to those of `sources` that are assigners.
    #[must_use]
    pub const fn report_offered(mut self, report: bool) -> Self {
        self.report_offered = report;
        self
    }

    /// Starts the clerk. It knows nothing yet, or what the cache held: see `Clerk::ready`.
    pub fn start(mut self) -> Result<Clerk, StartError> {
        let job = JobName::new(&self.job).map_err(|error| StartError::Job(self.job, error))?;
        let parsed = |given: &[String]| given.iter().map(|text| text.parse()).collect();
        let sources: Result<Vec<Address>, AddressError> = parsed(&self.sources);
        let peers: Result<Vec<Address>, AddressError> = parsed(&self.peers);
        let (connector, watcher) = (self.connector, self.name);
        let upstream = Upstream { sources: sources?, peers: peers?, connector, watcher };
        let known = read_cache(&job, &mut self.cache);
        if let (Some(hub), Some(known)) = (&self.hub, &known) {
            hub.publish(Arc::clone(known), None);
        }
        let saved = known.as_ref().map(|known| known.generation);
        let state = nobody_asked(known.is_some());
        let (mut inner, mut desk, seen) = Inner::new(job.clone(), known.clone(), state, self.place);
        let reporter = self.report_offered.then(|| {
            let (sources, connector) = (upstream.sources.clone(), upstream.connector.clone());
            Reporter::new(job.clone(), drawn(), sources, connector)
        });
        if reporter.is_some() {
            let offered = Arc::new(Offered::new(Arc::clone(&inner.snapshot.load())));
            desk.offered = Some(Arc::clone(&offered));
            inner.offered = Some(offered);
        }
        let follower = Follower::new(job, upstream, known, seen, inner.clock)?;
        let tell = {
            let hub = self.hub;
            move |news: News<'_>| {
                desk.tell(news);
                if let (News::Install { assignment, delta }, Some(hub)) = (news, &hub) {
                    hub.publish(Arc::clone(assignment), delta);
                }
            }
        };
        let follow = follower.run(tell, inner.stop.clone());
        let save = save(self.cache, saved, inner.current.clone(), inner.stop.clone());
        let (offered, stop) = (inner.offered.clone(), inner.stop.clone());
        let report = async move {
            if let (Some(reporter), Some(offered)) = (reporter, offered) {
                reporter.run(offered, stop).await;
            }
        };
        inner.thread = Some(spawn(THREAD, async move {
            tokio::join!(follow, save, report);
        })?);
        Ok(Clerk { inner: Arc::new(inner) })
    }
}

/// What the cache holds. One that is not ours stays as it is, and nothing is saved then.
fn read_cache(job: &JobName, cache: &mut Option<PathBuf>) -> Option<Arc<Assignment>> {
    let path = cache.as_deref()?;
    match cache::load(path, job) {
        Ok(known) => known.map(Arc::new),
        Err(error) => {
            let replace = error.may_replace();
            let file = path.display();
            let error: &dyn std::error::Error = &error;
            warn!(%file, error, replace, "The cached assignment was not used");
            if !replace {
                *cache = None;
            }
            None
        }
    }
}

/// When somebody was last known to tell what changes, as callers read it without waiting.
#[derive(Debug)]
struct Heard(AtomicU64);

/// What it says: `NOBODY`, `SOMEBODY` or nanoseconds.
const NOBODY: u64 = 0;
const SOMEBODY: u64 = u64::MAX;

enum Last {
    Never,
    At(Time),
    Now,
}

impl Heard {
    fn new(state: &watch::State) -> Self {
        let is_live = matches!(state, watch::State::Live { .. });
        Self(AtomicU64::new(if is_live { SOMEBODY } else { NOBODY }))
    }

    /// Takes in how well the clerk is placed from now on.
    fn note(&self, state: &watch::State, now: Time) {
        if matches!(state, watch::State::Live { .. }) {
            self.0.store(SOMEBODY, Ordering::Relaxed);
        } else if self.0.load(Ordering::Relaxed) == SOMEBODY {
            self.0.store(now.as_nanos().max(1), Ordering::Relaxed);
        }
    }

    fn read(&self) -> Last {
        match self.0.load(Ordering::Relaxed) {
            NOBODY => Last::Never,
            SOMEBODY => Last::Now,
            nanos => Last::At(Time::from_nanos(nanos)),
        }
    }
}

/// Where the clerk's thread puts what callers read.
struct Desk {
    snapshot: Arc<Shown>,
    offered: Option<Arc<Offered>>,
    gauges: Arc<Gauges>,
    heard: Arc<Heard>,
    current: channel::Sender<Option<Arc<Assignment>>>,
    state: channel::Sender<watch::State>,
    clock: Clock,
}

impl Desk {
    fn tell(&mut self, news: News<'_>) {
        match news {
            News::Install { assignment, .. } => {
                // Whoever hears of it must find it in use.
                let snapshot = Arc::new(Snapshot::counted(Arc::clone(assignment), &self.gauges));
                self.snapshot.show(Arc::clone(&snapshot));
                if let Some(offered) = &self.offered {
                    offered.install(snapshot);
                }
                self.current.send_replace(Some(Arc::clone(assignment)));
            }
            News::State(state) => {
                self.heard.note(state, self.clock.now());
                self.state.send_replace(state.clone());
            }
        }
    }
}

fn nobody_asked(known: bool) -> watch::State {
    let (since, why) = (Time::ZERO, "nobody was asked yet".to_owned());
    if known { watch::State::Stale { since, why } } else { watch::State::Empty { since, why } }
}

/// Runs a clerk's work on a thread and a runtime of its own.
pub(crate) fn spawn(
    name: &str,
    work: impl Future<Output = ()> + Send + 'static,
) -> io::Result<thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name(name.into()).spawn(move || runtime.block_on(work))
}

/// Saves each assignment that comes, at most so often; on the way out once more, if there is something new.
async fn save(
    path: Option<PathBuf>,
    mut saved: Option<Generation>,
    mut current: channel::Receiver<Option<Arc<Assignment>>>,
    stop: CancellationToken,
) {
    let Some(path) = path else { return };
    let mut failing = false;
    loop {
        let goes_on = tokio::select! {
            () = stop.cancelled() => false,
            changed = current.changed() => changed.is_ok(),
        };
        let newest = current.borrow_and_update().clone();
        if let Some(newest) = newest.filter(|newest| Some(newest.generation) != saved) {
            saved = Some(newest.generation);
            let to = path.clone();
            let result = tokio::task::spawn_blocking(move || cache::save(&to, &newest)).await;
            let result = result.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            if let (Err(error), false) = (&result, failing) {
                let file = path.display();
                warn!(%file, %error, "The assignment was not cached; the next one will be tried");
            }
            failing = result.is_err();
        }
        if !goes_on {
            return;
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(SAVE_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests;

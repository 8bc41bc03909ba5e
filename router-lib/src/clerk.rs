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
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use arc_swap::{ArcSwap, Cache, Guard};
use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use mandoline_core::task::Address;
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
use crate::snapshot::{NoTask, Snapshot, Target};

/// The least time between two writes of the cache: a restart loses little by an assignment a second old.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Knows who owns every key of a job. Clones are the same clerk; its thread ends with the last of them.
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// let clerk = mandoline::Clerk::builder("shop".parse()?)
///     .sources(["10.0.0.1:7400".parse()?, "10.0.0.2:7400".parse()?])
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
    snapshot: Arc<ArcSwap<Snapshot>>,
    current: channel::Receiver<Option<Arc<Assignment>>>,
    state: channel::Receiver<watch::State>,
    seen: channel::Sender<Option<Generation>>,
    clock: Clock,
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

impl Clerk {
    /// Begins to describe a clerk of a job.
    pub fn builder(job: JobName) -> Builder {
        Builder { job, upstream: Upstream::default(), cache: None, hub: None }
    }

    /// Makes a clerk that knows this assignment and never another, for tests and tools.
    pub fn frozen(assignment: Arc<Assignment>) -> Self {
        let live = watch::State::Live { since: Time::ZERO, source: 0 };
        let (inner, _desk, _seen) = Inner::new(assignment.job.clone(), Some(assignment), live);
        Self { inner: Arc::new(inner) }
    }

    /// Makes a clerk that goes by a hub of the same process.
    pub fn follow_hub(hub: &Hub, job: JobName) -> Result<Self, StartError> {
        let mut changes = hub.watch_changes(&job);
        let known = changes.borrow().clone();
        let (mut inner, mut desk, seen) = Inner::new(job, known, nobody_asked(false));
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
        inner.thread = Some(spawn(follow)?);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Finds the task that serves a key.
    ///
    /// Never waits and never allocates. The answer keeps its snapshot for as long as it lives, so let it go soon. A thread
    /// that asks often is faster with a `router` of its own.
    #[inline]
    pub fn route(&self, key: &[u8]) -> Result<Target<Held>, NoTask> {
        self.route_at(SliceKey::of(key))
    }

    /// Finds the task that serves a slice key, such as a grouped one.
    #[inline]
    pub fn route_at(&self, key: SliceKey) -> Result<Target<Held>, NoTask> {
        let held = Held(self.inner.snapshot.load());
        let found = held.find(key, next_turn)?;
        Ok(Target::new(held, found))
    }

    /// Makes a handle for one thread or one connection, which looks up in a third of the time.
    pub fn router(&self) -> Router {
        let cache = Cache::new(Arc::clone(&self.inner.snapshot));
        Router { clerk: self.clone(), cache, turn: next_turn() }
    }

    /// Names the job.
    pub fn job(&self) -> &JobName {
        &self.inner.job
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

    /// Tells the clerk that a generation was seen elsewhere, such as on a request that a task turned away. Should its
    /// source not have it soon, it asks another one.
    pub fn refresh(&self, seen: Generation) {
        let news = |known: &mut Option<Generation>| {
            let news = Some(seen) > *known;
            if news {
                *known = Some(seen);
            }
            news
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
        let mut current = self.inner.current.clone();
        let reached = |current: &Option<Arc<Assignment>>| {
            current.as_ref().is_some_and(|current| current.generation >= wanted)
        };
        let newest = match current.wait_for(reached).await {
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
    ) -> (Self, Desk, channel::Receiver<Option<Generation>>) {
        let nothing = || Arc::new(Assignment::new(job.clone(), Generation::ZERO));
        let first = Snapshot::of(known.clone().unwrap_or_else(nothing));
        let snapshot = Arc::new(ArcSwap::from_pointee(first));
        let (known, current) = channel::channel(known);
        let (well, state) = channel::channel(state);
        let (seen, sightings) = channel::channel(None);
        let (clock, stop) = (Clock::start(), CancellationToken::new());
        let desk = Desk { snapshot: Arc::clone(&snapshot), current: known, state: well, clock };
        let inner = Self { job, snapshot, current, state, seen, clock, stop, thread: None };
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
    cache: Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>,
    turn: u32,
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
        let snapshot: &Snapshot = self.cache.load();
        let turn = &mut self.turn;
        let found = snapshot.find(key, || {
            *turn = turn.wrapping_add(TURN_STEP);
            *turn
        })?;
        Ok(Target::new(snapshot, found))
    }

    /// Gives the clerk that this is a handle on.
    pub fn clerk(&self) -> &Clerk {
        &self.clerk
    }
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "router of {:?}", self.clerk)
    }
}

/// 2^32 divided by the golden ratio: steps of it visit the replicas of a slice evenly, whatever their number.
const TURN_STEP: u32 = 0x9E37_79B9;

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
    job: JobName,
    upstream: Upstream,
    cache: Option<PathBuf>,
    hub: Option<Hub>,
}

impl Builder {
    /// Asks these, each as good as the others: assigner nodes or distributors.
    #[must_use]
    pub fn sources(mut self, sources: impl IntoIterator<Item = Address>) -> Self {
        self.upstream.sources.extend(sources);
        self
    }

    /// Asks these while no source answers: slicelets or proxies.
    #[must_use]
    pub fn peers(mut self, peers: impl IntoIterator<Item = Address>) -> Self {
        self.upstream.peers.extend(peers);
        self
    }

    /// Reaches them so, such as with TLS and a token.
    #[must_use]
    pub fn connector(mut self, connector: Connector) -> Self {
        self.upstream.connector = connector;
        self
    }

    /// Says who asks, for the logs of those who serve.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.upstream.watcher = name.into();
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

    /// Starts the clerk. It knows nothing yet, or what the cache held: see `Clerk::ready`.
    pub fn start(mut self) -> Result<Clerk, StartError> {
        let known = self.read_cache();
        if let (Some(hub), Some(known)) = (&self.hub, &known) {
            hub.publish(Arc::clone(known), None);
        }
        let saved = known.as_ref().map(|known| known.generation);
        let state = nobody_asked(known.is_some());
        let (mut inner, mut desk, seen) = Inner::new(self.job.clone(), known.clone(), state);
        let follower = Follower::new(self.job, self.upstream, known, seen, inner.clock)?;
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
        inner.thread = Some(spawn(async move {
            tokio::join!(follow, save);
        })?);
        Ok(Clerk { inner: Arc::new(inner) })
    }

    /// What the cache holds. One that is not ours stays as it is, and nothing is saved then.
    fn read_cache(&mut self) -> Option<Arc<Assignment>> {
        let path = self.cache.as_deref()?;
        match cache::load(path, &self.job) {
            Ok(known) => known.map(Arc::new),
            Err(error) => {
                let replace = error.may_replace();
                let file = path.display();
                let error: &dyn std::error::Error = &error;
                warn!(%file, error, replace, "The cached assignment was not used");
                if !replace {
                    self.cache = None;
                }
                None
            }
        }
    }
}

/// Where the clerk's thread puts what callers read.
struct Desk {
    snapshot: Arc<ArcSwap<Snapshot>>,
    current: channel::Sender<Option<Arc<Assignment>>>,
    state: channel::Sender<watch::State>,
    clock: Clock,
}

impl Desk {
    fn tell(&mut self, news: News<'_>) {
        match news {
            News::Install { assignment, .. } => {
                // Whoever hears of it must find it in use.
                self.snapshot.store(Arc::new(Snapshot::of(Arc::clone(assignment))));
                self.current.send_replace(Some(Arc::clone(assignment)));
            }
            News::State(state) => {
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
fn spawn(work: impl Future<Output = ()> + Send + 'static) -> io::Result<thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("mandoline-clerk".into()).spawn(move || runtime.block_on(work))
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
mod tests {
    use super::*;
    use mandoline_core::assignment::{Assigned, Replica};
    use mandoline_core::delta::{Delta, TaskChange};
    use mandoline_core::slice::Slice;
    use mandoline_core::task::{Phase, SessionId, Task, TaskInfo};
    use mandoline_distributor::serve::WatchService;
    use std::fs;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::transport::Server;

    /// How long anything here may take before the test is called hung.
    const PATIENCE: Duration = Duration::from_secs(20);

    async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(it) => it,
            Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
        }
    }

    fn job() -> JobName {
        "kv".parse().unwrap()
    }

    fn generation(number: u64) -> Generation {
        Generation { incarnation: 1, number }
    }

    /// Task `number` serves everything as of this generation.
    fn assignment(number: u64) -> Arc<Assignment> {
        let empty = Assignment::new(job(), generation(number - 1));
        Arc::new(delta(number).apply_to(&empty).unwrap())
    }

    fn delta(number: u64) -> Delta {
        let to = generation(number);
        let address = format!("127.0.0.1:{number}").parse().unwrap();
        let info = TaskInfo::new(format!("t{number}").parse().unwrap(), number, address);
        let task = Task { session: SessionId(number), info, phase: Phase::Serving };
        let replica = Replica { session: SessionId(number), since: to };
        let assigned = Assigned { replicas: [replica].into_iter().collect(), ..Default::default() };
        Delta {
            job: job(),
            from: generation(number - 1),
            to,
            tasks: vec![TaskChange::Set(Arc::new(task))],
            slices: vec![(Slice::FULL, assigned)],
        }
    }

    fn hub_at(number: u64) -> Hub {
        let hub = Hub::new();
        hub.publish(assignment(number), None);
        hub
    }

    fn advance(hub: &Hub) {
        let old = hub.get(&job()).unwrap();
        let delta = delta(old.generation.number + 1);
        hub.publish(Arc::new(delta.apply_to(&old).unwrap()), Some(&delta));
    }

    /// A server on a runtime of its own, so that it dies with all its connections when dropped.
    struct Node {
        address: Address,
        runtime: Option<tokio::runtime::Runtime>,
    }

    impl Node {
        fn serve(hub: &Hub) -> Self {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            Self::serve_on(listener, hub)
        }

        fn serve_on(listener: std::net::TcpListener, hub: &Hub) -> Self {
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap().to_string().parse().unwrap();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let service = WatchService::new(hub.clone(), CancellationToken::new());
            // Ends with the runtime, which the node holds.
            runtime.spawn(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let incoming = TcpListenerStream::new(listener);
                Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
            });
            Self { address, runtime: Some(runtime) }
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            if let Some(runtime) = self.runtime.take() {
                runtime.shutdown_background();
            }
        }
    }

    /// An address where nobody listens.
    fn nobody() -> Address {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string().parse().unwrap()
    }

    fn owner(clerk: &Clerk) -> String {
        let by_clerk = clerk.route(b"some key").unwrap();
        let mut router = clerk.router();
        let by_router = router.route(b"some key").unwrap();
        assert_eq!(by_clerk.session(), by_router.session());
        by_clerk.name().to_string()
    }

    async fn becomes(clerk: &Clerk, what: &str, mut is: impl FnMut(&State) -> bool) -> State {
        let mut states = clerk.inner.state.clone();
        soon(what, async {
            loop {
                states.borrow_and_update();
                let state = clerk.state();
                if is(&state) {
                    return state;
                }
                states.changed().await.unwrap();
            }
        })
        .await
    }

    #[tokio::test]
    async fn a_clerk_follows_what_changes() {
        let hub = hub_at(1);
        let node = Node::serve(&hub);
        let clerk = Clerk::builder(job()).sources([node.address.clone()]).start().unwrap();
        soon("an assignment", clerk.ready()).await;
        assert_eq!(owner(&clerk), "t1");
        let mut router = clerk.router();
        assert_eq!(router.route(b"x").unwrap().generation(), generation(1));
        for number in 2..=5 {
            advance(&hub);
            clerk.wait_for(generation(number), PATIENCE).await.unwrap();
            assert_eq!(owner(&clerk), format!("t{number}"));
            assert_eq!(router.route(b"x").unwrap().generation(), generation(number));
        }
        assert!(matches!(clerk.state(), State::Live { .. }));
        assert_eq!(clerk.clone().assignment(), hub.get(&job()));
    }

    #[tokio::test]
    async fn before_it_knows_anything_a_clerk_says_so() {
        let hub = Hub::new();
        let node = Node::serve(&hub);
        let clerk = Clerk::builder(job()).sources([node.address.clone()]).start().unwrap();
        assert_eq!(clerk.route(b"x").unwrap_err(), NoTask::Unknown);
        assert_eq!(clerk.assignment(), None);
        let state = becomes(
            &clerk,
            "the reason",
            |state| matches!(state, State::Empty { why, .. } if why.contains("does not know job kv")),
        );
        state.await;
        let short = Duration::from_millis(20);
        let error = clerk.wait_for(generation(1), short).await.unwrap_err();
        assert_eq!((error.wanted, error.waited), (generation(1), short));
        hub.publish(Arc::new(Assignment::new(job(), generation(1))), None);
        soon("an assignment", clerk.ready()).await;
        let nobody = NoTask::Nobody { slice: Slice::FULL, generation: generation(1) };
        assert_eq!(clerk.route(b"x").unwrap_err(), nobody);
    }

    #[tokio::test]
    async fn with_every_source_gone_a_clerk_goes_on_and_comes_back() {
        let hub = hub_at(1);
        let node = Node::serve(&hub);
        let address = node.address.clone();
        let clerk = Clerk::builder(job()).sources([address.clone()]).start().unwrap();
        soon("an assignment", clerk.ready()).await;
        drop(node);
        becomes(&clerk, "a stale state", |state| matches!(state, State::Stale { .. })).await;
        assert_eq!(owner(&clerk), "t1");
        advance(&hub);
        let listener = std::net::TcpListener::bind(address.as_str()).unwrap();
        let _again = Node::serve_on(listener, &hub);
        clerk.wait_for(generation(2), PATIENCE).await.unwrap();
        assert_eq!(owner(&clerk), "t2");
        becomes(&clerk, "a live state", |state| matches!(state, State::Live { .. })).await;
    }

    #[tokio::test]
    async fn a_new_clerk_starts_from_a_peer_with_every_source_gone() {
        let hub = hub_at(1);
        let source = Node::serve(&hub);
        // A caller that is served, and serves others: what a proxy does.
        let peers = Hub::new();
        let first = Clerk::builder(job()).sources([source.address.clone()]);
        let first = first.publish_to(peers.clone()).start().unwrap();
        let peer = Node::serve(&peers);
        soon("an assignment", first.ready()).await;
        drop(source);
        let second = Clerk::builder(job()).sources([nobody(), nobody()]);
        let second = second.peers([peer.address.clone()]).start().unwrap();
        soon("an assignment from the peer", second.ready()).await;
        assert_eq!(owner(&second), "t1");
    }

    #[tokio::test]
    async fn a_new_clerk_starts_from_its_file_with_everyone_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv.assignment");
        let hub = hub_at(7);
        let node = Node::serve(&hub);
        let clerk = Clerk::builder(job()).sources([node.address.clone()]).cache(&path);
        let clerk = clerk.start().unwrap();
        soon("an assignment", clerk.ready()).await;
        advance(&hub);
        clerk.wait_for(generation(8), PATIENCE).await.unwrap();
        drop(node);
        // On its way out it saves what it has not yet.
        let mut inner = Arc::into_inner(clerk.inner).unwrap();
        inner.stop.cancel();
        inner.thread.take().unwrap().join().unwrap();

        let peers = Hub::new();
        let clerk = Clerk::builder(job()).sources([nobody()]).cache(&path);
        let clerk = clerk.publish_to(peers.clone()).start().unwrap();
        assert_eq!(owner(&clerk), "t8");
        assert!(matches!(clerk.state(), State::Stale { .. }));
        assert_eq!(peers.get(&job()), clerk.assignment());
    }

    #[tokio::test]
    async fn a_file_that_is_no_use_is_ignored_and_only_ours_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv.assignment");
        let hub = hub_at(1);
        let node = Node::serve(&hub);
        for (content, replaced) in [("dear diary", false), ("mandolin", true)] {
            fs::write(&path, content).unwrap();
            let clerk = Clerk::builder(job()).sources([node.address.clone()]).cache(&path);
            let clerk = clerk.start().unwrap();
            soon("an assignment", clerk.ready()).await;
            let mut inner = Arc::into_inner(clerk.inner).unwrap();
            inner.stop.cancel();
            inner.thread.take().unwrap().join().unwrap();
            assert_eq!(fs::read(&path).unwrap() != content.as_bytes(), replaced, "{content}");
        }
    }

    #[tokio::test]
    async fn what_was_seen_elsewhere_sends_a_clerk_to_another_source() {
        let (lagging, ahead) = (hub_at(1), hub_at(5));
        let (behind, peer) = (Node::serve(&lagging), Node::serve(&ahead));
        let clerk = Clerk::builder(job()).sources([behind.address.clone()]);
        let clerk = clerk.peers([peer.address.clone()]).start().unwrap();
        soon("an assignment", clerk.ready()).await;
        assert_eq!(owner(&clerk), "t1");
        clerk.refresh(generation(5));
        clerk.refresh(generation(3));
        clerk.wait_for(generation(5), PATIENCE).await.unwrap();
        assert_eq!(owner(&clerk), "t5");
    }

    #[tokio::test]
    async fn a_clerk_follows_a_hub_of_its_own_process() {
        let hub = Hub::new();
        let clerk = Clerk::follow_hub(&hub, job()).unwrap();
        assert_eq!(clerk.route(b"x").unwrap_err(), NoTask::Unknown);
        hub.publish(assignment(1), None);
        soon("an assignment", clerk.ready()).await;
        advance(&hub);
        clerk.wait_for(generation(2), PATIENCE).await.unwrap();
        assert_eq!(owner(&clerk), "t2");
        assert!(matches!(clerk.state(), State::Live { .. }));
    }

    #[tokio::test]
    async fn a_frozen_clerk_knows_what_it_was_given() {
        let clerk = Clerk::frozen(assignment(3));
        assert_eq!(owner(&clerk), "t3");
        assert_eq!(soon("what it knows", clerk.ready()).await, assignment(3));
        clerk.refresh(generation(9));
        assert!(clerk.wait_for(generation(9), Duration::from_millis(5)).await.is_err());
    }

    #[tokio::test]
    async fn a_target_keeps_its_snapshot_and_may_be_sent_elsewhere() {
        let hub = hub_at(1);
        let clerk = Clerk::follow_hub(&hub, job()).unwrap();
        soon("an assignment", clerk.ready()).await;
        let target = clerk.route(b"x").unwrap();
        advance(&hub);
        clerk.wait_for(generation(2), PATIENCE).await.unwrap();
        let told = tokio::spawn(async move { format!("{target:?}") }).await.unwrap();
        assert_eq!(told, format!("t1 at 127.0.0.1:1 for {} as of 1.1", Slice::FULL));
    }

    #[test]
    fn a_lookup_does_not_allocate() {
        let mut made = assignment(1).as_ref().clone();
        for number in 2..=4_u64 {
            made = delta(number).apply_to(&made).unwrap();
        }
        let replica = |id| Replica { session: SessionId(id), since: generation(4) };
        for n in 1..1_000_u64 {
            let replicas = (0..n % 4).map(|k| replica(1 + (n + k) % 4)).collect();
            let slice = Slice::new(SliceKey(n << 54), SliceKey(((n + 1) << 54) - 1)).unwrap();
            made.slices.set(slice, Assigned { replicas, ..Default::default() });
        }
        let clerk = Clerk::frozen(Arc::new(made));
        let mut router = clerk.router();
        let mut found = 0;
        let mut look = || {
            for n in 0..10_000_u64 {
                let key = n.to_be_bytes();
                found += usize::from(clerk.route(&key).is_ok());
                found += usize::from(router.route(&key).is_ok_and(|t| t.replicas().len() > 1));
                found += usize::from(router.route_at(SliceKey(n << 50)).is_ok());
            }
        };
        look(); // each thread's first lookup may set up what it keeps
        let counted = allocation_counter::measure(look);
        assert_eq!(counted.count_total, 0, "{counted:?}");
        assert!(found > 10_000);
        let counted = allocation_counter::measure(|| drop(vec![found]));
        assert_eq!(counted.count_total, 1, "the counter counts");
    }

    #[test]
    fn a_clerk_with_nobody_to_ask_does_not_start() {
        let error = Clerk::builder(job()).start().unwrap_err();
        assert!(matches!(error, StartError::NobodyToAsk(_)), "{error}");
    }

    #[tokio::test]
    async fn its_thread_ends_with_the_last_clone() {
        let clerk = Clerk::builder(job()).sources([nobody()]).start().unwrap();
        let states = clerk.inner.state.clone();
        let router = clerk.clone().router();
        drop(clerk);
        assert!(states.has_changed().is_ok(), "a router holds the clerk");
        drop(router);
        let mut states = states;
        soon("the thread's end", async { while states.changed().await.is_ok() {} }).await;
    }
}

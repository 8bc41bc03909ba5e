//! The library half inside a task: what do I own, and how loaded am I.
//!
//! ```no_run
//! use mandoline::slicelet::{Claim, Slicelet};
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let slicelet = Slicelet::builder("kv", "kv-0", "127.0.0.1:9000")
//!     .assigners(["127.0.0.1:7400"])
//!     .on_added(|slices| println!("mine now: {slices:?}"))
//!     .start()?;
//! slicelet.ready().await?;
//! // For each request:
//! match slicelet.claim(b"user-42") {
//!     Claim::Mine => println!("serve it"),
//!     Claim::Elsewhere(owner) => println!("421 Misdirected Request, try {:?}", owner.address),
//! }
//! // On SIGTERM:
//! slicelet.shutdown().await;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::name::{JobName, NameError, TaskName};
use mandoline_core::report::Size;
use mandoline_core::slice::Slice;
use mandoline_core::task::{
    Address, AddressError, Capacity, CapacityError, SessionId, TaskInfo, TaskInfoError,
};
use mandoline_distributor::connect::Connector;
use mandoline_distributor::hub::Hub;
use mandoline_distributor::serve::WatchService;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

use crate::boot_clock::Clock;
pub use crate::counters::{COST_MAX_UNITS, CostError};
use crate::counters::{ONE_UNIT, Totals, thousandths};
use crate::dialer::drawn;
pub use crate::guard::{Guard, NotOwner};
use crate::link::Way;
use crate::moving::Moving;
use crate::owned::{Callback, Meter, Owned, View};
use crate::session::{Order, Session, Setup};
pub use crate::session::{State, Why};
use crate::spill::Utilisation;
use crate::steps::Calls;
use crate::transfer::State as Movable;
use crate::transfer::serve::Exports;

/// How long peers have to notice that nobody tells them anything here any more.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long a shutdown waits for slices to move away, unless told: Kubernetes kills after 30 s.
const GRACE: Duration = Duration::from_secs(25);
/// How long a shutdown waits after that for the last callbacks and the goodbye: with `GRACE`, within those 30 s.
const END_WITHIN: Duration = Duration::from_secs(2);

/// What a task knows of the slices that it owns.
///
/// Lookups and counts neither wait nor allocate. The session with the leader runs on a thread of its own. Dropping the
/// slicelet ends the session at once; [`Slicelet::shutdown`] has the slices moved away first.
pub struct Slicelet {
    owned: Arc<Owned>,
    totals: Totals,
    state: watch::Receiver<State>,
    orders: mpsc::Sender<Order>,
    stop: CancellationToken,
    // Slices that nobody was there to take when the session ended.
    left: Arc<AtomicUsize>,
    grace: Duration,
    watch_address: Option<Address>,
}

/// Whether a request is for this task.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a request that another task owns must be turned away"]
pub enum Claim {
    /// Serve it.
    Mine,
    /// Turn it away: `421 Misdirected Request`, or forward it.
    Elsewhere(Owner),
}

/// Who owns a key, as far as this task knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Where a task serves the key, if one does that is not this one.
    pub address: Option<Address>,
    /// The assignment that says so.
    pub generation: Generation,
}

/// How a shutdown went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Every slice had moved to another task.
    Drained,
    /// The grace period ended first, or no other task was there to wait for: so many slices were still this task's.
    GraceOver {
        /// How many.
        slices: usize,
    },
}

/// A task that cannot get ready, though it goes on trying; or one that was shut down.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The leader refuses this task: its name or address is taken, or what it says of itself is wrong. It asks again
    /// every second, since a process that died under that name is soon found lost.
    #[error("the leader refuses this task: {0}")]
    Refused(#[source] Why),
    /// The slicelet was shut down.
    #[error("the slicelet was shut down")]
    Stopped,
}

/// Why a slicelet did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The job's name is no name.
    #[error("job {0:?}")]
    Job(String, #[source] NameError),
    /// The task's name is no name.
    #[error("task {0:?}")]
    Task(String, #[source] NameError),
    /// Where the task serves, where it may be watched, or where an assigner is, is no address.
    #[error("{what}")]
    Address {
        /// Which one.
        what: &'static str,
        /// What is wrong.
        #[source]
        error: AddressError,
    },
    /// There is nobody to ask.
    #[error("no assigner is given: name at least one with `assigners`, such as 127.0.0.1:7400")]
    NoAssigners,
    /// The capacity is out of range.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// A label or the revision is too long, or there are too many labels.
    #[error(transparent)]
    Info(#[from] TaskInfoError),
    /// The watch address could not be listened on.
    #[error("cannot listen for watching peers on {0}")]
    Watch(String, #[source] io::Error),
    /// The thread for the session could not be made.
    #[error("cannot start the session's thread")]
    Thread(#[source] io::Error),
}

impl Slicelet {
    /// Begins to describe a task: its job, its stable name, and where it serves requests.
    pub fn builder(job: &str, task: &str, address: &str) -> Builder {
        let nothing = || -> Callback { Box::new(|_| ()) };
        Builder {
            job: job.to_owned(),
            task: task.to_owned(),
            address: address.to_owned(),
            assigners: Vec::new(),
            labels: Vec::new(),
            capacity: 1.0,
            revision: String::new(),
            watch_address: None,
            added: nothing(),
            removed: nothing(),
            meter: None,
            probe: None,
            grace: GRACE,
            connector: Connector::default(),
            calls: Calls::default(),
            movable: None,
        }
    }

    /// Owns for good what an assignment says that `session` owns, and reports to nobody: for tests and benchmarks.
    pub fn frozen(session: SessionId, assignment: Arc<Assignment>) -> Self {
        let nothing = || -> Callback { Box::new(|_| ()) };
        let start = Assignment::new(assignment.job.clone(), Generation::ZERO);
        let owned = Arc::new(Owned::new(start, nothing(), nothing()));
        if assignment.is_exclusive() {
            owned.own(session, assignment);
        } else {
            owned.install(Some(session), assignment, |_| ());
        }
        let (_, state) = watch::channel(State::Stopped);
        let (orders, _) = mpsc::channel(1);
        let (stop, grace) = (CancellationToken::new(), Duration::ZERO);
        let (totals, left) = (Totals::new(), Arc::default());
        Self { owned, totals, state, orders, stop, left, grace, watch_address: None }
    }

    /// Takes another assignment for good, as [`Slicelet::frozen`] does.
    #[cfg(test)]
    pub(crate) fn take(&self, session: SessionId, assignment: Arc<Assignment>) {
        if assignment.is_exclusive() {
            self.owned.own(session, assignment);
        } else {
            self.owned.install(Some(session), assignment, |_| ());
        }
    }

    /// Asks the session to have the slices moved away, and returns at once.
    #[cfg(feature = "testing")]
    pub(crate) fn ask_to_drain(&self) {
        // The queue is full only if it was asked before.
        let _queued = self.orders.try_send(Order::Drain);
    }

    /// Owns nothing any more, as a process that was killed.
    #[cfg(feature = "testing")]
    pub(crate) fn die(&self) {
        let known = self.assignment();
        if known.is_exclusive() {
            self.owned.lapse(known);
        } else {
            self.owned.install(None, known, |_| ());
        }
    }

    /// What it owns and counts.
    #[cfg(test)]
    pub(crate) fn owned_for_tests(&self) -> &Owned {
        &self.owned
    }

    /// Says whether this task owns a key right now. Counts nothing: see [`Slicelet::claim`].
    pub fn owns(&self, key: &[u8]) -> bool {
        self.owns_at(SliceKey::of(key))
    }

    /// Says whether this task owns a place, for keys that are grouped.
    pub fn owns_at(&self, key: SliceKey) -> bool {
        self.owned.view().owns(key)
    }

    /// Takes a request in: says whether it is this task's, and counts one unit of load for its slice. Misrouted requests
    /// count too, since they cost as well.
    pub fn claim(&self, key: &[u8]) -> Claim {
        self.claim_thousandths(SliceKey::of(key), ONE_UNIT)
    }

    /// Takes a request in that costs something else than one unit, at a place in the key space.
    pub fn claim_at(&self, key: SliceKey, cost: f64) -> Result<Claim, CostError> {
        Ok(self.claim_thousandths(key, thousandths(cost)?))
    }

    /// Takes a guard of a key: the word that this task owns it, for as long as the guard says so. Counts one unit of load.
    ///
    /// In an exclusive job no other task gives out a guard of the key meanwhile. Ask [`Guard::still_owned`] before you answer, and
    /// hand [`Guard::fencing_token`] on to storage.
    pub fn acquire(&self, key: &[u8]) -> Result<Guard, NotOwner> {
        Guard::take(&self.owned, SliceKey::of(key), ONE_UNIT)
    }

    /// Takes a guard for a request that costs something else than one unit, at a place in the key space.
    pub fn acquire_at(&self, key: SliceKey, cost: f64) -> Result<Guard, NotOwner> {
        Guard::take(&self.owned, key, thousandths(cost)?)
    }

    /// Takes a request in that its caller has spilled here (`mandoline-spill`, [`crate::Target::is_spilled`]): says whether it
    /// may be served, which is so while the job lets callers spill, whosever the key is; counts as [`Slicelet::claim`] does.
    pub fn claim_spilled(&self, key: &[u8]) -> Claim {
        self.claim_spilled_thousandths(SliceKey::of(key), ONE_UNIT)
    }

    /// Takes a spilled request in that costs something else than one unit, at a place in the key space.
    pub fn claim_spilled_at(&self, key: SliceKey, cost: f64) -> Result<Claim, CostError> {
        Ok(self.claim_spilled_thousandths(key, thousandths(cost)?))
    }

    fn claim_spilled_thousandths(&self, key: SliceKey, thousandths: u64) -> Claim {
        let view = self.owned.view();
        if view.claim_spilled(key, thousandths) {
            self.total(&view, thousandths);
            return Claim::Mine;
        }
        drop(view);
        self.claim_thousandths(key, thousandths)
    }

    /// Two atomics more, so only for jobs that make use of it.
    fn total(&self, view: &View, thousandths: u64) {
        if view.lets_spill() {
            self.totals.add(thousandths);
        }
    }

    /// Gives what this task has served since it began, for its answers (`mandoline-load`): by it, callers of a job with spill
    /// know which task is loaded above the cap. Other jobs need none of it, and for them it stands still.
    pub fn utilisation(&self) -> Utilisation {
        let (requests, thousandths) = self.totals.sum();
        Utilisation { requests, thousandths }
    }

    /// Says whether the task takes what callers spill here.
    pub(crate) fn takes_spilled(&self) -> bool {
        let view = self.owned.view();
        view.session.is_some() && view.lets_spill()
    }

    /// Gives what this task has served, if that is of use to anyone.
    pub(crate) fn tells_load(&self) -> Option<Utilisation> {
        self.owned.view().lets_spill().then(|| self.utilisation())
    }

    fn claim_thousandths(&self, key: SliceKey, thousandths: u64) -> Claim {
        let view = self.owned.view();
        if view.claim(key, thousandths) {
            self.total(&view, thousandths);
            return Claim::Mine;
        }
        let address = view.other_owner(key);
        Claim::Elsewhere(Owner { address, generation: view.assignment().generation })
    }

    /// Counts what a request has cost, where that is known only afterwards: use with [`Slicelet::owns`].
    pub fn count(&self, key: &[u8], cost: f64) -> Result<(), CostError> {
        self.count_at(SliceKey::of(key), cost)
    }

    /// Counts what a request has cost at a place, for keys that are grouped.
    pub fn count_at(&self, key: SliceKey, cost: f64) -> Result<(), CostError> {
        let cost = thousandths(cost)?;
        let view = self.owned.view();
        view.claim(key, cost);
        self.total(&view, cost);
        Ok(())
    }

    /// Says who else owns a key, for answers to requests that came to the wrong task.
    pub fn owner_of(&self, key: &[u8]) -> Owner {
        let view = self.owned.view();
        let address = view.other_owner(SliceKey::of(key));
        Owner { address, generation: view.assignment().generation }
    }

    /// Gives the generation of the assignment in force.
    pub fn generation(&self) -> Generation {
        self.owned.view().assignment().generation
    }

    /// Gives the assignment in force.
    pub fn assignment(&self) -> Arc<Assignment> {
        Arc::clone(self.owned.view().assignment())
    }

    /// Counts the slices that this task owns right now.
    pub fn owned(&self) -> usize {
        self.owned.view().owned()
    }

    /// Says how the task stands with the leader.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Gives where peers may watch, if they may; its port is the real one where 0 was asked for.
    pub fn watch_address(&self) -> Option<&Address> {
        self.watch_address.as_ref()
    }

    /// Waits until the task is registered and knows what it owns. Waits on while no assigner answers or nobody has made
    /// the job (`state` says so); gives up where the leader refuses the task, though the slicelet itself does not.
    pub async fn ready(&self) -> Result<(), NotReady> {
        let mut state = self.state.clone();
        loop {
            match &*state.borrow_and_update() {
                State::Attached { session, .. } => {
                    let view = self.owned.view();
                    let knows = view.assignment().tasks.contains_key(session);
                    if view.session == Some(*session) && knows {
                        return Ok(());
                    }
                }
                State::Alone { why, .. } if why.is_refusal() => {
                    return Err(NotReady::Refused(why.clone()));
                }
                State::Alone { .. } => (),
                State::Stopped => return Err(NotReady::Stopped),
            }
            if state.changed().await.is_err() {
                return Err(NotReady::Stopped);
            }
        }
    }

    /// Leaves in good order: serves until the last slice has moved to another task or the grace period ends, then ends
    /// the session. Call it on SIGTERM, and stop taking requests when it returns: two seconds after the grace period at the
    /// latest. A callback that still blocks then is left behind, and the leader finds the task lost.
    pub async fn shutdown(&self) -> Shutdown {
        // The queue is full only if it was asked before.
        let _queued = self.orders.try_send(Order::Drain);
        let drained = tokio::time::timeout(self.grace, self.stopped()).await.is_ok();
        let slices = self.owned();
        self.stop.cancel();
        if tokio::time::timeout(END_WITHIN, self.stopped()).await.is_err() {
            tracing::error!(
                "the session has not ended within {END_WITHIN:?}: on_added or on_removed blocks; leaving it behind"
            );
        }
        match self.left.load(Ordering::Relaxed) {
            0 if drained || slices == 0 => Shutdown::Drained,
            0 => Shutdown::GraceOver { slices },
            slices => Shutdown::GraceOver { slices },
        }
    }

    async fn stopped(&self) {
        // An error means that the session's thread is gone, which is as good.
        drop(self.state.clone().wait_for(|state| *state == State::Stopped).await);
    }
}

impl Drop for Slicelet {
    /// Ends the session at once, in the background: others are given the slices. [`Slicelet::shutdown`] is kinder.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl fmt::Debug for Slicelet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slicelet")
            .field("state", &self.state())
            .field("generation", &self.generation())
            .field("owned", &self.owned())
            .finish_non_exhaustive()
    }
}

/// What a task says of itself, and what it wants to hear.
#[must_use = "nothing happens before `start`"]
pub struct Builder {
    job: String,
    task: String,
    address: String,
    assigners: Vec<String>,
    labels: Vec<(String, String)>,
    capacity: f64,
    revision: String,
    watch_address: Option<String>,
    added: Callback,
    removed: Callback,
    meter: Option<Meter>,
    probe: Option<Handle>,
    grace: Duration,
    connector: Connector,
    calls: Calls,
    movable: Option<Arc<dyn Movable>>,
}

impl Builder {
    /// Names assigners to ask, in order; any one of the cluster knows who leads.
    pub fn assigners(mut self, addresses: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.assigners.extend(addresses.into_iter().map(|address| address.as_ref().to_owned()));
        self
    }

    /// Says something of the task that placement may look at, such as `zone`.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Says how much the task can carry, as a multiple of an ordinary one.
    pub fn capacity(mut self, times: f64) -> Self {
        self.capacity = times;
        self
    }

    /// Says which version of the program this is.
    pub fn revision(mut self, revision: &str) -> Self {
        revision.clone_into(&mut self.revision);
        self
    }

    /// Lets peers and callers watch assignments here, so that they start while no assigner runs. Port 0 takes a free one.
    pub fn watch_address(mut self, address: &str) -> Self {
        self.watch_address = Some(address.to_owned());
        self
    }

    /// Calls this with ranges that the task will own, sorted, before it says that it does: load what they need. The
    /// session goes on meanwhile, other changes wait.
    pub fn on_added(mut self, call: impl Fn(&[Slice]) + Send + Sync + 'static) -> Self {
        self.added = Box::new(call);
        self
    }

    /// Calls this with a slice that is on its way here, while another task still serves it: fetch what it needs. Callers stay
    /// where they are until it returns, or for the job's `prepare_within`.
    pub fn on_prepare(mut self, call: impl Fn(Slice) + Send + Sync + 'static) -> Self {
        self.calls.prepare = Some(Arc::new(call));
        self
    }

    /// Moves the application's state with its slices: see [`crate::transfer`]. Other tasks pull it from where peers watch, so
    /// give a [`Builder::watch_address`]; without one, slices that leave here start empty elsewhere. In an affinity job what is
    /// written to a slice while it moves stays behind: see [`crate::transfer`].
    pub fn state(mut self, state: impl Movable) -> Self {
        self.movable = Some(Arc::new(state));
        self
    }

    /// Calls this with a slice that is on its way elsewhere, once nothing is under way on it any more: write down what has to
    /// be. Nobody serves the slice meanwhile, unless the hand-off is called off: then requests come again at once, though this has
    /// not returned. Of exclusive jobs.
    pub fn on_release(mut self, call: impl Fn(Slice) + Send + Sync + 'static) -> Self {
        self.calls.release = Some(Arc::new(call));
        self
    }

    /// Calls this with a slice that was being released and stays, since its hand-off was called off: after
    /// [`Builder::on_release`] has returned, or without it, where guards were still held.
    pub fn on_resume(mut self, call: impl Fn(Slice) + Send + Sync + 'static) -> Self {
        self.calls.resume = Some(Arc::new(call));
        self
    }

    /// Calls this with ranges that the task no longer owns, sorted, once it says so: let go of what they held.
    pub fn on_removed(mut self, call: impl Fn(&[Slice]) + Send + Sync + 'static) -> Self {
        self.removed = Box::new(call);
        self
    }

    /// Asks this with each report what the application itself knows of the slices that the task serves: load by the metrics
    /// of the job's spec, and what a slice costs to move. It runs on the session's thread: answer from figures at hand,
    /// within milliseconds, for heartbeats wait for it. Slices that it leaves out are planned for by their requests.
    pub fn meter(mut self, call: impl Fn(&[Slice]) -> Vec<Size> + Send + Sync + 'static) -> Self {
        self.meter = Some(Box::new(call));
        self
    }

    /// Watches the application's runtime: a task that runs nothing any more must not pass for alive, so heartbeats stop
    /// while it hangs.
    pub fn probe(mut self, runtime: Handle) -> Self {
        self.probe = Some(runtime);
        self
    }

    /// Says how long [`Slicelet::shutdown`] waits for slices to move away; 25 s unless told.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Lets the session reach assigners by TLS, or show a token.
    pub fn connector(mut self, connector: Connector) -> Self {
        self.connector = connector;
        self
    }

    /// Starts the session on a thread of its own. Returns at once: see [`Slicelet::ready`].
    pub fn start(self) -> Result<Slicelet, StartError> {
        let (slicelet, setup, peers) = self.prepare()?;
        spawn(setup, peers).map_err(StartError::Thread)?;
        Ok(slicelet)
    }

    /// Makes a slicelet whose session is the caller's to run, reaches the leader this way and counts leases by this clock.
    #[cfg(feature = "testing")]
    pub(crate) fn start_by(
        self,
        way: Way,
        clock: Clock,
    ) -> Result<(Slicelet, impl Future<Output = ()> + Send), StartError> {
        let (slicelet, setup, peers) = self.prepare()?;
        Ok((slicelet, run(Setup { way, clock, ..setup }, peers)))
    }

    fn prepare(self) -> Result<(Slicelet, Setup, Option<Peers>), StartError> {
        let job = JobName::new(&self.job).map_err(|error| StartError::Job(self.job, error))?;
        let task = TaskName::new(&self.task).map_err(|error| StartError::Task(self.task, error))?;
        let assigners = self.assigners.iter().map(|text| address(text, "an assigner's address"));
        let assigners: Vec<Address> = assigners.collect::<Result<_, _>>()?;
        if assigners.is_empty() {
            return Err(StartError::NoAssigners);
        }
        let mut info = TaskInfo::new(task, drawn(), address(&self.address, "the task's address")?);
        info.labels = self.labels.into_iter().collect();
        info.capacity = Capacity::new(self.capacity)?;
        info.revision = self.revision;
        info.prepares = self.calls.prepare.is_some() || self.movable.is_some();
        info.check()?;
        let listener = self.watch_address.as_deref().map(listen).transpose()?;
        info.watch = listener.as_ref().map(|(address, _)| address.clone());
        let watch_address = info.watch.clone();

        let start = Assignment::new(job.clone(), Generation::ZERO);
        let owned = Owned::new(start.clone(), self.added, self.removed).with_meter(self.meter);
        let owned = Arc::new(owned);
        let (state, watched) = watch::channel(State::starting());
        // There is one thing to ask, and once is enough.
        let (orders, asked) = mpsc::channel(1);
        let (stop, hub) = (CancellationToken::new(), Hub::new());
        let left = Arc::new(AtomicUsize::new(0));
        let moving = self
            .movable
            .as_ref()
            .map(|state| Moving::new(&job, info.incarnation, state, self.connector.clone()));
        let peers = listener.map(|(_, listener)| Peers {
            listener,
            hub: hub.clone(),
            moving: moving.clone(),
        });
        let setup = Setup {
            job,
            info,
            assigners,
            way: Way::Network(self.connector),
            clock: Clock::default(),
            owned: Arc::clone(&owned),
            start: Arc::new(start),
            probe: self.probe,
            orders: asked,
            state,
            left: Arc::clone(&left),
            hub,
            calls: self.calls,
            moving,
            stop: stop.clone(),
        };
        let grace = self.grace;
        let totals = Totals::new();
        let state = watched;
        let slicelet = Slicelet { owned, totals, state, orders, stop, left, grace, watch_address };
        Ok((slicelet, setup, peers))
    }
}

/// Where peers watch, and what they are told.
struct Peers {
    listener: TcpListener,
    hub: Hub,
    moving: Option<Moving>,
}

/// Starts the session's thread. Its handle is let go: the thread ends with the session, and the state says when.
fn spawn(setup: Setup, peers: Option<Peers>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("mandoline-slicelet".to_owned());
    thread.spawn(move || runtime.block_on(run(setup, peers))).map(drop)
}

async fn run(setup: Setup, peers: Option<Peers>) {
    let stop = setup.stop.clone();
    let session = async {
        Session::new(setup).run().await;
        // After a drain nobody has said so yet.
        stop.cancel();
    };
    tokio::join!(session, serve(peers, stop.clone()));
}

async fn serve(peers: Option<Peers>, stop: CancellationToken) {
    let Some(Peers { listener, hub, moving }) = peers else { return };
    let exports = moving.as_ref().map(|moving| moving.exports().clone());
    let served = async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        // Else a small answer waits 40 ms for the acknowledgement of what was sent before.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tonic::transport::Server::builder()
            .add_service(WatchService::new(hub, stop.clone()))
            .add_optional_service(exports.as_ref().map(Exports::service))
            .serve_with_incoming_shutdown(incoming, stop.cancelled())
            .await
            .map_err(io::Error::other)
    };
    // A peer that keeps its connection open must not keep the thread alive.
    let over = async {
        stop.cancelled().await;
        tokio::time::sleep(GOODBYE).await;
    };
    let clear = async {
        match &exports {
            Some(exports) => exports.clear().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = clear => {}
        Err(error) = served => tracing::error!(%error, "peers can no longer watch here"),
        () = over => {}
        else => {}
    }
}

fn listen(text: &str) -> Result<(Address, TcpListener), StartError> {
    let refused = |error| StartError::Watch(text.to_owned(), error);
    let listener = TcpListener::bind(text).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    // A name is told as it was given: it may mean more to others than the address that it stands for here.
    let (host, _) = text.rsplit_once(':').unwrap_or((text, ""));
    let address = address(&format!("{host}:{}", bound.port()), "the watch address")?;
    Ok((address, listener))
}

fn address(text: &str, what: &'static str) -> Result<Address, StartError> {
    text.parse().map_err(|error| StartError::Address { what, error })
}

//! A whole sharded service in one process, on a clock of its own: for tests of what is built with this library.
//!
//! The leader, the planner, the leases and the sessions are the real ones; only the network and the log's other nodes are not
//! there. Time stands still until the test lets it go on ([`TestService::advance`]), so a minute of leases and reports takes
//! milliseconds, and nothing happens behind a test's back. Needs the feature `testing`, and a tokio runtime, paused or not.
//!
//! ```
//! use std::collections::HashMap;
//! use std::time::Duration;
//!
//! use mandoline::testing::TestService;
//!
//! # async fn test() -> Result<(), Box<dyn std::error::Error>> {
//! let service = TestService::builder("cache").tasks(2).start().await?;
//! let clerk = service.clerk()?;
//! // The application under test: here, a map for each task.
//! let mut caches = HashMap::from([("cache-0", HashMap::new()), ("cache-1", HashMap::new())]);
//!
//! let owner = clerk.route(b"user-42")?.name().to_string();
//! assert!(service.slicelet(&owner)?.owns(b"user-42"));
//! caches.get_mut(owner.as_str()).unwrap().insert("user-42", "Ada");
//!
//! service.kill(&owner).await?;
//! service.advance(Duration::from_secs(5)).await; // it is found lost, and its keys are given to the other
//!
//! let heir = clerk.route(b"user-42")?.name().to_string();
//! assert_ne!(heir, owner);
//! assert!(service.slicelet(&heir)?.owns(b"user-42"));
//! assert!(caches[heir.as_str()].is_empty(), "what was cached is lost: fetch it again");
//! # Ok(())
//! # }
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod desk;
mod line;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable};
use mandoline_core::assignment::Assignment;
use mandoline_core::command::Command;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::name::{JobName, NameError, TaskName};
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Consistency, JobSpec, Ratio};
use mandoline_core::state::Refused;
use mandoline_core::task::{Phase, SessionId};
use tokio::sync::mpsc;

use crate::boot_clock::Clock;
use crate::clerk::{self, Clerk};
use crate::link::{Caller, Way};
use crate::slicelet::{self, Slicelet, State};
use crate::testing::desk::Desk;
use crate::testing::world::{Switch, World};

/// The first time that anyone reads: leases keep the lowest numbers for themselves.
const BEGIN_NANOS: u64 = 1_000_000_000;
/// How far time goes on at once at most: well below any heartbeat that a spec may ask for but the shortest.
const STEP: Duration = Duration::from_millis(50);
/// How much of its own time the service is given for what it is asked to wait for: more than any lease.
const PATIENCE: Duration = Duration::from_secs(120);
/// Sessions that may wait to be taken in.
const CALLERS_MAX: usize = 64;

/// A sharded service in this process, whose clock stands still until it is told to go on.
pub struct TestService {
    desk: Arc<Desk>,
    world: World,
    door: mpsc::Sender<Caller>,
    nanos: Arc<AtomicU64>,
    tasks: Mutex<BTreeMap<String, Member>>,
    clerks: Mutex<Vec<Clerk>>,
}

struct Member {
    slicelet: Arc<Slicelet>,
    switch: Arc<Switch>,
    process: AbortHandle,
    is_dead: bool,
}

/// Why a test service did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The job's name is no name.
    #[error("job {0:?}")]
    Job(String, #[source] NameError),
    /// What was asked makes no sense to the leader: a spec, a task, a range.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The task did not start.
    #[error("task {0} did not start")]
    Task(String, #[source] slicelet::StartError),
    /// The clerk did not start.
    #[error(transparent)]
    Clerk(#[from] clerk::StartError),
    /// The system gave no thread.
    #[error("the service's thread did not start")]
    Thread(#[source] io::Error),
    /// There is a task of this name already.
    #[error("there is a task {0} already: kill or drain it first, or take another name")]
    Taken(String),
    /// No task has this name.
    #[error("there is no task {task}: there are {known}")]
    UnknownTask {
        /// Which one was asked for.
        task: String,
        /// Those that there are, or were.
        known: String,
    },
    /// The task was killed, has left, or is about to.
    #[error("task {0} was killed or drained, and serves nothing")]
    Dead(String),
    /// Ranges of an assignment share keys.
    #[error("the ranges overlap at {0}: give each key to one task")]
    Overlap(Slice),
    /// Ranges of an assignment leave keys out.
    #[error("the ranges leave {0} to nobody: give every key to a task")]
    Gap(Slice),
    /// It did not come to pass, however long the service's clock went on.
    #[error("{what} did not come to pass within {PATIENCE:?} of the service's own time")]
    TimedOut {
        /// What was waited for.
        what: String,
    },
}

/// What a test service is like.
#[derive(Clone, Debug)]
#[must_use = "nothing happens before `start`"]
pub struct Builder {
    job: String,
    tasks: usize,
    exclusive: bool,
    spec: Option<JobSpec>,
}

impl Builder {
    /// Begins with so many tasks, named after the job: `kv-0`, `kv-1`.
    pub const fn tasks(mut self, tasks: usize) -> Self {
        self.tasks = tasks;
        self
    }

    /// Gives each key one owner at most, under a lease.
    pub const fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// Asks what this spec says, under the service's own name. Without one the defaults hold but for the brake, which is off: of
    /// two tasks one may be killed.
    pub fn spec(mut self, spec: JobSpec) -> Self {
        self.spec = Some(spec);
        self
    }

    /// Starts the service, and waits until its tasks serve every key.
    pub async fn start(self) -> Result<TestService, Error> {
        let name = JobName::new(&self.job).map_err(|error| Error::Job(self.job.clone(), error))?;
        let plain = || JobSpec { brake: Ratio::percent(100), ..JobSpec::new(name.clone()) };
        let mut spec = JobSpec { name: name.clone(), ..self.spec.unwrap_or_else(plain) };
        if self.exclusive {
            spec.consistency = Consistency::Exclusive;
        }
        let nanos = Arc::new(AtomicU64::new(BEGIN_NANOS));
        let desk = Arc::new(Desk::new(spec, Arc::clone(&nanos))?);
        let world = World::start(Arc::clone(&desk), Arc::clone(&nanos)).map_err(Error::Thread)?;
        let (door, callers) = mpsc::channel(CALLERS_MAX);
        world.run(line::listen(Arc::clone(&desk), callers));
        let (tasks, clerks) = (Mutex::default(), Mutex::default());
        let service = TestService { desk, world, door, nanos, tasks, clerks };
        for number in 0..self.tasks {
            service.add_task(&format!("{}-{number}", self.job)).await?;
        }
        Ok(service)
    }
}

impl TestService {
    /// Begins to describe a service: its job's name first.
    pub fn builder(job: &str) -> Builder {
        Builder { job: job.to_owned(), tasks: 0, exclusive: false, spec: None }
    }

    /// Adds a task at an address that nobody listens on, and waits until it serves what it is given.
    pub async fn add_task(&self, name: &str) -> Result<Arc<Slicelet>, Error> {
        self.add(name, |builder| builder).await
    }

    /// Adds a task as its builder says: its labels, its capacity, its callbacks. The same name may come again once the one
    /// before was killed or drained: then this waits until that one is found lost.
    pub async fn add(
        &self,
        name: &str,
        describe: impl FnOnce(slicelet::Builder) -> slicelet::Builder,
    ) -> Result<Arc<Slicelet>, Error> {
        if self.lock().get(name).is_some_and(|member| !member.is_dead) {
            return Err(Error::Taken(name.to_owned()));
        }
        let builder = Slicelet::builder(self.desk.job.as_str(), name, &format!("{name}.test:7000"));
        let builder = describe(builder).assigners(["leader.test:7400"]);
        let way = Way::InProcess(self.door.clone());
        let started = builder.start_by(way, Clock::told(Arc::clone(&self.nanos)));
        let (slicelet, session) = started.map_err(|why| Error::Task(name.to_owned(), why))?;
        let (slicelet, switch) = (Arc::new(slicelet), Arc::<Switch>::default());
        let (process, aborted) = AbortHandle::new_pair();
        let running = Abortable::new(Box::pin(Arc::clone(&switch).run(session)), aborted);
        self.world.run(async move {
            let _killed_or_ended = running.await;
        });
        let member = Member { slicelet: Arc::clone(&slicelet), switch, process, is_dead: false };
        self.lock().insert(name.to_owned(), member);
        self.until(&format!("that task {name} is in touch and every key is served"), || {
            matches!(slicelet.state(), State::Attached { .. }) && self.is_settled()
        })
        .await?;
        Ok(slicelet)
    }

    /// Gives a task that lives.
    pub fn slicelet(&self, name: &str) -> Result<Arc<Slicelet>, Error> {
        self.living(name, |member| Arc::clone(&member.slicelet))
    }

    /// Makes a clerk that hears what the leader decides. [`TestService::advance`] returns once it has.
    pub fn clerk(&self) -> Result<Clerk, Error> {
        let clerk = Clerk::follow_hub(&self.desk.hub, self.desk.job.clone())?;
        self.clerks.lock().unwrap_or_else(PoisonError::into_inner).push(clerk.clone());
        Ok(clerk)
    }

    /// Ends a task as `kill -9` does: it serves nothing any more, and its connection breaks. That it is lost is found out as time
    /// goes on: after a heartbeat, or where keys have owners after its lease.
    pub async fn kill(&self, name: &str) -> Result<(), Error> {
        let slicelet = self.living_mut(name, |member| {
            member.is_dead = true;
            member.process.abort();
            Arc::clone(&member.slicelet)
        })?;
        self.world.step(Duration::ZERO).await;
        slicelet.die();
        self.hear().await;
        Ok(())
    }

    /// Stops a task as `SIGSTOP` does: it keeps its connection and says nothing. Its lease runs on.
    pub fn pause(&self, name: &str) -> Result<(), Error> {
        self.living(name, |member| member.switch.pause())
    }

    /// Lets a paused task go on where it was.
    pub async fn resume(&self, name: &str) -> Result<(), Error> {
        self.living(name, |member| member.switch.resume())?;
        self.advance(Duration::ZERO).await;
        Ok(())
    }

    /// Has a task leave in good order, as [`Slicelet::shutdown`] does, and waits until it is gone and others serve what it had.
    pub async fn drain(&self, name: &str) -> Result<(), Error> {
        let slicelet = self.slicelet(name)?;
        slicelet.ask_to_drain();
        self.until(&format!("that task {name} has left"), || slicelet.state() == State::Stopped)
            .await?;
        self.living_mut(name, |member| member.is_dead = true)?;
        // The last task leaves its keys to nobody.
        let is_empty = || self.desk.assignment().tasks.is_empty();
        self.until("that others serve what it had", || is_empty() || self.is_settled()).await
    }

    /// Gives ranges to tasks by name, for good: no balancing until [`TestService::unfreeze`]. Waits until they serve them. What
    /// is frozen to a task that dies later goes to others.
    pub async fn set_and_freeze<'a>(
        &self,
        ranges: impl IntoIterator<Item = (Slice, &'a str)>,
    ) -> Result<Generation, Error> {
        let mut ranges: Vec<(Slice, &str)> = ranges.into_iter().collect();
        ranges.sort_unstable();
        check_ranges(&ranges)?;
        let mut wanted: Vec<(Slice, SessionId)> = Vec::with_capacity(ranges.len());
        for (slice, name) in &ranges {
            let session = self.session(name)?;
            wanted.push((*slice, session));
        }
        let job = self.desk.job.clone();
        let mut commands = self.unpins();
        commands.push(Command::Freeze { job: job.clone() });
        for (slice, name) in &ranges {
            let task = TaskName::new(name).expect("a task has this name");
            commands.push(Command::Pin { job: job.clone(), slice: *slice, task });
        }
        self.desk.propose(commands)?;
        self.desk.rebalance();
        self.until("that the ranges are where they were put", || {
            let assignment = self.desk.assignment();
            let is_there = |(slice, session): &(Slice, SessionId)| {
                let mut parts = assignment.slices.touching(*slice);
                parts.all(|(_, assigned)| {
                    let replicas = assigned.replicas.as_slice();
                    replicas.len() == 1 && replicas[0].session == *session
                })
            };
            wanted.iter().all(is_there) && self.is_settled()
        })
        .await?;
        Ok(self.generation())
    }

    /// Lets the balancer move slices again.
    pub async fn unfreeze(&self) -> Result<(), Error> {
        let mut commands = self.unpins();
        commands.push(Command::Unfreeze { job: self.desk.job.clone() });
        self.desk.propose(commands)?;
        self.advance(Duration::ZERO).await;
        Ok(())
    }

    /// Begins a round of balancing now, on what was reported so far, and waits until whatever it moves has moved.
    pub async fn rebalance(&self) -> Result<Generation, Error> {
        self.desk.rebalance();
        self.until("that what the round moved is served", || self.is_settled()).await?;
        Ok(self.generation())
    }

    /// Adds up the load that the leader was told of last for keys within a range, by tasks that are there. Tasks report every
    /// five seconds of the service's time, unless the spec says otherwise.
    pub fn attributed_load(&self, range: Slice) -> Load {
        self.desk.attributed(range)
    }

    /// Gives the newest generation that was decided on.
    pub fn generation(&self) -> Generation {
        self.desk.assignment().generation
    }

    /// Gives the newest assignment that was decided on.
    pub fn assignment(&self) -> Arc<Assignment> {
        self.desk.assignment()
    }

    /// Lets time go on until every task that lives and is not paused, and every clerk, has heard of a generation or a later one.
    pub async fn wait_for(&self, wanted: Generation) -> Result<(), Error> {
        self.until(&format!("generation {wanted}"), || {
            self.generation() >= wanted && self.all_know(wanted)
        })
        .await
    }

    /// Lets the clock of the leader, the leases, the heartbeats and the reports go on, without sleeping. Everything that falls due
    /// meanwhile has happened when this returns, and every clerk has heard of it.
    pub async fn advance(&self, by: Duration) {
        let mut left = by;
        loop {
            let step = left.min(STEP);
            self.world.step(step).await;
            left -= step;
            if left.is_zero() {
                break;
            }
        }
        self.hear().await;
    }

    /// Waits until clerks, which have threads of their own, know what is decided.
    async fn hear(&self) {
        let newest = self.generation();
        let clerks = self.clerks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for clerk in clerks {
            let mut changes = clerk.changes();
            let knows = |known: &Option<Arc<Assignment>>| {
                known.as_ref().is_some_and(|known| known.generation >= newest)
            };
            // An error means that the clerk's thread is gone: it hears nothing more.
            drop(changes.wait_for(knows).await);
        }
    }

    /// Lets time go on until something has come to pass.
    async fn until(&self, what: &str, is_so: impl Fn() -> bool) -> Result<(), Error> {
        let mut waited = Duration::ZERO;
        self.advance(Duration::ZERO).await;
        while !is_so() {
            if waited >= PATIENCE {
                return Err(Error::TimedOut { what: what.to_owned() });
            }
            self.advance(STEP).await;
            waited += STEP;
        }
        Ok(())
    }

    /// Whether every key is served, nothing is on its way, and everyone knows.
    fn is_settled(&self) -> bool {
        let assignment = self.desk.assignment();
        let is_served = assignment.slices.iter().all(|(_, assigned)| {
            let has_task = !assigned.replicas.as_slice().is_empty();
            has_task && assigned.transit.is_none()
        });
        is_served && self.all_know(assignment.generation)
    }

    fn all_know(&self, wanted: Generation) -> bool {
        let assignment = self.desk.assignment();
        let tasks = self.lock();
        let mut hear =
            tasks.values().filter(|member| !member.is_dead && !member.switch.is_paused());
        hear.all(|member| {
            let slicelet = &member.slicelet;
            let State::Attached { session, .. } = slicelet.state() else { return false };
            let serves =
                || assignment.of(session).all(|(slice, _)| slicelet.owns_at(slice.first()));
            slicelet.generation() >= wanted
                && (slicelet.generation() != assignment.generation || serves())
        })
    }

    fn unpins(&self) -> Vec<Command> {
        let job = &self.desk.job;
        let unpin = |slice| Command::Unpin { job: job.clone(), slice };
        self.desk.read(|job| job.pins.iter().map(|pin| unpin(pin.slice)).collect())
    }

    /// The session of a task that lives and stays.
    fn session(&self, name: &str) -> Result<SessionId, Error> {
        self.living(name, |_| ())?;
        let assignment = self.desk.assignment();
        let mut serving = assignment.tasks.values().filter(|task| task.phase == Phase::Serving);
        let task = serving.find(|task| task.info.name.as_str() == name);
        Ok(task.ok_or_else(|| Error::Dead(name.to_owned()))?.session)
    }

    fn living<R>(&self, name: &str, look: impl FnOnce(&Member) -> R) -> Result<R, Error> {
        self.living_mut(name, |member| look(member))
    }

    fn living_mut<R>(&self, name: &str, act: impl FnOnce(&mut Member) -> R) -> Result<R, Error> {
        let mut tasks = self.lock();
        match tasks.get_mut(name) {
            Some(member) if member.is_dead => Err(Error::Dead(name.to_owned())),
            Some(member) => Ok(act(member)),
            None => {
                let known: Vec<&str> = tasks.keys().map(String::as_str).collect();
                Err(Error::UnknownTask { task: name.to_owned(), known: known.join(", ") })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Member>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TestService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestService")
            .field("job", &self.desk.job)
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

/// Checks that ranges, in order, hold each key once.
fn check_ranges(ranges: &[(Slice, &str)]) -> Result<(), Error> {
    let mut next = Some(SliceKey::MIN);
    for (slice, _) in ranges {
        let Some(expected) = next.filter(|expected| *expected <= slice.first()) else {
            return Err(Error::Overlap(*slice));
        };
        if let Some(gap) = slice.first().previous().and_then(|last| Slice::new(expected, last)) {
            return Err(Error::Gap(gap));
        }
        next = slice.last().next();
    }
    match next {
        Some(first) => Err(Error::Gap(Slice::new(first, SliceKey::MAX).expect("it is the last"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;

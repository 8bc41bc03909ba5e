//! What is known of every job, handed to each watcher: everything once, then what changed, encoded once and shared by all.
//!
//! A watcher pulls, so a slow one has nothing queued for it: when it comes back it gets the deltas that it missed while
//! they are still kept, else everything. `publish` never waits for a watcher, and is called from where commands are applied.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_proto::update::{encode_delta, encode_full, encode_unknown};
use tokio::sync::watch;

/// The most watchers of one node: 5 KiB each (measured) makes 100 MiB, and a push to all takes a second of one core.
pub const WATCHERS_MAX: usize = 20_000;
/// How many deltas are kept for those who fall behind: a minute and more of steady change at one a second.
pub const DELTAS_MAX: usize = 64;
/// The most slices of a delta that is worth keeping; past that everything is not much dearer, and fits into parts.
pub const DELTA_SLICES_MAX: usize = 4_096;

/// There are `WATCHERS_MAX` watchers already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this node has its {max} watchers: ask another one")]
pub struct TooManyWatchers {
    /// How many there may be.
    pub max: usize,
}

/// An encoded `pb::Update`, shared by all who are told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Bytes);

impl Frame {
    fn new(message: &[u8]) -> Self {
        let len = u32::try_from(message.len()).expect("a message is at most a few MiB");
        let mut frame = BytesMut::with_capacity(FRAME_HEAD_BYTES + message.len());
        frame.put_u8(0);
        frame.put_u32(len);
        frame.put_slice(message);
        Self(frame.freeze())
    }

    /// Gives the message alone.
    pub fn message(&self) -> Bytes {
        self.0.slice(FRAME_HEAD_BYTES..)
    }

    /// Gives the message as gRPC frames it: not compressed, its length, itself.
    pub fn framed(&self) -> Bytes {
        self.0.clone()
    }
}

/// The flag that says whether a message is compressed, and its length.
const FRAME_HEAD_BYTES: usize = 5;

/// What is known of every job. Clones are the same hub.
#[derive(Clone, Debug)]
pub struct Hub {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Who publishes, subscribes, forgets or sweeps holds this; then a topic's log, never the other way round.
    topics: Mutex<Topics>,
    watchers: AtomicUsize,
    watchers_max: usize,
}

/// One job, known or waited for.
#[derive(Debug)]
struct Topic {
    job: JobName,
    log: Mutex<Log>,
    current: watch::Sender<Option<Arc<Assignment>>>,
}

/// What there is to tell. Invariant: `deltas` lead without a gap to the assignment of `edition`.
#[derive(Debug, Default)]
struct Log {
    edition: Option<Arc<Edition>>,
    deltas: VecDeque<Step>,
}

#[derive(Debug)]
struct Edition {
    assignment: Arc<Assignment>,
    frames: OnceLock<Arc<[Frame]>>,
}

#[derive(Debug)]
struct Step {
    from: Generation,
    to: Generation,
    frame: Frame,
}

impl Step {
    fn new(delta: &Delta) -> Self {
        Self { from: delta.from, to: delta.to, frame: Frame::new(&encode_delta(delta)) }
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self::new()
    }
}

impl Hub {
    /// Begins with no job, and room for `WATCHERS_MAX` watchers.
    pub fn new() -> Self {
        Self::with_watchers_max(WATCHERS_MAX)
    }

    /// Begins with no job, and room for that many watchers.
    pub fn with_watchers_max(watchers_max: usize) -> Self {
        let (topics, watchers) = (Mutex::default(), AtomicUsize::new(0));
        Self { inner: Arc::new(Inner { topics, watchers, watchers_max }) }
    }

    /// Tells all watchers of a job's newer assignment, and of the step that led to it from the one before, if there was one.
    ///
    /// Quick and never waits. What is not newer than what is known changes nothing.
    pub fn publish(&self, assignment: Arc<Assignment>, delta: Option<&Delta>) {
        let delta = delta.filter(|delta| delta.slices.len() <= DELTA_SLICES_MAX).map(Step::new);
        let edition =
            Arc::new(Edition { assignment: Arc::clone(&assignment), frames: OnceLock::new() });
        let mut topics = lock(&self.inner.topics);
        let topic = topic(&mut topics, &assignment.job);
        let mut log = lock(&topic.log);
        let known = log.edition.as_ref().map(|edition| edition.assignment.generation);
        if known >= Some(assignment.generation) {
            return;
        }
        match delta.filter(|step| Some(step.from) == known && step.to == assignment.generation) {
            Some(step) => {
                if log.deltas.len() == DELTAS_MAX {
                    log.deltas.pop_front();
                }
                log.deltas.push_back(step);
            }
            None => log.deltas.clear(),
        }
        log.edition = Some(edition);
        topic.current.send_replace(Some(assignment));
    }

    /// Forgets a job that is gone: its watchers hear that it is not known.
    pub fn forget(&self, job: &JobName) {
        let mut topics = lock(&self.inner.topics);
        if let Some(topic) = topics.get(job) {
            *lock(&topic.log) = Log::default();
            topic.current.send_replace(None);
            sweep(&mut topics, job);
        }
    }

    /// Gives what is known of a job.
    pub fn get(&self, job: &JobName) -> Option<Arc<Assignment>> {
        let topics = lock(&self.inner.topics);
        let current = topics.get(job)?.current.borrow();
        current.clone()
    }

    /// Names the jobs that are known.
    pub fn jobs(&self) -> Vec<JobName> {
        let topics = lock(&self.inner.topics);
        let known = topics.iter().filter(|(_, topic)| topic.current.borrow().is_some());
        known.map(|(job, _)| job.clone()).collect()
    }

    /// Watches a job from within this process: the receiver holds what is known, and wakes when that changes.
    pub fn watch_changes(&self, job: &JobName) -> watch::Receiver<Option<Arc<Assignment>>> {
        topic(&mut lock(&self.inner.topics), job).current.subscribe()
    }

    /// Begins to tell someone of a job, from what they know on.
    pub fn subscribe(
        &self,
        job: &JobName,
        known: Option<Generation>,
    ) -> Result<Subscription, TooManyWatchers> {
        let place = Place::take(&self.inner)?;
        let mut topics = lock(&self.inner.topics);
        let topic = topic(&mut topics, job);
        let changed = topic.current.subscribe();
        drop(topics);
        let hub = self.clone();
        Ok(Subscription {
            hub,
            topic,
            changed,
            told: known,
            told_unknown: false,
            pending: Pending::None,
            _place: place,
        })
    }

    /// Counts those who subscribe.
    pub fn watchers(&self) -> usize {
        self.inner.watchers.load(Ordering::Relaxed)
    }
}

type Topics = BTreeMap<JobName, Arc<Topic>>;

fn topic(topics: &mut Topics, job: &JobName) -> Arc<Topic> {
    if let Some(topic) = topics.get(job) {
        return Arc::clone(topic);
    }
    let topic = Topic::new(job);
    topics.insert(job.clone(), Arc::clone(&topic));
    topic
}

/// Drops what was kept for a job that is not known and that nobody waits for: anyone may ask for any name.
fn sweep(topics: &mut Topics, job: &JobName) {
    let idle = |topic: &Arc<Topic>| {
        topic.current.receiver_count() == 0 && topic.current.borrow().is_none()
    };
    if topics.get(job).is_some_and(idle) {
        topics.remove(job);
    }
}

impl Topic {
    fn new(job: &JobName) -> Arc<Self> {
        let (current, _) = watch::channel(None);
        Arc::new(Self { job: job.clone(), log: Mutex::default(), current })
    }
}

impl Edition {
    /// Everything, encoded by whoever needs it first.
    fn frames(&self) -> Arc<[Frame]> {
        let encode = || encode_full(&self.assignment).iter().map(|part| Frame::new(part)).collect();
        Arc::clone(self.frames.get_or_init(encode))
    }
}

/// One of the places that watchers may take, given back when dropped.
#[derive(Debug)]
struct Place(Arc<Inner>);

impl Place {
    fn take(inner: &Arc<Inner>) -> Result<Self, TooManyWatchers> {
        let max = inner.watchers_max;
        let more = |watchers| (watchers < max).then_some(watchers + 1);
        match inner.watchers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Self(Arc::clone(inner))),
            Err(_) => Err(TooManyWatchers { max }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one watcher is told.
#[derive(Debug)]
pub struct Subscription {
    hub: Hub,
    topic: Arc<Topic>,
    changed: watch::Receiver<Option<Arc<Assignment>>>,
    /// What the watcher knows, once it has taken what is pending.
    told: Option<Generation>,
    told_unknown: bool,
    pending: Pending,
    _place: Place,
}

/// The rest of a full assignment, which may not be broken off.
#[derive(Debug)]
enum Pending {
    None,
    Parts { frames: Arc<[Frame]>, next: usize },
}

impl Subscription {
    /// Gives the next message, as soon as there is one. Safe to cancel: what was not given is given next time.
    pub async fn next(&mut self) -> Frame {
        loop {
            self.changed.borrow_and_update();
            if let Some(frame) = self.ready() {
                return frame;
            }
            // The topic holds the sender, so this ends only with news.
            if self.changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn ready(&mut self) -> Option<Frame> {
        if let Pending::Parts { frames, next } = &mut self.pending {
            let frame = frames[*next].clone();
            *next += 1;
            if *next == frames.len() {
                self.pending = Pending::None;
            }
            return Some(frame);
        }
        let log = lock(&self.topic.log);
        let Some(edition) = log.edition.clone() else {
            drop(log);
            self.told = None;
            let first = !std::mem::replace(&mut self.told_unknown, true);
            return first.then(|| Frame::new(&encode_unknown(&self.topic.job)));
        };
        self.told_unknown = false;
        let newest = edition.assignment.generation;
        // A watcher who knows more than this hub waits until the hub has caught up.
        if self.told >= Some(newest) {
            return None;
        }
        if let Some(step) = log.deltas.iter().find(|step| Some(step.from) == self.told) {
            self.told = Some(step.to);
            return Some(step.frame.clone());
        }
        drop(log);
        self.told = Some(newest);
        self.pending = Pending::Parts { frames: edition.frames(), next: 0 };
        self.ready()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // The receiver of this subscription still counts: swap it for one of a channel of its own.
        self.changed = watch::channel(None).1;
        sweep(&mut lock(&self.hub.inner.topics), &self.topic.job);
    }
}

/// A poisoned lock is taken as it is: nothing here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

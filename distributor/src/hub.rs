//! What is known of every job, and of the flags, handed to each watcher: everything once, then what changed, encoded once and shared by all.
//!
//! A watcher pulls, so a slow one has nothing queued for it: when it comes back it gets the deltas that it missed while
//! they are still kept, else everything. `publish` never waits for a watcher, and is called from where commands are applied.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::flags::Flags;
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_proto::flags::encode_flags;
use mandoline_proto::update::{encode_delta, encode_full, encode_unknown};
use tokio::sync::{OnceCell, watch};
use tokio::task::spawn_blocking;

/// The most watchers of one node: 5 KiB each (measured) makes 100 MiB, and a push to all takes a second of one core.
pub const WATCHERS_MAX: usize = 20_000;
/// How many deltas are kept for those who fall behind: a minute and more of steady change at one a second.
pub const DELTAS_MAX: usize = 64;
/// The most slices of a delta that is worth keeping; past that everything is not much dearer, and fits into parts.
pub const DELTA_SLICES_MAX: usize = 4_096;
/// The most slices that are encoded in passing, in some 2 ms; more of them go to a thread that may take its time, since an
/// assigner's heartbeats run beside this.
const INLINE_SLICES_MAX: usize = 20_000;

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
    flags: watch::Sender<Option<FlagsEdition>>,
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
    frames: OnceCell<Arc<[Frame]>>,
}

/// All flags are one small message: there is nothing between everything and nothing.
#[derive(Clone, Debug)]
struct FlagsEdition {
    flags: Arc<Flags>,
    frame: Frame,
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
        let (flags, _) = watch::channel(None);
        Self { inner: Arc::new(Inner { topics, flags, watchers, watchers_max }) }
    }

    /// Tells all watchers of a job's newer assignment, and of the step that led to it from the one before, if there was one.
    ///
    /// Quick and never waits. What is not newer than what is known changes nothing.
    pub fn publish(&self, assignment: Arc<Assignment>, delta: Option<&Delta>) {
        let delta = delta.filter(|delta| delta.slices.len() <= DELTA_SLICES_MAX).map(Step::new);
        let edition =
            Arc::new(Edition { assignment: Arc::clone(&assignment), frames: OnceCell::new() });
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

    /// Tells all who watch the flags of newer ones. Quick, never waits, and changes nothing where they are not newer.
    pub fn publish_flags(&self, flags: Arc<Flags>) {
        let known = |known: &Option<FlagsEdition>| known.as_ref().map(|e| e.flags.version);
        if known(&self.inner.flags.borrow()) >= Some(flags.version) {
            return;
        }
        let frame = Frame::new(&encode_flags(&flags));
        self.inner.flags.send_if_modified(|current| {
            let is_newer = known(current) < Some(flags.version);
            if is_newer {
                *current = Some(FlagsEdition { flags, frame });
            }
            is_newer
        });
    }

    /// Gives the flags, once they are known.
    pub fn flags(&self) -> Option<Arc<Flags>> {
        self.inner.flags.borrow().as_ref().map(|edition| Arc::clone(&edition.flags))
    }

    /// Begins to tell someone of the flags.
    pub fn subscribe_flags(&self) -> Result<FlagsSubscription, TooManyWatchers> {
        let place = Place::take(&self.inner)?;
        let mut changed = self.inner.flags.subscribe();
        changed.mark_changed();
        Ok(FlagsSubscription { changed, _place: place })
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
    async fn frames(self: &Arc<Self>) -> Arc<[Frame]> {
        let frames = self.frames.get_or_init(async || {
            if self.assignment.slices.count() <= INLINE_SLICES_MAX {
                return self.encode();
            }
            let edition = Arc::clone(self);
            spawn_blocking(move || edition.encode()).await.unwrap_or_else(|_| self.encode())
        });
        Arc::clone(frames.await)
    }

    fn encode(&self) -> Arc<[Frame]> {
        encode_full(&self.assignment).iter().map(|part| Frame::new(part)).collect()
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

/// What a watcher is told next, where everything is not encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Everything.
    Everything(Arc<Assignment>),
    /// A step, or that the job is not known.
    Frame(Frame),
}

/// The rest of a full assignment, which may not be broken off.
#[derive(Debug)]
enum Pending {
    None,
    Parts { frames: Arc<[Frame]>, next: usize },
}

/// What there is to say to a watcher.
enum Ready {
    Now(Frame),
    Everything(Arc<Edition>),
    Nothing,
}

impl Subscription {
    /// Gives the next message, as soon as there is one. Safe to cancel: what was not given is given next time.
    pub async fn next(&mut self) -> Frame {
        loop {
            self.changed.borrow_and_update();
            match self.ready() {
                Ready::Now(frame) => return frame,
                Ready::Everything(edition) => {
                    let frames = edition.frames().await;
                    self.told = Some(edition.assignment.generation);
                    self.pending = Pending::Parts { frames, next: 0 };
                }
                Ready::Nothing => self.news().await,
            }
        }
    }

    /// Gives what there is to say next to whoever says it in another form than gRPC's. For one watcher either this or `next`.
    /// Safe to cancel, as `next` is.
    pub async fn tell(&mut self) -> Told {
        loop {
            self.changed.borrow_and_update();
            match self.ready() {
                Ready::Now(frame) => return Told::Frame(frame),
                Ready::Everything(edition) => {
                    self.told = Some(edition.assignment.generation);
                    return Told::Everything(Arc::clone(&edition.assignment));
                }
                Ready::Nothing => self.news().await,
            }
        }
    }

    /// The topic holds the sender, so this ends only with news.
    async fn news(&mut self) {
        if self.changed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn ready(&mut self) -> Ready {
        if let Pending::Parts { frames, next } = &mut self.pending {
            let frame = frames[*next].clone();
            *next += 1;
            if *next == frames.len() {
                self.pending = Pending::None;
            }
            return Ready::Now(frame);
        }
        let log = lock(&self.topic.log);
        let Some(edition) = &log.edition else {
            self.told = None;
            if std::mem::replace(&mut self.told_unknown, true) {
                return Ready::Nothing;
            }
            return Ready::Now(Frame::new(&encode_unknown(&self.topic.job)));
        };
        self.told_unknown = false;
        // A watcher who knows more than this hub waits until the hub has caught up.
        if self.told >= Some(edition.assignment.generation) {
            return Ready::Nothing;
        }
        match log.deltas.iter().find(|step| Some(step.from) == self.told) {
            Some(step) => {
                self.told = Some(step.to);
                Ready::Now(step.frame.clone())
            }
            None => Ready::Everything(Arc::clone(edition)),
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // The receiver of this subscription still counts: swap it for one of a channel of its own.
        self.changed = watch::channel(None).1;
        sweep(&mut lock(&self.hub.inner.topics), &self.topic.job);
    }
}

/// What one who watches the flags is told: those that there are, and again whenever they change. Of those that came while it
/// was not listening, the newest.
#[derive(Debug)]
pub struct FlagsSubscription {
    changed: watch::Receiver<Option<FlagsEdition>>,
    /// Holds the hub too, and so the sender.
    _place: Place,
}

impl FlagsSubscription {
    /// Gives the next message, as soon as there is one. Safe to cancel.
    pub async fn next(&mut self) -> Frame {
        loop {
            if self.changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Some(edition) = &*self.changed.borrow_and_update() {
                return edition.frame.clone();
            }
        }
    }
}

/// A poisoned lock is taken as it is: nothing here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{advance, empty, generation, large, soon, step};
    use futures_util::FutureExt;
    use mandoline_proto::update::{Assembler, Update};

    fn job() -> JobName {
        "kv".parse().unwrap()
    }

    /// Takes what there is to tell right now, in words.
    fn told(subscription: &mut Subscription) -> Vec<String> {
        let mut assembler = Assembler::default();
        let mut told = Vec::new();
        while let Some(frame) = subscription.next().now_or_never() {
            assert_eq!(frame.framed()[5..], frame.message());
            let len = u32::from_be_bytes(frame.framed()[1..5].try_into().unwrap());
            assert_eq!((frame.framed()[0], len as usize), (0, frame.message().len()));
            told.extend(assembler.take_bytes(&frame.message()).unwrap().map(
                |update| match update {
                    Update::Full(full) => format!("full {}", full.generation),
                    Update::Delta(delta) => format!("delta {} {}", delta.from, delta.to),
                    Update::Unknown(job) => format!("unknown {job}"),
                },
            ));
        }
        told
    }

    #[test]
    fn a_watcher_hears_everything_once_and_then_what_changes() {
        let hub = Hub::new();
        let mut early = hub.subscribe(&job(), None).unwrap();
        assert_eq!(told(&mut early), ["unknown kv"]);
        assert_eq!(told(&mut early), Vec::<String>::new());
        hub.publish(empty("kv", 1), None);
        assert_eq!(told(&mut early), ["full 1.1"]);
        advance(&hub, "kv");
        advance(&hub, "kv");
        assert_eq!(told(&mut early), ["delta 1.1 1.2", "delta 1.2 1.3"]);
        let mut late = hub.subscribe(&job(), None).unwrap();
        assert_eq!(told(&mut late), ["full 1.3"]);
    }

    #[test]
    fn another_form_is_told_the_same() {
        let hub = Hub::new();
        hub.publish(empty("kv", 1), None);
        let mut watcher = hub.subscribe(&job(), None).unwrap();
        let mut tell = || watcher.tell().now_or_never();
        assert_eq!(tell(), Some(Told::Everything(empty("kv", 1))));
        assert_eq!(tell(), None);
        advance(&hub, "kv");
        hub.forget(&job());
        let Some(Told::Frame(unknown)) = tell() else { panic!("it is told that the job is gone") };
        assert_eq!(unknown.message(), encode_unknown(&job()));
        hub.publish(empty("kv", 5), None);
        assert_eq!(tell(), Some(Told::Everything(empty("kv", 5))));
        advance(&hub, "kv");
        assert!(matches!(tell(), Some(Told::Frame(_))));
    }

    #[test]
    fn what_a_watcher_knows_is_where_it_begins() {
        let hub = Hub::new();
        hub.publish(empty("kv", 5), None);
        for _ in 0..3 {
            advance(&hub, "kv");
        }
        let cases = [
            (Some(generation(8)), vec![]),
            (Some(generation(6)), vec!["delta 1.6 1.7", "delta 1.7 1.8"]),
            (Some(generation(4)), vec!["full 1.8"]),
            (Some(Generation { incarnation: 0, number: 900 }), vec!["full 1.8"]),
            // It knows more than this hub: nothing, until the hub has caught up.
            (Some(generation(9)), vec![]),
            (Some(Generation { incarnation: 2, number: 1 }), vec![]),
        ];
        for (known, expected) in cases {
            let mut subscription = hub.subscribe(&job(), known).unwrap();
            assert_eq!(told(&mut subscription), expected, "{known:?}");
        }
        let mut ahead = hub.subscribe(&job(), Some(generation(9))).unwrap();
        advance(&hub, "kv");
        assert_eq!(told(&mut ahead), Vec::<String>::new());
        advance(&hub, "kv");
        assert_eq!(told(&mut ahead), ["delta 1.9 1.10"]);
    }

    #[test]
    fn a_watcher_that_fell_too_far_behind_hears_everything_anew() {
        let hub = Hub::new();
        hub.publish(empty("kv", 1), None);
        let mut slow = hub.subscribe(&job(), None).unwrap();
        assert_eq!(told(&mut slow), ["full 1.1"]);
        for _ in 0..DELTAS_MAX {
            advance(&hub, "kv");
        }
        assert_eq!(told(&mut slow).len(), DELTAS_MAX);
        for _ in 0..=DELTAS_MAX {
            advance(&hub, "kv");
        }
        assert_eq!(told(&mut slow), ["full 1.130"]);
    }

    #[test]
    fn what_is_older_or_does_not_follow_is_never_told_as_a_step() {
        let hub = Hub::new();
        hub.publish(empty("kv", 5), None);
        let mut watcher = hub.subscribe(&job(), Some(generation(5))).unwrap();
        hub.publish(empty("kv", 5), None);
        hub.publish(empty("kv", 4), None);
        assert_eq!(told(&mut watcher), Vec::<String>::new());
        // A step from a generation that this hub has not had.
        let (_, delta) = step(&empty("kv", 6));
        hub.publish(empty("kv", 7), Some(&delta));
        assert_eq!(told(&mut watcher), ["full 1.7"]);
        // A step that is so large that everything is as good.
        let (next, mut delta) = step(&empty("kv", 7));
        delta.slices = vec![delta.slices[0].clone(); DELTA_SLICES_MAX + 1];
        hub.publish(next, Some(&delta));
        assert_eq!(told(&mut watcher), ["full 1.8"]);
    }

    #[tokio::test]
    async fn parts_of_a_full_assignment_are_not_broken_off_by_news() {
        let hub = Hub::new();
        hub.publish(large("kv", 1), None);
        let mut watcher = hub.subscribe(&job(), None).unwrap();
        let mut assembler = Assembler::default();
        let first = soon("the first part", watcher.next()).await;
        assert_eq!(assembler.take_bytes(&first.message()), Ok(None));
        let newer = advance(&hub, "kv");
        let mut known = None;
        while let Some(frame) = watcher.next().now_or_never() {
            match assembler.take_bytes(&frame.message()).unwrap() {
                Some(Update::Full(full)) => known = Some(full),
                Some(Update::Delta(delta)) => {
                    known = Some(delta.apply_to(&known.unwrap()).unwrap());
                }
                _ => {}
            }
        }
        assert_eq!(known.as_ref(), Some(newer.as_ref()));
    }

    #[tokio::test]
    async fn all_watchers_share_the_same_bytes() {
        let hub = Hub::new();
        hub.publish(large("kv", 1), None);
        let mut watchers: Vec<_> = (0..3).map(|_| hub.subscribe(&job(), None).unwrap()).collect();
        let mut first = Vec::new();
        for watcher in &mut watchers {
            first.push(soon("the first part", watcher.next()).await.framed());
        }
        assert!(first.iter().all(|bytes| bytes.as_ptr() == first[0].as_ptr()));
    }

    #[test]
    fn a_job_that_is_forgotten_is_unknown_and_may_come_back() {
        let hub = Hub::new();
        hub.publish(empty("kv", 5), None);
        let mut watcher = hub.subscribe(&job(), Some(generation(5))).unwrap();
        hub.forget(&job());
        assert_eq!((hub.get(&job()), hub.jobs()), (None, vec![]));
        assert_eq!(told(&mut watcher), ["unknown kv"]);
        hub.publish(empty("kv", 2), None);
        assert_eq!(told(&mut watcher), ["full 1.2"]);
        assert_eq!(hub.jobs(), [job()]);
    }

    #[test]
    fn there_is_room_for_so_many_watchers_and_a_place_is_given_back() {
        let hub = Hub::with_watchers_max(2);
        let one = hub.subscribe(&job(), None).unwrap();
        let _two = hub.subscribe(&job(), None).unwrap();
        let refused = hub.subscribe(&job(), None).unwrap_err();
        assert_eq!(refused, TooManyWatchers { max: 2 });
        drop(one);
        assert_eq!(hub.watchers(), 1);
        assert!(hub.subscribe(&job(), None).is_ok());
    }

    #[test]
    fn names_that_nobody_waits_for_are_not_kept() {
        let hub = Hub::new();
        for n in 0..100 {
            let name = format!("guess-{n}").parse().unwrap();
            drop(hub.subscribe(&name, None).unwrap());
        }
        assert_eq!(lock(&hub.inner.topics).len(), 0);
        hub.publish(empty("kv", 1), None);
        drop(hub.subscribe(&job(), None).unwrap());
        hub.forget(&job());
        assert_eq!(lock(&hub.inner.topics).len(), 0);
    }

    #[tokio::test]
    async fn news_wakes_who_waits() {
        let hub = Hub::new();
        let mut changes = hub.watch_changes(&job());
        let mut watcher = hub.subscribe(&job(), None).unwrap();
        assert_eq!(told(&mut watcher), ["unknown kv"]);
        let publisher = hub.clone();
        let publish = tokio::spawn(async move { publisher.publish(empty("kv", 1), None) });
        soon("a frame", watcher.next()).await;
        soon("a change", changes.changed()).await.unwrap();
        publish.await.unwrap();
        assert_eq!(changes.borrow().as_ref().map(|known| known.generation), Some(generation(1)));
    }
}

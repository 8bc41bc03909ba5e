//! The side that will serve the slice: pulls its state from the one that has it.
//!
//! One [`Import`] a hand-off. The connection is opened for the bulk pass and kept for the last one, which callers wait for. The
//! application's import runs on a thread of its own and reads what the connection has checked; it lives through broken
//! connections. What it set aside is kept or discarded when the import is: once, and after its last call has returned.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, Task};
use mandoline_distributor::connect::Connector;
use mandoline_proto::error::WireError;
use mandoline_proto::pb;
use mandoline_proto::pb::transfers_client::TransfersClient;
use mandoline_proto::transfer::{Ask, End, Party, Pass, Pull, Refusal, RefusalCode, Say, Wanted};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use xxhash_rust::xxh3::Xxh3;

use crate::transfer::feed::{Feed, feed};
use crate::transfer::{BULK_MAX, HandOff, LAST_MAX, Limits, Moved, State};

/// The first pause after a try that brought nothing; each next one is twice as long, up to `PAUSE_MAX`. All eight together take
/// under two seconds, which is what a lost peer costs.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// What may wait to be said: more than there are chunks under way, so it fills only when the other side does not read.
const ASKS_MAX: usize = 16;

/// Where a slice's state is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Where its peers watch.
    pub address: Address,
    /// Who must answer there.
    pub party: Party,
}

impl Origin {
    /// Finds it in what an assignment says of a task; nothing if the task serves no peers.
    pub fn of(task: &Task) -> Option<Self> {
        let party = Party { session: task.session, incarnation: task.info.incarnation };
        Some(Self { address: task.info.watch.clone()?, party })
    }
}

/// Pulls the state of slices that come to this task.
#[derive(Clone)]
pub struct Puller {
    shared: Arc<Shared>,
}

struct Shared {
    job: JobName,
    state: Arc<dyn State>,
    connector: Connector,
    limits: Limits,
    bulk: Semaphore,
    last: Semaphore,
    tallies: Tallies,
}

#[derive(Default)]
struct Tallies {
    passes: AtomicU64,
    bytes: AtomicU64,
    resumed: AtomicU64,
    empty: AtomicU64,
}

/// What was pulled since the task began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulled {
    /// Passes that came whole.
    pub passes: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How often a broken connection was taken up again.
    pub resumed: u64,
    /// Slices that start empty, since their state could not be moved.
    pub empty_starts: u64,
}

/// Why a pass did not come. The slice starts empty, unless its hand-off is over anyway.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The task that has the slice serves no peers.
    #[error("the task that has the slice serves no peers: give it a watch address")]
    NoAddress,
    /// The last pass adds to a bulk pass, and there is none.
    #[error("there is no bulk pass to add to")]
    NoBulk,
    /// The other side refused, or broke off.
    #[error("refused: {0}")]
    Refused(#[source] Refusal),
    /// Someone else answered than was asked.
    #[error("{found} answered at {address}, where {meant} was meant")]
    Impostor {
        /// Where.
        address: Address,
        /// Who was meant.
        meant: Party,
        /// Who it was.
        found: Party,
    },
    /// What came makes no sense, or is not what was sent.
    #[error("the stream is corrupt")]
    Corrupt(#[source] WireError),
    /// The other side cannot be reached, or breaks off before it brings anything.
    #[error("lost the task that has the slice, after {tries} tries: {problem}")]
    Lost {
        /// How many in a row.
        tries: u32,
        /// What happened last.
        problem: String,
    },
    /// Time was up.
    #[error("the pass did not come in time, last because: {0}")]
    TimedOut(String),
    /// The application's import failed.
    #[error("the import failed")]
    Import(#[source] std::io::Error),
    /// The application's import panicked, or its `keep` did.
    #[error("the application panicked")]
    Panicked,
}

impl Puller {
    /// Moves state into `state`, reaching other tasks by `connector`.
    pub fn new(job: JobName, state: Arc<dyn State>, connector: Connector) -> Self {
        Self::with_limits(job, state, connector, Limits::default())
    }

    /// The same with other limits.
    pub fn with_limits(
        job: JobName,
        state: Arc<dyn State>,
        connector: Connector,
        limits: Limits,
    ) -> Self {
        let (bulk, last) = (Semaphore::new(BULK_MAX), Semaphore::new(LAST_MAX));
        let tallies = Tallies::default();
        Self { shared: Arc::new(Shared { job, state, connector, limits, bulk, last, tallies }) }
    }

    /// Begins to move what a hand-off brings here. Nothing happens yet.
    pub fn begin(&self, me: Party, from: Option<Origin>, hand_off: HandOff) -> Import {
        let stage = Stage { state: Arc::clone(&self.shared.state), hand_off, is_used: false };
        Import {
            shared: Arc::clone(&self.shared),
            me,
            from,
            hand_off,
            stage: Some(Arc::new(stage.into())),
            channel: None,
            attempt: 0,
            progress: Progress::Nothing,
        }
    }

    /// Says what was pulled since the task began.
    pub fn pulled(&self) -> Pulled {
        let Tallies { passes, bytes, resumed, empty } = &self.shared.tallies;
        let [passes, bytes, resumed, empty_starts] =
            [passes, bytes, resumed, empty].map(|tally| tally.load(Ordering::Relaxed));
        Pulled { passes, bytes, resumed, empty_starts }
    }
}

/// The import of one slice's state. Dropping it discards what was set aside, on another thread and once the application's last
/// call has returned; dropping a pass that is under way gives it up.
#[must_use = "dropping it discards what it brought"]
pub struct Import {
    shared: Arc<Shared>,
    me: Party,
    from: Option<Origin>,
    hand_off: HandOff,
    stage: Option<Arc<Staged>>,
    channel: Option<Channel>,
    attempt: u32,
    progress: Progress,
}

/// What has come whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Nothing,
    Bulk { attempt: u32 },
    Last { bulk: u32 },
}

/// What the application has set aside. Discarded when the last of those who hold it lets go, unless it was taken into use.
struct Stage {
    state: Arc<dyn State>,
    hand_off: HandOff,
    is_used: bool,
}

/// One call at a time.
type Staged = std::sync::Mutex<Stage>;

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.is_used {
            self.state.discard(&self.hand_off);
        }
    }
}

impl Import {
    /// Brings everything there is, while the other side serves on. May be repeated; then it begins anew.
    pub async fn bulk(&mut self, until: Instant) -> Result<Moved, PullError> {
        self.progress = Progress::Nothing;
        let moved = self.pass(Wanted::Bulk, until).await?;
        self.progress = Progress::Bulk { attempt: self.attempt };
        Ok(moved)
    }

    /// Brings what has changed since the bulk pass, when the other side serves no longer. Where it fails for good, the bulk pass is
    /// of no use either.
    pub async fn last(&mut self, until: Instant) -> Result<Moved, PullError> {
        let (Progress::Bulk { attempt: bulk } | Progress::Last { bulk }) = self.progress else {
            return Err(PullError::NoBulk);
        };
        self.progress = Progress::Nothing;
        let moved = self.pass(Wanted::Last { after: bulk }, until).await?;
        self.progress = Progress::Last { bulk };
        Ok(moved)
    }

    /// Takes what came into use, now that the assignment shows this task as the owner: of an exclusive slice, whose last pass must
    /// have come.
    pub async fn keep(self) -> Result<(), PullError> {
        match self.progress {
            Progress::Last { .. } => self.take_into_use().await,
            Progress::Nothing | Progress::Bulk { .. } => Err(PullError::NoBulk),
        }
    }

    /// The same after the bulk pass alone: of a slice of an affinity job, which others may have changed since.
    pub async fn keep_bulk(self) -> Result<(), PullError> {
        match self.progress {
            Progress::Bulk { .. } | Progress::Last { .. } => self.take_into_use().await,
            Progress::Nothing => Err(PullError::NoBulk),
        }
    }

    async fn take_into_use(mut self) -> Result<(), PullError> {
        let stage = self.stage.take().expect("it is taken only here and in `drop`");
        let kept = tokio::task::spawn_blocking(move || {
            let mut stage = stage.lock().map_err(|_| PullError::Panicked)?;
            stage.is_used = true;
            stage.state.keep(&stage.hand_off);
            Ok(())
        });
        kept.await.unwrap_or(Err(PullError::Panicked))
    }

    /// Brings a pass, and says aloud when that fails.
    async fn pass(&mut self, wanted: Wanted, until: Instant) -> Result<Moved, PullError> {
        let mut problem = "nothing has begun".to_owned();
        let pulled = timeout_at(until, Box::pin(self.attempts(wanted, &mut problem))).await;
        let pulled = pulled.unwrap_or(Err(PullError::TimedOut(problem)));
        let (hand_off, pass) = (self.hand_off, wanted.pass());
        let tallies = &self.shared.tallies;
        match &pulled {
            Ok(moved) => {
                tallies.passes.fetch_add(1, Ordering::Relaxed);
                tallies.bytes.fetch_add(moved.bytes, Ordering::Relaxed);
                tallies.resumed.fetch_add(u64::from(moved.resumed), Ordering::Relaxed);
                tracing::debug!(%hand_off, %pass, bytes = moved.bytes, "State came");
            }
            Err(PullError::Refused(refusal)) if refusal.code == RefusalCode::Over => {
                tracing::debug!(%hand_off, %pass, "State is not needed: the hand-off is over");
            }
            Err(error) => {
                tallies.empty.fetch_add(1, Ordering::Relaxed);
                let error: &dyn std::error::Error = error;
                tracing::warn!(%hand_off, %pass, error, "State could not be moved: the slice starts empty");
            }
        }
        pulled
    }

    /// Begins until one attempt comes through. Only bytes that are gone at the other side make another one worth it.
    async fn attempts(&mut self, wanted: Wanted, problem: &mut String) -> Result<Moved, PullError> {
        let shared = Arc::clone(&self.shared);
        let line = match wanted.pass() {
            Pass::Bulk => &shared.bulk,
            Pass::Last => &shared.last,
        };
        let _place = line.acquire().await.expect("the semaphore is never closed");
        let mut tries = Tries { limits: shared.limits, barren: 0, pause: PAUSE_FIRST };
        loop {
            self.attempt += 1;
            let stage = self.stage.as_ref().expect("it is taken only with the import itself");
            let mut inflow = Inflow::new(Arc::clone(stage), wanted.pass());
            if let Some(moved) = self.attempt(wanted, &mut inflow, &mut tries, problem).await? {
                return Ok(moved);
            }
            // The import must have ended before it is begun anew.
            inflow.break_off().await;
        }
    }

    /// Goes on over as many connections as it takes. Nothing: it must begin anew.
    async fn attempt(
        &mut self,
        wanted: Wanted,
        inflow: &mut Inflow,
        tries: &mut Tries,
        problem: &mut String,
    ) -> Result<Option<Moved>, PullError> {
        let mut resumed = 0;
        loop {
            let before = inflow.offset;
            let broke = match self.connection(wanted, inflow).await {
                Ok(()) => return Ok(Some(Moved { bytes: inflow.offset, resumed })),
                Err(Trouble::Fatal(error)) => return Err(error),
                Err(Trouble::Anew(why)) => {
                    tries.again(before < inflow.offset, &why).await?;
                    *problem = why;
                    return Ok(None);
                }
                Err(Trouble::Broke(why)) => why,
            };
            tracing::debug!(hand_off = %self.hand_off, at = inflow.offset, broke, "Pull broke off");
            tries.again(before < inflow.offset, &broke).await?;
            resumed += u32::from(inflow.offset > 0);
            *problem = broke;
        }
    }

    /// Pulls over one connection until all is taken in.
    async fn connection(&mut self, wanted: Wanted, inflow: &mut Inflow) -> Result<(), Trouble> {
        let origin = self.from.clone().ok_or(PullError::NoAddress)?;
        let channel = self.channel(&origin.address).await?;
        let pull = Pull {
            job: self.shared.job.clone(),
            hand_off: self.hand_off.id,
            puller: self.me,
            server: origin.party,
            wanted,
            attempt: self.attempt,
            offset: inflow.offset,
        };
        let (asks, queue) = mpsc::channel(ASKS_MAX);
        asks.try_send(pb::PullRequest::from(&Ask::Pull(pull))).expect("a new queue has room");
        let authorize = self.shared.connector.authorize();
        let mut client = TransfersClient::with_interceptor(channel, authorize);
        let replies = client.pull(ReceiverStream::new(queue)).await;
        let mut replies = replies.map_err(|status| self.failed(&status))?.into_inner();
        let mut has_begun = false;
        loop {
            let reply = match replies.message().await {
                Ok(Some(reply)) => reply,
                Ok(None) if inflow.is_imported() => return Ok(()),
                Ok(None) => return Err(Trouble::Broke("the stream ended early".to_owned())),
                Err(status) => return Err(self.failed(&status)),
            };
            let say = Say::try_from(reply).map_err(PullError::Corrupt)?;
            let ask = match say {
                Say::Begun { server, offset } if !has_begun => {
                    has_begun = true;
                    check_begun(&origin, inflow.offset, server, offset)?;
                    continue;
                }
                Say::Refused(refusal) => return Err(refused(refusal)),
                Say::Chunk { offset, bytes } if has_begun => {
                    inflow.take(offset, bytes).await?;
                    Ask::Taken(inflow.offset)
                }
                Say::End(end) if has_begun => {
                    inflow.end(self.hand_off, &end).await?;
                    Ask::Imported
                }
                Say::Begun { .. } | Say::Chunk { .. } | Say::End(_) => {
                    let problem = "a stream begins with `begun`, and only so";
                    return Err(corrupt("reply", problem).into());
                }
            };
            if asks.send(pb::PullRequest::from(&ask)).await.is_err() {
                return Err(Trouble::Broke("the connection is gone".to_owned()));
            }
        }
    }

    /// Gives the connection, the one from before if it still stands.
    async fn channel(&mut self, address: &Address) -> Result<Channel, Trouble> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        let connected = self.shared.connector.connect(address).await;
        let channel = connected.map_err(|error| Trouble::Broke(chain(&error)))?;
        Ok(self.channel.insert(channel).clone())
    }

    /// A call that failed leaves a connection that may have, too.
    fn failed(&mut self, status: &Status) -> Trouble {
        self.channel = None;
        let said = format!("{}: {}", status.code(), status.message());
        match status.code() {
            Code::Unimplemented => {
                let message = "the task that has the slice serves no transfers".to_owned();
                refused(Refusal { code: RefusalCode::NoExporter, message })
            }
            Code::InvalidArgument => corrupt("request", said).into(),
            _ => Trouble::Broke(said),
        }
    }
}

impl Drop for Import {
    /// What the application set aside is discarded where that may block.
    fn drop(&mut self) {
        let Some(stage) = self.stage.take() else { return };
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(stage))),
            Err(_) => drop(stage),
        }
    }
}

/// Why a connection did not bring the end.
enum Trouble {
    /// Another one may go on where it was.
    Broke(String),
    /// What would come next is gone.
    Anew(String),
    /// No other one would do better.
    Fatal(PullError),
}

impl From<PullError> for Trouble {
    fn from(error: PullError) -> Self {
        Self::Fatal(error)
    }
}

fn refused(refusal: Refusal) -> Trouble {
    match refusal.code {
        RefusalCode::NotDue => Trouble::Broke(refusal.message),
        RefusalCode::CannotResume => Trouble::Anew(refusal.message),
        _ => Trouble::Fatal(PullError::Refused(refusal)),
    }
}

fn corrupt(field: &str, problem: impl std::fmt::Display) -> PullError {
    PullError::Corrupt(WireError::new(field, problem))
}

fn check_begun(origin: &Origin, at: u64, found: Party, offset: u64) -> Result<(), PullError> {
    if found != origin.party {
        let (address, meant) = (origin.address.clone(), origin.party);
        return Err(PullError::Impostor { address, meant, found });
    }
    if offset != at {
        return Err(corrupt("begun.offset", format!("is {offset}, and {at} was asked for")));
    }
    Ok(())
}

/// Counts tries in a row that brought nothing.
struct Tries {
    limits: Limits,
    barren: u32,
    pause: Duration,
}

impl Tries {
    /// Waits for the next try, unless there were enough.
    async fn again(&mut self, brought_something: bool, problem: &str) -> Result<(), PullError> {
        if brought_something {
            (self.barren, self.pause) = (0, PAUSE_FIRST);
        }
        self.barren += 1;
        if self.barren >= self.limits.tries {
            return Err(PullError::Lost { tries: self.barren, problem: problem.to_owned() });
        }
        sleep(self.pause).await;
        self.pause = PAUSE_MAX.min(2 * self.pause);
        Ok(())
    }
}

/// What comes in during one attempt, over however many connections.
struct Inflow {
    pass: Pass,
    offset: u64,
    checksum: Xxh3,
    feed: Option<mpsc::Sender<Feed>>,
    import: Option<JoinHandle<std::io::Result<()>>>,
}

impl Inflow {
    /// Begins with the application's import on a thread of its own.
    fn new(stage: Arc<Staged>, pass: Pass) -> Self {
        let (feed, mut source) = feed();
        let import = tokio::task::spawn_blocking(move || {
            // A call that panicked spoils only this transfer, and the next call says so again.
            let stage = stage.lock().map_err(|_| std::io::Error::other("an import panicked"))?;
            stage.state.import(&stage.hand_off, pass, &mut source)?;
            source.rest()
        });
        let (feed, import) = (Some(feed), Some(import));
        Self { pass, offset: 0, checksum: Xxh3::new(), feed, import }
    }

    /// Hands a chunk on, as soon as the application has room for it.
    async fn take(&mut self, offset: u64, bytes: Bytes) -> Result<(), PullError> {
        if offset != self.offset {
            let problem = format!("is {offset}, and {} comes next", self.offset);
            return Err(corrupt("chunk.offset", problem));
        }
        let Some(feed) = &self.feed else {
            return Err(corrupt("chunk", "comes after the end"));
        };
        self.checksum.update(&bytes);
        self.offset += bytes.len() as u64;
        if feed.send(Feed::Chunk(bytes)).await.is_err() {
            // The import has returned before its end.
            return Err(match self.imported().await {
                Ok(()) => PullError::Import(std::io::Error::other("the import left bytes unread")),
                Err(error) => error,
            });
        }
        Ok(())
    }

    /// Checks the end, and waits until the application has taken all in. Once: a connection that breaks right after makes
    /// the end come again.
    async fn end(&mut self, hand_off: HandOff, end: &End) -> Result<(), PullError> {
        let meant = End {
            hand_off: hand_off.id,
            pass: self.pass,
            length: self.offset,
            checksum: self.checksum.digest(),
        };
        if *end != meant {
            let End { hand_off, pass, length, checksum } = end;
            let said = format!("says {hand_off}, {pass}, {length} bytes, checksum {checksum:016x}");
            let End { hand_off, pass, length, checksum } = meant;
            let found = format!("{hand_off}, {pass}, {length} bytes, checksum {checksum:016x}");
            return Err(corrupt("end", format!("{said}, and what came is {found}")));
        }
        let Some(feed) = self.feed.take() else { return Ok(()) };
        // If nobody hears it the import has returned, and says why.
        drop(feed.send(Feed::End).await);
        drop(feed);
        self.imported().await
    }

    async fn imported(&mut self) -> Result<(), PullError> {
        let import = self.import.as_mut().expect("it is awaited once, at the end or at an error");
        let imported = import.await;
        self.import = None;
        match imported {
            Ok(result) => result.map_err(PullError::Import),
            Err(_) => Err(PullError::Panicked),
        }
    }

    fn is_imported(&self) -> bool {
        self.feed.is_none() && self.import.is_none()
    }

    /// Lets the application's import end without having seen the end.
    async fn break_off(mut self) {
        self.feed = None;
        if let Some(import) = self.import.take() {
            // Whatever it says: it was not given the whole.
            drop(import.await);
        }
    }
}

/// An error and what caused it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

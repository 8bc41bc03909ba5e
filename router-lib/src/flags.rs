//! The flags as a proxy follows them: what operators tell every proxy, and what it says back.
//!
//! A follower has one thread of its own, as a clerk has. What it knows never goes back to an older version, whoever it asks
//! and however often; with a file it goes on, after a restart of its process and with nobody to ask, where the process
//! before stopped: pauses last so much less as they are old by then.
//!
//! What a proxy has in the scope of each pause it puts into [`Follower::standing`]. The leader is told at once when a version
//! came into force or when something came to nothing, else now and then.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mandoline_core::flags::{Ages, Count, Flags, PauseId, Standing};
use mandoline_core::generation::Generation;
use mandoline_core::offers::Caller;
use mandoline_core::pauses::STANDING_EVERY;
use mandoline_core::task::{Address, AddressError};
use mandoline_distributor::connect::{Authorize, Connector};
use mandoline_distributor::follow::NobodyToAsk;
use mandoline_distributor::follow_flags::FlagsFollower;
use mandoline_distributor::hub::Hub;
use mandoline_proto::error::{WireError, need};
use mandoline_proto::flags::{millis, standing_message};
use mandoline_proto::pb;
use mandoline_proto::pb::proxies_client::ProxiesClient;
use mandoline_proto::pb::standing_reply::Reply;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tracing::{debug, warn};

use crate::cache;
use crate::clerk::spawn;
use crate::dialer::{Dialer, Next, drawn};

/// How soon the leader hears of a change that nobody waits for.
const TELL_AFTER: Duration = Duration::from_millis(500);
/// How long one who is asked may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a proxy that stops tries to say so.
const LEAVE_WITHIN: Duration = Duration::from_millis(500);

/// Follows the flags. They are told for as long as it lives.
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// let follower = mandoline::flags::Follower::builder()
///     .sources(["10.0.0.1:7400", "10.0.0.2:7400"])
///     .cache("/var/lib/proxy/flags")
///     .start()?;
/// let mut flags = follower.flags();
/// while flags.changed().await.is_ok() {
///     let newest = flags.borrow_and_update().clone();
///     println!("version {} has {} pauses", newest.version, newest.pauses.len());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Follower {
    flags: watch::Receiver<Arc<Flags>>,
    standing: watch::Sender<Standing>,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

/// Why a follower did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// What a source is given by is no address.
    #[error("the address of whom to ask")]
    Address(#[from] AddressError),
    /// There was no source.
    #[error(transparent)]
    NobodyToAsk(#[from] NobodyToAsk),
    /// The system gave no thread.
    #[error("the thread that follows the flags did not start")]
    Thread(#[from] io::Error),
}

/// Describes a follower.
#[derive(Debug, Default)]
pub struct Builder {
    sources: Vec<String>,
    connector: Connector,
    name: String,
    cache: Option<PathBuf>,
    hub: Option<Hub>,
    silent: bool,
}

impl Follower {
    /// Begins to describe a follower.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Gives the flags as they are known, with no pause before anybody was heard. They wake whoever waits for a change.
    pub fn flags(&self) -> watch::Receiver<Arc<Flags>> {
        self.flags.clone()
    }

    /// Gives where to put how the proxy stands, whenever that changes.
    pub fn standing(&self) -> watch::Sender<Standing> {
        self.standing.clone()
    }

    /// Says that the proxy has stopped, with nothing in flight, so that nobody waits for it. Blocks for half a second at most.
    pub fn leave(mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // It has said what there was to say, or could not.
            drop(thread.join());
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Builder {
    /// Asks these, each as good as the others: assigner nodes or distributors. Assigners among them are told how the proxy
    /// stands.
    #[must_use]
    pub fn sources(mut self, sources: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.sources.extend(sources.into_iter().map(|source| source.as_ref().to_owned()));
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

    /// Keeps the flags in this file and starts from it: for one process at a time.
    #[must_use]
    pub fn cache(mut self, path: impl Into<PathBuf>) -> Self {
        self.cache = Some(path.into());
        self
    }

    /// Tells a hub what comes, so that others can follow it.
    #[must_use]
    pub fn publish_to(mut self, hub: Hub) -> Self {
        self.hub = Some(hub);
        self
    }

    /// Tells nobody how it stands: for whoever holds no requests, such as a distributor.
    #[must_use]
    pub const fn silent(mut self) -> Self {
        self.silent = true;
        self
    }

    /// Starts the follower. It knows of no flags yet, or of those that the file held.
    pub fn start(mut self) -> Result<Follower, StartError> {
        let sources: Result<Vec<Address>, AddressError> =
            self.sources.iter().map(|source| source.parse()).collect();
        let sources = sources?;
        if sources.is_empty() {
            return Err(NobodyToAsk.into());
        }
        let kept = self.kept();
        let (mut memory, known) = Memory::new(kept, wall_millis());
        let (shown, flags) = watch::channel(known.clone().unwrap_or_default());
        let hub = self.hub;
        if let (Some(hub), Some(known)) = (&hub, &known) {
            hub.publish_flags(Arc::clone(known));
        }
        let (newest_told, newest) = watch::channel(Generation::ZERO);
        let follower = FlagsFollower {
            sources: sources.clone(),
            connector: self.connector.clone(),
            watcher: self.name,
            known: known.map(|flags| flags.version),
            newest,
        };
        let (saved, to_save) = watch::channel(None);
        let tell = move |flags: Arc<Flags>| {
            let aged = Arc::new(memory.take(flags, wall_millis()));
            if let Some(hub) = &hub {
                hub.publish_flags(Arc::clone(&aged));
            }
            shown.send_replace(aged);
            saved.send_replace(Some(memory.keep()));
        };
        let stop = CancellationToken::new();
        let (standing, told) = watch::channel(Standing::default());
        let number = drawn();
        let reporter = (!self.silent).then(|| Reporter {
            proxy: Caller(number),
            connector: self.connector,
            dialer: Dialer::new(sources, number),
            leader: None,
            newest: newest_told,
            refused: false,
        });
        let (following, saving, reporting) = (stop.clone(), stop.clone(), stop.clone());
        let cache = self.cache;
        let work = async move {
            let report = async {
                if let Some(reporter) = reporter {
                    reporter.run(told, reporting).await;
                }
            };
            let save = save(cache, to_save, saving);
            tokio::join!(follower.run(tell, following), save, report);
        };
        let thread = Some(spawn("mandoline-flags", work)?);
        Ok(Follower { flags, standing, stop, thread })
    }

    /// What the file holds. One that is not ours stays as it is, and nothing is saved then.
    fn kept(&mut self) -> Option<Kept> {
        let path = self.cache.as_deref()?;
        let loaded = cache::load_flags(path);
        let (error, replace): (Box<dyn std::error::Error>, bool) = match loaded {
            Ok(None) => return None,
            Ok(Some(kept)) => match Kept::try_from(kept) {
                Ok(kept) => return Some(kept),
                Err(error) => (error.into(), true),
            },
            Err(error) => {
                let replace = error.may_replace();
                (error.into(), replace)
            }
        };
        warn!(file = %path.display(), error, replace, "The kept flags were not used");
        if !replace {
            self.cache = None;
        }
        None
    }
}

/// Flags, and since when each pause was known, in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    flags: Arc<Flags>,
    since_ms: BTreeMap<PauseId, u64>,
}

impl From<&Kept> for pb::KeptFlags {
    fn from(kept: &Kept) -> Self {
        Self {
            flags: Some((&*kept.flags).into()),
            since_ms: kept.since_ms.iter().map(|(id, since)| (id.0, *since)).collect(),
        }
    }
}

impl TryFrom<pb::KeptFlags> for Kept {
    type Error = WireError;

    fn try_from(kept: pb::KeptFlags) -> Result<Self, WireError> {
        let flags = Flags::try_from(need(kept.flags, "flags")?)?;
        let since_ms = kept.since_ms.into_iter().map(|(id, since)| (PauseId(id), since)).collect();
        Ok(Self { flags: Arc::new(flags), since_ms })
    }
}

/// Since when pauses are known, over restarts of the process.
#[derive(Debug)]
struct Memory {
    /// As they came, and not as they are told here.
    kept: Kept,
    /// How old pauses were when the process began.
    ages: Ages,
}

impl Memory {
    /// Goes on from what was kept, and gives the flags as they are now.
    fn new(kept: Option<Kept>, now_ms: u64) -> (Self, Option<Arc<Flags>>) {
        let Some(kept) = kept else {
            let kept = Kept { flags: Arc::default(), since_ms: BTreeMap::new() };
            return (Self { kept, ages: Ages::default() }, None);
        };
        // A clock that went back makes nothing older.
        let age = |since: &u64| Duration::from_millis(now_ms.saturating_sub(*since));
        let ages = Ages(kept.since_ms.iter().map(|(id, since)| (*id, age(since))).collect());
        let flags = Arc::new(ages.apply_to(&kept.flags));
        (Self { kept, ages }, Some(flags))
    }

    /// Takes newer flags, and gives them as they are for this process.
    fn take(&mut self, flags: Arc<Flags>, now_ms: u64) -> Flags {
        let since = |id: &PauseId| self.kept.since_ms.get(id).copied().unwrap_or(now_ms);
        let since_ms = flags.pauses.keys().map(|id| (*id, since(id))).collect();
        self.ages.0.retain(|id, _| flags.pauses.contains_key(id));
        let aged = self.ages.apply_to(&flags);
        self.kept = Kept { flags, since_ms };
        aged
    }

    fn keep(&self) -> pb::KeptFlags {
        (&self.kept).into()
    }
}

fn wall_millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}

/// Saves what comes. Pauses are few and far between, so each is saved as it comes.
async fn save(
    path: Option<PathBuf>,
    mut to_save: watch::Receiver<Option<pb::KeptFlags>>,
    stop: CancellationToken,
) {
    let Some(path) = path else { return };
    let mut failing = false;
    loop {
        let goes_on = tokio::select! {
            biased;
            changed = to_save.changed() => changed.is_ok(),
            () = stop.cancelled() => false,
        };
        if !goes_on {
            return;
        }
        let Some(newest) = to_save.borrow_and_update().clone() else { continue };
        let to = path.clone();
        let saving = tokio::task::spawn_blocking(move || cache::save_flags(&to, &newest));
        let result = saving.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
        failing = complain(&path, result, failing);
    }
}

/// Says once that saving fails, until it goes well again.
fn complain(path: &Path, result: io::Result<()>, failing: bool) -> bool {
    let Err(error) = result else { return false };
    if !failing {
        warn!(file = %path.display(), %error, "The flags were not kept; the next ones will be tried");
    }
    true
}

/// Tells the leader how the proxy stands.
struct Reporter {
    proxy: Caller,
    connector: Connector,
    dialer: Dialer,
    /// Whoever heard the last word.
    leader: Option<(Address, Client)>,
    newest: watch::Sender<Generation>,
    /// Said once, until it goes well again.
    refused: bool,
}

type Client = ProxiesClient<InterceptedService<Channel, Authorize>>;

/// What became of a word.
enum Told {
    /// The leader has it, and wants the next by then.
    Heard(Duration),
    /// Nobody has.
    Nobody(Duration),
}

impl Reporter {
    /// Runs until told to stop, and says so as its last word.
    async fn run(mut self, mut standing: watch::Receiver<Standing>, stop: CancellationToken) {
        let mut told = Standing::default();
        let mut due = Instant::now();
        let mut spoke = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = sleep_until(due) => {}
                changed = standing.changed() => if changed.is_ok() {
                    let urgent = is_urgent(&told, &standing.borrow_and_update());
                    let soon = if urgent { Duration::ZERO } else { TELL_AFTER };
                    due = due.min(spoke + soon);
                    continue;
                } else {
                    stop.cancelled().await;
                    break;
                },
            }
            let now = standing.borrow_and_update().clone();
            let outcome = tokio::select! {
                () = stop.cancelled() => break,
                outcome = self.tell(Some(&now)) => outcome,
            };
            spoke = Instant::now();
            due = spoke
                + match outcome {
                    Told::Heard(every) => {
                        told = now;
                        every
                    }
                    Told::Nobody(pause) => pause,
                };
        }
        // If nobody hears it, it is taken for gone before long.
        drop(timeout(LEAVE_WITHIN, self.tell(None)).await);
    }

    /// Asks one after the other until the leader has heard.
    async fn tell(&mut self, standing: Option<&Standing>) -> Told {
        let message = standing_message(self.proxy, standing);
        loop {
            let (address, mut client) = match self.leader.take() {
                Some(leader) => leader,
                None => match self.dialer.next() {
                    Next::Dial(address) => match self.dial(address) {
                        Some(leader) => leader,
                        None => continue,
                    },
                    Next::Wait(pause) => return Told::Nobody(pause),
                },
            };
            let answered = timeout(PATIENCE, client.stand(message.clone())).await;
            match answered.map(|answered| answered.map(|reply| reply.into_inner().reply)) {
                Ok(Ok(Some(Reply::Heard(heard)))) => {
                    let every = Duration::from_millis(heard.every_ms);
                    let every = every.clamp(Duration::from_millis(100), STANDING_EVERY);
                    self.dialer.attached(every);
                    (self.leader, self.refused) = (Some((address, client)), false);
                    self.newest.send_replace(heard.version.map(Into::into).unwrap_or_default());
                    return Told::Heard(every);
                }
                Ok(Ok(Some(Reply::Redirect(redirect)))) => {
                    if let Ok(leader) = redirect.address.parse() {
                        self.dialer.redirected(leader);
                    }
                }
                Ok(Ok(None)) => {}
                Ok(Err(status)) => {
                    debug!(%address, %status, "Nobody hears of the flags here");
                    let hopeless = matches!(
                        status.code(),
                        tonic::Code::ResourceExhausted
                            | tonic::Code::InvalidArgument
                            | tonic::Code::Unauthenticated
                    );
                    if hopeless && !std::mem::replace(&mut self.refused, true) {
                        let problem = status.message();
                        warn!(%address, problem, "The leader does not hear how this proxy stands towards pauses");
                    }
                }
                Err(_) => debug!(%address, "No answer within {PATIENCE:?}"),
            }
        }
    }

    fn dial(&self, address: Address) -> Option<(Address, Client)> {
        let endpoint = self.connector.endpoint(&address).ok()?;
        let (channel, authorize) = (endpoint.connect_lazy(), self.connector.authorize());
        Some((address, ProxiesClient::with_interceptor(channel, authorize)))
    }
}

/// Whether somebody may wait for this: a version came into force, a pause came or went, or nothing is in flight any more, or
/// something is again.
fn is_urgent(told: &Standing, now: &Standing) -> bool {
    let is_quiet = |count: &Count| count.in_flight == 0;
    told.version != now.version
        || told.counts.len() != now.counts.len()
        || now.counts.iter().any(|(id, count)| {
            told.counts.get(id).is_none_or(|before| is_quiet(before) != is_quiet(count))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_core::flags::{AtEnd, Pause, PauseOrder, Phase, Scope};

    fn flags(number: u64, ids: &[u64]) -> Arc<Flags> {
        let pause = |id: &u64| {
            let order = PauseOrder {
                scope: Scope { path: Some("/".into()), ..Scope::default() },
                why: "".into(),
                lasts: Duration::from_secs(30),
                at_end: AtEnd::GoOn,
                release_over: Duration::ZERO,
            };
            let id = PauseId(*id);
            (id, Pause { id, order, phase: Phase::Holding })
        };
        let version = Generation { incarnation: 1, number };
        Arc::new(Flags { version, pauses: ids.iter().map(pause).collect() })
    }

    fn lasts(flags: &Flags) -> Vec<(u64, u64)> {
        flags.pauses.values().map(|pause| (pause.id.0, pause.order.lasts.as_secs())).collect()
    }

    #[test]
    fn pauses_go_on_over_restarts_and_do_not_begin_anew() {
        let (mut memory, known) = Memory::new(None, 1_000_000);
        assert_eq!(known, None);
        assert_eq!(lasts(&memory.take(flags(1, &[7]), 1_000_000)), [(7, 30)]);
        assert_eq!(lasts(&memory.take(flags(2, &[7, 8]), 1_010_000)), [(7, 30), (8, 30)]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flags");
        // A restart 15 seconds after the first pause came, and two more.
        let restarted = |now_ms, memory: &Memory| {
            cache::save_flags(&path, &memory.keep()).unwrap();
            let kept = Kept::try_from(cache::load_flags(&path).unwrap().unwrap()).unwrap();
            let (memory, known) = Memory::new(Some(kept), now_ms);
            (memory, lasts(&known.unwrap()))
        };
        let (mut memory, known) = restarted(1_015_000, &memory);
        assert_eq!(known, [(7, 15), (8, 25)]);
        // Newer flags do not make what is known last longer.
        let newer = memory.take(flags(3, &[7, 8, 9]), 1_020_000);
        assert_eq!(lasts(&newer), [(7, 15), (8, 25), (9, 30)]);
        let (mut memory, known) = restarted(1_030_000, &memory);
        assert_eq!(known, [(8, 10), (9, 20)], "the first has lasted");
        let newer = memory.take(flags(4, &[7, 9]), 1_031_000);
        assert_eq!(lasts(&newer), [(9, 20)], "and does not come back");
        let (_, known) = restarted(1, &memory);
        assert_eq!(known, [(7, 30), (9, 30)], "a clock that went back makes nothing older");
    }

    #[test]
    fn files_that_are_damaged_or_of_others_are_known_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flags");
        let (mut memory, _) = Memory::new(None, 1);
        memory.take(flags(1, &[7]), 1);
        cache::save_flags(&path, &memory.keep()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(cache::load_flags(&path).unwrap_err().may_replace(), "{len}");
        }
        std::fs::write(&path, "dear diary").unwrap();
        assert!(!cache::load_flags(&path).unwrap_err().may_replace());
        let start = || Follower::builder().sources(["127.0.0.1:1"]).cache(&path).start();
        assert_eq!(lasts(&start().unwrap().flags().borrow()), []);
        assert_eq!(std::fs::read(&path).unwrap(), b"dear diary");
    }

    #[test]
    fn the_leader_hears_at_once_of_what_somebody_may_wait_for() {
        let standing = |number, in_flight: &[u64]| Standing {
            version: Generation { incarnation: 1, number },
            counts: (1..)
                .zip(in_flight)
                .map(|(id, in_flight)| {
                    (PauseId(id), Count { in_flight: *in_flight, held: 3 + in_flight })
                })
                .collect(),
        };
        let told = standing(3, &[5, 0]);
        for (now, urgent) in [
            (standing(3, &[4, 0]), false),
            (standing(3, &[5, 0]), false),
            (standing(3, &[0, 0]), true),
            (standing(3, &[5, 1]), true),
            (standing(4, &[5, 0]), true),
            (standing(3, &[5]), true),
            (standing(3, &[5, 0, 9]), true),
        ] {
            assert_eq!(is_urgent(&told, &now), urgent, "{now:?}");
        }
    }

    #[test]
    fn a_follower_needs_somebody_to_ask() {
        let nobody = Follower::builder().start().unwrap_err();
        assert!(matches!(nobody, StartError::NobodyToAsk(_)));
        let odd = Follower::builder().sources(["nowhere"]).start().unwrap_err();
        assert!(matches!(odd, StartError::Address(_)));
    }
}

//! What to ask for next: the machine that keeps one job's assignment up to date from whoever knows it.
//!
//! It holds two lists: sources that are as good as each other (assigner nodes, distributors), of which it starts at a
//! random one so that watchers spread, and peers (slicelets, proxies), asked only when every source has failed and left
//! again for a source after a while, since a peer may be cut off without knowing.
//!
//! Three promises, whatever comes in and in whatever order: what is known never goes back, nothing that does not fit is
//! installed, and what is known is kept while nobody can be reached.
//!
//! The shell opens a stream for each `Action::Ask` and drops the one before; what an older stream still says is ignored.

use std::sync::Arc;
use std::time::Duration;

use crate::assignment::Assignment;
use crate::delta::Delta;
use crate::generation::Generation;
use crate::name::JobName;
use crate::prng::Prng;
use crate::time::Time;

/// The longest wait before the first try after a failure: a caller notices nothing of it.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest wait between tries: twenty thousand watchers then knock four thousand times a second, which a node bears.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How long a source may take to accept a stream.
pub const OPEN_PATIENCE: Duration = Duration::from_secs(5);
/// How long a source may take to send what was asked for in full: 256 MiB over a slow line.
pub const FULL_PATIENCE: Duration = Duration::from_secs(30);
/// How long to wait for a job that the source does not know before another one is asked, which may.
pub const UNKNOWN_PATIENCE: Duration = Duration::from_secs(2);
/// How long a source may lag behind a generation that was seen elsewhere before another one is asked.
pub const BEHIND_PATIENCE: Duration = Duration::from_millis(500);
/// The least time between two changes of source for that reason, so that a wrong word of a task costs little.
pub const BEHIND_EVERY: Duration = Duration::from_secs(1);
/// How long to stay with a peer before the sources are tried again.
pub const PEER_PATIENCE: Duration = Duration::from_secs(30);

/// Names a stream: each `Ask` has a greater one than the `Ask` before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A stream was accepted; what it says comes next.
    Opened(StreamId),
    /// A stream gave everything.
    Full(StreamId, Arc<Assignment>),
    /// A stream gave what changed.
    Delta(StreamId, Delta),
    /// A stream said that its source does not know the job; it will say more when it does.
    Unknown(StreamId),
    /// A stream could not be opened, broke, or said what makes no sense.
    Failed(StreamId, String),
    /// A generation was seen elsewhere, such as on a request that a task turned away.
    Seen(Generation),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Drop the stream before, and open one.
    Ask {
        /// Its name.
        stream: StreamId,
        /// Whom to ask: a place in the list of sources followed by peers.
        source: usize,
        /// What to say is known: a stream then begins with what changed since.
        known: Option<Generation>,
    },
    /// Drop the stream: it is of no use. An `Ask` follows after a pause.
    Close,
    /// Work with this from now on.
    Install {
        /// The assignment.
        assignment: Arc<Assignment>,
        /// The step that led to it from the one before, if it was one.
        delta: Option<Delta>,
    },
}

/// How well the watcher is placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is known yet.
    Empty {
        /// Since when.
        since: Time,
        /// What went wrong last.
        why: String,
    },
    /// A source is being heard, and what it said is known.
    Live {
        /// Since when.
        since: Time,
        /// Which source.
        source: usize,
    },
    /// Something is known, but no source is being heard: it may be old.
    Stale {
        /// Since when.
        since: Time,
        /// What went wrong last.
        why: String,
    },
}

/// Keeps one job's assignment up to date.
#[derive(Clone, Debug)]
pub struct Watcher {
    job: JobName,
    /// How many of the list are sources; the rest are peers.
    sources: usize,
    count: usize,
    prng: Prng,
    known: Option<Arc<Assignment>>,
    /// Whether what is known did not fit what came, so that everything must come anew.
    resync: bool,
    /// The last `Ask`.
    stream: StreamId,
    /// Whom the last `Ask` went to, or the next one will.
    source: usize,
    /// How many sources failed since one served, or since the peers were tried.
    sources_failed: usize,
    /// Tries since something new was installed or a stream lasted.
    failures: u32,
    /// No change of source before this because of what was seen elsewhere.
    behind_again: Time,
    phase: Phase,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// No stream; ask when the time has come.
    Waiting { until: Time },
    /// A stream was asked for and has not been accepted.
    Opening { since: Time },
    /// A stream is open.
    Open { since: Time, patience: Patience },
}

/// When to leave an open stream, unless something comes before; each for a reason of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Patience {
    /// The source owes everything.
    full: Option<Time>,
    /// The source does not know the job.
    unknown: Option<Time>,
    /// The source has not reached a generation that was seen elsewhere.
    behind: Option<(Time, Generation)>,
    /// The source is a peer.
    home: Option<Time>,
}

impl Patience {
    fn ends(&self) -> Option<(Time, &'static str)> {
        let ends = [
            self.full.map(|at| (at, "the source did not send what it was asked for")),
            self.unknown.map(|at| (at, "the source does not know the job")),
            self.behind.map(|(at, _)| (at, "the source is behind what was seen elsewhere")),
            self.home.map(|at| (at, "leaving a peer to try the sources again")),
        ];
        ends.into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}

impl Watcher {
    /// Begins to watch a job. `known` is what was known before, such as from a disk. There must be a source or a peer.
    ///
    /// The first `tick` asks.
    pub fn new(
        job: JobName,
        sources: usize,
        peers: usize,
        known: Option<Arc<Assignment>>,
        now: Time,
        mut prng: Prng,
    ) -> Self {
        assert!(sources + peers > 0, "there is someone to ask");
        let why = "nobody was asked yet".to_owned();
        let state = match known {
            Some(_) => State::Stale { since: now, why },
            None => State::Empty { since: now, why },
        };
        Self {
            job,
            sources,
            count: sources + peers,
            source: prng.below(if sources > 0 { sources } else { peers } as u64) as usize,
            prng,
            known,
            resync: false,
            stream: StreamId::default(),
            sources_failed: 0,
            failures: 0,
            behind_again: now,
            phase: Phase::Waiting { until: now },
            state,
        }
    }

    /// Gives what is known.
    pub fn known(&self) -> Option<&Arc<Assignment>> {
        self.known.as_ref()
    }

    /// Says how well the watcher is placed.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Seen(generation) => self.seen(now, generation),
            Event::Opened(stream) if self.hears(stream) => self.opened(now),
            Event::Full(stream, full) if self.hears(stream) => self.full(now, full, out),
            Event::Delta(stream, delta) if self.hears(stream) => self.delta(now, delta, out),
            Event::Unknown(stream) if self.hears(stream) => self.unknown(now),
            Event::Failed(stream, why) if self.hears(stream) => self.fail(now, why, out),
            // A stream that was given up.
            _ => {}
        }
    }

    /// Does what the time has come for. Early, late or twice: harmless.
    pub fn tick(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match &self.phase {
            Phase::Waiting { .. } => self.ask(now, out),
            Phase::Opening { .. } => self.fail(now, "the source did not answer".into(), out),
            Phase::Open { patience, .. } => {
                let why = patience.ends().map_or("", |(_, why)| why);
                self.fail(now, why.into(), out);
            }
        }
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Option<Time> {
        match &self.phase {
            Phase::Waiting { until } => Some(*until),
            Phase::Opening { since } => Some(*since + OPEN_PATIENCE),
            Phase::Open { patience, .. } => patience.ends().map(|(at, _)| at),
        }
    }

    fn hears(&self, stream: StreamId) -> bool {
        stream == self.stream && !matches!(self.phase, Phase::Waiting { .. })
    }

    fn generation(&self) -> Option<Generation> {
        self.known.as_ref().map(|known| known.generation)
    }

    fn is_peer(&self) -> bool {
        self.source >= self.sources
    }

    fn ask(&mut self, now: Time, out: &mut Vec<Action>) {
        self.stream.0 += 1;
        self.phase = Phase::Opening { since: now };
        let known = if self.resync { None } else { self.generation() };
        out.push(Action::Ask { stream: self.stream, source: self.source, known });
    }

    fn opened(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Opening { .. }) {
            return;
        }
        let owes = self.resync || self.known.is_none();
        let home = self.is_peer() && self.sources > 0;
        let patience = Patience {
            full: owes.then_some(now + FULL_PATIENCE),
            home: home.then(|| now + self.prng.jitter(PEER_PATIENCE)),
            ..Patience::default()
        };
        self.phase = Phase::Open { since: now, patience };
        if !owes {
            self.live(now);
        }
    }

    fn full(&mut self, now: Time, full: Arc<Assignment>, out: &mut Vec<Action>) {
        if full.job != self.job {
            let why = format!("the source told of job {} when asked for {}", full.job, self.job);
            return self.fail(now, why, out);
        }
        match self.generation() {
            Some(known) if full.generation < known => {
                let why = format!("the source is behind: it has {}, not {known}", full.generation);
                self.fail(now, why, out);
            }
            Some(known) if full.generation == known && !self.resync => self.settle(now),
            _ => self.install(now, full, None, out),
        }
    }

    fn delta(&mut self, now: Time, delta: Delta, out: &mut Vec<Action>) {
        let known = match &self.known {
            Some(known) if !self.resync => Arc::clone(known),
            _ => return self.fail(now, "a delta came before the full assignment".into(), out),
        };
        if delta.job == self.job && delta.to <= known.generation {
            return; // old news
        }
        match delta.apply_to(&known) {
            Ok(next) => self.install(now, Arc::new(next), Some(delta), out),
            Err(error) => {
                // The same source has the rest. Should what it sends then not do either, `fail` follows.
                self.resync = true;
                self.not_live(now, error.to_string());
                self.ask(now, out);
            }
        }
    }

    fn unknown(&mut self, now: Time) {
        self.opened(now);
        let others = self.count > 1;
        let until = others.then(|| now + self.prng.jitter(UNKNOWN_PATIENCE));
        if let Phase::Open { patience, .. } = &mut self.phase {
            *patience = Patience { unknown: until, ..Patience::default() };
        }
        self.not_live(now, format!("the source does not know job {}", self.job));
    }

    fn seen(&mut self, now: Time, generation: Generation) {
        let news = Some(generation) > self.generation();
        // With nobody else to ask, another stream would say the same.
        if !news || self.count == 1 || now < self.behind_again {
            return;
        }
        if let Phase::Open { patience, .. } = &mut self.phase
            && patience.behind.is_none()
        {
            patience.behind = Some((now + BEHIND_PATIENCE, generation));
            self.behind_again = now + BEHIND_EVERY;
        }
    }

    fn install(
        &mut self,
        now: Time,
        assignment: Arc<Assignment>,
        delta: Option<Delta>,
        out: &mut Vec<Action>,
    ) {
        self.known = Some(Arc::clone(&assignment));
        self.resync = false;
        self.failures = 0;
        self.sources_failed = 0;
        self.settle(now);
        out.push(Action::Install { assignment, delta });
    }

    /// What is known is what the source has.
    fn settle(&mut self, now: Time) {
        self.opened(now);
        let known = self.generation();
        if let Phase::Open { patience, .. } = &mut self.phase {
            patience.full = None;
            patience.unknown = None;
            patience.behind.take_if(|(_, seen)| Some(*seen) <= known);
        }
        self.live(now);
    }

    fn fail(&mut self, now: Time, why: String, out: &mut Vec<Action>) {
        // A stream that lasted was a good one: its end begins the count anew.
        if let Phase::Open { since, .. } = self.phase
            && now.since(since) >= BACKOFF_MAX
        {
            self.failures = 0;
        }
        let round = self.failures / self.count as u32;
        let pause = BACKOFF_FIRST.saturating_mul(1 << round.min(16)).min(BACKOFF_MAX);
        self.source = self.next_source();
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Waiting { until: now + self.prng.jitter(pause) };
        self.not_live(now, why);
        out.push(Action::Close);
    }

    /// All sources in turn, then all peers in turn, then the sources again; and back to the sources from a peer that served.
    fn next_source(&mut self) -> usize {
        if self.sources == 0 {
            return (self.source + 1) % self.count;
        }
        if self.is_peer() {
            let next = self.source + 1;
            let served = self.failures == 0;
            let on = next < self.count && !served;
            return if on { next } else { self.prng.below(self.sources as u64) as usize };
        }
        self.sources_failed += 1;
        if self.sources_failed < self.sources || self.count == self.sources {
            return (self.source + 1) % self.sources;
        }
        self.sources_failed = 0;
        self.sources
    }

    fn live(&mut self, now: Time) {
        let source = self.source;
        match self.state {
            State::Live { source: same, .. } if same == source => {}
            _ => self.state = State::Live { since: now, source },
        }
    }

    fn not_live(&mut self, now: Time, why: String) {
        self.state = match self.state {
            State::Live { .. } => State::Stale { since: now, why },
            State::Stale { since, .. } => State::Stale { since, why },
            State::Empty { since, .. } => State::Empty { since, why },
        };
    }
}

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
/// The least time between two changes of source for that reason, and after everyone was asked in vain: the word of a task
/// that saw what never was must cost little.
pub const BEHIND_EVERY: Duration = Duration::from_secs(1);
/// See `BEHIND_EVERY`.
pub const BEHIND_REST: Duration = Duration::from_secs(30);
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
    /// Whether that was so since a delta last fitted: a source may be asked anew once, not in a circle.
    resynced: bool,
    /// The last `Ask`.
    stream: StreamId,
    /// Whom the last `Ask` went to, or the next one will.
    source: usize,
    /// How many sources failed since one served, or since the peers were tried.
    sources_failed: usize,
    /// Tries since something new was installed or a stream lasted.
    failures: u32,
    /// What was seen elsewhere and is not known yet, and how many sources more to ask for it.
    wanted: Option<(Generation, usize)>,
    /// No change of source before this because of that.
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
    behind: Option<Time>,
    /// The source is a peer.
    home: Option<Time>,
}

impl Patience {
    fn ends(&self) -> Option<(Time, &'static str)> {
        let ends = [
            self.full.map(|at| (at, "the source did not send what it was asked for")),
            self.unknown.map(|at| (at, "the source does not know the job")),
            self.behind.map(|at| (at, "the source is behind what was seen elsewhere")),
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
            resynced: false,
            stream: StreamId::default(),
            sources_failed: 0,
            failures: 0,
            wanted: None,
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
        self.expect(now);
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
            Ok(next) => {
                self.resynced = false;
                self.install(now, Arc::new(next), Some(delta), out);
            }
            Err(error) => {
                self.resync = true;
                if std::mem::replace(&mut self.resynced, true) {
                    return self.fail(now, error.to_string(), out);
                }
                // The same source has the rest.
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
        let sought = self.wanted.map(|(sought, _)| sought);
        // With nobody else to ask, another stream would say the same.
        if self.count > 1 && Some(generation) > self.generation().max(sought) {
            self.wanted = Some((generation, self.count));
            self.expect(now);
            // Someone is there who tells of changes, so whoever is waited for may be back too. Once for each generation.
            if let Phase::Waiting { until } = &mut self.phase {
                self.failures = 0;
                *until = (*until).min(now + self.prng.jitter(BACKOFF_FIRST));
            }
        }
    }

    /// Expects the source to have what was seen elsewhere before long.
    fn expect(&mut self, now: Time) {
        if let Phase::Open { patience, .. } = &mut self.phase
            && self.wanted.is_some()
            && patience.behind.is_none()
        {
            let leave = (now + BEHIND_PATIENCE).max(self.behind_again);
            patience.behind = Some(leave);
            self.behind_again = leave + BEHIND_EVERY;
        }
    }

    /// A source did not have what was seen elsewhere.
    fn missed(&mut self, now: Time) {
        if let Phase::Open { patience: Patience { behind: Some(_), .. }, .. } = self.phase
            && let Some((_, left)) = &mut self.wanted
        {
            *left -= 1;
            if *left == 0 {
                self.wanted = None;
                self.behind_again = now + BEHIND_REST;
            }
        }
    }

    fn install(
        &mut self,
        now: Time,
        assignment: Arc<Assignment>,
        delta: Option<Delta>,
        out: &mut Vec<Action>,
    ) {
        if Some(assignment.generation) > self.generation() {
            self.failures = 0;
            self.sources_failed = 0;
        }
        self.known = Some(Arc::clone(&assignment));
        self.resync = false;
        self.settle(now);
        out.push(Action::Install { assignment, delta });
    }

    /// What is known is what the source has.
    fn settle(&mut self, now: Time) {
        self.opened(now);
        let known = self.generation();
        self.wanted.take_if(|(seen, _)| Some(*seen) <= known);
        if let Phase::Open { patience, .. } = &mut self.phase {
            patience.full = None;
            patience.unknown = None;
            if self.wanted.is_none() {
                patience.behind = None;
            }
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
        self.missed(now);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assignment::{Assigned, Replica};
    use crate::slice::Slice;
    use crate::task::SessionId;

    /// Plays a transcript: on each line what happens, then what the watcher does, then how it is placed.
    struct Play {
        now: Time,
        watcher: Watcher,
        stream: StreamId,
    }

    impl Play {
        fn new(sources: usize, peers: usize, known: Option<u64>, seed: u64) -> Self {
            let known = known.map(|number| Arc::new(assignment("kv", &format!("1.{number}"))));
            let (job, prng) = ("kv".parse().unwrap(), Prng::new(seed));
            let watcher = Watcher::new(job, sources, peers, known, Time::ZERO, prng);
            Self { now: Time::ZERO, watcher, stream: StreamId(0) }
        }

        fn step(&mut self, line: &str) -> String {
            let words: Vec<&str> = line.split_whitespace().collect();
            let mut out = Vec::new();
            let stream = self.stream;
            let event = match words[..] {
                // The next deadline comes; tick twice, which does no more than once.
                ["wait"] => {
                    self.now = self.now.max(self.watcher.deadline().expect("it waits for a time"));
                    self.watcher.tick(self.now, &mut out);
                    self.watcher.tick(self.now, &mut out);
                    None
                }
                ["pass", ms] => {
                    self.now += Duration::from_millis(ms.parse().unwrap());
                    self.watcher.tick(self.now, &mut out);
                    None
                }
                ["open"] => Some(Event::Opened(stream)),
                ["full", g] => Some(Event::Full(stream, Arc::new(assignment("kv", g)))),
                ["full", g, job] => Some(Event::Full(stream, Arc::new(assignment(job, g)))),
                ["delta", from, to] => Some(Event::Delta(stream, delta(from, to, vec![]))),
                ["broken-delta", from, to] => {
                    let replica = Replica { session: SessionId(9), since: Generation::ZERO };
                    let assigned = Assigned {
                        replicas: [replica].into_iter().collect(),
                        ..Default::default()
                    };
                    Some(Event::Delta(stream, delta(from, to, vec![(Slice::FULL, assigned)])))
                }
                ["unknown"] => Some(Event::Unknown(stream)),
                ["fail"] => Some(Event::Failed(stream, "it broke".into())),
                ["late", "full", g] => {
                    Some(Event::Full(StreamId(stream.0 - 1), Arc::new(assignment("kv", g))))
                }
                ["late", "fail"] => Some(Event::Failed(StreamId(stream.0 - 1), "old".into())),
                ["seen", g] => Some(Event::Seen(g.parse().unwrap())),
                _ => panic!("{line} is no step"),
            };
            if let Some(event) = event {
                self.watcher.handle(self.now, event, &mut out);
            }
            let mut text: Vec<String> = Vec::new();
            for action in out {
                text.push(match action {
                    Action::Ask { stream, source, known } => {
                        assert!(stream > self.stream, "each stream has a greater name");
                        self.stream = stream;
                        let known =
                            known.map_or_else(|| "nothing".into(), |known| known.to_string());
                        format!("ask {source} knowing {known}")
                    }
                    Action::Close => "close".into(),
                    Action::Install { assignment, delta } => {
                        assert_eq!(self.watcher.known(), Some(&assignment));
                        let how = if delta.is_some() { "by delta" } else { "in full" };
                        format!("install {} {how}", assignment.generation)
                    }
                });
            }
            let state = match self.watcher.state() {
                State::Empty { .. } => "empty",
                State::Live { .. } => "live",
                State::Stale { .. } => "stale",
            };
            format!("{} | {state}", if text.is_empty() { "-".into() } else { text.join(", ") })
        }
    }

    fn assignment(job: &str, generation: &str) -> Assignment {
        Assignment::new(job.parse().unwrap(), generation.parse().unwrap())
    }

    fn delta(from: &str, to: &str, slices: Vec<(Slice, Assigned)>) -> Delta {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        Delta { job: "kv".parse().unwrap(), from, to, tasks: vec![], slices, spill: None }
    }

    fn check(mut play: Play, transcript: &str) {
        for line in transcript.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (step, expected) = line.split_once('>').expect("a step > what follows");
            let found = play.step(step.trim());
            assert_eq!(found, expected.trim(), "after {step:?} in {transcript}");
        }
    }

    #[test]
    fn everything_comes_once_and_then_what_changes() {
        check(
            Play::new(1, 0, None, 1),
            "wait            > ask 0 knowing nothing | empty
             open            > - | empty
             full 1.5        > install 1.5 in full | live
             delta 1.5 1.6   > install 1.6 by delta | live
             delta 1.6 1.9   > install 1.9 by delta | live
             full 1.9        > - | live
             full 2.1        > install 2.1 in full | live",
        );
    }

    #[test]
    fn what_was_known_before_is_where_the_stream_begins() {
        check(
            Play::new(1, 0, Some(5), 1),
            "wait            > ask 0 knowing 1.5 | stale
             open            > - | live
             delta 1.5 1.6   > install 1.6 by delta | live",
        );
    }

    #[test]
    fn a_delta_that_does_not_fit_asks_for_everything_and_keeps_what_is_known() {
        check(
            Play::new(1, 0, Some(5), 1),
            "wait                  > ask 0 knowing 1.5 | stale
             open                  > - | live
             delta 1.7 1.8         > ask 0 knowing nothing | stale
             late full 1.9         > - | stale
             open                  > - | stale
             full 1.8              > install 1.8 in full | live
             delta 1.8 1.9         > install 1.9 by delta | live
             broken-delta 1.9 1.10 > ask 0 knowing nothing | stale
             open                  > - | stale
             full 1.9              > install 1.9 in full | live
             broken-delta 1.9 1.10 > close | stale
             wait                  > ask 0 knowing nothing | stale",
        );
    }

    #[test]
    fn a_source_that_owes_everything_and_sends_a_delta_is_left() {
        check(
            Play::new(2, 0, None, 1),
            "wait            > ask 1 knowing nothing | empty
             open            > - | empty
             delta 1.1 1.2   > close | empty
             wait            > ask 0 knowing nothing | empty
             open            > - | empty
             wait            > close | empty",
        );
    }

    #[test]
    fn nothing_goes_back() {
        check(
            Play::new(2, 0, Some(5), 1),
            "wait            > ask 1 knowing 1.5 | stale
             open            > - | live
             delta 1.3 1.4   > - | live
             delta 1.4 1.5   > - | live
             full 1.4        > close | stale
             late full 1.9   > - | stale
             wait            > ask 0 knowing 1.5 | stale
             full 0.900      > close | stale
             wait            > ask 1 knowing 1.5 | stale
             full 1.6 other  > close | stale
             wait            > ask 0 knowing 1.5 | stale
             full 1.6        > install 1.6 in full | live",
        );
    }

    #[test]
    fn each_source_is_tried_then_each_peer_then_the_sources_again() {
        check(
            Play::new(2, 2, Some(5), 1),
            "wait  > ask 1 knowing 1.5 | stale
             fail  > close | stale
             wait  > ask 0 knowing 1.5 | stale
             fail  > close | stale
             wait  > ask 2 knowing 1.5 | stale
             fail  > close | stale
             wait  > ask 3 knowing 1.5 | stale
             fail  > close | stale
             wait  > ask 0 knowing 1.5 | stale
             fail  > close | stale
             wait  > ask 1 knowing 1.5 | stale",
        );
    }

    #[test]
    fn a_peer_is_left_for_the_sources_after_a_while() {
        check(
            Play::new(1, 1, None, 1),
            "wait            > ask 0 knowing nothing | empty
             wait            > close | empty
             wait            > ask 1 knowing nothing | empty
             open            > - | empty
             full 1.5        > install 1.5 in full | live
             pass 10000      > - | live
             delta 1.5 1.6   > install 1.6 by delta | live
             pass 10000      > - | live
             wait            > close | stale
             wait            > ask 0 knowing 1.6 | stale
             fail            > close | stale
             wait            > ask 1 knowing 1.6 | stale
             open            > - | live",
        );
    }

    #[test]
    fn a_peer_that_fails_after_it_served_is_left_for_the_sources() {
        check(
            Play::new(2, 2, None, 1),
            "wait      > ask 1 knowing nothing | empty
             fail      > close | empty
             wait      > ask 0 knowing nothing | empty
             fail      > close | empty
             wait      > ask 2 knowing nothing | empty
             full 1.1  > install 1.1 in full | live
             fail      > close | stale
             wait      > ask 0 knowing 1.1 | stale",
        );
    }

    #[test]
    fn a_job_that_a_source_does_not_know_is_asked_for_elsewhere_in_turn() {
        check(
            Play::new(2, 0, None, 1),
            "wait      > ask 1 knowing nothing | empty
             open      > - | empty
             unknown   > - | empty
             wait      > close | empty
             wait      > ask 0 knowing nothing | empty
             unknown   > - | empty
             full 1.1  > install 1.1 in full | live
             pass 60000 > - | live
             unknown   > - | stale
             wait      > close | stale",
        );
        let mut alone = Play::new(1, 0, None, 1);
        for step in ["wait", "open", "unknown"] {
            alone.step(step);
        }
        assert_eq!(alone.watcher.deadline(), None, "with nobody else to ask it waits");
    }

    #[test]
    fn a_source_that_lags_behind_what_was_seen_is_left_and_each_is_asked_once() {
        check(
            Play::new(2, 0, Some(5), 1),
            "wait            > ask 1 knowing 1.5 | stale
             open            > - | live
             seen 1.5        > - | live
             pass 10000      > - | live
             seen 1.6        > - | live
             delta 1.5 1.6   > install 1.6 by delta | live
             pass 2000       > - | live
             seen 1.7        > - | live
             pass 499        > - | live
             pass 1          > close | stale
             wait            > ask 0 knowing 1.6 | stale
             open            > - | live
             full 1.7        > install 1.7 in full | live
             pass 60000      > - | live
             seen 9.9        > - | live
             pass 500        > close | stale
             wait            > ask 1 knowing 1.7 | stale
             open            > - | live
             seen 9.8        > - | live
             pass 800        > - | live
             wait            > close | stale
             wait            > ask 0 knowing 1.7 | stale
             open            > - | live
             seen 9.9        > - | live
             pass 29000      > - | live
             delta 1.7 1.8   > install 1.8 by delta | live
             pass 1000       > close | stale",
        );
        let mut alone = Play::new(1, 0, Some(5), 1);
        for step in ["wait", "open", "seen 9.9"] {
            alone.step(step);
        }
        assert_eq!(alone.watcher.deadline(), None, "another stream would say the same");
    }

    #[test]
    fn news_from_elsewhere_end_a_long_pause() {
        let mut play = Play::new(3, 0, Some(5), 1);
        for _ in 0..30 {
            play.step("wait");
            play.step("fail");
        }
        let pause = |play: &Play| play.watcher.deadline().expect("it tries again").since(play.now);
        assert!(pause(&play) >= BACKOFF_MAX / 2);
        play.step("seen 1.5");
        assert!(pause(&play) >= BACKOFF_MAX / 2, "this is known");
        play.step("seen 1.6");
        assert!(pause(&play) <= BACKOFF_FIRST * 2);
        for _ in 0..30 {
            play.step("wait");
            play.step("fail");
            play.step("seen 1.6");
        }
        assert!(pause(&play) >= BACKOFF_MAX / 2, "the same news twice are none");
    }

    #[test]
    fn pauses_begin_short_grow_and_differ() {
        let mut firsts = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let mut play = Play::new(1, 0, Some(1), seed);
            let mut pauses = Vec::new();
            for _ in 0..20 {
                play.step("wait");
                play.step("fail");
                let until = play.watcher.deadline().expect("it tries again");
                pauses.push(until.since(play.now));
            }
            firsts.insert(pauses[0]);
            assert!(pauses[0] <= Duration::from_millis(200), "{pauses:?}");
            assert!(pauses.iter().all(|pause| *pause <= BACKOFF_MAX), "{pauses:?}");
            assert!(pauses[10..].iter().all(|pause| *pause >= BACKOFF_MAX / 2), "{pauses:?}");
        }
        assert!(firsts.len() > 40, "watchers that failed together come back apart");
    }

    #[test]
    fn a_source_that_opens_and_fails_at_once_is_not_asked_without_pause() {
        let mut play = Play::new(1, 0, Some(1), 3);
        for _ in 0..20 {
            for step in ["wait", "open", "fail"] {
                play.step(step);
            }
        }
        let until = play.watcher.deadline().expect("it tries again");
        assert!(until.since(play.now) >= BACKOFF_MAX / 2);
    }

    #[test]
    fn whatever_comes_nothing_goes_back_and_someone_is_asked() {
        for seed in 0..300 {
            let mut prng = Prng::new(seed);
            let (sources, peers) = (prng.below(3) as usize, 1 + prng.below(2) as usize);
            let mut play = Play::new(sources, peers, None, seed);
            let mut known = None;
            for _ in 0..200 {
                let (a, b) = (prng.below(9), prng.below(9));
                let step = match prng.below(12) {
                    0 => "pass 700".to_owned(),
                    1 => "open".into(),
                    2 => format!("full {}.{a}", 1 + b / 7),
                    3 => format!("delta 1.{a} 1.{b}"),
                    4 => format!("delta 1.{a} 1.{}", a + 1),
                    5 => format!("broken-delta 1.{a} 1.{}", a + 1),
                    6 => "unknown".into(),
                    7 => "fail".into(),
                    8 => format!("seen 1.{a}"),
                    9 if play.stream > StreamId(0) => format!("late full 1.{a}"),
                    _ if play.watcher.deadline().is_some() => "wait".into(),
                    _ => "fail".into(),
                };
                play.step(&step);
                let now_known = play.watcher.generation();
                assert!(
                    now_known >= known,
                    "seed {seed}: {known:?} became {now_known:?} by {step}"
                );
                known = now_known;
                let waits = matches!(play.watcher.phase, Phase::Open { .. });
                assert!(
                    waits || play.watcher.deadline().is_some(),
                    "seed {seed}: stuck after {step}"
                );
            }
        }
    }
}

//! Keeps up with an upstream: drives a `Watcher` over real connections, and passes on what it installs.

use std::collections::hash_map::RandomState;
use std::error::Error;
use std::fmt::Write;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt, stream};
use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::prng::Prng;
use mandoline_core::task::Address;
use mandoline_core::watch::{Action, Event, State, StreamId, Watcher};
use mandoline_proto::pb;
use mandoline_proto::pb::assignments_client::AssignmentsClient;
use mandoline_proto::update::{Assembler, Update};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tracing::{debug, info};

use crate::clock::Clock;
use crate::connect::Connector;
use crate::hub::Hub;

/// Whom to ask.
#[derive(Clone, Debug, Default)]
pub struct Upstream {
    /// Assigner nodes or distributors, each as good as the others.
    pub sources: Vec<Address>,
    /// Slicelets or proxies, asked when no source answers.
    pub peers: Vec<Address>,
    /// How to reach them.
    pub connector: Connector,
    /// Who asks, for the logs of those who serve.
    pub watcher: String,
}

/// There was neither a source nor a peer to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is nobody to ask: give the address of at least one source or peer")]
pub struct NobodyToAsk;

/// What a follower has to tell.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// Work with this from now on.
    Install {
        /// The assignment.
        assignment: &'a Arc<Assignment>,
        /// The step that led to it from the one before, if it was one.
        delta: Option<&'a Delta>,
    },
    /// The follower is placed better or worse than before. Times are those of its clock.
    State(&'a State),
}

/// Keeps up with one job.
#[derive(Debug)]
pub struct Follower {
    watcher: Watcher,
    job: JobName,
    upstream: Upstream,
    clock: Clock,
    seen: watch::Receiver<Option<Generation>>,
}

impl Follower {
    /// Prepares to follow a job. `known` is what was known before; `seen` is where to put generations that were seen
    /// elsewhere, such as on a request that a task turned away, so that a source which lags is left.
    pub fn new(
        job: JobName,
        upstream: Upstream,
        known: Option<Arc<Assignment>>,
        seen: watch::Receiver<Option<Generation>>,
        clock: Clock,
    ) -> Result<Self, NobodyToAsk> {
        let (sources, peers) = (upstream.sources.len(), upstream.peers.len());
        if sources + peers == 0 {
            return Err(NobodyToAsk);
        }
        let prng = Prng::new(RandomState::new().hash_one(&job));
        let watcher = Watcher::new(job.clone(), sources, peers, known, clock.now(), prng);
        Ok(Self { watcher, job, upstream, clock, seen })
    }

    /// Follows until told to stop, and tells what is new.
    pub async fn run(mut self, mut tell: impl FnMut(News<'_>), stop: CancellationToken) {
        let mut out = Vec::new();
        let mut events: Events = Box::pin(stream::empty());
        let mut state = self.watcher.state().clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep_until(self.watcher.deadline()) => {
                    self.watcher.tick(self.clock.now(), &mut out);
                }
                Some(event) = events.next() => {
                    self.watcher.handle(self.clock.now(), event, &mut out);
                }
                Ok(()) = self.seen.changed() => {
                    if let Some(generation) = *self.seen.borrow_and_update() {
                        let event = Event::Seen(generation);
                        self.watcher.handle(self.clock.now(), event, &mut out);
                    }
                }
            }
            for action in out.drain(..) {
                match action {
                    Action::Ask { stream, source, known } => {
                        events = open(stream, &self.upstream, source, &self.job, known);
                    }
                    Action::Close => events = Box::pin(stream::empty()),
                    Action::Install { assignment, delta } => {
                        tell(News::Install { assignment: &assignment, delta: delta.as_ref() });
                    }
                }
            }
            if *self.watcher.state() != state {
                state = self.watcher.state().clone();
                self.log(&state);
                tell(News::State(&state));
            }
        }
    }

    fn log(&self, state: &State) {
        let job = &self.job;
        match state {
            State::Live { source, .. } => {
                let source = source_address(&self.upstream, *source);
                info!(%job, %source, "Watch is live");
            }
            State::Stale { why, .. } => info!(%job, error = why, "Watch is stale"),
            State::Empty { why, .. } => debug!(%job, error = why, "Watch knows nothing yet"),
        }
    }
}

/// Passes what a follower installs on to a hub: together they are a fan-out tier.
pub fn publish_to(hub: Hub) -> impl FnMut(News<'_>) {
    move |news| {
        if let News::Install { assignment, delta } = news {
            hub.publish(Arc::clone(assignment), delta);
        }
    }
}

/// Gives the address of a source by its place: sources first, then peers.
fn source_address(upstream: &Upstream, source: usize) -> &Address {
    let peers = source.saturating_sub(upstream.sources.len());
    upstream.sources.get(source).unwrap_or_else(|| &upstream.peers[peers])
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send>>;

/// What happens on a stream, from the connection on. It ends after a failure.
fn open(
    id: StreamId,
    upstream: &Upstream,
    source: usize,
    job: &JobName,
    known: Option<Generation>,
) -> Events {
    let address = source_address(upstream, source).clone();
    let connector = upstream.connector.clone();
    let request = pb::WatchRequest {
        job: job.to_string(),
        known: known.map(Into::into),
        watcher: upstream.watcher.clone(),
    };
    let opening = async move {
        let channel = connector
            .connect(&address)
            .await
            .map_err(|error| format!("{address} cannot be reached: {}", chain(&error)))?;
        let mut client = AssignmentsClient::with_interceptor(channel, connector.authorize());
        let messages = client.watch(request).await;
        match messages {
            Ok(messages) => Ok((messages.into_inner(), address)),
            Err(status) => Err(format!("{address} refused: {}", status.message())),
        }
    };
    let events = stream::once(opening).flat_map(move |opened| match opened {
        Ok((messages, address)) => stream::once(async move { Event::Opened(id) })
            .chain(listen(id, messages, address))
            .boxed(),
        Err(why) => stream::once(async move { Event::Failed(id, why) }).boxed(),
    });
    Box::pin(events)
}

fn listen(
    id: StreamId,
    messages: Streaming<pb::Update>,
    address: Address,
) -> impl Stream<Item = Event> + Send {
    let start = Some((messages, Assembler::default(), address));
    stream::unfold(start, move |state| async move {
        let (mut messages, mut assembler, address) = state?;
        let why = loop {
            let update = match messages.message().await {
                Ok(Some(update)) => assembler.take(update),
                Ok(None) => break format!("{address} ended the stream"),
                Err(status) => break format!("{address} broke off: {}", status.message()),
            };
            let event = match update {
                Ok(None) => continue,
                Ok(Some(Update::Full(full))) => Event::Full(id, Arc::new(full)),
                Ok(Some(Update::Delta(delta))) => Event::Delta(id, delta),
                Ok(Some(Update::Unknown(_))) => Event::Unknown(id),
                Err(error) => break format!("{address} sent what makes no sense: {error}"),
            };
            return Some((event, Some((messages, assembler, address))));
        };
        Some((Event::Failed(id, why), None))
    })
}

/// An error and what it stems from, in a line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}

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
                let was = std::mem::replace(&mut state, self.watcher.state().clone());
                self.log(&was, &state);
                tell(News::State(&state));
            }
        }
    }

    /// Says once that the line was lost or found; each try in vain only to those who look for it.
    fn log(&self, was: &State, is: &State) {
        let job = &self.job;
        match (was, is) {
            (_, State::Live { source, .. }) => {
                let source = source_address(&self.upstream, *source);
                info!(%job, %source, "Watch is live");
            }
            (State::Live { .. }, State::Stale { why, .. }) => {
                info!(%job, error = why, "Watch is stale");
            }
            (_, State::Stale { why, .. }) => debug!(%job, error = why, "Watch is still stale"),
            // Nothing works before the first assignment: a wrong address must not go unseen.
            (_, State::Empty { why, .. }) => info!(%job, error = why, "Watch knows nothing yet"),
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
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Node, Relay, advance, empty, generation, large, soon};
    use bytes::Bytes;
    use mandoline_proto::update::{encode_delta, encode_full};
    use std::time::Duration;
    use tokio::task::JoinHandle;

    /// A follower that publishes into a hub, and what became of it.
    struct Following {
        hub: Hub,
        states: watch::Receiver<State>,
        seen: watch::Sender<Option<Generation>>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Following {
        fn start(sources: &[&Node], peers: &[&Node], known: Option<Arc<Assignment>>) -> Self {
            let addresses = |nodes: &[&Node]| nodes.iter().map(|n| n.address.clone()).collect();
            let (sources, peers) = (addresses(sources), addresses(peers));
            Self::follow(Upstream { sources, peers, ..Upstream::default() }, known)
        }

        fn start_with(connector: Connector, sources: &[&Node]) -> Self {
            let sources = sources.iter().map(|node| node.address.clone()).collect();
            let upstream = Upstream { sources, connector, ..Upstream::default() };
            Self::follow(upstream, None)
        }

        fn follow(upstream: Upstream, known: Option<Arc<Assignment>>) -> Self {
            let (seen, sightings) = watch::channel(None);
            let clock = Clock::start();
            let job = "kv".parse().unwrap();
            let follower = Follower::new(job, upstream, known.clone(), sightings, clock).unwrap();
            let hub = Hub::new();
            if let Some(known) = known {
                hub.publish(known, None);
            }
            let (state, states) = watch::channel(follower.watcher.state().clone());
            let mut publish = publish_to(hub.clone());
            let tell = move |news: News<'_>| {
                publish(news);
                if let News::State(now) = news {
                    state.send_replace(now.clone());
                }
            };
            let stop = CancellationToken::new();
            let task = tokio::spawn(follower.run(tell, stop.clone()));
            Self { hub, states, seen, stop, task }
        }

        async fn reaches(&self, wanted: Generation) -> Arc<Assignment> {
            let mut changes = self.hub.watch_changes(&"kv".parse().unwrap());
            let reached = |known: &Option<Arc<Assignment>>| {
                known.as_ref().is_some_and(|known| known.generation >= wanted)
            };
            let what = format!("generation {wanted}");
            let known = soon(&what, changes.wait_for(reached)).await.unwrap().clone();
            known.unwrap()
        }

        async fn becomes(&mut self, what: &str, is: impl FnMut(&State) -> bool) -> State {
            soon(what, self.states.wait_for(is)).await.unwrap().clone()
        }

        async fn end(self) {
            self.stop.cancel();
            soon("the follower's end", self.task).await.unwrap();
        }
    }

    fn hub_at(number: u64) -> Hub {
        let hub = Hub::new();
        hub.publish(empty("kv", number), None);
        hub
    }

    fn is_live(state: &State) -> bool {
        matches!(state, State::Live { .. })
    }

    #[tokio::test]
    async fn a_follower_has_what_its_source_has() {
        let upstream = Hub::new();
        let node = Node::serve(&upstream);
        let following = Following::start(&[&node], &[], None);
        upstream.publish(large("kv", 1), None);
        for _ in 0..5 {
            advance(&upstream, "kv");
        }
        let newest = upstream.get(&"kv".parse().unwrap()).unwrap();
        assert_eq!(following.reaches(newest.generation).await, newest);
        following.end().await;
    }

    #[tokio::test]
    async fn a_follower_of_a_follower_has_it_too() {
        let upstream = hub_at(1);
        let node = Node::serve(&upstream);
        let first = Following::start(&[&node], &[], None);
        let tier = Node::serve(&first.hub);
        let second = Following::start(&[&tier], &[], None);
        second.reaches(generation(1)).await;
        let newest = advance(&upstream, "kv");
        assert_eq!(second.reaches(newest.generation).await, newest);
        first.end().await;
        second.end().await;
    }

    #[tokio::test]
    async fn when_a_source_dies_the_next_one_is_asked_from_where_it_stood() {
        let upstream = hub_at(1);
        let mut nodes = vec![Node::serve(&upstream), Node::serve(&upstream)];
        let mut following = Following::start(&[&nodes[0], &nodes[1]], &[], None);
        following.reaches(generation(1)).await;
        let State::Live { source, .. } = following.becomes("a live state", is_live).await else {
            panic!("it is live");
        };
        drop(nodes.remove(source));
        advance(&upstream, "kv");
        following.reaches(generation(2)).await;
        following
            .becomes(
                "the other source",
                |state| matches!(state, State::Live { source: now, .. } if *now != source),
            )
            .await;
        following.end().await;
    }

    #[tokio::test]
    async fn a_source_that_stops_politely_is_left_at_once() {
        let upstream = hub_at(1);
        let nodes = [Node::serve(&upstream), Node::serve(&upstream)];
        let mut following = Following::start(&[&nodes[0], &nodes[1]], &[], None);
        let State::Live { source, .. } = following.becomes("a live state", is_live).await else {
            panic!("it is live");
        };
        nodes[source].stop();
        advance(&upstream, "kv");
        following.reaches(generation(2)).await;
        following.end().await;
    }

    #[tokio::test]
    async fn with_every_source_gone_a_peer_tells_and_without_peers_what_is_known_stays() {
        let upstream = hub_at(1);
        let (source, peer) = (Node::serve(&upstream), Node::serve(&upstream));
        let mut following = Following::start(&[&source], &[&peer], None);
        following.reaches(generation(1)).await;
        drop(source);
        following.becomes("the peer", |state| matches!(state, State::Live { source: 1, .. })).await;
        advance(&upstream, "kv");
        following.reaches(generation(2)).await;
        drop(peer);
        let stale =
            following.becomes("a stale state", |state| matches!(state, State::Stale { .. })).await;
        let State::Stale { why, .. } = stale else { panic!("it is stale") };
        assert!(!why.is_empty());
        assert_eq!(following.reaches(generation(2)).await.generation, generation(2));
        following.end().await;
    }

    #[tokio::test]
    async fn a_source_that_is_behind_is_not_followed_back() {
        let (old, new) = (hub_at(1), hub_at(9));
        let behind = Node::liar(
            encode_full(&old.get(&"kv".parse().unwrap()).unwrap())
                .iter()
                .map(|m| grpc(m))
                .collect(),
        );
        let ahead = Node::serve(&new);
        let following = Following::start(&[&behind, &ahead], &[], Some(empty("kv", 5)));
        following.reaches(generation(9)).await;
        let known = following.hub.get(&"kv".parse().unwrap()).unwrap();
        assert_eq!(known.generation, generation(9));
        following.end().await;
    }

    #[tokio::test]
    async fn a_source_that_lags_behind_what_was_seen_is_left_for_another() {
        let (lagging, ahead) = (hub_at(5), hub_at(7));
        let nodes = [Node::serve(&lagging), Node::serve(&ahead)];
        let mut following = Following::start(&[&nodes[0]], &[&nodes[1]], None);
        following.becomes("a live state", is_live).await;
        following.seen.send_replace(Some(generation(7)));
        following.reaches(generation(7)).await;
        following.end().await;
    }

    /// Three nodes, each as far as it got; in each round one dies or comes back, and one at least has the newest.
    #[tokio::test]
    async fn through_deaths_and_lags_it_reaches_the_newest_and_never_goes_back() {
        let seed = RandomState::new().hash_one(0);
        println!("seed {seed}");
        let mut prng = Prng::new(seed);
        let hubs = [hub_at(1), hub_at(1), hub_at(1)];
        let mut nodes: Vec<Option<Node>> = hubs.iter().map(|hub| Some(Node::serve(hub))).collect();
        let addresses: Vec<Address> =
            nodes.iter().flatten().map(|node| node.address.clone()).collect();
        let upstream = Upstream { sources: addresses.clone(), ..Upstream::default() };
        let following = Following::follow(upstream, None);
        let mut changes = following.hub.watch_changes(&"kv".parse().unwrap());
        let mut newest = empty("kv", 1);
        let mut steps = Vec::new();
        for _ in 0..4 {
            let (next, delta) = crate::testing::step(&newest);
            steps.push((Arc::clone(&next), delta));
            newest = next;
            let ahead = prng.below(3) as usize;
            let victim = prng.below(3) as usize;
            nodes[victim] = match nodes[victim].take() {
                Some(_dies) if victim != ahead => None,
                Some(lives) => Some(lives),
                None => Some(Node::serve_at(&addresses[victim], &hubs[victim]).await),
            };
            if nodes[ahead].is_none() {
                nodes[ahead] = Some(Node::serve_at(&addresses[ahead], &hubs[ahead]).await);
            }
            for (step, delta) in &steps {
                hubs[ahead].publish(Arc::clone(step), Some(delta));
            }
            following.seen.send_replace(Some(newest.generation));
            assert_eq!(following.reaches(newest.generation).await, newest);
            let known = changes.borrow_and_update().clone().unwrap();
            assert_eq!(known, newest);
        }
        following.end().await;
    }

    fn grpc(message: &[u8]) -> Bytes {
        let mut frame = vec![0];
        frame.extend((message.len() as u32).to_be_bytes());
        frame.extend(message);
        frame.into()
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_left_for_a_source_that_does() {
        let good = hub_at(9);
        let full = grpc(&encode_full(&empty("kv", 8))[0]);
        let (_, gap) = crate::testing::step(&empty("kv", 3));
        let (_, next) = crate::testing::step(&empty("kv", 8));
        let mut torn = encode_full(&large("kv", 8));
        torn.truncate(1);
        let cases: [(&str, Vec<Bytes>); 7] = [
            ("bytes that are no message", vec![grpc(&[0xFF; 20])]),
            ("an empty update", vec![grpc(&[])]),
            ("a frame that claims 4 GiB", vec![Bytes::from_static(b"\0\xFF\xFF\xFF\xFFabc")]),
            ("another job", vec![grpc(&encode_full(&empty("other", 99))[0])]),
            ("a delta first", vec![grpc(&encode_delta(&next))]),
            (
                "a step that does not fit, twice",
                vec![
                    full,
                    grpc(&encode_delta(&gap)),
                    grpc(&encode_delta(&crate::testing::step(&empty("kv", 30)).1)),
                ],
            ),
            ("a delta between parts", vec![grpc(&torn[0]), grpc(&encode_delta(&next))]),
        ];
        for (what, frames) in cases {
            let (liar, honest) = (Node::liar(frames), Node::serve(&good));
            // The liar is asked first: the other one is a peer.
            let following = Following::start(&[&liar], &[&honest], None);
            let known = soon(what, following.reaches(generation(9))).await;
            assert_eq!(known.job.as_str(), "kv", "{what}");
            following.end().await;
        }
    }

    #[tokio::test]
    async fn a_source_that_falls_silent_is_noticed() {
        let upstream = hub_at(1);
        let node = Node::serve(&upstream);
        let relay = Relay::to(&node).await;
        let upstream = Upstream {
            sources: vec![relay.address.clone()],
            connector: Connector::default().with_keepalive(Duration::from_millis(100)),
            ..Upstream::default()
        };
        let mut following = Following::follow(upstream, None);
        following.reaches(generation(1)).await;
        following.becomes("a live state", is_live).await;
        relay.go_silent();
        let stale = |state: &State| matches!(state, State::Stale { .. });
        following.becomes("a stale state", stale).await;
        following.end().await;
    }

    #[tokio::test]
    async fn the_token_is_shown_with_each_watch() {
        let hub = hub_at(1);
        let node = Node::guarded(&hub, "sesame");
        let connector = Connector::default().with_token("sesame").unwrap();
        assert!(!format!("{connector:?}").contains("sesame"));
        let welcome = Following::start_with(connector, &[&node]);
        welcome.reaches(generation(1)).await;
        welcome.end().await;
        let wrong = Connector::default().with_token("barley").unwrap();
        for connector in [wrong, Connector::default()] {
            let mut stranger = Following::start_with(connector, &[&node]);
            let said = "refused: the token is not this cluster's";
            let refused =
                |state: &State| matches!(state, State::Empty { why, .. } if why.contains(said));
            stranger.becomes("a refusal", refused).await;
            stranger.end().await;
        }
        assert!(Connector::default().with_token("new\nline").is_err());
    }

    #[tokio::test]
    async fn with_nobody_to_ask_it_says_so() {
        let (_, seen) = watch::channel(None);
        let upstream = Upstream::default();
        let refused = Follower::new("kv".parse().unwrap(), upstream, None, seen, Clock::start());
        assert_eq!(refused.unwrap_err(), NobodyToAsk);
    }
}

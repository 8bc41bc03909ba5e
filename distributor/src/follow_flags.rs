//! Keeps up with the flags: one upstream after the other, and never back to older ones.
//!
//! There is no state machine here as there is for assignments: the flags come whole, so that a gap, a reconnect or a message
//! that came twice cannot do harm. What is not newer than what is known is passed over; whoever has told nothing newer for a
//! while, though the leader is known to have it, is left.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::flags::Flags;
use mandoline_core::generation::Generation;
use mandoline_core::prng::Prng;
use mandoline_core::task::Address;
use mandoline_proto::pb;
use mandoline_proto::pb::flags_watch_client::FlagsWatchClient;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::connect::Connector;
use crate::follow::chain;

/// How long a source may take to tell the flags that it has: a distributor that has not heard of them says nothing.
const FIRST_WITHIN: Duration = Duration::from_secs(5);
/// How long a source may lag behind what the leader is known to have.
const LAG_WITHIN: Duration = Duration::from_secs(2);
/// Between two rounds in which nobody told anything: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Keeps up with the flags.
#[derive(Debug)]
pub struct FlagsFollower {
    /// Assigner nodes or distributors, each as good as the others.
    pub sources: Vec<Address>,
    /// How to reach them.
    pub connector: Connector,
    /// Who asks, for the logs of those who serve.
    pub watcher: String,
    /// The version that is known from before.
    pub known: Option<Generation>,
    /// The version that the leader is known to have, if anybody asks it.
    pub newest: watch::Receiver<Generation>,
}

impl FlagsFollower {
    /// Follows until told to stop, and tells what is newer than what was known before.
    pub async fn run(mut self, mut tell: impl FnMut(Arc<Flags>), stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.follow(&mut tell) => {}
        }
    }

    async fn follow(&mut self, tell: &mut impl FnMut(Arc<Flags>)) {
        let mut prng = Prng::new(RandomState::new().hash_one(&self.watcher));
        // Watchers that have the same list do not all ask the first.
        let mut at = prng.below(self.sources.len().max(1) as u64) as usize;
        let mut pause = PAUSES.0;
        loop {
            let mut heard = false;
            for _ in 0..self.sources.len() {
                let source = self.sources[at].clone();
                let why = self.listen(&source, tell, &mut heard).await;
                debug!(%source, error = why, "The flags are not told here any more");
                at = (at + 1) % self.sources.len();
                if heard {
                    break;
                }
            }
            pause = if heard { PAUSES.0 } else { (2 * pause).min(PAUSES.1) };
            sleep(prng.jitter(pause)).await;
        }
    }

    /// Listens to one source for as long as it tells, and says why it was left.
    async fn listen(
        &mut self,
        source: &Address,
        tell: &mut impl FnMut(Arc<Flags>),
        heard: &mut bool,
    ) -> String {
        let channel = match self.connector.connect(source).await {
            Ok(channel) => channel,
            Err(error) => return chain(&error),
        };
        let mut client = FlagsWatchClient::with_interceptor(channel, self.connector.authorize());
        let request = pb::WatchFlagsRequest { watcher: self.watcher.clone() };
        let mut messages = match timeout(FIRST_WITHIN, client.watch(request)).await {
            Ok(Ok(messages)) => messages.into_inner(),
            Ok(Err(status)) => return status.message().to_owned(),
            Err(_) => return format!("no answer within {FIRST_WITHIN:?}"),
        };
        let mut first = true;
        loop {
            let message = tokio::select! {
                message = messages.message() => message,
                () = sleep(FIRST_WITHIN), if first => {
                    return format!("it told no flags within {FIRST_WITHIN:?}");
                }
                () = lags(&mut self.newest, self.known) => {
                    info!(%source, "The flags are older here than the leader's: asking elsewhere");
                    return "it lags behind the leader".to_owned();
                }
            };
            let flags = match message {
                Ok(Some(flags)) => Flags::try_from(flags),
                Ok(None) => return "it ended the stream".to_owned(),
                Err(status) => return status.message().to_owned(),
            };
            match flags {
                Ok(flags) => {
                    (first, *heard) = (false, true);
                    if self.known.is_none_or(|known| known < flags.version) {
                        self.known = Some(flags.version);
                        tell(Arc::new(flags));
                    }
                }
                Err(error) => return format!("it sent what makes no sense: {error}"),
            }
        }
    }
}

/// Waits until the leader has had newer flags for a while. Where nobody asks the leader any more, for ever.
async fn lags(newest: &mut watch::Receiver<Generation>, known: Option<Generation>) {
    if newest.wait_for(|newest| known.is_none_or(|known| known < *newest)).await.is_err() {
        std::future::pending::<()>().await;
    }
    sleep(LAG_WITHIN).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::Hub;
    use crate::testing::{Node, generation, soon};
    use mandoline_core::flags::{AtEnd, Pause, PauseId, PauseOrder, Phase, Scope};

    /// Flags of this version, with pauses of these ids.
    fn flags(number: u64, ids: &[u64]) -> Arc<Flags> {
        let order = PauseOrder {
            scope: Scope { path: Some("/".into()), ..Scope::default() },
            why: "".into(),
            lasts: Duration::from_secs(30),
            at_end: AtEnd::GoOn,
            release_over: Duration::ZERO,
        };
        let pause = |id: &u64| {
            let (id, order) = (PauseId(*id), order.clone());
            (id, Pause { id, order, phase: Phase::Holding })
        };
        let pauses = ids.iter().map(pause).collect();
        Arc::new(Flags { version: generation(number), pauses })
    }

    struct Following {
        hub: Hub,
        flags: watch::Receiver<Option<Arc<Flags>>>,
        leader: watch::Sender<Generation>,
        told: watch::Receiver<u64>,
        _stop: tokio_util::sync::DropGuard,
    }

    impl Following {
        fn start(nodes: &[&Node], known: Option<Arc<Flags>>) -> Self {
            let (leader, newest) = watch::channel(Generation::ZERO);
            let (newer, flags) = watch::channel(known.clone());
            let (count, told) = watch::channel(0);
            let follower = FlagsFollower {
                sources: nodes.iter().map(|node| node.address.clone()).collect(),
                connector: Connector::default(),
                watcher: "test".to_owned(),
                known: known.map(|flags| flags.version),
                newest,
            };
            let hub = Hub::new();
            let publish = hub.clone();
            let tell = move |flags: Arc<Flags>| {
                publish.publish_flags(Arc::clone(&flags));
                newer.send_replace(Some(flags));
                count.send_modify(|count| *count += 1);
            };
            let stop = CancellationToken::new();
            tokio::spawn(follower.run(tell, stop.clone()));
            Self { hub, flags, leader, told, _stop: stop.drop_guard() }
        }

        async fn reaches(&mut self, wanted: &Arc<Flags>) {
            let version = wanted.version;
            let there = |known: &Option<Arc<Flags>>| {
                known.as_ref().is_some_and(|known| known.version >= version)
            };
            let what = format!("flags {version}");
            let found = soon(&what, self.flags.wait_for(there)).await.unwrap().clone();
            assert_eq!(found.as_ref(), Some(wanted));
        }
    }

    #[tokio::test]
    async fn who_comes_late_gets_all_flags_and_then_what_changes() {
        let hub = Hub::new();
        let node = Node::serve(&hub);
        let mut early = Following::start(&[&node], None);
        hub.publish_flags(flags(1, &[7]));
        early.reaches(&flags(1, &[7])).await;
        let mut late = Following::start(&[&node], None);
        late.reaches(&flags(1, &[7])).await;
        hub.publish_flags(flags(2, &[7, 8]));
        hub.publish_flags(flags(1, &[7]));
        assert_eq!(hub.flags(), Some(flags(2, &[7, 8])), "an older one is none");
        for following in [&mut early, &mut late] {
            following.reaches(&flags(2, &[7, 8])).await;
        }
        assert_eq!(hub.watchers(), 2);
    }

    #[tokio::test]
    async fn a_follower_passes_them_on() {
        let hub = Hub::new();
        hub.publish_flags(flags(1, &[7]));
        let node = Node::serve(&hub);
        let tier = Following::start(&[&node], None);
        let between = Node::serve(&tier.hub);
        let mut last = Following::start(&[&between], None);
        last.reaches(&flags(1, &[7])).await;
        hub.publish_flags(flags(2, &[]));
        last.reaches(&flags(2, &[])).await;
    }

    #[tokio::test]
    async fn a_source_that_dies_or_is_behind_brings_no_ended_pause_back() {
        let (ahead, behind) = (Hub::new(), Hub::new());
        ahead.publish_flags(flags(2, &[]));
        behind.publish_flags(flags(1, &[7]));
        let (first, second) = (Node::serve(&ahead), Node::serve(&behind));
        // Whichever it asks first, the version that it has does not go back.
        let mut following = Following::start(&[&first], Some(flags(1, &[7])));
        following.reaches(&flags(2, &[])).await;
        let known = following.flags.borrow().clone();
        let mut lagging = Following::start(&[&second], known);
        behind.publish_flags(flags(3, &[9]));
        lagging.reaches(&flags(3, &[9])).await;
        assert_eq!(*lagging.told.borrow_and_update(), 1, "the older ones were not told");
    }

    #[tokio::test]
    async fn a_source_that_lags_behind_the_leader_is_left() {
        let (lagging, current) = (Hub::new(), Hub::new());
        lagging.publish_flags(flags(1, &[]));
        let first = Node::serve(&lagging);
        let mut following = Following::start(&[&first], None);
        following.reaches(&flags(1, &[])).await;
        // The same place is asked again, and tells what it has by then.
        following.leader.send_replace(generation(2));
        soon("the lagging source to be left", async {
            while lagging.watchers() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        current.publish_flags(flags(2, &[7]));
        lagging.publish_flags(flags(2, &[7]));
        following.reaches(&flags(2, &[7])).await;
    }
}

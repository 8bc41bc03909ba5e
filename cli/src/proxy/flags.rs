//! The flags that a proxy follows, and what it says back of how it stands.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mandoline::Hub;
use mandoline::flags::Follower;
use mandoline_assigner::access::connector;
use mandoline_assigner::config::Access;
use mandoline_core::flags::Flags;
use mandoline_core::generation::Generation;
use mandoline_core::task::Address;
use mandoline_proxy::pauses::Pauses;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use crate::failure::Failure;

/// What a follower is told when it starts: one with the same order is the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FlagsOrder {
    pub(crate) assigners: Vec<Address>,
    pub(crate) cache: Option<PathBuf>,
    /// Who asks, for the logs of those who serve.
    pub(crate) name: String,
}

/// A follower of the flags, and what tells it how the proxy stands.
pub(crate) struct Following {
    order: FlagsOrder,
    follower: Follower,
    // Ends with what it tells.
    telling: Mutex<JoinSet<()>>,
}

impl Following {
    /// Begins to follow.
    pub(crate) fn start(
        order: FlagsOrder,
        access: &Access,
        hub: Option<&Hub>,
    ) -> Result<Self, Failure> {
        let mut builder = Follower::builder()
            .sources(&order.assigners)
            .connector(connector(access))
            .named(order.name.as_str());
        if let Some(path) = &order.cache {
            builder = builder.cache(path);
        }
        if let Some(hub) = hub {
            builder = builder.publish_to(hub.clone());
        }
        let follower = builder
            .start()
            .map_err(|error| Failure::new("the flags cannot be followed").caused_by(&error))?;
        Ok(Self { order, follower, telling: Mutex::default() })
    }

    /// Says whether it follows as it is asked to.
    pub(crate) fn suits(&self, order: &FlagsOrder) -> bool {
        self.order == *order
    }

    pub(crate) fn flags(&self) -> watch::Receiver<Arc<Flags>> {
        self.follower.flags()
    }

    /// Waits until the flags are known, or nobody has told them for a while: a proxy that knew of no pause would let pass what others
    /// hold.
    pub(crate) async fn heard(&self) {
        let mut flags = self.follower.flags();
        if flags.borrow().version == Generation::ZERO {
            // With nobody to ask it begins without, as it would go on without.
            let _: Result<_, Elapsed> = timeout(HEARD_WITHIN, flags.changed()).await;
        }
    }

    /// Says back how a proxy stands, from now on.
    pub(crate) fn tell_of(&self, pauses: Pauses) {
        let mut telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        telling.spawn(pauses.tell(self.follower.standing()));
    }

    /// Says that the proxy has stopped, so that nobody waits for it.
    pub(crate) async fn leave(self) {
        let Self { follower, telling, .. } = self;
        drop(telling);
        // It blocks for half a second at most. If it cannot be said the leader finds out by the silence.
        drop(tokio::task::spawn_blocking(|| follower.leave()).await);
    }
}

/// How long a proxy that starts waits to hear the flags. They come with the first answer of whoever is asked, in milliseconds.
const HEARD_WITHIN: Duration = Duration::from_secs(1);

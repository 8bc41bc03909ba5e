//! One node's parts, as the service and the tasks beside it share them; and the moment when it becomes someone.
//!
//! A node that starts for the first time has to serve before it can be anyone: the others must be able to ask who it is.
//! So the service is there from the start, and Raft itself begins once the node has an identity on disk.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::NodeId;
use openraft::Config as RaftConfig;
use tokio::sync::{Mutex, SetOnce};

use crate::raft::config::FirstStart;
use crate::raft::disk::Change;
use crate::raft::log::Log;
use crate::raft::machine::{Machine, Shown};
use crate::raft::network::Network;
use crate::raft::peer::{Dialer, Known, Refusal};
use crate::raft::record::{self, Kind};
use crate::raft::types::{Member, Types};
use crate::raft::wire::{self, Identity};
use crate::raft::writer::Writer;

pub(crate) type Raft = openraft::Raft<Types, Machine>;

/// One node's parts.
pub(crate) struct Node {
    pub(crate) member: Member,
    pub(crate) first: FirstStart,
    pub(crate) known: Known,
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) shown: Shown,
    pub(crate) writer: Writer,
    /// Set once the node is someone.
    pub(crate) raft: SetOnce<Raft>,
    /// What Raft will be made of; also the lock under which an identity is taken.
    unborn: Mutex<Option<Unborn>>,
}

/// What Raft is made of.
pub(crate) struct Unborn {
    pub(crate) config: Arc<RaftConfig>,
    pub(crate) log: Log,
    pub(crate) machine: Machine,
}

/// Why a node could not become who it was to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BirthError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("cannot write down who this node is: {0}")]
    Disk(#[from] io::Error),
    #[error("Raft does not start: {0}")]
    Raft(String),
}

impl Node {
    pub(crate) fn new(
        member: Member,
        first: FirstStart,
        dialer: Arc<Dialer>,
        known: Known,
        shown: Shown,
        writer: Writer,
        unborn: Unborn,
    ) -> Self {
        Self {
            member,
            first,
            known,
            dialer,
            shown,
            writer,
            raft: SetOnce::new(),
            unborn: Mutex::new(Some(unborn)),
        }
    }

    /// Makes the node who it is to be: on disk first, then to others, then Raft begins.
    ///
    /// A node that has pledged itself to a cluster which never came to be may pledge anew, under the same id; one that
    /// has a log never changes.
    pub(crate) async fn become_one(&self, identity: Identity) -> Result<(), BirthError> {
        let mut unborn = self.unborn.lock().await;
        let before = self.known.get();
        if before.as_deref() != Some(&identity) {
            if let Some(before) = before {
                if before.node != identity.node {
                    let text = format!(
                        "this node is {} already, and cannot become {}",
                        before.node, identity.node
                    );
                    return Err(Refusal::Pledge(text).into());
                }
                if self.founded().await {
                    let text =
                        format!("this node is a member of cluster {} already", before.cluster);
                    return Err(Refusal::Pledge(text).into());
                }
            }
            let record = record::seal(Kind::Identity, 0, &wire::pb_identity(&identity));
            self.writer.written(Change::Identity(record)).await?;
            self.known.set(identity.clone());
        }
        if let Some(Unborn { config, log, machine }) = unborn.take() {
            let network = Network::new(identity.node, self.dialer.clone());
            let raft = Raft::new(identity.node.0, config, network, log, machine).await;
            let raft = raft.map_err(|fatal| BirthError::Raft(fatal.to_string()))?;
            self.raft.set(raft).map_err(|_| BirthError::Raft("it runs already".to_owned()))?;
        }
        Ok(())
    }

    /// Says whether the node has a log: its cluster was founded.
    pub(crate) async fn founded(&self) -> bool {
        match self.raft.get() {
            Some(raft) => raft.is_initialized().await.unwrap_or(false),
            None => false,
        }
    }

    /// Gives this node's id, once it has one.
    pub(crate) fn id(&self) -> Option<NodeId> {
        self.known.get().map(|identity| identity.node)
    }
}

/// Waits until a member has the log up to `index` on disk; false if it has not in time, or this node ceases to lead.
///
/// Openraft's own waiting is of no use for that: it lets a learner pass that lags by less than thousands of entries, in a
/// young cluster even one that is not there.
pub(crate) async fn caught_up(raft: &Raft, node: u64, index: u64, within: Duration) -> bool {
    let wait = raft.wait(Some(within));
    let waited = wait.metrics(
        |now| match &now.replication {
            None => true,
            Some(known) => {
                let matched = known.get(&node).copied().flatten();
                matched.is_some_and(|matched| matched.index >= index)
            }
        },
        "a learner to catch up",
    );
    node == *raft.node_id() || waited.await.is_ok_and(|now| now.replication.is_some())
}

//! How a node comes to be a member: founds a cluster, alone or with others, or joins one; and how a node whose disk is
//! gone is found out.
//!
//! **Together.** The first in the list of peers asks all others who they are. If none has a log, it draws the cluster's id,
//! writes down who it is, and has each of the others do the same and sync it (`Pledge`); only then does it begin the log.
//! So from the first entry on every founder has its identity on disk, and a founder with an empty disk whose peers have a
//! log is not late: its disk is gone. It must not come back under its id, for it may have voted and acknowledged what it
//! no longer knows. A founder that dies half-way goes on where it was, since its own identity was written first.
//!
//! **Join.** A new node asks for an id, which `State::apply` mints and never gives twice, writes it down, and asks to be
//! admitted: the leader feeds it as a learner, and lets it vote once it has caught up.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::{ClusterId, NodeId};
use mandoline_proto::command::cluster_id;
use mandoline_proto::pb;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{InitializeError, RaftError};
use tonic::Status;

use crate::raft::config::FirstStart;
use crate::raft::disk::DiskError;
use crate::raft::node::{BirthError, Node, Raft};
use crate::raft::peer::{self, FOREIGN, PLEDGE, REMOVED};
use crate::raft::types::Member;
use crate::raft::wire::{self, Identity};

/// Between two rounds of questions to peers that are not up yet.
const ROUND: Duration = Duration::from_millis(100);
/// How long a peer may take to answer a question.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long the leader may take to let a new node catch up.
const ADMISSION_WITHIN: Duration = Duration::from_secs(70);

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its file cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The options make no sense.
    #[error("the options make no sense: {0}")]
    Config(String),
    /// There is nothing on disk, and nobody said what to do.
    #[error(
        "there is nothing on disk yet: found a cluster (`--init`, or the same `--peers` for each node), or join one \
         (`--join ADDRESS`)"
    )]
    Empty,
    /// The node is not in its own list of peers.
    #[error(
        "{peer} is not among the peers {list}: the list must name every node, this one too, by its peer address"
    )]
    NotListed {
        /// Its peer address.
        peer: String,
        /// The list.
        list: String,
    },
    /// The node has nothing on disk, but its cluster knows it.
    #[error(
        "{node} of cluster {cluster} has nothing on disk: its disk is gone, or this is the wrong directory. An id is \
         never used twice, for the node may have promised what it no longer knows. Start it as a new one with \
         `mandoline assigner --join {peer}`, then remove the old one: `mandoline cluster remove {node}`"
    )]
    DiskGone {
        /// Who it was.
        node: NodeId,
        /// In which cluster.
        cluster: ClusterId,
        /// A member's peer address.
        peer: String,
    },
    /// A peer cannot be a member of the cluster that this node was to found.
    #[error("peer {peer} refuses: {problem}")]
    Refused {
        /// Its peer address.
        peer: String,
        /// What it says.
        problem: String,
    },
    /// The node was taken out of its cluster, and has come back with what it had.
    #[error(
        "{node} was removed from the cluster for good, as {peer} says: empty its data directory and it joins as a new \
         node, by `mandoline assigner --join {peer}`"
    )]
    Removed {
        /// Who it was.
        node: NodeId,
        /// Who says so, by its peer address.
        peer: String,
    },
    /// The system gave no thread, or the identity could not be written.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
    /// Raft did not start.
    #[error("cannot start: {0}")]
    Raft(String),
}

impl From<BirthError> for StartError {
    fn from(error: BirthError) -> Self {
        match error {
            BirthError::Refused(refusal) => Self::Config(refusal.to_string()),
            BirthError::Disk(error) => Self::Io(error),
            BirthError::Raft(error) => Self::Raft(error),
        }
    }
}

/// Looks through the options and gives the place in the list of peers, for a node that founds a cluster with others.
pub(crate) fn place(first: &FirstStart, member: &Member) -> Result<Option<usize>, StartError> {
    let FirstStart::Together(list) = first else {
        return Ok(None);
    };
    let joined = || list.iter().map(|member| member.peer.as_str()).collect::<Vec<_>>().join(",");
    let mut places = list.iter().enumerate().filter(|(_, other)| other.peer == member.peer);
    let Some((place, _)) = places.next() else {
        return Err(StartError::NotListed { peer: member.peer.clone(), list: joined() });
    };
    let distinct: std::collections::BTreeSet<_> = list.iter().map(|member| &member.peer).collect();
    if distinct.len() < list.len() {
        return Err(StartError::Config(format!("the peers {} name an address twice", joined())));
    }
    Ok(Some(place))
}

/// Makes the node a member, however long that takes; returns once it is one, or cannot be.
pub(crate) async fn begin(node: Arc<Node>) -> Result<(), StartError> {
    match node.known.get() {
        None => begin_new(&node).await,
        Some(identity) => {
            node.become_one((*identity).clone()).await?;
            if identity.node == NodeId(1) && !identity.founders.is_empty() && !node.founded().await
            {
                found(&node, &identity).await?;
            }
            if let FirstStart::Join(via) = &node.first {
                be_admitted(&node, via).await?;
            }
            tell_address(&node).await
        }
    }
}

async fn begin_new(node: &Node) -> Result<(), StartError> {
    match &node.first {
        FirstStart::Refuse => Err(StartError::Empty),
        FirstStart::Alone => {
            let identity =
                Identity { cluster: draw(), node: NodeId(1), founders: vec![node.member.clone()] };
            node.become_one(identity.clone()).await?;
            found(node, &identity).await
        }
        FirstStart::Together(list) => {
            let place = place(&node.first, &node.member)?.expect("a list has a place for its node");
            let me = NodeId(place as u64 + 1);
            let others: Vec<&Member> =
                list.iter().filter(|member| member.peer != node.member.peer).collect();
            loop {
                if node.known.get().is_some() {
                    return Ok(());
                }
                let reached = ask_round(node, me, &others).await?;
                if place == 0 && reached == others.len() {
                    break;
                }
                tokio::time::sleep(ROUND).await;
            }
            let identity = Identity { cluster: draw(), node: me, founders: list.clone() };
            node.become_one(identity.clone()).await?;
            found(node, &identity).await
        }
        FirstStart::Join(via) => {
            let identity = ask_for_id(node, via).await;
            tracing::info!(node = %identity.node, cluster = %identity.cluster, "Joins the cluster");
            node.become_one(identity).await?;
            be_admitted(node, via).await
        }
    }
}

/// Asks the others who they are, and counts those that answer; an error if one of them knows this node from before.
async fn ask_round(node: &Node, me: NodeId, others: &[&Member]) -> Result<usize, StartError> {
    let mut reached = 0;
    for other in others {
        let Ok(reply) = hello(node, &other.peer).await else {
            continue;
        };
        reached += 1;
        let Some(cluster) = reply.founded.then(|| cluster_id(&reply.cluster).ok()).flatten() else {
            continue;
        };
        // The pledge may have come while the question was under way.
        if node.known.get().is_none() {
            return Err(StartError::DiskGone { node: me, cluster, peer: other.peer.clone() });
        }
    }
    Ok(reached)
}

async fn hello(node: &Node, peer: &str) -> Result<pb::RaftHelloReply, Status> {
    let mut client = node.dialer.client(peer)?;
    let request = node.dialer.request(None, pb::RaftHello {});
    Ok(within(ANSWER_WITHIN, client.hello(request)).await?.into_inner())
}

/// Has every founder write down who it is, then begins the log.
async fn found(node: &Node, identity: &Identity) -> Result<(), StartError> {
    let members: BTreeMap<u64, Member> = (1..).zip(identity.founders.iter().cloned()).collect();
    for (id, member) in members.iter().filter(|(id, _)| **id != identity.node.0) {
        pledge(node, &Identity { node: NodeId(*id), ..identity.clone() }, &member.peer).await?;
    }
    tracing::info!(cluster = %identity.cluster, members = members.len(), "Founds the cluster");
    let raft = node.raft.get().expect("a node that founds is someone");
    match raft.initialize(members).await {
        Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
        Err(error) => Err(StartError::Raft(error.to_string())),
    }
}

async fn pledge(node: &Node, identity: &Identity, peer: &str) -> Result<(), StartError> {
    loop {
        let pledged = async {
            let mut client = node.dialer.client(peer)?;
            let message = pb::RaftPledge { identity: Some(wire::pb_identity(identity)) };
            within(ANSWER_WITHIN, client.pledge(node.dialer.request(None, message))).await
        };
        match pledged.await {
            Ok(_) => return Ok(()),
            Err(status) if peer::refusal(&status) == Some(PLEDGE) => {
                return Err(StartError::Refused {
                    peer: peer.to_owned(),
                    problem: status.message().to_owned(),
                });
            }
            Err(status) => {
                tracing::info!(peer, error = status.message(), "Waits for a peer");
                tokio::time::sleep(ROUND).await;
            }
        }
    }
}

/// Asks one after the other, the leader first once one has named it.
struct Asked<'a> {
    via: &'a [String],
    next: usize,
    leader: Option<String>,
}

impl<'a> Asked<'a> {
    const fn new(via: &'a [String]) -> Self {
        Self { via, next: 0, leader: None }
    }

    fn next(&mut self) -> Option<String> {
        if let Some(leader) = self.leader.take() {
            return Some(leader);
        }
        let peer = self.via.get(self.next % self.via.len().max(1)).cloned();
        self.next += 1;
        peer
    }

    /// Whether each has been asked, and a leader that the last one named.
    const fn been_around(&self) -> bool {
        self.next >= self.via.len() && self.leader.is_none()
    }

    async fn refused(&mut self, peer: &str, status: &Status) {
        self.leader = peer::leader(status).map(str::to_owned);
        if self.leader.is_none() {
            tracing::info!(peer, error = status.message(), "Asks again");
            tokio::time::sleep(ROUND).await;
        }
    }
}

async fn ask_for_id(node: &Node, via: &[String]) -> Identity {
    let mut asked = Asked::new(via);
    loop {
        let Some(peer) = asked.next() else { std::future::pending().await };
        let reply = async {
            let mut client = node.dialer.client(&peer)?;
            let reply =
                within(ANSWER_WITHIN, client.join(node.dialer.request(None, pb::RaftJoin {})))
                    .await?;
            let pb::RaftJoinReply { cluster, node } = reply.into_inner();
            let cluster =
                cluster_id(&cluster).map_err(|error| Status::internal(error.to_string()))?;
            Ok(Identity { cluster, node: NodeId(node), founders: vec![] })
        };
        match reply.await {
            Ok(identity) => return identity,
            Err(status) => asked.refused(&peer, &status).await,
        }
    }
}

/// Asks to be fed and to vote, until the log says so.
///
/// A node whose own log says so already asks once around all the same: if it was removed, its log may not know of it.
async fn be_admitted(node: &Node, via: &[String]) -> Result<(), StartError> {
    let raft = node.raft.get().expect("a node that joins is someone");
    let mut asked = Asked::new(via);
    let mut sure = false;
    while !votes(raft) || !(sure || asked.been_around()) {
        let (Some(peer), Some(id)) = (asked.next(), node.id()) else {
            return Ok(());
        };
        let admitted = async {
            let mut client = node.dialer.client(&peer)?;
            let (fresh, member) = (!node.founded().await, Some(wire::pb_member(&node.member)));
            let message = pb::RaftAdmit { node: id.0, member, fresh };
            within(ADMISSION_WITHIN, client.admit(node.dialer.request(None, message))).await
        };
        match admitted.await {
            Ok(_) => {
                sure = true;
                // The log tells this node too, a moment later.
                let wait = raft.wait(Some(ANSWER_WITHIN));
                let told = wait.metrics(
                    |m| m.membership_config.voter_ids().any(|voter| voter == id.0),
                    "admission",
                );
                drop(told.await);
            }
            Err(status) if peer::refusal(&status) == Some(REMOVED) => {
                return Err(StartError::Removed { node: id, peer });
            }
            Err(status) if peer::refusal(&status) == Some(FOREIGN) => {
                tracing::error!(
                    peer,
                    error = status.message(),
                    "Cannot join: the peer belongs to another cluster"
                );
                tokio::time::sleep(ANSWER_WITHIN).await;
            }
            Err(status) => asked.refused(&peer, &status).await,
        }
    }
    Ok(())
}

/// Has the leader write down where this node is now, if it has moved since it was last here.
async fn tell_address(node: &Node) -> Result<(), StartError> {
    let raft = node.raft.get().expect("a node that starts again is someone");
    let me = *raft.node_id();
    loop {
        // Once there is a leader, this node soon knows the newest members.
        let led = raft.wait(None).metrics(|now| now.current_leader.is_some(), "a leader").await;
        let Ok(now) = led else {
            return Ok(());
        };
        let (Some(leader), Some(known)) = (now.current_leader, now.membership_config.get_node(&me))
        else {
            return Ok(());
        };
        if *known == node.member {
            return Ok(());
        }
        let given = now.membership_config.get_node(&leader).map_or("", |member| &member.peer);
        let peer = if leader == me {
            node.member.peer.clone()
        } else {
            node.dialer.book().address(leader, given)
        };
        let told = async {
            let mut client = node.dialer.client(&peer)?;
            let member = Some(wire::pb_member(&node.member));
            let message = pb::RaftAdmit { node: me, member, fresh: false };
            within(ANSWER_WITHIN, client.admit(node.dialer.request(None, message))).await
        };
        match told.await {
            Ok(_) => {
                tracing::info!(peer = %node.member.peer, "The cluster knows where this node is now");
            }
            Err(status) if peer::refusal(&status) == Some(REMOVED) => {
                return Err(StartError::Removed { node: NodeId(me), peer });
            }
            Err(status) => tracing::info!(%peer, error = status.message(), "Asks again"),
        }
        tokio::time::sleep(ROUND).await;
    }
}

fn votes(raft: &Raft) -> bool {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    metrics.membership_config.voter_ids().any(|voter| voter == metrics.id)
}

async fn within<T>(
    time: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    tokio::time::timeout(time, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")))
}

/// Draws an id that no other cluster has: 128 bits from the keys that the system seeds hash maps with.
fn draw() -> ClusterId {
    let keys = RandomState::new();
    ClusterId(u128::from(keys.hash_one(0_u8)) << 64 | u128::from(keys.hash_one(1_u8)))
}

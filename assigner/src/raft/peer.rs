//! Who calls, and whether it is one of us: what every call between nodes carries, and how a stranger is turned away.
//!
//! A call names the protocol, the caller's cluster and node, and the node that it means. So a node of another cluster
//! that was given a wrong address, or a member whose address now belongs to another, cannot put a word into the log.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use mandoline_core::command::{ClusterId, NodeId};
use mandoline_proto::pb::peer_client::PeerClient;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::raft::book::Book;
use crate::raft::config::Transport;
use crate::raft::wire::Identity;

/// The version of what nodes say to each other. A change that an older node would misread raises it.
pub const PROTOCOL: u64 = 1;

const PROTOCOL_KEY: &str = "mandoline-protocol";
const CLUSTER_KEY: &str = "mandoline-cluster";
const FROM_KEY: &str = "mandoline-from";
const TO_KEY: &str = "mandoline-to";
const REFUSAL_KEY: &str = "mandoline-refusal";
const LEADER_KEY: &str = "mandoline-leader";

/// A peer that does not answer a ping is gone: its connection is given up, and the next call dials anew.
const PING_EVERY: Duration = Duration::from_secs(2);
const PONG_WITHIN: Duration = Duration::from_secs(2);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// Why a node turns a call away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The caller speaks another version.
    #[error(
        "the caller speaks protocol {theirs}, this node speaks {PROTOCOL}: bring both to the same version"
    )]
    Protocol {
        /// The caller's, or nothing if it is no node at all.
        theirs: String,
    },
    /// The caller belongs to another cluster.
    #[error(
        "the caller belongs to cluster {theirs}, this node to {ours}: check the addresses of its peers"
    )]
    ForeignCluster {
        /// The caller's.
        theirs: String,
        /// This node's.
        ours: ClusterId,
    },
    /// Another node was meant.
    #[error("node {meant} was called, but {found} answers here: check the address of {meant}")]
    OtherNode {
        /// Who was meant.
        meant: String,
        /// Who this is.
        found: NodeId,
    },
    /// This node has no cluster yet.
    #[error("this node has not joined a cluster yet")]
    NoCluster,
    /// Only the leader can do this.
    #[error("this node does not lead; the leader's peer address is {0:?}")]
    NotLeader(String),
    /// The node was a member once.
    #[error(
        "{0} was removed from the cluster for good: empty its data directory and it joins as a new node, by \
         `mandoline assigner --join`"
    )]
    Removed(NodeId),
    /// The node was asked to found a cluster that it cannot be a member of.
    #[error("{0}")]
    Pledge(String),
}

impl Refusal {
    fn kind(&self) -> &'static str {
        match self {
            Self::Protocol { .. } => "protocol",
            Self::ForeignCluster { .. } => FOREIGN,
            Self::OtherNode { .. } => "other-node",
            Self::NoCluster => "no-cluster",
            Self::NotLeader(_) => "not-leader",
            Self::Removed(_) => REMOVED,
            Self::Pledge(_) => PLEDGE,
        }
    }
}

/// The call came from, or went to, another cluster.
pub(crate) const FOREIGN: &str = "foreign-cluster";
/// The node was removed from the cluster.
pub(crate) const REMOVED: &str = "removed";
/// The node cannot be a member of the cluster that is being founded.
pub(crate) const PLEDGE: &str = "pledge";

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut status = Self::failed_precondition(refusal.to_string());
        status.metadata_mut().insert(REFUSAL_KEY, MetadataValue::from_static(refusal.kind()));
        if let Refusal::NotLeader(leader) = &refusal {
            status.metadata_mut().insert(LEADER_KEY, text(leader));
        }
        status
    }
}

/// Gives the kind of a refusal that a peer has answered with.
pub(crate) fn refusal(status: &Status) -> Option<&str> {
    status.metadata().get(REFUSAL_KEY)?.to_str().ok()
}

/// Gives the leader's peer address, from a peer's answer that it does not lead.
pub(crate) fn leader(status: &Status) -> Option<&str> {
    status.metadata().get(LEADER_KEY)?.to_str().ok().filter(|leader| !leader.is_empty())
}

/// Who this node is: known once it has a cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known(Arc<ArcSwapOption<Identity>>);

impl Known {
    pub(crate) fn get(&self) -> Option<Arc<Identity>> {
        self.0.load_full()
    }

    pub(crate) fn set(&self, identity: Identity) {
        self.0.store(Some(Arc::new(identity)));
    }

    /// Lets a call in that comes from a member of this cluster and means this node.
    pub(crate) fn admit(&self, metadata: &MetadataMap) -> Result<(), Refusal> {
        check_protocol(metadata)?;
        let ours = self.get().ok_or(Refusal::NoCluster)?;
        let theirs = read(metadata, CLUSTER_KEY);
        if theirs != ours.cluster.to_string() {
            return Err(Refusal::ForeignCluster { theirs: theirs.to_owned(), ours: ours.cluster });
        }
        let meant = read(metadata, TO_KEY);
        if !meant.is_empty() && meant != ours.node.to_string() {
            return Err(Refusal::OtherNode { meant: meant.to_owned(), found: ours.node });
        }
        Ok(())
    }
}

/// Lets a call in that speaks this protocol, whoever makes it.
pub(crate) fn check_protocol(metadata: &MetadataMap) -> Result<(), Refusal> {
    let theirs = read(metadata, PROTOCOL_KEY);
    if theirs == PROTOCOL.to_string() {
        Ok(())
    } else {
        Err(Refusal::Protocol { theirs: theirs.to_owned() })
    }
}

fn read<'a>(metadata: &'a MetadataMap, key: &str) -> &'a str {
    metadata.get(key).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn text(value: &impl fmt::Display) -> MetadataValue<tonic::metadata::Ascii> {
    MetadataValue::try_from(value.to_string()).unwrap_or_else(|_| MetadataValue::from_static(""))
}

/// Calls peers, over one connection each.
#[derive(Debug)]
pub(crate) struct Dialer {
    transport: Transport,
    known: Known,
    book: Book,
    /// A few lines, and never across a wait.
    channels: Mutex<BTreeMap<String, Channel>>,
}

impl Dialer {
    pub(crate) fn new(transport: Transport, known: Known, book: Book) -> Self {
        Self { transport, known, book, channels: Mutex::default() }
    }

    /// Gives where each peer is found.
    pub(crate) const fn book(&self) -> &Book {
        &self.book
    }

    /// Gives the client for a peer; it connects with the first call.
    pub(crate) fn client(&self, address: &str) -> Result<PeerClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(PeerClient::new(channel.clone()));
        }
        let endpoint = (self.transport.endpoint)(address).map_err(|error| {
            Status::new(Code::InvalidArgument, format!("{address:?} is no address: {error}"))
        })?;
        let channel = endpoint
            .connect_timeout(CONNECT_WITHIN)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PONG_WITHIN)
            .keep_alive_while_idle(true)
            .connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(PeerClient::new(channel))
    }

    /// Makes a call that says who makes it, and to which node.
    pub(crate) fn request<T>(&self, to: Option<NodeId>, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert(PROTOCOL_KEY, text(&PROTOCOL));
        if let Some(identity) = self.known.get() {
            metadata.insert(CLUSTER_KEY, text(&identity.cluster));
            metadata.insert(FROM_KEY, text(&identity.node));
        }
        if let Some(to) = to {
            metadata.insert(TO_KEY, text(&to));
        }
        (self.transport.sign)(metadata);
        request
    }
}

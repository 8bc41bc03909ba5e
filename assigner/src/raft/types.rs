//! The one choice of types that openraft is used with, and short names for what it makes of them.

use std::sync::Arc;

use mandoline_core::command::Command;
use mandoline_core::state::{Applied, Refused};

/// Where a member of the cluster is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Where callers and operators reach it: `host:port`.
    pub client: String,
    /// Where its peers reach it: `host:port`.
    pub peer: String,
}

/// What a command led to; nothing for the entries that are Raft's own.
pub(crate) type Answer = Option<Result<Applied, Refused>>;

openraft::declare_raft_types!(
    /// The types that the log is made of. Commands are shared, since an entry is cloned on its way to each peer.
    pub(crate) Types:
        D = Arc<Command>,
        R = Answer,
        NodeId = u64,
        Node = Member,
);

pub(crate) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub(crate) type LogId = openraft::LogId<LeaderId>;
pub(crate) type Vote = openraft::Vote<LeaderId>;
pub(crate) type Payload = openraft::EntryPayload<Arc<Command>, u64, Member>;
pub(crate) type Entry = openraft::Entry<LeaderId, Payload>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type StoredMembership = openraft::StoredMembership<LeaderId, u64, Member>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, Member>;
pub(crate) type Snapshot = openraft::Snapshot<LeaderId, u64, Member, bytes::Bytes>;

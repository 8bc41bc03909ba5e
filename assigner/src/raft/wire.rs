//! Between openraft's types and `mandoline.v1`: what goes to disk and to peers.
//!
//! Here and not in `proto`, since only this folder may name openraft. `pb_x` encodes, `x` decodes; what does not decode
//! is a [`WireError`] that names the field.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mandoline_core::command::{ClusterId, Command, NodeId};
use mandoline_proto::command::{cluster_bytes, cluster_id};
use mandoline_proto::error::{WireError, need};
use mandoline_proto::pb;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};

use crate::raft::types::{
    Entry, LeaderId, LogId, Member, Membership, Payload, SnapshotMeta, StoredMembership, Types,
    Vote,
};

/// Who a node is: kept on its disk, and the first thing that is written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) cluster: ClusterId,
    pub(crate) node: NodeId,
    /// The members that the cluster is founded with, in the order of their ids from one; empty for a node that joined.
    pub(crate) founders: Vec<Member>,
}

pub(crate) fn pb_identity(identity: &Identity) -> pb::RaftIdentity {
    pb::RaftIdentity {
        cluster: cluster_bytes(identity.cluster),
        node: identity.node.0,
        founders: identity.founders.iter().map(pb_member).collect(),
    }
}

pub(crate) fn identity(wire: pb::RaftIdentity) -> Result<Identity, WireError> {
    if wire.node == 0 {
        return Err(WireError::new("node", "is zero"));
    }
    Ok(Identity {
        cluster: cluster_id(&wire.cluster).map_err(|error| error.within("identity"))?,
        node: NodeId(wire.node),
        founders: wire.founders.into_iter().map(member).collect(),
    })
}

pub(crate) fn pb_log_id(id: &LogId) -> pb::RaftLogId {
    pb::RaftLogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub(crate) fn log_id(wire: pb::RaftLogId) -> LogId {
    LogId::new(LeaderId { term: wire.term, node_id: wire.node }, wire.index)
}

pub(crate) fn pb_vote(vote: &Vote) -> pb::RaftVote {
    pb::RaftVote {
        term: vote.leader_id.term,
        node: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub(crate) fn vote(wire: pb::RaftVote) -> Vote {
    Vote { leader_id: LeaderId { term: wire.term, node_id: wire.node }, committed: wire.committed }
}

pub(crate) fn pb_member(member: &Member) -> pb::RaftMember {
    pb::RaftMember { client: member.client.clone(), peer: member.peer.clone() }
}

pub(crate) fn member(wire: pb::RaftMember) -> Member {
    Member { client: wire.client, peer: wire.peer }
}

pub(crate) fn pb_membership(membership: &Membership) -> pb::RaftMembership {
    let voters = |set: &BTreeSet<u64>| pb::RaftVoters { nodes: set.iter().copied().collect() };
    pb::RaftMembership {
        configs: membership.get_joint_config().iter().map(voters).collect(),
        nodes: membership.nodes().map(|(id, member)| (*id, pb_member(member))).collect(),
    }
}

pub(crate) fn membership(wire: pb::RaftMembership) -> Result<Membership, WireError> {
    let configs: Vec<BTreeSet<u64>> =
        wire.configs.into_iter().map(|voters| voters.nodes.into_iter().collect()).collect();
    let nodes: BTreeMap<u64, Member> =
        wire.nodes.into_iter().map(|(id, wire)| (id, member(wire))).collect();
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|error| WireError::new("membership", error))
}

pub(crate) fn pb_stored_membership(stored: &StoredMembership) -> pb::RaftStoredMembership {
    pb::RaftStoredMembership {
        log_id: stored.log_id().as_ref().map(pb_log_id),
        membership: Some(pb_membership(stored.membership())),
    }
}

pub(crate) fn stored_membership(
    wire: pb::RaftStoredMembership,
) -> Result<StoredMembership, WireError> {
    let members = membership(wire.membership.unwrap_or_default())?;
    Ok(StoredMembership::new(wire.log_id.map(log_id), members))
}

pub(crate) fn pb_entry(entry: &Entry) -> pb::RaftEntry {
    use pb::raft_entry::Payload as Wire;
    let payload = match &entry.payload {
        Payload::Blank => Wire::Blank(pb::RaftBlank {}),
        Payload::Normal(command) => Wire::Command(pb::Command::from(&**command)),
        Payload::Membership(membership) => Wire::Membership(pb_membership(membership)),
    };
    pb::RaftEntry { log_id: Some(pb_log_id(&entry.log_id)), payload: Some(payload) }
}

pub(crate) fn entry(wire: pb::RaftEntry) -> Result<Entry, WireError> {
    use pb::raft_entry::Payload as Wire;
    let log_id = log_id(need(wire.log_id, "log_id")?);
    let payload = match need(wire.payload, "payload")? {
        Wire::Blank(pb::RaftBlank {}) => Payload::Blank,
        Wire::Command(wire) => Payload::Normal(Arc::new(
            Command::try_from(wire).map_err(|error| error.within("command"))?,
        )),
        Wire::Membership(wire) => Payload::Membership(membership(wire)?),
    };
    Ok(Entry { log_id, payload })
}

/// What a snapshot is beside its bytes: which format they are in, and how to know that they are whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) format: u32,
    pub(crate) meta: SnapshotMeta,
    pub(crate) length: u64,
    pub(crate) checksum: u64,
}

/// Encodes a head; the vote goes along to a peer, and not to disk.
pub(crate) fn pb_head(head: &Head, vote: Option<&Vote>) -> pb::RaftSnapshotHead {
    pb::RaftSnapshotHead {
        format: head.format,
        last_log_id: head.meta.last_log_id.as_ref().map(pb_log_id),
        membership: Some(pb_stored_membership(&head.meta.last_membership)),
        length: head.length,
        checksum: head.checksum,
        vote: vote.map(pb_vote),
    }
}

pub(crate) fn head(wire: pb::RaftSnapshotHead) -> Result<Head, WireError> {
    Ok(Head {
        format: wire.format,
        meta: SnapshotMeta {
            last_log_id: wire.last_log_id.map(log_id),
            last_membership: stored_membership(need(wire.membership, "membership")?)?,
        },
        length: wire.length,
        checksum: wire.checksum,
    })
}

pub(crate) fn pb_append(request: &AppendEntriesRequest<Types>) -> pb::RaftAppend {
    pb::RaftAppend {
        vote: Some(pb_vote(&request.vote)),
        previous: request.prev_log_id.as_ref().map(pb_log_id),
        entries: request.entries.iter().map(pb_entry).collect(),
        committed: request.leader_commit.as_ref().map(pb_log_id),
    }
}

pub(crate) fn append(wire: pb::RaftAppend) -> Result<AppendEntriesRequest<Types>, WireError> {
    let named = |(at, wire)| entry(wire).map_err(|error| error.within(format!("entries[{at}]")));
    let entries = wire.entries.into_iter().enumerate().map(named).collect::<Result<Vec<_>, _>>()?;
    let first = wire.previous.as_ref().map_or(0, |previous| previous.index + 1);
    // Raft looks at the last id alone, so a hole would go unnoticed.
    if let Some((due, odd)) =
        (first..).zip(&entries).find(|(due, entry)| entry.log_id.index != *due)
    {
        let problem = format!("index {} where {due} was due", odd.log_id.index);
        return Err(WireError::new("entries", problem));
    }
    Ok(AppendEntriesRequest {
        vote: vote(need(wire.vote, "vote")?),
        prev_log_id: wire.previous.map(log_id),
        entries,
        leader_commit: wire.committed.map(log_id),
    })
}

fn pb_flushed(log_id: Option<&LogId>) -> pb::RaftFlushed {
    pb::RaftFlushed { log_id: log_id.map(pb_log_id) }
}

pub(crate) fn pb_append_reply(result: &StreamAppendResult<Types>) -> pb::RaftAppendReply {
    use pb::raft_append_reply::Reply;
    let reply = match result {
        Ok(flushed) => Reply::Flushed(pb_flushed(flushed.as_ref())),
        Err(StreamAppendError::Conflict(at)) => Reply::Conflict(pb_log_id(at)),
        Err(StreamAppendError::HigherVote(higher)) => Reply::Higher(pb_vote(higher)),
    };
    pb::RaftAppendReply { reply: Some(reply) }
}

pub(crate) fn append_reply(
    wire: pb::RaftAppendReply,
) -> Result<StreamAppendResult<Types>, WireError> {
    use pb::raft_append_reply::Reply;
    Ok(match need(wire.reply, "reply")? {
        Reply::Flushed(flushed) => Ok(flushed.log_id.map(log_id)),
        Reply::Conflict(at) => Err(StreamAppendError::Conflict(log_id(at))),
        Reply::Higher(higher) => Err(StreamAppendError::HigherVote(vote(higher))),
    })
}

pub(crate) fn pb_vote_request(request: &VoteRequest<Types>, pre: bool) -> pb::RaftVoteRequest {
    pb::RaftVoteRequest {
        vote: Some(pb_vote(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(pb_log_id),
        transfer: request.leadership_transfer,
        pre,
    }
}

pub(crate) fn vote_request(wire: pb::RaftVoteRequest) -> Result<VoteRequest<Types>, WireError> {
    Ok(VoteRequest {
        vote: vote(need(wire.vote, "vote")?),
        last_log_id: wire.last_log_id.map(log_id),
        leadership_transfer: wire.transfer,
    })
}

pub(crate) fn pb_vote_reply(response: &VoteResponse<Types>) -> pb::RaftVoteReply {
    pb::RaftVoteReply {
        vote: Some(pb_vote(&response.vote)),
        granted: response.vote_granted,
        last_log_id: response.last_log_id.as_ref().map(pb_log_id),
    }
}

pub(crate) fn vote_reply(wire: pb::RaftVoteReply) -> Result<VoteResponse<Types>, WireError> {
    let last_log_id = wire.last_log_id.map(log_id);
    Ok(VoteResponse::new(vote(need(wire.vote, "vote")?), last_log_id, wire.granted))
}

pub(crate) fn pb_transfer(request: &TransferLeaderRequest<Types>) -> pb::RaftTransfer {
    pb::RaftTransfer {
        from: Some(pb_vote(request.from_leader())),
        to: *request.to_node_id(),
        last_log_id: request.last_log_id().map(pb_log_id),
    }
}

pub(crate) fn transfer(wire: pb::RaftTransfer) -> Result<TransferLeaderRequest<Types>, WireError> {
    let from = vote(need(wire.from, "from")?);
    Ok(TransferLeaderRequest::new(from, wire.to, wire.last_log_id.map(log_id)))
}

pub(crate) fn pb_transfer_reply(response: &TransferLeaderResponse<Types>) -> pb::RaftTransferReply {
    use pb::raft_transfer_reply::Refused;
    let refused = response.as_ref().err().map(|error| match error {
        TransferLeaderError::VoteChanged { actual, .. } => Refused::Vote(pb_vote(actual)),
        TransferLeaderError::LogNotFlushed { actual, .. } => {
            Refused::Flushed(pb_flushed(actual.as_ref()))
        }
    });
    pb::RaftTransferReply { refused }
}

/// Decodes the answer to `asked`, which says what was expected.
pub(crate) fn transfer_reply(
    wire: pb::RaftTransferReply,
    asked: &TransferLeaderRequest<Types>,
) -> TransferLeaderResponse<Types> {
    use pb::raft_transfer_reply::Refused;
    match wire.refused {
        None => Ok(()),
        Some(Refused::Vote(actual)) => Err(TransferLeaderError::VoteChanged {
            expected: *asked.from_leader(),
            actual: vote(actual),
        }),
        Some(Refused::Flushed(flushed)) => Err(TransferLeaderError::LogNotFlushed {
            expected: asked.last_log_id().copied(),
            actual: flushed.log_id.map(log_id),
        }),
    }
}

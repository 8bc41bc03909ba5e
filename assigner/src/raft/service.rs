//! What a node answers its peers.
//!
//! Whatever comes in is decoded and looked through here, so that a malformed or damaged message is refused to its sender
//! and never reaches Raft, for which an error of the storage would be the end.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use mandoline_core::command::{Command, NodeId};
use mandoline_core::state::Outcome;
use mandoline_proto::command::cluster_bytes;
use mandoline_proto::error::{WireError, decode, need};
use mandoline_proto::pb;
use mandoline_proto::pb::peer_server::Peer;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::AppendEntriesRequest;
use openraft::{ChangeMembers, ReadPolicy};
use tonic::{Request, Response, Status, Streaming};

use crate::raft::config::FirstStart;
use crate::raft::machine::examine;
use crate::raft::node::{BirthError, Node, Raft, caught_up};
use crate::raft::peer::{Refusal, check_protocol};
use crate::raft::types::{Snapshot, Types};
use crate::raft::wire;

/// The largest request or snapshot that is put together from parts: a million slices weigh a tenth of it.
const WHOLE_BYTES_MAX: usize = 1 << 30;
/// How long a new node may take to catch up before its admission is asked for again.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(60);
/// How long its admission may take in all, which is agreed on twice besides.
const ADMIT_WITHIN: Duration = Duration::from_secs(65);

/// What a node answers its peers: the service of the peer port.
#[derive(Clone)]
pub struct Service(Arc<Node>);

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Service")
    }
}

impl Service {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }

    fn raft(&self) -> Result<&Raft, Status> {
        self.0.raft.get().ok_or_else(|| Refusal::NoCluster.into())
    }

    /// Lets a member in, and gives what it came for.
    fn admit<T>(&self, request: &Request<T>) -> Result<&Raft, Status> {
        self.0.known.admit(request.metadata())?;
        self.raft()
    }

    fn pledge_fits(&self, identity: &wire::Identity) -> Result<(), Refusal> {
        let refuse = |text: String| Err(Refusal::Pledge(text));
        let peers = |list: &[crate::raft::types::Member]| {
            list.iter().map(|m| m.peer.clone()).collect::<Vec<_>>()
        };
        let founders = peers(&identity.founders);
        let FirstStart::Together(list) = &self.0.first else {
            return refuse("this node was not started with a list of peers".to_owned());
        };
        if peers(list) != founders {
            return refuse(format!(
                "this node was started with the peers {}, the founder with {}: give all the same list in the same order",
                peers(list).join(","),
                founders.join(","),
            ));
        }
        match founders.iter().position(|peer| *peer == self.0.member.peer) {
            Some(at) if at as u64 + 1 == identity.node.0 => Ok(()),
            _ => refuse(format!(
                "{} is not the place of {} in the list of peers",
                identity.node, self.0.member.peer
            )),
        }
    }
}

fn malformed(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the node has stopped: {error}"))
}

/// Turns what Raft says of a change into what the asker can do about it.
fn change_failed(raft: &Raft, error: &RaftError<Types, ClientWriteError<Types>>) -> Status {
    match error.forward_to_leader() {
        Some(_) => Refusal::NotLeader(leader_address(raft)).into(),
        None => Status::unavailable(error.to_string()),
    }
}

/// The leader's peer address, or nothing.
fn leader_address(raft: &Raft) -> String {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let leader = metrics.current_leader.filter(|leader| *leader != metrics.id);
    let node = leader.and_then(|leader| metrics.membership_config.get_node(&leader).cloned());
    node.map(|node| node.peer).unwrap_or_default()
}

/// Puts together what comes in parts. Nothing if the stream has ended between two things.
async fn whole(
    parts: &mut Streaming<pb::RaftPart>,
) -> Result<Option<(Option<pb::RaftSnapshotHead>, Bytes)>, Status> {
    let (mut head, mut bytes) = (None, BytesMut::new());
    let mut first = true;
    while let Some(part) = parts.message().await? {
        if first {
            head = part.head;
        }
        if bytes.len() + part.data.len() > WHOLE_BYTES_MAX {
            return Err(Status::resource_exhausted(format!(
                "more than {WHOLE_BYTES_MAX} bytes in parts"
            )));
        }
        if first && part.last {
            return Ok(Some((head, part.data)));
        }
        first = false;
        bytes.extend_from_slice(&part.data);
        if part.last {
            return Ok(Some((head, bytes.freeze())));
        }
    }
    if first {
        Ok(None)
    } else {
        Err(Status::invalid_argument("the stream ended between two parts"))
    }
}

/// Reads requests until the stream ends; what ended it, if it was an error, is left in `failure`.
fn appends(
    parts: Streaming<pb::RaftPart>,
    failure: Arc<Mutex<Option<Status>>>,
) -> impl Stream<Item = AppendEntriesRequest<Types>> + Send + 'static {
    stream::unfold((parts, failure), |(mut parts, failure)| async move {
        let read = async {
            let Some((_, bytes)) = whole(&mut parts).await? else {
                return Ok(None);
            };
            let request = decode::<pb::RaftAppend>(bytes, "append").and_then(wire::append);
            request.map(Some).map_err(malformed)
        };
        match read.await {
            Ok(request) => Some((request?, (parts, failure))),
            Err(status) => {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
                None
            }
        }
    })
}

#[tonic::async_trait]
impl Peer for Service {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<pb::RaftAppendReply, Status>> + Send>>;

    async fn hello(
        &self,
        request: Request<pb::RaftHello>,
    ) -> Result<Response<pb::RaftHelloReply>, Status> {
        check_protocol(request.metadata())?;
        let identity = self.0.known.get();
        let mut reply =
            pb::RaftHelloReply { founded: self.0.founded().await, ..pb::RaftHelloReply::default() };
        if let Some(identity) = identity {
            reply.cluster = cluster_bytes(identity.cluster);
            reply.node = identity.node.0;
        }
        if let Some(raft) = self.0.raft.get() {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            reply.membership = Some(wire::pb_membership(metrics.membership_config.membership()));
            let leader = metrics.current_leader;
            let member =
                leader.and_then(|leader| metrics.membership_config.get_node(&leader).cloned());
            reply.leader = member.map(|member| member.peer).unwrap_or_default();
        }
        Ok(Response::new(reply))
    }

    async fn pledge(
        &self,
        request: Request<pb::RaftPledge>,
    ) -> Result<Response<pb::RaftPledgeReply>, Status> {
        check_protocol(request.metadata())?;
        let identity = need(request.into_inner().identity, "identity")
            .and_then(wire::identity)
            .map_err(malformed)?;
        self.pledge_fits(&identity)?;
        match self.0.become_one(identity).await {
            Ok(()) => Ok(Response::new(pb::RaftPledgeReply {})),
            Err(BirthError::Refused(refusal)) => Err(refusal.into()),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    async fn join(
        &self,
        request: Request<pb::RaftJoin>,
    ) -> Result<Response<pb::RaftJoinReply>, Status> {
        check_protocol(request.metadata())?;
        let raft = self.raft()?;
        let cluster = self.0.known.get().ok_or(Refusal::NoCluster)?.cluster;
        let written = raft.client_write(Arc::new(Command::MintNode)).await;
        let written = written.map_err(|error| change_failed(raft, &error))?;
        match written.data {
            Some(Ok(applied)) => match applied.outcome {
                Outcome::Node(node) => Ok(Response::new(pb::RaftJoinReply {
                    cluster: cluster_bytes(cluster),
                    node: node.0,
                })),
                other => Err(Status::internal(format!("minting a node gave {other:?}"))),
            },
            Some(Err(refused)) => Err(Status::failed_precondition(refused.to_string())),
            None => Err(Status::internal("minting a node gave nothing")),
        }
    }

    async fn admit(
        &self,
        request: Request<pb::RaftAdmit>,
    ) -> Result<Response<pb::RaftAdmitReply>, Status> {
        let raft = Self::admit(self, &request)?;
        let pb::RaftAdmit { node, member, fresh } = request.into_inner();
        let member = wire::member(need(member, "member").map_err(malformed)?);
        let minted = self.0.shown.state().last_node;
        if node == 0 || node > minted {
            return Err(Status::invalid_argument(format!("{} was never minted", NodeId(node))));
        }
        let listed = || {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.get_node(&node).cloned()
        };
        let mut known = listed();
        if known.is_none() && !fresh {
            // Only a leader for sure may say so: one that was replaced may not have heard of the newest members.
            let confirmed = raft.ensure_linearizable(ReadPolicy::ReadIndex).await;
            confirmed.map_err(|_| Refusal::NotLeader(leader_address(raft)))?;
            known = listed();
            // A node that ended between getting its id and being fed is fresh, and is let in: it has promised nothing.
            if known.is_none() {
                return Err(Refusal::Removed(NodeId(node)).into());
            }
        }
        let votes = known.is_some() && raft.voter_ids().any(|voter| voter == node);
        let moved = known.as_ref().is_some_and(|known| *known != member);
        if votes && !moved && raft.is_leader() {
            return Ok(Response::new(pb::RaftAdmitReply {}));
        }
        let admitted = async {
            if moved {
                let change = ChangeMembers::SetNodes([(node, member)].into());
                return raft.change_membership(change, true).await.map(Some);
            }
            let added = raft.add_learner(node, member, false).await?;
            // Without this, a node that goes away again at once would have a vote that it cannot cast.
            if !caught_up(raft, node, added.log_id.index, CATCH_UP_WITHIN).await {
                return Ok(None);
            }
            let change = ChangeMembers::AddVoterIds(BTreeSet::from([node]));
            raft.change_membership(change, false).await.map(Some)
        };
        let admitted = tokio::time::timeout(ADMIT_WITHIN, admitted).await.unwrap_or(Ok(None));
        let admitted = admitted.map_err(|error| change_failed(raft, &error))?;
        if admitted.is_none() {
            return Err(Status::deadline_exceeded("the node has not caught up yet"));
        }
        Ok(Response::new(pb::RaftAdmitReply {}))
    }

    async fn append(
        &self,
        request: Request<Streaming<pb::RaftPart>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let raft = Self::admit(self, &request)?;
        let failure = Arc::new(Mutex::new(None));
        let results = raft.stream_append(appends(request.into_inner(), failure.clone()));
        let replies = results.map(|result| match result {
            Ok(result) => Ok(wire::pb_append_reply(&result)),
            Err(fatal) => Err(stopped(fatal)),
        });
        let last =
            stream::once(
                async move { failure.lock().unwrap_or_else(PoisonError::into_inner).take() },
            );
        Ok(Response::new(Box::pin(
            replies.chain(last.filter_map(|failure| async { failure.map(Err) })),
        )))
    }

    async fn vote(
        &self,
        request: Request<pb::RaftVoteRequest>,
    ) -> Result<Response<pb::RaftVoteReply>, Status> {
        let raft = Self::admit(self, &request)?;
        let request = request.into_inner();
        let pre = request.pre;
        let request = wire::vote_request(request).map_err(malformed)?;
        let reply = if pre { raft.pre_vote(request).await } else { raft.vote(request).await };
        Ok(Response::new(wire::pb_vote_reply(&reply.map_err(stopped)?)))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<pb::RaftPart>>,
    ) -> Result<Response<pb::RaftSnapshotReply>, Status> {
        let raft = Self::admit(self, &request)?;
        let mut parts = request.into_inner();
        let (head, snapshot) =
            whole(&mut parts).await?.ok_or_else(|| Status::invalid_argument("no snapshot"))?;
        let mut head = need(head, "head").map_err(malformed)?;
        let vote = need(head.vote.take(), "head.vote").map(wire::vote).map_err(malformed)?;
        let head = wire::head(head).map_err(malformed)?;
        let examined = tokio::task::spawn_blocking(move || {
            examine(&head, &snapshot).map(|()| Snapshot { meta: head.meta, snapshot })
        });
        let snapshot = examined.await.map_err(stopped)?;
        let snapshot = snapshot
            .map_err(|problem| Status::data_loss(format!("the snapshot is no good: {problem}")))?;
        let reply = raft.install_full_snapshot(vote, snapshot).await.map_err(stopped)?;
        Ok(Response::new(pb::RaftSnapshotReply { vote: Some(wire::pb_vote(&reply.vote)) }))
    }

    async fn transfer(
        &self,
        request: Request<pb::RaftTransfer>,
    ) -> Result<Response<pb::RaftTransferReply>, Status> {
        let raft = Self::admit(self, &request)?;
        let request = wire::transfer(request.into_inner()).map_err(malformed)?;
        let reply = raft.handle_transfer_leader(request).await.map_err(stopped)?;
        Ok(Response::new(wire::pb_transfer_reply(&reply)))
    }
}

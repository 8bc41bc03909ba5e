//! How openraft reaches a peer: one gRPC connection, a stream for what is appended, plain calls for the rest.
//!
//! Three things that openraft leaves to its network. It waits out its back-off inside the stream of requests, so the first
//! request is awaited before dialling; else a peer that is down would be dialled in a loop. Each call ends within its time
//! to live. And a stream on which a request waits for its reply for too long is given up, so that a peer that hangs does
//! not hang the leader.

use std::collections::VecDeque;
use std::future::{Future, ready};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use mandoline_core::command::NodeId;
use mandoline_proto::pb;
use mandoline_proto::pb::peer_client::PeerClient;
use openraft::OptionalSend;
use openraft::base::BoxFuture;
use openraft::errors::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
    RPCTypes, RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use prost::Message;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::raft::disk::PART_BYTES;
use crate::raft::machine::head_of;
use crate::raft::peer::{Dialer, refusal};
use crate::raft::types::{Member, Snapshot, Types, Vote};
use crate::raft::wire;

/// The least that a reply may take: a sync on a busy disk takes longer than three quarters of a heartbeat.
const PATIENCE: Duration = Duration::from_millis(300);

/// What more a reply may take for each MiB that it is the answer to, and that has to be carried, decoded and synced
/// first: a command may have 64 of them. A heartbeat has none, and is missed as quickly as ever.
const PATIENCE_PER_MIB: Duration = Duration::from_secs(1);

/// How many refusals in a row are told of once.
const REMIND_EVERY: u64 = 600;

/// Makes the links of one node.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    me: NodeId,
    dialer: Arc<Dialer>,
}

impl Network {
    pub(crate) fn new(me: NodeId, dialer: Arc<Dialer>) -> Self {
        Self { me, dialer }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Member) -> Link {
        Link {
            told: AtomicU64::new(0),
            me: self.me,
            target: NodeId(target),
            given: node.peer.clone(),
            tried: Mutex::default(),
            dialer: self.dialer.clone(),
        }
    }
}

/// The way to one peer.
#[derive(Debug)]
pub(crate) struct Link {
    /// How many refusals were told of.
    told: AtomicU64,
    me: NodeId,
    target: NodeId,
    /// Where it was when the link was made.
    given: String,
    /// Where it was looked for last.
    tried: Mutex<String>,
    dialer: Arc<Dialer>,
}

impl Link {
    /// Gives the client for wherever the peer is now, as far as is known.
    fn client(&self) -> Result<PeerClient<Channel>, RPCError<Types>> {
        let address = self.dialer.book().address(self.target.0, &self.given);
        let client = self.dialer.client(&address);
        *self.tried.lock().unwrap_or_else(PoisonError::into_inner) = address;
        client.map_err(|status| self.failed(&status))
    }

    fn tried(&self) -> String {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes one call, within its time.
    async fn call<T>(
        &self,
        action: RPCTypes,
        within: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, RPCError<Types>> {
        match tokio::time::timeout(within, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_) => Err(self.late(action, within)),
        }
    }

    fn failed(&self, status: &Status) -> RPCError<Types> {
        let address = self.tried();
        self.dialer.book().failed(self.target.0, &address);
        if let Some(kind) = refusal(status) {
            // A leader calls ten times a second: the first refusal is news, the rest is a reminder.
            if self.told.fetch_add(1, Ordering::Relaxed).is_multiple_of(REMIND_EVERY) {
                let (peer, error) = (self.target, status.message());
                tracing::warn!(%peer, %address, kind, error, "Peer refused a call");
            }
        }
        let message =
            format!("{} at {}: {:?}: {}", self.target, address, status.code(), status.message());
        match status.code() {
            Code::InvalidArgument | Code::ResourceExhausted => {
                RPCError::Network(NetworkError::from_string(message))
            }
            // Everything else goes away by itself or not at all: openraft backs off.
            _ => RPCError::Unreachable(Unreachable::from_string(message)),
        }
    }

    fn late(&self, action: RPCTypes, timeout: Duration) -> RPCError<Types> {
        self.dialer.book().failed(self.target.0, &self.tried());
        RPCError::Timeout(Timeout { action, id: self.me.0, target: self.target.0, timeout })
    }

    fn odd(&self, error: impl std::fmt::Display) -> RPCError<Types> {
        RPCError::Network(NetworkError::from_string(format!(
            "{} at {}: {error}",
            self.target,
            self.tried()
        )))
    }

    async fn ask(
        &self,
        rpc: VoteRequest<Types>,
        pre: bool,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let mut client = self.client()?;
        let request = self.dialer.request(Some(self.target), wire::pb_vote_request(&rpc, pre));
        let reply = self.call(RPCTypes::Vote, option.soft_ttl(), client.vote(request)).await?;
        wire::vote_reply(reply).map_err(|error| self.odd(error))
    }

    async fn append<S>(
        &self,
        mut input: S,
        option: RPCOption,
    ) -> Result<BoxStream<'_, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
    {
        let Some(first) = input.next().await else {
            return Ok(stream::empty().boxed());
        };
        let mut client = self.client()?;
        let within = option.soft_ttl().max(PATIENCE);
        let first: Bytes = wire::pb_append(&first).encode_to_vec().into();
        // The answer's head may come only after the first request, if that fills the line.
        let head_within = within + allowance(first.len());
        let unanswered = Unanswered::default();
        let noted = unanswered.clone();
        let requests = stream::once(ready(first))
            .chain(input.map(|request| wire::pb_append(&request).encode_to_vec().into()));
        let outgoing = requests.flat_map(move |bytes| {
            noted.sent(bytes.len());
            stream::iter(parts(bytes))
        });
        let call = client.append(self.dialer.request(Some(self.target), outgoing));
        let replies = self.call(RPCTypes::AppendEntries, head_within, call).await?;
        let replies = stream::unfold(Some(replies), move |replies| {
            let unanswered = unanswered.clone();
            async move {
                let mut replies = replies?;
                loop {
                    let awaited = unanswered.bytes();
                    let within = within + allowance(awaited.unwrap_or_default());
                    match tokio::time::timeout(within, replies.message()).await {
                        Ok(Ok(Some(reply))) => {
                            unanswered.answered();
                            let result = wire::append_reply(reply).map_err(|error| self.odd(error));
                            let more = matches!(result, Ok(Ok(_))).then_some(replies);
                            return Some((result, more));
                        }
                        Ok(Ok(None)) => return None,
                        Ok(Err(status)) => {
                            return Some((Err(self.failed(&status)), None));
                        }
                        // Nothing was asked the whole time: silence is the right answer.
                        Err(_) if awaited.is_none() => {}
                        Err(_) => {
                            return Some((Err(self.late(RPCTypes::AppendEntries, within)), None));
                        }
                    }
                }
            }
        });
        Ok(replies.boxed())
    }
}

/// What was sent on a stream and has no reply yet, by size, in order. As many as openraft has under way at once.
#[derive(Clone, Debug, Default)]
struct Unanswered(Arc<Mutex<VecDeque<usize>>>);

impl Unanswered {
    fn sent(&self, bytes: usize) {
        self.sizes().push_back(bytes);
    }

    fn answered(&self) {
        self.sizes().pop_front();
    }

    /// Gives how much there is, or nothing if no reply is due.
    fn bytes(&self) -> Option<usize> {
        let sizes = self.sizes();
        (!sizes.is_empty()).then(|| sizes.iter().sum())
    }

    fn sizes(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives how much longer the reply to so many bytes may take than one to nothing.
fn allowance(bytes: usize) -> Duration {
    PATIENCE_PER_MIB.mul_f64(bytes as f64 / f64::from(1 << 20))
}

/// Cuts bytes into parts.
fn parts(bytes: Bytes) -> Vec<pb::RaftPart> {
    let mut parts: Vec<_> = (0..bytes.len())
        .step_by(PART_BYTES)
        .map(|at| bytes.slice(at..bytes.len().min(at + PART_BYTES)))
        .map(|data| pb::RaftPart { data, last: false, head: None })
        .collect();
    if parts.is_empty() {
        parts.push(pb::RaftPart::default());
    }
    parts.last_mut().expect("there is one at least").last = true;
    parts
}

impl NetBackoff<Types> for Link {
    fn backoff(&self) -> Option<Backoff> {
        None
    }
}

impl NetStreamAppend<Types> for Link {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<
            openraft::base::BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>,
            RPCError<Types>,
        >,
    >
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(self.append(input, option))
    }
}

impl NetVote<Types> for Link {
    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask(rpc, false, option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask(rpc, true, option).await
    }
}

impl NetSnapshot<Types> for Link {
    type SnapshotData = Bytes;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let mut client = self.client()?;
        let head = head_of(snapshot.meta, &snapshot.snapshot);
        let mut parts = parts(snapshot.snapshot);
        parts[0].head = Some(wire::pb_head(&head, Some(&vote)));
        let request = self.dialer.request(Some(self.target), stream::iter(parts));
        let call =
            self.call(RPCTypes::InstallSnapshot, option.soft_ttl(), client.snapshot(request));
        let reply = tokio::select! {
            reply = call => reply?,
            closed = cancel => return Err(closed.into()),
        };
        let vote = reply.vote.ok_or_else(|| self.odd("a reply without a vote"))?;
        Ok(SnapshotResponse::new(wire::vote(vote)))
    }
}

impl NetTransferLeader<Types> for Link {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let mut client = self.client()?;
        let call =
            client.transfer(self.dialer.request(Some(self.target), wire::pb_transfer(&request)));
        let reply = self.call(RPCTypes::TransferLeader, option.soft_ttl(), call).await?;
        Ok(wire::transfer_reply(reply, &request))
    }
}

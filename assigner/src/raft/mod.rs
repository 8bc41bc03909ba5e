//! Agreement: commands go in at the leader, and come out of every node in the same order, once a quorum has them on disk.
//!
//! [`Consensus`] is the whole of it for the rest of the assigner. The only folder that names openraft: should another
//! implementation take its place, everything outside stays as it is (`docs/adr/0008-openraft-0.10.md`).
//!
//! Read downward: `types` and `wire` say what the log is made of, `record` how it stands on disk, `disk`, `writer` and
//! `log` keep it, `machine` applies it, `peer`, `network` and `service` carry it to the others, `node` and `start` make a
//! member of a process.

pub mod types;
pub(crate) mod wire;
pub(crate) mod record;
pub mod faulty;
pub mod disk;
pub(crate) mod writer;
pub(crate) mod log;
pub mod machine;
pub mod config;
pub(crate) mod book;
pub mod peer;
pub(crate) mod network;
pub(crate) mod node;
pub mod service;
pub mod start;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use mandoline_core::command::{ClusterId, Command, NodeId};
use mandoline_core::state::{Applied, Refused, State};
use mandoline_proto::pb;
use mandoline_proto::pb::peer_server::PeerServer;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, ForwardToLeader, LinearizableReadError, RaftError,
};
use openraft::impls::ProgressResponder;
use openraft::vote::RaftLeaderId;
use openraft::{ChangeMembers, RaftMetrics, ReadPolicy, SnapshotPolicy};
use prost::Message;
use tokio::sync::{OnceCell, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::raft::book::Book;
use crate::raft::config::{Config, Timings};
use crate::raft::disk::{Disk, DiskError};
use crate::raft::log::{Grown, Log};
use crate::raft::machine::{Keeper, Listener, Machine, Shown};
use crate::raft::node::{Node, Raft, Unborn, caught_up};
use crate::raft::peer::{Dialer, Known};
use crate::raft::service::Service;
use crate::raft::start::StartError;
use crate::raft::types::{LeaderId, LogId, Member, Types};
use crate::raft::writer::Writer;

/// The largest command, encoded: a plan that touches a million slices weighs half of it.
pub const COMMAND_BYTES_MAX: usize = 64 << 20;
/// The name under which the implementation below logs, for filters: it tells every step of an election.
pub const LOG_TARGET: &str = "openraft";
/// How long a leader that stops waits for another to lead: a transfer takes milliseconds, and an election comes anyway.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(1);
/// How long a node that an operator adds may take to catch up: less than the ten seconds that operators wait for an answer.
pub const ADD_WITHIN: Duration = Duration::from_secs(8);
/// How long a snapshot may take: a state of gigabytes is beyond the limits of a cluster.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(60);
/// Between two tries of a proposal that found no leader.
const RETRY_EVERY: Duration = Duration::from_millis(5);

/// What a node is in its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads: it has applied everything that was agreed on before its term, and may propose.
    Leader {
        /// Its term. Two leaders never have the same term and the same node.
        term: u64,
    },
    /// It follows, or has not joined yet.
    Follower {
        /// Whom, if it knows.
        leader: Option<Leader>,
    },
}

impl Role {
    /// Gives the term in which this node leads, if it does.
    pub const fn leads(&self) -> Option<u64> {
        match self {
            Self::Leader { term } => Some(*term),
            Self::Follower { .. } => None,
        }
    }
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Its id.
    pub node: NodeId,
    /// Where callers reach it.
    pub client: String,
}

impl fmt::Display for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.node, self.client)
    }
}

/// Why a command was not carried out, as far as anyone knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The state refused it, and is as it was.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Only the leader can propose. Nothing was done: ask the leader.
    #[error("this node does not lead{}", .leader.as_ref().map_or(String::new(), |leader| format!(": ask {leader}")))]
    NotLeader {
        /// Who does, if that is known.
        leader: Option<Leader>,
    },
    /// It may have been carried out, or may yet be: look before trying again.
    #[error(
        "no quorum has answered in time, and the command may yet be carried out: look before trying again"
    )]
    Unknown,
    /// It is too large for the log.
    #[error("the command has {bytes} bytes: {COMMAND_BYTES_MAX} are the most")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The node stops, or has failed.
    #[error("the node has stopped")]
    Stopped,
}

/// Why the members were not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// Only the leader can change the members.
    #[error("this node does not lead{}", .leader.as_ref().map_or(String::new(), |leader| format!(": ask {leader}")))]
    NotLeader {
        /// Who does, if that is known.
        leader: Option<Leader>,
    },
    /// There is no such member.
    #[error("{0} is no member: `mandoline status` lists them")]
    NoSuchMember(NodeId),
    /// The id was never minted, so another node may be given it later.
    #[error("{0} was never minted: a node that joins gets its id from the log")]
    NotMinted(NodeId),
    /// The last voter cannot go: nobody would be left to agree.
    #[error("{0} is the last voter: add another first, or stop the node for good")]
    LastVoter(NodeId),
    /// The node that was to be added has not caught up in time, and so does not vote.
    #[error(
        "{node} has not caught up within {} s, so it was not added: check that it runs and is reached at {peer}, then \
         add it again", .within.as_secs()
    )]
    NotCaughtUp {
        /// Which node.
        node: NodeId,
        /// Where it was looked for.
        peer: String,
        /// How long it had.
        within: Duration,
    },
    /// Another change is under way.
    #[error("another change of the members is under way: try again when it is done")]
    InProgress,
    /// It may have been done, or may yet be.
    #[error("no quorum has answered in time: look at the members before trying again")]
    Unknown,
    /// The node stops, or has failed.
    #[error("the node has stopped")]
    Stopped,
}

/// Why a node cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// It could not become a member.
    #[error(transparent)]
    Start(Arc<StartError>),
    /// Its storage failed. Nothing that it acknowledged is lost; it can start again once the disk is well.
    #[error(transparent)]
    Disk(Arc<DiskError>),
    /// Raft has stopped.
    #[error("Raft has stopped: {0}")]
    Raft(String),
}

/// How a node and its cluster are, as far as the node knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its cluster, once it has one.
    pub cluster: Option<ClusterId>,
    /// Its id, once it has one.
    pub node: Option<NodeId>,
    /// What it is.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// The index of its last log entry.
    pub last_log: Option<u64>,
    /// The index of the newest entry that it has applied.
    pub applied: Option<u64>,
    /// The index that its newest snapshot reaches to.
    pub snapshot: Option<u64>,
    /// The index up to which its log was purged.
    pub purged: Option<u64>,
    /// The members, by id.
    pub members: Vec<MemberStatus>,
}

/// How a member is, as far as a node knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its id.
    pub node: NodeId,
    /// Where it is found.
    pub member: Member,
    /// It votes; else it only listens.
    pub voter: bool,
    /// It leads.
    pub leader: bool,
    /// The index of the last entry that it is known to have on disk; only the leader knows.
    pub matched: Option<u64>,
    /// It has answered the leader within an election's time; only the leader knows.
    pub reachable: bool,
}

/// One node of the cluster: a handle, cheap to clone.
#[derive(Clone)]
pub struct Consensus {
    node: Arc<Node>,
    timings: Timings,
    role: watch::Receiver<Role>,
    failed: watch::Receiver<Option<Failure>>,
    applied: watch::Receiver<Option<LogId>>,
    /// Ends the tasks.
    ending: CancellationToken,
    tasks: Arc<Mutex<Vec<JoinHandle<()>>>>,
    writer: Arc<Mutex<Option<std::thread::JoinHandle<()>>>>,
    stopped: Arc<OnceCell<()>>,
}

impl fmt::Debug for Consensus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consensus")
            .field("node", &self.node.id())
            .field("role", &*self.role.borrow())
            .finish()
    }
}

impl Consensus {
    /// Opens a node's file and starts it.
    ///
    /// Returns once the file was read and found good. A node that starts for the first time becomes a member after that:
    /// serve [`Consensus::service`] on its peer port, since the others must be able to ask who it is. Watch
    /// [`Consensus::failed`] for what may keep it from that.
    ///
    /// `listener` hears of every change, in order, beginning with what is on disk. When `stop` is cancelled the node hands
    /// over and stops, as by [`Consensus::stop`].
    pub async fn start(
        config: Config,
        listener: Listener,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        let Config { storage, member, first, timings, snapshots, transport } = config;
        start::place(&first, &member)?;
        let raft_config = Arc::new(raft_config(timings, snapshots)?);
        let opened = tokio::task::spawn_blocking(move || Disk::open(storage)).await;
        let (disk, loaded) = opened.map_err(|error| StartError::Raft(error.to_string()))??;
        let disk = Arc::new(disk);
        if loaded.identity.is_none() && first == config::FirstStart::Refuse {
            return Err(StartError::Empty);
        }
        let (writer, thread) = Writer::start(disk.clone())?;
        let known = Known::default();
        if let Some(identity) = &loaded.identity {
            known.set(identity.clone());
        }
        let shown = Shown::new();
        let keeper = Keeper::new(disk.clone(), writer.clone(), loaded.snapshot.clone());
        let machine = Machine::new(shown.clone(), listener, keeper);
        let applied = machine.progress();
        let log = Log::new(disk, writer.clone(), &loaded, snapshots.bytes);
        let grown = log.grown();
        let dialer = Arc::new(Dialer::new(transport, known.clone(), Book::new(&first)));
        let unborn = Unborn { config: raft_config, log, machine };
        let node = Arc::new(Node::new(member, first, dialer, known, shown, writer, unborn));
        if let Some(identity) = loaded.identity {
            node.become_one(identity).await?;
        }
        let (role_is, role) = watch::channel(Role::Follower { leader: None });
        let (failure, failed) = watch::channel(None);
        let ending = CancellationToken::new();
        let consensus = Self {
            node: node.clone(),
            timings,
            role: role.clone(),
            failed,
            applied,
            ending: ending.clone(),
            tasks: Arc::default(),
            writer: Arc::new(Mutex::new(Some(thread))),
            stopped: Arc::default(),
        };
        let tasks = [
            tokio::spawn(
                ending.clone().run_until_cancelled_owned(keep_small(node.clone(), grown)).map(drop),
            ),
            tokio::spawn(
                ending
                    .clone()
                    .run_until_cancelled_owned(begin(node.clone(), failure.clone()))
                    .map(drop),
            ),
            tokio::spawn(
                ending
                    .clone()
                    .run_until_cancelled_owned(watch_disk(node.clone(), failure.clone()))
                    .map(drop),
            ),
            tokio::spawn(watch_role(node.clone(), timings, role_is, failure, ending.clone())),
            tokio::spawn(
                ending.clone().run_until_cancelled_owned(name_cluster(node, role)).map(drop),
            ),
        ];
        consensus.tasks().extend(tasks);
        let stopping = consensus.clone();
        // Ends by itself after `stop`, and so is held by nobody: it is who stops the others.
        drop(tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => stopping.stop().await,
                () = ending.cancelled() => {}
            }
        }));
        Ok(consensus)
    }

    /// Gives what answers the peers: to be served on the peer port, with TLS and tokens as the caller likes.
    pub fn service(&self) -> PeerServer<Service> {
        // Parts are of 1 MiB, so the usual limit of 4 MiB a message holds.
        PeerServer::new(Service::new(self.node.clone()))
    }

    /// Proposes a command, and waits until it is applied here.
    pub async fn propose(&self, command: Command) -> Result<Applied, ProposeError> {
        let bytes = pb::Command::from(&command).encoded_len();
        if bytes > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes });
        }
        let command = Arc::new(command);
        let deadline = Instant::now() + self.timings.propose;
        // A leader is found, or found out, within two elections.
        let patience = (Instant::now() + 2 * self.timings.election_max).min(deadline);
        loop {
            let error = match self.node.raft.get() {
                None => ForwardToLeader::empty(),
                Some(raft) if self.is_unnamed(raft) => ForwardToLeader::empty(),
                Some(raft) => {
                    match tokio::time::timeout_at(deadline, raft.client_write(command.clone()))
                        .await
                    {
                        Err(_) => return Err(ProposeError::Unknown),
                        Ok(Ok(written)) => {
                            let answer =
                                written.data.expect("a command is answered by what it led to");
                            return Ok(answer?);
                        }
                        Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(
                            forward,
                        )))) => forward,
                        Ok(Err(RaftError::APIError(_))) => return Err(ProposeError::Unknown),
                        Ok(Err(RaftError::Fatal(_))) => return Err(ProposeError::Stopped),
                    }
                }
            };
            if self.ending.is_cancelled() || self.failed.borrow().is_some() {
                return Err(ProposeError::Stopped);
            }
            let leader = self.other(&error);
            if leader.is_some() || Instant::now() >= patience {
                return Err(ProposeError::NotLeader { leader });
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }

    /// Proposes what the leader of a term has decided, in that term and no later one: another may have led since, on other
    /// knowledge. Tried once.
    pub async fn propose_in(&self, term: u64, command: Command) -> Result<Applied, ProposeError> {
        let bytes = pb::Command::from(&command).encoded_len();
        if bytes > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes });
        }
        let raft = self.node.raft.get().ok_or(ProposeError::NotLeader { leader: None })?;
        let leader = LeaderId::new(term, raft.metrics().borrow_watched().id);
        let (responder, answered) = ProgressResponder::complete_only();
        let write = raft.write(Arc::new(command)).with_leader(leader).responder(responder);
        if write.await.is_err() {
            return Err(ProposeError::Stopped);
        }
        match tokio::time::timeout(self.timings.propose, answered).await {
            Err(_) => Err(ProposeError::Unknown),
            Ok(Err(_)) => Err(ProposeError::Stopped),
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(forward)))) => {
                Err(ProposeError::NotLeader { leader: self.other(&forward) })
            }
            Ok(Ok(Err(_))) => Err(ProposeError::Unknown),
            Ok(Ok(Ok(written))) => {
                Ok(written.data.expect("a command is answered by what it led to")?)
            }
        }
    }

    /// Says whether the cluster is yet to be named, which comes before all else: generations begin with its incarnation.
    fn is_unnamed(&self, raft: &Raft) -> bool {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let led_elsewhere = metrics.current_leader.is_some_and(|leader| leader != metrics.id);
        !led_elsewhere && self.node.shown.state().cluster.is_none()
    }

    /// Confirms with a quorum that this node leads now, since the call. The state is then no older than the call.
    pub async fn confirm_leadership(&self) -> Result<(), ProposeError> {
        let raft = self.node.raft.get().ok_or(ProposeError::NotLeader { leader: None })?;
        let confirmed = tokio::time::timeout(
            self.timings.propose,
            raft.ensure_linearizable(ReadPolicy::ReadIndex),
        );
        match confirmed.await {
            Err(_) => Err(ProposeError::Unknown),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                Err(ProposeError::NotLeader { leader: self.other(&forward) })
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) => {
                Err(ProposeError::Unknown)
            }
            Ok(Err(RaftError::Fatal(_))) => Err(ProposeError::Stopped),
        }
    }

    /// Gives the state as of the newest command that this node has applied.
    pub fn state(&self) -> Arc<State> {
        self.node.shown.state()
    }

    /// Follows what this node is.
    pub fn role(&self) -> watch::Receiver<Role> {
        self.role.clone()
    }

    /// Waits until this node has applied the entry at `index`; false if it stops before.
    pub async fn wait_applied(&self, index: u64) -> bool {
        let mut applied = self.applied.clone();
        applied
            .wait_for(|applied| applied.is_some_and(|applied| applied.index >= index))
            .await
            .is_ok()
    }

    /// Waits until the node cannot go on, and says why. Never returns for a node that is well, or was told to stop.
    pub async fn failed(&self) -> Failure {
        let mut failed = self.failed.clone();
        let failure =
            failed.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone());
        match failure {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Says how the node and its cluster are.
    pub fn status(&self) -> Status {
        let identity = self.node.known.get();
        let mut status = Status {
            cluster: identity.as_ref().map(|identity| identity.cluster),
            node: identity.map(|identity| identity.node),
            role: self.role.borrow().clone(),
            term: 0,
            last_log: None,
            applied: self.applied.borrow().map(|id| id.index),
            snapshot: None,
            purged: None,
            members: Vec::new(),
        };
        let Some(raft) = self.node.raft.get() else {
            return status;
        };
        let metrics = raft.metrics().borrow_watched().clone();
        status.term = metrics.current_term;
        status.last_log = metrics.last_log_index;
        status.snapshot = metrics.snapshot.map(|id| id.index);
        status.purged = metrics.purged.map(|id| id.index);
        let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
        let matched = |id: &u64| {
            let known =
                metrics.replication.as_ref().and_then(|known| known.get(id).copied().flatten());
            known.map(|log_id| log_id.index)
        };
        let answered = |id: &u64| {
            let known =
                metrics.heartbeat.as_ref().and_then(|known| known.get(id).copied().flatten());
            known.is_some_and(|at| openraft::Instant::elapsed(&*at) <= self.timings.election_max)
        };
        let member = |(id, member): (&u64, &Member)| MemberStatus {
            node: NodeId(*id),
            member: member.clone(),
            voter: voters.contains(id),
            leader: metrics.current_leader == Some(*id),
            matched: matched(id),
            reachable: *id == metrics.id || answered(id),
        };
        status.members = metrics.membership_config.nodes().map(member).collect();
        status
    }

    /// Adds a node that has its id from the log: it listens until it has caught up, then votes.
    ///
    /// A node that does not catch up `within` that time never votes, for it would count against every quorum; it is taken
    /// out again, unless it was a member before.
    pub async fn add(
        &self,
        node: NodeId,
        member: Member,
        within: Duration,
    ) -> Result<(), MemberError> {
        let is_new = self.must_know(node).is_err();
        let index = self.add_learner(node, member.clone()).await?;
        let raft = self.running()?;
        if raft.voter_ids().any(|voter| voter == node.0) {
            return Ok(());
        }
        if caught_up(raft, node.0, index, within).await {
            return self.promote(node).await;
        }
        if !raft.is_leader() {
            return Err(MemberError::NotLeader { leader: self.leader() });
        }
        if is_new {
            // Openraft refuses this for a voter: it may have asked for its admission itself, and been let in.
            let change = ChangeMembers::RemoveNodes(BTreeSet::from([node.0]));
            let removed =
                self.changed(node, || raft.change_membership(change.clone(), false)).await;
            if let Err(error) = removed {
                tracing::warn!(%node, %error, "A node that has not caught up is a member, though without a vote");
            }
        }
        Err(MemberError::NotCaughtUp { node, peer: member.peer, within })
    }

    /// Lets a node listen that has its id from the log. Returns once that is agreed on, not once it has caught up, and
    /// gives the index of the entry that says so.
    pub async fn add_learner(&self, node: NodeId, member: Member) -> Result<u64, MemberError> {
        if node.0 == 0 || node.0 > self.state().last_node {
            return Err(MemberError::NotMinted(node));
        }
        let raft = self.running()?;
        let added = self.changed(node, || raft.add_learner(node.0, member.clone(), false)).await;
        added.map(|written| written.log_id.index)
    }

    /// Lets a member vote that has listened until now.
    pub async fn promote(&self, node: NodeId) -> Result<(), MemberError> {
        self.must_know(node)?;
        let change = ChangeMembers::AddVoterIds(BTreeSet::from([node.0]));
        let raft = self.running()?;
        self.changed(node, || raft.change_membership(change.clone(), false)).await.map(drop)
    }

    /// Removes a member for good: its id is never given again.
    ///
    /// A leader that is to remove itself hands over first, and says whom to ask: else it would be gone before it heard
    /// whether it may go.
    pub async fn remove(&self, node: NodeId) -> Result<(), MemberError> {
        self.must_know(node)?;
        let raft = self.running()?;
        let voters: Vec<u64> = raft.voter_ids().collect();
        let gone = BTreeSet::from([node.0]);
        let change = if !voters.contains(&node.0) {
            ChangeMembers::RemoveNodes(gone)
        } else if voters.len() == 1 {
            return Err(MemberError::LastVoter(node));
        } else {
            ChangeMembers::RemoveVoters(gone)
        };
        if node.0 == *raft.node_id() && raft.is_leader() {
            abdicate(raft, HAND_OVER_WITHIN).await;
            let metrics = raft.metrics().borrow_watched().clone();
            let leader = metrics.current_leader.filter(|leader| *leader != node.0);
            return Err(MemberError::NotLeader {
                leader: leader.and_then(|id| found_in(&metrics, id)),
            });
        }
        self.changed(node, || raft.change_membership(change.clone(), false)).await.map(drop)
    }

    /// Hands the lead to another voter, and returns once this node does not lead any more.
    pub async fn transfer_leader(&self, to: NodeId) -> Result<(), MemberError> {
        self.must_know(to)?;
        let raft = self.running()?;
        if !raft.is_leader() {
            return Err(MemberError::NotLeader { leader: self.leader() });
        }
        if raft.voter_ids().all(|voter| voter != to.0) {
            return Err(MemberError::NoSuchMember(to));
        }
        if to.0 == *raft.node_id() || hand_over(raft, to.0, self.timings.election_max).await {
            return Ok(());
        }
        Err(MemberError::Unknown)
    }

    /// Hands the lead over if this node has it, then stops: what was acknowledged is on disk, and the file is closed.
    pub async fn stop(&self) {
        self.stopped.get_or_init(|| self.wind_down()).await;
    }

    async fn wind_down(&self) {
        if let Some(raft) = self.node.raft.get() {
            abdicate(raft, HAND_OVER_WITHIN).await;
            if let Err(error) = raft.shutdown().await {
                tracing::warn!(%error, "Raft ended badly");
            }
        }
        self.ending.cancel();
        let tasks = std::mem::take(&mut *self.tasks());
        for task in tasks {
            drop(task.await);
        }
        self.node.writer.close();
        let thread = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            drop(tokio::task::spawn_blocking(move || thread.join()).await);
        }
    }

    fn tasks(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> Result<&Raft, MemberError> {
        self.node.raft.get().ok_or(MemberError::NotLeader { leader: None })
    }

    fn must_know(&self, node: NodeId) -> Result<(), MemberError> {
        let metrics = self.running()?.metrics();
        let known = metrics.borrow_watched().membership_config.get_node(&node.0).is_some();
        if known { Ok(()) } else { Err(MemberError::NoSuchMember(node)) }
    }

    /// Changes the members, and waits a while for a change that is under way.
    async fn changed<T, F>(&self, node: NodeId, change: impl Fn() -> F) -> Result<T, MemberError>
    where
        F: Future<Output = Result<T, RaftError<Types, ClientWriteError<Types>>>>,
    {
        let deadline = Instant::now() + self.timings.propose;
        loop {
            let Ok(result) = tokio::time::timeout_at(deadline, change()).await else {
                return Err(MemberError::Unknown);
            };
            return match result {
                Ok(changed) => Ok(changed),
                Err(RaftError::Fatal(_)) => Err(MemberError::Stopped),
                Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                    Err(MemberError::NotLeader { leader: self.other(&forward) })
                }
                Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
                    match error {
                        ChangeMembershipError::InProgress(_)
                        | ChangeMembershipError::UncommittedLeaderLog(_) => {
                            if Instant::now() < deadline {
                                tokio::time::sleep(RETRY_EVERY).await;
                                continue;
                            }
                            Err(MemberError::InProgress)
                        }
                        ChangeMembershipError::EmptyMembership(_) => {
                            Err(MemberError::LastVoter(node))
                        }
                        _ => Err(MemberError::NoSuchMember(node)),
                    }
                }
                Err(RaftError::APIError(_)) => Err(MemberError::Unknown),
            };
        }
    }

    fn leader(&self) -> Option<Leader> {
        match &*self.role.borrow() {
            Role::Follower { leader } => leader.clone(),
            Role::Leader { .. } => None,
        }
    }

    /// The leader that is to be asked, unless that is this node.
    fn other(&self, forward: &ForwardToLeader<Types>) -> Option<Leader> {
        let node = NodeId(forward.leader_id?);
        let client = forward.leader_node.as_ref()?.client.clone();
        (Some(node) != self.node.id()).then_some(Leader { node, client })
    }
}

fn raft_config(
    timings: Timings,
    snapshots: config::Snapshots,
) -> Result<openraft::Config, StartError> {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let config = openraft::Config {
        cluster_name: "mandoline".to_owned(),
        heartbeat_interval: millis(timings.heartbeat),
        election_timeout_min: millis(timings.election_min),
        election_timeout_max: millis(timings.election_max),
        // A snapshot of a hundred megabytes over a slow line; a peer that is gone is noticed by the connection.
        install_snapshot_timeout: 60_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshots.every),
        max_in_snapshot_log_to_keep: snapshots.keep,
        enable_pre_vote: Some(true),
        // A restarted leader must be elected again: lease argument, point 4, in the design.
        enable_leader_restore: Some(false),
        // A node that has lost its log must not come back under its id.
        allow_log_reversion: Some(false),
        ..openraft::Config::default()
    };
    config.validate().map_err(|error| StartError::Config(error.to_string()))
}

/// Makes the node a member, and says why not if it cannot be one.
async fn begin(node: Arc<Node>, failure: watch::Sender<Option<Failure>>) {
    if let Err(error) = start::begin(node).await {
        tracing::error!(%error, "The node does not start");
        fail(&failure, Failure::Start(Arc::new(error)));
    }
}

async fn watch_disk(node: Arc<Node>, failure: watch::Sender<Option<Failure>>) {
    let mut failed = node.writer.failed();
    let Ok(error) = failed.wait_for(Option::is_some).await.map(|error| error.clone()) else {
        return std::future::pending().await;
    };
    fail(&failure, Failure::Disk(error.expect("it was waited for")));
}

/// The first failure is the cause; what comes after follows from it.
fn fail(failure: &watch::Sender<Option<Failure>>, what: Failure) {
    failure.send_if_modified(|known| known.is_none() && known.replace(what).is_none());
}

/// Tells what the node is, until it ends.
async fn watch_role(
    node: Arc<Node>,
    timings: Timings,
    role: watch::Sender<Role>,
    failure: watch::Sender<Option<Failure>>,
    ending: CancellationToken,
) {
    let watching = async {
        let raft = node.raft.wait().await;
        let mut metrics = raft.metrics();
        let mut learned = None;
        loop {
            let now = metrics.borrow_watched().clone();
            if let Err(fatal) = &now.running_state {
                // The disk's own words come first, if it was the disk.
                if node.writer.failed().borrow().is_none() {
                    fail(&failure, Failure::Raft(fatal.to_string()));
                }
                return;
            }
            if learned != *now.membership_config.log_id() {
                learned = *now.membership_config.log_id();
                let members = now.membership_config.nodes();
                node.dialer.book().learn(members.map(|(id, member)| (*id, member.peer.as_str())));
            }
            let is = role_of(&now, timings.election_max);
            role.send_if_modified(|was| {
                let changed = *was != is;
                *was = is;
                changed
            });
            // Without news too, since a leader that nobody answers hears nothing.
            tokio::select! {
                news = metrics.changed() => if news.is_err() { return },
                () = tokio::time::sleep(timings.heartbeat) => {}
            }
        }
    };
    ending.run_until_cancelled(watching).await;
    // Whoever took over is still worth knowing to those who are sent there; the last news may have come with the end.
    let last =
        node.raft.get().map(|raft| role_of(&raft.metrics().borrow_watched(), timings.election_max));
    role.send_replace(match last {
        Some(follower @ Role::Follower { .. }) => follower,
        Some(Role::Leader { .. }) | None => Role::Follower { leader: None },
    });
}

/// Says where a member is found, as one that leads.
fn found_in(metrics: &RaftMetrics<Types>, id: u64) -> Option<Leader> {
    let member = metrics.membership_config.get_node(&id)?;
    Some(Leader { node: NodeId(id), client: member.client.clone() })
}

fn role_of(metrics: &RaftMetrics<Types>, quorum_within: Duration) -> Role {
    let leader = metrics.current_leader;
    if leader != Some(metrics.id) {
        return Role::Follower { leader: leader.and_then(|id| found_in(metrics, id)) };
    }
    let term = metrics.vote.leader_id;
    let caught_up = metrics.state.is_leader()
        && metrics.vote.committed
        && metrics.last_applied.is_some_and(|applied| applied.leader_id == term);
    let alone = metrics.membership_config.voter_ids().nth(1).is_none();
    let answered = metrics
        .last_quorum_acked
        .is_some_and(|at| openraft::Instant::elapsed(&*at) <= quorum_within);
    if caught_up && (alone || answered) {
        Role::Leader { term: term.term }
    } else {
        Role::Follower { leader: None }
    }
}

/// Whenever this node leads a cluster that has no name in its state yet, gives it the one that its founders agreed on.
async fn name_cluster(node: Arc<Node>, mut role: watch::Receiver<Role>) {
    loop {
        if role.wait_for(|role| matches!(role, Role::Leader { .. })).await.is_err() {
            return;
        }
        let (raft, identity) =
            (node.raft.wait().await, node.known.get().expect("a leader is someone"));
        if node.shown.state().cluster.is_some() {
            return;
        }
        let nodes = raft
            .metrics()
            .borrow_watched()
            .membership_config
            .nodes()
            .map(|(id, _)| *id)
            .max()
            .unwrap_or(0);
        // Newer than whatever was founded here before: callers outlive a cluster whose disks were wiped.
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let incarnation =
            since_1970.map_or(1, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1));
        let id = identity.cluster;
        let command = Arc::new(Command::FoundCluster { id, nodes, incarnation });
        if let Err(error) = raft.client_write(command).await {
            tracing::debug!(%error, "The cluster is named by the next leader");
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }
}

/// Makes a snapshot, and drops the log that it covers, whenever the log has grown by too many bytes.
async fn keep_small(node: Arc<Node>, grown: Grown) {
    let raft = node.raft.wait().await;
    loop {
        grown.enough().await;
        let applied = raft.metrics().borrow_watched().last_applied;
        let made = async {
            raft.trigger().snapshot().await.ok()?;
            let wait = raft.wait(Some(SNAPSHOT_WITHIN));
            let metrics = wait.metrics(|now| now.snapshot >= applied, "a snapshot").await.ok()?;
            raft.trigger().purge_log(metrics.snapshot?.index).await.ok()
        };
        if made.await.is_none() {
            tracing::warn!("The log has grown, and no snapshot was made in time");
        }
    }
}

/// Hands the lead to whoever has most of the log, if this node has it.
async fn abdicate(raft: &Raft, within: Duration) {
    let deadline = Instant::now() + within;
    let metrics = raft.metrics().borrow_watched().clone();
    let known = metrics.replication.unwrap_or_default();
    let mut heirs: Vec<(Option<LogId>, u64)> = metrics
        .membership_config
        .voter_ids()
        .filter(|voter| *voter != metrics.id)
        .map(|voter| (known.get(&voter).copied().flatten(), voter))
        .collect();
    heirs.sort_unstable();
    while let Some((_, heir)) = heirs.pop() {
        let left = deadline.saturating_duration_since(Instant::now());
        if !raft.is_leader()
            || left.is_zero()
            || hand_over(raft, heir, left / (heirs.len() as u32 + 1)).await
        {
            return;
        }
    }
}

/// Hands the lead to `heir`, and says whether it took it in time.
async fn hand_over(raft: &Raft, heir: u64, within: Duration) -> bool {
    if raft.trigger().transfer_leader(heir).await.is_err() {
        return false;
    }
    let me = *raft.node_id();
    let wait = raft.wait(Some(within));
    wait.metrics(|now| now.current_leader.is_some_and(|leader| leader != me), "hand-over")
        .await
        .is_ok()
}

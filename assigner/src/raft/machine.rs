//! The state machine as openraft wants it: committed commands go into `core::State`, in order, and what they changed is
//! told to one listener.
//!
//! The state is shared by `Arc` behind a lock that is held while one command is applied. A reader takes the `Arc` and is
//! gone; only if one still holds the last state does applying the next command clone it (`Arc::make_mut`), so a state of
//! many jobs is not copied once a command.
//!
//! The listener is a function, called in the order of the log, from the one task that applies. It must be quick and must
//! not wait: it is the distributor's hub, which puts a delta into each watcher's single slot and is done. So there is no
//! queue between Raft and the hub that could grow.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use mandoline_core::assignment::Assignment;
use mandoline_core::command::Command;
use mandoline_core::delta::Delta;
use mandoline_core::flags::Flags;
use mandoline_core::name::JobName;
use mandoline_core::state::{Applied, Refused, State};
use mandoline_proto::pb;
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use prost::Message;
use tokio::sync::watch;

use crate::raft::disk::{Change, Disk, PART_BYTES, SNAPSHOT_FORMAT, check_snapshot};
use crate::raft::record::{self, Kind};
use crate::raft::types::{LogId, Payload, Snapshot, SnapshotMeta, StoredMembership, Types};
use crate::raft::wire::{self, Head};
use crate::raft::writer::Writer;

/// What the cluster has agreed on, in the order of the log.
#[derive(Clone, Debug)]
pub enum Event {
    /// A command that concerns a job was applied.
    Applied {
        /// Where it stands in the log.
        index: u64,
        /// What changed for watchers; nothing if only the spec or the stored loads did.
        delta: Option<Delta>,
        /// The job's assignment, as it is now.
        assignment: Arc<Assignment>,
    },
    /// The flags have changed.
    Flagged {
        /// As they are now.
        flags: Arc<Flags>,
    },
    /// Everything was replaced: the node has started from a snapshot, or was sent one since it was far behind.
    Installed {
        /// What there is now.
        state: Arc<State>,
    },
}

/// Hears of every event, in order. Called where commands are applied: it must be quick and must not wait.
pub type Listener = Box<dyn FnMut(Event) + Send>;

/// The state as of the newest command that this node has applied; cheap to clone, and shared with the machine.
#[derive(Clone, Debug)]
pub(crate) struct Shown(Arc<Mutex<Arc<State>>>);

impl Shown {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Arc::new(State::default()))))
    }

    pub(crate) fn state(&self) -> Arc<State> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Arc<State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state machine of one node.
pub(crate) struct Machine {
    shown: Shown,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// In a lock that is never taken, since openraft wants its state machine to be `Sync`.
    listener: Mutex<Listener>,
    progress: watch::Sender<Option<LogId>>,
    keeper: Keeper,
}

/// Puts snapshots on disk, and gets them back.
#[derive(Clone)]
pub(crate) struct Keeper {
    disk: Arc<Disk>,
    writer: Writer,
    /// The newest one on disk; also what keeps an older one from replacing it.
    head: Arc<tokio::sync::Mutex<Option<Head>>>,
}

impl Machine {
    /// Begins with nothing: openraft installs the snapshot and applies what was committed after it.
    pub(crate) fn new(shown: Shown, listener: Listener, keeper: Keeper) -> Self {
        let progress = watch::Sender::new(None);
        Self {
            shown,
            applied: None,
            membership: StoredMembership::default(),
            listener: Mutex::new(listener),
            progress,
            keeper,
        }
    }

    /// Follows the newest entry that was applied.
    pub(crate) fn progress(&self) -> watch::Receiver<Option<LogId>> {
        self.progress.subscribe()
    }

    fn tell(&mut self, event: Event) {
        (self.listener.get_mut().unwrap_or_else(PoisonError::into_inner))(event);
    }

    fn command(&mut self, index: u64, command: Arc<Command>) -> Result<Applied, Refused> {
        let job = job_of(&command).cloned();
        let command = Arc::unwrap_or_clone(command);
        let (result, assignment, flags) = {
            let mut state = self.shown.lock();
            let version = state.flags.version;
            let result = Arc::make_mut(&mut state).apply(command);
            let assignment =
                job.and_then(|job| state.jobs.get(&job).map(|job| job.assignment.clone()));
            let flags = (state.flags.version != version).then(|| Arc::clone(&state.flags));
            (result, assignment, flags)
        };
        if let Some(flags) = flags {
            self.tell(Event::Flagged { flags });
        }
        if let (Ok(Applied { delta, .. }), Some(assignment)) = (&result, assignment) {
            self.tell(Event::Applied { index, delta: delta.clone(), assignment });
        }
        result
    }
}

fn job_of(command: &Command) -> Option<&JobName> {
    match command {
        Command::FoundCluster { .. }
        | Command::MintNode
        | Command::Settle { .. }
        | Command::AddPause { .. }
        | Command::EndPause { .. }
        | Command::ClearPause { .. } => None,
        Command::ApplyJob { spec, .. } => Some(&spec.name),
        Command::Register { job, .. }
        | Command::Drain { job, .. }
        | Command::Undrain { job, .. }
        | Command::Forget { job, .. }
        | Command::End { job, .. }
        | Command::Change { job, .. }
        | Command::HandOff { job, .. }
        | Command::StoreLoads { job, .. }
        | Command::Freeze { job }
        | Command::Unfreeze { job }
        | Command::Pin { job, .. }
        | Command::Unpin { job, .. }
        | Command::BelieveLost { job, .. }
        | Command::Confine { job, .. }
        | Command::Unconfine { job, .. } => Some(job),
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let answer = match entry.payload {
                Payload::Blank => None,
                Payload::Normal(command) => Some(self.command(entry.log_id.index, command)),
                Payload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    None
                }
            };
            self.applied = Some(entry.log_id);
            self.progress.send_replace(self.applied);
            if let Some(responder) = responder {
                responder.send(answer);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let meta =
            SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() };
        Builder { meta, state: self.shown.state(), keeper: self.keeper.clone() }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Bytes) -> io::Result<()> {
        let state = tokio::task::spawn_blocking({
            let bytes = snapshot.clone();
            move || decode(&bytes)
        });
        let state = Arc::new(state.await.map_err(io::Error::other)??);
        self.keeper.keep(meta, snapshot).await?;
        *self.shown.lock() = state.clone();
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.progress.send_replace(self.applied);
        self.tell(Event::Installed { state });
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let disk = self.keeper.disk.clone();
        let found = tokio::task::spawn_blocking(move || disk.snapshot())
            .await
            .map_err(io::Error::other)??;
        Ok(found.map(|(head, snapshot)| Snapshot { meta: head.meta, snapshot }))
    }
}

/// Makes a snapshot of the state as it was when it was asked for.
pub(crate) struct Builder {
    meta: SnapshotMeta,
    state: Arc<State>,
    keeper: Keeper,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let state = self.state.clone();
        let encode = move || Bytes::from(pb::State::from(&*state).encode_to_vec());
        let snapshot = tokio::task::spawn_blocking(encode).await.map_err(io::Error::other)?;
        self.keeper.keep(&self.meta, snapshot.clone()).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot })
    }
}

impl Keeper {
    pub(crate) fn new(disk: Arc<Disk>, writer: Writer, head: Option<Head>) -> Self {
        Self { disk, writer, head: Arc::new(tokio::sync::Mutex::new(head)) }
    }

    /// Puts a snapshot on disk in place of the one before, unless that is as new.
    async fn keep(&self, meta: &SnapshotMeta, bytes: Bytes) -> io::Result<()> {
        let mut newest = self.head.lock().await;
        if newest.as_ref().is_some_and(|head| head.meta.last_log_id >= meta.last_log_id) {
            return Ok(());
        }
        let head = head_of(meta.clone(), &bytes);
        self.writer.written(change(&head, &bytes)).await?;
        *newest = Some(head);
        Ok(())
    }
}

/// Describes a snapshot.
pub(crate) fn head_of(meta: SnapshotMeta, bytes: &[u8]) -> Head {
    Head { format: SNAPSHOT_FORMAT, meta, length: bytes.len() as u64, checksum: record::sum(bytes) }
}

/// Says how a snapshot goes to disk.
pub(crate) fn change(head: &Head, bytes: &[u8]) -> Change {
    let part = |(number, part)| record::seal_bytes(Kind::SnapshotPart, number, part);
    let parts = (0_u64..).zip(bytes.chunks(PART_BYTES)).map(part).collect();
    Change::Snapshot {
        head: record::seal(Kind::SnapshotHead, 0, &wire::pb_head(head, None)),
        parts,
    }
}

/// Looks a snapshot through that came from a peer, so that a bad one is refused before it reaches Raft.
pub(crate) fn examine(head: &Head, bytes: &[u8]) -> Result<(), String> {
    if head.format != SNAPSHOT_FORMAT {
        return Err(format!(
            "it has format {}, and this version reads format {SNAPSHOT_FORMAT}",
            head.format
        ));
    }
    check_snapshot(head, bytes)?;
    decode(bytes).map(drop).map_err(|error| error.to_string())
}

fn decode(bytes: &[u8]) -> io::Result<State> {
    let bad = |error: String| {
        io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot: {error}"))
    };
    let wire = pb::State::decode(bytes).map_err(|error| bad(error.to_string()))?;
    State::try_from(wire).map_err(|error| bad(error.to_string()))
}

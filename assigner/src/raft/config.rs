//! What a node is told when it starts.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tonic::metadata::MetadataMap;
use tonic::transport::Endpoint;

use crate::raft::disk::Storage;
use crate::raft::types::Member;

/// What a node is told when it starts.
#[derive(Debug)]
pub struct Config {
    /// Where it keeps what it must not forget.
    pub storage: Storage,
    /// Where it is found.
    pub member: Member,
    /// What it does if it has nothing on disk. Once it has, the disk says who it is.
    pub first: FirstStart,
    /// How fast it is.
    pub timings: Timings,
    /// When it makes snapshots.
    pub snapshots: Snapshots,
    /// How it reaches its peers.
    pub transport: Transport,
}

/// What a node does that has nothing on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstStart {
    /// Founds a cluster of one: `--init`.
    Alone,
    /// Founds a cluster with these, itself among them: `--peers`, the same list in the same order for each. All must be up
    /// once; the first of them takes the lead in this.
    Together(Vec<Member>),
    /// Asks one of these peer addresses for a fresh id, and joins: `--join`.
    Join(Vec<String>),
    /// Stops with an error: nobody said what to do.
    Refuse,
}

/// How fast a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// How often a leader says that it is there.
    pub heartbeat: Duration,
    /// The least that a follower waits before it stands for election.
    pub election_min: Duration,
    /// The most; also how long a leader that no quorum answers goes on.
    pub election_max: Duration,
    /// How long a proposal may take before its sender is told that nobody knows.
    pub propose: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(300),
            election_max: Duration::from_millis(600),
            propose: Duration::from_secs(5),
        }
    }
}

/// When a node makes snapshots, and what it keeps of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshots {
    /// After so many entries: few enough to apply them again in a second or two.
    pub every: u64,
    /// So many entries stay in the log although a snapshot has them: a node that was away for a moment catches up by
    /// them, which is cheaper than a snapshot.
    pub keep: u64,
    /// Or after so many bytes, however few entries that are: the loads of a million slices weigh megabytes, and come once a
    /// minute. The log that such a snapshot covers goes at once.
    pub bytes: u64,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self { every: 5_000, keep: 1_000, bytes: 64 << 20 }
    }
}

type MakeEndpoint = dyn Fn(&str) -> Result<Endpoint, tonic::transport::Error> + Send + Sync;
type Sign = dyn Fn(&mut MetadataMap) + Send + Sync;

/// How a node reaches its peers.
#[derive(Clone)]
pub struct Transport {
    /// Makes the endpoint for a peer's `host:port`, with its scheme and TLS. Time-outs and keep-alive are set here.
    pub endpoint: Arc<MakeEndpoint>,
    /// Adds to each call what proves that it may be made, such as a join token.
    pub sign: Arc<Sign>,
}

impl Transport {
    /// Plain HTTP/2, for loopback.
    pub fn plain() -> Self {
        Self {
            endpoint: Arc::new(|address| Endpoint::from_shared(format!("http://{address}"))),
            sign: Arc::new(|_| ()),
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}

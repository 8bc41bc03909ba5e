//! How much to take at most.

use crate::config::error::ConfigError;

/// How much to take at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Client connections at a time, over all workers. One more gets a 503 and is closed.
    pub connections: usize,
    /// The head of a request or of an answer, in bytes. More gets a 431, or a 502 where a task sent it.
    pub header_bytes: usize,
    /// Header lines in a request or an answer. More gets a 431, or a 502 where a task sent it.
    pub headers: usize,
    /// Connections kept open to a task that have nothing to do, for each worker. More are closed.
    pub idle_per_task: usize,
    /// Requests held at a time, by pauses and while the slices of their keys are on their way to other tasks. One more gets a 503 at
    /// once; with 0 none is held.
    pub held_requests: usize,
    /// The same in bytes of heads and of bodies as far as they were read.
    pub held_bytes: usize,
    /// Requests that one pause holds at a time. Fewer than are held in all, so that a pause for one service leaves room for what others
    /// need.
    pub paused_requests: usize,
    /// The same in bytes.
    pub paused_bytes: usize,
    /// Request bodies kept for a second try, over all requests of a worker. Beyond it a body cannot be sent again.
    pub replay_bytes: usize,
    /// Request bodies that are read since they hold the key, over all requests of a worker. Where one more has no room it gets a 503.
    pub key_bytes: usize,
    /// How long a request's body may be. It is passed on as it comes, so a long one costs time and no memory; this is for the tasks' sake.
    pub body_bytes: u64,
    /// How many bytes of a body a client must bring in each second at least, over `timeouts.response`; with 0 a byte in that time is enough.
    /// For gRPC it does not count.
    pub body_rate: u64,
    /// Connections and streams that have switched to another protocol, or are about to, over all workers. One more gets a 503.
    pub tunnels: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            // What nginx takes (4 buffers of 8 KiB).
            header_bytes: 32 << 10,
            headers: HEADERS_USUAL,
            idle_per_task: 256,
            // A second's worth of 10,000 requests a second, and 6 KiB for each.
            held_requests: 10_000,
            held_bytes: 64 << 20,
            paused_requests: 8_000,
            paused_bytes: 48 << 20,
            replay_bytes: 64 << 20,
            key_bytes: 64 << 20,
            // What large content networks take of an upload unless told otherwise.
            body_bytes: 100 << 20,
            // Half of what Apache's mod_reqtimeout demands: no network in use is slower, and what trickles is ended in a minute.
            body_rate: 256,
            // Half of the client connections, for each has another one to its task. Streams of HTTP/2 could ask for many more.
            tunnels: 10_000,
        }
    }
}

impl Limits {
    /// Refuses those with which no proxy could work.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let Self {
            connections,
            header_bytes,
            headers,
            idle_per_task,
            held_requests,
            held_bytes: _,
            paused_requests,
            paused_bytes: _,
            replay_bytes: _,
            key_bytes,
            body_bytes: _,
            body_rate: _,
            tunnels,
        } = *self;
        let limits = [
            ("connections", connections, 1, 1_000_000),
            // hyper's smallest buffer is 8 KiB, and a key alone may have 8 KiB.
            ("header_bytes", header_bytes, 8 << 10, 1 << 20),
            ("headers", headers, 1, 10_000),
            ("idle_per_task", idle_per_task, 0, 100_000),
            ("held_requests", held_requests, 0, 1_000_000),
            ("paused_requests", paused_requests, 0, 1_000_000),
            ("key_bytes", key_bytes, KEY_BODY_MAX_BYTES, usize::MAX),
            ("tunnels", tunnels, 0, 1_000_000),
        ];
        for (name, value, least, most) in limits {
            check_range(name, value, least, most)?;
        }
        Ok(())
    }
}

/// Refuses a number with which no proxy could work.
pub(super) fn check_range(
    name: &'static str,
    value: usize,
    least: usize,
    most: usize,
) -> Result<(), ConfigError> {
    if !(least..=most).contains(&value) {
        return Err(ConfigError::Limit { name, value, least, most });
    }
    Ok(())
}

/// The longest body that is read to find a key: it has to be kept until its end has come.
pub(crate) const KEY_BODY_MAX_BYTES: usize = 64 << 10;

/// So many header lines are taken unless something else is said. It is hyper's own limit, too, which costs it less than any other:
/// with another it makes room for them anew with each head.
pub(crate) const HEADERS_USUAL: usize = 100;

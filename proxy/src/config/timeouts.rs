//! How long to wait for what.

use std::time::Duration;

use crate::config::error::ConfigError;

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a task to accept a connection. A second: within one data centre it takes a millisecond, or a lost packet's
    /// first retransmission (1 s) has shown that something is wrong.
    pub connect: Duration,
    /// For a client to finish the head of a request that it has begun.
    pub header: Duration,
    /// For a client to begin a request on a connection that it keeps. Longer than what common clients keep one for.
    pub client_idle: Duration,
    /// For a task to begin its answer, counted anew whenever a piece of the request's body gets through.
    pub response: Duration,
    /// For the next piece of an answer, and for a client to take what it was sent. Long, since a stream of events may have
    /// nothing to say for minutes.
    pub stall: Duration,
    /// How long a connection to a task is kept for the next request. Below the 5 s after which Node closes its end, the
    /// shortest common default: closing first means never sending into a connection that is being closed.
    pub idle: Duration,
    /// How long a request is held at most, in all, while the slice of its key is on its way to another task. Several
    /// times the default lease (5 s), after which such a slice has an owner again; about as long as callers wait.
    pub hold: Duration,
    /// How long a request is held at most by pauses, all together. Longer than pauses for maintenance last, for clients that give up
    /// are noticed by themselves; without it one that never does would be held for as long as a pause may last, an hour.
    pub pause: Duration,
    /// For either side of a tunnel to say something. Several times what applications that keep a WebSocket wait between two pings, some
    /// 30 s, and shorter than what routers remember a silent connection for.
    pub tunnel: Duration,
    /// For requests in flight to finish once the proxy is told to stop.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(1),
            header: Duration::from_secs(10),
            client_idle: Duration::from_secs(75),
            response: Duration::from_secs(60),
            stall: Duration::from_secs(300),
            idle: Duration::from_secs(4),
            hold: Duration::from_secs(30),
            pause: Duration::from_secs(300),
            tunnel: Duration::from_secs(300),
            grace: Duration::from_secs(10),
        }
    }
}

impl Timeouts {
    /// Refuses those with which no proxy could work.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let Self {
            connect,
            header,
            client_idle,
            response,
            stall,
            idle,
            hold,
            pause,
            tunnel,
            grace: _,
        } = *self;
        let timeouts = [
            ("connect", connect),
            ("header", header),
            ("client_idle", client_idle),
            ("response", response),
            ("stall", stall),
            ("idle", idle),
            ("hold", hold),
            ("pause", pause),
            ("tunnel", tunnel),
        ];
        for (name, length) in timeouts {
            check_timeout(name, length)?;
        }
        Ok(())
    }
}

/// Refuses a time-out with which no proxy could work.
pub(super) fn check_timeout(name: &'static str, length: Duration) -> Result<(), ConfigError> {
    if length.is_zero() || length > TIMEOUT_MAX {
        return Err(ConfigError::Timeout { name, length });
    }
    Ok(())
}

/// The longest time-out: a day, since nobody waits longer and clocks overflow somewhere.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

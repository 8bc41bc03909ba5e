//! One request of a recorded or made-up load: when, which key, how dear, how big.

use std::time::Duration;

/// The highest cost that one request may claim: what a slicelet counts for one request at most.
pub const WEIGHT_MAX: u64 = 1_000_000;

/// A request for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, since the first event.
    pub at: Duration,
    /// Which key, as text.
    pub key: Box<str>,
    /// What it costs whoever serves it: 1 is an ordinary request.
    pub weight: u64,
    /// How big the value is, where the source says.
    pub bytes: Option<u64>,
}

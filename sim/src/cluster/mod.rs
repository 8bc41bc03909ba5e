//! A whole cluster on a virtual clock over a bad network, made of the machines that the product is made of.
//!
//! `core::state::State`, `core::leader::Leader`, `core::lease::Holder` and `core::watch::Watcher` are the real ones; what stands here is what surrounds them: the
//! shells that carry messages to them and do what they say, a network, clocks, a log that keeps its contract and no more
//! (`log.rs`), and what goes wrong. Whoever runs a seed twice gets the same twice, to the byte.

pub mod clock;
pub mod queue;
pub mod network;
pub mod log;
pub mod scenario;
pub mod flaw;
pub mod tally;
pub mod trace;
pub mod data;
pub mod wire;
pub mod load;
pub mod chronicle;
mod tamper;
pub mod ground;
pub mod assigner;
pub mod dialer;
pub mod work;
pub mod task;
pub mod clerk;
pub mod store;
pub mod faults;
pub mod world;
pub mod sweep;

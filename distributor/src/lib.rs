//! Serves assignments to watchers, and follows whoever knows them.
//!
//! `hub` holds what is known and hands each watcher everything once and what changed after, encoded once for all; `serve`
//! puts a hub on the wire; `follow` keeps up with an upstream. Alone the three are a fan-out tier; inside an assigner the
//! hub serves clients, inside a slicelet or a proxy it serves peers.

pub mod hub;
pub mod serve;
pub mod clock;
pub mod connect;
pub mod follow;
#[cfg(test)]
mod testing;

//! Serves assignments to watchers, and follows whoever knows them.
//!
//! `hub` holds what is known and hands each watcher everything once and what changed after, encoded once for all; `serve`
//! puts a hub on the wire; `follow` keeps up with an upstream, and so does `follow_flags` for what all jobs share. Alone they are a
//! fan-out tier; inside an assigner the hub serves clients, inside a slicelet or a proxy it serves peers.

pub mod hub;
pub mod serve;
pub mod clock;
pub mod connect;
pub mod follow;
pub mod follow_flags;
#[cfg(test)]
mod testing;

//! The replicated control plane of Mandoline: decides who serves what.
//!
//! The shell round `core`'s leader: `raft` agrees on its decisions, `node` runs its loop, `api` answers tasks and operators,
//! and `assigner` puts one node together. Read downward: a module uses only what stands above it.

pub mod config;
pub mod metrics;
pub mod raft;
pub mod access;
pub mod sessions;
pub mod node;
pub mod api;
pub mod http;
pub mod server;
pub mod assigner;

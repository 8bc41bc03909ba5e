//! The replicated control plane of Mandoline: decides who serves what.

pub mod raft;

//! Mandoline's decisions on a virtual clock, and the load to try them on: real traces, access logs, synthetic keys.
//!
//! Pure and synchronous: it reads files and nothing else of the world. `mandoline dev` drives a running system with the
//! same events. Modules are listed in order of use: a module uses only what stands above it.

#[cfg(test)]
mod real;
pub mod event;
pub mod spread;
pub mod trace;
pub mod access_log;
mod zstd;
pub mod lines;
pub mod replay;
pub mod workload;
pub mod service;
pub mod percentile;
pub mod rehearsal;
pub mod interval;
pub mod synthetic;
pub mod fleet;
pub mod layout;
pub mod requests;
pub mod policy;
pub mod scenario;
pub mod contest;
pub mod field;
pub mod sensitivity;
pub mod advise;
pub mod chaos;
pub mod check;
pub mod cluster;

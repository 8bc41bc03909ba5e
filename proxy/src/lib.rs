//! The L7 proxy of Mandoline: sends each request to the task that owns its key.
//!
//! HTTP/1.1 on hyper, one single-threaded runtime per core, nothing shared between cores on a request's path but the
//! assignment. A request runs through named stages, in this order and in one function, `serve::serve`:
//!
//! ```text
//! listen -> identify -> key -> pause -> route -> forward -> observe
//! ```

pub mod record;
pub mod config;
pub mod metrics;
mod wire;
mod refusal;
mod upload;
mod pool;
pub mod route;
mod pause;
mod worker;
mod exchange;
mod download;
mod identify;
mod forward;
mod serve;
pub mod dry_run;
mod listen;
mod admin;
pub mod proxy;

#[cfg(test)]
mod tests;

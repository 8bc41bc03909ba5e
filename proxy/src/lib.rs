//! The L7 proxy of Mandoline: sends each request to the task that owns its key.
//!
//! HTTP/1.1 on hyper, one single-threaded runtime per core, nothing shared between cores on a request's path but the
//! assignment. A request runs through named stages, in this order and in one function, `serve::serve`:
//!
//! ```text
//! listen -> identify -> admit -> key -> pause -> route -> forward -> observe
//! ```

pub mod record;
pub mod access_log;
pub mod trace;
pub mod servers;
mod seldom;
pub mod look;
pub mod lookup;
pub mod metrics;
mod stream;
mod send;
mod wire;
mod trailers;
mod refusal;
mod room;
mod permit;
mod upload;
pub mod router;
pub mod config;
pub mod tls;
mod pool;
pub mod probe;
pub mod tables;
mod target;
mod hold;
mod client;
mod chain;
mod upgrade;
mod rules;
mod job;
mod setup;
mod worker;
mod observe;
mod tunnel;
mod passage;
mod identify;
mod admit;
mod key;
mod pause;
mod route;
mod forward;
mod download;
mod serve;
pub mod dry_run;
pub mod ask;
mod proxy_protocol;
mod connection;
mod listen;
pub mod sockets;
pub mod handover;
pub mod reload;
pub mod pauses;
mod page;
mod admin;
pub mod proxy;

#[cfg(test)]
mod tests;

//! The proxy as clients and tasks see it: real sockets, real hyper tasks, and raw bytes where framing is the question.

mod harness;
mod reloads;
mod routing;
mod observing;
mod tracing;
mod framing;
mod corpus;
mod bodies;
mod tries;
mod headers;
mod holds;
mod pauses;
mod moves;
mod handovers;
mod spills;
mod regions;
mod limits;
mod keys;
mod lookups;
#[cfg(feature = "postgres")]
mod postgres;
mod life;
mod take_overs;
mod http2;
mod tls;
mod proxy_protocol;
mod unix;
mod http2_tasks;
mod grpc;
mod tls_tasks;
mod tunnels;
mod chains;

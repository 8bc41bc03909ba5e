//! Routing in programs that speak HTTP or gRPC, on either side of a request.
//!
//! | who | what | does |
//! |---|---|---|
//! | a gRPC client | [`channel::Channel`] | sends each call to its key's owner; a drop-in for tonic's own channel |
//! | an HTTP client | [`route::RouteLayer`] | the same round any HTTP client that is a `tower::Service` |
//! | a server | [`own::OwnLayer`] | refuses what another task owns, and says who does |
//! | a server | [`load::LoadLayer`] | counts what requests cost, for the task's report |
//! | a server that forwards | [`backhaul::BackhaulLayer`] | serves what is its own and sends the rest to its owner |
//!
//! All find the key by the same [`key::KeyFrom`], and refuse and understand refusals by the same [`refused::Refused`].

pub mod names;
#[cfg(feature = "json")]
mod json;
pub mod key;
pub mod refused;
pub mod replay;
mod budget;
mod deadline;
pub mod verdict;
pub mod route;
pub mod channel;
pub mod load;
pub mod own;
pub mod backhaul;

#[cfg(test)]
mod tests;

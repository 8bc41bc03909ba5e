//! The integration tests: the real thing, as users run it.
// Helpers of tests are tests: what cannot fail may be unwrapped.
#![allow(clippy::unwrap_used)]

mod kit;
mod slips;
mod examples;
mod dev;
mod cluster;
mod outage;
mod bad_calls;
mod secure;

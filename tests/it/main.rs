//! The integration tests: the real thing, as users run it.

mod kit;
mod slips;
mod dev;
mod cluster;

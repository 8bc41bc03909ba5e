//! Every number the proxy keeps, by name. Each worker counts for itself, in cells that others may read; they are added up when
//! someone asks, and written in the form that Prometheus reads.

pub mod stats;
pub(crate) mod names;
pub(crate) mod counters;
pub mod tally;
mod encode;

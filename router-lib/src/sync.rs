//! The atomics that `gate` is built from, by a path of ours, so that `tests/gate.rs` can put loom's in their place.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

//! Looks up which task owns a key, in nanoseconds, and tells a task what it owns.

pub mod snapshot;
mod cache;
pub mod clerk;
mod counters;
mod owned;
mod dialer;
mod session;
pub mod slicelet;

pub use clerk::{Clerk, Router};
pub use mandoline_core::assignment::Assignment;
pub use mandoline_core::generation::Generation;
pub use mandoline_core::key::SliceKey;
pub use mandoline_core::name::{JobName, TaskName};
pub use mandoline_core::slice::Slice;
pub use mandoline_core::task::{Address, SessionId, Task};
pub use mandoline_distributor::connect::Connector;
pub use mandoline_distributor::hub::Hub;
pub use mandoline_distributor::serve::WatchService;
pub use snapshot::{NoTask, Target};

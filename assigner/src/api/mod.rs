//! What a node answers: to tasks, to proxies, and to operators. Watchers are answered by the distributor.

pub mod task;
pub mod proxies;
pub mod admin;
pub mod gate;
pub mod feed;

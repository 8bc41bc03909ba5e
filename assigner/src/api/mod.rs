//! What a node answers: to tasks, and to operators. Watchers are answered by the distributor.

pub mod task;
pub mod admin;
pub mod gate;
pub mod feed;

//! Keys that an operator nailed to a task by hand.

use crate::name::TaskName;
use crate::slice::Slice;

/// The most pins of a job: what people put there by hand, and no second assignment.
pub const PINS_MAX: usize = 1_000;

/// Keys that one task serves, whatever the load. By the task's name, so that it holds over restarts; while no task has that
/// name, the keys live wherever they would without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Which keys.
    pub slice: Slice,
    /// Which task.
    pub task: TaskName,
}

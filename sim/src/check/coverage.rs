//! The whole key space is covered: in every assignment that anyone holds each key lies in one slice, and each slice names
//! tasks that are there, each once.

use mandoline_core::key::SliceKey;
use mandoline_core::time::Time;

use crate::check::{Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "coverage";

/// The whole key space is covered.
#[derive(Debug, Default)]
pub struct Coverage;

impl Coverage {
    /// Looks at each assignment that anyone holds.
    pub fn see(&mut self, _at: Time, seen: &Seen<'_>) -> Verdict {
        let Seen::Holds { who, assignment } = seen else { return Ok(()) };
        let mut next = Some(SliceKey::MIN);
        for (slice, _) in assignment.slices.iter() {
            if next != Some(slice.first()) {
                return Err((format!("process {who} has a gap or an overlap"), Some(slice)));
            }
            next = slice.last().next();
        }
        if next.is_some() {
            return Err((format!("process {who} has nothing for the last keys"), None));
        }
        match assignment.broken_slice() {
            Some(slice) => Err((format!("process {who} has a slice that is broken"), Some(slice))),
            None => Ok(()),
        }
    }
}

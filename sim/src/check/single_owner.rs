//! Never two owners: at no instant do two tasks both believe that they own a key, each by its own word on its own clock.
//!
//! Belief only begins when a task hears something; it ends by itself. So two beliefs that overlap in time are both there at
//! the moment when the later one begins, and that is when this looks.

use mandoline_core::time::Time;

use crate::check::{Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "single_owner";

/// Never two owners.
#[derive(Debug, Default)]
pub struct SingleOwner;

impl SingleOwner {
    /// Looks at what a task believes whenever it may believe more than before.
    pub fn see(&mut self, _at: Time, seen: &Seen<'_>) -> Verdict {
        let Seen::Believes { who, slices, others } = seen else { return Ok(()) };
        for (other, theirs) in *others {
            for slice in *slices {
                if let Some(both) = theirs.iter().find_map(|their| their.overlap(*slice)) {
                    let message = format!("processes {who} and {other} both believe that they own");
                    return Err((message, Some(both)));
                }
            }
        }
        Ok(())
    }
}

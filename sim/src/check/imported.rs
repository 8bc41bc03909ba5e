//! Imported state belongs to the hand-off that is in force: what a new owner begins with came by the very hand-off that
//! brought the slice, and is what the old owner had when it let go.

use std::collections::BTreeMap;

use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;

use crate::check::{Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "imported";
/// How many are remembered: nobody opens a slice by one that is older.
const KEPT: usize = 512;

/// What was let go of.
#[derive(Debug, Default)]
pub struct Imported(BTreeMap<HandOffId, u64>);

impl Imported {
    /// Looks at each slice that comes with state.
    pub fn see(&mut self, _at: Time, seen: &Seen<'_>) -> Verdict {
        match seen {
            Seen::LetGo { id, checksum, .. } => {
                self.0.insert(*id, *checksum);
                if self.0.len() > KEPT {
                    self.0.pop_first();
                }
            }
            Seen::Resumed { id, .. } => {
                self.0.remove(id);
            }
            Seen::Opened { who, slice, since, import: Some((id, checksum)) } => {
                let by_it = id.began == *since && id.first == slice.first();
                let message = match self.0.get(id) {
                    _ if !by_it => {
                        format!("process {who} begins with state of {id}, another hand-off")
                    }
                    None => {
                        format!("process {who} begins with state of {id}, which nobody let go by")
                    }
                    Some(known) if known != checksum => {
                        format!("process {who} begins with state of {id} that changed since")
                    }
                    Some(_) => return Ok(()),
                };
                return Err((message, Some(*slice)));
            }
            _ => {}
        }
        Ok(())
    }
}

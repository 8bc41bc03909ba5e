//! Watchers converge: some time after the last fault, whoever watches holds the newest assignment, and all hold the same.

use std::sync::Arc;
use std::time::Duration;

use mandoline_core::assignment::Assignment;
use mandoline_core::time::Time;

use crate::check::{Look, Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "convergence";
/// How long a watcher may hold something that is not the newest, once all is well: a longest pause of five seconds,
/// thirty with a peer that may be cut off, and the half-open streams that linger.
pub const BOUND: Duration = Duration::from_secs(60);
/// How far behind the newest a watcher may be at any one moment: what is on its way right now.
const ON_ITS_WAY: u64 = 8;

/// Watchers converge.
#[derive(Debug, Default)]
pub struct Convergence {
    calm: Option<Time>,
}

impl Convergence {
    /// Looks at what everyone holds once the bound has passed.
    pub fn see(&mut self, at: Time, seen: &Seen<'_>) -> Verdict {
        match seen {
            Seen::Calm { .. } => self.calm = Some(at),
            Seen::Look(look) if self.calm.is_some_and(|calm| at.since(calm) >= BOUND) => {
                return agree(look);
            }
            _ => {}
        }
        Ok(())
    }
}

fn agree(look: &Look) -> Verdict {
    let newest = look.holds.iter().filter_map(|(_, held)| held.as_ref());
    let Some(newest) = newest.max_by_key(|held| held.generation) else { return Ok(()) };
    for (who, held) in &look.holds {
        let behind = |held: &Arc<Assignment>| {
            held.generation.incarnation < newest.generation.incarnation
                || held.generation.number + ON_ITS_WAY < newest.generation.number
        };
        if held.as_ref().is_none_or(behind) {
            let held =
                held.as_ref().map_or_else(|| "nothing".to_owned(), |h| h.generation.to_string());
            let message = format!("process {who} still holds {held}, not {}", newest.generation);
            return Err((message, None));
        }
    }
    Ok(())
}

//! Keeps every task within a band round the mean, and moves as little as it can.
//!
//! `plan` is one pure function: the same round gives the same plan in the assigner, in the simulator and in a replay. It
//! reads as its list of phases, each in a file of its own, all of one shape: look at the draft, edit it. Emergencies (a
//! slice that nobody serves, a task that leaves) are always met; what merely evens out load spends a churn budget.

mod round;
mod draft;
mod split;
mod place;
mod evict;
mod replicate;
mod shed;
mod fill;
mod merge;

use crate::plan::Plan;

pub use round::{Policy, Round};

/// Decides what to change for a round.
pub fn plan(round: &Round) -> Plan {
    let mut draft = draft::Draft::new(round);
    split::split(&mut draft); // so that there is something to move
    place::place(&mut draft); // what nobody serves, or too few
    evict::evict(&mut draft); // what a leaving task still serves
    replicate::replicate(&mut draft); // what one task cannot carry
    shed::shed(&mut draft); // what a hot task has too much
    fill::fill(&mut draft); // what a cold task has too little
    merge::merge(&mut draft); // what need not be apart
    draft.into_plan()
}

#[cfg(test)]
mod tests;

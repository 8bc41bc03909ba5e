//! Keeps every task within a band round the mean, and moves as little as it can.
//!
//! `plan` is one pure function: the same round gives the same plan in the assigner, in the simulator and in a replay. It
//! reads as its list of phases, each in a file of its own, all of one shape: look at the draft, edit it. Emergencies (a
//! slice that nobody serves, a task that leaves) are always met; what merely evens out load spends a churn budget.

mod round;
mod tuning;
mod meter;
mod band;
mod holder;
mod draft;
mod isolate;
mod split;
mod pin;
mod confine;
mod place;
mod replicate;
mod give;
mod displace;
mod shed;
mod fill;
mod merge;

use crate::plan::Plan;

pub use round::{Further, InFlight, Policy, Round};
pub use tuning::Tuning;

/// Decides what to change for a round.
pub fn plan(round: &Round) -> Plan {
    plan_with(round, &Tuning::STANDARD)
}

/// Decides with other constants than the standard ones, for studies of what they are worth.
pub fn plan_with(round: &Round, tuning: &Tuning) -> Plan {
    let mut draft = draft::Draft::new(round, tuning);
    isolate::isolate(&mut draft); // hot keys become slices of their own
    split::split(&mut draft); // so that there is something to move
    pin::pin(&mut draft); // what the operator put somewhere
    confine::confine(&mut draft); // what crashes whoever serves it
    place::place(&mut draft); // what nobody serves, or too few, or who leaves
    replicate::replicate(&mut draft); // what one task cannot carry, or need not share
    shed::shed(&mut draft); // what a hot task has too much
    fill::fill(&mut draft); // what a cold task has too little
    merge::merge(&mut draft); // what need not be apart
    draft.into_plan()
}

#[cfg(test)]
mod tests;

//! What commands do to the state, a thought a file.

mod sessions;
mod plans;
mod specs;
mod pins;
mod cluster;
mod transcript;
mod handoffs;
mod restore;
mod flags;
mod chance;

use super::*;
use crate::assignment::{Assigned, Assignment, Replica};
use crate::command::EndReason;
use crate::key::SliceKey;
use crate::load::Load;
use crate::pin::{PINS_MAX, Pin};
use crate::plan::{Edit, Move, Plan, Reason};
use crate::spec::{Band, Ratio, Spill};
use crate::transit::{Step, Transit};

fn kv() -> JobName {
    "kv".parse().unwrap()
}

fn info(name: &str, incarnation: u64, port: u16) -> TaskInfo {
    TaskInfo::new(name.parse().unwrap(), incarnation, format!("h:{port}").parse().unwrap())
}

fn with_job() -> State {
    let mut state = State::default();
    let spec = JobSpec::new(kv());
    state.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
    state
}

fn register(state: &mut State, info: TaskInfo) -> Result<SessionId, Refused> {
    let applied = state.apply(Command::Register { job: kv(), info, stopped: None })?;
    let Outcome::Session(session) = applied.outcome else { panic!("{applied:?}") };
    Ok(session)
}

fn give_all(state: &mut State, to: SessionId) -> Result<Applied, Refused> {
    let base = state.jobs[&kv()].assignment.generation;
    let none = Load::ZERO;
    let (slice, reason) = (Slice::FULL, Reason::First);
    let step =
        Move { slice, from: None, to: Some(to), reason, load: none, before: none, after: none };
    let even = Ratio::from_millionths(1_000_000);
    let plan = Plan { base, edits: vec![Edit::Move(step)], imbalance: (even, even), total: none };
    state.apply(Command::Change { job: kv(), plan })
}

/// Applies a command that must be refused, and checks that it left everything as it was.
fn refuse(state: &mut State, command: Command) -> Refused {
    let before = state.clone();
    let refused = state.apply(command).unwrap_err();
    assert_eq!(*state, before);
    refused
}

//! What every node does wrong when it applies a command, for the flaws that lie there: all alike, as a bug in `State::apply`
//! would have it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mandoline_core::assignment::{Assigned, Assignment, Replica};
use mandoline_core::command::Command;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::state::Job;
use mandoline_core::transit::{Act, HandOffId, Step, Transit};

/// Every so many generations one is given to two assignments.
const TWICE_EVERY: u64 = 40;

/// Gives a generation a second time.
pub(in crate::cluster) fn generation_twice(job: &mut Job, before: Option<&Assignment>) {
    let Some(before) = before.map(|before| before.generation) else { return };
    if job.assignment.generation == before.next() && before.number % TWICE_EVERY == 0 {
        Arc::make_mut(&mut job.assignment).generation = before;
    }
}

/// Splits a slice that is being released, in the middle.
pub(in crate::cluster) fn split_while_releasing(job: &mut Job) {
    let releasing = |assigned: &Assigned| {
        assigned.transit.as_deref().is_some_and(|transit| transit.step == Step::Releasing)
    };
    let slices = &job.assignment.slices;
    let wide = |slice: &Slice| slice.width() > 1 << 40;
    let Some((slice, _)) =
        slices.iter().find(|(slice, assigned)| releasing(assigned) && wide(slice))
    else {
        return;
    };
    let middle = slice.first().0 + (slice.last().0 - slice.first().0) / 2;
    let assignment = Arc::make_mut(&mut job.assignment);
    assignment.slices.split(SliceKey(middle));
    assignment.generation = assignment.generation.next();
}

/// Lets an acknowledgement count though its hand-off was called off.
pub(in crate::cluster) fn acknowledged_after_abort(
    job: &mut Job,
    command: &Command,
    aborted: &mut BTreeMap<HandOffId, Transit>,
    before: Option<&Assignment>,
) {
    if let Command::HandOff { steps, .. } = command {
        for (id, act) in steps {
            let Some(transit) = aborted.get(id).filter(|_| matches!(act, Act::Acknowledged { .. }))
            else {
                continue;
            };
            switch(job, transit);
        }
    }
    // What was on its way and stays where it was has been called off.
    let Some(before) = before else { return };
    for (slice, was) in before.slices.iter() {
        let Some(transit) = was.transit.as_deref() else { continue };
        let now = job.assignment.get(slice.first()).1;
        if now.transit.is_none() && now.replicas == was.replicas {
            aborted.insert(transit.id, *transit);
        }
    }
}

fn switch(job: &mut Job, transit: &Transit) {
    let now = job.assignment.generation.next();
    let (slice, assigned) = job.assignment.get(transit.id.first);
    let lives = job.assignment.tasks.contains_key(&transit.to);
    let to = Replica { session: transit.to, since: transit.id.began };
    let Some(replicas) = assigned.replicas.moved(transit.from, Some(to)).filter(|_| lives) else {
        return;
    };
    let assigned = Assigned { replicas, token: now, transit: None, load: assigned.load };
    let assignment = Arc::make_mut(&mut job.assignment);
    assignment.slices.set(slice, assigned);
    assignment.generation = now;
}

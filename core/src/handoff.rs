//! What the leader does about slices in transit: takes each hand-off a step further when it is time.
//!
//! The state says which hand-offs there are and how far they are; only how long that has been so, and who said that it is done,
//! is known here. So a new leader starts each deadline anew, and hears again from the tasks what they had said
//! (`docs/protocol.md`, section 3). At most one command for a job's hand-offs is under way: what becomes due meanwhile goes
//! into the next, so that a thousand slices of a task that leaves are not a thousand generations.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::assignment::Assignment;
use crate::command::Command;
use crate::lease::Margin;
use crate::name::JobName;
use crate::task::{Phase, SessionId};
use crate::time::Time;
use crate::transit::{Act, HandOffId, Step, Transit};

/// The most steps of one command, far below the 4 MiB of a message.
const STEPS_MAX: usize = 10_000;

/// The hand-offs of one job.
#[derive(Clone, Debug, Default)]
pub(crate) struct HandOffs {
    seen: BTreeMap<HandOffId, Seen>,
    /// What was proposed and has neither been applied nor failed.
    proposed: Vec<(HandOffId, Act)>,
    /// When to propose again, after that came to nothing.
    again: Option<Time>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    transit: Transit,
    exclusive: bool,
    /// When this step is over, whoever has not done his part.
    deadline: Time,
    /// What its task said.
    due: Option<Act>,
}

impl HandOffs {
    /// Brings what is known in line with the assignment. Preparing may take so long; releasing until the right to the slice has
    /// surely ended: a lease from when this leader first saw it, which is no earlier than it began or than the release was
    /// applied.
    pub(crate) fn sync(
        &mut self,
        now: Time,
        assignment: &Assignment,
        prepare: Duration,
        margin: Margin,
    ) {
        let mut old = std::mem::take(&mut self.seen);
        for (_, assigned) in assignment.slices.iter() {
            let Some(transit) = assigned.transit.as_deref().copied() else { continue };
            let known = old.remove(&transit.id).filter(|seen| seen.transit.step == transit.step);
            let deadline = match transit.step {
                Step::Preparing => now + prepare,
                Step::Releasing => {
                    let from = transit.from.and_then(|from| assignment.tasks.get(&from)?.lease);
                    now + margin.waited(from.unwrap_or_default())
                }
            };
            let exclusive = assigned.replicas.is_exclusive();
            let mut seen = known.unwrap_or(Seen { transit, exclusive, deadline, due: None });
            let leaves = |task: SessionId| {
                assignment.tasks.get(&task).is_none_or(|task| task.phase == Phase::Draining)
            };
            if leaves(transit.to) {
                seen.due = Some(Act::Abort);
            }
            self.seen.insert(transit.id, seen);
        }
        let Self { seen, proposed, .. } = self;
        // A step that was applied has changed its hand-off.
        proposed.retain(|(id, act)| seen.get(id).is_some_and(|seen| seen.fits(*act)));
    }

    /// Whoever takes a slice says that it is ready.
    pub(crate) fn ready(&mut self, session: SessionId, id: HandOffId) {
        if let Some(seen) = self.seen.get_mut(&id)
            && seen.transit.to == session
            && seen.transit.step == Step::Preparing
        {
            let next = seen.next();
            seen.due.get_or_insert(next);
        }
    }

    /// Whoever had a slice says that it has let go. Of another hand-off, another task or another step: stale, and ignored.
    pub(crate) fn acknowledged(&mut self, session: SessionId, id: HandOffId) {
        if let Some(seen) = self.seen.get_mut(&id)
            && seen.transit.from == Some(session)
            && seen.transit.step == Step::Releasing
        {
            seen.due.get_or_insert(Act::Acknowledged { by: session });
        }
    }

    /// What was proposed came to nothing, or nobody knows: what is still due is proposed again then, and no sooner.
    pub(crate) fn failed(&mut self, again: Time) {
        self.proposed.clear();
        self.again = Some(again);
    }

    /// Says what to propose now, if something is due and nothing under way. Nothing goes to a task that is away: by its time
    /// that hand-off is called off, so that who has the slice keeps it, or has it back, rather than nobody serving it.
    pub(crate) fn propose(
        &mut self,
        now: Time,
        job: &JobName,
        is_away: impl Fn(SessionId) -> bool,
    ) -> Option<Command> {
        if !self.proposed.is_empty() || self.again.is_some_and(|again| now < again) {
            return None;
        }
        self.again = None;
        let due = self.seen.iter().filter_map(|(id, seen)| {
            let act = seen.act(now)?;
            Some((*id, if is_away(seen.transit.to) { Act::Abort } else { act }))
        });
        self.proposed = due.take(STEPS_MAX).collect();
        let (job, steps) = (job.clone(), self.proposed.clone());
        (!steps.is_empty()).then_some(Command::HandOff { job, steps })
    }

    /// Says when to look in next.
    pub(crate) fn deadline(&self) -> Option<Time> {
        if !self.proposed.is_empty() {
            return None;
        }
        let next = self.seen.values().map(Seen::acts_at).min()?;
        Some(self.again.map_or(next, |again| next.max(again)))
    }

    /// Says whether anything is in transit.
    pub(crate) fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

impl Seen {
    /// What comes after preparing.
    const fn next(&self) -> Act {
        if self.exclusive { Act::Release } else { Act::Switch }
    }

    /// When something is due: at once where its task has said so.
    fn acts_at(&self) -> Time {
        if self.due.is_some() { Time::ZERO } else { self.deadline }
    }

    fn act(&self, now: Time) -> Option<Act> {
        self.due.or_else(|| {
            (self.deadline <= now).then(|| match self.transit.step {
                Step::Preparing => self.next(),
                Step::Releasing => Act::Lapsed,
            })
        })
    }

    /// Says whether an act can still happen to it.
    fn fits(&self, act: Act) -> bool {
        match act {
            Act::Abort => true,
            Act::Release | Act::Switch => self.transit.step == Step::Preparing,
            Act::Acknowledged { .. } | Act::Lapsed => self.transit.step == Step::Releasing,
        }
    }
}

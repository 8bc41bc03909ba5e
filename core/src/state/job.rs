//! What the cluster has agreed on about one job: its tasks, who serves what, what is on its way, what an operator said.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::assignment::{Assigned, Assignment, Replica};
use crate::confine::{CONFINED_MAX, CRASHES_MAX, Confined, Crash};
use crate::delta::{Delta, TaskChange};
use crate::generation::Generation;
use crate::kept::Kept;
use crate::load::Load;
use crate::name::TaskName;
use crate::pin::{PINS_MAX, Pin};
use crate::plan::{self, Move, Plan, SLICES_MAX};
use crate::slice::Slice;
use crate::spec::{Consistency, JobSpec, Ratio};
use crate::state::{Applied, Outcome, Refused};
use crate::task::{Phase, SessionId, TASKS_MAX, Task};
use crate::transit::{Act, HandOffId, Step, Transit};

/// How many moves of a job are remembered, the newest: an hour at a move every four seconds.
pub const HISTORY_MAX: usize = 1_000;
/// How many tasks that went are remembered, the newest: more do not restart at once, and those that were taken away stay.
const GONE_MAX: usize = 100;

/// What the cluster has agreed on about one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What is asked of it.
    pub spec: JobSpec,
    /// Grows with each change of the spec, from one.
    pub version: u64,
    /// Who serves what.
    pub assignment: Arc<Assignment>,
    /// Whether slices stay where they are, emergencies apart: by an operator's word.
    pub frozen: bool,
    /// What an operator nailed to tasks, in order, without overlap.
    pub pins: Vec<Pin>,
    /// What waits for tasks that stopped without drain, by their names.
    pub kept: BTreeMap<TaskName, Kept>,
    /// Tasks that ended and are not back, by when they ended: a leader that finds them does not know how long ago that was.
    pub gone: VecDeque<TaskName>,
    /// What crashes tasks and stays with one, in order, without overlap.
    pub confined: Vec<Confined>,
    /// Sessions that an operator says are lost, until they end.
    pub believed: BTreeSet<SessionId>,
    /// What all plans together have moved.
    pub churn: Churn,
    /// The newest moves, oldest first, each with the generation that it led to.
    pub history: VecDeque<(Generation, Move)>,
}

/// What all plans of a job together have moved, since the job began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Churn {
    /// Replicas that came, went or moved.
    pub moves: u64,
    /// The key space that someone began to serve, in millionths of all keys.
    pub keys: u64,
    /// The load that someone began to serve, in millionths of the load at the time.
    pub load: u64,
}

impl Job {
    /// Nails keys to a task that is there. The same keys once more go to the newly named task.
    pub(in crate::state) fn pin(
        &mut self,
        slice: Slice,
        task: TaskName,
    ) -> Result<Applied, Refused> {
        if self.find(|known| known.info.name == task).is_none() {
            return Err(Refused::NoSuchTask { job: self.spec.name.clone(), task });
        }
        // Pins neither overlap nor lie out of order, so what could touch this one stands right here.
        let place = self.pins.partition_point(|pin| pin.slice.last() < slice.first());
        let full = self.pins.len() >= PINS_MAX;
        match self.pins.get_mut(place) {
            Some(pin) if pin.slice == slice => pin.task = task,
            Some(pin) if pin.slice.overlap(slice).is_some() => {
                let (pinned, task) = (pin.slice, pin.task.clone());
                return Err(Refused::Pinned { slice, pinned, task });
            }
            _ if full => return Err(Refused::Limit { what: "pins of a job", max: PINS_MAX }),
            _ => self.pins.insert(place, Pin { slice, task }),
        }
        Ok(Outcome::Done.into())
    }

    pub(in crate::state) fn unpin(&mut self, slice: Slice) -> Result<Applied, Refused> {
        let place = self.pins.iter().position(|pin| pin.slice == slice);
        let job = &self.spec.name;
        let place = place.ok_or_else(|| Refused::NoSuchPin { job: job.clone(), slice })?;
        self.pins.remove(place);
        Ok(Outcome::Done.into())
    }

    /// Takes an operator's word that sessions are lost.
    pub(in crate::state) fn believe(
        &mut self,
        sessions: Vec<SessionId>,
    ) -> Result<Applied, Refused> {
        for session in &sessions {
            self.task(*session)?;
        }
        self.believed = sessions.into_iter().collect();
        Ok(Outcome::Done.into())
    }

    /// Keeps ranges with one task. A plan that is under way does not know of it: the new generation makes it stale.
    pub(in crate::state) fn confine(
        &mut self,
        slices: &[Slice],
        task: &TaskName,
        crashes: &[Crash],
    ) -> Result<Applied, Refused> {
        let mut after = self.confined.clone();
        for slice in slices {
            let evidence = crashes.iter().take(CRASHES_MAX).cloned();
            let place = after.partition_point(|known| known.slice.last() < slice.first());
            match after.get_mut(place) {
                Some(known) if known.slice == *slice => {
                    known.task = task.clone();
                    if !crashes.is_empty() {
                        known.crashes = evidence.collect();
                    }
                }
                Some(known) if known.slice.overlap(*slice).is_some() => {
                    return Err(Refused::Confined(*slice));
                }
                _ => after.insert(
                    place,
                    Confined { slice: *slice, task: task.clone(), crashes: evidence.collect() },
                ),
            }
        }
        if after.len() > CONFINED_MAX {
            return Err(Refused::Limit { what: "confined ranges of a job", max: CONFINED_MAX });
        }
        self.confined = after;
        Ok(Applied { delta: Some(self.step(vec![], vec![])), outcome: Outcome::Done })
    }

    pub(in crate::state) fn unconfine(&mut self, slice: Slice) -> Result<Applied, Refused> {
        let place = self.confined.iter().position(|known| known.slice == slice);
        let job = &self.spec.name;
        let place = place.ok_or_else(|| Refused::NoSuchConfined { job: job.clone(), slice })?;
        self.confined.remove(place);
        Ok(Outcome::Done.into())
    }

    /// Begins a job that nobody serves.
    pub fn new(spec: JobSpec, first: Generation) -> Self {
        let mut assignment = match spec.consistency {
            Consistency::Affinity => Assignment::new(spec.name.clone(), first),
            Consistency::Exclusive => Assignment::exclusive(spec.name.clone(), first),
        };
        assignment.spill = spec.spill.map(|spill| spill.cap);
        let assignment = Arc::new(assignment);
        Self {
            spec,
            version: 0,
            assignment,
            frozen: false,
            pins: Vec::new(),
            kept: BTreeMap::new(),
            gone: VecDeque::new(),
            confined: Vec::new(),
            believed: BTreeSet::new(),
            churn: Churn::default(),
            history: VecDeque::new(),
        }
    }

    /// The cap for spill that the spec asks for.
    pub(in crate::state) fn spill(&self) -> Option<Ratio> {
        self.spec.spill.map(|spill| spill.cap)
    }

    pub(in crate::state) fn find(&self, wanted: impl Fn(&Task) -> bool) -> Option<&Task> {
        self.assignment.tasks.values().map(Arc::as_ref).find(|task| wanted(task))
    }

    pub(in crate::state) fn task(&self, session: SessionId) -> Result<&Task, Refused> {
        let task = self.assignment.tasks.get(&session).map(Arc::as_ref);
        task.ok_or_else(|| Refused::NoSuchSession { job: self.spec.name.clone(), session })
    }

    pub(in crate::state) fn begin(&mut self, task: Task, stopped: Option<SessionId>) -> Delta {
        let stopped = stopped.filter(|session| self.assignment.tasks.contains_key(session));
        let gone = stopped.map(TaskChange::Gone);
        let kept = self.kept.remove(&task.info.name);
        let kept = stopped.and_then(|session| self.kept_of(session)).or(kept);
        if stopped.is_none() {
            self.come(&task.info.name);
        }
        let left = stopped.map_or_else(Vec::new, |session| self.without(session));
        let slices = self.given_back(left, kept.as_ref(), task.session);
        self.step(gone.into_iter().chain([TaskChange::Set(Arc::new(task))]).collect(), slices)
    }

    /// Has the slices of a session that is about to end wait for its task.
    pub(in crate::state) fn keep(&mut self, session: SessionId) {
        let Some(kept) = self.kept_of(session) else { return };
        let name = self.assignment.tasks[&session].info.name.clone();
        if self.kept.len() < TASKS_MAX {
            self.kept.insert(name, kept);
        }
    }

    /// What would wait for a task that stops now: nothing of one that drains, and nothing that is on its way to another.
    pub(in crate::state) fn kept_of(&self, session: SessionId) -> Option<Kept> {
        if self.spec.grace.is_zero() || !self.may_take(session) {
            return None;
        }
        let slices = self.assignment.slices.iter().filter(|(_, assigned)| {
            assigned.transit.is_none() && assigned.replicas.of(session).is_some()
        });
        Kept::new(session, slices.map(|(slice, _)| slice).collect())
    }

    /// The slices of `left`, and those that were kept, with a session that serves the latter from now on.
    pub(in crate::state) fn given_back(
        &self,
        left: Vec<(Slice, Assigned)>,
        kept: Option<&Kept>,
        session: SessionId,
    ) -> Vec<(Slice, Assigned)> {
        let token = self.assignment.generation.next();
        let mut slices: BTreeMap<Slice, Assigned> = left.into_iter().collect();
        for slice in kept.into_iter().flat_map(|kept| &kept.slices) {
            let (whole, known) = self.assignment.get(slice.first());
            let old = slices.get(slice).unwrap_or(known);
            let to = Replica { session, since: token };
            if let Some(replicas) = old.replicas.moved(None, Some(to)).filter(|_| whole == *slice) {
                slices.insert(*slice, Assigned { replicas, token, ..old.clone() });
            }
        }
        slices.into_iter().collect()
    }

    /// Lets go of what waits for a task.
    pub(in crate::state) fn forget(
        &mut self,
        task: &TaskName,
        session: SessionId,
    ) -> Result<Applied, Refused> {
        if self.kept.get(task).is_none_or(|kept| kept.session != session) {
            return Err(Refused::NoSuchSession { job: self.spec.name.clone(), session });
        }
        self.kept.remove(task);
        // A generation of its own, so that a plan that was made while they waited is stale.
        Ok(Applied { delta: Some(self.step(vec![], vec![])), outcome: Outcome::Done })
    }

    /// The slices that wait for a task.
    pub fn waiting(&self) -> BTreeSet<Slice> {
        self.kept.values().flat_map(|kept| kept.slices.iter().copied()).collect()
    }

    /// Notes that a task is there. Where names are drawn anew, such as by a Kubernetes Deployment, a newcomer stands for who
    /// has been gone longest.
    fn come(&mut self, task: &TaskName) {
        let place = self.gone.iter().position(|gone| gone == task).unwrap_or(0);
        self.gone.remove(place);
    }

    pub(in crate::state) fn end(&mut self, session: SessionId) -> Delta {
        let left = self.without(session);
        self.gone.push_back(self.assignment.tasks[&session].info.name.clone());
        self.gone.drain(..self.gone.len().saturating_sub(GONE_MAX));
        self.step(vec![TaskChange::Gone(session)], left)
    }

    /// The slices that `session` serves or is about to, as they are without it.
    pub(in crate::state) fn without(&self, session: SessionId) -> Vec<(Slice, Assigned)> {
        let now = self.assignment.generation.next();
        let without = |old: &Assigned| {
            let transit = old.transit.as_deref();
            if transit.is_some_and(|transit| transit.to == session) {
                // Whoever has it keeps it, or has it back.
                return Some(Assigned { transit: None, ..old.clone() });
            }
            old.replicas.of(session)?;
            let left = old.replicas.moved(Some(session), None).expect("it serves the slice");
            let was_last = left.as_slice().is_empty();
            match transit {
                Some(to) if to.from == Some(session) || was_last => {
                    if self.may_take(to.to) {
                        let to = Transit { from: Some(session), ..*to };
                        return Some(switched(old, &to, now));
                    }
                    Some(Assigned { replicas: left, token: now, transit: None, load: old.load })
                }
                _ => Some(Assigned { replicas: left, token: now, ..old.clone() }),
            }
        };
        let slices = self.assignment.slices.iter();
        slices.filter_map(|(slice, old)| Some((slice, without(old)?))).collect()
    }

    pub(in crate::state) fn may_take(&self, session: SessionId) -> bool {
        self.task(session).is_ok_and(|task| task.phase == Phase::Serving)
    }

    /// Says whether a move begins a hand-off: an owner has to let go first, a task that prepares is waited for.
    pub(in crate::state) fn hands_over(&self, step: &Move, assigned: &Assigned) -> bool {
        let Some(to) = step.to.and_then(|to| self.task(to).ok()) else { return false };
        match self.spec.consistency {
            Consistency::Exclusive => step.from.is_some(),
            Consistency::Affinity => {
                let is_served = !assigned.replicas.as_slice().is_empty();
                to.info.prepares && is_served && !self.spec.prepare_within.is_zero()
            }
        }
    }

    /// Takes hand-offs further, those that are as the steps expect. Each goes one step at most: nobody can have acted on one
    /// that no assignment has shown.
    pub(in crate::state) fn hand_off(
        &mut self,
        steps: &[(HandOffId, Act)],
    ) -> Result<Applied, Refused> {
        let now = self.assignment.generation.next();
        let mut changed: BTreeMap<Slice, Assigned> = BTreeMap::new();
        for (id, act) in steps {
            let (slice, old) = self.assignment.get(id.first);
            let transit = old.transit.as_deref().filter(|transit| transit.id == *id);
            if let Some(new) = transit.and_then(|transit| acted(old, transit, *act, now)) {
                changed.entry(slice).or_insert(new);
            }
        }
        if changed.is_empty() {
            let job = self.spec.name.clone();
            let Some((id, act)) = steps.first().copied() else { return Ok(Outcome::Done.into()) };
            return Err(Refused::StaleHandOff { job, id, act });
        }
        let delta = self.step(vec![], changed.into_iter().collect());
        Ok(Applied { delta: Some(delta), outcome: Outcome::Done })
    }

    /// Begins anew after a restore: the tasks that were are unknown, and so is who serves.
    pub(in crate::state) fn restart(&mut self, first: Generation) {
        let mut assignment = self.assignment.as_ref().clone();
        assignment.generation = first;
        assignment.tasks.clear();
        for assigned in assignment.slices.values_mut() {
            let nobody = assigned.replicas.nobody();
            *assigned = Assigned { replicas: nobody, token: first, transit: None, ..*assigned };
        }
        self.assignment = Arc::new(assignment);
        self.kept.clear();
        self.gone.clear();
    }

    /// Moves the assignment one generation on.
    pub(in crate::state) fn step(
        &mut self,
        tasks: Vec<TaskChange>,
        slices: Vec<(Slice, Assigned)>,
    ) -> Delta {
        let from = self.assignment.generation;
        let (job, spill) = (self.spec.name.clone(), self.spill());
        let delta = Delta { job, from, to: from.next(), tasks, slices, spill };
        self.assignment =
            Arc::new(delta.apply_to(&self.assignment).expect("a step is made for what there is"));
        // What was said of a session is used up with it.
        self.believed.retain(|session| self.assignment.tasks.contains_key(session));
        delta
    }

    pub(in crate::state) fn current(&self, base: Generation) -> Result<(), Refused> {
        let newest = self.assignment.generation;
        if base == newest {
            Ok(())
        } else {
            Err(Refused::Stale { job: self.spec.name.clone(), base, newest })
        }
    }

    pub(in crate::state) fn change(
        &mut self,
        plan: &Plan,
        hold_off: bool,
    ) -> Result<Applied, Refused> {
        self.current(plan.base)?;
        let mut takes = plan.moves().filter_map(|step| Some((step.slice, step.to?)));
        if let Some((slice, session)) = takes.find(|(_, session)| !self.may_take(*session)) {
            return Err(Refused::Taker { slice, session });
        }
        if hold_off
            && self.spec.consistency == Consistency::Exclusive
            && plan.moves().any(|step| step.to.is_some())
        {
            return Err(Refused::HoldOff(self.spec.name.clone()));
        }
        let now = plan.base.next();
        let hands_over = |step: &Move, assigned: &Assigned| self.hands_over(step, assigned);
        let (slices, touched) =
            plan::apply(&plan.edits, &self.assignment.slices, now, &hands_over)?;
        if slices.count() > SLICES_MAX {
            return Err(Refused::Limit { what: "slices of a job", max: SLICES_MAX });
        }
        self.churn.add(plan);
        self.history.extend(plan.moves().map(|step| (now, *step)));
        self.history.drain(..self.history.len().saturating_sub(HISTORY_MAX));
        let touched = union(touched);
        self.kept.retain(|_, kept| kept.release(&touched));
        let changed = touched.into_iter().flat_map(|range| {
            slices
                .touching(range)
                .map(|(slice, assigned)| (slice, assigned.clone()))
                .collect::<Vec<_>>()
        });
        let delta = self.step(vec![], changed.collect());
        debug_assert_eq!(self.assignment.slices, slices, "a delta leads where the edits lead");
        Ok(Applied { delta: Some(delta), outcome: Outcome::Done })
    }

    pub(in crate::state) fn store_loads(
        &mut self,
        base: Generation,
        loads: &[Load],
    ) -> Result<Applied, Refused> {
        self.current(base)?;
        let expected = self.assignment.slices.count();
        if loads.len() != expected {
            return Err(Refused::Loads { expected, found: loads.len() });
        }
        let assignment = Arc::make_mut(&mut self.assignment);
        for (assigned, load) in assignment.slices.values_mut().zip(loads) {
            assigned.load = *load;
        }
        Ok(Outcome::Done.into())
    }
}

impl Churn {
    pub(in crate::state) fn add(&mut self, plan: &Plan) {
        self.moves += plan.moves().count() as u64;
        let keys: u128 =
            plan.moves().filter(|step| step.to.is_some()).map(|step| step.slice.width()).sum();
        // In millionths of 2^64 keys.
        self.keys += (((keys >> 24) * 1_000_000) >> 40) as u64;
        let total = u128::from(plan.total.milli()).max(1);
        self.load += (u128::from(plan.moved().milli()) * 1_000_000 / total) as u64;
    }
}

/// What a slice in hand-off becomes; nothing where the act does not fit.
fn acted(old: &Assigned, transit: &Transit, act: Act, now: Generation) -> Option<Assigned> {
    let exclusive = old.replicas.is_exclusive();
    match (act, transit.step) {
        (Act::Abort, _) => Some(Assigned { transit: None, ..old.clone() }),
        (Act::Release, Step::Preparing) if exclusive => {
            let transit = Transit { step: Step::Releasing, ..*transit };
            Some(Assigned { transit: Some(Arc::new(transit)), ..old.clone() })
        }
        (Act::Switch, Step::Preparing) if !exclusive => Some(switched(old, transit, now)),
        (Act::Acknowledged { by }, Step::Releasing) if transit.from == Some(by) => {
            Some(switched(old, transit, now))
        }
        (Act::Lapsed, Step::Releasing) => Some(switched(old, transit, now)),
        _ => None,
    }
}

/// A slice whose hand-off is over: the next one serves it.
fn switched(old: &Assigned, transit: &Transit, now: Generation) -> Assigned {
    let to = Replica { session: transit.to, since: transit.id.began };
    let replicas = old.replicas.moved(transit.from, Some(to)).expect("a hand-off fits its slice");
    Assigned { replicas, token: now, transit: None, ..old.clone() }
}

/// Joins ranges that overlap, so that each slice is told of once.
fn union(mut ranges: Vec<Slice>) -> Vec<Slice> {
    ranges.sort_unstable();
    let mut joined: Vec<Slice> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(before) if range.first() <= before.last() => {
                *before = Slice::new(before.first(), before.last().max(range.last()))
                    .expect("the end only grows");
            }
            _ => joined.push(range),
        }
    }
    joined
}

//! What the balancer decided: splits, merges and moves, each with its reason, in the order in which they apply.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::assignment::{Assigned, Replica};
use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::Ratio;
use crate::task::SessionId;
use crate::transit::{HandOffId, Step, Transit};

/// The most slices of a job.
pub const SLICES_MAX: usize = 1_000_000;

/// Why a slice changed hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Nobody served it: the job is new, or its last task had left.
    First,
    /// The task that served it is lost.
    Lost,
    /// The task that served it is about to stop.
    Drain,
    /// The task that served it had more than its share of load.
    Load,
    /// It made room for something larger, or was the larger thing for which others make room.
    Displace,
    /// The operator pinned it to a task.
    Pin,
    /// It crashes tasks and stays with one, or made room there for what does.
    Confine,
    /// It lives in another region.
    Home,
    /// A task had next to nothing: it is new, or its slices went cold.
    Fill,
    /// The spec asks for more replicas, or one task cannot carry the slice.
    Replicate,
    /// The spec asks for fewer replicas, or one task can carry the slice again.
    Dereplicate,
    /// The slice lay between two of another task and is cheap to move: fewer slices serve the same.
    Merge,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::First => "first",
            Self::Lost => "lost",
            Self::Drain => "drain",
            Self::Load => "load",
            Self::Displace => "displace",
            Self::Pin => "pin",
            Self::Confine => "confine",
            Self::Home => "home",
            Self::Fill => "fill",
            Self::Replicate => "replicate",
            Self::Dereplicate => "dereplicate",
            Self::Merge => "merge",
        })
    }
}

/// A replica that comes, goes, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// What moves: exactly one slice of the assignment.
    pub slice: Slice,
    /// Who stops serving it; nobody where a replica is added.
    pub from: Option<SessionId>,
    /// Who begins to serve it; nobody where a replica is removed.
    pub to: Option<SessionId>,
    /// Why.
    pub reason: Reason,
    /// The load that moves.
    pub load: Load,
    /// The load of the task that gives, or where none gives of the one that takes, before the move.
    pub before: Load,
    /// The same after it.
    pub after: Load,
}

/// One step of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Parts a slice; both parts stay where they are.
    Split {
        /// Where the upper part begins.
        at: SliceKey,
        /// The load that lies below.
        low: Load,
    },
    /// Makes one slice of several that the same tasks serve.
    Merge(Slice),
    /// Moves a replica.
    Move(Move),
}

/// Why an edit did not apply: the plan was made for another assignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// A slice already begins there.
    #[error("cannot split at {0}: a slice begins there")]
    Split(SliceKey),
    /// The slices there do not make up this one, or other tasks serve them.
    #[error("cannot merge {0}: it is not made of whole slices that the same tasks serve")]
    Merge(Slice),
    /// The assignment has no such slice.
    #[error("cannot move {0}: the assignment has no such slice")]
    NoSuchSlice(Slice),
    /// The task that should give does not have it, the one that should take does, or neither was named.
    #[error("cannot move {0}: its replicas are not as the move expects")]
    Replicas(Slice),
    /// The slice is on its way from one task to another.
    #[error("cannot touch {0}: it is in hand-off")]
    InTransit(Slice),
    /// Nobody would take it from an owner who knows nothing of that: whoever is given it next would be a second one.
    #[error(
        "cannot take {0} from its owner: it has to be handed over, or its owner's session ended"
    )]
    Owned(Slice),
}

/// Which moves begin a hand-off, while the slice stays where it is; all others are made at once.
pub type HandsOver<'a> = &'a dyn Fn(&Move, &Assigned) -> bool;

/// No move begins a hand-off: where nobody has to be waited for, such as on paper.
pub const fn at_once(_: &Move, _: &Assigned) -> bool {
    false
}

impl Edit {
    /// Does to `slices` what the edit says, as of generation `now`, and says which keys it touched.
    pub fn apply(
        &self,
        slices: &mut SliceMap<Assigned>,
        now: Generation,
        hands_over: HandsOver<'_>,
    ) -> Result<Slice, EditError> {
        match *self {
            Self::Split { at, low } => split(slices, at, low),
            Self::Merge(whole) => merge(slices, whole),
            Self::Move(step) => shift(slices, step, now, hands_over),
        }
    }
}

fn split(slices: &mut SliceMap<Assigned>, at: SliceKey, low: Load) -> Result<Slice, EditError> {
    let (whole, assigned) = slices.get(at);
    let (below, above) = whole.split_at(at).ok_or(EditError::Split(at))?;
    stays(whole, assigned)?;
    let low = low.min(assigned.load);
    let parts = [low, assigned.load - low].map(|load| Assigned { load, ..assigned.clone() });
    let [lower, upper] = parts;
    slices.set(below, lower);
    slices.set(above, upper);
    Ok(whole)
}

/// A slice in hand-off is touched by nothing but the hand-off.
fn stays(slice: Slice, assigned: &Assigned) -> Result<(), EditError> {
    if assigned.transit.is_some() { Err(EditError::InTransit(slice)) } else { Ok(()) }
}

fn merge(slices: &mut SliceMap<Assigned>, whole: Slice) -> Result<Slice, EditError> {
    let merged = merged(slices, whole)?;
    slices.set(whole, merged);
    Ok(whole)
}

/// What the slices of a range are as one.
fn merged(slices: &SliceMap<Assigned>, whole: Slice) -> Result<Assigned, EditError> {
    let mut parts = slices.touching(whole);
    let (first, merged) = parts.next().expect("a slice touches at least one");
    let (mut last, mut merged) = (first, merged.clone());
    stays(first, &merged)?;
    for (part, assigned) in parts {
        stays(part, assigned)?;
        let same = |replica: &Replica| merged.replicas.of(replica.session).is_some();
        let replicas = assigned.replicas.as_slice();
        if replicas.len() != merged.replicas.as_slice().len() || !replicas.iter().all(same) {
            return Err(EditError::Merge(whole));
        }
        // A guard's token is its slice's: one that grew without a change of hands would shut the owner out of its own writes.
        let differs = merged.replicas != assigned.replicas || merged.token != assigned.token;
        if assigned.replicas.is_exclusive() && differs {
            return Err(EditError::Merge(whole));
        }
        // A replica has held all of it only since it held the last part.
        merged.replicas = merged.replicas.map(|Replica { session, since }| {
            let other = assigned.replicas.of(session).map_or(since, |other| other.since);
            Replica { session, since: since.max(other) }
        });
        merged.load += assigned.load;
        merged.token = merged.token.max(assigned.token);
        last = part;
    }
    if first.first() != whole.first() || last.last() != whole.last() || first == last {
        return Err(EditError::Merge(whole));
    }
    Ok(merged)
}

fn shift(
    slices: &mut SliceMap<Assigned>,
    step: Move,
    now: Generation,
    hands_over: HandsOver<'_>,
) -> Result<Slice, EditError> {
    let index = slices.index_of(step.slice.first());
    if slices.slice_at(index) != step.slice {
        return Err(EditError::NoSuchSlice(step.slice));
    }
    let assigned = slices.value_at_mut(index);
    stays(step.slice, assigned)?;
    if assigned.replicas.is_exclusive() && step.from.is_some() && step.to.is_none() {
        return Err(EditError::Owned(step.slice));
    }
    let come = step.to.map(|session| Replica { session, since: now });
    let moved = assigned.replicas.moved(step.from, come);
    let nothing = (step.from, step.to) == (None, None);
    let moved = moved.filter(|_| !nothing).ok_or(EditError::Replicas(step.slice))?;
    match step.to {
        Some(to) if hands_over(&step, assigned) => {
            let id = HandOffId { began: now, first: step.slice.first() };
            let transit = Transit { id, from: step.from, to, step: Step::Preparing };
            assigned.transit = Some(Arc::new(transit));
        }
        _ => (assigned.replicas, assigned.token) = (moved, now),
    }
    Ok(step.slice)
}

/// Carries edits out one after the other, as of generation `now`, and says which keys each touched. Splits at the
/// beginning and merges at the end, which is how plans are made, cost one pass together and not one each.
pub fn apply(
    edits: &[Edit],
    slices: &SliceMap<Assigned>,
    now: Generation,
    hands_over: HandsOver<'_>,
) -> Result<(SliceMap<Assigned>, Vec<Slice>), EditError> {
    let mut touched = Vec::with_capacity(edits.len());
    let splits = edits.iter().take_while(|edit| matches!(edit, Edit::Split { .. })).count();
    let merges = edits.iter().rev().take_while(|edit| matches!(edit, Edit::Merge(_))).count();
    let merges = edits.len() - merges.min(edits.len() - splits);
    let mut slices = split_all(&edits[..splits], slices, &mut touched)?;
    for edit in &edits[splits..merges] {
        touched.push(edit.apply(&mut slices, now, hands_over)?);
    }
    merge_all(&edits[merges..], &mut slices, &mut touched)?;
    Ok((slices, touched))
}

fn split_all(
    edits: &[Edit],
    slices: &SliceMap<Assigned>,
    touched: &mut Vec<Slice>,
) -> Result<SliceMap<Assigned>, EditError> {
    // Where slices begin that are new, or whose load is another.
    let mut more: BTreeMap<SliceKey, Assigned> = BTreeMap::new();
    for edit in edits {
        let &Edit::Split { at, low } = edit else { continue };
        let (whole, assigned) = slices.get(at);
        let before = more.range(..=at).next_back().filter(|(first, _)| **first >= whole.first());
        let (first, assigned) = before
            .map_or_else(|| (whole.first(), assigned), |(first, assigned)| (*first, assigned));
        if first == at {
            return Err(EditError::Split(at));
        }
        stays(whole, assigned)?;
        let low = low.min(assigned.load);
        let lower = Assigned { load: low, ..assigned.clone() };
        let upper = Assigned { load: assigned.load - low, ..assigned.clone() };
        more.insert(first, lower);
        more.insert(at, upper);
        touched.push(whole);
    }
    Ok(if more.is_empty() { slices.clone() } else { slices.with_runs(more) })
}

fn merge_all(
    edits: &[Edit],
    slices: &mut SliceMap<Assigned>,
    touched: &mut Vec<Slice>,
) -> Result<(), EditError> {
    let ranges = edits.iter().filter_map(|edit| match edit {
        Edit::Merge(whole) => Some(*whole),
        _ => None,
    });
    let ranges: Vec<Slice> = ranges.collect();
    if ranges.windows(2).any(|pair| pair[0].last() >= pair[1].first()) {
        // No plan of ours is made so, yet it means what it says.
        for whole in ranges {
            touched.push(merge(slices, whole)?);
        }
        return Ok(());
    }
    let patches: Result<Vec<_>, _> =
        ranges.iter().map(|whole| Ok((*whole, merged(slices, *whole)?))).collect();
    slices.set_all(&patches?);
    touched.extend(ranges);
    Ok(())
}

/// What the balancer decided in one round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The assignment that it was made for, and applies to no other.
    pub base: Generation,
    /// What to do, in this order.
    pub edits: Vec<Edit>,
    /// Max over mean of task load for capacity, before and after; one is perfect.
    pub imbalance: (Ratio, Ratio),
    /// All load of the job, as the plan saw it.
    pub total: Load,
}

impl Plan {
    /// Walks the moves.
    pub fn moves(&self) -> impl Iterator<Item = &Move> {
        self.edits
            .iter()
            .filter_map(|edit| if let Edit::Move(step) = edit { Some(step) } else { None })
    }

    /// Sums the load that changes hands: what someone begins to serve.
    pub fn moved(&self) -> Load {
        self.moves().filter(|step| step.to.is_some()).map(|step| step.load).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assignment::Replicas;

    const NOW: Generation = Generation { incarnation: 1, number: 9 };

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn step(slice: Slice, from: Option<u64>, to: Option<u64>) -> Edit {
        let (from, to) = (from.map(SessionId), to.map(SessionId));
        let none = Load::ZERO;
        Edit::Move(Move {
            slice,
            from,
            to,
            reason: Reason::Load,
            load: none,
            before: none,
            after: none,
        })
    }

    fn served_by_one() -> SliceMap<Assigned> {
        let one = Replica { session: SessionId(1), since: Generation::ZERO };
        let assigned = Assigned {
            replicas: Replicas::One(one),
            load: Load::from_milli(100),
            ..Assigned::default()
        };
        SliceMap::uniform(assigned)
    }

    #[test]
    fn a_split_keeps_since_and_token_and_a_move_renews_them() {
        let mut slices = served_by_one();
        Edit::Split { at: SliceKey(50), low: Load::from_milli(30) }
            .apply(&mut slices, NOW, &at_once)
            .unwrap();
        let (_, low) = slices.get(SliceKey(0));
        assert_eq!((low.load.milli(), low.token), (30, Generation::ZERO));
        step(slice(0, 49), Some(1), Some(2)).apply(&mut slices, NOW, &at_once).unwrap();
        let (_, low) = slices.get(SliceKey(0));
        assert_eq!((low.replicas.as_slice()[0].since, low.token), (NOW, NOW));
        let (_, high) = slices.get(SliceKey(50));
        assert_eq!((high.load.milli(), high.replicas.as_slice()[0].since), (70, Generation::ZERO));
    }

    #[test]
    fn a_merge_counts_from_when_the_last_part_came() {
        let mut slices = served_by_one();
        Edit::Split { at: SliceKey(50), low: Load::ZERO }
            .apply(&mut slices, NOW, &at_once)
            .unwrap();
        step(slice(0, 49), Some(1), Some(2)).apply(&mut slices, NOW, &at_once).unwrap();
        assert_eq!(
            Edit::Merge(Slice::FULL).apply(&mut slices, NOW, &at_once),
            Err(EditError::Merge(Slice::FULL))
        );
        step(slice(0, 49), Some(2), Some(1)).apply(&mut slices, NOW, &at_once).unwrap();
        Edit::Merge(Slice::FULL).apply(&mut slices, NOW, &at_once).unwrap();
        let (whole, assigned) = slices.get(SliceKey(7));
        assert_eq!((whole, assigned.replicas.as_slice()[0].since), (Slice::FULL, NOW));
    }

    #[test]
    fn edits_made_for_another_assignment_are_refused() {
        let mut slices = served_by_one();
        let before = slices.clone();
        let cases = [
            (Edit::Split { at: SliceKey(0), low: Load::ZERO }, EditError::Split(SliceKey(0))),
            (Edit::Merge(Slice::FULL), EditError::Merge(Slice::FULL)),
            (Edit::Merge(slice(0, 9)), EditError::Merge(slice(0, 9))),
            (step(slice(0, 9), Some(1), Some(2)), EditError::NoSuchSlice(slice(0, 9))),
            (step(Slice::FULL, Some(2), Some(3)), EditError::Replicas(Slice::FULL)),
            (step(Slice::FULL, None, Some(1)), EditError::Replicas(Slice::FULL)),
            (step(Slice::FULL, None, None), EditError::Replicas(Slice::FULL)),
        ];
        for (edit, error) in cases {
            assert_eq!(edit.apply(&mut slices, NOW, &at_once), Err(error));
            assert_eq!(slices, before);
        }
    }
}

//! Who serves every slice of a job, as of one generation.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::name::JobName;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::Ratio;
use crate::task::{SessionId, Task};
use crate::transit::{Step, Transit};

/// One of the tasks that a slice is assigned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Who.
    pub session: SessionId,
    /// Since when without a break, kept over splits and merges that moved nothing. Where the slice came by a hand-off it is
    /// the generation that began that: by it the task knows whether what it prepared is what it now serves.
    pub since: Generation,
}

/// The replicas of a slice, none to many. One, by far the most common, needs no allocation.
#[derive(Clone, Debug, Default)]
pub enum Replicas {
    /// Nobody serves the slice: there is no task.
    #[default]
    None,
    /// One task does.
    One(Replica),
    /// Several do, in the order in which they were added.
    Many(Arc<[Replica]>),
    /// The slice of an exclusive job: one task owns it, or nobody. A second owner cannot be written down.
    Owner(Option<Replica>),
}

impl Replicas {
    /// Gives them as a list.
    pub fn as_slice(&self) -> &[Replica] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
            Self::Owner(owner) => owner.as_slice(),
        }
    }

    /// Says whether this is the slice of an exclusive job.
    pub const fn is_exclusive(&self) -> bool {
        matches!(self, Self::Owner(_))
    }

    /// Gives them after one went, another came, or both. `None` where that cannot be: whoever should go is not there, whoever
    /// should come is, or there would be a second owner.
    #[must_use]
    pub fn moved(&self, from: Option<SessionId>, to: Option<Replica>) -> Option<Self> {
        if from.is_some_and(|from| self.of(from).is_none())
            || to.is_some_and(|to| self.of(to.session).is_some())
        {
            return None;
        }
        let stay = self.as_slice().iter().copied().filter(|replica| Some(replica.session) != from);
        match self {
            Self::Owner(owner) if owner.is_some() && from.is_none() && to.is_some() => None,
            Self::Owner(_) => Some(Self::Owner(stay.chain(to).next())),
            _ => Some(stay.chain(to).collect()),
        }
    }

    /// Gives nobody, of the same kind.
    #[must_use]
    pub const fn nobody(&self) -> Self {
        if self.is_exclusive() { Self::Owner(None) } else { Self::None }
    }

    /// Gives them with each one changed by `change`.
    #[must_use]
    pub fn map(&self, change: impl FnMut(Replica) -> Replica) -> Self {
        match self {
            Self::Owner(owner) => Self::Owner(owner.map(change)),
            _ => self.as_slice().iter().copied().map(change).collect(),
        }
    }

    /// Finds one by its task.
    pub fn of(&self, session: SessionId) -> Option<Replica> {
        self.as_slice().iter().copied().find(|replica| replica.session == session)
    }
}

impl FromIterator<Replica> for Replicas {
    fn from_iter<I: IntoIterator<Item = Replica>>(replicas: I) -> Self {
        let mut replicas = replicas.into_iter();
        match (replicas.next(), replicas.next()) {
            (None, _) => Self::None,
            (Some(one), None) => Self::One(one),
            (Some(first), Some(second)) => {
                Self::Many([first, second].into_iter().chain(replicas).collect())
            }
        }
    }
}

impl PartialEq for Replicas {
    fn eq(&self, other: &Self) -> bool {
        self.is_exclusive() == other.is_exclusive() && self.as_slice() == other.as_slice()
    }
}

impl Eq for Replicas {}

/// What an assignment says of one slice.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Assigned {
    /// Who serves it.
    pub replicas: Replicas,
    /// Its load as last stored: soft knowledge that lets a new leader start, never fresher than its last reporting period.
    pub load: Load,
    /// Grows each time the slice changes hands, for storage to reject a late writer.
    pub token: Generation,
    /// Where it is going, if it is on its way.
    pub transit: Option<Arc<Transit>>,
}

impl Assigned {
    /// The slice of an exclusive job that nobody owns.
    pub fn unowned() -> Self {
        Self { replicas: Replicas::Owner(None), ..Self::default() }
    }

    /// Says whether whoever has the slice is letting go of it, so that nobody takes work on it.
    pub fn is_releasing(&self) -> bool {
        self.transit.as_deref().is_some_and(|transit| transit.step == Step::Releasing)
    }

    /// Gives who serves the slice once the hand-off that it is in, if it is in one, is over.
    pub fn settled(&self) -> Option<Replicas> {
        let transit = self.transit.as_ref()?;
        let to = Replica { session: transit.to, since: transit.id.began };
        self.replicas.moved(transit.from, Some(to))
    }
}

/// Who serves every slice of a job, as of one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Which job.
    pub job: JobName,
    /// As of when.
    pub generation: Generation,
    /// The tasks that replicas may name.
    pub tasks: BTreeMap<SessionId, Arc<Task>>,
    /// Each slice's replicas. Invariant: they name tasks in `tasks`, each at most once a slice.
    pub slices: SliceMap<Assigned>,
    /// What callers need of the spec: the load of a task in relation to the mean above which they may pass it over, if they
    /// may at all.
    pub spill: Option<Ratio>,
}

impl Assignment {
    /// Begins a job: no task, and so nobody who serves.
    pub fn new(job: JobName, generation: Generation) -> Self {
        Self {
            job,
            generation,
            tasks: BTreeMap::new(),
            slices: SliceMap::uniform(Assigned::default()),
            spill: None,
        }
    }

    /// Begins an exclusive job: no task, and so nobody who owns.
    pub fn exclusive(job: JobName, generation: Generation) -> Self {
        Self { slices: SliceMap::uniform(Assigned::unowned()), ..Self::new(job, generation) }
    }

    /// Looks up the slice of `key` and what the assignment says of it.
    pub fn get(&self, key: SliceKey) -> (Slice, &Assigned) {
        self.slices.get(key)
    }

    /// Walks the slices that `session` serves.
    pub fn of(&self, session: SessionId) -> impl Iterator<Item = (Slice, Replica)> {
        self.slices
            .iter()
            .filter_map(move |(slice, assigned)| Some((slice, assigned.replicas.of(session)?)))
    }

    /// Says whether `session` serves nothing, and nothing is on its way there.
    pub fn has_nothing_for(&self, session: SessionId) -> bool {
        self.slices.iter().all(|(_, assigned)| {
            let comes = assigned.transit.as_deref().is_some_and(|transit| transit.to == session);
            !comes && assigned.replicas.of(session).is_none()
        })
    }

    /// Says whether each slice has one owner at most.
    pub fn is_exclusive(&self) -> bool {
        self.slices.value_at(0).replicas.is_exclusive()
    }

    /// Finds a slice that is broken: it names a task that the assignment does not have, or one twice; its hand-off does not fit
    /// who serves it; or it may have several replicas where others have an owner.
    pub fn broken_slice(&self) -> Option<Slice> {
        let exclusive = self.is_exclusive();
        let broken = |slice: Slice, assigned: &Assigned| {
            let replicas = assigned.replicas.as_slice();
            let unfit = |transit: &Transit| {
                !self.tasks.contains_key(&transit.to)
                    || assigned.settled().is_none()
                    || transit.id.first != slice.first()
                    || (transit.step == Step::Releasing && !exclusive)
            };
            if assigned.transit.as_deref().is_some_and(unfit)
                || assigned.replicas.is_exclusive() != exclusive
            {
                return true;
            }
            replicas.iter().enumerate().any(|(index, replica)| {
                !self.tasks.contains_key(&replica.session)
                    || replicas[..index].iter().any(|other| other.session == replica.session)
            })
        };
        self.slices
            .iter()
            .find(|(slice, assigned)| broken(*slice, assigned))
            .map(|(slice, _)| slice)
    }
}

/// A line a slice, as transcripts show it.
impl fmt::Display for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.job, self.generation)?;
        for (slice, assigned) in self.slices.iter() {
            write!(f, "  {slice}")?;
            for replica in assigned.replicas.as_slice() {
                let task = self.tasks.get(&replica.session);
                write!(
                    f,
                    " {}@{}",
                    task.map_or("?", |task| task.info.name.as_str()),
                    replica.since
                )?;
            }
            if let Some(transit) = &assigned.transit {
                let to = self.tasks.get(&transit.to);
                let to = to.map_or("?", |task| task.info.name.as_str());
                write!(f, " {} -> {to}", transit.step)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::TaskInfo;
    use crate::transit::HandOffId;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const C: SessionId = SessionId(3);
    const SINCE: Generation = Generation { incarnation: 1, number: 1 };

    fn replica(session: SessionId) -> Replica {
        Replica { session, since: SINCE }
    }

    #[test]
    fn replicas_move_only_as_they_are_expected_to_be() {
        let of = |sessions: &[SessionId]| sessions.iter().copied().map(replica).collect();
        let moved = |replicas: &Replicas, from, to: Option<SessionId>| {
            let moved = replicas.moved(from, to.map(replica))?;
            Some(moved.as_slice().iter().map(|replica| replica.session).collect::<Vec<_>>())
        };
        let two: Replicas = of(&[A, B]);
        assert_eq!(moved(&two, Some(A), Some(C)), Some(vec![B, C]));
        assert_eq!(moved(&two, None, Some(C)), Some(vec![A, B, C]));
        assert_eq!(moved(&two, Some(B), None), Some(vec![A]));
        for (from, to) in [(Some(C), None), (None, Some(A)), (Some(A), Some(B)), (Some(A), Some(A))]
        {
            assert_eq!(moved(&two, from, to), None, "{from:?} to {to:?}");
        }
        let owned = Replicas::Owner(Some(replica(A)));
        assert_eq!(moved(&owned, Some(A), Some(B)), Some(vec![B]));
        assert_eq!(moved(&owned, None, Some(B)), None, "there is no second owner");
        assert_eq!(moved(&Replicas::Owner(None), None, Some(B)), Some(vec![B]));
        assert!(owned.moved(Some(A), None).unwrap().is_exclusive());
    }

    #[test]
    fn a_hand_off_that_does_not_fit_its_slice_is_found() {
        let id = |first| HandOffId { began: SINCE, first: SliceKey(first) };
        let (preparing, releasing) = (Step::Preparing, Step::Releasing);
        for (exclusive, transit, fits) in [
            (true, Transit { id: id(0), from: Some(A), to: B, step: preparing }, true),
            (true, Transit { id: id(0), from: Some(A), to: B, step: releasing }, true),
            (false, Transit { id: id(0), from: Some(A), to: B, step: preparing }, true),
            (false, Transit { id: id(0), from: None, to: B, step: preparing }, true),
            (false, Transit { id: id(0), from: Some(A), to: B, step: releasing }, false),
            (true, Transit { id: id(0), from: None, to: B, step: preparing }, false),
            (true, Transit { id: id(0), from: Some(B), to: A, step: preparing }, false),
            (true, Transit { id: id(0), from: Some(A), to: C, step: preparing }, false),
            (true, Transit { id: id(0), from: Some(A), to: A, step: preparing }, false),
            (true, Transit { id: id(9), from: Some(A), to: B, step: preparing }, false),
        ] {
            let mut assignment = match exclusive {
                true => Assignment::exclusive("kv".parse().unwrap(), SINCE),
                false => Assignment::new("kv".parse().unwrap(), SINCE),
            };
            for session in [A, B] {
                let (name, address) = (format!("t{}", session.0), format!("h:{}", session.0));
                let info = TaskInfo::new(name.parse().unwrap(), 1, address.parse().unwrap());
                assignment.tasks.insert(session, Arc::new(Task::new(session, info)));
            }
            let owner = Some(replica(A));
            let replicas = match exclusive {
                true => Replicas::Owner(owner),
                false => owner.into_iter().collect(),
            };
            let moving = Some(Arc::new(transit));
            let assigned = Assigned { replicas, transit: moving, ..Assigned::default() };
            assignment.slices = SliceMap::uniform(assigned);
            assert_eq!(assignment.broken_slice().is_none(), fits, "{exclusive} {transit:?}");
        }
    }
}

//! The tasks of a round as the draft sees them, and how slices find them.

use std::collections::{BTreeMap, BTreeSet};

use crate::balance::round::Round;
use crate::region::REGION;
use crate::task::{Phase, SessionId, Task};

/// A task.
pub(in crate::balance) struct Holder {
    pub(in crate::balance) session: SessionId,
    /// Whether it may be given slices.
    pub(in crate::balance) serving: bool,
    /// Whether it is not about to stop.
    pub(in crate::balance) stays: bool,
    /// Whether it serves confined keys and nothing else.
    pub(in crate::balance) keeper: bool,
    /// Whether it held nothing when the round began.
    pub(in crate::balance) newcomer: bool,
    /// Whether it runs the newest of several revisions, or is new in a rollout of one.
    pub(in crate::balance) newest: bool,
    /// Which value of the label that replicas are spread over it has.
    pub(in crate::balance) zone: u32,
    /// Which region it is in.
    pub(in crate::balance) region: Option<u32>,
    /// What it was given in this round to even out load.
    pub(in crate::balance) given: u64,
    /// Its load without any reserve.
    pub(in crate::balance) load: u64,
    /// The same when the round began.
    pub(in crate::balance) start: u64,
    /// The share of the keys that it holds, of 2^44.
    pub(in crate::balance) space: u64,
}

/// The tasks as holders, the regions' names, and how many values the label has that replicas are spread over.
pub(in crate::balance) fn roster(round: &Round) -> (Vec<Holder>, Vec<String>, usize) {
    let tasks = || round.assignment.tasks.values();
    let serving = || tasks().filter(|task| task.phase == Phase::Serving);
    let label = |task: &Task, name: &str| task.info.labels.get(name).cloned().unwrap_or_default();
    let regions: BTreeSet<String> = match round.policy.homes.is_empty() {
        true => BTreeSet::new(),
        false => serving().map(|task| label(task, REGION)).collect(),
    };
    let regions: Vec<String> = regions.into_iter().collect();
    let zones: BTreeSet<String> = match &round.policy.spread {
        None => BTreeSet::new(),
        Some(spread) => serving().map(|task| label(task, spread)).collect(),
    };
    let zones: Vec<String> = zones.into_iter().collect();
    // Sessions are minted in order: the revision whose first task is the youngest is the newest.
    let mut revisions: BTreeMap<&str, SessionId> = BTreeMap::new();
    for task in tasks() {
        revisions.entry(&task.info.revision).or_insert(task.session);
    }
    let newest = match revisions.len() {
        0 | 1 => None,
        _ => revisions.iter().max_by_key(|(_, first)| **first).map(|(revision, _)| *revision),
    };
    let keeps =
        |task: &Task| round.policy.confined.iter().any(|confined| confined.task == task.info.name);
    // Where there is nobody else for the rest, the keeper serves that, too.
    let keeps_alone = serving().any(|task| !keeps(task));
    let holder = |task: &Task| Holder {
        session: task.session,
        serving: task.phase == Phase::Serving && !(keeps_alone && keeps(task)),
        stays: task.phase == Phase::Serving,
        keeper: keeps_alone && keeps(task),
        newcomer: false,
        newest: match (newest, round.rollout) {
            (Some(newest), _) => newest == task.info.revision,
            // Where revisions tell nothing apart, whoever registered since the restart began has restarted.
            (None, Some(before)) => task.session > before,
            (None, None) => false,
        },
        zone: round.policy.spread.as_ref().map_or(0, |spread| {
            let value = label(task, spread);
            zones.binary_search(&value).unwrap_or(usize::MAX) as u32
        }),
        region: regions.binary_search(&label(task, REGION)).ok().map(|place| place as u32),
        given: 0,
        load: 0,
        start: 0,
        space: 0,
    };
    let holders = tasks().map(|task| holder(task)).collect();
    (holders, regions, zones.len())
}

/// Finds holders by session: sessions are minted in order, so mostly they lie close together and a table does.
pub(in crate::balance) enum Places {
    Table(u64, Vec<u32>),
    Sorted(Vec<SessionId>),
}

impl Places {
    pub(in crate::balance) fn new(holders: &[Holder]) -> Self {
        let sessions = || holders.iter().map(|holder| holder.session);
        let (first, last) = (sessions().next(), sessions().next_back());
        let span = last.zip(first).map_or(0, |(last, first)| last.0 - first.0 + 1);
        if span > 64 * holders.len() as u64 + 1_024 {
            return Self::Sorted(sessions().collect());
        }
        let first = first.map_or(0, |first| first.0);
        let mut table = vec![ABSENT; span as usize];
        for (place, session) in sessions().enumerate() {
            table[(session.0 - first) as usize] = place as u32;
        }
        Self::Table(first, table)
    }

    pub(in crate::balance) fn find(&self, session: SessionId) -> Option<u32> {
        match self {
            Self::Table(first, table) => {
                let place = usize::try_from(session.0.checked_sub(*first)?).ok()?;
                table.get(place).copied().filter(|place| *place != ABSENT)
            }
            Self::Sorted(sessions) => sessions.binary_search(&session).ok().map(|at| at as u32),
        }
    }
}

/// No task has the session.
const ABSENT: u32 = u32::MAX;

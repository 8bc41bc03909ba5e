//! An assignment made ready for lookups: a table on the top bits of the slice key says who serves it, or where to look closer.
//!
//! With eight buckets a slice thirteen of fourteen lie in one slice as a whole, and where that has one replica the bucket is the
//! answer: one read of two bytes, where a binary search in 10,000 slices takes 20 ns. In the others a key is nearly always in the
//! first or second slice looked at; where slices crowd (half of them in a hundredth of the line) a binary search among the candidates
//! takes over. Past 10,000 slices two buckets a slice do, or the table would not fit the second-level cache. Never changed once
//! built, so any number of threads may read it.

use std::ops::Deref;
use std::sync::Arc;

use mandoline_core::assignment::{Assigned, Assignment};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::name::TaskName;
use mandoline_core::slice::Slice;
use mandoline_core::spec::Ratio;
use mandoline_core::spill::Ticket;
use mandoline_core::task::{Address, SessionId, Task};

use crate::choice::{Call, Gauge, Gauges};

/// Up to how many slices the table has eight buckets for each; two beyond.
const DENSE_SLICES_MAX: usize = 10_000;
/// How many slices are looked at one after the other; with more to choose from, half of them are ruled out at a time.
const SCAN_MAX: usize = 8;

/// Nobody serves the key, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTask {
    /// Nothing is known of the job yet.
    #[error(
        "no assignment is known yet: wait until one has come, and see the clerk's state for what is in the way"
    )]
    Unknown,
    /// The key's slice has no task.
    #[error("slice {slice} has no task as of generation {generation}")]
    Nobody {
        /// The slice that the key lies in.
        slice: Slice,
        /// As of when.
        generation: Generation,
    },
}

/// An assignment made ready for lookups.
#[derive(Debug)]
pub struct Snapshot {
    assignment: Arc<Assignment>,
    spill: Option<Ratio>,
    /// Where slices begin and who serves them, in order; and one that nobody looks up, so that each has a next.
    entries: Box<[Entry]>,
    /// Who serves all keys of each bucket, as a place in `tasks`; or [`LOOK_CLOSER`].
    table: Box<[u16]>,
    /// The slice that holds the first key of each bucket; one more than there are buckets, for the last one's end.
    starts: Box<[u32]>,
    /// A key's bucket is what is left of it after a shift by this.
    shift: u32,
    tasks: Box<[Arc<Task>]>,
    /// Their sessions, close together: what connections are kept by.
    sessions: Box<[SessionId]>,
    /// What a clerk counts of each; nothing elsewhere.
    gauges: Box<[Arc<Gauge>]>,
    /// The replicas of slices that have several: places in `tasks`.
    many: Box<[u32]>,
}

/// Several slices begin in the bucket, or several tasks serve it, or none. No task that is found has this place.
const LOOK_CLOSER: u16 = u16::MAX;

/// Sixteen bytes, so that a cache line holds four.
#[derive(Clone, Copy, Debug)]
struct Entry {
    first: u64,
    /// Of one replica: its place in `tasks`. Of several: where they begin in `many`.
    at: u32,
    replicas: u32,
}

impl Snapshot {
    /// Makes an assignment ready.
    pub fn of(assignment: Arc<Assignment>) -> Self {
        let tasks: Box<[Arc<Task>]> = assignment.tasks.values().map(Arc::clone).collect();
        let place = |session: SessionId| {
            let place = tasks.binary_search_by_key(&session, |task| task.session);
            place.expect("replicas name tasks of the assignment") as u32
        };
        let mut many = Vec::new();
        let mut entry = |(slice, assigned): (Slice, &Assigned)| {
            let replicas = assigned.replicas.as_slice();
            let at = match replicas {
                [] => 0,
                [one] => place(one.session),
                several => {
                    let at = many.len() as u32;
                    many.extend(several.iter().map(|replica| place(replica.session)));
                    at
                }
            };
            Entry { first: slice.first().0, at, replicas: replicas.len() as u32 }
        };
        let mut entries: Vec<Entry> = assignment.slices.iter().map(&mut entry).collect();
        let (table, starts, shift) = table(&entries);
        entries.push(Entry { first: u64::MAX, at: 0, replicas: 0 });
        let spill = assignment.spill;
        let sessions = tasks.iter().map(|task| task.session).collect();
        let (entries, many) = (entries.into(), many.into());
        let gauges = Box::default();
        Self { assignment, spill, entries, table, starts, shift, tasks, sessions, gauges, many }
    }

    /// Makes it ready for a clerk, which counts what it asks of each task.
    pub(crate) fn counted(assignment: Arc<Assignment>, gauges: &Arc<Gauges>) -> Self {
        let made = Self::of(assignment);
        Self { gauges: gauges.of(&made.tasks), ..made }
    }

    /// Gives the assignment that it was built from. Its generation is zero before anything is known.
    pub fn assignment(&self) -> &Arc<Assignment> {
        &self.assignment
    }

    /// Finds the slice of a key by its place in the list.
    #[inline]
    pub fn index_of(&self, key: SliceKey) -> usize {
        let bucket = (key.0 >> self.shift) as usize;
        let (low, high) = (self.starts[bucket] as usize, self.starts[bucket + 1] as usize);
        if high - low > SCAN_MAX {
            let candidates = &self.entries[low..=high];
            return low + candidates.partition_point(|entry| entry.first <= key.0) - 1;
        }
        let mut slice = low;
        while slice < high && self.entries[slice + 1].first <= key.0 {
            slice += 1;
        }
        slice
    }

    /// Finds who serves a key, as a place among the tasks. `turn` says whose turn it is where several do.
    #[inline]
    pub(crate) fn find(&self, key: SliceKey, turn: impl FnOnce() -> u32) -> Result<u32, NoTask> {
        match self.table[(key.0 >> self.shift) as usize] {
            LOOK_CLOSER => self.look_closer(key, turn),
            task => Ok(u32::from(task)),
        }
    }

    /// Out of line, so that what is asked nearly always is compiled into the caller.
    #[inline(never)]
    fn look_closer(&self, key: SliceKey, turn: impl FnOnce() -> u32) -> Result<u32, NoTask> {
        let slice = self.index_of(key);
        let entry = self.entries[slice];
        match entry.replicas {
            1 => Ok(entry.at),
            0 => Err(self.nobody(slice)),
            several => Ok(self.choose(&self.many[entry.at as usize..][..several as usize], turn())),
        }
    }

    /// Chooses one of several replicas, by their places among the tasks.
    fn choose(&self, replicas: &[u32], turn: u32) -> u32 {
        if self.gauges.is_empty() {
            // Multiply-shift: an even share for each without a division.
            return replicas[((u64::from(turn) * replicas.len() as u64) >> 32) as usize];
        }
        Gauge::choose(&self.gauges, replicas, turn)
    }

    /// Says whether a task, by its place, is avoided now.
    pub(crate) fn is_avoided(&self, task: u32) -> bool {
        self.gauges.get(task as usize).is_some_and(|gauge| gauge.is_avoided())
    }

    /// Gives the tasks that are avoided now, since they fail.
    pub(crate) fn avoided(&self) -> impl Iterator<Item = &Arc<Task>> {
        let avoided = self.tasks.iter().zip(&self.gauges).filter(|(_, gauge)| gauge.is_avoided());
        avoided.map(|(task, _)| task)
    }

    /// Gives all who serve a key, as places among the tasks. Never empty.
    pub(crate) fn holders(&self, key: SliceKey) -> Result<&[u32], NoTask> {
        let slice = self.index_of(key);
        let holders = self.holders_of(slice);
        if holders.is_empty() { Err(self.nobody(slice)) } else { Ok(holders) }
    }

    fn holders_of(&self, slice: usize) -> &[u32] {
        let entry = &self.entries[slice];
        match entry.replicas {
            0 => &[],
            1 => std::slice::from_ref(&entry.at),
            several => &self.many[entry.at as usize..][..several as usize],
        }
    }

    /// Gives the tasks, sorted by session.
    pub(crate) fn tasks(&self) -> &[Arc<Task>] {
        &self.tasks
    }

    /// Says above which load in relation to the mean keys spill, if they do.
    #[inline]
    pub(crate) fn spill(&self) -> Option<Ratio> {
        self.spill
    }

    #[cold]
    fn nobody(&self, slice: usize) -> NoTask {
        let generation = self.assignment.generation;
        if generation == Generation::ZERO {
            return NoTask::Unknown;
        }
        NoTask::Nobody { slice: self.assignment.slices.slice_at(slice), generation }
    }
}

/// Eight or two buckets a slice, rounded up to a power of two: who serves each, where each begins, and the shift.
fn table(entries: &[Entry]) -> (Box<[u16]>, Box<[u32]>, u32) {
    let density = if entries.len() <= DENSE_SLICES_MAX { 8 } else { 2 };
    let buckets = (entries.len() * density).next_power_of_two();
    let shift = u64::BITS - buckets.trailing_zeros();
    let begins_by =
        |slice: usize, key: u64| entries.get(slice).is_some_and(|entry| entry.first <= key);
    let (mut table, mut starts) = (Vec::with_capacity(buckets), Vec::with_capacity(buckets + 1));
    let mut slice = 0;
    for bucket in 0..buckets as u64 {
        let first = bucket << shift;
        let last = first | ((1 << shift) - 1);
        while begins_by(slice + 1, first) {
            slice += 1;
        }
        let Entry { at, replicas, .. } = entries[slice];
        let is_whole = !begins_by(slice + 1, last) && replicas == 1;
        table.push(if is_whole { u16::try_from(at).unwrap_or(LOOK_CLOSER) } else { LOOK_CLOSER });
        starts.push(slice as u32);
    }
    starts.push(entries.len() as u32 - 1);
    (table.into(), starts.into(), shift)
}

/// Who serves a key: a place in a snapshot, which is kept as long as this lives.
///
/// `H` is how the snapshot is held: borrowed from a `Router`, or on its own.
#[derive(Clone, Copy)]
pub struct Target<H> {
    held: H,
    key: SliceKey,
    task: u32,
    // Kept small: a target is handed over by copy.
    ticket: Option<Ticket>,
    lane: u16,
    is_spilled: bool,
}

/// That a request was sent, to be given back with its answer: see [`crate::Clerk::heard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    pub(crate) session: SessionId,
    pub(crate) ticket: Ticket,
    /// Whose answer it will be, where a clerk has several callers.
    pub(crate) lane: u16,
}

impl<H: Deref<Target = Snapshot>> Target<H> {
    #[inline]
    pub(crate) fn new(held: H, key: SliceKey, task: u32) -> Self {
        Self { held, key, task, ticket: None, lane: 0, is_spilled: false }
    }

    /// Says by what to know the answer, and whether the task is none of those that serve the key.
    pub(crate) fn with_spill(self, sent: Sent, is_spilled: bool) -> Self {
        Self { ticket: Some(sent.ticket), lane: sent.lane, is_spilled, ..self }
    }

    /// Says by what to know the answer, for jobs with spill: give it to [`crate::Clerk::heard`] with what the answer tells.
    pub fn sent(&self) -> Option<Sent> {
        let (session, lane) = (self.session(), self.lane);
        self.ticket.map(|ticket| Sent { session, ticket, lane })
    }

    /// Says whether the task is none of those that serve the key, and takes it because they are loaded above the cap. Tell it
    /// so with the request, by `mandoline-spill` or in your own protocol: it takes it by [`crate::Slicelet::claim_spilled`].
    pub fn is_spilled(&self) -> bool {
        self.is_spilled
    }

    /// Says whether the clerk knows its own region: then it chose by that, and a replica far away is meant.
    pub(crate) fn is_by_region(&self) -> bool {
        self.held.gauges.first().is_some_and(|gauge| gauge.is_by_region())
    }

    /// Counts that a request is sent to the task, until what comes back is dropped. Callers that count choose better among replicas:
    /// the less loaded of two, and none that fails.
    pub fn begin(&self) -> Call {
        Call::begin(&self.held.gauges[self.task as usize])
    }

    /// Gives all that is known of the task.
    #[inline]
    pub fn task(&self) -> &Arc<Task> {
        &self.held.tasks[self.task as usize]
    }

    /// Names the task's life.
    #[inline]
    pub fn session(&self) -> SessionId {
        self.held.sessions[self.task as usize]
    }

    /// Names the task.
    pub fn name(&self) -> &TaskName {
        &self.task().info.name
    }

    /// Gives where the task serves requests.
    pub fn address(&self) -> &Address {
        &self.task().info.address
    }

    /// Gives the generation that this answer is as of.
    pub fn generation(&self) -> Generation {
        self.held.assignment.generation
    }

    /// Gives the slice that the key lies in.
    pub fn slice(&self) -> Slice {
        self.held.assignment.slices.slice_at(self.held.index_of(self.key))
    }

    /// Gives what the assignment says of the slice.
    pub fn assigned(&self) -> &Assigned {
        self.held.assignment.slices.value_at(self.held.index_of(self.key))
    }

    /// Walks all tasks that serve the slice; this one is among them, unless the key was spilled.
    pub fn replicas(&self) -> impl ExactSizeIterator<Item = &Arc<Task>> + Clone {
        let places = self.held.holders_of(self.held.index_of(self.key));
        places.iter().map(|place| &self.held.tasks[*place as usize])
    }
}

impl<H: Deref<Target = Snapshot>> std::fmt::Debug for Target<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} at {} for {} as of {}",
            self.name(),
            self.address(),
            self.slice(),
            self.generation()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_core::assignment::{Replica, Replicas};
    use mandoline_core::prng::Prng;
    use mandoline_core::slice_map::SliceMap;
    use mandoline_core::task::TaskInfo;

    fn assignment(firsts: impl IntoIterator<Item = u64>) -> Arc<Assignment> {
        let mut firsts: Vec<u64> = firsts.into_iter().chain([0]).collect();
        firsts.sort_unstable();
        firsts.dedup();
        let generation = Generation { incarnation: 1, number: 7 };
        let mut made = Assignment::new("kv".parse().unwrap(), generation);
        for id in 1..=5 {
            let name = format!("t{id}").parse().unwrap();
            let info = TaskInfo::new(name, id, format!("127.0.0.1:{id}").parse().unwrap());
            let task = Task::new(SessionId(id), info);
            made.tasks.insert(SessionId(id), Arc::new(task));
        }
        let replica = |id: u64| Replica { session: SessionId(id), since: generation };
        let run = |(index, first): (usize, u64)| {
            // None, one and several in turn.
            let replicas: Replicas =
                (0..index as u64 % 4).map(|n| replica(1 + (index as u64 + n) % 5)).collect();
            (SliceKey(first), Assigned { replicas, ..Assigned::default() })
        };
        made.slices =
            SliceMap::from_runs(firsts.into_iter().enumerate().map(run).collect()).unwrap();
        Arc::new(made)
    }

    #[test]
    fn the_table_finds_what_the_assignment_says() {
        let mut prng = Prng::new(11);
        let crowd: Vec<u64> = (0..3_000).map(|_| prng.below(1 << 40)).collect();
        let even: Vec<u64> = (0..3_000).map(|_| prng.bits()).collect();
        let many: Vec<u64> = (0..20_000).map(|_| prng.bits()).collect();
        let edges = vec![1, 2, 3, u64::MAX - 1, u64::MAX];
        for firsts in [
            vec![],
            vec![1 << 63],
            edges,
            even.clone(),
            crowd.clone(),
            [even, crowd].concat(),
            many,
        ] {
            let assignment = assignment(firsts.iter().copied());
            let snapshot = Snapshot::of(Arc::clone(&assignment));
            let near = firsts
                .iter()
                .flat_map(|first| [first.wrapping_sub(1), *first, first.wrapping_add(1)]);
            let far: Vec<u64> = (0..1_000).map(|_| prng.bits()).chain([0, u64::MAX]).collect();
            for key in near.chain(far).map(SliceKey) {
                assert_eq!(
                    snapshot.index_of(key),
                    assignment.slices.index_of(key),
                    "{key} among {}",
                    firsts.len()
                );
                let (slice, assigned) = assignment.get(key);
                match snapshot.find(key, || prng.bits() as u32) {
                    Ok(found) => {
                        let target = Target::new(&snapshot, key, found);
                        assert!(assigned.replicas.of(target.session()).is_some(), "{target:?}");
                        assert_eq!((target.slice(), target.assigned()), (slice, assigned));
                        let replicas: Vec<_> = target.replicas().map(|task| task.session).collect();
                        let expected: Vec<_> =
                            assigned.replicas.as_slice().iter().map(|r| r.session).collect();
                        assert_eq!(replicas, expected);
                    }
                    Err(error) => {
                        assert_eq!(
                            error,
                            NoTask::Nobody { slice, generation: assignment.generation }
                        );
                        assert!(assigned.replicas.as_slice().is_empty());
                    }
                }
            }
        }
    }

    #[test]
    fn replicas_share_evenly() {
        let assignment = assignment([1 << 61, 2 << 61, 3 << 61]);
        let snapshot = Snapshot::of(assignment);
        let mut prng = Prng::new(3);
        let mut taken = std::collections::BTreeMap::<u32, u32>::new();
        for _ in 0..3_000 {
            let task = snapshot.find(SliceKey::MAX, || prng.bits() as u32).unwrap();
            *taken.entry(task).or_default() += 1;
        }
        assert_eq!(taken.len(), 3);
        assert!(taken.values().all(|taken| (850..1_150).contains(taken)), "{taken:?}");
    }

    #[test]
    fn before_anything_is_known_every_key_is_unknown() {
        let nothing = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let snapshot = Snapshot::of(Arc::new(nothing));
        assert_eq!(snapshot.find(SliceKey(9), || 0), Err(NoTask::Unknown));
    }
}

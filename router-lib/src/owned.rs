//! What a task owns right now, and what its slices have carried since the last report.
//!
//! Requests read one `View` behind an `ArcSwap`. Installing a new one runs on a thread that may wait for the
//! application: slices that come are announced before the first request of theirs is taken, slices that go after the
//! last could begin.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use mandoline_core::assignment::{Assignment, Replica};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::lease::Held;
use mandoline_core::load::Load;
use mandoline_core::report::{HOT_MAX, HotKey, Report, Size};
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::METRICS_MAX;
use mandoline_core::task::{Address, SessionId};
use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::counters::{Tally, per_second, spread};
use crate::hot::{Found, Hot};
use crate::snapshot::Snapshot;
use crate::tenure::{Tenure, Tenures};
use crate::term::Term;

/// What the application does when slices come or go.
pub(crate) type Callback = Box<dyn Fn(&[Slice]) + Send + Sync>;
/// What the application knows of its slices.
pub(crate) type Meter = Box<dyn Fn(&[Slice]) -> Vec<Size> + Send + Sync>;

/// The most entries of one report (some 3 MB of the 4 MiB that a message may have); past it neighbours are reported
/// together, and their load is taken to lie evenly.
const REPORT_MAX_SLICES: usize = 100_000;
/// What sizes may take of a report beside its slices, at 31 bytes a slice, for it to stay below 4 MiB.
const REPORT_MAX_BYTES: usize = 3_900_000;

/// One assignment, seen by one of its tasks.
pub(crate) struct View {
    /// Who looks; nobody before registration and after the session has ended.
    pub(crate) session: Option<SessionId>,
    snapshot: Snapshot,
    // A place for each slice of the assignment.
    mine: Box<[bool]>,
    /// Of an exclusive job: what is held, and until when.
    tenures: Option<Tenures>,
    tally: Tally,
    // Of all views: which keys are hot does not depend on how they are cut.
    hot: Arc<Hot>,
}

impl View {
    fn new(session: Option<SessionId>, assignment: Arc<Assignment>, hot: Arc<Hot>) -> Self {
        let slices = &assignment.slices;
        let mine =
            |index| session.is_some_and(|own| slices.value_at(index).replicas.of(own).is_some());
        let mine = (0..slices.count()).map(mine).collect();
        let tally = Tally::new(slices.count());
        Self { session, snapshot: Snapshot::of(assignment), mine, tenures: None, tally, hot }
    }

    /// Sees an assignment as an owner: what it does not hold is not its own, whatever the assignment says.
    fn of_owner(tenures: Tenures, assignment: Arc<Assignment>, hot: Arc<Hot>) -> Self {
        let slices = assignment.slices.count();
        let mine = (0..slices).map(|index| tenures.at(index).is_some()).collect();
        let tally = Tally::new(slices);
        let (session, snapshot) = (Some(tenures.term.session), Snapshot::of(assignment));
        Self { session, snapshot, mine, tenures: Some(tenures), tally, hot }
    }

    /// Gives the place of a key's slice.
    pub(crate) fn index_of(&self, key: SliceKey) -> usize {
        self.snapshot.index_of(key)
    }

    /// Gives what is held, where slices have owners.
    pub(crate) const fn tenures(&self) -> Option<&Tenures> {
        self.tenures.as_ref()
    }

    /// Gives what is held at a key, where slices have owners.
    pub(crate) fn tenure(&self, key: SliceKey) -> Option<(&Term, &Tenure)> {
        let tenures = self.tenures.as_ref()?;
        Some((&tenures.term, tenures.at(self.index_of(key))?))
    }

    /// Says whether the task has what is at a key, in use or just being released.
    pub(crate) fn has(&self, key: SliceKey) -> bool {
        self.mine[self.index_of(key)]
    }

    /// Says whether new work may be taken at a place.
    fn accepts(&self, index: usize) -> bool {
        match &self.tenures {
            None => self.mine[index],
            Some(tenures) => tenures.accepts(index),
        }
    }

    /// Counts what a request has cost.
    pub(crate) fn count(&self, index: usize, key: SliceKey, thousandths: u64) {
        self.tally.add(index, thousandths);
        self.hot.note(key, thousandths);
    }

    /// What is known.
    pub(crate) fn assignment(&self) -> &Arc<Assignment> {
        self.snapshot.assignment()
    }

    /// Says whether the task owns `key`.
    pub(crate) fn owns(&self, key: SliceKey) -> bool {
        self.accepts(self.index_of(key))
    }

    /// Says whether the task owns `key`, and counts what its request costs, whosever it is.
    pub(crate) fn claim(&self, key: SliceKey, thousandths: u64) -> bool {
        let index = self.snapshot.index_of(key);
        self.tally.add(index, thousandths);
        let mine = self.accepts(index);
        if mine {
            // What came to the wrong task is counted by the right one.
            self.hot.note(key, thousandths);
        }
        mine
    }

    /// Says whether callers of the job may send keys to tasks that do not own them.
    pub(crate) fn lets_spill(&self) -> bool {
        self.snapshot.spill().is_some()
    }

    /// Says whether the task may take a request for a key that it does not own, since its job lets callers spill; counts what
    /// it costs if so.
    pub(crate) fn claim_spilled(&self, key: SliceKey, thousandths: u64) -> bool {
        let is_taken = self.session.is_some() && self.lets_spill();
        if is_taken {
            // By the key's slice, whoever serves it: the planner evens out what is asked for.
            self.tally.add(self.snapshot.index_of(key), thousandths);
            self.hot.note(key, thousandths);
        }
        is_taken
    }

    /// Gives where another task serves `key`, as far as is known.
    pub(crate) fn other_owner(&self, key: SliceKey) -> Option<Address> {
        let (_, assigned) = self.assignment().get(key);
        let other = assigned
            .replicas
            .as_slice()
            .iter()
            .find(|replica| Some(replica.session) != self.session)?;
        Some(self.assignment().tasks.get(&other.session)?.info.address.clone())
    }

    /// Counts the slices that the task owns.
    pub(crate) fn owned(&self) -> usize {
        self.mine.iter().filter(|mine| **mine).count()
    }

    /// The slices that the task owns, each with since when.
    fn held(&self) -> Vec<(Slice, Generation)> {
        let Some(session) = self.session else { return Vec::new() };
        self.assignment().of(session).map(|(slice, replica)| (slice, replica.since)).collect()
    }
}

/// What a task owns right now.
pub(crate) struct Owned {
    view: ArcSwap<View>,
    // Views that were replaced while a thread was about to count in them. What they counted goes into the next view, and
    // they go with the next assignment or report at which nobody holds them: a thread holds one for one lookup, so there
    // are no more of them than threads.
    retired: Mutex<Vec<Arc<View>>>,
    added: Callback,
    removed: Callback,
    meter: Option<Meter>,
    /// Of an exclusive job: what is to become a view.
    possession: Mutex<Possession>,
    /// Each new view, and each guard that was the last of a closed gate.
    pub(crate) changed: Notify,
    pub(crate) drained: Notify,
}

/// What an owner holds, on its way into a view.
#[derive(Default)]
struct Possession {
    term: Option<Arc<Term>>,
    held: Vec<Held>,
    /// What the application has been told of, and since when it is held.
    ready: Option<SliceMap<Option<Generation>>>,
    /// What it was told of and has to be told that it is gone.
    gone: Vec<Slice>,
    /// Slices that have come by a hand-off, whose state is still set aside.
    arrived: Vec<Arrival>,
}

/// A slice that has come by a hand-off.
struct Arrival {
    id: HandOffId,
    slice: Slice,
    /// The assignment that said so: an older one does not show it yet.
    known: Generation,
}

/// What becomes of state that was set aside for a slice that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aside {
    /// It is used before the slice is served.
    Keep(HandOffId),
    /// The slice was lost again before it was served, so what was set aside is of no use.
    Discard(HandOffId),
}

impl Owned {
    /// Begins with nothing.
    pub(crate) fn new(start: Assignment, added: Callback, removed: Callback) -> Self {
        let view = ArcSwap::from_pointee(View::new(None, Arc::new(start), Arc::new(Hot::new())));
        Self {
            view,
            retired: Mutex::default(),
            added,
            removed,
            meter: None,
            possession: Mutex::default(),
            changed: Notify::new(),
            drained: Notify::new(),
        }
    }

    /// Asks the application for what it knows, with each report.
    #[must_use]
    pub(crate) fn with_meter(self, meter: Option<Meter>) -> Self {
        Self { meter, ..self }
    }

    /// Gives what holds right now, for one lookup.
    pub(crate) fn view(&self) -> arc_swap::Guard<Arc<View>> {
        self.view.load()
    }

    /// Takes a new assignment, or a new session, into force: announces slices that come, then serves them, then
    /// announces slices that have gone. One caller at a time.
    pub(crate) fn install(
        &self,
        session: Option<SessionId>,
        assignment: Arc<Assignment>,
        settle: impl Fn(Aside),
    ) {
        let old = self.view.load_full();
        let new = Arc::new(View::new(session, assignment, Arc::clone(&old.hot)));
        let asides = self.lock().asides(new.assignment().generation, &new.held());
        let change = change(&old, &new);
        // A slice that was lost and came back in between goes before it comes.
        if !change.broken.is_empty() {
            announce(&self.removed, &change.broken, "removed");
        }
        asides.into_iter().for_each(settle);
        if !change.added.is_empty() {
            announce(&self.added, &change.added, "added");
        }
        self.publish(old, &new);
        if !change.removed.is_empty() {
            announce(&self.removed, &change.removed, "removed");
        }
    }

    fn publish(&self, old: Arc<View>, new: &Arc<View>) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        self.view.store(Arc::clone(new));
        retired.push(old);
        settle(&mut retired, new);
        drop(retired);
        self.changed.notify_waiters();
    }

    // --- Of an exclusive job. What is lost is lost at once; only what comes waits for the application.

    /// Begins a session that may serve only as long as it is granted: nothing is held yet.
    pub(crate) fn begin(&self, term: Arc<Term>, assignment: Arc<Assignment>) {
        self.possess(Some(term), assignment, Vec::new());
    }

    /// Owns for good what an assignment says that `session` owns.
    pub(crate) fn own(&self, session: SessionId, assignment: Arc<Assignment>) {
        let term = Arc::new(Term::leased(session));
        let _begun = term.extend(Time::from_nanos(u64::MAX));
        self.begin(term, Arc::clone(&assignment));
        let held = assignment.slices.iter().filter_map(|(slice, assigned)| {
            let Replica { since, .. } = assigned.replicas.of(session)?;
            Some(Held { slice, since, token: assigned.token, release: None })
        });
        self.hold(Arc::clone(&assignment), held.collect());
        self.welcome(|_| ());
    }

    /// Takes what the session holds from now on, as of an assignment. What it holds no more, or not without a break, is
    /// gone when this returns; what is new waits for [`Owned::welcome`].
    pub(crate) fn hold(&self, assignment: Arc<Assignment>, held: Vec<Held>) {
        let term = self.lock().term.clone();
        self.possess(term, assignment, held);
    }

    fn possess(&self, term: Option<Arc<Term>>, assignment: Arc<Assignment>, held: Vec<Held>) {
        let mut possession = self.lock();
        let before = possession.ready.take().unwrap_or_else(|| SliceMap::uniform(None));
        let same_term = match (&term, &possession.term) {
            (Some(new), Some(old)) => Arc::ptr_eq(new, old),
            _ => false,
        };
        let mut ready = SliceMap::uniform(None);
        for Held { slice, since, .. } in held.iter().filter(|_| same_term) {
            for (part, known) in before.touching(*slice) {
                if known == &Some(*since)
                    && let Some(part) = part.overlap(*slice)
                {
                    ready.set(part, *known);
                }
            }
        }
        let told = |ready: &SliceMap<Option<Generation>>| {
            joined(ready.iter().filter(|(_, since)| since.is_some()).map(|(slice, _)| slice))
        };
        let gone = without(&told(&before), &told(&ready));
        possession.gone.extend(gone);
        if !same_term {
            // They came to a session that is over, by assignments that the next one may not count on from.
            possession.arrived.iter_mut().for_each(|arrival| arrival.known = Generation::ZERO);
        }
        (possession.term, possession.held) = (term, held);
        possession.ready = Some(ready);
        self.show(&possession, assignment);
    }

    /// Notes that a slice has come by a hand-off, as an assignment says that is about to be taken in: what was prepared for it is
    /// used before it is served.
    pub(crate) fn arrived(&self, id: HandOffId, by: &Assignment) {
        let (slice, _) = by.get(id.first);
        self.lock().arrived.push(Arrival { id, slice, known: by.generation });
    }

    /// Announces what has gone, then what has come, and serves that. Runs beside the session, since the application may take its
    /// time; what is lost meanwhile is not served afterwards.
    pub(crate) fn welcome(&self, settle: impl Fn(Aside)) {
        loop {
            let (gone, asides, coming) = {
                let mut possession = self.lock();
                let gone = std::mem::take(&mut possession.gone);
                let held = possession.held.iter().map(|held| (held.slice, held.since));
                let held: Vec<(Slice, Generation)> = held.collect();
                let known = self.view().assignment().generation;
                (gone, possession.asides(known, &held), possession.coming())
            };
            if gone.is_empty() && asides.is_empty() && coming.is_empty() {
                return;
            }
            if !gone.is_empty() {
                announce(&self.removed, &joined(sorted(gone)), "removed");
            }
            asides.into_iter().for_each(&settle);
            if !coming.is_empty() {
                announce(&self.added, &joined(coming.iter().map(|held| held.slice)), "added");
            }
            let mut possession = self.lock();
            let still = |known: &Held| {
                let held = possession.held.iter().filter(|held| held.since == known.since);
                held.filter_map(|held| held.slice.overlap(known.slice)).collect::<Vec<_>>()
            };
            let come: Vec<(Slice, Generation)> = coming
                .iter()
                .flat_map(|known| still(known).into_iter().map(|slice| (slice, known.since)))
                .collect();
            let came: Vec<Slice> = come.iter().map(|(slice, _)| *slice).collect();
            // Announced, and lost before it could be served.
            let lost =
                without(&joined(coming.iter().map(|held| held.slice)), &joined(sorted(came)));
            possession.gone.extend(lost);
            if let Some(ready) = &mut possession.ready {
                come.into_iter().for_each(|(slice, since)| ready.set(slice, Some(since)));
            }
            let assignment = Arc::clone(self.view().assignment());
            self.show(&possession, assignment);
        }
    }

    /// Ends everything at once: the lease has run out, or the session has ended.
    pub(crate) fn lapse(&self, assignment: Arc<Assignment>) {
        if let Some(term) = &self.lock().term {
            term.end();
        }
        // Guards that are held over the next session must not come to life by it.
        self.view().tenures().into_iter().for_each(Tenures::revoke);
        self.possess(None, assignment, Vec::new());
    }

    /// Puts what is held into a view. Under the lock of what is held, so that views follow each other as that does.
    fn show(&self, possession: &Possession, assignment: Arc<Assignment>) {
        let old = self.view.load_full();
        let hot = Arc::clone(&old.hot);
        let new = match (&possession.term, &possession.ready) {
            (Some(term), Some(ready)) => {
                let before =
                    old.tenures.as_ref().map(|tenures| (tenures, old.assignment().as_ref()));
                let held = &possession.held;
                let tenures = Tenures::after(term, before, &assignment, held, ready);
                Arc::new(View::of_owner(tenures, assignment, hot))
            }
            _ => Arc::new(View::new(None, assignment, hot)),
        };
        let replaced = Arc::clone(&old);
        self.publish(old, &new);
        if let Some(tenures) = &new.tenures {
            tenures.take_over(replaced.tenures.as_ref());
        }
        // Of a release that began with nobody inside no guard says that it was the last.
        self.drained.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Possession> {
        self.possession.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was counted since it was last asked, by the slices of the view that holds now.
    fn fold(&self) -> (Arc<View>, Vec<u64>) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.view.load_full();
        settle(&mut retired, &now);
        drop(retired);
        let slices = now.assignment().slices.count();
        let counted = (0..slices).map(|index| now.tally.take(index)).collect();
        (now, counted)
    }
}

impl Possession {
    /// What is held and the application was not told of yet.
    fn coming(&self) -> Vec<Held> {
        let Some(ready) = &self.ready else { return Vec::new() };
        let is_ready =
            |held: &Held| ready.touching(held.slice).all(|(_, known)| known == &Some(held.since));
        self.held.iter().filter(|held| !is_ready(held)).copied().collect()
    }

    /// Takes out what has arrived by an assignment, and says what becomes of it by what is held since when. A slice that is not
    /// here whole any more starts empty where it is: the rest of its state would be left behind here.
    fn asides(&mut self, known: Generation, held: &[(Slice, Generation)]) -> Vec<Aside> {
        let arrived = self.arrived.extract_if(.., |arrival| arrival.known <= known);
        let aside = |Arrival { id, slice, .. }| {
            let since = held.iter().filter(|(_, since)| *since == id.began);
            let here = joined(since.map(|(slice, _)| *slice));
            if without(&[slice], &here).is_empty() { Aside::Keep(id) } else { Aside::Discard(id) }
        };
        arrived.map(aside).collect()
    }
}

fn sorted(mut slices: Vec<Slice>) -> Vec<Slice> {
    slices.sort_unstable();
    slices
}

/// Moves what views that were replaced have counted into the one that holds now, and lets go of those that nobody holds.
fn settle(retired: &mut Vec<Arc<View>>, now: &View) {
    if retired.is_empty() {
        return;
    }
    let slices = &now.assignment().slices;
    let mut counted = vec![0; slices.count()];
    // Looked up once, where a slice was split: most are split round a hot key.
    let mut hot: Option<Vec<(SliceKey, u64)>> = None;
    retired.retain(|old| {
        // Asked before it is drained: nobody can take hold of it anew, so what it counts afterwards is nothing.
        let in_use = Arc::strong_count(old) > 1;
        for (index, (slice, _)) in old.assignment().slices.iter().enumerate() {
            let late = old.tally.take(index);
            if late > 0 {
                let split = slices.index_of(slice.first()) < slices.index_of(slice.last());
                let hot: &[_] =
                    if split { hot.get_or_insert_with(|| now.hot.so_far()) } else { &[] };
                spread(late, slice, slices, hot, &mut counted);
            }
        }
        in_use
    });
    for (index, late) in counted.into_iter().enumerate().filter(|(_, late)| *late > 0) {
        now.tally.add(index, late);
    }
}

fn announce(callback: &Callback, slices: &[Slice], what: &str) {
    // The callback is the application's: its panic must not cost the session.
    if catch_unwind(AssertUnwindSafe(|| callback(slices))).is_err() {
        tracing::error!(
            slices = slices.len(),
            "the callback for slices {what} panicked; going on without it"
        );
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    added: Vec<Slice>,
    removed: Vec<Slice>,
    broken: Vec<Slice>,
}

/// What comes and goes, as ranges of keys: a split or merge that moves nothing changes nothing.
fn change(old: &View, new: &View) -> Change {
    let same_life = old.session == new.session;
    let known = old.assignment().generation;
    let (before, after) = (old.held(), new.held());
    let unbroken = |since: Generation| same_life && since <= known;
    let fresh = after.iter().filter(|(_, since)| !unbroken(*since)).map(|(slice, _)| *slice);
    let (had, has) =
        (joined(before.iter().map(|held| held.0)), joined(after.iter().map(|held| held.0)));
    let broken = common(&had, &joined(fresh));
    let mut added = without(&has, &had);
    added.extend(&broken);
    added.sort_unstable();
    let removed = without(&had, &has);
    Change { added: joined(added), removed, broken }
}

/// Joins neighbours in a sorted list of slices.
fn joined(slices: impl IntoIterator<Item = Slice>) -> Vec<Slice> {
    let mut runs: Vec<Slice> = Vec::new();
    for slice in slices {
        match runs.last_mut() {
            Some(before) if before.last().next() == Some(slice.first()) => {
                *before = Slice::new(before.first(), slice.last()).expect("the end only grows");
            }
            _ => runs.push(slice),
        }
    }
    runs
}

/// The keys of `a` that `b` has too. Both are sorted, without overlap.
fn common(a: &[Slice], b: &[Slice]) -> Vec<Slice> {
    let mut both = Vec::new();
    let mut from = 0;
    for slice in a {
        from += b[from..].partition_point(|other| other.last() < slice.first());
        both.extend(b[from..].iter().map_while(|other| slice.overlap(*other)));
    }
    both
}

/// The keys of `a` that `b` lacks. Both are sorted, without overlap.
fn without(a: &[Slice], b: &[Slice]) -> Vec<Slice> {
    let mut left = Vec::new();
    for slice in a {
        let mut rest = Some(*slice);
        for hole in common(&[*slice], b) {
            let Some(now) = rest else { break };
            let before = hole.first().previous().and_then(|end| Slice::new(now.first(), end));
            left.extend(before);
            rest = hole.last().next().and_then(|start| Slice::new(start, now.last()));
        }
        left.extend(rest);
    }
    left
}

/// Turns what is counted into reports, one window after the other.
pub(crate) struct Window {
    began: Instant,
    generation: Generation,
}

impl Window {
    /// Begins the first window.
    pub(crate) fn begin(owned: &Owned, now: Instant) -> Self {
        Self { began: now, generation: owned.view().assignment().generation }
    }

    /// Ends the window and begins the next. Nothing to report before there is a session.
    pub(crate) fn close(&mut self, owned: &Owned, now: Instant) -> Option<Report> {
        // A window that no clock could measure says nothing; what it counted goes into the next.
        let window = now.duration_since(self.began);
        if window < Duration::from_millis(1) {
            return None;
        }
        let (view, counted) = owned.fold();
        let found = view.hot.take();
        let generation = std::mem::replace(&mut self.generation, view.assignment().generation);
        self.began = now;
        let session = view.session?;
        let slices = (0..counted.len())
            .filter(|index| view.mine[*index] || counted[*index] > 0)
            .map(|index| {
                (view.assignment().slices.slice_at(index), per_second(counted[index], window))
            })
            .collect();
        let mut report =
            Report::new(session, generation, window, thinned(slices, REPORT_MAX_SLICES));
        let mut hot = hottest(&view, &found, window);
        hot.retain(|hot| report.load_around(hot.key).is_some());
        report.hot = hot;
        // Samples are estimates, and a request between the two takings is in one of them alone.
        report.clamp();
        report.sizes = owned.meter.as_ref().map_or_else(Vec::new, |meter| {
            let room = REPORT_MAX_BYTES.saturating_sub(report.slices.len() * 31);
            metered(meter, &view, room)
        });
        Some(report)
    }
}

/// The heaviest keys that the task serves, sorted.
fn hottest(view: &View, found: &Found, window: Duration) -> Vec<HotKey> {
    let mut hot: Vec<HotKey> = found
        .worth_telling()
        .into_iter()
        .filter(|heavy| view.owns(heavy.key))
        .take(HOT_MAX)
        .map(|heavy| HotKey { key: heavy.key, load: per_second(heavy.at_least(), window) })
        .collect();
    hot.sort_unstable();
    hot
}

/// What the application says of the slices that the task serves: sorted, each once, and no more than there is room for.
fn metered(meter: &Meter, view: &View, mut room: usize) -> Vec<Size> {
    let held: Vec<Slice> = view.held().into_iter().map(|(slice, _)| slice).collect();
    // The meter is the application's: its panic must not cost the session.
    let Ok(mut sizes) = catch_unwind(AssertUnwindSafe(|| meter(&held))) else {
        tracing::error!(slices = held.len(), "the meter panicked; reporting without it");
        return Vec::new();
    };
    let told = sizes.len();
    sizes.retain(|size| {
        held.binary_search(&size.slice).is_ok() && size.metrics.len() <= METRICS_MAX
    });
    sizes.sort_by_key(|size| size.slice);
    sizes.dedup_by_key(|size| size.slice);
    let fit = sizes.iter().take_while(|size| {
        let left = room.checked_sub(40 + 8 * size.metrics.len());
        room = left.unwrap_or(0);
        left.is_some()
    });
    let fit = fit.count();
    sizes.truncate(fit);
    if sizes.len() < told {
        tracing::warn!(
            told,
            reported = sizes.len(),
            "the meter spoke of slices that the task does not serve, twice of one, of too many, or gave more than {METRICS_MAX} metrics"
        );
    }
    sizes
}

/// Reports neighbours together, two by two, until there are few enough.
fn thinned(mut slices: Vec<(Slice, Load)>, max: usize) -> Vec<(Slice, Load)> {
    while slices.len() > max {
        let before = slices.len();
        let mut fewer: Vec<(Slice, Load)> = Vec::with_capacity(before / 2 + 1);
        let mut may_join = false;
        for (slice, load) in slices {
            match fewer.last_mut() {
                Some((first, sum)) if may_join && first.last().next() == Some(slice.first()) => {
                    *first = Slice::new(first.first(), slice.last()).expect("the end only grows");
                    *sum += load;
                    may_join = false;
                }
                _ => {
                    fewer.push((slice, load));
                    may_join = true;
                }
            }
        }
        slices = fewer;
        if slices.len() == before {
            // No neighbours are left: what is beyond the limit goes unreported, and keeps the load last stored.
            slices.truncate(max);
        }
    }
    slices
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mandoline_core::assignment::{Assigned, Replica, Replicas};
    use mandoline_core::slice_map::SliceMap;
    use mandoline_core::task::{Task, TaskInfo};

    use super::*;

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn number(number: u64) -> Generation {
        Generation { incarnation: 1, number }
    }

    /// Session 1 and 2 are tasks; each run is where it begins, whose it is (0: nobody's) and since when.
    fn assignment(generation: u64, runs: &[(u64, u64, u64)]) -> Arc<Assignment> {
        let task = |id: u64| {
            let address = format!("127.0.0.1:{id}").parse().unwrap();
            let info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, address);
            (SessionId(id), Arc::new(Task::new(SessionId(id), info)))
        };
        let run = |&(first, session, since): &(u64, u64, u64)| {
            let replica = Replica { session: SessionId(session), since: number(since) };
            let replicas = if session == 0 { Replicas::None } else { Replicas::One(replica) };
            (SliceKey(first), Assigned { replicas, ..Assigned::default() })
        };
        Arc::new(Assignment {
            job: "kv".parse().unwrap(),
            generation: number(generation),
            tasks: BTreeMap::from([task(1), task(2)]),
            slices: SliceMap::from_runs(runs.iter().map(run).collect()).unwrap(),
            spill: None,
        })
    }

    fn view(session: u64, generation: u64, runs: &[(u64, u64, u64)]) -> View {
        View::new(Some(SessionId(session)), assignment(generation, runs), Arc::new(Hot::new()))
    }

    /// An owner whose callbacks write down what they hear.
    fn owned() -> (Arc<Owned>, Arc<Mutex<Vec<String>>>) {
        let heard: Arc<Mutex<Vec<String>>> = Arc::default();
        let note = |what: &'static str| -> Callback {
            let heard = Arc::clone(&heard);
            Box::new(move |slices| {
                let slices: Vec<String> = slices.iter().map(Slice::to_string).collect();
                heard.lock().unwrap().push(format!("{what} {}", slices.join(" ")));
            })
        };
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        (Arc::new(Owned::new(start, note("added"), note("removed"))), heard)
    }

    #[test]
    fn a_split_or_merge_that_moves_nothing_is_not_told() {
        let whole = view(1, 5, &[(0, 1, 3), (100, 2, 3)]);
        let parted = view(1, 6, &[(0, 1, 3), (50, 1, 3), (100, 2, 3)]);
        assert_eq!(change(&whole, &parted), Change::default());
        assert_eq!(change(&parted, &whole), Change::default());
    }

    #[test]
    fn what_comes_and_goes_is_told_as_ranges() {
        let before = view(1, 5, &[(0, 1, 3), (100, 2, 3), (200, 2, 3), (300, 1, 3)]);
        let after = view(1, 6, &[(0, 1, 3), (50, 2, 6), (100, 1, 6), (200, 1, 6), (300, 1, 3)]);
        let expected =
            Change { added: vec![slice(100, 299)], removed: vec![slice(50, 99)], broken: vec![] };
        assert_eq!(change(&before, &after), expected);
    }

    #[test]
    fn what_was_lost_and_came_back_unseen_goes_and_comes() {
        let before = view(1, 5, &[(0, 1, 3), (100, 2, 3)]);
        let after = view(1, 9, &[(0, 1, 8), (100, 2, 3)]);
        let gone = vec![slice(0, 99)];
        let expected = Change { added: gone.clone(), removed: vec![], broken: gone };
        assert_eq!(change(&before, &after), expected);
    }

    #[test]
    fn another_session_holds_nothing_of_the_one_before() {
        let before = view(1, 5, &[(0, 1, 3), (100, 2, 3)]);
        let after = view(2, 5, &[(0, 1, 3), (100, 2, 3)]);
        let change = change(&before, &after);
        assert_eq!(
            (change.added, change.removed),
            (vec![slice(100, u64::MAX)], vec![slice(0, 99)])
        );
    }

    #[test]
    fn slices_are_announced_before_they_are_served_and_after() {
        let (owned, heard) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2), (100, 2, 2)]), |_| ());
        assert!(owned.view().owns(SliceKey(99)) && !owned.view().owns(SliceKey(100)));
        owned.install(None, assignment(2, &[(0, 1, 2), (100, 2, 2)]), |_| ());
        assert!(!owned.view().owns(SliceKey(99)));
        let all = heard.lock().unwrap().join("; ");
        let range = slice(0, 99);
        assert_eq!(all, format!("added {range}; removed {range}"));
    }

    fn hand_off(began: u64, first: u64) -> HandOffId {
        HandOffId { began: number(began), first: SliceKey(first) }
    }

    /// Notes what becomes of state that was set aside beside what the callbacks hear.
    fn settle(heard: &Mutex<Vec<String>>) -> impl Fn(Aside) + '_ {
        |aside| {
            heard.lock().unwrap().push(match aside {
                Aside::Keep(id) => format!("keep {id}"),
                Aside::Discard(id) => format!("discard {id}"),
            });
        }
    }

    #[test]
    fn state_that_came_is_used_after_what_was_lost_is_gone_and_before_what_came_is_served() {
        let (owned, heard) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2), (100, 2, 2)]), |_| ());
        heard.lock().unwrap().clear();
        // Lost and back by a hand-off, both unseen.
        let newest = assignment(6, &[(0, 1, 5), (100, 2, 2)]);
        owned.arrived(hand_off(5, 0), &newest);
        owned.install(Some(SessionId(1)), assignment(3, &[(0, 1, 2), (100, 2, 2)]), settle(&heard));
        assert!(heard.lock().unwrap().is_empty(), "an older assignment does not show it");
        owned.install(Some(SessionId(1)), newest, settle(&heard));
        let (range, id) = (slice(0, 99), hand_off(5, 0));
        let all = heard.lock().unwrap().join("; ");
        assert_eq!(all, format!("removed {range}; keep {id}; added {range}"));
    }

    #[test]
    fn state_of_a_slice_that_was_lost_again_is_let_go_of() {
        let (owned, heard) = owned();
        let came = assignment(6, &[(0, 1, 5), (100, 2, 2)]);
        for lost in [
            assignment(7, &[(0, 2, 7), (100, 2, 2)]),
            assignment(7, &[(0, 1, 7), (100, 2, 2)]),
            assignment(7, &[(0, 1, 5), (50, 2, 7), (100, 2, 2)]),
        ] {
            owned.arrived(hand_off(5, 0), &came);
            owned.install(Some(SessionId(1)), lost, settle(&heard));
        }
        let told = heard.lock().unwrap();
        let settled = told.iter().filter(|one| one.contains('/')).collect::<Vec<_>>();
        assert_eq!(settled, [&format!("discard {}", hand_off(5, 0)); 3]);
    }

    #[test]
    fn an_owner_that_lapses_before_it_was_told_of_a_slice_keeps_nothing_of_it() {
        for lapses in [false, true] {
            let (owned, heard) = owned();
            let came = assignment(6, &[(0, 1, 5), (100, 2, 2)]);
            let term = Arc::new(Term::leased(SessionId(1)));
            owned.begin(Arc::clone(&term), assignment(4, &[(0, 2, 2)]));
            owned.arrived(hand_off(5, 0), &came);
            // Something older is still being told of.
            owned.welcome(settle(&heard));
            assert!(heard.lock().unwrap().is_empty());
            let (slice, since) = (slice(0, 99), number(5));
            let held = Held { slice, since, token: since, release: None };
            owned.hold(Arc::clone(&came), vec![held]);
            if lapses {
                owned.lapse(came);
                owned.begin(Arc::new(Term::leased(SessionId(3))), assignment(1, &[(0, 2, 1)]));
            }
            owned.welcome(settle(&heard));
            let told = heard.lock().unwrap().join("; ");
            let id = hand_off(5, 0);
            let expected =
                if lapses { format!("discard {id}") } else { format!("keep {id}; added {slice}") };
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn a_callback_that_panics_costs_nothing_else() {
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let owned =
            Owned::new(start, Box::new(|_| panic!("the application's bug")), Box::new(|_| ()));
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2)]), |_| ());
        assert!(owned.view().owns(SliceKey(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn counts_survive_a_change_and_are_reported_once() {
        let (owned, _) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2)]), |_| ());
        let mut window = Window::begin(&owned, Instant::now());
        for key in [0, 1, u64::MAX] {
            assert!(owned.view().claim(SliceKey(key), 1_000));
        }
        // One thread holds on to the view that is about to be replaced.
        let late = owned.view();
        owned.install(Some(SessionId(1)), assignment(3, &[(0, 1, 2), (1 << 63, 2, 3)]), |_| ());
        late.claim(SliceKey(5), 1_000);
        assert!(
            !owned.view().claim(SliceKey(1 << 63), 2_000),
            "misrouted, and counted all the same"
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        let report = window.close(&owned, Instant::now()).unwrap();
        assert_eq!(report.check(), Ok(()));
        assert_eq!((report.generation, report.window), (number(2), Duration::from_secs(1)));
        let loads: Vec<u64> = report.slices.iter().map(|(_, load)| load.milli()).collect();
        assert_eq!(
            loads,
            [2_000, 4_000],
            "three and the late one, shared by width, and two misrouted"
        );

        late.claim(SliceKey(5), 8_000);
        drop(late);
        tokio::time::advance(Duration::from_secs(1)).await;
        let report = window.close(&owned, Instant::now()).unwrap();
        assert_eq!(report.generation, number(3));
        assert_eq!(report.slices.iter().map(|(_, load)| load.milli()).sum::<u64>(), 8_000);
        assert!(owned.retired.lock().unwrap().is_empty(), "nobody can count there any more");
    }

    #[tokio::test(start_paused = true)]
    async fn hot_keys_are_named_once_and_by_those_who_serve_them() {
        let (owned, _) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2), (1 << 63, 2, 2)]), |_| ());
        let mut window = Window::begin(&owned, Instant::now());
        let hot = [7, 1 << 40, 1 << 63];
        for n in 0..300 {
            for key in hot {
                let mine = owned.view().claim(SliceKey(key), 1_000);
                assert_eq!(mine, key < 1 << 63);
            }
            // A change of assignment costs nothing.
            if n == 100 {
                owned.install(
                    Some(SessionId(1)),
                    assignment(3, &[(0, 1, 2), (1 << 63, 2, 2)]),
                    |_| (),
                );
            }
            owned.view().claim(SliceKey(1_000 + n), 1_000);
        }
        tokio::time::advance(Duration::from_secs(3)).await;
        let report = window.close(&owned, Instant::now()).unwrap();
        assert_eq!(report.check(), Ok(()));
        let expected =
            [7, 1 << 40].map(|key| HotKey { key: SliceKey(key), load: Load::from_milli(100_000) });
        assert_eq!(report.hot, expected);
        tokio::time::advance(Duration::from_secs(3)).await;
        assert!(window.close(&owned, Instant::now()).unwrap().hot.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_is_set_apart_keeps_what_it_carried() {
        let (owned, _) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2)]), |_| ());
        let mut window = Window::begin(&owned, Instant::now());
        for n in 0..1_000_u64 {
            let key = if n % 2 == 0 { 500 } else { n << 50 };
            owned.view().claim(SliceKey(key), 1_000);
        }
        owned.install(
            Some(SessionId(1)),
            assignment(3, &[(0, 1, 2), (500, 1, 2), (501, 1, 2)]),
            |_| (),
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        let report = window.close(&owned, Instant::now()).unwrap();
        let load = |place: usize| report.slices[place].1.milli() / 1_000;
        assert_eq!((load(0), load(1), load(2)), (0, 500, 500));
    }

    fn metered_by(meter: impl Fn(&[Slice]) -> Vec<Size> + Send + Sync + 'static) -> Vec<Size> {
        let start = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let nothing = || -> Callback { Box::new(|_| ()) };
        let owned = Owned::new(start, nothing(), nothing()).with_meter(Some(Box::new(meter)));
        let now = Instant::now();
        owned.install(
            Some(SessionId(1)),
            assignment(2, &[(0, 1, 2), (100, 1, 2), (200, 2, 2)]),
            |_| (),
        );
        let mut window = Window::begin(&owned, now);
        let report = window.close(&owned, now + Duration::from_secs(1)).unwrap();
        assert_eq!((report.check(), report.slices.len()), (Ok(()), 2));
        report.sizes
    }

    fn size(slice: Slice, metrics: usize) -> Size {
        Size { slice, metrics: vec![Load::ZERO; metrics], move_cost: Some(9) }
    }

    #[test]
    fn what_the_meter_says_is_reported_in_order() {
        let told = metered_by(|slices| slices.iter().rev().map(|one| size(*one, 2)).collect());
        assert_eq!(told, [size(slice(0, 99), 2), size(slice(100, 199), 2)]);
    }

    #[test]
    fn what_a_meter_gets_wrong_costs_only_that() {
        let told = metered_by(|slices| {
            let foreign = slice(200, 299);
            vec![size(slices[1], 1), size(slices[0], 9), size(foreign, 1), size(slices[1], 1)]
        });
        assert_eq!(told, [size(slice(100, 199), 1)]);
        assert_eq!(metered_by(|_| panic!("the application's bug")), []);
    }

    #[tokio::test(start_paused = true)]
    async fn views_that_nobody_holds_go_before_any_report() {
        let (owned, _) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2)]), |_| ());
        let mut window = Window::begin(&owned, Instant::now());
        for generation in 3..50 {
            owned.view().claim(SliceKey(7), 1_000);
            owned.install(Some(SessionId(1)), assignment(generation, &[(0, 1, 2)]), |_| ());
            assert!(owned.retired.lock().unwrap().is_empty(), "generation {generation}");
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        let report = window.close(&owned, Instant::now()).unwrap();
        assert_eq!(report.slices, [(Slice::FULL, Load::from_milli(47_000))], "nothing is lost");
    }

    #[test]
    fn taking_a_request_in_allocates_nothing() {
        let (owned, _) = owned();
        owned.install(Some(SessionId(1)), assignment(2, &[(0, 1, 2), (1 << 63, 2, 2)]), |_| ());
        let take_in = || {
            assert!(owned.view().claim(SliceKey::MIN, 1_000));
            assert!(!owned.view().owns(SliceKey::MAX));
            assert!(owned.view().other_owner(SliceKey::MAX).is_some());
        };
        // The first time a thread is given its lane.
        take_in();
        let take_in = || (0..5_000).for_each(|_| take_in());
        assert_eq!(allocation_counter::measure(take_in).count_total, 0);
    }

    #[test]
    fn a_report_of_too_many_slices_joins_neighbours() {
        let slices = (0..10).map(|n| (slice(n * 10, n * 10 + 9), Load::from_milli(n))).collect();
        let fewer = thinned(slices, 3);
        assert_eq!(fewer.len(), 3);
        assert_eq!(fewer[0], (slice(0, 39), Load::from_milli(6)));
        let apart = (0..10).map(|n| (slice(n * 10, n * 10), Load::ZERO)).collect();
        assert_eq!(thinned(apart, 3).len(), 3);
    }
}

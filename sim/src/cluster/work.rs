//! What a task does with the slices that it holds: requests under guards, writes with tokens, state that comes and goes.
//!
//! What `router-lib` and an application on it do round `core::lease::Holder`: a guard holds back the acknowledgement of a release; a new slice is
//! served only once storage knows of its owner; state is sent in bulk while the old owner serves, and for good once it has let
//! go; what came is used only if it came whole, for the hand-off that brought the slice.

use std::collections::BTreeMap;
use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::lease::{Coming, Going, Held, Holder};
use mandoline_core::slice::Slice;
use mandoline_core::task::SessionId;
use mandoline_core::time::Time;
use mandoline_core::transit::HandOffId;

use crate::check::Seen;
use crate::cluster::data::Data;
use crate::cluster::flaw::Flaw;
use crate::cluster::ground::{Ground, Own};
use crate::cluster::tally::Count;
use crate::cluster::wire::Letter;

/// How often a letter that was not answered is sent once more.
const AGAIN: Duration = Duration::from_millis(400);
/// How long a new owner waits for the bulk of a slice's state before it says that it is ready without.
const PULL_PATIENCE: Duration = Duration::from_secs(3);
/// How long an old owner waits to hear that the last of it came.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// What a task does with the slices that it holds.
#[derive(Debug)]
pub struct Work {
    place: usize,
    store: usize,
    guards: BTreeMap<u64, Guard>,
    last_guard: u64,
    data: Data,
    /// As the holder last said.
    held: Vec<Held>,
    /// Slices whose new owner storage has not confirmed yet.
    opening: Vec<Opening>,
    going: BTreeMap<HandOffId, Leave>,
    coming: BTreeMap<HandOffId, Import>,
    /// What came whole, until the slice does.
    arrived: BTreeMap<HandOffId, Data>,
    /// Flawed: what was to be forgotten.
    kept: BTreeMap<SliceKey, (HandOffId, Data)>,
    /// Flawed: whether a grant came since the last release.
    given_back: bool,
}

#[derive(Clone, Copy, Debug)]
struct Guard {
    key: SliceKey,
    since: Generation,
    token: Generation,
}

#[derive(Clone, Copy, Debug)]
struct Opening {
    slice: Slice,
    token: Generation,
    again: Time,
}

#[derive(Clone, Copy, Debug)]
struct Leave {
    slice: Slice,
    to: usize,
    by: SessionId,
    state: Leaving,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// Guards are in flight.
    Draining,
    /// The last of the state is on its way.
    Sending { since: Time, again: Time, came: bool },
    /// It is let go of.
    Gone,
}

#[derive(Clone, Debug)]
struct Import {
    slice: Slice,
    from: Option<(usize, SessionId)>,
    asked: Time,
    again: Time,
    state: Preparing,
    last: Option<Data>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preparing {
    /// The bulk was asked for.
    Asked,
    /// It came.
    Came,
    /// The holder was told.
    Told,
}

/// What the holder is to be told.
#[derive(Debug, Default)]
pub struct News {
    /// Ready to serve.
    pub prepared: Vec<HandOffId>,
    /// Let go of.
    pub released: Vec<HandOffId>,
}

impl Work {
    /// A process that has done nothing yet.
    pub fn new(place: usize, store: usize) -> Self {
        Self {
            place,
            store,
            guards: BTreeMap::new(),
            last_guard: 0,
            data: Data::default(),
            held: Vec::new(),
            opening: Vec::new(),
            going: BTreeMap::new(),
            coming: BTreeMap::new(),
            arrived: BTreeMap::new(),
            kept: BTreeMap::new(),
            given_back: false,
        }
    }

    /// Gives the place of the storage.
    pub const fn store(&self) -> usize {
        self.store
    }

    /// Gives what the holder last said is held.
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    /// Walks the keys of guards that are still good by the task's own word.
    pub fn guarded<'a>(
        &'a self,
        holder: &'a Holder,
        now: Time,
    ) -> impl Iterator<Item = SliceKey> + 'a {
        let good = move |guard: &&Guard| guard.is_good(holder, now, self.given_back);
        self.guards.values().filter(good).map(|guard| guard.key)
    }

    /// Takes a request under a guard. False if the task may not.
    pub fn request(&mut self, ground: &mut Ground, holder: &Holder, key: SliceKey) -> bool {
        let now = ground.local(self.place);
        let Some(held) = holder.held(now, key) else { return false };
        if !(holder.accepts(now, key) || self.given_back)
            || self.opening.iter().any(|opening| opening.slice.contains(key))
        {
            return false;
        }
        self.last_guard += 1;
        let Held { since, token, .. } = held;
        self.guards.insert(self.last_guard, Guard { key, since, token });
        ground.tally.count(Count::Guards);
        // Mostly moments; now and then longer than a lease.
        let most = match ground.prng.below(50) {
            0 => 15_000,
            1..=9 => 2_000,
            _ => 30,
        };
        let takes = Duration::from_millis(1 + ground.prng.below(most));
        ground.own(self.place, takes, Own::Done { guard: self.last_guard });
        true
    }

    /// The work of a guard is done: it is written, if the guard is still good.
    pub fn done(&mut self, ground: &mut Ground, holder: &Holder, guard: u64) {
        let now = ground.local(self.place);
        let Some(guard) = self.guards.remove(&guard) else { return };
        if guard.is_good(holder, now, self.given_back) {
            self.data.count(guard.key);
            ground.post_late(
                self.place,
                self.store,
                Letter::Write { key: guard.key, token: guard.token },
            );
        } else {
            ground.tally.count(Count::GuardsLost);
        }
    }

    // --- What the holder says.

    /// This is held from now on, and nothing else.
    pub fn hold(&mut self, ground: &mut Ground, held: Vec<Held>) {
        let now = ground.local(self.place);
        let before = std::mem::replace(&mut self.held, held);
        let had = |slice: Slice, since: Generation| {
            before.iter().any(|old| old.since == since && old.slice.contains(slice.first()))
        };
        let held = self.held.clone();
        for Held { slice, since, token, .. } in &held {
            if !had(*slice, *since) {
                self.open(ground, *slice, *since);
                self.opening.push(Opening { slice: *slice, token: *token, again: now });
            }
        }
        self.arrived.clear();
        let holds = |slice: Slice, since: Generation| {
            held.iter().any(|now| now.since == since && now.slice.contains(slice.first()))
        };
        for old in before.iter().filter(|old| !holds(old.slice, old.since)) {
            self.data.forget(old.slice);
        }
        self.opening.retain(|opening| {
            held.iter()
                .any(|now| now.token == opening.token && now.slice.contains(opening.slice.first()))
        });
        let count = self.guards.len();
        self.guards.retain(|_, guard| {
            held.iter().any(|now| now.since == guard.since && now.slice.contains(guard.key))
        });
        (self.guards.len()..count).for_each(|_| ground.tally.count(Count::GuardsLost));
        self.going.retain(|id, leave| {
            held.iter().any(|now| {
                now.slice.contains(leave.slice.first())
                    && now.release.is_some_and(|(release, _)| release == *id)
            })
        });
    }

    /// A slice has come: with its state, or without.
    fn open(&mut self, ground: &mut Ground, slice: Slice, since: Generation) {
        let id = HandOffId { began: since, first: slice.first() };
        let mut came = self.arrived.remove(&id).map(|data| (id, data));
        if came.is_none() && ground.flaw == Flaw::ImportKept {
            came = self.kept.remove(&slice.first());
        }
        let by = came.as_ref().map(|(id, data)| (*id, data.checksum()));
        let count = if came.is_some() { Count::Imports } else { Count::EmptyStarts };
        ground.tally.count(count);
        ground.see(&Seen::Opened { who: self.place, slice, since, import: by });
        self.data.take(slice, came.map(|(_, data)| data).unwrap_or_default());
    }

    /// All is over: the session has ended.
    pub fn end(&mut self, ground: &mut Ground) {
        (0..self.guards.len()).for_each(|_| ground.tally.count(Count::GuardsLost));
        self.guards.clear();
        self.data = Data::default();
        self.going.clear();
        self.opening.clear();
        self.coming.clear();
        self.held.clear();
    }

    /// A slice is to come: its state is asked for.
    pub fn prepare(&mut self, ground: &Ground, coming: Coming, from: Option<usize>) {
        let now = ground.local(self.place);
        let from = from.zip(coming.from);
        let (slice, state) = (coming.slice, Preparing::Asked);
        let import = Import { slice, from, asked: now, again: now, state, last: None };
        self.coming.insert(coming.id, import);
    }

    /// A slice has come by this hand-off.
    pub fn arrive(&mut self, id: HandOffId) {
        if let Some(last) = self.coming.remove(&id).and_then(|import| import.last) {
            self.arrived.insert(id, last);
        }
    }

    /// A slice does not come.
    pub fn discard(&mut self, ground: &Ground, id: HandOffId) {
        let Some(import) = self.coming.remove(&id) else { return };
        if let Some(last) = import.last
            && ground.flaw == Flaw::ImportKept
        {
            self.kept.insert(import.slice.first(), (id, last));
        }
    }

    /// A slice is to go.
    pub fn release(&mut self, going: Going, to: usize, by: SessionId) {
        self.given_back = false;
        let (slice, state) = (going.slice, Leaving::Draining);
        self.going.insert(going.id, Leave { slice, to, by, state });
    }

    /// A slice stays after all.
    pub fn resume(&mut self, ground: &mut Ground, id: HandOffId) {
        self.going.remove(&id);
        ground.see(&Seen::Resumed { who: self.place, id });
    }

    /// A grant came.
    pub fn granted(&mut self, ground: &Ground) {
        self.given_back = ground.flaw == Flaw::GrantGivesBack;
    }

    // --- What others say.

    /// Takes in a letter, if it is one of these.
    pub fn letter(
        &mut self,
        ground: &mut Ground,
        session: Option<SessionId>,
        from: usize,
        letter: Letter,
    ) {
        match letter {
            Letter::Pull(id) => {
                // Whoever asks before this task has heard of the hand-off asks again.
                let known = self.held.iter().find(|held| held.slice.contains(id.first));
                if let Some((held, by)) = known.zip(session) {
                    let data = self.data.of(held.slice);
                    ground.post(self.place, from, Letter::Bulk { id, by, data });
                }
            }
            Letter::Bulk { id, by, .. } => {
                // What came is a start; what counts comes last.
                if let Some(import) = self.coming.get_mut(&id)
                    && import.is_by(by)
                    && import.state == Preparing::Asked
                {
                    import.state = Preparing::Came;
                }
            }
            Letter::Last { id, by, data, length, checksum } => {
                if data.len() != length || data.checksum() != checksum {
                    return;
                }
                if let Some(import) = self.coming.get_mut(&id).filter(|import| import.is_by(by)) {
                    import.last = Some(data);
                    ground.post(self.place, from, Letter::Got(id));
                }
            }
            Letter::Got(id) => {
                if let Some(Leave { state: Leaving::Sending { came, .. }, .. }) =
                    self.going.get_mut(&id)
                {
                    *came = true;
                }
            }
            Letter::Advanced { slice, token } => {
                self.opening.retain(|opening| (opening.slice, opening.token) != (slice, token));
            }
            _ => {}
        }
    }

    /// Does what is due, and says what the holder is to be told.
    pub fn tick(&mut self, ground: &mut Ground) -> News {
        let (now, mut news) = (ground.local(self.place), News::default());
        let untold = |(_, import): &(&HandOffId, &mut Import)| import.state != Preparing::Told;
        for (id, import) in self.coming.iter_mut().filter(untold) {
            let waits = import.state == Preparing::Asked && now.since(import.asked) < PULL_PATIENCE;
            let Some((from, _)) = import.from.filter(|_| waits) else {
                import.state = Preparing::Told;
                news.prepared.push(*id);
                continue;
            };
            if import.again <= now {
                import.again = now + AGAIN;
                ground.post(self.place, from, Letter::Pull(*id));
            }
        }
        for (id, leave) in &mut self.going {
            if leave.state == Leaving::Draining {
                let early = ground.flaw == Flaw::AcknowledgesEarly;
                if !early && self.guards.values().any(|guard| leave.slice.contains(guard.key)) {
                    continue;
                }
                // From here on nothing changes it, whoever hears of that first.
                let checksum = self.data.of(leave.slice).checksum();
                ground.see(&Seen::LetGo { who: self.place, id: *id, checksum });
                leave.state = Leaving::Sending { since: now, again: now, came: false };
            }
            let Leaving::Sending { since, again, came } = &mut leave.state else { continue };
            if *came || now.since(*since) >= LAST_PATIENCE {
                leave.state = Leaving::Gone;
                news.released.push(*id);
                continue;
            }
            if *again <= now {
                *again = now + AGAIN;
                let mut data = self.data.of(leave.slice);
                let (length, checksum) = (data.len(), data.checksum());
                if ground.prng.below(50) == 0 {
                    data.cut();
                }
                let last = Letter::Last { id: *id, by: leave.by, data, length, checksum };
                ground.post(self.place, leave.to, last);
            }
        }
        for Opening { slice, token, again } in &mut self.opening {
            if *again <= now {
                *again = now + AGAIN;
                let (slice, token) = (*slice, *token);
                let letter = match ground.flaw {
                    Flaw::NoAdvance => Letter::Read { slice, token },
                    _ => Letter::Advance { slice, token },
                };
                ground.post(self.place, self.store, letter);
            }
        }
        news
    }

    /// Says when to tick next.
    pub fn deadline(&self) -> Option<Time> {
        let coming = self.coming.values().filter(|import| import.state != Preparing::Told);
        let coming = coming.map(|import| import.again);
        let going = self.going.values().filter_map(|leave| match leave.state {
            Leaving::Sending { since, again, .. } => Some(again.min(since + LAST_PATIENCE)),
            Leaving::Draining | Leaving::Gone => None,
        });
        let opening = self.opening.iter().map(|opening| opening.again);
        coming.chain(going).chain(opening).min()
    }
}

impl Guard {
    /// Whether the task may still believe that it owns the key: it is held as when the guard was given, and if it is being
    /// released its time is not over.
    fn is_good(&self, holder: &Holder, now: Time, given_back: bool) -> bool {
        holder.held(now, self.key).is_some_and(|held| {
            held.since == self.since
                && (given_back || held.release.is_none_or(|(_, until)| now < until))
        })
    }
}

impl Import {
    fn is_by(&self, by: SessionId) -> bool {
        self.from.is_some_and(|(_, from)| from == by)
    }
}

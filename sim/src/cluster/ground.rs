//! The ground that all processes stand on: time, chance, clocks, the network, what is to happen, and who looks on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::balance::{self, Round};
use mandoline_core::command::Command;
use mandoline_core::plan::Plan;
use mandoline_core::prng::Prng;
use mandoline_core::slice::Slice;
use mandoline_core::time::Time;

use crate::check::{Breach, Checks, Seen};
use crate::cluster::chronicle::Chronicle;
use crate::cluster::clock::Clock;
use crate::cluster::flaw::Flaw;
use crate::cluster::load::TUNING;
use crate::cluster::network::{Flowed, Network, Side, StreamId, Word};
use crate::cluster::queue::Queue;
use crate::cluster::scenario::Kind;
use crate::cluster::tally::{Count, Tally};
use crate::cluster::trace::{Line, Trace};
use crate::cluster::wire::{Letter, Say};

/// Something that happens.
#[derive(Debug)]
pub enum Event {
    /// A letter arrives.
    Letter {
        /// From where.
        from: usize,
        /// Whereto.
        to: usize,
        /// What it says.
        letter: Letter,
    },
    /// Something may have come over a stream to this side.
    Flow(StreamId, Side),
    /// This side finds out that a stream is broken.
    Break(StreamId, Side),
    /// Something of a process's own, in one of its lives.
    Own {
        /// Whose.
        place: usize,
        /// In which life.
        life: u32,
        /// What.
        own: Own,
    },
    /// Something goes wrong.
    Fault(Kind),
    /// A process that was gone starts again, or one that stood still goes on.
    Up {
        /// Which.
        place: usize,
        /// Which life that ends.
        life: u32,
    },
    /// A spell is over.
    Over(Kind),
    /// To look at how everyone is.
    Look,
}

/// What happens within a process.
#[derive(Debug)]
pub enum Own {
    /// It wanted to look in.
    Wake,
    /// The disk has what was written.
    Synced,
    /// A plan is made.
    Planned {
        /// In which term it was asked for.
        term: u64,
        /// What it says.
        plan: Box<Plan>,
    },
    /// A proposal has taken too long.
    GivenUp {
        /// In which term it was made.
        term: u64,
        /// Its place in the log.
        at: usize,
    },
    /// A proposal gets into the log.
    Proposed {
        /// In which term it was decided.
        term: u64,
        /// What.
        command: Arc<Command>,
    },
    /// The clerk asks for a key.
    Request,
    /// The work of a guard is done.
    Done {
        /// Which guard.
        guard: u64,
    },
}

/// What a process hears.
#[derive(Debug)]
pub enum Heard {
    /// Something of its own.
    Own(Own),
    /// A letter.
    Letter(usize, Letter),
    /// Something on a stream.
    Said(StreamId, Side, Say),
    /// A stream is over.
    Broke(StreamId, Side),
}

/// How a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It runs.
    Up,
    /// It stands still: whatever comes waits.
    Paused,
    /// It is gone.
    Down,
}

/// A machine, and the process on it.
#[derive(Debug)]
pub struct Machine {
    /// What traces call it.
    pub name: String,
    /// Its clock.
    pub clock: Clock,
    /// Which process it is that runs here.
    pub life: u32,
    /// How that one is.
    pub health: Health,
    /// What has come while it stood still.
    pub waiting: VecDeque<Event>,
    /// When it is to be looked in on, by true time.
    wake: Option<Time>,
}

/// The ground that all processes stand on.
#[derive(Debug)]
pub struct Ground {
    /// True time, which no process knows.
    pub now: Time,
    /// All chance.
    pub prng: Prng,
    /// The machines, by place.
    pub machines: Vec<Machine>,
    /// What lies between them.
    pub network: Network<Say>,
    /// How long a write to disk takes at most.
    pub disk: Duration,
    /// How often tasks beat.
    pub heartbeat: Duration,
    /// In which way the protocol is broken on purpose.
    pub flaw: Flaw,
    /// Which cluster it is: a restored one is another.
    pub cluster: u64,
    /// What happened, in numbers.
    pub tally: Tally,
    /// What happened, line by line.
    pub trace: Trace,
    /// The first thing that was broken.
    pub breach: Option<Breach>,
    checks: Checks,
    chronicle: Chronicle,
    queue: Queue<Event>,
}

impl Ground {
    /// Bare ground.
    pub fn new(
        machines: Vec<Machine>,
        network: Network<Say>,
        prng: Prng,
        trace: Trace,
        flaw: Flaw,
        checks: Checks,
    ) -> Self {
        Self {
            now: Time::ZERO,
            prng,
            machines,
            network,
            disk: DISK,
            heartbeat: Duration::from_secs(1),
            flaw,
            cluster: 1,
            tally: Tally::default(),
            trace,
            breach: None,
            checks,
            chronicle: Chronicle::default(),
            queue: Queue::default(),
        }
    }

    /// Gives what a place's own clock shows.
    pub fn local(&self, place: usize) -> Time {
        self.machines[place].clock.at(self.now)
    }

    /// Lets something happen after a while of true time.
    pub fn after(&mut self, delay: Duration, event: Event) {
        self.queue.push(self.now + delay, event);
    }

    /// Takes what happens next, and lets that much time pass.
    pub fn advance(&mut self) -> Option<Event> {
        let (at, event) = self.queue.pop()?;
        self.now = at;
        self.tally.count(Count::Events);
        Some(event)
    }

    /// Lets something of a process's own happen after a while, if that still lives.
    pub fn own(&mut self, place: usize, delay: Duration, own: Own) {
        let life = self.machines[place].life;
        self.after(delay, Event::Own { place, life, own });
    }

    /// Has a process looked in on when its own clock shows a time, or before.
    pub fn wake(&mut self, place: usize, shown: Time) {
        let at = self.machines[place].clock.when(shown).max(self.now);
        if self.machines[place].wake.is_none_or(|wake| at < wake) {
            self.machines[place].wake = Some(at);
            let life = self.machines[place].life;
            self.queue.push(at, Event::Own { place, life, own: Own::Wake });
        }
    }

    /// Says whether a place is to be looked in on now; forgets that then.
    pub fn woken(&mut self, place: usize) -> bool {
        self.machines[place].wake.take_if(|wake| *wake <= self.now).is_some()
    }

    /// Sends a letter.
    pub fn post(&mut self, from: usize, to: usize, letter: Letter) {
        match self.network.post(from, to, &mut self.prng) {
            [None, _] => self.tally.count(Count::LettersLost),
            [Some(delay), again] => {
                if let Some(again) = again {
                    self.tally.count(Count::LettersTwice);
                    self.after(again, Event::Letter { from, to, letter: letter.clone() });
                }
                self.after(delay, Event::Letter { from, to, letter });
            }
        }
    }

    /// Opens a stream.
    pub fn open(&mut self, from: usize, to: usize) -> StreamId {
        self.network.open(from, to, &mut self.prng)
    }

    /// Says something on a stream.
    pub fn say(&mut self, id: StreamId, side: Side, say: Say) {
        self.put(id, side, Word::Said(say));
    }

    /// Ends a stream after what was said on it.
    pub fn close(&mut self, id: StreamId, side: Side) {
        self.put(id, side, Word::Over);
    }

    fn put(&mut self, id: StreamId, side: Side, word: Word<Say>) {
        if let Some(at) = self.network.say(self.now, id, side, word, &mut self.prng) {
            self.queue.push(at, Event::Flow(id, 1 - side));
        }
    }

    /// Looks at what came over a stream to a side, if that can hear.
    pub fn flow(&mut self, id: StreamId, side: Side) -> Option<Word<Say>> {
        match self.network.flow(self.now, id, side, &mut self.prng) {
            Flowed::Nothing => None,
            Flowed::Later(at) => {
                self.queue.push(at, Event::Flow(id, side));
                None
            }
            Flowed::Came(word, next) => {
                if let Some(at) = next {
                    self.queue.push(at, Event::Flow(id, side));
                }
                Some(word)
            }
            Flowed::Broke(broke, lingers) => {
                self.queue.push(self.now, Event::Break(id, broke));
                self.queue.push(lingers, Event::Break(id, 1 - broke));
                None
            }
        }
    }

    /// The process at a place dies: what it had open is reset, or lingers.
    pub fn reset_streams(&mut self, place: usize, silently: bool) {
        for (id, side) in self.network.streams_of(place) {
            if silently {
                self.network.drop_end(id, side);
                let lingers = Duration::from_millis(self.prng.below(LINGER_MILLIS));
                self.after(lingers, Event::Break(id, 1 - side));
            } else {
                self.close(id, side);
            }
        }
    }

    /// Notes a line.
    pub fn note(&mut self, place: usize, slice: Option<Slice>, text: impl FnOnce() -> String) {
        let (at, machine) = (self.now, &self.machines[place]);
        self.trace.note(|| Line { at, who: machine.name.clone(), slice, text: text() });
    }

    /// Shows the checks what happened.
    pub fn see(&mut self, seen: &Seen<'_>) {
        if let Seen::Holds { assignment, .. } = seen {
            self.chronicle.see(assignment, &mut self.tally);
        }
        if self.breach.is_none() {
            let before = self.checks.double_owners;
            self.breach = self.checks.see(self.now, seen);
            if self.checks.double_owners > before {
                self.tally.count(Count::DoubleOwners);
            }
        }
    }

    /// Sends a letter that may take very long: a write that waits somewhere.
    pub fn post_late(&mut self, from: usize, to: usize, letter: Letter) {
        if self.prng.below(25) == 0 {
            let late = Duration::from_millis(self.prng.below(LATE_MILLIS));
            self.after(late, Event::Letter { from, to, letter });
        } else {
            self.post(from, to, letter);
        }
    }

    /// Makes a plan, and brings it to whoever asked for it when that would have taken its time.
    pub fn plan(&mut self, place: usize, term: u64, round: &Round) {
        let plan = Box::new(balance::plan_with(round, &TUNING));
        let takes = Duration::from_millis(1 + self.prng.below(PLAN_MILLIS));
        self.own(place, takes, Own::Planned { term, plan });
    }
}

impl Machine {
    /// A machine whose process runs.
    pub fn new(name: String, clock: Clock) -> Self {
        let (health, waiting) = (Health::Up, VecDeque::new());
        Self { name, clock, life: 0, health, waiting, wake: None }
    }

    /// Ends the process: what it was to do is forgotten.
    pub fn end(&mut self) {
        self.life += 1;
        self.health = Health::Down;
        self.waiting.clear();
        self.wake = None;
    }
}

/// A write to disk takes this long at most, on a good day.
pub const DISK: Duration = Duration::from_millis(3);
/// A write that waits somewhere comes this late at most.
const LATE_MILLIS: u64 = 30_000;
/// A plan takes this long at most.
const PLAN_MILLIS: u64 = 150;
/// What a machine that vanished had open lingers this long at most.
const LINGER_MILLIS: u64 = 20_000;

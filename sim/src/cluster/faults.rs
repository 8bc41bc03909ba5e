//! What goes wrong, and for how long: each kind by itself, at random, until all is left alone at the end.

use std::time::Duration;

use mandoline_core::prng::Prng;
use mandoline_core::time::Time;

use crate::cluster::ground::{DISK, Event, Ground, Health};
use crate::cluster::network::Weather;
use crate::cluster::scenario::{HOLD_OFF, Kind, Setup};

/// What goes wrong in a cluster.
#[derive(Debug)]
pub struct Faults {
    setup: Setup,
    /// When no fault may last any longer.
    until: Time,
    /// How many spells of each kind last right now: the newest decides, and the last one ends it.
    spells: [u32; Kind::ALL.len()],
}

impl Faults {
    /// Begins, with each kind's first time drawn. All is over at `until`.
    pub fn new(setup: Setup, until: Time, ground: &mut Ground) -> Self {
        for (kind, every) in &setup.every {
            let first = spread(*every, &mut ground.prng);
            ground.after(first, Event::Fault(*kind));
        }
        Self { setup, until, spells: [0; Kind::ALL.len()] }
    }

    /// Says whether this fault still happens; draws when the next one of its kind does.
    pub fn strikes(&self, kind: Kind, ground: &mut Ground) -> bool {
        // What a restored cluster waits out is no time to be judged by.
        let over = if kind == Kind::Restore { ground.now + HOLD_OFF } else { ground.now };
        if over >= self.until {
            return false;
        }
        let every = self.setup.every.iter().find(|(other, _)| *other == kind);
        if let Some((_, every)) = every {
            let next = spread(*every, &mut ground.prng);
            ground.after(next, Event::Fault(kind));
        }
        ground.tally.fault(kind);
        true
    }

    /// Draws how long something lasts: mostly around `usual`, at times up to ten times that; never past the end.
    pub fn lasts(&self, usual: Duration, ground: &mut Ground) -> Duration {
        let scale = if ground.prng.below(6) == 0 { 10.0 } else { 1.0 };
        let length = usual.mul_f64(scale * (0.02 + ground.prng.unit()));
        length.min(self.until.since(ground.now))
    }

    /// Draws how long a process stands still: mostly moments, at times longer than any lease, now and then ten minutes.
    pub fn pause(&self, ground: &mut Ground) -> Duration {
        let most = match ground.prng.below(20) {
            0 => 600_000,
            1..=5 => 30_000,
            _ => 4_000,
        };
        let length = Duration::from_millis(10 + ground.prng.below(most));
        length.min(self.until.since(ground.now))
    }

    /// Begins a spell of bad network, bad disk or bad clocks.
    pub fn begin(&mut self, kind: Kind, ground: &mut Ground) {
        let usual = match kind {
            Kind::Partition | Kind::OneWay => Duration::from_secs(6),
            Kind::Loss | Kind::Slow => Duration::from_secs(10),
            _ => Duration::from_secs(5),
        };
        match kind {
            Kind::Partition | Kind::OneWay => {
                let all = (1_u32 << ground.machines.len()) - 1;
                let assigner = 1_u32 << ground.prng.below(self.setup.assigners as u64);
                let some = match ground.prng.below(5) {
                    0 => 1 << ground.prng.below(ground.machines.len() as u64),
                    1 => assigner,
                    2 => ground.prng.bits() as u32 & all,
                    // An assigner, perhaps the leader, with some that go on believing in it.
                    _ => {
                        assigner
                            | (ground.prng.bits() as u32 & all) >> self.setup.assigners
                                << self.setup.assigners
                    }
                };
                ground.note(0, None, || format!("{} cuts {some:b}", kind.name()));
                ground.network.cut(some, all & !some);
                if kind == Kind::Partition {
                    ground.network.cut(all & !some, some);
                }
            }
            Kind::Stall => ground.disk = Duration::from_millis(100 + ground.prng.below(1_400)),
            _ => {}
        }
        self.spells[kind as usize] += 1;
        self.weather(ground);
        let lasts = self.lasts(usual, ground);
        ground.after(lasts, Event::Over(kind));
    }

    /// Ends a spell.
    pub fn end(&mut self, kind: Kind, ground: &mut Ground) {
        let spells = &mut self.spells;
        spells[kind as usize] -= 1;
        if spells[Kind::Partition as usize] + spells[Kind::OneWay as usize] == 0 {
            ground.network.heal();
        }
        if spells[Kind::Stall as usize] == 0 {
            ground.disk = DISK;
        }
        self.weather(ground);
    }

    fn weather(&self, ground: &mut Ground) {
        let mut weather = Weather::FAIR;
        if self.setup.every.len() > 2 {
            (weather.lost, weather.twice, weather.late) = (2, 5, 5);
        }
        if self.spells[Kind::Loss as usize] > 0 {
            (weather.lost, weather.twice) = (200, 100);
        }
        if self.spells[Kind::Slow as usize] > 0 {
            (weather.delay, weather.late) = (Duration::from_millis(60), 50);
        }
        ground.network.set_weather(weather);
    }

    /// Changes the rate of a clock, mostly to one of the ends of what is allowed.
    pub fn drift(&self, prng: &mut Prng) -> i64 {
        let most = self.setup.drift;
        match prng.below(4) {
            0 => most,
            1 => -most,
            _ => prng.below(2 * most as u64 + 1) as i64 - most,
        }
    }

    /// Gives the cluster that was drawn.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Picks a process that runs among these places, if one does.
    pub fn pick(&self, places: std::ops::Range<usize>, ground: &mut Ground) -> Option<usize> {
        let place = places.start + ground.prng.below(places.len() as u64) as usize;
        (ground.machines[place].health == Health::Up).then_some(place)
    }
}

/// Draws a time between two that are this far apart on average.
fn spread(every: Duration, prng: &mut Prng) -> Duration {
    every.mul_f64(-(1.0 - prng.unit()).ln())
}

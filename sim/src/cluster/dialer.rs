//! Whom a task asks next, and when: as `router-lib/src/dialer.rs` has it, in places instead of addresses.

use std::time::Duration;

use mandoline_core::prng::Prng;

const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(2);
const PAUSE_REFUSED: Duration = Duration::from_secs(1);
const HOPS_MAX: u32 = 3;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask this one.
    Dial(usize),
    /// Wait, then ask for the next.
    Wait(Duration),
}

/// Whom to ask next, and when.
#[derive(Clone, Debug)]
pub struct Dialer {
    places: Vec<usize>,
    at: usize,
    hint: Option<usize>,
    hops: u32,
    pause: Duration,
}

impl Dialer {
    /// Begins with the first of a list.
    pub const fn new(places: Vec<usize>) -> Self {
        Self { places, at: 0, hint: None, hops: 0, pause: PAUSE_FIRST }
    }

    /// Begins anew with the same list.
    #[must_use]
    pub fn anew(&self) -> Self {
        let mut places = self.places.clone();
        places.sort_unstable();
        Self::new(places)
    }

    /// Says what to do next.
    pub fn next(&mut self, prng: &mut Prng) -> Next {
        if let Some(hint) = self.hint.take() {
            return Next::Dial(hint);
        }
        if let Some(place) = self.places.get(self.at) {
            self.at += 1;
            return Next::Dial(*place);
        }
        let pause = self.pause;
        self.pause = (2 * pause).min(PAUSE_MAX);
        (self.at, self.hops) = (0, 0);
        Next::Wait(prng.jitter(pause))
    }

    /// Hears that another leads.
    pub const fn redirected(&mut self, to: usize) {
        if self.hops < HOPS_MAX {
            self.hops += 1;
            self.hint = Some(to);
        }
    }

    /// Hears that the one asked took the session on.
    pub const fn attached(&mut self) {
        (self.at, self.hops, self.pause) = (0, 0, PAUSE_FIRST);
    }

    /// Hears that the one attached to has broken off: it is asked once more, at once.
    pub const fn broken(&mut self, attached: usize) {
        self.hint = Some(attached);
    }

    /// Hears that the one attached to does not answer: it is asked last.
    pub fn silent(&mut self, attached: usize) {
        if let Some(at) = self.places.iter().position(|place| *place == attached) {
            self.places.rotate_left(at + 1);
        }
    }

    /// Hears that asking was no use, and that only time helps.
    pub fn refused(&mut self, by: usize) {
        self.at = self.places.len();
        self.pause = PAUSE_REFUSED;
        if let Some(at) = self.places.iter().position(|place| *place == by) {
            self.places.rotate_left(at);
        }
    }
}

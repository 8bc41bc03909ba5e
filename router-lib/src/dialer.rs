//! Whom to ask next, and when: the list in order, wherever someone points, and a pause before it all begins again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use mandoline_core::prng::Prng;
use mandoline_core::task::Address;

/// The longest first pause: a re-attach after an election begins within it.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// The longest pause: a task that was cut off is back two seconds after its assigners are.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The longest pause after a refusal: whoever has the name or the address is found lost within a few heartbeats.
const PAUSE_REFUSED: Duration = Duration::from_secs(1);
/// How often a round follows pointers from one assigner to another before it goes on with the list: two may point at
/// each other while they vote.
const HOPS_MAX: u32 = 3;

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Ask this one.
    Dial(Address),
    /// Wait, then ask for the next.
    Wait(Duration),
}

/// Whom to ask next, and when.
#[derive(Debug)]
pub(crate) struct Dialer {
    addresses: Vec<Address>,
    // The next of the list.
    at: usize,
    // Asked before the list goes on.
    hint: Option<Address>,
    hops: u32,
    pause: Duration,
    pause_max: Duration,
    prng: Prng,
}

impl Dialer {
    /// Begins with the first of a list.
    pub(crate) fn new(addresses: Vec<Address>, seed: u64) -> Self {
        let prng = Prng::new(seed);
        let (pause, pause_max) = (PAUSE_FIRST, PAUSE_MAX);
        Self { addresses, at: 0, hint: None, hops: 0, pause, pause_max, prng }
    }

    /// Says what to do next.
    pub(crate) fn next(&mut self) -> Next {
        if let Some(hint) = self.hint.take() {
            return Next::Dial(hint);
        }
        if let Some(address) = self.addresses.get(self.at) {
            self.at += 1;
            return Next::Dial(address.clone());
        }
        let pause = self.pause;
        self.pause = (2 * pause).min(self.pause_max);
        self.begin_round();
        Next::Wait(self.prng.jitter(pause))
    }

    fn begin_round(&mut self) {
        (self.at, self.hops) = (0, 0);
    }

    /// Hears that another leads.
    pub(crate) fn redirected(&mut self, to: Address) {
        if self.hops < HOPS_MAX {
            self.hops += 1;
            self.hint = Some(to);
        }
    }

    /// Hears that the one asked took the session on, and expects heartbeats so often. A new leader gives each session
    /// three of them to come back, so no pause is longer than two.
    pub(crate) fn attached(&mut self, heartbeat: Duration) {
        self.begin_round();
        self.pause_max = PAUSE_MAX.min(2 * heartbeat);
        self.pause = PAUSE_FIRST.min(self.pause_max);
    }

    /// Hears that the one attached to has broken off: it is asked once more, at once.
    pub(crate) fn broken(&mut self, attached: Address) {
        self.hint = Some(attached);
    }

    /// Hears that the one attached to does not answer: it is asked last.
    pub(crate) fn silent(&mut self, attached: &Address) {
        if let Some(place) = self.addresses.iter().position(|address| address == attached) {
            self.addresses.rotate_left(place + 1);
        }
    }

    /// Hears that asking was no use, and that only time helps.
    pub(crate) fn refused(&mut self, by: Address) {
        self.at = self.addresses.len();
        self.pause = PAUSE_REFUSED;
        // Asked first after the pause, since it leads.
        if let Some(place) = self.addresses.iter().position(|address| *address == by) {
            self.addresses.rotate_left(place);
        }
    }
}

/// Draws a number that no other process draws: the standard library seeds each `RandomState` from the system's
/// randomness.
pub(crate) fn drawn() -> u64 {
    RandomState::new().hash_one((std::process::id(), std::time::UNIX_EPOCH.elapsed().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        format!("127.0.0.1:{port}").parse().unwrap()
    }

    fn dialer() -> Dialer {
        Dialer::new((1..=3).map(address).collect(), 1)
    }

    /// The ports that are asked until it waits, and how long it would wait.
    fn round(dialer: &mut Dialer) -> (Vec<String>, Duration) {
        let mut asked = Vec::new();
        loop {
            match dialer.next() {
                Next::Dial(address) => {
                    asked.push(address.as_str().rsplit_once(':').unwrap().1.to_owned());
                }
                Next::Wait(pause) => return (asked, pause),
            }
        }
    }

    #[test]
    fn the_list_is_asked_in_order_with_longer_and_longer_pauses_between() {
        let mut dialer = dialer();
        let mut max = PAUSE_FIRST;
        for _ in 0..8 {
            let (asked, pause) = round(&mut dialer);
            assert_eq!(asked, ["1", "2", "3"]);
            assert!(max / 2 <= pause && pause <= max, "{pause:?} of {max:?}");
            max = (2 * max).min(PAUSE_MAX);
        }
        dialer.attached(Duration::from_millis(150));
        assert!(round(&mut dialer).1 <= PAUSE_FIRST);
        for _ in 0..5 {
            assert!(round(&mut dialer).1 <= Duration::from_millis(300));
        }
    }

    #[test]
    fn pointers_are_followed_but_not_in_circles() {
        let mut dialer = dialer();
        assert_eq!(dialer.next(), Next::Dial(address(1)));
        dialer.redirected(address(9));
        assert_eq!(dialer.next(), Next::Dial(address(9)));
        for _ in 0..10 {
            dialer.redirected(address(8));
        }
        assert_eq!(round(&mut dialer).0, ["8", "2", "3"]);
        let mut hops = 0;
        dialer.redirected(address(8));
        while dialer.next() == Next::Dial(address(8)) {
            hops += 1;
            dialer.redirected(address(8));
        }
        assert_eq!(hops, HOPS_MAX);
    }

    #[test]
    fn one_that_broke_off_is_asked_first_and_one_that_is_silent_last() {
        let mut dialer = dialer();
        dialer.attached(Duration::from_secs(1));
        dialer.broken(address(2));
        assert_eq!(round(&mut dialer).0, ["2", "1", "2", "3"]);
        dialer.silent(&address(2));
        assert_eq!(round(&mut dialer).0, ["3", "1", "2"]);
    }

    #[test]
    fn a_refusal_is_asked_again_only_after_a_pause() {
        let mut dialer = dialer();
        assert_eq!(dialer.next(), Next::Dial(address(1)));
        dialer.refused(address(2));
        let (asked, pause) = round(&mut dialer);
        assert!(asked.is_empty() && pause >= PAUSE_REFUSED / 2, "{asked:?} {pause:?}");
        assert_eq!(dialer.next(), Next::Dial(address(2)));
    }
}

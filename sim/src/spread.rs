//! Requests recorded to the second or the minute, spread evenly over it.
//!
//! A log of whole seconds, or a count by the minute, is no record of a burst at each full second: sent as it stands it
//! would be one. Order is kept. Times with fractions are left alone, for what they put together was together.

use std::time::Duration;

use crate::event::Event;

/// Spreads events with coarse times. Holds the events of one time, `HELD_MAX` at most.
#[derive(Debug, Default)]
pub struct Spread {
    // All of one time, in order.
    held: Vec<Event>,
}

impl Spread {
    /// Takes an event that is no earlier than the one before, and gives out those whose place is settled.
    pub fn push(&mut self, event: Event, out: &mut Vec<Event>) {
        if self.held.first().is_some_and(|first| first.at < event.at) {
            self.release(event.at, out);
        } else if self.held.len() >= HELD_MAX {
            self.finish(out);
        }
        self.held.push(event);
    }

    /// Gives out the last ones, at the time that they have: nothing says how long that lasted.
    pub fn finish(&mut self, out: &mut Vec<Event>) {
        out.append(&mut self.held);
    }

    fn release(&mut self, next: Duration, out: &mut Vec<Event>) {
        let count = u32::try_from(self.held.len()).expect("no more than HELD_MAX are held");
        for (number, event) in (0..).zip(self.held.drain(..)) {
            let span = resolution(event.at, next).min(next - event.at);
            out.push(Event { at: event.at + span * number / count, ..event });
        }
    }
}

/// Guesses how finely two times were taken.
fn resolution(at: Duration, next: Duration) -> Duration {
    let both = |is: fn(Duration) -> bool| is(at) && is(next);
    if both(|time| time.subsec_nanos() == 0 && time.as_secs().is_multiple_of(60)) {
        Duration::from_secs(60)
    } else if both(|time| time.subsec_nanos() == 0) {
        Duration::from_secs(1)
    } else {
        Duration::ZERO
    }
}

/// How many events of one time are spread, at some 100 bytes each; past it they go out as they are.
const HELD_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(times: &[f64], expected: &[f64]) {
        let (mut spread, mut out) = (Spread::default(), Vec::new());
        for (number, at) in times.iter().enumerate() {
            let (at, key) = (Duration::from_secs_f64(*at), number.to_string().into());
            spread.push(Event { at, key, weight: 1, bytes: None }, &mut out);
        }
        spread.finish(&mut out);
        assert!(
            out.iter().enumerate().all(|(number, event)| *event.key == number.to_string()),
            "{out:?}"
        );
        let got: Vec<f64> = out.iter().map(|event| event.at.as_secs_f64()).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn coarse_times_are_spread_to_their_resolution_and_no_further() {
        check(&[], &[]);
        check(&[0.0, 0.0, 0.0, 0.0, 1.0], &[0.0, 0.25, 0.5, 0.75, 1.0]);
        check(&[3.0, 3.0, 10.0, 10.0], &[3.0, 3.5, 10.0, 10.0]);
        check(&[0.0, 0.0, 60.0, 60.0, 60.0, 180.0], &[0.0, 30.0, 60.0, 80.0, 100.0, 180.0]);
    }

    #[test]
    fn fine_times_are_left_alone() {
        check(&[0.0, 0.0, 0.5, 0.5, 0.7], &[0.0, 0.0, 0.5, 0.5, 0.7]);
        check(&[1.5, 1.5, 2.0, 2.0, 2.5], &[1.5, 1.5, 2.0, 2.0, 2.5]);
    }

    #[test]
    fn more_of_one_time_than_can_be_held_go_out_as_they_are() {
        let (mut spread, mut out) = (Spread::default(), Vec::new());
        let event = Event { at: Duration::ZERO, key: "k".into(), weight: 1, bytes: None };
        (0..=HELD_MAX).for_each(|_| spread.push(event.clone(), &mut out));
        assert_eq!(out.len(), HELD_MAX);
    }
}

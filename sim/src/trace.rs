//! A line of a trace: `seconds key [weight [bytes]]`.
//!
//! Fields are separated by one tab each if the line has a tab, so that keys may hold spaces, else by spaces. Seconds may
//! have a fraction and count from wherever the recorder liked; weight and bytes are whole numbers.

use std::time::Duration;

use mandoline_core::key::KEY_MAX_BYTES;

use crate::event::{Event, WEIGHT_MAX};

/// The latest time that a trace may name, in seconds: past the year 33,000, counted from 1970.
pub const SECONDS_MAX: f64 = 1e12;

/// What is wrong with a line of a trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceProblem {
    /// The line was not UTF-8.
    #[error("the line is not UTF-8: write keys as text, such as hex")]
    Encoding,
    /// There were not 2 to 4 fields.
    #[error(
        "the line has {0} field(s): write `seconds key [weight [bytes]]`, separated by tabs or spaces"
    )]
    Fields(usize),
    /// The first field was NaN, negative, infinite, too large or no number at all.
    #[error("the time {0:?} is no number of seconds from 0 to {SECONDS_MAX:e}")]
    Seconds(String),
    /// The key was empty or too long.
    #[error("the key is {0} bytes long: use 1 to {KEY_MAX_BYTES}")]
    Key(usize),
    /// The third field was no whole number, or too large.
    #[error("the weight {0:?} is no whole number from 0 to {WEIGHT_MAX}")]
    Weight(String),
    /// The fourth field was no whole number.
    #[error("the size {0:?} is no whole number of bytes")]
    Bytes(String),
}

/// Reads one line. The event's time is as the trace says it.
pub fn parse(line: &[u8]) -> Result<Event, TraceProblem> {
    let line = std::str::from_utf8(line).map_err(|_| TraceProblem::Encoding)?;
    let fields: Vec<&str> = if line.contains('\t') {
        line.trim_end().split('\t').map(str::trim).collect()
    } else {
        line.split_ascii_whitespace().collect()
    };
    let (seconds, key, rest) = match fields[..] {
        [seconds, key, ref rest @ ..] if rest.len() <= 2 => (seconds, key, rest),
        _ => return Err(TraceProblem::Fields(fields.len())),
    };
    let at = seconds.parse().ok().filter(|at| (0.0..=SECONDS_MAX).contains(at));
    let at =
        at.map(Duration::from_secs_f64).ok_or_else(|| TraceProblem::Seconds(seconds.to_owned()))?;
    if key.is_empty() || key.len() > KEY_MAX_BYTES {
        return Err(TraceProblem::Key(key.len()));
    }
    let weight = rest.first().map_or(Ok(1), |text| {
        let weight = text.parse().ok().filter(|weight| *weight <= WEIGHT_MAX);
        weight.ok_or_else(|| TraceProblem::Weight((*text).to_owned()))
    })?;
    let bytes =
        rest.get(1).map(|text| text.parse().map_err(|_| TraceProblem::Bytes((*text).to_owned())));
    Ok(Event { at, key: key.into(), weight, bytes: bytes.transpose()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at: f64, key: &str, weight: u64, bytes: Option<u64>) -> Event {
        Event { at: Duration::from_secs_f64(at), key: key.into(), weight, bytes }
    }

    #[test]
    fn lines_come_with_tabs_or_spaces_and_two_to_four_fields() {
        assert_eq!(parse(b"0 a"), Ok(event(0.0, "a", 1, None)));
        assert_eq!(parse(b"  1.5   a  7  "), Ok(event(1.5, "a", 7, None)));
        assert_eq!(parse(b"2\ta\t0\t4096\r"), Ok(event(2.0, "a", 0, Some(4096))));
        assert_eq!(parse("3\ttwo wörds\t1".as_bytes()), Ok(event(3.0, "two wörds", 1, None)));
        assert_eq!(parse(b"1e3 -"), Ok(event(1_000.0, "-", 1, None)));
    }

    #[test]
    fn what_is_wrong_with_a_line_is_named() {
        for bad in ["NaN k", "-1 k", "inf k", "1e13 k", "soon k"] {
            assert!(matches!(parse(bad.as_bytes()), Err(TraceProblem::Seconds(_))), "{bad}");
        }
        for bad in ["0 k -1", "0 k 0.5", "0 k NaN", "0 k 1000001", "0 k 99999999999999999999"] {
            assert!(matches!(parse(bad.as_bytes()), Err(TraceProblem::Weight(_))), "{bad}");
        }
        for bad in ["0 k 1 -1", "0 k 1 1.5", "0 k 1 infinity"] {
            assert!(matches!(parse(bad.as_bytes()), Err(TraceProblem::Bytes(_))), "{bad}");
        }
        assert_eq!(parse(b"0"), Err(TraceProblem::Fields(1)));
        assert_eq!(parse(b"0 a 1 2 3"), Err(TraceProblem::Fields(5)));
        assert_eq!(parse(b"0\t\t1"), Err(TraceProblem::Key(0)));
        assert_eq!(
            parse(format!("0 {}", "k".repeat(8_193)).as_bytes()),
            Err(TraceProblem::Key(8_193))
        );
        assert_eq!(parse(b"0 \xFF"), Err(TraceProblem::Encoding));
    }
}

//! Values with a unit, as operators write them: durations `5s`, shares `10%`, sizes `64MiB`. A number without its unit is
//! refused, for the reader of a file cannot know which one was meant.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use mandoline_core::spec::Ratio;
use serde::de::{Deserialize, Deserializer, Visitor};

/// A text is no value of this kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnitError {
    found: String,
    allowed: &'static str,
}

impl fmt::Display for UnitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no {}", self.found, self.allowed)
    }
}

impl std::error::Error for UnitError {}

/// A length of time: `500ms`, `5s`, `2m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span(pub(crate) Duration);

/// A share of a whole: `10%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share(pub(crate) Ratio);

/// How many times as much: `1.15`, or the same as `115%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Factor(pub(crate) Ratio);

/// A number of bytes: `512B`, `64KiB`, `64MiB`, `1GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

const SPANS: &[(&str, f64)] = &[("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3_600.0)];
const SIZES: &[(&str, f64)] =
    &[("B", 1.0), ("KiB", 1024.0), ("MiB", 1_048_576.0), ("GiB", 1_073_741_824.0)];

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        // A century: what is longer was a slip.
        measure(text, SPANS)
            .filter(|seconds| *seconds <= 3.2e9)
            .map(|seconds| Self(Duration::from_secs_f64(seconds)))
            .ok_or_else(|| Self::refuse(text))
    }
}

impl FromStr for Share {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        measure(text, &[("%", 10_000.0)])
            .map(f64::round)
            .filter(|millionths| *millionths <= f64::from(u32::MAX))
            .map(|millionths| Self(Ratio::from_millionths(millionths as u32)))
            .ok_or_else(|| Self::refuse(text))
    }
}

impl FromStr for Factor {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let bare = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let share = if bare { format!("{text}x") } else { text.to_owned() };
        measure(&share, &[("%", 10_000.0), ("x", 1_000_000.0)])
            .filter(|_| !text.ends_with('x'))
            .map(f64::round)
            .filter(|millionths| *millionths <= f64::from(u32::MAX))
            .map(|millionths| Self(Ratio::from_millionths(millionths as u32)))
            .ok_or_else(|| Self::refuse(text))
    }
}

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        // Nothing is nothing in every unit.
        if text == "0" {
            return Ok(Self(0));
        }
        // Up to 2^53 bytes a float is exact, and no machine has more.
        measure(text, SIZES)
            .map(f64::round)
            .filter(|bytes| *bytes <= 9.0e15)
            .map(|bytes| Self(bytes as u64))
            .ok_or_else(|| Self::refuse(text))
    }
}

/// Splits `1.5s` into its number and unit, and gives the product.
fn measure(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().ok()?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    Some(number * factor)
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        match millis {
            0 => write!(f, "0s"),
            _ if !millis.is_multiple_of(1_000) => write!(f, "{millis}ms"),
            _ if !millis.is_multiple_of(60_000) => write!(f, "{}s", millis / 1_000),
            _ if !millis.is_multiple_of(3_600_000) => write!(f, "{}m", millis / 60_000),
            _ => write!(f, "{}h", millis / 3_600_000),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) = match self.0 {
            0 => ("B", 1),
            n if n.is_multiple_of(1 << 30) => ("GiB", 1 << 30),
            n if n.is_multiple_of(1 << 20) => ("MiB", 1 << 20),
            n if n.is_multiple_of(1 << 10) => ("KiB", 1 << 10),
            _ => ("B", 1),
        };
        write!(f, "{}{name}", self.0 / factor)
    }
}

/// Reads a value from a file by its text form.
macro_rules! from_file {
    ($type:ident, $allowed:literal) => {
        impl $type {
            const ALLOWED: &str = $allowed;

            fn refuse(text: &str) -> UnitError {
                UnitError { found: text.chars().take(80).collect(), allowed: Self::ALLOWED }
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Text;

                impl Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        write!(f, "a {}", $type::ALLOWED)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }
                }

                from.deserialize_any(Text)
            }
        }
    };
}

from_file!(Span, "duration: give a number and a unit of ms, s, m or h, such as 500ms or 5s");
from_file!(Share, "share: give percent, such as 10%");
from_file!(Factor, "factor: give a number or percent, such as 1.15 or 115%");
from_file!(Size, "size: give a number and a unit of B, KiB, MiB or GiB, such as 64MiB");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_a_number_and_its_unit() {
        for (text, millis) in [("500ms", 500), ("5s", 5_000), ("1.5s", 1_500), ("2m", 120_000)] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(millis))), "{text}");
        }
        assert_eq!("10%".parse(), Ok(Share(Ratio::percent(10))));
        assert_eq!("0.5%".parse(), Ok(Share(Ratio::from_millionths(5_000))));
        assert_eq!("64MiB".parse(), Ok(Size(64 << 20)));
        assert_eq!("0".parse(), Ok(Size(0)));
        for (text, percent) in [("1.15", 115), ("115%", 115), ("2", 200)] {
            assert_eq!(text.parse(), Ok(Factor(Ratio::percent(percent))), "{text}");
        }
    }

    #[test]
    fn a_wrong_unit_is_refused_with_what_is_allowed() {
        for bad in ["5", "", "s", "5 parsecs", "-1s", "1e3s", "5S", "1.2.3s", "9999999h", "NaNs"] {
            let error = bad.parse::<Span>().unwrap_err().to_string();
            assert!(error.contains("unit of ms, s, m or h"), "{error}");
        }
        for bad in ["10", "0.1", "5s", "%", "500000%"] {
            assert!(bad.parse::<Share>().unwrap_err().to_string().contains("percent"), "{bad}");
        }
        for bad in ["", "x", "1x", "1.15s", ".", "-1", "9999"] {
            assert!(
                bad.parse::<Factor>().unwrap_err().to_string().contains("1.15 or 115%"),
                "{bad}"
            );
        }
        for bad in ["64", "64MB", "64 mib"] {
            assert!(bad.parse::<Size>().unwrap_err().to_string().contains("MiB"), "{bad}");
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for text in ["0s", "500ms", "5s", "90s", "2m", "1h"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["0B", "7B", "64KiB", "64MiB", "1GiB"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        assert_eq!("12.5%".parse::<Share>().unwrap().to_string(), "12.5%");
    }
}

//! Order among assignments: each change has a greater generation than the one before, also over a restored backup.

use std::fmt;
use std::str::FromStr;

/// When an assignment was made, in changes since the job began. Minted in `State::apply` alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation {
    /// Raised when a backup is restored, so that no generation is ever given twice.
    pub incarnation: u64,
    /// Raised by one with each change.
    pub number: u64,
}

impl Generation {
    /// Before the first change.
    pub const ZERO: Self = Self { incarnation: 0, number: 0 };

    /// Gives the one after.
    #[must_use]
    pub const fn next(self) -> Self {
        Self { incarnation: self.incarnation, number: self.number + 1 }
    }

    /// Gives 16 bytes that sort as generations do, the incarnation first: what a storage compares.
    #[must_use]
    pub const fn to_be_bytes(self) -> [u8; 16] {
        ((self.incarnation as u128) << 64 | self.number as u128).to_be_bytes()
    }

    /// Reads what [`to_be_bytes`](Self::to_be_bytes) wrote.
    #[must_use]
    pub const fn from_be_bytes(bytes: [u8; 16]) -> Self {
        let both = u128::from_be_bytes(bytes);
        Self { incarnation: (both >> 64) as u64, number: both as u64 }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.number)
    }
}

/// Why a text is no generation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no generation: give incarnation.number, such as 1.42")]
pub struct GenerationError(String);

impl FromStr for Generation {
    type Err = GenerationError;

    fn from_str(text: &str) -> Result<Self, GenerationError> {
        let parts =
            text.split_once('.').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        let (incarnation, number) = parts.ok_or_else(|| GenerationError(text.to_owned()))?;
        Ok(Self { incarnation, number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_backup_is_newer_than_all_that_was_before() {
        let last: Generation = "1.900".parse().unwrap();
        let restored: Generation = "2.3".parse().unwrap();
        assert!(last < last.next() && last.next() < restored);
        assert!("1".parse::<Generation>().is_err());
    }

    #[test]
    fn bytes_sort_as_generations_do_and_read_back() {
        let parts = [0, 1, 255, 256, 1 << 32, u64::MAX];
        let all: Vec<Generation> = parts
            .iter()
            .flat_map(|&incarnation| parts.map(|number| Generation { incarnation, number }))
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(all.windows(2).all(|pair| pair[0].to_be_bytes() < pair[1].to_be_bytes()));
        assert!(all.iter().all(|one| Generation::from_be_bytes(one.to_be_bytes()) == *one));
        let spelled = Generation { incarnation: 1, number: 0x0203 }.to_be_bytes();
        assert_eq!(spelled, [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 3]);
    }
}

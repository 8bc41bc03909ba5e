//! Where a key lands: a `u64` by XXH3-64 with seed 0, which has a written specification and an implementation in nearly
//! every language (<https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>), so that all callers agree.

use std::fmt;
use std::str::FromStr;

use xxhash_rust::xxh3::xxh3_64;

/// The longest key that a proxy or an application may ask for, in bytes: 8 KiB, what common servers allow a header line.
pub const KEY_MAX_BYTES: usize = 8 * 1024;

/// A key's place on the line that slices divide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SliceKey(pub u64);

impl SliceKey {
    /// The first place.
    pub const MIN: Self = Self(0);
    /// The last place.
    pub const MAX: Self = Self(u64::MAX);

    /// Hashes a key's bytes.
    #[inline]
    pub fn of(key: &[u8]) -> Self {
        Self(xxh3_64(key))
    }

    /// Places a member of a group: all members of a group lie together in 2^32 places, yet can be split.
    pub fn grouped(group: &[u8], member: &[u8]) -> Self {
        Self((xxh3_64(group) & 0xFFFF_FFFF_0000_0000) | (xxh3_64(member) >> 32))
    }

    /// Gives the next place, unless this is the last.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }

    /// Gives the place before, unless this is the first.
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

/// Sixteen hex digits, so that text sorts as places do.
impl fmt::Display for SliceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Why a text is no slice key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no slice key: give 1 to 16 hex digits")]
pub struct SliceKeyError(String);

impl FromStr for SliceKey {
    type Err = SliceKeyError;

    fn from_str(text: &str) -> Result<Self, SliceKeyError> {
        let digits = text.len() <= 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let place = digits.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        place.map(Self).ok_or_else(|| SliceKeyError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_land_where_the_specification_says() {
        // From the XXH3 specification's reference implementation, seed 0.
        assert_eq!(SliceKey::of(b"").to_string(), "2d06800538d394c2");
        assert_eq!(SliceKey::of(b"a").to_string(), "e6c632b61e964e1f");
        assert_eq!(SliceKey::of(b"abc").to_string(), "78af5f94892f3950");
    }

    #[test]
    fn a_group_lies_together() {
        let (a, b) = (SliceKey::grouped(b"tenant", b"1"), SliceKey::grouped(b"tenant", b"2"));
        assert_eq!(a.0 >> 32, b.0 >> 32);
        assert_ne!(a, b);
    }

    #[test]
    fn text_forms_come_back() {
        assert_eq!("00ff".parse(), Ok(SliceKey(255)));
        assert_eq!(SliceKey::MAX.to_string().parse(), Ok(SliceKey::MAX));
        for bad in ["", "+1", "00000000000000001", "xyz"] {
            assert!(bad.parse::<SliceKey>().is_err(), "{bad}");
        }
    }
}

//! What a proxy calls itself.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;

/// What a proxy calls itself in `Via`: letters, digits, `-`, `_` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProxyId(Box<str>);

/// A proxy's name was empty, too long, or held something else than letters, digits, `-`, `_` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name for a proxy: give 1 to {ID_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_' and '.'"
)]
pub struct ProxyIdError(String);

impl ProxyId {
    /// Draws a name that no other proxy has, so that two in a row do not take each other for a loop.
    pub fn random() -> Self {
        // The standard library's hasher is the one source of randomness that needs no dependency.
        Self(format!("{:016x}", RandomState::new().hash_one(std::process::id())).into())
    }

    /// Gives the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProxyId {
    type Err = ProxyIdError;

    fn from_str(text: &str) -> Result<Self, ProxyIdError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if (1..=ID_MAX_BYTES).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(ProxyIdError(text.chars().take(2 * ID_MAX_BYTES).collect()))
        }
    }
}

impl fmt::Display for ProxyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The longest name of a proxy, in bytes: a DNS label.
pub const ID_MAX_BYTES: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_name_fits_a_header() {
        for good in ["a", "edge-1.eu_west", &"x".repeat(63)] {
            assert_eq!(good.parse::<ProxyId>().unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a,b", "a/b", &"x".repeat(64)] {
            assert!(bad.parse::<ProxyId>().is_err(), "{bad}");
        }
        assert_ne!(ProxyId::random(), ProxyId::random());
        assert!(ProxyId::random().as_str().parse::<ProxyId>().is_ok());
    }
}

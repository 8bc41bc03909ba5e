//! Which keys an operator means: a slice by its ends, one key, or a group of them.

use std::fmt;
use std::str::FromStr;

use mandoline_core::key::SliceKey;
use mandoline_core::slice::{Slice, SliceError};

/// `0000000000000000..3fffffffffffffff`, `key:user-17` or `group:tenant-7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    /// Where they lie.
    pub(crate) slice: Slice,
    text: String,
}

impl FromStr for Keys {
    type Err = KeysError;

    fn from_str(text: &str) -> Result<Self, KeysError> {
        let slice = if let Some(key) = text.strip_prefix("key:") {
            let key = SliceKey::of(key.as_bytes());
            Slice::new(key, key).expect("a key is its own slice")
        } else if let Some(group) = text.strip_prefix("group:") {
            Slice::of_group(group.as_bytes())
        } else {
            text.parse().map_err(KeysError)?
        };
        Ok(Self { slice, text: text.to_owned() })
    }
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A text names no keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeysError(SliceError);

impl fmt::Display for KeysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; or key:KEY, or group:GROUP", self.0)
    }
}

impl std::error::Error for KeysError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_named_by_place_by_name_or_by_group() {
        let slice = |text: &str| text.parse::<Keys>().unwrap().slice;
        assert_eq!(slice("0..ff"), "0..ff".parse().unwrap());
        let abc = SliceKey::of(b"abc");
        assert_eq!(slice("key:abc"), Slice::new(abc, abc).unwrap());
        assert_eq!(slice("group:t").width(), 1 << 32);
        let error = "abc".parse::<Keys>().unwrap_err().to_string();
        assert!(error.contains("\"abc\" is no slice") && error.contains("key:KEY"), "{error}");
    }
}

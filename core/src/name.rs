//! Names that people choose, checked once where they come in.

use std::fmt;
use std::str::FromStr;

/// The longest name, in bytes: a DNS label, so that a name fits a host name, a file name and a metric label.
pub const NAME_MAX_BYTES: usize = 63;

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There was nothing.
    #[error("the name is empty: use 1 to {NAME_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_' and '.'")]
    Empty,
    /// It was longer than `NAME_MAX_BYTES`.
    #[error("the name is {0} bytes long: use at most {NAME_MAX_BYTES}")]
    TooLong(usize),
    /// It held something else than letters, digits, `-`, `_` and `.`, or began with a sign.
    #[error(
        "the name {name:?} has {found:?} at byte {at}: use a-z, A-Z, 0-9, '-', '_' and '.', and begin with a letter or digit"
    )]
    Char {
        /// The name as given.
        name: String,
        /// The character that it may not hold.
        found: char,
        /// Where it stands.
        at: usize,
    },
}

fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > NAME_MAX_BYTES {
        return Err(NameError::TooLong(name.len()));
    }
    let odd = name
        .char_indices()
        .find(|&(at, c)| !(c.is_ascii_alphanumeric() || (at > 0 && matches!(c, '-' | '_' | '.'))));
    match odd {
        Some((at, found)) => Err(NameError::Char { name: name.to_owned(), found, at }),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Box<str>);

        impl $type {
            /// Takes a name that someone chose.
            pub fn new(name: &str) -> Result<Self, NameError> {
                check(name).map(|()| Self(name.into()))
            }

            /// Gives the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name! {
    /// The name of a job: one sharded service.
    JobName
}
name! {
    /// The stable name of a task, kept over restarts.
    TaskName
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_once_where_they_come_in() {
        for good in ["a", "kv", "shop-1.eu_west", &"x".repeat(63)] {
            assert_eq!(JobName::new(good).unwrap().as_str(), good);
        }
        assert_eq!(JobName::new(""), Err(NameError::Empty));
        assert_eq!(JobName::new(&"x".repeat(64)), Err(NameError::TooLong(64)));
        let odd = TaskName::new("a/b").unwrap_err();
        assert_eq!(odd, NameError::Char { name: "a/b".into(), found: '/', at: 1 });
        assert!(TaskName::new("-a").is_err() && TaskName::new("é").is_err());
    }
}

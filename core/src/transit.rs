//! A slice on its way from one task to another: what everybody is told of it, and what may happen to it.
//!
//! `docs/protocol.md`, section 3, has the steps and why each is safe. A slice in transit is not split, merged or moved
//! otherwise until that is over.

use std::fmt;
use std::str::FromStr;

use crate::generation::Generation;
use crate::key::SliceKey;
use crate::task::SessionId;

/// Names a hand-off: the change that began it, and which of its slices. Never the same twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandOffId {
    /// The generation that began it.
    pub began: Generation,
    /// The slice's first key: a slice in hand-off is not cut.
    pub first: SliceKey,
}

impl fmt::Display for HandOffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.began, self.first)
    }
}

/// Why a text names no hand-off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no hand-off: give generation/first key, such as 1.42/00000000000000ff")]
pub struct HandOffIdError(String);

impl FromStr for HandOffId {
    type Err = HandOffIdError;

    fn from_str(text: &str) -> Result<Self, HandOffIdError> {
        let read = || {
            let (began, first) = text.split_once('/')?;
            let hex = first.len() == 16 && first.bytes().all(|b| b.is_ascii_hexdigit());
            let first = hex.then(|| u64::from_str_radix(first, 16).ok())??;
            Some(Self { began: began.parse().ok()?, first: SliceKey(first) })
        };
        read().ok_or_else(|| HandOffIdError(text.chars().take(100).collect()))
    }
}

/// How far a hand-off is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Whoever will serve it gets ready; whoever has it serves on.
    Preparing,
    /// Whoever has it takes no new work and lets go. Only of exclusive slices.
    Releasing,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Preparing => "preparing",
            Self::Releasing => "releasing",
        })
    }
}

/// A slice's way from one task to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transit {
    /// Which hand-off.
    pub id: HandOffId,
    /// Who has it; nobody where a replica is added.
    pub from: Option<SessionId>,
    /// Who will.
    pub to: SessionId,
    /// How far it is.
    pub step: Step,
}

/// What happens to a hand-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The owner is told to let go, since the next one is ready or has had its time.
    Release,
    /// The owner has let go: the next one owns it.
    Acknowledged {
        /// By whose word.
        by: SessionId,
    },
    /// The owner said nothing until its right to this slice had ended: the next one owns it.
    Lapsed,
    /// The next one serves it from now on: a slice of an affinity job, of which nobody has to let go first.
    Switch,
    /// It is called off: the slice stays where it is.
    Abort,
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Release => "release",
            Self::Acknowledged { .. } => "acknowledged",
            Self::Lapsed => "lapsed",
            Self::Switch => "switch",
            Self::Abort => "abort",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_off_is_named_as_text_and_read_back() {
        let began = Generation { incarnation: 1, number: 42 };
        let id = HandOffId { began, first: SliceKey(255) };
        assert_eq!(id.to_string(), "1.42/00000000000000ff");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "1.42", "1.42/ff", "1.42/+0000000000000ff", "1/00000000000000ff", "/"] {
            assert!(bad.parse::<HandOffId>().is_err(), "{bad}");
        }
    }
}

//! All who compete, by name: what `--policy` takes, each with the settings that are best for it.

use std::fmt;
use std::str::FromStr;

use crate::contest::Entry;
use crate::policy::Planned;
use crate::policy::fixed::Fixed;
use crate::scenario::nearest;

/// The name of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(&'static str);

/// The names of all policies and what each is, in the order in which they are shown.
pub const ALL: [(Name, &str); 1] = [(Name("static"), "the first assignment, for ever")];

/// A name is of no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no policy {name:?}: {}", advise(.near))]
pub struct NameError {
    name: String,
    near: Option<&'static str>,
}

fn advise(near: &Option<&'static str>) -> String {
    match near {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("use {}", ALL.map(|(name, _)| name.0).join(", ")),
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let found = ALL.iter().find(|(name, _)| name.0 == text).map(|(name, _)| *name);
        found.ok_or_else(|| {
            let near = nearest(text, &ALL.map(|(name, _)| name.0));
            NameError { name: text.to_owned(), near }
        })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0)
    }
}

/// What all policies are asked alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// How many tasks may serve one key; as many as there are, unless told.
    pub replicas_max: Option<u32>,
}

impl Name {
    /// Gives what makes the policy.
    pub fn entry(self, terms: Terms) -> Entry<'static> {
        let Terms { replicas_max: _ } = terms;
        match self.0 {
            "static" => Box::new(|_| Box::new(Planned::new(Fixed::default()))),
            name => unreachable!("{name} is no name"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_makes_a_policy() {
        for (name, what) in ALL {
            assert_eq!(name.to_string().parse(), Ok(name));
            assert!(!what.is_empty());
            assert_eq!(name.entry(Terms::default())(1).name(), name.to_string());
        }
    }

    #[test]
    fn what_was_probably_meant_is_suggested() {
        let error = "statik".parse::<Name>().unwrap_err().to_string();
        assert_eq!(error, "there is no policy \"statik\": did you mean \"static\"?");
        let error = "roundrobin".parse::<Name>().unwrap_err().to_string();
        assert!(error.starts_with("there is no policy \"roundrobin\": use "), "{error}");
    }
}

//! All who compete, by name: what `--policy` takes, each with the settings that are best for it.

use std::fmt;
use std::str::FromStr;

use mandoline_core::spec::Ratio;

use crate::contest::Entry;
use crate::policy::Planned;
use crate::policy::bounded_ring::BoundedRing;
use crate::policy::dicer::{Dicer, DicerConfig};
use crate::policy::fixed::Fixed;
use crate::policy::mandoline::Mandoline;
use crate::policy::ring::ConsistentHash;
use crate::policy::slicer::{Slicer, SlicerConfig};
use crate::policy::spilling::Spilling;
use crate::requests::Network;
use crate::scenario::nearest;

/// The name of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(&'static str);

/// The names of all policies and what each is, in the order in which they are shown.
pub const ALL: [(Name, &str); 10] = [
    (Name("mandoline"), "our own planner, as the assigner runs it"),
    (
        Name("mandoline+spill"),
        "the same, and four callers that pass over tasks above 1.15, request by request",
    ),
    (Name("slicer"), "Slicer's weighted moves as published, every interval"),
    (Name("slicer+band"), "the same, that stops when the busiest task is within 10 % of the mean"),
    (Name("dicer"), "Dicer's published algorithm with its default tolerance of 10 %"),
    (Name("ring"), "consistent hashing, 1,000 virtual nodes a task"),
    (Name("ring-100"), "consistent hashing, 100 virtual nodes a task"),
    (Name("bounded-ring"), "consistent hashing with bounded loads, 1.15, request by request"),
    (Name("static"), "the first assignment, for ever"),
    (Name("clairvoyant"), "our own planner, shown the load to come: a yardstick, for nobody can"),
];

/// How far above the mean a task may be for `slicer+band`: as in most of what is measured elsewhere.
const SLICER_BAND: f64 = 0.10;
/// How far above its due a task may be loaded with `bounded-ring`, and how many virtual nodes it has.
const BOUND: f64 = 1.15;
const BOUNDED_NODES: u32 = 100;

/// Above which load, in relation to the mean, `mandoline+spill` passes a task over.
const SPILL_CAP: Ratio = Ratio::percent(115);

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
        let Terms { replicas_max } = terms;
        let slicer = move |band| {
            Planned::new(Slicer::new(SlicerConfig {
                band,
                replicas_max,
                ..SlicerConfig::default()
            }))
        };
        match self.0 {
            "mandoline" => Box::new(move |_| Box::new(Planned::new(Mandoline::new(replicas_max)))),
            "mandoline+spill" => Box::new(move |seed| {
                let (planner, network) = (Mandoline::new(replicas_max), Network::default());
                Box::new(Spilling::new(planner, SPILL_CAP, network, seed))
            }),
            "clairvoyant" => {
                Box::new(move |_| Box::new(Planned::new(Mandoline::clairvoyant(replicas_max))))
            }
            "slicer" => Box::new(move |_| Box::new(slicer(None))),
            "slicer+band" => Box::new(move |_| Box::new(slicer(Some(SLICER_BAND)))),
            "dicer" => Box::new(move |_| {
                let config = DicerConfig { replicas_max, ..DicerConfig::default() };
                Box::new(Planned::new(Dicer::new(config)))
            }),
            "ring" => Box::new(|_| Box::new(Planned::new(ConsistentHash::new(1_000)))),
            "ring-100" => Box::new(|_| Box::new(Planned::new(ConsistentHash::new(100)))),
            "bounded-ring" => {
                Box::new(|seed| Box::new(BoundedRing::new(BOUNDED_NODES, BOUND, seed)))
            }
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
            let made = name.entry(Terms::default())(1).name();
            // A ring says how many virtual nodes it has.
            assert!(made.starts_with(&name.to_string()), "{name}: {made}");
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

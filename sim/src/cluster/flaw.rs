//! Ways to break the protocol on purpose: a check that never fails proves nothing.
//!
//! Each flaw tampers with what passes through the simulator's hands (messages, commands, state, margins); the machines of `core` are
//! never touched. `mandoline sim cluster --self-test` runs each until one of the checks that should catch it does.

use crate::check::{coverage, fencing, generations, imported, served, single_owner};
use crate::cluster::scenario::Scenario;

/// A way to break the protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flaw {
    /// None: the protocol as it is.
    #[default]
    None,
    /// Clocks are trusted to be exact.
    NoMargin,
    /// Renewals are granted without asking a majority.
    ConfirmsAlone,
    /// Whoever begins to lead counts leases from long ago.
    LeaderDoesNotWait,
    /// A slice is let go of while guards are in flight.
    AcknowledgesEarly,
    /// Now and then a generation is given to two assignments.
    GenerationTwice,
    /// A hub leaves a change out, and makes the next one fit.
    DeltaOverGap,
    /// The leader takes any acknowledgement for that of the hand-off that is under way.
    StaleAcknowledgement,
    /// An acknowledgement counts though its hand-off was called off.
    AcknowledgedAfterAbort,
    /// A slice is split while its owner lets go of it.
    SplitWhileReleasing,
    /// What was imported is kept, and used when the slice comes some other time.
    ImportKept,
    /// Whoever has the name has the session.
    OwnershipByName,
    /// A grant lets a task serve again what it has let go of.
    GrantGivesBack,
    /// A restored cluster gives slices away at once.
    NoHoldOff,
    /// A new owner reads before storage knows of it.
    NoAdvance,
}

impl Flaw {
    /// All of them, but none.
    pub const ALL: [Self; 14] = [
        Self::NoMargin,
        Self::ConfirmsAlone,
        Self::LeaderDoesNotWait,
        Self::AcknowledgesEarly,
        Self::GenerationTwice,
        Self::DeltaOverGap,
        Self::StaleAcknowledgement,
        Self::AcknowledgedAfterAbort,
        Self::SplitWhileReleasing,
        Self::ImportKept,
        Self::OwnershipByName,
        Self::GrantGivesBack,
        Self::NoHoldOff,
        Self::NoAdvance,
    ];

    /// Gives its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoMargin => "no margin for clocks",
            Self::ConfirmsAlone => "a renewal without confirmed leadership",
            Self::LeaderDoesNotWait => "a new leader that does not wait",
            Self::AcknowledgesEarly => "an acknowledgement before guards are gone",
            Self::GenerationTwice => "a generation minted twice",
            Self::DeltaOverGap => "a delta applied over a gap",
            Self::StaleAcknowledgement => "an acknowledgement of an older hand-off",
            Self::AcknowledgedAfterAbort => "an acknowledgement after an abort",
            Self::SplitWhileReleasing => "a split during a release",
            Self::ImportKept => "an import kept after an abort",
            Self::OwnershipByName => "ownership by name instead of session",
            Self::GrantGivesBack => "a grant that gives a slice back",
            Self::NoHoldOff => "a restore without the hold-off",
            Self::NoAdvance => "a new owner that reads before it advances the fence",
        }
    }

    /// Gives the scenario in which it shows soonest.
    pub const fn scenario(self) -> Scenario {
        match self {
            Self::NoHoldOff => Scenario::Restore,
            Self::NoMargin => Scenario::Pauses,
            Self::AcknowledgesEarly
            | Self::NoAdvance
            | Self::DeltaOverGap
            | Self::SplitWhileReleasing => Scenario::Calm,
            Self::GenerationTwice | Self::GrantGivesBack => Scenario::Crashes,
            _ => Scenario::Partitions,
        }
    }

    /// Gives the checks that may catch it: whatever it leads to first.
    pub const fn caught_by(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::GenerationTwice | Self::DeltaOverGap => &[generations::NAME],
            // A part of it is never let go of, as everyone can see at once, or nobody ever serves.
            Self::SplitWhileReleasing => &[coverage::NAME, served::NAME],
            Self::ImportKept => &[imported::NAME],
            Self::NoAdvance => &[fencing::NAME],
            // Two owners, or state that one of them changed when the other had begun with it.
            Self::AcknowledgesEarly | Self::GrantGivesBack => &[single_owner::NAME, imported::NAME],
            _ => &[single_owner::NAME],
        }
    }
}

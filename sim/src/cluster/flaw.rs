//! Ways to break the protocol on purpose: a check that never fails proves nothing.
//!
//! Each flaw tampers with what passes through the simulator's hands (messages, commands, state, margins); the machines of `core` are
//! never touched. Tests run each, and demand that the right check catches it.

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
    /// A decision to end a session is written down in whatever term.
    EndsInAnyTerm,
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
    pub const ALL: [Self; 15] = [
        Self::NoMargin,
        Self::ConfirmsAlone,
        Self::LeaderDoesNotWait,
        Self::EndsInAnyTerm,
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
}

//! The protocol's rules, each of which the model can leave out: a model that finds nothing wrong then would prove nothing.

/// A rule of `docs/protocol.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The holder counts less than the lease, the leader more (2.2, 2.5).
    DriftMargin,
    /// The holder counts from when it sent, not from when it was answered (2.2).
    CountFromSend,
    /// A grant is made only after the leader has confirmed that it still leads (2.3).
    ConfirmedGrant,
    /// Whoever begins to lead takes every session for renewed (2.4).
    NewLeaderWaits,
    /// It does so in each term, also if it never saw that another led in between (2.4).
    EachTermAnew,
    /// A leader that has proposed to end a session grants it nothing more (2.5, a).
    NoGrantAfterEnd,
    /// The end of a silent session is written only in the term in which it was decided (2.5, f).
    EndInItsTerm,
    /// A lapse is for good (2.5).
    LapseForGood,
    /// Only the process itself can say that its session has stopped, not its successor by name (2.5, b).
    SameProcess,
    /// A grant extends only once the generation it was made at is installed (2.2).
    InstallFirst,
    /// A grant whose generation shows a slice as being released does not extend that slice (2, iii).
    ReleaseEndsRight,
    /// A grant never gives a slice back (2.2).
    GrantGivesNothing,
    /// The release is acknowledged after the last guard has gone (3).
    GuardsFirst,
    /// A slice is given on unacknowledged only after a whole lease (3).
    LapseWaits,
    /// A plan takes no slice from its owner without a hand-off: who got it next would get it at once (3).
    NoOneInstead,
    /// An acknowledgement counts for the hand-off that it names (3).
    AckNamesHandOff,
    /// None counts after an abort (3).
    AckEndsWithAbort,
    /// Each owner has a token of its own (2.7).
    TokenGrows,
    /// A restored cluster holds off (2.8).
    HoldOff,
    /// No session id is minted twice, not even by a restored cluster (2.8, g).
    FreshSessions,
}

/// All of them, in the order of the document.
pub(crate) const RULES: [Rule; 20] = [
    Rule::DriftMargin,
    Rule::CountFromSend,
    Rule::ConfirmedGrant,
    Rule::NewLeaderWaits,
    Rule::EachTermAnew,
    Rule::NoGrantAfterEnd,
    Rule::EndInItsTerm,
    Rule::LapseForGood,
    Rule::SameProcess,
    Rule::InstallFirst,
    Rule::ReleaseEndsRight,
    Rule::GrantGivesNothing,
    Rule::GuardsFirst,
    Rule::LapseWaits,
    Rule::NoOneInstead,
    Rule::AckNamesHandOff,
    Rule::AckEndsWithAbort,
    Rule::TokenGrows,
    Rule::HoldOff,
    Rule::FreshSessions,
];

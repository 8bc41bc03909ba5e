//! What a try came to, if not an answer to pass on.

use http::request::Parts;
use mandoline_core::generation::Generation;

use crate::pool::dial::ConnectError;
use crate::refusal::Refusal;

/// What one try came to, if not an answer to pass on.
pub(crate) enum Setback {
    /// The task was not reached, or was not sent the request.
    Unreached(ConnectError),
    /// The task says that the key is not its own, and by which assignment.
    Misdirected(Option<Generation>),
    /// The task is giving the key's slice away, by this assignment or an older one.
    InTransit(Generation),
    /// The task broke off before it answered.
    Broken,
    /// There is no use in trying again.
    Final(Refusal),
}

/// What the client is told of a setback that ends its request.
pub(crate) fn refusal(setback: Setback, head: &Parts) -> Refusal {
    match setback {
        Setback::Unreached(_) => Refusal::Unreached,
        Setback::Misdirected(_) | Setback::InTransit(_) => Refusal::Moving,
        Setback::Broken if head.method.is_idempotent() => Refusal::BrokenRepeatable,
        Setback::Broken => Refusal::Broken,
        Setback::Final(refusal) => refusal,
    }
}

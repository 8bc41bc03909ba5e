//! What is wrong with bytes that came from outside: which field, and why.

use std::fmt;

use prost::Message;

/// A field that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct WireError {
    /// Where, such as `slices[3].replicas[0].since`.
    pub field: String,
    /// What is wrong there.
    pub problem: String,
}

impl WireError {
    /// Says what is wrong with a field.
    pub fn new(field: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self { field: field.into(), problem: problem.to_string() }
    }

    /// Says in which message the field stands.
    #[must_use]
    pub fn within(self, outer: impl fmt::Display) -> Self {
        Self { field: format!("{outer}.{}", self.field), problem: self.problem }
    }
}

/// Takes what must be there.
pub fn need<T>(value: Option<T>, field: &str) -> Result<T, WireError> {
    value.ok_or_else(|| WireError::new(field, "is missing"))
}

/// Converts each of a list, naming the one that fails.
pub fn each<F, T>(list: Vec<F>, field: &str) -> Result<Vec<T>, WireError>
where
    T: TryFrom<F, Error = WireError>,
{
    let one = |(index, value)| {
        T::try_from(value).map_err(|error: WireError| error.within(format!("{field}[{index}]")))
    };
    list.into_iter().enumerate().map(one).collect()
}

/// Decodes a message, naming it where that fails.
pub fn decode<M: Message + Default>(bytes: impl bytes::Buf, what: &str) -> Result<M, WireError> {
    M::decode(bytes).map_err(|error| WireError::new(what, error))
}

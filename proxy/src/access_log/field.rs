//! What a line of the access log may tell of a request, by name.

use std::fmt;
use std::str::FromStr;

use http::header::HeaderName;

/// Something to tell of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field(pub(super) What);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    Time,
    Client,
    Method,
    Host,
    Path,
    Query,
    Protocol,
    Status,
    Outcome,
    Route,
    Job,
    Key,
    Generation,
    Task,
    Upstream,
    Tries,
    Held,
    UpstreamTime,
    Duration,
    BytesOut,
    Reason,
    Trace,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Plain(Plain),
    Header(HeaderName),
}

/// The fields by their names, in the order in which JSON has them. Headers are named as `header:NAME`.
pub(super) const FIELDS: [(&str, Plain); 22] = [
    ("time", Plain::Time),
    ("client", Plain::Client),
    ("method", Plain::Method),
    ("host", Plain::Host),
    ("path", Plain::Path),
    ("query", Plain::Query),
    ("protocol", Plain::Protocol),
    ("status", Plain::Status),
    ("outcome", Plain::Outcome),
    ("route", Plain::Route),
    ("job", Plain::Job),
    ("key", Plain::Key),
    ("generation", Plain::Generation),
    ("task", Plain::Task),
    ("upstream", Plain::Upstream),
    ("tries", Plain::Tries),
    ("held", Plain::Held),
    ("upstream_time", Plain::UpstreamTime),
    ("duration", Plain::Duration),
    ("bytes_out", Plain::BytesOut),
    ("reason", Plain::Reason),
    ("trace", Plain::Trace),
];

/// Why a format cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It names a field that is not known.
    #[error(
        "the access log has no field {0:?}; known: {known}, and header:NAME",
        known = FIELDS.map(|(name, _)| name).join(", ")
    )]
    Unknown(String),
    /// It names a header that cannot be one.
    #[error("{0:?} is no name of a header")]
    Header(String),
    /// A brace has no partner.
    #[error("the format has a brace without its other half: a brace itself is written twice")]
    Brace,
    /// It would end lines, or do something to a terminal.
    #[error(
        "the format has a control character in it, such as the end of a line: each request has one line"
    )]
    Control,
    /// It tells nothing.
    #[error("the format names no field: give one at least, such as {{status}}")]
    Empty,
}

impl Field {
    /// Gives the names of all fields but headers.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FIELDS.iter().map(|(name, _)| *name)
    }
}

impl FromStr for Field {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        let short = || name.chars().take(80).collect::<String>();
        if let Some(header) = name.strip_prefix("header:") {
            let header = HeaderName::from_str(header).map_err(|_| FormatError::Header(short()))?;
            return Ok(Self(What::Header(header)));
        }
        let known = FIELDS.iter().find(|(known, _)| *known == name);
        known.map(|(_, what)| Self(What::Plain(*what))).ok_or_else(|| FormatError::Unknown(short()))
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            What::Header(name) => write!(f, "header:{name}"),
            What::Plain(what) => {
                let place = *what as usize;
                f.write_str(FIELDS[place].0)
            }
        }
    }
}

//! What is changed in heads on their way: fields that are set, by templates, and fields that are taken away.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use http::header::{self, HeaderName};

/// What is changed in a head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderRules {
    /// Fields that are taken away, before any is set.
    pub remove: Vec<FieldName>,
    /// Fields that are set, in place of any that were there.
    pub set: Vec<(FieldName, Template)>,
}

impl HeaderRules {
    /// Says whether nothing is changed.
    pub const fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty()
    }
}

/// A field that may be changed: none that says where a message ends, whom it is for or which way it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldName(pub HeaderName);

impl Ord for FieldName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.as_str().cmp(other.0.as_str())
    }
}

impl PartialOrd for FieldName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The value of a field: text, with values of the request in braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(pub Vec<Piece>);

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// As it stands.
    Text(Box<str>),
    /// What the request says.
    Value(Value),
}

/// A value that a request has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number for the request that no other has, in 32 hex digits; the client's `x-request-id`, if it sent a sane one.
    RequestId,
    /// The client's address.
    Client,
    /// Whom the client's certificate is about, such as `CN=shop, O=Example`; empty if it showed none.
    ClientSubject,
    /// The names that the client's certificate is for, such as `URI:spiffe://example.org/shop, DNS:shop`; empty if it showed none.
    ClientNames,
    /// The host that was asked for.
    Host,
    /// The name of the route.
    Route,
    /// Where the key lies, in 16 hex digits.
    Key,
    /// What stands for the key in the table of the route's lookup; `%` and two hex digits for a byte that no header holds. Empty without one.
    Translation,
    /// The name of the task that the request goes to.
    Task,
    /// The generation of the assignment that says so.
    Generation,
}

/// Each value and what it is called in braces.
const VALUES: [(Value, &str); 10] = [
    (Value::RequestId, "request_id"),
    (Value::Client, "client"),
    (Value::ClientSubject, "client_subject"),
    (Value::ClientNames, "client_names"),
    (Value::Host, "host"),
    (Value::Route, "route"),
    (Value::Key, "key"),
    (Value::Translation, "translation"),
    (Value::Task, "task"),
    (Value::Generation, "generation"),
];

/// Fields that a rule must leave alone: framing, what belongs to one hop, and what proxies tell each other.
const FIXED: [HeaderName; 11] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::EXPECT,
    header::HOST,
    header::VIA,
    header::FORWARDED,
    HeaderName::from_static("keep-alive"),
];

/// Why a text is no field or no template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// No name.
    #[error("{0:?} is no header's name")]
    Name(String),
    /// A name that may not be changed.
    #[error("{0} is set by the proxy itself and cannot be changed")]
    Fixed(HeaderName),
    /// A value that no request has.
    #[error("{{{0}}} is no value: give one of {values}", values = all())]
    Value(String),
    /// A brace without its partner, or what no header can hold.
    #[error(
        "{0:?} is no template: write text, and values in braces; a brace itself is written twice"
    )]
    Template(String),
}

fn all() -> String {
    VALUES.map(|(_, name)| format!("{{{name}}}")).join(", ")
}

impl FromStr for FieldName {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let name = HeaderName::try_from(text).map_err(|_| RuleError::Name(text.to_owned()))?;
        if FIXED.contains(&name) || name.as_str().starts_with("mandoline-") {
            return Err(RuleError::Fixed(name));
        }
        Ok(Self(name))
    }
}

impl FromStr for Template {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let bad = || RuleError::Template(text.to_owned());
        if text.bytes().any(|b| !(b == b' ' || b.is_ascii_graphic())) {
            return Err(bad());
        }
        let (mut pieces, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let (brace, after) = rest[at..].split_at(1);
            if let Some(after) = after.strip_prefix(brace) {
                plain.push_str(brace);
                rest = after;
                continue;
            }
            let (name, after) = after.split_once('}').filter(|_| brace == "{").ok_or_else(bad)?;
            let value = VALUES.iter().find(|(_, known)| *known == name);
            let (value, _) = value.ok_or_else(|| RuleError::Value(name.to_owned()))?;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain).into()));
            }
            pieces.push(Piece::Value(*value));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain.into()));
        }
        Ok(Self(pieces))
    }
}

impl fmt::Display for FieldName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_have_text_and_values() {
        let read = |text: &str| text.parse::<Template>().map(|Template(pieces)| pieces);
        let text = |text: &str| Piece::Text(text.into());
        assert_eq!(read(""), Ok(vec![]));
        assert_eq!(read("plain"), Ok(vec![text("plain")]));
        assert_eq!(
            read("a {client}{key}-{{x}}"),
            Ok(vec![
                text("a "),
                Piece::Value(Value::Client),
                Piece::Value(Value::Key),
                text("-{x}")
            ])
        );
        assert_eq!(read("{clinet}"), Err(RuleError::Value("clinet".to_owned())));
        for bad in ["{", "}", "a{client", "a}b", "line\nbreak", "caf\u{e9}"] {
            assert_eq!(read(bad), Err(RuleError::Template(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn what_frames_a_message_cannot_be_changed() {
        assert!("x-owner".parse::<FieldName>().is_ok());
        assert!("a b".parse::<FieldName>().is_err());
        for fixed in ["Content-Length", "transfer-encoding", "via", "mandoline-hops", "host"] {
            assert!(matches!(fixed.parse::<FieldName>(), Err(RuleError::Fixed(_))), "{fixed}");
        }
    }
}

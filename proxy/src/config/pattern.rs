//! Patterns of hosts and paths, and how the host and the path of a request are read to be held against them. Pure.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

/// `shop.example.com`, or `*.example.com` for every name below.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// This host. In lower case.
    Exact(Box<str>),
    /// Every host whose name ends with this, which begins with a dot. In lower case.
    Below(Box<str>),
}

/// `/carts` for this path alone, `/carts/*` for it and everything below.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathPattern {
    /// This path.
    Exact(Box<str>),
    /// This path, without a slash at its end, and everything below.
    Below(Box<str>),
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// No host.
    #[error(
        "{0:?} is no host: give a name such as shop.example.com, or *.example.com for all below it, without a port"
    )]
    Host(String),
    /// No path.
    #[error(
        "{0:?} is no path: begin it with /, and end it with /* to take everything below; it has no . or .. between slashes, no query and no other *"
    )]
    Path(String),
}

impl FromStr for HostPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let lower = text.to_ascii_lowercase();
        let (name, below) = match lower.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (lower.as_str(), false),
        };
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let is_address = name.starts_with('[') && name.ends_with(']');
        let good = !name.is_empty()
            && name.len() <= HOST_MAX_BYTES
            && (is_address || name.bytes().all(allowed))
            && !name.starts_with('.')
            && !name.ends_with('.');
        match (good, below) {
            (false, _) => Err(PatternError::Host(text.chars().take(HOST_MAX_BYTES).collect())),
            (true, false) => Ok(Self::Exact(name.into())),
            (true, true) => Ok(Self::Below(lower[1..].into())),
        }
    }
}

impl FromStr for PathPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let (path, below) = match text.strip_suffix("/*") {
            Some(path) => (path, true),
            None => (text, false),
        };
        let good = (path.starts_with('/') || (below && path.is_empty()))
            && !path.contains(['*', '?', '#', '%'])
            && path.bytes().all(|b| b.is_ascii_graphic())
            && plain(path).is_some();
        match (good, below) {
            (false, _) => Err(PatternError::Path(text.chars().take(HOST_MAX_BYTES).collect())),
            (true, false) => Ok(Self::Exact(path.into())),
            (true, true) => Ok(Self::Below(path.into())),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(host) => f.write_str(host),
            Self::Below(host) => write!(f, "*{host}"),
        }
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Below(path) => write!(f, "{path}/*"),
        }
    }
}

impl HostPattern {
    pub(super) fn takes(&self, host: &str) -> bool {
        match self {
            Self::Exact(own) => host.eq_ignore_ascii_case(own),
            Self::Below(end) => host
                .len()
                .checked_sub(end.len())
                .filter(|at| *at > 0)
                .and_then(|at| host.get(at..))
                .is_some_and(|found| found.eq_ignore_ascii_case(end)),
        }
    }
}

impl PathPattern {
    pub(super) fn takes(&self, path: &[u8]) -> bool {
        match self {
            Self::Exact(own) => path == own.as_bytes(),
            Self::Below(own) => path
                .strip_prefix(own.as_bytes())
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'/'),
        }
    }
}

/// Gives a host without its port, and without the dot that ends a full name.
pub(crate) fn without_port(host: &str) -> &str {
    let host = match host.rfind(']') {
        Some(end) => &host[..=end],
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    host.strip_suffix('.').unwrap_or(host)
}

/// Gives a path with what was encoded for no reason decoded; nothing if it has `.` or `..` between slashes. An encoded slash is
/// part of a name and stays as it is.
pub(crate) fn plain(path: &str) -> Option<Cow<'_, [u8]>> {
    let bytes = path.as_bytes();
    let decoded: Cow<'_, [u8]> = if bytes.contains(&b'%') {
        let mut all = Vec::with_capacity(bytes.len());
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
            match (byte, digit(at + 1).zip(digit(at + 2))) {
                (b'%', Some((high, low))) if (high, low) != (2, 15) => {
                    all.push((high * 16 + low) as u8);
                    at += 3;
                }
                _ => {
                    all.push(*byte);
                    at += 1;
                }
            }
        }
        all.into()
    } else {
        bytes.into()
    };
    let dotted = decoded.split(|b| *b == b'/').any(|name| matches!(name, b"." | b".."));
    (!dotted).then_some(decoded)
}

/// The longest host: a DNS name.
const HOST_MAX_BYTES: usize = 253;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_read_strictly() {
        for good in ["a.org", "*.a.org", "localhost", "[::1]", "10.0.0.1"] {
            assert_eq!(good.parse::<HostPattern>().unwrap().to_string(), good);
        }
        for bad in ["", "*", "*.", "a.*.org", "a.org:80", "a org", ".a.org", "a.org.", "a/b"] {
            assert!(bad.parse::<HostPattern>().is_err(), "{bad}");
        }
        for good in ["/", "/*", "/a", "/a/*", "/a/b.c/..."] {
            assert_eq!(good.parse::<PathPattern>().unwrap().to_string(), good);
        }
        for bad in ["", "*", "a", "/a*", "/*/a", "/a?b", "/a b", "/a/../b", "/%61", "//../"] {
            assert!(bad.parse::<PathPattern>().is_err(), "{bad}");
        }
    }
}

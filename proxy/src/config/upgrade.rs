//! The protocols that a client and a task may switch to on a connection.

use std::fmt;
use std::str::FromStr;

use http::header::HeaderValue;

/// A protocol that a connection may switch to, as `Upgrade` names it: `websocket`. Its case does not count.
#[derive(Clone, Debug)]
pub struct Upgrade(HeaderValue);

/// A text was no protocol that may be switched to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// No name at all.
    #[error("{0:?} is no protocol: give a name as Upgrade has it, such as websocket")]
    Name(String),
    /// More requests would come that nobody looks at.
    #[error("{0} cannot be switched to: requests in it would go past the proxy unseen")]
    Unseen(String),
}

/// Those in which more requests come, or that hide them: h2c upgrades are a known way past a proxy.
const UNSEEN: [&str; 6] = ["h2", "h2c", "h3", "http", "tls", "connect-udp"];

impl Upgrade {
    /// WebSocket (RFC 6455).
    pub const WEBSOCKET: Self = Self(HeaderValue::from_static("websocket"));

    /// Gives it as a header has it.
    pub const fn value(&self) -> &HeaderValue {
        &self.0
    }

    /// Says whether a protocol that is named in a header is this one.
    pub fn is(&self, name: &[u8]) -> bool {
        self.0.as_bytes().eq_ignore_ascii_case(name)
    }
}

impl PartialEq for Upgrade {
    fn eq(&self, other: &Self) -> bool {
        self.is(other.0.as_bytes())
    }
}

impl Eq for Upgrade {}

impl FromStr for Upgrade {
    type Err = UpgradeError;

    fn from_str(text: &str) -> Result<Self, UpgradeError> {
        let shown = || text.chars().take(NAME_MAX_BYTES).collect::<String>();
        let (name, version) = text.split_once('/').unwrap_or((text, "1"));
        if text.len() > NAME_MAX_BYTES || !is_token(name) || !is_token(version) {
            return Err(UpgradeError::Name(shown()));
        }
        if UNSEEN.iter().any(|unseen| unseen.eq_ignore_ascii_case(name)) {
            return Err(UpgradeError::Unseen(shown()));
        }
        Ok(Self(HeaderValue::from_str(text).expect("a token fits a header")))
    }
}

/// Longer than any that is registered.
const NAME_MAX_BYTES: usize = 64;

fn is_token(text: &str) -> bool {
    let is_one = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.bytes().all(is_one)
}

impl fmt::Display for Upgrade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0.to_str().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_a_name_and_perhaps_a_version() {
        for good in ["websocket", "x-tunnel", "spdy/3.1"] {
            assert_eq!(good.parse::<Upgrade>().unwrap().to_string(), good);
        }
        assert!(Upgrade::WEBSOCKET.is(b"WebSocket") && !Upgrade::WEBSOCKET.is(b"websocket/13"));
        for bad in ["", "web socket", "a, b", "a/", "/1", "a/b/c", &"x".repeat(65)] {
            assert!(matches!(bad.parse::<Upgrade>(), Err(UpgradeError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn what_hides_requests_cannot_be_switched_to() {
        for bad in ["h2c", "H2C", "h2", "HTTP/2.0", "TLS/1.2"] {
            assert_eq!(bad.parse::<Upgrade>(), Err(UpgradeError::Unseen(bad.to_owned())), "{bad}");
        }
    }
}

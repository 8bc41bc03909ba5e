//! How tasks and servers are spoken to: where, in which version of HTTP, and whether by TLS.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use mandoline_core::task::{Address, AddressError};

use crate::config::tls::Tls;

/// How the tasks of a job, or the servers of a pool, are spoken to.
#[derive(Clone, Debug, Default)]
pub struct Transport {
    /// In which version of HTTP.
    pub protocol: Protocol,
    /// By TLS, if this is set.
    pub tls: Option<Arc<Tls>>,
}

impl Transport {
    /// Says whether connections that were opened by the one suit the other.
    pub fn is(&self, other: &Self) -> bool {
        let same_tls = match (&self.tls, &other.tls) {
            (None, None) => true,
            (Some(one), Some(other)) => one.is(other),
            _ => false,
        };
        same_tls && self.protocol == other.protocol
    }
}

/// Which version of HTTP is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 for gRPC, which knows nothing else. HTTP/1.1 for the rest, or by TLS what the other side chooses (ALPN).
    #[default]
    Auto,
    /// HTTP/1.1 for everything.
    Http1,
    /// HTTP/2 for everything: by TLS where the other side agrees, in clear text without asking ("prior knowledge").
    Http2,
}

/// Protocols have no other name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no protocol: give auto, http1 or http2")]
pub struct ProtocolError(String);

impl FromStr for Protocol {
    type Err = ProtocolError;

    fn from_str(text: &str) -> Result<Self, ProtocolError> {
        match text {
            "auto" => Ok(Self::Auto),
            "http1" => Ok(Self::Http1),
            "http2" => Ok(Self::Http2),
            other => Err(ProtocolError(other.chars().take(64).collect())),
        }
    }
}

/// Where a task, a gateway or a server listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `host:port`.
    Tcp(Address),
    /// `unix:/path`: a socket of this machine.
    Unix(Arc<Path>),
}

/// Why a text is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It begins with `unix:`, and no good path follows.
    #[error(
        "{0:?} is no path of a socket: give unix: and an absolute path of at most {UNIX_MAX_BYTES} bytes"
    )]
    Unix(String),
    /// It is no address.
    #[error(transparent)]
    Address(#[from] AddressError),
}

/// The longest path of a socket (`sun_path` of Linux, less the zero at its end).
pub const UNIX_MAX_BYTES: usize = 107;

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let Some(path) = text.strip_prefix("unix:") else { return Ok(Self::Tcp(text.parse()?)) };
        let is_good = path.starts_with('/')
            && path.len() <= UNIX_MAX_BYTES
            && path.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
        if is_good {
            Ok(Self::Unix(Path::new(path).into()))
        } else {
            Err(EndpointError::Unix(path.chars().take(300).collect()))
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<Address> for Endpoint {
    fn from(address: Address) -> Self {
        Self::Tcp(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_an_address_or_a_path() {
        for good in ["10.0.0.7:9000", "[::1]:80", "db.example:80", "unix:/run/app.sock"] {
            assert_eq!(good.parse::<Endpoint>().unwrap().to_string(), good);
        }
        let long = format!("unix:/{}", "x".repeat(UNIX_MAX_BYTES));
        for bad in ["", "10.0.0.7", "unix:", "unix:app.sock", "unix:/a b", "unix:/a\n", &long] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_protocol_has_one_name() {
        assert_eq!("http2".parse(), Ok(Protocol::Http2));
        assert!("h2".parse::<Protocol>().is_err() && "HTTP1".parse::<Protocol>().is_err());
    }
}

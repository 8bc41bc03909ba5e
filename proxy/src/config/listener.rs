//! Where clients come in, and what is spoken there.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::config::error::ConfigError;
use crate::config::limits::check_range;
use crate::config::network::Network;

/// Where clients come in, and what is spoken there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where.
    pub address: Address,
    /// How the connection is encrypted, if it is.
    pub tls: Option<Tls>,
    /// Those who say in a PROXY header whom they speak for, as balancers do, and must. From others such a header is a bad request.
    /// On a Unix socket, where there are no addresses, any network means everyone.
    pub proxy_protocol: Vec<Network>,
    /// HTTP/2, beside HTTP/1.1 on the same port: chosen by ALPN within TLS, and by the first bytes without. None speaks HTTP/1.1 alone.
    pub http2: Option<Http2>,
    /// How many TLS handshakes may be under way at a time; whoever comes on top is closed at once rather than answered too late.
    pub handshakes: usize,
}

/// Each has some 30 KB and a few hundred microseconds of work to come, so that this is a second of one core.
const HANDSHAKES: usize = 2048;

impl Listener {
    /// Listens in the clear, for HTTP/1.1 and HTTP/2.
    pub fn new(address: Address) -> Self {
        Self {
            address,
            tls: None,
            proxy_protocol: Vec::new(),
            http2: Some(Http2::default()),
            handshakes: HANDSHAKES,
        }
    }

    /// Refuses one that nobody could listen by.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.tls.as_ref().is_some_and(|tls| tls.certificates.is_empty()) {
            return Err(ConfigError::NoCertificate(self.address.to_string()));
        }
        let Some(Http2 { streams, stream_window, connection_window }) = self.http2 else {
            return Ok(());
        };
        let limits = [
            ("http2 streams", streams, 1, 10_000),
            // The least that a client may count on before it knows better (RFC 9113, 6.9.2); and the most that there is.
            ("http2 stream_window", stream_window, 0xffff, 0x7fff_ffff),
            ("http2 connection_window", connection_window, 0xffff, 0x7fff_ffff),
        ];
        for (name, value, least, most) in limits {
            check_range(name, value as usize, least, most)?;
        }
        Ok(())
    }
}

impl From<SocketAddr> for Listener {
    fn from(address: SocketAddr) -> Self {
        Self::new(Address::Tcp(address))
    }
}

/// Where clients connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An address and a port. Port 0 takes any free port.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix {
        /// Where. A file there is replaced if it is a socket that nobody listens on.
        path: PathBuf,
        /// Who may connect: the file's permissions.
        mode: u32,
    },
}

/// Who may connect to a Unix socket unless it is said: its user and group.
pub const UNIX_MODE: u32 = 0o660;

/// A text says no place to listen at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no place to listen at: give an address and a port, such as 0.0.0.0:8080, or unix: and the whole path of a socket"
)]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = || AddressError(text.chars().take(200).collect());
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') && path.len() < UNIX_PATH_MAX => {
                Ok(Self::Unix { path: path.into(), mode: UNIX_MODE })
            }
            Some(_) => Err(refuse()),
            None => text.parse().map(Self::Tcp).map_err(|_| refuse()),
        }
    }
}

/// What the kernel has room for, with the zero behind it.
const UNIX_PATH_MAX: usize = 108;

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How a connection is encrypted: TLS 1.2 or 1.3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// At least one. A client gets the first that has the name it asks for, or the first of all.
    pub certificates: Vec<CertificateFiles>,
    /// Whether clients show certificates.
    pub clients: ClientCertificates,
}

/// A certificate and its key, in files that are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate and those that lead from it to an authority, in PEM.
    pub chain: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

/// Whether clients show certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// They are not asked for any.
    Off,
    /// They may; one that cannot be verified ends the connection.
    Optional {
        /// The authorities that vouch for them, in PEM.
        authorities: PathBuf,
    },
    /// They must.
    Required {
        /// The authorities that vouch for them, in PEM.
        authorities: PathBuf,
    },
}

impl ClientCertificates {
    /// Gives the file of authorities, if there is one.
    pub const fn authorities(&self) -> Option<&PathBuf> {
        match self {
            Self::Off => None,
            Self::Optional { authorities } | Self::Required { authorities } => Some(authorities),
        }
    }
}

/// How much a connection of HTTP/2 may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2 {
    /// Requests at a time on one connection.
    pub streams: u32,
    /// What a request's body may have on its way before it is read, in bytes.
    pub stream_window: u32,
    /// The same over all requests of a connection.
    pub connection_window: u32,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            // What RFC 9113 calls the least that makes sense is 100; browsers and gRPC open another connection beyond it.
            streams: 128,
            // 10 MB/s to a client 25 ms away; and a connection whose bodies nobody reads keeps no more than a mebibyte.
            stream_window: 256 << 10,
            connection_window: 1 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_port_or_a_file() {
        for good in ["0.0.0.0:8080", "[::1]:0", "unix:/run/proxy.sock"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        let long = format!("unix:/{}", "x".repeat(108));
        for bad in ["", "8080", "localhost:80", "unix:", "unix:proxy.sock", &long] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}

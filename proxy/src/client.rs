//! Who asks, and for which host: the other end of a client's connection, and the name that a request came for.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};

use http::header::HeaderValue;

use crate::tls::terminator::Identity;

/// The other end of a client's connection.
pub(crate) struct Client {
    // `for=...;proto=...`, the same for every request.
    prefix: String,
    address: IpAddr,
    // Who it is, if it showed a certificate.
    identity: Option<Identity>,
}

/// How a client's connection is protected.
#[derive(Clone, Copy)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

impl Client {
    /// One on a Unix socket has no address. For whoever needs one it is this machine's.
    pub(crate) fn new(address: Option<IpAddr>, scheme: Scheme, identity: Option<Identity>) -> Self {
        let proto = scheme.as_str();
        let prefix = match address.map(|address| address.to_canonical()) {
            Some(IpAddr::V4(v4)) => format!("for={v4};proto={proto}"),
            Some(IpAddr::V6(v6)) => format!("for=\"[{v6}]\";proto={proto}"),
            None => format!("for=unknown;proto={proto}"),
        };
        let address = address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Self { prefix, address, identity }
    }

    /// Says who it is, if it showed a certificate that was verified.
    pub(crate) const fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    pub(crate) const fn address(&self) -> IpAddr {
        self.address
    }

    pub(crate) fn forwarded(&self, host: &Host) -> HeaderValue {
        let prefix = &self.prefix;
        let text = match host.as_str() {
            None => Cow::Borrowed(prefix),
            // A port or an IPv6 address is no token, so it is quoted. No host holds a quote: see `is_host`.
            Some(host) if host.contains([':', '[']) => {
                Cow::Owned(format!("{prefix};host=\"{host}\""))
            }
            Some(host) => Cow::Owned(format!("{prefix};host={host}")),
        };
        HeaderValue::try_from(text.into_owned()).expect("addresses and checked hosts fit a header")
    }
}

/// The host that a request is for: from an absolute target, or else from `Host`.
pub(crate) struct Host(pub(crate) HeaderValue);

impl Host {
    /// None, as far as is known yet.
    pub(crate) const fn unknown() -> Self {
        Self(HeaderValue::from_static(""))
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        self.0.to_str().ok().filter(|host| !host.is_empty())
    }
}

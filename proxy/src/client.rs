//! Who asks, and for which host: the other end of a client's connection, and the name that a request came for.

use std::borrow::Cow;
use std::net::IpAddr;

use http::header::HeaderValue;

/// The other end of a client's connection.
pub(crate) struct Client {
    // `for=...;proto=http`, the same for every request.
    prefix: String,
    address: IpAddr,
}

impl Client {
    pub(crate) fn new(address: IpAddr) -> Self {
        let prefix = match address.to_canonical() {
            IpAddr::V4(v4) => format!("for={v4};proto=http"),
            IpAddr::V6(v6) => format!("for=\"[{v6}]\";proto=http"),
        };
        Self { prefix, address }
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

//! Who asks, and for which host: the other end of a client's connection or whom it speaks for, and the name that a request came for.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use http::header::HeaderValue;

use crate::tls::terminator::Identity;

/// The other end of a client's connection, or whom it speaks for.
pub(crate) struct Client {
    // `for=...;proto=...` of each that the request has come by, the same for every request that comes so.
    prefix: String,
    // What the same is in other words.
    x_for: HeaderValue,
    x_proto: HeaderValue,
    // Where another host was asked for than the one that the request has come for here.
    x_host: Option<HeaderValue>,
    address: IpAddr,
    // Who the other end is, if it showed a certificate.
    identity: Option<Rc<Identity>>,
}

/// What a trusted proxy says of where a request comes from.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// The client, and the proxies that the request came by before it came to this one.
    pub(crate) hops: Vec<IpAddr>,
    pub(crate) proto: Option<HeaderValue>,
    pub(crate) host: Option<HeaderValue>,
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
        let prefix = match address {
            Some(address) => format!("{};proto={proto}", node(address)),
            None => format!("for=unknown;proto={proto}"),
        };
        let address = address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Self {
            prefix,
            x_for: visible(address.to_canonical().to_string()),
            x_proto: HeaderValue::from_static(proto),
            x_host: None,
            address,
            identity: identity.map(Rc::new),
        }
    }

    /// Makes the one that this one, a proxy, speaks for.
    pub(crate) fn speaks_for(&self, told: &Told) -> Self {
        let Told { hops, proto, host } = told;
        let (mut prefix, mut x_for) = (String::new(), String::new());
        for (place, hop) in hops.iter().enumerate() {
            prefix.push_str(&node(*hop));
            if place == 0 {
                let proto = proto.as_ref().and_then(|proto| proto.to_str().ok());
                let host = host.as_ref().and_then(|host| host.to_str().ok());
                proto.into_iter().for_each(|proto| prefix.extend([";proto=", proto]));
                host.into_iter().for_each(|host| prefix.extend([";host=", &*quoted(host)]));
            }
            prefix.push_str(", ");
            write!(x_for, "{hop}, ").expect("a string takes it");
        }
        prefix.push_str(&self.prefix);
        x_for.push_str(self.x_for.to_str().unwrap_or_default());
        Self {
            prefix,
            x_for: visible(x_for),
            x_proto: proto.as_ref().unwrap_or(&self.x_proto).clone(),
            x_host: host.clone(),
            address: hops.first().copied().unwrap_or(self.address),
            identity: self.identity.clone(),
        }
    }

    /// Says who the other end is, if it showed a certificate that was verified.
    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.identity.as_deref()
    }

    pub(crate) const fn address(&self) -> IpAddr {
        self.address
    }

    /// Gives what `Forwarded` says.
    pub(crate) fn forwarded(&self, host: &Host) -> HeaderValue {
        let prefix = &self.prefix;
        visible(match host.as_str() {
            None => prefix.clone(),
            Some(host) => format!("{prefix};host={}", quoted(host)),
        })
    }

    /// Gives what `X-Forwarded-For`, `-Proto` and `-Host` say.
    pub(crate) fn x_forwarded(&self, host: &Host) -> [HeaderValue; 3] {
        let host = self.x_host.as_ref().unwrap_or(&host.0);
        [&self.x_for, &self.x_proto, host].map(HeaderValue::clone)
    }
}

/// Names an address as `Forwarded` does.
fn node(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(v4) => format!("for={v4}"),
        IpAddr::V6(v6) => format!("for=\"[{v6}]\""),
    }
}

/// A port or an IPv6 address is no token, so it is quoted. No host holds a quote: see `is_host`.
fn quoted(host: &str) -> Cow<'_, str> {
    if host.contains([':', '[']) { format!("\"{host}\"").into() } else { host.into() }
}

fn visible(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("addresses and checked hosts fit a header")
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

/// Says whether this is a name or an address, and perhaps a port. Nothing at all is no host either, but says so.
pub(crate) fn is_host(text: &[u8]) -> bool {
    let (is_named, port) = match text.strip_prefix(b"[") {
        Some(rest) => {
            let Some(end) = rest.iter().position(|byte| *byte == b']') else { return false };
            let address = std::str::from_utf8(&rest[..end]).ok();
            let address = address.and_then(|address| address.parse::<Ipv6Addr>().ok());
            (address.is_some(), &rest[end + 1..])
        }
        None => {
            let end = text.iter().position(|byte| *byte == b':').unwrap_or(text.len());
            (end > 0 && text[..end].iter().all(|byte| is_name_byte(*byte)), &text[end..])
        }
    };
    text.is_empty() || (is_named && is_port(port))
}

/// Says whether this is nothing, or a colon and a port.
fn is_port(text: &[u8]) -> bool {
    let Some(digits) = text.strip_prefix(b":") else { return text.is_empty() };
    let port = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<u16>().ok());
    port.is_some() && digits[0].is_ascii_digit()
}

const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

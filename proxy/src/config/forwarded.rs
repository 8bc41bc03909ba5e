//! Whose word is taken for where a request comes from, and how tasks are told.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use http::header::{self, HeaderName};

use crate::config::network::Network;

/// Whose word is taken for where a request comes from, and how tasks are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// The networks of proxies in front of this one. What anyone else says of where a request comes from is taken away.
    pub trusted: Vec<Network>,
    /// What those proxies set themselves, whatever a client has sent. The rest they pass on as it came, so it is taken away, too.
    pub headers: Vec<Witness>,
    /// Whether tasks are told by `X-Forwarded-For`, `-Proto` and `-Host`, beside `Forwarded`.
    pub x_forwarded: bool,
}

impl Forwarded {
    /// Says whether an address is a proxy's in front of this one.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(address))
    }

    /// Says whether trusted proxies are believed what they say in this header.
    pub fn believes(&self, name: &HeaderName) -> bool {
        self.headers.iter().any(|witness| witness.0 == *name)
    }
}

impl Default for Forwarded {
    fn default() -> Self {
        // What nearly all set. Many pass X-Forwarded-Host on, by which strangers could choose the links that applications make.
        let headers = vec![Witness(X_FORWARDED_FOR), Witness(X_FORWARDED_PROTO)];
        Self { trusted: Vec::new(), headers, x_forwarded: true }
    }
}

/// Who asked, and the proxies in between.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// How the client's own connection is protected.
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// The host that the client asked for.
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// A header that tells where a request comes from: `Forwarded`, `X-Real-IP` and all that begin with `X-Forwarded-`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness(HeaderName);

/// A header that tells something else, or none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no header that tells where a request comes from: give such as x-forwarded-for, x-forwarded-proto or forwarded"
)]
pub struct WitnessError(String);

impl Witness {
    /// Says whether a header is one. Behind a gateway interface, where `-` becomes `_`, some that look alike are.
    pub fn is(name: &HeaderName) -> bool {
        let name = name.as_str().as_bytes();
        let begins = |start: &[u8]| {
            let same = |(a, b): (&u8, &u8)| a == b || (*a == b'_' && *b == b'-');
            name.len() >= start.len() && name.iter().zip(start).all(same)
        };
        match name {
            [b'f', ..] => name == header::FORWARDED.as_str().as_bytes(),
            [b'x', b'-' | b'_', ..] => {
                begins(b"x-forwarded-") || (begins(REAL_IP) && name.len() == REAL_IP.len())
            }
            _ => false,
        }
    }
}

const REAL_IP: &[u8] = b"x-real-ip";

impl FromStr for Witness {
    type Err = WitnessError;

    fn from_str(text: &str) -> Result<Self, WitnessError> {
        let refuse = || WitnessError(text.chars().take(64).collect());
        let name = HeaderName::try_from(text).map_err(|_| refuse())?;
        if Self::is(&name) && !text.contains('_') { Ok(Self(name)) } else { Err(refuse()) }
    }
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_headers_tell_where_a_request_comes_from() {
        for good in ["forwarded", "X-Forwarded-For", "x-forwarded-prefix", "x-real-ip"] {
            assert_eq!(good.parse::<Witness>().unwrap().to_string(), good.to_lowercase());
        }
        for bad in ["", "from", "x-forwarded", "x-real-ip2", "x_forwarded_for", "x-forwarded-for,"]
        {
            assert!(bad.parse::<Witness>().is_err(), "{bad}");
        }
        for alike in ["x_forwarded_for", "x-forwarded_host", "x_real_ip"] {
            assert!(Witness::is(&HeaderName::from_static(alike)), "{alike}");
        }
        assert!(!Witness::is(&HeaderName::from_static("x-forwardedfor")));
    }
}

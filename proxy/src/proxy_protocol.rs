//! The PROXY header, with which a balancer in front says whom a connection is for: version 1, a line, and version 2, bytes.
//!
//! By the specification (haproxy.org/download/2.8/doc/proxy-protocol.txt) only what comes from a trusted sender may be read so, and
//! from such a one it must come: who is trusted is the caller's to know. A connection of the sender's own (LOCAL), one that it knows
//! nothing of (UNKNOWN, UNSPEC) and one of a kind that is none of ours (UDP, Unix) keep the address that they have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What both versions say: whom the connection is for, if somebody else than who opened it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// How many bytes it has.
    pub(crate) length: usize,
    pub(crate) source: Option<IpAddr>,
}

/// Why bytes are no PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    /// The connection began with something else.
    #[error("a trusted sender must begin with a PROXY header, and this one did not")]
    Missing,
    /// It goes on for longer than any that makes sense.
    #[error("the PROXY header is longer than {LENGTH_MAX} bytes")]
    TooLong,
    /// It says what cannot be.
    #[error("the PROXY header is malformed: {0}")]
    Malformed(&'static str),
}

/// The longest that is read. Balancers add a few hundred bytes to the 232 that addresses may have.
pub(crate) const LENGTH_MAX: usize = 4096;
/// By the specification, with the line's end.
const LINE_MAX: usize = 107;
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const LINE: &[u8; 6] = b"PROXY ";

/// Reads a header from the beginning of what came; nothing if more has to come.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let begins = |with: &[u8]| {
        let common = bytes.len().min(with.len());
        bytes[..common] == with[..common]
    };
    if begins(SIGNATURE) {
        parse_bytes(bytes)
    } else if begins(LINE) {
        parse_line(bytes)
    } else {
        Err(HeaderError::Missing)
    }
}

fn parse_line(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let seen = &bytes[..bytes.len().min(LINE_MAX)];
    let Some(end) = seen.windows(2).position(|window| window == b"\r\n") else {
        let malformed = HeaderError::Malformed("its line does not end within 107 bytes");
        return if bytes.len() < LINE_MAX { Ok(None) } else { Err(malformed) };
    };
    let malformed = HeaderError::Malformed("its line has other fields than it should");
    let line = std::str::from_utf8(&bytes[..end]).map_err(|_| malformed)?;
    let fields: Vec<&str> = line.split(' ').collect();
    let source = match fields[..] {
        // What follows says nothing, by the specification.
        [_, "UNKNOWN", ..] => None,
        [_, family @ ("TCP4" | "TCP6"), source, target, from, to] => {
            let ports = [from, to].map(port);
            let addresses = [source, target].map(|text| address(family, text));
            let ([Some(source), Some(_)], [Some(_), Some(_)]) = (addresses, ports) else {
                return Err(malformed);
            };
            Some(source)
        }
        _ => return Err(malformed),
    };
    Ok(Some(Header { length: end + 2, source }))
}

fn address(family: &str, text: &str) -> Option<IpAddr> {
    match family {
        "TCP4" => text.parse().ok().map(IpAddr::V4),
        _ => text.parse().ok().map(IpAddr::V6),
    }
}

/// A number without a sign or zeros in front.
fn port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| plain)
}

fn parse_bytes(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let Some(&[command, family, high, low]) = bytes.get(12..16) else { return Ok(None) };
    let rest = usize::from(u16::from_be_bytes([high, low]));
    let length = 16 + rest;
    if length > LENGTH_MAX {
        return Err(HeaderError::TooLong);
    }
    let is_local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(HeaderError::Malformed("its version or command is not known")),
    };
    if family >> 4 > 3 || family & 0xf > 2 {
        return Err(HeaderError::Malformed("its family or transport is not known"));
    }
    let Some(body) = bytes.get(16..length) else { return Ok(None) };
    let short = HeaderError::Malformed("it is shorter than its addresses");
    let source = match family {
        _ if is_local => None,
        0x11 if rest < 12 => return Err(short),
        0x21 if rest < 36 => return Err(short),
        0x11 => body.first_chunk::<4>().map(|octets| IpAddr::V4(Ipv4Addr::from(*octets))),
        0x21 => body.first_chunk::<16>().map(|octets| IpAddr::V6(Ipv6Addr::from(*octets))),
        _ => None,
    };
    Ok(Some(Header { length, source }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], wanted: Result<Option<&str>, HeaderError>) {
        for cut in 0..bytes.len() {
            assert!(wanted.is_err() || parse(&bytes[..cut]) == Ok(None), "cut short at {cut}");
        }
        let mut more = bytes.to_vec();
        more.extend_from_slice(b"GET / HTTP/1.1\r\n");
        let parsed = parse(&more);
        let wanted = wanted.map(|source| {
            let source = source.map(|text| text.parse().unwrap());
            Some(Header { length: bytes.len(), source })
        });
        assert_eq!(parsed, wanted, "{:?}", String::from_utf8_lossy(bytes));
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [SIGNATURE.as_slice(), &[command, family], &length, body].concat()
    }

    #[test]
    fn lines_say_whom_they_are_for() {
        check(b"PROXY TCP4 192.0.2.1 198.51.100.1 5000 443\r\n", Ok(Some("192.0.2.1")));
        check(b"PROXY TCP6 2001:db8::1 ::1 5000 443\r\n", Ok(Some("2001:db8::1")));
        check(b"PROXY UNKNOWN\r\n", Ok(None));
        check(b"PROXY UNKNOWN a b c d e\r\n", Ok(None));
    }

    #[test]
    fn lines_that_say_something_else_are_refused() {
        let malformed = HeaderError::Malformed("its line has other fields than it should");
        for bad in [
            "PROXY TCP4 192.0.2.1 198.51.100.1 5000\r\n",
            "PROXY TCP4 2001:db8::1 ::1 5000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 5000 65536\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 +5000 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 05000 443\r\n",
            "PROXY TCP4  192.0.2.1 198.51.100.1 5000 443\r\n",
            "PROXY TCP5 192.0.2.1 198.51.100.1 5000 443\r\n",
            "PROXY \r\n",
        ] {
            check(bad.as_bytes(), Err(malformed));
        }
        let endless = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat();
        assert!(matches!(parse(&endless), Err(HeaderError::Malformed(_))));
        for other in ["GET / HTTP/1.1\r\n", "PROXy TCP4", "\r\n\r\n\0\r\nQUIX\n", "x"] {
            assert_eq!(parse(other.as_bytes()), Err(HeaderError::Missing));
        }
    }

    #[test]
    fn bytes_say_whom_they_are_for() {
        let four = [192, 0, 2, 1, 198, 51, 100, 1, 0, 80, 1, 187];
        let six = [[0x20, 1, 0xd, 0xb8].as_slice(), &[0; 11], &[7], &[0; 20]].concat();
        check(&v2(0x21, 0x11, &four), Ok(Some("192.0.2.1")));
        check(&v2(0x21, 0x21, &six), Ok(Some("2001:db8::7")));
        // What comes behind the addresses is passed over.
        check(&v2(0x21, 0x11, &[four.as_slice(), &[4, 0, 1, 0]].concat()), Ok(Some("192.0.2.1")));
        check(&v2(0x20, 0x11, &four), Ok(None));
        check(&v2(0x20, 0x00, &[]), Ok(None));
        check(&v2(0x21, 0x00, b"whatever"), Ok(None));
        check(&v2(0x21, 0x12, &four), Ok(None));
        check(&v2(0x21, 0x31, &[0; 216]), Ok(None));
    }

    #[test]
    fn bytes_that_say_something_else_are_refused() {
        let malformed = |bytes: &[u8]| matches!(parse(bytes), Err(HeaderError::Malformed(_)));
        assert!(malformed(&v2(0x11, 0x11, &[0; 12])));
        assert!(malformed(&v2(0x22, 0x11, &[0; 12])));
        assert!(malformed(&v2(0x21, 0x41, &[0; 12])));
        assert!(malformed(&v2(0x21, 0x13, &[0; 12])));
        assert!(malformed(&v2(0x21, 0x11, &[0; 11])));
        assert!(malformed(&v2(0x21, 0x21, &[0; 35])));
        assert_eq!(parse(&v2(0x21, 0x11, &[0; 5000])), Err(HeaderError::TooLong));
    }
}

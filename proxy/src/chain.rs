//! Where a request comes from, by the word of the proxies in front of this one: from right to left, since each adds whom it was sent the
//! request by, up to the first that is not trusted. That one is the client; what stands left of it only the client says.
//!
//! Tasks are told anew, from the addresses that were found: whatever else stood in the chain ends here.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::client::{Client, Told, is_host};
use crate::config::forwarded::{
    Forwarded, Witness, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO,
};
use crate::metrics::counters::Counters;
use crate::metrics::names::Count;

/// Proxies in a row that are followed: more than any service has.
const HOPS_MAX: usize = 16;

/// Finds out who asks: whoever is at the other end of the connection, or whom it speaks for if it is trusted.
pub(crate) fn asker(
    connected: Rc<Client>,
    headers: &HeaderMap,
    by: &Forwarded,
    counters: &Counters,
) -> Rc<Client> {
    if !by.trusts(connected.address()) {
        return connected;
    }
    let (told, is_sound) = told(headers, by);
    if !is_sound {
        counters.count(Count::BadChains);
    }
    Rc::new(connected.speaks_for(&told))
}

/// Takes away what a request says of where it comes from: it has been heard, or is nobody's word. What trusted proxies say besides
/// stays.
pub(crate) fn strip(headers: &mut HeaderMap, connected: IpAddr, by: &Forwarded) {
    let is_heard = |name: &HeaderName| {
        [header::FORWARDED, X_FORWARDED_FOR, X_FORWARDED_PROTO, X_FORWARDED_HOST].contains(name)
    };
    let goes = |name: &&HeaderName| {
        Witness::is(name) && (is_heard(name) || !by.believes(name) || !by.trusts(connected))
    };
    let all: Vec<HeaderName> = headers.keys().filter(goes).cloned().collect();
    for name in all {
        headers.remove(name);
    }
}

/// Reads what a trusted proxy says, and says whether all of it makes sense. Where a part does not, what was found before it holds.
pub(crate) fn told(headers: &HeaderMap, by: &Forwarded) -> (Told, bool) {
    let believed = |name: &HeaderName| by.believes(name);
    let (mut told, mut is_sound) = (Told::default(), true);
    if believed(&header::FORWARDED) {
        let lines = headers.get_all(header::FORWARDED).iter().rev();
        let elements = lines.flat_map(|line| split(line.as_bytes(), b',').into_iter().rev());
        let elements = elements.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty());
        let mut client: &[u8] = &[];
        let entries = elements.map(|element| {
            client = element;
            pair(element, "for").and_then(address)
        });
        is_sound &= follow(entries, by, &mut told.hops);
        // The last that was looked at is the client's, unless it made no sense.
        if is_sound {
            let (said_proto, said_host) = (pair(client, "proto"), pair(client, "host"));
            (told.proto, told.host) = (said_proto.and_then(proto), said_host.and_then(host));
            is_sound = said_proto.is_some() == told.proto.is_some()
                && said_host.is_some() == told.host.is_some();
        }
    } else if believed(&X_FORWARDED_FOR) {
        let lines = headers.get_all(X_FORWARDED_FOR).iter().rev();
        let entries = lines.flat_map(|line| line.as_bytes().rsplit(|b| *b == b','));
        let entries = entries.map(<[u8]>::trim_ascii).filter(|entry| !entry.is_empty());
        is_sound &= follow(entries.map(address), by, &mut told.hops);
    }
    for (name, read, to) in [
        (X_FORWARDED_PROTO, proto as fn(&[u8]) -> _, &mut told.proto),
        (X_FORWARDED_HOST, host, &mut told.host),
    ] {
        if believed(&name) && headers.contains_key(&name) {
            *to = single(headers, &name).and_then(read);
            is_sound &= to.is_some();
        }
    }
    (told, is_sound)
}

/// Follows a chain from its end to the client, and says whether it got there. `hops` has the client first.
fn follow(
    entries: impl Iterator<Item = Option<IpAddr>>,
    by: &Forwarded,
    hops: &mut Vec<IpAddr>,
) -> bool {
    let mut is_sound = true;
    for entry in entries {
        let Some(address) = entry.filter(|_| hops.len() < HOPS_MAX) else {
            is_sound = false;
            break;
        };
        hops.push(address);
        if !by.trusts(address) {
            break;
        }
    }
    hops.reverse();
    is_sound
}

/// Reads an address, perhaps with a port.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = match bare {
        Some(bare) => IpAddr::V6(bare.parse().ok()?),
        None => text.parse().or_else(|_| text.parse().map(|with: SocketAddr| with.ip())).ok()?,
    };
    Some(address.to_canonical())
}

fn proto(text: &[u8]) -> Option<HeaderValue> {
    let known = ["http", "https", "ws", "wss"];
    let it = known.into_iter().find(|known| known.as_bytes().eq_ignore_ascii_case(text))?;
    Some(HeaderValue::from_static(it))
}

fn host(text: &[u8]) -> Option<HeaderValue> {
    let is_one = !text.is_empty() && is_host(text);
    HeaderValue::from_bytes(text).ok().filter(|_| is_one)
}

/// Reads a field that stands once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut lines = headers.get_all(name).iter();
    let line = lines.next().filter(|_| lines.next().is_none())?;
    Some(line.as_bytes().trim_ascii())
}

/// Splits a text where no quotes are round it.
fn split(text: &[u8], at: u8) -> Vec<&[u8]> {
    let mut is_quoted = false;
    let parts = text.split(|byte| {
        is_quoted ^= *byte == b'"';
        *byte == at && !is_quoted
    });
    parts.collect()
}

/// Finds the value of a pair in an element of `Forwarded`, without its quotes. Nothing if it is there twice, for nobody knows which counts.
fn pair<'a>(element: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let pairs = split(element, b';').into_iter();
    let mut values = pairs.filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let is_it = pair[..at].trim_ascii().eq_ignore_ascii_case(name.as_bytes());
        is_it.then(|| pair[at + 1..].trim_ascii())
    });
    let value = values.next().filter(|_| values.next().is_none())?;
    value.strip_prefix(b"\"").map_or(Some(value), |rest| rest.strip_suffix(b"\""))
}

#[cfg(test)]
mod tests {
    use mandoline_core::prng::Prng;

    use super::*;
    use crate::client::{Host, Scheme};

    fn by(headers: &[&str]) -> Forwarded {
        let trusted = ["10.0.0.0/8", "fd00::/8"].map(|network| network.parse().unwrap());
        let headers = headers.iter().map(|name| name.parse().unwrap()).collect();
        Forwarded { trusted: trusted.into(), headers, ..Forwarded::default() }
    }

    fn hops(name: &'static str, lines: &[&str]) -> (Vec<String>, bool) {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(name, line.parse().unwrap());
        }
        let (told, is_sound) = told(&headers, &by(&[name]));
        (told.hops.iter().map(ToString::to_string).collect(), is_sound)
    }

    #[test]
    fn the_client_is_the_right_most_that_is_not_trusted() {
        for (lines, found) in [
            (&[][..], &[][..]),
            (&["192.0.2.1"], &["192.0.2.1"]),
            (&["6.6.6.6, 192.0.2.1"], &["192.0.2.1"]),
            (&["6.6.6.6,192.0.2.1 , 10.0.0.1"], &["192.0.2.1", "10.0.0.1"]),
            (
                &["6.6.6.6", "192.0.2.1", "10.0.0.2,, 10.0.0.1"],
                &["192.0.2.1", "10.0.0.2", "10.0.0.1"],
            ),
            (&["10.0.0.2, 10.0.0.1"], &["10.0.0.2", "10.0.0.1"]),
            (&["192.0.2.1:5000, [fd00::1]:80"], &["192.0.2.1", "fd00::1"]),
            (&["2001:db8::1, [fd00::1], fd00::2"], &["2001:db8::1", "fd00::1", "fd00::2"]),
            (&["::ffff:192.0.2.1, ::ffff:10.0.0.1"], &["192.0.2.1", "10.0.0.1"]),
            // What only the client says is not even looked at.
            (&["nonsense, 192.0.2.1, 10.0.0.1"], &["192.0.2.1", "10.0.0.1"]),
        ] {
            let (all, is_sound) = hops("x-forwarded-for", lines);
            assert_eq!(
                (all, is_sound),
                (found.iter().map(|&hop| hop.to_owned()).collect(), true),
                "{lines:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_followed_ends_the_chain() {
        for (line, found) in [
            ("192.0.2.1, unknown", &[][..]),
            ("192.0.2.1, unknown, 10.0.0.1", &["10.0.0.1"]),
            ("192.0.2.1, 10.0.0.300, 10.0.0.1", &["10.0.0.1"]),
            ("192.0.2.1, <script>, 10.0.0.1", &["10.0.0.1"]),
            ("192.0.2.1, 10.0.0.2:99999, 10.0.0.1", &["10.0.0.1"]),
            ("192.0.2.1, [10.0.0.2], 10.0.0.1", &["10.0.0.1"]),
        ] {
            let (all, is_sound) = hops("x-forwarded-for", &[line]);
            assert_eq!(
                (all, is_sound),
                (found.iter().map(|&hop| hop.to_owned()).collect(), false),
                "{line}"
            );
        }
        let many = ["10.0.0.1"; HOPS_MAX + 1].join(", ");
        assert_eq!(hops("x-forwarded-for", &[&many]).0.len(), HOPS_MAX);
        assert!(!hops("x-forwarded-for", &[&many]).1);
        assert!(hops("x-forwarded-for", &[&["10.0.0.1"; HOPS_MAX].join(", ")]).1);
    }

    #[test]
    fn forwarded_is_read_as_rfc_7239_has_it() {
        for (lines, found, is_sound) in [
            (&["for=192.0.2.1;proto=https"][..], &["192.0.2.1"][..], true),
            (
                &["for=6.6.6.6, For=\"192.0.2.1:80\" ; by=x", "for=10.0.0.1"],
                &["192.0.2.1", "10.0.0.1"],
                true,
            ),
            (&["for=\"[2001:db8::1]:80\", for=\"[fd00::1]\""], &["2001:db8::1", "fd00::1"], true),
            (&["for=6.6.6.6, by=\"a,b;for=7.7.7.7\";for=192.0.2.1"], &["192.0.2.1"], true),
            (&["for=192.0.2.1, for=_hidden, for=10.0.0.1"], &["10.0.0.1"], false),
            (&["for=192.0.2.1, proto=http"], &[], false),
            (&["for=192.0.2.1;for=10.0.0.1"], &[], false),
            (&["for=\"192.0.2.1"], &[], false),
            (&["for=\"192.0.2\\.1\""], &[], false),
        ] {
            let (all, sound) = hops("forwarded", lines);
            assert_eq!(
                (all, sound),
                (found.iter().map(|&hop| hop.to_owned()).collect(), is_sound),
                "{lines:?}"
            );
        }
    }

    #[test]
    fn what_stands_beside_the_client_is_told_by_the_same_proxy() {
        let said = |headers: &[&str], lines: &[(&'static str, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in lines {
                map.append(*name, value.parse().unwrap());
            }
            let (told, is_sound) = told(&map, &by(headers));
            let text =
                |value: Option<HeaderValue>| value.map(|value| value.to_str().unwrap().to_owned());
            (text(told.proto), text(told.host), is_sound)
        };
        let own = |text: &str| Some(text.to_owned());
        let line = "for=6.6.6.6;proto=http;host=evil, for=192.0.2.1;proto=HTTPS;host=\"a.org:8\", for=10.0.0.1;proto=http";
        assert_eq!(
            said(&["forwarded"], &[("forwarded", line)]),
            (own("https"), own("a.org:8"), true)
        );
        let bad = "for=192.0.2.1;proto=gopher;host=\"a b\"";
        assert_eq!(said(&["forwarded"], &[("forwarded", bad)]), (None, None, false));

        let both = [("x-forwarded-proto", "https"), ("x-forwarded-host", "a.org")];
        let all = ["x-forwarded-proto", "x-forwarded-host"];
        assert_eq!(said(&all, &both), (own("https"), own("a.org"), true));
        assert_eq!(said(&all[..1], &both), (own("https"), None, true));
        assert_eq!(said(&[], &both), (None, None, true));
        for bad in [
            ("x-forwarded-proto", "https, http"),
            ("x-forwarded-host", "a b"),
            ("x-forwarded-host", ""),
        ] {
            assert_eq!(said(&all, &[bad]), (None, None, false), "{bad:?}");
        }
        assert_eq!(said(&all, &[both[0], both[0]]), (None, None, false));
    }

    #[test]
    fn no_chain_is_too_strange_to_be_read() {
        let pieces = [
            "for=",
            "192.0.2.1",
            "10.0.0.1",
            "\"",
            "\\",
            ",",
            ";",
            "=",
            " ",
            "[",
            "]",
            ":",
            "fd00::1",
            "proto",
            "host",
            "\u{e9}",
            "unknown",
            "80",
            "by=x",
        ];
        let mut prng = Prng::new(1);
        for name in ["forwarded", "x-forwarded-for"] {
            let by = by(&[name]);
            for _ in 0..20_000 {
                let mut piece = || pieces[prng.bits() as usize % pieces.len()];
                let line: String = (0..12).map(|_| piece()).collect();
                let mut headers = HeaderMap::new();
                headers.insert(name, HeaderValue::from_bytes(line.as_bytes()).unwrap());
                let (told, _) = told(&headers, &by);
                // All but the client are trusted, and what is made of it can be sent.
                assert!(told.hops.iter().skip(1).all(|hop| by.trusts(*hop)), "{line}");
                let client = Client::new(None, Scheme::Http, None).speaks_for(&told);
                client.forwarded(&Host::unknown());
            }
        }
    }
}

//! The header fields that Mandoline's parts say things to each other in, and those that end at every hop.

use http::header;
use http::header::{HeaderMap, HeaderName, HeaderValue};

/// In a 421 answer: the address of the task that owns the key, as far as the sender knows. A hint for people: nobody
/// connects to an address because a response says so.
pub const OWNER: HeaderName = HeaderName::from_static("mandoline-owner");
/// In a 421 answer: the generation that the sender judged by, as `incarnation.number`.
pub const GENERATION: HeaderName = HeaderName::from_static("mandoline-generation");
/// In a 503 answer: the task is giving the key's slice away, by the hand-off of this id (`HandOffId`). It has done nothing, and
/// says with `mandoline-generation` what it judged by: a newer assignment tells who has the slice next.
pub const TRANSIT: HeaderName = HeaderName::from_static("mandoline-transit");

/// In a request: the proxy sends it to a task that does not own the key, since those that do are loaded above the cap; the
/// generation that it goes by, as `incarnation.number`. From a client it means nothing, and is taken away.
pub const SPILL: HeaderName = HeaderName::from_static("mandoline-spill");
/// In an answer: what the task has served since it began, as `requests=5120, units=5120.5`. The proxy keeps it to itself.
pub const LOAD: HeaderName = HeaderName::from_static("mandoline-load");

/// In a request: how often it may still be forwarded. A task that is sent one with 0, and does not own the key, answers 421; so does a
/// gateway that is sent one with 1, where the key lives in another region.
pub const HOPS: HeaderName = HeaderName::from_static("mandoline-hops");

/// Why a response is what it is, when the proxy made it (RFC 9209).
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Fields that a `Connection` field may not take away: the message is not the same without them.
const END_TO_END: [HeaderName; 5] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::VIA,
    header::FORWARDED,
];

/// Reads how often a request may still be forwarded, if it says so. What cannot be read is 0.
pub fn hops(headers: &HeaderMap) -> Option<u8> {
    let text = headers.get(HOPS)?.to_str().ok();
    Some(text.and_then(|text| text.parse().ok()).unwrap_or(0))
}

/// Takes away what is meant for this hop alone (RFC 9110, 7.6.1), and what `Connection` names besides.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        for named in connection_options(headers) {
            if !END_TO_END.contains(&named) {
                headers.remove(named);
            }
        }
        headers.remove(header::CONNECTION);
    }
    // To look through the few that there are is cheaper than to look each of these up.
    if headers.keys().any(|name| OF_ONE_HOP.contains(name)) {
        for name in &OF_ONE_HOP {
            headers.remove(name);
        }
    }
}

const OF_ONE_HOP: [HeaderName; 8] = [
    KEEP_ALIVE,
    PROXY_CONNECTION,
    HTTP2_SETTINGS,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
];

fn connection_options(headers: &HeaderMap) -> Vec<HeaderName> {
    let lines = headers.get_all(header::CONNECTION).iter();
    let options = lines.flat_map(|line| line.as_bytes().split(|b| *b == b','));
    options.filter_map(|option| HeaderName::from_bytes(option.trim_ascii()).ok()).collect()
}

/// Tells whether a list-valued field has this member, whatever its case and parameters.
pub fn lists<'a>(lines: impl IntoIterator<Item = &'a HeaderValue>, member: &str) -> bool {
    lines.into_iter().flat_map(|line| line.as_bytes().split(|b| *b == b',')).any(|item| {
        let bare = item.split(|b| *b == b';').next().unwrap_or_default();
        bare.trim_ascii().eq_ignore_ascii_case(member.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| {
                (name.parse::<HeaderName>().unwrap(), HeaderValue::from_static(value))
            })
            .collect()
    }

    #[test]
    fn what_is_meant_for_one_hop_ends_there() {
        let mut all = headers(&[
            ("connection", "close, X-Mine"),
            ("connection", "host,content-length , b@d,"),
            ("x-mine", "1"),
            ("x-yours", "1"),
            ("host", "a"),
            ("content-length", "1"),
            ("keep-alive", "1"),
            ("proxy-connection", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("proxy-authorization", "x"),
            ("trailer", "x"),
        ]);
        strip_hop_by_hop(&mut all);
        let mut left: Vec<&str> = all.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "trailer", "x-yours"]);
    }

    #[test]
    fn list_members_are_found_whatever_their_case_and_parameters() {
        let te = headers(&[("te", "gzip;q=0.5"), ("te", "deflate, Trailers;q=1")]);
        assert!(lists(te.get_all("te"), "trailers") && lists(te.get_all("te"), "GZIP"));
        assert!(!lists(te.get_all("te"), "trailer"));
    }
}

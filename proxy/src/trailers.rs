//! What may stand behind a body. A trailer that says what is for a head is taken away in both directions: who merges the two
//! would believe it, and it has passed none of the checks that heads pass (RFC 9110, 6.5.1).

use http::header::{self, HeaderMap, HeaderName};

/// Takes away what is for heads.
pub(crate) fn strip(trailers: &mut HeaderMap) {
    let named: Vec<HeaderName> =
        trailers.keys().filter(|name| is_for_heads(name)).cloned().collect();
    for name in named {
        trailers.remove(name);
    }
}

fn is_for_heads(name: &HeaderName) -> bool {
    FOR_HEADS.contains(name) || FAMILIES.iter().any(|family| name.as_str().starts_with(family))
}

/// Framing, routing, who asks and with what right, and what ends at the next hop.
const FOR_HEADS: [HeaderName; 17] = [
    header::AUTHORIZATION,
    header::CONNECTION,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::COOKIE,
    header::EXPECT,
    header::FORWARDED,
    header::HOST,
    header::RANGE,
    header::SET_COOKIE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::VIA,
];

/// What proxies say to each other and to tasks.
const FAMILIES: [&str; 4] = ["keep-alive", "mandoline-", "proxy-", "x-forwarded-"];

#[test]
fn what_is_for_heads_is_no_trailer() {
    let mut trailers = HeaderMap::new();
    for name in ["grpc-status", "content-length", "x-forwarded-host", "mandoline-spill", "x-sum"] {
        trailers.insert(name, header::HeaderValue::from_static("7"));
    }
    strip(&mut trailers);
    let mut left: Vec<&str> = trailers.keys().map(HeaderName::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["grpc-status", "x-sum"]);
}

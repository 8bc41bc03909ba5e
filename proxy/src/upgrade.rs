//! What a client wants to switch to, and whether its task has agreed: only what a route names, one protocol at a time, and only where
//! both sides say so.
//!
//! Whoever takes a connection for switched that is not lets a client write requests that nobody looks at ("request smuggling by
//! upgrade"). So a connection is switched by nothing but the task's 101 with the protocol that was asked for; and HTTP/2 in clear text
//! (`h2c`), which carries requests itself, is passed over as if it had not been asked for.

use http::Version;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use mandoline::http::names::lists;

use crate::config::upgrade::Upgrade;
use crate::refusal::Refusal;

/// Finds the protocol that a client wants to switch to, if it does.
pub(crate) fn wish(head: &Parts, has_body: bool) -> Result<Option<HeaderValue>, Refusal> {
    // Nobody may switch in HTTP/1.0 (RFC 9110, 7.8), and nobody can in HTTP/2.
    if head.version != Version::HTTP_11 || !head.headers.contains_key(header::UPGRADE) {
        return Ok(None);
    }
    let mut wishes = names(&head.headers).filter(|name| !name.eq_ignore_ascii_case(b"h2c"));
    let Some(wish) = wishes.next() else { return Ok(None) };
    if wishes.next().is_some() {
        return Err(Refusal::Upgrade);
    }
    if !lists(head.headers.get_all(header::CONNECTION), "upgrade") {
        return Err(Refusal::Malformed(
            "the request has Upgrade, but Connection does not name it: send Connection: Upgrade",
        ));
    }
    if has_body {
        return Err(Refusal::Malformed(
            "a request that switches protocols has no body: where it ends would be in doubt",
        ));
    }
    HeaderValue::from_bytes(wish).map(Some).map_err(|_| Refusal::Upgrade)
}

/// Finds the wish among what may be switched to.
pub(crate) fn granted<'a>(
    wish: &HeaderValue,
    upgrades: &'a [Upgrade],
) -> Result<&'a HeaderValue, Refusal> {
    let granted = upgrades.iter().find(|upgrade| upgrade.is(wish.as_bytes()));
    granted.map(Upgrade::value).ok_or(Refusal::Upgrade)
}

/// Says whether a task that answers 101 switches to just this.
pub(crate) fn agrees(headers: &HeaderMap, wish: &HeaderValue) -> bool {
    let mut named = names(headers);
    let is_it = named.next().is_some_and(|name| name.eq_ignore_ascii_case(wish.as_bytes()));
    is_it && named.next().is_none() && lists(headers.get_all(header::CONNECTION), "upgrade")
}

fn names(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(header::UPGRADE).iter();
    let names = lines.flat_map(|line| line.as_bytes().split(|b| *b == b','));
    names.map(<[u8]>::trim_ascii).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(lines: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder();
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_wish_is_one_protocol_said_twice() {
        let wished = |lines: &[(&str, &str)]| wish(&head(lines), false).unwrap();
        assert_eq!(wished(&[]), None);
        assert_eq!(wished(&[("upgrade", ""), ("connection", "upgrade")]), None);
        assert_eq!(wished(&[("upgrade", "h2c")]), None);
        let both = [("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")];
        assert_eq!(wished(&both).unwrap(), "WebSocket");
        let both = [("connection", "upgrade"), ("upgrade", "h2c,  websocket ,")];
        assert_eq!(wished(&both).unwrap(), "websocket");

        let mut old = head(&both);
        old.version = Version::HTTP_10;
        assert_eq!(wish(&old, false), Ok(None));
    }

    #[test]
    fn what_has_two_readings_is_refused() {
        let refused = |lines: &[(&str, &str)], has_body| wish(&head(lines), has_body).unwrap_err();
        let two = [("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "x")];
        assert_eq!(refused(&two, false), Refusal::Upgrade);
        assert!(matches!(refused(&[("upgrade", "websocket")], false), Refusal::Malformed(_)));
        let near = [("connection", "upgrades"), ("upgrade", "websocket")];
        assert!(matches!(refused(&near, false), Refusal::Malformed(_)));
        let both = [("connection", "upgrade"), ("upgrade", "websocket")];
        assert!(matches!(refused(&both, true), Refusal::Malformed(_)));
    }

    #[test]
    fn only_what_is_named_is_granted_and_agreed_to() {
        let websocket = [Upgrade::WEBSOCKET];
        let of = HeaderValue::from_static;
        assert_eq!(granted(&of("WebSocket"), &websocket), Ok(Upgrade::WEBSOCKET.value()));
        assert_eq!(granted(&of("websocket"), &[]), Err(Refusal::Upgrade));
        assert_eq!(granted(&of("websocket/1"), &websocket), Err(Refusal::Upgrade));

        let agreed = |lines: &[(&str, &str)]| agrees(&head(lines).headers, &of("websocket"));
        assert!(agreed(&[("upgrade", "WebSocket"), ("connection", "Upgrade")]));
        assert!(!agreed(&[("upgrade", "websocket")]));
        assert!(!agreed(&[("connection", "upgrade")]));
        assert!(!agreed(&[("upgrade", "x"), ("connection", "upgrade")]));
        assert!(!agreed(&[("upgrade", "websocket, x"), ("connection", "upgrade")]));
    }
}

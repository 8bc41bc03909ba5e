//! What a client wants to switch to, and whether its task has agreed: only what a route names, one protocol at a time, and only where
//! both sides say so.
//!
//! Whoever takes a connection for switched that is not lets a client write requests that nobody looks at ("request smuggling by
//! upgrade"). So a connection is switched by nothing but the task's 101 with the protocol that was asked for; and HTTP/2 in clear text
//! (`h2c`), which carries requests itself, is passed over as if it had not been asked for.

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Version};
use hyper::ext::Protocol;
use hyper::upgrade::OnUpgrade;
use mandoline::http::names::lists;
use mandoline_core::prng::Prng;

use crate::config::upgrade::Upgrade;
use crate::refusal::Refusal;

/// Finds a wish for WebSocket as HTTP/2 has it, a CONNECT of a stream (RFC 8441), and says it as HTTP/1.1 does: what tasks know, and the rest of
/// this proxy. Gives the stream, which is the client's side of the tunnel. Another CONNECT stays what it is, and is refused.
pub(crate) fn of_stream<B>(request: &mut Request<B>, prng: &mut Prng) -> Option<OnUpgrade> {
    if *request.method() != Method::CONNECT {
        return None;
    }
    let protocol = request.extensions().get::<Protocol>()?;
    if !Upgrade::WEBSOCKET.is(protocol.as_str().as_bytes()) {
        return None;
    }
    let stream = hyper::upgrade::on(&mut *request);
    *request.method_mut() = Method::GET;
    let headers = request.headers_mut();
    headers.insert(header::UPGRADE, Upgrade::WEBSOCKET.value().clone());
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::SEC_WEBSOCKET_KEY, key(prng));
    Some(stream)
}

/// Draws 16 bytes, in Base64. They keep a cache from taking an old answer for this one (RFC 6455, 1.3), and are no secret.
fn key(prng: &mut Prng) -> HeaderValue {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut digit = |step: usize| DIGITS[prng.bits() as usize % (DIGITS.len() / step) * step];
    let mut text: Vec<u8> = (0..21).map(|_| digit(1)).collect();
    // Of the last digit two bits count.
    text.push(digit(16));
    text.extend(b"==");
    HeaderValue::from_bytes(&text).expect("digits fit a header")
}

/// Finds the protocol that a client wants to switch to, if it does.
pub(crate) fn wish(head: &Parts, has_body: bool) -> Result<Option<HeaderValue>, Refusal> {
    // Nobody may switch in HTTP/1.0 (RFC 9110, 7.8).
    if head.version == Version::HTTP_10 || !head.headers.contains_key(header::UPGRADE) {
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
    fn a_stream_of_http_2_says_its_wish_as_a_connection_of_http_1_does() {
        let asked = |method: Method, protocol: Option<&'static str>| {
            let mut request =
                Request::builder().method(method).version(Version::HTTP_2).body(()).unwrap();
            if let Some(protocol) = protocol {
                request.extensions_mut().insert(Protocol::from_static(protocol));
            }
            let stream = of_stream(&mut request, &mut Prng::new(7));
            (request.into_parts().0, stream.is_some())
        };
        let (head, is_one) = asked(Method::CONNECT, Some("websocket"));
        assert!(is_one && head.method == Method::GET);
        assert_eq!(wish(&head, false).unwrap().unwrap(), "websocket");
        let key = head.headers[header::SEC_WEBSOCKET_KEY].to_str().unwrap();
        assert!(key.len() == 24 && key.ends_with("=="), "{key}");
        assert!("AQgw".contains(&key[21..22]), "{key}");
        for (method, protocol) in [
            (Method::CONNECT, None),
            (Method::CONNECT, Some("connect-udp")),
            (Method::GET, Some("websocket")),
        ] {
            let (head, is_one) = asked(method.clone(), protocol);
            assert!(
                !is_one && head.method == method && head.headers.is_empty(),
                "{method} {protocol:?}"
            );
        }
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

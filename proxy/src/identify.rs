//! Who asks for what: refuses what cannot be passed on safely, and signs what is passed on, so that the task knows the
//! client and a loop is noticed.
//!
//! hyper has parsed the head by now and refused what is no HTTP; `wire` has watched for what hyper forgives.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{Method, Uri, Version};

use crate::client::{Host, is_host};
use crate::config::forwarded::{X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO};
use crate::passage::Passage;
use crate::refusal::Refusal;
use crate::upgrade::wish;
use mandoline::http::names::{SPILL, lists, strip_hop_by_hop};

/// The stage `identify`.
pub(crate) fn identify(passage: &mut Passage) -> Result<(), Refusal> {
    passage.host = check(&passage.worker.pseudonym, &mut passage.head)?;
    if passage.switch.is_some() {
        passage.upgrade = wish(&passage.head, !passage.tape.is_empty())?;
    }
    join_crumbs(&mut passage.head);
    Ok(())
}

/// Refuses what cannot be passed on safely, and finds out which host is meant.
pub(crate) fn check(pseudonym: &str, head: &mut Parts) -> Result<Host, Refusal> {
    method(&head.method)?;
    framing(head)?;
    no_loop(&head.headers, pseudonym)?;
    let host = host(head)?;
    origin_form(head)?;
    Ok(host)
}

fn method(method: &Method) -> Result<(), Refusal> {
    match *method {
        Method::CONNECT => Err(Refusal::Method("CONNECT")),
        // It would show a script what its browser hides from it.
        Method::TRACE => Err(Refusal::Method("TRACE")),
        _ => Ok(()),
    }
}

fn framing(head: &Parts) -> Result<(), Refusal> {
    // Behind a gateway interface, where `-` becomes `_`, these would stand for the real ones.
    if LOOKALIKES.iter().any(|name| head.headers.contains_key(name)) {
        return Err(Refusal::Malformed(
            "a field is named like Content-Length or Transfer-Encoding, but with an underscore",
        ));
    }
    // hyper has taken the number, and some would take it for octal.
    let length = head.headers.get(header::CONTENT_LENGTH).map(HeaderValue::as_bytes);
    if length.is_some_and(|length| length.len() > 1 && length[0] == b'0') {
        return Err(Refusal::Malformed("the Content-Length begins with a zero"));
    }
    let mut codings = head.headers.get_all(header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => {}
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => {}
        _ => return Err(Refusal::TransferCoding),
    }
    let mut expectations = head.headers.get_all(header::EXPECT).iter();
    if expectations.any(|value| !value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Err(Refusal::Expectation);
    }
    Ok(())
}

const LOOKALIKES: [HeaderName; 2] =
    [HeaderName::from_static("content_length"), HeaderName::from_static("transfer_encoding")];

fn no_loop(headers: &HeaderMap, pseudonym: &str) -> Result<(), Refusal> {
    let mut entries =
        headers.get_all(header::VIA).iter().flat_map(|line| line.as_bytes().split(|b| *b == b','));
    // An entry is protocol, pseudonym and perhaps a comment.
    let ours = entries.any(|entry| {
        let mut words = entry.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        words.nth(1) == Some(pseudonym.as_bytes())
    });
    if ours { Err(Refusal::Loop) } else { Ok(()) }
}

/// Makes one `Cookie` of those that HTTP/2 lets a client send one by one (RFC 9113, 8.2.3): in HTTP/1.1 there is but one.
fn join_crumbs(head: &mut Parts) {
    if head.version != Version::HTTP_2 || head.headers.get_all(header::COOKIE).iter().count() < 2 {
        return;
    }
    let crumbs: Vec<&[u8]> =
        head.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    let whole = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]));
    head.headers.insert(header::COOKIE, whole.expect("what parts of headers make is one"));
}

fn host(head: &Parts) -> Result<Host, Refusal> {
    let mut lines = head.headers.get_all(header::HOST).iter();
    let host = match (lines.next(), lines.next()) {
        (_, Some(_)) => return Err(Refusal::Malformed("the request has more than one Host")),
        (None, None) if head.version == Version::HTTP_11 => {
            return Err(Refusal::Malformed("the request has no Host"));
        }
        (host, None) => host.cloned().unwrap_or(HeaderValue::from_static("")),
    };
    // An absolute target outweighs Host (RFC 9112, 3.2.2).
    let host = match head.uri.authority() {
        Some(authority) if head.version == Version::HTTP_2 => {
            let differs = |host: &HeaderValue| {
                !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes())
            };
            // RFC 9113, 8.3.1.
            if head.headers.get(header::HOST).is_some_and(differs) {
                return Err(Refusal::Malformed("Host says something else than :authority"));
            }
            HeaderValue::from_str(authority.as_str()).map_err(|_| Refusal::Malformed(BAD_HOST))?
        }
        None if head.version == Version::HTTP_2 && host.is_empty() => {
            return Err(Refusal::Malformed("the request has no :authority"));
        }
        None => host,
        Some(authority) => {
            let without_user = authority.as_str().rsplit('@').next().unwrap_or_default();
            HeaderValue::from_str(without_user).map_err(|_| Refusal::Malformed(BAD_HOST))?
        }
    };
    if is_host(host.as_bytes()) { Ok(Host(host)) } else { Err(Refusal::Malformed(BAD_HOST)) }
}

const BAD_HOST: &str = "the host of the request is none: use a name or address, and perhaps a port";

fn origin_form(head: &mut Parts) -> Result<(), Refusal> {
    if let Some(scheme) = head.uri.scheme() {
        if *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS {
            return Err(Refusal::Malformed(
                "the target of the request is of another scheme: use http",
            ));
        }
        let path = head.uri.path_and_query().cloned();
        head.uri = Uri::from(path.unwrap_or(PathAndQuery::from_static("/")));
    }
    let asterisk = head.method == Method::OPTIONS && head.uri.path() == "*";
    if !head.uri.path().starts_with('/') && !asterisk {
        return Err(Refusal::Malformed("the target of the request is no path: begin it with /"));
    }
    // Which servers take for what they like, or refuse.
    if head.uri.path_and_query().is_some_and(|target| !target.as_str().is_ascii()) {
        return Err(Refusal::Malformed("the target of the request is not ASCII: encode it with %"));
    }
    Ok(())
}

/// Takes away what was meant for this hop, and says who the client was and that the request came by here.
pub(crate) fn sign(passage: &mut Passage) {
    let Passage { worker, setup, client, host, head, tape, upgrade, .. } = passage;
    let headers = &mut head.headers;
    let trailers = lists(headers.get_all(header::TE), "trailers");
    // A body of HTTP/2 may go without a length as it is.
    let has_length = headers.contains_key(header::CONTENT_LENGTH);
    let of_frames = head.version == Version::HTTP_2 && !tape.is_empty() && !has_length;
    let chunked = headers.contains_key(header::TRANSFER_ENCODING) || of_frames;
    strip_hop_by_hop(headers);
    // The proxy meets the expectation itself: it asks for the body as soon as the task takes it.
    headers.remove(header::EXPECT);
    // Said by the last proxy to the task alone.
    headers.remove(SPILL);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::UPGRADE, protocol.clone());
        headers.append(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if chunked {
        // Also with GET, where hyper would take a body of unknown length for none.
        headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    headers.append(header::VIA, worker.via(head.version));
    headers.insert(header::FORWARDED, client.forwarded(host));
    if setup.config.forwarded.x_forwarded {
        let [chain, proto, asked] = client.x_forwarded(host);
        headers.insert(X_FORWARDED_FOR, chain);
        headers.insert(X_FORWARDED_PROTO, proto);
        if !asked.is_empty() {
            headers.insert(X_FORWARDED_HOST, asked);
        }
    }
    headers.insert(header::HOST, host.0.clone());
    head.version = Version::HTTP_11;
}

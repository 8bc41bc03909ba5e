//! What a request looks like on its way to a task or a server, and an answer on its way back: the same message, in the words of the
//! connection that it goes by.

use std::str::FromStr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use mandoline::Utilisation;
use mandoline::http::names::{GENERATION, HOPS, LOAD, SPILL, TRANSIT, strip_hop_by_hop};
use mandoline::http::refused::Refused;
use mandoline::tries;
use mandoline_core::generation::Generation;
use mandoline_core::transit::HandOffId;

use crate::forward::setback::Setback;
use crate::passage::Answer;
use crate::pool::upstream::Checkout;
use crate::refusal::Refusal;
use crate::rules::{Rules, Values};
use crate::trace::Context;
use crate::upgrade::agrees;
use crate::upload::Upload;

/// What a request is made of, for every try.
#[derive(Clone, Copy)]
pub(crate) struct Original<'a> {
    pub(crate) head: &'a Parts,
    pub(crate) rules: &'a Rules,
    pub(crate) values: Values<'a>,
}

/// What is said to one task alone.
#[derive(Clone, Copy, Default)]
pub(crate) struct Marks {
    /// The assignment that it was chosen by.
    pub(crate) generation: Generation,
    /// Whether it may forward the request once more.
    pub(crate) may_forward: bool,
    /// Whether it does not own the key.
    pub(crate) is_spilled: bool,
    /// Where it is in a trace, if the request is recorded.
    pub(crate) trace: Option<Context>,
}

/// Makes a request to be sent by a connection.
pub(crate) fn request(
    original: &Original<'_>,
    marks: Marks,
    checkout: &Checkout,
    upload: Upload,
) -> Result<Request<Upload>, Setback> {
    let Original { head, rules, values } = *original;
    let mut request = Request::new(upload);
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = head.uri.clone();
    *request.headers_mut() = head.headers.clone();
    let task = Some(&checkout.upstream.name);
    rules.apply(request.headers_mut(), &Values { task, generation: marks.generation, ..values });
    if marks.may_forward {
        request.headers_mut().insert(HOPS, HeaderValue::from_static("1"));
    } else if let Some(left) = request.headers_mut().get_mut(HOPS) {
        *left = HeaderValue::from_static("0");
    }
    if marks.is_spilled {
        let generation = HeaderValue::try_from(marks.generation.to_string());
        request.headers_mut().insert(SPILL, generation.expect("a generation fits a header"));
    }
    if let Some(trace) = marks.trace {
        trace.put(request.headers_mut());
    }
    if checkout.is_shared() {
        in_http2(&mut request, checkout.upstream.transport.tls.is_some())?;
    }
    Ok(request)
}

/// Says a request in HTTP/2: what was said of the connection is said by its frames, and the host by the target (RFC 9113, 8.3.1).
fn in_http2(request: &mut Request<Upload>, by_tls: bool) -> Result<(), Setback> {
    let headers = request.headers_mut();
    headers.remove(header::CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    // Without a host, as HTTP/1.0 allows, the target stays a path.
    let Some(host) = headers.remove(header::HOST).filter(|host| !host.is_empty()) else {
        return Ok(());
    };
    let bad = || Setback::Final(Refusal::Malformed("the host of the request is none"));
    let mut target = std::mem::take(request.uri_mut()).into_parts();
    target.authority = Some(Authority::try_from(host.as_bytes()).map_err(|_| bad())?);
    target.scheme = Some(if by_tls { Scheme::HTTPS } else { Scheme::HTTP });
    *request.uri_mut() = Uri::from_parts(target).map_err(|_| bad())?;
    *request.version_mut() = Version::HTTP_2;
    Ok(())
}

/// Takes out of an answer what its task says of its load. What cannot be read is as good as nothing, for the client waits.
pub(crate) fn load(response: &mut Response<Incoming>) -> Option<Utilisation> {
    response.headers_mut().remove(LOAD)?.to_str().ok()?.parse().ok()
}

/// Finds in an answer that the task took no part in the request: 421, and 503 in a hand-off, lead to another try; so do the statuses of
/// gRPC that say the same.
pub(crate) fn refused(response: &Response<Incoming>, is_grpc: bool) -> Option<Setback> {
    let headers = response.headers();
    match response.status() {
        StatusCode::MISDIRECTED_REQUEST => Some(Setback::Misdirected(named(headers, &GENERATION))),
        StatusCode::SERVICE_UNAVAILABLE => {
            let id: HandOffId = named(headers, &TRANSIT)?;
            Some(Setback::InTransit(named(headers, &GENERATION).unwrap_or(id.began)))
        }
        StatusCode::OK if is_grpc => match Refused::read(response)? {
            tries::Refusal::NotOwner(told) => Some(Setback::Misdirected(Some(told))),
            tries::Refusal::InTransit(told) => Some(Setback::InTransit(told)),
            // As over HTTP: what has no lease may be anybody's.
            tries::Refusal::Unreached => None,
        },
        _ => None,
    }
}

/// Takes an answer over: what belongs to this hop ends here.
pub(crate) fn accept(
    mut response: Response<Incoming>,
    checkout: Checkout,
    upgrade: Option<&HeaderValue>,
) -> Result<Answer, Setback> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let garbled = |what| Err(Setback::Final(Refusal::Garbled(what)));
        match upgrade {
            None => return garbled("it switched protocols though nobody had asked"),
            Some(wish) if !agrees(response.headers(), wish) => {
                return garbled("it switched to another protocol than it was asked to");
            }
            // Behind its head there is another protocol, and no body.
            Some(_) => drop(response.headers_mut().remove(header::CONTENT_LENGTH)),
        }
    }
    framing(&mut response)?;
    strip_hop_by_hop(response.headers_mut());
    if !checkout.is_shared() {
        *response.version_mut() = Version::HTTP_11;
    }
    Ok((response, checkout))
}

/// Reads what a task says in a field of its answer. What cannot be read is as good as nothing.
fn named<T: FromStr>(headers: &HeaderMap, field: &HeaderName) -> Option<T> {
    headers.get(field)?.to_str().ok()?.parse().ok()
}

/// Leaves one reading of where the answer ends: hyper has chosen it by the rules, so what speaks against it goes.
fn framing(response: &mut Response<Incoming>) -> Result<(), Setback> {
    let no_body = matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let headers = response.headers();
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let chunked = match (codings.next(), codings.next()) {
        (None, _) => false,
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => true,
        _ => {
            return Err(Setback::Final(Refusal::Garbled(
                "its transfer coding is not chunked alone",
            )));
        }
    };
    let length = one_length(headers)?;
    let headers = response.headers_mut();
    if chunked || no_body {
        headers.remove(header::CONTENT_LENGTH);
    } else if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length);
    }
    Ok(())
}

/// Finds the length that an answer states, in a plain form if it was stated twice alike.
fn one_length(headers: &HeaderMap) -> Result<Option<HeaderValue>, Setback> {
    let mut lines = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = lines.next() else { return Ok(None) };
    let all =
        [first].into_iter().chain(lines).flat_map(|line| line.as_bytes().split(|b| *b == b','));
    let mut lengths = all.map(<[u8]>::trim_ascii);
    let length = lengths.next().unwrap_or_default();
    let plain = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
    if !plain || lengths.any(|other| other != length) {
        return Err(Setback::Final(Refusal::Garbled(
            "its Content-Length is no number, or says two things",
        )));
    }
    Ok(HeaderValue::from_bytes(length).ok())
}

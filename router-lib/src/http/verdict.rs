//! What an answer says of the task that gave it: the same for stubs, HTTP clients, applications that forward, and the proxy.
//!
//! As in Envoy's outlier detection a 5xx is a failure, and so are the statuses of gRPC that stand for one, if they come with the
//! answer's head, as they do where a handler failed. What a program does not implement says nothing of the task: another
//! one would not either.

use http::header::{HeaderMap, HeaderValue};
use http::{Response, StatusCode};

use crate::choice::Verdict;

/// UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE and DATA_LOSS.
const FAILED: [&[u8]; 5] = [b"2", b"4", b"13", b"14", b"15"];

/// Judges an answer of a task that took the request.
pub fn verdict<B>(answer: &Response<B>) -> Verdict {
    let status = answer.status();
    let is_missing =
        matches!(status, StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED);
    let grpc = answer.headers().get("grpc-status");
    let has_failed = (status.is_server_error() && !is_missing)
        || grpc.is_some_and(|code| FAILED.contains(&code.as_bytes()));
    if has_failed { Verdict::Failed } else { Verdict::Served }
}

/// Judges an answer of gRPC by its end, where its head did not say how the call went.
pub fn of_trailers(trailers: &HeaderMap) -> Verdict {
    // Without a status it is an answer that broke off.
    let code = trailers.get("grpc-status").map_or(&b"2"[..], HeaderValue::as_bytes);
    if FAILED.contains(&code) { Verdict::Failed } else { Verdict::Served }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_fails_where_it_says_that_it_does() {
        let of = |status: u16, grpc: Option<&str>| {
            let mut answer = Response::builder().status(status);
            if let Some(code) = grpc {
                answer = answer.header("grpc-status", code);
            }
            verdict(&answer.body(()).unwrap())
        };
        for status in [500, 502, 503, 504] {
            assert_eq!(of(status, None), Verdict::Failed, "{status}");
        }
        for status in [200, 404, 421, 429, 501, 505] {
            assert_eq!(of(status, None), Verdict::Served, "{status}");
        }
        assert_eq!(of(200, Some("13")), Verdict::Failed);
        assert_eq!(of(200, Some("14")), Verdict::Failed);
        assert_eq!(of(200, Some("0")), Verdict::Served);
        assert_eq!(of(200, Some("3")), Verdict::Served);
    }

    #[test]
    fn the_end_of_an_answer_says_how_the_call_went() {
        let of = |code: &'static str| {
            let code = HeaderValue::from_static(code);
            of_trailers(&HeaderMap::from_iter([("grpc-status".parse().unwrap(), code)]))
        };
        assert_eq!((of("0"), of("5")), (Verdict::Served, Verdict::Served));
        assert_eq!((of("13"), of("14")), (Verdict::Failed, Verdict::Failed));
        assert_eq!(of_trailers(&HeaderMap::new()), Verdict::Failed);
    }
}

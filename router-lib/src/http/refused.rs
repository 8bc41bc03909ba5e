//! How a task says that it did not take a request, and how a caller reads that: in HTTP by a status and two fields, in gRPC by a
//! status, the same two entries of metadata, and `google.rpc.ErrorInfo` for callers that know nothing of Mandoline.
//!
//! | why | HTTP | gRPC | `ErrorInfo` reason |
//! |---|---|---|---|
//! | another task owns the key | 421 | `FAILED_PRECONDITION` | `NOT_OWNER` |
//! | its slice is on the way to another task | 503, `mandoline-transit` | `UNAVAILABLE`, `mandoline-transit` | `IN_TRANSIT` |
//! | this task has no lease | 503 | `UNAVAILABLE` | `NO_LEASE` |
//! | the request has no usable key | 400, or 431 for one too long | `INVALID_ARGUMENT` | `NO_KEY` |
//!
//! The first three promise that nothing was done, so whoever hears them asks again: see [`crate::tries::Tries`]. Only a task may
//! promise that of itself: what a handler passes on from another job's task loses the fields that say so (`unsay`), or the caller
//! would repeat what the handler has done by then.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use mandoline_core::extract::Miss;
use mandoline_core::generation::Generation;
use mandoline_core::task::Address;
use mandoline_core::transit::HandOffId;
use prost::Message;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use crate::guard::NotOwner;
use crate::http::names::{GENERATION, OWNER, TRANSIT};
use crate::tries;

/// Whose reasons these are, in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "mandoline";

/// Why a task did not take a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    /// Another task owns the key.
    NotOwner {
        /// Where, as far as is known. A hint for people: nobody connects to an address because a response says so.
        owner: Option<Address>,
        /// The assignment that says so.
        generation: Generation,
    },
    /// The key's slice is on its way to another task.
    InTransit {
        /// By which hand-off.
        id: HandOffId,
        /// The assignment that says so.
        generation: Generation,
    },
    /// The task has no lease right now.
    NoLease {
        /// The newest assignment that it knows.
        generation: Generation,
    },
    /// The request has no usable key.
    NoKey(Miss),
}

impl From<NotOwner> for Refused {
    fn from(why: NotOwner) -> Self {
        match why {
            NotOwner::Elsewhere { owner, generation } => Self::NotOwner { owner, generation },
            NotOwner::InTransit { id, generation } => Self::InTransit { id, generation },
            NotOwner::NoLease { generation } => Self::NoLease { generation },
            NotOwner::Cost(error) => unreachable!("layers ask at a cost of their own: {error}"),
        }
    }
}

impl Refused {
    /// Makes the answer: a gRPC status without a body, or an HTTP answer with a sentence for people. A handler gives it as it is:
    /// its fields mean something only in the answer that was made here.
    pub fn answer(&self, is_grpc: bool) -> Response<Bytes> {
        if is_grpc {
            return Status::from(self).into_http();
        }
        let status = match self {
            Self::NotOwner { .. } => StatusCode::MISDIRECTED_REQUEST,
            Self::InTransit { .. } | Self::NoLease { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoKey(Miss::TooLong(_)) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::NoKey(_) => StatusCode::BAD_REQUEST,
        };
        let mut answer = Response::new(Bytes::from(format!("{}\n", self.message())));
        *answer.status_mut() = status;
        answer.extensions_mut().insert(OfOurs);
        let headers = answer.headers_mut();
        headers.extend(self.fields());
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        answer
    }

    /// Reads why a task did not take a request, if that is what an answer says and another try may help.
    pub fn read<B>(answer: &Response<B>) -> Option<tries::Refusal> {
        let headers = answer.headers();
        let code = headers.get(Status::GRPC_STATUS);
        let is = |status: StatusCode, of_grpc: Code| match code {
            None => answer.status() == status,
            Some(code) => Code::from_bytes(code.as_bytes()) == of_grpc,
        };
        let told = named::<Generation>(headers, &GENERATION);
        if is(StatusCode::MISDIRECTED_REQUEST, Code::FailedPrecondition) {
            return Some(tries::Refusal::NotOwner(told?));
        }
        if is(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable) {
            let transit = named::<HandOffId>(headers, &TRANSIT);
            return match (transit, told) {
                (Some(id), told) => Some(tries::Refusal::InTransit(told.unwrap_or(id.began))),
                // It has no lease: it gets one in a moment, or another task gets the key.
                (None, Some(_)) => Some(tries::Refusal::Unreached),
                (None, None) => None,
            };
        }
        None
    }

    fn message(&self) -> String {
        match self {
            Self::NotOwner { owner: None, .. } => "this task does not own the key".to_owned(),
            Self::NotOwner { owner: Some(owner), .. } => {
                format!("this task does not own the key: {owner} does, as far as it knows")
            }
            Self::InTransit { id, .. } => {
                format!("the key is on its way to another task (hand-off {id}): ask again")
            }
            Self::NoLease { .. } => {
                "this task has no lease: it cannot serve before it hears of the assigner".to_owned()
            }
            Self::NoKey(miss) => miss.to_string(),
        }
    }

    fn fields(&self) -> HeaderMap {
        let mut fields = HeaderMap::new();
        let mut add = |name: HeaderName, value: String| {
            let value = HeaderValue::try_from(value).expect("addresses and numbers fit a header");
            fields.insert(name, value);
        };
        match self {
            Self::NotOwner { owner, generation } => {
                add(GENERATION, generation.to_string());
                if let Some(owner) = owner {
                    add(OWNER, owner.to_string());
                }
            }
            Self::InTransit { id, generation } => {
                add(GENERATION, generation.to_string());
                add(TRANSIT, id.to_string());
            }
            Self::NoLease { generation } => add(GENERATION, generation.to_string()),
            Self::NoKey(_) => {}
        }
        fields
    }
}

impl From<&Refused> for Status {
    fn from(refused: &Refused) -> Self {
        let (code, reason) = match refused {
            Refused::NotOwner { .. } => (Code::FailedPrecondition, "NOT_OWNER"),
            Refused::InTransit { .. } => (Code::Unavailable, "IN_TRANSIT"),
            Refused::NoLease { .. } => (Code::Unavailable, "NO_LEASE"),
            Refused::NoKey(_) => (Code::InvalidArgument, "NO_KEY"),
        };
        let fields = refused.fields();
        let text = |(name, value): (&HeaderName, &HeaderValue)| {
            Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
        };
        let info = ErrorInfo {
            reason: reason.to_owned(),
            domain: DOMAIN.to_owned(),
            metadata: fields.iter().filter_map(text).collect(),
        };
        let details = Details {
            code: code as i32,
            message: refused.message(),
            details: vec![Any {
                type_url: "type.googleapis.com/google.rpc.ErrorInfo".to_owned(),
                value: info.encode_to_vec(),
            }],
        };
        let (details, fields) = (details.encode_to_vec(), MetadataMap::from_headers(fields));
        let message = refused.message();
        let mut status = Self::with_details_and_metadata(code, message, details.into(), fields);
        status.set_source(Arc::new(OfOurs));
        status
    }
}

/// Marks a refusal that was made in this process: an answer's extensions, and a status's source, do not travel.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this task did not take the request")]
struct OfOurs;

/// Takes from a handler's answer what would make it a refusal, unless the handler made it one itself.
pub(crate) fn unsay<B>(answer: &mut Response<B>) {
    let extensions = answer.extensions();
    let source = extensions.get::<Status>().and_then(std::error::Error::source);
    if extensions.get::<OfOurs>().is_some() || source.is_some_and(|source| source.is::<OfOurs>()) {
        return;
    }
    for field in [OWNER, GENERATION, TRANSIT] {
        answer.headers_mut().remove(field);
    }
}

/// Reads what a field of an answer says. What cannot be read is as good as nothing.
fn named<T: FromStr>(headers: &HeaderMap, field: &HeaderName) -> Option<T> {
    headers.get(field)?.to_str().ok()?.parse().ok()
}

/// Says whether a message is of gRPC, by its content type.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.and_then(|kind| kind.strip_prefix(b"application/grpc"))
        .is_some_and(|rest| rest.is_empty() || matches!(rest[0], b'+' | b';'))
}

// Of googleapis' google/rpc/status.proto and error_details.proto; tonic-types has twenty more, and its own runtime for them.

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct Details {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `google.rpc.ErrorInfo`.
#[derive(Clone, PartialEq, Message)]
struct ErrorInfo {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    domain: String,
    #[prost(map = "string, string", tag = "3")]
    metadata: HashMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATION_7: Generation = Generation { incarnation: 1, number: 7 };

    fn all() -> Vec<Refused> {
        let generation = GENERATION_7;
        let id = HandOffId { began: generation, first: mandoline_core::key::SliceKey(9) };
        let owner = Some("10.0.0.1:80".parse().unwrap());
        vec![
            Refused::NotOwner { owner, generation },
            Refused::NotOwner { owner: None, generation },
            Refused::InTransit { id, generation },
            Refused::NoLease { generation },
            Refused::NoKey(Miss::Twice),
        ]
    }

    #[test]
    fn callers_read_what_tasks_say_in_either_language() {
        use tries::Refusal::{InTransit, NotOwner, Unreached};
        let told = [
            Some(NotOwner(GENERATION_7)),
            Some(NotOwner(GENERATION_7)),
            Some(InTransit(GENERATION_7)),
            Some(Unreached),
            None,
        ];
        for (refused, told) in all().iter().zip(told) {
            assert_eq!(Refused::read(&refused.answer(false)), told, "{refused:?}");
            assert_eq!(Refused::read(&refused.answer(true)), told, "{refused:?}");
        }
    }

    #[test]
    fn an_application_s_own_answers_are_not_taken_for_refusals() {
        for status in [200, 404, 421, 503] {
            let answer = Response::builder().status(status).body(()).unwrap();
            assert_eq!(Refused::read(&answer), None, "{status} without a generation");
        }
        for status in [Status::failed_precondition("mine"), Status::unavailable("later")] {
            assert_eq!(Refused::read(&status.into_http::<()>()), None);
        }
        let answer = Response::builder().header(GENERATION, "1.7").body(()).unwrap();
        assert_eq!(Refused::read(&answer), None, "it was taken");
    }

    #[test]
    fn who_knows_nothing_of_mandoline_reads_error_info() {
        let status = Status::from(&all()[0]);
        assert_eq!(status.code(), Code::FailedPrecondition);
        let details = Details::decode(status.details()).unwrap();
        let info = ErrorInfo::decode(details.details[0].value.as_slice()).unwrap();
        assert_eq!(
            (details.code, info.reason.as_str(), info.domain.as_str()),
            (9, "NOT_OWNER", DOMAIN)
        );
        assert_eq!(info.metadata["mandoline-owner"], "10.0.0.1:80");
        assert_eq!(info.metadata["mandoline-generation"], "1.7");
    }

    #[test]
    fn each_refusal_has_its_status() {
        let statuses =
            all().iter().map(|refused| refused.answer(false).status().as_u16()).collect::<Vec<_>>();
        assert_eq!(statuses, [421, 421, 503, 503, 400]);
        assert_eq!(Refused::NoKey(Miss::TooLong(1 << 20)).answer(false).status().as_u16(), 431);
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        let of = |kind: &'static str| {
            is_grpc(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]))
        };
        assert!(
            of("application/grpc") && of("application/grpc+proto") && of("application/grpc;x=y")
        );
        assert!(
            !of("application/grpc-web") && !of("application/json") && !is_grpc(&HeaderMap::new())
        );
    }
}

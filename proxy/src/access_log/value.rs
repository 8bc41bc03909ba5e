//! What a field of the access log comes to for one request, and how it is written so that nobody can forge another.

use std::borrow::Cow;
use std::fmt::Write;
use std::time::{Duration, SystemTime};

use http::header::HeaderName;
use serde_json::Value;

use crate::access_log::field::{Field, Plain, What};
use crate::access_log::timestamp::timestamp;
use crate::record::{Record, RequestInfo};

/// One request that a line is to tell of.
pub(super) struct Told<'a> {
    /// The headers that were kept of it.
    pub(super) headers: &'a [HeaderName],
    pub(super) record: &'a Record,
    pub(super) request: &'a RequestInfo,
    /// When it ended.
    pub(super) now: SystemTime,
}

/// What a field comes to.
pub(super) enum Said<'a> {
    Nothing,
    /// Of ours, and harmless.
    Plain(Cow<'a, str>),
    /// A stranger's.
    Strange(&'a [u8]),
    Number(u64),
    /// In seconds.
    Seconds(Duration),
}

impl<'a> Told<'a> {
    pub(super) fn value(&self, field: &Field) -> Said<'a> {
        let (record, request) = (self.record, self.request);
        let own = |text: String| Said::Plain(Cow::Owned(text));
        let what = match &field.0 {
            What::Plain(what) => *what,
            What::Header(name) => {
                let place = self.headers.iter().position(|known| known == name);
                let value = place.and_then(|place| request.headers.get(place)?.as_ref());
                return value.map_or(Said::Nothing, |value| Said::Strange(value.as_bytes()));
            }
        };
        match what {
            Plain::Time => {
                own(timestamp(self.now.checked_sub(record.duration).unwrap_or(self.now)))
            }
            Plain::Client => own(request.client.to_string()),
            Plain::Method => Said::Strange(request.method.as_str().as_bytes()),
            Plain::Host => match (request.uri.authority(), &request.host) {
                (Some(authority), _) => Said::Strange(authority.as_str().as_bytes()),
                (None, Some(host)) => Said::Strange(host.as_bytes()),
                (None, None) => Said::Nothing,
            },
            Plain::Path => Said::Strange(request.uri.path().as_bytes()),
            Plain::Query => {
                request.uri.query().map_or(Said::Nothing, |query| Said::Strange(query.as_bytes()))
            }
            Plain::Protocol => own(format!("{:?}", request.version)),
            Plain::Status => {
                record.status.map_or(Said::Nothing, |status| Said::Number(status.into()))
            }
            Plain::Outcome => Said::Plain(record.outcome.as_str().into()),
            Plain::Route => {
                record.route.as_ref().map_or(Said::Nothing, |name| Said::Strange(name.as_bytes()))
            }
            Plain::Job => {
                request.job.as_ref().map_or(Said::Nothing, |job| Said::Plain(job.as_str().into()))
            }
            Plain::Key => record.key.map_or(Said::Nothing, |key| own(format!("{:016x}", key.0))),
            Plain::Generation if record.first.is_none() => Said::Nothing,
            Plain::Generation => own(record.generation.to_string()),
            Plain::Task => record.last.map_or(Said::Nothing, |task| own(task.to_string())),
            Plain::Upstream => {
                request.address.as_ref().map_or(Said::Nothing, |address| own(address.to_string()))
            }
            Plain::Tries => Said::Number(record.tries.into()),
            Plain::Held => Said::Seconds(record.held),
            Plain::UpstreamTime => Said::Seconds(record.upstream),
            Plain::Duration => Said::Seconds(record.duration),
            Plain::BytesOut => Said::Number(record.bytes_out),
            Plain::Reason => {
                request.reason.as_ref().map_or(Said::Nothing, |why| Said::Strange(why.as_bytes()))
            }
            Plain::Trace => {
                request.trace.as_ref().map_or(Said::Nothing, |trace| Said::Plain(trace.into()))
            }
        }
    }
}

impl Said<'_> {
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Nothing => Value::Null,
            Self::Plain(text) => Value::from(text.as_ref()),
            Self::Strange(bytes) => Value::from(String::from_utf8_lossy(cut(bytes))),
            Self::Number(number) => Value::from(*number),
            Self::Seconds(length) => Value::from(length.as_micros() as f64 / 1e6),
        }
    }

    pub(super) fn write(&self, line: &mut String) {
        match self {
            Self::Nothing => line.push('-'),
            Self::Plain(text) => line.push_str(text),
            Self::Strange(bytes) => escape(cut(bytes), line),
            Self::Number(number) => write!(line, "{number}").expect("a string takes it"),
            Self::Seconds(length) => {
                write!(line, "{:.6}", length.as_secs_f64()).expect("a string takes it");
            }
        }
    }
}

fn cut(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(VALUE_BYTES_MAX)]
}

/// Leaves printable ASCII as it is, and writes everything else, quotes and backslashes as `\xHH`, as nginx does.
fn escape(bytes: &[u8], line: &mut String) {
    if bytes.is_empty() {
        line.push('-');
    }
    for byte in bytes {
        match byte {
            b'"' | b'\\' => write!(line, "\\x{byte:02X}").expect("a string takes it"),
            b' '..=b'~' => line.push(char::from(*byte)),
            _ => write!(line, "\\x{byte:02X}").expect("a string takes it"),
        }
    }
}

/// How much of one value is told, in bytes: paths and names of browsers fit, and no client fills a disk by one request.
pub(super) const VALUE_BYTES_MAX: usize = 2048;

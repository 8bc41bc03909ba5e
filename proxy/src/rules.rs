//! Header rules at work: what a route changes in the heads of its requests and of their answers.

use std::cell::RefCell;
use std::fmt::Write as _;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use mandoline::{Generation, SliceKey};
use mandoline_core::prng::Prng;

use crate::client::{Client, Host};
use crate::config::headers::{HeaderRules, Piece, Template, Value};
use crate::tls::terminator::Identity;

/// What templates may name of one request.
#[derive(Clone, Copy)]
pub(crate) struct Values<'a> {
    pub(crate) request_id: &'a HeaderValue,
    pub(crate) client: &'a Client,
    pub(crate) host: &'a Host,
    pub(crate) route: &'a str,
    pub(crate) key: Option<SliceKey>,
    pub(crate) translation: Option<&'a [u8]>,
    pub(crate) task: Option<&'a HeaderValue>,
    pub(crate) generation: Generation,
}

/// The rules of a route, ready for one worker.
pub(crate) struct Rules {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, Template)>,
}

impl Rules {
    pub(crate) fn new(rules: &HeaderRules) -> Self {
        let remove = rules.remove.iter().map(|name| name.0.clone()).collect();
        let set = rules.set.iter().map(|(name, value)| (name.0.clone(), value.clone())).collect();
        Self { remove, set }
    }

    /// Says whether a template names this value.
    pub(crate) fn name(&self, value: Value) -> bool {
        self.set.iter().any(|(_, template)| template.0.contains(&Piece::Value(value)))
    }

    /// Changes a head.
    pub(crate) fn apply(&self, headers: &mut HeaderMap, values: &Values<'_>) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, template) in &self.set {
            headers.insert(name.clone(), values.fill(template));
        }
    }
}

impl Values<'_> {
    fn fill(&self, template: &Template) -> HeaderValue {
        match &template.0[..] {
            [Piece::Value(Value::RequestId)] => return self.request_id.clone(),
            [Piece::Value(Value::Host)] => return self.host.0.clone(),
            [Piece::Value(Value::Task)] if let Some(task) = self.task => return task.clone(),
            _ => {}
        }
        let mut text = String::with_capacity(FILLED_BYTES);
        for piece in &template.0 {
            match piece {
                Piece::Text(plain) => text.push_str(plain),
                Piece::Value(value) => self.write(*value, &mut text),
            }
        }
        HeaderValue::from_maybe_shared(Bytes::from(text)).expect("every value fits a header")
    }

    fn write(&self, value: Value, text: &mut String) {
        let written = match value {
            Value::RequestId => text.write_str(visible(self.request_id)),
            Value::Client => write!(text, "{}", self.client.address().to_canonical()),
            Value::ClientSubject => {
                text.write_str(self.client.identity().map_or("", |identity| &identity.subject))
            }
            Value::ClientNames => {
                text.write_str(&self.client.identity().map_or_else(String::new, Identity::names))
            }
            Value::Host => text.write_str(visible(&self.host.0)),
            Value::Route => text.write_str(self.route),
            Value::Key => self.key.map_or(Ok(()), |key| write!(text, "{key}")),
            Value::Translation => write_held(self.translation.unwrap_or_default(), text),
            Value::Task => text.write_str(self.task.map_or("", visible)),
            Value::Generation => write!(text, "{}", self.generation),
        };
        written.expect("writing to a string does not fail");
    }
}

/// What most filled templates need: an address, a number of 32 digits.
const FILLED_BYTES: usize = 48;

/// Writes what may be any bytes, so that a header holds it and nothing is lost.
fn write_held(bytes: &[u8], text: &mut String) -> std::fmt::Result {
    bytes.iter().try_for_each(|&b| match b {
        b'%' | ..b' ' | 0x7f.. => write!(text, "%{b:02X}"),
        b => text.write_char(b.into()),
    })
}

fn visible(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or_default()
}

/// Numbers for requests, drawn by each worker for itself.
pub(crate) struct RequestIds(RefCell<Prng>);

impl RequestIds {
    /// Starts from a seed that no other worker has.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(RefCell::new(Prng::new(seed)))
    }

    /// Gives the number that the client sent, if it is one that can be passed on and logged; a new one if not.
    pub(crate) fn of(&self, headers: &HeaderMap) -> HeaderValue {
        let mut given = headers.get_all(&REQUEST_ID).iter();
        if let (Some(one), None) = (given.next(), given.next())
            && (1..=GIVEN_MAX_BYTES).contains(&one.len())
            && one.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:/+=".contains(b))
        {
            return one.clone();
        }
        let mut prng = self.0.borrow_mut();
        let text = format!("{:016x}{:016x}", prng.bits(), prng.bits());
        HeaderValue::from_maybe_shared(Bytes::from(text)).expect("digits fit a header")
    }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest number of a client that is passed on: twice what common tracers send.
const GIVEN_MAX_BYTES: usize = 128;

//! What a line of the access log says, and how: JSON, or a template with the names of fields in braces.
//!
//! Much of it was written by strangers. In a template whatever is not printable ASCII, and quotes and backslashes, become `\xHH`, and
//! in JSON they are escaped as JSON has it: nobody can forge a line or a field. A header is told of only where it is named, and so is
//! the query, for both may hold secrets.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::record::{Record, RequestInfo};

/// How much of one value is told, in bytes: paths and names of browsers fit, and no client fills a disk by one request.
const VALUE_BYTES_MAX: usize = 2048;

/// What a line of the access log says, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    pieces: Vec<Piece>,
    is_json: bool,
    // Those that are named, each once.
    headers: Vec<HeaderName>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(Box<str>),
    Field(Field),
}

/// Something to tell of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field(What);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plain {
    Time,
    Client,
    Method,
    Host,
    Path,
    Query,
    Protocol,
    Status,
    Outcome,
    Route,
    Job,
    Key,
    Generation,
    Task,
    Upstream,
    Tries,
    Held,
    UpstreamTime,
    Duration,
    BytesOut,
    Reason,
    Trace,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Plain(Plain),
    Header(HeaderName),
}

/// The fields by their names, in the order in which JSON has them. Headers are named as `header:NAME`.
const FIELDS: [(&str, Plain); 22] = [
    ("time", Plain::Time),
    ("client", Plain::Client),
    ("method", Plain::Method),
    ("host", Plain::Host),
    ("path", Plain::Path),
    ("query", Plain::Query),
    ("protocol", Plain::Protocol),
    ("status", Plain::Status),
    ("outcome", Plain::Outcome),
    ("route", Plain::Route),
    ("job", Plain::Job),
    ("key", Plain::Key),
    ("generation", Plain::Generation),
    ("task", Plain::Task),
    ("upstream", Plain::Upstream),
    ("tries", Plain::Tries),
    ("held", Plain::Held),
    ("upstream_time", Plain::UpstreamTime),
    ("duration", Plain::Duration),
    ("bytes_out", Plain::BytesOut),
    ("reason", Plain::Reason),
    ("trace", Plain::Trace),
];

/// Why a format cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It names a field that is not known.
    #[error(
        "the access log has no field {0:?}; known: {known}, and header:NAME",
        known = Field::names().collect::<Vec<_>>().join(", ")
    )]
    Unknown(String),
    /// It names a header that cannot be one.
    #[error("{0:?} is no name of a header")]
    Header(String),
    /// A brace has no partner.
    #[error("the format has a brace without its other half: a brace itself is written twice")]
    Brace,
    /// It would end lines, or do something to a terminal.
    #[error(
        "the format has a control character in it, such as the end of a line: each request has one line"
    )]
    Control,
    /// It tells nothing.
    #[error("the format names no field: give one at least, such as {{status}}")]
    Empty,
}

impl Field {
    /// Gives the names of all fields but headers.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FIELDS.iter().map(|(name, _)| *name)
    }
}

impl FromStr for Field {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        let short = || name.chars().take(80).collect::<String>();
        if let Some(header) = name.strip_prefix("header:") {
            let header = HeaderName::from_str(header).map_err(|_| FormatError::Header(short()))?;
            return Ok(Self(What::Header(header)));
        }
        let known = FIELDS.iter().find(|(known, _)| *known == name);
        known.map(|(_, what)| Self(What::Plain(*what))).ok_or_else(|| FormatError::Unknown(short()))
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            What::Header(name) => write!(f, "header:{name}"),
            What::Plain(what) => {
                let place = *what as usize;
                f.write_str(FIELDS[place].0)
            }
        }
    }
}

impl Format {
    /// A JSON object with all fields but the query and headers.
    pub fn usual() -> Self {
        let fields = FIELDS.iter().map(|(_, what)| *what).filter(|what| *what != Plain::Query);
        Self::json(fields.map(|what| Field(What::Plain(what))).collect()).expect("there are fields")
    }

    /// A JSON object with these fields.
    pub fn json(fields: Vec<Field>) -> Result<Self, FormatError> {
        Self::new(fields.into_iter().map(Piece::Field).collect(), true)
    }

    fn new(pieces: Vec<Piece>, is_json: bool) -> Result<Self, FormatError> {
        let mut headers: Vec<HeaderName> = Vec::new();
        let mut names_any = false;
        for piece in &pieces {
            names_any |= matches!(piece, Piece::Field(_));
            match piece {
                Piece::Field(Field(What::Header(name))) if !headers.contains(name) => {
                    headers.push(name.clone());
                }
                _ => {}
            }
        }
        if names_any { Ok(Self { pieces, is_json, headers }) } else { Err(FormatError::Empty) }
    }

    /// Takes from a request what has to be kept of its headers.
    pub(crate) fn headers(&self, of: &HeaderMap) -> Vec<Option<HeaderValue>> {
        self.headers.iter().map(|name| of.get(name).cloned()).collect()
    }

    /// Makes the line of a request that ended `now`.
    pub(crate) fn line(&self, record: &Record, request: &RequestInfo, now: SystemTime) -> String {
        let told = Told { format: self, record, request, now };
        let mut line = String::with_capacity(256);
        if self.is_json {
            line.push('{');
            for (n, piece) in self.pieces.iter().enumerate() {
                let Piece::Field(field) = piece else { continue };
                let comma = if n == 0 { "" } else { "," };
                let value = told.value(field).to_json();
                write!(line, "{comma}\"{field}\":{value}").expect("a string takes it");
            }
            line.push('}');
        } else {
            for piece in &self.pieces {
                match piece {
                    Piece::Text(text) => line.push_str(text),
                    Piece::Field(field) => told.value(field).write(&mut line),
                }
            }
        }
        line
    }
}

/// A template: text with `{FIELD}` in it; a brace itself is written twice.
impl FromStr for Format {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        if text.contains(char::is_control) {
            return Err(FormatError::Control);
        }
        let mut pieces = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                plain.push_str(brace);
                rest = after;
                continue;
            }
            let (name, after) =
                rest.split_once('}').filter(|_| brace == "{").ok_or(FormatError::Brace)?;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain).into()));
            }
            pieces.push(Piece::Field(name.parse()?));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain.into()));
        }
        Self::new(pieces, false)
    }
}

/// One request that a line is to tell of.
struct Told<'a> {
    format: &'a Format,
    record: &'a Record,
    request: &'a RequestInfo,
    now: SystemTime,
}

/// What a field comes to.
enum Said<'a> {
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
    fn value(&self, field: &Field) -> Said<'a> {
        let (record, request) = (self.record, self.request);
        let own = |text: String| Said::Plain(Cow::Owned(text));
        let what = match &field.0 {
            What::Plain(what) => *what,
            What::Header(name) => {
                let place = self.format.headers.iter().position(|known| known == name);
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
    fn to_json(&self) -> Value {
        match self {
            Self::Nothing => Value::Null,
            Self::Plain(text) => Value::from(text.as_ref()),
            Self::Strange(bytes) => Value::from(String::from_utf8_lossy(cut(bytes))),
            Self::Number(number) => Value::from(*number),
            Self::Seconds(length) => Value::from(length.as_micros() as f64 / 1e6),
        }
    }

    fn write(&self, line: &mut String) {
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

/// As RFC 3339 has it, in UTC, to the millisecond.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, millis) = (since.as_secs(), since.subsec_millis());
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Gives the year, month and day of a day since 1970, by the calendar's cycle of 400 years that begin in March (Hinnant,
/// "chrono-compatible low-level date algorithms").
const fn date(days: u64) -> (u64, u64, u64) {
    // From the first of March of the year 0.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + (month <= 2) as u64, month, day)
}

#[cfg(test)]
mod tests {
    use http::Request;
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::task::SessionId;

    use super::*;
    use crate::record::Outcome;

    fn record() -> Record {
        Record {
            route: Some("carts".into()),
            key: Some(SliceKey(0xab)),
            generation: Generation { incarnation: 1, number: 42 },
            first: Some(SessionId(7)),
            last: Some(SessionId(8)),
            first_try_right: false,
            tries: 2,
            status: Some(200),
            outcome: Outcome::Answered,
            held: Duration::from_millis(1_500),
            upstream: Duration::from_micros(250),
            duration: Duration::from_secs(2),
            bytes_out: 512,
        }
    }

    fn line(format: &Format, record: &Record, change: impl FnOnce(&mut RequestInfo)) -> String {
        let head = Request::get("/carts/1?token=secret")
            .header("host", "shop.example.com")
            .header("cookie", "session=secret")
            .header("user-agent", "a \"b\"\\c");
        let (mut head, ()) = head.body(()).unwrap().into_parts();
        head.headers.insert("x-strange", HeaderValue::from_bytes(b"a\xffb\tc").unwrap());
        let mut request =
            RequestInfo::of("10.0.0.1".parse().unwrap(), &head, format.headers(&head.headers));
        request.job = Some("carts".parse().unwrap());
        request.address = Some("10.0.0.2:80".parse().unwrap());
        change(&mut request);
        let now = UNIX_EPOCH + Duration::from_millis(1_753_000_002_345);
        format.line(record, &request, now)
    }

    #[test]
    fn json_has_all_but_what_may_be_secret() {
        let line =
            line(&Format::usual(), &record(), |request| request.trace = Some("4b".to_owned()));
        let expected = r#"{"time":"2025-07-20T08:26:40.345Z","client":"10.0.0.1","method":"GET","host":"shop.example.com","path":"/carts/1","protocol":"HTTP/1.1","status":200,"outcome":"answered","route":"carts","job":"carts","key":"00000000000000ab","generation":"1.42","task":"s8","upstream":"10.0.0.2:80","tries":2,"held":1.5,"upstream_time":0.00025,"duration":2.0,"bytes_out":512,"reason":null,"trace":"4b"}"#;
        assert_eq!(line, expected);
        assert!(!line.contains("secret"));
        assert!(serde_json::from_str::<Value>(&line).is_ok());
    }

    #[test]
    fn a_template_tells_what_it_names() {
        let format: Format =
            "{client} \"{method} {path}?{query}\" {status} {{{header:user-agent}}} {held} {reason}"
                .parse()
                .unwrap();
        let expected =
            "10.0.0.1 \"GET /carts/1?token=secret\" 200 {a \\x22b\\x22\\x5Cc} 1.500000 -";
        assert_eq!(line(&format, &record(), |_| {}), expected);
    }

    #[test]
    fn no_client_can_forge_a_line_or_a_field() {
        let evil = "x\r\n127.0.0.1 \"GET /admin\" 200\u{2028}\u{1b}[2J\"";
        let change = |request: &mut RequestInfo| request.reason = Some(evil.to_owned());
        for format in ["{reason} {header:x-strange}".parse().unwrap(), {
            let fields = ["reason", "header:x-strange"].map(|name| name.parse().unwrap());
            Format::json(fields.to_vec()).unwrap()
        }] {
            let line = line(&format, &record(), change);
            let tame = |c: char| !c.is_control();
            assert!(line.chars().all(tame), "{line:?}");
            if format.is_json {
                let value: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(value["reason"], evil);
                assert_eq!(value["header:x-strange"], "a\u{fffd}b\tc");
            } else {
                let expected = "x\\x0D\\x0A127.0.0.1 \\x22GET /admin\\x22 200\\xE2\\x80\\xA8\\x1B[2J\\x22 a\\xFFb\\x09c";
                assert_eq!(line, expected);
            }
        }
        let long = line(&"{reason}".parse().unwrap(), &record(), |request| {
            request.reason = Some("x".repeat(1 << 20));
        });
        assert_eq!(long.len(), VALUE_BYTES_MAX);
    }

    #[test]
    fn what_is_not_known_is_a_dash_or_null() {
        let none = Record {
            route: None,
            key: None,
            first: None,
            last: None,
            status: None,
            outcome: Outcome::Abandoned,
            ..record()
        };
        let format = "{status} {route} {key} {generation} {task} {header:x-not-there}";
        assert_eq!(line(&format.parse().unwrap(), &none, |_| {}), "- - - - - -");
    }

    #[test]
    fn a_format_that_cannot_be_is_refused() {
        for (format, error) in [
            ("{staus}", FormatError::Unknown("staus".to_owned())),
            ("{header:a b}", FormatError::Header("header:a b".to_owned())),
            ("{status", FormatError::Brace),
            ("status}", FormatError::Brace),
            ("a\n{status}", FormatError::Control),
            ("status", FormatError::Empty),
            ("", FormatError::Empty),
        ] {
            assert_eq!(format.parse::<Format>(), Err(error), "{format}");
        }
        for (place, (name, what)) in FIELDS.iter().enumerate() {
            assert_eq!(*what as usize, place, "{name}");
            assert_eq!(name.parse::<Field>().unwrap().to_string(), *name);
        }
        let page = include_str!("../../../docs/proxy.md");
        for name in Field::names() {
            assert!(page.contains(&format!("`{name}`")), "docs/proxy.md does not name {name}");
        }
    }

    #[test]
    fn days_have_dates() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (20_453, (2025, 12, 31)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
    }
}

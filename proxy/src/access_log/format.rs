//! What a line of the access log says, and how: JSON, or a template with the names of fields in braces.
//!
//! Much of it was written by strangers. In a template whatever is not printable ASCII, and quotes and backslashes, become `\xHH`, and
//! in JSON they are escaped as JSON has it: nobody can forge a line or a field. A header is told of only where it is named, and so is
//! the query, for both may hold secrets.

use std::fmt::Write;
use std::str::FromStr;
use std::time::SystemTime;

use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::access_log::field::{FIELDS, Field, FormatError, Plain, What};
use crate::access_log::value::Told;
use crate::record::{Record, RequestInfo};

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
        let told = Told { headers: &self.headers, record, request, now };
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use http::Request;
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::task::SessionId;

    use serde_json::Value;

    use super::*;
    use crate::access_log::value::VALUE_BYTES_MAX;
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
}

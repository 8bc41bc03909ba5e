//! A line of a web server's access log, common or combined, as Apache and nginx write it:
//!
//! ```text
//! host ident user [10/Oct/2000:13:55:36 -0700] "GET /path?query HTTP/1.0" 200 2326 "referer" "agent"
//! ```
//!
//! Referer and agent are the combined form's; fields after them are ignored. Text is unescaped (`\"`, `\\`, `\xhh`), and
//! what is not UTF-8 after that is replaced, so that a crawler's odd bytes cost one odd key and not a line.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use mandoline_core::key::KEY_MAX_BYTES;

/// Which part of a log line is the key. Its text forms are what `--key` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyPart {
    /// `path`: the path without its query.
    Path,
    /// `path:N`: a segment of the path, counted from 0 as the proxy counts: `path:1` of `/kv/apple` is `apple`.
    Segment(u8),
    /// `target`: the path with its query.
    Target,
    /// `query:NAME`: the first value of a query parameter, still percent-encoded.
    Query(Box<str>),
    /// `host`: the client's address.
    Host,
    /// `user`: the authenticated user.
    User,
    /// `referer`: the page that the request came from (combined logs).
    Referer,
    /// `agent`: the client program (combined logs).
    Agent,
}

/// Why a text names no part of a log line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no part of a log line: give path, path:N (a segment, from 0), target, query:NAME, host, user, referer or agent"
)]
pub struct KeyPartError(String);

impl FromStr for KeyPart {
    type Err = KeyPartError;

    fn from_str(text: &str) -> Result<Self, KeyPartError> {
        let bad = || KeyPartError(text.to_owned());
        match text.split_once(':') {
            None => match text {
                "path" => Ok(Self::Path),
                "target" => Ok(Self::Target),
                "host" => Ok(Self::Host),
                "user" => Ok(Self::User),
                "referer" => Ok(Self::Referer),
                "agent" => Ok(Self::Agent),
                _ => Err(bad()),
            },
            Some(("path", number)) if !number.starts_with('+') => {
                number.parse().map(Self::Segment).map_err(|_| bad())
            }
            Some(("query", name)) if !name.is_empty() => Ok(Self::Query(name.into())),
            Some(_) => Err(bad()),
        }
    }
}

impl fmt::Display for KeyPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("path"),
            Self::Segment(number) => write!(f, "path:{number}"),
            Self::Target => f.write_str("target"),
            Self::Query(name) => write!(f, "query:{name}"),
            Self::Host => f.write_str("host"),
            Self::User => f.write_str("user"),
            Self::Referer => f.write_str("referer"),
            Self::Agent => f.write_str("agent"),
        }
    }
}

/// What is wrong with a line of an access log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogProblem {
    /// A field was missing, or not where it belongs.
    #[error(
        "{0} is missing: a line is `host ident user [day/month/year:h:m:s zone] \"request\" status bytes`"
    )]
    Missing(&'static str),
    /// The time was none.
    #[error("the time {0:?} is none: it reads like 10/Oct/2000:13:55:36 -0700")]
    Time(String),
    /// The status was no number from 100 to 999.
    #[error("the status {0:?} is no number from 100 to 999")]
    Status(String),
    /// The size was neither `-` nor a whole number.
    #[error("the size {0:?} is neither - nor a whole number of bytes")]
    Bytes(String),
    /// The key was too long.
    #[error("the key is {0} bytes long: the most is {KEY_MAX_BYTES}")]
    Key(usize),
}

/// What a line of an access log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// When the request came, since 1970.
    pub at: Duration,
    /// The part that was asked for; `None` where the line has none, such as a user who was not logged in.
    pub key: Option<Box<str>>,
    /// How many bytes were sent.
    pub bytes: Option<u64>,
}

/// Reads one line, with `part` of it for its key.
pub fn parse(line: &[u8], part: &KeyPart) -> Result<LogLine, LogProblem> {
    let (head, rest) = split_at(line, b'[').ok_or(LogProblem::Missing("[the time]"))?;
    let (time, rest) = split_at(rest, b']').ok_or(LogProblem::Missing("the end of [the time]"))?;
    let at = parse_time(time)
        .ok_or_else(|| LogProblem::Time(String::from_utf8_lossy(time).into_owned()))?;

    let (host, user) =
        split_at(head.trim_ascii(), b' ').ok_or(LogProblem::Missing("ident or user"))?;
    let (_ident, user) = split_at(user.trim_ascii(), b' ').ok_or(LogProblem::Missing("user"))?;

    let (request, rest) = quoted(rest).ok_or(LogProblem::Missing("\"the request\""))?;
    let (status, rest) = word(rest).ok_or(LogProblem::Missing("the status"))?;
    let known = status.len() == 3 && status.iter().all(u8::is_ascii_digit) && status[0] != b'0';
    if !known {
        return Err(LogProblem::Status(String::from_utf8_lossy(status).into_owned()));
    }
    let (bytes, rest) = word(rest).ok_or(LogProblem::Missing("the size"))?;
    let bytes = match bytes {
        b"-" => None,
        digits => {
            let digits = String::from_utf8_lossy(digits);
            Some(digits.parse().map_err(|_| LogProblem::Bytes(digits.into_owned()))?)
        }
    };

    let key = match part {
        KeyPart::Host => Some(host.to_vec()),
        KeyPart::User => Some(unescape(user.trim_ascii())),
        KeyPart::Referer => quoted(rest).map(|(referer, _)| unescape(referer)),
        KeyPart::Agent => {
            quoted(rest).and_then(|(_, rest)| quoted(rest)).map(|(agent, _)| unescape(agent))
        }
        KeyPart::Path | KeyPart::Segment(_) | KeyPart::Target | KeyPart::Query(_) => {
            of_target(&unescape(request), part)
        }
    };
    let key = key.filter(|key| !key.is_empty() && key != b"-");
    let key: Option<Box<str>> = key.map(|key| String::from_utf8_lossy(&key).into());
    match key {
        Some(ref key) if key.len() > KEY_MAX_BYTES => Err(LogProblem::Key(key.len())),
        key => Ok(LogLine { at, key, bytes }),
    }
}

/// Finds a part of `GET /path?query HTTP/1.1`; `None` if the request has no such part.
fn of_target(request: &[u8], part: &KeyPart) -> Option<Vec<u8>> {
    let (_method, rest) = split_at(request, b' ')?;
    // HTTP/0.9 has no version; a target with a space in it is not cut short.
    let target = match rest.iter().rposition(|b| *b == b' ') {
        Some(space) if rest[space + 1..].starts_with(b"HTTP/") => &rest[..space],
        _ => rest,
    };
    let (path, query) = split_at(target, b'?').unwrap_or((target, b""));
    match part {
        KeyPart::Target => Some(target.to_vec()),
        KeyPart::Path => Some(path.to_vec()),
        KeyPart::Segment(number) => {
            let mut segments = path.strip_prefix(b"/")?.split(|b| *b == b'/');
            segments.nth(usize::from(*number)).map(<[u8]>::to_vec)
        }
        KeyPart::Query(name) => {
            let mut pairs = query.split(|b| *b == b'&').filter_map(|pair| split_at(pair, b'='));
            pairs.find(|(key, _)| *key == name.as_bytes()).map(|(_, value)| value.to_vec())
        }
        KeyPart::Host | KeyPart::User | KeyPart::Referer | KeyPart::Agent => None,
    }
}

fn split_at(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|b| *b == separator)?;
    Some((&text[..at], &text[at + 1..]))
}

/// Takes what stands up to the next blank.
fn word(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.trim_ascii_start();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// Takes what stands in the next pair of quotes, still escaped.
fn quoted(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.trim_ascii_start().strip_prefix(b"\"")?;
    let mut escaped = false;
    let end = text.iter().position(|b| {
        let ends = *b == b'"' && !escaped;
        escaped = *b == b'\\' && !escaped;
        ends
    })?;
    Some((&text[..end], &text[end + 1..]))
}

/// Undoes `\"`, `\\` and `\xhh`, which Apache and nginx write for what would break a line.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let hex = |digit: &u8| char::from(*digit).to_digit(16);
        rest = match (first, tail) {
            (b'\\', [b'x', high, low, tail @ ..]) if hex(high).is_some() && hex(low).is_some() => {
                out.push((hex(high).unwrap_or(0) * 16 + hex(low).unwrap_or(0)) as u8);
                tail
            }
            (b'\\', [second @ (b'"' | b'\\'), tail @ ..]) => {
                out.push(*second);
                tail
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

/// Reads `10/Oct/2000:13:55:36 -0700` as the time since 1970; `None` before that, or if it is no time.
fn parse_time(text: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(text).ok()?;
    let (date, zone) = text.split_once(' ')?;
    let fields: Vec<&str> = date.split(['/', ':']).collect();
    let [day, month, year, hour, minute, second] = fields[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)?;
    let year = number(year, 4)?;
    let day = Some(number(day, 2)?).filter(|day| (1..=days_in(year, month)).contains(day))?;
    let (hour, minute) = (
        Some(number(hour, 2)?).filter(|h| *h < 24)?,
        Some(number(minute, 2)?).filter(|m| *m < 60)?,
    );
    // 60 is a leap second, which 1970's count does not know: it falls on the next one.
    let second = Some(number(second, 2)?).filter(|second| *second <= 60)?;

    let local = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    u64::try_from(local - parse_zone(zone)?).ok().map(Duration::from_secs)
}

/// Reads `-0700` as seconds east of Greenwich.
fn parse_zone(text: &str) -> Option<i64> {
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let hhmm = number(digits, 4)?;
    // The farthest zone is +14:00, and RFC 5322 allows up to 23:59.
    (hhmm / 100 < 24 && hhmm % 100 < 60).then(|| sign * (hhmm / 100 * 3_600 + hhmm % 100 * 60))
}

fn number(text: &str, digits: usize) -> Option<i64> {
    let right = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
    right.then(|| text.parse().ok()).flatten()
}

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const DAYS: [i64; 12] = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: usize) -> i64 {
    DAYS[month] + i64::from(month == 1 && is_leap(year))
}

/// Counts the days of the Gregorian calendar; months from 0, days from 1.
fn days_since_1970(year: i64, month: usize, day: i64) -> i64 {
    // Leap days before a year: those of all years that ended.
    let leap_days = |year: i64| (year - 1) / 4 - (year - 1) / 100 + (year - 1) / 400;
    let months: i64 = (0..month).map(|month| days_in(year, month)).sum();
    (year - 1970) * 365 + leap_days(year) - leap_days(1970) + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMON: &str = r#"127.0.0.1 - frank [10/Oct/2000:13:55:36 -0700] "GET /a/b.gif?x=1&id=7 HTTP/1.0" 200 2326"#;

    fn key(line: &str, part: &str) -> Option<String> {
        let line = parse(line.as_bytes(), &part.parse().unwrap()).unwrap();
        line.key.map(String::from)
    }

    fn seconds(text: &str) -> Option<u64> {
        parse_time(text.as_bytes()).map(|at| at.as_secs())
    }

    #[test]
    fn times_are_read_over_leap_years_and_zones() {
        // Expected by `date -ud ... +%s`.
        for (text, expected) in [
            ("01/Jan/1970:00:00:00 +0000", 0),
            ("10/Oct/2000:13:55:36 -0700", 971_211_336),
            ("29/Feb/2000:23:59:59 +0000", 951_868_799),
            ("01/Mar/2000:00:00:00 +0000", 951_868_800),
            ("29/Feb/2024:12:00:00 +0530", 1_709_188_200),
            ("31/Dec/2023:23:59:60 +0000", 1_704_067_200),
            ("01/Mar/2100:00:00:00 +0000", 4_107_542_400),
            ("01/Jan/2025:00:30:00 +0100", 1_735_687_800),
        ] {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in [
            "29/Feb/2100:00:00:00 +0000",
            "31/Apr/2001:00:00:00 +0000",
            "00/Jan/2001:00:00:00 +0000",
            "10/oct/2000:13:55:36 -0700",
            "10/Oct/2000:24:00:00 -0700",
            "10/Oct/2000:13:60:00 -0700",
            "10/Oct/2000:13:55:61 -0700",
            "10/Oct/2000:13:55:36",
            "10/Oct/2000:13:55:36 0700",
            "10/Oct/2000:13:55:36 -7000",
            "10/Oct/2000:13:55 -0700",
            "+1/Oct/2000:13:55:36 -0700",
            "31/Dec/1969:00:00:00 +0000",
            "",
        ] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_part_of_a_line_can_be_the_key() {
        let combined = format!(r#"{COMMON} "http://ref/" "Mozilla \"4\" \\ \x41" "extra""#);
        for (part, expected) in [
            ("path", Some("/a/b.gif")),
            ("path:0", Some("a")),
            ("path:1", Some("b.gif")),
            ("path:2", None),
            ("target", Some("/a/b.gif?x=1&id=7")),
            ("query:id", Some("7")),
            ("query:i", None),
            ("host", Some("127.0.0.1")),
            ("user", Some("frank")),
            ("referer", Some("http://ref/")),
            ("agent", Some(r#"Mozilla "4" \ A"#)),
        ] {
            assert_eq!(key(&combined, part).as_deref(), expected, "{part}");
            assert_eq!(part.parse::<KeyPart>().unwrap().to_string(), part);
        }
        assert_eq!(key(COMMON, "referer"), None);
        for bad in ["", "paths", "path:+1", "path:x", "path:256", "query:", "host:1", "method"] {
            assert!(bad.parse::<KeyPart>().is_err(), "{bad}");
        }
    }

    #[test]
    fn odd_requests_are_read_as_far_as_they_go() {
        let line =
            |request: &str| format!(r#"::1 - - [10/Oct/2000:13:55:36 -0700] "{request}" 408 -"#);
        assert_eq!(key(&line("-"), "path"), None);
        assert_eq!(key(&line(""), "path"), None);
        assert_eq!(key(&line("GET /old"), "path").as_deref(), Some("/old"));
        assert_eq!(key(&line("GET /a b HTTP/1.0"), "path").as_deref(), Some("/a b"));
        assert_eq!(key(&line(r"GET /\xff HTTP/1.0"), "path").as_deref(), Some("/\u{FFFD}"));
        assert_eq!(key(&line("-"), "host").as_deref(), Some("::1"));
        assert_eq!(
            key(r#"h - a b [10/Oct/2000:13:55:36 -0700] "" 200 1"#, "user").as_deref(),
            Some("a b")
        );
        assert_eq!(key(&line("GET / HTTP/1.0"), "user"), None);
    }

    #[test]
    fn what_is_wrong_with_a_line_is_named() {
        let check = |line: &str| parse(line.as_bytes(), &KeyPart::Path).unwrap_err();
        assert_eq!(check("0 key 1"), LogProblem::Missing("[the time]"));
        assert_eq!(check("h [x"), LogProblem::Missing("the end of [the time]"));
        assert_eq!(check("h - - [x] \"\" 200 1"), LogProblem::Time("x".into()));
        let with = |tail: &str| format!("h - - [10/Oct/2000:13:55:36 -0700] {tail}");
        assert_eq!(check("h [10/Oct/2000:13:55:36 -0700]"), LogProblem::Missing("ident or user"));
        assert_eq!(check(&with("GET")), LogProblem::Missing("\"the request\""));
        assert_eq!(check(&with("\"GET / 200 1")), LogProblem::Missing("\"the request\""));
        assert_eq!(check(&with("\"GET /\"")), LogProblem::Missing("the status"));
        assert_eq!(check(&with("\"GET /\" 2000 1")), LogProblem::Status("2000".into()));
        assert_eq!(check(&with("\"GET /\" 200")), LogProblem::Missing("the size"));
        assert_eq!(check(&with("\"GET /\" 200 -1")), LogProblem::Bytes("-1".into()));
        let long = with(&format!("\"GET /{}\" 200 1", "k".repeat(9_000)));
        assert_eq!(check(&long), LogProblem::Key(9_001));
    }
}

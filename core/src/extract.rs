//! Where the key is in a request: one place, named by the operator. Pure, over borrowed parts, so that the proxy, a task
//! that checks what it was sent and a tool that replays a log all find the same key.
//!
//! A request says its key once or it is refused: with two keys, a proxy and the task behind it could each take another.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use crate::key::KEY_MAX_BYTES;

/// The longest name of a header, cookie or query parameter, in bytes: the same as a label, long enough for any in use.
pub const SOURCE_NAME_MAX_BYTES: usize = 128;
/// The last path segment that may be asked for: deeper paths are rare, and each segment costs a scan.
pub const SEGMENT_MAX: u8 = 63;

/// The part of a request that is the key.
///
/// Its text form is what flags and configuration hold: `path:1`, `header:x-shard-key`, `cookie:session`, `query:user`,
/// `host`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Extract {
    /// A segment of the path, counted from 0: segment 1 of `/kv/apple` is `apple`. Percent-decoded.
    Path(u8),
    /// The value of a header, as it stands. The name is in lower case.
    Header(Box<str>),
    /// The value of a cookie, as it stands.
    Cookie(Box<str>),
    /// The value of a query parameter, form-decoded: `%20` and `+` are spaces.
    Query(Box<str>),
    /// The host that was asked for, in lower case and without a port.
    Host,
}

/// A request's parts, borrowed from wherever the caller has them.
#[derive(Debug)]
pub struct Parts<'a, H: ?Sized> {
    /// The path, undecoded, with its leading `/`.
    pub path: &'a str,
    /// What follows the `?`, undecoded.
    pub query: Option<&'a str>,
    /// The authority of the request target or else the `Host` header, with or without a port.
    pub host: Option<&'a str>,
    /// Looks up headers.
    pub headers: &'a H,
}

/// Looks up the headers of a request.
pub trait Headers {
    /// Gives every value of the header called `name` (in lower case), in order, one for each line.
    fn values<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a [u8]>;
}

/// A short list of headers is good enough for tests and logs.
impl Headers for [(&str, &str)] {
    fn values<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(other, _)| other.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_bytes())
    }
}

/// Why a request has no usable key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Miss {
    /// The part is not there.
    #[error("the request has no key")]
    NoKey,
    /// The part is there and holds nothing.
    #[error("the key is empty")]
    Empty,
    /// The part is there more than once, so that the proxy and the task might not take the same one.
    #[error("the request has more than one key")]
    Twice,
    /// It is longer than `KEY_MAX_BYTES`.
    #[error("the key is {0} bytes long: at most {KEY_MAX_BYTES} are allowed")]
    TooLong(usize),
    /// A `%` is not followed by two hex digits.
    #[error("the key has a % at byte {0} that two hex digits do not follow: write % itself as %25")]
    Encoding(usize),
    /// It is in a token or a body that cannot be read.
    #[error("the key is in a token or a body that cannot be read")]
    Unreadable,
    /// It is in a body that is longer than what is read to find it.
    #[error(
        "the key is in a body of more than {0} bytes: send a shorter one, or the key elsewhere"
    )]
    LongBody(usize),
}

impl Extract {
    /// Decodes a segment of a path.
    pub(crate) fn decoded(segment: &str) -> Result<Cow<'_, [u8]>, Miss> {
        decode(segment, Plus::IsPlus)
    }

    /// Finds the key. Allocates only if there is something to decode.
    pub fn key<'a, H: Headers + ?Sized>(
        &self,
        parts: &Parts<'a, H>,
    ) -> Result<Cow<'a, [u8]>, Miss> {
        let key = match self {
            Self::Path(n) => decode(segment(parts.path, *n).ok_or(Miss::NoKey)?, Plus::IsPlus)?,
            Self::Header(name) => Cow::Borrowed(only(parts.headers.values(name))?.trim_ascii()),
            Self::Cookie(name) => Cow::Borrowed(cookie(parts.headers, name)?),
            Self::Query(name) => {
                decode(parameter(parts.query.ok_or(Miss::NoKey)?, name)?, Plus::IsSpace)?
            }
            Self::Host => host(parts.host.ok_or(Miss::NoKey)?),
        };
        match key.len() {
            0 => Err(Miss::Empty),
            1..=KEY_MAX_BYTES => Ok(key),
            long => Err(Miss::TooLong(long)),
        }
    }

    /// Says in words where the key is expected, to finish the sentence "the key is".
    pub fn describe(&self) -> String {
        match self {
            Self::Path(n) => {
                let before: String = (0..*n).map(|n| format!("/{n}")).collect();
                format!("segment {n} of the path, counted from 0, as in {before}/KEY")
            }
            Self::Header(name) => format!("the value of the header {name}"),
            Self::Cookie(name) => format!("the value of the cookie {name}"),
            Self::Query(name) => {
                format!("the value of the query parameter {name}, as in ?{name}=KEY")
            }
            Self::Host => "the host that is asked for".to_owned(),
        }
    }
}

fn only<T>(mut found: impl Iterator<Item = T>) -> Result<T, Miss> {
    let first = found.next().ok_or(Miss::NoKey)?;
    match found.next() {
        None => Ok(first),
        Some(_) => Err(Miss::Twice),
    }
}

fn segment(path: &str, n: u8) -> Option<&str> {
    path.strip_prefix('/')?.split('/').nth(usize::from(n))
}

fn cookie<'a, H: Headers + ?Sized>(headers: &'a H, name: &str) -> Result<&'a [u8], Miss> {
    let pairs = headers.values("cookie").flat_map(|line| line.split(|b| *b == b';'));
    only(pairs.filter_map(|pair| {
        let at = pair.iter().position(|b| *b == b'=')?;
        (pair[..at].trim_ascii() == name.as_bytes()).then(|| pair[at + 1..].trim_ascii())
    }))
}

fn parameter<'a>(query: &'a str, name: &str) -> Result<&'a str, Miss> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    // A name may be encoded too: `us%65r` is `user` to the task, so it is here.
    let same = |written: &str| {
        written == name
            || decode(written, Plus::IsSpace).is_ok_and(|plain| *plain == *name.as_bytes())
    };
    only(pairs.filter(|(written, _)| same(written)).map(|(_, value)| value))
}

fn host(authority: &str) -> Cow<'_, [u8]> {
    let without_user = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match without_user.rfind(']') {
        Some(end) => &without_user[..=end],
        None => without_user.split_once(':').map_or(without_user, |(host, _)| host),
    };
    // `example.com.` is `example.com` to the resolver, so it is here.
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase().into_bytes())
    } else {
        Cow::Borrowed(host.as_bytes())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Plus {
    IsPlus,
    IsSpace,
}

fn decode(text: &str, plus: Plus) -> Result<Cow<'_, [u8]>, Miss> {
    let bytes = text.as_bytes();
    let coded = |b: &u8| *b == b'%' || (*b == b'+' && plus == Plus::IsSpace);
    let Some(first) = bytes.iter().position(coded) else { return Ok(Cow::Borrowed(bytes)) };
    let mut plain = Vec::with_capacity(bytes.len());
    plain.extend_from_slice(&bytes[..first]);
    let mut at = first;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'%' => {
                let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
                let pair = digit(at + 1).zip(digit(at + 2)).ok_or(Miss::Encoding(at))?;
                plain.push((pair.0 * 16 + pair.1) as u8);
                at += 3;
            }
            b'+' if plus == Plus::IsSpace => {
                plain.push(b' ');
                at += 1;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    Ok(Cow::Owned(plain))
}

impl fmt::Display for Extract {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(n) => write!(f, "path:{n}"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
            Self::Query(name) => write!(f, "query:{name}"),
            Self::Host => f.write_str("host"),
        }
    }
}

/// Why a text does not say where a key is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtractError {
    /// It begins with none of the words that are known.
    #[error("{0:?} is no key source: give path:1, header:NAME, cookie:NAME, query:NAME or host")]
    Source(String),
    /// The segment was no number, or too great a one.
    #[error(
        "{0:?} is no path segment: give 0 to {SEGMENT_MAX}, counted from 0, so that path:1 is KEY in /kv/KEY"
    )]
    Segment(String),
    /// The name was empty, too long, or held what such a name cannot hold.
    #[error(
        "{name:?} is no {source_kind} name: give 1 to {SOURCE_NAME_MAX_BYTES} letters, digits or any of !#$%&'*+-.^_`|~"
    )]
    Name {
        /// `header`, `cookie` or `query`.
        source_kind: &'static str,
        /// The name as given.
        name: String,
    },
}

impl FromStr for Extract {
    type Err = ExtractError;

    fn from_str(text: &str) -> Result<Self, ExtractError> {
        let short = |text: &str| text.chars().take(2 * SOURCE_NAME_MAX_BYTES).collect::<String>();
        if text == "host" {
            return Ok(Self::Host);
        }
        let (source, rest) =
            text.split_once(':').ok_or_else(|| ExtractError::Source(short(text)))?;
        let name = |source_kind, well_formed: fn(u8) -> bool| {
            let good =
                (1..=SOURCE_NAME_MAX_BYTES).contains(&rest.len()) && rest.bytes().all(well_formed);
            if good { Ok(rest) } else { Err(ExtractError::Name { source_kind, name: short(rest) }) }
        };
        match source {
            "path" => {
                let digits = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit());
                let segment = rest.parse().ok().filter(|n| digits && *n <= SEGMENT_MAX);
                segment.map(Self::Path).ok_or_else(|| ExtractError::Segment(short(rest)))
            }
            "header" => Ok(Self::Header(name("header", is_token)?.to_ascii_lowercase().into())),
            "cookie" => Ok(Self::Cookie(name("cookie", is_token)?.into())),
            "query" => Ok(Self::Query(
                name("query", |b| b.is_ascii_graphic() && !b"&=#?\"<>".contains(&b))?.into(),
            )),
            _ => Err(ExtractError::Source(short(text))),
        }
    }
}

/// What HTTP allows in the name of a header or a cookie (RFC 9110, 5.6.2).
const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
}

#[cfg(test)]
mod tests {
    use super::*;

    type Lines<'a> = &'a [(&'a str, &'a str)];

    fn check(source: &str, target: &str, headers: Lines<'_>, wanted: Result<&str, Miss>) {
        let (path, query) =
            target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let host = headers.iter().find(|(name, _)| *name == "host").map(|(_, value)| *value);
        let found = source.parse::<Extract>().unwrap().key(&Parts { path, query, host, headers });
        let found = found.map(|key| String::from_utf8(key.into_owned()).unwrap());
        assert_eq!(found, wanted.map(str::to_owned), "{source} of {target} {headers:?}");
    }

    #[test]
    fn a_path_segment_is_a_key() {
        let cases = [
            ("path:0", "/kv/apple", Ok("kv")),
            ("path:1", "/kv/apple", Ok("apple")),
            ("path:1", "/kv/apple/", Ok("apple")),
            ("path:1", "/kv/a%2Fb%20c", Ok("a/b c")),
            ("path:1", "/kv/%E2%98%83", Ok("\u{2603}")),
            ("path:1", "/kv/a+b", Ok("a+b")),
            ("path:1", "/kv/..", Ok("..")),
            ("path:2", "/kv/apple", Err(Miss::NoKey)),
            ("path:0", "*", Err(Miss::NoKey)),
            ("path:0", "", Err(Miss::NoKey)),
            ("path:1", "/kv/", Err(Miss::Empty)),
            ("path:1", "/kv//apple", Err(Miss::Empty)),
            ("path:1", "/kv/ab%2", Err(Miss::Encoding(2))),
            ("path:1", "/kv/%zz", Err(Miss::Encoding(0))),
            ("path:1", "/kv/%", Err(Miss::Encoding(0))),
            ("path:1", "/kv/%+1", Err(Miss::Encoding(0))),
        ];
        for (source, target, wanted) in cases {
            check(source, target, &[], wanted);
        }
    }

    #[test]
    fn a_query_parameter_is_a_key() {
        let cases = [
            ("/?user=7", Ok("7")),
            ("/?a=1&user=x+y%2B&b", Ok("x y+")),
            ("/?us%65r=7", Ok("7")),
            ("/?user=a=b", Ok("a=b")),
            ("/?%zz=1&user=7", Ok("7")),
            ("/?users=7", Err(Miss::NoKey)),
            ("/", Err(Miss::NoKey)),
            ("/?user", Err(Miss::Empty)),
            ("/?user=", Err(Miss::Empty)),
            ("/?user=1&user=1", Err(Miss::Twice)),
            ("/?user=1&%75ser=2", Err(Miss::Twice)),
            ("/?user=%", Err(Miss::Encoding(0))),
        ];
        for (target, wanted) in cases {
            check("query:user", target, &[], wanted);
        }
    }

    #[test]
    fn a_header_is_a_key() {
        let cases: [(Lines<'_>, _); 6] = [
            (&[("x-shard", "a b")], Ok("a b")),
            (&[("X-SHARD", " a ")], Ok("a")),
            (&[("x-shard", "a%20b")], Ok("a%20b")),
            (&[("x-shard", "")], Err(Miss::Empty)),
            (&[("x-shard", "a"), ("x-shard", "a")], Err(Miss::Twice)),
            (&[("x-other", "a")], Err(Miss::NoKey)),
        ];
        for (headers, wanted) in cases {
            check("header:X-Shard", "/", headers, wanted);
        }
    }

    #[test]
    fn a_cookie_is_a_key() {
        let cases: [(Lines<'_>, _); 9] = [
            (&[("cookie", "session=s1")], Ok("s1")),
            (&[("cookie", "a=1; session=s1 ;b=2")], Ok("s1")),
            (&[("cookie", "a=1"), ("cookie", "session=s=1")], Ok("s=1")),
            (&[("cookie", "Session=s1")], Err(Miss::NoKey)),
            (&[("cookie", "session")], Err(Miss::NoKey)),
            (&[("cookie", "session=")], Err(Miss::Empty)),
            (&[("cookie", "session=1; session=2")], Err(Miss::Twice)),
            (&[("cookie", "session=1"), ("cookie", "session=1")], Err(Miss::Twice)),
            (&[], Err(Miss::NoKey)),
        ];
        for (headers, wanted) in cases {
            check("cookie:session", "/", headers, wanted);
        }
    }

    #[test]
    fn the_host_is_a_key() {
        let cases = [
            ("shop.example", Ok("shop.example")),
            ("Shop.Example:8080", Ok("shop.example")),
            ("shop.example.", Ok("shop.example")),
            ("[2001:DB8::1]:80", Ok("[2001:db8::1]")),
            ("[::1]", Ok("[::1]")),
            ("user@shop.example:1", Ok("shop.example")),
            (":80", Err(Miss::Empty)),
        ];
        for (host, wanted) in cases {
            check("host", "/", &[("host", host)], wanted);
        }
        check("host", "/", &[], Err(Miss::NoKey));
    }

    #[test]
    fn the_longest_key_fits_and_one_byte_more_does_not() {
        let longest = "x".repeat(KEY_MAX_BYTES);
        check("path:0", &format!("/{longest}"), &[], Ok(&longest));
        check("path:0", &format!("/{longest}y"), &[], Err(Miss::TooLong(KEY_MAX_BYTES + 1)));
        // What counts is the key itself and not how it was written.
        let coded = "%78".repeat(KEY_MAX_BYTES);
        check("path:0", &format!("/{coded}"), &[], Ok(&longest));
    }

    #[test]
    fn nothing_is_copied_when_there_is_nothing_to_decode() {
        let headers: Lines<'_> = &[("x-shard", "a"), ("cookie", "c=a")];
        let parts = Parts { path: "/kv/a", query: Some("q=a"), host: Some("a:80"), headers };
        for source in ["path:1", "header:x-shard", "cookie:c", "query:q", "host"] {
            let key = source.parse::<Extract>().unwrap().key(&parts).unwrap();
            assert!(matches!(key, Cow::Borrowed(b"a")), "{source}");
        }
    }

    #[test]
    fn text_forms_come_back_and_bad_ones_are_refused_with_a_hint() {
        for good in
            ["path:0", "path:63", "header:x-shard-key", "cookie:session", "query:user[id]", "host"]
        {
            assert_eq!(good.parse::<Extract>().unwrap().to_string(), good);
        }
        let cases = [
            (
                "",
                "\"\" is no key source: give path:1, header:NAME, cookie:NAME, query:NAME or host",
            ),
            ("path", "\"path\" is no key source"),
            ("Host", "\"Host\" is no key source"),
            ("method:x", "\"method:x\" is no key source"),
            ("path:x", "\"x\" is no path segment: give 0 to 63"),
            ("path:+1", "\"+1\" is no path segment"),
            ("path:64", "\"64\" is no path segment"),
            ("path:", "\"\" is no path segment"),
            ("header:", "\"\" is no header name: give 1 to 128"),
            ("header:a b", "\"a b\" is no header name"),
            ("header:a:b", "\"a:b\" is no header name"),
            ("cookie:a=b", "\"a=b\" is no cookie name"),
            ("query:a&b", "\"a&b\" is no query name"),
        ];
        for (text, start) in cases {
            let error = text.parse::<Extract>().unwrap_err().to_string();
            assert!(error.starts_with(start), "{text}: {error}");
        }
        let long = format!("cookie:{}", "x".repeat(SOURCE_NAME_MAX_BYTES + 1));
        assert!(long.parse::<Extract>().is_err());
    }

    #[test]
    fn a_source_says_in_words_where_it_looks() {
        let said = "path:1".parse::<Extract>().unwrap().describe();
        assert_eq!(said, "segment 1 of the path, counted from 0, as in /0/KEY");
    }
}

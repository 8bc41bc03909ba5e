//! A table behind an HTTP service: `GET` with the key in the URL; what comes back is what stands for the key.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use mandoline::http::key::{Asked, KeyFrom};
use mandoline_core::extract::Miss;
use mandoline_core::task::Address;

use crate::config::tls::Tls;
use crate::config::transport::Endpoint;
use crate::lookup::desk::Desk;
use crate::lookup::{Fault, Found, Source};
use crate::pool::dial::{Io, Speech, dial};
use crate::tables::remote::{self, Remote, down};

/// How many questions a service is asked at a time: more than one that hangs, and few for a service that others ask too.
const CONNECTIONS: usize = 16;
/// The longest answer that is read: that of a service which says more than the key, in JSON.
const ANSWER_MAX_BYTES: usize = 64 << 10;

/// A table behind an HTTP service.
#[derive(Clone, Debug)]
pub struct Http {
    url: Url,
    field: Option<Pointer>,
    tls: Option<Arc<Tls>>,
}

/// Why a service cannot be asked so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Nobody is told whom to believe.
    #[error("{0} is asked by TLS, and nothing says whom to believe: give tls with a ca")]
    NoTls(Url),
    /// TLS is set up for nothing.
    #[error(
        "{0} is asked in clear text, so tls is for nothing: give an https URL, or leave tls out"
    )]
    Clear(Url),
}

impl Http {
    /// Says where to ask; whether the answer is a field of JSON, such as `/shard`, or all there is; and whom to believe by TLS.
    pub fn new(url: Url, field: Option<Pointer>, tls: Option<Arc<Tls>>) -> Result<Self, HttpError> {
        match (url.is_secure, &tls) {
            (true, None) => Err(HttpError::NoTls(url)),
            (false, Some(_)) => Err(HttpError::Clear(url)),
            _ => Ok(Self { url, field, tls }),
        }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        let same_tls = match (&self.tls, &other.tls) {
            (None, None) => true,
            (Some(one), Some(other)) => one.is(other),
            _ => false,
        };
        (&self.url, &self.field) == (&other.url, &other.field) && same_tls
    }

    pub(super) const fn source(self) -> Service {
        Service(self)
    }
}

/// Where a service is asked: `http://host:port/path/{key}`, with `{key}` in the path or the query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    text: Box<str>,
    is_secure: bool,
    endpoint: Endpoint,
    host: HeaderValue,
    /// What stands before, between and after the places of the key, and whether the first of them is in the path.
    pieces: Vec<Box<str>>,
    is_in_path: bool,
}

/// A text is no URL that a service could be asked by.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no URL of a lookup: give one such as http://127.0.0.1:9000/shards?domain={{key}}, with {{key}} where the key goes"
)]
pub struct UrlError(String);

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let bad = || UrlError(text.chars().take(300).collect());
        let (scheme, rest) = text.split_once("://").ok_or_else(bad)?;
        let (is_secure, port) = match scheme {
            "http" => (false, 80),
            "https" => (true, 443),
            _ => return Err(bad()),
        };
        let (host, target) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let with_port = host.parse().or_else(|_| format!("{host}:{port}").parse::<Address>());
        let endpoint = Endpoint::Tcp(with_port.map_err(|_| bad())?);
        let host = HeaderValue::from_str(host).map_err(|_| bad())?;
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        let pieces: Vec<Box<str>> = target.split("{key}").map(Into::into).collect();
        let may_be = |b: u8| b.is_ascii_graphic() && !matches!(b, b'{' | b'}' | b'#');
        if pieces.len() < 2 || !pieces.iter().all(|piece| piece.bytes().all(may_be)) {
            return Err(bad());
        }
        let is_in_path = !pieces[0].contains('?');
        Ok(Self { text: text.into(), is_secure, endpoint, host, pieces, is_in_path })
    }
}

impl Url {
    /// Gives what to ask for, unless the key is one that a service might take for another part of its path.
    fn target(&self, key: &[u8]) -> Option<String> {
        let climbs = matches!(key, b"." | b"..") || key.iter().any(|b| matches!(b, b'/' | b'\\'));
        if self.is_in_path && climbs {
            return None;
        }
        let mut target = String::new();
        for (place, piece) in self.pieces.iter().enumerate() {
            if place > 0 {
                encode(key, &mut target);
            }
            target.push_str(piece);
        }
        Some(target)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

/// Writes a key so that it means itself wherever it stands in a URL (RFC 3986, 2.3).
fn encode(key: &[u8], to: &mut String) {
    for &b in key {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~') {
            to.push(b.into());
        } else {
            to.push('%');
            for digit in [b >> 4, b & 15] {
                to.push(char::from(b"0123456789ABCDEF"[usize::from(digit)]));
            }
        }
    }
}

/// Where the answer is in JSON: a pointer such as `/shard` (RFC 6901).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointer(KeyFrom);

/// A text is no pointer into JSON.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no field of an answer: give a pointer such as /shard or /shop/shard")]
pub struct PointerError(String);

impl FromStr for Pointer {
    type Err = PointerError;

    fn from_str(text: &str) -> Result<Self, PointerError> {
        let bad = || PointerError(text.chars().take(300).collect());
        // One pointer, and nothing that ends the brackets early.
        if !text.starts_with('/') || text.contains(['(', ')', ',']) {
            return Err(bad());
        }
        format!("json({text})").parse().map(Self).map_err(|_| bad())
    }
}

impl Pointer {
    fn find(&self, body: &[u8]) -> Found {
        let (head, ()) = Request::new(()).into_parts();
        let asked = Asked { head: &head, host: None, client: None, body: Some(body) };
        match self.0.bytes_in(&asked) {
            Ok(answer) => Ok(Some(answer)),
            Err(Miss::NoKey) => Ok(None),
            Err(Miss::Twice) => Err(Fault::Two),
            Err(Miss::Empty) => Err(Fault::Length(0)),
            Err(Miss::TooLong(length)) => Err(Fault::Length(length)),
            Err(_) => Err(Fault::Down(format!(
                "its answer has no text and no whole number where it should be: {}",
                self.0.describe()
            ))),
        }
    }
}

/// Reads an answer that is nothing but what stands for the key: one line.
fn line(body: &[u8]) -> Found {
    let line = body.trim_ascii();
    if line.iter().any(|b| matches!(b, b'\n' | b'\r')) {
        return Err(Fault::Two);
    }
    Ok(Some(line.to_vec()))
}

/// Asks an HTTP service.
pub(super) struct Service(Http);

impl Source for Service {
    async fn serve(self, desk: Desk) {
        remote::serve(self, CONNECTIONS, desk).await;
    }
}

impl Remote for Service {
    type Connection = SendRequest<Empty<Bytes>>;

    async fn connect(&self) -> Result<Self::Connection, Fault> {
        let Http { url, tls, .. } = &self.0;
        let (io, _): (Io, bool) =
            dial(&url.endpoint, tls.as_deref(), Speech::One).await.map_err(|error| down(&error))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(io)).await.map_err(|error| down(&error))?;
        tokio::task::spawn_local(async move {
            // Whoever asks hears of it.
            let _broke = connection.await;
        });
        Ok(sender)
    }

    async fn ask(&self, connection: &mut Self::Connection, key: &[u8]) -> Found {
        let Http { url, field, .. } = &self.0;
        let Some(target) = url.target(key) else { return Ok(None) };
        let request = Request::get(target)
            .header(header::HOST, &url.host)
            .header(header::USER_AGENT, HeaderValue::from_static("mandoline-proxy"))
            .body(Empty::new())
            .expect("each part of it is one");
        connection.ready().await.map_err(|error| down(&error))?;
        let response = connection.send_request(request).await.map_err(|error| down(&error))?;
        let status = response.status();
        let reading = Limited::new(response.into_body(), ANSWER_MAX_BYTES).collect().await;
        let body = reading
            .map_err(|error| Fault::Down(format!("its answer cannot be read: {error}")))?
            .to_bytes();
        match (status, field) {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (StatusCode::OK, None) => line(&body),
            (StatusCode::OK, Some(field)) => field.find(&body),
            (status, _) => Err(Fault::Down(format!("it answers {status}"))),
        }
    }

    fn is_usable(connection: &Self::Connection) -> bool {
        !connection.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_means_itself_wherever_it_stands_in_a_url() {
        let target = |url: &str, key: &[u8]| url.parse::<Url>().unwrap().target(key);
        for (url, key, wanted) in [
            ("http://a/s/{key}", &b"b.org"[..], Some("/s/b.org")),
            (
                "http://a?of={key}&x={key}",
                b"a&b=\xff/",
                Some("/?of=a%26b%3D%FF%2F&x=a%26b%3D%FF%2F"),
            ),
            ("http://a:1/s?of={key}", b"../b", Some("/s?of=..%2Fb")),
            ("http://a/s/{key}", b"..", None),
            ("http://a/s/{key}", b"../b", None),
            ("http://a/s/{key}", b"..\\b", None),
            ("http://a/s/{key}?of={key}", b"a/b", None),
        ] {
            assert_eq!(target(url, key).as_deref(), wanted, "{url}");
        }
        let url: Url = "https://[::1]/{key}".parse().unwrap();
        assert_eq!((url.endpoint.to_string(), url.is_secure), ("[::1]:443".to_owned(), true));
        for bad in [
            "a/{key}",
            "ftp://a/{key}",
            "http:///{key}",
            "http://a/",
            "http://a/{key}#x",
            "http://{key}/",
            "http://b@a/{key}",
            "http://a/{kee}/{key}",
            "http://a/ {key}",
            "http://a:0/{key}",
        ] {
            assert!(bad.parse::<Url>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_is_one_line_or_one_field() {
        assert_eq!(line(b" eu-1 \r\n"), Ok(Some(b"eu-1".to_vec())));
        assert_eq!(line(b"1\n2\n"), Err(Fault::Two));
        let field: Pointer = "/shop/shard".parse().unwrap();
        for (body, wanted) in [
            (&br#"{"shop": {"shard": 7}}"#[..], Ok(Some(b"7".to_vec()))),
            (br#"{"shop": {"shard": "eu-1", "x": []}}"#, Ok(Some(b"eu-1".to_vec()))),
            (br#"{"shop": {"shard": null}}"#, Ok(None)),
            (br#"{"shop": {}}"#, Ok(None)),
            (br#"{"shop": {"shard": 1, "shard": 2}}"#, Err(Fault::Two)),
        ] {
            assert_eq!(field.find(body), wanted, "{}", String::from_utf8_lossy(body));
        }
        for bad in [&br#"{"shop": {"shard": [1, 2]}}"#[..], b"{", b""] {
            assert!(matches!(field.find(bad), Err(Fault::Down(_))), "{bad:?}");
        }
        for bad in ["shard", "", "/a)", "/a, host", "(/a"] {
            assert!(bad.parse::<Pointer>().is_err(), "{bad}");
        }
    }
}

//! A question to a proxy: what would become of this request? It travels as the query of `GET /explain`.

use std::net::{IpAddr, Ipv4Addr};

use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::Scheme;
use http::{Method, Request, Uri};

/// A request to explain.
#[derive(Debug)]
pub struct Ask {
    /// Its head, as it would come in.
    pub head: Parts,
    /// Where it would come from.
    pub client: IpAddr,
}

/// A question made no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// It says not what for.
    #[error("no url is given: ask for one, such as url=http://shop.example.com/carts/1")]
    NoUrl,
    /// Its URL cannot be asked for.
    #[error("{0:?} is no URL: give one such as http://shop.example.com/carts/1")]
    Url(String),
    /// A part of it makes no sense.
    #[error("{value:?} is no {what}")]
    Part {
        /// Which part.
        what: &'static str,
        /// What was given.
        value: String,
    },
    /// There is no such part.
    #[error("{0:?} is not known here: give url, method, header and client")]
    Unknown(String),
}

impl Ask {
    /// Reads the query of a question: `url`, and perhaps `method`, `client` and any number of `header`, each `NAME: VALUE`.
    pub fn of(query: &str) -> Result<Self, AskError> {
        let (mut url, mut method, mut client) =
            (None, Method::GET, IpAddr::V4(Ipv4Addr::LOCALHOST));
        let mut headers = Vec::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let refuse = |what| AskError::Part { what, value: value.chars().take(80).collect() };
            match &*name {
                "url" => url = Some(value.into_owned()),
                "method" => method = value.parse().map_err(|_| refuse("method"))?,
                "client" => client = value.parse().map_err(|_| refuse("address of a client"))?,
                "header" => headers.push(header(&value).ok_or_else(|| refuse("header"))?),
                _ => return Err(AskError::Unknown(name.into_owned())),
            }
        }
        let url = url.ok_or(AskError::NoUrl)?;
        let refuse = || AskError::Url(url.chars().take(200).collect());
        let uri: Uri = url.parse().map_err(|_| refuse())?;
        let is_web = [Some(&Scheme::HTTP), Some(&Scheme::HTTPS)].contains(&uri.scheme());
        let host = uri.authority().filter(|_| is_web).ok_or_else(refuse)?;
        let host = HeaderValue::from_str(host.as_str()).map_err(|_| refuse())?;
        let target = uri.path_and_query().map_or("/", |target| target.as_str());
        let request =
            Request::builder().method(method).uri(target).body(()).map_err(|_| refuse())?;
        let (mut head, ()) = request.into_parts();
        // As clients send it: the path alone, and the host in its header.
        let names_host = headers.iter().any(|(name, _)| *name == header::HOST);
        if !names_host {
            head.headers.insert(header::HOST, host);
        }
        for (name, value) in headers {
            head.headers.append(name, value);
        }
        Ok(Self { head, client })
    }

    /// Writes the query of a question.
    pub fn query<'a>(parts: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
        form_urlencoded::Serializer::new(String::new()).extend_pairs(parts).finish()
    }
}

fn header(text: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':')?;
    Some((name.trim().parse().ok()?, value.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_a_request_as_clients_send_it() {
        let query = Ask::query([
            ("url", "http://shop.example.com:80/carts/a%20b?x=1&y=2"),
            ("method", "PUT"),
            ("header", "x-user: a & b"),
            ("header", "X-User:c"),
            ("client", "10.0.0.1"),
        ]);
        let Ask { head, client } = Ask::of(&query).unwrap();
        assert_eq!((head.method, client.to_string()), (Method::PUT, "10.0.0.1".to_owned()));
        assert_eq!(head.uri, "/carts/a%20b?x=1&y=2");
        assert_eq!(head.headers[header::HOST], "shop.example.com:80");
        let users: Vec<_> = head.headers.get_all("x-user").iter().collect();
        assert_eq!(users, ["a & b", "c"]);
        let other = Ask::of("url=http://a.org&header=host:%20b.org").unwrap();
        assert_eq!(other.head.uri, "/");
        assert_eq!(other.head.headers.get_all("host").iter().collect::<Vec<_>>(), ["b.org"]);
    }

    #[test]
    fn a_question_that_makes_no_sense_is_refused() {
        let part = |what, value: &str| AskError::Part { what, value: value.to_owned() };
        for (query, error) in [
            ("", AskError::NoUrl),
            ("url=/carts/1", AskError::Url("/carts/1".to_owned())),
            ("url=ftp://a/b", AskError::Url("ftp://a/b".to_owned())),
            ("url=http://a&method=G%20T", part("method", "G T")),
            ("url=http://a&client=b", part("address of a client", "b")),
            ("url=http://a&header=b", part("header", "b")),
            ("uri=http://a", AskError::Unknown("uri".to_owned())),
        ] {
            assert_eq!(Ask::of(query).unwrap_err(), error, "{query}");
        }
    }
}

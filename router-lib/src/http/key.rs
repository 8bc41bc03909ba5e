//! Where a request says its key, for every way into a program: a header, the path, gRPC metadata, or a typed call.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use mandoline_core::extract::{self, Extract, Miss};
use mandoline_core::key::SliceKey;
use mandoline_core::recipe::{Recipe, RecipeError, Whole, group_and_member};

/// A typed call's key: put it into the request's extensions, for [`KeyFrom::typed`].
///
/// ```
/// use mandoline::http::key::Key;
///
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(Key::of(b"user-42"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(pub SliceKey);

impl Key {
    /// Hashes a key's bytes.
    pub fn of(key: &[u8]) -> Self {
        Self(SliceKey::of(key))
    }
}

/// Where the key is in a request. A key that is there twice, or is empty, or is too long is refused rather than guessed: two
/// programs must never take different ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFrom(Source);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Typed,
    Part(Recipe),
    Group { group: Recipe, member: Recipe },
}

impl KeyFrom {
    /// The value of a metadata entry of a gRPC call, which is a header of its request.
    ///
    /// # Panics
    ///
    /// If that is no name of a header. For names that come from elsewhere than source code, parse `header:NAME`.
    pub fn metadata(name: &'static str) -> Self {
        Self::header(name)
    }

    /// The value of a header.
    ///
    /// # Panics
    ///
    /// If that is no name of a header. For names that come from elsewhere than source code, parse `header:NAME`.
    pub fn header(name: &'static str) -> Self {
        format!("header:{name}").parse().expect("the source code names a header")
    }

    /// A segment of the path, counted from 0: segment 1 of `/kv/apple` is `apple`.
    ///
    /// # Panics
    ///
    /// Beyond `SEGMENT_MAX`: deeper paths are rare.
    pub fn path(segment: u8) -> Self {
        format!("path:{segment}").parse().expect("the source code names a segment that may be")
    }

    /// What the caller puts into the request's extensions, as a [`Key`]. It does not travel: for stubs, not for servers.
    pub const fn typed() -> Self {
        Self(Source::Typed)
    }

    /// Groups keys: all keys of one group, such as a tenant, lie together and can still be split.
    ///
    /// # Panics
    ///
    /// If either is no part of a request: typed or grouped itself.
    #[must_use]
    pub fn within(self, group: Self) -> Self {
        match (group.0, self.0) {
            (Source::Part(group), Source::Part(member)) => Self(Source::Group { group, member }),
            _ => panic!("a group and its member are parts of the request, such as a header"),
        }
    }

    /// Finds a request's key.
    pub fn find(&self, head: &Parts) -> Result<SliceKey, Miss> {
        self.find_of(head, host(head))
    }

    /// Does the same where the host that is asked for is known otherwise, such as from a target that was absolute once.
    pub fn find_of(&self, head: &Parts, host: Option<&str>) -> Result<SliceKey, Miss> {
        self.find_in(&Asked { head, host, client: None, body: None })
    }

    /// Does the same where more of the request is known than its head.
    pub fn find_in(&self, asked: &Asked<'_>) -> Result<SliceKey, Miss> {
        let fields = Fields(&asked.head.headers);
        let whole = asked.whole(&fields);
        match &self.0 {
            Source::Typed => asked.head.extensions.get::<Key>().map(|key| key.0).ok_or(Miss::NoKey),
            Source::Part(part) => Ok(SliceKey::of(&part.key(&whole, &FORMAT)?)),
            Source::Group { group, member } => {
                Ok(SliceKey::grouped(&group.key(&whole, &FORMAT)?, &member.key(&whole, &FORMAT)?))
            }
        }
    }

    /// Says whether the key is one run of bytes, which something else can be looked up by: neither typed nor grouped.
    pub const fn is_whole(&self) -> bool {
        matches!(self.0, Source::Part(_))
    }

    /// Finds the key's bytes, for whoever looks something else up by them. A key that is typed or grouped has none.
    pub fn bytes_in(&self, asked: &Asked<'_>) -> Result<Vec<u8>, Miss> {
        let fields = Fields(&asked.head.headers);
        match &self.0 {
            Source::Part(part) => Ok(part.key(&asked.whole(&fields), &FORMAT)?.into_owned()),
            Source::Typed | Source::Group { .. } => Err(Miss::NoKey),
        }
    }

    /// Says whether the key is in the body of a request, which then has to be read first: only a proxy does that.
    pub fn reads_body(&self) -> bool {
        match &self.0 {
            Source::Typed => false,
            Source::Part(part) => part.reads_body(),
            Source::Group { group, member } => group.reads_body() || member.reads_body(),
        }
    }
}

/// A request, as far as it is known to whoever looks for its key.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its head.
    pub head: &'a Parts,
    /// The host that it is for.
    pub host: Option<&'a str>,
    /// Who asks.
    pub client: Option<IpAddr>,
    /// Its body, if that was read.
    pub body: Option<&'a [u8]>,
}

impl<'a> Asked<'a> {
    fn whole(&self, headers: &'a Fields<'a>) -> Whole<'a, Fields<'a>> {
        let uri = &self.head.uri;
        let parts =
            extract::Parts { path: uri.path(), query: uri.query(), host: self.host, headers };
        Whole { parts, method: self.head.method.as_str(), client: self.client, body: self.body }
    }
}

#[cfg(feature = "json")]
const FORMAT: crate::http::json::Json = crate::http::json::Json;
#[cfg(not(feature = "json"))]
const FORMAT: mandoline_core::recipe::NoJson = mandoline_core::recipe::NoJson;

impl KeyFrom {
    /// Says in words where the key is expected, to finish the sentence "the key is".
    pub fn describe(&self) -> String {
        match &self.0 {
            Source::Typed => "what the caller puts into the request's extensions".to_owned(),
            Source::Part(part) => part.describe(),
            Source::Group { group, member } => {
                format!("{}, in the group that is {}", member.describe(), group.describe())
            }
        }
    }
}

fn host(head: &Parts) -> Option<&str> {
    let authority = head.uri.authority().map(http::uri::Authority::as_str);
    authority.or_else(|| head.headers.get(header::HOST)?.to_str().ok())
}

impl From<Extract> for KeyFrom {
    fn from(part: Extract) -> Self {
        Self(Source::Part(Recipe::Part(part)))
    }
}

/// Why a text does not say where a key is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFromError {
    /// It is no recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The library was built without reading JSON.
    #[error(
        "{0} is in JSON, which this program does not read: build it with the feature json of mandoline"
    )]
    Json(String),
}

/// `header:x-shard-key`, `path:1`, `first(cookie:s, client)` and so on, as in flags and configuration; `header:tenant/header:user` groups.
impl FromStr for KeyFrom {
    type Err = KeyFromError;

    fn from_str(text: &str) -> Result<Self, KeyFromError> {
        let read = |text: &str| -> Result<Recipe, KeyFromError> {
            let recipe: Recipe = text.parse()?;
            if recipe.reads_json() && !cfg!(feature = "json") {
                return Err(KeyFromError::Json(text.to_owned()));
            }
            Ok(recipe)
        };
        match group_and_member(text) {
            Some((group, member)) => {
                Ok(Self(Source::Group { group: read(group)?, member: read(member)? }))
            }
            None => Ok(Self(Source::Part(read(text)?))),
        }
    }
}

/// What is parsed, and `typed` for keys that do not travel.
impl fmt::Display for KeyFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::Typed => f.write_str("typed"),
            Source::Part(part) => part.fmt(f),
            Source::Group { group, member } => write!(f, "{group}/{member}"),
        }
    }
}

/// Lets core's key extraction look into a request's headers.
#[derive(Debug)]
pub struct Fields<'a>(pub &'a HeaderMap);

impl extract::Headers for Fields<'_> {
    fn values<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.0.get_all(name).iter().map(HeaderValue::as_bytes)
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(request: http::request::Builder) -> Parts {
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_key_is_found_where_it_is_said_to_be() {
        let request =
            Request::get("http://a.example:80/kv/apple?user=bob").header("tenant", "acme");
        let head = head(request.header("x-shard-key", " k1 ").extension(Key::of(b"t1")));
        for (from, key) in [
            (KeyFrom::header("x-shard-key"), "k1"),
            (KeyFrom::metadata("X-Shard-Key"), "k1"),
            (KeyFrom::path(1), "apple"),
            ("query:user".parse().unwrap(), "bob"),
            ("host".parse().unwrap(), "a.example"),
            (KeyFrom::typed(), "t1"),
        ] {
            assert_eq!(from.find(&head), Ok(SliceKey::of(key.as_bytes())), "{from:?}");
        }
        let client = Some("10.1.2.3".parse().unwrap());
        let body = Some(&br#"{"user": {"id": "u1"}}"#[..]);
        let asked = Asked { head: &head, host: Some("a.example"), client, body };
        for (from, key) in [
            ("client:8", "10.0.0.0"),
            ("json(/user/id)", "u1"),
            ("first(cookie:c, lower(header:tenant))", "acme"),
        ] {
            let from: KeyFrom = from.parse().unwrap();
            assert_eq!(from.find_in(&asked), Ok(SliceKey::of(key.as_bytes())), "{from:?}");
        }
        let grouped = KeyFrom::header("x-shard-key").within(KeyFrom::header("tenant"));
        assert_eq!(grouped, "header:tenant/header:x-shard-key".parse().unwrap());
        assert_eq!(grouped.to_string(), "header:tenant/header:x-shard-key");
        assert_eq!(grouped.find(&head), Ok(SliceKey::grouped(b"acme", b"k1")));
    }

    #[test]
    fn a_key_that_two_programs_might_read_differently_is_refused() {
        let from = KeyFrom::header("k");
        let find = |request: http::request::Builder| from.find(&head(request));
        assert_eq!(find(Request::get("/")), Err(Miss::NoKey));
        assert_eq!(find(Request::get("/").header("k", "")), Err(Miss::Empty));
        assert_eq!(find(Request::get("/").header("k", "a").header("k", "a")), Err(Miss::Twice));
        let long = "x".repeat(1 << 20);
        assert_eq!(find(Request::get("/").header("k", long)), Err(Miss::TooLong(1 << 20)));
        assert_eq!(KeyFrom::typed().find(&head(Request::get("/"))), Err(Miss::NoKey));
        for bad in ["", "path:", "header:a b", "header:a/", "header:a/b/c"] {
            assert!(bad.parse::<KeyFrom>().is_err(), "{bad}");
        }
    }

    #[test]
    #[should_panic(expected = "the source code names a header")]
    fn a_name_in_source_code_is_a_name() {
        let _key = KeyFrom::header("no name");
    }
}

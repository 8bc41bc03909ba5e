//! How a key is made of a request: a part of it, or several joined, or the first of several that is there.
//!
//! Two programs must never make two keys of one request. So what is there twice is refused, parts are joined so that no two lists of
//! parts give one key, and what stands in for a part that is missing does so only where that part is not there at all: one that is
//! there and cannot be used is refused.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::extract::{Extract, ExtractError, Headers, Miss, Parts};
use crate::key::KEY_MAX_BYTES;

/// How a key is made of a request.
///
/// Its text form is what flags and configuration hold: a source such as `path:1` or `header:x-user`, or a word with others in
/// parentheses such as `join(header:x-tenant, path:1)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Recipe {
    /// One part.
    Part(Extract),
    /// `path(/shops/{key}/*)`: the segment of the path where `{key}` stands. Percent-decoded.
    Pattern(Pattern),
    /// `client`, `client:24`, `client:24:56`: the client's address, or the network of so many bits that it is in.
    Client(Network),
    /// `method`: the request's method, in capitals.
    Method,
    /// `metadata:NAME`: an entry of a gRPC call's metadata, as it stands, or decoded where its name ends with `-bin`.
    Metadata(Extract),
    /// `jwt(CLAIM)`, `jwt(CLAIM, header:x-token)`: a claim of a token, by default of the bearer's. Nobody checks its signature here.
    Claim(Pointer, Token),
    /// `json(/user/id)`: a field of a small JSON body.
    Field(Pointer),
    /// `'text'`: always the same.
    Text(Box<str>),
    /// `lower(...)`: in lower case, for letters of ASCII.
    Lower(Box<Self>),
    /// `first(..., ...)`: the first that is there.
    First(Box<[Self]>),
    /// `join(..., ...)`: all of them, each after its length, so that `a` and `bc` are not `ab` and `c`.
    Join(Box<[Self]>),
}

/// Where a token is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// After `Bearer ` in the header `authorization`.
    Bearer,
    /// In a header, a cookie or a query parameter.
    In(Extract),
}

/// How many bits of an address count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    v4: u8,
    v6: u8,
}

/// A path with one place for the key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern {
    // Without the leading slash. `None` is any segment.
    segments: Box<[Option<Box<str>>]>,
    key: u8,
    // Whether more may follow.
    is_open: bool,
}

/// The way to a field, from the outside in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pointer(Box<[Box<str>]>);

/// A request, as far as keys are made of it.
#[derive(Debug)]
pub struct Whole<'a, H: ?Sized> {
    /// Its head's parts.
    pub parts: Parts<'a, H>,
    /// Its method, in capitals.
    pub method: &'a str,
    /// Who asks, if that is known.
    pub client: Option<IpAddr>,
    /// Its body, if that was read.
    pub body: Option<&'a [u8]>,
}

/// Reads JSON, which core does not.
pub trait Json {
    /// Gives the text of the one string, number or boolean at `path`. None is `NoKey`; two fields of one name are `Twice`; what is no
    /// JSON, or no such value, is `Unreadable`.
    fn field(&self, json: &[u8], path: &[Box<str>]) -> Result<Vec<u8>, Miss>;
}

/// Reads none: whoever has no bodies and no tokens to look into.
#[derive(Clone, Copy, Debug)]
pub struct NoJson;

impl Json for NoJson {
    fn field(&self, _: &[u8], _: &[Box<str>]) -> Result<Vec<u8>, Miss> {
        Err(Miss::Unreadable)
    }
}

impl Recipe {
    /// Makes the key. Allocates only where there is something to decode, to join or to write.
    pub fn key<'a, H: Headers + ?Sized>(
        &'a self,
        whole: &Whole<'a, H>,
        json: &impl Json,
    ) -> Result<Cow<'a, [u8]>, Miss> {
        if let Self::Part(part) = self {
            return part.key(&whole.parts);
        }
        let key = self.made(whole, json)?;
        match key.len() {
            0 => Err(Miss::Empty),
            1..=KEY_MAX_BYTES => Ok(key),
            long => Err(Miss::TooLong(long)),
        }
    }

    fn made<'a, H: Headers + ?Sized>(
        &'a self,
        whole: &Whole<'a, H>,
        json: &impl Json,
    ) -> Result<Cow<'a, [u8]>, Miss> {
        match self {
            Self::Part(part) => part.key(&whole.parts),
            Self::Pattern(pattern) => {
                let segment = pattern.find(whole.parts.path).ok_or(Miss::NoKey)?;
                Extract::decoded(segment)
            }
            Self::Client(network) => {
                let address = whole.client.ok_or(Miss::NoKey)?;
                Ok(network.of(address).into_bytes().into())
            }
            Self::Method => Ok(whole.method.as_bytes().into()),
            Self::Metadata(part) => {
                let value = part.key(&whole.parts)?;
                match part {
                    Extract::Header(name) if name.ends_with("-bin") => {
                        base64(&value).map(Cow::Owned)
                    }
                    _ => Ok(value),
                }
            }
            Self::Claim(claim, token) => {
                let token = token.find(&whole.parts)?;
                let mut pieces = token.split(|b| *b == b'.');
                let (Some(_), Some(claims), Some(_), None) =
                    (pieces.next(), pieces.next(), pieces.next(), pieces.next())
                else {
                    return Err(Miss::Unreadable);
                };
                json.field(&base64(claims)?, &claim.0).map(Cow::Owned)
            }
            Self::Field(pointer) => {
                json.field(whole.body.ok_or(Miss::NoKey)?, &pointer.0).map(Cow::Owned)
            }
            Self::Text(text) => Ok(text.as_bytes().into()),
            Self::Lower(recipe) => {
                let mut key = recipe.made(whole, json)?;
                if key.iter().any(u8::is_ascii_uppercase) {
                    key.to_mut().make_ascii_lowercase();
                }
                Ok(key)
            }
            Self::First(recipes) => {
                let mut tried = recipes.iter().map(|recipe| recipe.made(whole, json));
                // `first()` of nothing cannot be written.
                tried.find(|tried| *tried != Err(Miss::NoKey)).unwrap_or(Err(Miss::NoKey))
            }
            Self::Join(recipes) => {
                let mut joined = Vec::new();
                for recipe in recipes {
                    let part = recipe.made(whole, json)?;
                    if part.is_empty() {
                        return Err(Miss::Empty);
                    }
                    let length =
                        u16::try_from(part.len()).map_err(|_| Miss::TooLong(part.len()))?;
                    joined.extend_from_slice(&length.to_be_bytes());
                    joined.extend_from_slice(&part);
                }
                Ok(joined.into())
            }
        }
    }

    /// Says whether a request's body has to be read first.
    pub fn reads_body(&self) -> bool {
        match self {
            Self::Field(_) => true,
            Self::Lower(recipe) => recipe.reads_body(),
            Self::First(recipes) | Self::Join(recipes) => recipes.iter().any(Self::reads_body),
            _ => false,
        }
    }

    /// Says whether JSON has to be read.
    pub fn reads_json(&self) -> bool {
        match self {
            Self::Field(_) | Self::Claim(..) => true,
            Self::Lower(recipe) => recipe.reads_json(),
            Self::First(recipes) | Self::Join(recipes) => recipes.iter().any(Self::reads_json),
            _ => false,
        }
    }

    /// Says in words where the key is expected, to finish the sentence "the key is".
    pub fn describe(&self) -> String {
        let list = |recipes: &[Self], between: &str| {
            recipes.iter().map(Self::describe).collect::<Vec<_>>().join(between)
        };
        match self {
            Self::Part(part) => part.describe(),
            Self::Pattern(pattern) => format!("the part of the path where {pattern} has {{key}}"),
            Self::Client(network) if *network == Network::WHOLE => {
                "the client's address".to_owned()
            }
            Self::Client(network) => format!(
                "the network of the client's address, of {} bits or {} with IPv6",
                network.v4, network.v6
            ),
            Self::Method => "the method".to_owned(),
            Self::Metadata(part) => part.describe(),
            Self::Claim(claim, _) => format!("the claim {claim} of the token"),
            Self::Field(pointer) => format!("the field {pointer} of the JSON body"),
            Self::Text(text) => format!("always {text:?}"),
            Self::Lower(recipe) => format!("{}, in lower case", recipe.describe()),
            Self::First(recipes) => list(recipes, ", or else "),
            Self::Join(recipes) => list(recipes, " together with "),
        }
    }
}

impl Token {
    fn find<'a, H: Headers + ?Sized>(&self, parts: &Parts<'a, H>) -> Result<Cow<'a, [u8]>, Miss> {
        match self {
            Self::In(part) => part.key(parts),
            Self::Bearer => {
                let mut lines = parts.headers.values("authorization");
                let line = lines.next().ok_or(Miss::NoKey)?;
                if lines.next().is_some() {
                    return Err(Miss::Twice);
                }
                let (scheme, token) = line.split_at(line.len().min(BEARER.len()));
                let is_bearer = scheme.eq_ignore_ascii_case(BEARER);
                if is_bearer { Ok(token.trim_ascii().into()) } else { Err(Miss::NoKey) }
            }
        }
    }
}

const BEARER: &[u8] = b"bearer ";

impl Network {
    /// Every bit counts.
    const WHOLE: Self = Self { v4: 32, v6: 128 };

    /// Gives the network that an address is in, as text; an address alone if every bit counts. One of IPv4 in IPv6's clothes is
    /// one of IPv4.
    fn of(self, address: IpAddr) -> String {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.v4)).unwrap_or(0);
                std::net::Ipv4Addr::from_bits(v4.to_bits() & mask).to_string()
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.v6)).unwrap_or(0);
                std::net::Ipv6Addr::from_bits(v6.to_bits() & mask).to_string()
            }
        }
    }
}

impl Pattern {
    /// Gives the segment of the key, undecoded, if the path is such a one.
    fn find<'a>(&self, path: &'a str) -> Option<&'a str> {
        let mut found = None;
        let mut given = path.strip_prefix('/')?.split('/');
        for (n, wanted) in self.segments.iter().enumerate() {
            let segment = given.next()?;
            if n == usize::from(self.key) {
                found = Some(segment);
            } else if let Some(wanted) = wanted
                && !same(segment, wanted)
            {
                return None;
            }
        }
        if self.is_open || given.next().is_none() { found } else { None }
    }
}

/// A name in a path may be encoded too: `%73hops` is `shops` to the task.
fn same(segment: &str, wanted: &str) -> bool {
    segment == wanted || Extract::decoded(segment).is_ok_and(|plain| *plain == *wanted.as_bytes())
}

/// Decodes base64 in either alphabet (RFC 4648, 4 and 5), with its padding or without.
fn base64(text: &[u8]) -> Result<Vec<u8>, Miss> {
    let end = text.iter().rposition(|b| *b != b'=').map_or(0, |last| last + 1);
    let mut plain = Vec::with_capacity(end * 3 / 4);
    let (mut bits, mut held) = (0_u32, 0);
    for byte in &text[..end] {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return Err(Miss::Unreadable),
        };
        bits = (bits << 6) | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            plain.push((bits >> held) as u8);
        }
    }
    // What is left over must be nothing: else two texts would be one key.
    if held < 6 && bits & ((1 << held) - 1) == 0 { Ok(plain) } else { Err(Miss::Unreadable) }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, segment) in self.segments.iter().enumerate() {
            match segment {
                _ if n == usize::from(self.key) => f.write_str("/{key}")?,
                Some(name) => write!(f, "/{name}")?,
                None => f.write_str("/{}")?,
            }
        }
        f.write_str(if self.is_open { "/*" } else { "" })
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|name| write!(f, "/{}", name.replace('~', "~0").replace('/', "~1")))
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, word: &str, recipes: &[Self]| {
            write!(f, "{word}(")?;
            for (n, recipe) in recipes.iter().enumerate() {
                f.write_str(if n == 0 { "" } else { ", " })?;
                recipe.fmt(f)?;
            }
            f.write_str(")")
        };
        match self {
            Self::Part(part) => part.fmt(f),
            Self::Pattern(pattern) => write!(f, "path({pattern})"),
            Self::Client(network) if *network == Network::WHOLE => f.write_str("client"),
            Self::Client(Network { v4, v6: 128 }) => write!(f, "client:{v4}"),
            Self::Client(Network { v4, v6 }) => write!(f, "client:{v4}:{v6}"),
            Self::Method => f.write_str("method"),
            Self::Metadata(Extract::Header(name)) => write!(f, "metadata:{name}"),
            Self::Metadata(part) => part.fmt(f),
            Self::Claim(claim, Token::Bearer) => write!(f, "jwt({claim})"),
            Self::Claim(claim, Token::In(part)) => write!(f, "jwt({claim}, {part})"),
            Self::Field(pointer) => write!(f, "json({pointer})"),
            Self::Text(text) => write!(f, "'{text}'"),
            Self::Lower(recipe) => write!(f, "lower({recipe})"),
            Self::First(recipes) => list(f, "first", recipes),
            Self::Join(recipes) => list(f, "join", recipes),
        }
    }
}

/// Why a text is no recipe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecipeError {
    /// A source is none, or has a name that cannot be.
    #[error(transparent)]
    Source(#[from] ExtractError),
    /// A word with parentheses that is none.
    #[error(
        "{0}(...) is no key source: give path(/shops/{{key}}/*), jwt(sub), json(/user/id), lower(..), first(.., ..) or join(.., ..)"
    )]
    Word(String),
    /// A parenthesis or a quote has no partner, or something stands behind the last.
    #[error("{0:?} has a parenthesis or a quote without its partner")]
    Unbalanced(String),
    /// A word was given too few or too many things.
    #[error("{word} takes {takes}")]
    Arguments {
        /// Which.
        word: &'static str,
        /// What it takes.
        takes: &'static str,
    },
    /// No pattern.
    #[error(
        "{0:?} is no pattern: begin with /, write {{key}} once for the key, {{}} for any other segment, and /* at the end if more may follow"
    )]
    Pattern(String),
    /// No network.
    #[error(
        "{0:?} is no length of a network: give client, client:24 or client:24:56 (of IPv4 up to 32, of IPv6 up to 128 bits)"
    )]
    Network(String),
    /// No way to a field.
    #[error("{0:?} names no field: give its names from the outside in, such as /user/id")]
    Pointer(String),
    /// Nested too deeply.
    #[error("recipes are nested at most {DEPTH_MAX} deep")]
    Depth,
}

/// How deep recipes may be nested: deeper ones nobody can read.
const DEPTH_MAX: usize = 8;

impl FromStr for Recipe {
    type Err = RecipeError;

    fn from_str(text: &str) -> Result<Self, RecipeError> {
        read(text.trim(), DEPTH_MAX)
    }
}

fn read(text: &str, depth: usize) -> Result<Recipe, RecipeError> {
    if depth == 0 {
        return Err(RecipeError::Depth);
    }
    let unbalanced = || RecipeError::Unbalanced(text.to_owned());
    if let Some(rest) = text.strip_prefix('\'') {
        let plain = rest.strip_suffix('\'').filter(|plain| !plain.contains('\''));
        return plain.map(|plain| Recipe::Text(plain.into())).ok_or_else(unbalanced);
    }
    let Some((word, rest)) = text.split_once('(') else { return source(text) };
    let inside = rest.strip_suffix(')').ok_or_else(unbalanced)?;
    let given = split(inside).ok_or_else(unbalanced)?;
    let all = || given.iter().map(|one| read(one, depth - 1)).collect::<Result<Box<[_]>, _>>();
    let arguments = |word, takes| Err(RecipeError::Arguments { word, takes });
    match (word, &given[..]) {
        ("path", [one]) => pattern(one).map(Recipe::Pattern),
        ("path", _) => arguments("path(..)", "one pattern"),
        ("jwt", [claim]) => Ok(Recipe::Claim(pointer(claim)?, Token::Bearer)),
        ("jwt", [claim, part]) => Ok(Recipe::Claim(pointer(claim)?, Token::In(part.parse()?))),
        ("jwt", _) => {
            arguments("jwt(..)", "a claim, and where the token is unless it is the bearer's")
        }
        ("json", [one]) => pointer(one).map(Recipe::Field),
        ("json", _) => arguments("json(..)", "one field"),
        ("lower", [one]) => Ok(Recipe::Lower(Box::new(read(one, depth - 1)?))),
        ("lower", _) => arguments("lower(..)", "one source"),
        ("first", [_, _, ..]) => all().map(Recipe::First),
        ("first", _) => arguments("first(..)", "two sources or more"),
        ("join", [_, _, ..]) => all().map(Recipe::Join),
        ("join", _) => arguments("join(..)", "two sources or more"),
        (word, _) => Err(RecipeError::Word(word.to_owned())),
    }
}

fn source(text: &str) -> Result<Recipe, RecipeError> {
    if text.contains([')', '\'']) && !text.starts_with("query:") {
        return Err(RecipeError::Unbalanced(text.to_owned()));
    }
    match text.split_once(':') {
        None if text == "client" => Ok(Recipe::Client(Network::WHOLE)),
        None if text == "method" => Ok(Recipe::Method),
        Some(("client", bits)) => network(bits).map(Recipe::Client),
        Some(("metadata", name)) => {
            Ok(Recipe::Metadata(format!("header:{name}").parse::<Extract>()?))
        }
        _ => Ok(Recipe::Part(text.parse()?)),
    }
}

/// Splits at the commas that no parentheses and no quotes enclose.
fn split(text: &str) -> Option<Vec<&str>> {
    let (mut parts, mut depth, mut quoted, mut from) = (Vec::new(), 0_usize, false, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'\'' => quoted = !quoted,
            _ if quoted => {}
            b'(' => depth += 1,
            b')' => depth = depth.checked_sub(1)?,
            b',' if depth == 0 => {
                parts.push(text[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[from..].trim());
    (depth == 0 && !quoted).then_some(parts)
}

/// Splits a group from its member, at the slash that no parentheses and no quotes enclose.
pub fn group_and_member(text: &str) -> Option<(&str, &str)> {
    let (mut depth, mut quoted) = (0_usize, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'\'' => quoted = !quoted,
            _ if quoted => {}
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'/' if depth == 0 => return Some((text[..at].trim(), text[at + 1..].trim())),
            _ => {}
        }
    }
    None
}

fn network(bits: &str) -> Result<Network, RecipeError> {
    let bad = || RecipeError::Network(bits.to_owned());
    let length = |text: &str, most: u8| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|length| digits && (1..=most).contains(length)).ok_or_else(bad)
    };
    match bits.split_once(':') {
        None => Ok(Network { v4: length(bits, 32)?, v6: 128 }),
        Some((v4, v6)) => Ok(Network { v4: length(v4, 32)?, v6: length(v6, 128)? }),
    }
}

fn pattern(text: &str) -> Result<Pattern, RecipeError> {
    let bad = || RecipeError::Pattern(text.to_owned());
    let (path, is_open) = text.strip_suffix("/*").map_or((text, false), |path| (path, true));
    let names: Vec<&str> = path.strip_prefix('/').ok_or_else(bad)?.split('/').collect();
    let places: Vec<usize> = (0..names.len()).filter(|n| names[*n] == "{key}").collect();
    let [key] = places[..] else { return Err(bad()) };
    let key = u8::try_from(key).map_err(|_| bad())?;
    let segments = names.into_iter().map(|name| match name {
        "{key}" | "{}" => Ok(None),
        name if name.is_empty() || name.contains(['{', '}', '*', '?', '#', '%']) => Err(bad()),
        name => Ok(Some(name.into())),
    });
    Ok(Pattern { segments: segments.collect::<Result<_, _>>()?, key, is_open })
}

/// `/user/id` as RFC 6901 has it, or `sub` alone for the outermost.
fn pointer(text: &str) -> Result<Pointer, RecipeError> {
    let names = text.strip_prefix('/').unwrap_or(text).split('/');
    let names = names.map(|name| name.replace("~1", "/").replace("~0", "~").into());
    let names: Box<[Box<str>]> = names.collect();
    let good = names.iter().all(|name| !name.is_empty()) && names.len() <= POINTER_MAX;
    if good { Ok(Pointer(names)) } else { Err(RecipeError::Pointer(text.to_owned())) }
}

/// How deep a field may lie.
const POINTER_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    /// Knows one document: `{"sub": "ann", "o": {"n": 7}}`.
    struct One;

    impl Json for One {
        fn field(&self, json: &[u8], path: &[Box<str>]) -> Result<Vec<u8>, Miss> {
            if json != b"{}" {
                return Err(Miss::Unreadable);
            }
            let path: Vec<&str> = path.iter().map(|name| &**name).collect();
            match path[..] {
                ["sub"] => Ok(b"ann".to_vec()),
                ["o", "n"] => Ok(b"7".to_vec()),
                _ => Err(Miss::NoKey),
            }
        }
    }

    fn key(recipe: &str, target: &str, headers: &[(&str, &str)]) -> Result<String, Miss> {
        let (path, query) = target.split_once('?').map_or((target, None), |(p, q)| (p, Some(q)));
        let host = headers.iter().find(|(name, _)| *name == "host").map(|(_, value)| *value);
        let parts = Parts { path, query, host, headers };
        let client = Some("192.168.7.9".parse().unwrap());
        let whole = Whole { parts, method: "GET", client, body: Some(b"{}") };
        let recipe: Recipe = recipe.parse().unwrap();
        let key = recipe.key(&whole, &One)?.into_owned();
        Ok(String::from_utf8(key).unwrap())
    }

    #[test]
    fn each_source_finds_its_part() {
        // {} in base64url.
        let bearer = &[("authorization", "Bearer e30.e30.x"), ("x-token", "a.e30.b")];
        for (recipe, target, wanted) in [
            ("path:1", "/kv/a", Ok("a")),
            ("path(/shops/{key})", "/shops/7", Ok("7")),
            ("path(/shops/{key})", "/%73hops/a%20b", Ok("a b")),
            ("path(/shops/{key})", "/shops/7/x", Err(Miss::NoKey)),
            ("path(/shops/{key})", "/carts/7", Err(Miss::NoKey)),
            ("path(/shops/{key})", "/shops", Err(Miss::NoKey)),
            ("path(/shops/{key})", "/shops/", Err(Miss::Empty)),
            ("path(/{}/{key}/*)", "/any/7", Ok("7")),
            ("path(/{}/{key}/*)", "/any/7/x/y", Ok("7")),
            ("client", "/", Ok("192.168.7.9")),
            ("client:16", "/", Ok("192.168.0.0")),
            ("method", "/", Ok("GET")),
            ("jwt(sub)", "/", Ok("ann")),
            ("jwt(/o/n, header:x-token)", "/", Ok("7")),
            ("jwt(aud)", "/", Err(Miss::NoKey)),
            ("json(/o/n)", "/", Ok("7")),
            ("'x y'", "/", Ok("x y")),
            ("lower(query:Q)", "/?Q=AbC", Ok("abc")),
            ("first(header:none, cookie:none, path:0)", "/a", Ok("a")),
            ("first(header:none, 'else')", "/a", Ok("else")),
            ("first(path:0, 'else')", "/%zz", Err(Miss::Encoding(0))),
            ("join(path:0, method)", "/a", Ok("\0\u{1}a\0\u{3}GET")),
            ("join(path:0, header:none)", "/a", Err(Miss::NoKey)),
        ] {
            assert_eq!(
                key(recipe, target, bearer),
                wanted.map(str::to_owned),
                "{recipe} of {target}"
            );
        }
    }

    #[test]
    fn a_token_that_cannot_be_read_is_refused_and_none_is_missing() {
        for (line, wanted) in [
            ("bearer e30.e30.x", Ok("ann")),
            ("Basic abc", Err(Miss::NoKey)),
            ("Bearer ", Err(Miss::Unreadable)),
            ("Bearer a.b", Err(Miss::Unreadable)),
            ("Bearer a.e30.b.c", Err(Miss::Unreadable)),
            ("Bearer a.e3*.b", Err(Miss::Unreadable)),
            ("Bearer a.e31.b", Err(Miss::Unreadable)),
            ("Bearer a.x.b", Err(Miss::Unreadable)),
        ] {
            let found = key("jwt(sub)", "/", &[("authorization", line)]);
            assert_eq!(found, wanted.map(str::to_owned), "{line}");
        }
        assert_eq!(key("jwt(sub)", "/", &[]), Err(Miss::NoKey));
        let twice = [("authorization", "Bearer a.e30.b"), ("authorization", "Bearer a.e30.b")];
        assert_eq!(key("jwt(sub)", "/", &twice), Err(Miss::Twice));
        assert_eq!(key("metadata:k-bin", "/", &[("k-bin", "YWI")]), Ok("ab".to_owned()));
        assert_eq!(key("metadata:k-bin", "/", &[("k-bin", "YWI=")]), Ok("ab".to_owned()));
        assert_eq!(key("metadata:k", "/", &[("k", "YWI")]), Ok("YWI".to_owned()));
    }

    #[test]
    fn no_two_lists_of_parts_are_joined_to_one_key() {
        let join =
            |a: &str, b: &str| key("join(path:0, path:1)", &format!("/{a}/{b}"), &[]).unwrap();
        let words = ["a", "ab", "abc", "b", "bc", "c", "%00", "%00%01a", "%01"];
        let mut seen = std::collections::BTreeSet::new();
        for a in words {
            for b in words {
                assert!(seen.insert(join(a, b)), "{a} {b}");
            }
        }
    }

    #[test]
    fn networks_of_both_kinds_are_cut() {
        let of = |bits: &str, address: &str| network(bits).unwrap().of(address.parse().unwrap());
        assert_eq!(of("24", "10.1.2.3"), "10.1.2.0");
        assert_eq!(of("24", "::ffff:10.1.2.3"), "10.1.2.0");
        assert_eq!(of("24", "2001:db8::1"), "2001:db8::1");
        assert_eq!(of("24:32", "2001:db8:7::1"), "2001:db8::");
        assert_eq!(of("32:128", "2001:db8::1"), "2001:db8::1");
        assert_eq!(of("1:1", "255.0.0.1"), "128.0.0.0");
    }

    #[test]
    fn text_forms_come_back_and_bad_ones_are_refused_with_a_hint() {
        for good in [
            "path:1",
            "path(/shops/{key}/{}/*)",
            "client",
            "client:24",
            "client:24:56",
            "method",
            "metadata:user-bin",
            "jwt(/sub)",
            "jwt(/a/b~1c, cookie:token)",
            "json(/user/id)",
            "'a, (b'",
            "lower(host)",
            "first(header:a, join(path:1, 'x'))",
        ] {
            assert_eq!(good.parse::<Recipe>().unwrap().to_string(), good);
        }
        for (bad, start) in [
            ("", "\"\" is no key source"),
            ("hots", "\"hots\" is no key source"),
            ("pth(/a)", "pth(...) is no key source"),
            ("path(/a)", "\"/a\" is no pattern"),
            ("path(/{key}/{key})", "\"/{key}/{key}\" is no pattern"),
            ("path(a/{key})", "\"a/{key}\" is no pattern"),
            ("client:33", "\"33\" is no length"),
            ("client:24:0", "\"24:0\" is no length"),
            ("json()", "\"\" names no field"),
            ("json(/a//b)", "\"/a//b\" names no field"),
            ("first(host)", "first(..) takes two"),
            ("join()", "join(..) takes two"),
            ("lower(host", "\"lower(host\" has a parenthesis"),
            ("lower(host))", "\"lower(host))\" has a parenthesis"),
            ("'a", "\"'a\" has a parenthesis or a quote"),
            ("header:a b", "\"a b\" is no header name"),
            ("lower(lower(lower(lower(lower(lower(lower(lower(host))))))))", "recipes are nested"),
        ] {
            let error = bad.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.starts_with(start), "{bad}: {error}");
        }
        assert_eq!(group_and_member("host/path:1"), Some(("host", "path:1")));
        assert_eq!(group_and_member("path(/a/{key})"), None);
        assert_eq!(group_and_member("'/'/path(/a/{key})"), Some(("'/'", "path(/a/{key})")));
    }

    #[test]
    fn nothing_is_copied_when_there_is_nothing_to_decode() {
        let parts = Parts { path: "/kv/a", query: None, host: None, headers: &[][..] };
        let whole = Whole { parts, method: "GET", client: None, body: None };
        for source in
            ["path:1", "path(/kv/{key})", "method", "'a'", "lower(path:1)", "first(host, path:1)"]
        {
            let recipe: Recipe = source.parse().unwrap();
            assert!(matches!(recipe.key(&whole, &NoJson).unwrap(), Cow::Borrowed(_)), "{source}");
        }
        assert_eq!("client".parse::<Recipe>().unwrap().key(&whole, &NoJson), Err(Miss::NoKey));
    }

    #[test]
    fn a_recipe_says_in_words_where_it_looks() {
        let said = "first(header:a, join(client:24, 'x'))".parse::<Recipe>().unwrap().describe();
        assert_eq!(
            said,
            "the value of the header a, or else the network of the client's address, of 24 bits or 128 with IPv6 together with always \"x\""
        );
    }
}

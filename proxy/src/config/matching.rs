//! Which route takes a request: the most specific one, by host, then path, then method, then headers. Pure.
//!
//! Two routes of which neither is more specific and which one request could match are refused when the table is made, so that
//! no request ever depends on the order of lines in a file.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use http::header::{HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Method};

use crate::config::pattern::{HostPattern, PathPattern, plain, without_port};

/// Which requests a route takes: those that fit all that is given. With nothing given it takes all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The host that is asked for, without its port.
    pub host: Option<HostPattern>,
    /// The path, without its query.
    pub path: Option<PathPattern>,
    /// Any of these methods; all if there is none.
    pub methods: Vec<Method>,
    /// Headers that must be there with exactly this value.
    pub headers: BTreeMap<HeaderKey, HeaderValue>,
}

/// The name of a header, in an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderKey(pub HeaderName);

impl Ord for HeaderKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.as_str().cmp(other.0.as_str())
    }
}

impl PartialOrd for HeaderKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// In short: `shop.example.com/carts/* GET x-canary=yes`.
impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(host) = &self.host {
            host.fmt(f)?;
        }
        match &self.path {
            Some(path) => path.fmt(f)?,
            None => f.write_str("/*")?,
        }
        for (n, method) in self.methods.iter().enumerate() {
            write!(f, "{}{method}", if n == 0 { ' ' } else { ',' })?;
        }
        for (name, value) in &self.headers {
            write!(f, " {}={}", name.0, String::from_utf8_lossy(value.as_bytes()))?;
        }
        Ok(())
    }
}

/// What decides between two routes that both take a request: the greater.
type Rank = (HostRank, PathRank, bool, usize);
type HostRank = (bool, usize);
type PathRank = (bool, usize);

impl Match {
    fn rank(&self) -> Rank {
        let host = match &self.host {
            Some(HostPattern::Exact(host)) => (true, host.len()),
            Some(HostPattern::Below(host)) => (false, host.len()),
            None => (false, 0),
        };
        // Below the root is everything, and yet more than nothing was said.
        let path = match &self.path {
            Some(PathPattern::Exact(path)) => (true, path.len() + 1),
            Some(PathPattern::Below(path)) => (false, path.len() + 1),
            None => (false, 0),
        };
        (host, path, !self.methods.is_empty(), self.headers.len())
    }

    fn takes(&self, asked: &Asked<'_>) -> bool {
        self.misses(asked).next().is_none()
    }

    fn takes_but_for_method(&self, asked: &Asked<'_>) -> bool {
        self.misses(asked).all(|miss| matches!(miss, Miss::Method(_)))
    }

    /// Gives what it asks for and a request does not have.
    fn misses<'a>(&'a self, asked: &Asked<'_>) -> impl Iterator<Item = Miss<'a>> {
        let host = self.host.iter().filter(|host| !host.takes(asked.host)).map(Miss::Host);
        let path = self.path.iter().filter(|path| !path.takes(asked.path)).map(Miss::Path);
        let lacks = |(name, value): &(&HeaderKey, &HeaderValue)| {
            !asked.headers.get_all(&name.0).iter().any(|given| given == *value)
        };
        let headers = self.headers.iter().filter(lacks).map(|(name, _)| Miss::Header(name));
        let is_other = !self.methods.is_empty() && !self.methods.contains(asked.method);
        let method = is_other.then_some(Miss::Method(&self.methods));
        host.chain(path).chain(headers).chain(method)
    }

    /// Says whether there is a request that both take, and neither is more specific.
    fn vies_with(&self, other: &Self) -> bool {
        let methods = self.methods.is_empty()
            || other.methods.is_empty()
            || self.methods.iter().any(|method| other.methods.contains(method));
        let headers = self
            .headers
            .iter()
            .all(|(name, value)| other.headers.get(name).is_none_or(|theirs| theirs == value));
        self.rank() == other.rank()
            && self.host == other.host
            && self.path == other.path
            && methods
            && headers
    }
}

/// What a route asks for and a request does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss<'a> {
    /// It is for another host.
    Host(&'a HostPattern),
    /// It is for another path.
    Path(&'a PathPattern),
    /// A header is not there, or has another value.
    Header(&'a HeaderKey),
    /// It is for other methods.
    Method(&'a [Method]),
}

impl fmt::Display for Miss<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) => write!(f, "its host is {host}"),
            Self::Path(path) => write!(f, "its path is {path}"),
            // Its value may be a secret.
            Self::Header(name) => write!(f, "it asks for a certain value of the header {}", name.0),
            Self::Method(methods) => {
                let methods: Vec<&str> = methods.iter().map(Method::as_str).collect();
                write!(f, "it takes {}", methods.join(", "))
            }
        }
    }
}

/// What of a request decides which route takes it.
struct Asked<'a> {
    host: &'a str,
    path: &'a [u8],
    method: &'a Method,
    headers: &'a HeaderMap,
}

/// All routes, the most specific first. It gives the place that a route had in the list it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    entries: Vec<(Match, usize)>,
    reads_paths: bool,
}

/// Why there is no table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "routes {first} and {second} both take {what}, and neither is more specific: tell them apart by host, path, method or headers"
)]
pub struct Ambiguous {
    /// The place of one, counted from 1.
    pub first: usize,
    /// The place of the other.
    pub second: usize,
    /// What both take.
    pub what: String,
}

/// Why no route takes a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Astray {
    /// No route is for such a request.
    NoRoute,
    /// Routes are, but for other methods.
    Method(Vec<Method>),
    /// The path has `.` or `..` between slashes, so that it may lead elsewhere for whoever reads it next.
    Dots,
}

impl Table {
    /// Sorts routes by how specific they are.
    pub fn new<'a>(matches: impl IntoIterator<Item = &'a Match>) -> Result<Self, Ambiguous> {
        let mut entries: Vec<(Match, usize)> =
            matches.into_iter().cloned().enumerate().map(|(place, m)| (m, place)).collect();
        // Sorting is stable, so those that vie stay in the order they were written in.
        entries.sort_by_key(|(given, _)| Reverse(given.rank()));
        for (n, (one, first)) in entries.iter().enumerate() {
            let rivals =
                entries[n + 1..].iter().take_while(|(other, _)| other.rank() == one.rank());
            for (other, second) in rivals {
                if one.vies_with(other) {
                    let (first, second) = (first + 1, second + 1);
                    return Err(Ambiguous { first, second, what: other.to_string() });
                }
            }
        }
        let reads_paths = entries.iter().any(|(given, _)| given.path.is_some());
        Ok(Self { entries, reads_paths })
    }

    /// Gives the places of the routes, the most specific first.
    pub fn order(&self) -> impl Iterator<Item = usize> {
        self.entries.iter().map(|(_, place)| *place)
    }

    /// Finds the route for a request to `host`, which may have a port.
    pub fn find(&self, head: &Parts, host: Option<&str>) -> Result<usize, Astray> {
        // One route for everything is what most proxies have.
        if let [(only, place)] = &self.entries[..]
            && *only == Match::default()
        {
            return Ok(*place);
        }
        self.ask(head, host, |asked| {
            let found = self.entries.iter().find(|(given, _)| given.takes(asked));
            found.map(|(_, place)| *place).ok_or_else(|| self.astray(asked))
        })?
    }

    /// Says of each route, the most specific first, what it misses in a request. The first that misses nothing takes it.
    pub fn misses(
        &self,
        head: &Parts,
        host: Option<&str>,
    ) -> Result<Vec<(usize, Vec<Miss<'_>>)>, Astray> {
        self.ask(head, host, |asked| {
            let all = self.entries.iter();
            all.map(|(given, place)| (*place, given.misses(asked).collect())).collect()
        })
    }

    fn ask<T>(
        &self,
        head: &Parts,
        host: Option<&str>,
        ask: impl FnOnce(&Asked<'_>) -> T,
    ) -> Result<T, Astray> {
        let path = head.uri.path();
        let path = if self.reads_paths {
            plain(path).ok_or(Astray::Dots)?
        } else {
            path.as_bytes().into()
        };
        Ok(ask(&Asked {
            host: without_port(host.unwrap_or_default()),
            path: &path,
            method: &head.method,
            headers: &head.headers,
        }))
    }

    fn astray(&self, asked: &Asked<'_>) -> Astray {
        let others = self.entries.iter().filter(|(given, _)| given.takes_but_for_method(asked));
        let mut methods: Vec<Method> =
            others.flat_map(|(given, _)| given.methods.iter().cloned()).collect();
        methods.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        methods.dedup();
        if methods.is_empty() { Astray::NoRoute } else { Astray::Method(methods) }
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    /// `HOST/PATH METHOD,.. name=value`, each but the first may be left out; `*` is any host.
    fn read(text: &str) -> Match {
        let mut words = text.split(' ');
        let place = words.next().unwrap();
        let at = place.find('/').unwrap_or(place.len());
        let (host, path) = place.split_at(at);
        let mut read = Match {
            host: (host != "*").then(|| host.parse().unwrap()),
            path: (!path.is_empty()).then(|| path.parse().unwrap()),
            ..Match::default()
        };
        for word in words {
            match word.split_once('=') {
                Some((name, value)) => {
                    let name = HeaderKey(name.parse().unwrap());
                    read.headers.insert(name, value.parse().unwrap());
                }
                None => read.methods = word.split(',').map(|m| m.parse().unwrap()).collect(),
            }
        }
        read
    }

    fn table(routes: &[&str]) -> Result<Table, Ambiguous> {
        let routes: Vec<Match> = routes.iter().map(|route| read(route)).collect();
        Table::new(&routes)
    }

    fn find(table: &Table, request: &str) -> Result<usize, Astray> {
        let mut words = request.split(' ');
        let (method, place) = (words.next().unwrap(), words.next().unwrap());
        let (host, path) = place.split_at(place.find('/').unwrap());
        let mut head = Request::builder().method(method).uri(path);
        for (name, value) in words.map(|word| word.split_once('=').unwrap()) {
            head = head.header(name, value);
        }
        table.find(&head.body(()).unwrap().into_parts().0, Some(host))
    }

    #[test]
    fn the_most_specific_route_takes_a_request() {
        let table = table(&[
            "*/*",
            "*.example.com",
            "shop.example.com",
            "shop.example.com/carts/*",
            "shop.example.com/carts/new",
            "shop.example.com/carts/* GET",
            "shop.example.com/carts/* GET x-canary=yes",
            "*/carts/*",
        ])
        .unwrap();
        for (request, route) in [
            ("GET other.org/", 0),
            ("GET a.example.com/", 1),
            ("GET example.com/", 0),
            ("GET a.b.example.com:8080/x", 1),
            ("GET shop.example.com/", 2),
            ("GET SHOP.Example.com.:80/", 2),
            ("POST shop.example.com/carts", 3),
            ("POST shop.example.com/carts/1/2", 3),
            ("POST shop.example.com/cartsx", 2),
            ("GET shop.example.com/carts/new", 4),
            ("GET shop.example.com/carts/1", 5),
            ("GET shop.example.com/carts/1 x-canary=yes", 6),
            ("GET shop.example.com/carts/1 x-canary=no", 5),
            ("GET other.org/carts", 7),
            ("GET other.org/%63arts/1", 7),
            ("GET other.org/x%2fcarts", 0),
        ] {
            assert_eq!(find(&table, request), Ok(route), "{request}");
        }
    }

    #[test]
    fn a_request_that_no_route_takes_is_told_why() {
        let table = table(&["a.org/x/* GET", "a.org/x/* PUT,DELETE", "a.org/y"]).unwrap();
        assert_eq!(find(&table, "GET b.org/x"), Err(Astray::NoRoute));
        assert_eq!(find(&table, "GET a.org/z"), Err(Astray::NoRoute));
        assert_eq!(find(&table, "PUT a.org/y"), Ok(2));
        let methods = vec![Method::DELETE, Method::GET, Method::PUT];
        assert_eq!(find(&table, "POST a.org/x/1"), Err(Astray::Method(methods)));
        for dots in ["/x/../y", "/x/%2e%2E/y", "/./x", "/x/.."] {
            assert_eq!(find(&table, &format!("GET a.org{dots}")), Err(Astray::Dots), "{dots}");
        }
        assert_eq!(find(&table, "GET a.org/x/..."), Ok(0));
    }

    #[test]
    fn a_route_that_does_not_take_a_request_says_what_it_misses() {
        let table = table(&["a.org/x/* GET x-a=1", "a.org/x", "*/x/*", "b.org"]).unwrap();
        let head = Request::put("/x/1").body(()).unwrap().into_parts().0;
        let misses =
            table.misses(&head, Some("a.org")).unwrap().into_iter().map(|(place, misses)| {
                let misses: Vec<String> = misses.iter().map(ToString::to_string).collect();
                (place, misses.join("; "))
            });
        let expected = [
            (1, "its path is /x"),
            (0, "it asks for a certain value of the header x-a; it takes GET"),
            (3, "its host is b.org"),
            (2, ""),
        ];
        let expected = expected.map(|(place, misses)| (place, misses.to_owned()));
        assert_eq!(misses.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn two_routes_for_one_request_are_refused() {
        for (routes, places) in [
            (&["*/a", "*/b", "*/a"][..], (1, 3)),
            (&["a.org", "A.ORG"], (1, 2)),
            (&["a.org/x GET,PUT", "a.org/x PUT"], (1, 2)),
            (&["a.org x=1", "a.org y=2"], (1, 2)),
            (&["*", "*"], (1, 2)),
        ] {
            let error = table(routes).unwrap_err();
            assert_eq!((error.first, error.second), places, "{routes:?}");
        }
        for fine in [
            &["a.org/x GET", "a.org/x PUT"][..],
            &["a.org x=1", "a.org x=2"],
            &["a.org x=1", "a.org GET"],
            &["a.org", "b.org", "*.org", "*"],
            &["*/*", "*"],
        ] {
            assert!(table(fine).is_ok(), "{fine:?}");
        }
    }
}

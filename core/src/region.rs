//! Which way a request goes when keys live in several regions: straight to the task, or by a gateway of the task's region, where the
//! look-up is repeated.
//!
//! A gateway is whatever forwards there: a proxy, or an application's task that backhauls. Going by one keeps the connections
//! between two data centres few, and needs only the gateways to be reachable from outside. A region without gateways is reached
//! straight; so is a task that says no region. One that does not accept connections is passed over for [`RETRY_AFTER`]; then a single
//! request tries it, so that a dead link costs one request a second its connect time-out, and the rest nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::key::SliceKey;
use crate::task::{Address, AddressError, LABEL_MAX_BYTES, SessionId, Task};
use crate::time::Time;

/// The label of a task that names its region.
pub const REGION: &str = "region";
/// How long a gateway that did not accept a connection is passed over: short, for it may be back, and long beside the millisecond
/// that a refused connection costs.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The most gateways in all: each is an address that an operator wrote down.
pub const GATEWAYS_MAX: usize = 1_000;

/// Names a region, as tasks do by their label `region`: 1 to 128 letters, digits, `-`, `_`, `.` and `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region(Arc<str>);

/// Why a text names no region.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no region: give 1 to {LABEL_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_', '.' and '/', as in the tasks' label region"
)]
pub struct RegionError(String);

impl Region {
    /// Gives the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Region {
    type Err = RegionError;

    fn from_str(text: &str) -> Result<Self, RegionError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
        if (1..=LABEL_MAX_BYTES).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(RegionError(text.chars().take(2 * LABEL_MAX_BYTES).collect()))
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Where requests for keys of a region may be sent: `us=gw1.us.example:8080`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gateway {
    /// The region that it is in.
    pub region: Region,
    /// Where it takes requests.
    pub address: Address,
}

/// Why a text is no gateway.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatewayError {
    /// There is no `=`.
    #[error("{0:?} is no gateway: give REGION=HOST:PORT, such as us=10.8.0.1:8080")]
    Form(String),
    /// What stands before it is no region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// What stands behind it is no address.
    #[error(transparent)]
    Address(#[from] AddressError),
}

impl FromStr for Gateway {
    type Err = GatewayError;

    fn from_str(text: &str) -> Result<Self, GatewayError> {
        let form = || GatewayError::Form(text.chars().take(2 * LABEL_MAX_BYTES).collect());
        let (region, address) = text.split_once('=').ok_or_else(form)?;
        Ok(Self { region: region.parse()?, address: address.parse()? })
    }
}

impl fmt::Display for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.region, self.address)
    }
}

/// What one caller knows of regions: its own, and the gateways of others.
#[derive(Clone, Debug)]
pub struct Regions {
    home: Region,
    // No list is empty, and the own region has none.
    gateways: BTreeMap<Region, Vec<Address>>,
}

/// Why regions cannot be used as they were given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionsError {
    /// A gateway is in the own region.
    #[error("{0} is a gateway of the own region: leave it out, for its tasks are asked straight")]
    Home(Gateway),
    /// A gateway is there twice.
    #[error("the gateway {0} is given twice")]
    Twice(Gateway),
    /// There are too many.
    #[error("{0} gateways are too many: give at most {GATEWAYS_MAX}")]
    TooMany(usize),
}

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way<'a> {
    /// To this task.
    Straight(&'a Arc<Task>),
    /// To a gateway of this region, which looks again.
    Gateway(&'a Region),
}

impl Regions {
    /// Takes the own region and the gateways of others.
    pub fn new(
        home: Region,
        gateways: impl IntoIterator<Item = Gateway>,
    ) -> Result<Self, RegionsError> {
        let mut lists: BTreeMap<Region, Vec<Address>> = BTreeMap::new();
        let mut count = 0;
        for gateway in gateways {
            count += 1;
            if gateway.region == home {
                return Err(RegionsError::Home(gateway));
            }
            let list = lists.entry(gateway.region.clone()).or_default();
            if list.contains(&gateway.address) {
                return Err(RegionsError::Twice(gateway));
            }
            list.push(gateway.address);
        }
        if count > GATEWAYS_MAX {
            return Err(RegionsError::TooMany(count));
        }
        Ok(Self { home, gateways: lists })
    }

    /// Names the own region.
    pub const fn home(&self) -> &Region {
        &self.home
    }

    /// Walks all gateways, by region.
    pub fn gateways(&self) -> impl Iterator<Item = Gateway> {
        self.gateways.iter().flat_map(|(region, list)| {
            let of =
                |address: &Address| Gateway { region: region.clone(), address: address.clone() };
            list.iter().map(of)
        })
    }

    /// Says which way a request goes whose look-up found `task` among `replicas`: to one at home if there is any, wherever `task` is.
    /// `failed` did not answer a moment ago, and is passed over where there is another.
    pub fn way<'a>(
        &'a self,
        mut task: &'a Arc<Task>,
        replicas: impl ExactSizeIterator<Item = &'a Arc<Task>> + Clone,
        failed: Option<SessionId>,
    ) -> Way<'a> {
        let region = |task: &'a Task| task.info.labels.get(REGION).map(String::as_str);
        let is_far =
            |task: &'a Task| region(task).is_some_and(|region| region != self.home.as_str());
        if replicas.len() > 1 && (is_far(task) || failed == Some(task.session)) {
            let others = replicas.filter(|task| failed != Some(task.session));
            let near: Vec<_> = others.clone().filter(|task| !is_far(task)).collect();
            let choice = if near.is_empty() { others.collect() } else { near };
            // Those that are not asked stand in turn for those that are.
            if !choice.contains(&task) && !choice.is_empty() {
                task = choice[(task.session.0 % choice.len() as u64) as usize];
            }
        }
        let far = region(task).filter(|_| is_far(task));
        let Some(far) = far else { return Way::Straight(task) };
        let known = self.gateways.keys().find(|known| known.as_str() == far);
        known.map_or(Way::Straight(task), Way::Gateway)
    }
}

/// What one caller remembers of the gateways that it knows: who did not answer, and how often.
#[derive(Clone, Debug)]
pub struct Links(BTreeMap<Gateway, Link>);

/// One gateway, as one caller knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// When it may be tried again, if it did not accept the last connection.
    pub retry_at: Option<Time>,
    /// Requests sent to it.
    pub sent: u64,
    /// Those of them that it did not accept a connection for.
    pub failed: u64,
}

impl Links {
    /// Begins with all gateways good.
    pub fn new(regions: &Regions) -> Self {
        Self(regions.gateways().map(|gateway| (gateway, Link::default())).collect())
    }

    /// Says which gateway of a region a request for `key` is sent to, after those in `tried`; none if nobody is left. A key keeps to
    /// its gateway, and the keys spread over all. To be followed by `answered` or `failed`.
    pub fn next(
        &mut self,
        regions: &Regions,
        region: &Region,
        key: SliceKey,
        tried: &[Address],
        now: Time,
    ) -> Option<Address> {
        let list = regions.gateways.get(region)?;
        // The keys of a region may lie together, so the place of a key says nothing until it is mixed (Fibonacci hashing).
        let mixed = key.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let first = ((u128::from(mixed) * list.len() as u128) >> 64) as usize;
        let in_turn = list[first..].iter().chain(&list[..first]);
        for address in in_turn.filter(|address| !tried.contains(address)) {
            let gateway = Gateway { region: region.clone(), address: address.clone() };
            let link = self.0.entry(gateway).or_default();
            match &mut link.retry_at {
                Some(retry_at) if *retry_at > now => continue,
                // This request finds out; others pass it over meanwhile.
                Some(retry_at) => *retry_at = now + RETRY_AFTER,
                None => {}
            }
            link.sent += 1;
            return Some(address.clone());
        }
        None
    }

    /// A gateway has accepted a request. Says whether it had not before.
    pub fn answered(&mut self, gateway: &Gateway) -> bool {
        self.0.get_mut(gateway).is_some_and(|link| link.retry_at.take().is_some())
    }

    /// A gateway did not accept a connection. Says whether it had before.
    pub fn failed(&mut self, gateway: &Gateway, now: Time) -> bool {
        self.0.get_mut(gateway).is_some_and(|link| {
            link.failed += 1;
            link.retry_at.replace(now + RETRY_AFTER).is_none()
        })
    }

    /// Walks all gateways, by region.
    pub fn iter(&self) -> impl Iterator<Item = (&Gateway, Link)> {
        self.0.iter().map(|(gateway, link)| (gateway, *link))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::TaskInfo;

    fn regions(gateways: &[&str]) -> Result<Regions, RegionsError> {
        let gateways = gateways.iter().map(|text| text.parse().unwrap());
        Regions::new("eu".parse().unwrap(), gateways)
    }

    fn task(session: u64, region: &str) -> Arc<Task> {
        let name = format!("t{session}").parse().unwrap();
        let mut info = TaskInfo::new(name, session, "10.0.0.1:80".parse().unwrap());
        if !region.is_empty() {
            info.labels.insert(REGION.to_owned(), region.to_owned());
        }
        Arc::new(Task::new(SessionId(session), info))
    }

    #[test]
    fn only_what_lives_beyond_a_gateway_goes_by_one() {
        let regions = regions(&["us=10.8.0.1:80"]).unwrap();
        let us: Region = "us".parse().unwrap();
        for (region, way) in [
            ("eu", None),
            ("us", Some(&us)),
            // No gateway of it is known; no region is said.
            ("ap", None),
            ("", None),
        ] {
            let task = task(1, region);
            let wanted = way.map_or(Way::Straight(&task), Way::Gateway);
            assert_eq!(regions.way(&task, [&task].into_iter(), None), wanted, "{region}");
        }
    }

    #[test]
    fn of_several_replicas_one_at_home_is_taken() {
        let regions = regions(&["us=10.8.0.1:80"]).unwrap();
        let replicas = [task(1, "us"), task(2, "eu"), task(3, "ap"), task(4, "eu"), task(5, "us")];
        for (found, taken) in [(0, 3), (1, 1), (2, 3), (3, 3), (4, 3)] {
            let way = regions.way(&replicas[found], replicas.iter(), None);
            assert_eq!(way, Way::Straight(&replicas[taken]), "{found}");
        }
        let far = [task(1, "us"), task(2, "us")];
        assert!(matches!(regions.way(&far[1], far.iter(), None), Way::Gateway(_)));
    }

    #[test]
    fn one_that_did_not_answer_is_passed_over_where_there_is_another() {
        let regions = regions(&["us=10.8.0.1:80"]).unwrap();
        let us: Region = "us".parse().unwrap();
        let [a, b, c] = [task(1, "eu"), task(2, "eu"), task(3, "us")];
        let failed = |task: &Arc<Task>| Some(task.session);
        let all = [&a, &b, &c];
        for found in all {
            assert_eq!(regions.way(found, all.into_iter(), failed(&a)), Way::Straight(&b));
        }
        // The last one at home: then the far one, by its gateway.
        for found in [&a, &c] {
            assert_eq!(regions.way(found, [&a, &c].into_iter(), failed(&a)), Way::Gateway(&us));
        }
        // There is no other.
        assert_eq!(regions.way(&a, [&a].into_iter(), failed(&a)), Way::Straight(&a));
    }

    #[test]
    fn who_failed_is_passed_over_and_tried_again_by_one_request_at_a_time() {
        let regions = regions(&["us=a:80", "us=b:80", "ap=c:80"]).unwrap();
        let us: Region = "us".parse().unwrap();
        let mut links = Links::new(&regions);
        let next = |links: &mut Links, key: u64, tried: &[&str], now: Duration| {
            let tried: Vec<Address> = tried.iter().map(|text| text.parse().unwrap()).collect();
            let found = links.next(&regions, &us, SliceKey(key), &tried, Time::ZERO + now);
            found.map(|address| address.to_string())
        };
        let gateway = |text: &str| text.parse::<Gateway>().unwrap();
        let (at, second) = (Duration::ZERO, RETRY_AFTER);
        let keys: Vec<_> = (0..100).filter_map(|key| next(&mut links, key, &[], at)).collect();
        let of_a = keys.iter().filter(|address| *address == "a:80").count();
        assert!((30..=70).contains(&of_a), "the keys spread: {of_a} of 100");
        let of_b = (0..100).find(|key| keys[*key as usize] == "b:80").unwrap();
        assert_eq!(next(&mut links, of_b, &[], at).as_deref(), Some("b:80"), "a key keeps to one");
        assert!(links.failed(&gateway("us=b:80"), Time::ZERO));
        assert!(!links.failed(&gateway("us=b:80"), Time::ZERO), "that is no news");
        for _ in 0..3 {
            assert_eq!(next(&mut links, of_b, &[], at).as_deref(), Some("a:80"));
        }
        assert_eq!(next(&mut links, of_b, &["a:80"], at), None, "nobody is left");
        // When its time has come, one request finds out whether it is back, and then the next.
        assert_eq!(next(&mut links, of_b, &[], second).as_deref(), Some("b:80"));
        assert_eq!(next(&mut links, of_b, &[], second).as_deref(), Some("a:80"));
        assert!(links.answered(&gateway("us=b:80")) && !links.answered(&gateway("us=a:80")));
        for _ in 0..3 {
            assert_eq!(next(&mut links, of_b, &[], second).as_deref(), Some("b:80"));
        }
        let (_, link) = links.iter().find(|(known, _)| **known == gateway("us=b:80")).unwrap();
        assert_eq!((link.failed, link.retry_at), (2, None));
        // A region without gateways has none to offer.
        let eu = "eu".parse().unwrap();
        assert_eq!(links.next(&regions, &eu, SliceKey(0), &[], Time::ZERO), None);
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        for (text, says) in [
            ("us", "\"us\" is no gateway: give REGION=HOST:PORT"),
            ("=10.0.0.1:80", "\"\" is no region"),
            ("u s=10.0.0.1:80", "\"u s\" is no region"),
            ("us=10.0.0.1", "\"10.0.0.1\" is no address: give host:port"),
            ("us=10.0.0.1:0", "is no address"),
        ] {
            let error = text.parse::<Gateway>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        for (gateways, says) in [
            (&["us=a:80", "eu=b:80"][..], "eu=b:80 is a gateway of the own region"),
            (&["us=a:80", "us=a:80"], "the gateway us=a:80 is given twice"),
        ] {
            assert!(regions(gateways).unwrap_err().to_string().contains(says), "{gateways:?}");
        }
        let many: Vec<String> = (1..=GATEWAYS_MAX + 1).map(|n| format!("us=a:{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(regions(&many).unwrap_err(), RegionsError::TooMany(GATEWAYS_MAX + 1));
        assert!(regions(&["us=a:80", "ap=a:80"]).is_ok(), "one may serve two regions");
    }
}

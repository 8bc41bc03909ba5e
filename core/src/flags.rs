//! Flags: what operators tell every proxy through the log of the control plane. So far these are pauses, which have requests
//! held for a while.
//!
//! A pause travels as a length of time. Each proxy counts it on its own clock from when it first heard of the pause, so that
//! it ends also where no assigner is left to say so; the leader takes it out of the log when it is over by its own.
//!
//! What a proxy makes of a pause, from one version of the flags to the next:
//!
//! | it | then |
//! |---|---|
//! | comes, or is there still | requests in its scope are held, until it has lasted by the proxy's clock; then `at_end` is done |
//! | is `Releasing { over }` | those held go on, spread over that time; new ones behind them, then at once |
//! | is gone and was `Holding` | it has lasted by the leader's clock: `at_end` is done now |
//! | is gone and was `Releasing` | whatever is held still goes on now |
//!
//! An id is never given twice: a pause that a proxy has ended by its own clock stays ended, though the flags still name it.
//!
//! A proxy follows the flags by `mandoline::flags::Follower`: `flags()` gives a `watch::Receiver<Arc<Flags>>`, `standing()` a
//! `watch::Sender<Standing>` that the proxy keeps up to date, so that the leader knows when nothing is in flight any more.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::generation::Generation;
use crate::key::SliceKey;
use crate::name::JobName;
use crate::slice::Slice;

/// The most pauses at a time: each request in a proxy is looked up in all of them.
pub const PAUSES_MAX: usize = 1_000;
/// The least that a pause may last: below this it is over before all proxies have heard of it.
pub const LASTS_MIN: Duration = Duration::from_secs(1);
/// The most that a pause may last: clients give up long before, and a forgotten pause must not be an outage for a day.
pub const LASTS_MAX: Duration = Duration::from_secs(60 * 60);
/// The longest time over which held requests are let go.
pub const RELEASE_MAX: Duration = Duration::from_secs(10 * 60);
/// The longest note on why a pause is, in bytes: a line.
pub const WHY_MAX_BYTES: usize = 200;
/// The longest host of a scope, in bytes: a DNS name.
pub const HOST_MAX_BYTES: usize = 253;
/// The longest path of a scope, in bytes.
pub const PATH_MAX_BYTES: usize = 1_024;
/// The most methods of a scope: more than HTTP has.
pub const METHODS_MAX: usize = 16;
/// The longest method, in bytes.
pub const METHOD_MAX_BYTES: usize = 32;

/// Which pause: minted by `State::apply`, never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PauseId(pub u64);

impl fmt::Display for PauseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("p{}", self.0))
    }
}

/// A text is no pause's id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no pause: give its id as `mandoline pause list` shows it, such as p7")]
pub struct PauseIdError(String);

impl FromStr for PauseId {
    type Err = PauseIdError;

    fn from_str(text: &str) -> Result<Self, PauseIdError> {
        let digits = text.strip_prefix('p').filter(|rest| rest.bytes().all(|b| b.is_ascii_digit()));
        let number = digits.and_then(|digits| digits.parse().ok());
        number.map(Self).ok_or_else(|| PauseIdError(short(text)))
    }
}

/// Which requests: those that fit every part that is given. At least one is, see [`check`](Self::check).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Requests for this job.
    pub job: Option<JobName>,
    /// Requests whose key lies here; a single key is a slice of its own. Those without a key are not meant.
    pub slice: Option<Slice>,
    /// Requests for this host: in lower case, without a port; `*.example.com` means every name below.
    pub host: Option<Box<str>>,
    /// Requests for this path and what is below: `/carts` covers `/carts/7` and not `/cartsy`.
    pub path: Option<Box<str>>,
    /// Requests by any of these methods; by every method if there is none.
    pub methods: Vec<Box<str>>,
}

/// What of a request decides whether a scope covers it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The job that its route leads to, if it leads to one.
    pub job: Option<&'a JobName>,
    /// Where its key lies, if it has one.
    pub key: Option<SliceKey>,
    /// The host that is asked for, without its port, in any case; empty if there is none.
    pub host: &'a str,
    /// The path, decoded, without its query.
    pub path: &'a [u8],
    /// The method, as it stands.
    pub method: &'a str,
}

impl Scope {
    /// Says whether a request is meant. Parts that the request does not have are not covered by a scope that names them.
    pub fn covers(&self, asked: &Asked<'_>) -> bool {
        self.job.as_ref().is_none_or(|job| asked.job == Some(job))
            && self.slice.is_none_or(|slice| asked.key.is_some_and(|key| slice.contains(key)))
            && self.host.as_ref().is_none_or(|host| is_host(host, asked.host))
            && self.path.as_ref().is_none_or(|path| is_below(path, asked.path))
            && (self.methods.is_empty() || self.methods.iter().any(|m| **m == *asked.method))
    }

    /// Checks that something is meant, and that every part can be what a request has.
    pub fn check(&self) -> Result<(), ScopeError> {
        if *self == Self::default() {
            return Err(ScopeError::Empty);
        }
        if let Some(host) = self.host.as_deref().filter(|host| !is_well_formed_host(host)) {
            return Err(ScopeError::Host(short(host)));
        }
        if let Some(path) = self.path.as_deref().filter(|path| !is_well_formed_path(path)) {
            return Err(ScopeError::Path(short(path)));
        }
        if self.methods.len() > METHODS_MAX {
            return Err(ScopeError::Methods(self.methods.len()));
        }
        match self.methods.iter().find(|method| !is_well_formed_method(method)) {
            Some(method) => Err(ScopeError::Method(short(method))),
            None => Ok(()),
        }
    }
}

/// As an operator writes it: `job shop, keys 00..ff, path /carts, methods GET or PUT`.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { job, slice, host, path, methods } = self;
        let parts = [
            job.as_ref().map(|job| format!("job {job}")),
            slice.map(|slice| match slice.width() {
                1 => format!("key at {}", slice.first()),
                _ => format!("keys {slice}"),
            }),
            host.as_ref().map(|host| format!("host {host}")),
            path.as_ref().map(|path| format!("path {path}")),
            (!methods.is_empty()).then(|| format!("method {}", methods.join(" or "))),
        ];
        f.pad(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// Why a scope was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// It means every request of every job.
    #[error(
        "the pause says of nothing what it is for: give a job, keys, a host, a path or methods"
    )]
    Empty,
    /// No request has such a host.
    #[error(
        "{0:?} is no host: give a name such as shop.example.com, or *.example.com for all below it, in lower case and without a port"
    )]
    Host(String),
    /// No request has such a path.
    #[error(
        "{0:?} is no path: begin it with /, without query, %, * or a slash at its end, in at most {PATH_MAX_BYTES} bytes"
    )]
    Path(String),
    /// It has too many methods.
    #[error("the pause names {0} methods: name {METHODS_MAX} at most, or none for all")]
    Methods(usize),
    /// No request has such a method.
    #[error("{0:?} is no method: give 1 to {METHOD_MAX_BYTES} letters or signs, such as GET")]
    Method(String),
}

/// What happens to those that are held when a pause has lasted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtEnd {
    /// They go on, spread over the pause's release.
    #[default]
    GoOn,
    /// They are refused with 503.
    Fail,
}

impl fmt::Display for AtEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::GoOn => "go-on",
            Self::Fail => "fail",
        })
    }
}

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PauseOrder {
    /// Which requests are held.
    pub scope: Scope,
    /// Why, for whoever wonders. May be empty.
    pub why: Box<str>,
    /// How long at most: from when each proxy first heard of it, by its own clock.
    pub lasts: Duration,
    /// What happens to those held then.
    pub at_end: AtEnd,
    /// Over how long those held go on, unless whoever ends the pause says otherwise. Zero: all at once.
    pub release_over: Duration,
}

impl PauseOrder {
    /// Checks what nobody could carry out, or nobody should want.
    pub fn check(&self) -> Result<(), PauseError> {
        self.scope.check()?;
        if !(LASTS_MIN..=LASTS_MAX).contains(&self.lasts) {
            return Err(PauseError::Lasts(self.lasts));
        }
        check_release(self.release_over)?;
        if self.why.len() > WHY_MAX_BYTES || self.why.chars().any(char::is_control) {
            return Err(PauseError::Why);
        }
        Ok(())
    }
}

/// Checks a time over which held requests are let go.
pub fn check_release(over: Duration) -> Result<(), PauseError> {
    if over > RELEASE_MAX { Err(PauseError::Release(over)) } else { Ok(()) }
}

/// Why a pause was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PauseError {
    /// Its scope makes no sense.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// It has no end, or one that is too near or too far.
    #[error("a pause that lasts {0:?}: give it an end, {LASTS_MIN:?} to {LASTS_MAX:?} away")]
    Lasts(Duration),
    /// Held requests would be let go too slowly.
    #[error("held requests are let go over {0:?}: {RELEASE_MAX:?} at most")]
    Release(Duration),
    /// The note is no line of text.
    #[error("why the pause is: one line of at most {WHY_MAX_BYTES} bytes")]
    Why,
}

/// How far a pause is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Requests in its scope are held.
    Holding,
    /// Those held go on, spread over this time from when a proxy heard of it. Zero: all at once.
    Releasing {
        /// How long.
        over: Duration,
    },
}

/// A pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Which.
    pub id: PauseId,
    /// What was asked for.
    pub order: PauseOrder,
    /// How far it is.
    pub phase: Phase,
}

/// All flags, as of one version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Grows with each change, also over a restore of the control plane. Zero until there was a first flag.
    pub version: Generation,
    /// The pauses by id, the oldest first.
    pub pauses: BTreeMap<PauseId, Pause>,
}

impl Flags {
    /// Gives the pauses that hold or release such a request, the oldest first.
    pub fn covering<'a>(&'a self, asked: &'a Asked<'_>) -> impl Iterator<Item = &'a Pause> {
        self.pauses.values().filter(move |pause| pause.order.scope.covers(asked))
    }
}

/// How a proxy stands towards the flags: what it tells the leader of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// The version that is in force in the whole proxy: every request that begins now is judged by it or a newer one.
    pub version: Generation,
    /// What the scope of each pause of that version covers.
    pub counts: BTreeMap<PauseId, Count>,
}

/// How many requests of a proxy the scope of a pause covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests that were let through, before the pause or after it, and have not ended.
    pub in_flight: u64,
    /// Requests that wait for the pause to end.
    pub held: u64,
}

/// How long each pause had lasted before this process began: known where one before it has left that behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ages(pub BTreeMap<PauseId, Duration>);

impl Ages {
    /// Gives flags as they are for whoever counts from now: pauses last so much less, and those that have lasted are gone.
    pub fn apply_to(&self, flags: &Flags) -> Flags {
        let mut aged = flags.clone();
        aged.pauses.retain(|id, pause| {
            let age = self.0.get(id).copied().unwrap_or_default();
            pause.order.lasts = pause.order.lasts.saturating_sub(age);
            !pause.order.lasts.is_zero()
        });
        aged
    }
}

fn is_host(own: &str, asked: &str) -> bool {
    // `example.com.` is `example.com` to the resolver, so it is here.
    let asked = asked.strip_suffix('.').unwrap_or(asked);
    match own.strip_prefix('*') {
        None => asked.eq_ignore_ascii_case(own),
        Some(end) => {
            let at = asked.len().checked_sub(end.len()).filter(|at| *at > 0);
            at.and_then(|at| asked.get(at..)).is_some_and(|found| found.eq_ignore_ascii_case(end))
        }
    }
}

fn is_below(own: &str, asked: &[u8]) -> bool {
    // Every path is below the root.
    let own = own.strip_suffix('/').unwrap_or(own);
    let rest = asked.strip_prefix(own.as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn is_well_formed_host(host: &str) -> bool {
    let name = host.strip_prefix("*.").unwrap_or(host);
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    let is_address = host.starts_with('[') && host.ends_with(']') && !host.contains(['/', '@']);
    (1..=HOST_MAX_BYTES).contains(&host.len())
        && (is_address || name.bytes().all(allowed))
        && !name.is_empty()
        && !name.starts_with('.')
        && !name.ends_with('.')
}

fn is_well_formed_path(path: &str) -> bool {
    path.starts_with('/')
        && (path == "/" || !path.ends_with('/'))
        && path.len() <= PATH_MAX_BYTES
        && path.bytes().all(|b| b.is_ascii_graphic() && !b"?#%*".contains(&b))
        && !path.split('/').any(|segment| matches!(segment, "." | ".."))
}

fn is_well_formed_method(method: &str) -> bool {
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    (1..=METHOD_MAX_BYTES).contains(&method.len()) && method.bytes().all(is_token)
}

/// As much of a text as an error shows.
fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scope by its parts: `job=kv slice=0..ff host=a.b path=/x methods=GET,PUT`.
    fn scope(text: &str) -> Scope {
        let mut scope = Scope::default();
        for part in text.split_whitespace() {
            let (name, value) = part.split_once('=').unwrap();
            match name {
                "job" => scope.job = Some(value.parse().unwrap()),
                "slice" => scope.slice = Some(value.parse().unwrap()),
                "host" => scope.host = Some(value.into()),
                "path" => scope.path = Some(value.into()),
                "methods" => scope.methods = value.split(',').map(Into::into).collect(),
                _ => panic!("{name}"),
            }
        }
        scope
    }

    fn order(scope: Scope) -> PauseOrder {
        let (lasts, release_over) = (Duration::from_secs(30), Duration::ZERO);
        PauseOrder { scope, why: "schema change".into(), lasts, at_end: AtEnd::GoOn, release_over }
    }

    #[test]
    fn a_scope_covers_what_fits_each_of_its_parts() {
        let kv: JobName = "kv".parse().unwrap();
        let check = |text: &str, expected: [bool; 4]| {
            let asked = |job, key: Option<u64>, host, path: &'static str, method| Asked {
                job,
                key: key.map(SliceKey),
                host,
                path: path.as_bytes(),
                method,
            };
            let scope = scope(text);
            assert_eq!(scope.check(), Ok(()), "{text}");
            let requests = [
                asked(Some(&kv), Some(7), "shop.example.com", "/carts/7", "GET"),
                asked(Some(&kv), Some(0x100), "Shop.Example.com.", "/carts", "PUT"),
                asked(None, None, "example.com", "/cartsy", "GET"),
                asked(None, None, "", "/", "get"),
            ];
            assert_eq!(requests.map(|asked| scope.covers(&asked)), expected, "{text}");
        };
        check("job=kv", [true, true, false, false]);
        check("job=other", [false; 4]);
        check("slice=0..ff", [true, false, false, false]);
        check("slice=7..7", [true, false, false, false]);
        check("slice=0..ffffffffffffffff", [true, true, false, false]);
        check("host=shop.example.com", [true, true, false, false]);
        check("host=*.example.com", [true, true, false, false]);
        check("host=*.com", [true, true, true, false]);
        check("host=example.com", [false, false, true, false]);
        check("path=/carts", [true, true, false, false]);
        check("path=/carts/7", [true, false, false, false]);
        check("path=/", [true; 4]);
        check("methods=GET", [true, false, true, false]);
        check("methods=PUT,get", [false, true, false, true]);
        check("job=kv methods=GET", [true, false, false, false]);
        check("job=kv slice=0..ff path=/carts host=shop.example.com", [true, false, false, false]);
        check("job=kv path=/other", [false; 4]);
    }

    #[test]
    fn a_scope_that_means_nothing_or_cannot_be_is_refused() {
        let check = |text: &str, error: ScopeError| {
            assert_eq!(scope(text).check(), Err(error.clone()), "{text}");
            assert_eq!(order(scope(text)).check(), Err(error.into()), "{text}");
        };
        check("", ScopeError::Empty);
        for host in ["", "a:80", "A.com", ".a", "a.", "*", "*.", "*.*.a", "a/b", "[::1"] {
            check(&format!("host={host}"), ScopeError::Host(host.into()));
        }
        let long = "a".repeat(HOST_MAX_BYTES + 1);
        check(&format!("host={long}"), ScopeError::Host("a".repeat(80)));
        for path in ["", "carts", "/carts/", "/a?b", "/a%20b", "/a/*", "/a/../b", "/.", "//"] {
            check(&format!("path={path}"), ScopeError::Path(path.into()));
        }
        for method in ["", "G:T", "GE(T"] {
            check(&format!("methods={method}"), ScopeError::Method(method.into()));
        }
        let many = vec!["GET"; METHODS_MAX + 1].join(",");
        check(&format!("methods={many}"), ScopeError::Methods(METHODS_MAX + 1));
        assert_eq!(scope("host=[::1]").check(), Ok(()));
    }

    #[test]
    fn a_pause_has_an_end_that_is_neither_too_near_nor_too_far() {
        let good = order(scope("job=kv"));
        assert_eq!(good.check(), Ok(()));
        for lasts in [LASTS_MIN, LASTS_MAX] {
            assert_eq!(PauseOrder { lasts, ..good.clone() }.check(), Ok(()));
        }
        let milli = Duration::from_millis(1);
        for lasts in [Duration::ZERO, LASTS_MIN - milli, LASTS_MAX + milli, Duration::MAX] {
            let bad = PauseOrder { lasts, ..good.clone() };
            assert_eq!(bad.check(), Err(PauseError::Lasts(lasts)));
        }
        let release_over = RELEASE_MAX + milli;
        let slow = PauseOrder { release_over, ..good.clone() };
        assert_eq!(slow.check(), Err(PauseError::Release(release_over)));
        for why in ["x".repeat(WHY_MAX_BYTES + 1), "two\nlines".to_owned()] {
            let bad = PauseOrder { why: why.into(), ..good.clone() };
            assert_eq!(bad.check(), Err(PauseError::Why));
        }
    }

    #[test]
    fn all_pauses_that_cover_a_request_are_found_the_oldest_first() {
        let mut flags = Flags::default();
        for (id, text) in [(9, "path=/"), (3, "methods=PUT"), (4, "job=kv"), (5, "methods=GET")] {
            let (id, phase) = (PauseId(id), Phase::Holding);
            flags.pauses.insert(id, Pause { id, order: order(scope(text)), phase });
        }
        let kv: JobName = "kv".parse().unwrap();
        let asked = Asked { job: Some(&kv), key: None, host: "", path: b"/a", method: "GET" };
        let found: Vec<u64> = flags.covering(&asked).map(|pause| pause.id.0).collect();
        assert_eq!(found, [4, 5, 9]);
    }

    #[test]
    fn a_pause_of_some_age_lasts_less_and_then_is_gone() {
        let id = PauseId(7);
        let pause = Pause { id, order: order(scope("job=kv")), phase: Phase::Holding };
        let flags = Flags { pauses: [(id, pause)].into(), ..Flags::default() };
        let lasts = |seconds| {
            let age = Ages([(id, Duration::from_secs(seconds))].into());
            age.apply_to(&flags).pauses.get(&id).map(|pause| pause.order.lasts.as_secs())
        };
        assert_eq!([lasts(0), lasts(29), lasts(30), lasts(99)], [Some(30), Some(1), None, None]);
        assert_eq!(Ages::default().apply_to(&flags), flags);
    }

    #[test]
    fn ids_and_scopes_read_as_operators_write_them() {
        assert_eq!(PauseId(7).to_string().parse(), Ok(PauseId(7)));
        for bad in ["", "p", "7", "p-1", "p+1", "px", "p99999999999999999999"] {
            assert!(bad.parse::<PauseId>().is_err(), "{bad}");
        }
        let shown = scope("job=kv slice=0..ff path=/carts methods=GET,PUT").to_string();
        assert_eq!(
            shown,
            "job kv, keys 0000000000000000..00000000000000ff, path /carts, method GET or PUT"
        );
        assert_eq!(scope("slice=a..a").to_string(), "key at 000000000000000a");
    }
}

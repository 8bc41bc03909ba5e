//! A task: one incarnation of a server process that can own slices.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::name::TaskName;

/// The longest label key, label value or revision, in bytes: what Kubernetes allows a label name, doubled.
pub const LABEL_MAX_BYTES: usize = 128;
/// The most labels a task may carry.
pub const LABELS_MAX: usize = 32;
/// The most tasks of a job.
pub const TASKS_MAX: usize = 10_000;

/// One life of one task: minted by `State::apply` at registration, never chosen by a process, never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

/// Where something listens: `host:port`, or `[v6]:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(Arc<str>);

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address: give host:port, such as 10.0.0.7:9000 or [::1]:9000")]
pub struct AddressError(String);

impl Address {
    /// Gives the address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Address {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let bad = || AddressError(text.chars().take(300).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let host_is_good = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            // 253 bytes is the longest host name (RFC 1035, 2.3.4).
            None => {
                (1..=253).contains(&host.len())
                    && host
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
            }
        };
        let port_is_good = port.bytes().all(|b| b.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port > 0);
        if host_is_good && port_is_good { Ok(Self(text.into())) } else { Err(bad()) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// How much a task can carry, in thousandths of an ordinary one. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Capacity(u32);

/// A capacity was zero, negative, no number, or beyond a million ordinary tasks.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the capacity {0} is out of range: give 0.001 to 1000000, where 1 is an ordinary task")]
pub struct CapacityError(pub f64);

impl Capacity {
    /// An ordinary task.
    pub const ONE: Self = Self(1_000);

    /// Takes a multiple of an ordinary task.
    pub fn new(times: f64) -> Result<Self, CapacityError> {
        if (0.001..=1_000_000.0).contains(&times) {
            Ok(Self((times * 1_000.0).round() as u32))
        } else {
            Err(CapacityError(times))
        }
    }

    /// Gives thousandths of an ordinary task.
    pub const fn thousandths(self) -> u32 {
        self.0
    }
}

/// Whether a task may be given slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It serves what it has and may be given more.
    Serving,
    /// It is about to stop: it serves what it has until that is moved.
    Draining,
}

/// What a process says of itself when it registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskInfo {
    /// Its stable name, kept over restarts.
    pub name: TaskName,
    /// A number that the process drew when it started, so that a repeated registration is known for the same one.
    pub incarnation: u64,
    /// Where it serves requests.
    pub address: Address,
    /// Where it tells its peers what it knows of assignments, if it does.
    pub watch: Option<Address>,
    /// Such as `zone` and `region`.
    pub labels: BTreeMap<String, String>,
    /// How much it can carry.
    pub capacity: Capacity,
    /// Which version of the program it runs; empty if it does not say.
    pub revision: String,
    /// Whether it gets ready for a slice before it serves it: callers then stay where they are until it is.
    pub prepares: bool,
}

/// Why a task's description was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskInfoError {
    /// A label or the revision was longer than `LABEL_MAX_BYTES`.
    #[error("{field} is {len} bytes long: use at most {LABEL_MAX_BYTES}")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// How long it was.
        len: usize,
    },
    /// There were more than `LABELS_MAX` labels.
    #[error("{0} labels are too many: use at most {LABELS_MAX}")]
    Labels(usize),
}

impl TaskInfo {
    /// Describes an ordinary task: capacity 1, no labels.
    pub fn new(name: TaskName, incarnation: u64, address: Address) -> Self {
        Self {
            name,
            incarnation,
            address,
            watch: None,
            labels: BTreeMap::new(),
            capacity: Capacity::ONE,
            revision: String::new(),
            prepares: false,
        }
    }

    /// Checks what has a bound: labels and revision.
    pub fn check(&self) -> Result<(), TaskInfoError> {
        if self.labels.len() > LABELS_MAX {
            return Err(TaskInfoError::Labels(self.labels.len()));
        }
        let keys = self.labels.keys().map(|key| ("a label's key", key));
        let values = self.labels.values().map(|value| ("a label's value", value));
        let long = keys
            .chain(values)
            .chain([("the revision", &self.revision)])
            .find(|(_, t)| t.len() > LABEL_MAX_BYTES);
        long.map_or(Ok(()), |(field, text)| Err(TaskInfoError::TooLong { field, len: text.len() }))
    }
}

/// A task that an assignment knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its life: what replicas name.
    pub session: SessionId,
    /// What the process said of itself.
    pub info: TaskInfo,
    /// Whether it may be given slices.
    pub phase: Phase,
    /// How long it may serve after it last asked to, fixed when it registered; nothing in an affinity job.
    pub lease: Option<Duration>,
}

impl Task {
    /// A task of an affinity job that may be given slices.
    pub const fn new(session: SessionId, info: TaskInfo) -> Self {
        Self { session, info, phase: Phase::Serving, lease: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["127.0.0.1:80", "[::1]:9000", "task-1.svc.local:65535"] {
            assert_eq!(good.parse::<Address>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "host",
            "host:",
            "host:0",
            "host:65536",
            ":80",
            "ho st:80",
            "::1:80",
            "[::g]:80",
            "host:+80",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_capacity_is_a_positive_number() {
        assert_eq!(Capacity::new(2.5).unwrap().thousandths(), 2_500);
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
            assert!(Capacity::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_has_no_bound_is_refused() {
        let mut info = TaskInfo::new("t".parse().unwrap(), 1, "h:1".parse().unwrap());
        assert_eq!(info.check(), Ok(()));
        info.revision = "r".repeat(129);
        assert_eq!(info.check(), Err(TaskInfoError::TooLong { field: "the revision", len: 129 }));
        info.labels = (0..33).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(info.check(), Err(TaskInfoError::Labels(33)));
    }
}

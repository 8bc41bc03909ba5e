//! Scenarios: which faults a cluster has to bear, and how many of each.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use mandoline_core::name::JobName;
use mandoline_core::prng::Prng;

/// What a cluster has to bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Nothing but an ordinary network, tasks that drain, and load that shifts.
    Calm,
    /// Processes crash and start again.
    Crashes,
    /// The network parts and heals, in both directions or in one.
    Partitions,
    /// Processes stand still for up to ten minutes.
    Pauses,
    /// Clocks run further from true time than the protocol allows: two owners there will be, and fencing must hold.
    Drift,
    /// The cluster is restored from a backup.
    Restore,
    /// All of it together, clocks within what the protocol allows.
    Mixed,
}

/// Why a text names no scenario.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no scenario {0:?}: use calm, crashes, partitions, pauses, drift, restore or mixed"
)]
pub struct ScenarioError(String);

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Calm,
        Self::Crashes,
        Self::Partitions,
        Self::Pauses,
        Self::Drift,
        Self::Restore,
        Self::Mixed,
    ];

    /// Gives its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::Crashes => "crashes",
            Self::Partitions => "partitions",
            Self::Pauses => "pauses",
            Self::Drift => "drift",
            Self::Restore => "restore",
            Self::Mixed => "mixed",
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scenario {
    type Err = ScenarioError;

    fn from_str(text: &str) -> Result<Self, ScenarioError> {
        let named = Self::ALL.into_iter().find(|scenario| scenario.name() == text);
        named.ok_or_else(|| ScenarioError(text.chars().take(40).collect()))
    }
}

/// What may go wrong, or happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A task's process dies, and another begins under its name a while later.
    TaskCrash,
    /// An assigner's process dies, and starts again with its disk.
    AssignerCrash,
    /// A process stands still, and goes on as if nothing had been.
    Pause,
    /// Some cannot reach the others, nor these them.
    Partition,
    /// Some cannot reach the others, while these reach them.
    OneWay,
    /// Letters get lost and come twice.
    Loss,
    /// Messages take long, and overtake each other.
    Slow,
    /// A stream breaks.
    Break,
    /// A clock changes its rate.
    Rate,
    /// A disk takes long.
    Stall,
    /// A task leaves in good order, and another comes under its name: no fault, yet much happens.
    Drain,
    /// Load shifts: no fault either.
    Shift,
    /// The cluster is lost and restored from a backup.
    Restore,
}

impl Kind {
    /// All of them, in their order.
    pub const ALL: [Self; 13] = [
        Self::TaskCrash,
        Self::AssignerCrash,
        Self::Pause,
        Self::Partition,
        Self::OneWay,
        Self::Loss,
        Self::Slow,
        Self::Break,
        Self::Rate,
        Self::Stall,
        Self::Drain,
        Self::Shift,
        Self::Restore,
    ];

    /// Gives its name, as figures carry it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TaskCrash => "task_crashes",
            Self::AssignerCrash => "assigner_crashes",
            Self::Pause => "pauses",
            Self::Partition => "partitions",
            Self::OneWay => "one_way_partitions",
            Self::Loss => "loss_bursts",
            Self::Slow => "slow_spells",
            Self::Break => "broken_streams",
            Self::Rate => "clock_changes",
            Self::Stall => "disk_stalls",
            Self::Drain => "drains",
            Self::Shift => "load_shifts",
            Self::Restore => "restores",
        }
    }
}

/// A cluster to run, as a seed draws it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many assigner nodes.
    pub assigners: usize,
    /// How many tasks.
    pub tasks: usize,
    /// How many processes more that bear the first task's name, by mistake.
    pub twins: usize,
    /// How many clerks.
    pub clerks: usize,
    /// How long an owner may serve after it last asked to; nothing in an affinity job.
    pub lease: Option<Duration>,
    /// How long all of it takes.
    pub length: Duration,
    /// How long all is left alone at the end, so that it can be seen to recover.
    pub calm: Duration,
    /// How far clocks may run from true time, in millionths.
    pub drift: i64,
    /// The mean time between two of each kind.
    pub every: Vec<(Kind, Duration)>,
}

/// How long a cluster is left alone at the end.
const CALM: Duration = Duration::from_secs(75);
/// How long a restored cluster gives nothing away: the longest lease, its margin, and an election. Whoever leads anew waits anew.
pub const HOLD_OFF: Duration = Duration::from_secs(70);
/// The shortest run: something has to happen before all is left alone.
pub const LENGTH_MIN: Duration = Duration::from_secs(180);
/// Leases to draw from: the shortest there is, the usual one, and longer ones, whose margins are wider.
const LEASES: [Duration; 5] = [
    Duration::from_secs(2),
    Duration::from_secs(3),
    Duration::from_secs(5),
    Duration::from_secs(5),
    Duration::from_secs(12),
];
/// The drift that the protocol is made for: one in a hundred.
const DRIFT: i64 = 10_000;
/// A drift that it is not made for.
const DRIFT_BEYOND: i64 = 60_000;

impl Setup {
    /// Gives the name of the job.
    pub fn job(&self) -> JobName {
        JobName::new("kv").expect("it is short and plain")
    }

    /// Draws a cluster for a scenario. Three assigners and four tasks are the least.
    pub fn draw(scenario: Scenario, length: Duration, prng: &mut Prng) -> Self {
        use Kind::{
            AssignerCrash, Break, Drain, Loss, OneWay, Partition, Pause, Rate, Restore, Shift,
            Slow, Stall, TaskCrash,
        };
        let secs = |kinds: &[(Kind, u64)]| -> Vec<(Kind, Duration)> {
            kinds.iter().map(|(kind, secs)| (*kind, Duration::from_secs(*secs))).collect()
        };
        let mut every = secs(&[(Drain, 60), (Shift, 30)]);
        every.extend(secs(match scenario {
            Scenario::Calm => &[],
            Scenario::Crashes => &[(TaskCrash, 20), (AssignerCrash, 25), (Stall, 40)],
            Scenario::Partitions => {
                &[(Partition, 25), (OneWay, 25), (Loss, 60), (Slow, 60), (Break, 15)]
            }
            Scenario::Pauses => &[(Pause, 12)],
            Scenario::Drift => &[(Pause, 20), (Partition, 40), (TaskCrash, 60), (Rate, 60)],
            Scenario::Restore => &[(Restore, 300), (TaskCrash, 120), (Partition, 120)],
            Scenario::Mixed => &[
                (TaskCrash, 60),
                (AssignerCrash, 80),
                (Pause, 30),
                (Partition, 60),
                (OneWay, 60),
                (Loss, 90),
                (Slow, 90),
                (Break, 30),
                (Rate, 60),
                (Stall, 90),
            ],
        }));
        // Each seed has more of this and less of that.
        for (_, every) in &mut every {
            *every = every.mul_f64(0.5 + 1.5 * prng.unit());
        }
        Self {
            assigners: 3,
            tasks: 4 + prng.below(4) as usize,
            twins: usize::from(prng.below(4) == 0),
            lease: (scenario == Scenario::Mixed || prng.below(4) > 0)
                .then(|| LEASES[prng.below(LEASES.len() as u64) as usize]),
            clerks: 2 + prng.below(2) as usize,
            length: length.max(LENGTH_MIN),
            calm: if scenario == Scenario::Restore { CALM + HOLD_OFF } else { CALM },
            drift: if scenario == Scenario::Drift { DRIFT_BEYOND } else { DRIFT },
            every,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_go_by_their_names() {
        for scenario in Scenario::ALL {
            assert_eq!(scenario.to_string().parse(), Ok(scenario));
        }
        let error = "mixd".parse::<Scenario>().unwrap_err();
        assert!(error.to_string().contains("\"mixd\": use calm, "), "{error}");
    }

    #[test]
    fn kinds_stand_in_their_order() {
        assert!(Kind::ALL.iter().enumerate().all(|(at, kind)| *kind as usize == at));
    }
}

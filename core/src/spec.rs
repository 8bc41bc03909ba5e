//! What an operator asks of a job.

use std::fmt;
use std::time::Duration;

use crate::name::JobName;

/// A share or a ratio in millionths, so that it is exact and the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ratio(u32);

impl Ratio {
    /// Takes millionths.
    pub const fn from_millionths(millionths: u32) -> Self {
        Self(millionths)
    }

    /// Takes percent.
    pub const fn percent(percent: u32) -> Self {
        Self(percent * 10_000)
    }

    /// Gives millionths.
    pub const fn millionths(self) -> u32 {
        self.0
    }

    /// Gives this ratio of a whole, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        u64::try_from(u128::from(whole) * u128::from(self.0) / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// Percent.
impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 10_000.0)
    }
}

/// How many tasks may serve one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaBounds {
    /// Each slice has as many, if there are as many tasks.
    pub min: u32,
    /// A slice that one task cannot carry may have as many.
    pub max: u32,
}

/// What an operator asks of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// The job's name.
    pub name: JobName,
    /// How far above the capacity-weighted mean a task's load may lie before slices are moved off it.
    pub band: Ratio,
    /// How much of the job's load one balancing round may move, emergencies apart.
    pub churn_budget: Ratio,
    /// How many tasks may serve one slice.
    pub replicas: ReplicaBounds,
    /// How often a task says that it lives.
    pub heartbeat: Duration,
    /// How often a task reports its load.
    pub report_every: Duration,
    /// How often the load is balanced.
    pub balance_every: Duration,
}

/// Why a spec was refused. The one before it stays in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {hint}")]
pub struct SpecError {
    /// Which field.
    pub field: &'static str,
    /// What it held.
    pub value: String,
    /// What it may hold.
    pub hint: &'static str,
}

impl JobSpec {
    /// Gives the defaults under a name.
    pub const fn new(name: JobName) -> Self {
        Self {
            name,
            band: Ratio::percent(10),
            churn_budget: Ratio::percent(5),
            replicas: ReplicaBounds { min: 1, max: 1 },
            heartbeat: Duration::from_secs(1),
            report_every: Duration::from_secs(5),
            balance_every: Duration::from_secs(10),
        }
    }

    /// Checks that each value lies where it makes sense.
    pub fn check(&self) -> Result<(), SpecError> {
        let bounded = |field, ratio: Ratio, max: Ratio, hint| {
            let good = (Ratio::from_millionths(1)..=max).contains(&ratio);
            if good { Ok(()) } else { Err(SpecError { field, value: ratio.to_string(), hint }) }
        };
        bounded("band", self.band, Ratio::percent(1_000), "give more than 0% and at most 1000%")?;
        bounded(
            "churn_budget",
            self.churn_budget,
            Ratio::percent(100),
            "give more than 0% and at most 100%",
        )?;
        let ReplicaBounds { min, max } = self.replicas;
        // Beyond 64 a slice's list of replicas is a fleet, and each write would visit it.
        if min == 0 || min > max || max > 64 {
            let value = format!("min {min}, max {max}");
            return Err(SpecError { field: "replicas", value, hint: "give 1 <= min <= max <= 64" });
        }
        let lengths = [
            ("heartbeat", self.heartbeat, Duration::from_millis(100), "give 100ms to 1h"),
            ("report_every", self.report_every, Duration::from_millis(100), "give 100ms to 1h"),
            ("balance_every", self.balance_every, Duration::from_millis(100), "give 100ms to 1h"),
        ];
        for (field, length, min, hint) in lengths {
            if !(min..=Duration::from_secs(3_600)).contains(&length) {
                return Err(SpecError { field, value: format!("{length:?}"), hint });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        let good = JobSpec::new("kv".parse().unwrap());
        assert_eq!(good.check(), Ok(()));
        let cases = [
            (JobSpec { band: Ratio::percent(0), ..good.clone() }, "band is 0%"),
            (JobSpec { churn_budget: Ratio::percent(101), ..good.clone() }, "churn_budget is 101%"),
            (
                JobSpec { replicas: ReplicaBounds { min: 3, max: 2 }, ..good.clone() },
                "replicas is min 3, max 2",
            ),
            (JobSpec { heartbeat: Duration::from_millis(1), ..good.clone() }, "heartbeat is 1ms"),
            (JobSpec { balance_every: Duration::ZERO, ..good }, "balance_every is 0ns"),
        ];
        for (spec, message) in cases {
            let error = spec.check().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}

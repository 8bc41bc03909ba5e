//! Which tasks keep confined keys, and how they fare: when each crashed last, and since when it is away. Soft: a new leader
//! gives all of them their time anew.

use std::collections::BTreeMap;

use crate::confine::{AWAY_MAX, REMEMBERED};
use crate::name::TaskName;
use crate::slice::Slice;
use crate::state::Job;
use crate::time::Time;

/// The tasks that confined keys stay with: when each crashed last, and since when it is away.
#[derive(Clone, Debug, Default)]
pub struct Wards {
    tasks: BTreeMap<TaskName, Ward>,
    ranges: Vec<(Slice, TaskName)>,
    /// Whether something was confined that no plan has seen.
    pub unplanned: bool,
}

#[derive(Clone, Copy, Debug)]
struct Ward {
    crashed: Time,
    away: Option<Time>,
}

/// What has to be done about confined keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// An hour has passed without a crash.
    Release,
    /// Their task does not come back.
    Replace,
}

impl Wards {
    /// Brings the list in line with what is confined and who is there, and says whether something was let go of.
    pub fn sync(&mut self, now: Time, job: &Job) -> bool {
        let mut old = std::mem::take(&mut self.tasks);
        for confined in &job.confined {
            let name = &confined.task;
            let there = || job.assignment.tasks.values().any(|task| task.info.name == *name);
            self.tasks.entry(name.clone()).or_insert_with(|| {
                let ward = old.remove(name).unwrap_or(Ward { crashed: now, away: None });
                let away = if there() { None } else { ward.away.or(Some(now)) };
                Ward { away, ..ward }
            });
        }
        let ranges: Vec<_> =
            job.confined.iter().map(|confined| (confined.slice, confined.task.clone())).collect();
        self.unplanned |= ranges.iter().any(|range| !self.ranges.contains(range));
        ranges.len() < std::mem::replace(&mut self.ranges, ranges).len()
    }

    /// Notes that a task crashed, and says whether it keeps confined keys.
    pub fn crashed(&mut self, now: Time, task: &TaskName) -> bool {
        self.tasks.get_mut(task).map(|ward| ward.crashed = now).is_some()
    }

    /// Says which tasks' keys have waited long enough, or have been quiet for long enough.
    pub fn due(&self, now: Time) -> Vec<(TaskName, Due)> {
        let due = |ward: &Ward| {
            if now.since(ward.crashed) >= REMEMBERED {
                return Some(Due::Release);
            }
            let away = ward.away.filter(|away| now.since(*away) >= AWAY_MAX);
            away.map(|_| Due::Replace)
        };
        self.tasks.iter().filter_map(|(task, ward)| Some((task.clone(), due(ward)?))).collect()
    }
}

//! A recorded load as the simulator takes it: read once, cut into intervals, with what was odd about it.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use mandoline_core::key::SliceKey;
use mandoline_sim::access_log::KeyPart;
use mandoline_sim::event::Event;
use mandoline_sim::interval::{FoldError, Interval, Intervals};
use mandoline_sim::lines::InputError;
use mandoline_sim::replay::{Replay, Skipped};

use crate::failure::Failure;
use crate::sim::failure;
use crate::sim::progress::Progress;

/// Which part of a file is read, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading<'a> {
    /// Which file.
    pub(crate) path: &'a Path,
    /// Which part of a log line is the key.
    pub(crate) key: Option<&'a KeyPart>,
    /// Whether broken lines of a trace are passed over.
    pub(crate) lenient: bool,
    /// How long an interval is.
    pub(crate) interval: Duration,
    /// How many intervals are read at most.
    pub(crate) intervals_max: Option<usize>,
}

/// A recorded load, cut into intervals.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) intervals: Vec<Interval>,
    skipped: Skipped,
    first_malformed: Option<(u64, String)>,
}

impl Reading<'_> {
    /// Reads the file; `each` is shown every request.
    pub(crate) fn read(self, each: &mut dyn FnMut(&Event)) -> Result<Recording, Failure> {
        let mut replay = Replay::open(self.path, self.key).map_err(|error| failure(&error))?;
        if self.lenient {
            replay = replay.lenient();
        }
        let progress = Progress::new("requests", None);
        let events = replay.by_ref().inspect(|event| {
            if let Ok(event) = event {
                progress.add(1);
                each(event);
            }
        });
        let intervals = Intervals::new(events, self.interval)
            .and_then(|intervals| {
                intervals.take(self.intervals_max.unwrap_or(usize::MAX)).collect()
            })
            .map_err(|error| refuse(&error))?;
        let (skipped, first_malformed) = (replay.skipped(), replay.first_malformed());
        Ok(Recording { intervals, skipped, first_malformed })
    }
}

fn refuse(error: &FoldError) -> Failure {
    let refused = failure(error);
    match error {
        FoldError::Input(InputError::Trace { .. } | InputError::Unsorted { .. }) => {
            refused.try_this("--lenient passes over broken lines and counts them")
        }
        _ => refused,
    }
}

impl Recording {
    /// Counts the keys.
    pub(crate) fn keys(&self) -> usize {
        let keys = |interval: &Interval| -> Vec<SliceKey> {
            interval.loads().iter().map(|(key, _)| *key).collect()
        };
        self.intervals.iter().flat_map(keys).collect::<HashSet<_>>().len()
    }

    /// Says what was passed over or put right in reading, a sentence each.
    pub(crate) fn skipped(&self) -> Vec<String> {
        let Skipped { malformed, without_key, late } = self.skipped;
        let mut said = Vec::new();
        if let Some((line, problem)) = &self.first_malformed {
            said.push(format!(
                "{malformed} broken line(s) passed over, the first is line {line}: {problem}"
            ));
        }
        if without_key > 0 {
            said.push(format!("{without_key} line(s) without the key passed over"));
        }
        if late > 0 {
            said.push(format!(
                "{late} request(s) out of order: each is counted at the time of the one before"
            ));
        }
        said
    }
}

/// Says what so few keys mean for so many tasks, if there are few.
pub(crate) fn few_keys(keys: u64, tasks: u32) -> Option<String> {
    match keys {
        1 => Some(
            "there is one key only: one task serves it all, unless it may have replicas".to_owned(),
        ),
        _ if keys < u64::from(tasks) => Some(format!(
            "there are more tasks ({tasks}) than keys ({keys}): without replicas some have nothing to do"
        )),
        _ => None,
    }
}

/// Prints remarks where they do not mix with results.
pub(crate) fn remark(remarks: impl IntoIterator<Item = String>) {
    remarks.into_iter().for_each(|remark| eprintln!("note: {remark}"));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(text: &str, lenient: bool) -> Result<Recording, Failure> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let interval = Duration::from_secs(10);
        let (path, key, intervals_max) = (file.path(), None, Some(3));
        Reading { path, key, lenient, interval, intervals_max }.read(&mut |_| {})
    }

    #[test]
    fn a_broken_line_ends_the_reading_or_is_counted() {
        let text = "0 a\n1 b x\n15 a\n14 b\n39 c\n";
        let refused = read(text, false).unwrap_err().to_string();
        assert!(refused.contains(":2: the weight \"x\"") && refused.contains("try: --lenient"));
        let read = read(text, true).unwrap();
        assert_eq!((read.intervals.len(), read.keys()), (3, 2));
        let said = read.skipped();
        assert!(said[0].starts_with("1 broken line(s) passed over, the first is line 2: "));
        assert!(said[1].starts_with("1 request(s) out of order"), "{said:?}");
    }

    #[test]
    fn few_keys_are_remarked_on() {
        assert!(few_keys(1, 1).unwrap().starts_with("there is one key only"));
        assert!(few_keys(3, 4).unwrap().starts_with("there are more tasks (4) than keys (3)"));
        assert_eq!(few_keys(4, 4), None);
    }
}

//! What sharding a recorded load by a key would give, in plain words: what bounds it, what to ask for, what to beware of.
//!
//! The words are made here from the load alone and from how policies did on it, so that they can be tested.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use mandoline_core::balance::Tuning;

use crate::contest::Outcome;
use crate::event::Event;
use crate::interval::Interval;
use crate::percentile::Percentiles;

/// What a recorded load looks like, key by key.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// How many requests there were.
    pub requests: u64,
    /// When the last came, counted from the first.
    pub span: Duration,
    costs: HashMap<Box<str>, u64>,
}

impl Survey {
    /// Takes in a request.
    pub fn take(&mut self, event: &Event) {
        self.requests += 1;
        self.span = self.span.max(event.at);
        if let Some(cost) = self.costs.get_mut(&event.key) {
            *cost += event.weight;
        } else {
            self.costs.insert(event.key.clone(), event.weight);
        }
    }

    /// Counts the keys.
    pub fn keys(&self) -> usize {
        self.costs.len()
    }

    /// Gives the keys that draw most load, and their share of all, hottest first.
    pub fn hottest(&self, count: usize) -> Vec<(&str, f64)> {
        let total: u64 = self.costs.values().sum();
        let mut keys: Vec<(&str, u64)> =
            self.costs.iter().map(|(key, cost)| (&**key, *cost)).collect();
        keys.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        keys.truncate(count);
        keys.into_iter().map(|(key, cost)| (key, cost as f64 / total.max(1) as f64)).collect()
    }

    /// Gives how long intervals should be for so many tasks: so long that each task gets enough requests for load to be told
    /// from chance, unless too few intervals would come of it, and never so short that there would be too many.
    pub fn interval(&self, tasks: u32) -> Duration {
        let span = self.span.as_secs();
        let enough = u128::from(span) * u128::from(tasks) * u128::from(REQUESTS_ENOUGH)
            / u128::from(self.requests.max(1));
        let wanted = enough.min(u128::from(span / INTERVALS_FEW));
        let fits = |seconds: u64| {
            span / seconds < INTERVALS_MANY
                && (u128::from(seconds) >= wanted || span / next_length(seconds) < INTERVALS_FEW)
        };
        let found = LENGTHS.into_iter().find(|seconds| fits(*seconds));
        Duration::from_secs(found.unwrap_or(LENGTHS[LENGTHS.len() - 1]))
    }
}

fn next_length(seconds: u64) -> u64 {
    LENGTHS.into_iter().find(|next| *next > seconds).unwrap_or(u64::MAX)
}

/// Few enough intervals for every policy to be done in seconds.
const INTERVALS_MANY: u64 = 200;
/// Fewer say little of the one in a hundred.
const INTERVALS_FEW: u64 = 40;
/// A task with so many requests is a tenth more or less busy by chance, at twenty tasks.
const REQUESTS_ENOUGH: u64 = 500;
/// 10 s is how often the real thing balances.
const LENGTHS: [u64; 9] = [10, 30, 60, 300, 900, 3_600, 6 * 3_600, 86_400, 7 * 86_400];

/// What is said of a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// How many tasks were asked about.
    pub tasks: u32,
    /// How many intervals the load was cut into, and how long each is.
    pub intervals: (usize, Duration),
    /// The share of an interval's load that its hottest key draws, over the intervals that have more than a tenth of the
    /// mean load.
    pub hottest_share: Percentiles,
    /// From how many tasks on the hottest key is more than one task's share, in half of the intervals.
    pub tasks_bound: u64,
    /// How many tasks have to serve the hottest key, in all but one interval of a hundred, so that it does not stand in the
    /// way of balance; 1 if it never does.
    pub replicas: u32,
    /// The least that the busiest task can be expected to have over the mean, for requests come by chance.
    pub floor: f64,
    /// What makes all this less certain, a sentence each.
    pub warnings: Vec<String>,
}

impl Advice {
    /// Thinks about a load; there must be a request.
    pub fn new(survey: &Survey, intervals: &[Interval], length: Duration, tasks: u32) -> Self {
        // Where next to nothing was asked for, one request is all the load.
        let total: u64 = intervals.iter().map(Interval::total).sum();
        let quiet = total / (10 * intervals.len().max(1)) as u64;
        let busy: Vec<&Interval> =
            intervals.iter().filter(|interval| interval.total() > quiet).collect();
        let share = |interval: &&Interval| {
            let hottest = interval.loads().iter().map(|(_, load)| *load).max().unwrap_or(0);
            hottest as f64 / interval.total().max(1) as f64
        };
        let hottest_share = Percentiles::of(busy.iter().map(share).collect()).unwrap_or_default();
        let requests = survey.requests as f64 / busy.len().max(1) as f64 / f64::from(tasks);
        let chance = (2.0 * f64::from(tasks).ln() / requests.max(1e-9)).sqrt();
        let mut advice = Self {
            tasks,
            intervals: (intervals.len(), length),
            hottest_share,
            tasks_bound: (1.0 / hottest_share.p50.max(1e-9) + 1e-9).floor() as u64,
            replicas: replicas(hottest_share.p99, tasks),
            floor: 1.0 + chance,
            warnings: Vec::new(),
        };
        advice.warnings = advice.warn(survey, requests);
        advice
    }

    fn warn(&self, survey: &Survey, requests: f64) -> Vec<String> {
        let (keys, tasks) = (survey.keys(), self.tasks);
        let mut warnings = Vec::new();
        if keys == 1 {
            warnings.push(
                "There is one key only: sharding by it sends everything to one task. Choose another part of the request."
                    .to_owned(),
            );
        } else if keys < tasks as usize {
            warnings.push(format!(
                "There are more tasks ({tasks}) than keys ({keys}): some tasks have nothing to do unless keys have replicas."
            ));
        } else if keys < 10 * tasks as usize {
            warnings.push(format!(
                "There are only {keys} keys for {tasks} tasks: few keys are hard to spread evenly."
            ));
        }
        if requests < 100.0 {
            warnings.push(format!(
                "A task gets {requests:.0} requests in an interval: too few to tell load from chance. A longer log, longer \
                 intervals or fewer tasks would say more."
            ));
        }
        if self.intervals.0 < 20 {
            warnings.push(format!(
                "The log makes {} intervals: too few for what is said of 99 in 100.",
                self.intervals.0
            ));
        }
        if survey.span < Duration::from_secs(86_400) {
            warnings.push(format!(
                "The log spans {}, less than a day: how the load shifts from day to night is not in it.",
                in_words(survey.span)
            ));
        }
        warnings
    }

    /// Says what is there and what bounds it.
    pub fn describe(&self, survey: &Survey) -> String {
        let Self { tasks, intervals: (count, length), .. } = *self;
        let mut text = format!(
            "{} requests for {} keys in {}; looked at in {count} intervals of {}.\n\nThe hottest keys:\n",
            survey.requests,
            survey.keys(),
            in_words(survey.span),
            in_words(length)
        );
        for (key, share) in survey.hottest(HOTTEST) {
            let _ = writeln!(text, "  {:>6.2} %  {}", share * 100.0, shown(key));
        }
        let Percentiles { p50, p99, .. } = self.hottest_share;
        let _ = writeln!(
            text,
            "\nIn half of the intervals the hottest key draws {:.1} % of the load or more, in one of a hundred {:.1} %.",
            p50 * 100.0,
            p99 * 100.0
        );
        let bound = self.tasks_bound;
        let _ = if u64::from(tasks) > bound {
            writeln!(
                text,
                "That is more than one of {tasks} tasks should have: served by one task, it makes that one {:.1} times as busy\n\
                 as the mean. Beyond {bound} task(s), more of them do not help it; replicas do, or spilling.",
                p50 * f64::from(tasks)
            )
        } else {
            writeln!(
                text,
                "With up to {bound} tasks that is less than one task's share, so it does not bound how even the load can be."
            )
        };
        let _ = match self.replicas {
            1 => writeln!(text, "No key needs replicas."),
            replicas => writeln!(
                text,
                "Where it is hottest, it is {:.1} times one task's share: too heavy to balance with. Served by {replicas} tasks, it is\n\
                 at most a third of a task's share for each, and in nobody's way.",
                p99 * f64::from(tasks)
            ),
        };
        let _ = writeln!(
            text,
            "Requests come by chance: no planner can expect the busiest task below {:.3} times the mean.",
            self.floor
        );
        text
    }

    /// Says how our planner did, beside hashing.
    pub fn compare(&self, outcomes: &[Outcome]) -> String {
        let of = |name: &str| {
            let found = outcomes.iter().find(|outcome| outcome.policy == name)?;
            Some((found.imbalance?, found.load_churn))
        };
        let (Some((ours, churn)), Some((ring, _))) = (of("mandoline"), of("ring")) else {
            return String::new();
        };
        let mut text = format!(
            "Mandoline keeps the busiest task within {:.2} times the mean in half of the intervals and within {:.2} in 99 of 100,\n\
             and moves {:.3} % of the load in an interval for that. Consistent hashing moves nothing, and has the busiest\n\
             task at {:.2} and {:.2}.\n",
            ours.p50,
            ours.p99,
            churn * 100.0,
            ring.p50,
            ring.p99
        );
        if self.wants_spill(outcomes) {
            text.push_str(
                "What is left above that comes faster than a planner can follow. If any task can serve any key, if only slower,\n\
                 as with caches, let callers spill: it bounds the busiest task as it happens.\n",
            );
            if let Some((spilling, churn)) = of("mandoline+spill") {
                let _ = writeln!(
                    text,
                    "With that it is {:.2} and {:.2}, and {:.3} % of the load.",
                    spilling.p50,
                    spilling.p99,
                    churn * 100.0
                );
            }
        }
        if let Some((one, churn)) = of("mandoline, one task a key").filter(|_| self.replicas > 1) {
            let _ = writeln!(
                text,
                "If each key may be served by one task only, it is {:.2} and {:.2}, and {:.3} % of the load.",
                one.p50,
                one.p99,
                churn * 100.0
            );
        }
        text
    }

    /// Says whether the planner alone leaves the busiest task too busy too often.
    pub fn wants_spill(&self, outcomes: &[Outcome]) -> bool {
        let ours = outcomes.iter().find(|outcome| outcome.policy == "mandoline");
        ours.and_then(|ours| ours.imbalance).is_some_and(|imbalance| imbalance.p99 > SPILL_FROM)
    }

    /// Writes the job spec to begin with.
    pub fn spec(&self, name: &str, outcomes: &[Outcome]) -> String {
        let mut text = format!("name: {name}\n");
        if self.replicas > 1 {
            let _ = writeln!(
                text,
                "# The hottest key needs as many. Leave it out if only one task may serve a key.\nreplicas: {{min: 1, max: {}}}",
                self.replicas
            );
        }
        if self.wants_spill(outcomes) {
            text.push_str(
                "# Leave it out if a task cannot serve keys that are not its own.\nspill: {cap: 115%}\n",
            );
        }
        text
    }
}

/// How many of the hottest keys are shown.
const HOTTEST: usize = 5;
/// Where the planner alone is worse than this once in a hundred intervals, spilling is advised: twice its usual cap.
const SPILL_FROM: f64 = 1.3;
/// The longest key that is shown whole.
const SHOWN: usize = 60;

/// How many tasks the planner would have serve a key with this share of the load.
fn replicas(share: f64, tasks: u32) -> u32 {
    let ratio = |ratio: mandoline_core::spec::Ratio| f64::from(ratio.millionths()) / 1e6;
    let of_mean = share * f64::from(tasks);
    if of_mean <= ratio(Tuning::STANDARD.grow_above) {
        return 1;
    }
    ((of_mean / ratio(Tuning::STANDARD.grow_to)).ceil() as u32).clamp(1, tasks)
}

/// A key as it can be printed on a line.
fn shown(key: &str) -> String {
    let plain: String = key.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if plain.chars().count() <= SHOWN {
        return plain;
    }
    let cut: String = plain.chars().take(SHOWN).collect();
    format!("{cut}...")
}

/// A length of time in its greatest whole units.
fn in_words(length: Duration) -> String {
    let seconds = length.as_secs_f64();
    match seconds {
        ..120.0 => format!("{seconds:.0} s"),
        ..7_200.0 => format!("{:.0} min", seconds / 60.0),
        ..172_800.0 => format!("{:.1} h", seconds / 3_600.0),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::key::SliceKey;

    use super::*;

    fn survey(keys: usize, requests: usize, seconds: u64) -> Survey {
        let mut survey = Survey::default();
        for number in 0..requests {
            // Every second request is for the first key.
            let key = if number % 2 == 0 { 0 } else { number / 2 % keys };
            let at = Duration::from_secs_f64(seconds as f64 * number as f64 / requests as f64);
            survey.take(&Event { at, key: format!("k{key}").into(), weight: 1, bytes: None });
        }
        survey
    }

    fn interval(hottest: u64, others: u64) -> Interval {
        let others = (1..=others).map(|key| (SliceKey(key), 1));
        Interval::new(others.chain([(SliceKey(1_000), hottest)]).collect())
    }

    #[test]
    fn a_hot_key_bounds_how_many_tasks_help_and_says_how_many_must_serve_it() {
        let intervals = vec![interval(50, 50); 30];
        let survey = survey(50, 30_000, 100_000);
        let advice = Advice::new(&survey, &intervals, Duration::from_secs(60), 10);
        assert_eq!((advice.tasks_bound, advice.replicas), (2, 10));
        assert_eq!(survey.hottest(1), [("k0", 0.51)]);
        let said = advice.describe(&survey);
        assert!(said.contains("makes that one 5.0 times as busy"), "{said}");
        assert!(said.contains("  51.00 %  k0"), "{said}");
        assert_eq!(
            advice.spec("kv", &[]),
            "name: kv\n# The hottest key needs as many. Leave it out if only one task may serve a key.\nreplicas: {min: 1, max: 10}\n"
        );
    }

    #[test]
    fn an_even_load_needs_nothing() {
        let intervals = vec![interval(1, 999); 30];
        let survey = survey(1_000, 100_000, 200_000);
        let advice = Advice::new(&survey, &intervals, Duration::from_secs(60), 4);
        assert_eq!((advice.tasks_bound, advice.replicas), (1_000, 1));
        assert_eq!(advice.warnings, Vec::<String>::new());
        assert_eq!(advice.spec("kv", &[]), "name: kv\n");
        assert!(advice.describe(&survey).contains("No key needs replicas."));
    }

    #[test]
    fn what_makes_it_uncertain_is_said() {
        let check = |keys, tasks, expected: &str| {
            let survey = survey(keys, 100, 50);
            let advice = Advice::new(&survey, &[interval(3, 4)], Duration::from_secs(60), tasks);
            let found = advice.warnings.iter().any(|warning| warning.contains(expected));
            assert!(found, "{expected}: {:?}", advice.warnings);
        };
        check(1, 4, "There is one key only");
        check(3, 4, "more tasks (4) than keys (3)");
        check(20, 4, "only 20 keys for 4 tasks");
        check(20, 4, "A task gets 25 requests in an interval");
        check(20, 4, "makes 1 intervals");
        check(20, 4, "spans 50 s, less than a day");
    }

    #[test]
    fn intervals_are_neither_too_short_nor_too_few() {
        let length = |requests, seconds| survey(2, requests, seconds).interval(1).as_secs();
        assert_eq!(length(100_000, 600), 10);
        assert_eq!(length(100_000, 86_400), 900);
        // Few requests ask for long intervals, of which there would be too few.
        assert_eq!(length(1_000, 86_400), 900);
        assert_eq!(length(100, 600), 10);
        assert_eq!(length(10, 0), 10);
        assert_eq!(length(10, 100_000 * 86_400), 7 * 86_400);
    }

    #[test]
    fn keys_are_shown_on_a_line() {
        assert_eq!(shown("a\nb"), "a\u{fffd}b");
        assert_eq!(shown(&"é".repeat(100)).chars().count(), 63);
    }
}

//! What the constants of a balancer are worth: each is varied while the rest stay, on loads that differ in what is hard
//! about them.
//!
//! Slicer's authors published theirs and said that they had not studied how much they matter. Here is that study: all
//! combinations of theirs, and our own one by one. The same text comes out whenever it is run, for it holds no times.

use std::fmt::Write as _;

use mandoline_core::balance::Tuning;
use mandoline_core::forecast::Smoothing;
use mandoline_core::spec::{Band, JobSpec, Ratio, ReplicaBounds};

use crate::contest::{Clock, Contest, Entry, Outcome, Progress};
use crate::policy::Planned;
use crate::policy::mandoline::Mandoline;
use crate::policy::slicer::{Slicer, SlicerConfig};
use crate::scenario::{Recipe, Scenario, ScenarioError};

/// The loads that constants are tried on.
pub struct Study {
    tasks: u32,
    scenarios: Vec<(&'static str, Scenario)>,
    seeds: Vec<u64>,
}

/// What is said of each load, its words, and its tasks.
const LOADS: [(&str, &str); 6] = [
    ("static", "zipf:0.99"),
    ("drift", "zipf:0.99,drift"),
    ("flash", "zipf:0.99,flash"),
    ("diurnal", "zipf:0.99,diurnal"),
    ("fail", "zipf:0.99,fail"),
    ("scale", "zipf:0.99,scale"),
];

/// One setting of a policy's constants.
pub struct Variant {
    /// Which constant is not as it usually is, or all of them for a point of a grid.
    pub knob: String,
    /// Its value.
    pub value: String,
    make: Entry<'static>,
}

/// How one variant did on each load.
#[derive(Clone, Debug, PartialEq)]
struct Finding {
    knob: String,
    value: String,
    outcomes: Vec<Figures>,
}

/// What of an outcome does not depend on the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    p50: f64,
    p99: f64,
    churn: f64,
    slices: usize,
}

impl Study {
    /// Prepares the whole study, or a small one that is done in seconds and whose figures say little.
    pub fn new(quick: bool) -> Result<Self, ScenarioError> {
        if quick {
            let words = ",keys=2000,intervals=6,warmup=2,rate=1000";
            Self::of(5, &LOADS[1..4], words, vec![1])
        } else {
            Self::of(100, &LOADS, ",keys=1000000", vec![1, 2])
        }
    }

    fn of(
        tasks: u32,
        loads: &[(&'static str, &str)],
        words: &str,
        seeds: Vec<u64>,
    ) -> Result<Self, ScenarioError> {
        let scenario = |(name, load): &(&'static str, &str)| {
            let recipe: Recipe = format!("{load}{words}").parse()?;
            Ok((*name, Scenario::made(&recipe, tasks)?))
        };
        let scenarios = loads.iter().map(scenario).collect::<Result<_, ScenarioError>>()?;
        Ok(Self { tasks, scenarios, seeds })
    }

    /// Counts the intervals that `markdown` will run.
    pub fn intervals(&self) -> usize {
        let variants = slicer_grid().len() + slicer_others().len() + ours().len();
        let each: usize = self.scenarios.iter().map(|(_, scenario)| scenario.count()).sum();
        variants * each * self.seeds.len()
    }

    /// Runs everything, and gives the page. `clock` and `threads` change nothing in it.
    pub fn markdown(
        &self,
        threads: usize,
        clock: Clock<'_>,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> String {
        let run = |variants: &[Variant]| self.run(variants, threads, clock, progress);
        let (grid, others, ours) = (run(&slicer_grid()), run(&slicer_others()), run(&ours()));
        self.page(&grid, &others, &ours)
    }

    fn run(
        &self,
        variants: &[Variant],
        threads: usize,
        clock: Clock<'_>,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Vec<Finding> {
        let policies: Vec<Entry<'_>> = variants
            .iter()
            .map(|variant| -> Entry<'_> { Box::new(|seed| (variant.make)(seed)) })
            .collect();
        let mut findings: Vec<Finding> = variants
            .iter()
            .map(|Variant { knob, value, .. }| {
                let (knob, value) = (knob.clone(), value.clone());
                Finding { knob, value, outcomes: Vec::new() }
            })
            .collect();
        for (_, scenario) in &self.scenarios {
            let (policies, seeds) = (&policies[..], &self.seeds[..]);
            let contest = Contest { scenario, policies, seeds, threads, clock, progress };
            let outcomes = contest.run();
            findings.iter_mut().zip(outcomes).for_each(|(finding, outcome)| {
                finding.outcomes.push(Figures::from(&outcome));
            });
        }
        findings
    }

    fn page(&self, grid: &[Finding], others: &[Finding], ours: &[Finding]) -> String {
        let mut text = String::new();
        let names: Vec<&str> = self.scenarios.iter().map(|(name, _)| *name).collect();
        let loads: Vec<String> = self
            .scenarios
            .iter()
            .map(|(name, scenario)| format!("| {name} | `{}` |\n", scenario.name()))
            .collect();
        let _ = write!(
            text,
            "# How much the constants matter\n\n\
             Made by `mandoline sim sensitivity`; run it again to make it anew. {} tasks, seeds {:?}, these loads:\n\n\
             | name | `--workload` |\n|---|---|\n{}\n\
             Each cell: the busiest task's load over the mean, p50 / p99 over the intervals; the load that changes tasks in\n\
             an interval, in percent of all, a mean.\n\n\
             ## What each constant is worth\n\n\
             How far the p99 and the churn lie apart between the best and the worst of its values here, where that is\n\
             most. A constant with small figures can be left alone; one with large figures is a choice between evenness\n\
             and churn, or a mistake.\n\n",
            self.tasks,
            self.seeds,
            loads.concat()
        );
        let _ = writeln!(
            text,
            "| of | constant | p99, worst over best | on | churn, most over least | on |\n|---|---|--:|---|--:|---|"
        );
        for (of, findings) in [("Slicer", others), ("ours", ours)] {
            for (knob, spread) in spreads(findings, &names) {
                let _ = writeln!(text, "| {of} | {knob} | {spread} |");
            }
        }
        for (of, findings) in [("Slicer's", others), ("Ours", ours)] {
            let (idle, rest) = idle(findings);
            let _ = write!(
                text,
                "\n{of} that change next to nothing here (less than 3 % of p99 and a tenth of churn): {}. The rest: {}.\n",
                listed(&idle),
                listed(&rest)
            );
        }
        let _ = write!(
            text,
            "\n## Slicer, one constant at a time\n\n\
             From its published point: 50 to 150 slices a task, 9 % of the key space for moves and 1 % for merges, splits\n\
             from 2 times the mean. Suppression stops moves while no task is above a quarter of what it can take, so it\n\
             depends on how busy the job is.\n\n"
        );
        table(&mut text, &names, others);
        text.push_str("\n## Ours, one constant at a time\n\n");
        table(&mut text, &names, ours);
        text.push_str("\n## Slicer, all combinations\n\nSlices a task, budgets for moves and merges, split from.\n\n");
        table(&mut text, &names, grid);
        text
    }
}

impl From<&Outcome> for Figures {
    fn from(outcome: &Outcome) -> Self {
        let imbalance = outcome.imbalance.unwrap_or_default();
        let (p50, p99) = (imbalance.p50, imbalance.p99);
        Self { p50, p99, churn: outcome.load_churn, slices: outcome.slices }
    }
}

fn table(text: &mut String, names: &[&str], findings: &[Finding]) {
    let _ = writeln!(text, "| constant | value | {} | slices |", names.join(" | "));
    let _ = writeln!(text, "|---|---|{}--:|", "--:|".repeat(names.len()));
    for Finding { knob, value, outcomes } in findings {
        let _ = write!(text, "| {knob} | {value} |");
        for Figures { p50, p99, churn, .. } in outcomes {
            let _ = write!(text, " {p50:.2} / {p99:.2}; {} |", percent(*churn));
        }
        let _ = writeln!(text, " {} |", outcomes.first().map_or(0, |figures| figures.slices));
    }
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent < 0.1 { format!("{percent:.3}") } else { format!("{percent:.2}") }
}

/// For each knob, in order, how far its values lie apart, as cells of a table. The usual values, under `(none)`, are one
/// of every knob's.
fn spreads(findings: &[Finding], names: &[&str]) -> Vec<(String, String)> {
    let usual = findings.iter().find(|finding| finding.knob == USUAL);
    let mut knobs: Vec<&str> = findings.iter().map(|finding| finding.knob.as_str()).collect();
    knobs.dedup();
    knobs
        .into_iter()
        .filter(|knob| *knob != USUAL)
        .map(|knob| {
            let of_knob = || findings.iter().filter(|finding| finding.knob == knob).chain(usual);
            let spread = |of: fn(&Figures) -> f64, least: f64| {
                let on = |number: usize| {
                    let values =
                        || of_knob().map(|finding| of(&finding.outcomes[number]).max(least));
                    values().fold(0.0, f64::max) / values().fold(f64::INFINITY, f64::min)
                };
                let widest = (0..names.len()).max_by(|a, b| on(*a).total_cmp(&on(*b)));
                widest.map_or_else(String::new, |number| {
                    format!("{:.2} | {}", on(number), names[number])
                })
            };
            // Churn below a part in a thousand is next to none, however many times another.
            let cells = [spread(|figures| figures.p99, 1.0), spread(|figures| figures.churn, 1e-3)];
            (knob.to_owned(), cells.join(" | "))
        })
        .collect()
}

/// Parts knobs into those that change next to nothing on any load, and the rest.
fn idle(findings: &[Finding]) -> (Vec<&str>, Vec<&str>) {
    let usual = findings.iter().find(|finding| finding.knob == USUAL);
    let changes = |finding: &Finding| {
        let usual = usual.map_or(&[][..], |usual| &usual.outcomes);
        finding.outcomes.iter().zip(usual).any(|(now, usual)| {
            let apart = |a: f64, b: f64, least: f64| a.max(b).max(least) / a.min(b).max(least);
            apart(now.p99, usual.p99, 1.0) > 1.03 || apart(now.churn, usual.churn, 1e-3) > 1.1
        })
    };
    let mut knobs: Vec<&str> = findings.iter().map(|finding| finding.knob.as_str()).collect();
    knobs.dedup();
    knobs.retain(|knob| *knob != USUAL);
    let change =
        |knob: &str| findings.iter().any(|finding| finding.knob == knob && changes(finding));
    knobs.into_iter().partition(|knob| !change(knob))
}

fn listed(knobs: &[&str]) -> String {
    if knobs.is_empty() { "none".to_owned() } else { knobs.join(", ") }
}

/// What the first row of each table is called.
const USUAL: &str = "(none)";

fn slicer(knob: &str, value: &str, config: SlicerConfig) -> Variant {
    let make: Entry<'static> =
        Box::new(move |_| Box::new(Planned::new(Slicer::new(config.clone()))));
    Variant { knob: knob.to_owned(), value: value.to_owned(), make }
}

/// Slices at the start and to merge down to, and to split up to.
const SLICES: [(u32, u32); 4] = [(25, 75), (50, 150), (100, 300), (200, 600)];
/// Of key space, for moves and for merges.
const BUDGETS: [(f64, f64); 3] = [(0.03, 0.003), (0.09, 0.01), (0.27, 0.03)];
/// Times the mean slice load.
const SPLITS: [f64; 3] = [1.5, 2.0, 4.0];

fn with_slices((least, most): (u32, u32), config: SlicerConfig) -> SlicerConfig {
    SlicerConfig { slices_initial: least, slices_min: least, slices_max: most, ..config }
}

fn slicer_grid() -> Vec<Variant> {
    let mut variants = Vec::new();
    for slices in SLICES {
        for (moves, merges) in BUDGETS {
            for split_factor in SPLITS {
                let config = SlicerConfig {
                    move_budget: moves,
                    merge_budget: merges,
                    split_factor,
                    ..SlicerConfig::default()
                };
                let (least, most) = slices;
                let knob = format!("{least}-{most}, {} / {} %", moves * 100.0, merges * 100.0);
                let value = format!("{split_factor} x");
                variants.push(slicer(&knob, &value, with_slices(slices, config)));
            }
        }
    }
    variants
}

fn slicer_others() -> Vec<Variant> {
    let base = SlicerConfig::default;
    let mut variants = vec![slicer(USUAL, "as published", base())];
    for (least, most) in SLICES.into_iter().filter(|slices| *slices != (50, 150)) {
        let config = with_slices((least, most), base());
        variants.push(slicer("slices a task", &format!("{least}-{most}"), config));
    }
    for move_budget in [0.01, 0.03, 0.27] {
        let config = SlicerConfig { move_budget, ..base() };
        variants.push(slicer("budget for moves", &format!("{} %", move_budget * 100.0), config));
    }
    for merge_budget in [0.0, 0.003, 0.03] {
        let config = SlicerConfig { merge_budget, ..base() };
        variants.push(slicer("budget for merges", &format!("{} %", merge_budget * 100.0), config));
    }
    for split_factor in [1.5, 3.0, 4.0] {
        let config = SlicerConfig { split_factor, ..base() };
        variants.push(slicer("split from", &format!("{split_factor} x"), config));
    }
    for (busy, of_mean) in [("70 %", 0.25 / 0.7), ("22 %", 0.25 / 0.22), ("15 %", 0.25 / 0.15)] {
        // The mean task is asked for the usual rate of a scenario; the small study has less, and says little anyway.
        let config = SlicerConfig { suppress_below: Some(of_mean * RATE), ..base() };
        variants.push(slicer("suppress below 25 %", &format!("tasks {busy} busy"), config));
    }
    for band in [0.05, 0.10, 0.20] {
        let config = SlicerConfig { band: Some(band), ..base() };
        variants.push(slicer(
            "stop band (not in the paper)",
            &format!("{} %", band * 100.0),
            config,
        ));
    }
    variants
}

/// Requests a task an interval, unless a scenario says otherwise.
const RATE: f64 = 20_000.0;

/// All that can be varied of ours.
#[derive(Clone, Copy)]
struct Set {
    tuning: Tuning,
    smoothing: Smoothing,
    band: Ratio,
}

fn standard() -> Set {
    let name = "sim".parse().expect("it is a name");
    let band = JobSpec::new(name).band.ratio();
    Set { tuning: Tuning::STANDARD, smoothing: Smoothing::STANDARD, band }
}

fn mandoline(knob: &str, value: String, set: Set) -> Variant {
    let make: Entry<'static> = Box::new(move |_| {
        let spec = JobSpec {
            band: Band::Adaptive(set.band),
            replicas: ReplicaBounds { min: 1, max: ReplicaBounds::ALL },
            ..JobSpec::new("sim".parse().expect("it is a name"))
        };
        Box::new(Planned::new(Mandoline::with("mandoline", spec, set.tuning, set.smoothing)))
    });
    Variant { knob: knob.to_owned(), value, make }
}

/// Each constant at half and at twice what it is.
fn ours() -> Vec<Variant> {
    let mut variants = vec![mandoline(USUAL, "standard".to_owned(), standard())];
    let factors = [(1, 2), (2, 1)];
    for (knob, field) in RATIOS {
        for (times, over) in factors {
            let mut set = standard();
            let ratio = field(&mut set);
            *ratio = Ratio::from_millionths(ratio.millionths() / over * times);
            let value = ratio.to_string();
            variants.push(mandoline(knob, value, set));
        }
    }
    for (knob, field) in COUNTS {
        for (times, over) in factors {
            let mut set = standard();
            let count = field(&mut set);
            *count = (*count * times / over).max(1);
            let value = count.to_string();
            variants.push(mandoline(knob, value, set));
        }
    }
    variants
}

type Field<V> = (&'static str, fn(&mut Set) -> &mut V);

const RATIOS: [Field<Ratio>; 16] = [
    ("band", |set| &mut set.band),
    ("reserve", |set| &mut set.tuning.reserve),
    ("isolate_above", |set| &mut set.tuning.isolate_above),
    ("error_widens", |set| &mut set.tuning.error_widens),
    ("surprise_widens", |set| &mut set.tuning.surprise_widens),
    ("band_max", |set| &mut set.tuning.band_max),
    ("give_to", |set| &mut set.tuning.give_to),
    ("take_to", |set| &mut set.tuning.take_to),
    ("grow_above", |set| &mut set.tuning.grow_above),
    ("grow_to", |set| &mut set.tuning.grow_to),
    ("shrink_below", |set| &mut set.tuning.shrink_below),
    ("space_costs", |set| &mut set.tuning.space_costs),
    ("overshoot", |set| &mut set.tuning.overshoot),
    ("fill_below", |set| &mut set.tuning.fill_below),
    ("fill_to", |set| &mut set.tuning.fill_to),
    ("merge_below", |set| &mut set.tuning.merge_below),
];

const COUNTS: [Field<u32>; 5] = [
    ("slices_min", |set| &mut set.tuning.slices_min),
    ("slices_merge", |set| &mut set.tuning.slices_merge),
    ("slices_max", |set| &mut set.tuning.slices_max),
    ("gain of the forecast, %", |set| &mut set.smoothing.gain),
    ("news to the forecast, tenths of a deviation", |set| &mut set.smoothing.news),
];

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn finding(knob: &str, p99: f64, churn: f64) -> Finding {
        let figures = Figures { p50: 1.0, p99, churn, slices: 7 };
        let outcomes = vec![figures, Figures { p99: 1.0, ..figures }];
        Finding { knob: knob.to_owned(), value: "v".to_owned(), outcomes }
    }

    #[test]
    fn a_constant_is_worth_what_its_values_lie_apart_where_that_is_most() {
        let findings = [
            finding(USUAL, 1.5, 0.002),
            finding("a", 3.0, 0.008),
            finding("a", 2.0, 0.0),
            finding("b", 1.5, 0.002),
        ];
        let found = spreads(&findings, &["x", "y"]);
        let cells = |text: &str| text.to_owned();
        assert_eq!(found[0], (cells("a"), cells("2.00 | x | 8.00 | y")));
        assert_eq!(found[1], (cells("b"), cells("1.00 | y | 1.00 | y")));
        assert_eq!(idle(&findings), (vec!["b"], vec!["a"]));
    }

    #[test]
    fn the_page_is_the_same_each_time() {
        let words = ",keys=100,intervals=3,warmup=1,rate=100";
        let study = Study::of(2, &LOADS[..2], words, vec![1]).unwrap();
        let ran = std::sync::atomic::AtomicUsize::new(0);
        let page = |threads| {
            study.markdown(threads, &|| Duration::ZERO, &|_| {
                ran.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            })
        };
        let first = page(1);
        assert_eq!(first, page(2));
        assert_eq!(ran.into_inner(), 2 * study.intervals());
        for part in ["## Slicer, all combinations", "| ours | give_to |", "suppress below 25 %"] {
            assert!(first.contains(part), "{first}");
        }
        assert!(!first.contains("NaN") && !first.contains("inf"), "{first}");
    }
}

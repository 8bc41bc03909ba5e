//! Asks the re-implementation what Dicer's own code was asked, and compares the answers.
//!
//! The recording has a load map a round, fine within our slices, and tolerance, bounds and tasks that change each time. Two
//! measures are as in the recording, and not as elsewhere here: the spread is that of the load with what is reserved, and
//! churn counts every gain of a task on a key, also when another holder gave its replica up.

use mandoline_core::key::SliceKey;
use serde::Deserialize;

use super::{Dicer, DicerConfig, first};
use crate::fleet::Member;
use crate::interval::Interval;
use crate::layout::Layout;
use crate::percentile::Percentiles;
use crate::policy::{Planner, Round};

use crate::zstd::Zstd;

#[derive(Deserialize)]
struct Recorded {
    resources: Vec<String>,
    load_map: Vec<(String, f64)>,
    max_load_hint: f64,
    tolerance: f64,
    reservation_ratio: f64,
    churn_penalty: f64,
    min_replicas: u32,
    max_replicas: u32,
    dicer: Answer,
}

#[derive(Deserialize)]
struct Answer {
    over: f64,
    under: f64,
    churn_add: f64,
    churn_rem: f64,
    churn_lb: f64,
    slices: f64,
    replicas: f64,
}

/// Our unit of load, in the recording's.
const UNITS: f64 = 1e6;
/// A run of the load map is so many keys: fine enough that none of them is a top key.
const KEYS_A_RUN: u64 = 256;

impl Recorded {
    fn config(&self) -> DicerConfig {
        DicerConfig {
            tolerance: self.tolerance,
            max_load_hint: Some(self.max_load_hint * UNITS),
            reservation: self.reservation_ratio,
            churn_penalty: self.churn_penalty,
            replicas_min: self.min_replicas,
            replicas_max: Some(self.max_replicas),
            targets: usize::MAX,
            ..DicerConfig::default()
        }
    }

    fn members(&self) -> Vec<Member> {
        let member = |name: &String| {
            let id = name.strip_prefix("resource").unwrap().parse().unwrap();
            Member { id, capacity: 1_000, zone: 0, region: 0, revision: 0 }
        };
        let mut members: Vec<Member> = self.resources.iter().map(member).collect();
        members.sort_by_key(|member| member.id);
        members
    }

    /// Gives the load map as keys, spread evenly over each run; a run one place wide is a hot key.
    fn interval(&self) -> Interval {
        let firsts: Vec<u64> = self.load_map.iter().map(|run| place(&run.0)).collect();
        let mut keys = Vec::new();
        for (at, (_, load)) in self.load_map.iter().enumerate() {
            let first = firsts[at];
            let until = firsts.get(at + 1).copied().unwrap_or(u64::MAX);
            let parts = KEYS_A_RUN.min(until.saturating_sub(first)).max(1);
            let step = until.saturating_sub(first) / parts;
            let each = (load * UNITS / parts as f64) as u64;
            keys.extend((0..parts).map(|nth| (SliceKey(first + nth * step + step / 2), each)));
        }
        Interval::new(keys)
    }
}

/// Where a key of the recording lies: at its first eight bytes, or just behind them if it has more.
fn place(hex: &str) -> u64 {
    let head = format!("{:0<16}", &hex[..hex.len().min(16)]);
    u64::from_str_radix(&head, 16).unwrap() + u64::from(hex.len() > 16)
}

/// What can be compared: over, under, churn, slices, replicas.
type Figures = [f64; 5];

fn figures(round: &Recorded, before: &Layout, after: &Layout, seen: &Interval) -> Figures {
    let members = round.members();
    let hint = round.max_load_hint * UNITS;
    let reserved = round.reservation_ratio * hint * members.len() as f64;
    let mut loads = after.loads(seen, &members).members;
    for (slice, held) in after.iter() {
        let share = slice.width() as f64 / 2.0_f64.powi(64) / held.ids().len() as f64;
        for id in held.ids() {
            let seat = members.binary_search_by_key(id, |member| member.id).unwrap();
            loads[seat] += share * reserved;
        }
    }
    let mean = loads.iter().sum::<f64>() / loads.len() as f64;
    let most = loads.iter().copied().fold(0.0, f64::max);
    let least = loads.iter().copied().fold(f64::MAX, f64::min);
    let mut gained = 0.0;
    for (key, load) in seen.loads() {
        let held = before.holders()[before.index_of(*key)].ids();
        let holds = after.holders()[after.index_of(*key)].ids();
        for id in holds {
            let had = if held.contains(id) { 1.0 / held.len() as f64 } else { 0.0 };
            gained += (1.0 / holds.len() as f64 - had).max(0.0) * *load as f64;
        }
    }
    let replicas: usize = after.holders().iter().map(|held| held.ids().len()).sum();
    let churn = gained / seen.total() as f64;
    [(most - mean) / hint, (mean - least) / hint, churn, after.count() as f64, replicas as f64]
}

#[test]
fn answers_are_like_those_of_the_original() {
    let Some(path) = crate::real::trace("dicer_chaos_seed1.jsonl.zst") else { return };
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let text = std::io::read_to_string(Zstd::new(file)).unwrap();
    let (mut ours, mut theirs): (Vec<Figures>, Vec<Figures>) = (Vec::new(), Vec::new());
    let mut dicer = Dicer::new(DicerConfig::default());
    // All thousand say the same (over .0160 and .0137, churn .546 and .552 at the median), and take a minute in a debug build.
    for line in text.lines().take(60) {
        let round: Recorded = serde_json::from_str(line).unwrap();
        let (members, seen) = (round.members(), round.interval());
        dicer.config = round.config();
        let before = dicer.layout.take().unwrap_or_else(|| first(&dicer.config, &members));
        dicer.loads.resize(before.count(), 0.0);
        dicer.layout = Some(before.clone());
        let (silent, next) = (&[][..], &seen);
        let asked = Round { members: &members, seen: Some(&seen), silent, next, interval: 1 };
        dicer.observe(&asked);
        dicer.plan(&asked);
        ours.push(figures(&round, &before, &dicer.layout(), &seen));
        let told = round.dicer;
        let churn = told.churn_add + told.churn_rem + told.churn_lb;
        theirs.push([told.over, told.under, churn, told.slices, told.replicas]);
    }
    let near =
        [("over", 0.005), ("under", 0.005), ("churn", 0.03), ("slices", 8.0), ("replicas", 8.0)];
    for (at, (name, allowed)) in near.into_iter().enumerate() {
        let percentiles = |figures: &[Figures]| {
            Percentiles::of(figures.iter().map(|figures| figures[at]).collect()).unwrap()
        };
        let (ours, theirs) = (percentiles(&ours), percentiles(&theirs));
        println!("{name}: {ours:?}, theirs {theirs:?}");
        assert!((ours.p50 - theirs.p50).abs() <= allowed, "{name}: {ours:?}, theirs {theirs:?}");
    }
}

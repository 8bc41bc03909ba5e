//! A little language for rounds, and plans as text. Slice keys are shown by their first four digits.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use crate::assignment::{Assigned, Assignment, Replica};
use crate::balance::{Further, InFlight, Policy, Round, plan};
use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::pin::Pin;
use crate::plan::{Edit, Plan, apply, at_once};
use crate::report::HotKey;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::{Band, BandOf, Home, JobSpec, Ratio, ReplicaBounds};
use crate::task::{Capacity, Phase, SessionId, Task, TaskInfo};

pub(in crate::balance) const SINCE: Generation = Generation { incarnation: 1, number: 1 };

/// Reads a round, a line for each thing: `task a b*2 c-` (a capacity, a leaving task), `label a zone=x`, `revision a v2`,
/// `0000..7fff a 900` (a slice, who serves it, its load), `hot 1234 500`, what the spec and the operator say (`replicas
/// 1..2`, `budget 5%`, `fill 25%`, `band fixed 2.5% of hint 1000`, `spread zone`, `home 0000..7fff eu`, `pin 0000..7fff
/// a`, `frozen`), and, in the slices' order, `usual 1 2 3`, `cost 1 2 3` and `further 10% 1 2 3`. A key's missing digits
/// are zeros, and ones at the end of a range.
pub(in crate::balance) fn round(text: &str) -> Round {
    let assignment = Assignment::new("kv".parse().unwrap(), SINCE);
    let mut policy = Policy::from(&JobSpec::new("kv".parse().unwrap()));
    policy.band = Band::Adaptive(Ratio::percent(10));
    let mut round = Round::new(Arc::new(assignment), vec![Load::ZERO], policy);
    let mut assignment = Assignment::clone(&round.assignment);
    let mut runs = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let policy = &mut round.policy;
        match words[..] {
            ["task", ref tasks @ ..] => {
                tasks.iter().for_each(|word| add_task(&mut assignment, word));
            }
            ["label", task, label] => {
                let (name, value) = label.split_once('=').unwrap();
                let labels = &mut task_mut(&mut assignment, task).info.labels;
                labels.insert(name.to_owned(), value.to_owned());
            }
            ["revision", task, revision] => {
                task_mut(&mut assignment, task).info.revision = revision.to_owned();
            }
            ["budget", share] => policy.churn_budget = percent(share),
            ["fill", share] => policy.fill_rate = percent(share),
            ["band", "adaptive", share] => policy.band = Band::Adaptive(percent(share)),
            ["band", "fixed", share, "of", "mean"] => {
                policy.band = Band::Fixed { ratio: percent(share), of: BandOf::Mean };
            }
            ["band", "fixed", share, "of", "hint", hint] => {
                policy.band = Band::Fixed { ratio: percent(share), of: BandOf::Hint };
                policy.max_load_hint = Some(load(hint));
            }
            ["replicas", bounds] => {
                let (min, max) = bounds.split_once("..").unwrap();
                let (min, max) = (min.parse().unwrap(), max.parse().unwrap());
                policy.replicas = ReplicaBounds { min, max };
            }
            ["spread", label] => policy.spread = Some(label.to_owned()),
            ["home", slice, region] => {
                policy.homes.push(Home { slice: range(slice), region: region.to_owned() });
            }
            ["pin", slice, task] => {
                policy.pins.push(Pin { slice: range(slice), task: task.parse().unwrap() });
            }
            ["frozen"] => policy.frozen = true,
            ["hot", at, hot] => round.hot.push(HotKey { key: key(at), load: load(hot) }),
            ["usual", ref loads @ ..] => {
                round.usual = loads.iter().map(|word| load(word)).collect();
            }
            ["cost", ref costs @ ..] => {
                round.costs = costs.iter().map(|word| word.parse().unwrap()).collect();
            }
            ["further", band, ref loads @ ..] => {
                let loads = loads.iter().map(|word| load(word)).collect();
                round.further.push(Further { band: percent(band), loads });
            }
            ["flight", slice, from] => {
                round.in_flight.push(InFlight { slice: range(slice), from: session(from) });
            }
            [slice, ref holders @ .., carried] => {
                let replica = |name: &&str| Replica { session: session(name), since: SINCE };
                let replicas = holders.iter().map(replica).collect();
                let assigned =
                    Assigned { replicas, load: load(carried), token: SINCE, transit: None };
                runs.push((key(slice.split_once("..").unwrap().0), assigned));
            }
            _ => panic!("cannot read {line:?}"),
        }
    }
    if !runs.is_empty() {
        assignment.slices = SliceMap::from_runs(runs).unwrap();
    }
    round.loads = assignment.slices.iter().map(|(_, assigned)| assigned.load).collect();
    round.fresh = round.loads.iter().all(|load| *load == Load::ZERO);
    round.assignment = Arc::new(assignment);
    round
}

fn load(word: &str) -> Load {
    Load::from_milli(word.parse().unwrap())
}

fn percent(word: &str) -> Ratio {
    let share: f64 = word.trim_end_matches('%').parse().unwrap();
    Ratio::from_millionths((share * 10_000.0) as u32)
}

/// Reads a key by its first digits.
pub(in crate::balance) fn key(digits: &str) -> SliceKey {
    SliceKey(u64::from_str_radix(&format!("{digits:0<16}"), 16).unwrap())
}

/// Reads a range of keys by the first digits of both ends.
pub(in crate::balance) fn range(text: &str) -> Slice {
    let (first, last) = text.split_once("..").unwrap();
    Slice::new(key(first), key(&format!("{last:f<16}"))).unwrap()
}

/// Gives the session of a task of the language.
pub(in crate::balance) fn session(name: &str) -> SessionId {
    SessionId(u64::from(name.as_bytes()[0]))
}

fn name_of(session: SessionId) -> char {
    session.0 as u8 as char
}

fn task_mut<'a>(assignment: &'a mut Assignment, name: &str) -> &'a mut Task {
    Arc::make_mut(assignment.tasks.get_mut(&session(name)).unwrap())
}

/// Adds a task as the language writes it: a letter, then `*2` for its capacity or `-` if it leaves.
pub(in crate::balance) fn add_task(assignment: &mut Assignment, word: &str) {
    let name = &word[..1];
    let capacity = word.split_once('*').map_or(1.0, |(_, times)| times.parse().unwrap());
    let address = format!("{name}:1").parse().unwrap();
    let mut info = TaskInfo::new(name.parse().unwrap(), 1, address);
    info.capacity = Capacity::new(capacity).unwrap();
    let phase = if word.ends_with('-') { Phase::Draining } else { Phase::Serving };
    assignment
        .tasks
        .insert(session(name), Arc::new(Task { phase, ..Task::new(session(name), info) }));
}

/// Slices of one width, so many for each task of `names` in turn, and each of this load.
pub(in crate::balance) fn slices(names: &str, each: usize, load: u64) -> String {
    let step = 0x1_0000 / (names.len() * each);
    let mut text = String::new();
    for (at, name) in names.chars().flat_map(|name| std::iter::repeat_n(name, each)).enumerate() {
        writeln!(text, "{:04x}..____ {name} {load}", at * step).unwrap();
    }
    text
}

fn short(slice: Slice) -> String {
    format!("{}..{}", &slice.first().to_string()[..4], &slice.last().to_string()[..4])
}

/// Plans, and writes down all but the splits that only make slices enough.
pub(in crate::balance) fn transcript(round: &Round) -> String {
    let plan = plan(round);
    let name = |session: Option<SessionId>| session.map_or('-', name_of);
    let mut text = String::new();
    for edit in &plan.edits {
        match edit {
            Edit::Split { .. } => {}
            Edit::Merge(slice) => writeln!(text, "merge {}", short(*slice)).unwrap(),
            Edit::Move(step) => writeln!(
                text,
                "{} {} -> {} ({}, {}: {} to {})",
                short(step.slice),
                name(step.from),
                name(step.to),
                step.reason,
                step.load.milli(),
                step.before.milli(),
                step.after.milli()
            )
            .unwrap(),
        }
    }
    let percent = |ratio: Ratio| f64::from(ratio.millionths()) / 1e6;
    write!(text, "imbalance {:.2} to {:.2}", percent(plan.imbalance.0), percent(plan.imbalance.1))
        .unwrap();
    text
}

/// Compares the plan with what is expected.
pub(in crate::balance) fn check(input: &str, expected: &str) {
    let found = transcript(&round(input));
    let expected: Vec<&str> =
        expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(found.lines().collect::<Vec<_>>(), expected, "\n{found}\n");
}

/// The slices as they are once a plan was carried out.
pub(in crate::balance) fn carried_out(round: &Round, plan: &Plan) -> SliceMap<Assigned> {
    apply(&plan.edits, &round.assignment.slices, SINCE.next(), &at_once).unwrap().0
}

/// What each task carries once a plan was carried out, worked out from the slices alone.
pub(in crate::balance) fn carried(round: &Round, plan: &Plan) -> BTreeMap<char, u64> {
    let tasks = round.assignment.tasks.keys().map(|session| (name_of(*session), 0));
    let mut carried: BTreeMap<char, u64> = tasks.collect();
    for (_, assigned) in carried_out(round, plan).iter() {
        let replicas = assigned.replicas.as_slice();
        for replica in replicas {
            *carried.entry(name_of(replica.session)).or_default() +=
                assigned.load.milli() / replicas.len() as u64;
        }
    }
    carried
}

/// Who serves a key once a plan was carried out, in alphabetical order.
pub(in crate::balance) fn servers(round: &Round, plan: &Plan, at: SliceKey) -> String {
    let slices = carried_out(round, plan);
    let replicas = slices.get(at).1.replicas.as_slice();
    let mut names: Vec<char> = replicas.iter().map(|replica| name_of(replica.session)).collect();
    names.sort_unstable();
    names.into_iter().collect()
}

//! Transcripts: tasks, loads, and what the plan does about them. Slice keys are shown by their first four digits.

use std::fmt::Write;
use std::sync::Arc;

use crate::assignment::{Assigned, Assignment, Replica};
use crate::balance::{Policy, Round, plan};
use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::plan::{Edit, Move, Reason};
use crate::prng::Prng;
use crate::report::HotKey;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::{Band, JobSpec, Ratio, ReplicaBounds};
use crate::state::{Job, State};
use crate::task::{Capacity, Phase, SessionId, Task, TaskInfo};

const SINCE: Generation = Generation { incarnation: 1, number: 1 };

/// Reads `task a b*2 c-` (a capacity, a leaving task), `0000..7fff a 900` (a slice, who serves it, its load) and
/// `replicas 1..2`, `budget 5%`.
fn round(text: &str) -> Round {
    let mut assignment = Assignment::new("kv".parse().unwrap(), SINCE);
    let mut policy = Policy::from(&JobSpec::new("kv".parse().unwrap()));
    policy.band = Band::Adaptive(Ratio::percent(10));
    let mut runs = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut words = line.split_whitespace();
        match words.next().unwrap() {
            "task" => words.for_each(|word| add_task(&mut assignment, word)),
            "budget" => {
                policy.churn_budget =
                    Ratio::percent(words.next().unwrap().trim_end_matches('%').parse().unwrap());
            }
            "replicas" => {
                let (min, max) = words.next().unwrap().split_once("..").unwrap();
                policy.replicas =
                    ReplicaBounds { min: min.parse().unwrap(), max: max.parse().unwrap() };
            }
            slice => {
                let first = u64::from_str_radix(&slice[..4], 16).unwrap() << 48;
                let mut words: Vec<&str> = words.collect();
                let load = Load::from_milli(words.pop().unwrap().parse().unwrap());
                let replicas = words
                    .iter()
                    .map(|name| Replica { session: session(name), since: SINCE })
                    .collect();
                runs.push((SliceKey(first), Assigned { replicas, load, token: SINCE }));
            }
        }
    }
    if !runs.is_empty() {
        assignment.slices = SliceMap::from_runs(runs).unwrap();
    }
    let loads = assignment.slices.iter().map(|(_, assigned)| assigned.load).collect();
    let fresh = assignment.slices.iter().all(|(_, assigned)| assigned.load == Load::ZERO);
    Round { fresh, ..Round::new(Arc::new(assignment), loads, policy) }
}

fn session(name: &str) -> SessionId {
    SessionId(u64::from(name.as_bytes()[0]))
}

fn add_task(assignment: &mut Assignment, word: &str) {
    let name = &word[..1];
    let capacity = word.split_once('*').map_or(1.0, |(_, times)| times.parse().unwrap());
    let address = format!("{name}:1").parse().unwrap();
    let mut info = TaskInfo::new(name.parse().unwrap(), 1, address);
    info.capacity = Capacity::new(capacity).unwrap();
    let phase = if word.ends_with('-') { Phase::Draining } else { Phase::Serving };
    assignment.tasks.insert(session(name), Arc::new(Task { session: session(name), info, phase }));
}

fn short(slice: Slice) -> String {
    format!("{}..{}", &slice.first().to_string()[..4], &slice.last().to_string()[..4])
}

/// Plans, and writes down all but the splits that only make slices enough.
fn transcript(round: &Round) -> String {
    let plan = plan(round);
    let name = |session: Option<SessionId>| session.map_or('-', |session| session.0 as u8 as char);
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

/// Compares the plan with what is expected; a `...` line stands for any number of lines.
fn check(input: &str, expected: &str) {
    let found = transcript(&round(input));
    let expected: Vec<&str> =
        expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(found.lines().collect::<Vec<_>>(), expected, "\n{found}\n");
}

#[test]
fn an_even_start() {
    let round = round("task a b c d");
    let plan = plan(&round);
    let mut keys = [0_u128; 4];
    for step in plan.moves() {
        keys[(step.to.unwrap().0 - u64::from(b'a')) as usize] += step.slice.width();
    }
    assert_eq!(keys, [1 << 62; 4]);
}

#[test]
fn within_the_band_nothing_moves() {
    check(
        "task a b
         0000..7fff a 1090
         8000..ffff b 910",
        "imbalance 1.09 to 1.09",
    );
}

#[test]
fn a_hot_task_gives_its_excess_and_no_more() {
    check(
        "task a b
         0000..1fff a 700
         2000..3fff a 400
         4000..7fff a 100
         8000..ffff b 800",
        "2000..21ff a -> b (load, 25: 1200 to 1175)
         0400..05ff a -> b (load, 44: 1175 to 1131)
         0c00..0dff a -> b (load, 44: 1131 to 1087)
         imbalance 1.20 to 1.09",
    );
}

#[test]
fn a_task_of_twice_the_capacity_carries_twice_the_load() {
    check(
        "task a*2 b
         0000..1fff a 1900
         2000..ffff b 1000",
        "imbalance 1.04 to 1.04",
    );
}

#[test]
fn a_leaving_task_is_emptied_whatever_the_budget() {
    let round = round(
        "task a- b c
         budget 0%
         0000..3fff a 500
         4000..7fff a 300
         8000..bfff b 400
         c000..ffff c 400",
    );
    let plan = plan(&round);
    assert!(
        plan.moves().all(|step| step.from == Some(session("a")) && step.reason == Reason::Drain)
    );
    assert_eq!(
        (plan.moved(), plan.imbalance.1.millionths() / 10_000),
        (Load::from_milli(800), 100)
    );
}

#[test]
fn the_last_task_keeps_its_slices_until_it_is_gone() {
    check("task a-\n 0000..ffff a 100", "imbalance 1.00 to 1.00");
}

#[test]
fn what_a_lost_task_served_is_placed_whatever_the_budget() {
    let round =
        round("task b c\n budget 0%\n 0000..7fff 600\n 8000..bfff b 300\n c000..ffff c 300");
    let plan = plan(&round);
    assert!(plan.moves().all(|step| step.from.is_none() && step.reason == Reason::Lost));
    assert_eq!(plan.moved(), Load::from_milli(600));
}

#[test]
fn a_hot_key_whose_last_task_is_lost_gets_all_its_replicas_at_once() {
    let slice = |n: usize| {
        let (first, holder) = (n * 512, if n == 77 { "" } else { ["a", "b", "c"][n % 3] });
        let load = if n == 77 { 1_000 } else { 10 };
        format!("{first:04x}..{:04x} {holder} {load}\n", first + 511)
    };
    let slices: String = (0..128).map(slice).collect();
    let mut round = round(&format!("task a b c d\nreplicas 1..4\n{slices}"));
    let key = SliceKey((77 * 512 + 9) << 48);
    round.hot = vec![HotKey { key, load: Load::from_milli(900) }];
    let plan = plan(&round);
    let takes = plan.moves().filter(|step| step.slice.first() == key && step.to.is_some());
    assert_eq!(takes.count(), 4);
}

#[test]
fn a_newcomer_among_many_is_filled_at_a_bounded_rate() {
    let names = "abcdefghijklmnopqrst";
    let mut text =
        format!("task {} z\n budget 2%\n", names.split("").collect::<Vec<_>>().join(" "));
    for (at, name) in names.chars().enumerate() {
        writeln!(text, "{:04x}..____ {name} 1000", at * 0x0ccc).unwrap();
    }
    let plan = plan(&round(&text));
    assert!(plan.moves().all(|step| step.to == Some(session("z")) && step.reason == Reason::Fill));
    assert!((300..=400).contains(&plan.moved().milli()), "{:?}", plan.moved());
}

#[test]
fn a_slice_that_one_task_cannot_carry_is_replicated_where_the_spec_allows_it() {
    let mut text = String::from("task a b c d\n");
    for at in 0..128 {
        let holder = ["a", "b", "c", "d"][at / 32];
        writeln!(text, "{:04x}..____ {holder} {}", at * 512, if at == 0 { 2_000 } else { 10 })
            .unwrap();
    }
    let alone = plan(&round(&text));
    assert!(alone.moves().all(|step| step.reason != Reason::Replicate));
    let shared = plan(&round(&format!("replicas 1..4\n{text}")));
    assert!(shared.moves().filter(|step| step.reason == Reason::Replicate).count() >= 3);
}

#[test]
fn cold_neighbours_of_one_task_are_merged_when_there_are_too_many() {
    let mut text = String::from("task a b\n");
    for at in 0..256 {
        writeln!(
            text,
            "{:04x}..____ {} {}",
            at * 256,
            if at < 128 { "a" } else { "b" },
            if at % 128 < 8 { 900 } else { 1 }
        )
        .unwrap();
    }
    let plan = plan(&round(&text));
    assert_eq!(plan.moves().count(), 0);
    let merged: u128 = plan
        .edits
        .iter()
        .map(|edit| if let Edit::Merge(slice) = edit { slice.width() >> 56 } else { 0 })
        .sum();
    assert!(merged >= 128, "{merged} of 256 slices are merged");
}

#[test]
fn an_idle_job_stays_as_it_is() {
    let mut idle = round("task a b\n 0000..0fff a 0\n 1000..ffff b 0");
    assert!(plan(&idle).moves().count() > 0, "a fresh one becomes even in keys");
    idle.fresh = false;
    assert_eq!(plan(&idle).moves().count(), 0);
}

#[test]
fn plans_fit_the_state_that_they_are_made_for() {
    // Random jobs: whatever the plan says applies, serves every slice, and is the same when planned again.
    for seed in 0..300 {
        let mut prng = Prng::new(seed);
        let tasks = 1 + prng.below(9);
        let mut state = State::default();
        let name: crate::name::JobName = "kv".parse().unwrap();
        let mut spec = JobSpec::new(name.clone());
        let min = 1 + prng.below(2) as u32;
        spec.replicas = ReplicaBounds { min, max: min + prng.below(3) as u32 };
        let mut job = Job::new(spec.clone(), SINCE);
        let mut assignment = Assignment::new(name.clone(), SINCE);
        for task in 0..tasks {
            let word = format!(
                "{}{}",
                (b'a' + task as u8) as char,
                if prng.below(5) == 0 { "-" } else { "" }
            );
            add_task(&mut assignment, &word);
        }
        job.assignment = Arc::new(assignment);
        state.jobs.insert(name.clone(), job);
        for _ in 0..6 {
            let assignment = Arc::clone(&state.jobs[&name].assignment);
            let heavy = |prng: &mut Prng| {
                if prng.below(20) == 0 { prng.below(100_000) } else { prng.below(1_000) }
            };
            let loads = (0..assignment.slices.count())
                .map(|_| Load::from_milli(heavy(&mut prng)))
                .collect();
            let policy = Policy {
                churn_budget: Ratio::percent(prng.below(50) as u32),
                ..Policy::from(&spec)
            };
            let round = Round::new(assignment, loads, policy.clone());
            let found = plan(&round);
            assert_eq!(found, plan(&round), "seed {seed}: the same round gives the same plan");
            let evened = |step: &&Move| step.reason == Reason::Load;
            let moved: Load = found.moves().filter(evened).map(|step| step.load).sum();
            assert!(
                moved.milli() <= policy.churn_budget.of(found.total.milli()),
                "seed {seed}: the budget is hard"
            );
            let change = crate::command::Command::Change { job: name.clone(), plan: found };
            state.apply(change).unwrap_or_else(|refused| panic!("seed {seed}: {refused}"));
            let job = &state.jobs[&name];
            let serving =
                job.assignment.tasks.values().filter(|task| task.phase == Phase::Serving).count();
            for (slice, assigned) in job.assignment.slices.iter().filter(|_| serving > 0) {
                let replicas = assigned.replicas.as_slice().len();
                assert!(
                    replicas >= serving.min(min as usize),
                    "seed {seed}: {slice} has {replicas} replicas"
                );
            }
        }
    }
}

//! Random jobs with everything switched on at random: what holds of all plans.

use std::sync::Arc;

use crate::assignment::{Assigned, Assignment};
use crate::balance::tests::transcript::{SINCE, add_task};
use crate::balance::{Further, InFlight, Policy, Round, plan};
use crate::command::Command;
use crate::key::SliceKey;
use crate::load::Load;
use crate::name::JobName;
use crate::pin::Pin;
use crate::plan::{Move, Reason};
use crate::prng::Prng;
use crate::report::HotKey;
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::{Band, BandOf, Consistency, Home, JobSpec, Ratio, ReplicaBounds};
use crate::state::{Job, State};
use crate::task::{Phase, Task};
use crate::transit::{Act, HandOffId, Step};

#[test]
fn plans_fit_the_state_that_they_are_made_for() {
    for seed in 0..100 {
        let mut prng = Prng::new(seed);
        let name: JobName = "kv".parse().unwrap();
        let mut state = State::default();
        let mut job = Job::new(JobSpec::new(name.clone()), SINCE);
        job.assignment = Arc::new(tasks(&mut prng, &name));
        state.jobs.insert(name.clone(), job);
        let asked = policy(&mut prng);
        for _ in 0..5 {
            let before = Arc::clone(&state.jobs[&name].assignment);
            let round = round(&mut prng, before, &asked);
            let found = plan(&round);
            assert_eq!(found, plan(&round), "seed {seed}: the same round gives the same plan");
            spends_no_more_than_its_budget(&round, seed);
            let change = Command::Change { job: name.clone(), plan: found };
            state.apply(change).unwrap_or_else(|refused| panic!("seed {seed}: {refused}"));
            let after = &state.jobs[&name].assignment;
            has_enough_replicas(after, &round.policy, seed);
            keeps_the_operators_word(after, &round.policy, seed);
        }
    }
}

#[test]
fn plans_fit_a_state_in_which_slices_are_handed_over() {
    for seed in 0..100 {
        let mut prng = Prng::new(seed);
        let name: JobName = "kv".parse().unwrap();
        let mut spec = JobSpec::new(name.clone());
        let mut asked = policy(&mut prng);
        let mut assignment = tasks(&mut prng, &name);
        if one_in(&mut prng, 2) {
            spec.consistency = Consistency::Exclusive;
            asked.replicas = ReplicaBounds { min: 1, max: 1 };
            assignment.slices = SliceMap::uniform(Assigned { token: SINCE, ..Assigned::unowned() });
        }
        for task in assignment.tasks.values_mut().map(Arc::make_mut) {
            task.info.prepares = prng.below(3) > 0;
        }
        let mut state = State::default();
        let mut job = Job::new(spec, SINCE);
        job.assignment = Arc::new(assignment);
        state.jobs.insert(name.clone(), job);
        for _ in 0..12 {
            let settled = settled(&state.jobs[&name].assignment);
            let moving = moving(&state.jobs[&name].assignment);
            let round = Round { moving, ..round(&mut prng, settled, &asked) };
            let change = Command::Change { job: name.clone(), plan: plan(&round) };
            state.apply(change).unwrap_or_else(|refused| panic!("seed {seed}: {refused}"));
            assert_eq!(state.jobs[&name].assignment.broken_slice(), None, "seed {seed}");
            let steps: Vec<(HandOffId, Act)> = steps(&mut prng, &state.jobs[&name].assignment);
            state.apply(Command::HandOff { job: name.clone(), steps }).unwrap();
            // What leaves next time has much that lies side by side.
            let sessions: Vec<_> = state.jobs[&name].assignment.tasks.keys().copied().collect();
            let session = sessions[prng.below(sessions.len() as u64) as usize];
            let job = name.clone();
            state
                .apply(match one_in(&mut prng, 2) {
                    true => Command::Drain { job, session },
                    false => Command::Undrain { job, session },
                })
                .unwrap();
        }
    }
}

/// The assignment as planners see it: each slice where it is going.
fn settled(assignment: &Assignment) -> Arc<Assignment> {
    let mut settled = assignment.clone();
    for assigned in settled.slices.values_mut() {
        assigned.replicas = assigned.settled().unwrap_or_else(|| assigned.replicas.clone());
    }
    Arc::new(settled)
}

fn moving(assignment: &Assignment) -> Vec<u32> {
    let places = assignment.slices.iter().enumerate();
    places.filter(|(_, (_, one))| one.transit.is_some()).map(|(at, _)| at as u32).collect()
}

/// Takes most hand-offs a step further, and calls some off.
fn steps(prng: &mut Prng, assignment: &Assignment) -> Vec<(HandOffId, Act)> {
    let mut steps = Vec::new();
    for (_, assigned) in assignment.slices.iter() {
        let Some(transit) = assigned.transit.as_deref() else { continue };
        let act = match (transit.step, assigned.replicas.is_exclusive()) {
            _ if one_in(prng, 9) => Act::Abort,
            (Step::Preparing, true) => Act::Release,
            (Step::Preparing, false) => Act::Switch,
            (Step::Releasing, _) => Act::Lapsed,
        };
        if !one_in(prng, 4) {
            steps.push((transit.id, act));
        }
    }
    steps
}

fn one_in(prng: &mut Prng, many: u64) -> bool {
    prng.below(many) == 0
}

fn tasks(prng: &mut Prng, name: &JobName) -> Assignment {
    let mut assignment = Assignment::new(name.clone(), SINCE);
    for task in 0..=prng.below(9) {
        let capacity = ["", "", "*0.5", "*2", "-"][prng.below(5) as usize];
        add_task(&mut assignment, &format!("{}{capacity}", (b'a' + task as u8) as char));
    }
    for task in assignment.tasks.values_mut().map(Arc::make_mut) {
        let mut label = |name: &str, values: [&str; 3]| {
            let value = values[prng.below(3) as usize].to_owned();
            task.info.labels.insert(name.to_owned(), value);
        };
        label("zone", ["x", "y", "z"]);
        label("region", ["eu", "us", "us"]);
        task.info.revision = ["v1", "v1", "v2"][prng.below(3) as usize].to_owned();
    }
    assignment
}

fn slice(prng: &mut Prng) -> Slice {
    let first = prng.bits();
    Slice::new(SliceKey(first), SliceKey(first.saturating_add(prng.bits() >> 3))).unwrap()
}

fn policy(prng: &mut Prng) -> Policy {
    let mut policy = Policy::from(&JobSpec::new("kv".parse().unwrap()));
    let ratio = Ratio::from_millionths(prng.below(200_000) as u32);
    policy.band = match prng.below(3) {
        0 => Band::Adaptive(ratio),
        1 => Band::Fixed { ratio, of: BandOf::Mean },
        _ => Band::Fixed { ratio, of: BandOf::Hint },
    };
    policy.max_load_hint = one_in(prng, 2).then(|| Load::from_milli(prng.below(100_000)));
    policy.reservation = Ratio::percent([0, 0, 20][prng.below(3) as usize]);
    policy.churn_budget = Ratio::percent(prng.below(101) as u32);
    policy.fill_rate = Ratio::percent(1 + prng.below(100) as u32);
    let min = 1 + prng.below(3) as u32;
    policy.replicas = ReplicaBounds { min, max: min + prng.below(4) as u32 };
    policy.spread = one_in(prng, 2).then(|| String::from("zone"));
    if one_in(prng, 2) {
        // Homes and pins do not overlap among themselves: what a job may have is checked when it is applied.
        let (low, high) = Slice::FULL.split_at(SliceKey(1 << 63)).unwrap();
        let home = |slice, region: &str| Home { slice, region: region.to_owned() };
        policy.homes = vec![home(low, "eu"), home(high, "nowhere")];
    }
    if one_in(prng, 2) {
        let task = ["a", "c", "q"][prng.below(3) as usize].parse().unwrap();
        policy.pins = vec![Pin { slice: slice(prng), task }];
    }
    policy
}

fn round(prng: &mut Prng, assignment: Arc<Assignment>, asked: &Policy) -> Round {
    let count = assignment.slices.count();
    let heavy = |prng: &mut Prng| {
        let most = if one_in(prng, 20) { 100_000 } else { 1_000 };
        Load::from_milli(prng.below(most))
    };
    let loads = |prng: &mut Prng| (0..count).map(|_| heavy(prng)).collect::<Vec<Load>>();
    let some_loads = |prng: &mut Prng| if one_in(prng, 2) { loads(prng) } else { Vec::new() };
    let mut round = Round::new(Arc::clone(&assignment), loads(prng), asked.clone());
    round.usual = some_loads(prng);
    if one_in(prng, 2) {
        round.costs = (0..count).map(|_| prng.below(1_000_000)).collect();
    }
    if one_in(prng, 3) {
        round.further.push(Further { band: Ratio::percent(10), loads: loads(prng) });
    }
    let mut hot = Vec::new();
    for _ in 0..prng.below(4) {
        let key = SliceKey(prng.bits());
        let load = round.loads[assignment.slices.index_of(key)];
        hot.push(HotKey { key, load: load.share(1 + u128::from(prng.below(100)), 100) });
    }
    hot.sort_by_key(|hot| hot.key);
    round.hot = hot;
    let sessions: Vec<_> = assignment.tasks.keys().copied().collect();
    for _ in 0..prng.below(4) {
        let slice = assignment.slices.slice_at(prng.below(count as u64) as usize);
        let from = sessions[prng.below(sessions.len() as u64) as usize];
        round.in_flight.push(InFlight { slice, from });
    }
    round.forecast_error = Ratio::from_millionths(prng.below(100_000) as u32);
    round.surprise = Ratio::from_millionths(prng.below(100_000) as u32);
    round.policy.frozen = one_in(prng, 6);
    round
}

fn spends_no_more_than_its_budget(round: &Round, seed: u64) {
    let found = plan(round);
    let evened =
        |step: &&Move| matches!(step.reason, Reason::Load | Reason::Displace | Reason::Fill);
    let moved: Load = found.moves().filter(evened).map(|step| step.load).sum();
    let budget =
        if round.policy.frozen { 0 } else { round.policy.churn_budget.of(found.total.milli()) };
    assert!(moved.milli() <= budget, "seed {seed}: moves {moved}, {budget} at most");
}

fn serving(assignment: &Assignment) -> impl Iterator<Item = &Task> {
    let tasks = assignment.tasks.values().map(AsRef::as_ref);
    tasks.filter(|task: &&Task| task.phase == Phase::Serving)
}

/// The task that a slice is pinned to, if it serves.
fn pinned(assignment: &Assignment, policy: &Policy, slice: Slice) -> Option<Task> {
    let pin = policy.pins.iter().find(|pin| pin.slice.overlap(slice).is_some())?;
    serving(assignment).find(|task| task.info.name == pin.task).cloned()
}

fn has_enough_replicas(assignment: &Assignment, policy: &Policy, seed: u64) {
    let serving = serving(assignment).count();
    let (min, max) = (policy.replicas.min as usize, policy.replicas.max as usize);
    for (slice, assigned) in assignment.slices.iter().filter(|_| serving > 0) {
        if pinned(assignment, policy, slice).is_some() {
            continue;
        }
        let replicas = assigned.replicas.as_slice().len();
        assert!(
            (serving.min(min)..=max).contains(&replicas),
            "seed {seed}: {slice} has {replicas} replicas"
        );
    }
}

fn keeps_the_operators_word(assignment: &Assignment, policy: &Policy, seed: u64) {
    for (slice, assigned) in assignment.slices.iter() {
        let replicas = assigned.replicas.as_slice();
        if let Some(task) = pinned(assignment, policy, slice) {
            let sessions: Vec<_> = replicas.iter().map(|replica| replica.session).collect();
            assert_eq!(sessions, [task.session], "seed {seed}: {slice} is pinned");
            continue;
        }
        let home = policy.homes.iter().find(|home| home.slice.overlap(slice).is_some());
        // Where the spread forbids what the home asks, either may give way.
        let Some(home) = home.filter(|_| policy.spread.is_none()) else { continue };
        let lives = |task: &Task| task.info.labels["region"] == home.region;
        let at_home = serving(assignment).filter(|task| lives(task)).count();
        let home = replicas.iter().filter(|one| lives(&assignment.tasks[&one.session])).count();
        assert!(home >= at_home.min(1), "seed {seed}: {slice} has no replica at home");
    }
}

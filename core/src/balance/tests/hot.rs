//! Hot keys: cut out, replicated, or displaced; what is best is worked out by hand.

use crate::balance::tests::transcript::{carried, carried_out, key, round, servers, slices};
use crate::balance::{Round, plan};
use crate::load::Load;
use crate::plan::{Edit, Reason};

/// A job of tasks with 32 slices each that are as hot as one another, and keys that carry `share` of a task's mean each,
/// all on the first task: in neighbouring slices, and known from reports.
fn hot_keys(names: &str, keys: usize, share: f64, spec: &str) -> Round {
    let tasks: Vec<String> = names.chars().map(String::from).collect();
    // Chosen so that the mean comes out at about 100,000.
    let rest = (names.len() as f64 - keys as f64 * share) * 100_000.0 / (names.len() * 32) as f64;
    let hot = (share * 100_000.0) as u64;
    let mut found = round(&format!(
        "task {}\nband adaptive 2%\n{spec}\n{}",
        tasks.join(" "),
        slices(names, 32, rest as u64)
    ));
    let assignment = std::sync::Arc::make_mut(&mut found.assignment);
    for at in 0..keys {
        found.loads[at] += Load::from_milli(hot);
        let slice = assignment.slices.slice_at(at);
        let at = crate::key::SliceKey(slice.first().0 + (slice.width() / 3) as u64);
        found.hot.push(crate::report::HotKey { key: at, load: Load::from_milli(hot) });
    }
    let loads = found.loads.clone();
    for (at, load) in loads.into_iter().enumerate() {
        assignment.slices.value_at_mut(at).load = load;
    }
    found
}

/// Max over mean after the plan, in relation to what is the least possible with at most `replicas` replicas a key.
fn over_the_bound(round: &Round, share: f64, replicas: f64) -> f64 {
    let carried = carried(round, &plan(round));
    let (max, sum) = (carried.values().max().unwrap(), carried.values().sum::<u64>());
    let reached = *max as f64 * carried.len() as f64 / sum as f64;
    reached / f64::max(1.0, share / replicas)
}

#[test]
fn two_hot_keys_that_met_on_one_task_are_parted_in_one_round() {
    for names in ["abc", "abcdefgh"] {
        for share in [0.3, 0.6, 0.9, 1.0, 1.2] {
            let found = over_the_bound(&hot_keys(names, 2, share, ""), share, 1.0);
            assert!(found <= 1.05, "{names}, keys of {share}: {found}");
        }
    }
}

#[test]
fn two_hot_keys_that_met_on_one_task_are_replicated_in_one_round() {
    for replicas in [2_u8, 4, 8] {
        for share in [0.6, 1.2, 1.9, 3.0] {
            let round = hot_keys("abcdefgh", 2, share, &format!("replicas 1..{replicas}"));
            let found = over_the_bound(&round, share, f64::from(replicas));
            assert!(found <= 1.05, "{replicas} replicas, keys of {share}: {found}");
        }
    }
}

#[test]
fn three_equal_hot_keys_on_eight_tasks_are_even_after_one_round() {
    // With three replicas each there are nine on eight tasks: only keys of which a task can carry two replicas fit.
    for (spec, replicas, shares) in [
        ("", 1.0, [0.5, 1.0, 1.6, 2.5]),
        ("replicas 1..3", 3.0, [0.5, 0.8, 1.0, 1.4]),
        ("replicas 1..8", 8.0, [0.5, 1.0, 1.6, 2.5]),
    ] {
        for share in shares {
            let found = over_the_bound(&hot_keys("abcdefgh", 3, share, spec), share, replicas);
            assert!(found <= 1.05, "{spec}, keys of {share}: {found}");
        }
    }
}

#[test]
fn hot_keys_become_slices_of_their_own_and_nothing_moves() {
    let text = format!(
        "task a b\nband adaptive 10%\n{}hot 0123 100\nhot 0345 60\nhot 8123 5",
        slices("ab", 32, 20)
    );
    let round = round(&text);
    let plan = plan(&round);
    assert_eq!(plan.moves().count(), 0);
    let after = carried_out(&round, &plan);
    for at in ["0123", "0345"] {
        assert_eq!(after.get(key(at)).0.width(), 1, "{at}");
    }
    assert!(after.get(key("8123")).0.width() > 1, "it is not hot enough to be worth a slice");
    assert_eq!(plan.edits.len(), 4, "each is cut out by two cuts");
}

#[test]
fn a_hot_key_is_cut_out_once() {
    let text = "task a b\n0000..____ a 500\n0123..____ a 500\n0123000000000001..____ a 10\n8000..____ b 1000
        hot 0123 500";
    let cuts = |edit: &&Edit| matches!(edit, Edit::Split { at, .. } if at.0 >> 48 == 0x123);
    assert_eq!(plan(&round(text)).edits.iter().filter(cuts).count(), 0);
}

#[test]
fn where_no_single_move_helps_one_hot_key_displaces_what_lies_elsewhere() {
    // Either key on b or c leaves that task as hot, unless it gives away what it had: both fit nowhere else.
    let round = hot_keys("abc", 2, 0.95, "");
    let plan = plan(&round);
    let displaced: Vec<_> = plan.moves().filter(|step| step.reason == Reason::Displace).collect();
    assert_eq!(displaced.len(), 1);
    assert_eq!((displaced[0].slice.width(), displaced[0].load.milli()), (1, 95_000));
    let keys: Vec<String> = round.hot.iter().map(|hot| servers(&round, &plan, hot.key)).collect();
    assert_ne!(keys[0], keys[1]);
}

#[test]
fn a_key_that_is_too_hot_for_any_task_stays_while_its_neighbours_go() {
    let round = hot_keys("abcd", 1, 1.5, "");
    let plan = plan(&round);
    assert_eq!(servers(&round, &plan, round.hot[0].key), "a");
    let carried = carried(&round, &plan);
    assert!(carried[&'a'] <= 152_000, "{carried:?}");
}

#[test]
fn replicas_stay_until_a_slice_was_cold_for_long() {
    let rest = slices("abcd", 32, 1_000);
    let job = |usual: u64| {
        let first = rest.replacen("0000..____ a 1000", "0000..____ a b c 900", 1);
        let usual = format!("usual {usual}{}", " 1000".repeat(127));
        plan(&round(&format!("task a b c d\nreplicas 1..4\n{first}{usual}")))
    };
    let fewer =
        |usual| job(usual).moves().filter(|step| step.reason == Reason::Dereplicate).count();
    assert_eq!(fewer(9_000), 0, "it was hot until now and may be again");
    assert_eq!(fewer(900), 2);
}

#[test]
fn more_replicas_than_the_spec_allows_are_removed_whatever_they_carry() {
    let rest = slices("abcd", 32, 1_000);
    let first = rest.replacen("0000..____ a 1000", "0000..____ a b c d 90000", 1);
    let round = round(&format!("task a b c d\nreplicas 1..2\n{first}"));
    let plan = plan(&round);
    assert_eq!(servers(&round, &plan, key("0000")).len(), 2);
}

#[test]
fn replicas_cost_what_they_carry_and_the_budget_bounds_it() {
    let rest = slices("abcd", 32, 1_000);
    let first = rest.replacen("0000..____ a 1000", "0000..____ a 90000", 1);
    for budget in [0, 5, 20, 40] {
        let text = format!("task a b c d\nreplicas 1..4\nbudget {budget}%\n{first}");
        let plan = plan(&round(&text));
        let most = (90_000 + 127_000) * budget / 100;
        assert!(plan.moved().milli() <= most, "{budget} %: {:?}", plan.moved());
    }
}

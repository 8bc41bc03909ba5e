//! Starting even and staying so: what is given, filled, merged and placed.

use std::fmt::Write;

use crate::balance::plan;
use crate::balance::tests::transcript::{check, round, session};
use crate::key::SliceKey;
use crate::load::Load;
use crate::plan::{Edit, Reason};
use crate::report::HotKey;

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

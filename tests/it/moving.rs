//! The benches of owners, in small: slices that move under load, owners that are killed, and what makes no sense to measure.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use crate::callers::{PATIENCE, my_turn, program};
use crate::kit::{run, text};

/// What a bench printed last, once it has ended well.
async fn found(words: &str) -> Value {
    let bench =
        tokio::process::Command::new(program()).args(words.split(' ')).kill_on_drop(true).output();
    let output = timeout(PATIENCE * 2, bench).await.expect("the bench ends in time").unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    println!("{out}{err}");
    assert!(output.status.success(), "{out}{err}");
    serde_json::from_str(out.lines().last().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_that_move_all_the_time_fail_no_request() {
    let _turn = my_turn().await;
    let found =
        found("bench moving --tasks 4 --clients 3 --rate 150 --moves 5 --seconds 4 --json").await;
    assert_eq!(found["failed"], 0, "{found}");
    assert!(found["requests"].as_u64().unwrap() > 300, "{found}");
    // A debug build beside other tests: that it moved at all, and that nearly nobody noticed.
    assert!(found["moves_per_s"]["mean"].as_f64().unwrap() >= 2.0, "{found}");
    assert!(found["load_moved_per_s"]["mean"].as_f64().unwrap() >= 0.004, "{found}");
    assert!(found["at_first_try"].as_f64().unwrap() >= 0.9, "{found}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_owners_keys_are_served_elsewhere_and_not_too_early() {
    let _turn = my_turn().await;
    let found = found("bench crash --kills 2 --json").await;
    let kills = |kind: &str| found[kind].as_u64().unwrap();
    assert_eq!(kills("kills") + kills("kills_under_new_leader"), 2, "{found}");
    assert_eq!(found["early"], 0, "{found}");
    let first = Duration::from_secs_f64(found["first_s"].as_f64().unwrap());
    assert!(first >= Duration::from_millis(1_400), "{found}");
}

#[test]
fn what_makes_no_sense_to_measure_is_refused() {
    for (words, why) in [
        ("bench handoff --moves 0", "0 is not in 1..=10000"),
        ("bench handoff --state-kib 65537", "65537 is not in 0..=65536"),
        ("bench moving --tasks 1", "1 is not in 2..=100"),
        ("bench moving --tasks 101", "101 is not in 2..=100"),
        ("bench moving --clients 0", "0 is not in 1..=100"),
        ("bench moving --rate 0", "0 is not in 1..=100000"),
        ("bench moving --moves 101", "101 is not in 0..=100"),
        ("bench moving --seconds 0", "0 is not in 1..=3600"),
        ("bench crash --kills 0", "0 is not in 1..=1000"),
        ("bench rolling --tasks 1", "1 is not in 2..=50"),
        ("bench rolling --keys 99", "99 is not in 100..=1000000"),
        ("bench rolling --rate many", "invalid value 'many'"),
    ] {
        let output = run(&words.split(' ').collect::<Vec<_>>());
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words}: {err}");
        assert!(err.contains(why), "{words}: {err}");
    }
}

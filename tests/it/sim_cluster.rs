//! `mandoline sim cluster`: what a sweep prints, that a seed repeats to the byte, and what is refused.

use crate::kit::{json, run, text};

#[test]
fn a_sweep_counts_what_went_wrong_and_finds_nothing_broken() {
    let found = json(&[
        "sim",
        "cluster",
        "--scenario",
        "mixed",
        "--seeds",
        "4",
        "--first-seed",
        "5",
        "--minutes",
        "4",
        "--json",
    ]);
    assert_eq!(found["seeds"], 4, "{found}");
    assert_eq!(found["violations"].as_array().map(Vec::len), Some(0), "{found}");
    assert!((found["simulated_hours"].as_f64().unwrap() - 16.0 / 60.0).abs() < 0.01, "{found}");
    for count in ["handoffs_done", "leader_changes", "restarts", "expiries", "imports"] {
        assert!(found[count].as_u64().unwrap() > 0, "{count}: {found}");
    }
    for fault in ["task_crashes", "pauses", "partitions", "broken_streams", "clock_changes"] {
        assert!(found["faults"][fault].as_u64().unwrap() > 0, "{fault}: {found}");
    }
}

#[test]
fn a_seed_repeats_to_the_byte() {
    let trace = || {
        let arguments = ["sim", "cluster", "--first-seed", "9", "--minutes", "3", "--trace"];
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        output.stdout
    };
    let first = trace();
    assert!(first.len() > 1_000 && first == trace());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let cases = [
        (["--scenario", "mixd"], "use calm, crashes, partitions, pauses, drift, restore or mixed"),
        (["--seeds", "0"], "no seeds: run one at least"),
        (["--minutes", "1"], "60s a seed: run between"),
        (["--threads", "0"], "invalid value '0'"),
    ];
    for (arguments, expected) in cases {
        let output = run(&[["sim", "cluster"], arguments].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

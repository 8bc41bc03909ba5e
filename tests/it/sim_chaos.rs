//! `mandoline sim dicer-chaos`: what it prints, and what it says of files that are no recording.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::kit::{json, run, text};

const ROUND: &str = r#"{"resources":["a","b","c"],"load_map":[["",300.0],["8000000000000000",200.0],["800000000000000000",400.0]],"max_load_hint":1000,"tolerance":0.025,"reservation_ratio":0.01,"min_replicas":1,"max_replicas":3,"dicer":{"over":0.5,"under":0.25,"churn_add":0.125,"churn_rem":0.125,"churn_lb":0.25,"ms":3.5}}"#;

fn file(dir: &Path, text: &str) -> String {
    let path = dir.join("rounds.jsonl");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn both_sides_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), &format!("{ROUND}\n{ROUND}\n"));
    let found = json(&["sim", "dicer-chaos", &path, "--json"]);
    assert_eq!(keys(&found), ["dicer", "mandoline"]);
    for side in ["mandoline", "dicer"] {
        assert_eq!(keys(&found[side]), ["churn", "ms", "over", "under"]);
        for figure in ["churn", "ms", "over", "under"] {
            assert_eq!(keys(&found[side][figure]), ["max", "p50", "p90", "p99"]);
            for percentile in ["p50", "p90", "p99", "max"] {
                assert!(found[side][figure][percentile].is_f64(), "{found}");
            }
        }
    }
    assert_eq!(found["dicer"]["churn"]["p50"], 0.5);
    assert_eq!(found["dicer"]["ms"]["max"], 3.5);

    let printed = run(&["sim", "dicer-chaos", &path]);
    let printed = text(&printed.stdout);
    assert!(printed.starts_with("FIGURE"), "{printed}");
    assert!(printed.contains("\n2 rounds"), "{printed}");
}

#[test]
fn what_is_no_recording_is_refused_by_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (format!("{ROUND}\nnonsense\n"), ":2: the line is no recorded round: "),
        (String::new(), ": there is no round in it"),
        (ROUND.replace(r#"["a","b","c"]"#, "[]"), ":1: `resources` is empty"),
        (ROUND.replace(r#""min_replicas":1"#, r#""min_replicas":0"#), ":1: replicas is min 0"),
        (
            ROUND.replace(r#""max_load_hint":1000"#, r#""max_load_hint":0"#),
            ":1: `max_load_hint` is",
        ),
    ];
    for (given, expected) in cases {
        let output = run(&["sim", "dicer-chaos", &file(dir.path(), &given), "--json"]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.starts_with("error: ") && said.contains(expected), "{said}");
        assert!(output.stdout.is_empty(), "{given}");
    }
    let missing = run(&["sim", "dicer-chaos", "no/such/file"]);
    assert!(text(&missing.stderr).contains("error: no/such/file: cannot be opened"));
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> =
        value.as_object().expect("it is an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

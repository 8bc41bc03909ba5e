//! `mandoline sim advise` and `mandoline sim sensitivity`: what they say, and what they say of bad input.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::kit::{json, run, text};

fn file(dir: &Path, text: &str) -> String {
    let path = dir.join("load");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// An hour of requests, one in three of them by the same user.
fn log() -> String {
    let mut log = String::new();
    for n in 0..3_600 {
        let user = if n % 3 == 0 { 0 } else { n * 7 % 50 };
        let (minute, second) = (n / 60, n % 60);
        let _ = writeln!(
            log,
            "h - - [10/Oct/2000:13:{minute:02}:{second:02} -0700] \"GET /a?user=u{user} HTTP/1.0\" 200 1"
        );
    }
    log
}

#[test]
fn advice_names_the_hot_key_what_it_bounds_and_a_spec() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), &log());
    let args = ["sim", "advise", "--log", &path, "--key", "query:user", "--tasks", "6"];
    let output = run(&args);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in [
        "3600 requests for 50 keys in 60 min",
        " %  u0\n",
        "Beyond 2 task(s)",
        "\nmandoline ",
        "\nring ",
        "less than a day",
        "name: my-service\n",
        "replicas: {min: 1, max: ",
    ] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    let found = json(&[&args[..], &["--json", "--job", "kv"]].concat());
    assert_eq!((&found["requests"], &found["keys"]), (&3_600.into(), &50.into()));
    assert_eq!(found["hottest"][0]["key"], "u0");
    assert_eq!(found["tasks_bound"], 2);
    assert!(found["replicas_needed"].as_u64().unwrap() > 1, "{found}");
    assert!(found["policies"].as_array().unwrap().len() >= 6, "{found}");
    assert!(found["warnings"][0].is_string(), "{found}");
    assert!(found["spec"].as_str().unwrap().starts_with("name: kv\n"), "{found}");
}

#[test]
fn one_key_and_next_to_no_data_are_told_and_are_no_error() {
    let dir = tempfile::tempdir().unwrap();
    for (given, expected) in [
        ("0 k\n", "There is one key only"),
        ("0 a\n1 b\n", "There are more tasks (4) than keys (2)"),
    ] {
        let output = run(&["sim", "advise", "--tasks", "4", "--log", &file(dir.path(), given)]);
        let said = text(&output.stdout);
        assert!(output.status.success() && said.contains(expected), "{said}");
        assert!(said.contains("name: my-service"), "{said}");
    }
}

#[test]
fn bad_logs_and_keys_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), &log());
    let cases: [(&[&str], &str); 6] = [
        (&["--log", "no/such", "--tasks", "4"], "no/such: cannot be opened"),
        (&["--log", &path, "--tasks", "0"], "0 is not in 1..=10000"),
        (&["--log", &path], "--tasks <N>"),
        (&["--log", &path, "--tasks", "4", "--key", "cookie"], "\"cookie\" is no part of a log"),
        (&["--log", &path, "--tasks", "4", "--key", "query:none"], ": there is no event in it"),
        (&["--log", &path, "--tasks", "4", "--interval", "0s"], "an interval of no length"),
    ];
    for (args, expected) in cases {
        let output = run(&[&["sim", "advise"][..], args].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(expected) && output.stdout.is_empty(), "{args:?}: {said}");
    }
    let trace = file(dir.path(), "0 a\n1 b\n");
    let output = run(&["sim", "advise", "--log", &trace, "--key", "path", "--tasks", "2"]);
    assert!(text(&output.stderr).contains("leave out --key"), "{}", text(&output.stderr));
}

#[test]
fn the_study_is_a_page_of_tables() {
    let output = run(&["sim", "sensitivity", "--quick"]);
    let page = text(&output.stdout);
    assert!(output.status.success() && page.starts_with("# How much the constants matter\n"));
    for part in ["| Slicer | slices a task |", "## Slicer, all combinations", "| ours | give_to |"]
    {
        assert!(page.contains(part), "{page}");
    }
    assert_eq!(run(&["sim", "sensitivity", "--slow"]).status.code(), Some(2));
}

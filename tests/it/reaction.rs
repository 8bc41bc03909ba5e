//! A key becomes hot and the load is even soon: `mandoline bench reaction` as a user runs it, once of each kind and with
//! rounds a fifth as long: in shorter ones there are too few requests for the load to be known from them beside other tests.

use std::time::Duration;

use serde_json::Value;

use crate::callers::{my_turn, program};
use crate::kit::text;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_hot_key_is_evened_out_in_a_few_rounds() {
    let _turn = my_turn().await;
    let words = "bench reaction --runs 1 --report-every 1s --balance-every 2s --json";
    let bench =
        tokio::process::Command::new(program()).args(words.split(' ')).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(120), bench).await;
    let output = output.expect("the bench ends within 120 s").unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    println!("{out}{err}");
    assert!(output.status.success(), "{out}{err}");
    let found: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&found["never"], &found["failed"]), (&0.into(), &0.into()), "{out}{err}");
    for kind in ["replicate_s", "clear_s"] {
        let took = found[kind]["p50"].as_f64().unwrap();
        // Three times the three rounds that are claimed, for other tests run beside it, and the 2 s over which it is measured.
        assert!(took <= 20.0, "{kind}: {took} s: {out}{err}");
    }
}

//! Proxy, stub and application give the same owner for a key: a share of the keys of `mandoline bench same`, whose full million the
//! tests of the Python package ask for, and then Python.

use crate::callers::{my_turn, number};
use crate::kit::json;

#[tokio::test]
async fn everyone_who_routes_gives_the_same_owner() {
    let _turn = my_turn().await;
    let keys = number("MANDOLINE_SAME_KEYS", 20_000).to_string();
    let found = json(&["bench", "same", "--keys", &keys, "--calls", "200", "--json"]);
    assert_eq!(found["differ_total"], 0, "{found}");
    assert!(found["slices"].as_u64() >= Some(1_000), "{found}");
    assert!(found["tasks"].as_u64() >= Some(20), "{found}");
}

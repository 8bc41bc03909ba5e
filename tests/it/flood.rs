//! Floods of a real proxy: its memory stays bounded, and the clients beside them are served. How soon is for `bench flood` on a machine
//! that has nothing else to do.

use serde_json::Value;

use crate::callers::my_turn_blocking;
use crate::kit::{run, text};

#[test]
fn floods_leave_memory_bounded_and_other_clients_served() {
    let _turn = my_turn_blocking();
    let output = run(&["bench", "flood", "--rounds", "1", "--window-ms", "150", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr)));
    let floods = found["floods"].as_object().unwrap();
    assert!(floods.len() >= 19, "{found}");
    for (name, effect) in floods {
        assert!(effect["more_kib"].as_u64().unwrap() <= 64 << 10, "{name}: {found}");
    }
    assert_eq!(found["failed"], 0, "{found}");
    assert!(found["asked"].as_u64().unwrap() > 0, "{found}");
    // The proxy shows out who breaks its rules.
    assert!(floods["h1_bad_heads"]["ended"].as_u64().unwrap() > 0, "{found}");
}

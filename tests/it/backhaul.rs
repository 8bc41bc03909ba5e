//! A large body through an application that forwards: it costs next to no memory, arrives whole, and ends where either side leaves.

use serde_json::Value;

use crate::callers::my_turn;
use crate::kit::{run, text};

#[tokio::test]
async fn a_large_body_is_forwarded_in_little_memory_and_ends_when_either_side_leaves() {
    let _turn = my_turn().await;
    // It ends with 1 past 1 MiB, which is for release builds to keep; what does not arrive, or hangs, is an error of its own.
    let output = run(&["bench", "backhaul", "--mib", "64", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr)));
    assert!(found["more_kib_max"].as_u64() <= Some(4 * 1_024), "{found}");
    for way in ["http1_request", "http1_response", "http2_request", "http2_response"] {
        assert!(found["owner_hears_ms"][way].is_f64(), "{way}: {found}");
        assert!(found["client_hears_ms"][way].is_f64(), "{way}: {found}");
    }
}

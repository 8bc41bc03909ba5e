//! Nobody gets more tokens than flow into the bucket, whoever owns it meanwhile.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::{Scene, built, ctrl_c};
use crate::kit::ask;

/// What the example gives: at once, and each second.
const BURST: f64 = 10.0;
const PER_SECOND: f64 = 0.5;

#[test]
fn a_bucket_gives_no_token_twice_while_its_task_is_drained() {
    if built("rate_limiter").is_none() {
        return;
    }
    let scene = Scene::start("name: limits\nconsistency: exclusive\n");
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("buckets.db");
    let database = database.to_str().unwrap();
    let start = |name| scene.task("rate_limiter", &[name, "127.0.0.1:0", database], name);
    let [(leaves, _), (_stays, address)] = ["limits-0", "limits-1"].map(start);
    scene.settle("limits", 2);

    let began = Instant::now();
    let mut given: BTreeMap<String, f64> = BTreeMap::new();
    let mut take = |user: usize| {
        let user = format!("user-{user}");
        let answer = ask(address, "POST", &format!("/take/{user}"), "").unwrap();
        match answer.status {
            200 => *given.entry(user).or_default() += 1.0,
            // What the leaving task was about to answer breaks off at worst: not given, as far as anyone knows.
            429 | 502 | 503 => (),
            _ => panic!("{answer:?}"),
        }
    };
    let mut all = |rounds: usize| (0..rounds * USERS).for_each(|turn| take(turn % USERS));
    // Half of each bucket is given by one owner, the rest while one of them leaves, and after.
    all(5);
    let leaving = std::thread::spawn(|| ctrl_c(leaves));
    while !leaving.is_finished() {
        all(1);
    }
    leaving.join().unwrap();
    all(12);

    assert_eq!(given.len(), USERS);
    for (user, tokens) in given {
        let most = BURST + began.elapsed().as_secs_f64() * PER_SECOND;
        assert!(tokens <= most, "{user} was given {tokens} of {most}");
        assert!(tokens >= BURST, "{user} was given {tokens} only");
    }
}

/// So many that each task owns some.
const USERS: usize = 8;

//! One node alone.

use std::time::SystemTime;

use super::kit::{Options, Place, apply, job, start, until, version};
use crate::raft::config::FirstStart;

#[tokio::test]
async fn a_node_alone_leads_and_finds_everything_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut place = Place::new(dir.path(), "n1");
    let node = start(&mut place, Options::new(FirstStart::Alone)).await.unwrap();
    assert_eq!(version(&node.propose(apply("a")).await.unwrap()), 1);
    assert_eq!(version(&node.propose(apply("a")).await.unwrap()), 2);
    until("a named cluster", || node.consensus.state().cluster.is_some()).await;
    let before = node.consensus.state();
    node.stop().await;
    let node = start(&mut place, Options::new(FirstStart::Refuse)).await.unwrap();
    until("everything to be there again", || *node.consensus.state() == *before).await;
    assert_eq!(before.jobs[&job("a")].version, 2);
    assert_eq!(version(&node.propose(apply("a")).await.unwrap()), 3);
}

#[tokio::test]
async fn a_cluster_founded_anew_is_newer_than_the_one_whose_disk_was_wiped() {
    let dir = tempfile::tempdir().unwrap();
    let mut place = Place::new(dir.path(), "n1");
    let mut founded = Vec::new();
    for disk in ["wiped", "new"] {
        place.dir = dir.path().join(disk);
        let begun = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
        // Milliseconds count: the next one must have begun.
        let newest = founded.last().copied().unwrap_or_default();
        until("the next millisecond", || {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            now.as_millis() > newest
        })
        .await;
        let node = start(&mut place, Options::new(FirstStart::Alone)).await.unwrap();
        until("a named cluster", || node.consensus.state().cluster.is_some()).await;
        founded.push(u128::from(node.consensus.state().incarnation));
        assert!(founded.last() >= Some(&begun), "{founded:?} since {begun}");
        node.stop().await;
    }
    assert!(founded[0] < founded[1], "{founded:?}");
}

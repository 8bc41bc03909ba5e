//! One node alone.

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

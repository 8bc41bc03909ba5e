//! Three nodes over TCP.

use super::kit::{Cluster, apply};
use crate::raft::config::Snapshots;

#[tokio::test]
async fn three_nodes_agree_and_go_on_without_the_one_that_led() {
    let mut cluster = Cluster::start(3, Snapshots::default()).await;
    cluster.propose(apply("a")).await;
    cluster.all_have("a", 1).await;
    let led = cluster.leader().await;
    cluster.kill(led);
    cluster.propose(apply("a")).await;
    cluster.all_have("a", 2).await;
    cluster.up(led).await;
    cluster.all_have("a", 2).await;
}

//! The identity of a cluster and of its nodes.

use super::*;

#[test]
fn a_cluster_is_founded_once_and_its_nodes_never_share_an_id() {
    let mut state = State::default();
    state
        .apply(Command::FoundCluster { id: ClusterId(7), nodes: 3, incarnation: 1_700_000_000 })
        .unwrap();
    let again = Command::FoundCluster { id: ClusterId(8), nodes: 3, incarnation: 1_800_000_000 };
    assert_eq!(refuse(&mut state, again), Refused::Founded(ClusterId(7)));
    state.apply(Command::ApplyJob { spec: JobSpec::new(kv()), if_version: None }).unwrap();
    let first = Generation { incarnation: 1_700_000_000, number: 1 };
    assert_eq!(state.jobs[&kv()].assignment.generation, first);
    assert_eq!(state.apply(Command::MintNode).unwrap().outcome, Outcome::Node(NodeId(4)));
    assert_eq!(state.apply(Command::MintNode).unwrap().outcome, Outcome::Node(NodeId(5)));
}

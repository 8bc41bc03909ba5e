//! Who is a member: nodes that join and leave, that lost their disk, that belong elsewhere.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::command::{ClusterId, Command, NodeId};
use mandoline_proto::pb;
use tonic::Status;

use super::kit::{Cluster, Options, Place, Running, apply, start, until, version};
use crate::raft::book::Book;
use crate::raft::config::{FirstStart, Snapshots, Transport};
use crate::raft::peer::{Dialer, FOREIGN, Known, refusal};
use crate::raft::start::StartError;
use crate::raft::wire::Identity;
use crate::raft::{Failure, MemberError, ProposeError};

#[tokio::test]
async fn a_node_that_lost_its_disk_is_refused_under_its_id_and_joins_under_a_fresh_one() {
    let mut cluster =
        Cluster::start(3, Snapshots { every: 50, keep: 10, ..Snapshots::default() }).await;
    for _ in 0..100 {
        cluster.propose(apply("a")).await;
    }
    // Not the leader, to keep it short.
    let lost = (cluster.leader().await + 1) % 3;
    cluster.kill(lost);
    let old = NodeId(lost as u64 + 1);
    cluster.places[lost].dir = cluster.dir.path().join("a new disk");

    let first = cluster.list();
    let node = start(&mut cluster.places[lost], Options::new(first)).await.unwrap();
    let Failure::Start(error) = node.consensus.failed().await else { panic!("it did not start") };
    let StartError::DiskGone { node: who, peer, .. } = &*error else { panic!("{error}") };
    assert_eq!(*who, old);
    assert!(error.to_string().contains(&format!("mandoline assigner --join {peer}")), "{error}");
    assert!(error.to_string().contains(&format!("mandoline cluster remove {old}")), "{error}");
    node.stop().await;

    let options = Options::new(FirstStart::Join(vec![peer.clone()]));
    // Another address: the old member is still known by its own.
    let mut place = Place::new(cluster.dir.path(), "n4");
    let node = start(&mut place, options).await.unwrap();
    until("the new node to vote", || {
        node.consensus.status().members.iter().any(|m| m.node == NodeId(4) && m.voter)
    })
    .await;
    assert_eq!(node.consensus.status().node, Some(NodeId(4)));
    let leader = cluster.leader().await;
    let consensus = cluster.node(leader).consensus.clone();
    assert_eq!(consensus.remove(NodeId(9)).await, Err(MemberError::NoSuchMember(NodeId(9))));
    consensus.remove(old).await.unwrap();
    cluster.nodes.push(Some(node));
    cluster.propose(apply("a")).await;
    cluster.all_have("a", 101).await;
    let members: Vec<_> = consensus.status().members.iter().map(|m| m.node.0).collect();
    assert_eq!(members.len(), 3);
    assert!(members.contains(&4) && !members.contains(&old.0), "{members:?}");
    // Ids are never given twice.
    assert_eq!(consensus.state().last_node, 4);
}

#[tokio::test]
async fn a_learner_listens_before_it_votes_and_the_last_voter_stays() {
    let mut cluster = Cluster::start(1, Snapshots::default()).await;
    let consensus = cluster.node(0).consensus.clone();
    cluster.propose(apply("a")).await;
    let place = Place::new(cluster.dir.path(), "n2");
    let never_minted = consensus.add_learner(NodeId(2), place.member.clone()).await;
    assert_eq!(never_minted, Err(MemberError::NotMinted(NodeId(2))));
    assert_eq!(consensus.remove(NodeId(1)).await, Err(MemberError::LastVoter(NodeId(1))));
    assert_eq!(consensus.promote(NodeId(2)).await, Err(MemberError::NoSuchMember(NodeId(2))));

    let join = FirstStart::Join(vec![cluster.places[0].member.peer.clone()]);
    cluster.places.push(place);
    let node = start(&mut cluster.places[1], Options::new(join)).await.unwrap();
    until("two voters", || consensus.status().members.iter().filter(|m| m.voter).count() == 2)
        .await;
    cluster.nodes.push(Some(node));
    cluster.all_have("a", 1).await;
    // A leader that is to go hands over first, and the other one lets it go.
    let leader = cluster.leader().await;
    let (gone, other) = (NodeId(leader as u64 + 1), 1 - leader);
    let asked = cluster.node(leader).consensus.remove(gone).await;
    let Err(MemberError::NotLeader { leader: Some(told) }) = asked else { panic!("{asked:?}") };
    assert_eq!(told.node, NodeId(other as u64 + 1));
    until("the other one to lead", || cluster.node(other).leads()).await;
    cluster.node(other).consensus.remove(gone).await.unwrap();
    let left: Vec<_> = cluster.node(other).consensus.status().members;
    assert_eq!(left.iter().map(|member| member.node).collect::<Vec<_>>(), [told.node]);
    cluster.node(other).propose(apply("a")).await.unwrap();
}

#[tokio::test]
async fn a_node_that_is_not_there_is_not_added_and_costs_no_quorum() {
    let cluster = Cluster::start(1, Snapshots::default()).await;
    let named = || cluster.node(0).consensus.state().cluster.is_some();
    until("a cluster with a name", named).await;
    cluster.propose(Command::MintNode).await;
    // Nobody serves there.
    let dead = Place::new(cluster.dir.path(), "n2").member;
    let consensus = cluster.node(0).consensus.clone();
    let within = Duration::from_secs(1);
    let (adder, member) = (consensus.clone(), dead.clone());
    let added = cluster.node(0).spawn(async move { adder.add(NodeId(2), member, within).await });
    let expected = MemberError::NotCaughtUp { node: NodeId(2), peer: dead.peer.clone(), within };
    assert!(expected.to_string().contains(&dead.peer), "{expected}");
    assert_eq!(added.await, Err(expected));
    let members: Vec<_> = consensus.status().members.iter().map(|m| m.node.0).collect();
    assert_eq!(members, [1]);
    assert_eq!(version(&cluster.propose(apply("a")).await), 1);
    // One that votes may be added again, at no risk.
    let me = cluster.places[0].member.clone();
    assert_eq!(consensus.add(NodeId(1), me, within).await, Ok(()));
}

#[tokio::test]
async fn a_node_that_was_removed_is_refused_when_it_comes_back_with_its_old_disk() {
    let mut cluster = Cluster::start(1, Snapshots::default()).await;
    let consensus = cluster.node(0).consensus.clone();
    let via = cluster.places[0].member.peer.clone();
    let join = FirstStart::Join(vec![via.clone()]);
    for n in [2, 3] {
        let mut place = Place::new(cluster.dir.path(), &format!("n{n}"));
        cluster.nodes.push(Some(start(&mut place, Options::new(join.clone())).await.unwrap()));
        cluster.places.push(place);
        let votes = || consensus.status().members.iter().any(|m| m.node.0 == n && m.voter);
        until("the new node to vote", votes).await;
    }
    cluster.kill(2);
    let leader = cluster.leader().await;
    cluster.node(leader).consensus.remove(NodeId(3)).await.unwrap();
    // Its own log says that it votes.
    let again = start(&mut cluster.places[2], Options::new(join.clone())).await.unwrap();
    let Failure::Start(error) = again.consensus.failed().await else { panic!("it started") };
    assert!(matches!(&*error, StartError::Removed { node: NodeId(3), .. }), "{error}");
    assert!(error.to_string().contains("empty its data directory"), "{error}");
    again.stop().await;
    let members = |at| cluster.node(at).consensus.status().members;
    assert!(members(leader).iter().all(|m| m.node.0 != 3), "{:?}", members(leader));
    // As it was told to.
    cluster.places[2].dir = cluster.dir.path().join("emptied");
    cluster.nodes[2] =
        Some(start(&mut cluster.places[2], Options::new(join.clone())).await.unwrap());
    until("it to vote as n4", || {
        consensus.status().members.iter().any(|m| m.node == NodeId(4) && m.voter)
    })
    .await;
    // One that was not removed comes back as ever.
    cluster.kill(1);
    cluster.nodes[1] = Some(start(&mut cluster.places[1], Options::new(join)).await.unwrap());
    cluster.propose(apply("a")).await;
    cluster.all_have("a", 1).await;
}

#[tokio::test]
async fn a_call_from_another_cluster_or_to_another_node_or_in_another_protocol_is_refused() {
    let cluster = Cluster::start(1, Snapshots::default()).await;
    let node = cluster.node(0);
    let ours = node.consensus.status().cluster.unwrap();
    let term = node.consensus.status().term;
    let peer = cluster.places[0].member.peer.clone();
    let vote = |cluster, to, transport: Transport| {
        let peer = peer.clone();
        async move {
            let known = Known::default();
            known.set(Identity { cluster, node: NodeId(7), founders: vec![] });
            let dialer = Arc::new(Dialer::new(transport, known, Book::default()));
            let vote = pb::RaftVote { term: 1_000, node: 7, committed: false };
            let message =
                pb::RaftVoteRequest { vote: Some(vote), ..pb::RaftVoteRequest::default() };
            let status =
                dialer.client(&peer).unwrap().vote(dialer.request(Some(to), message)).await;
            status.map(|_| ()).unwrap_err()
        }
    };
    let kind = |status: &Status| refusal(status).map(str::to_owned);
    let foreign = vote(ClusterId(ours.0 ^ 1), NodeId(1), Transport::plain()).await;
    assert_eq!(kind(&foreign).as_deref(), Some(FOREIGN), "{foreign}");
    assert!(foreign.message().contains(&ours.to_string()), "{foreign}");
    let other = vote(ours, NodeId(2), Transport::plain()).await;
    assert_eq!(kind(&other).as_deref(), Some("other-node"), "{other}");
    let newer = Transport {
        sign: Arc::new(|metadata| {
            drop(metadata.insert("mandoline-protocol", "2".parse().unwrap()));
        }),
        ..Transport::plain()
    };
    let newer = vote(ours, NodeId(1), newer).await;
    assert_eq!(kind(&newer).as_deref(), Some("protocol"), "{newer}");
    assert_eq!(node.consensus.status().term, term, "a stranger's term counts for nothing");
}

#[tokio::test]
async fn nodes_that_were_given_different_lists_do_not_found_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let mut places: Vec<_> = (1..=3).map(|n| Place::new(dir.path(), &format!("n{n}"))).collect();
    let list: Vec<_> = places.iter().map(|place| place.member.clone()).collect();
    let mut other = list.clone();
    other.swap(1, 2);
    let mut nodes = Vec::new();
    for (at, place) in places.iter_mut().enumerate() {
        let list = if at == 2 { &other } else { &list };
        let options = Options::new(FirstStart::Together(list.clone()));
        nodes.push(start(place, options).await.unwrap());
    }
    let Failure::Start(error) = nodes[0].consensus.failed().await else { panic!("it started") };
    assert!(matches!(&*error, StartError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("same list in the same order"), "{error}");
}

#[tokio::test]
async fn a_node_that_is_not_in_its_own_list_or_was_told_nothing_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut place = Place::new(dir.path(), "n1");
    let other = Place::new(dir.path(), "n2").member;
    let error = start(&mut place, Options::new(FirstStart::Together(vec![other]))).await.map(drop);
    assert!(matches!(error, Err(StartError::NotListed { .. })), "{error:?}");
    let twice = FirstStart::Together(vec![place.member.clone(), place.member.clone()]);
    let error = start(&mut place, Options::new(twice)).await.map(drop);
    assert!(matches!(error, Err(StartError::Config(_))), "{error:?}");
    let error = start(&mut place, Options::new(FirstStart::Refuse)).await.map(drop);
    assert!(matches!(error, Err(StartError::Empty)), "{error:?}");
}

#[tokio::test]
async fn nodes_that_all_have_moved_find_each_other_by_the_list_and_the_log_learns_of_it() {
    let mut cluster = Cluster::start(3, Snapshots::default()).await;
    cluster.propose(apply("a")).await;
    cluster.all_have("a", 1).await;
    for at in 0..3 {
        cluster.kill(at);
    }
    for (at, place) in cluster.places.iter_mut().enumerate() {
        // The same directory, by its name, and another port.
        *place = Place::new(cluster.dir.path(), &format!("n{}", at + 1));
    }
    for at in 0..3 {
        cluster.up(at).await;
    }
    cluster.propose(apply("a")).await;
    cluster.all_have("a", 2).await;
    let places: Vec<_> = cluster.places.iter().map(|place| place.member.clone()).collect();
    for (_, node) in cluster.running() {
        let known =
            || node.consensus.status().members.into_iter().map(|m| m.member).collect::<Vec<_>>();
        until("every node to know where the others are", || known() == places).await;
    }
}

#[tokio::test]
async fn two_of_three_found_nothing_until_the_third_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut places: Vec<_> = (1..=3).map(|n| Place::new(dir.path(), &format!("n{n}"))).collect();
    let list = FirstStart::Together(places.iter().map(|place| place.member.clone()).collect());
    let mut nodes = Vec::new();
    for place in places.iter_mut().take(2) {
        nodes.push(start(place, Options::new(list.clone())).await.unwrap());
    }
    let early = nodes[0].consensus.propose(apply("a")).await;
    assert!(matches!(early, Err(ProposeError::NotLeader { leader: None })), "{early:?}");
    assert_eq!(nodes[0].consensus.status().cluster, None);
    // The founder may be killed while it waits, and be another process after that.
    nodes.remove(0).kill();
    nodes.push(start(&mut places[0], Options::new(list.clone())).await.unwrap());
    nodes.push(start(&mut places[2], Options::new(list)).await.unwrap());
    until("a leader", || nodes.iter().any(Running::leads)).await;
    let named = || nodes.iter().all(|node| node.consensus.state().cluster.is_some());
    until("a cluster with a name", named).await;
    let ids: BTreeSet<_> = nodes.iter().map(|node| node.consensus.state().cluster).collect();
    assert_eq!(ids.len(), 1);
}

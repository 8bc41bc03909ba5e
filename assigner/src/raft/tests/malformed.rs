//! What a peer sends that makes no sense is refused to it, and the node goes on.

use bytes::Bytes;
use futures_util::stream;
use mandoline_core::command::NodeId;
use mandoline_proto::pb;
use mandoline_proto::pb::peer_client::PeerClient;
use prost::Message;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::kit::{Cluster, apply, version};
use super::storage::{at, entry, snapshot_meta};
use crate::raft::book::Book;
use crate::raft::config::{Snapshots, Transport};
use crate::raft::machine::head_of;
use crate::raft::peer::{Dialer, Known};
use crate::raft::wire::{self, Identity};

/// A member's way to the node, for which it was never meant.
struct Peer {
    dialer: Dialer,
    client: PeerClient<Channel>,
}

impl Peer {
    fn new(cluster: &Cluster) -> Self {
        let known = Known::default();
        let id = cluster.node(0).consensus.status().cluster.unwrap();
        known.set(Identity { cluster: id, node: NodeId(7), founders: vec![] });
        let dialer = Dialer::new(Transport::plain(), known, Book::default());
        let client = dialer.client(&cluster.places[0].member.peer).unwrap();
        Self { dialer, client }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        self.dialer.request(Some(NodeId(1)), message)
    }

    async fn append(&mut self, parts: Vec<pb::RaftPart>) -> Status {
        let request = self.request(stream::iter(parts));
        let mut replies = self.client.append(request).await.unwrap().into_inner();
        replies.message().await.expect_err("it makes no sense")
    }

    async fn snapshot(&mut self, parts: Vec<pb::RaftPart>) -> Status {
        let request = self.request(stream::iter(parts));
        self.client.snapshot(request).await.map(|_| ()).expect_err("it makes no sense")
    }
}

fn part(data: impl Into<Bytes>, last: bool) -> pb::RaftPart {
    pb::RaftPart { data: data.into(), last, head: None }
}

#[tokio::test]
async fn malformed_messages_are_refused_and_the_node_goes_on() {
    let cluster = Cluster::start(1, Snapshots::default()).await;
    cluster.propose(apply("a")).await;
    let mut peer = Peer::new(&cluster);
    let vote = pb::RaftVote { term: 1_000, node: 7, committed: true };

    let garbage = peer.append(vec![part(&b"\xff\xff\xff"[..], true)]).await;
    assert_eq!(garbage.code(), Code::InvalidArgument, "{garbage}");
    let cut = peer.append(vec![part(&b"\x0a"[..], false)]).await;
    assert_eq!(cut.code(), Code::InvalidArgument, "{cut}");
    let whole = pb::RaftAppend {
        vote: Some(vote),
        previous: Some(wire::pb_log_id(&at(1, 3))),
        entries: vec![wire::pb_entry(&entry(4)), wire::pb_entry(&entry(6))],
        committed: None,
    };
    let hole = peer.append(vec![part(whole.encode_to_vec(), true)]).await;
    assert!(hole.message().contains("index 6 where 5 was due"), "{hole}");
    let no_vote = pb::RaftAppend { vote: None, entries: vec![], ..whole.clone() };
    let no_vote = peer.append(vec![part(no_vote.encode_to_vec(), true)]).await;
    assert!(no_vote.message().contains("vote"), "{no_vote}");
    let no_payload = pb::RaftEntry { log_id: whole.previous, payload: None };
    let odd = pb::RaftAppend { entries: vec![no_payload], previous: None, ..whole };
    let odd = peer.append(vec![part(odd.encode_to_vec(), true)]).await;
    assert!(odd.message().contains("entries[0].payload"), "{odd}");

    let bytes = Bytes::from_static(b"no state");
    let head = head_of(snapshot_meta(), &bytes);
    let sent = |head: &wire::Head| {
        let wire = wire::pb_head(head, Some(&wire::vote(vote)));
        vec![pb::RaftPart { head: Some(wire), ..part(bytes.clone(), true) }]
    };
    let headless = peer.snapshot(vec![part(bytes.clone(), true)]).await;
    assert!(headless.message().contains("head"), "{headless}");
    let nothing = peer.snapshot(vec![]).await;
    assert_eq!(nothing.code(), Code::InvalidArgument, "{nothing}");
    let no_state = peer.snapshot(sent(&head)).await;
    assert_eq!(no_state.code(), Code::DataLoss, "{no_state}");
    let damaged = peer.snapshot(sent(&wire::Head { checksum: 1, ..head.clone() })).await;
    assert!(damaged.message().contains("checksum"), "{damaged}");
    let newer = peer.snapshot(sent(&wire::Head { format: 2, ..head })).await;
    assert!(newer.message().contains("format 2"), "{newer}");

    let request = peer.request(pb::RaftVoteRequest::default());
    let voteless = peer.client.vote(request).await.map(|_| ()).unwrap_err();
    assert_eq!(voteless.code(), Code::InvalidArgument, "{voteless}");
    let request = peer.request(pb::RaftTransfer::default());
    let voteless = peer.client.transfer(request).await.map(|_| ()).unwrap_err();
    assert_eq!(voteless.code(), Code::InvalidArgument, "{voteless}");
    let request = peer.request(pb::RaftAdmit {
        node: 99,
        member: Some(pb::RaftMember::default()),
        fresh: true,
    });
    let never = peer.client.admit(request).await.map(|_| ()).unwrap_err();
    assert!(never.message().contains("n99 was never minted"), "{never}");
    let identity =
        pb::RaftIdentity { cluster: Bytes::from_static(&[1; 16]), node: 1, founders: vec![] };
    let request = peer.request(pb::RaftPledge { identity: Some(identity) });
    let pledged = peer.client.pledge(request).await.map(|_| ()).unwrap_err();
    assert_eq!(pledged.code(), Code::FailedPrecondition, "{pledged}");

    assert_eq!(version(&cluster.propose(apply("a")).await), 2);
    assert_eq!(cluster.node(0).consensus.status().term, 1, "nobody has stood for election since");
}

#[tokio::test]
async fn every_message_that_is_cut_short_is_refused_or_means_less() {
    // Decoding must not panic, whatever comes: whether it makes sense is for the tests above.
    let append = pb::RaftAppend {
        vote: Some(pb::RaftVote { term: 1, node: 1, committed: true }),
        previous: None,
        entries: (0..4).map(|index| wire::pb_entry(&entry(index))).collect(),
        committed: Some(wire::pb_log_id(&at(1, 2))),
    };
    let whole = append.encode_to_vec();
    let head = wire::pb_head(&head_of(snapshot_meta(), b"x"), None).encode_to_vec();
    let decoded: Vec<_> = (0..=whole.len())
        .filter_map(|length| pb::RaftAppend::decode(&whole[..length]).ok())
        .map(wire::append)
        .collect();
    assert!(decoded.last().is_some_and(Result::is_ok));
    for length in 0..head.len() {
        drop(pb::RaftSnapshotHead::decode(&head[..length]).map(wire::head));
    }
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        drop(pb::RaftAppend::decode(&flipped[..]).map(wire::append));
    }
}

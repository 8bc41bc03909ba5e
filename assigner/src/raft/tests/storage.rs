//! The storage by itself: openraft's own suite, what is there after opening again, and what is refused.

use std::sync::Arc;

use bytes::Bytes;
use mandoline_core::command::{ClusterId, NodeId};
use mandoline_core::prng::Prng;
use openraft::StorageError;
use openraft::storage::{RaftLogReader, RaftLogStorage, RaftLogStorageExt};
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use super::kit::apply;
use crate::raft::disk::{Change, Disk, DiskError, FILE, Loaded, Storage};
use crate::raft::faulty::{Faults, Media};
use crate::raft::log::{Log, seal_entry};
use crate::raft::machine::{self, Keeper, Machine, Shown};
use crate::raft::record::{self, Kind};
use crate::raft::types::{
    Entry, LeaderId, LogId, Member, Membership, Payload, SnapshotMeta, StoredMembership, Types,
    Vote,
};
use crate::raft::wire::{self, Identity};
use crate::raft::writer::Writer;

struct Builder;

impl StoreBuilder<Types, Log, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<Types>> {
        let dir = tempfile::tempdir().unwrap();
        let (log, machine, _) = stored(Storage::Dir(dir.path().to_owned())).unwrap();
        Ok((dir, log, machine))
    }
}

fn stored(storage: Storage) -> Result<(Log, Machine, Writer), DiskError> {
    let (disk, loaded) = Disk::open(storage)?;
    let disk = Arc::new(disk);
    // The thread ends with the last of those who can send to it.
    let (writer, _thread) = Writer::start(disk.clone()).unwrap();
    let keeper = Keeper::new(disk.clone(), writer.clone(), loaded.snapshot.clone());
    let log = Log::new(disk, writer.clone(), &loaded, u64::MAX);
    Ok((log, Machine::new(Shown::new(), Box::new(|_| ()), keeper), writer))
}

#[tokio::test]
async fn openrafts_own_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}

pub(super) fn at(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: 1 }, index)
}

pub(super) fn members() -> Membership {
    let member =
        |n: u64| Member { client: format!("client-{n}:7400"), peer: format!("peer-{n}:7401") };
    let nodes: std::collections::BTreeMap<u64, Member> = (1..=3).map(|n| (n, member(n))).collect();
    Membership::new(vec![[1, 2].into(), [1, 2, 3].into()], nodes).unwrap()
}

pub(super) fn entry(index: u64) -> Entry {
    let payload = match index {
        0 => Payload::Membership(members()),
        1 => Payload::Blank,
        _ => Payload::Normal(Arc::new(apply("a"))),
    };
    Entry { log_id: at(1, index), payload }
}

pub(super) fn identity() -> Identity {
    let founders = members().nodes().map(|(_, member)| member.clone()).collect();
    Identity {
        cluster: ClusterId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
        node: NodeId(2),
        founders,
    }
}

pub(super) fn snapshot_meta() -> SnapshotMeta {
    let last_membership = StoredMembership::new(Some(at(1, 0)), members());
    SnapshotMeta { last_log_id: Some(at(1, 3)), last_membership }
}

/// A file with everything in it: entries 2 to 9 after a purge, and a snapshot.
fn filled(snapshot_bytes: usize) -> Media {
    let media = Media::default();
    let (disk, _) = open(&media).unwrap();
    let snapshot = vec![7_u8; snapshot_bytes];
    let head = machine::head_of(snapshot_meta(), &snapshot);
    let log_id = |kind, id| record::seal(kind, 0, &wire::pb_log_id(&id));
    disk.commit(&[
        Change::Identity(record::seal(Kind::Identity, 0, &wire::pb_identity(&identity()))),
        Change::Vote(record::seal(Kind::Vote, 0, &wire::pb_vote(&Vote::new_committed(1, 1)))),
        Change::Append((0..10).map(|index| (index, seal_entry(&entry(index)))).collect()),
        Change::Committed(log_id(Kind::Committed, at(1, 8))),
        machine::change(&head, &snapshot),
        Change::Purge(1, log_id(Kind::Purged, at(1, 1))),
    ])
    .unwrap();
    media
}

fn open(media: &Media) -> Result<(Disk, Loaded), DiskError> {
    Disk::open(Storage::Backend("media".to_owned(), Box::new(media.plug(Faults::default()))))
}

#[test]
fn what_was_written_is_there_when_the_file_is_opened_again() {
    let in_three_parts = (5 << 20) / 2;
    let (disk, loaded) = open(&filled(in_three_parts)).unwrap();
    assert_eq!(loaded.identity, Some(identity()));
    assert_eq!(loaded.vote, Some(Vote::new_committed(1, 1)));
    assert_eq!(
        (loaded.purged, loaded.last, loaded.committed),
        (Some(at(1, 1)), Some(at(1, 9)), Some(at(1, 8)))
    );
    assert_eq!(disk.entries(0..100, usize::MAX).unwrap(), (2..10).map(entry).collect::<Vec<_>>());
    assert_eq!(disk.entries(4..100, 0).unwrap(), [entry(4)], "one at least, whatever it weighs");
    let (head, snapshot) = disk.snapshot().unwrap().unwrap();
    assert_eq!((Some(&head), snapshot.len()), (loaded.snapshot.as_ref(), in_three_parts));
    assert_eq!(head.meta, snapshot_meta());
}

/// Changes the filled file by the file's own means, and gives what opening it says.
fn spoiled(change: Change) -> DiskError {
    let media = filled(20_000);
    let (disk, _) = open(&media).unwrap();
    disk.commit(&[change]).unwrap();
    disk.close();
    open(&media).map(|_| ()).expect_err("it is damaged")
}

fn flipped(record: &Bytes) -> Bytes {
    let mut record = record.to_vec();
    *record.last_mut().unwrap() ^= 1;
    record.into()
}

fn newer(record: &Bytes) -> Bytes {
    let mut record = record.to_vec();
    record[0] = record::FORMAT + 1;
    record.into()
}

#[test]
fn a_damaged_record_is_refused_by_its_file_and_its_place() {
    let vote = record::seal(Kind::Vote, 0, &wire::pb_vote(&Vote::new(2, 1)));
    let who = record::seal(Kind::Identity, 0, &wire::pb_identity(&identity()));
    let snapshot = vec![1_u8; 100];
    let head = machine::head_of(snapshot_meta(), &snapshot);
    let Change::Snapshot { head: sealed, parts } = machine::change(&head, &snapshot) else {
        unreachable!()
    };
    let shorter = machine::head_of(snapshot_meta(), &snapshot[1..]);
    let Change::Snapshot { head: shorter, .. } = machine::change(&shorter, &snapshot) else {
        unreachable!()
    };
    let committed = record::seal(Kind::Committed, 0, &wire::pb_log_id(&at(1, 12)));
    let cases = [
        ("log entry 4", Change::Append(vec![(4, flipped(&seal_entry(&entry(4))))])),
        ("log entry 4", Change::Append(vec![(4, seal_entry(&entry(5)))])),
        ("log entry 4", Change::Append(vec![(4, seal_entry(&entry(4)).slice(..20))])),
        ("log entry 4", Change::Append(vec![(4, vote.clone())])),
        ("the log", Change::Append(vec![(11, seal_entry(&entry(11)))])),
        (
            "log entry 10",
            Change::Append(vec![(
                10,
                seal_entry(&Entry { log_id: at(0, 10), payload: Payload::Blank }),
            )]),
        ),
        ("the log", Change::Committed(committed)),
        ("the vote", Change::Vote(flipped(&vote))),
        ("the node's identity", Change::Identity(flipped(&who))),
        ("the snapshot", Change::Snapshot { head: flipped(&sealed), parts: parts.clone() }),
        (
            "snapshot part 0",
            Change::Snapshot { head: sealed.clone(), parts: vec![flipped(&parts[0])] },
        ),
        ("the snapshot", Change::Snapshot { head: sealed.clone(), parts: vec![] }),
        ("the snapshot", Change::Snapshot { head: shorter, parts: parts.clone() }),
    ];
    for (place, change) in cases {
        let error = spoiled(change.clone());
        let DiskError::Damaged { file, what, .. } = &error else { panic!("{place}: {error}") };
        assert_eq!((file.as_str(), what.as_str()), ("media", place), "{error}");
        assert!(
            error.to_string().contains("mandoline assigner --join"),
            "it says what to do: {error}"
        );
    }
}

#[test]
fn a_record_of_a_newer_format_is_refused_as_such() {
    let snapshot = vec![1_u8; 100];
    let mut head = machine::head_of(snapshot_meta(), &snapshot);
    head.format += 1;
    let cases = [
        ("log entry 9", Change::Append(vec![(9, newer(&seal_entry(&entry(9))))])),
        (
            "the vote",
            Change::Vote(newer(&record::seal(Kind::Vote, 0, &wire::pb_vote(&Vote::new(2, 1))))),
        ),
        ("the snapshot", machine::change(&head, &snapshot)),
    ];
    for (place, change) in cases {
        let error = spoiled(change);
        let DiskError::Newer { what, found: 2, known: 1, .. } = &error else {
            panic!("{place}: {error}")
        };
        assert_eq!(what, place);
        assert!(error.to_string().contains("start the version that wrote it"), "{error}");
    }
}

#[test]
fn a_file_that_was_cut_short_or_changed_anywhere_is_refused_or_reads_the_same() {
    let media = filled(20_000);
    let whole = media.bytes();
    let read = |media: &Media| {
        let (disk, loaded) = open(media)?;
        let read = (loaded, disk.entries(0..100, usize::MAX)?, disk.snapshot()?);
        Ok::<_, DiskError>(read)
    };
    let right = read(&media).unwrap();
    let mut prng = Prng::new(11);
    let (mut refused, mut unharmed) = (0, 0);
    for case in 0..200 {
        let mut bytes = whole.clone();
        if case % 10 == 0 {
            bytes.truncate(prng.below(whole.len() as u64) as usize);
        } else {
            // Most of the file is room to grow, where nothing is lost.
            let used = |at: &usize| whole[*at] != 0;
            let mut anywhere = std::iter::repeat_with(|| prng.below(whole.len() as u64) as usize);
            let place = anywhere.find(used).expect("something was written");
            bytes[place] ^= 1 << (case % 8);
        }
        let media = Media::default();
        let empty = bytes.is_empty();
        media.overwrite(bytes);
        match read(&media) {
            Ok(found) => {
                assert!(found == right || empty, "case {case}: it reads, but otherwise");
                unharmed += 1;
            }
            Err(DiskError::Damaged { .. } | DiskError::Newer { .. } | DiskError::Io { .. }) => {
                refused += 1;
            }
            Err(error) => panic!("case {case}: {error}"),
        }
    }
    println!("{refused} refused, {unharmed} where nothing was kept");
    assert!(refused > 50, "{refused} refused, {unharmed} unharmed");
}

#[test]
fn an_empty_or_foreign_file_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    for bytes in [&b""[..], b"not a database, but someone's letter"] {
        std::fs::write(&path, bytes).unwrap();
        let error = Disk::open(Storage::Dir(dir.path().to_owned())).map(|_| ()).unwrap_err();
        assert!(matches!(error, DiskError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn a_file_that_was_never_finished_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("raft.redb.new"), b"the power went here").unwrap();
    let (_, loaded) = Disk::open(Storage::Dir(dir.path().to_owned())).unwrap();
    assert_eq!(loaded, Loaded::default());
    assert!(dir.path().join(FILE).exists());
}

#[test]
fn a_directory_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a file");
    std::fs::write(&file, b"").unwrap();
    let error = Disk::open(Storage::Dir(file.clone())).map(|_| ()).unwrap_err();
    assert!(matches!(error, DiskError::Open { .. }), "{error}");
    assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
}

#[test]
fn two_nodes_do_not_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = Disk::open(Storage::Dir(dir.path().to_owned())).unwrap();
    let error = Disk::open(Storage::Dir(dir.path().to_owned())).map(|_| ()).unwrap_err();
    assert!(matches!(error, DiskError::InUse { .. }), "{error}");
    drop(first);
    Disk::open(Storage::Dir(dir.path().to_owned())).map(|_| ()).unwrap();
}

#[tokio::test]
async fn the_log_reads_the_same_from_memory_and_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let storage = || Storage::Dir(dir.path().to_owned());
    let (mut log, _, writer) = stored(storage()).unwrap();
    for start in (0..3_000).step_by(100) {
        log.blocking_append((start..start + 100).map(entry)).await.unwrap();
    }
    // Older ones are on disk alone by now.
    let expected: Vec<_> = (1_500..2_500).map(entry).collect();
    assert_eq!(log.try_get_log_entries(1_500..2_500).await.unwrap(), expected);
    log.truncate_after(Some(at(1, 1_999))).await.unwrap();
    let other = |index| Entry { log_id: at(2, index), payload: Payload::Blank };
    log.blocking_append((2_000..2_010).map(other)).await.unwrap();
    log.purge(at(1, 1_800)).await.unwrap();
    log.save_committed(Some(at(1, 1_900))).await.unwrap();
    let kept: Vec<_> = (1_801..2_000).map(entry).chain((2_000..2_010).map(other)).collect();
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), kept);
    writer.written(Change::Truncate(9_999)).await.unwrap();
    writer.close();
    drop((log, writer));
    let (mut log, ..) = loop {
        match stored(storage()) {
            // The writer has yet to let go of it.
            Err(DiskError::InUse { .. }) => tokio::task::yield_now().await,
            opened => break opened.unwrap(),
        }
    };
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), kept);
    assert_eq!(log.read_committed().await.unwrap(), Some(at(1, 1_900)));
    let state = log.get_log_state().await.unwrap();
    assert_eq!(
        (state.last_purged_log_id, state.last_log_id),
        (Some(at(1, 1_800)), Some(at(2, 2_009)))
    );
}

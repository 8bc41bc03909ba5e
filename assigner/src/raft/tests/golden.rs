//! The bytes on disk do not change by accident: each record as a hex file in `golden/`, to be read for ever.
//!
//! A change that these tests notice needs a new format version, and a reader for the old one. `MANDOLINE_BLESS=1` writes
//! the files that are missing.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use mandoline_core::command::Command;
use mandoline_core::load::Load;
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Band, BandOf, Home, JobSpec, Metric, Ratio, ReplicaBounds, Spill};
use mandoline_core::state::State;
use mandoline_core::task::TaskInfo;
use mandoline_proto::pb;
use prost::Message;

use super::kit::{apply, job};
use super::storage::{at, entry, identity, snapshot_meta};
use crate::raft::disk::Change;
use crate::raft::log::seal_entry;
use crate::raft::machine;
use crate::raft::record::{self, Kind};
use crate::raft::types::{Entry, Payload, Vote};
use crate::raft::wire;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.hex"))
}

fn hex(bytes: &[u8]) -> String {
    let row = |row: &[u8]| row.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    bytes.chunks(32).map(row).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// Compares with the file, and gives what the file holds.
fn same(name: &str, record: &[u8]) -> Vec<u8> {
    let path = golden(name);
    if !path.exists() && std::env::var_os("MANDOLINE_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, hex(record)).unwrap();
    }
    let kept = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(kept, hex(record), "{name}: the format on disk has changed");
    unhex(&kept)
}

#[test]
fn log_records_are_written_and_read_as_ever() {
    for (index, name) in [(0, "entry-membership"), (1, "entry-blank"), (2, "entry-command")] {
        let kept = same(name, &seal_entry(&entry(index)));
        let wire: pb::RaftEntry = record::open_as(Kind::Entry, index, &kept).unwrap();
        assert_eq!(wire::entry(wire).unwrap(), entry(index), "{name}");
    }
    let vote = Vote::new_committed(3, 1);
    let kept = same("vote", &record::seal(Kind::Vote, 0, &wire::pb_vote(&vote)));
    assert_eq!(wire::vote(record::open_as(Kind::Vote, 0, &kept).unwrap()), vote);
    for (kind, name) in [(Kind::Committed, "committed"), (Kind::Purged, "purged")] {
        let kept = same(name, &record::seal(kind, 0, &wire::pb_log_id(&at(3, 1_000_000))));
        assert_eq!(wire::log_id(record::open_as(kind, 0, &kept).unwrap()), at(3, 1_000_000));
    }
    let kept = same("identity", &record::seal(Kind::Identity, 0, &wire::pb_identity(&identity())));
    assert_eq!(
        wire::identity(record::open_as(Kind::Identity, 0, &kept).unwrap()).unwrap(),
        identity()
    );
}

#[test]
fn what_an_operator_asked_by_hand_is_written_and_read_as_ever() {
    let task = |name: &str| name.parse().unwrap();
    let slice: Slice = "00..ff".parse().unwrap();
    let commands = [
        Command::ApplyJob { spec: asked(), if_version: Some(1) },
        Command::Freeze { job: job("a") },
        Command::Unfreeze { job: job("a") },
        Command::Pin { job: job("a"), slice, task: task("t") },
        Command::Unpin { job: job("a"), slice },
    ];
    let mut records = Vec::new();
    for (index, command) in (2..).zip(&commands) {
        let entry =
            Entry { log_id: at(1, index), payload: Payload::Normal(Arc::new(command.clone())) };
        let sealed = seal_entry(&entry);
        let wire: pb::RaftEntry = record::open_as(Kind::Entry, index, &sealed).unwrap();
        assert_eq!(wire::entry(wire).unwrap(), entry);
        records.extend_from_slice(&sealed);
    }
    same("entries-by-hand", &records);

    let mut state = State::default();
    let info = TaskInfo::new(task("t"), 1, "h:1".parse().unwrap());
    let register = Command::Register { job: job("a"), info, stopped: None };
    let [_, freeze, _, pin, _] = commands;
    for command in
        [apply("a"), Command::ApplyJob { spec: asked(), if_version: None }, register, freeze, pin]
    {
        state.apply(command).unwrap();
    }
    let kept = same("state-by-hand", &pb::State::from(&state).encode_to_vec());
    assert_eq!(State::try_from(pb::State::decode(kept.as_slice()).unwrap()).unwrap(), state);
}

/// A spec that asks for everything.
fn asked() -> JobSpec {
    JobSpec {
        band: Band::Fixed { ratio: Ratio::percent(2), of: BandOf::Hint },
        churn_budget: Ratio::percent(5),
        fill_rate: Ratio::percent(50),
        max_load_hint: Some(Load::from_milli(1_000_000)),
        reservation: Ratio::percent(10),
        replicas: ReplicaBounds { min: 2, max: ReplicaBounds::ALL },
        spread: Some("zone".to_owned()),
        homes: vec![Home { slice: Slice::of_group(b"tenant"), region: "eu".to_owned() }],
        metrics: vec![Metric { name: "memory".to_owned(), band: Ratio::percent(20) }],
        spill: Some(Spill { cap: Ratio::percent(115) }),
        ..JobSpec::new(job("a"))
    }
}

#[test]
fn snapshots_are_written_and_read_as_ever() {
    let mut state = State::default();
    state.apply(apply("a")).unwrap();
    let bytes = Bytes::from(pb::State::from(&state).encode_to_vec());
    let head = machine::head_of(snapshot_meta(), &bytes);
    let Change::Snapshot { head: sealed, parts } = machine::change(&head, &bytes) else {
        unreachable!()
    };
    let kept = same("snapshot-head", &sealed);
    let read = wire::head(record::open_as(Kind::SnapshotHead, 0, &kept).unwrap()).unwrap();
    assert_eq!(read, head);
    let kept = same("snapshot-part", &parts[0]);
    let part = record::open(Kind::SnapshotPart, 0, &kept).unwrap();
    machine::examine(&read, part).unwrap();
    let decoded = State::try_from(pb::State::decode(part).unwrap()).unwrap();
    assert_eq!(decoded, state);
}

//! The crates that a user would take instead, each as it is shipped and given the hash of the key.

use std::hash::{BuildHasherDefault, Hash, Hasher};

use anchorhash::AnchorHash;
use hashring::HashRing;
use hrw_hash::{HrwNode, HrwNodes};
use jumphash::{CustomJumpHasher, JumpHasher};
use maglev::{ConsistentHasher, Maglev};
use mandoline_core::key::SliceKey;

use super::{Contender, Kind};

/// How many points each task has on a ring: what rings are usually given, to be even within some ten in a hundred.
const POINTS: u64 = 100;

/// All of them, for so many tasks.
pub(super) fn all(tasks: u64) -> Vec<Contender> {
    let mut all = Vec::new();
    shipped(tasks, &mut all);
    hashed(tasks, &mut all);
    all
}

fn shipped(tasks: u64, all: &mut Vec<Contender>) {
    let kind = Kind::PeerShipped;
    let mut ring = HashRing::new();
    ring.batch_add(points(tasks));
    all.push(Contender::new("hashring, as shipped", kind, move |key| {
        ring.get(key).expect("a task").task
    }));
    let maglev = Maglev::new(0..tasks);
    all.push(Contender::new("maglev, as shipped", kind, move |key| {
        *maglev.get(key).expect("a task")
    }));
    let anchor: AnchorHash<[u8; 16], u64, _> = (0..tasks).collect();
    all.push(Contender::new("anchorhash, as shipped", kind, move |key| {
        *anchor.get_resource(*key).expect("a task")
    }));
    let jump = JumpHasher::new_with_keys(0, 0);
    all.push(Contender::new("jumphash, as shipped", kind, move |key| {
        u64::from(jump.slot(key, tasks as u32))
    }));
    let rendezvous = HrwNodes::new((0..tasks).map(Node));
    all.push(Contender::new("hrw-hash (rendezvous), as shipped", kind, move |key| {
        rendezvous.sorted(key).next().expect("a task").0
    }));
}

fn hashed(tasks: u64, all: &mut Vec<Contender>) {
    let kind = Kind::PeerXxh3;
    let place = |key: &[u8; 16]| SliceKey::of(key).0;
    let mut ring = HashRing::with_hasher(Given::default());
    ring.batch_add(points(tasks));
    all.push(Contender::new("hashring, given XXH3", kind, move |key| {
        ring.get(&place(key)).expect("a task").task
    }));
    // Its table is made by hashing tasks, for which a number itself is no hash.
    let nodes = (0..tasks).map(|task| Scattered { task, point: 0 });
    let maglev = Maglev::with_hasher(nodes, Given::default());
    all.push(Contender::new("maglev, given XXH3", kind, move |key| {
        maglev.get(&place(key)).expect("a task").task
    }));
    let anchor: AnchorHash<u64, u64, _> =
        anchorhash::Builder::with_hasher(Given::default()).with_resources(0..tasks).build(64);
    all.push(Contender::new("anchorhash, given XXH3", kind, move |key| {
        *anchor.get_resource(place(key)).expect("a task")
    }));
    let jump = CustomJumpHasher::new(Identity::default());
    all.push(Contender::new("jumphash, given XXH3", kind, move |key| {
        u64::from(jump.slot(&place(key), tasks as u32))
    }));
    let nodes = (0..tasks).map(|task| Scattered { task, point: 0 });
    let rendezvous = HrwNodes::with_build_hasher(Given::default(), nodes);
    all.push(Contender::new("hrw-hash (rendezvous), given XXH3", kind, move |key| {
        rendezvous.sorted(&place(key)).next().expect("a task").task
    }));
}

fn points(tasks: u64) -> Vec<Scattered> {
    let of = |task| (0..POINTS).map(move |point| Scattered { task, point });
    (0..tasks).flat_map(of).collect()
}

/// A point of a task, which lies where a hash says even if the hasher passes numbers through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scattered {
    task: u64,
    point: u64,
}

impl Hash for Scattered {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.task.to_le_bytes());
        bytes[8..].copy_from_slice(&self.point.to_le_bytes());
        hasher.write_u64(SliceKey::of(&bytes).0);
    }
}

impl HrwNode for Scattered {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Node(u64);

impl HrwNode for Node {}

/// Passes a number through that is a hash already.
#[derive(Clone, Copy, Debug, Default)]
struct Identity(u64);

type Given = BuildHasherDefault<Identity>;

impl Hasher for Identity {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = SliceKey::of(bytes).0;
    }

    fn write_u32(&mut self, number: u32) {
        // A seed beside the number that counts.
        self.0 ^= u64::from(number);
    }

    fn write_u64(&mut self, number: u64) {
        self.0 ^= number;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn everybody_spreads_keys_over_the_tasks() {
        let key = |n: u64| -> [u8; 16] {
            let mut key = [0; 16];
            key[..8].copy_from_slice(&n.to_le_bytes());
            key
        };
        assert_ne!(Given::default().hash_one(1_u64), Given::default().hash_one(2_u64));
        for mut contender in all(50) {
            let mut found: Vec<u64> = (0..5_000).map(|n| (contender.batch)(&[key(n)])).collect();
            found.sort_unstable();
            found.dedup();
            assert!(found.len() > 40, "{}: {} tasks", contender.name, found.len());
        }
    }
}

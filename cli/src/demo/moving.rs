//! How the sample service's values move to another task with their slice.
//!
//! The bulk pass copies the slice's entries, a few at a time while requests go on, and notes what changes from then on; the
//! last pass brings that. Records follow one another, numbers with the least byte first:
//!
//! ```text
//! 1  key bytes: u32  value bytes: u32  key  value      the key has this value
//! 2  place: u64                                        there is no key at this place
//! ```

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mandoline::transfer::{HandOff, Pass, Sink, Source, State};
use mandoline_core::key::{KEY_MAX_BYTES, SliceKey};
use mandoline_core::slice::Slice;
use mandoline_core::transit::HandOffId;

use crate::demo::server::VALUE_MAX_BYTES;
use crate::demo::store::{Entry, Store};

/// What is wrong with a record from another task.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("record {0} is of kind {1}, which this version does not know")]
    Kind(usize, u8),
    #[error("record {0} has a key of {1} bytes: at most {KEY_MAX_BYTES} are allowed")]
    Key(usize, u32),
    #[error("record {0} has a value of {1} bytes: at most {VALUE_MAX_BYTES} are allowed")]
    Value(usize, u32),
    #[error("record {0} lies at {1}, outside of the slice {2}")]
    Outside(usize, SliceKey, Slice),
    #[error("record {0} is cut short")]
    Short(usize),
    #[error("what comes from other tasks takes more than the {0} bytes that this one may hold")]
    TooLarge(usize),
}

/// Moves a store's slices.
pub(crate) struct Moving {
    store: Arc<Store>,
    staged: Mutex<BTreeMap<HandOffId, Stage>>,
    // What is set aside in all, for as long as it is.
    bytes: Arc<AtomicUsize>,
}

/// What was set aside for one hand-off.
#[derive(Default)]
struct Stage {
    bulk: Part,
    last: Part,
}

/// What a pass brought: entries, and places where there is none any more.
#[derive(Default)]
struct Part {
    entries: BTreeMap<SliceKey, Option<Entry>>,
    bytes: usize,
    all: Arc<AtomicUsize>,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Moving {
    /// Moves what this store has, and fills it with what comes.
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store, staged: Mutex::default(), bytes: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HandOffId, Stage>> {
        // Each change is whole before anything in it could panic.
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_all(&self, slice: Slice, out: &mut impl Write) -> io::Result<()> {
        let mut after = None;
        loop {
            let some = self.store.some_after(after, slice);
            let Some((last, _)) = some.last() else { return Ok(()) };
            after = Some(*last);
            for (_, entry) in &some {
                write_entry(entry, out)?;
            }
        }
    }

    fn write_changes(&self, hand_off: &HandOff, out: &mut impl Write) -> io::Result<()> {
        let changes = self.store.changes(hand_off).ok_or_else(|| {
            io::Error::other("more has changed since the bulk pass than is noted: nothing to add")
        })?;
        for place in changes {
            match self.store.at(place) {
                Some(entry) => write_entry(&entry, out)?,
                None => {
                    out.write_all(&[GONE])?;
                    out.write_all(&place.0.to_le_bytes())?;
                }
            }
        }
        Ok(())
    }

    fn read_part(&self, slice: Slice, bytes: &mut impl BufRead) -> io::Result<Part> {
        let all = Arc::clone(&self.bytes);
        let mut part = Part { entries: BTreeMap::new(), bytes: 0, all };
        let mut number = 1;
        while !bytes.fill_buf()?.is_empty() {
            let (place, entry) = read_record(number, slice, bytes)?;
            let new = RECORD_OVERHEAD_BYTES + entry.as_ref().map_or(0, Entry::bytes);
            part.bytes += new;
            let before = self.bytes.fetch_add(new, Ordering::Relaxed);
            part.entries.insert(place, entry);
            if before + new > self.store.bytes_max() {
                return Err(invalid(RecordError::TooLarge(self.store.bytes_max())));
            }
            number += 1;
        }
        Ok(part)
    }
}

impl State for Moving {
    fn export(&self, hand_off: &HandOff, pass: Pass, out: &mut Sink) -> io::Result<()> {
        match pass {
            Pass::Bulk => {
                self.store.note_changes(hand_off);
                self.write_all(hand_off.slice, out)
            }
            Pass::Last => self.write_changes(hand_off, out),
        }
    }

    fn exported(&self, hand_off: &HandOff) {
        self.store.forget_changes(hand_off);
    }

    fn import(&self, hand_off: &HandOff, pass: Pass, bytes: &mut Source) -> io::Result<()> {
        let part = self.read_part(hand_off.slice, bytes)?;
        let mut staged = self.lock();
        let stage = staged.entry(hand_off.id).or_default();
        match pass {
            Pass::Bulk => *stage = Stage { bulk: part, last: Part::default() },
            Pass::Last => stage.last = part,
        }
        Ok(())
    }

    fn keep(&self, hand_off: &HandOff) {
        let Some(mut stage) = self.lock().remove(&hand_off.id) else { return };
        let mut entries = std::mem::take(&mut stage.bulk.entries);
        entries.append(&mut stage.last.entries);
        let entries = entries.into_iter().filter_map(|(place, entry)| Some((place, entry?)));
        self.store.take_in(entries);
    }

    fn discard(&self, hand_off: &HandOff) {
        drop(self.lock().remove(&hand_off.id));
    }
}

fn write_entry(entry: &Entry, out: &mut impl Write) -> io::Result<()> {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("keys and values are bounded");
    out.write_all(&[ENTRY])?;
    out.write_all(&len(&entry.key).to_le_bytes())?;
    out.write_all(&len(&entry.value).to_le_bytes())?;
    out.write_all(&entry.key)?;
    out.write_all(&entry.value)
}

fn read_record(
    number: usize,
    slice: Slice,
    bytes: &mut impl Read,
) -> io::Result<(SliceKey, Option<Entry>)> {
    let mut read = |into: &mut [u8]| {
        bytes.read_exact(into).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => invalid(RecordError::Short(number)),
            _ => error,
        })
    };
    let mut kind = [0];
    read(&mut kind)?;
    let (place, entry) = match kind {
        [ENTRY] => {
            let mut lens = [[0; 4]; 2];
            for len in &mut lens {
                read(len)?;
            }
            let [key, value] = lens.map(u32::from_le_bytes);
            if key as usize > KEY_MAX_BYTES {
                return Err(invalid(RecordError::Key(number, key)));
            }
            if value as usize > VALUE_MAX_BYTES {
                return Err(invalid(RecordError::Value(number, value)));
            }
            let [mut key, mut value] = [key, value].map(|len| vec![0; len as usize]);
            read(&mut key)?;
            read(&mut value)?;
            let entry = Entry { key: key.into(), value: Bytes::from(value) };
            (SliceKey::of(&entry.key), Some(entry))
        }
        [GONE] => {
            let mut place = [0; 8];
            read(&mut place)?;
            (SliceKey(u64::from_le_bytes(place)), None)
        }
        [kind] => return Err(invalid(RecordError::Kind(number, kind))),
    };
    if !slice.contains(place) {
        return Err(invalid(RecordError::Outside(number, place, slice)));
    }
    Ok((place, entry))
}

fn invalid(error: RecordError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

const ENTRY: u8 = 1;
const GONE: u8 = 2;
/// What a record costs beside its entry.
const RECORD_OVERHEAD_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mandoline::Connector;
    use mandoline::transfer::Party;
    use mandoline::transfer::pull::{Import, Origin, PullError, Puller};
    use mandoline::transfer::serve::{Exports, Leaving, Outgoing};
    use mandoline_core::generation::Generation;
    use mandoline_core::task::SessionId;
    use tokio::sync::watch;
    use tokio::time::Instant;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;

    use super::*;

    const OLD: Party = Party { session: SessionId(1), incarnation: 1 };
    const NEW: Party = Party { session: SessionId(2), incarnation: 2 };
    const BYTES_MAX: usize = 1 << 20;

    fn lower_half() -> HandOff {
        let began = Generation { incarnation: 1, number: 3 };
        let slice = Slice::new(SliceKey::MIN, SliceKey(u64::MAX / 2)).unwrap();
        HandOff { id: HandOffId { began, first: SliceKey::MIN }, slice }
    }

    fn key(number: u32) -> [u8; 4] {
        number.to_be_bytes()
    }

    /// Keys of the slice that moves, and one that stays.
    fn keys() -> (Vec<[u8; 4]>, [u8; 4]) {
        let is_within = |key: &[u8; 4]| lower_half().slice.contains(SliceKey::of(key));
        let within = (0..).map(key).filter(is_within).take(300).collect();
        (within, (0..).map(key).find(|key| !is_within(key)).unwrap())
    }

    /// Two tasks of the sample service, and the slice that moves from one to the other.
    struct Pair {
        old: Arc<Store>,
        new: Arc<Store>,
        arriving: Arc<Moving>,
        outgoing: watch::Sender<Outgoing>,
        import: Import,
    }

    impl Pair {
        async fn begin(new_bytes_max: usize) -> Self {
            let (old, new) = (Store::new(BYTES_MAX), Store::new(new_bytes_max));
            let (old, new) = (Arc::new(old), Arc::new(new));
            let HandOff { id, slice } = lower_half();
            let leaving = Leaving { slice, to: NEW, due: Pass::Bulk };
            let hand_offs = BTreeMap::from([(id, leaving)]);
            let (outgoing, watched) =
                watch::channel(Outgoing { me: Some(OLD), known: id.began, hand_offs });
            let job: mandoline_core::name::JobName = "kv".parse().unwrap();
            let leaves = Arc::new(Moving::new(Arc::clone(&old)));
            let exports = Exports::new(job.clone(), Some(leaves), watched);
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string().parse().unwrap();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let server = Server::builder().add_service(exports.service());
            tokio::spawn(async move { server.serve_with_incoming(incoming).await });
            tokio::spawn(async move { exports.clear().await });
            let arriving = Arc::new(Moving::new(Arc::clone(&new)));
            let state: Arc<dyn State> = Arc::<Moving>::clone(&arriving);
            let puller = Puller::new(job, state, Connector::default());
            let origin = Origin { address, party: OLD };
            let import = puller.begin(NEW, Some(origin), lower_half());
            Self { old, new, arriving, outgoing, import }
        }

        async fn pull(&mut self, pass: Pass) -> Result<u64, PullError> {
            self.outgoing.send_modify(|outgoing| {
                outgoing.hand_offs.get_mut(&lower_half().id).unwrap().due = pass;
            });
            let until = Instant::now() + Duration::from_secs(20);
            let moved = match pass {
                Pass::Bulk => self.import.bulk(until).await,
                Pass::Last => self.import.last(until).await,
            };
            moved.map(|moved| moved.bytes)
        }
    }

    #[tokio::test]
    async fn a_slice_arrives_as_it_was_left() {
        let (keys, stays) = keys();
        let mut pair = Pair::begin(BYTES_MAX).await;
        for key in keys.iter().chain([&stays]) {
            pair.old.write(key, b"first");
        }
        pair.pull(Pass::Bulk).await.unwrap();
        assert_eq!(pair.new.size(), (0, 0), "nothing is served before it is kept");
        // What has changed since: a value, a new key, one that is gone, and one elsewhere.
        pair.old.write(&keys[0], b"second");
        assert!(pair.old.delete(&keys[1]));
        pair.old.write(&stays, b"second");
        let added = key(1 << 30);
        pair.old.write(&added, b"new");
        pair.pull(Pass::Last).await.unwrap();
        pair.import.keep().await.unwrap();
        assert_eq!(pair.new.read(&keys[0]).as_deref(), Some(&b"second"[..]));
        assert_eq!((pair.new.read(&keys[1]), pair.new.read(&stays)), (None, None));
        let is_within = lower_half().slice.contains(SliceKey::of(&added));
        assert_eq!(pair.new.read(&added).is_some(), is_within);
        assert!(keys[2..].iter().all(|key| pair.new.read(key).as_deref() == Some(b"first")));
        assert_eq!(pair.new.size().0, 299 + usize::from(is_within));
        assert_eq!(pair.arriving.bytes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_the_new_owner_wrote_itself_is_newer() {
        let (keys, _) = keys();
        let mut pair = Pair::begin(BYTES_MAX).await;
        pair.old.write(&keys[0], b"old");
        pair.pull(Pass::Bulk).await.unwrap();
        pair.new.write(&keys[0], b"new");
        pair.import.keep_bulk().await.unwrap();
        assert_eq!(pair.new.read(&keys[0]).as_deref(), Some(&b"new"[..]));
    }

    #[tokio::test]
    async fn more_than_the_new_owner_may_hold_is_not_set_aside() {
        let (keys, _) = keys();
        let mut pair = Pair::begin(10_000).await;
        for key in &keys {
            pair.old.write(key, b"value");
        }
        let error = pair.pull(Pass::Bulk).await.unwrap_err();
        let PullError::Import(why) = &error else { panic!("{error:?}") };
        assert!(why.to_string().contains("more than the 10000 bytes"), "{why}");
        assert_eq!(pair.arriving.bytes.load(Ordering::Relaxed), 0);
        drop(pair.import);
        assert_eq!(pair.new.size(), (0, 0));
    }

    #[test]
    fn records_that_make_no_sense_are_refused_and_nothing_is_set_aside() {
        let (keys, stays) = keys();
        let moving = Moving::new(Arc::new(Store::new(BYTES_MAX)));
        let slice = lower_half().slice;
        let record = |key: &[u8]| {
            let mut bytes = Vec::new();
            let entry = Entry { key: key.into(), value: Bytes::from_static(b"value") };
            write_entry(&entry, &mut bytes).unwrap();
            bytes
        };
        let refused = |bytes: &[u8]| {
            let error = moving.read_part(slice, &mut &*bytes).err().expect("it is refused");
            assert_eq!(moving.bytes.load(Ordering::Relaxed), 0);
            let why = error.get_ref().and_then(|why| why.downcast_ref::<RecordError>());
            why.expect("it is typed").clone()
        };
        let good = record(&keys[0]);
        assert_eq!(moving.read_part(slice, &mut &*good).unwrap().entries.len(), 1);
        for cut in 1..good.len() {
            assert_eq!(refused(&good[..cut]), RecordError::Short(1));
            assert_eq!(refused(&[&good, &good[..cut]].concat()), RecordError::Short(2));
        }
        assert_eq!(refused(&[&*good, &[3]].concat()), RecordError::Kind(2, 3));
        let outside = SliceKey::of(&stays);
        assert_eq!(refused(&record(&stays)), RecordError::Outside(1, outside, slice));
        let gone = [&[GONE][..], &outside.0.to_le_bytes()].concat();
        assert_eq!(refused(&gone), RecordError::Outside(1, outside, slice));
        let long = |at: usize| {
            let mut long = good.clone();
            long[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            long
        };
        assert_eq!(refused(&long(1)), RecordError::Key(1, u32::MAX));
        assert_eq!(refused(&long(5)), RecordError::Value(1, u32::MAX));
    }
}

//! A test kit: a disk that loses power, fills up and fails, from a seed.
//!
//! [`Media`] is the disk and outlives the machine; [`Media::plug`] gives the backend for one life of a node. What the
//! node writes reaches a cache first, as it does in an operating system, and the platter on sync. A cut keeps of what was
//! not synced whatever the seed says: each write whole, in part (in sectors of 512 bytes), or not at all, in any order,
//! since a disk promises no more. After a cut every call fails, until the disk is plugged in again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mandoline_core::prng::Prng;
use redb::StorageBackend;

/// What a disk keeps or loses as one.
const SECTOR_BYTES: usize = 512;

/// A disk.
#[derive(Clone, Debug, Default)]
pub struct Media(Arc<Mutex<Platter>>);

/// What a disk does wrong, and when. Calls are counted from when it was plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Power goes at this write, resize or sync.
    pub cut_at: Option<u64>,
    /// This write, resize or sync fails with EIO, and so do all after it.
    pub fail_at: Option<u64>,
    /// The disk says that it has synced, and has not: no node can bear that, and a test must notice.
    pub lies: bool,
    /// The disk has so many bytes: a write or resize beyond them fails with ENOSPC.
    pub capacity: Option<u64>,
}

#[derive(Default)]
struct Platter {
    /// As of the last sync.
    durable: Vec<u8>,
    /// As the node sees it.
    cached: Vec<u8>,
    /// What was done since the last sync.
    pending: Vec<Op>,
    faults: Faults,
    calls: u64,
    off: bool,
    /// Counts lives, so that the node of an earlier one cannot write any more.
    life: u64,
}

impl std::fmt::Debug for Platter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Platter")
            .field("bytes", &self.cached.len())
            .field("calls", &self.calls)
            .finish()
    }
}

enum Op {
    Resize(usize),
    Write(usize, Vec<u8>),
}

/// One life of a disk: what a node is given.
#[derive(Debug)]
pub struct Plugged {
    media: Media,
    life: u64,
}

impl Media {
    /// Gives the backend for one life, with the faults that it will have; whoever used the disk before has lost it.
    pub fn plug(&self, faults: Faults) -> Plugged {
        let mut platter = self.lock();
        platter.life += 1;
        platter.faults = faults;
        platter.calls = 0;
        platter.off = false;
        Plugged { media: self.clone(), life: platter.life }
    }

    /// Cuts the power, now or when the faults said, and leaves what the seed says.
    pub fn cut(&self, prng: &mut Prng) {
        let mut platter = self.lock();
        let mut left = std::mem::take(&mut platter.durable);
        for op in std::mem::take(&mut platter.pending) {
            match op {
                Op::Resize(length) if prng.below(2) == 0 => left.resize(length, 0),
                Op::Resize(_) => {}
                Op::Write(offset, bytes) => keep_some(&mut left, offset, &bytes, prng),
            }
        }
        platter.cached.clone_from(&left);
        platter.durable = left;
        platter.off = true;
    }

    /// Says whether the power is gone.
    pub fn is_off(&self) -> bool {
        self.lock().off
    }

    /// Counts writes, resizes and syncs since the disk was plugged in.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Gives all bytes, as the node sees them.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().cached.clone()
    }

    /// Overwrites all bytes, as a failing disk or a careless hand would.
    pub fn overwrite(&self, bytes: Vec<u8>) {
        let mut platter = self.lock();
        platter.cached.clone_from(&bytes);
        platter.durable = bytes;
        platter.pending.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps all, some sectors, or nothing of a write.
fn keep_some(left: &mut Vec<u8>, offset: usize, bytes: &[u8], prng: &mut Prng) {
    let fate = prng.below(3);
    let mut at = 0;
    while at < bytes.len() {
        // To the end of the sector on disk that this byte lies in.
        let end = bytes.len().min(at + SECTOR_BYTES - (offset + at) % SECTOR_BYTES);
        if fate == 0 || (fate == 1 && prng.below(2) == 0) {
            // The resize that made room may be lost although the write is not.
            left.resize(left.len().max(offset + end), 0);
            left[offset + at..offset + end].copy_from_slice(&bytes[at..end]);
        }
        at = end;
    }
}

impl Plugged {
    fn platter(&self) -> io::Result<MutexGuard<'_, Platter>> {
        let platter = self.media.lock();
        if platter.off || platter.life != self.life {
            return Err(io::Error::other("the disk has no power"));
        }
        Ok(platter)
    }

    /// Counts a call that changes something, and lets it fail if it is time.
    fn counted(&self) -> io::Result<MutexGuard<'_, Platter>> {
        let mut platter = self.platter()?;
        platter.calls += 1;
        if platter.faults.cut_at.is_some_and(|at| platter.calls >= at) {
            platter.off = true;
            return Err(io::Error::other("the disk has no power"));
        }
        if platter.faults.fail_at.is_some_and(|at| platter.calls >= at) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        Ok(platter)
    }
}

/// The system's number for an input or output error.
const EIO: i32 = 5;

impl StorageBackend for Plugged {
    fn len(&self) -> io::Result<u64> {
        Ok(self.platter()?.cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.platter()?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let found = platter.cached.get(offset..offset.saturating_add(out.len()));
        out.copy_from_slice(found.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.counted()?;
        if platter.faults.capacity.is_some_and(|capacity| len > capacity) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        platter.cached.resize(len, 0);
        platter.pending.push(Op::Resize(len));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.counted()?;
        if platter.faults.lies {
            return Ok(());
        }
        // Only what changed is copied: a database of megabytes is synced hundreds of times a test.
        for op in std::mem::take(&mut platter.pending) {
            match op {
                Op::Resize(length) => platter.durable.resize(length, 0),
                Op::Write(offset, bytes) => {
                    platter.durable[offset..offset + bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.counted()?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let end = offset.saturating_add(data.len());
        if platter.faults.capacity.is_some_and(|capacity| end as u64 > capacity) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let place = platter.cached.get_mut(offset..end);
        place.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?.copy_from_slice(data);
        platter.pending.push(Op::Write(offset, data.to_vec()));
        Ok(())
    }
}

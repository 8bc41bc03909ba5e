//! The last assignment on disk, so that a caller starts with nobody to ask; and the last flags.
//!
//! One file each: a mark, a version, the length, a checksum (XXH3-64), an encoded `pb::Assignment` or `pb::KeptFlags`. Written beside its place,
//! synced, and renamed over it, so that a reader finds the old one or the new one and nothing between. Knowledge that is
//! too old costs a caller a redirect and no more, so the file is a hint and never worth an error to the application.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_core::assignment::Assignment;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use mandoline_proto::error::{WireError, decode};
use mandoline_proto::pb;
use mandoline_proto::update::FULL_MAX_BYTES;
use prost::Message;

type Mark = [u8; 8];
const ASSIGNMENT: Mark = *b"mandolin";
const FLAGS: Mark = *b"mandflag";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 8 + 4 + 8 + 8;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// The disk said no.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// Something else wrote it, so it is left alone.
    #[error("it is nothing of Mandoline's, or something else of it: choose another path")]
    Foreign,
    /// A later release wrote it, so it is left alone.
    #[error(
        "its format is {0}, and this release knows {VERSION}: choose another path, or delete it"
    )]
    Version(u32),
    /// It is of another job, so it is left alone.
    #[error("it is of job {0}: choose a path for each job")]
    Job(JobName),
    /// It was cut short or changed.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// Its checksum is right, and yet it makes no sense.
    #[error("it does not hold what it says")]
    Content(#[from] WireError),
}

impl CacheError {
    /// Says whether the file may be written over: it is ours, and of no use as it is.
    pub(crate) fn may_replace(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Content(_))
    }
}

/// Reads the file, if there is one.
pub(crate) fn load(path: &Path, job: &JobName) -> Result<Option<Assignment>, CacheError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let assignment = parse(&bytes)?;
    if assignment.job == *job { Ok(Some(assignment)) } else { Err(CacheError::Job(assignment.job)) }
}

/// Reads the file of the flags, if there is one.
pub(crate) fn load_flags(path: &Path) -> Result<Option<pb::KeptFlags>, CacheError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    Ok(Some(decode(open(FLAGS, &bytes)?, "flags")?))
}

/// Writes the file of the flags.
pub(crate) fn save_flags(path: &Path, flags: &pb::KeptFlags) -> io::Result<()> {
    write(path, &sealed(FLAGS, &flags.encode_to_vec()))
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take((HEAD_BYTES + FULL_MAX_BYTES + 1) as u64).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Writes the file so that it is there whole or not at all.
pub(crate) fn save(path: &Path, assignment: &Assignment) -> io::Result<()> {
    write(path, &format(assignment))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = beside(path);
    let written = write_synced(&beside, bytes).and_then(|()| fs::rename(&beside, path));
    if let Err(error) = written {
        // What is left of it is of no use, and the error that led here matters more.
        drop(fs::remove_file(&beside));
        return Err(error);
    }
    // The new name is safe once the folder is.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A name in the same folder that no other clerk uses, in this process or another.
fn beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}-{count}.tmp", std::process::id()));
    name.into()
}

fn format(assignment: &Assignment) -> Vec<u8> {
    sealed(ASSIGNMENT, &pb::Assignment::from(assignment).encode_to_vec())
}

fn sealed(mark: Mark, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + content.len());
    bytes.extend(mark);
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend((content.len() as u64).to_be_bytes());
    bytes.extend(checksum(content).to_be_bytes());
    bytes.extend(content);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Assignment, CacheError> {
    let assignment: pb::Assignment = decode(open(ASSIGNMENT, bytes)?, "assignment")?;
    Ok(assignment.try_into()?)
}

/// Gives what is in a file.
fn open(mark: Mark, bytes: &[u8]) -> Result<&[u8], CacheError> {
    let Some(rest) = bytes.strip_prefix(&mark) else {
        // What begins like a mark was cut short; an empty file too.
        let ours = mark.starts_with(bytes);
        return Err(if ours {
            CacheError::Damaged("it is cut short")
        } else {
            CacheError::Foreign
        });
    };
    let short = CacheError::Damaged("it is cut short");
    let Some((version, rest)) = rest.split_first_chunk() else { return Err(short) };
    match u32::from_be_bytes(*version) {
        VERSION => {}
        other => return Err(CacheError::Version(other)),
    }
    let Some((len, rest)) = rest.split_first_chunk() else { return Err(short) };
    let Some((sum, content)) = rest.split_first_chunk() else { return Err(short) };
    if u64::from_be_bytes(*len) != content.len() as u64 {
        return Err(CacheError::Damaged("its length is not what it says"));
    }
    if u64::from_be_bytes(*sum) != checksum(content) {
        return Err(CacheError::Damaged("its checksum is not what it says"));
    }
    Ok(content)
}

/// XXH3-64, as for keys.
fn checksum(content: &[u8]) -> u64 {
    SliceKey::of(content).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_core::generation::Generation;

    fn assignment() -> Assignment {
        let mut made =
            Assignment::new("kv".parse().unwrap(), Generation { incarnation: 1, number: 3 });
        made.slices.split(SliceKey(77));
        made
    }

    fn job() -> JobName {
        "kv".parse().unwrap()
    }

    #[test]
    fn what_was_saved_is_loaded_and_nothing_lies_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv.assignment");
        assert!(load(&path, &job()).unwrap().is_none());
        for _ in 0..2 {
            save(&path, &assignment()).unwrap();
            assert_eq!(load(&path, &job()).unwrap(), Some(assignment()));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_cut_short_or_changed_anywhere_is_refused() {
        let whole = format(&assignment());
        for len in 0..whole.len() {
            let error = parse(&whole[..len]).unwrap_err();
            assert!(error.may_replace(), "{len}: {error}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x40;
            assert!(parse(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        fs::write(&path, "dear diary").unwrap();
        assert!(matches!(load(&path, &job()), Err(CacheError::Foreign)));
        let other = Assignment::new("other".parse().unwrap(), Generation::ZERO);
        save(&path, &other).unwrap();
        assert!(matches!(load(&path, &job()), Err(CacheError::Job(_))));
        let mut later = format(&other);
        later[11] = 2;
        fs::write(&path, later).unwrap();
        let error = load(&path, &job()).unwrap_err();
        assert!(matches!(error, CacheError::Version(2)) && !error.may_replace());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert!(save(&folder.path().join("absent/kv"), &assignment()).is_err());
        let taken = folder.path().join("folder");
        fs::create_dir(&taken).unwrap();
        assert!(save(&taken, &assignment()).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

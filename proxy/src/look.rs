//! Whether a file has changed. Whoever reads one looks first and reads then, so that a change in between is seen at the next look.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    // File systems use the number of a file that is gone again.
    device: u64,
    inode: u64,
    length: u64,
    // Seconds and nanoseconds: of what is written, which copies may keep, and of anything about the file, which nobody can.
    written: (i64, i64),
    changed: (i64, i64),
}

impl Look {
    /// Looks at a file; nothing if it is not there.
    pub fn at(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        Some(Self {
            device: found.dev(),
            inode: found.ino(),
            length: found.len(),
            written: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, FileTimes, rename, write};

    use super::*;

    #[test]
    fn a_file_that_is_replaced_looks_different_whatever_it_keeps() {
        let folder = tempfile::tempdir().unwrap();
        let (path, beside) = (folder.path().join("a"), folder.path().join("b"));
        assert_eq!(Look::at(&path), None);
        write(&path, "one").unwrap();
        let (before, written) = (Look::at(&path), path.metadata().unwrap().modified().unwrap());
        assert!(before.is_some());
        assert_eq!(Look::at(&path), before);
        // As long, and as old by what it says of itself.
        write(&beside, "two").unwrap();
        let times = FileTimes::new().set_modified(written);
        File::options().write(true).open(&beside).unwrap().set_times(times).unwrap();
        rename(&beside, &path).unwrap();
        assert_ne!(Look::at(&path), before);
        // And with as long a file written over it.
        let before = Look::at(&path);
        while Look::at(&path) == before {
            write(&path, "six").unwrap();
        }
    }
}

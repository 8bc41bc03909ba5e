//! The storage by itself: openraft's own suite, what is on disk after it was opened again, what is refused.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use crate::raft::disk::{Disk, DiskError, Storage};
use crate::raft::log::Log;
use crate::raft::machine::{Keeper, Machine, Shown};
use crate::raft::types::Types;
use crate::raft::writer::Writer;

struct Builder;

impl StoreBuilder<Types, Log, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<Types>> {
        let dir = tempfile::tempdir().unwrap();
        let (log, machine) = open(&dir).unwrap();
        Ok((dir, log, machine))
    }
}

fn open(dir: &TempDir) -> Result<(Log, Machine), DiskError> {
    let (disk, loaded) = Disk::open(Storage::Dir(dir.path().to_owned()))?;
    let disk = Arc::new(disk);
    let (writer, _ends_with_its_senders) = Writer::start(disk.clone()).unwrap();
    let keeper = Keeper::new(disk.clone(), writer.clone(), loaded.snapshot.clone());
    let log = Log::new(disk, writer, &loaded);
    Ok((log, Machine::new(Shown::new(), Box::new(|_| ()), keeper)))
}

#[tokio::test]
async fn openrafts_own_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}

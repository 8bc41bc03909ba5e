//! The one thread that writes: it takes what has piled up, makes one transaction of it, and answers in order.
//!
//! While one sync runs, the requests that come in wait for the next one and share it, so the number of syncs depends on
//! the disk and not on the load. Everything that a node must not forget goes this way, so the order in which Raft asks is
//! the order on disk. After the first failure nothing is written any more: a sync that failed may have lost any of what
//! was written before it, so trying again would only hide that.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::raft::disk::{Change, Disk, DiskError};

/// How many requests may wait. Whoever comes when it is full waits for the disk, which slows clients down and nobody else:
/// the writer itself waits for no one.
const QUEUE: usize = 1_024;
/// How long the committed mark may wait for something that is worth a sync. A mark that is lost costs a node only that it
/// must hear from the leader again how far it may apply.
const COMMITTED_WAITS: Duration = Duration::from_millis(100);

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

enum Job {
    Write(Change, Done),
    Committed(Bytes),
    Close,
}

/// Where to send what must be on disk.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    queue: SyncSender<Job>,
    failed: watch::Receiver<Option<Arc<DiskError>>>,
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(disk: Arc<Disk>) -> io::Result<(Self, JoinHandle<()>)> {
        let (queue, jobs) = sync_channel(QUEUE);
        let (failure, failed) = watch::channel(None);
        let thread = std::thread::Builder::new().name("raft-writer".to_owned());
        let thread = thread.spawn(move || run(&disk, &jobs, &failure))?;
        Ok((Self { queue, failed }, thread))
    }

    /// Writes, and calls `done` once it is on disk or has failed.
    pub(crate) fn write(&self, change: Change, done: impl FnOnce(io::Result<()>) + Send + 'static) {
        self.send(Job::Write(change, Box::new(done)));
    }

    /// Writes, and returns once it is on disk.
    pub(crate) async fn written(&self, change: Change) -> io::Result<()> {
        let (tell, told) = oneshot::channel();
        self.write(change, move |result| drop(tell.send(result)));
        told.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Writes the committed mark with whatever is written next.
    pub(crate) fn committed(&self, record: Bytes) {
        self.send(Job::Committed(record));
    }

    /// Lets go of the file once everything before is written.
    pub(crate) fn close(&self) {
        self.send(Job::Close);
    }

    /// Gives the reason for which nothing is written any more, once there is one.
    pub(crate) fn failed(&self) -> watch::Receiver<Option<Arc<DiskError>>> {
        self.failed.clone()
    }

    fn send(&self, job: Job) {
        let refused = match self.queue.try_send(job) {
            Ok(()) => None,
            Err(TrySendError::Full(job)) => self.queue.send(job).err().map(|refused| refused.0),
            Err(TrySendError::Disconnected(job)) => Some(job),
        };
        if let Some(Job::Write(_, done)) = refused {
            done(Err(closed()));
        }
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the node has stopped, and writes no more")
}

fn run(disk: &Disk, jobs: &Receiver<Job>, failure: &watch::Sender<Option<Arc<DiskError>>>) {
    let mut mark = None;
    loop {
        let next = match &mark {
            None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(_) => jobs.recv_timeout(COMMITTED_WAITS),
        };
        let (mut changes, mut done, mut last) = (Vec::new(), Vec::new(), false);
        let first = match next {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Timeout) => None,
            // Nobody is left who could ask; a process that was killed would not have written the mark either.
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let idle = first.is_none();
        for job in first.into_iter().chain(jobs.try_iter().take(QUEUE)) {
            match job {
                Job::Write(change, then) => {
                    changes.push(change);
                    done.push(then);
                }
                Job::Committed(record) => mark = Some(record),
                Job::Close => last = true,
            }
        }
        if idle || last || !changes.is_empty() {
            changes.extend(mark.take().map(Change::Committed));
        }
        let result = write(disk, &changes, failure);
        for then in done {
            then(result.clone().map_err(|error| io::Error::new(kind(&error), error)));
        }
        if last {
            disk.close();
            return;
        }
    }
}

fn write(
    disk: &Disk,
    changes: &[Change],
    failure: &watch::Sender<Option<Arc<DiskError>>>,
) -> Result<(), Arc<DiskError>> {
    if changes.is_empty() {
        return Ok(());
    }
    if let Some(error) = &*failure.borrow() {
        return Err(error.clone());
    }
    disk.commit(changes).map_err(|error| {
        tracing::error!(%error, "Storage failed: the node stops");
        let error = Arc::new(error);
        failure.send_replace(Some(error.clone()));
        error
    })
}

fn kind(error: &DiskError) -> io::ErrorKind {
    match error {
        DiskError::Io { source, .. } => source.kind(),
        _ => io::ErrorKind::Other,
    }
}

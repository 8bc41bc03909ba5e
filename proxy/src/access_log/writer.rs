//! The thread that writes an access log: to standard output, standard error or a file, which it opens anew when told to, so that
//! logrotate can move it away.
//!
//! The queue before it is bounded in lines and bytes. A line that finds no room is dropped and counted: whoever reads the log
//! learns that it has gaps from a metric, and no request waits.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use tracing::error;

/// Lines that may wait: a moment's worth of what a busy machine serves.
const LINES_MAX: usize = 16_384;
/// The same in bytes.
const BYTES_MAX: usize = 16 << 20;
/// How much is gathered for one write.
const WRITE_BYTES: usize = 64 << 10;

/// Where an access log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, which is appended to.
    File(PathBuf),
}

/// Who writes an access log. Clones are the same; the last one to go ends the thread.
#[derive(Clone)]
pub struct Writer(Arc<Inner>);

struct Inner {
    queue: Option<SyncSender<Message>>,
    counts: Arc<Counts>,
}

/// What became of the lines so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Lines that were written.
    pub written: u64,
    /// Lines that were dropped, since the writer did not keep up.
    pub dropped: u64,
    /// Lines that could not be written.
    pub failed: u64,
}

#[derive(Default)]
struct Counts {
    queued_bytes: AtomicUsize,
    written: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

enum Message {
    Line(String),
    Reopen,
    /// Dropped when all that came before is written.
    Flush(SyncSender<()>),
}

impl Writer {
    /// Opens the output and starts the thread.
    pub fn open(output: Output) -> io::Result<Self> {
        let sink = output.open()?;
        Self::over(Some(output), sink)
    }

    /// Writes nothing: for a look at a configuration.
    pub fn idle() -> Self {
        Self(Arc::new(Inner { queue: None, counts: Arc::default() }))
    }

    fn over(output: Option<Output>, sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let (queue, messages) = sync_channel(LINES_MAX);
        let counts: Arc<Counts> = Arc::default();
        let writing = Arc::clone(&counts);
        thread::Builder::new()
            .name("mandoline-access-log".to_owned())
            .spawn(move || run(output, sink, &messages, &writing))?;
        Ok(Self(Arc::new(Inner { queue: Some(queue), counts })))
    }

    /// Hands a line over, without its end. Never waits.
    pub(crate) fn write(&self, line: String) {
        let Inner { queue, counts } = &*self.0;
        let Some(queue) = queue else { return };
        let length = line.len();
        if counts.queued_bytes.fetch_add(length, Relaxed) + length <= BYTES_MAX
            && queue.try_send(Message::Line(line)).is_ok()
        {
            return;
        }
        counts.queued_bytes.fetch_sub(length, Relaxed);
        counts.dropped.fetch_add(1, Relaxed);
    }

    /// Opens the file anew: lines from now on go to whatever has its name then.
    pub fn reopen(&self) {
        self.tell(Message::Reopen);
    }

    /// Waits until what was handed over is written, but no longer than `most`.
    pub fn flush(&self, most: Duration) {
        let (done, is_done) = sync_channel(1);
        self.tell(Message::Flush(done));
        // Late or not, there is nothing more to do.
        let _: Result<(), _> = is_done.recv_timeout(most);
    }

    /// Puts in what is no line, as soon as there is room: whoever asked has other things to do.
    fn tell(&self, message: Message) {
        let Some(queue) = &self.0.queue else { return };
        if let Err(TrySendError::Full(message)) = queue.try_send(message) {
            let queue = queue.clone();
            drop(thread::spawn(move || queue.send(message)));
        }
    }

    /// Says what became of the lines so far.
    pub fn stats(&self) -> LogStats {
        let Counts { written, dropped, failed, .. } = &*self.0.counts;
        LogStats {
            written: written.load(Relaxed),
            dropped: dropped.load(Relaxed),
            failed: failed.load(Relaxed),
        }
    }
}

fn run(
    output: Option<Output>,
    mut sink: Box<dyn Write + Send>,
    messages: &Receiver<Message>,
    counts: &Counts,
) {
    let mut block = Vec::with_capacity(WRITE_BYTES);
    let mut was_told = false;
    while let Ok(first) = messages.recv() {
        let mut next = Ok(first);
        let (mut lines, mut then) = (0, None);
        // As many lines as are there go out together.
        loop {
            match next {
                Ok(Message::Line(line)) => {
                    counts.queued_bytes.fetch_sub(line.len(), Relaxed);
                    block.extend_from_slice(line.as_bytes());
                    block.push(b'\n');
                    lines += 1;
                    if block.len() >= WRITE_BYTES {
                        break;
                    }
                }
                Ok(other) => {
                    then = Some(other);
                    break;
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
            next = messages.try_recv();
        }
        let written = sink.write_all(&block).and_then(|()| sink.flush());
        block.clear();
        match written {
            Ok(()) => {
                counts.written.fetch_add(lines, Relaxed);
                was_told = false;
            }
            Err(error) => {
                counts.failed.fetch_add(lines, Relaxed);
                if !std::mem::replace(&mut was_told, true) {
                    error!(%error, "The access log cannot be written");
                }
            }
        }
        match then {
            Some(Message::Reopen) => match output.as_ref().map(Output::open) {
                Some(Ok(fresh)) => sink = fresh,
                Some(Err(error)) => {
                    error!(%error, "The access log cannot be opened anew: it goes on where it was");
                }
                None => {}
            },
            Some(Message::Flush(done)) => drop(done),
            Some(Message::Line(_)) | None => {}
        }
    }
}

impl Output {
    fn open(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(match self {
            Self::Stdout => Box::new(io::stdout()),
            Self::Stderr => Box::new(io::stderr()),
            Self::File(path) => Box::new(append(path)?),
        })
    }
}

/// What clients asked for is nobody's business but the operator's and their group's.
fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("stdout"),
            Self::Stderr => f.write_str("stderr"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// `stdout`, `stderr`, or a path, which has a slash.
impl FromStr for Output {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        match text {
            "stdout" => Ok(Self::Stdout),
            "stderr" => Ok(Self::Stderr),
            _ if text.contains('/') => Ok(Self::File(text.into())),
            _ => Err(PlaceError(text.chars().take(80).collect())),
        }
    }
}

/// A text named no output for a log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no output for a log: give stdout, stderr, or a path with a slash, such as ./access.log"
)]
pub struct PlaceError(String);

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Writer").field(&self.stats()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Far beyond what anything here takes.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_file_that_was_moved_away_is_opened_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
        let writer = Writer::open(path.to_str().unwrap().parse().unwrap()).unwrap();
        writer.write("one".to_owned());
        writer.flush(PATIENCE);
        std::fs::rename(&path, &old).unwrap();
        writer.write("two".to_owned());
        writer.reopen();
        writer.write("three".to_owned());
        writer.flush(PATIENCE);
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        assert_eq!(writer.stats(), LogStats { written: 3, dropped: 0, failed: 0 });
        assert!(Writer::open(Output::File(folder.path().join("no/such/folder"))).is_err());
    }

    /// A pipe that nobody reads, until the test lets go of it.
    struct Stuck(Arc<Mutex<()>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            drop(self.0.lock());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_waits_for_a_writer_that_is_stuck() {
        let pipe = Arc::new(Mutex::new(()));
        let stuck = pipe.lock().unwrap();
        let writer = Writer::over(None, Box::new(Stuck(Arc::clone(&pipe)))).unwrap();
        let lines = LINES_MAX as u64 * 2;
        (0..lines).for_each(|n| writer.write(n.to_string()));
        let dropped = writer.stats().dropped;
        // What fits one write has left the queue.
        assert!(dropped > 0 && dropped <= lines - LINES_MAX as u64, "{dropped}");
        drop(stuck);
        writer.flush(PATIENCE);
        let LogStats { written, dropped, failed } = writer.stats();
        assert_eq!((written + dropped, failed), (lines, 0));
        // Long lines run out of bytes sooner.
        let stuck = pipe.lock().unwrap();
        let long = "x".repeat(1 << 20);
        (0..40).for_each(|_| writer.write(long.clone()));
        assert!(writer.stats().dropped >= dropped + 20, "{:?}", writer.stats());
        drop(stuck);
        writer.flush(PATIENCE);
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        struct Broken;

        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        let writer = Writer::over(None, Box::new(Broken)).unwrap();
        writer.write("one".to_owned());
        writer.flush(PATIENCE);
        assert_eq!(writer.stats(), LogStats { written: 0, dropped: 0, failed: 1 });
    }

    #[test]
    fn a_place_is_named_so_that_no_slip_makes_a_file() {
        assert_eq!("stdout".parse(), Ok(Output::Stdout));
        assert_eq!("stderr".parse(), Ok(Output::Stderr));
        assert_eq!("./a".parse(), Ok(Output::File("./a".into())));
        assert!("sdtout".parse::<Output>().is_err());
    }
}

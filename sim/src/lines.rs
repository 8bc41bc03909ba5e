//! The lines of a file, plain or zstd, one at a time: numbered, bounded, without blank lines and `#` comments.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::access_log::LogProblem;
use crate::trace::TraceProblem;
use crate::zstd::{Zstd, is_zstd};

/// The longest line, in bytes: eight times the longest key, for a log line holds more than its key.
pub const LINE_MAX_BYTES: usize = 64 * 1024;

/// Why a recorded load could not be read (any further).
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file could not be opened.
    #[error("{}: cannot be opened: give a trace or an access log that may be read", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Reading failed.
    #[error("{}:{line}: reading failed after this line", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The last line that was read.
        line: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file is compressed, and damaged.
    #[error("{}:{line}: the zstd data is cut short or damaged after this line: fetch or compress the file again", path.display())]
    Zstd {
        /// Which file.
        path: PathBuf,
        /// The last line that was read.
        line: u64,
        /// What the decoder said.
        source: io::Error,
    },
    /// A line was longer than `LINE_MAX_BYTES`.
    #[error("{}:{line}: the line is longer than {LINE_MAX_BYTES} bytes: give a trace or an access log, plain or zstd", path.display())]
    Long {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: u64,
    },
    /// There was nothing but blank lines and comments, or no line of a log had the key.
    #[error("{}: there is no event in it: give lines `seconds key [weight [bytes]]`, or an access log that has the key", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// The first lines are neither of a trace nor of an access log.
    #[error("{}:{line}: neither a trace nor an access log: as a trace, {trace}; as a log, {log}", path.display())]
    Unknown {
        /// Which file.
        path: PathBuf,
        /// Its first line that is no comment.
        line: u64,
        /// Why that is no line of a trace.
        trace: TraceProblem,
        /// Why that is no line of a log.
        log: LogProblem,
    },
    /// A key was asked for where there is nothing to choose.
    #[error("{}: it is a trace, whose lines name their keys: leave out --key, which is for access logs", path.display())]
    KeyOfTrace {
        /// Which file.
        path: PathBuf,
    },
    /// A line of a trace is malformed.
    #[error("{}:{line}: {problem}", path.display())]
    Trace {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: u64,
        /// What is wrong with it.
        problem: TraceProblem,
    },
    /// A line of a trace is earlier than the one before.
    #[error("{}:{line}: {at} s comes after {before} s: sort the trace by time, such as with `sort -s -g`", path.display())]
    Unsorted {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: u64,
        /// Its time, in seconds.
        at: f64,
        /// The time before it.
        before: f64,
    },
    /// More than half of an access log was malformed.
    #[error("{}: {malformed} of the first {lines} lines are malformed, so this is no access log; line {line}: {problem}", path.display())]
    NoLog {
        /// Which file.
        path: PathBuf,
        /// How many lines were malformed.
        malformed: u64,
        /// Of how many that were read.
        lines: u64,
        /// The first malformed one.
        line: u64,
        /// What is wrong with it.
        problem: LogProblem,
    },
}

/// A line, without its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    /// Counted from 1, blank lines and comments included.
    pub(crate) number: u64,
    pub(crate) bytes: Vec<u8>,
}

/// The lines of a file that say something.
pub(crate) struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    compressed: bool,
    number: u64,
    // Lines that were looked at and given back, in order.
    ahead: VecDeque<Line>,
}

impl Lines {
    /// Opens a file, compressed or not: its first bytes tell, not its name.
    pub(crate) fn open(path: &Path) -> Result<Self, InputError> {
        let open = |source| InputError::Open { path: path.to_owned(), source };
        let mut file = BufReader::with_capacity(BUFFER_BYTES, File::open(path).map_err(open)?);
        // A folder opens, and fails at the first read.
        let compressed = is_zstd(file.fill_buf().map_err(open)?);
        let reader: Box<dyn BufRead + Send> = if compressed {
            Box::new(BufReader::with_capacity(BUFFER_BYTES, Zstd::new(file)))
        } else {
            Box::new(file)
        };
        Ok(Self { path: path.to_owned(), reader, compressed, number: 0, ahead: VecDeque::new() })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// Gives lines back, to be given out again.
    pub(crate) fn put_back(&mut self, lines: Vec<Line>) {
        for line in lines.into_iter().rev() {
            self.ahead.push_front(line);
        }
    }

    /// Reads the next line that says something into `line`; false at the end.
    pub(crate) fn next_into(&mut self, line: &mut Line) -> Result<bool, InputError> {
        if let Some(ahead) = self.ahead.pop_front() {
            *line = ahead;
            return Ok(true);
        }
        loop {
            line.bytes.clear();
            // One byte more than allowed tells a long line from a full one.
            let limit = LINE_MAX_BYTES as u64 + 1;
            let read = (&mut self.reader).take(limit).read_until(b'\n', &mut line.bytes);
            let read = read.map_err(|source| {
                let (path, line) = (self.path(), self.number);
                // The file itself failing and the decoder failing look alike; a damaged file is far likelier.
                if self.compressed {
                    InputError::Zstd { path, line, source }
                } else {
                    InputError::Read { path, line, source }
                }
            })?;
            if read == 0 {
                return Ok(false);
            }
            self.number += 1;
            line.number = self.number;
            if read > LINE_MAX_BYTES {
                return Err(InputError::Long { path: self.path(), line: self.number });
            }
            if self.number == 1 && line.bytes.starts_with(BYTE_ORDER_MARK) {
                line.bytes.drain(..BYTE_ORDER_MARK.len());
            }
            let text = line.bytes.trim_ascii();
            if !text.is_empty() && text[0] != b'#' {
                return Ok(true);
            }
        }
    }
}

const BUFFER_BYTES: usize = 64 * 1024;
/// UTF-8's, which some editors put at the front of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

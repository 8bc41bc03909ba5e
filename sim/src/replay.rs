//! A recorded load as events in order of time: a trace or an access log, told apart by the first lines.
//!
//! A trace is a format of ours, so anything odd in it is an error with its line. An access log is what some server wrote
//! over months: a malformed line is counted and passed over, unless more than half are malformed, and requests that were
//! logged late (servers log when a reply ends) are sorted within a second and counted beyond it. Who knows that a trace is
//! damaged may ask for a lenient reader, which treats it so too.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::Path;
use std::time::Duration;

use crate::access_log::{self, KeyPart, LogProblem};
use crate::event::Event;
use crate::lines::{InputError, Line, Lines};
use crate::trace::{self, TraceProblem};

/// What a reader of an access log, or a lenient one of a trace, passed over or put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Lines that could not be read, passed over.
    pub malformed: u64,
    /// Lines without the part that is the key, passed over.
    pub without_key: u64,
    /// Requests logged more than a second too late for their place, in a trace ever so little; they keep their key and are
    /// given the time of the event before.
    pub late: u64,
}

/// The events of a file, in order of time, the first at zero. Ends after the first error.
pub struct Replay {
    source: Source,
    // The time of the first event, which the others count from.
    origin: Option<Duration>,
    events: u64,
    ended: bool,
}

enum Source {
    Trace(TraceReader),
    Log(LogReader),
}

impl Replay {
    /// Opens a trace or an access log. `key` says which part of a log line is the key, the path unless told; a trace
    /// takes none.
    pub fn open(path: &Path, key: Option<&KeyPart>) -> Result<Self, InputError> {
        let mut lines = Lines::open(path)?;
        let part = key.unwrap_or(&KeyPart::Path);
        let source = match detect(&mut lines, part)? {
            Format::Trace if key.is_some() => {
                return Err(InputError::KeyOfTrace { path: lines.path() });
            }
            Format::Trace => Source::Trace(TraceReader::new(lines)),
            Format::Log => Source::Log(LogReader::new(lines, part.clone())),
        };
        Ok(Self { source, origin: None, events: 0, ended: false })
    }

    /// Passes over malformed lines of a trace, and puts right times that run backwards, rather than end there. A log is
    /// read so anyway.
    #[must_use]
    pub fn lenient(mut self) -> Self {
        if let Source::Trace(trace) = &mut self.source {
            trace.lenient = true;
        }
        self
    }

    /// Says what was passed over so far.
    pub fn skipped(&self) -> Skipped {
        match &self.source {
            Source::Trace(trace) => trace.skipped,
            Source::Log(log) => log.skipped,
        }
    }

    /// Gives the first line that was passed over as malformed, and what is wrong with it.
    pub fn first_malformed(&self) -> Option<(u64, String)> {
        match &self.source {
            Source::Trace(trace) => {
                trace.first_malformed.as_ref().map(|(n, p)| (*n, p.to_string()))
            }
            Source::Log(log) => log.first_malformed.as_ref().map(|(n, p)| (*n, p.to_string())),
        }
    }

    fn read(&mut self) -> Result<Option<Event>, InputError> {
        let event = match &mut self.source {
            Source::Trace(trace) => trace.read()?,
            Source::Log(log) => log.read()?,
        };
        let Some(mut event) = event else {
            return if self.events > 0 {
                Ok(None)
            } else {
                Err(InputError::Empty { path: self.path() })
            };
        };
        self.events += 1;
        let origin = *self.origin.get_or_insert(event.at);
        event.at = event.at.saturating_sub(origin);
        Ok(Some(event))
    }

    fn path(&self) -> std::path::PathBuf {
        match &self.source {
            Source::Trace(trace) => trace.lines.path(),
            Source::Log(log) => log.lines.path(),
        }
    }
}

impl Iterator for Replay {
    type Item = Result<Event, InputError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.read().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

enum Format {
    Trace,
    Log,
}

/// Looks at the first lines: the first that is either decides. So a trace whose first line is malformed is still told to
/// be one, and its error then names that line.
fn detect(lines: &mut Lines, part: &KeyPart) -> Result<Format, InputError> {
    let mut seen: Vec<Line> = Vec::new();
    let mut format = None;
    while format.is_none() && seen.len() < DETECT_LINES {
        let mut line = Line::default();
        if !lines.next_into(&mut line)? {
            break;
        }
        format = match (trace::parse(&line.bytes), access_log::parse(&line.bytes, part)) {
            (Ok(_), _) => Some(Format::Trace),
            (_, Ok(_)) => Some(Format::Log),
            (Err(_), Err(_)) => None,
        };
        seen.push(line);
    }
    let first = seen.first().cloned();
    lines.put_back(seen);
    match (format, first) {
        (Some(format), _) => Ok(format),
        (None, None) => Err(InputError::Empty { path: lines.path() }),
        (None, Some(line)) => {
            match (trace::parse(&line.bytes), access_log::parse(&line.bytes, part)) {
                (Err(trace), Err(log)) => {
                    Err(InputError::Unknown { path: lines.path(), line: line.number, trace, log })
                }
                _ => unreachable!("a line that is one of them decided the format"),
            }
        }
    }
}

/// Enough to see past a torn first line and a few odd ones.
const DETECT_LINES: usize = 16;

struct TraceReader {
    lines: Lines,
    line: Line,
    before: Duration,
    lenient: bool,
    skipped: Skipped,
    first_malformed: Option<(u64, TraceProblem)>,
}

impl TraceReader {
    fn new(lines: Lines) -> Self {
        Self {
            lines,
            line: Line::default(),
            before: Duration::ZERO,
            lenient: false,
            skipped: Skipped::default(),
            first_malformed: None,
        }
    }

    fn read(&mut self) -> Result<Option<Event>, InputError> {
        while self.lines.next_into(&mut self.line)? {
            let (path, line) = (|| self.lines.path(), self.line.number);
            let mut event = match trace::parse(&self.line.bytes) {
                Ok(event) => event,
                Err(problem) if self.lenient => {
                    self.skipped.malformed += 1;
                    self.first_malformed.get_or_insert((line, problem));
                    continue;
                }
                Err(problem) => return Err(InputError::Trace { path: path(), line, problem }),
            };
            if event.at < self.before {
                if !self.lenient {
                    let (at, before) = (event.at.as_secs_f64(), self.before.as_secs_f64());
                    return Err(InputError::Unsorted { path: path(), line, at, before });
                }
                self.skipped.late += 1;
                event.at = self.before;
            }
            self.before = event.at;
            return Ok(Some(event));
        }
        Ok(None)
    }
}

/// A request's time, line, key and size.
type Waiting = (Duration, u64, Box<str>, Option<u64>);

struct LogReader {
    lines: Lines,
    line: Line,
    part: KeyPart,
    read: u64,
    skipped: Skipped,
    first_malformed: Option<(u64, LogProblem)>,
    // What was read and waits for earlier ones: by time, then by line. Bounded by `WINDOW_EVENTS`.
    window: BinaryHeap<Reverse<Waiting>>,
    newest: Duration,
    given: Duration,
    at_end: bool,
}

impl LogReader {
    fn new(lines: Lines, part: KeyPart) -> Self {
        Self {
            lines,
            line: Line::default(),
            part,
            read: 0,
            skipped: Skipped::default(),
            first_malformed: None,
            window: BinaryHeap::new(),
            newest: Duration::ZERO,
            given: Duration::ZERO,
            at_end: false,
        }
    }

    fn read(&mut self) -> Result<Option<Event>, InputError> {
        while !self.at_end && !self.is_ripe() {
            self.at_end = !self.lines.next_into(&mut self.line)?;
            if !self.at_end {
                self.take_line()?;
            } else if let Some(error) = self.too_many_malformed() {
                return Err(error);
            }
        }
        let Some(Reverse((at, _, key, bytes))) = self.window.pop() else { return Ok(None) };
        self.skipped.late += u64::from(at < self.given);
        self.given = self.given.max(at);
        Ok(Some(Event { at: self.given, key, weight: 1, bytes }))
    }

    /// Whether the earliest event that waits can be given out: nothing earlier is to come, or no more may wait.
    fn is_ripe(&self) -> bool {
        let Some(Reverse((earliest, ..))) = self.window.peek() else { return false };
        self.newest.saturating_sub(*earliest) > WINDOW || self.window.len() >= WINDOW_EVENTS
    }

    fn take_line(&mut self) -> Result<(), InputError> {
        self.read += 1;
        match access_log::parse(&self.line.bytes, &self.part) {
            Ok(line) => match line.key {
                Some(key) => {
                    self.newest = self.newest.max(line.at);
                    self.window.push(Reverse((line.at, self.line.number, key, line.bytes)));
                }
                None => self.skipped.without_key += 1,
            },
            Err(problem) => {
                self.skipped.malformed += 1;
                self.first_malformed.get_or_insert((self.line.number, problem));
                // Not at the first few lines, which may well be the odd ones.
                if self.read >= JUDGE_LINES
                    && let Some(error) = self.too_many_malformed()
                {
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn too_many_malformed(&self) -> Option<InputError> {
        let (line, problem) = self.first_malformed.clone()?;
        let (malformed, lines) = (self.skipped.malformed, self.read);
        let path = self.lines.path();
        (malformed * 2 > lines).then_some(InputError::NoLog {
            path,
            malformed,
            lines,
            line,
            problem,
        })
    }
}

/// How far out of order log lines may be and still be sorted: the resolution of their times.
const WINDOW: Duration = Duration::from_secs(1);
/// How many log lines may wait to be sorted, at some 100 bytes each. Past it, the earliest is given out.
const WINDOW_EVENTS: usize = 65_536;
/// How many lines a log is given before it is judged.
const JUDGE_LINES: u64 = 100;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn replay(bytes: &[u8]) -> Result<Vec<Event>, InputError> {
        Replay::open(file(bytes).path(), None)?.collect()
    }

    /// Writes events as a trace, the shortest way to say what is expected.
    fn text(events: &[Event]) -> String {
        let line =
            |event: &Event| format!("{} {} {}", event.at.as_secs_f64(), event.key, event.weight);
        events.iter().map(line).collect::<Vec<_>>().join("; ")
    }

    /// The error of a file, after its path.
    fn error(bytes: &[u8]) -> String {
        let file = file(bytes);
        let path = file.path().display().to_string();
        let mut events = match Replay::open(file.path(), None) {
            Ok(replay) => replay,
            Err(error) => return error.to_string().replace(&path, "FILE"),
        };
        let error = events.find_map(Result::err).expect("the file is bad");
        assert!(events.next().is_none(), "nothing follows an error");
        error.to_string().replace(&path, "FILE")
    }

    fn log(entries: &[(&str, &str)]) -> String {
        let line = |(time, path): &(&str, &str)| {
            format!("h - - [{time} +0000] \"GET {path} HTTP/1.1\" 200 5\n")
        };
        entries.iter().map(line).collect()
    }

    #[test]
    fn a_trace_is_read_plain_or_compressed_and_starts_at_zero() {
        let trace = b"\xEF\xBB\xBF# name: t\n\n1000 a 2\r\n1000.5\tb c\n  # note\n1002 a 1 77";
        let expected = "0 a 2; 0.5 b c 1; 2 a 1";
        assert_eq!(text(&replay(trace).unwrap()), expected);
        assert_eq!(
            text(&replay(&compress_to_vec(&trace[..], CompressionLevel::Fastest)).unwrap()),
            expected
        );
    }

    #[test]
    fn a_bad_trace_is_an_error_that_names_its_line() {
        assert_eq!(
            error(b"0 a\n# x\n5 b\n4 c\n"),
            "FILE:4: 4 s comes after 5 s: sort the trace by time, such as with `sort -s -g`"
        );
        assert_eq!(
            error(b"0 a\nnan b\n"),
            "FILE:2: the time \"nan\" is no number of seconds from 0 to 1e12"
        );
        assert!(error(b"-1 a\n1 b\n").starts_with("FILE:1: the time \"-1\""));
        assert!(error(b"0 a\n1 b -7\n").starts_with("FILE:2: the weight \"-7\""));
        assert!(
            error(&[b"0 a\n", &b"k".repeat(70_000)[..]].concat())
                .starts_with("FILE:2: the line is longer")
        );
    }

    #[test]
    fn a_lenient_reader_passes_over_bad_lines_and_counts_them() {
        let file = file(b"0 a\nnan b\n5 b\n4 c\n6 d x\n7 e\n");
        let mut replay = Replay::open(file.path(), None).unwrap().lenient();
        let events: Vec<Event> = replay.by_ref().collect::<Result<_, _>>().unwrap();
        assert_eq!(text(&events), "0 a 1; 5 b 1; 5 c 1; 7 e 1");
        assert_eq!(replay.skipped(), Skipped { malformed: 2, without_key: 0, late: 1 });
        let (line, problem) = replay.first_malformed().unwrap();
        assert!(line == 2 && problem.starts_with("the time \"nan\""), "{line}: {problem}");
    }

    #[test]
    fn what_is_no_load_at_all_is_told_so() {
        assert!(error(b"").starts_with("FILE: there is no event"));
        assert!(error(b"# only\n\n").starts_with("FILE: there is no event"));
        let prose = error(b"\nDear reader,\nhow are you?\n");
        assert!(
            prose.starts_with("FILE:2: neither a trace nor an access log: as a trace, the time"),
            "{prose}"
        );
        assert!(prose.contains("as a log, [the time] is missing"), "{prose}");
        let missing = Replay::open(Path::new("no/such/file"), None).err().unwrap();
        assert!(missing.to_string().starts_with("no/such/file: cannot be opened"));
        assert!(matches!(Replay::open(&std::env::temp_dir(), None), Err(InputError::Open { .. })));
    }

    #[test]
    fn damaged_zstd_is_an_error_after_the_last_good_line() {
        let trace: String =
            (0..20_000).map(|n| format!("{n} key{}\n", n * 7_919 % 1_000)).collect();
        let whole = compress_to_vec(trace.as_bytes(), CompressionLevel::Fastest);
        let cut = error(&whole[..whole.len() / 2]);
        assert!(
            cut.starts_with("FILE:") && cut.contains("the zstd data is cut short or damaged"),
            "{cut}"
        );
        let mut damaged = whole.clone();
        // The type of the first block: 3 is reserved.
        damaged[whole.len() / 2..].fill(0xFF);
        assert!(!error(&damaged).is_empty());
        assert!(error(&whole[..3]).contains("neither"));
        assert!(error(&whole[..5]).contains("the zstd data is cut short or damaged"));
    }

    #[test]
    fn a_key_part_is_refused_for_a_trace() {
        let error = Replay::open(file(b"0 a\n").path(), Some(&KeyPart::Host)).err().unwrap();
        assert!(error.to_string().contains("leave out --key"));
    }

    #[test]
    fn log_lines_are_sorted_within_a_second_and_held_in_place_beyond() {
        let lines = log(&[
            ("10/Oct/2000:13:55:37", "/b"),
            ("10/Oct/2000:13:55:36", "/a"),
            ("10/Oct/2000:13:55:40", "/c"),
            ("10/Oct/2000:13:55:44", "/e"),
            ("10/Oct/2000:13:55:30", "/late"),
            ("10/Oct/2000:13:55:43", "/d"),
        ]);
        let file = file(lines.as_bytes());
        let mut replay = Replay::open(file.path(), None).unwrap();
        let events: Vec<Event> = replay.by_ref().map(Result::unwrap).collect();
        assert_eq!(text(&events), "0 /a 1; 1 /b 1; 4 /c 1; 4 /late 1; 7 /d 1; 8 /e 1");
        assert_eq!(replay.skipped(), Skipped { late: 1, ..Skipped::default() });
        assert_eq!(events[0].bytes, Some(5));
    }

    #[test]
    fn malformed_lines_of_a_log_are_counted_until_they_are_the_most() {
        let good = log(&[("10/Oct/2000:13:55:36", "/a")]);
        let no_key = log(&[("10/Oct/2000:13:55:36", "/a")]).replace("GET /a HTTP/1.1", "-");
        let file = file(format!("torn li\n{good}{no_key}junk\n{good}").as_bytes());
        let mut replay = Replay::open(file.path(), None).unwrap();
        assert_eq!(replay.by_ref().map(Result::unwrap).count(), 2);
        assert_eq!(replay.skipped(), Skipped { malformed: 2, without_key: 1, late: 0 });

        let most = format!("{good}{}", "junk\n".repeat(3));
        assert!(error(most.as_bytes()).starts_with(
            "FILE: 3 of the first 4 lines are malformed, so this is no access log; line 2:"
        ));
        let endless = format!("{good}{}", "junk\n".repeat(1_000));
        assert!(
            error(endless.as_bytes()).starts_with("FILE: 99 of the first 100 lines"),
            "judged early"
        );
        assert!(error(no_key.as_bytes()).contains("no event"));
    }

    #[test]
    fn every_real_trace_is_read_to_its_end() {
        // Counted by awk.
        for (name, events, keys) in [
            ("nasa_http_19950801.tsv.zst", 30_969, 2_088),
            ("cache2k_web12.tsv.zst", 95_607, 13_756),
            ("mooncake_conversation_session.tsv.zst", 12_031, 7_373),
        ] {
            let Some(path) = crate::real::trace(name) else { continue };
            let read: Vec<Event> = Replay::open(&path, None).unwrap().map(Result::unwrap).collect();
            let distinct: std::collections::BTreeSet<&str> =
                read.iter().map(|event| &*event.key).collect();
            assert_eq!((read.len(), distinct.len()), (events, keys), "{name}");
        }
    }
}

//! The corpus as text: what each case sends, what its task answers, and what may come of it.
//!
//! ```text
//! # a comment
//! == what the case is about
//! > POST /kv/a HTTP/1.1        a line that the client sends, with CR LF behind it
//! > hello\                     the same without; elsewhere \r \n \t \\ \x00 and \{40000*x} stand for bytes
//! ...                          the client waits for an answer here
//! < HTTP/1.1 200 OK            what the task answers to the first request, instead of what it has seen
//! <early                       ... before it has read the body
//! <close                       ... and closes then
//! forwarded POST /kv/a hello   the task sees this request, and the client gets its answer
//!   with host: a               ... with this field, among others
//!   without connection         ... and not with this one
//!   at apache 404              ... and Apache, where it is the task, answers that itself
//!   at apache as GET /b        ... or takes it for one request, and sends it on like this
//! refused 400                  the proxy answers in the task's place, and the task sees nothing
//! refused 400 or dropped       ... if the answer is not lost in the reset of a connection that is full of unread bytes
//! broken POST /kv/broken       the task sees part of this request at most; the client an answer of the proxy, or none
//! passed 200 hi                the client gets what the task answered: this status, and a body that is whole
//! cut 200                      ... this status, and a body that is not
//! closed                       the proxy closes the connection; otherwise it takes one more request
//! ```
//!
//! Of HTTP/2 a case writes frames. Its outcomes are those of streams 1, 3 and so on:
//!
//! ```text
//! h2                           from here on frames: the preface and settings were exchanged
//! headers end                  HEADERS; `end` sets END_STREAM, `open` leaves END_HEADERS out; stream=3 puts it on another
//! | :method: GET               ... with this field, as a literal that is not indexed
//! continuation                 CONTINUATION, with fields as above
//! data end hello               DATA
//! frame 8 0 1 \x00\x00         any frame: type, flags, stream, bytes
//! reset                        the proxy resets the stream
//! ```

use std::path::Path;

/// One case.
#[derive(Debug)]
pub(super) struct Case {
    /// File and name.
    pub(super) name: String,
    pub(super) steps: Vec<Step>,
    pub(super) script: Option<Script>,
    pub(super) outcomes: Vec<Outcome>,
    /// Whether the proxy closes the connection.
    pub(super) closed: bool,
    pub(super) is_h2: bool,
}

/// What the client does next.
#[derive(Debug)]
pub(super) enum Step {
    Send(Vec<u8>),
    /// Waits for an answer.
    Wait,
    Frame(Frame),
}

/// A frame of HTTP/2.
#[derive(Clone, Debug, Default)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

/// What the task answers to the first request.
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    pub(super) bytes: Vec<u8>,
    pub(super) is_early: bool,
    pub(super) closes: bool,
}

/// What comes of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    Forwarded(Forwarded),
    Refused {
        status: u16,
        or_dropped: bool,
    },
    Broken(String),
    Passed {
        status: u16,
        body: Vec<u8>,
    },
    Cut(u16),
    /// Of a stream of HTTP/2.
    Reset,
}

/// A request that the task sees.
#[derive(Debug, Default)]
pub(super) struct Forwarded {
    /// Method and target.
    pub(super) line: String,
    pub(super) body: Vec<u8>,
    pub(super) with: Vec<(String, String)>,
    pub(super) without: Vec<String>,
    /// What peers make of it.
    pub(super) at: Vec<(String, AtPeer)>,
}

/// What a peer makes of a request that it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AtPeer {
    /// It answers so itself.
    Answers(u16),
    /// It takes it for one, and sends this on: method and target.
    Rewrites(String),
}

impl Frame {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("a frame is short").to_be_bytes();
        let head = [&length[1..], &[self.kind, self.flags], &self.stream.to_be_bytes()].concat();
        [&head, &self.payload[..]].concat()
    }
}

const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

/// Reads all cases of the corpus, in the order of their files.
pub(super) fn all() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tests/corpus");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|ending| ending == "txt"));
    files.sort();
    let cases: Vec<Case> = files
        .iter()
        .flat_map(|file| {
            let name = file.file_stem().unwrap().to_str().unwrap();
            read(name, &std::fs::read_to_string(file).unwrap())
        })
        .collect();
    for case in &cases {
        let same = cases.iter().filter(|other| other.name == case.name).count();
        assert_eq!(same, 1, "{} is there more than once", case.name);
    }
    cases
}

fn read(file: &str, text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix("== ") {
            cases.push(Case {
                name: format!("{file}: {name}"),
                steps: Vec::new(),
                script: None,
                outcomes: Vec::new(),
                closed: false,
                is_h2: false,
            });
            continue;
        }
        let case = cases.last_mut();
        case.and_then(|case| case.take(line))
            .unwrap_or_else(|| panic!("{file}.txt, line {}: {line:?}", number + 1));
    }
    for case in &mut cases {
        if case.steps.is_empty() {
            case.steps.push(Step::Send(b"GET /kv/a HTTP/1.1\r\nhost: a\r\n\r\n".to_vec()));
        }
        assert!(!case.outcomes.is_empty() || case.closed, "{} has no outcome", case.name);
    }
    cases
}

impl Case {
    /// Takes one line; nothing if it is none.
    fn take(&mut self, line: &str) -> Option<()> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            ">" => self.send(&wire_line(rest)),
            "..." => self.steps.push(Step::Wait),
            "<" => self.script().bytes.extend(wire_line(rest)),
            "<early" => self.script().is_early = true,
            "<close" => self.script().closes = true,
            "h2" => {
                self.is_h2 = true;
                self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
            }
            "headers" | "continuation" => {
                let kind = if word == "headers" { HEADERS } else { CONTINUATION };
                self.frame(kind, END_HEADERS, rest)?;
            }
            "data" => {
                let (options, body) = match rest.strip_prefix("end") {
                    Some(body) => ("end", body.trim_start()),
                    None => ("", rest),
                };
                self.frame(DATA, 0, options)?;
                self.last_frame()?.payload = unescape(body);
            }
            "frame" => {
                let mut words = rest.splitn(4, ' ');
                let mut number = || words.next()?.parse::<u32>().ok();
                let (kind, flags, stream) = (number()?, number()?, number()?);
                let payload = unescape(words.next().unwrap_or_default());
                let (kind, flags) = (u8::try_from(kind).ok()?, u8::try_from(flags).ok()?);
                self.steps.push(Step::Frame(Frame { kind, flags, stream, payload }));
            }
            "|" => {
                // The colon of a pseudo-header is no end of a name.
                let at = rest.get(1..)?.find(": ")? + 1;
                let literal = literal(&unescape(&rest[..at]), &unescape(&rest[at + 2..]));
                self.last_frame()?.payload.extend(literal);
            }
            _ => return self.outcome(line),
        }
        Some(())
    }

    fn outcome(&mut self, line: &str) -> Option<()> {
        if let Some(detail) = line.strip_prefix("  ") {
            let Some(Outcome::Forwarded(forwarded)) = self.outcomes.last_mut() else { return None };
            return forwarded.take(detail);
        }
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let outcome = match word {
            "closed" => {
                self.closed = true;
                return Some(());
            }
            "forwarded" => {
                let mut words = rest.splitn(3, ' ');
                let line = format!("{} {}", words.next()?, words.next()?);
                let body = unescape(words.next().unwrap_or_default());
                Outcome::Forwarded(Forwarded { line, body, ..Forwarded::default() })
            }
            "refused" => {
                let (status, or_dropped) = match rest.strip_suffix(" or dropped") {
                    Some(status) => (status, true),
                    None => (rest, false),
                };
                Outcome::Refused { status: status.parse().ok()?, or_dropped }
            }
            "broken" => Outcome::Broken(rest.to_owned()),
            "passed" => {
                let (status, body) = rest.split_once(' ').unwrap_or((rest, ""));
                Outcome::Passed { status: status.parse().ok()?, body: unescape(body) }
            }
            "cut" => Outcome::Cut(rest.parse().ok()?),
            "reset" => Outcome::Reset,
            _ => return None,
        };
        self.outcomes.push(outcome);
        Some(())
    }

    fn send(&mut self, bytes: &[u8]) {
        match self.steps.last_mut() {
            Some(Step::Send(sent)) => sent.extend(bytes),
            _ => self.steps.push(Step::Send(bytes.to_vec())),
        }
    }

    fn script(&mut self) -> &mut Script {
        self.script.get_or_insert_default()
    }

    fn frame(&mut self, kind: u8, flags: u8, options: &str) -> Option<()> {
        let mut frame = Frame { kind, flags, stream: 1, payload: Vec::new() };
        for option in options.split_whitespace() {
            match option.split_once('=') {
                None if option == "end" => frame.flags |= END_STREAM,
                None if option == "open" => frame.flags &= !END_HEADERS,
                Some(("stream", stream)) => frame.stream = stream.parse().ok()?,
                _ => return None,
            }
        }
        self.steps.push(Step::Frame(frame));
        Some(())
    }

    fn last_frame(&mut self) -> Option<&mut Frame> {
        match self.steps.last_mut()? {
            Step::Frame(frame) => Some(frame),
            _ => None,
        }
    }
}

impl Forwarded {
    fn take(&mut self, detail: &str) -> Option<()> {
        let (word, rest) = detail.split_once(' ')?;
        match word {
            "with" => {
                let (name, value) = rest.split_once(": ")?;
                let value = String::from_utf8_lossy(&unescape(value)).into_owned();
                self.with.push((name.to_owned(), value));
            }
            "without" => self.without.push(rest.to_owned()),
            "at" => {
                let (peer, rest) = rest.split_once(' ')?;
                let made = match rest.strip_prefix("as ") {
                    Some(line) => AtPeer::Rewrites(line.to_owned()),
                    None => AtPeer::Answers(rest.parse().ok()?),
                };
                self.at.push((peer.to_owned(), made));
            }
            _ => return None,
        }
        Some(())
    }
}

/// A line with CR LF behind it, unless it ends with a backslash.
fn wire_line(line: &str) -> Vec<u8> {
    let escaped = line.strip_suffix("\\\\").is_some();
    match line.strip_suffix('\\').filter(|_| !escaped) {
        Some(line) => unescape(line),
        None => [unescape(line), b"\r\n".to_vec()].concat(),
    }
}

fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend(&rest.as_bytes()[..at]);
        let (piece, length) = escape(&rest[at + 1..]);
        bytes.extend(piece);
        rest = &rest[at + 1 + length..];
    }
    bytes.extend(rest.as_bytes());
    bytes
}

/// The bytes that an escape stands for, and its length without the backslash.
fn escape(text: &str) -> (Vec<u8>, usize) {
    let number = |digits: &str| u8::from_str_radix(digits, 16).expect("two digits follow \\x");
    match text.as_bytes() {
        [b'r', ..] => (vec![b'\r'], 1),
        [b'n', ..] => (vec![b'\n'], 1),
        [b't', ..] => (vec![b'\t'], 1),
        [b'\\', ..] => (vec![b'\\'], 1),
        [b'x', ..] => (vec![number(&text[1..3])], 3),
        [b'{', ..] => {
            let end = text.find('}').expect("\\{ ends with }");
            let (times, of) = text[1..end].split_once('*').expect("\\{times*what}");
            (unescape(of).repeat(times.parse().expect("\\{ begins with a number")), end + 1)
        }
        _ => panic!("no escape: \\{text}"),
    }
}

/// A field in HPACK, as a literal without indexing and without Huffman's code (RFC 7541, 6.2.2).
pub(super) fn literal(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[0][..], &length(name.len()), name, &length(value.len()), value].concat()
}

/// A number with a prefix of seven bits (RFC 7541, 5.1).
fn length(number: usize) -> Vec<u8> {
    if number < 127 {
        return vec![number as u8];
    }
    let (mut bytes, mut rest) = (vec![127], number - 127);
    while rest >= 128 {
        bytes.push((rest % 128 + 128) as u8);
        rest /= 128;
    }
    bytes.push(rest as u8);
    bytes
}

#[test]
fn escapes_stand_for_bytes() {
    assert_eq!(wire_line("a: b"), b"a: b\r\n");
    assert_eq!(wire_line(r"a\x00\r\n\{3*\t}\\ b\"), b"a\0\r\n\t\t\t\\ b");
    assert_eq!(wire_line(""), b"\r\n");
    assert_eq!(length(1337), [127, 186, 9]);
}

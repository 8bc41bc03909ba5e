//! What a client's bytes are by the strictest reading there is: where heads begin and end, and what in them has more than one
//! reading. Nothing here is a socket, or waits.
//!
//! To know where heads begin, bodies are counted too. Where a body breaks the reading, the parser may go on: then its request is
//! not whole, and what follows on the connection is refused.

use std::collections::VecDeque;

/// What a head holds that has more than one reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Both Content-Length and Transfer-Encoding.
    TwoLengths,
    /// A line that ends without a carriage return.
    BareLineFeed,
    /// A target with a `#`, behind which everyone sees something else.
    Fragment,
    /// It follows on a body whose end is in doubt.
    Lost,
}

/// What was read of the requests of one connection.
#[derive(Default)]
pub(crate) struct Scan {
    has_read: bool,
    place: Place,
    head: Head,
    // Heads that have ended and were not taken, the oldest first.
    heads: VecDeque<Option<Doubt>>,
    // How many heads have begun, how many have ended, and how many were taken.
    begun: u64,
    ended: u64,
    taken: u64,
    // Whose body broke the strictest reading.
    doubtful_body: Option<u64>,
}

/// Where in a request the next byte belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Head,
    /// So many bytes of a body are yet to come.
    Body(u64),
    /// In the line before a chunk: its size so far, how many digits that is, and the byte before.
    Size { size: u64, digits: u8, last: u8 },
    /// So many bytes of a chunk are yet to come.
    Chunk(u64),
    /// Behind a chunk, before the line's end.
    ChunkEnd,
    /// Behind a chunk, within the line's end.
    ChunkEndFeed,
    /// In a line behind the last chunk: its length so far and its last byte.
    Trailer { length: usize, last: u8 },
    /// Nobody knows.
    Lost,
    /// Behind a switch to another protocol, where there are no requests.
    Tunnel,
}

/// A head so far.
struct Head {
    lines: usize,
    // The line so far: its length, its beginning and its last byte.
    length: usize,
    start: [u8; START_MAX],
    last: u8,
    // What Content-Length says, if it can be told.
    body: Option<u64>,
    has_length: bool,
    has_coding: bool,
    has_bare_line_feed: bool,
    has_fragment: bool,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            lines: 0,
            length: 0,
            start: [0; START_MAX],
            last: 0,
            body: None,
            has_length: false,
            has_coding: false,
            has_bare_line_feed: false,
            has_fragment: false,
        }
    }
}

/// `content-length:`, the longest number that fits 64 bits, and some white space.
const START_MAX: usize = 48;

/// More heads than fit the parser's buffer ahead of the one that is served.
const HEADS_MAX: usize = 8192;

impl Scan {
    /// Reads what has come.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) {
        self.has_read |= !bytes.is_empty();
        while !bytes.is_empty() {
            bytes = match self.place {
                Place::Head => self.read_head(bytes),
                Place::Body(left) => {
                    let (left, rest) = skip(left, bytes);
                    self.place = if left == 0 { Place::Head } else { Place::Body(left) };
                    rest
                }
                Place::Chunk(left) => {
                    let (left, rest) = skip(left, bytes);
                    self.place = if left == 0 { Place::ChunkEnd } else { Place::Chunk(left) };
                    rest
                }
                Place::Lost | Place::Tunnel => return,
                place => {
                    self.place = place.after(bytes[0]);
                    if self.place == Place::Lost {
                        self.doubtful_body = Some(self.ended);
                    }
                    &bytes[1..]
                }
            };
        }
    }

    /// Reads a line of a head, or part of one, and gives what is behind it.
    fn read_head<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        self.begun = self.ended + 1;
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
            self.head.extend(bytes);
            return &[];
        };
        self.head.extend(&bytes[..end]);
        if self.head.end_line() {
            let head = std::mem::take(&mut self.head);
            self.heads.push_back(head.doubt());
            self.ended += 1;
            let too_many = self.heads.len() > HEADS_MAX;
            self.place = if too_many { Place::Lost } else { head.place() };
        }
        &bytes[end + 1..]
    }

    /// Takes the oldest head that was not taken: the number of its request, and what is in doubt.
    pub(crate) fn take(&mut self) -> (u64, Option<Doubt>) {
        let lost = (self.place == Place::Lost).then_some(Doubt::Lost);
        self.taken += 1;
        (self.taken, self.heads.pop_front().unwrap_or(lost))
    }

    /// Reads no further: from here on there are no requests.
    pub(crate) fn switches(&mut self) {
        self.place = Place::Tunnel;
        self.heads = VecDeque::new();
    }

    /// Says whether the body of that request breaks the strictest reading.
    pub(crate) fn is_in_doubt(&self, number: u64) -> bool {
        self.doubtful_body == Some(number)
    }

    /// Says how many heads have begun: a line's end ahead of one is part of it.
    pub(crate) const fn begun(&self) -> u64 {
        self.begun
    }

    /// Says whether a head is awaited: one has begun and not ended, or nothing has come yet.
    pub(crate) fn awaits_head(&self) -> bool {
        !self.has_read || self.is_in_head()
    }

    fn is_in_head(&self) -> bool {
        self.place == Place::Head && (self.head.lines > 0 || self.head.length > 0)
    }
}

impl Place {
    /// Goes on by a byte, in what frames the chunks.
    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            (Self::Size { size, digits, last: b'\r' }, b'\n') if digits > 0 => match size {
                0 => Self::Trailer { length: 0, last: 0 },
                size => Self::Chunk(size),
            },
            // A line's end is both, and stands at the end.
            (Self::Size { last: b'\r', .. }, _) | (Self::Size { .. }, b'\n') => Self::Lost,
            (Self::Size { size, digits, last }, byte) => {
                let digit = (byte as char).to_digit(16).filter(|_| last.is_ascii_hexdigit());
                match digit {
                    Some(_) if digits == SIZE_DIGITS_MAX => Self::Lost,
                    Some(digit) => {
                        let size = size << 4 | u64::from(digit);
                        Self::Size { size, digits: digits + 1, last: byte }
                    }
                    // What else may stand here the parser knows.
                    None => {
                        Self::Size { size, digits, last: if byte == b'\r' { byte } else { b';' } }
                    }
                }
            }
            (Self::ChunkEnd, b'\r') => Self::ChunkEndFeed,
            (Self::ChunkEndFeed, b'\n') => Self::SIZE,
            (Self::Trailer { length: 1, last: b'\r' }, b'\n') => Self::Head,
            (Self::Trailer { last: b'\r', .. }, b'\n') => Self::Trailer { length: 0, last: 0 },
            (Self::Trailer { last: b'\r', .. }, _) | (Self::Trailer { .. }, b'\n') => Self::Lost,
            (Self::Trailer { length, .. }, last) => Self::Trailer { length: length + 1, last },
            _ => Self::Lost,
        }
    }

    /// Before the first digit. The byte before counts as one, so that digits may follow.
    const SIZE: Self = Self::Size { size: 0, digits: 0, last: b'0' };
}

/// As many as fit 64 bits.
const SIZE_DIGITS_MAX: u8 = 16;

/// Passes over what is left, and says how much is left then.
fn skip(left: u64, bytes: &[u8]) -> (u64, &[u8]) {
    let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    (left - here as u64, &bytes[here..])
}

impl Head {
    fn extend(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.last = *last;
        self.has_fragment |= self.lines == 0 && bytes.contains(&b'#');
        if self.length < START_MAX {
            let taken = bytes.len().min(START_MAX - self.length);
            self.start[self.length..][..taken].copy_from_slice(&bytes[..taken]);
        }
        self.length += bytes.len();
    }

    /// Ends a line, and says whether the head ends with it.
    fn end_line(&mut self) -> bool {
        let (length, last) = (self.length, self.last);
        (self.length, self.last) = (0, 0);
        self.has_bare_line_feed |= last != b'\r';
        let is_empty = length == 0 || (length == 1 && last == b'\r');
        if is_empty {
            // Empty lines before a request are passed over (RFC 9112, 2.2).
            return self.lines > 0;
        }
        let start = &self.start[..length.min(START_MAX)];
        let is = |name: &[u8]| {
            start.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
        };
        // The first line is no field, whatever it looks like.
        if self.lines > 0 {
            if is(b"content-length:") {
                self.has_length = true;
                let whole = start.get(b"content-length:".len()..).filter(|_| length <= START_MAX);
                let value = whole.and_then(|value| std::str::from_utf8(value).ok());
                self.body = value.and_then(|value| value.trim().parse().ok());
            }
            self.has_coding |= is(b"transfer-encoding:");
        }
        self.lines += 1;
        false
    }

    const fn doubt(&self) -> Option<Doubt> {
        if self.has_length && self.has_coding {
            Some(Doubt::TwoLengths)
        } else if self.has_bare_line_feed {
            Some(Doubt::BareLineFeed)
        } else if self.has_fragment {
            Some(Doubt::Fragment)
        } else {
            None
        }
    }

    /// What comes behind it.
    const fn place(&self) -> Place {
        match (self.has_coding, self.has_length, self.body) {
            (true, _, _) => Place::SIZE,
            (false, false, _) | (false, true, Some(0)) => Place::Head,
            (false, true, Some(length)) => Place::Body(length),
            // A number that is none ends the connection anyway.
            (false, true, None) => Place::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads text in pieces of each length there is: what is seen must not depend on how it arrived.
    fn check(text: &str, heads: &[Option<Doubt>], in_head: bool) {
        for length in 1..=text.len() {
            let mut scan = Scan::default();
            text.as_bytes().chunks(length).for_each(|piece| scan.read(piece));
            assert_eq!(scan.heads, heads, "{text:?} in pieces of {length}");
            assert_eq!(scan.is_in_head(), in_head, "{text:?} in pieces of {length}");
        }
    }

    #[test]
    fn heads_are_seen_however_they_arrive() {
        let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        check("", &[], false);
        check("\r\n", &[], false);
        check("G", &[], true);
        check(&get[..get.len() - 1], &[], true);
        check(get, &[None], false);
        check(&format!("\r\n{get}{get}"), &[None, None], false);
        check("content-length: GET\r\nTransfer-Encoding: chunked\r\n\r\n", &[None], false);
        check("POST /\r\ncontent-length: 6\r\n\r\na\nb\n\n\n", &[None], false);
        check("POST /\r\ncontent-length: 3\r\n\r\na\nbG", &[None], true);
        let chunks = "POST /\r\nx-content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\n\n\n\n\r\n";
        check(&format!("{chunks}a"), &[None], false);
        check(&format!("{chunks}0\r\n\r\n{get}"), &[None, None], false);
        check(&format!("{chunks}0;a\r\nx: y\r\n\r\nG"), &[None], true);
    }

    #[test]
    fn a_body_that_has_more_than_one_reading_is_in_doubt() {
        let head = "POST /\r\ntransfer-encoding: chunked\r\n\r\n";
        let cases = [
            ("\r\n", true),
            ("5\n", true),
            ("5\r5", true),
            ("5;a\n", true),
            ("00000000000000005\r\n", true),
            ("1\r\naa", true),
            ("1\r\na\n", true),
            ("0\r\n\n", true),
            ("0\r\nx\n", true),
            ("0\r\nx\ry", true),
            ("A \t;a=b\r\n1234567890\r\n00\r\nx: y\r\n\r\n", false),
        ];
        for (body, in_doubt) in cases {
            for length in 1..=body.len() {
                let mut scan = Scan::default();
                scan.read(head.as_bytes());
                let (number, _) = scan.take();
                let pieces = body.as_bytes().chunks(length);
                pieces.for_each(|piece| scan.read(piece));
                assert_eq!(scan.is_in_doubt(number), in_doubt, "{body:?} in pieces of {length}");
                scan.read(b"GET / HTTP/1.1\r\n\r\n");
                let (_, doubt) = scan.take();
                assert_eq!(doubt.is_some(), in_doubt, "{body:?} in pieces of {length}");
            }
        }
    }

    #[test]
    fn doubts_are_seen_however_they_arrive() {
        let both = Some(Doubt::TwoLengths);
        check("POST /\r\nContent-Length: 3\r\nTRANSFER-ENCODING: chunked\r\n\r\n", &[both], false);
        check("POST /\r\ntransfer-encoding:chunked\r\ncontent-length:3\r\n\r\n", &[both], false);
        let bare = Some(Doubt::BareLineFeed);
        for text in [
            "GET /\nhost: a\r\n\r\n",
            "GET /\r\nhost: a\n\r\n",
            "GET /\r\nhost: a\r\n\n",
            "\nGET /\r\n\r\n",
        ] {
            check(text, &[bare], false);
        }
    }

    #[test]
    fn a_body_is_not_taken_for_a_head() {
        let mut scan = Scan::default();
        scan.read(b"POST /\r\ncontent-length: 9\r\n\r\nab\nc");
        assert_eq!(scan.take(), (1, None));
        // The next head comes in one piece with the end of the body.
        scan.read(b"d\n\nefGET /\n\r\n\r\n");
        assert_eq!(scan.take(), (2, Some(Doubt::BareLineFeed)));
        assert!(!scan.is_in_head());
    }
}

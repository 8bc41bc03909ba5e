//! What a client of HTTP/2 gets: just enough of it to tell an answer from a reset.

use std::collections::BTreeMap;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::tests::corpus::case::{END_HEADERS, END_STREAM, Frame, HEADERS, literal};
use crate::tests::corpus::strict::Strict;

/// The client's side of a connection.
pub(super) struct Frames {
    client: Strict,
    streams: BTreeMap<u32, Reply>,
}

/// What came on a stream.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    is_over: bool,
    pub(super) is_reset: bool,
}

const DATA: u8 = 0;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;

impl Frames {
    pub(super) fn new(client: Strict) -> Self {
        Self { client, streams: BTreeMap::new() }
    }

    /// Waits until a stream is over. Nothing if the connection ends before.
    pub(super) async fn reply(&mut self, stream: u32) -> Option<Reply> {
        loop {
            if self.streams.get(&stream).is_some_and(|reply| reply.is_over) {
                return self.streams.remove(&stream);
            }
            self.read().await?;
        }
    }

    /// Asks for a target on a stream of its own.
    pub(super) async fn ask(&mut self, stream: u32, target: &str) {
        let fields =
            [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", target)];
        let payload =
            fields.map(|(name, value)| literal(name.as_bytes(), value.as_bytes())).concat();
        let frame = Frame { kind: HEADERS, flags: END_HEADERS | END_STREAM, stream, payload };
        // If it is closed the reply will not come.
        drop(self.client.stream.write_all(&frame.bytes()).await);
    }

    /// Waits until the proxy says that the connection is broken, or closes it.
    pub(super) async fn closed(mut self) {
        while self.read().await.is_some() {}
    }

    /// Reads a frame; nothing once the connection has ended, or will.
    async fn read(&mut self) -> Option<()> {
        let mut head = [0; 9];
        self.client.stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.client.stream.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let [kind, flags] = [head[3], head[4]];
        let is_over = flags & END_STREAM != 0;
        match kind {
            // With an error, not as a farewell.
            GOAWAY if payload[4..8] != [0; 4] => return None,
            HEADERS => {
                let reply = self.streams.entry(stream).or_default();
                if reply.status == 0 {
                    reply.status = status(&payload).unwrap_or(1);
                }
                reply.is_over |= is_over;
            }
            DATA => {
                let reply = self.streams.entry(stream).or_default();
                reply.body.extend(&payload);
                reply.is_over |= is_over;
            }
            RST_STREAM => {
                let reply = self.streams.entry(stream).or_default();
                // An answer that is whole may be followed by a reset: that the rest of the request is not wanted.
                reply.is_reset |= !reply.is_over;
                reply.is_over = true;
            }
            _ => {}
        }
        Some(())
    }
}

/// The status at the beginning of a head (RFC 7541). It is the first field, and an answer's first on its connection.
fn status(head: &[u8]) -> Option<u16> {
    let at = head.iter().position(|byte| byte & 0xe0 != 0x20)?;
    let indexed = [200, 204, 206, 304, 400, 404, 500];
    match head[at] {
        first @ 0x88..=0x8e => Some(indexed[usize::from(first - 0x88)]),
        // A literal value for the name `:status`.
        0x08 | 0x48 => {
            let length = usize::from(head.get(at + 1)? & 0x7f);
            let value = head.get(at + 2..at + 2 + length)?;
            let digits = if head[at + 1] & 0x80 == 0 {
                String::from_utf8(value.to_vec()).ok()?
            } else {
                digits(value)
            };
            digits.parse().ok()
        }
        _ => None,
    }
}

/// Digits in Huffman's code: 0 to 2 have five bits, the others six.
fn digits(coded: &[u8]) -> String {
    let bits: Vec<u8> =
        coded.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let mut text = String::new();
    let mut rest = &bits[..];
    while rest.len() >= 5 {
        let five = rest[..5].iter().fold(0, |number, bit| number << 1 | bit);
        let (digit, length) = match rest.get(5) {
            _ if five < 3 => (five, 5),
            Some(sixth) if (0b1_1001..=0b1_1111).contains(&(five << 1 | sixth)) => {
                ((five << 1 | sixth) - 0b1_1001 + 3, 6)
            }
            _ => break,
        };
        text.push(char::from(b'0' + digit));
        rest = &rest[length..];
    }
    text
}

#[test]
fn a_status_is_read() {
    assert_eq!(status(&[0x88]), Some(200));
    assert_eq!(status(&[0x20, 0x8c]), Some(400));
    assert_eq!(status(&[0x48, 3, b'5', b'0', b'1']), Some(501));
    // RFC 7541, C.6.1: 302.
    assert_eq!(status(&[0x48, 0x82, 0x64, 0x02]), Some(302));
    // C.6.2: 307.
    assert_eq!(status(&[0x48, 0x83, 0x64, 0x0e, 0xff]), Some(307));
}

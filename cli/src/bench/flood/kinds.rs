//! The floods: what each sends, and how much of it. All of it is cheap for who sends it and work for who gets it.
//!
//! A flood is paced and ends with the measurement, so that what is measured is the proxy's part and not this process's hunger.

/// One kind of flood.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// How many connections it has at a time. One that the proxy ends is opened again.
    pub(crate) connections: usize,
    /// What a connection sends first.
    pub(crate) opens: fn() -> Vec<u8>,
    /// What it sends every ten milliseconds. The number counts from 0 on each connection.
    pub(crate) goes_on: fn(u32) -> Vec<u8>,
    /// Whether it reads what it is answered.
    pub(crate) reads: bool,
}

/// All of them.
pub(crate) const KINDS: [Kind; 20] = [
    Kind {
        name: "h2_rapid_reset",
        connections: 8,
        opens: preface,
        // Twenty streams are opened, and reset at once.
        goes_on: |tick| {
            many(20, |n| [get(stream(tick, 20, n)), reset(stream(tick, 20, n))].concat())
        },
        reads: true,
    },
    Kind {
        name: "h2_resets_by_the_proxy",
        connections: 8,
        opens: preface,
        // A window update of nothing is an error of the stream, which the proxy must reset.
        goes_on: |tick| {
            many(20, |n| {
                let stream = stream(tick, 20, n);
                [get(stream), frame(WINDOW_UPDATE, 0, stream, &[0; 4])].concat()
            })
        },
        reads: true,
    },
    Kind {
        name: "h2_continuation",
        connections: 8,
        opens: || [preface(), frame(HEADERS, END_STREAM, 1, &get_fields())].concat(),
        goes_on: |_| frame(CONTINUATION, 0, 1, &field(b"x", &[b'y'; 4_000])),
        reads: true,
    },
    Kind {
        name: "h2_empty_continuation",
        connections: 8,
        opens: || [preface(), frame(HEADERS, END_STREAM, 1, &get_fields())].concat(),
        goes_on: |_| many(100, |_| frame(CONTINUATION, 0, 1, &[])),
        reads: true,
    },
    Kind {
        name: "h2_empty_data",
        connections: 8,
        opens: || [preface(), frame(HEADERS, END_HEADERS, 1, &put_fields())].concat(),
        goes_on: |_| many(100, |_| frame(DATA, 0, 1, &[])),
        reads: true,
    },
    Kind {
        name: "h2_empty_headers",
        connections: 8,
        opens: preface,
        goes_on: |tick| many(20, |n| frame(HEADERS, END_HEADERS, stream(tick, 20, n), &[])),
        reads: true,
    },
    Kind {
        name: "h2_settings",
        connections: 8,
        opens: preface,
        goes_on: |_| many(100, |_| frame(SETTINGS, 0, 0, &[])),
        // Each is to be acknowledged, to somebody who does not listen.
        reads: false,
    },
    Kind {
        name: "h2_ping",
        connections: 8,
        opens: preface,
        goes_on: |_| many(100, |_| frame(PING, 0, 0, &[7; 8])),
        reads: false,
    },
    Kind {
        name: "h2_window_updates",
        connections: 8,
        opens: preface,
        goes_on: |_| many(100, |_| frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes())),
        reads: true,
    },
    Kind {
        name: "h2_priorities",
        connections: 8,
        opens: preface,
        goes_on: |tick| many(100, |n| frame(PRIORITY, 0, stream(tick, 100, n), &[0, 0, 0, 0, 16])),
        reads: true,
    },
    Kind {
        name: "h2_slow_read",
        connections: 8,
        // A hundred answers at a time, and no room for any of them.
        opens: || {
            let no_window = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
            [PREFACE.to_vec(), no_window, many(100, |n| get(2 * n + 1))].concat()
        },
        goes_on: |_| Vec::new(),
        reads: false,
    },
    Kind {
        name: "h2_idle",
        connections: 500,
        opens: preface,
        goes_on: |_| Vec::new(),
        reads: true,
    },
    Kind {
        name: "h1_idle",
        connections: 500,
        opens: || b"GET /kv/flood HTTP/1.1\r\nhost: flood\r\n\r\n".to_vec(),
        goes_on: |_| Vec::new(),
        reads: true,
    },
    Kind {
        name: "h1_slow_heads",
        connections: 500,
        opens: || b"GET /kv/flood HTTP/1.1\r\nhost: flood\r\nx: ".to_vec(),
        goes_on: |tick| if tick % 50 == 0 { b"y".to_vec() } else { Vec::new() },
        reads: true,
    },
    Kind {
        name: "h1_long_heads",
        connections: 200,
        opens: || [&b"GET /kv/flood HTTP/1.1\r\nhost: flood\r\nx: "[..], &[b'y'; 30_000]].concat(),
        goes_on: |_| Vec::new(),
        reads: true,
    },
    Kind {
        name: "h1_slow_bodies",
        connections: 500,
        opens: || {
            b"PUT /kv/slow HTTP/1.1\r\nhost: flood\r\ncontent-length: 100000\r\n\r\n".to_vec()
        },
        goes_on: |tick| if tick % 50 == 0 { b"y".to_vec() } else { Vec::new() },
        reads: true,
    },
    Kind {
        name: "h1_unwanted_bodies",
        connections: 8,
        // The task says at once that it takes no such method, and the connection ends since nobody wants the rest.
        opens: || {
            b"POST /kv/flood HTTP/1.1\r\nhost: flood\r\ncontent-length: 100000\r\n\r\n".to_vec()
        },
        goes_on: |_| b"y".to_vec(),
        reads: true,
    },
    Kind {
        name: "h1_endless_chunks",
        connections: 8,
        opens: || {
            b"PUT /kv/slow HTTP/1.1\r\nhost: flood\r\ntransfer-encoding: chunked\r\n\r\n".to_vec()
        },
        goes_on: |_| b"1\r\ny\r\n".repeat(100),
        reads: true,
    },
    Kind {
        name: "h1_pipelines",
        connections: 8,
        opens: Vec::new,
        goes_on: |_| b"GET /kv/flood HTTP/1.1\r\nhost: flood\r\n\r\n".repeat(10),
        reads: false,
    },
    Kind {
        name: "h1_bad_heads",
        connections: 8,
        opens: || b"GET /kv/flood HTTP/1.1\r\nhost : flood\r\n\r\n".to_vec(),
        goes_on: |_| Vec::new(),
        reads: true,
    },
];

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn preface() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

/// The client's streams have odd numbers, and each a greater one than the last.
const fn stream(tick: u32, of_each: u32, n: u32) -> u32 {
    2 * (tick * of_each + n) + 1
}

fn many(count: u32, piece: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    (0..count).flat_map(piece).collect()
}

fn get(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &get_fields())
}

fn reset(stream: u32) -> Vec<u8> {
    // CANCEL
    frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())
}

fn get_fields() -> Vec<u8> {
    [vec![0x82, 0x86], field(b":path", b"/kv/flood"), authority()].concat()
}

/// The head of a request whose body is waited for.
fn put_fields() -> Vec<u8> {
    [field(b":method", b"PUT"), vec![0x86], field(b":path", b"/kv/slow"), authority()].concat()
}

fn authority() -> Vec<u8> {
    field(b":authority", b"flood")
}

/// A field as a literal that is not indexed and not compressed (RFC 7541, 6.2.2).
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[0], &length(name.len())[..], name, &length(value.len()), value].concat()
}

fn length(number: usize) -> Vec<u8> {
    let Some(mut rest) = number.checked_sub(127) else { return vec![number as u8] };
    let mut bytes = vec![127];
    while rest >= 128 {
        bytes.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    bytes.push(rest as u8);
    bytes
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_written_as_the_specification_says() {
        assert_eq!(frame(PING, 1, 0, &[7; 8]), [0, 0, 8, 6, 1, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert_eq!(field(b"a", b"bc"), [0, 1, b'a', 2, b'b', b'c']);
        assert_eq!(length(1_337), [127, 186, 9]);
        assert_eq!(stream(2, 20, 3), 87);
    }

    #[test]
    fn each_flood_has_a_name_of_its_own() {
        for kind in KINDS {
            assert_eq!(KINDS.iter().filter(|other| other.name == kind.name).count(), 1);
        }
    }
}

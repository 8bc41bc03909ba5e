//! What clients in other languages are written against: the key vectors, and the watch by server-sent events. Each is used here as
//! such a client would: by its written form alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use mandoline_core::key::SliceKey;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::{Process, ask, free_ports, json, local, run, run_with, text, until};

/// Assigner nodes, each a process.
struct Nodes {
    nodes: Vec<Process>,
    ports: Vec<u16>,
    list: String,
    _data: TempDir,
}

impl Nodes {
    fn start(count: usize, more: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let all = free_ports(2 * count);
        let (ports, peers) = all.split_at(count);
        let seat = |(client, peer)| format!("127.0.0.1:{client}/{peer}");
        let seats: Vec<String> = ports.iter().zip(peers).map(seat).collect();
        let node = |index: usize| {
            let (listen, peer) = (local(ports[index]).to_string(), local(peers[index]).to_string());
            let dir = data.path().join(index.to_string());
            let own = ["assigner", "--listen", &listen, "--peer-listen", &peer];
            let both = ["--peers", &seats.join(","), "--data-dir", dir.to_str().unwrap()];
            Process::start(&[&own[..], &both, more].concat())
        };
        let nodes = (0..count).map(node).collect();
        for port in ports {
            until("a node to be ready", || {
                ask(local(*port), "GET", "/readyz", "").filter(|answer| answer.status == 200)
            });
        }
        let list: Vec<String> = ports.iter().map(|port| local(*port).to_string()).collect();
        Self { nodes, ports: ports.to_vec(), list: list.join(","), _data: data }
    }

    fn make_job(&self) {
        let spec = "name: kv\nheartbeat: 500ms\nreport_every: 500ms\nbalance_every: 1s\n";
        let applied = run_with(&["job", "apply", "-", "--assigners", &self.list], spec);
        assert!(applied.status.success(), "{}", text(&applied.stderr));
    }

    fn task(&self, name: &str) -> Process {
        let own = ["demo", "task", "--name", name, "--listen", "127.0.0.1:0"];
        Process::start(&[&own[..], &["--assigners", &self.list]].concat())
    }

    fn shown(&self) -> Value {
        json(&["assignment", "show", "kv", "-o", "json", "--assigners", &self.list])
    }

    fn pin(&self, slice: &str, task: &str) {
        let pinned = run(&["assignment", "pin", "kv", slice, task, "--assigners", &self.list]);
        assert!(pinned.status.success(), "{}", text(&pinned.stderr));
    }
}

/// One event.
#[derive(Debug, Default)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: String,
    data: String,
}

impl Event {
    fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A stream of events, read as its specification says.
pub(crate) struct Events {
    lines: BufReader<TcpStream>,
    comments: usize,
}

impl Events {
    /// Asks by HTTP/1.0: what answers then is the stream and nothing round it.
    pub(crate) fn open(port: u16, target: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(local(port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET {target} HTTP/1.0\r\nhost: kv\r\n{headers}\r\n").unwrap();
        let mut events = Self { lines: BufReader::new(stream), comments: 0 };
        let status = events.line().unwrap();
        assert!(status.contains(" 200 "), "{status}");
        let mut head = String::new();
        while let Some(line) = events.line().filter(|line| !line.is_empty()) {
            writeln!(head, "{line}").unwrap();
        }
        assert!(head.contains("content-type: text/event-stream\n"), "{head}");
        events
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let bytes = self.lines.read_line(&mut line).expect("something comes within 20 s");
        (bytes > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// The next event; nothing at the end of the stream.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let mut event = Event::default();
        loop {
            let line = self.line()?;
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "" if line.is_empty() && event.data.is_empty() => event = Event::default(),
                "" if line.is_empty() => return Some(event),
                "" => self.comments += 1,
                "event" => event.name = value.to_owned(),
                "id" => event.id = value.to_owned(),
                "data" if event.data.is_empty() => event.data = value.to_owned(),
                "data" => event.data = event.data + "\n" + value,
                _ => {}
            }
        }
    }
}

/// What a client keeps: `docs/protocol.md`, section 7.
#[derive(Default)]
struct Known {
    generation: String,
    tasks: BTreeMap<u64, String>,
    /// Each slice by its first key: who serves it.
    runs: BTreeMap<u64, Vec<u64>>,
}

impl Known {
    fn take(&mut self, event: &Event) {
        let data = event.json();
        match event.name.as_str() {
            "full" => *self = Self::default(),
            "delta" => assert_eq!(data["from"], self.generation.as_str(), "{event:?}"),
            other => panic!("event {other}"),
        }
        for task in data["tasks"].as_array().unwrap() {
            let name = task["task"].as_str().unwrap().to_owned();
            self.tasks.insert(task["session"].as_u64().unwrap(), name);
        }
        for gone in data["gone"].as_array().into_iter().flatten() {
            self.tasks.remove(&gone.as_u64().unwrap());
        }
        for slice in data["slices"].as_array().unwrap() {
            let (first, last) = slice["slice"].as_str().unwrap().split_once("..").unwrap();
            let [first, last] = [first, last].map(|key| u64::from_str_radix(key, 16).unwrap());
            let session = |replica: &Value| replica["session"].as_u64().unwrap();
            let sessions = slice["replicas"].as_array().unwrap().iter().map(session).collect();
            self.set(first, last, sessions);
        }
        self.generation = data["generation"].as_str().unwrap().to_owned();
        assert_eq!(self.generation, event.id);
    }

    fn set(&mut self, first: u64, last: u64, sessions: Vec<u64>) {
        if let Some(after) = last.checked_add(1) {
            let before =
                self.runs.range(..=after).next_back().map(|(_, sessions)| sessions.clone());
            self.runs.insert(after, before.unwrap_or_default());
        }
        let inside: Vec<u64> = self.runs.range(first..=last).map(|(first, _)| *first).collect();
        inside.iter().for_each(|first| drop(self.runs.remove(first)));
        self.runs.insert(first, sessions);
    }

    /// Every slice's first key, and its tasks.
    fn slices(&self) -> Vec<(String, Vec<String>)> {
        let names = |sessions: &Vec<u64>| sessions.iter().map(|s| self.tasks[s].clone()).collect();
        self.runs.iter().map(|(first, of)| (format!("{first:016x}"), names(of))).collect()
    }
}

/// The same of what an operator is shown.
fn slices(shown: &Value) -> Vec<(String, Vec<String>)> {
    let name = |replica: &Value| replica["task"].as_str().unwrap().to_owned();
    let slice = |slice: &Value| {
        let replicas = slice["replicas"].as_array().unwrap();
        (slice["slice"].as_str().unwrap()[..16].to_owned(), replicas.iter().map(name).collect())
    };
    shown["slices"].as_array().unwrap().iter().map(slice).collect()
}

const WATCH: &str = "/api/v1/jobs/kv/watch";

#[test]
fn whoever_reads_server_sent_events_knows_what_everybody_knows() {
    let nodes = Nodes::start(3, &[]);
    nodes.make_job();
    // A node that follows hears of the job a moment later.
    for port in &nodes.ports {
        until("the node to know the job", || watched(*port, WATCH));
    }
    let _tasks = [nodes.task("kv-0"), nodes.task("kv-1")];
    let watch = |port: &u16| (Events::open(*port, WATCH, ""), Known::default());
    let mut watchers: Vec<(Events, Known)> = nodes.ports.iter().map(watch).collect();
    let served = |shown: &Value| {
        let tasks = slices(shown).into_iter().flat_map(|(_, tasks)| tasks);
        tasks.collect::<std::collections::BTreeSet<_>>().len() == 2
    };
    until("both tasks to serve", || served(&nodes.shown()).then_some(()));
    nodes.pin("7700000000000000..777fffffffffffff", "kv-0");
    nodes.pin("7780000000000000..778fffffffffffff", "kv-1");
    let shown = until("the pins to be in force", || {
        let shown = nodes.shown();
        let of = slices(&shown).into_iter().find(|(first, _)| first == "7780000000000000");
        (of?.1 == ["kv-1"]).then_some(shown)
    });
    let target = shown["generation"].as_str().unwrap();
    for (events, known) in &mut watchers {
        while number(&known.generation) < number(target) {
            let event = events.next().expect("the stream goes on");
            known.take(&event);
        }
        // As of one generation both say the same; the watcher may be further already.
        if known.generation == target {
            assert_eq!(known.slices(), slices(&shown));
        }
        assert!(known.tasks.values().any(|name| name == "kv-1"));
    }

    // Whoever comes back goes on where it was, whatever its address still says.
    let (port, (_, known)) = (nodes.ports[0], &mut watchers[1]);
    let last = format!("last-event-id: {}\r\n", known.generation);
    let mut events = Events::open(port, "/api/v1/jobs/kv/watch?known=1.1", &last);
    nodes.pin("7790000000000000..779fffffffffffff", "kv-1");
    let event = events.next().unwrap();
    assert_eq!(event.name, "delta", "{event:?}");
    known.take(&event);
    let mut fresh = Events::open(port, "/api/v1/jobs/kv/watch?known=0.900", "");
    assert_eq!(fresh.next().unwrap().name, "full", "what no node knows leads nowhere");

    // That a stream lives is heard even when nothing happens.
    until("a comment", || events.line().filter(|line| line.starts_with(':')));
}

/// The status and the error of a watch that is refused.
fn refusal(port: u16, target: &str, headers: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(local(port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {target} HTTP/1.0\r\nhost: kv\r\n{headers}\r\n").unwrap();
    let answer = std::io::read_to_string(stream).unwrap();
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let page: Value = serde_json::from_str(page).unwrap_or_else(|error| panic!("{error}: {page}"));
    (status, page["error"].as_str().unwrap().to_owned())
}

/// Whether a node knows the job.
fn watched(port: u16, target: &str) -> Option<()> {
    let mut stream = TcpStream::connect(local(port)).unwrap();
    write!(stream, "GET {target} HTTP/1.0\r\nhost: kv\r\n\r\n").unwrap();
    let mut status = String::new();
    BufReader::new(stream).read_line(&mut status).unwrap();
    status.contains(" 200 ").then_some(())
}

fn number(generation: &str) -> u64 {
    generation.split_once('.').map_or(0, |(_, number)| number.parse().unwrap())
}

#[test]
fn a_watch_that_makes_no_sense_is_refused_by_name() {
    let mut nodes = Nodes::start(1, &[]);
    nodes.make_job();
    let long = format!("/api/v1/jobs/{}/watch", "x".repeat(64));
    for (target, headers, status, says) in [
        (
            "/api/v1/jobs/nope/watch",
            "",
            404,
            "no job nope: `mandoline job list` shows those that are",
        ),
        ("/api/v1/jobs/nope/watch?known=1.7", "", 404, "no job nope"),
        (&long, "", 400, "job: "),
        ("/api/v1/jobs/k%20v/watch", "", 400, "job: "),
        (
            "/api/v1/jobs/kv/watch?known=7",
            "",
            400,
            "known: \"7\" is no generation: give incarnation.number",
        ),
        ("/api/v1/jobs/kv/watch?known=", "", 400, "known: "),
        ("/api/v1/jobs/kv/watch?known=-1.7", "", 400, "known: "),
        ("/api/v1/jobs/kv/watch?known=1.99999999999999999999", "", 400, "known: "),
        ("/api/v1/jobs/kv/watch?known=1.7&known=1.8", "", 400, "known: is given twice"),
        ("/api/v1/jobs/kv/watch?since=1.7", "", 400, "there is no parameter \"since=1.7\""),
        (WATCH, "last-event-id: x\r\n", 400, "last-event-id: \"x\" is no generation"),
    ] {
        let (found, message) = refusal(nodes.ports[0], target, headers);
        assert_eq!(found, status, "{target} {headers}: {message}");
        assert!(message.contains(says), "{target} {headers}: {message}");
    }
    let post = ask(local(nodes.ports[0]), "POST", WATCH, "").unwrap();
    assert_eq!(post.status, 405);

    // A node that stops ends its streams, so that their watchers ask elsewhere.
    let mut events = Events::open(nodes.ports[0], WATCH, "");
    assert_eq!(events.next().unwrap().name, "full");
    nodes.nodes[0].signal(rustix::process::Signal::TERM);
    while events.next().is_some() {}
    assert_eq!(nodes.nodes[0].ended(), Some(0));
}

#[test]
fn a_watch_asks_for_the_cluster_s_token() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "0123456789abcdef0123456789abcdef\n").unwrap();
    let more = ["--token-file", file.to_str().unwrap()];
    let nodes = Nodes::start(1, &more);
    let apply = ["job", "apply", "-", "--assigners", &nodes.list];
    let applied = run_with(&[&apply[..], &more].concat(), "name: kv\n");
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let port = nodes.ports[0];
    let (status, message) = refusal(port, WATCH, "");
    assert_eq!(status, 401);
    assert!(message.contains("asks for a token"), "{message}");
    let (status, _) = refusal(port, WATCH, "authorization: Bearer 0123456789abcdef\r\n");
    assert_eq!(status, 401);
    let shown = "authorization: Bearer 0123456789abcdef0123456789abcdef\r\n";
    assert_eq!(Events::open(port, WATCH, shown).next().unwrap().name, "full");
}

/// Bytes that the reference implementation's own tests hash (`xsum_sanity_check.c`), so that ours can be held against them.
fn reference_bytes(count: usize) -> Vec<u8> {
    let mut state = 2_654_435_761_u64;
    let step = |_| {
        let byte = (state >> 56) as u8;
        state = state.wrapping_mul(11_400_714_785_074_694_797);
        byte
    };
    (0..count).map(step).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What `docs/key-vectors.json` should be.
fn vectors() -> Value {
    let mut keys: Vec<Vec<u8>> = ["", "a", "abc", "user-17", "tenant-7", "Ω/π", "a\0b", "00ff"]
        .iter()
        .map(|text| text.as_bytes().to_vec())
        .collect();
    keys.push(vec![0]);
    keys.push(vec![0xff, 0xfe]);
    // Both sides of each length at which the hash goes another way.
    let lengths = [1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 65, 80, 96, 97, 128, 129];
    let longer = [195, 239, 240, 241, 255, 256, 257, 403, 512, 1_023, 1_024, 1_025, 2_048, 2_240];
    keys.extend(lengths.iter().chain(&longer).map(|count| reference_bytes(*count)));
    let key =
        |key: &Vec<u8>| json!({ "key": hex(key), "slice_key": SliceKey::of(key).to_string() });
    let grouped = [
        ("tenant-7", "user-17"),
        ("tenant-7", "user-18"),
        ("tenant-8", "user-17"),
        ("tenant-7", ""),
        ("", "user-17"),
        ("", ""),
        ("Ω", "π"),
    ];
    let grouped = grouped.map(|(group, member)| {
        let slice_key = SliceKey::grouped(group.as_bytes(), member.as_bytes()).to_string();
        json!({ "group": hex(group.as_bytes()), "member": hex(member.as_bytes()), "slice_key": slice_key })
    });
    json!({
        "about": "where keys land: docs/keys.md",
        "hash": "XXH3-64, seed 0",
        "keys": keys.iter().map(key).collect::<Vec<_>>(),
        "grouped": grouped,
    })
}

#[test]
fn keys_land_where_the_vectors_say() {
    // From the reference implementation: length, hash.
    for (count, hash) in [
        (0, 0x2D06_8005_38D3_94C2),
        (1, 0xC44B_DFF4_074E_ECDB),
        (6, 0x27B5_6A84_CD2D_7325),
        (12, 0xA713_DAF0_DFBB_77E7),
        (24, 0xA3FE_70BF_9D35_10EB),
        (48, 0x397D_A259_ECBA_1F11),
        (80, 0xBCDE_FBBB_2C47_C90A),
        (195, 0xCD94_217E_E362_EC3A),
        (403, 0xCDEB_804D_65C6_DEA4),
        (512, 0x617E_4959_9013_CB6B),
        (2_048, 0xDD59_E2C3_A5F0_38E0),
        (2_240, 0x6E73_A905_39CF_2948),
    ] {
        assert_eq!(SliceKey::of(&reference_bytes(count)), SliceKey(hash), "{count} bytes");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/key-vectors.json");
    let text = format!("{:#}\n", vectors());
    if std::env::var_os("MANDOLINE_WRITE_VECTORS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap();
    assert_eq!(written, text, "MANDOLINE_WRITE_VECTORS=1 writes it anew: keys must never move");
}

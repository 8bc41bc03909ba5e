//! `mandoline bench handoff`: for how long nobody serves a slice of an exclusive job while it moves, by the real path.
//!
//! A real cluster runs as child processes. An operator's pin moves a slice to and fro between two tasks: each is a planned
//! hand-off, with state. One caller asks for a key of the slice all the time, and goes to the other task as soon as one says no.
//! A move's dark time is from the last answer of the old owner to the first of the new one, the caller's own time included.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_proto::pb;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::bench::processes::Cluster;
use crate::failure::Failure;
use crate::stop;

/// Moves a slice of an exclusive job to and fro, and measures for how long nobody serves it
///
/// Starts three assigners and two tasks as processes of their own on loopback, with their data in a temporary directory; all
/// of them end with this command. Ends with 1 if two tasks ever answered for the key at once.
///
/// Example: mandoline bench handoff --moves 100 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct HandoffArgs {
    /// How often the slice moves
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    moves: u16,
    /// KiB of state that moves along
    #[arg(long, default_value_t = 1_023, value_parser = clap::value_parser!(u32).range(0..=1_023))]
    state_kib: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: HandoffArgs) -> Result<ExitCode, Failure> {
    let stop = stop::on_signal()?;
    let failed = |error: anyhow::Error| {
        Failure::new("the bench could not be run").because(format!("{error:#}"))
    };
    let found = tokio::select! {
        found = measure(&args) => found.map_err(failed)?,
        () = stop.cancelled() => return Ok(ExitCode::from(130)),
    };
    let Found { mut dark, both, asked } = found;
    dark.sort_unstable();
    let ms = |share: f64| {
        let at = ((dark.len() - 1) as f64 * share).round() as usize;
        dark[at].as_secs_f64() * 1e3
    };
    let (p50, p99, max) = (ms(0.5), ms(0.99), ms(1.0));
    if args.json {
        let dark_ms = json!({ "p50": p50, "p99": p99, "max": max });
        println!(
            "{}",
            json!({ "moves": dark.len(), "both": both, "asked": asked, "dark_ms": dark_ms })
        );
    } else {
        println!(
            "{} moves: nobody served for {p50:.1} ms (median), {p99:.1} ms (p99), {max:.1} ms at most; two at once: {both}",
            dark.len()
        );
    }
    Ok(if both == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

struct Found {
    dark: Vec<Duration>,
    /// Answers of an old owner to requests that were sent after a new one had answered.
    both: u64,
    asked: u64,
}

async fn measure(args: &HandoffArgs) -> anyhow::Result<Found> {
    let cluster = Cluster::start(&std::env::current_exe()?, 3).await?;
    let spec = JobSpec {
        consistency: Consistency::Exclusive,
        balance_every: Duration::from_millis(100),
        ..JobSpec::new("kv".parse()?)
    };
    cluster.apply(&(&spec).into(), START_WITHIN).await?;
    let tasks = [cluster.start_task("kv-0")?, cluster.start_task("kv-1")?];
    cluster.served("kv", tasks.len(), START_WITHIN).await?;
    // Two keys of one slice, narrower than any other: one that is large, and one that is asked for.
    let large = "key-0".to_owned();
    let block = SliceKey::of(large.as_bytes()).0 & !(WIDTH - 1);
    let slice = Slice::new(SliceKey(block), SliceKey(block + (WIDTH - 1))).context("a slice")?;
    let mut others = (1..).map(|n| format!("key-{n}"));
    let key = others.find(|key| slice.contains(SliceKey::of(key.as_bytes()))).context("a key")?;
    let mut callers = [Caller::new(tasks[0].address), Caller::new(tasks[1].address)];
    let leader = cluster.leader(START_WITHIN).await?;
    let mut found = Found { dark: Vec::new(), both: 0, asked: 0 };
    let mut owner = 0;
    pin(&cluster, leader.index, slice, &tasks[owner].name).await?;
    until_served(&mut callers[owner], &key).await?;
    let state = vec![b'x'; args.state_kib as usize * 1_024];
    let put = callers[owner].ask("PUT", &large, &state).await?;
    if !matches!(put, 200 | 204) {
        bail!("the state was not taken: {put}");
    }
    for nth in 0..args.moves {
        let next = 1 - owner;
        pin(&cluster, leader.index, slice, &tasks[next].name).await?;
        let (mut last, mut at) = (Instant::now(), owner);
        let deadline = Instant::now() + START_WITHIN;
        loop {
            found.asked += 1;
            let served = matches!(callers[at].ask("GET", &key, &[]).await?, 200 | 404);
            match (served, at == next) {
                (true, true) => break,
                (true, false) => last = Instant::now(),
                // Whoever says no sends its caller on.
                (false, _) => at = 1 - at,
            }
            if Instant::now() > deadline {
                bail!("move {nth} did not end within {START_WITHIN:?}");
            }
        }
        found.dark.push(last.elapsed());
        if matches!(callers[owner].ask("GET", &key, &[]).await?, 200 | 404) {
            found.both += 1;
        }
        owner = next;
        if args.state_kib > 0 && callers[owner].ask("GET", &large, &[]).await? != 200 {
            bail!("move {nth} lost the state");
        }
    }
    Ok(found)
}

async fn pin(cluster: &Cluster, leader: usize, slice: Slice, task: &str) -> anyhow::Result<()> {
    let request = pb::PinSliceRequest {
        job: "kv".to_owned(),
        slice: Some(slice.into()),
        task: task.to_owned(),
    };
    cluster.admin(leader).pin_slice(request).await.context("the pin was refused")?;
    Ok(())
}

async fn until_served(caller: &mut Caller, key: &str) -> anyhow::Result<()> {
    let served = async {
        while !matches!(caller.ask("GET", key, &[]).await?, 200 | 404) {}
        anyhow::Ok(())
    };
    timeout(START_WITHIN, served).await.context("nobody serves the key")?
}

/// A connection to one task, with as little between it and the wire as may be: what it takes itself counts as dark.
struct Caller {
    address: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Caller {
    const fn new(address: SocketAddr) -> Self {
        Self { address, stream: None, buffer: Vec::new() }
    }

    /// Asks for a key, reads the whole answer, and gives its status. A connection that was closed meanwhile is made anew.
    async fn ask(&mut self, method: &str, key: &str, body: &[u8]) -> anyhow::Result<u16> {
        let was_open = self.stream.is_some();
        match self.try_ask(method, key, body).await {
            Err(_) if was_open => self.try_ask(method, key, body).await,
            answer => answer,
        }
    }

    async fn try_ask(&mut self, method: &str, key: &str, body: &[u8]) -> anyhow::Result<u16> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        let length = body.len();
        let head = format!(
            "{method} /kv/{key} HTTP/1.1\r\nhost: task\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body).await?;
        self.buffer.clear();
        let (status, whole) = loop {
            if stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the task closed the connection");
            }
            if let Some(found) = head_of(&self.buffer)? {
                break found;
            }
        };
        while self.buffer.len() < whole {
            if stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the task broke off");
            }
        }
        self.stream = Some(stream);
        Ok(status)
    }
}

/// The status of an answer and its length with its body, once its head is there.
fn head_of(bytes: &[u8]) -> anyhow::Result<Option<(u16, usize)>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&bytes[..end])?.to_ascii_lowercase();
    let status = head.split(' ').nth(1).context("an answer has a status")?.parse()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    Ok(Some((status, end + 4 + length.map_or(Ok(0), str::parse)?)))
}

/// How many keys the slice has: one in 4,096.
const WIDTH: u64 = 1 << 52;

/// How long a cluster, a pin and a move may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(30);

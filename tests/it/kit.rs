//! What the tests start and ask with: the binary as a user runs it, plain HTTP, and waiting with a deadline and a name.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::time::Instant;

use crate::processes::free_port;

/// Far beyond what anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A process of the binary. Killed when dropped.
pub(crate) struct Process {
    child: Child,
    out: Arc<Mutex<String>>,
    err: Arc<Mutex<String>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

/// The binary with these arguments, and nothing of ours in its environment.
pub(crate) fn mandoline(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mandoline"));
    let ours = std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("MANDOLINE_"));
    ours.for_each(|name| {
        command.env_remove(name);
    });
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    mandoline(args).output().expect("the binary starts")
}

/// Runs a command with a text on its standard input.
pub(crate) fn run_with(args: &[&str], input: &str) -> Output {
    let mut command = mandoline(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary starts");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it is read");
    child.wait_with_output().expect("the binary ends")
}

/// What a command printed, as JSON, if it ended well.
pub(crate) fn json(args: &[&str]) -> Value {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{args:?}: {error}: {}", text(&output.stdout)))
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Process {
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::spawn(mandoline(args))
    }

    pub(crate) fn spawn(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let (out, err) = (Arc::default(), Arc::default());
        let readers = vec![
            read(child.stdout.take().expect("it is piped"), Arc::clone(&out)),
            read(child.stderr.take().expect("it is piped"), Arc::clone(&err)),
        ];
        Self { child, out, err, readers }
    }

    /// What it has printed so far.
    pub(crate) fn stdout(&self) -> String {
        self.out.lock().expect("readers do not panic").clone()
    }

    /// What it has complained about so far.
    pub(crate) fn stderr(&self) -> String {
        self.err.lock().expect("readers do not panic").clone()
    }

    /// Waits until it has printed a line that begins so, and gives the rest of that line.
    pub(crate) fn line(&mut self, begins: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let all = format!("{}\n{}", self.stdout(), self.stderr());
            let found = all.lines().find_map(|line| line.trim_start().strip_prefix(begins));
            if let Some(rest) = found {
                return rest.trim().to_owned();
            }
            let ended = self.child.try_wait().expect("the child is ours");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "no line {begins:?} ({ended:?}): {all}"
            );
            pause();
        }
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a child has a number"), signal).expect("the process is there");
    }

    /// Waits for its end, and gives its exit code.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let status =
            until("the process to end", || self.child.try_wait().expect("the child is ours"));
        self.readers.drain(..).for_each(|reader| reader.join().expect("reading does not panic"));
        status.code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn read(from: impl Read + Send + 'static, into: Arc<Mutex<String>>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = vec![];
        while from.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            into.lock().expect("nobody panics with it").push_str(&text(&line));
            line.clear();
        }
    })
}

/// Waits until something is there.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        pause();
    }
}

/// Between two looks at something that cannot wake us: another process.
fn pause() {
    std::thread::park_timeout(Duration::from_millis(20));
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

/// Asks by HTTP/1.1, one request a connection; nothing if nobody answers.
pub(crate) fn ask(address: SocketAddr, method: &str, target: &str, body: &str) -> Option<Answer> {
    try_ask(address, method, target, body).ok()
}

/// The same, and what went wrong.
pub(crate) fn try_ask(
    address: SocketAddr,
    method: &str,
    target: &str,
    body: &str,
) -> Result<Answer, String> {
    let failed = |what| move |error: std::io::Error| format!("{what}: {error}");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
        .map_err(failed("connecting"))?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(failed("a time-out"))?;
    let length = body.len();
    let head = format!(
        "{method} {target} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).map_err(failed("sending the head"))?;
    stream.write_all(body.as_bytes()).map_err(failed("sending the body"))?;
    let mut answer = vec![];
    let read = stream.read_to_end(&mut answer);
    let answer = text(&answer);
    read.map_err(|error| format!("after {answer:?}: {error}"))?;
    let parts = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, head: head.to_owned(), body: body.to_owned() })
    });
    parts.ok_or_else(|| format!("no answer: {answer:?}"))
}

/// Ports that were free a moment ago, of those that no outgoing connection is given. Each is given once in this process.
pub(crate) fn free_ports(count: usize) -> Vec<u16> {
    let port = || free_port().expect("there are free ports").port();
    std::iter::repeat_with(port).take(count).collect()
}

/// The first of `count` ports in a row that were free a moment ago. Each is given once in this process.
pub(crate) fn free_row(count: u16) -> u16 {
    // Below those of `free_port`, and not the same for two runs at the same time.
    let first = 10_000 + (std::process::id() % 700) as u16 * 10;
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    let free =
        |base: &u16| (*base..base + count).all(|port| TcpListener::bind(local(port)).is_ok());
    let mut rows = (0..100).map(|_| first + GIVEN.fetch_add(count, Ordering::Relaxed));
    rows.find(free).expect("a hundred rows are not all taken")
}

pub(crate) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

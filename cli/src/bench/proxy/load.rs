//! The load: wrk for HTTP/1.1, h2load for gRPC and for the time that single requests take.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::process::Command;
use tokio::time::timeout;

use crate::bench::proxy::cpu::{LOAD_CORE, on_core};
use crate::bench::proxy::origin::{GRPC, MESSAGE};

/// Connections of clients, kept alive.
pub(crate) const CONNECTIONS: u16 = 64;

/// What the clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http,
    Grpc,
}

/// What a load came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) requests: u64,
    pub(crate) failed: u64,
}

/// How long requests took, or how much longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Writes what the tools read.
pub(crate) fn write(dir: &Path) -> anyhow::Result<()> {
    fs::write(dir.join("requests.lua"), include_str!("../../../../bench/proxy/requests.lua"))?;
    fs::write(dir.join("message"), MESSAGE)?;
    Ok(())
}

/// Loads an address for so many seconds, as fast as it answers.
pub(crate) async fn run(
    protocol: Protocol,
    address: SocketAddr,
    dir: &Path,
    seconds: u16,
) -> anyhow::Result<Load> {
    match protocol {
        Protocol::Http => {
            let (script, url) = (dir.join("requests.lua"), format!("http://{address}"));
            let words = ["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{seconds}s"), "-s"];
            let script = script.to_str().context("the folder's name is no text")?;
            let said = output("wrk", &[&words[..], &[script, &url]].concat(), seconds).await?;
            let figure = |name| figure(&said, name).with_context(|| format!("wrk said: {said}"));
            Ok(Load { requests: figure("requests=")?, failed: figure("failed=")? })
        }
        Protocol::Grpc => {
            let message = dir.join("message");
            let message = message.to_str().context("the folder's name is no text")?;
            let (time, kind) = (format!("-D{seconds}"), format!("content-type: {GRPC}"));
            let urls = urls(address);
            let mut words =
                vec!["-c8", "-m8", &time, "-d", message, "-H", &kind, "-H", "te: trailers"];
            words.extend(urls.iter().map(String::as_str));
            let said = output("h2load", &words, seconds).await?;
            let line = said.lines().find(|line| line.starts_with("requests: "));
            let line = line.with_context(|| format!("h2load said: {said}"))?;
            let number = |what| {
                let part = line.split(", ").find(|part| part.ends_with(what));
                part.and_then(|part| part.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
            };
            let [done, failed, errored, late] =
                ["succeeded", "failed", "errored", "timeout"].map(number);
            Ok(Load { requests: done, failed: failed + errored + late })
        }
    }
}

/// Measures what single requests take: of one client one after the other, or of several that send 100 a second each.
pub(crate) async fn latency(
    address: SocketAddr,
    connections: u16,
    dir: &Path,
    seconds: u16,
) -> anyhow::Result<Latency> {
    let log = dir.join("latency.tsv");
    let text = log.to_str().context("the folder's name is no text")?;
    // It only appends.
    drop(fs::remove_file(&log));
    let (clients, time, log_to) =
        (format!("-c{connections}"), format!("-D{seconds}"), format!("--log-file={text}"));
    let mut words = vec!["--h1", &clients, &time, &log_to];
    if connections > 1 {
        words.push("--rps=100");
    }
    let urls = urls(address);
    words.extend(urls.iter().map(String::as_str));
    output("h2load", &words, seconds).await?;
    let lines = fs::read_to_string(&log).context("h2load wrote no log")?;
    let taken = |line: &str| line.split('\t').nth(2)?.parse::<u64>().ok();
    let mut took: Vec<u64> = lines.lines().filter_map(taken).collect();
    ensure!(!took.is_empty(), "h2load noted no request");
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share).round() as usize] as f64;
    Ok(Latency { p50_us: at(0.5), p99_us: at(0.99) })
}

/// Some keys of every task.
fn urls(address: SocketAddr) -> Vec<String> {
    (0..64)
        .map(|n| format!("http://{address}/k/{:012x}/items/42?x=1", n * 0x9e37_79b9_u64))
        .collect()
}

/// Runs a tool to its end, and gives what it printed.
async fn output(tool: &str, words: &[&str], seconds: u16) -> anyhow::Result<String> {
    let command = on_core(LOAD_CORE, Path::new(tool), words.iter().copied());
    let mut command = Command::from(command);
    command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let within = Duration::from_secs(u64::from(seconds)) + SPARE;
    let ended = timeout(within, command.output()).await;
    let ended = ended.with_context(|| format!("{tool} took more than {within:?}"))?;
    let ended = ended.with_context(|| format!("{tool} cannot be started"))?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    let lament = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "{tool} ended with {}: {said}{lament}", ended.status);
    Ok(said)
}

/// Finds the number after a word.
fn figure(text: &str, after: &str) -> Option<u64> {
    let (_, rest) = text.split_once(after)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// How much longer than its load a tool may take to start and to end.
const SPARE: Duration = Duration::from_secs(20);

//! `mandoline bench stub`: the processor time that the sharded channel adds to a gRPC call, over tonic's own.
//!
//! One task runs as a process. Both channels call it from one thread, with all that they spawn, and take turns in short blocks; each
//! block is charged its thread's processor time. Each pair of neighbouring blocks gives one difference, and their median counts, so that
//! what drifts or interrupts hits both alike.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use http::uri::PathAndQuery;
use mandoline::http::key::KeyFrom;
use mandoline::{Assignment, Clerk};
use mandoline_core::assignment::{Assigned, Replica};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

use crate::bench::echo::KEY;
use crate::bench::processes::{Process, free_port};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::failure::Failure;

/// Measures the processor time that the sharded channel adds to a call
///
/// Starts a task as a process of its own on loopback, which ends with this command. Ends with 1 above 3 microseconds.
///
/// Example: mandoline bench stub --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct StubArgs {
    /// How many pairs of blocks there are
    #[arg(long, default_value_t = 101, value_parser = clap::value_parser!(u16).range(3..=10_000))]
    pairs: u16,
    /// How many calls a block has
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    calls: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: StubArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    let Found { plain, sharded, added } = found;
    let [q1, median, q3] = added;
    if args.json {
        println!(
            "{}",
            json!({
                "pairs": args.pairs, "calls": args.calls,
                "plain_us": plain[1], "sharded_us": sharded[1],
                "added_us": { "q1": q1, "median": median, "q3": q3 },
            })
        );
    } else {
        println!(
            "{:.2} us a call by tonic's channel, {:.2} us by the sharded one; added {median:.2} us (quartiles {q1:.2} and {q3:.2})",
            plain[1], sharded[1]
        );
    }
    Ok(if median <= GOAL_US { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Microseconds of processor time a call: quartiles.
struct Found {
    plain: [f64; 3],
    sharded: [f64; 3],
    added: [f64; 3],
}

async fn measure(args: &StubArgs) -> anyhow::Result<Found> {
    let dir = tempfile::tempdir()?;
    let address = free_port()?;
    let words = ["bench", "echo", "--name", "kv-0", "--listen"].map(str::to_owned);
    let words = [words.as_slice(), &[address.to_string()]].concat();
    let _task = Process::start(&std::env::current_exe()?, "kv-0", &words, dir.path())?;
    let end = Instant::now() + WITHIN;
    while TcpStream::connect(address).await.is_err() {
        ensure!(Instant::now() < end, "the task is not there within {WITHIN:?}");
        sleep(Duration::from_millis(5)).await;
    }
    let (pairs, calls) = (args.pairs, args.calls);
    // A thread of its own, with everything that a channel spawns.
    let measured = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(blocks(address, pairs, calls))
    });
    measured.await?
}

async fn blocks(address: SocketAddr, pairs: u16, calls: u32) -> anyhow::Result<Found> {
    // Looked after as the sharded channel looks after its connections.
    let mut plain = Endpoint::from_shared(format!("http://{address}"))?
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect_lazy();
    let clerk = Clerk::frozen(Arc::new(one_task(address)?));
    let mut sharded = clerk.channel(KeyFrom::metadata(KEY));
    block(&mut plain, calls).await?;
    block(&mut sharded, calls).await?;
    let (mut by_plain, mut by_sharded, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..pairs {
        // Whoever is second finds caches warmer, so they take turns in that too.
        let (one, other) = if pair % 2 == 0 {
            let one = block(&mut plain, calls).await?;
            (one, block(&mut sharded, calls).await?)
        } else {
            let other = block(&mut sharded, calls).await?;
            (block(&mut plain, calls).await?, other)
        };
        by_plain.push(one);
        by_sharded.push(other);
        added.push(other - one);
    }
    Ok(Found {
        plain: quartiles(by_plain),
        sharded: quartiles(by_sharded),
        added: quartiles(added),
    })
}

/// Makes a block of calls, each for another key, and gives what one took of this thread's processor time.
async fn block<S>(channel: &mut S, calls: u32) -> anyhow::Result<f64>
where
    S: GrpcService<Body> + Clone,
    S::ResponseBody: http_body::Body<Data = bytes::Bytes, Error: Into<mandoline::http::replay::BoxError>>
        + Send
        + 'static,
    S::Error: std::error::Error + Send + Sync + 'static,
{
    let keys: Vec<MetadataValue<Ascii>> =
        (0..calls).map(|n| format!("user-{n:011}").parse()).collect::<Result<_, _>>()?;
    let mut client = Grpc::new(channel.clone());
    let began = processor_micros();
    for key in keys {
        let mut request = tonic::Request::new(String::new());
        request.metadata_mut().insert(KEY, key);
        client.ready().await?;
        let path = PathAndQuery::from_static("/t.Echo/Say");
        let codec = ProstCodec::<String, String>::default();
        let answer = client.unary(request, path, codec).await?;
        ensure!(answer.get_ref() == "kv-0", "someone else answers");
    }
    Ok((processor_micros() - began) / f64::from(calls))
}

/// What this thread has used of the processor.
fn processor_micros() -> f64 {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    used.tv_sec as f64 * 1e6 + used.tv_nsec as f64 / 1e3
}

fn quartiles(mut of: Vec<f64>) -> [f64; 3] {
    of.sort_unstable_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| of[(of.len() - 1) * quarter / 4])
}

/// One task serves all of many slices.
fn one_task(address: SocketAddr) -> anyhow::Result<Assignment> {
    let generation = Generation { incarnation: 1, number: 1 };
    let mut made = Assignment::new("kv".parse()?, generation);
    let session = SessionId(1);
    let info = TaskInfo::new("kv-0".parse()?, 1, address.to_string().parse()?);
    made.tasks.insert(session, Arc::new(Task::new(session, info)));
    let step = u64::MAX / SLICES;
    let run = |n: u64| {
        let replicas = [Replica { session, since: generation }].into_iter().collect();
        (SliceKey(n * step), Assigned { replicas, ..Assigned::default() })
    };
    made.slices = SliceMap::from_runs((0..SLICES).map(run).collect()).context("slices in order")?;
    Ok(made)
}

/// As many as a large job has.
const SLICES: u64 = 10_000;
/// What a call may cost more.
const GOAL_US: f64 = 3.0;
/// How long a process may take to start on a busy machine.
const WITHIN: Duration = Duration::from_secs(30);

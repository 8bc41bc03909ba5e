//! `mandoline bench backhaul`: what a large body costs an application that forwards it, and how soon either side hears that the other
//! has left.
//!
//! An assigner and two tasks run as processes. Everything is asked of the task that does not own the key. Its memory is the kernel's
//! account of the process: what was resident before a large body, after a small one by the same way, and the peak until its end.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::bench::echo::{Any, KEY, any, given};
use crate::bench::processes::{Cluster, Echo};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::failure::Failure;

/// Forwards large bodies, and measures what they cost the application that does so
///
/// Starts an assigner and two tasks as processes of their own on loopback; all of them end with this command. Ends with 1 if a body
/// cost more than 1 MiB of memory, or did not arrive whole.
///
/// Example: mandoline bench backhaul --mib 1024 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct BackhaulArgs {
    /// How many MiB each body has
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    mib: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: BackhaulArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    let worst = found.carried.iter().map(|carried| carried.more_kib).max().unwrap_or(0);
    if args.json {
        let mut page = Map::new();
        for Carried { what, more_kib, seconds } in &found.carried {
            let mib_s = f64::from(args.mib) / seconds;
            page.insert(
                (*what).to_owned(),
                json!({ "more_kib": more_kib, "mib_s": mib_s.round() }),
            );
        }
        let ms = |ends: &[(&'static str, Duration)]| -> Map<String, Value> {
            let ms = |took: &Duration| json!((took.as_secs_f64() * 1e4).round() / 10.0);
            ends.iter().map(|(what, took)| ((*what).to_owned(), ms(took))).collect()
        };
        println!(
            "{}",
            json!({
                "mib": args.mib, "bodies": page, "more_kib_max": worst,
                "owner_hears_ms": ms(&found.owner_hears), "client_hears_ms": ms(&found.client_hears),
            })
        );
    } else {
        for Carried { what, more_kib, seconds } in &found.carried {
            let mib_s = f64::from(args.mib) / seconds;
            println!("{what}: {} MiB at {mib_s:.0} MiB/s cost {more_kib} KiB", args.mib);
        }
        for (ends, who) in [
            (&found.owner_hears, "the client left: the owner heard"),
            (&found.client_hears, "the owner died: the client heard"),
        ] {
            for (what, took) in ends {
                println!("{what}: {who} after {:.1} ms", took.as_secs_f64() * 1e3);
            }
        }
    }
    Ok(if worst <= 1_024 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

#[derive(Default)]
struct Found {
    carried: Vec<Carried>,
    /// How long after the client has left.
    owner_hears: Vec<(&'static str, Duration)>,
    /// How long after the owner was killed.
    client_hears: Vec<(&'static str, Duration)>,
}

/// A body that was forwarded.
struct Carried {
    what: &'static str,
    more_kib: u64,
    seconds: f64,
}

/// A way to ask.
struct Way {
    client: Client<HttpConnector, Any>,
    upload: &'static str,
    download: &'static str,
}

fn ways() -> [Way; 2] {
    let builder = || Client::builder(TokioExecutor::new());
    [
        Way { client: builder().build_http(), upload: "http1_request", download: "http1_response" },
        Way {
            client: builder().http2_only(true).build_http(),
            upload: "http2_request",
            download: "http2_response",
        },
    ]
}

/// Two tasks, and a key that the second owns.
struct Stage {
    cluster: Cluster,
    near: Echo,
    far: Echo,
    key: String,
}

impl Stage {
    async fn start() -> anyhow::Result<Self> {
        let cluster = Cluster::start(&std::env::current_exe()?, 1).await?;
        let spec =
            JobSpec { balance_every: Duration::from_millis(100), ..JobSpec::new("kv".parse()?) };
        cluster.apply(&(&spec).into(), WITHIN).await?;
        let (near, far) = (cluster.start_echo("kv-0")?, cluster.start_echo("kv-1")?);
        cluster.served("kv", 2, WITHIN).await?;
        let mut stage = Self { cluster, near, far, key: String::new() };
        stage.key = stage.of_far().await?;
        // Or its key goes to the near task, by what this does to their loads, and the end of the far one is nothing to whoever asks.
        let freeze = pb::FreezeJobRequest { job: "kv".to_owned(), unfreeze: false };
        stage.cluster.admin(0).freeze_job(freeze).await?;
        // What was on its way then has come to its end.
        stage.key = stage.of_far().await?;
        Ok(stage)
    }

    /// Finds a key that the far task answers, whichever of the two is asked: once both know.
    async fn of_far(&self) -> anyhow::Result<String> {
        let [way, _] = ways();
        let look = async |_: &Cluster| {
            for n in 0..KEYS {
                let key = format!("key-{n}");
                let said = |at| self.said(&way, at, "/", &key);
                let (near, far) = (said(&self.near).await.ok()?, said(&self.far).await.ok()?);
                if near == self.far.name && far == self.far.name {
                    return Some(key);
                }
            }
            None
        };
        self.cluster.until("the far task to own a key", WITHIN, look).await
    }

    async fn ask(
        &self,
        way: &Way,
        at: &Echo,
        path: &str,
        key: &str,
        body: Any,
    ) -> anyhow::Result<Response<Incoming>> {
        let uri = format!("http://{}{path}", at.address);
        let request = Request::post(uri).header(KEY, key).body(body)?;
        Ok(way.client.request(request).await?)
    }

    /// Asks for something short.
    async fn said(&self, way: &Way, at: &Echo, path: &str, key: &str) -> anyhow::Result<String> {
        text(self.ask(way, at, path, key, given(0)).await?).await
    }

    /// Has a body read by the owner, and says how many bytes it was.
    async fn upload(&self, way: &Way, bytes: u64) -> anyhow::Result<u64> {
        let answer = self.ask(way, &self.near, "/take", &self.key, given(bytes)).await?;
        Ok(text(answer).await?.parse()?)
    }

    /// Has a body sent by the owner, and says how many bytes it was.
    async fn download(&self, way: &Way, bytes: u64) -> anyhow::Result<u64> {
        let path = format!("/give/{bytes}");
        let mut body = self.ask(way, &self.near, &path, &self.key, given(0)).await?.into_body();
        let mut read = 0;
        while let Some(frame) = body.frame().await {
            read += frame?.data_ref().map_or(0, Bytes::len) as u64;
        }
        Ok(read)
    }

    /// How many bodies have broken off at the owner.
    async fn left(&self, way: &Way) -> anyhow::Result<u64> {
        Ok(self.said(way, &self.far, "/left", &self.key).await?.parse()?)
    }

    async fn until_left(&self, way: &Way, before: u64) -> anyhow::Result<Duration> {
        let since = Instant::now();
        let look = async {
            while self.left(way).await? == before {
                tokio::task::yield_now().await;
            }
            anyhow::Ok(since.elapsed())
        };
        timeout(WITHIN, look).await.context("the owner never heard that the client has left")?
    }
}

async fn text(answer: Response<Incoming>) -> anyhow::Result<String> {
    let status = answer.status();
    let bytes = answer.into_body().collect().await?.to_bytes();
    let text = String::from_utf8(bytes.to_vec())?;
    ensure!(status.is_success(), "{status}: {text}");
    Ok(text)
}

async fn measure(args: &BackhaulArgs) -> anyhow::Result<Found> {
    let mut stage = Stage::start().await?;
    let bytes = u64::from(args.mib) << 20;
    let mut found = Found::default();
    for way in ways() {
        stage.upload(&way, 1).await?;
        let (more_kib, seconds) = stage.cost(stage.upload(&way, bytes), bytes).await?;
        eprintln!("{} {more_kib} KiB {seconds:.2} s", way.upload);
        found.carried.push(Carried { what: way.upload, more_kib, seconds });
        stage.download(&way, 1).await?;
        let (more_kib, seconds) = stage.cost(stage.download(&way, bytes), bytes).await?;
        eprintln!("{} {more_kib} KiB {seconds:.2} s", way.download);
        found.carried.push(Carried { what: way.download, more_kib, seconds });
    }
    for way in ways() {
        leave(&stage, &way, &mut found).await?;
    }
    for way in ways() {
        for is_upload in [true, false] {
            let took = die(&mut stage, &way, is_upload).await?;
            let what = if is_upload { way.upload } else { way.download };
            found.client_hears.push((what, took));
        }
    }
    Ok(found)
}

impl Stage {
    /// Carries a body, and says how many KiB more than before the near task had at most, and how many seconds it took.
    async fn cost(
        &self,
        carry: impl Future<Output = anyhow::Result<u64>>,
        bytes: u64,
    ) -> anyhow::Result<(u64, f64)> {
        let id = self.near.process.id();
        // Sets the peak to what is resident now (proc(5)).
        fs::write(format!("/proc/{id}/clear_refs"), "5").context("the peak cannot be reset")?;
        let before = memory_kib(id, "VmRSS:")?;
        let began = Instant::now();
        let carried = carry.await?;
        let seconds = began.elapsed().as_secs_f64();
        ensure!(carried == bytes, "{carried} of {bytes} bytes arrived");
        Ok((memory_kib(id, "VmHWM:")?.saturating_sub(before), seconds))
    }
}

/// What the kernel says of a process's memory.
fn memory_kib(id: u32, what: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    let line = line.with_context(|| format!("/proc/{id}/status has no {what}"))?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// The client leaves in the middle of a body.
async fn leave(stage: &Stage, way: &Way, found: &mut Found) -> anyhow::Result<()> {
    let before = stage.left(way).await?;
    let (body, parts) = endless();
    let upload = stage.ask(way, &stage.near, "/take", &stage.key, body);
    tokio::select! {
        answer = upload => bail!("{:?} in the middle of a body", answer?.status()),
        sent = parts.sent(PARTS) => sent?,
    }
    found.owner_hears.push((way.upload, stage.until_left(way, before).await?));
    let before = stage.left(way).await?;
    let path = format!("/give/{}", 1_u64 << 40);
    let mut answer = stage.ask(way, &stage.near, &path, &stage.key, given(0)).await?;
    answer.body_mut().frame().await.context("it ended")??;
    drop(answer);
    found.owner_hears.push((way.download, stage.until_left(way, before).await?));
    Ok(())
}

/// The owner dies in the middle of a body, and comes back.
async fn die(stage: &mut Stage, way: &Way, is_upload: bool) -> anyhow::Result<Duration> {
    eprintln!("{}: the owner dies", if is_upload { way.upload } else { way.download });
    let took = if is_upload {
        let (body, parts) = endless();
        let uri = format!("http://{}/take", stage.near.address);
        let request = Request::post(uri).header(KEY, &stage.key).body(body)?;
        let mut upload = std::pin::pin!(way.client.request(request));
        tokio::select! {
            answer = &mut upload => bail!("{:?} in the middle of a body", answer?.status()),
            sent = parts.sent(PARTS) => sent?,
        }
        stage.far.process.kill();
        let since = Instant::now();
        // An answer that is none of the owner's, or an error: not a hang, and not an answer of success.
        let answer = timeout(WITHIN, upload).await.context("the client never heard")?;
        ensure!(!answer.is_ok_and(|answer| answer.status().is_success()), "half a body was taken");
        since.elapsed()
    } else {
        let path = format!("/give/{}", 1_u64 << 40);
        let mut answer = stage.ask(way, &stage.near, &path, &stage.key, given(0)).await?;
        answer.body_mut().frame().await.context("it ended")??;
        stage.far.process.kill();
        let since = Instant::now();
        let ends = async {
            loop {
                match answer.body_mut().frame().await {
                    None => bail!("half a body passes for a whole one"),
                    Some(Err(_)) => return Ok(since.elapsed()),
                    Some(Ok(_)) => {}
                }
            }
        };
        timeout(WITHIN, ends).await.context("the client never heard")??
    };
    // It had what it has again: another session, by the same name.
    *stage = Stage::start().await?;
    Ok(took)
}

/// A body without end, and a hand on it.
fn endless() -> (Any, Parts) {
    let (count, counted) = mpsc::channel(1);
    let parts = futures_util::stream::unfold(count, |count| async move {
        // Whoever counts may have heard enough.
        count.send(()).await.ok();
        let part = http_body::Frame::data(Bytes::from_static(&[0; 16 * 1_024]));
        Some((Ok::<_, std::convert::Infallible>(part), count))
    });
    (any(StreamBody::new(parts)), Parts(counted))
}

struct Parts(mpsc::Receiver<()>);

impl Parts {
    /// Waits until so many parts were asked for.
    async fn sent(mut self, count: usize) -> anyhow::Result<()> {
        for _ in 0..count {
            self.0.recv().await.context("the body was let go of")?;
        }
        Ok(())
    }
}

/// 64 MiB: more than all buffers on the way hold, so that it is under way when somebody leaves.
const PARTS: usize = 4_096;
/// How many keys are looked at for one that the far task owns: it has half of them.
const KEYS: usize = 100;
/// How long anything but a large body may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

//! `mandoline bench pause`: what callers notice when every task is down for a while, with their requests held meanwhile.
//!
//! A real cluster runs as child processes: assigners, tasks, two proxies. Callers send an even stream of writes through the
//! proxies. An operator's pause begins; once nothing is in flight all tasks are stopped, are down for a while, and are started
//! again; then the pause is ended and what was held goes on, slowly. Each caller waits for its answer on a connection of its
//! own. Meanwhile others leave while they are held, some behind a megabyte of body, and it is measured how soon the proxy notices.
//!
//! What is let go is seen where it counts, by when its answers come: how many in each second, and for each key in which order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use mandoline_core::flags::{AtEnd, PauseOrder, Scope};
use mandoline_core::pauses::FORGOTTEN_AFTER;
use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::bench::plain::Caller;
use crate::bench::processes::{Cluster, Proxy, ProxyKnows, Task, page};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::failure::Failure;

/// Stops every task for a while behind a pause, and measures what callers notice
///
/// Starts assigners, tasks and two proxies as processes of their own on loopback, with their data in a temporary directory;
/// all of them end with this command. Ends with 1 if a request failed, if a client that left was noticed after more than
/// 300 ms, or if those held were let go out of order, or by more than 10 % faster or slower than was set.
///
/// Example: mandoline bench pause --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct PauseArgs {
    /// How many requests are held, about: they come evenly while the tasks are down
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(20..=8_000))]
    requests: u32,
    /// How long every task is down, in seconds
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=60))]
    down: u32,
    /// Over how long those held are let go, in seconds
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=60))]
    over: u32,
    /// How many clients leave: half of them with nothing, half with a megabyte of body
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    leaves: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: PauseArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(Box::pin(measure(&args))).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    if args.json {
        println!("{}", found.json());
    } else {
        println!("{}", found.text());
    }
    Ok(if found.is_good() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

struct Found {
    held: usize,
    /// Of all requests, held or not.
    failed: usize,
    asked: usize,
    /// From the pause's beginning until nothing was in flight.
    quiet: Duration,
    /// From the first task's stop until all keys were served again.
    down: Duration,
    /// How soon those who left with nothing, and behind a megabyte, were noticed.
    left: [Vec<Duration>; 2],
    /// Requests a second: what was set, and in each second what was.
    set: f64,
    rates: Vec<f64>,
    /// From the first answer of one that was held to the last.
    took: Duration,
    /// Pairs of requests for a key whose answers came the other way round.
    out_of_order: usize,
}

async fn measure(args: &PauseArgs) -> anyhow::Result<Found> {
    room_for_connections()?;
    let cluster = Cluster::start(&std::env::current_exe()?, 3).await?;
    let spec = JobSpec { heartbeat: Duration::from_millis(500), ..JobSpec::new("kv".parse()?) };
    cluster.apply(&(&spec).into(), WITHIN).await?;
    let mut tasks = start_tasks(&cluster)?;
    cluster.served("kv", tasks.len(), WITHIN).await?;
    let proxies = [
        cluster.start_proxy("proxy-1", ProxyKnows::default()).await?,
        cluster.start_proxy("proxy-2", ProxyKnows::default()).await?,
    ];
    // A leader that was elected lately waits to hear of all proxies before it says that nothing is in flight.
    sleep(FORGOTTEN_AFTER).await;
    let every = Duration::from_secs(args.down.into()) / args.requests;
    let load = Load::start(proxies.each_ref().map(|proxy| proxy.address), every);
    sleep(BEFORE).await;

    let began = Instant::now();
    let pause = begin(&cluster).await?;
    until_quiet(&cluster, pause).await?;
    let (quiet, stopped) = (began.elapsed(), Instant::now());
    eprintln!("pause p{pause}: nothing is in flight after {quiet:.1?}; every task stops");
    let down = async {
        for task in &tasks {
            task.process.terminate()?;
        }
        for task in &mut tasks {
            task.process.wait_ended(WITHIN).await?;
        }
        sleep(Duration::from_secs(args.down.into()).saturating_sub(stopped.elapsed())).await;
        let tasks = start_tasks(&cluster)?;
        cluster.served("kv", tasks.len(), WITHIN).await?;
        anyhow::Ok((tasks, stopped.elapsed()))
    };
    let (down, left) = tokio::try_join!(down, leave(&proxies[0], pause, args.leaves))?;
    let (_tasks, down) = down;
    let asked = load.stop();
    let held = until_held(&proxies, pause).await?;
    eprintln!(
        "served again after {down:.1?}, with {held} requests held; they go on over {} s",
        args.over
    );

    let over = Duration::from_secs(args.over.into());
    let ended = Instant::now();
    end(&cluster, pause, over).await?;
    let answers = timeout(over + WITHIN, asked.answers()).await;
    let answers = answers.context("the last answers did not come")?;
    let mut late: Vec<Instant> =
        answers.iter().map(|answer| answer.at).filter(|at| *at > ended).collect();
    late.sort_unstable();
    let (first, last) = (late.first().context("an answer")?, late.last().context("an answer")?);
    Ok(Found {
        held,
        failed: answers.iter().filter(|answer| !answer.is_good).count(),
        asked: answers.len(),
        quiet,
        down,
        left,
        set: held as f64 / over.as_secs_f64(),
        rates: rates(&late, *first, args.over),
        took: *last - *first,
        out_of_order: out_of_order(&answers),
    })
}

/// An even stream of writes, each on a connection of its own.
struct Load {
    stop: watch::Sender<bool>,
    sent: tokio::task::JoinHandle<JoinSet<Asked>>,
}

/// Requests that were sent.
struct Sent {
    sent: tokio::task::JoinHandle<JoinSet<Asked>>,
}

/// A request and its answer.
#[derive(Clone, Copy, Debug)]
struct Asked {
    number: usize,
    at: Instant,
    is_good: bool,
}

impl Load {
    fn start(proxies: [SocketAddr; 2], every: Duration) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let sent = tokio::spawn(async move {
            let mut all = JoinSet::new();
            let mut ticks = interval(every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            for number in 0.. {
                tokio::select! {
                    biased;
                    _ = stopped.changed() => break,
                    _ = ticks.tick() => {}
                }
                let key = number % KEYS;
                // All of a key go by one proxy: two know nothing of each other's order.
                let mut caller = Caller::new(proxies[key % proxies.len()]);
                all.spawn(async move {
                    let body = number.to_string();
                    let asked = caller.ask("PUT", &format!("key-{key}"), body.as_bytes()).await;
                    let is_good = asked.is_ok_and(|answer| answer.status == 204);
                    Asked { number, at: Instant::now(), is_good }
                });
            }
            all
        });
        Self { stop, sent }
    }

    fn stop(self) -> Sent {
        self.stop.send_replace(true);
        Sent { sent: self.sent }
    }
}

impl Sent {
    async fn answers(self) -> Vec<Asked> {
        let mut all = self.sent.await.expect("the load does not panic");
        let mut answers = Vec::with_capacity(all.len());
        while let Some(answer) = all.join_next().await {
            answers.push(answer.expect("a caller does not panic"));
        }
        answers
    }
}

/// How many answers came in each second.
fn rates(answers: &[Instant], first: Instant, seconds: u32) -> Vec<f64> {
    let in_second = |second: u32| {
        let from = first + Duration::from_secs(second.into());
        let within = from..from + Duration::from_secs(1);
        answers.iter().filter(|at| within.contains(at)).count() as f64
    };
    (0..seconds).map(in_second).collect()
}

/// Counts neighbours among the requests for a key whose answers came the other way round.
fn out_of_order(answers: &[Asked]) -> usize {
    let mut by_key: BTreeMap<usize, Vec<Asked>> = BTreeMap::new();
    for answer in answers {
        by_key.entry(answer.number % KEYS).or_default().push(*answer);
    }
    let turned = |mut asked: Vec<Asked>| {
        asked.sort_by_key(|answer| answer.number);
        asked.windows(2).filter(|pair| pair[1].at < pair[0].at).count()
    };
    by_key.into_values().map(turned).sum()
}

fn start_tasks(cluster: &Cluster) -> anyhow::Result<Vec<Task>> {
    (0..TASKS).map(|index| cluster.start_task(&format!("kv-{index}"))).collect()
}

async fn begin(cluster: &Cluster) -> anyhow::Result<u64> {
    let order = PauseOrder {
        scope: Scope { job: Some("kv".parse()?), ..Scope::default() },
        why: "bench".into(),
        lasts: LASTS,
        at_end: AtEnd::GoOn,
        release_over: Duration::ZERO,
    };
    let leader = cluster.leader(WITHIN).await?;
    let request = pb::AddPauseRequest { order: Some((&order).into()) };
    let reply = cluster.admin(leader.index).add_pause(request).await;
    Ok(reply.context("the pause was refused")?.into_inner().id)
}

/// Waits until nothing is in flight in any proxy, as `mandoline pause wait` does.
async fn until_quiet(cluster: &Cluster, id: u64) -> anyhow::Result<()> {
    let quiet = async |cluster: &Cluster| {
        let leader = cluster.leader(WITHIN).await.ok()?;
        let asked = cluster.admin(leader.index).list_pauses(pb::ListPausesRequest { id }).await;
        let progress = asked.ok()?.into_inner().pauses.first()?.progress?;
        // Both must have spoken.
        (progress.quiet && progress.proxies == 2).then_some(())
    };
    cluster.until("nothing to be in flight", WITHIN, quiet).await
}

async fn end(cluster: &Cluster, id: u64, over: Duration) -> anyhow::Result<()> {
    let leader = cluster.leader(WITHIN).await?;
    let over_ms = Some(u64::try_from(over.as_millis())?);
    let ended = cluster.admin(leader.index).end_pause(pb::EndPauseRequest { id, over_ms }).await;
    ended.context("the pause did not end")?;
    Ok(())
}

/// Waits until all that was sent has come to the proxies, and says how many they hold.
async fn until_held(proxies: &[Proxy; 2], pause: u64) -> anyhow::Result<usize> {
    let held = async || {
        let [one, two] = proxies.each_ref().map(|proxy| number(proxy, "pause_held", pause));
        anyhow::Ok(one.await? + two.await?)
    };
    let mut before = held().await?;
    loop {
        // What is on its way through loopback is there long before.
        sleep(Duration::from_millis(200)).await;
        let now = held().await?;
        if now == before {
            return Ok(usize::try_from(now)?);
        }
        before = now;
    }
}

/// Has clients leave while they are held, one after the other, and measures how soon the proxy notices.
async fn leave(proxy: &Proxy, pause: u64, times: u32) -> anyhow::Result<[Vec<Duration>; 2]> {
    let mut found = [vec![], vec![]];
    let head = |method: &str, length: usize| {
        format!("{method} /kv/leaves HTTP/1.1\r\nhost: task\r\ncontent-length: {length}\r\n\r\n")
    };
    let body = vec![b'x'; BODY_BYTES];
    for nth in 0..times {
        let has_body = nth % 2 == 1;
        let (left, holds) = (number(proxy, "pause_left_total", pause).await?, "pause_holds_total");
        let before = number(proxy, holds, pause).await?;
        let mut stream = TcpStream::connect(proxy.address).await?;
        if has_body {
            stream.write_all(head("PUT", body.len()).as_bytes()).await?;
            stream.write_all(&body).await?;
        } else {
            stream.write_all(head("GET", 0).as_bytes()).await?;
        }
        // Others come as well, so that this one is among those that are held for sure only a moment later.
        until_more(proxy, holds, pause, before).await?;
        sleep(Duration::from_millis(20)).await;
        let gone = Instant::now();
        drop(stream);
        until_more(proxy, "pause_left_total", pause, left).await?;
        found[usize::from(has_body)].push(gone.elapsed());
    }
    found.iter_mut().for_each(|lengths| lengths.sort_unstable());
    Ok(found)
}

async fn until_more(proxy: &Proxy, what: &str, pause: u64, before: u64) -> anyhow::Result<()> {
    let more = async {
        while number(proxy, what, pause).await? <= before {
            sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(())
    };
    timeout(WITHIN, more).await.with_context(|| format!("{what} of p{pause} did not grow"))?
}

/// Reads a number of a pause from a proxy's page.
async fn number(proxy: &Proxy, what: &str, pause: u64) -> anyhow::Result<u64> {
    let page = page(proxy.admin, "/metrics").await.context("the proxy shows no metrics")?;
    let start = format!("mandoline_proxy_{what}{{pause=\"p{pause}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(start.as_str()));
    Ok(line.with_context(|| format!("the proxy does not show {what} of p{pause}"))?.parse()?)
}

/// Lets this process and those that it starts have a descriptor for each request that is held, at both ends.
fn room_for_connections() -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("the limit of open files cannot be raised")?;
    if limit.maximum.is_some_and(|most| most < DESCRIPTORS) {
        bail!("no more than {:?} files may be open: {DESCRIPTORS} are needed", limit.maximum);
    }
    Ok(())
}

impl Found {
    /// Says by how much the rate of the worst second was off, of one.
    fn worst(&self) -> f64 {
        self.rates.iter().map(|rate| (rate / self.set - 1.0).abs()).fold(0.0, f64::max)
    }

    fn left_max(&self) -> Duration {
        self.left.iter().flatten().max().copied().unwrap_or_default()
    }

    fn is_good(&self) -> bool {
        self.failed == 0
            && self.out_of_order == 0
            && self.worst() <= 0.1
            && self.left_max() <= Duration::from_millis(300)
    }

    fn json(&self) -> Value {
        let ms = |length: Duration| (length.as_secs_f64() * 1e4).round() / 10.0;
        let left = |lengths: &[Duration]| {
            let at = |share: f64| lengths.get((lengths.len() as f64 * share) as usize);
            json!({
                "p50": at(0.5).copied().map(ms),
                "max": lengths.last().copied().map(ms),
                "clients": lengths.len(),
            })
        };
        json!({
            "asked": self.asked,
            "held": self.held,
            "failed": self.failed,
            "quiet_ms": ms(self.quiet),
            "down_s": self.down.as_secs_f64(),
            "left_ms": {"without_body": left(&self.left[0]), "behind_a_megabyte": left(&self.left[1])},
            "set_rate": self.set,
            "rates": self.rates,
            "off_at_worst": self.worst(),
            "released_over_s": self.took.as_secs_f64(),
            "out_of_order": self.out_of_order,
        })
    }

    fn text(&self) -> String {
        format!(
            "{} of {} requests held while every task was down for {:.1?}: {} failed, {} out of order; let go over {:.2?} at {:.0} a second, off by {:.1} % \
             in the worst second; a client that left was noticed after {:.0?} at most",
            self.held,
            self.asked,
            self.down,
            self.failed,
            self.out_of_order,
            self.took,
            self.set,
            self.worst() * 100.0,
            self.left_max(),
        )
    }
}

const TASKS: usize = 4;
/// So many that each has about ten requests among those held.
const KEYS: usize = 200;
/// What unread would fill every buffer on the way.
const BODY_BYTES: usize = 1_000_000;
/// How long requests go straight through before the pause begins.
const BEFORE: Duration = Duration::from_secs(1);
/// Far longer than all of it takes.
const LASTS: Duration = Duration::from_secs(300);
/// How long a start or a change may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(30);
/// Twice the most that is held.
const DESCRIPTORS: u64 = 20_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_the_other_way_round_are_seen() {
        let now = Instant::now();
        let answer =
            |number, ms| Asked { number, at: now + Duration::from_millis(ms), is_good: true };
        let other = 1;
        let good = [answer(0, 1), answer(KEYS, 2), answer(other, 9), answer(KEYS + other, 10)];
        assert_eq!(out_of_order(&good), 0);
        assert_eq!(out_of_order(&[answer(KEYS, 1), answer(0, 2), answer(2 * KEYS, 3)]), 1);
    }

    #[test]
    fn each_second_has_its_rate() {
        let now = Instant::now();
        let answers: Vec<Instant> = (0..40).map(|n| now + Duration::from_millis(n * 50)).collect();
        assert_eq!(rates(&answers, now, 3), [20.0, 20.0, 0.0]);
    }
}

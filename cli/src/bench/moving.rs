//! `mandoline bench moving`: how many requests notice that the slices of an exclusive job move all the time.
//!
//! The experiment of Slicer's paper (OSDI'16, 4.4.2) on one machine: fifty tasks, each a process of its own, and 25 clients
//! here, each with a clerk of its own, that ask for evenly drawn keys. Meanwhile slices go from task to task,
//! by an operator's pins, each a hand-off that the old owner releases. How much really moved is read from the
//! assignments, slice by slice, and not from what was ordered.
//!
//! Load is open: a request is due at its time whatever became of those before it, and its latency counts from when it was
//! due. A client does with a refusal what the library does: `Tries` says whom to ask next, and when.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use mandoline::clerk::Clerk;
use mandoline::tries::Tries;
use mandoline_core::assignment::{Assignment, Replica};
use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;
use mandoline_core::slice::Slice;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_core::task::SessionId;
use mandoline_proto::pb;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::bench::plain::{Answer, Caller};
use crate::bench::processes::{Cluster, Task};
use crate::bench::trial::{STOPPED, until_stopped};
use crate::drive::histogram::Histogram;
use crate::failure::Failure;

/// Moves slices of an exclusive job all the time under load, and measures how many requests notice
///
/// Starts assigners and tasks as processes of their own on loopback, with their data in a temporary directory; all of them
/// end with this command. Ends with 1 if a request failed.
///
/// Example: mandoline bench moving --rate 5000 --json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct MovingArgs {
    /// How many tasks serve
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(2..=100))]
    tasks: u8,
    /// How many clients ask, each with a clerk of its own
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u8).range(1..=100))]
    clients: u8,
    /// Requests a second, of all clients
    #[arg(long, default_value_t = 10_000, value_name = "PER_SECOND", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Slices that are ordered to another task each second; 0 to compare with
    #[arg(long, default_value_t = 16, value_name = "PER_SECOND", value_parser = clap::value_parser!(u8).range(0..=100))]
    moves: u8,
    /// For how many seconds it is measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=3_600))]
    seconds: u16,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: MovingArgs) -> Result<ExitCode, Failure> {
    let Some(found) = until_stopped(measure(&args)).await? else {
        return Ok(ExitCode::from(STOPPED));
    };
    if args.json {
        println!("{}", found.json());
    } else {
        println!("{}", found.text());
    }
    Ok(if found.tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

async fn measure(args: &MovingArgs) -> anyhow::Result<Findings> {
    let cluster = Cluster::start(&std::env::current_exe()?, 3).await?;
    let spec = JobSpec {
        consistency: Consistency::Exclusive,
        // A pin is obeyed by the next round.
        balance_every: Duration::from_millis(500),
        ..JobSpec::new("kv".parse()?)
    };
    cluster.apply(&(&spec).into(), START_WITHIN).await?;
    let tasks: Vec<Task> = (0..args.tasks)
        .map(|index| cluster.start_task(&format!("kv-{index}")))
        .collect::<Result<_, _>>()?;
    cluster.served("kv", tasks.len(), START_WITHIN).await?;
    let clerks: Vec<Clerk> = (0..args.clients)
        .map(|client| {
            let named = format!("client-{client}");
            Clerk::builder("kv")
                .sources(cluster.addresses())
                .named(named)
                .start()
                .map_err(anyhow::Error::from)
        })
        .collect::<Result<_, _>>()?;
    for clerk in &clerks {
        timeout(START_WITHIN, clerk.ready()).await.context("a client knows no assignment")?;
    }
    let mut mover = Mover::new(&clerks[0], args.moves);
    let tally = Arc::<Mutex<Tally>>::default();
    let mut clients = Clients::start(&clerks, args, &tally);
    until_all_own(&clerks[0], tasks.len()).await?;
    eprintln!("{} tasks own their part; {} clients ask", tasks.len(), clerks.len());
    // What met the start has come to an end after this.
    sleep(PATIENCE).await;
    drop(take(&tally));
    let mut found = Findings { tasks: tasks.len(), clients: clerks.len(), ..Findings::default() };
    let (began, busy) = (Instant::now(), processor_time());
    let seen = Seen::new(&clerks[0])?;
    for second in 1..=u32::from(args.seconds) {
        let end = began + Duration::from_secs(second.into());
        tokio::select! {
            () = mover.until(end, &cluster) => {},
            ended = clients.0.join_next() => bail!("a client ended: {ended:?}"),
        }
        let moved = seen.take();
        let of_second = take(&tally);
        eprintln!(
            "second {second}: {} requests, {} not at first try, {} failed; {} slices with {:.2} % of the keys moved",
            of_second.requests,
            of_second.requests - of_second.at_first,
            of_second.failed,
            moved.slices,
            moved.share * 100.0
        );
        found.tally.add(&of_second);
        found.moved.push(moved);
    }
    found.seconds = began.elapsed().as_secs_f64();
    found.busy = busy.zip(processor_time()).map(|(before, after)| after.busy_since(before));
    Ok(found)
}

/// Waits until no task owns more than twice its part, and nothing is on its way.
async fn until_all_own(clerk: &Clerk, tasks: usize) -> anyhow::Result<()> {
    let mut changes = clerk.changes();
    let even = |newest: &Option<Arc<Assignment>>| {
        let Some(assignment) = newest else { return false };
        let mut owned: BTreeMap<SessionId, f64> = BTreeMap::new();
        for (slice, assigned) in assignment.slices.iter() {
            let owner = assigned.replicas.as_slice().first();
            let Some(owner) = owner.filter(|_| assigned.transit.is_none()) else { return false };
            *owned.entry(owner.session).or_default() += width(slice);
        }
        let most = owned.values().fold(0.0_f64, |most, width| most.max(*width));
        owned.len() == tasks && most * tasks as f64 <= 2.0
    };
    timeout(EVEN_WITHIN, changes.wait_for(even))
        .await
        .with_context(|| format!("the load was not even within {EVEN_WITHIN:?}"))?
        .context("the clerk ended")?;
    Ok(())
}

/// The share of all keys that lie in a slice.
fn width(slice: Slice) -> f64 {
    slice.width() as f64 / 2_f64.powi(64)
}

/// Orders slices to other tasks, one after another.
struct Mover {
    clerk: Clerk,
    every: Option<Duration>,
    due: Instant,
    // Where to look next, as a part of the key space: the golden ratio spreads them evenly, however many there are.
    at: f64,
    prng: Prng,
    // The oldest first. A slice that has moved may stay or go on, as the balancer likes.
    pinned: VecDeque<Slice>,
}

impl Mover {
    fn new(clerk: &Clerk, moves: u8) -> Self {
        let every = (moves > 0).then(|| Duration::from_secs(1) / u32::from(moves.max(1)));
        let (clerk, prng, pinned) = (clerk.clone(), Prng::new(1), VecDeque::new());
        Self { clerk, every, due: Instant::now(), at: 0.0, prng, pinned }
    }

    /// Orders what is due before a moment, and waits for that.
    async fn until(&mut self, end: Instant, cluster: &Cluster) {
        if let Some(every) = self.every {
            // What was due before the measuring began is not caught up with.
            self.due = self.due.max(end - Duration::from_secs(1));
            while self.due < end {
                sleep_until(self.due).await;
                self.due += every;
                // Where the lead changes, or the leader is slow, there are fewer moves, and the figures show it.
                let ordered = timeout(ORDER_WITHIN, self.order(cluster)).await;
                match ordered {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => eprintln!("an order failed: {error:#}"),
                    Err(_) => eprintln!("an order took longer than {ORDER_WITHIN:?}"),
                }
            }
        }
        sleep_until(end).await;
    }

    async fn order(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        let leader = cluster.leader(ORDER_WITHIN).await?;
        let mut admin = cluster.admin(leader.index);
        let job = || "kv".to_owned();
        if self.pinned.len() >= PINS {
            let slice = self.pinned.pop_front().map(Into::into);
            admin.unpin_slice(pb::UnpinSliceRequest { job: job(), slice }).await?;
        }
        let (slice, task) = self.next()?;
        let order = pb::PinSliceRequest { job: job(), slice: Some(slice.into()), task };
        // Noted before it is known: an order whose answer is lost may hold.
        self.pinned.push_back(slice);
        admin.pin_slice(order).await?;
        Ok(())
    }

    /// Chooses the next slice that is not pinned, and a task that does not own it.
    fn next(&mut self) -> anyhow::Result<(Slice, String)> {
        let assignment = self.clerk.assignment().context("the clerk knows an assignment")?;
        let look = || {
            self.at = (self.at + 0.618_034) % 1.0;
            let (slice, assigned) = assignment.get(SliceKey((self.at * 2_f64.powi(64)) as u64));
            let is_free = self.pinned.iter().all(|pinned| pinned.overlap(slice).is_none());
            is_free.then_some((slice, assigned))
        };
        let free = std::iter::repeat_with(look).take(LOOKS).flatten().next();
        let (slice, assigned) = free.context("there are too few slices to move: try more tasks")?;
        let owner = assigned.replicas.as_slice().first().map(|replica| replica.session);
        let others: Vec<_> =
            assignment.tasks.iter().filter(|(session, _)| Some(**session) != owner).collect();
        let chosen = self.prng.below(others.len().max(1) as u64) as usize;
        let (_, task) = others.get(chosen).context("there is another task")?;
        Ok((slice, task.info.name.to_string()))
    }
}

/// What moved in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Moved {
    slices: u64,
    /// Of all keys, and so of the load: keys are drawn evenly.
    share: f64,
}

/// Compares each assignment with the one before.
struct Seen {
    moved: Arc<Mutex<Moved>>,
    _watching: JoinSet<()>,
}

impl Seen {
    fn new(clerk: &Clerk) -> anyhow::Result<Self> {
        let mut before = clerk.assignment().context("the clerk knows an assignment")?;
        let moved = Arc::<Mutex<Moved>>::default();
        let mut watching = JoinSet::new();
        let (mut changes, sums) = (clerk.changes(), Arc::clone(&moved));
        watching.spawn(async move {
            while changes.changed().await.is_ok() {
                let newest = changes.borrow_and_update().clone();
                let Some(newest) = newest else { continue };
                let more = moved_between(&before, &newest);
                let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
                sums.slices += more.slices;
                sums.share += more.share;
                before = newest;
            }
        });
        Ok(Self { moved, _watching: watching })
    }

    fn take(&self) -> Moved {
        std::mem::take(&mut *self.moved.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Counts the slices whose owner is another one, and their keys.
fn moved_between(before: &Assignment, after: &Assignment) -> Moved {
    let owner = |replicas: &[Replica]| replicas.first().map(|r| r.session);
    let mut moved = Moved::default();
    for (slice, assigned) in after.slices.iter() {
        let now = owner(assigned.replicas.as_slice());
        let other = before
            .slices
            .touching(slice)
            .filter(|(_, was)| now.is_some() && owner(was.replicas.as_slice()) != now)
            .filter_map(|(was, _)| was.overlap(slice));
        let share: f64 = other.map(width).sum();
        moved.slices += u64::from(share > 0.0);
        moved.share += share;
    }
    moved
}

/// What became of the requests.
#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    /// Taken by the first task that was asked.
    at_first: u64,
    /// Answered within `SOON` of being due.
    soon: u64,
    /// The one or the other.
    good: u64,
    failed: u64,
    latency: Histogram,
    /// Of those that the first task did not take.
    again: Histogram,
    /// How late requests went out: a busy machine's doing, or the driver's.
    late: Histogram,
    errors: BTreeMap<String, u64>,
}

impl Tally {
    fn add(&mut self, more: &Self) {
        self.requests += more.requests;
        self.at_first += more.at_first;
        self.soon += more.soon;
        self.good += more.good;
        self.failed += more.failed;
        self.latency.add(&more.latency);
        self.again.add(&more.again);
        self.late.add(&more.late);
        for (error, times) in &more.errors {
            *self.errors.entry(error.clone()).or_default() += times;
        }
    }
}

fn take(tally: &Mutex<Tally>) -> Tally {
    std::mem::take(&mut *tally.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Clients under way. Dropping them ends them.
struct Clients(JoinSet<()>);

impl Clients {
    fn start(clerks: &[Clerk], args: &MovingArgs, tally: &Arc<Mutex<Tally>>) -> Self {
        let each = Duration::from_secs_f64(clerks.len() as f64 / f64::from(args.rate));
        let mut all = JoinSet::new();
        for (nth, clerk) in clerks.iter().enumerate() {
            let client = Arc::new(Client {
                clerk: clerk.clone(),
                idle: Mutex::default(),
                tally: Arc::clone(tally),
            });
            // They do not all ask at the same moment.
            let first = Instant::now() + each.mul_f64(nth as f64 / clerks.len() as f64);
            all.spawn(client.ask_on(first, each, Prng::new(nth as u64)));
        }
        Self(all)
    }
}

struct Client {
    clerk: Clerk,
    // As many as were in use at once, at most.
    idle: Mutex<BTreeMap<SocketAddr, Vec<Caller>>>,
    tally: Arc<Mutex<Tally>>,
}

impl Client {
    async fn ask_on(self: Arc<Self>, first: Instant, each: Duration, mut prng: Prng) {
        let mut asking = JoinSet::new();
        let room = Arc::new(Semaphore::new(IN_FLIGHT));
        let mut due = first;
        loop {
            sleep_until(due).await;
            let permit = Arc::clone(&room).acquire_owned().await.expect("it is never closed");
            let (client, key, was_due) = (Arc::clone(&self), prng.below(KEYS), due);
            asking.spawn(async move {
                client.ask(key, was_due).await;
                drop(permit);
            });
            while asking.try_join_next().is_some() {}
            due += each;
        }
    }

    /// Asks until somebody answers, as the library says, and notes what came of it.
    async fn ask(&self, key: u64, due: Instant) {
        let key = format!("key-{key}");
        let late = due.elapsed();
        let (mut tried, mut error) = (0, None);
        let mut tries = Tries::new(&self.clerk, SliceKey::of(key.as_bytes()), PATIENCE);
        loop {
            let target = match tries.next().await {
                Ok(target) => target,
                Err(gave_up) => {
                    error = Some(gave_up.to_string().replace(&key, "KEY"));
                    break;
                }
            };
            tried += 1;
            let address: Result<SocketAddr, _> = target.address().as_str().parse();
            drop(target);
            let Ok(address) = address else {
                error = Some("a task's address is no socket's".to_owned());
                break;
            };
            match self.send(address, &key).await {
                Err(_) => tries.unreached(),
                Ok(answer) if answer.is_served() => break,
                Ok(answer) => match answer.refusal() {
                    Some(refusal) => tries.refused(refusal),
                    None => {
                        error = Some(format!("status {}", answer.status));
                        break;
                    }
                },
            }
        }
        let took = due.elapsed();
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.requests += 1;
        tally.late.record(late);
        match error {
            Some(error) => {
                tally.failed += 1;
                *tally.errors.entry(error).or_default() += 1;
            }
            None => {
                let (at_first, soon) = (tried == 1, took <= SOON);
                tally.at_first += u64::from(at_first);
                tally.soon += u64::from(soon);
                tally.good += u64::from(at_first || soon);
                tally.latency.record(took);
                if !at_first {
                    tally.again.record(took);
                }
            }
        }
    }

    async fn send(&self, address: SocketAddr, key: &str) -> anyhow::Result<Answer> {
        let idle = self.lock().get_mut(&address).and_then(Vec::pop);
        let mut caller = idle.unwrap_or_else(|| Caller::new(address));
        let answer = timeout(PATIENCE, caller.ask("GET", key, &[])).await;
        let answer = answer.map_err(|_| anyhow!("no answer within {PATIENCE:?}"))??;
        self.lock().entry(address).or_default().push(caller);
        Ok(answer)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Vec<Caller>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Findings {
    tasks: usize,
    clients: usize,
    seconds: f64,
    tally: Tally,
    moved: Vec<Moved>,
    /// How busy the machine was with all that it did.
    busy: Option<f64>,
}

impl Findings {
    fn share(&self, of: u64) -> f64 {
        of as f64 / self.tally.requests.max(1) as f64
    }

    /// The mean and the least of a second.
    fn a_second(&self, of: impl Fn(&Moved) -> f64) -> (f64, f64) {
        let sum: f64 = self.moved.iter().map(&of).sum();
        let least = self.moved.iter().map(of).fold(f64::INFINITY, f64::min);
        (sum / self.moved.len().max(1) as f64, least)
    }

    fn json(&self) -> Value {
        let ms = |of: &Histogram, share: f64| of.quantile(share).as_secs_f64() * 1e3;
        let spread = |of: &Histogram| {
            json!({
                "p50": ms(of, 0.5), "p99": ms(of, 0.99), "p999": ms(of, 0.999),
                "max": of.max().as_secs_f64() * 1e3,
            })
        };
        let (slices, slices_least) = self.a_second(|moved| moved.slices as f64);
        let (share, share_least) = self.a_second(|moved| moved.share);
        let tally = &self.tally;
        json!({
            "tasks": self.tasks,
            "clients": self.clients,
            "seconds": self.seconds,
            "requests": tally.requests,
            "requests_per_s": tally.requests as f64 / self.seconds,
            "failed": tally.failed,
            "errors": tally.errors,
            "at_first_try": self.share(tally.at_first),
            "within_50_ms": self.share(tally.soon),
            "at_first_try_or_within_50_ms": self.share(tally.good),
            "not_so": tally.requests - tally.good,
            "latency_ms": spread(&tally.latency),
            "retried": tally.again.count(),
            "retried_latency_ms": spread(&tally.again),
            "sent_late_ms": spread(&tally.late),
            "moves_per_s": { "mean": slices, "least": slices_least },
            "load_moved_per_s": { "mean": share, "least": share_least },
            "machine_busy": self.busy,
        })
    }

    fn text(&self) -> String {
        let percent = |of: u64| format!("{:.3} %", self.share(of) * 100.0);
        let tally = &self.tally;
        let (slices, _) = self.a_second(|moved| moved.slices as f64);
        let (share, _) = self.a_second(|moved| moved.share);
        let at = |share: f64| tally.latency.quantile(share).as_secs_f64() * 1e3;
        let mut text = format!(
            "{} requests in {:.1} s while {slices:.1} slices with {:.2} % of the load moved each second\n\
             satisfied at first try {}, within 50 ms {}, the one or the other {}; failed: {}\n\
             latency p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms",
            tally.requests,
            self.seconds,
            share * 100.0,
            percent(tally.at_first),
            percent(tally.soon),
            percent(tally.good),
            tally.failed,
            at(0.5),
            at(0.99),
            at(0.999),
        );
        for (error, times) in &tally.errors {
            text.push_str(&format!("\n{times} times: {error}"));
        }
        text
    }
}

/// What the machine's processors did since it was started, in ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct ProcessorTime {
    all: u64,
    idle: u64,
}

impl ProcessorTime {
    fn busy_since(self, before: Self) -> f64 {
        let (all, idle) = (self.all - before.all, self.idle - before.idle);
        1.0 - idle as f64 / all.max(1) as f64
    }
}

/// Reads it where the system tells (Linux).
fn processor_time() -> Option<ProcessorTime> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    // cpu  user nice system idle iowait irq softirq steal guest guest_nice; guests are in user and nice.
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|n| n.parse().ok()).collect();
    Some(ProcessorTime { all: ticks.iter().sum(), idle: ticks.get(3)? + ticks.get(4)? })
}

/// Slices that are held where they were ordered to: so few of them that there is always another one to move.
const PINS: usize = 20;
/// How long an order may take: the next ones wait meanwhile.
const ORDER_WITHIN: Duration = Duration::from_secs(1);
/// How often one is looked for.
const LOOKS: usize = 1_000;
/// Keys that are asked for: many to each slice.
const KEYS: u64 = 1_000_000;
/// What the claim calls soon.
const SOON: Duration = Duration::from_millis(50);
/// Requests of a client under way: past that it waits, and is late.
const IN_FLIGHT: usize = 1_000;
/// What a client waits for a request.
const PATIENCE: Duration = Duration::from_secs(5);
/// Fifty processes take their time to start on two cores.
const START_WITHIN: Duration = Duration::from_secs(60);
/// How long newcomers may take to be filled.
const EVEN_WITHIN: Duration = Duration::from_secs(120);

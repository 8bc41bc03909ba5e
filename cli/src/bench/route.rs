//! `mandoline bench route`: nanoseconds from a key to the task that serves it, beside what a user would take instead.
//!
//! Every contender finds one of 50 tasks for the same keys of 16 bytes, more of them than the second-level cache holds. They take turns
//! in short batches, and each is charged its thread's processor time, so that what else runs on the machine hits them alike. The
//! figure of each is the median of its batches.
//!
//! What others hash by costs more than what they look up in, so each is measured twice: as it is shipped, and given the same
//! XXH3 hash. Their crates are here only with `--features bench`.

#[cfg(feature = "bench")]
mod peers;

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use mandoline::{Assignment, Clerk};
use mandoline_core::assignment::{Assigned, Replica};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, json};

use crate::failure::Failure;
use crate::stop;

/// How many tasks serve.
const TASKS: u64 = 50;
/// How many keys are asked for: 1 MiB of them.
const KEYS: usize = 1 << 16;

/// Measures how long a look-up takes, beside the crates that a user would take instead
///
/// The others are built in only with a feature, since nothing else needs them:
///
///     cargo run --release --features bench -- bench route
///
/// Ends with 1 if a goal is missed: 1.1 times the best of them given the same hash, half the best as shipped.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct RouteArgs {
    /// How many batches each contender runs, in turns; the median counts
    #[arg(long, default_value_t = 101, value_parser = clap::value_parser!(u16).range(3..=10_000))]
    batches: u16,
    /// How many slices the assignment has
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    slices: u32,
    /// Ends with one JSON object on a line; the rest goes to stderr
    #[arg(long)]
    json: bool,
}

/// Who takes part, and by whose hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Mandoline, from a key of 16 bytes.
    Ours,
    /// Mandoline in another way.
    Variant,
    /// Someone else, given the same XXH3 hash.
    #[cfg_attr(not(feature = "bench"), expect(dead_code, reason = "peers come with a feature"))]
    PeerXxh3,
    /// Someone else, as shipped.
    #[cfg_attr(not(feature = "bench"), expect(dead_code, reason = "peers come with a feature"))]
    PeerShipped,
}

type Key = [u8; 16];
/// Finds the tasks of these keys, and adds them up.
type Batch = dyn FnMut(&[Key]) -> u64;

/// Whoever finds a task for a key. Gives a number that depends on it, so that nothing is left out.
struct Contender {
    name: &'static str,
    kind: Kind,
    batch: Box<Batch>,
    nanos: Vec<f64>,
}

impl Contender {
    fn new(name: &'static str, kind: Kind, mut find: impl FnMut(&Key) -> u64 + 'static) -> Self {
        // The loop is compiled with the look-up in it: one call of a pointer a batch.
        let batch = move |keys: &[Key]| {
            keys.iter().fold(0_u64, |all, key| all.wrapping_add(black_box(find(key))))
        };
        Self { name, kind, batch: Box::new(batch), nanos: Vec::new() }
    }

    fn run(&mut self, keys: &[Key]) {
        // Whoever had its turn before has filled the caches with what is its own.
        black_box((self.batch)(keys));
        let begun = processor_nanos();
        black_box((self.batch)(keys));
        self.nanos.push((processor_nanos() - begun) as f64 / keys.len() as f64);
    }

    fn median(&self) -> f64 {
        let mut sorted = self.nanos.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}

/// What this thread has used of the processor.
fn processor_nanos() -> u64 {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64
}

/// Runs until done, or told to stop.
pub(crate) async fn run(args: RouteArgs) -> Result<ExitCode, Failure> {
    let stop = stop::on_signal()?;
    // On a thread of its own: nobody else takes turns there.
    let measuring = tokio::task::spawn_blocking(move || measure(&args));
    tokio::select! {
        ended = measuring => Ok(ended.expect("measuring does not panic")),
        () = stop.cancelled() => std::process::exit(130),
    }
}

fn measure(args: &RouteArgs) -> ExitCode {
    let keys = keys();
    let mut contenders = ours(args.slices);
    #[cfg(feature = "bench")]
    contenders.extend(peers::all(TASKS));
    #[cfg(not(feature = "bench"))]
    eprintln!(
        "only Mandoline is measured: for the others run cargo run --release --features bench -- bench route"
    );
    for _ in 0..args.batches {
        contenders.iter_mut().for_each(|contender| contender.run(&keys));
    }
    let best = |kind: Kind| {
        let of_kind = contenders.iter().filter(|contender| contender.kind == kind);
        of_kind.map(Contender::median).min_by(f64::total_cmp)
    };
    let mandoline = best(Kind::Ours).expect("it takes part");
    #[cfg(feature = "bench")]
    let peers = (best(Kind::PeerXxh3), best(Kind::PeerShipped));
    #[cfg(not(feature = "bench"))]
    let peers: (Option<f64>, Option<f64>) = (None, None);
    let (xxh3, shipped) = peers;
    let ratio = |peer: Option<f64>| peer.map(|peer| mandoline / peer);
    let table = |text: &str| if args.json { eprint!("{text}") } else { print!("{text}") };
    for contender in &contenders {
        table(&format!("{:<44} {:>7.2} ns\n", contender.name, contender.median()));
    }
    for (what, ratio, goal) in
        [("given the same hash", ratio(xxh3), 1.1), ("as shipped", ratio(shipped), 0.5)]
    {
        if let Some(ratio) = ratio {
            table(&format!("{ratio:.2} times the best of the others {what} (goal {goal})\n"));
        }
    }
    if args.json {
        let all: Map<_, _> = contenders
            .iter()
            .map(|contender| (contender.name.to_owned(), json!(rounded(contender.median()))))
            .collect();
        let found = json!({
            "mandoline_ns": rounded(mandoline),
            "peers_xxh3_ns": xxh3.map(rounded),
            "peers_shipped_ns": shipped.map(rounded),
            "slices": args.slices,
            "all": all,
        });
        println!("{found}");
    }
    let is_met = ratio(xxh3).is_none_or(|ratio| ratio <= 1.1)
        && ratio(shipped).is_none_or(|ratio| ratio <= 0.5);
    if is_met { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn rounded(nanos: f64) -> f64 {
    (nanos * 100.0).round() / 100.0
}

fn keys() -> Vec<Key> {
    let mut prng = Prng::new(7);
    let mut key = || {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&prng.bits().to_le_bytes());
        key[8..].copy_from_slice(&prng.bits().to_le_bytes());
        key
    };
    (0..KEYS).map(|_| key()).collect()
}

/// Slices that begin at random places, spread over the tasks.
fn assignment(slices: u32) -> Arc<Assignment> {
    let generation = Generation { incarnation: 1, number: 1 };
    let mut prng = Prng::new(u64::from(slices));
    let mut made = Assignment::new("bench".parse().expect("a name"), generation);
    for id in 1..=TASKS {
        let address = format!("10.0.0.{id}:80").parse().expect("an address");
        let info = TaskInfo::new(format!("t{id}").parse().expect("a name"), id, address);
        let task = Task::new(SessionId(id), info);
        made.tasks.insert(task.session, Arc::new(task));
    }
    let mut firsts: Vec<u64> = (1..slices).map(|_| prng.bits()).chain([0]).collect();
    firsts.sort_unstable();
    firsts.dedup();
    let run = |first| {
        let session = SessionId(1 + prng.below(TASKS));
        let replicas = [Replica { session, since: generation }].into_iter().collect();
        (SliceKey(first), Assigned { replicas, ..Assigned::default() })
    };
    made.slices = SliceMap::from_runs(firsts.into_iter().map(run).collect()).expect("sorted");
    Arc::new(made)
}

fn ours(slices: u32) -> Vec<Contender> {
    let clerk = Clerk::frozen(assignment(slices));
    let (mut router, mut hashed) = (clerk.router(), clerk.router());
    let place = |key: &Key| {
        let (first, _) = key.split_first_chunk().expect("16 bytes begin with eight");
        SliceKey(u64::from_le_bytes(*first))
    };
    vec![
        Contender::new("Router, key of 16 bytes", Kind::Ours, move |key| {
            router.route(key).expect("a task").session().0
        }),
        Contender::new("Router, hashed key", Kind::Variant, move |key| {
            hashed.route_at(place(key)).expect("a task").session().0
        }),
        Contender::new("Clerk, key of 16 bytes", Kind::Variant, move |key| {
            clerk.route(key).expect("a task").session().0
        }),
        Contender::new("XXH3 alone", Kind::Variant, |key| SliceKey::of(key).0),
    ]
}

//! Every node is killed at a random moment while changes are made, again and again: what was acknowledged is there after each
//! start, and generations only grow.
//!
//! `MANDOLINE_KILLS` says how often, 12 if it is not set; `MANDOLINE_SEED` repeats the moments of a run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mandoline::clerk::Clerk;
use mandoline::{Assignment, Generation};
use mandoline_core::prng::Prng;
use mandoline_core::spec::{Band, JobSpec, Ratio};
use mandoline_proto::pb;
use mandoline_proto::pb::admin_client::AdminClient;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request as Asked;
use mandoline_proto::pb::tasks_client::TasksClient;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::callers::{PATIENCE, my_turn, number, program};
use crate::processes::Cluster;

/// What was acknowledged, by whoever wrote it.
#[derive(Debug, Default)]
struct Acknowledged {
    /// Of each job: the version and spec that were acknowledged last, and specs that were sent since and may have made it.
    jobs: BTreeMap<String, (u64, pb::JobSpec, Vec<pb::JobSpec>)>,
    changes: u64,
    /// Of job `tasks`: session and name.
    sessions: BTreeMap<u64, String>,
}

type Notes = Arc<Mutex<Acknowledged>>;

/// Makes jobs, and changes them once there are `JOBS`.
async fn write_jobs(writer: usize, admins: Vec<AdminClient<Channel>>, notes: Notes) {
    for turn in 0.. {
        let name = format!("w{writer}-{}", turn % JOBS);
        let spec = JobSpec {
            band: Band::Adaptive(Ratio::from_millionths(100_000 + turn as u32)),
            ..JobSpec::new(name.parse().unwrap())
        };
        let spec = pb::JobSpec::from(&spec);
        if let Some((_, _, sent)) = notes.lock().unwrap().jobs.get_mut(&name) {
            sent.push(spec.clone());
        }
        let mut admin = admins[(turn + writer) % admins.len()].clone();
        let request = pb::ApplyJobRequest { spec: Some(spec.clone()), if_version: None };
        // Of a call that failed nobody knows whether it was done: it may be there or not.
        if let Ok(Ok(reply)) = timeout(CALL_WITHIN, admin.apply_job(request)).await {
            let mut notes = notes.lock().unwrap();
            notes.changes += 1;
            notes.jobs.insert(name, (reply.into_inner().version, spec, vec![]));
        }
        sleep(PAUSE).await;
    }
}

/// Registers one task after the other, as a process does that then falls silent.
async fn register_tasks(channels: Vec<Channel>, notes: Notes) {
    let mut at = 0;
    for number in 0..TASKS {
        let info = pb::TaskInfo {
            name: format!("t-{number}"),
            incarnation: number + 1,
            address: format!("127.0.0.1:{}", 1 + number),
            ..pb::TaskInfo::default()
        };
        let register = pb::Register {
            job: "tasks".to_owned(),
            info: Some(info.clone()),
            ..pb::Register::default()
        };
        let first = pb::SessionRequest { request: Some(Asked::Register(register)) };
        let mut client = TasksClient::new(channels[at].clone());
        let asked = async {
            let requests = tokio_stream::iter([first]);
            let mut replies = client.session(requests).await.ok()?.into_inner();
            replies.message().await.ok()??.reply
        };
        match timeout(CALL_WITHIN, asked).await {
            Ok(Some(Reply::Attached(attached))) => {
                notes.lock().unwrap().sessions.insert(attached.session, info.name);
            }
            // Another leads, or nobody does.
            _ => at = (at + 1) % channels.len(),
        }
        sleep(10 * PAUSE).await;
    }
}

/// Assignments that were shown to anyone: who serves what, by generation.
#[derive(Debug, Default)]
struct Shown {
    by_generation: BTreeMap<Generation, String>,
}

impl Shown {
    /// Notes an assignment, and fails if another was shown under its generation.
    fn note(&mut self, assignment: &Assignment) {
        let tasks: Vec<_> = assignment.tasks.keys().collect();
        let slices: Vec<_> = assignment
            .slices
            .iter()
            .map(|(slice, assigned)| (slice, &assigned.replicas, assigned.token))
            .collect();
        let text = format!("{tasks:?} {slices:?}");
        let first = self.by_generation.entry(assignment.generation).or_insert_with(|| text.clone());
        assert_eq!(*first, text, "two assignments of generation {}", assignment.generation);
    }

    fn newest(&self) -> Option<Generation> {
        self.by_generation.keys().next_back().copied()
    }
}

/// Watches, as callers do, until told to stop.
async fn watch(
    cluster: &Cluster,
    shown: &Arc<Mutex<Shown>>,
    stop: CancellationToken,
) -> JoinSet<()> {
    let mut watching = JoinSet::new();
    for address in cluster.addresses() {
        let clerk = Clerk::builder("tasks").sources([address]).start().unwrap();
        let (shown, stop) = (Arc::clone(shown), stop.clone());
        watching.spawn(async move {
            let mut changes = clerk.changes();
            loop {
                if let Some(assignment) = changes.borrow_and_update().clone() {
                    shown.lock().unwrap().note(&assignment);
                }
                tokio::select! {
                    changed = changes.changed() => changed.unwrap(),
                    () = stop.cancelled() => return,
                }
            }
        });
    }
    watching
}

/// Compares what a node has with what was acknowledged.
async fn check(cluster: &Cluster, index: usize, notes: &Notes, shown: &Mutex<Shown>) {
    // First what must be there, then what is: what is acknowledged in between may be there too.
    let (jobs, sessions, newest) = {
        let (notes, shown) = (notes.lock().unwrap(), shown.lock().unwrap());
        (notes.jobs.clone(), notes.sessions.clone(), shown.newest())
    };
    let status = cluster.status(index).await.unwrap();
    let found: BTreeMap<&str, &pb::JobStatus> = status
        .jobs
        .iter()
        .map(|job| (job.spec.as_ref().map_or("", |spec| spec.name.as_str()), job))
        .collect();
    let node = index + 1;
    for (name, (version, spec, sent)) in &jobs {
        let job = found.get(name.as_str());
        let job = job
            .unwrap_or_else(|| panic!("node {node} has no job {name}, acknowledged at {version}"));
        let known = job.spec.as_ref().unwrap();
        let good = match job.version.cmp(version) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => known == spec,
            // A change that nobody heard of, or one that was made while this looked.
            std::cmp::Ordering::Greater => {
                let now = notes.lock().unwrap().jobs[name].clone();
                sent.contains(known) || now.1 == *known || now.2.contains(known)
            }
        };
        assert!(
            good,
            "node {node} has {job:?}, and {spec:?} was acknowledged as version {version}"
        );
    }
    let tasks = found["tasks"];
    let here: BTreeMap<u64, &str> = tasks
        .tasks
        .iter()
        .filter_map(|task| task.task.as_ref())
        .map(|task| (task.session, task.info.as_ref().map_or("", |info| info.name.as_str())))
        .collect();
    for (session, name) in &sessions {
        assert_eq!(here.get(session), Some(&name.as_str()), "node {node}: session {session}");
    }
    let generation = tasks.generation.map(Generation::from);
    assert!(generation >= newest, "node {node} is at {generation:?}, and {newest:?} was shown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_death_of_every_node() {
    let _turn = my_turn().await;
    let kills = number("MANDOLINE_KILLS", 12);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number("MANDOLINE_SEED", now.subsec_nanos().into());
    println!("MANDOLINE_SEED={seed}");
    let mut prng = Prng::new(seed);

    let mut cluster = Cluster::start(program(), 3).await.unwrap();
    // Nobody is missed for an hour, so every session that was acknowledged must stay.
    let spec = JobSpec {
        heartbeat: Duration::from_secs(3_600),
        balance_every: Duration::from_millis(200),
        ..JobSpec::new("tasks".parse().unwrap())
    };
    cluster.apply(&(&spec).into(), PATIENCE).await.unwrap();
    let (notes, shown) = (Notes::default(), Arc::<Mutex<Shown>>::default());
    let stop = CancellationToken::new();
    let mut watching = watch(&cluster, &shown, stop.clone()).await;
    let mut writing = JoinSet::new();
    let admins: Vec<_> = (0..3).map(|index| cluster.admin(index)).collect();
    for writer in 0..3 {
        writing.spawn(write_jobs(writer, admins.clone(), Arc::clone(&notes)));
    }
    let channel = |node: &crate::processes::Node| {
        Channel::from_shared(format!("http://{}", node.client)).unwrap().connect_lazy()
    };
    let channels = cluster.nodes.iter().map(channel).collect();
    writing.spawn(register_tasks(channels, Arc::clone(&notes)));

    let began = Instant::now();
    for round in 1..=kills {
        // One in four dies while it starts.
        if prng.below(4) > 0 {
            let leader = cluster.settled(PATIENCE).await.unwrap();
            check(&cluster, leader.index, &notes, &shown).await;
        }
        sleep(Duration::from_millis(prng.below(KILL_WITHIN_MS))).await;
        cluster.kill_nodes();
        for index in 0..3 {
            cluster.start_node(index).unwrap();
        }
        if round % 10 == 0 {
            let notes = notes.lock().unwrap();
            println!("{round} kills: {} changes, {} tasks", notes.changes, notes.sessions.len());
        }
    }
    cluster.settled(PATIENCE).await.unwrap();
    let took = began.elapsed();
    writing.shutdown().await;
    cluster.settled(PATIENCE).await.unwrap();
    for index in 0..3 {
        check(&cluster, index, &notes, &shown).await;
    }
    stop.cancel();
    while let Some(ended) = watching.join_next().await {
        ended.unwrap();
    }
    // Whoever asks anew is told the newest, by each node.
    for address in cluster.addresses() {
        let clerk = Clerk::builder("tasks").sources([address]).start().unwrap();
        let assignment = timeout(PATIENCE, clerk.ready()).await.expect("a node tells what it has");
        let newest = shown.lock().unwrap().newest();
        assert!(
            Some(assignment.generation) >= newest,
            "{} after {newest:?}",
            assignment.generation
        );
        shown.lock().unwrap().note(&assignment);
    }

    let (notes, shown) = (notes.lock().unwrap(), shown.lock().unwrap());
    println!(
        "{kills} kills of all three nodes in {:.0} s: {} changes and {} tasks acknowledged, {} assignments shown up to {:?}; all are there",
        took.as_secs_f64(),
        notes.changes,
        notes.sessions.len(),
        shown.by_generation.len(),
        shown.newest()
    );
    assert!(notes.changes > kills && !notes.sessions.is_empty(), "hardly anything was written");
}

/// Jobs of each writer: enough that many are old when they are looked at, and few enough to look at all of them.
const JOBS: usize = 40;
/// Tasks that try to register in all: `MANDOLINE_KILLS=50` has some to the end.
const TASKS: u64 = 1_000;
/// Longer than an election, so that kills fall before, into and after one.
const KILL_WITHIN_MS: u64 = 1_500;
/// A call that takes longer found no leader.
const CALL_WITHIN: Duration = Duration::from_secs(1);
/// Between two changes of a writer: the disk is to be written to at any moment, and the machine not to be full.
const PAUSE: Duration = Duration::from_millis(10);

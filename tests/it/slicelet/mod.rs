//! A slicelet against a leader over real sockets: what a task keeps, whatever happens to its connection.

mod leader;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::leader::{Leader, kv, quick};
use mandoline::slicelet::{Claim, NotReady, Shutdown, Slicelet, StartError, State, Why};
use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
use mandoline_core::command::Command;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::report::Size;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_core::task::{SessionId, Task, TaskInfo};
use mandoline_proto::pb::session_request::Request as Asked;
use tokio::time::timeout;

type Heard = Arc<Mutex<Vec<String>>>;

fn task(assigners: &[&Leader]) -> mandoline::slicelet::Builder {
    Slicelet::builder("kv", "t", "127.0.0.1:9000")
        .assigners(assigners.iter().map(|leader| leader.address.clone()))
}

/// A task whose callbacks write down what they hear.
fn noting(assigners: &[&Leader]) -> (Slicelet, Heard) {
    let heard = Heard::default();
    let note = |what: &'static str| {
        let heard = Arc::clone(&heard);
        move |slices: &[Slice]| {
            let slices: Vec<String> = slices.iter().map(Slice::to_string).collect();
            heard.lock().unwrap().push(format!("{what} {}", slices.join(" ")));
        }
    };
    let builder = task(assigners).on_added(note("added")).on_removed(note("removed"));
    (builder.start().unwrap(), heard)
}

async fn ready(slicelet: &Slicelet) -> SessionId {
    let ready = timeout(Duration::from_secs(10), slicelet.ready()).await;
    ready.unwrap_or_else(|_| panic!("never ready: {:?}", slicelet.state())).unwrap();
    let State::Attached { session, .. } = slicelet.state() else { panic!("just attached") };
    session
}

/// Waits for something that the task comes to, asking now and then, since not all of it can be waited for otherwise.
async fn comes_to(slicelet: &Slicelet, what: &str, is: impl Fn(&Slicelet) -> bool) {
    let wait = async {
        while !is(slicelet) {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), wait)
        .await
        .unwrap_or_else(|_| panic!("never {what}: {slicelet:?}"));
}

fn is_alone(slicelet: &Slicelet) -> bool {
    matches!(slicelet.state(), State::Alone { .. })
}

fn half() -> (Slice, Slice) {
    Slice::FULL.split_at(SliceKey(1 << 63)).unwrap()
}

/// Another task, which needs no process.
fn other(leader: &Leader) -> SessionId {
    let info = TaskInfo::new("other".parse().unwrap(), 7, "127.0.0.1:9001".parse().unwrap());
    leader.apply(Command::Register { job: kv(), info, stopped: None }).unwrap();
    *leader.sessions().last().unwrap()
}

#[tokio::test]
async fn a_task_registers_and_learns_what_it_owns() {
    let leader = Leader::start().await;
    let (slicelet, heard) = noting(&[&leader]);
    let session = ready(&slicelet).await;
    assert!(!slicelet.owns(b"x"));
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    assert_eq!(slicelet.generation(), leader.generation());
    assert_eq!(slicelet.claim(b"x"), Claim::Mine);

    let (low, high) = half();
    let other = other(&leader);
    leader.give(high, other);
    comes_to(&slicelet, "left with half", |task| !task.owns_at(SliceKey::MAX)).await;
    assert!(slicelet.owns_at(SliceKey::MIN));
    let Claim::Elsewhere(owner) = slicelet.claim_at(SliceKey::MAX, 1.0).unwrap() else {
        panic!("the upper half is the other's")
    };
    assert_eq!(owner.address.unwrap().as_str(), "127.0.0.1:9001");
    assert_eq!(owner.generation, leader.generation());
    comes_to(&slicelet, "told", |_| heard.lock().unwrap().len() == 2).await;
    let told = heard.lock().unwrap().clone();
    assert_eq!(told, [format!("added {}", Slice::FULL), format!("removed {high}")]);
    assert_ne!(low, high);
}

#[tokio::test]
async fn load_is_reported_by_slice_and_nonsense_is_refused() {
    let leader = Leader::start().await;
    let slicelet = task(&[&leader]).start().unwrap();
    let session = ready(&slicelet).await;
    let (low, high) = half();
    leader.give(low, session);
    leader.give(high, session);
    comes_to(&slicelet, "given both", |task| task.owned() == 2).await;
    let installed = slicelet.generation();
    for bad in [f64::NAN, f64::INFINITY, -1.0, 1e7] {
        assert!(slicelet.count_at(SliceKey::MIN, bad).is_err());
        assert!(slicelet.claim_at(SliceKey::MIN, bad).is_err());
    }
    // The first window that saw the assignment from its beginning.
    leader
        .hears("a report of this generation", |asked| match asked {
            Asked::Report(report) => {
                (report.generation.map(Into::into) == Some(installed)).then_some(())
            }
            _ => None,
        })
        .await;
    leader.forget_heard();
    slicelet.count_at(SliceKey::MAX, 500.0).unwrap();
    let (window, loads) = leader
        .hears("the load", |asked| match asked {
            Asked::Report(report) if report.slices.iter().any(|slice| slice.load > 0.0) => {
                let loads: Vec<f64> = report.slices.iter().map(|slice| slice.load).collect();
                Some((report.window_ms, loads))
            }
            _ => None,
        })
        .await;
    assert_eq!(loads.len(), 2);
    assert_eq!(loads[0], 0.0);
    let units = loads[1] * window as f64 / 1_000.0;
    assert!((490.0..510.0).contains(&units), "{units} of 500 units in {window} ms");
}

#[tokio::test]
async fn hot_keys_and_what_the_meter_says_are_reported() {
    let leader = Leader::start().await;
    let meter = |slices: &[Slice]| {
        let size = |slice: &Slice| {
            let (slice, metrics) = (*slice, vec![Load::from_milli(2_500)]);
            Size { slice, metrics, move_cost: Some(1 << 30) }
        };
        slices.iter().map(size).collect()
    };
    let slicelet = task(&[&leader]).meter(meter).start().unwrap();
    let session = ready(&slicelet).await;
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    for n in 0..500_u64 {
        assert_eq!(slicelet.claim(b"hot"), Claim::Mine);
        assert_eq!(slicelet.claim(&n.to_be_bytes()), Claim::Mine);
    }
    let hot = |asked: &Asked| match asked {
        Asked::Report(report) if !report.hot.is_empty() => Some(report.clone()),
        _ => None,
    };
    let report = leader.hears("a report with a hot key", hot).await;
    let [hot] = report.hot.as_slice() else { panic!("one key is hot: {:?}", report.hot) };
    assert_eq!(hot.key, SliceKey::of(b"hot").0);
    let all: f64 = report.slices.iter().map(|slice| slice.load).sum();
    assert!((all * 0.4..all * 0.6).contains(&hot.load), "{} of {all}", hot.load);
    let size = &report.sizes[0];
    assert_eq!((size.metrics.as_slice(), size.move_cost), ([2.5].as_slice(), Some(1 << 30)));
}

#[tokio::test]
async fn a_cut_connection_costs_no_session() {
    let leader = Leader::start().await;
    let (slicelet, heard) = noting(&[&leader]);
    let session = ready(&slicelet).await;
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    leader.forget_heard();
    leader.cut();
    let attach = leader
        .hears("the session again", |asked| match asked {
            Asked::Attach(attach) => Some(attach.clone()),
            Asked::Register(_) => panic!("registered anew"),
            _ => None,
        })
        .await;
    assert_eq!(attach.session, session.0);
    assert_eq!(attach.known.map(Into::into), Some(leader.generation()));
    assert_eq!(ready(&slicelet).await, session);
    assert!(slicelet.owns(b"x"));
    assert_eq!(heard.lock().unwrap().len(), 1, "nothing came and nothing went");
}

#[tokio::test]
async fn whoever_does_not_lead_points_at_who_does() {
    let (leader, follower) = (Leader::start().await, Leader::start().await);
    follower.point_at(&leader.address);
    let slicelet = task(&[&follower]).start().unwrap();
    ready(&slicelet).await;
    let State::Attached { leader: attached, .. } = slicelet.state() else { panic!("ready") };
    assert_eq!(attached.as_str(), leader.address);
}

#[tokio::test]
async fn with_every_assigner_gone_a_task_goes_on_and_says_so() {
    let leader = Leader::start().await;
    let (slicelet, heard) = noting(&[&leader]);
    let session = ready(&slicelet).await;
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    leader.stop();
    let gone =
        |task: &Slicelet| matches!(task.state(), State::Alone { why: Why::Unreachable { .. }, .. });
    comes_to(&slicelet, "alone", gone).await;
    assert!(slicelet.owns(b"x"));
    assert_eq!(slicelet.claim(b"x"), Claim::Mine);
    leader.restart().await;
    assert_eq!(ready(&slicelet).await, session);
    assert_eq!(heard.lock().unwrap().len(), 1, "nothing came and nothing went");
}

#[tokio::test]
async fn a_task_without_a_leader_hears_from_others_what_is_its_own() {
    let (leader, follower) = (Leader::start().await, Leader::start().await);
    follower.point_at("");
    let (slicelet, heard) = noting(&[&leader, &follower]);
    let session = ready(&slicelet).await;
    leader.stop();
    comes_to(&slicelet, "alone", is_alone).await;
    // What the leader decided last has reached its followers, and not the task.
    leader.give(Slice::FULL, session);
    follower.learn(&leader);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    assert!(is_alone(&slicelet), "{slicelet:?}");
    assert_eq!(slicelet.generation(), leader.generation());
    leader.restart().await;
    assert_eq!(ready(&slicelet).await, session);
    assert_eq!(heard.lock().unwrap().len(), 1, "it came once");
    let left = timeout(Duration::from_secs(10), async {
        while follower.watchers() > 0 {
            tokio::task::yield_now().await;
        }
    });
    left.await.expect("whoever is in touch listens to nobody else");
}

#[tokio::test]
async fn what_has_one_owner_is_taken_from_the_leader_alone() {
    let (leader, follower) = (Leader::start_empty().await, Leader::start_empty().await);
    follower.point_at("");
    let (consistency, lease) = (Consistency::Exclusive, Duration::from_secs(2));
    let spec = JobSpec { consistency, lease, ..quick() };
    leader.apply(Command::ApplyJob { spec, if_version: None }).unwrap();
    let slicelet = task(&[&leader, &follower]).start().unwrap();
    let session = ready(&slicelet).await;
    let (low, high) = half();
    leader.give(low, session);
    comes_to(&slicelet, "given one half", |task| task.owned() == 1).await;
    leader.stop();
    comes_to(&slicelet, "alone", is_alone).await;
    leader.give(high, session);
    follower.learn(&leader);
    let stopped = |asked: &Asked| matches!(asked, Asked::Register(new) if new.stopped == session.0);
    comes_to(&slicelet, "out of its lease", |task| {
        assert!(task.owned() <= 1 && follower.watchers() == 0, "{task:?}");
        follower.has_heard(stopped)
    })
    .await;
}

#[tokio::test]
async fn a_session_that_ended_while_away_begins_anew_with_nothing() {
    let leader = Leader::start().await;
    let (slicelet, heard) = noting(&[&leader]);
    let session = ready(&slicelet).await;
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    leader.stop();
    leader.end(session);
    assert!(slicelet.owns(b"x"), "nobody has told it");
    leader.restart().await;
    comes_to(&slicelet, "without slices", |task| !task.owns(b"x")).await;
    let anew = ready(&slicelet).await;
    assert_ne!(anew, session);
    leader.give(Slice::FULL, anew);
    comes_to(&slicelet, "given everything again", |task| task.owns(b"x")).await;
    let all = Slice::FULL;
    let told = heard.lock().unwrap().clone();
    assert_eq!(told, [format!("added {all}"), format!("removed {all}"), format!("added {all}")]);
}

#[tokio::test]
async fn a_cluster_that_begins_anew_is_believed() {
    let old = Leader::start().await;
    let (slicelet, heard) = noting(&[&old]);
    let session = ready(&slicelet).await;
    let (low, high) = half();
    old.give(low, session);
    old.give(high, session);
    comes_to(&slicelet, "given both", |task| task.owned() == 2).await;
    let known = slicelet.generation();
    old.begin_anew();
    assert_eq!(other(&old), session, "sessions are counted anew");
    old.cut();
    let anew = |task: &Slicelet| task.owned() == 0 && task.generation() < known;
    comes_to(&slicelet, "in the new cluster", anew).await;
    let anew = ready(&slicelet).await;
    assert_ne!(anew, session);
    old.give(Slice::FULL, anew);
    comes_to(&slicelet, "given everything", |task| task.owned() == 1).await;
    let last = heard.lock().unwrap().last().cloned();
    assert_eq!(last, Some(format!("added {}", Slice::FULL)));
}

#[tokio::test]
async fn a_leader_that_grants_nothing_is_left_for_another() {
    let (mute, other) = (Leader::start().await, Leader::start_empty().await);
    let slicelet = task(&[&mute, &other]).start().unwrap();
    let session = ready(&slicelet).await;
    other.learn(&mute);
    mute.mute(true);
    let there = |task: &Slicelet| matches!(task.state(), State::Attached { leader, .. } if leader.as_str() == other.address);
    comes_to(&slicelet, "attached elsewhere", there).await;
    assert_eq!(ready(&slicelet).await, session);
}

#[tokio::test]
async fn a_gap_in_what_is_told_is_filled() {
    let leader = Leader::start().await;
    let slicelet = task(&[&leader]).start().unwrap();
    let session = ready(&slicelet).await;
    leader.lose_updates(1);
    let (low, high) = half();
    leader.give(low, session);
    leader.give(high, session);
    leader
        .hears("a call for everything", |asked| matches!(asked, Asked::Resync(_)).then_some(()))
        .await;
    comes_to(&slicelet, "given both", |task| task.owned() == 2).await;
}

#[tokio::test]
async fn an_assignment_of_another_job_is_not_believed() {
    let leader = Leader::start().await;
    let (slicelet, _heard) = noting(&[&leader]);
    let session = ready(&slicelet).await;
    // Newer than anything of the job's own, and everything is this session's by it.
    let generation = Generation { number: 1 << 40, ..leader.generation() };
    let mut impostor = Assignment::new("impostor".parse().unwrap(), generation);
    let info = TaskInfo::new("kv-0".parse().unwrap(), 7, "127.0.0.1:9000".parse().unwrap());
    impostor.tasks.insert(session, Arc::new(Task::new(session, info)));
    let replicas = Replicas::One(Replica { session, since: generation });
    impostor.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
    leader.tell(impostor);
    comes_to(&slicelet, "told of another job", |_| leader.has_told()).await;
    // What the leader says next comes after it on the same stream.
    let (low, _) = half();
    leader.give(low, session);
    comes_to(&slicelet, "given half", |task| task.owns_at(SliceKey::MIN)).await;
    assert!(!slicelet.owns_at(SliceKey::MAX));
    assert_eq!(slicelet.generation(), leader.generation());
}

#[tokio::test]
async fn a_drained_task_leaves_with_nothing_left() {
    let leader = Leader::start().await;
    let slicelet = Arc::new(task(&[&leader]).start().unwrap());
    let session = ready(&slicelet).await;
    let other = other(&leader);
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    let leaving = Arc::clone(&slicelet);
    let shutdown = tokio::spawn(async move { leaving.shutdown().await });
    leader.hears("a drain", |asked| matches!(asked, Asked::Drain(_)).then_some(())).await;
    assert!(slicelet.owns(b"x"), "it serves until its slices have moved");
    // A connection that breaks meanwhile changes nothing.
    leader.cut();
    leader
        .hears("the session again", |asked| matches!(asked, Asked::Attach(_)).then_some(()))
        .await;
    leader.give(Slice::FULL, other);
    let outcome = timeout(Duration::from_secs(10), shutdown).await.expect("the shutdown ends");
    assert_eq!(outcome.unwrap(), Shutdown::Drained);
    leader.hears("a goodbye", |asked| matches!(asked, Asked::Leave(_)).then_some(())).await;
    assert_eq!((leader.sessions(), slicelet.state()), (vec![other], State::Stopped));
    assert_eq!(slicelet.ready().await, Err(NotReady::Stopped));
}

#[tokio::test]
async fn a_task_whose_slices_nobody_takes_leaves_after_its_grace() {
    let leader = Leader::start().await;
    let slicelet = task(&[&leader]).grace(Duration::from_millis(300)).start().unwrap();
    let session = ready(&slicelet).await;
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    let outcome = timeout(Duration::from_secs(10), slicelet.shutdown()).await.expect("it ends");
    assert_eq!(outcome, Shutdown::GraceOver { slices: 1 });
    assert!(!slicelet.owns(b"x"));
    assert_eq!(leader.sessions(), []);
}

#[tokio::test]
async fn a_callback_that_blocks_does_not_hold_a_shutdown() {
    let leader = Leader::start().await;
    // Each blocks until the test is over.
    for blocks_on_added in [true, false] {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Mutex::new(held);
        let (entered, mut is_entered) = tokio::sync::mpsc::channel(1);
        let block = move |_: &[Slice]| {
            entered.blocking_send(()).unwrap();
            held.lock().unwrap().recv().unwrap_err();
        };
        let builder = task(&[&leader]).grace(Duration::from_millis(100));
        let builder =
            if blocks_on_added { builder.on_added(block) } else { builder.on_removed(block) };
        let slicelet = builder.start().unwrap();
        let session = ready(&slicelet).await;
        leader.give(Slice::FULL, session);
        if blocks_on_added {
            timeout(Duration::from_secs(10), is_entered.recv()).await.expect("it is called");
        } else {
            comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
        }
        let outcome = timeout(Duration::from_secs(5), slicelet.shutdown()).await;
        let expected =
            if blocks_on_added { Shutdown::Drained } else { Shutdown::GraceOver { slices: 1 } };
        assert_eq!(outcome.expect("the shutdown ends"), expected);
        // What was blocked ends in the background, and with it the session.
        drop(release);
        leader.hears("a goodbye", |asked| matches!(asked, Asked::Leave(_)).then_some(())).await;
        leader.forget_heard();
        comes_to(&slicelet, "stopped", |task| task.state() == State::Stopped).await;
    }
}

#[tokio::test]
async fn a_task_that_never_found_a_leader_leaves_at_once() {
    let leader = Leader::start().await;
    leader.stop();
    let slicelet = task(&[&leader]).start().unwrap();
    let outcome = timeout(Duration::from_secs(10), slicelet.shutdown()).await.expect("it ends");
    assert_eq!(outcome, Shutdown::Drained);
}

#[tokio::test]
async fn a_dropped_slicelet_ends_its_session() {
    let leader = Leader::start().await;
    let slicelet = task(&[&leader]).start().unwrap();
    ready(&slicelet).await;
    drop(slicelet);
    leader.hears("a goodbye", |asked| matches!(asked, Asked::Leave(_)).then_some(())).await;
}

#[tokio::test]
async fn a_name_or_address_that_is_taken_is_said_and_asked_for_again() {
    let leader = Leader::start().await;
    let first = task(&[&leader]).start().unwrap();
    let session = ready(&first).await;
    let second = task(&[&leader]).start().unwrap();
    let refused = timeout(Duration::from_secs(10), second.ready()).await.expect("an answer");
    assert!(matches!(refused, Err(NotReady::Refused(Why::NameTaken(_)))), "{refused:?}");
    let third =
        Slicelet::builder("kv", "t3", "127.0.0.1:9000").assigners([&leader.address]).start();
    let third = third.unwrap();
    let refused = timeout(Duration::from_secs(10), third.ready()).await.expect("an answer");
    assert!(matches!(refused, Err(NotReady::Refused(Why::AddressTaken(_)))), "{refused:?}");
    drop(third);
    first.shutdown().await;
    // The second asks again every second.
    let attached = |task: &Slicelet| matches!(task.state(), State::Attached { .. });
    comes_to(&second, "registered", attached).await;
    assert_ne!(ready(&second).await, session);
}

#[tokio::test]
async fn a_job_that_nobody_has_made_yet_is_waited_for() {
    let leader = Leader::start_empty().await;
    let slicelet = task(&[&leader]).start().unwrap();
    let waits =
        |task: &Slicelet| matches!(task.state(), State::Alone { why: Why::NoSuchJob(_), .. });
    comes_to(&slicelet, "told that there is no job", waits).await;
    leader.apply(Command::ApplyJob { spec: quick(), if_version: None }).unwrap();
    ready(&slicelet).await;
}

#[tokio::test]
async fn a_task_whose_runtime_hangs_does_not_pass_for_alive() {
    let leader = Leader::start().await;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let slicelet = task(&[&leader]).probe(runtime.handle().clone()).start().unwrap();
    let session = ready(&slicelet).await;
    leader.hears("a heartbeat", |asked| matches!(asked, Asked::Heartbeat(_)).then_some(())).await;
    let (release, held) = std::sync::mpsc::channel::<()>();
    runtime.spawn(async move { held.recv() });
    let hangs = |task: &Slicelet| matches!(task.state(), State::Alone { why: Why::Hung, .. });
    comes_to(&slicelet, "known to hang", hangs).await;
    leader.forget_heard();
    drop(release);
    comes_to(&slicelet, "back", |task| matches!(task.state(), State::Attached { .. })).await;
    leader.hears("a heartbeat", |asked| matches!(asked, Asked::Heartbeat(_)).then_some(())).await;
    assert_eq!(ready(&slicelet).await, session);
    runtime.shutdown_background();
}

#[tokio::test]
async fn peers_watch_what_a_task_knows() {
    let leader = Leader::start().await;
    let slicelet = task(&[&leader]).watch_address("127.0.0.1:0").start().unwrap();
    let session = ready(&slicelet).await;
    leader.give(Slice::FULL, session);
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    let address = slicelet.watch_address().unwrap();
    let task = Arc::clone(&slicelet.assignment().tasks[&session]);
    assert_eq!(task.info.watch.as_ref(), Some(address));
    leader.stop();
    let request = mandoline_proto::pb::WatchRequest { job: "kv".into(), ..Default::default() };
    let mut client = mandoline_proto::pb::assignments_client::AssignmentsClient::connect(format!(
        "http://{address}"
    ))
    .await
    .unwrap();
    let mut updates = client.watch(request).await.unwrap().into_inner();
    let update = timeout(Duration::from_secs(10), updates.message()).await.expect("an update");
    let mut assembler = mandoline_proto::update::Assembler::default();
    let known = assembler.take(update.unwrap().unwrap()).unwrap();
    let expected = slicelet.assignment();
    assert_eq!(known, Some(mandoline_proto::update::Update::Full(expected.as_ref().clone())));
}

#[test]
fn what_cannot_start_says_why() {
    let builder = || Slicelet::builder("kv", "t", "h:1").assigners(["h:2"]);
    let error = |start: Result<Slicelet, StartError>| start.unwrap_err();
    assert!(matches!(error(Slicelet::builder("k/v", "t", "h:1").start()), StartError::Job(..)));
    assert!(matches!(error(Slicelet::builder("kv", "", "h:1").start()), StartError::Task(..)));
    let nowhere = Slicelet::builder("kv", "t", "h").assigners(["h:2"]).start();
    assert!(matches!(error(nowhere), StartError::Address { .. }));
    assert!(matches!(error(builder().assigners(["h"]).start()), StartError::Address { .. }));
    assert!(matches!(error(Slicelet::builder("kv", "t", "h:1").start()), StartError::NoAssigners));
    assert!(matches!(error(builder().capacity(f64::NAN).start()), StartError::Capacity(_)));
    assert!(matches!(error(builder().label(&"k".repeat(200), "").start()), StartError::Info(_)));
    assert!(matches!(error(builder().watch_address("nowhere").start()), StartError::Watch(..)));
}

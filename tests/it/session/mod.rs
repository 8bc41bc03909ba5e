//! Task sessions with real nodes over real sockets: first word for word, then by slicelets.

mod cluster;
mod raw;
mod measure;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::cluster::{Cluster, PATIENCE, eventually, kv, quick};
use self::raw::{Raw, attach, info, register};
use mandoline::slicelet::{Builder, NotReady, Shutdown, Slicelet, State, Why};
use mandoline_core::command::Command;
use mandoline_core::key::SliceKey;
use mandoline_core::spec::JobSpec;
use mandoline_core::task::SessionId;
use mandoline_proto::pb;
use mandoline_proto::pb::session_reply::Reply;
use mandoline_proto::pb::session_request::Request as Asked;
use tokio::time::timeout;
use tonic::Code;

#[tokio::test]
async fn a_first_message_that_makes_no_sense_is_refused_by_field() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let cases = [
        (None, "request: is missing"),
        (Some(Asked::Drain(pb::Drain {})), "request: must begin with register or attach"),
        (Some(attach(0, 1)), "attach.session: is zero"),
        (Some(register(info("t/1", 1, "h:1"))), "register.info.name: "),
        (Some(register(info("t", 1, "h"))), "register.info.address: "),
        (Some(Asked::Register(pb::Register::default())), "register.info: is missing"),
        (
            Some(Asked::Attach(pb::Attach {
                job: "x".repeat(64),
                session: 1,
                ..Default::default()
            })),
            "attach.job: the name is 64 bytes long",
        ),
    ];
    for (first, message) in cases {
        let status = Raw::turned_away(address, first).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{message}");
        assert!(status.message().starts_with(message), "{} instead of {message}", status.message());
    }
}

#[tokio::test]
async fn a_task_that_registers_twice_keeps_its_session_and_the_newest_stream() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let again = || Some(register(info("t", 7, "h:1")));
    let mut first = Raw::open(address, again()).await.unwrap();
    let session = first.session().await;
    first.granted(1).await;
    let mut second = Raw::open(address, again()).await.unwrap();
    assert_eq!(second.session().await, session);
    while let Ok(Some(_)) = first.next().await {}
    second.granted(1).await;
    let mut third = Raw::open(address, Some(attach(session, 7))).await.unwrap();
    assert_eq!(third.session().await, session);
    third.granted(1).await;
    assert_eq!(cluster.assignment().await.tasks.len(), 1);
}

#[tokio::test]
async fn refusals_have_names() {
    let cluster = Cluster::start(1).await;
    let address = &cluster.nodes[0].address;
    let refused = async |first| Raw::open(address, Some(first)).await.unwrap().refused().await.0;
    assert_eq!(refused(register(info("t", 1, "h:1"))).await, pb::RefusedCode::NoSuchJob);
    cluster.propose(Command::ApplyJob { spec: quick(), if_version: None }).await;
    let mut task = Raw::open(address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    let session = task.session().await;
    assert_eq!(refused(attach(session, 2)).await, pb::RefusedCode::NoSuchSession);
    assert_eq!(refused(register(info("t", 2, "h:2"))).await, pb::RefusedCode::NameTaken);
    assert_eq!(refused(register(info("u", 2, "h:1"))).await, pb::RefusedCode::AddressTaken);
    assert_eq!(refused(attach(99, 1)).await, pb::RefusedCode::NoSuchSession);
}

#[tokio::test]
async fn a_bad_message_is_answered_and_costs_no_session() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let mut task = Raw::open(address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    task.session().await;
    let report = |load: f64, window_ms| {
        let slice = Some(pb::Slice { first: 0, last: u64::MAX });
        let generation = Some(pb::Generation { incarnation: 1, number: 1 });
        Asked::Report(pb::Report {
            generation,
            window_ms,
            slices: vec![pb::SliceLoad { slice, load }],
            ..Default::default()
        })
    };
    let cases = [
        (report(f64::NAN, 1_000), "slices[0].load: NaN is no load"),
        (report(-1.0, 1_000), "slices[0].load: -1 is no load"),
        (report(f64::INFINITY, 1_000), "slices[0].load: inf is no load"),
        (report(1.0, 0), "report: the report's window is 0ns"),
        (
            Asked::Report(pb::Report { window_ms: 9, ..Default::default() }),
            "generation: is missing",
        ),
        (attach(1, 1), "request: this stream has a session already"),
    ];
    for (message, expected) in cases {
        task.say(message).await;
        let warning = |reply: &Reply| match reply {
            Reply::Warning(warning) => Some(warning.clone()),
            _ => None,
        };
        let warning = task.hears("a warning", warning).await;
        assert!(warning.starts_with(expected), "{warning} instead of {expected}");
        task.granted(1).await;
    }
}

#[tokio::test]
async fn a_silent_task_is_lost_and_told_so_if_it_still_listens() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let mut task = Raw::open(address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    let session = task.session().await;
    assert_eq!(task.refused().await.0, pb::RefusedCode::NoSuchSession);
    assert_eq!(task.next().await.unwrap(), None, "the stream ends");
    assert!(!cluster.assignment().await.tasks.contains_key(&SessionId(session)));
}

#[tokio::test]
async fn a_broken_connection_ends_the_session_unless_the_task_comes_back() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let mut task = Raw::open(address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    let session = task.session().await;
    drop(task);
    let mut back = Raw::open(address, Some(attach(session, 1))).await.unwrap();
    assert_eq!(back.session().await, session);
    for beat in 1..20 {
        back.granted(beat).await;
    }
    drop(back);
    let state = || cluster.nodes[0].consensus.state();
    eventually("the end of the session", || {
        state().jobs[&kv()].assignment.tasks.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_spec_that_asks_for_another_pace_is_told() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let mut task = Raw::open(address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    task.session().await;
    let heartbeat = Duration::from_millis(100);
    let spec = JobSpec { heartbeat, ..quick() };
    cluster.propose(Command::ApplyJob { spec, if_version: None }).await;
    let pace = |reply: &Reply| match reply {
        Reply::Attached(attached) => Some(attached.heartbeat_ms),
        _ => None,
    };
    assert_eq!(task.hears("another pace", pace).await, 100);
}

#[tokio::test]
async fn a_follower_says_who_leads() {
    let cluster = Cluster::with_job(3).await;
    let (leader, follower) = (cluster.leader().await, cluster.follower().await);
    let mut task = Raw::open(&follower.address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    match task.next().await.unwrap() {
        Some(Reply::Redirect(redirect)) => assert_eq!(redirect.address, leader.address),
        other => panic!("{other:?} instead of who leads"),
    }
    assert_eq!(task.next().await.unwrap(), None);
}

fn task(cluster: &Cluster, number: u16) -> Builder {
    let (name, address) = (format!("t{number}"), format!("127.0.0.1:{}", 9_000 + number));
    Slicelet::builder("kv", &name, &address).assigners(cluster.addresses())
}

async fn ready(slicelet: &Slicelet) -> SessionId {
    let ready = timeout(PATIENCE, slicelet.ready()).await;
    ready.unwrap_or_else(|_| panic!("never ready: {slicelet:?}")).unwrap();
    let State::Attached { session, .. } = slicelet.state() else { panic!("just attached") };
    session
}

async fn comes_to(slicelet: &Slicelet, what: &str, is: impl Fn(&Slicelet) -> bool) {
    let wait = eventually(what, || is(slicelet).then_some(()));
    wait.await;
}

/// Whether exactly one of the tasks owns each of many places.
fn share_everything(tasks: &[&Slicelet]) -> bool {
    let owners = |place| tasks.iter().filter(|task| task.owns_at(SliceKey(place))).count();
    (0..64_u64).all(|nth| owners(nth << 58) == 1)
}

#[tokio::test]
async fn tasks_share_the_keys_and_a_drained_one_leaves_with_nothing() {
    let cluster = Cluster::with_job(1).await;
    let (one, two) = (task(&cluster, 1).start().unwrap(), task(&cluster, 2).start().unwrap());
    ready(&one).await;
    ready(&two).await;
    comes_to(&one, "an even start", |_| {
        one.owned() > 0 && two.owned() > 0 && share_everything(&[&one, &two])
    })
    .await;
    let (one, served) = (Arc::new(one), Arc::new(Mutex::new(true)));
    let leaving = Arc::clone(&one);
    let shutdown = tokio::spawn(async move { leaving.shutdown().await });
    let noted = Arc::clone(&served);
    let everything_is_served = || {
        // Make before break: while it leaves each key has an owner, for a moment two.
        let owned = |place| one.owns_at(SliceKey(place)) || two.owns_at(SliceKey(place));
        *noted.lock().unwrap() &= (0..64_u64).all(|nth| owned(nth << 58));
        shutdown.is_finished().then_some(())
    };
    eventually("an end of the shutdown", everything_is_served).await;
    assert_eq!(shutdown.await.unwrap(), Shutdown::Drained);
    comes_to(&two, "left with everything", |two| share_everything(&[two])).await;
    assert_eq!(cluster.assignment().await.tasks.len(), 1);
}

#[tokio::test]
async fn load_that_tasks_count_reaches_the_balancer() {
    let cluster = Cluster::with_job(1).await;
    let (one, two) = (task(&cluster, 1).start().unwrap(), task(&cluster, 2).start().unwrap());
    ready(&one).await;
    ready(&two).await;
    comes_to(&one, "an even start", |_| share_everything(&[&one, &two])).await;
    let hot = (0..u64::MAX).map(|nth| nth.to_be_bytes()).find(|key| one.owns(key)).unwrap();
    // One key has all the load: a few rounds and the hot one's other slices are gone.
    let before = one.owned();
    comes_to(&one, "rid of what is not hot", |one| {
        let claimed = one.count(&hot, 100.0);
        claimed.unwrap();
        one.owned() != before || !one.owns(&hot)
    })
    .await;
}

#[tokio::test]
async fn a_task_outlives_the_leader() {
    let mut cluster = Cluster::with_job(3).await;
    let slicelet = task(&cluster, 1).start().unwrap();
    let session = ready(&slicelet).await;
    comes_to(&slicelet, "given everything", |task| task.owns(b"x")).await;
    let killed = cluster.take_leader().await;
    let dead = killed.address.clone();
    killed.kill();
    let elsewhere = |task: &Slicelet| {
        assert!(task.owns(b"x"), "it serves on");
        matches!(task.state(), State::Attached { leader, .. } if leader.as_str() != dead)
    };
    comes_to(&slicelet, "attached to the new leader", elsewhere).await;
    assert_eq!(ready(&slicelet).await, session);
    assert_eq!(cluster.assignment().await.of(session).count(), slicelet.owned());
}

#[tokio::test]
async fn a_leader_that_stops_sends_its_tasks_to_the_next_one() {
    let mut cluster = Cluster::with_job(3).await;
    let address = cluster.leader().await.address.clone();
    let mut raw = Raw::open(&address, Some(register(info("r", 1, "h:1")))).await.unwrap();
    raw.session().await;
    cluster.take_leader().await.stop().await;
    let redirect = |reply: &Reply| match reply {
        Reply::Redirect(redirect) => Some(redirect.address.clone()),
        _ => None,
    };
    let next = raw.hears("who leads now", redirect).await;
    assert_eq!(next, cluster.leader().await.address);
}

#[tokio::test]
async fn a_second_process_under_a_living_name_waits_for_its_end() {
    let cluster = Cluster::with_job(1).await;
    let first = task(&cluster, 1).start().unwrap();
    let session = ready(&first).await;
    let second = task(&cluster, 1).start().unwrap();
    let refused = timeout(PATIENCE, second.ready()).await.expect("an answer");
    assert!(matches!(refused, Err(NotReady::Refused(Why::NameTaken(_)))), "{refused:?}");
    drop(first);
    comes_to(&second, "registered", |task| matches!(task.state(), State::Attached { .. })).await;
    assert_ne!(ready(&second).await, session);
}

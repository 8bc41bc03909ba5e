//! What tasks and callers measure, on its way to the leader: named, believed, or refused.

use std::time::Duration;

use mandoline::clerk::Clerk;
use mandoline::http::key::KeyFrom;
use mandoline_core::prng::Prng;
use mandoline_proto::pb;
use mandoline_proto::pb::admin_client::AdminClient;
use mandoline_proto::pb::offer_reply::Reply as Answer;
use mandoline_proto::pb::tasks_client::TasksClient;
use mandoline_proxy::config::Config;
use mandoline_proxy::proxy::Proxy;
use mandoline_proxy::router::Router;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::kit::ask;
use crate::session::cluster::{Cluster, PATIENCE, kv};
use crate::session::raw::{Raw, info, register};
use crate::session::{Asked, Reply, SliceKey, ready, share_everything, task};

const EVERYTHING: pb::Slice = pb::Slice { first: 0, last: u64::MAX };

/// Does something every 20 ms until it leads to something.
async fn driven<T>(what: &str, mut step: impl AsyncFnMut() -> Option<T>) -> T {
    let (mut tick, deadline) = (interval(Duration::from_millis(20)), Instant::now() + PATIENCE);
    loop {
        tick.tick().await;
        if let Some(found) = step().await {
            return found;
        }
        assert!(Instant::now() < deadline, "there never was {what}");
    }
}

async fn job(address: &str) -> pb::JobStatus {
    let mut admin = AdminClient::connect(format!("http://{address}")).await.unwrap();
    let request = pb::GetJobRequest { name: "kv".to_owned() };
    admin.get_job(request).await.unwrap().into_inner()
}

async fn offer(address: &str, offer: pb::Offer) -> Result<Answer, Status> {
    let mut tasks = TasksClient::connect(format!("http://{address}")).await.unwrap();
    Ok(tasks.offer(offer).await?.into_inner().reply.unwrap())
}

fn offered(slices: &[(pb::Slice, f64)]) -> pb::Offer {
    let part = |&(slice, load)| pb::SliceOffer { slice: Some(slice), load, failed: 0.0 };
    let slices = slices.iter().map(part).collect();
    pb::Offer { job: "kv".to_owned(), caller: 7, window_ms: 1_000, slices, ..Default::default() }
}

#[tokio::test]
async fn a_hot_key_that_tasks_serve_is_set_apart() {
    let cluster = Cluster::with_job(1).await;
    let tasks = [1, 2, 3].map(|number| task(&cluster, number).start().unwrap());
    for task in &tasks {
        ready(task).await;
    }
    driven("an even start", async || share_everything(&tasks.each_ref()).then_some(())).await;
    let (hot, mut prng) = (SliceKey::of(b"the one that everyone asks for"), Prng::new(1));
    let apart = async || {
        // One request in five is for one key.
        for n in 0..200 {
            let key = if n % 5 == 0 { hot } else { SliceKey(prng.bits()) };
            let owner = tasks.iter().find(|task| task.owns_at(key));
            if let Some(owner) = owner {
                let _claimed = owner.claim_at(key, 1.0).unwrap();
            }
        }
        let assignment = cluster.assignment().await;
        (assignment.get(hot).0.width() == 1).then_some(())
    };
    driven("a slice of its own for the hot key", apart).await;
}

#[tokio::test]
async fn hot_keys_that_make_no_sense_are_answered_and_cost_no_session() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let mut task = Raw::open(address, Some(register(info("t", 1, "h:1")))).await.unwrap();
    task.session().await;
    let report = |hot: &[(u64, f64)]| {
        let slice = Some(pb::Slice { first: 0, last: 99 });
        Asked::Report(pb::Report {
            generation: Some(pb::Generation { incarnation: 1, number: 1 }),
            window_ms: 200,
            slices: vec![pb::SliceLoad { slice, load: 10.0 }],
            hot: hot.iter().map(|&(key, load)| pb::HotKey { key, load }).collect(),
            sizes: vec![],
        })
    };
    let many = vec![(1, 1.0); 257];
    let cases: [(&[(u64, f64)], &str); 6] = [
        (&[(1, f64::NAN)], "hot[0].load: NaN is no load"),
        (&[(1, -1.0)], "hot[0].load: -1 is no load"),
        (&[(2, 1.0), (1, 1.0)], "report: the report's hot keys are out of order or come twice"),
        (&[(100, 1.0)], "report: the report's hot key 0000000000000064 lies in none of its slices"),
        (&many, "report: the report names 257 hot keys"),
        (&[(1, 99.0)], "report: 1 hot keys carried more than their slices"),
    ];
    for (number, (hot, expected)) in (1..).zip(cases) {
        task.say(report(hot)).await;
        let warning = |reply: &Reply| match reply {
            Reply::Warning(warning) => Some(warning.clone()),
            _ => None,
        };
        let warning = task.hears("a warning", warning).await;
        assert!(warning.starts_with(expected), "{warning} instead of {expected}");
        task.granted(number).await;
    }
}

#[tokio::test]
async fn offers_are_taken_by_the_leader_and_nonsense_is_refused_by_field() {
    let cluster = Cluster::with_job(3).await;
    let (leader, follower) = (cluster.leader().await, cluster.follower().await);
    let good = || offered(&[(EVERYTHING, 5.0)]);
    match offer(&leader.address, good()).await.unwrap() {
        Answer::Taken(taken) => assert_eq!(taken.report_every_ms, 200),
        other @ Answer::Redirect(_) => panic!("{other:?}"),
    }
    match offer(&follower.address, good()).await.unwrap() {
        Answer::Redirect(redirect) => assert_eq!(redirect.address, leader.address),
        other @ Answer::Taken(_) => panic!("{other:?}"),
    }
    let hot = |key| pb::HotKey { key, load: 1.0 };
    let more_failed = pb::SliceOffer { slice: Some(EVERYTHING), load: 1.0, failed: 2.0 };
    let many = vec![(EVERYTHING, 0.0); 4_097];
    let cases = [
        (pb::Offer { job: "a/b".to_owned(), ..good() }, Code::InvalidArgument, "name \"a/b\""),
        (pb::Offer { job: "none".to_owned(), ..good() }, Code::NotFound, "none"),
        (pb::Offer { window_ms: 0, ..good() }, Code::InvalidArgument, "window is 0ns"),
        (offered(&[(EVERYTHING, f64::NAN)]), Code::InvalidArgument, "slices[0].load: NaN"),
        (offered(&[(EVERYTHING, 2e9)]), Code::InvalidArgument, "slices[0].load: 2000000000"),
        (offered(&[(EVERYTHING, 1.0); 2]), Code::InvalidArgument, "out of order or overlap"),
        (offered(&many), Code::InvalidArgument, "names 4097 slices"),
        (
            pb::Offer { slices: vec![more_failed], ..good() },
            Code::InvalidArgument,
            "failed than was offered",
        ),
        (
            pb::Offer { hot: vec![hot(2), hot(1)], ..good() },
            Code::InvalidArgument,
            "hot keys are out of order",
        ),
    ];
    for (bad, code, message) in cases {
        let status = offer(&leader.address, bad).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(message), "{} instead of {message}", status.message());
    }
}

#[tokio::test]
async fn what_a_clerk_offers_reaches_the_leader_wherever_it_asks() {
    let cluster = Cluster::with_job(3).await;
    let (leader, follower) = (cluster.leader().await, cluster.follower().await);
    let clerk =
        Clerk::builder(kv()).sources([&follower.address]).report_offered(true).start().unwrap();
    clerk.ready().await;
    let seen = async || {
        clerk.offer(b"a key", 3.0).unwrap();
        clerk.failed(b"a key", 1.0).unwrap();
        let job = job(&leader.address).await;
        (job.callers == 1 && job.offered_failed > 0).then_some(job)
    };
    let job = driven("word of what was offered", seen).await;
    assert!((job.offered_failed * 2..job.offered_failed * 4).contains(&job.offered), "{job:?}");
    assert!(clerk.offer(b"a key", f64::NAN).is_err() && clerk.failed(b"a key", -1.0).is_err());
}

#[tokio::test]
async fn offers_pass_over_those_who_take_none_and_follow_the_leader() {
    let mut cluster = Cluster::with_job(3).await;
    let peer = task(&cluster, 1).watch_address("127.0.0.1:0").start().unwrap();
    ready(&peer).await;
    let mut sources = vec![peer.watch_address().unwrap().clone()];
    sources.extend(cluster.addresses().iter().map(|address| address.parse().unwrap()));
    let clerk = Clerk::builder(kv()).sources(sources).report_offered(true).start().unwrap();
    clerk.ready().await;
    let heard = async |cluster: &Cluster| {
        let leader = cluster.leader().await.address.clone();
        let seen = async || {
            clerk.offer(b"a key", 1.0).unwrap();
            (job(&leader).await.offered > 0).then_some(())
        };
        driven("word at the leader", seen).await;
    };
    heard(&cluster).await;
    cluster.take_leader().await.kill();
    heard(&cluster).await;
}

#[tokio::test]
async fn a_proxy_tells_what_it_could_not_deliver() {
    let cluster = Cluster::with_job(1).await;
    let address = cluster.nodes[0].address.clone();
    // It owns everything, and nobody listens where it says that it serves.
    let task = task(&cluster, 1).start().unwrap();
    ready(&task).await;
    let clerk = Clerk::builder(kv()).sources([&address]).report_offered(true);
    let clerk = clerk.start().unwrap();
    clerk.ready().await;
    let (stop, any) = (CancellationToken::new(), "127.0.0.1:0".parse().unwrap());
    let config = Config::new(any, KeyFrom::path(1), Router::new(clerk));
    let proxy = Proxy::start(config, &stop).unwrap();
    let local = proxy.local_addr();
    let told = async || {
        let asked = tokio::task::spawn_blocking(move || ask(local, "GET", "/kv/key", ""));
        let answer = asked.await.unwrap().unwrap();
        assert!(answer.status >= 500, "{answer:?}");
        let job = job(&address).await;
        (job.callers == 1 && job.offered > 0 && job.offered_failed > 0).then_some(())
    };
    driven("word of what failed", told).await;
    proxy.stop().await;
}

/// Tasks that say what a test has them say, and what is thought of them.
#[tokio::test]
async fn a_task_that_drowns_and_one_that_lies_are_told_by_their_callers() {
    let cluster = Cluster::with_job(1).await;
    let address = &cluster.nodes[0].address;
    let mut tasks = Vec::new();
    for n in 1..=5_u64 {
        let info = info(&format!("t{n}"), n, &format!("h:{n}"));
        let mut raw = Raw::open(address, Some(register(info))).await.unwrap();
        tasks.push((raw.session().await, raw));
    }
    let (drowns, lies) = (tasks[1].0, tasks[3].0);
    // What is thought of the two, once it is what it should be.
    let mut beat = 0;
    let known = async || {
        beat += 1;
        let assignment = cluster.assignment().await;
        // Callers offer 60 units each second to each slice.
        let slices: Vec<(pb::Slice, f64)> =
            assignment.slices.iter().map(|(slice, _)| (slice.into(), 60.0)).collect();
        offer(address, offered(&slices)).await.unwrap();
        for (session, raw) in &mut tasks {
            let load = if *session == drowns {
                15.0
            } else if *session == lies {
                1e8
            } else {
                60.0
            };
            let own = assignment.of(mandoline_core::task::SessionId(*session));
            let slices = own.map(|(slice, _)| pb::SliceLoad { slice: Some(slice.into()), load });
            raw.say(Asked::Report(pb::Report {
                generation: Some(assignment.generation.into()),
                window_ms: 1_000,
                slices: slices.collect(),
                ..pb::Report::default()
            }))
            .await;
            raw.granted(beat).await;
        }
        let job = job(address).await;
        let of = |session| {
            let is_its = |task: &&pb::TaskStatus| task.task.as_ref().unwrap().session == session;
            job.tasks.iter().find(is_its).unwrap()
        };
        let (drowning, liar) = (of(drowns), of(lies));
        let per_slice = |task: &pb::TaskStatus| task.load / task.slices.max(1);
        let suspects = job.tasks.iter().filter(|task| task.suspect).count();
        let right = liar.suspect && suspects == 1 && per_slice(drowning) > 50_000;
        (right && per_slice(liar) < 90_000).then_some(())
    };
    driven("the truth about both", known).await;
}

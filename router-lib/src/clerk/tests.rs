//! Clerks against real sockets, with nodes that die and come back.

use super::*;
use mandoline_core::assignment::{Assigned, Replica};
use mandoline_core::delta::{Delta, TaskChange};
use mandoline_core::slice::Slice;
use mandoline_core::task::{SessionId, Task, TaskInfo};
use mandoline_core::transit::{HandOffId, Step, Transit};
use mandoline_distributor::serve::WatchService;
use std::fs;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// How long anything here may take before the test is called hung.
const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(it) => it,
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

fn job() -> JobName {
    "kv".parse().unwrap()
}

fn generation(number: u64) -> Generation {
    Generation { incarnation: 1, number }
}

/// Task `number` serves everything as of this generation.
fn assignment(number: u64) -> Arc<Assignment> {
    let empty = Assignment::new(job(), generation(number - 1));
    Arc::new(delta(number).apply_to(&empty).unwrap())
}

fn delta(number: u64) -> Delta {
    let to = generation(number);
    let address = format!("127.0.0.1:{number}").parse().unwrap();
    let info = TaskInfo::new(format!("t{number}").parse().unwrap(), number, address);
    let task = Task::new(SessionId(number), info);
    let replica = Replica { session: SessionId(number), since: to };
    let assigned = Assigned { replicas: [replica].into_iter().collect(), ..Default::default() };
    Delta {
        job: job(),
        from: generation(number - 1),
        to,
        tasks: vec![TaskChange::Set(Arc::new(task))],
        slices: vec![(Slice::FULL, assigned)],
        spill: None,
    }
}

fn hub_at(number: u64) -> Hub {
    let hub = Hub::new();
    hub.publish(assignment(number), None);
    hub
}

fn advance(hub: &Hub) {
    let old = hub.get(&job()).unwrap();
    let delta = delta(old.generation.number + 1);
    hub.publish(Arc::new(delta.apply_to(&old).unwrap()), Some(&delta));
}

/// A server on a runtime of its own, so that it dies with all its connections when dropped.
struct Node {
    address: Address,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Node {
    fn serve(hub: &Hub) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::serve_on(listener, hub)
    }

    fn serve_on(listener: std::net::TcpListener, hub: &Hub) -> Self {
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let service = WatchService::new(hub.clone(), CancellationToken::new());
        // Ends with the runtime, which the node holds.
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = TcpListenerStream::new(listener);
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { address, runtime: Some(runtime) }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// An address where nobody listens.
fn nobody() -> Address {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string().parse().unwrap()
}

fn owner(clerk: &Clerk) -> String {
    let by_clerk = clerk.route(b"some key").unwrap();
    let mut router = clerk.router();
    let by_router = router.route(b"some key").unwrap();
    assert_eq!(by_clerk.session(), by_router.session());
    by_clerk.name().to_string()
}

async fn becomes(clerk: &Clerk, what: &str, mut is: impl FnMut(&State) -> bool) -> State {
    let mut states = clerk.inner.state.clone();
    soon(what, async {
        loop {
            states.borrow_and_update();
            let state = clerk.state();
            if is(&state) {
                return state;
            }
            states.changed().await.unwrap();
        }
    })
    .await
}

#[tokio::test]
async fn a_clerk_follows_what_changes() {
    let hub = hub_at(1);
    let node = Node::serve(&hub);
    let clerk = Clerk::builder(job()).sources([node.address.clone()]).start().unwrap();
    soon("an assignment", clerk.ready()).await;
    assert_eq!(owner(&clerk), "t1");
    let mut router = clerk.router();
    assert_eq!(router.route(b"x").unwrap().generation(), generation(1));
    for number in 2..=5 {
        advance(&hub);
        clerk.wait_for(generation(number), PATIENCE).await.unwrap();
        assert_eq!(owner(&clerk), format!("t{number}"));
        assert_eq!(router.route(b"x").unwrap().generation(), generation(number));
    }
    assert!(matches!(clerk.state(), State::Live { .. }));
    assert_eq!(clerk.clone().assignment(), hub.get(&job()));
}

#[tokio::test]
async fn before_it_knows_anything_a_clerk_says_so() {
    let hub = Hub::new();
    let node = Node::serve(&hub);
    let clerk = Clerk::builder(job()).sources([node.address.clone()]).start().unwrap();
    assert_eq!(clerk.route(b"x").unwrap_err(), NoTask::Unknown);
    assert_eq!(clerk.assignment(), None);
    let state = becomes(
        &clerk,
        "the reason",
        |state| matches!(state, State::Empty { why, .. } if why.contains("does not know job kv")),
    );
    state.await;
    let short = Duration::from_millis(20);
    let error = clerk.wait_for(generation(1), short).await.unwrap_err();
    assert_eq!((error.wanted, error.waited), (generation(1), short));
    hub.publish(Arc::new(Assignment::new(job(), generation(1))), None);
    soon("an assignment", clerk.ready()).await;
    let nobody = NoTask::Nobody { slice: Slice::FULL, generation: generation(1) };
    assert_eq!(clerk.route(b"x").unwrap_err(), nobody);
}

#[tokio::test]
async fn with_every_source_gone_a_clerk_goes_on_and_comes_back() {
    let hub = hub_at(1);
    let node = Node::serve(&hub);
    let address = node.address.clone();
    let clerk = Clerk::builder(job()).sources([address.clone()]).start().unwrap();
    soon("an assignment", clerk.ready()).await;
    drop(node);
    becomes(&clerk, "a stale state", |state| matches!(state, State::Stale { .. })).await;
    assert_eq!(owner(&clerk), "t1");
    advance(&hub);
    // Somebody else's connection may have the port for a moment.
    let again = async {
        loop {
            match std::net::TcpListener::bind(address.as_str()) {
                Ok(listener) => break listener,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let listener = soon("its port again", again).await;
    let _again = Node::serve_on(listener, &hub);
    clerk.wait_for(generation(2), PATIENCE).await.unwrap();
    assert_eq!(owner(&clerk), "t2");
    becomes(&clerk, "a live state", |state| matches!(state, State::Live { .. })).await;
}

#[tokio::test]
async fn a_new_clerk_starts_from_a_peer_with_every_source_gone() {
    let hub = hub_at(1);
    let source = Node::serve(&hub);
    // A caller that is served, and serves others: what a proxy does.
    let peers = Hub::new();
    let first = Clerk::builder(job()).sources([source.address.clone()]);
    let first = first.publish_to(peers.clone()).start().unwrap();
    let peer = Node::serve(&peers);
    soon("an assignment", first.ready()).await;
    drop(source);
    let second = Clerk::builder(job()).sources([nobody(), nobody()]);
    let second = second.peers([peer.address.clone()]).start().unwrap();
    soon("an assignment from the peer", second.ready()).await;
    assert_eq!(owner(&second), "t1");
}

#[tokio::test]
async fn a_new_clerk_starts_from_its_file_with_everyone_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kv.assignment");
    let hub = hub_at(7);
    let node = Node::serve(&hub);
    let clerk = Clerk::builder(job()).sources([node.address.clone()]).cache(&path);
    let clerk = clerk.start().unwrap();
    soon("an assignment", clerk.ready()).await;
    advance(&hub);
    clerk.wait_for(generation(8), PATIENCE).await.unwrap();
    drop(node);
    // On its way out it saves what it has not yet.
    let mut inner = Arc::into_inner(clerk.inner).unwrap();
    inner.stop.cancel();
    inner.thread.take().unwrap().join().unwrap();

    let peers = Hub::new();
    let clerk = Clerk::builder(job()).sources([nobody()]).cache(&path);
    let clerk = clerk.publish_to(peers.clone()).start().unwrap();
    assert_eq!(owner(&clerk), "t8");
    assert!(matches!(clerk.state(), State::Stale { .. }));
    assert_eq!(peers.get(&job()), clerk.assignment());
}

#[tokio::test]
async fn what_is_known_is_too_old_once_nobody_has_told_for_so_long() {
    const HOUR: Duration = Duration::from_secs(3_600);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kv.assignment");
    let hub = hub_at(7);
    let node = Node::serve(&hub);
    let clerk = Clerk::builder(job()).sources([node.address.clone()]).cache(&path);
    let clerk = clerk.start().unwrap();
    becomes(&clerk, "a live state", |state| matches!(state, State::Live { .. })).await;
    // However long ago the last change was.
    assert_eq!(clerk.check_age(Duration::ZERO), Ok(()));
    drop(node);
    becomes(&clerk, "a stale state", |state| matches!(state, State::Stale { .. })).await;
    let old = clerk.check_age(Duration::ZERO).unwrap_err();
    assert!(old.heard.is_some_and(|ago| ago < PATIENCE), "{old}");
    assert_eq!(old.generation, generation(7));
    assert!(
        old.to_string().contains("older than 0ns: nobody has told what changes for 0."),
        "{old}"
    );
    assert!(matches!(clerk.route_within(b"x", Duration::ZERO), Err(NotWithin::TooOld(_))));
    assert_eq!(clerk.route_within(b"x", HOUR).unwrap().session(), SessionId(7));
    assert_eq!(clerk.route(b"x").unwrap().session(), SessionId(7));
    let mut inner = Arc::into_inner(clerk.inner).unwrap();
    inner.stop.cancel();
    inner.thread.take().unwrap().join().unwrap();

    // What a file held was never heard of by this one, so nobody knows how old it is.
    let clerk = Clerk::builder(job()).sources([nobody()]).cache(&path).start().unwrap();
    let old = clerk.check_age(HOUR).unwrap_err();
    assert_eq!(old.heard, None);
    assert!(old.to_string().contains("since the clerk started, 0."), "{old}");
    // A clerk that knows nothing says so.
    let empty = Clerk::builder(job()).sources([nobody()]).start().unwrap();
    assert_eq!(empty.route_within(b"x", HOUR).unwrap_err(), NotWithin::NoTask(NoTask::Unknown));
}

#[tokio::test]
async fn a_file_that_is_no_use_is_ignored_and_only_ours_is_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kv.assignment");
    let hub = hub_at(1);
    let node = Node::serve(&hub);
    for (content, replaced) in [("dear diary", false), ("mandolin", true)] {
        fs::write(&path, content).unwrap();
        let clerk = Clerk::builder(job()).sources([node.address.clone()]).cache(&path);
        let clerk = clerk.start().unwrap();
        soon("an assignment", clerk.ready()).await;
        let mut inner = Arc::into_inner(clerk.inner).unwrap();
        inner.stop.cancel();
        inner.thread.take().unwrap().join().unwrap();
        assert_eq!(fs::read(&path).unwrap() != content.as_bytes(), replaced, "{content}");
    }
}

#[tokio::test]
async fn what_was_seen_elsewhere_sends_a_clerk_to_another_source() {
    let (lagging, ahead) = (hub_at(1), hub_at(5));
    let (behind, peer) = (Node::serve(&lagging), Node::serve(&ahead));
    let clerk = Clerk::builder(job()).sources([behind.address.clone()]);
    let clerk = clerk.peers([peer.address.clone()]).start().unwrap();
    soon("an assignment", clerk.ready()).await;
    assert_eq!(owner(&clerk), "t1");
    clerk.refresh(generation(5));
    clerk.refresh(generation(3));
    clerk.wait_for(generation(5), PATIENCE).await.unwrap();
    assert_eq!(owner(&clerk), "t5");
}

#[tokio::test]
async fn a_clerk_follows_a_hub_of_its_own_process() {
    let hub = Hub::new();
    let clerk = Clerk::follow_hub(&hub, job()).unwrap();
    assert_eq!(clerk.route(b"x").unwrap_err(), NoTask::Unknown);
    hub.publish(assignment(1), None);
    soon("an assignment", clerk.ready()).await;
    advance(&hub);
    clerk.wait_for(generation(2), PATIENCE).await.unwrap();
    assert_eq!(owner(&clerk), "t2");
    assert!(matches!(clerk.state(), State::Live { .. }));
}

#[tokio::test]
async fn a_frozen_clerk_knows_what_it_was_given() {
    let clerk = Clerk::frozen(assignment(3));
    assert_eq!(owner(&clerk), "t3");
    assert_eq!(soon("what it knows", clerk.ready()).await, assignment(3));
    clerk.refresh(generation(9));
    assert!(clerk.wait_for(generation(9), Duration::from_millis(5)).await.is_err());
}

#[tokio::test]
async fn a_clerk_waits_until_a_slice_has_moved() {
    let hub = hub_at(1);
    let clerk = Clerk::follow_hub(&hub, job()).unwrap();
    soon("an assignment", clerk.ready()).await;
    let key = SliceKey::of(b"some key");
    // The old owner judged by 1.2, and 1.3 still shows the release.
    advance(&hub);
    let released = delta(3).apply_to(&hub.get(&job()).unwrap()).unwrap();
    let (from, to) = (SessionId(2), SessionId(4));
    let id = HandOffId { began: generation(2), first: SliceKey(0) };
    let transit = Some(Arc::new(Transit { id, from: Some(from), to, step: Step::Releasing }));
    let assigned = released.get(key).1.clone();
    let mut in_transit = released;
    in_transit.slices.set(Slice::FULL, Assigned { transit, ..assigned });
    let wait = clerk.wait_moved(key, generation(2), PATIENCE);
    let moves = async {
        hub.publish(Arc::new(in_transit), None);
        clerk.wait_for(generation(3), PATIENCE).await.unwrap();
        let short = Duration::from_millis(20);
        let error = clerk.wait_moved(key, generation(2), short).await.unwrap_err();
        let NotMoved::TimedOut { told, waited, .. } = &error else { panic!("{error}") };
        assert_eq!((*told, *waited), (generation(2), short));
        assert!(error.to_string().contains("was still moving 20ms after"), "{error}");
        let over = delta(4).apply_to(&hub.get(&job()).unwrap()).unwrap();
        hub.publish(Arc::new(over), None);
    };
    let (target, ()) = tokio::join!(wait, moves);
    assert_eq!(target.unwrap().name().as_str(), "t4");
    // Where nobody serves it then, that is said, and not waited for.
    hub.publish(Arc::new(Assignment::new(job(), generation(5))), None);
    let error = clerk.wait_moved(key, generation(4), PATIENCE).await.unwrap_err();
    assert!(matches!(error, NotMoved::NoTask(_)), "{error}");
}

#[tokio::test]
async fn a_target_keeps_its_snapshot_and_may_be_sent_elsewhere() {
    let hub = hub_at(1);
    let clerk = Clerk::follow_hub(&hub, job()).unwrap();
    soon("an assignment", clerk.ready()).await;
    let target = clerk.route(b"x").unwrap();
    advance(&hub);
    clerk.wait_for(generation(2), PATIENCE).await.unwrap();
    let told = tokio::spawn(async move { format!("{target:?}") }).await.unwrap();
    assert_eq!(told, format!("t1 at 127.0.0.1:1 for {} as of 1.1", Slice::FULL));
}

#[test]
fn a_lookup_does_not_allocate() {
    let mut made = assignment(1).as_ref().clone();
    for number in 2..=4_u64 {
        made = delta(number).apply_to(&made).unwrap();
    }
    let replica = |id| Replica { session: SessionId(id), since: generation(4) };
    for n in 1..1_000_u64 {
        let replicas = (0..n % 4).map(|k| replica(1 + (n + k) % 4)).collect();
        let slice = Slice::new(SliceKey(n << 54), SliceKey(((n + 1) << 54) - 1)).unwrap();
        made.slices.set(slice, Assigned { replicas, ..Default::default() });
    }
    let clerk = Clerk::frozen(Arc::new(made));
    let mut router = clerk.router();
    let mut found = 0;
    let mut look = || {
        for n in 0..10_000_u64 {
            let key = n.to_be_bytes();
            found += usize::from(clerk.route(&key).is_ok());
            found += usize::from(router.route(&key).is_ok_and(|t| t.replicas().len() > 1));
            found += usize::from(router.route_at(SliceKey(n << 50)).is_ok());
        }
    };
    look(); // each thread's first lookup may set up what it keeps
    let counted = allocation_counter::measure(look);
    assert_eq!(counted.count_total, 0, "{counted:?}");
    assert!(found > 10_000);
    let counted = allocation_counter::measure(|| drop(vec![found]));
    assert_eq!(counted.count_total, 1, "the counter counts");
}

#[test]
fn clerks_and_targets_go_anywhere() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Clerk>();
    sent::<Router>();
    sent::<Target<Held>>();
}

#[test]
fn a_clerk_that_is_badly_described_does_not_start() {
    let error = Clerk::builder(job()).start().unwrap_err();
    assert!(matches!(error, StartError::NobodyToAsk(_)), "{error}");
    let error = Clerk::builder("k/v").sources(["127.0.0.1:1"]).start().unwrap_err();
    assert_eq!(error.to_string(), "job \"k/v\"");
    assert!(matches!(error, StartError::Job(..)), "{error}");
    for builder in [Clerk::builder("kv").sources(["nowhere"]), Clerk::builder("kv").peers([""])] {
        let error = builder.start().unwrap_err();
        assert!(matches!(error, StartError::Address(_)), "{error}");
    }
}

#[tokio::test]
async fn its_thread_ends_with_the_last_clone() {
    let clerk = Clerk::builder(job()).sources([nobody()]).start().unwrap();
    let states = clerk.inner.state.clone();
    let router = clerk.clone().router();
    drop(clerk);
    assert!(states.has_changed().is_ok(), "a router holds the clerk");
    drop(router);
    let mut states = states;
    soon("the thread's end", async { while states.changed().await.is_ok() {} }).await;
}

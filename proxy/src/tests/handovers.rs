//! An exclusive slice that goes from task to task under load, a thousand times: no request is lost, none is carried out twice,
//! and no two tasks carry out any at the same moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use mandoline_core::generation::Generation;
use mandoline_core::prng::Prng;
use mandoline_core::transit::Step;
use tokio::sync::watch;
use tokio::task::{JoinSet, yield_now};

use super::harness::{Backend, Owners, Stage, Wire, generation, show, status, text, until};

const CLIENTS: usize = 8;
const HAND_OVERS: u64 = 1_000;
const REQUESTS_BETWEEN: u64 = 3;

/// What a task believes of the one slice that there is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Belief {
    Mine,
    LettingGo,
    Anothers,
}

/// A task as the test sees it.
struct Task {
    backend: Backend,
    tell: watch::Sender<(Generation, Belief)>,
    // Requests that it is carrying out.
    guards: Arc<AtomicU64>,
}

impl Task {
    async fn start(believes: Belief, all_guards: Arc<AtomicU64>, done: Arc<AtomicU64>) -> Self {
        let (tell, belief) = watch::channel((generation(1), believes));
        let guards = Arc::new(AtomicU64::new(0));
        let own_guards = Arc::clone(&guards);
        let backend = Backend::serve(move |request| {
            let (belief, guards) = (belief.clone(), Arc::clone(&own_guards));
            let (all_guards, done) = (Arc::clone(&all_guards), Arc::clone(&done));
            async move {
                let (known, believes) = *belief.borrow();
                let known = known.to_string();
                match believes {
                    Belief::Mine => {
                        guards.fetch_add(1, SeqCst);
                        all_guards.fetch_add(1, SeqCst);
                        let seen = show(request).await;
                        let (own, all) = (guards.load(SeqCst), all_guards.load(SeqCst));
                        assert_eq!(own, all, "another task carries out requests too");
                        done.fetch_add(1, SeqCst);
                        all_guards.fetch_sub(1, SeqCst);
                        guards.fetch_sub(1, SeqCst);
                        text(seen)
                    }
                    Belief::LettingGo => {
                        let id = format!("{known}/0000000000000000");
                        status(503, &[("mandoline-transit", &id), ("mandoline-generation", &known)])
                    }
                    Belief::Anothers => status(421, &[("mandoline-generation", &known)]),
                }
            }
        })
        .await;
        Self { backend, tell, guards }
    }
}

#[tokio::test]
async fn a_slice_that_is_handed_over_a_thousand_times_under_load_loses_no_request() {
    let (all_guards, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut tasks = Vec::new();
    for believes in [Belief::Mine, Belief::Anothers] {
        tasks.push(Task::start(believes, Arc::clone(&all_guards), Arc::clone(&done)).await);
    }
    let place = |task: usize| (task as u64 + 1, tasks[task].backend.address);
    let stage = Stage::new(Owners::all(tasks[0].backend.address).await);
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (mut wire, stop) = (stage.connect().await, Arc::clone(&stop));
        clients.spawn(async move { requests(client, &mut wire, &stop).await });
    }
    let mut prng = Prng::new(19);
    for n in 0..HAND_OVERS {
        let (old, new) = (n as usize % 2, (n as usize + 1) % 2);
        let (release, over) = (2 * n + 2, 2 * n + 3);
        // Now and then the proxy hears of the release first; now and then it hears only how it ended.
        if prng.below(2) == 0 {
            stage.owners.hand_over(release, Step::Releasing, place(old), place(new)).await;
        }
        tasks[old].tell.send_replace((generation(release), Belief::LettingGo));
        until("a request to be held", || stage.stats().held > 0).await;
        until("guards to go", || tasks[old].guards.load(SeqCst) == 0).await;
        // The old owner, the new one and the proxy hear of the end in any order.
        let mut order = [0, 1, 2];
        for last in (1..order.len()).rev() {
            order.swap(last, prng.below(last as u64 + 1) as usize);
        }
        for hears in order {
            match hears {
                0 => drop(tasks[old].tell.send_replace((generation(over), Belief::Anothers))),
                1 => drop(tasks[new].tell.send_replace((generation(over), Belief::Mine))),
                _ => {
                    let (session, address) = place(new);
                    stage.owners.give(over, &[(0, session, address)]).await;
                }
            }
            yield_now().await;
        }
        let goal = done.load(SeqCst) + REQUESTS_BETWEEN;
        until("requests to go on", || done.load(SeqCst) >= goal).await;
    }
    stop.store(true, SeqCst);
    let mut sent = 0;
    while let Some(count) = clients.join_next().await {
        sent += count.unwrap();
    }
    let stats = stage.stats();
    assert_eq!((stats.requests, stats.answered, stats.failed, stats.abandoned), (sent, sent, 0, 0));
    assert_eq!(done.load(SeqCst), sent, "each once");
    assert!(stats.holds >= HAND_OVERS, "{stats:?}");
    assert_eq!((stats.holds_released, stats.held, stats.held_bytes), (stats.holds, 0, 0));
}

/// Sends requests with and without a body, one after the other, until told to stop, and counts them.
async fn requests(client: usize, wire: &mut Wire, stop: &AtomicBool) -> u64 {
    let mut count = 0;
    while !stop.load(SeqCst) {
        let body = format!("{client}-{count}").repeat(count as usize % 3);
        let (method, length) = (if body.is_empty() { "GET" } else { "POST" }, body.len());
        let head = format!(
            "{method} /kv/{client} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
        );
        wire.send(format!("{head}{body}")).await;
        let answer = wire.head().await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        wire.read_to(&format!("[{body}]")).await;
        count += 1;
    }
    count
}

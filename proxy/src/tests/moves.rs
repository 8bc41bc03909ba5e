//! Keys that move under load: whoever hears of a move first, no request fails and none is carried out by two tasks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use mandoline_core::extract::{Extract, Parts};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::harness::{Backend, Owners, Stage, Wire, generation, show, status, text, until};

const TASKS: usize = 3;
const CLIENTS: usize = 8;
const MOVES: u64 = 30;
const REQUESTS_BETWEEN_MOVES: u64 = 60;
/// Few, for all parties must hear of a move before those who wait for it give up.
const REQUESTS_BETWEEN_NEWS: u64 = 4;

/// What one task believes: the generation, and the parts of the key space, by their first key, that are its own.
type Belief = (Generation, BTreeMap<u64, bool>);

/// A task that serves what it believes to be its own, and counts what it carried out.
async fn task(belief: watch::Receiver<Belief>, done: Arc<AtomicU64>) -> Backend {
    Backend::serve(move |request| {
        let (belief, done) = (belief.clone(), Arc::clone(&done));
        async move {
            let headers: &[(&str, &str)] = &[];
            let path = request.uri().path().to_owned();
            let key = Extract::Path(1)
                .key(&Parts { path: &path, query: None, host: None, headers })
                .unwrap();
            let key = SliceKey::of(&key).0;
            let (generation, own) = belief.borrow().clone();
            if !own.range(..=key).next_back().unwrap().1 {
                return status(421, &[("mandoline-generation", &generation.to_string())]);
            }
            done.fetch_add(1, SeqCst);
            text(show(request).await)
        }
    })
    .await
}

#[tokio::test]
async fn keys_that_move_under_load_fail_no_request() {
    let mut beliefs = Vec::new();
    let mut tasks = Vec::new();
    let done = Arc::new(AtomicU64::new(0));
    for _ in 0..TASKS {
        let (tell, belief) = watch::channel((Generation::ZERO, BTreeMap::new()));
        beliefs.push(tell);
        tasks.push(task(belief, Arc::clone(&done)).await);
    }
    // Each eighth of the key space has an owner.
    let mut owners = [0, 1, 2, 0, 1, 2, 0, 1];
    let first = |eighth: usize| (eighth as u64) << 61;
    let belief = |number: u64, owners: &[usize; 8], task: usize| {
        (generation(number), (0..8).map(|eighth| (first(eighth), owners[eighth] == task)).collect())
    };
    let runs = |owners: &[usize; 8]| -> Vec<_> {
        (0..8)
            .map(|eighth| (first(eighth), owners[eighth] as u64, tasks[owners[eighth]].address))
            .collect()
    };
    for (task, tell) in beliefs.iter().enumerate() {
        tell.send_replace(belief(1, &owners, task));
    }
    let stage = Stage::new(Owners::none());
    stage.owners.give(1, &runs(&owners)).await;

    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (mut wire, stop) = (stage.connect().await, Arc::clone(&stop));
        clients.spawn(async move { requests(client, &mut wire, &stop).await });
    }
    let mut prng = Prng::new(17);
    for number in 2..2 + MOVES {
        // Not the same keys twice in a row: those who wait go to one fresh owner, and no further.
        let eighth = &mut owners[number as usize % 8];
        *eighth = (*eighth + 1) % TASKS;
        // The proxy, the old owner and the new one hear of it in any order.
        let mut order = [0, 1, 2, 3];
        for last in (1..order.len()).rev() {
            order.swap(last, prng.below(last as u64 + 1) as usize);
        }
        for hears in order {
            match beliefs.get(hears) {
                Some(tell) => drop(tell.send_replace(belief(number, &owners, hears))),
                None => stage.owners.give(number, &runs(&owners)).await,
            }
            // Unless all clients wait for this move.
            let some = go_on(&done, REQUESTS_BETWEEN_NEWS);
            drop(tokio::time::timeout(Duration::from_millis(5), some).await);
        }
        go_on(&done, REQUESTS_BETWEEN_MOVES).await;
    }
    stop.store(true, SeqCst);
    let mut sent = 0;
    while let Some(count) = clients.join_next().await {
        sent += count.unwrap();
    }
    let stats = stage.stats();
    assert_eq!((stats.requests, stats.answered, stats.failed, stats.abandoned), (sent, sent, 0, 0));
    // Exactly once each: a second try never follows a first that was carried out.
    assert_eq!(done.load(SeqCst), sent);
    assert!(stats.retried > 0 && stats.first_try_right == sent - stats.retried, "{stats:?}");
}

/// Waits until so many more requests were carried out.
async fn go_on(done: &AtomicU64, more: u64) {
    let goal = done.load(SeqCst) + more;
    until("requests to go on", || done.load(SeqCst) >= goal).await;
}

/// Sends requests with and without a body, one after the other, until told to stop, and counts them.
async fn requests(client: usize, wire: &mut Wire, stop: &AtomicBool) -> u64 {
    let mut count = 0;
    while !stop.load(SeqCst) {
        let body = format!("{client}-{count}").repeat(count as usize % 3 * 100);
        let (method, length) = (if body.is_empty() { "GET" } else { "POST" }, body.len());
        let head = format!(
            "{method} /kv/{client}-{count} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
        );
        let began = tokio::time::Instant::now();
        wire.send(format!("{head}{body}")).await;
        let answer = wire.head().await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer} after {:?}", began.elapsed());
        wire.read_to(&format!("[{body}]")).await;
        count += 1;
    }
    count
}

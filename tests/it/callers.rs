//! Callers of the sample service: each asks for one key after the other over a connection that it keeps, and notes what it
//! was told. And a turn for tests that measure: one of them at a time.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use mandoline::{Assignment, Clerk, Generation};
use mandoline_core::spec::JobSpec;
use mandoline_proto::pb;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

/// What one request led to.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) key: usize,
    pub(crate) began: Instant,
    pub(crate) took: Duration,
    pub(crate) answer: Result<Answer, String>,
}

/// What was answered.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The task that answered.
    pub(crate) task: Option<String>,
    /// It says when to ask again, and who says so.
    pub(crate) says_what_to_do: bool,
    #[allow(dead_code)] // shown when a test fails
    pub(crate) body: String,
}

impl Outcome {
    /// Whether the application was asked and answered.
    pub(crate) fn is_good(&self) -> bool {
        self.answer.as_ref().is_ok_and(|answer| answer.status < 500)
    }

    /// Whether it failed in the way that callers can act on.
    pub(crate) fn is_clear(&self) -> bool {
        self.answer.as_ref().is_ok_and(|answer| answer.status == 503 && answer.says_what_to_do)
    }
}

/// Callers under way. Dropping them ends them.
#[derive(Debug)]
pub(crate) struct Callers {
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    stop: CancellationToken,
    calling: JoinSet<()>,
}

impl Callers {
    /// Starts callers of all `keys`, again and again, through the proxy at `target`.
    pub(crate) fn start(target: SocketAddr, keys: usize) -> Self {
        let (outcomes, stop) = (Arc::<Mutex<Vec<Outcome>>>::default(), CancellationToken::new());
        let mut calling = JoinSet::new();
        for caller in 0..CALLERS {
            let (outcomes, stop) = (Arc::clone(&outcomes), stop.clone());
            calling.spawn(async move {
                let mut tick = interval(CALL_EVERY);
                tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let mut connection = None;
                for number in 0.. {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        _ = tick.tick() => {}
                    }
                    let key = (caller + number * CALLERS) % keys;
                    let method = if number % 4 == 0 { "PUT" } else { "GET" };
                    let began = Instant::now();
                    let asked = ask(&mut connection, target, method, key);
                    let answer = timeout(HANGS_AFTER, asked)
                        .await
                        .unwrap_or_else(|_| Err(format!("no answer within {HANGS_AFTER:?}")));
                    if answer.is_err() {
                        connection = None;
                    }
                    let outcome = Outcome { key, began, took: began.elapsed(), answer };
                    outcomes.lock().unwrap().push(outcome);
                }
            });
        }
        Self { outcomes, stop, calling }
    }

    /// Gives what was told to requests that began since.
    pub(crate) fn since(&self, when: Instant) -> Vec<Outcome> {
        let outcomes = self.outcomes.lock().unwrap();
        outcomes.iter().filter(|outcome| outcome.began >= when).cloned().collect()
    }

    /// Whether each of these keys was answered well by a request that began since.
    pub(crate) fn answered(&self, keys: &[usize], when: Instant) -> bool {
        let good: Vec<usize> =
            self.since(when).iter().filter(|o| o.is_good()).map(|o| o.key).collect();
        keys.iter().all(|key| good.contains(key))
    }

    /// Ends the callers, and gives everything that they were told.
    pub(crate) async fn stop(mut self) -> Vec<Outcome> {
        self.stop.cancel();
        while let Some(ended) = self.calling.join_next().await {
            ended.unwrap();
        }
        std::mem::take(&mut *self.outcomes.lock().unwrap())
    }
}

/// Asks once, by the connection that there is, or by a new one if there is none or it was closed while idle.
pub(crate) async fn ask(
    connection: &mut Option<SendRequest<Full<Bytes>>>,
    target: SocketAddr,
    method: &str,
    key: usize,
) -> Result<Answer, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    if connection.as_ref().is_none_or(SendRequest::is_closed) {
        let stream = TcpStream::connect(target).await.map_err(|error| text(&error))?;
        let (sender, driver) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
        // Ends with the sender, or with the other side.
        drop(tokio::spawn(async move { drop(driver.await) }));
        *connection = Some(sender);
    }
    let sender = connection.as_mut().expect("it is there or has just been made");
    sender.ready().await.map_err(|error| text(&error))?;
    let body = if method == "PUT" { Bytes::from_static(b"value") } else { Bytes::new() };
    let request = http::Request::builder()
        .method(method)
        .uri(format!("/kv/key-{key}"))
        .header("host", target.to_string())
        .body(Full::new(body))
        .expect("numbers make a path");
    let reply = sender.send_request(request).await.map_err(|error| text(&error))?;
    let (head, body) = reply.into_parts();
    let body = body.collect().await.map_err(|error| text(&error))?.to_bytes();
    let has = |name: &str| head.headers.contains_key(name);
    let task = head.headers.get("mandoline-task").and_then(|task| task.to_str().ok());
    Ok(Answer {
        status: head.status.as_u16(),
        task: task.map(str::to_owned),
        says_what_to_do: has("retry-after") && has("proxy-status"),
        body: String::from_utf8_lossy(&body).trim().to_owned(),
    })
}

/// A key's bytes, as the proxy reads them from the path.
pub(crate) fn bytes_of(key: usize) -> Vec<u8> {
    format!("key-{key}").into_bytes()
}

/// Fails with the first few of these, if there are any.
pub(crate) fn assert_none<'a>(what: &str, outcomes: impl IntoIterator<Item = &'a Outcome>) {
    let bad: Vec<&Outcome> = outcomes.into_iter().collect();
    let first: Vec<String> = bad.iter().take(5).map(|outcome| format!("{outcome:?}")).collect();
    assert!(bad.is_empty(), "{}: {what}, such as\n  {}", bad.len(), first.join("\n  "));
}

/// The binary under test.
pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_mandoline"))
}

/// The job of the sample service, with a heartbeat of a second. Balanced so seldom that no key moves on its own.
pub(crate) fn kv() -> pb::JobSpec {
    let spec = JobSpec {
        balance_every: Duration::from_secs(3_600),
        ..JobSpec::new("kv".parse().unwrap())
    };
    pb::JobSpec::from(&spec)
}

/// Waits until every task of a job has keys and no slice is on its way, and gives the generation that has it so. Balanced as [`kv`] is, nothing
/// changes any more.
pub(crate) async fn at_rest(clerk: &Clerk, tasks: usize) -> Generation {
    let rests = |known: &Option<Arc<Assignment>>| {
        let Some(known) = known else { return false };
        let all = || known.slices.iter().map(|(_, assigned)| assigned);
        known.tasks.len() == tasks
            && known.tasks.keys().all(|task| all().any(|slice| slice.replicas.of(*task).is_some()))
            && all().all(|slice| slice.transit.is_none())
    };
    let mut changes = clerk.changes();
    let known = timeout(PATIENCE, changes.wait_for(rests)).await;
    let known = known.unwrap_or_else(|_| panic!("slices still move: {:?}", clerk.assignment()));
    known.unwrap().as_ref().expect("it rests").generation
}

/// Waits for its turn: tests that measure time take it, so that they do not measure each other. Held until dropped.
pub(crate) async fn my_turn() -> Turn {
    TURN.lock().await
}

/// [`my_turn`] for a test without a runtime.
pub(crate) fn my_turn_blocking() -> Turn {
    TURN.blocking_lock()
}

/// Held by one test at a time.
pub(crate) type Turn = tokio::sync::MutexGuard<'static, ()>;

static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A number from the environment: how long or how often, for who runs a test by hand.
pub(crate) fn number(variable: &str, usual: u64) -> u64 {
    let given = std::env::var(variable).ok();
    given.map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text:?}")))
}

/// Callers at once: enough that one which waits does not hide the others' answers.
const CALLERS: usize = 6;
/// Each calls so often: 300 requests/s in all, which leaves a debug build on two cores idle for most of the time.
const CALL_EVERY: Duration = Duration::from_millis(20);
/// What takes longer is no answer.
const HANGS_AFTER: Duration = Duration::from_secs(5);
/// Far beyond what anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

//! Drives a running system with load: a recorded one, faster or slower than it was, or one that is made up.
//!
//! The load is open: a request goes out when it is due, whether or not the ones before were answered, as real callers do;
//! a closed loop would be polite to a slow system and hide it. At most `Limits::in_flight` requests are under way: past
//! that the driver waits, and counts how late it is, rather than pile up memory.
//!
//! A request is `GET /kv/KEY` with the header `mandoline-cost`, the event's weight. A miss (404) is filled by
//! `PUT /kv/KEY` with a value of the event's size, as a cache is. A fill's cost is zero, so that the load that a run
//! brings is exactly the recording's.

pub(crate) mod histogram;
mod client;
pub(crate) mod ledger;
mod feed;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use mandoline_core::key::SliceKey;
use mandoline_sim::access_log::KeyPart;
use mandoline_sim::event::Event;
use mandoline_sim::lines::InputError;
use mandoline_sim::workload::Workload;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::drive::client::Client;
use crate::drive::feed::Feed;
use crate::drive::ledger::{Ledger, Outcome, Totals, Window};

/// What to send, and how fast.
#[derive(Clone, Debug)]
pub(crate) enum Load {
    /// The events of a trace or an access log. Sent once if the run has no end of its own, else over and over until
    /// then: the next pass begins one mean gap after the last event.
    Recorded {
        /// The file.
        path: PathBuf,
        /// Which part of a log line is the key.
        key: Option<KeyPart>,
        /// How fast.
        pace: Pace,
    },
    /// Keys drawn by a law. Has no end of its own.
    Made {
        /// The law.
        workload: Workload,
        /// What the drawing starts from: the same seed gives the same keys.
        seed: u64,
        /// How fast.
        rate: Rate,
    },
}

/// How fast a recording is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pace {
    /// By its own times, so many times faster. Times in whole seconds or minutes are spread evenly over them.
    Speed(Speed),
    /// At a steady rate, in its own order.
    Rate(Rate),
}

/// Why a number is no pace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}: give a number above 0, at most {PACE_MAX:e}")]
pub(crate) struct PaceError {
    what: &'static str,
    text: String,
}

/// The fastest that can be asked for: far beyond what one machine sends.
const PACE_MAX: f64 = 1e7;

macro_rules! pace {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub(crate) struct $type(f64);

        impl FromStr for $type {
            type Err = PaceError;

            fn from_str(text: &str) -> Result<Self, PaceError> {
                let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= PACE_MAX);
                number.map(Self).ok_or_else(|| PaceError { what: $what, text: text.to_owned() })
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

pace! {
    /// Requests a second.
    Rate, "rate in requests a second"
}
pace! {
    /// How many times faster than it was recorded.
    Speed, "speed"
}

/// What a run may take.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// When the run ends by itself, counted from its start.
    pub(crate) length: Option<Duration>,
    /// Requests under way at once; each has a connection of its own, kept alive and used again.
    pub(crate) in_flight: usize,
    /// How long an answer may take before the request has failed.
    pub(crate) timeout: Duration,
    /// The largest value that a fill writes.
    pub(crate) value_max_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // 512 in flight carries 50,000 requests/s at 10 ms each, more than one machine sends. 4 KiB a value keeps a
        // recording of large files from measuring memory copies.
        Self {
            length: None,
            in_flight: 512,
            timeout: Duration::from_secs(10),
            value_max_bytes: 4 * 1024,
        }
    }
}

/// A run under way. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Driver {
    ledger: Arc<Ledger>,
    run: Option<JoinHandle<Option<InputError>>>,
    error: Option<InputError>,
    _stop: DropGuard,
}

impl Driver {
    /// Opens the load and starts to send it to `target`. Ends when the load does, at `limits.length`, or when `stop` is
    /// cancelled, whichever comes first.
    pub(crate) async fn start(
        target: SocketAddr,
        load: Load,
        limits: Limits,
        stop: &CancellationToken,
    ) -> Result<Self, InputError> {
        let stop = stop.child_token();
        let (feed, pace) = match load {
            Load::Recorded { path, key, pace } => {
                (Feed::recorded(path, key, limits.length.is_some()).await?, pace)
            }
            Load::Made { workload, seed, rate } => (Feed::made(workload, seed), Pace::Rate(rate)),
        };
        let ledger = Arc::new(Ledger::new(Instant::now()));
        let sender = Arc::new(Sender {
            client: Client::new(target),
            ledger: Arc::clone(&ledger),
            value: vec![b'.'; limits.value_max_bytes].into(),
            timeout: limits.timeout,
            abandon: CancellationToken::new(),
        });
        let run = tokio::spawn(run(feed, pace, limits, sender, stop.clone()));
        Ok(Self { ledger, run: Some(run), error: None, _stop: stop.drop_guard() })
    }

    /// Says what happened so far.
    pub(crate) fn totals(&self) -> Totals {
        self.ledger.totals()
    }

    /// Takes the load since it was last asked, by task and by key.
    pub(crate) fn window(&self) -> Window {
        self.ledger.take_window()
    }

    /// Waits for the end and says what happened; with an error if the recording could not be read to its end. Can be
    /// given up and called again.
    pub(crate) async fn finished(&mut self) -> (Totals, Option<&InputError>) {
        if let Some(run) = &mut self.run {
            self.error = run.await.expect("the run does not panic, and nobody aborts it");
            self.run = None;
        }
        (self.ledger.totals(), self.error.as_ref())
    }
}

/// Sends each event when it is due, then waits for those under way.
async fn run(
    mut feed: Feed,
    pace: Pace,
    limits: Limits,
    sender: Arc<Sender>,
    stop: CancellationToken,
) -> Option<InputError> {
    let tasks = TaskTracker::new();
    let start = sender.ledger.start();
    let end = limits.length.map(|length| start + length);
    let ended = async {
        match end {
            Some(end) => tokio::select! { () = sleep_until(end) => {} () = stop.cancelled() => {} },
            None => stop.cancelled().await,
        }
    };
    let send = send_all(&mut feed, pace, limits.in_flight, start, &sender, &tasks);
    let error = tokio::select! {
        biased;
        () = ended => None,
        sent = send => sent.err(),
    };
    feed.close().await;

    tasks.close();
    // Each request ends at its own deadline; once told to stop, nobody wants to wait for that.
    tokio::select! {
        () = tasks.wait() => {}
        () = told_to_stop(&stop) => {
            sender.abandon.cancel();
            tasks.wait().await;
        }
    }
    sender.client.close().await;
    sender.ledger.end();
    error
}

async fn told_to_stop(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(STOP_PATIENCE).await;
}

/// How long requests under way may take once the run was told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

async fn send_all(
    feed: &mut Feed,
    pace: Pace,
    in_flight: usize,
    start: Instant,
    sender: &Arc<Sender>,
    tasks: &TaskTracker,
) -> Result<(), InputError> {
    let room = Arc::new(Semaphore::new(in_flight));
    let mut number = 0_u64;
    while let Some(event) = feed.next(&sender.ledger).await? {
        let after = match pace {
            Pace::Speed(Speed(times)) => event.at.as_secs_f64() / times,
            Pace::Rate(Rate(rate)) => number as f64 / rate,
        };
        let due = start + Duration::from_secs_f64(after.min(DUE_MAX_SECONDS));
        number += 1;
        // What is due after the end is waited for too: the end comes first.
        if due > Instant::now() {
            sleep_until(due).await;
        }
        let permit =
            Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
        sender.ledger.sent(Instant::now() - due);
        let sender = Arc::clone(sender);
        tasks.spawn(async move {
            sender.serve(event).await;
            drop(permit);
        });
    }
    Ok(())
}

/// Thirty years, so that no sum of times overflows.
const DUE_MAX_SECONDS: f64 = 1e9;

/// What each request needs.
#[derive(Debug)]
struct Sender {
    client: Client,
    ledger: Arc<Ledger>,
    // Fills take a piece of it.
    value: Bytes,
    timeout: Duration,
    // Cancelled when no answer is waited for any longer.
    abandon: CancellationToken,
}

impl Sender {
    /// Asks for the event's key, and fills it if it was missed.
    async fn serve(&self, event: Event) {
        let path = path_of(&event.key);
        let place = SliceKey::of(event.key.as_bytes());
        let status = self.exchange(Method::GET, &path, event.weight, Bytes::new(), place).await;
        if status == Some(StatusCode::NOT_FOUND) {
            let bytes = event
                .bytes
                .map_or(FILL_BYTES, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
            let value = self.value.slice(..bytes.min(self.value.len()));
            self.ledger.sent(Duration::ZERO);
            self.exchange(Method::PUT, &path, 0, value, place).await;
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        cost: u64,
        body: Bytes,
        place: SliceKey,
    ) -> Option<StatusCode> {
        let began = Instant::now();
        let request = self.client.send(method.clone(), path, cost, body);
        let reply = tokio::select! {
            biased;
            reply = timeout(self.timeout, request) => reply,
            () = self.abandon.cancelled() => {
                self.ledger.abandoned();
                return None;
            }
        };
        let took = began.elapsed();
        let reply = reply.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout)));
        let outcome = Outcome { method: &method, path, cost, place, took, reply: &reply };
        self.ledger.record(&outcome);
        reply.ok().map(|reply| reply.status)
    }
}

/// The size of a fill where the recording gives none: a small record.
const FILL_BYTES: usize = 128;

/// Writes a key as the path of its value, each byte that is not unreserved (RFC 3986, 2.3) as `%` and two hex digits.
fn path_of(key: &str) -> String {
    let mut path = String::with_capacity("/kv/".len() + key.len());
    path.push_str("/kv/");
    // What is between two slashes is taken away if it is `.` or `..` (RFC 3986, 5.2.4).
    let dots = matches!(key, "." | "..");
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'_' | b'~')
            || (byte == b'.' && !dots)
        {
            path.push(char::from(byte));
        } else {
            path.push('%');
            for nibble in [byte >> 4, byte & 15] {
                path.push(
                    char::from_digit(u32::from(nibble), 16)
                        .expect("a nibble is a hex digit")
                        .to_ascii_uppercase(),
                );
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mandoline_core::slice::Slice;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::demo::server::Server;
    use crate::demo::store::Store;
    use crate::demo::testing::Part;

    async fn task(name: &str) -> (Server, Arc<Part>, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (part, stop) = (Arc::new(Part::new(Slice::FULL)), CancellationToken::new());
        let store = Arc::new(Store::new(16 << 20));
        let server =
            Server::start(&name.parse().unwrap(), listener, Arc::clone(&part), store, stop.clone());
        (server.unwrap(), part, stop)
    }

    fn trace(lines: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.as_bytes()).unwrap();
        file
    }

    fn recorded(file: &tempfile::NamedTempFile, pace: Pace) -> Load {
        Load::Recorded { path: file.path().to_owned(), key: None, pace }
    }

    async fn finish(driver: &mut Driver) -> Totals {
        let (totals, error) = timeout(Duration::from_secs(30), driver.finished())
            .await
            .expect("the run ends within 30 s");
        assert!(error.is_none(), "{error:?}");
        totals
    }

    #[tokio::test]
    async fn a_trace_is_sent_with_its_costs_and_misses_are_filled() {
        let (server, part, _stop) = task("t1").await;
        let file = trace("0 a 2 10\n0.01 a/b? 3\n0.05 a 5\n0.05 .. 7 99999999\n");
        let load = recorded(&file, Pace::Speed("2".parse().unwrap()));
        let stop = CancellationToken::new();
        let mut driver =
            Driver::start(server.address(), load, Limits::default(), &stop).await.unwrap();
        let totals = finish(&mut driver).await;
        assert_eq!(
            (totals.hits, totals.misses, totals.fills, totals.failed),
            (1, 3, 3, 0),
            "{totals:?}"
        );
        assert_eq!((totals.requests, totals.in_flight, totals.passes), (7, 0, 1));
        assert_eq!((totals.cost, part.counted()), (17, 17.0));
        assert_eq!(totals.by_task["t1"], ledger::TaskTotals { requests: 7, cost: 17 });
        assert!(totals.elapsed >= Duration::from_millis(25), "{:?}", totals.elapsed);
        assert_eq!(driver.window().by_task["t1"], 17);
        assert!(driver.window().by_task.is_empty(), "a window is taken once");
    }

    /// Waits for something to be true of the totals.
    async fn until(driver: &Driver, what: &str, is_true: impl Fn(&Totals) -> bool) {
        let wait = async {
            while !is_true(&driver.totals()) {
                tokio::task::yield_now().await;
            }
        };
        let waited = timeout(Duration::from_secs(30), wait).await;
        waited.unwrap_or_else(|_| panic!("{what} within 30 s: {:?}", driver.totals()));
    }

    #[tokio::test]
    async fn a_run_with_a_length_starts_the_trace_over() {
        let (server, _, _stop) = task("t1").await;
        let file = trace("0 a\n0.02 b\n0.04 c\n");
        let limits = Limits { length: Some(Duration::from_secs(3_600)), ..Limits::default() };
        for pace in [Pace::Speed("1".parse().unwrap()), Pace::Rate("100".parse().unwrap())] {
            let stop = CancellationToken::new();
            let load = recorded(&file, pace);
            let mut driver =
                Driver::start(server.address(), load, limits.clone(), &stop).await.unwrap();
            until(&driver, "a third pass", |totals| totals.passes >= 3 && totals.requests > 6)
                .await;
            stop.cancel();
            let totals = finish(&mut driver).await;
            assert_eq!((totals.failed, totals.refused), (0, 0), "{pace:?}: {totals:?}");
        }
    }

    #[tokio::test]
    async fn a_run_lasts_as_long_as_it_was_given() {
        let (server, _, _stop) = task("t1").await;
        let file = trace("0 a\n3600.5 b\n");
        let length = Duration::from_millis(50);
        let limits = Limits { length: Some(length), ..Limits::default() };
        let load = recorded(&file, Pace::Speed("1".parse().unwrap()));
        let stop = CancellationToken::new();
        let mut driver = Driver::start(server.address(), load, limits, &stop).await.unwrap();
        let totals = finish(&mut driver).await;
        assert!(totals.elapsed >= length && totals.hits + totals.misses <= 1, "{totals:?}");
    }

    #[tokio::test]
    async fn made_load_comes_at_its_rate_until_it_is_stopped() {
        let (server, _, _stop) = task("t1").await;
        let (workload, rate) = ("zipf:1,keys=50".parse().unwrap(), "2000".parse().unwrap());
        let load = Load::Made { workload, seed: 1, rate };
        let stop = CancellationToken::new();
        let mut driver =
            Driver::start(server.address(), load, Limits::default(), &stop).await.unwrap();
        until(&driver, "1,000 requests", |totals| totals.requests >= 1_000).await;
        stop.cancel();
        let totals = finish(&mut driver).await;
        assert_eq!((totals.failed, totals.in_flight), (0, 0), "{totals:?}");
        let due = totals.elapsed.as_secs_f64() * 2_000.0 + 50.0;
        assert!(
            (totals.hits + totals.misses) as f64 <= due + 1.0,
            "no more than were due: {totals:?}"
        );
        assert!(totals.misses >= 30, "{totals:?}");
    }

    #[tokio::test]
    async fn what_is_not_answered_has_failed_and_is_told_why() {
        // Bound and dropped, so that nobody listens there.
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let file = trace("0 a\n0 b\n");
        let load = recorded(&file, Pace::Speed("1".parse().unwrap()));
        let stop = CancellationToken::new();
        let mut driver = Driver::start(nobody, load, Limits::default(), &stop).await.unwrap();
        let totals = finish(&mut driver).await;
        assert_eq!((totals.requests, totals.failed), (2, 2));
        assert!(totals.errors[0].contains("no connection to 127.0.0.1:"), "{:?}", totals.errors);
    }

    /// Answers each connection's first request with `reply`, whatever it is, and then as `then` says.
    async fn speaks(reply: &'static str) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let speaker = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4_096];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(reply.as_bytes()).await.unwrap();
                if reply.is_empty() {
                    open.push(stream);
                }
            }
        });
        (address, speaker)
    }

    #[tokio::test]
    async fn a_5xx_has_failed_and_a_4xx_was_refused() {
        let file = trace("0 a\n");
        let stop = CancellationToken::new();
        for (reply, failed, refused, told) in [
            (
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 7\r\n\r\nno task",
                1,
                0,
                "503 Service Unavailable no task",
            ),
            ("HTTP/1.1 421 Misdirected Request\r\ncontent-length: 0\r\n\r\n", 0, 1, ""),
            ("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\ncut", 1, 0, "the answer broke off"),
            ("nonsense\r\n\r\n", 1, 0, "no answer"),
        ] {
            let (address, speaker) = speaks(reply).await;
            let load = recorded(&file, Pace::Speed("1".parse().unwrap()));
            let mut driver = Driver::start(address, load, Limits::default(), &stop).await.unwrap();
            let totals = finish(&mut driver).await;
            assert_eq!(
                (totals.requests, totals.failed, totals.refused),
                (1, failed, refused),
                "{reply}: {totals:?}"
            );
            assert!(totals.errors.iter().all(|error| error.contains(told)), "{:?}", totals.errors);
            speaker.abort();
        }
    }

    #[tokio::test]
    async fn silence_fails_in_time_and_is_given_up_when_told_to_stop() {
        let (address, speaker) = speaks("").await;
        let file = trace("0 a\n");
        let stop = CancellationToken::new();
        let limits = Limits { timeout: Duration::from_millis(100), ..Limits::default() };
        let load = recorded(&file, Pace::Speed("1".parse().unwrap()));
        let mut driver = Driver::start(address, load.clone(), limits, &stop).await.unwrap();
        let totals = finish(&mut driver).await;
        assert_eq!((totals.requests, totals.failed), (1, 1));
        assert!(totals.errors[0].ends_with("no answer within 100ms"), "{:?}", totals.errors);

        let mut driver = Driver::start(address, load, Limits::default(), &stop).await.unwrap();
        stop.cancel();
        let totals = finish(&mut driver).await;
        assert_eq!((totals.failed, totals.in_flight), (0, 0));
        assert!(totals.elapsed < Duration::from_secs(9), "{:?}", totals.elapsed);
        speaker.abort();
    }

    #[tokio::test]
    async fn past_its_room_in_flight_the_driver_waits_and_counts_it() {
        let (address, speaker) = speaks("").await;
        let limits =
            Limits { in_flight: 3, timeout: Duration::from_millis(200), ..Limits::default() };
        let (workload, rate) = ("zipf:0".parse().unwrap(), "1000".parse().unwrap());
        let load = Load::Made { workload, seed: 1, rate };
        let stop = CancellationToken::new();
        let mut driver = Driver::start(address, load, limits, &stop).await.unwrap();
        until(&driver, "a late request", |totals| {
            assert!(totals.in_flight <= 3, "{totals:?}");
            totals.late >= 1 && totals.late_max >= Duration::from_millis(100)
        })
        .await;
        stop.cancel();
        finish(&mut driver).await;
        speaker.abort();
    }

    #[tokio::test]
    async fn a_trace_that_breaks_off_ends_the_run_with_its_line() {
        let (server, _, _stop) = task("t1").await;
        let file = trace("0 a\n1 b\n0 c\n");
        let load = recorded(&file, Pace::Rate("1000".parse().unwrap()));
        let stop = CancellationToken::new();
        let mut driver =
            Driver::start(server.address(), load, Limits::default(), &stop).await.unwrap();
        let (_, error) = timeout(Duration::from_secs(30), driver.finished())
            .await
            .expect("the run ends within 30 s");
        assert!(matches!(error, Some(InputError::Unsorted { line: 3, .. })), "{error:?}");

        let missing = Load::Recorded {
            path: "no/such/file".into(),
            key: None,
            pace: Pace::Rate("1".parse().unwrap()),
        };
        let error =
            Driver::start(server.address(), missing, Limits::default(), &stop).await.unwrap_err();
        assert!(matches!(error, InputError::Open { .. }), "{error:?}");
    }

    #[test]
    fn a_pace_is_a_positive_number() {
        assert_eq!("0.5".parse(), Ok(Rate(0.5)));
        for bad in ["0", "-1", "NaN", "inf", "1e8", "fast", ""] {
            assert!(bad.parse::<Rate>().is_err() && bad.parse::<Speed>().is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_written_so_that_they_come_back() {
        assert_eq!(path_of("a-Z_0.9~"), "/kv/a-Z_0.9~");
        assert_eq!(path_of("/a b?é%"), "/kv/%2Fa%20b%3F%C3%A9%25");
        assert_eq!(path_of(".."), "/kv/%2E%2E");
    }
}

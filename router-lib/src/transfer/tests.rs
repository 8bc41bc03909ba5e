//! Two tasks on real sockets: state that moves, connections that break, sides that lie, and applications that misbehave.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use mandoline_core::assignment::{Assigned, Assignment};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::task::{Address, SessionId, Task, TaskInfo};
use mandoline_core::transit::{HandOffId, Step, Transit};
use mandoline_distributor::connect::Connector;
use mandoline_proto::pb;
use mandoline_proto::pb::transfers_client::TransfersClient;
use mandoline_proto::pb::transfers_server::{Transfers, TransfersServer};
use mandoline_proto::transfer::{Ask, CHUNK_MAX_BYTES, End, Pull, Say, Wanted};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use xxhash_rust::xxh3::xxh3_64;

use super::pull::{Import, Origin, PullError, Pulled, Puller};
use super::serve::{Exports, Leaving, NotSent, Outgoing};
use super::window::SOON;
use super::{
    AHEAD_MAX_BYTES, HandOff, Limits, Moved, Party, Pass, Refusal, RefusalCode, Sink, Source, State,
};

const MIB: u64 = 1 << 20;
/// How long anything here may take before the test is called hung.
const PATIENCE: Duration = Duration::from_secs(20);
const BLOCK: usize = 64 * 1024;

async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(it) => it,
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

fn later() -> Instant {
    Instant::now() + PATIENCE
}

// --- The application.

/// How a call of the application goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Well,
    Fails,
    Panics,
    /// Until the test says so.
    Hangs,
    /// Returns, content, at a place where it should not.
    Stops,
}

/// Both sides' application: says what it was asked, and measures how far one side is ahead of the other.
struct App {
    // Bytes of the bulk pass and of the last.
    sizes: [u64; 2],
    export: Way,
    import: Way,
    written: AtomicU64,
    read: AtomicU64,
    ahead: AtomicU64,
    calls: watch::Sender<Vec<String>>,
    // Whoever hangs waits for the other end to go.
    hold: Mutex<Option<mpsc::Sender<()>>>,
    held: Mutex<mpsc::Receiver<()>>,
}

impl App {
    fn new(bulk: u64, last: u64) -> Self {
        let (hold, held) = mpsc::channel();
        Self {
            sizes: [bulk, last],
            export: Way::Well,
            import: Way::Well,
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            calls: watch::Sender::default(),
            hold: Mutex::new(Some(hold)),
            held: Mutex::new(held),
        }
    }

    fn exporting(mut self, way: Way) -> Self {
        self.export = way;
        self
    }

    fn importing(mut self, way: Way) -> Self {
        self.import = way;
        self
    }

    fn note(&self, call: impl Into<String>) {
        self.calls.send_modify(|calls| calls.push(call.into()));
    }

    fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    async fn called(&self, call: &str) {
        let mut calls = self.calls.subscribe();
        let called = calls.wait_for(|calls| calls.iter().any(|made| made == call));
        drop(soon(call, called).await.unwrap());
    }

    fn go_on(&self) {
        self.hold.lock().unwrap().take();
    }

    fn act(&self, way: Way) -> io::Result<()> {
        match way {
            Way::Well | Way::Stops => Ok(()),
            Way::Fails => Err(io::Error::other("no more ink")),
            Way::Panics => panic!("told to"),
            Way::Hangs => {
                self.held.lock().unwrap().recv().unwrap_err();
                Ok(())
            }
        }
    }

    fn size(&self, pass: Pass) -> u64 {
        self.sizes[usize::from(pass == Pass::Last)]
    }
}

/// A block that says where it stands.
fn block(at: u64, left: u64) -> Vec<u8> {
    let mut block = vec![at as u8; left.min(BLOCK as u64) as usize];
    for (byte, stamp) in block.iter_mut().zip(at.to_le_bytes()) {
        *byte = stamp;
    }
    block
}

impl State for App {
    fn export(&self, _: &HandOff, pass: Pass, out: &mut Sink) -> io::Result<()> {
        self.note(format!("export {pass}"));
        let size = self.size(pass);
        for at in (0..size).step_by(BLOCK) {
            if at >= size / 2 && self.export != Way::Well {
                self.act(self.export)?;
            }
            let block = block(at, size - at);
            out.write_all(&block).inspect_err(|_| self.note("nobody wants it"))?;
            let written =
                self.written.fetch_add(block.len() as u64, Ordering::SeqCst) + block.len() as u64;
            self.ahead.fetch_max(written - self.read.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        self.act(self.export)
    }

    fn exported(&self, _: &HandOff) {
        self.note("exported");
    }

    fn import(&self, _: &HandOff, pass: Pass, bytes: &mut Source) -> io::Result<()> {
        self.note(format!("import {pass}"));
        let size = self.size(pass);
        let mut found = vec![0; BLOCK];
        for at in (0..size).step_by(BLOCK) {
            if at >= size / 2 && self.import != Way::Well {
                self.act(self.import)?;
                if self.import == Way::Stops {
                    return Ok(());
                }
            }
            let wanted = block(at, size - at);
            let found = &mut found[..wanted.len()];
            bytes.read_exact(found).inspect_err(|_| self.note(format!("broken {pass}")))?;
            assert!(*found == *wanted, "at byte {at} stands something else");
            self.read.fetch_add(found.len() as u64, Ordering::SeqCst);
        }
        self.note(format!("imported {pass}"));
        Ok(())
    }

    fn keep(&self, _: &HandOff) {
        self.note("keep");
    }

    fn discard(&self, _: &HandOff) {
        self.note("discard");
    }
}

// --- The two sides.

fn hand_off(number: u64) -> HandOff {
    let id = HandOffId { began: Generation { incarnation: 1, number }, first: SliceKey(0) };
    HandOff { id, slice: Slice::new(SliceKey(0), SliceKey(999)).unwrap() }
}

const OLD: Party = Party { session: SessionId(1), incarnation: 0xA };
const NEW: Party = Party { session: SessionId(2), incarnation: 0xB };

/// The side that has the slice, which hand-off 7 takes away.
struct Old {
    app: Arc<App>,
    address: Address,
    exports: Exports,
    outgoing: watch::Sender<Outgoing>,
    // Serve, and clear.
    tasks: [JoinHandle<()>; 2],
}

impl Old {
    async fn serve(app: App) -> Self {
        Self::serve_with(app, Limits::default()).await
    }

    async fn serve_with(app: App, limits: Limits) -> Self {
        let app = Arc::new(app);
        let leaving = Leaving { slice: hand_off(7).slice, to: NEW, due: Pass::Bulk };
        let hand_offs = BTreeMap::from([(hand_off(7).id, leaving)]);
        let known = Generation { incarnation: 1, number: 7 };
        let (outgoing, watched) = watch::channel(Outgoing { me: Some(OLD), known, hand_offs });
        let state: Arc<dyn State> = Arc::<App>::clone(&app);
        let exports = Exports::with_limits("kv".parse().unwrap(), Some(state), watched, limits);
        let (address, serve) = serve(Routes::new(exports.service())).await;
        let clearing = exports.clone();
        let clear = tokio::spawn(async move { clearing.clear().await });
        Self { app, address, exports, outgoing, tasks: [serve, clear] }
    }

    fn is_due(&self, due: Pass) {
        self.outgoing.send_modify(|outgoing| {
            outgoing.hand_offs.get_mut(&hand_off(7).id).unwrap().due = due;
        });
    }

    fn is_over(&self) {
        self.outgoing.send_modify(|outgoing| outgoing.hand_offs.clear());
    }

    fn origin(&self) -> Origin {
        Origin { address: self.address.clone(), party: OLD }
    }

    /// The other side, with the same application.
    fn puller(&self) -> Puller {
        puller(&self.app)
    }

    fn import(&self) -> Import {
        self.puller().begin(NEW, Some(self.origin()), hand_off(7))
    }
}

impl Drop for Old {
    fn drop(&mut self) {
        self.app.go_on();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn puller(app: &Arc<App>) -> Puller {
    let state: Arc<dyn State> = Arc::<App>::clone(app);
    Puller::new("kv".parse().unwrap(), state, Connector::default())
}

async fn serve(routes: Routes) -> (Address, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string().parse().unwrap();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = Server::builder().add_routes(routes).serve_with_incoming(incoming);
    (address, tokio::spawn(async move { server.await.unwrap() }))
}

/// Pulls a bulk pass that must fail, and says how.
async fn bulk_fails(import: &mut Import) -> PullError {
    soon("a pass that fails", import.bulk(later())).await.unwrap_err()
}

fn code(error: &PullError) -> RefusalCode {
    match error {
        PullError::Refused(refusal) => refusal.code,
        other => panic!("no refusal: {other:?}"),
    }
}

// --- What goes well.

async fn moves(size: u64) {
    let old = Old::serve(App::new(size, 1_000)).await;
    let puller = old.puller();
    let mut import = puller.begin(NEW, Some(old.origin()), hand_off(7));
    let moved = soon("the bulk pass", import.bulk(later())).await.unwrap();
    assert_eq!(moved, Moved { bytes: size, resumed: 0 });
    assert!(old.app.ahead.load(Ordering::SeqCst) <= AHEAD_MAX_BYTES as u64);
    old.is_due(Pass::Last);
    let (last, sent) = soon("the last pass", async {
        tokio::join!(import.last(later()), old.exports.sent(hand_off(7).id))
    })
    .await;
    assert_eq!((last.unwrap().bytes, sent.unwrap().bytes), (1_000, 1_000));
    old.is_over();
    import.keep().await.unwrap();
    old.app.called("exported").await;
    let mut calls = old.app.calls();
    calls.retain(|call| call != "exported");
    let expected =
        "export bulk,import bulk,imported bulk,export last,import last,imported last,keep";
    let mut expected: Vec<_> = expected.split(',').collect();
    // The two sides begin at the same time.
    calls.sort();
    expected.sort_unstable();
    assert_eq!(calls, expected);
    let pulled = Pulled { passes: 2, bytes: size + 1_000, resumed: 0, empty_starts: 0 };
    assert_eq!(puller.pulled(), pulled);
}

#[tokio::test]
async fn a_mebibyte_moves() {
    moves(MIB).await;
}

#[tokio::test]
async fn sixty_four_mebibytes_move_and_the_export_is_never_far_ahead() {
    moves(64 * MIB).await;
}

#[tokio::test]
async fn nothing_moves_too() {
    moves(0).await;
}

#[tokio::test]
async fn an_import_that_is_slow_makes_the_export_wait() {
    let old = Old::serve(App::new(8 * MIB, 0).importing(Way::Hangs)).await;
    let mut import = old.import();
    let bulk = import.bulk(later());
    let hangs = async {
        // The import hangs after half; the export gets as far as it may, and no further.
        // One chunk is not being read, since it hangs between two.
        let bound = 4 * MIB + (AHEAD_MAX_BYTES - CHUNK_MAX_BYTES) as u64;
        while old.app.written.load(Ordering::SeqCst) < bound {
            tokio::task::yield_now().await;
        }
        assert!(old.app.ahead.load(Ordering::SeqCst) <= AHEAD_MAX_BYTES as u64);
        old.app.go_on();
    };
    let (moved, ()) = soon("a slow import", async { tokio::join!(bulk, hangs) }).await;
    assert_eq!(moved.unwrap().bytes, 8 * MIB);
    assert!(old.app.ahead.load(Ordering::SeqCst) <= AHEAD_MAX_BYTES as u64);
}

#[tokio::test]
async fn a_last_pass_that_is_asked_for_too_early_waits_for_its_time() {
    let old = Old::serve(App::new(10, 20)).await;
    let mut import = old.import();
    import.bulk(later()).await.unwrap();
    let (last, ()) = soon("the last pass", async {
        tokio::join!(import.last(later()), async {
            tokio::task::yield_now().await;
            old.is_due(Pass::Last);
        })
    })
    .await;
    assert_eq!(last.unwrap().bytes, 20);
}

#[tokio::test]
async fn a_hand_off_that_is_not_known_yet_is_waited_for() {
    let old = Old::serve(App::new(10, 20)).await;
    let leaving = old.outgoing.borrow().hand_offs[&hand_off(7).id];
    let mut import = old.puller().begin(NEW, Some(old.origin()), hand_off(8));
    let (bulk, ()) = soon("the bulk pass", async {
        tokio::join!(import.bulk(later()), async {
            tokio::task::yield_now().await;
            old.outgoing.send_modify(|outgoing| {
                outgoing.known.number = 8;
                outgoing.hand_offs.insert(hand_off(8).id, leaving);
            });
        })
    })
    .await;
    assert_eq!(bulk.unwrap().bytes, 10);
}

#[tokio::test]
async fn after_the_bulk_pass_alone_an_affinity_slice_is_kept_and_an_exclusive_one_is_not() {
    let old = Old::serve(App::new(10, 20)).await;
    let mut import = old.import();
    import.bulk(later()).await.unwrap();
    assert!(matches!(import.keep().await, Err(PullError::NoBulk)));
    old.app.called("discard").await;
    let old = Old::serve(App::new(10, 20)).await;
    let mut import = old.import();
    import.bulk(later()).await.unwrap();
    import.keep_bulk().await.unwrap();
    assert_eq!(old.app.calls().last().unwrap(), "keep");
    assert!(matches!(old.import().keep_bulk().await, Err(PullError::NoBulk)));
}

// --- Connections that break.

/// Passes bytes on, breaking each connection after so many bytes to the puller; when there are no more, it stays whole.
/// After a break nobody gets through before the test says so, if it is to.
struct Relay {
    address: Address,
    passed: watch::Sender<u32>,
    pass: CancellationToken,
    task: JoinHandle<()>,
}

impl Relay {
    async fn to(target: &Address, breaks: &'static [u64], waits: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let (passed, pass, target) =
            (watch::Sender::new(0), CancellationToken::new(), target.clone());
        let (passing, counted) = (pass.clone(), passed.clone());
        let task = tokio::spawn(async move {
            let mut breaks = breaks.iter();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                if waits && *counted.borrow() > 0 {
                    passing.cancelled().await;
                }
                let far = TcpStream::connect(target.as_str()).await.unwrap();
                let most = breaks.next().copied().unwrap_or(u64::MAX);
                relay(near, far, most).await;
                counted.send_modify(|passed| *passed += 1);
            }
        });
        Self { address, passed, pass, task }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(near: TcpStream, far: TcpStream, most: u64) {
    let (mut near_read, mut near_write) = near.into_split();
    let (far_read, mut far_write) = far.into_split();
    let down = async {
        let mut far_read = far_read.take(most);
        tokio::io::copy(&mut far_read, &mut near_write).await
    };
    tokio::select! {
        _ = tokio::io::copy(&mut near_read, &mut far_write) => {}
        _ = down => {}
    }
    // What is left may be lost: that is what breaking means.
    far_write.shutdown().await.ok();
}

#[tokio::test]
async fn broken_connections_in_the_middle_cost_what_was_under_way_and_no_more() {
    let old = Old::serve(App::new(16 * MIB, 0)).await;
    let relay = Relay::to(&old.address, &[5_000_000, 400_000, 3_000_000], false).await;
    let puller = old.puller();
    let origin = Origin { address: relay.address.clone(), party: OLD };
    let mut import = puller.begin(NEW, Some(origin), hand_off(7));
    let moved = soon("the bulk pass", import.bulk(later())).await.unwrap();
    assert_eq!(moved.bytes, 16 * MIB);
    assert!((1..=3).contains(&moved.resumed), "{moved:?}");
    assert_eq!(*relay.passed.borrow(), 3);
    // Once each: nothing began anew.
    let mut calls = old.app.calls();
    calls.sort();
    assert_eq!(calls, ["export bulk", "import bulk", "imported bulk"]);
}

#[tokio::test]
async fn a_puller_that_was_away_for_too_long_begins_anew() {
    let limits = Limits { resume_within: SOON, ..Limits::default() };
    let old = Old::serve_with(App::new(16 * MIB, 0), limits).await;
    let relay = Relay::to(&old.address, &[3_000_000], true).await;
    let origin = Origin { address: relay.address.clone(), party: OLD };
    let mut import = old.puller().begin(NEW, Some(origin), hand_off(7));
    // It counts what was read twice.
    let back = async {
        old.app.called("nobody wants it").await;
        old.app.written.store(0, Ordering::SeqCst);
        old.app.read.store(0, Ordering::SeqCst);
        relay.pass.cancel();
    };
    let (moved, ()) =
        soon("the bulk pass", async { tokio::join!(import.bulk(later()), back) }).await;
    assert_eq!(moved.unwrap().bytes, 16 * MIB);
    let calls = old.app.calls();
    let count = |call: &str| calls.iter().filter(|made| *made == call).count();
    assert_eq!((count("export bulk"), count("import bulk"), count("broken bulk")), (2, 2, 1));
    assert_eq!((count("imported bulk"), count("discard")), (1, 0));
}

#[tokio::test]
async fn a_peer_that_is_lost_means_an_empty_start_and_is_counted() {
    let app = Arc::new(App::new(10, 0));
    // Bound, so that nobody else takes it, and not listening.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string().parse().unwrap();
    let puller = puller(&app);
    let mut import = puller.begin(NEW, Some(Origin { address, party: OLD }), hand_off(7));
    let lost = bulk_fails(&mut import).await;
    assert!(matches!(lost, PullError::Lost { tries: 8, .. }), "{lost:?}");
    assert!(lost.to_string().contains("refused"), "{lost}");
    assert_eq!(puller.pulled(), Pulled { empty_starts: 1, ..Pulled::default() });
    assert!(matches!(import.last(later()).await, Err(PullError::NoBulk)));
    assert!(matches!(import.keep().await, Err(PullError::NoBulk)));
    app.called("discard").await;
    let mut import = puller.begin(NEW, None, hand_off(7));
    assert!(matches!(bulk_fails(&mut import).await, PullError::NoAddress));
}

#[tokio::test]
async fn a_puller_that_leaves_ends_the_export_and_what_it_had_is_discarded() {
    let limits = Limits { resume_within: SOON, ..Limits::default() };
    let app = App::new(16 * MIB, 0).importing(Way::Hangs);
    let old = Old::serve_with(app, limits).await;
    let mut import = old.import();
    let leave = async {
        while old.app.read.load(Ordering::SeqCst) < 8 * MIB {
            tokio::task::yield_now().await;
        }
    };
    soon("half of it", async {
        tokio::select! {
            moved = import.bulk(later()) => panic!("it hangs: {moved:?}"),
            () = leave => {}
        }
    })
    .await;
    drop(import);
    old.app.called("nobody wants it").await;
    // Not before the import has returned.
    assert!(!old.app.calls().contains(&"discard".to_owned()));
    old.app.go_on();
    old.app.called("discard").await;
    let calls = old.app.calls();
    let at = |call: &str| calls.iter().position(|made| made == call).unwrap();
    assert!(at("broken bulk") < at("discard"), "{calls:?}");
}

// --- Who asks whom for what.

#[tokio::test]
async fn whoever_is_not_meant_is_refused() {
    let old = Old::serve(App::new(10, 0)).await;
    let other = |party: Party| Party { incarnation: 0xFF, ..party };
    // A process that took the address over.
    let origin = Origin { party: other(OLD), ..old.origin() };
    let mut import = old.puller().begin(NEW, Some(origin), hand_off(7));
    let refused = bulk_fails(&mut import).await;
    assert_eq!(code(&refused), RefusalCode::WrongServer);
    let (meant, found) =
        ("session s1 of process 00000000000000ff of job kv", "and this is session s1");
    let said = refused.to_string();
    assert!(said.contains(meant) && said.contains(found), "{said}");
    // A session that has ended, of the same process.
    let party = Party { session: SessionId(9), ..OLD };
    let origin = Origin { party, ..old.origin() };
    let mut import = old.puller().begin(NEW, Some(origin), hand_off(7));
    assert_eq!(code(&bulk_fails(&mut import).await), RefusalCode::WrongServer);
    // Who asks: another process under the session, and another session.
    for party in [other(NEW), Party { session: SessionId(3), ..NEW }] {
        let mut import = old.puller().begin(party, Some(old.origin()), hand_off(7));
        assert_eq!(code(&bulk_fails(&mut import).await), RefusalCode::NotThePeer);
    }
    // Another job.
    let state: Arc<dyn State> = Arc::<App>::clone(&old.app);
    let elsewhere = Puller::new("other".parse().unwrap(), state, Connector::default());
    let mut import = elsewhere.begin(NEW, Some(old.origin()), hand_off(7));
    assert_eq!(code(&bulk_fails(&mut import).await), RefusalCode::WrongServer);
    // A task without a session is nobody.
    old.outgoing.send_modify(|outgoing| outgoing.me = None);
    let refused = bulk_fails(&mut old.import()).await;
    assert_eq!(code(&refused), RefusalCode::WrongServer);
    assert!(!old.app.calls().contains(&"export bulk".to_owned()));
}

#[tokio::test]
async fn a_hand_off_that_is_over_moves_nothing_and_is_no_empty_start() {
    let old = Old::serve(App::new(16 * MIB, 0).importing(Way::Hangs)).await;
    let puller = old.puller();
    let mut before = puller.begin(NEW, Some(old.origin()), hand_off(6));
    assert_eq!(code(&bulk_fails(&mut before).await), RefusalCode::Over);
    let mut import = puller.begin(NEW, Some(old.origin()), hand_off(7));
    let abort = async {
        while old.app.read.load(Ordering::SeqCst) < 8 * MIB {
            tokio::task::yield_now().await;
        }
        old.is_over();
        // The export ends even while nobody reads.
        old.app.called("nobody wants it").await;
        old.app.called("exported").await;
        old.app.go_on();
    };
    let (over, ()) = soon("the end", async { tokio::join!(import.bulk(later()), abort) }).await;
    assert_eq!(code(&over.unwrap_err()), RefusalCode::Over);
    drop(import);
    old.app.called("discard").await;
    assert_eq!(puller.pulled().empty_starts, 0);
    assert_eq!(old.exports.sent(hand_off(7).id).await, Err(NotSent::Over(hand_off(7).id)));
}

#[tokio::test]
async fn a_bulk_pass_comes_no_more_once_the_slice_is_released() {
    let old = Old::serve(App::new(10, 20)).await;
    old.is_due(Pass::Last);
    let refused = bulk_fails(&mut old.import()).await;
    assert_eq!(code(&refused), RefusalCode::Over);
    assert!(refused.to_string().contains("the bulk pass of hand-off 1.7/0000000000000000 is over"));
    // So nothing is waited for.
    assert_eq!(old.exports.sent(hand_off(7).id).await, Err(NotSent::NoBulk(hand_off(7).id)));
}

#[tokio::test]
async fn a_last_pass_that_does_not_become_due_is_given_up() {
    let limits = Limits { due_within: SOON, ..Limits::default() };
    let old = Old::serve_with(App::new(10, 20), limits).await;
    let mut import = old.import();
    import.bulk(later()).await.unwrap();
    let late = soon("the last pass", import.last(later())).await.unwrap_err();
    let PullError::Lost { problem, .. } = &late else { panic!("{late:?}") };
    assert_eq!(problem, "it is not time for the last pass yet");
    // What came before is of no use without it.
    assert!(matches!(import.keep_bulk().await, Err(PullError::NoBulk)));
}

#[tokio::test]
async fn a_task_without_an_exporter_says_so() {
    let (_, watched) = watch::channel(Outgoing::default());
    let exports = Exports::new("kv".parse().unwrap(), None, watched);
    let (address, serving) = serve(Routes::new(exports.service())).await;
    let app = Arc::new(App::new(10, 0));
    let begin =
        |address| puller(&app).begin(NEW, Some(Origin { address, party: OLD }), hand_off(7));
    let refused = bulk_fails(&mut begin(address)).await;
    assert_eq!(code(&refused), RefusalCode::NoExporter);
    serving.abort();
    // One that is older than transfers are.
    let hub = mandoline_distributor::hub::Hub::new();
    let watch = mandoline_distributor::serve::WatchService::new(hub, CancellationToken::new());
    let (address, serving) = serve(Routes::new(watch)).await;
    let refused = bulk_fails(&mut begin(address)).await;
    assert_eq!(code(&refused), RefusalCode::NoExporter);
    serving.abort();
}

// --- Applications that misbehave.

#[tokio::test]
async fn an_export_that_panics_fails_or_never_returns_ends_typed() {
    for (way, expected) in [
        (Way::Panics, RefusalCode::ExportPanicked),
        (Way::Fails, RefusalCode::ExportFailed),
        (Way::Hangs, RefusalCode::ExportStalled),
    ] {
        // A panic that prints its backtrace takes a while, too.
        let stall = if way == Way::Hangs { SOON } else { PATIENCE };
        let limits = Limits { stall, ..Limits::default() };
        let old = Old::serve_with(App::new(2 * MIB, 0).exporting(way), limits).await;
        let puller = old.puller();
        let mut import = puller.begin(NEW, Some(old.origin()), hand_off(7));
        let refused = bulk_fails(&mut import).await;
        assert_eq!(code(&refused), expected);
        assert_eq!(puller.pulled().empty_starts, 1);
        drop(import);
        old.app.called("discard").await;
        assert!(!old.app.calls().contains(&"imported bulk".to_owned()));
    }
}

#[tokio::test]
async fn a_last_pass_that_fails_is_not_waited_for() {
    let old = Old::serve(App::new(0, 10).exporting(Way::Stops)).await;
    let mut import = old.import();
    import.bulk(later()).await.unwrap();
    old.is_due(Pass::Last);
    // The hand-off is called off while the last pass is under way.
    let (last, sent) = soon("both ends", async {
        tokio::join!(import.last(later()), async {
            old.is_over();
            old.exports.sent(hand_off(7).id).await
        })
    })
    .await;
    assert_eq!(code(&last.unwrap_err()), RefusalCode::Over);
    assert_eq!(sent, Err(NotSent::Over(hand_off(7).id)));
}

#[tokio::test]
async fn exports_that_never_return_keep_others_waiting_only_so_long() {
    let limits = Limits { stall: SOON, ..Limits::default() };
    let old = Old::serve_with(App::new(10, 0).exporting(Way::Hangs), limits).await;
    let leaving = old.outgoing.borrow().hand_offs[&hand_off(7).id];
    old.outgoing.send_modify(|outgoing| {
        outgoing.hand_offs = (0..=7).map(|n| (hand_off(n).id, leaving)).collect();
        outgoing.hand_offs.insert(hand_off(100).id, leaving);
    });
    for number in 0..=7 {
        let mut import = old.puller().begin(NEW, Some(old.origin()), hand_off(number));
        let refused = bulk_fails(&mut import).await;
        assert_eq!(
            refused.to_string(),
            format!("refused: the export has written nothing for {SOON:?}")
        );
    }
    let mut import = old.puller().begin(NEW, Some(old.origin()), hand_off(100));
    let refused = bulk_fails(&mut import).await;
    assert!(refused.to_string().contains("other exports keep this one waiting"), "{refused}");
}

#[tokio::test]
async fn an_import_that_panics_fails_stops_or_never_returns_ends_typed() {
    type Check = fn(&PullError) -> bool;
    let cases: [(Way, Check); 4] = [
        (Way::Panics, |error| matches!(error, PullError::Panicked)),
        (
            Way::Fails,
            |error| matches!(error, PullError::Import(why) if why.to_string() == "no more ink"),
        ),
        (
            Way::Stops,
            |error| matches!(error, PullError::Import(why) if why.to_string().contains("unread")),
        ),
        (Way::Hangs, |error| matches!(error, PullError::TimedOut(_))),
    ];
    for (way, is_expected) in cases {
        let limits = Limits { resume_within: SOON, ..Limits::default() };
        let old = Old::serve_with(App::new(16 * MIB, 0).importing(way), limits).await;
        let mut import = old.import();
        let until = if way == Way::Hangs { Instant::now() + 4 * SOON } else { later() };
        let error = soon("a pass that fails", import.bulk(until)).await.unwrap_err();
        assert!(is_expected(&error), "{error:?}");
        drop(import);
        old.app.go_on();
        old.app.called("discard").await;
    }
}

// --- Sides that lie.

/// Answers every pull with the same.
struct Liar(Vec<Say>);

type Replies = stream::BoxStream<'static, Result<pb::PullReply, Status>>;

#[tonic::async_trait]
impl Transfers for Liar {
    type PullStream = Replies;

    async fn pull(
        &self,
        request: Request<Streaming<pb::PullRequest>>,
    ) -> Result<Response<Replies>, Status> {
        let said = self.0.clone().into_iter().map(|say| Ok(say.into()));
        // It hears the other side out, so that the end of its own words is what is judged.
        let heard = request.into_inner().take(said.len()).filter_map(async |_| None);
        Ok(Response::new(stream::iter(said).chain(heard).boxed()))
    }
}

/// What becomes of a pull that such a one answers.
async fn pull_from(said: Vec<Say>) -> PullError {
    let (address, serving) = serve(Routes::new(TransfersServer::new(Liar(said)))).await;
    let app = Arc::new(App::new(7, 0));
    let puller = puller(&app);
    let mut import = puller.begin(NEW, Some(Origin { address, party: OLD }), hand_off(7));
    let error = bulk_fails(&mut import).await;
    assert_eq!(puller.pulled(), Pulled { empty_starts: 1, ..Pulled::default() });
    drop(import);
    app.called("discard").await;
    assert!(!app.calls().contains(&"keep".to_owned()));
    serving.abort();
    error
}

#[tokio::test]
async fn streams_that_lie_are_typed_and_nothing_of_them_is_kept() {
    let bytes = block(0, 7);
    let begun = Say::Begun { server: OLD, offset: 0 };
    let chunk = Say::Chunk { offset: 0, bytes: bytes.clone().into() };
    let end =
        End { hand_off: hand_off(7).id, pass: Pass::Bulk, length: 7, checksum: xxh3_64(&bytes) };
    let ends = |end: End| vec![begun.clone(), chunk.clone(), Say::End(end)];

    // It ends early, every time.
    let early = pull_from(vec![begun.clone(), chunk.clone()]).await;
    assert!(matches!(&early, PullError::Lost { .. } | PullError::Corrupt(_)), "{early:?}");
    let silent = pull_from(vec![begun.clone()]).await;
    assert!(matches!(&silent, PullError::Lost { .. }), "{silent:?}");
    // An impostor that answers all the same.
    let impostor = Party { incarnation: 0xE, ..OLD };
    let found = pull_from(vec![Say::Begun { server: impostor, offset: 0 }]).await;
    assert!(matches!(&found, PullError::Impostor { found, .. } if *found == impostor), "{found:?}");

    let other = hand_off(8).id;
    let corrupt = [
        (ends(End { length: 8, ..end }), "end: says 1.7/"),
        (ends(End { length: 6, ..end }), "end: says 1.7/"),
        (ends(End { checksum: 1, ..end }), "checksum 0000000000000001, and what came is"),
        (ends(End { hand_off: other, ..end }), "end: says 1.8/"),
        (ends(End { pass: Pass::Last, ..end }), "last, 7 bytes"),
        (vec![chunk.clone()], "begins with `begun`"),
        (vec![begun.clone(), begun.clone()], "begins with `begun`"),
        (vec![Say::Begun { server: OLD, offset: 5 }], "begun.offset: is 5, and 0 was asked for"),
        (vec![begun.clone(), chunk.clone(), chunk.clone()], "chunk.offset: is 0, and 7 comes next"),
    ];
    for (said, expected) in corrupt {
        let error = pull_from(said).await;
        let PullError::Corrupt(why) = &error else { panic!("{expected}: {error:?}") };
        assert!(why.to_string().contains(expected), "{why} has no {expected}");
    }
}

/// A puller that says what it likes.
struct Raw(tokio::sync::mpsc::Sender<pb::PullRequest>, Streaming<pb::PullReply>);

impl Raw {
    async fn pull(old: &Old, wanted: Wanted, attempt: u32, offset: u64) -> Self {
        let job = "kv".parse().unwrap();
        let hand_off = hand_off(7).id;
        let (puller, server) = (NEW, OLD);
        let pull = Pull { job, hand_off, puller, server, wanted, attempt, offset };
        Self::say(old, (&Ask::Pull(pull)).into()).await.unwrap()
    }

    async fn say(old: &Old, first: pb::PullRequest) -> Result<Self, Status> {
        let (asks, queue) = tokio::sync::mpsc::channel(8);
        asks.send(first).await.unwrap();
        let channel = Connector::default().connect(&old.address).await.unwrap();
        let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
        let replies = soon("an answer", TransfersClient::new(channel).pull(queue)).await?;
        Ok(Self(asks, replies.into_inner()))
    }

    async fn hear(&mut self) -> Result<Say, Status> {
        let reply = soon("a reply", self.1.message()).await?;
        Ok(reply.expect("the stream goes on").try_into().unwrap())
    }

    async fn refused(&mut self) -> Refusal {
        loop {
            match self.hear().await.unwrap() {
                Say::Refused(refusal) => return refusal,
                Say::Begun { .. } | Say::Chunk { .. } => {}
                Say::End(end) => panic!("{end:?}"),
            }
        }
    }
}

#[tokio::test]
async fn the_newer_of_two_pulls_replaces_the_older() {
    let limits = Limits { resume_within: 10 * SOON, ..Limits::default() };
    let old = Old::serve_with(App::new(16 * MIB, 0), limits).await;
    let mut first = Raw::pull(&old, Wanted::Bulk, 1, 0).await;
    assert!(matches!(first.hear().await, Ok(Say::Begun { .. })));
    // The same attempt over another connection.
    let mut second = Raw::pull(&old, Wanted::Bulk, 1, 0).await;
    assert!(matches!(second.hear().await, Ok(Say::Begun { .. })));
    assert_eq!(first.refused().await.code, RefusalCode::Superseded);
    // A new attempt: the export begins anew.
    let mut third = Raw::pull(&old, Wanted::Bulk, 2, 0).await;
    assert!(matches!(third.hear().await, Ok(Say::Begun { .. })));
    assert!(matches!(third.hear().await, Ok(Say::Chunk { .. })));
    assert_eq!(second.refused().await.code, RefusalCode::Superseded);
    let calls = old.app.calls();
    assert_eq!(calls, ["export bulk", "nobody wants it", "export bulk"]);
    // And an old one comes too late.
    let mut late = Raw::pull(&old, Wanted::Bulk, 1, 0).await;
    assert_eq!(late.refused().await.code, RefusalCode::Superseded);
    assert!(matches!(third.hear().await, Ok(Say::Chunk { .. })));
}

#[tokio::test]
async fn pulls_out_of_order_are_refused() {
    let old = Old::serve(App::new(10, 20)).await;
    let mut ahead = Raw::pull(&old, Wanted::Bulk, 1, 5).await;
    assert_eq!(ahead.refused().await.code, RefusalCode::CannotResume);
    let mut import = old.import();
    import.bulk(later()).await.unwrap();
    old.is_due(Pass::Last);
    let mut other = Raw::pull(&old, Wanted::Last { after: 2 }, 3, 0).await;
    let refused = other.refused().await;
    assert_eq!(refused.code, RefusalCode::NoBulk);
    assert_eq!(refused.message, "bulk pass 2 of hand-off 1.7/0000000000000000 has not arrived");
    import.last(later()).await.unwrap();
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_by_name() {
    let limits = Limits { resume_within: 10 * SOON, ..Limits::default() };
    let old = Old::serve_with(App::new(4 * MIB, 0), limits).await;
    let nothing = pb::PullRequest::default();
    for first in [nothing.clone(), (&Ask::Taken(1)).into(), (&Ask::Imported).into()] {
        let Err(status) = Raw::say(&old, first).await else { panic!("it was taken") };
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    for second in [nothing, (&Ask::Taken(u64::MAX)).into(), (&Ask::Imported).into()] {
        let mut raw = Raw::pull(&old, Wanted::Bulk, 1, 0).await;
        raw.0.send(second).await.unwrap();
        let status = soon("a refusal", async {
            loop {
                match raw.hear().await {
                    Ok(Say::Begun { .. } | Say::Chunk { .. }) => {}
                    Ok(other) => panic!("{other:?}"),
                    Err(status) => return status,
                }
            }
        })
        .await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    // None of it spoiled the transfer.
    let mut import = old.import();
    assert_eq!(soon("the bulk pass", import.bulk(later())).await.unwrap().bytes, 4 * MIB);
}

#[test]
fn an_origin_is_a_task_that_serves_peers() {
    let mut info = TaskInfo::new("t".parse().unwrap(), 0xA, "h:1".parse().unwrap());
    let task = |info: &TaskInfo| Task::new(SessionId(1), info.clone());
    assert_eq!(Origin::of(&task(&info)), None);
    info.watch = Some("h:2".parse().unwrap());
    let origin = Origin { address: "h:2".parse().unwrap(), party: OLD };
    assert_eq!(Origin::of(&task(&info)), Some(origin));
}

#[test]
fn what_is_about_to_leave_is_read_from_the_assignment() {
    let task = |party: Party| {
        let name = format!("t{}", party.session.0).parse().unwrap();
        let address = format!("h:{}", party.session.0).parse().unwrap();
        let info = TaskInfo::new(name, party.incarnation, address);
        (party.session, Arc::new(Task::new(party.session, info)))
    };
    let known = Generation { incarnation: 1, number: 9 };
    let mut assignment = Assignment::exclusive("kv".parse().unwrap(), known);
    assignment.tasks = [OLD, NEW].map(task).into();
    let transit = |first: u64, from: Party, to: Party, step| {
        let id = HandOffId { first: SliceKey(first), ..hand_off(7).id };
        Arc::new(Transit { id, from: Some(from.session), to: to.session, step })
    };
    let transits = [
        transit(0, OLD, NEW, Step::Preparing),
        transit(10, OLD, NEW, Step::Releasing),
        transit(20, OLD, NEW, Step::Releasing),
        transit(30, NEW, OLD, Step::Releasing),
    ];
    for transit in &transits {
        let first = transit.id.first;
        let slice = Slice::new(first, SliceKey(first.0 + 9)).unwrap();
        let assigned = Assigned { transit: Some(Arc::clone(transit)), ..Assigned::unowned() };
        assignment.slices.set(slice, assigned);
    }
    let outgoing = Outgoing::of(&assignment, OLD, |id| id.first != SliceKey(20));
    assert_eq!((outgoing.me, outgoing.known), (Some(OLD), known));
    let due: Vec<_> =
        outgoing.hand_offs.values().map(|leaving| (leaving.slice.first().0, leaving.due)).collect();
    assert_eq!(due, [(0, Pass::Bulk), (10, Pass::Last), (20, Pass::Bulk)]);
    assert!(outgoing.hand_offs.values().all(|leaving| leaving.to == NEW));
    assert_eq!(outgoing.hand_offs[&transits[0].id].slice.last(), SliceKey(9));
}

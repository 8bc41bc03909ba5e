//! What it takes to move a slice's state: `cargo bench -p mandoline --bench transfer`.
//!
//! Two tasks with a thread of their own each, as slicelets have, over loopback: a bulk pass over a new connection, a last pass
//! over the same one, and what the application is asked to do in the end. Wall time at the median and near the worst, and the
//! processor time of both sides together.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use mandoline::transfer::pull::{Origin, Puller};
use mandoline::transfer::serve::{Exports, Leaving, Outgoing};
use mandoline::transfer::{HandOff, Party, Pass, Sink, Source, State};
use mandoline::{Address, Connector, Generation, HandOffId, SessionId, Slice, SliceKey};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::server::TcpIncoming;

const MIB: usize = 1 << 20;
const OLD: Party = Party { session: SessionId(1), incarnation: 1 };
const NEW: Party = Party { session: SessionId(2), incarnation: 2 };

/// Bytes, and nothing else.
struct Bytes {
    bulk: Vec<u8>,
    last: Vec<u8>,
}

impl State for Bytes {
    fn export(&self, _: &HandOff, pass: Pass, out: &mut Sink) -> io::Result<()> {
        out.write_all(if pass == Pass::Bulk { &self.bulk } else { &self.last })
    }

    fn import(&self, _: &HandOff, pass: Pass, bytes: &mut Source) -> io::Result<()> {
        let most = if pass == Pass::Bulk { self.bulk.len() } else { self.last.len() };
        let mut into = Vec::with_capacity(most);
        bytes.read_to_end(&mut into)?;
        assert_eq!(into.len(), most);
        Ok(())
    }

    fn keep(&self, _: &HandOff) {}
    fn discard(&self, _: &HandOff) {}
}

/// Serves exports on a thread of its own, for as long as the process lives.
fn serve(state: Arc<dyn State>, outgoing: watch::Receiver<Outgoing>) -> (Address, Exports) {
    let exports = Exports::new("bench".parse().expect("a name"), Some(state), outgoing);
    let (service, clearing) = (exports.service(), exports.clone());
    let (told, address) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address").to_string();
            told.send(address.parse().expect("an address")).expect("someone waits");
            let server = tonic::transport::Server::builder().add_service(service);
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let (served, ()) = tokio::join!(server.serve_with_incoming(incoming), clearing.clear());
            served.expect("it serves");
        });
    });
    (address.recv().expect("it serves"), exports)
}

/// Wall and processor time of each round.
#[derive(Default)]
struct Times(Vec<(Duration, Duration)>);

impl Times {
    async fn time<T>(&mut self, what: impl Future<Output = T>) -> T {
        let (wall, spent) = (Instant::now(), processor());
        let done = what.await;
        self.0.push((wall.elapsed(), processor() - spent));
        done
    }

    fn print(mut self, what: &str) {
        self.0.sort_unstable();
        let wall = |share: usize| self.0[self.0.len() * share / 100].0;
        let (p50, p99) = (wall(50), wall(99));
        let spent = self.0.iter().map(|(_, spent)| *spent).sum::<Duration>() / self.0.len() as u32;
        println!("{what:<32} p50 {p50:>10.1?}  p99 {p99:>10.1?}  processor {spent:>10.1?}");
    }
}

fn processor() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

async fn rounds(bulk: usize, last: usize, rounds: u64) {
    let state: Arc<dyn State> = Arc::new(Bytes { bulk: vec![7; bulk], last: vec![8; last] });
    let (told, outgoing) = watch::channel(Outgoing { me: Some(OLD), ..Outgoing::default() });
    let (address, exports) = serve(Arc::clone(&state), outgoing);
    let puller = Puller::new("bench".parse().expect("a name"), state, Connector::default());
    let (mut bulks, mut lasts) = (Times::default(), Times::default());
    let (slice, to) = (Slice::FULL, NEW);
    for number in 1..=rounds {
        let id = HandOffId { began: Generation { incarnation: 1, number }, first: SliceKey::MIN };
        let due = |due| {
            told.send_modify(|outgoing| {
                outgoing.hand_offs = BTreeMap::from([(id, Leaving { slice, to, due })]);
            });
        };
        due(Pass::Bulk);
        let origin = Origin { address: address.clone(), party: OLD };
        let mut import = puller.begin(NEW, Some(origin), HandOff { id, slice });
        let until = Instant::now() + Duration::from_secs(60);
        bulks.time(import.bulk(until)).await.expect("the bulk pass comes");
        due(Pass::Last);
        let both = async { tokio::join!(import.last(until), exports.sent(id)) };
        let (pulled, sent) = lasts.time(both).await;
        assert_eq!(pulled.expect("the last pass comes").bytes, last as u64);
        assert_eq!(sent.expect("the last pass is sent").bytes, last as u64);
        import.keep().await.expect("it can be kept");
    }
    bulks.print(&format!("bulk, {bulk} bytes"));
    lasts.print(&format!("last, {last} bytes"));
}

fn main() {
    // Asked to be a test, it shows that it runs.
    let times = if std::env::args().any(|arg| arg == "--test") { 1 } else { 500 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        rounds(MIB, 0, times).await;
        rounds(64 << 10, 64 << 10, times).await;
        rounds(64 * MIB, MIB, times.div_ceil(20)).await;
    });
}

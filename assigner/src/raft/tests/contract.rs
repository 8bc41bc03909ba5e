//! The contract that the simulated log keeps (`sim/src/cluster/log.rs`), claim by claim, against the real one: three nodes over
//! TCP whose lines to each other are cut and mended at random.
//!
//! Claims 1, 2, 3, 4, 7, 8 and 9 are checked here. 5 and 6 say what may happen; that it does is what 3, 7 and 8 are tried by.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_core::prng::Prng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Endpoint;

use super::kit::{Options, PATIENCE, Place, Running, apply, job, start, until, version};
use crate::raft::config::{FirstStart, Transport};
use crate::raft::{ProposeError, Role};

const NODES: usize = 3;

/// The line from one node to another, which can be cut: what is sent then waits, as in a network that parts.
struct Line {
    address: SocketAddr,
    cut: watch::Sender<bool>,
    _carries: JoinSet<()>,
}

impl Line {
    async fn new(to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, is_cut) = watch::channel(false);
        let mut carries = JoinSet::new();
        carries.spawn(async move {
            let mut under_way = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (to, is_cut) = (to.clone(), is_cut.clone());
                under_way.spawn(async move {
                    let Ok(far) = TcpStream::connect(to).await else { return };
                    let (near, far) = (near.into_split(), far.into_split());
                    let on = carry(near.0, far.1, is_cut.clone());
                    let back = carry(far.0, near.1, is_cut);
                    tokio::join!(on, back);
                });
            }
        });
        Self { address, cut, _carries: carries }
    }
}

async fn carry(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut is_cut: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if is_cut.wait_for(|cut| !cut).await.is_err()
            || to.write_all(&bytes[..count]).await.is_err()
        {
            return;
        }
    }
    drop(to.shutdown().await);
}

/// Three nodes, and the line from each to each other.
struct Net {
    _dir: tempfile::TempDir,
    places: Vec<Place>,
    nodes: Vec<Option<Running>>,
    lines: BTreeMap<(usize, usize), Line>,
    /// Who was seen to lead in each term.
    led: Arc<Mutex<BTreeMap<u64, BTreeSet<usize>>>>,
    watching: JoinSet<()>,
}

impl Net {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places: Vec<Place> =
            (1..=NODES).map(|n| Place::new(dir.path(), &format!("n{n}"))).collect();
        let mut lines = BTreeMap::new();
        for from in 0..NODES {
            for to in (0..NODES).filter(|to| *to != from) {
                lines.insert((from, to), Line::new(places[to].member.peer.clone()).await);
            }
        }
        let (led, watching) = (Arc::default(), JoinSet::new());
        let nodes = (0..NODES).map(|_| None).collect();
        let mut net = Self { _dir: dir, places, nodes, lines, led, watching };
        for at in 0..NODES {
            net.up(at).await;
        }
        net
    }

    async fn up(&mut self, at: usize) {
        let list = self.places.iter().map(|place| place.member.clone()).collect();
        let peers = self.places.iter().enumerate().filter(|(to, _)| *to != at);
        let by_peer: BTreeMap<String, String> = peers
            .map(|(to, place)| {
                (place.member.peer.clone(), self.lines[&(at, to)].address.to_string())
            })
            .collect();
        let endpoint = move |peer: &str| {
            let line = by_peer.get(peer).map_or(peer, String::as_str);
            Endpoint::from_shared(format!("http://{line}"))
        };
        let transport = Transport { endpoint: Arc::new(endpoint), ..Transport::plain() };
        let options = Options { transport, ..Options::new(FirstStart::Together(list)) };
        let node = start(&mut self.places[at], options).await.unwrap();
        let (mut role, led) = (node.consensus.role(), Arc::clone(&self.led));
        self.watching.spawn(async move {
            loop {
                if let Role::Leader { term } = *role.borrow_and_update() {
                    led.lock().unwrap().entry(term).or_default().insert(at);
                }
                if role.changed().await.is_err() {
                    return;
                }
            }
        });
        self.nodes[at] = Some(node);
    }

    fn node(&self, at: usize) -> &Running {
        self.nodes[at].as_ref().expect("it is up")
    }

    /// Cuts a node off from the others: what it says, and if `deaf` what it would hear.
    fn cut_off(&self, node: usize, deaf: bool) {
        for ((from, to), line) in &self.lines {
            line.cut.send_replace(*from == node || (deaf && *to == node));
        }
    }

    fn heal(&self) {
        for line in self.lines.values() {
            line.cut.send_replace(false);
        }
    }

    /// Waits for a leader among these, and gives its place.
    async fn leader(&self, among: impl Fn(usize) -> bool) -> usize {
        let leads = || (0..NODES).find(|at| among(*at) && self.node(*at).leads());
        until("a leader", || leads().is_some()).await;
        leads().unwrap_or(0)
    }

    /// Proposes wherever one of these leads, until it is done; gives the version that it led to, and where.
    async fn write(&self, among: impl Fn(usize) -> bool + Copy) -> (u64, usize) {
        let write = async {
            loop {
                let at = self.leader(among).await;
                if let Ok(applied) = self.node(at).propose(apply("a")).await {
                    return (version(&applied), at);
                }
            }
        };
        timeout(PATIENCE, write).await.expect("a command is accepted in time")
    }

    fn version_at(&self, at: usize) -> u64 {
        self.node(at).consensus.state().jobs.get(&job("a")).map_or(0, |job| job.version)
    }
}

/// How many runs: as many as are asked for where nothing is skipped, few beside other tests.
fn runs() -> u64 {
    if std::env::var_os("MANDOLINE_REQUIRE_ALL").is_some() { 50 } else { 3 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_log_keeps_the_contract_of_the_simulated_one() {
    let seed = 11;
    println!("seed {seed}, {} runs", runs());
    let mut prng = Prng::new(seed);
    let mut net = Net::start().await;
    // Each version is answered once: claims 3 and 4.
    let mut answered = BTreeSet::new();
    answered.insert(net.write(|_| true).await.0);
    for run in 0..runs() {
        let (newest, led) = net.write(|_| true).await;
        assert!(answered.insert(newest), "run {run}: version {newest} was answered before");
        let deaf = prng.below(3) > 0;
        net.cut_off(led, deaf);
        // It may believe in itself for a while: claim 6. What it is told may be lost or not: claims 4 and 5.
        let old = net.node(led).consensus.clone();
        let unsure = tokio::spawn(async move { old.propose(apply("a")).await });

        let (version, leads) = net.write(|at| at != led).await;
        assert!(answered.insert(version), "run {run}: version {version} was answered before");
        assert!(version > newest, "run {run}: {newest} is lost to {version}");
        // Another was elected before this is asked: claim 7. Here it can only be told no, or nothing.
        let old = net.node(led).consensus.clone();
        let term = net.led.lock().unwrap().keys().next_back().copied();
        let confirmed = tokio::spawn(async move { old.confirm_leadership().await });
        // Whoever is told yes has what was answered before: claim 8.
        if net.node(leads).consensus.confirm_leadership().await.is_ok() {
            let has = net.version_at(leads);
            assert!(has >= version, "run {run}: it surely leads with {has}, not {version}");
        }
        tokio::time::sleep(Duration::from_millis(prng.below(100))).await;
        net.heal();
        if confirmed.await.unwrap().is_ok() {
            let later = net
                .led
                .lock()
                .unwrap()
                .range(term.unwrap_or(0) + 1..)
                .any(|(_, who)| who.contains(&led));
            assert!(later, "run {run}: a node that was deposed was told that it leads");
        }
        match unsure.await.unwrap() {
            Ok(applied) => {
                let version = self::version(&applied);
                assert!(
                    answered.insert(version),
                    "run {run}: version {version} was answered before"
                );
            }
            Err(ProposeError::Refused(why)) => panic!("run {run}: {why}"),
            Err(_) => {}
        }
        if run % 4 == 0 {
            // Whoever starts again has what it had, and does not lead before it is elected: claim 9.
            let at = prng.below(NODES as u64) as usize;
            net.nodes[at].take().expect("it is up").kill();
            net.up(at).await;
        }
        let newest = *answered.last().expect("there was one");
        for at in 0..NODES {
            until("every node to have what was answered", || net.version_at(at) >= newest).await;
        }
    }
    // Nothing was done twice, and all are alike: claim 2.
    let (last, _) = net.write(|_| true).await;
    let same =
        || (1..NODES).all(|at| *net.node(at).consensus.state() == *net.node(0).consensus.state());
    until("all nodes to be alike", same).await;
    assert!(last as usize >= answered.len(), "{last} versions, {} answered", answered.len());
    // Claim 1.
    let led = net.led.lock().unwrap();
    assert!(led.len() as u64 > runs(), "leaders changed: {led:?}");
    let twice = led.iter().find(|(_, nodes)| nodes.len() > 1);
    assert_eq!(twice, None, "two nodes led in one term");
}

//! Assigner nodes, each on a thread and a runtime of its own, so that one can die as a process would.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::thread::JoinHandle;

use mandoline_assigner::assigner::{Assigner, Listeners};
use mandoline_assigner::config::{Access, Config, Seat, Start};
use mandoline_assigner::raft::Consensus;
use mandoline_core::task::Address;
use mandoline_distributor::hub::Hub;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, chain};
use crate::ports;

/// One assigner node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) seat: Seat,
    pub(crate) hub: Hub,
    pub(crate) consensus: Consensus,
    stop: CancellationToken,
    thread: JoinHandle<()>,
    ended: oneshot::Receiver<Result<(), String>>,
}

/// Starts nodes that found a cluster together, or find the one that they were.
pub(crate) async fn start(count: u16, base: u16, data: &Path) -> Result<Vec<Node>, Failure> {
    check_founded(count, data)?;
    let mut sockets = vec![];
    for index in 0..count {
        sockets.push(listeners(index, base)?);
    }
    let seats: Vec<Seat> = sockets.iter().map(seat).collect::<Result<_, _>>()?;
    let mut starting = vec![];
    for (index, listeners) in sockets.into_iter().enumerate() {
        let local = |listener: &TcpListener| {
            listener.local_addr().map_err(|error| Failure::new("a socket was lost").because(error))
        };
        let config = Config {
            listen: local(&listeners.client)?,
            peer_listen: local(&listeners.peer)?,
            advertise: None,
            data: data.join(format!("{NODE}{}", index + 1)),
            start: Start::Peers(seats.clone()),
            access: Access::default(),
        };
        starting.push(spawn(index, config, listeners, seats[index].clone())?);
    }
    let mut nodes = vec![];
    for node in starting {
        nodes.push(node.await?);
    }
    Ok(nodes)
}

/// Checks that as many nodes start as have founded the cluster in `data`: without some of them there may be no quorum, and
/// nobody has let more of them in.
fn check_founded(count: u16, data: &Path) -> Result<(), Failure> {
    let unread =
        |error: io::Error| Failure::new(format!("cannot read {}", data.display())).because(error);
    let entries = match std::fs::read_dir(data) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unread(error)),
    };
    let mut founded: u16 = 0;
    for entry in entries {
        let entry = entry.map_err(unread)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(NODE)?.parse::<u16>().ok());
        // An empty directory is a start that came to nothing.
        let begun =
            || std::fs::read_dir(entry.path()).is_ok_and(|mut files| files.next().is_some());
        founded += u16::from(number.is_some() && begun());
    }
    if founded == 0 || founded == count {
        return Ok(());
    }
    let what =
        format!("{} holds a cluster of {founded}, and {count} were asked for", data.display());
    Err(Failure::new(what)
        .because("a cluster that is found again has the assigners that it was made with")
        .try_this(format!(
            "--assigners {founded}, another --data-dir, or remove that one to begin anew"
        )))
}

/// A node's directory begins so, and ends with its number.
const NODE: &str = "node-";

fn listeners(index: u16, base: u16) -> Result<Listeners, Failure> {
    let port = |offset: u16| -> Result<SocketAddr, Failure> {
        let port = match base {
            0 => Some(0),
            base => base.checked_add(10 * index + offset),
        };
        let port = port.ok_or_else(|| {
            Failure::new(format!("--port-base {base} leaves no room")).because("ports end at 65535")
        })?;
        Ok(SocketAddr::from(([127, 0, 0, 1], port)))
    };
    let what = |who| format!("{who} of assigner {}", index + 1);
    Ok(Listeners {
        client: ports::bind(port(0)?, &what("callers"))?,
        peer: ports::bind(port(1)?, &what("peers"))?,
    })
}

fn seat(listeners: &Listeners) -> Result<Seat, Failure> {
    let address = |listener: &TcpListener| -> Result<Address, Failure> {
        let local = listener
            .local_addr()
            .map_err(|error| Failure::new("a socket was lost").because(error))?;
        Ok(local.to_string().parse().expect("a socket's address is an address"))
    };
    Ok(Seat { client: address(&listeners.client)?, peer: address(&listeners.peer)? })
}

/// Starts one node's thread, and gives what waits for the node itself.
fn spawn(
    index: usize,
    config: Config,
    listeners: Listeners,
    seat: Seat,
) -> Result<impl Future<Output = Result<Node, Failure>>, Failure> {
    let failed = move |why: String| {
        Failure::new(format!("assigner {} did not start", index + 1)).because(why)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(format!("assigner-{}", index + 1))
        .enable_all()
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let (tell_started, started) = oneshot::channel();
    let (tell_ended, ended) = oneshot::channel();
    let stop = CancellationToken::new();
    let token = stop.clone();
    let body = move || {
        let run = async {
            let assigner = match Assigner::start(config, listeners, token).await {
                Ok(assigner) => assigner,
                Err(error) => return drop(tell_started.send(Err(chain(&error)))),
            };
            let parts = (assigner.hub().clone(), assigner.consensus().clone());
            drop(tell_started.send(Ok(parts)));
            let result = assigner.finished().await.map_err(|error| chain(&error));
            drop(tell_ended.send(result));
        };
        runtime.block_on(run);
        // Connections that nobody ended must not hold the thread.
        runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    };
    let thread = std::thread::Builder::new()
        .name(format!("assigner-{}", index + 1))
        .spawn(body)
        .map_err(|error| failed(error.to_string()))?;
    Ok(async move {
        let parts = started.await.map_err(|_| failed("its thread is gone".to_owned()))?;
        let (hub, consensus) = parts.map_err(failed)?;
        Ok(Node { seat, hub, consensus, stop, thread, ended })
    })
}

/// Stops all nodes, at the same time.
pub(crate) async fn stop(nodes: Vec<Node>) {
    for node in &nodes {
        node.stop.cancel();
    }
    for node in nodes {
        match node.ended.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(node = %node.seat, error, "An assigner ended badly"),
            Err(_) => tracing::warn!(node = %node.seat, "An assigner's thread is gone"),
        }
        // The thread has nothing left to do but to end.
        drop(node.thread);
    }
}

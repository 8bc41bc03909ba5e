//! A cluster of real processes on loopback: assigner nodes, tasks of the sample service, proxies. Each can be killed or
//! asked to stop, and started again with what it had on disk. Whatever still runs is killed when its handle is dropped.
//!
//! `bench failover` and, by this file's path, the integration tests are built on it. So it names nothing of the binary.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use mandoline_core::task::Address;
use mandoline_proto::pb;
use mandoline_proto::pb::admin_client::AdminClient;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// A process of the binary under test. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with `args`; its log is appended to `DIR/NAME.log`.
    pub(crate) fn start(
        program: &Path,
        name: &str,
        args: &[String],
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.args(args);
        Self::spawn(command, name, dir)
    }

    /// Starts a command, with nothing of this process's environment that would change what it does.
    pub(crate) fn spawn(mut command: Command, name: &str, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        for (variable, _) in std::env::vars_os() {
            // How much is logged may be asked for from outside.
            let ours = variable.to_string_lossy().starts_with("MANDOLINE_");
            if ours && variable != "MANDOLINE_LOG" {
                command.env_remove(variable);
            }
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Ends it as a power switch would, and does not wait for that.
    pub(crate) fn kill(&mut self) {
        // One that has ended by itself is as dead.
        drop(self.child.kill());
    }

    /// Asks it to stop in good order (SIGTERM).
    pub(crate) fn terminate(&self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("{} has no process id", self.name))?;
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Gives its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Says how it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until it has ended.
    pub(crate) async fn wait_ended(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() >= end {
                bail!("{} has not ended within {within:?}:\n{}", self.name, self.log_tail());
            }
            sleep(POLL_EVERY).await;
        }
    }

    /// Gives the last of what it logged.
    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        // A killed process ends at once: this only takes it off the kernel's list.
        drop(self.child.wait());
    }
}

/// One assigner node: it keeps its place and its disk whether it runs or not.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) client: SocketAddr,
    pub(crate) peer: SocketAddr,
    pub(crate) data: PathBuf,
    pub(crate) process: Option<Process>,
    admin: AdminClient<Channel>,
}

/// A task of the sample service.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    /// Where it serves watches.
    pub(crate) watch: SocketAddr,
    pub(crate) process: Process,
}

/// A task that forwards what it does not own.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) process: Process,
}

/// A proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// Where it serves watches.
    pub(crate) watch: SocketAddr,
    pub(crate) process: Process,
}

/// Where a proxy learns who owns what.
#[derive(Debug, Default)]
pub(crate) struct ProxyKnows {
    pub(crate) peers: Vec<SocketAddr>,
    pub(crate) cache: Option<PathBuf>,
    /// Further flags.
    pub(crate) flags: Vec<String>,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leader {
    /// Its place among the nodes.
    pub(crate) index: usize,
    pub(crate) term: u64,
}

/// The assigner nodes, and how to start what goes with them. `MANDOLINE_KEEP=1` keeps their logs and data.
#[derive(Debug)]
pub(crate) struct Cluster {
    program: PathBuf,
    pub(crate) nodes: Vec<Node>,
    // Dropped last: the processes write into it.
    dir: tempfile::TempDir,
}

impl Cluster {
    /// Founds a cluster of `count` nodes, and waits until one leads and the others follow.
    pub(crate) async fn start(program: &Path, count: usize) -> anyhow::Result<Self> {
        let mut cluster = Self::describe(program, count)?;
        for index in 0..count {
            cluster.start_node(index)?;
        }
        cluster.settled(START_WITHIN).await?;
        Ok(cluster)
    }

    /// Chooses places for nodes; none of them runs yet.
    pub(crate) fn describe(program: &Path, count: usize) -> anyhow::Result<Self> {
        let mut dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        if std::env::var_os("MANDOLINE_KEEP").is_some_and(|keep| keep == "1") {
            dir.disable_cleanup(true);
            eprintln!("logs and data are kept in {}", dir.path().display());
        }
        let node = |index: usize| -> anyhow::Result<Node> {
            let (client, peer) = (free_port()?, free_port()?);
            let endpoint = Endpoint::from_shared(format!("http://{client}"))?;
            let admin = AdminClient::new(endpoint.connect_timeout(CALL_WITHIN).connect_lazy());
            let data = dir.path().join(format!("node-{}", index + 1));
            Ok(Node { client, peer, data, process: None, admin })
        };
        let nodes = (0..count).map(node).collect::<Result<_, _>>()?;
        Ok(Self { program: program.to_owned(), nodes, dir })
    }

    /// Gives where the nodes answer.
    pub(crate) fn addresses(&self) -> Vec<Address> {
        let clients = self.nodes.iter().map(|node| node.client);
        clients.map(address).collect()
    }

    /// Gives where logs and data are, for as long as this lives.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Gives the words that start a node.
    pub(crate) fn node_args(&self, index: usize) -> Vec<String> {
        let seats = self.nodes.iter().map(|node| format!("{}/{}", node.client, node.peer.port()));
        let node = &self.nodes[index];
        let words = [
            "assigner".to_owned(),
            "--peers".to_owned(),
            seats.collect::<Vec<_>>().join(","),
            "--listen".to_owned(),
            node.client.to_string(),
            "--peer-listen".to_owned(),
            node.peer.to_string(),
            "--data-dir".to_owned(),
            node.data.display().to_string(),
        ];
        words.to_vec()
    }

    /// Starts a node, with what it has on disk if it ran before.
    pub(crate) fn start_node(&mut self, index: usize) -> anyhow::Result<()> {
        let (args, name) = (self.node_args(index), format!("node-{}", index + 1));
        let process = Process::start(&self.program, &name, &args, self.dir.path())?;
        self.nodes[index].process = Some(process);
        Ok(())
    }

    /// Kills a node and waits until it is gone.
    pub(crate) fn kill_node(&mut self, index: usize) {
        self.nodes[index].process = None;
    }

    /// Kills all nodes at the same time.
    pub(crate) fn kill_nodes(&mut self) {
        for node in &mut self.nodes {
            if let Some(process) = &mut node.process {
                process.kill();
            }
        }
        for node in &mut self.nodes {
            node.process = None;
        }
    }

    /// Gives a client of one node. Its connection is kept, and made anew when it broke.
    pub(crate) fn admin(&self, index: usize) -> AdminClient<Channel> {
        self.nodes[index].admin.clone()
    }

    /// Asks a node how things are.
    pub(crate) async fn status(&self, index: usize) -> Result<pb::StatusReply, Status> {
        let mut request = Request::new(pb::StatusRequest {});
        request.set_timeout(CALL_WITHIN);
        let mut admin = self.admin(index);
        let asked = timeout(CALL_WITHIN, admin.status(request)).await;
        let silent = |_| Status::deadline_exceeded(format!("no answer within {CALL_WITHIN:?}"));
        Ok(asked.map_err(silent)??.into_inner())
    }

    /// Waits until a running node says of itself that it leads.
    pub(crate) async fn leader(&self, within: Duration) -> anyhow::Result<Leader> {
        let end = Instant::now() + within;
        // Each is asked on its own: one that is slow to say no must not hide the other's yes.
        let asked = self.running().into_iter().map(|index| {
            let look = async move {
                while Instant::now() < end {
                    if let Some(term) = self.term_led(index).await {
                        return Ok(Leader { index, term });
                    }
                    sleep(POLL_EVERY).await;
                }
                Err(anyhow!("waited {within:?} for a leader{}", self.logs()))
            };
            Box::pin(look)
        });
        let (leader, _) = futures_util::future::select_ok(asked).await?;
        Ok(leader)
    }

    /// The term in which a node says that it leads: by its page, which costs it far less than `Status`.
    async fn term_led(&self, index: usize) -> Option<u64> {
        let page = page(self.nodes[index].client, "/readyz?verbose").await?;
        let (_, term) = page.split_once("this node leads, term ")?;
        term.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    }

    /// Waits until one node leads, and every other that runs follows it and has applied what the leader had.
    pub(crate) async fn settled(&self, within: Duration) -> anyhow::Result<Leader> {
        let look = async |cluster: &Self| {
            let leader = cluster.leader(CALL_WITHIN).await.ok()?;
            let known = cluster.status(leader.index).await.ok()?;
            // Asked after the leader was, so that changes that go on meanwhile do not matter.
            for index in cluster.running() {
                let status = cluster.status(index).await.ok()?;
                let same = status.leader == known.node && status.term == leader.term;
                if !same || status.applied < known.applied {
                    return None;
                }
            }
            Some(leader)
        };
        self.until("all nodes that run to follow one leader and have its log", within, look).await
    }

    /// Waits until every slice of a job is served by a task that is none of `not`, and `tasks` are registered.
    pub(crate) async fn served(
        &self,
        job: &str,
        tasks: usize,
        within: Duration,
    ) -> anyhow::Result<pb::JobStatus> {
        let look = async |cluster: &Self| {
            for index in cluster.running() {
                let Ok(status) = cluster.status(index).await else { continue };
                let found = status
                    .jobs
                    .into_iter()
                    .find(|status| status.spec.as_ref().is_some_and(|spec| spec.name == job));
                return found.filter(|job| job.unserved == 0 && job.tasks.len() == tasks);
            }
            None
        };
        let what = format!("{tasks} tasks that serve every slice of job {job}");
        self.until(&what, within, look).await
    }

    /// Makes or changes a job at any node; the error of the last try if none accepts it in time. Tried again, since the
    /// same spec twice does no harm but to raise the version once more.
    pub(crate) async fn apply(&self, spec: &pb::JobSpec, within: Duration) -> anyhow::Result<u64> {
        let (end, mut error) = (Instant::now() + within, None);
        let running = self.running();
        for index in running.iter().cycle() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut request =
                Request::new(pb::ApplyJobRequest { spec: Some(spec.clone()), if_version: None });
            request.set_timeout(left);
            match timeout(left, self.admin(*index).apply_job(request)).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner().version),
                Ok(Err(status)) => error = Some(status),
                Err(_) => {}
            }
            sleep(RETRY_EVERY).await;
        }
        let why = error.map_or_else(String::new, |status| format!(": {status}"));
        bail!("job {} was not accepted within {within:?}{why}{}", spec.name, self.logs())
    }

    /// Gives the places of the nodes that run.
    pub(crate) fn running(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|index| self.nodes[*index].process.is_some()).collect()
    }

    /// Starts a task of the sample service for job `kv`. It asks for slices; wait for them by `served`.
    pub(crate) fn start_task(&self, name: &str) -> anyhow::Result<Task> {
        let (address, watch) = (free_port()?, free_port()?);
        let mut args = words("demo task");
        args.extend(["--name".to_owned(), name.to_owned()]);
        args.extend(["--listen".to_owned(), address.to_string()]);
        args.extend(["--watch-listen".to_owned(), watch.to_string()]);
        args.extend(["--assigners".to_owned(), self.assigners()]);
        let process = Process::start(&self.program, name, &args, self.dir.path())?;
        Ok(Task { name: name.to_owned(), address, watch, process })
    }

    /// Starts a task of job `kv` that forwards what it does not own.
    pub(crate) fn start_echo(&self, name: &str) -> anyhow::Result<Echo> {
        let address = free_port()?;
        let mut args = words("bench echo");
        args.extend(["--name".to_owned(), name.to_owned()]);
        args.extend(["--listen".to_owned(), address.to_string()]);
        args.extend(["--assigners".to_owned(), self.assigners()]);
        let process = Process::start(&self.program, name, &args, self.dir.path())?;
        Ok(Echo { name: name.to_owned(), address, process })
    }

    /// Starts a proxy for job `kv`, and waits until it is ready: it knows the job's assignment.
    pub(crate) async fn start_proxy(&self, name: &str, knows: ProxyKnows) -> anyhow::Result<Proxy> {
        let (listen, admin, watch) = (free_port()?, free_port()?, free_port()?);
        let mut args = words("proxy --workers 1");
        args.extend(["--listen".to_owned(), listen.to_string()]);
        args.extend(["--admin".to_owned(), admin.to_string()]);
        args.extend(["--watch-listen".to_owned(), watch.to_string()]);
        args.extend(["--assigners".to_owned(), self.assigners()]);
        let peers: Vec<String> = knows.peers.iter().map(SocketAddr::to_string).collect();
        if !peers.is_empty() {
            args.extend(["--watch-peers".to_owned(), peers.join(",")]);
        }
        if let Some(cache) = knows.cache {
            args.extend(["--cache".to_owned(), cache.display().to_string()]);
        }
        args.extend(knows.flags);
        let process = Process::start(&self.program, name, &args, self.dir.path())?;
        let mut proxy = Proxy { address: listen, admin, watch, process };
        let end = Instant::now() + START_WITHIN;
        while !is_ready(admin).await {
            let ended = proxy.process.ended();
            if ended.is_some() || Instant::now() >= end {
                bail!(
                    "{name} is not ready at {listen}, ended: {ended:?}\n{}",
                    proxy.process.log_tail()
                );
            }
            sleep(POLL_EVERY).await;
        }
        Ok(proxy)
    }

    fn assigners(&self) -> String {
        let clients: Vec<String> = self.nodes.iter().map(|node| node.client.to_string()).collect();
        clients.join(",")
    }

    /// Looks again and again until there is something; fails by name, with what the nodes logged last.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        within: Duration,
        look: impl AsyncFn(&Self) -> Option<T>,
    ) -> anyhow::Result<T> {
        let end = Instant::now() + within;
        loop {
            if let Some(found) = look(self).await {
                return Ok(found);
            }
            if Instant::now() >= end {
                return Err(anyhow!("waited {within:?} for {what}{}", self.logs()));
            }
            sleep(POLL_EVERY).await;
        }
    }

    /// What the nodes logged last.
    pub(crate) fn logs(&self) -> String {
        let of_node = |(index, node): (usize, &Node)| match &node.process {
            Some(process) => format!("\n-- node {}\n{}", index + 1, process.log_tail()),
            None => format!("\n-- node {} does not run", index + 1),
        };
        self.nodes.iter().enumerate().map(of_node).collect()
    }
}

/// Whether the page for that says yes.
pub(crate) async fn is_ready(admin: SocketAddr) -> bool {
    page(admin, "/readyz").await.is_some_and(|page| page.starts_with("HTTP/1.1 200"))
}

/// Asks for a page, and gives the answer with its head.
pub(crate) async fn page(address: SocketAddr, path: &str) -> Option<String> {
    let asked = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = vec![];
        stream.read_to_end(&mut answer).await.ok()?;
        String::from_utf8(answer).ok()
    };
    timeout(CALL_WITHIN, asked).await.ok().flatten()
}

/// Gives an address as the wire has it.
pub(crate) fn address(socket: SocketAddr) -> Address {
    socket.to_string().parse().expect("a socket's address is an address")
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// Finds a port of loopback that is free now, below those that the system gives to outgoing connections: a process that
/// is started again must find its own still free.
pub(crate) fn free_port() -> anyhow::Result<SocketAddr> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..PORTS {
        // Processes begin at different places, so that they seldom look at the same port at the same time.
        let step = NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id().wrapping_mul(61);
        let port = u16::try_from(u32::from(FIRST_PORT) + step % PORTS).expect("the range fits");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no port from {FIRST_PORT} on is free on loopback")
}

const FIRST_PORT: u16 = 18_500;
/// Up to 32,767: Linux gives those from 32,768 to outgoing connections.
const PORTS: u32 = 32_768 - FIRST_PORT as u32;
/// A start takes a second or two; past this something is wrong that waiting does not mend.
const START_WITHIN: Duration = Duration::from_secs(30);
/// How long a node may take to say how things are.
const CALL_WITHIN: Duration = Duration::from_secs(2);
/// How often something is looked at that cannot be waited for.
const POLL_EVERY: Duration = Duration::from_millis(5);
/// Between two tries of a change: short against an election, long against a call.
const RETRY_EVERY: Duration = Duration::from_millis(2);
/// How much of a log is shown.
const LOG_LINES: usize = 12;

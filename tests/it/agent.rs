//! Servers that link nothing, made tasks by an agent: requests reach them through a proxy while they are healthy.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mandoline_core::spec::{Consistency, JobSpec};
use mandoline_proto::pb;
use rustix::process::Signal;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::callers::{Callers, PATIENCE, ask, assert_none, bytes_of, kv, my_turn, program};
use crate::kit::{Process, free_ports, local, run, text, until};
use crate::processes::{Cluster, Proxy, ProxyKnows};

/// An ordinary HTTP server: it has never heard of keys. It says its name to any request, and whether it is well at /livez.
pub(crate) struct Plain {
    name: &'static str,
    address: SocketAddr,
    well: Arc<AtomicBool>,
    /// It answers 500, and says at /livez what it always said.
    pub(crate) fails: Arc<AtomicBool>,
    stop: CancellationToken,
}

impl Plain {
    pub(crate) async fn start(name: &'static str, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let well = Arc::new(AtomicBool::new(true));
        let fails = Arc::new(AtomicBool::new(false));
        let (is_well, stopped, is_failing) = (Arc::clone(&well), stop.clone(), Arc::clone(&fails));
        let serve = async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (well, stopped) = (Arc::clone(&is_well), stopped.clone());
                let fails = Arc::clone(&is_failing);
                let answer = service_fn(move |request: http::Request<_>| {
                    let _: &hyper::body::Incoming = request.body();
                    let status = match request.uri().path() {
                        "/livez" if !well.load(Ordering::Relaxed) => 503,
                        "/livez" => 200,
                        _ if fails.load(Ordering::Relaxed) => 500,
                        _ => 200,
                    };
                    let answer = http::Response::builder()
                        .status(status)
                        .header("mandoline-task", name)
                        .body(Full::new(Bytes::from_static(name.as_bytes())));
                    std::future::ready(answer)
                });
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                drop(tokio::spawn(
                    async move { drop(stopped.run_until_cancelled(connection).await) },
                ));
            }
        };
        let told = stop.clone();
        drop(tokio::spawn(async move { told.run_until_cancelled(serve).await }));
        Self { name, address, well, fails, stop }
    }

    pub(crate) fn listed(&self) -> String {
        format!("{}={}", self.name, self.address)
    }
}

impl Drop for Plain {
    /// It dies: nobody listens, and open connections break off.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(crate) const ANY: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

pub(crate) fn agent(cluster: &Cluster, args: &[&str]) -> Process {
    let assigners: Vec<String> = cluster.addresses().iter().map(ToString::to_string).collect();
    let assigners = assigners.join(",");
    let always = [
        "agent",
        "--job",
        "kv",
        "--assigners",
        &assigners,
        "--every",
        "100ms",
        "--list-every",
        "100ms",
    ];
    Process::start(&[&always[..], args].concat())
}

/// Waits until exactly these have the keys, and a proxy sends requests to all of them.
async fn answered_by(cluster: &Cluster, proxy: &Proxy, names: &[&str]) {
    let look = async |_: &Cluster| {
        let mut tasks = vec![];
        let mut connection = None;
        for key in 0..60 {
            let answer = ask(&mut connection, proxy.address, "GET", key).await.ok()?;
            tasks.push(answer.task.filter(|_| answer.status == 200)?);
        }
        tasks.sort();
        tasks.dedup();
        (tasks == names).then_some(())
    };
    cluster.until(&format!("{names:?} to answer"), PATIENCE, look).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_a_task_while_it_is_healthy() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let a = Plain::start("a", ANY).await;
    let b = Plain::start("b", ANY).await;
    let list = format!("{},{}", a.listed(), b.listed());
    let mut agent = agent(&cluster, &["--tasks", &list, "--health", "/livez"]);
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
    answered_by(&cluster, &proxy, &["a", "b"]).await;

    // It says that it is not well: nobody notices, for it serves until its keys are elsewhere.
    let callers = Callers::start(proxy.address, 60);
    a.well.store(false, Ordering::Relaxed);
    answered_by(&cluster, &proxy, &["b"]).await;
    agent.line("task a is drained");
    let outcomes = callers.stop().await;
    assert_none("requests failed", outcomes.iter().filter(|outcome| !outcome.is_good()));
    // The last one stays, however it feels: it is likelier that the agent is wrong than that nobody is well.
    b.well.store(false, Ordering::Relaxed);
    agent.line("task b is kept though it is not healthy");
    a.well.store(true, Ordering::Relaxed);
    answered_by(&cluster, &proxy, &["a"]).await;
    b.well.store(true, Ordering::Relaxed);
    answered_by(&cluster, &proxy, &["a", "b"]).await;

    // Both at once: one of them stays all the same.
    [&a, &b].iter().for_each(|server| server.well.store(false, Ordering::Relaxed));
    until("one of both to be kept", || {
        let said = agent.stderr();
        (said.matches("is kept though it is not healthy").count() == 2).then_some(())
    });
    [&a, &b].iter().for_each(|server| server.well.store(true, Ordering::Relaxed));
    answered_by(&cluster, &proxy, &["a", "b"]).await;

    // It dies, and comes back.
    let address = a.address;
    drop(a);
    answered_by(&cluster, &proxy, &["b"]).await;
    let _a = Plain::start("a", address).await;
    answered_by(&cluster, &proxy, &["a", "b"]).await;

    agent.signal(Signal::TERM);
    assert_eq!(agent.ended(), Some(0), "{}", agent.stderr());
    let left = cluster.status(0).await.unwrap().jobs.remove(0);
    assert_eq!(left.tasks.len(), 0, "both have left before it ended: {left:?}");
    assert!(agent.stderr().contains("agent: stopped"), "{}", agent.stderr());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_tasks_is_followed() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let servers =
        [Plain::start("a", ANY).await, Plain::start("b", ANY).await, Plain::start("c", ANY).await];
    let [a, b, c] = servers.each_ref().map(Plain::listed);
    let path = cluster.dir().join("tasks.txt");
    let write = |text: String| std::fs::write(&path, text).unwrap();
    write(format!("# ours\n{a} zone=x\n{b}\n"));
    let mut agent = agent(&cluster, &["--file", path.to_str().unwrap()]);
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
    answered_by(&cluster, &proxy, &["a", "b"]).await;
    write(format!("{a}\n{c}\n"));
    answered_by(&cluster, &proxy, &["a", "c"]).await;
    // What cannot be read changes nothing, and is named with its line.
    write(format!("{a}\n{c}\nd 10.0.0.1:9\n"));
    let line = agent.line(&format!("error: {}:3:", path.display()));
    assert!(line.contains("expected NAME=HOST:PORT"), "{line}");
    agent.line("the tasks stay as they were");
    answered_by(&cluster, &proxy, &["a", "c"]).await;
    // Nor does what can be read and can be no task.
    write(format!("{a}\n{c}\n{b} zone={}\n", "x".repeat(200)));
    agent.line("error: task b cannot be registered");
    agent.line("the tasks stay as they were");
    answered_by(&cluster, &proxy, &["a", "c"]).await;
    write(format!("{a}\n{c}\nd 10.0.0.1:9\n"));
    agent.line("the tasks stay as they were");

    let bad = run(&["agent", "--job", "kv", "--file", path.to_str().unwrap()]);
    assert_eq!(bad.status.code(), Some(2), "{}", text(&bad.stderr));
    assert!(text(&bad.stderr).contains("tasks.txt:3: \"d 10.0.0.1:9\" is no task"));
}

/// A server as a shell starts it, whose number is written down. It knows nothing of the job: any binary with HTTP will do.
fn command(pid: &Path, port: u16) -> [String; 3] {
    let serve = env!("CARGO_BIN_EXE_mandoline");
    let serve = format!(
        "echo $$ > {}; exec {serve} distributor --job x --listen {}",
        pid.display(),
        local(port)
    );
    ["sh".to_owned(), "-c".to_owned(), serve]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_stopped_after_its_keys_have_moved_and_its_end_is_the_agents() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let pid = cluster.dir().join("pid");
    let start = |name: &str, port| {
        let server = format!("http://{}", local(port));
        let [sh, c, line] = command(&pid, port);
        let args = ["--for", &server, "--name", name, "--health", "/livez", "--", &sh, &c, &line];
        agent(&cluster, &args)
    };
    let ports = free_ports(2);
    let mut first = start("first", ports[0]);
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let mut second = start("second", ports[1]);
    cluster.served("kv", 2, PATIENCE).await.unwrap();

    first.signal(Signal::TERM);
    assert_eq!(first.ended(), Some(0), "{}", first.stderr());
    let said = first.stderr();
    let at = |line: &str| said.find(line).unwrap_or_else(|| panic!("no {line:?}: {said}"));
    assert!(at("task first is drained") < at("distributor: stopped"), "{said}");
    cluster.served("kv", 1, PATIENCE).await.unwrap();

    let server = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(server).unwrap(), Signal::KILL)
        .unwrap();
    assert_eq!(second.ended(), Some(128 + 9), "{}", second.stderr());
    assert!(second.stderr().contains("the server has ended"), "{}", second.stderr());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_after_the_server_s_end_can_be_cut_short() {
    let mut cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let server = Plain::start("a", ANY).await;
    let address = server.address.to_string();
    let pid = cluster.dir().join("pid");
    let sleep = format!("echo $$ > {}; exec sleep 600", pid.display());
    let mut agent = agent(&cluster, &["--for", &address, "--name", "a", "--", "sh", "-c", &sleep]);
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    cluster.kill_nodes();
    let child = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(child).unwrap(), Signal::KILL)
        .unwrap();
    agent.line("agent: the server has ended");
    // With nobody to take its slices the drain would last for as long as it may.
    agent.signal(Signal::TERM);
    agent.line("agent: told to stop: waiting for the drain");
    agent.signal(Signal::TERM);
    agent.line("agent: told to stop again");
    assert_eq!(agent.ended(), Some(128 + 9), "{}", agent.stderr());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_no_child_is_told_to_stop_after_the_drain() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let port = free_ports(1)[0];
    let listen = local(port).to_string();
    let mut server = Process::start(&["distributor", "--job", "x", "--listen", &listen]);
    server.line("distributor: tells of x");
    let pid = server.id().to_string();
    let mut agent = agent(&cluster, &["--for", &listen, "--name", "kv-0", "--then-stop", &pid]);
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended(), Some(0), "{}", agent.stderr());
    assert_eq!(server.ended(), Some(0), "{}", server.stderr());

    let missing = run(&["agent", "--job", "kv", "--for", &listen, "--then-stop", &pid]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("cannot be stopped after the drain"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_report_nothing_are_balanced_by_what_callers_offer() {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    let spec = JobSpec {
        report_every: Duration::from_millis(500),
        balance_every: Duration::from_secs(1),
        ..JobSpec::new("kv".parse().unwrap())
    };
    cluster.apply(&pb::JobSpec::from(&spec), PATIENCE).await.unwrap();
    let servers = [Plain::start("a", ANY).await, Plain::start("b", ANY).await];
    let list = servers.each_ref().map(Plain::listed).join(",");
    let _agent = agent(&cluster, &["--tasks", &list]);
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    let proxy = cluster.start_proxy("proxy", ProxyKnows::default()).await.unwrap();
    let clerk = mandoline::Clerk::builder("kv").sources(cluster.addresses()).start().unwrap();
    clerk.ready().await;
    let owner = |key: usize| clerk.route(&bytes_of(key)).map(|target| target.name().to_string());
    // All that is asked for is a's.
    let keys: Vec<usize> =
        (0..400).filter(|key| owner(*key).is_ok_and(|owner| owner == "a")).take(40).collect();
    assert_eq!(keys.len(), 40);
    let stop = CancellationToken::new();
    let mut calling = tokio::task::JoinSet::new();
    for part in 0..4 {
        let (keys, stop, target) = (keys.clone(), stop.clone(), proxy.address);
        calling.spawn(async move {
            let mut connection = None;
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            for key in keys.iter().cycle().skip(part * 10) {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = tick.tick() => {}
                }
                assert_eq!(ask(&mut connection, target, "GET", *key).await.unwrap().status, 200);
            }
        });
    }
    let began = Instant::now();
    let look = async |_: &Cluster| {
        let moved = keys.iter().filter(|key| owner(**key).is_ok_and(|owner| owner == "b")).count();
        (12..=28).contains(&moved).then_some(moved)
    };
    let moved = cluster.until("half of the load to be b's", PATIENCE, look).await.unwrap();
    stop.cancel();
    while let Some(ended) = calling.join_next().await {
        ended.unwrap();
    }
    println!("{moved} of 40 busy keys have moved after {:.1} s", began.elapsed().as_secs_f64());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_said() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    let server = Plain::start("a", ANY).await;
    let url = format!("http://{}", server.address);
    // A job that nobody has made yet.
    let mut early = agent(&cluster, &["--for", &url, "--name", "a"]);
    early.line("there is no job kv yet, and it is asked for again");
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();

    // A name that is taken.
    let other = Plain::start("b", ANY).await;
    let url_b = format!("http://{}", other.address);
    let mut second = agent(&cluster, &["--for", &url_b, "--name", "a"]);
    let line = second.line("task a is not registered, and asks on:");
    assert!(!line.is_empty());

    // A check that never succeeds.
    let args = ["--for", &url_b, "--health", "/livez", "--healthy-within", "500ms"];
    other.well.store(false, Ordering::Relaxed);
    let mut ill = agent(&cluster, &args);
    assert_eq!(ill.ended(), Some(2), "{}", ill.stderr());
    assert!(ill.stderr().contains("was not healthy within 500ms"), "{}", ill.stderr());
    assert!(ill.stderr().contains("answers GET /livez with 503"), "{}", ill.stderr());

    // A name that does not resolve.
    let mut nowhere = agent(&cluster, &["--dns", "nobody.invalid:9000"]);
    nowhere.line("nobody.invalid:9000 does not resolve, and is asked again:");
    nowhere.signal(Signal::TERM);
    assert_eq!(nowhere.ended(), Some(0), "{}", nowhere.stderr());

    // An exclusive job.
    let spec =
        JobSpec { consistency: Consistency::Exclusive, ..JobSpec::new("locks".parse().unwrap()) };
    cluster.apply(&pb::JobSpec::from(&spec), PATIENCE).await.unwrap();
    let assigner = cluster.addresses()[0].to_string();
    let refused = run(&["agent", "--job", "locks", "--for", &url, "--assigners", &assigner]);
    let says = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{says}");
    assert!(says.contains("job locks is exclusive: an agent cannot register a server"), "{says}");

    for (args, says) in [
        (
            &["--for", "http://127.0.0.1"][..],
            "it has no port: give one, such as http://127.0.0.1:9000",
        ),
        (&["--for", "a:1", "--label", "zone"], "\"zone\" is no label"),
        (&["--for", "a:1", "--capacity", "0"], "the capacity 0 is out of range"),
        (&["--for", "a:1", "--", "/no/such/server"], "/no/such/server did not start"),
    ] {
        let bad = run(&[&["agent", "--job", "kv"], args].concat());
        assert_eq!(bad.status.code(), Some(2), "{args:?}");
        assert!(text(&bad.stderr).contains(says), "{args:?}: {}", text(&bad.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dns_name_is_a_task_for_each_address() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let server = Plain::start("a", ANY).await;
    let name = format!("localhost:{}", server.address.port());
    let mut agent = agent(&cluster, &["--dns", &name]);
    agent.line(&format!("task 127.0.0.1-{} is registered", server.address.port()));
    cluster.served("kv", 1, PATIENCE).await.unwrap();
}

/// The ports on which a process listens, as the kernel has them.
fn listens(pid: u32) -> Option<Vec<u16>> {
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .filter_map(|entry| {
            std::fs::read_link(entry.ok()?.path()).ok()?.to_str().map(str::to_owned)
        })
        .collect();
    let tables = ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/net/{table}")));
    let mut ports = vec![];
    for line in tables.iter().flatten().flat_map(|table| table.lines().skip(1)) {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let ours = sockets.contains(&format!("socket:[{}]", columns[9]));
        if ours && columns[3] == "0A" {
            let (_, port) = columns[1].rsplit_once(':')?;
            ports.push(u16::from_str_radix(port, 16).ok()?);
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Some(ports)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_watches_an_agent_a_slicelet_or_a_proxy_unless_that_was_asked_for() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let assigner = cluster.addresses()[0].to_string();
    let server = Plain::start("a", ANY).await;
    let url = server.address.to_string();
    let agent = agent(&cluster, &["--for", &url, "--name", "a"]);
    let slicelet = mandoline::Slicelet::builder("kv", "b", "127.0.0.1:1").assigners([&assigner]);
    let slicelet = slicelet.start().unwrap();
    slicelet.ready().await.unwrap();
    assert_eq!(slicelet.watch_address(), None);
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    let watched = |slicelet: &mandoline::Slicelet| {
        let tasks = slicelet.assignment().tasks.clone();
        tasks.values().filter(|task| task.info.watch.is_some()).count()
    };
    assert_eq!(watched(&slicelet), 0, "nobody is told of a place to watch");

    let ports = free_ports(2);
    let (listen, admin) = (local(ports[0]).to_string(), local(ports[1]).to_string());
    let proxy = Process::start(&[
        "proxy",
        "--listen",
        &listen,
        "--admin",
        &admin,
        "--assigners",
        &assigner,
    ]);
    until("the proxy to be ready", || {
        crate::kit::ask(local(ports[1]), "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });
    if cfg!(target_os = "linux") {
        let mut expected = ports;
        expected.sort_unstable();
        assert_eq!(listens(proxy.id()), Some(expected));
        assert_eq!(listens(agent.id()), Some(vec![]));
    }
}

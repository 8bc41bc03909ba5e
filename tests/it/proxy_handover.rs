//! One proxy process takes over from another, again and again, under load: nobody notices. One that cannot serve takes nothing over.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mandoline_core::spec::JobSpec;
use rustix::process::Signal;

use crate::callers::{PATIENCE, my_turn, program};
use crate::kit::{Process, ask, free_ports, local, until};
use crate::processes::Cluster;

/// A proxy that hands over at a file.
fn proxy(listen: SocketAddr, admin: SocketAddr, assigners: &str, file: &Path) -> Process {
    let (listen, admin) = (listen.to_string(), admin.to_string());
    let file = file.display().to_string();
    let place = ["--listen", &listen, "--admin", &admin, "--workers", "2", "--handover", &file];
    Process::start(&[&["proxy", "--assigners", assigners], &place[..]].concat())
}

/// Asks by a pool of connections that are kept, as applications do; the first thing that goes wrong is its end.
async fn keep_asking(
    proxy: SocketAddr,
    done: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
) -> Result<(), String> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    for n in 0_u64.. {
        if done.load(Relaxed) {
            break;
        }
        let request = Request::put(format!("http://{proxy}/kv/key-{}", n % 97));
        let request = request.body(Full::new(Bytes::from_static(b"value"))).unwrap();
        let answer = client.request(request).await.map_err(|error| format!("{error:?}"))?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(|error| error.to_string())?;
        if !status.is_success() {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&body.to_bytes())));
        }
        served.fetch_add(1, Relaxed);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_processes_hand_over_under_load_and_no_request_fails() {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&(&JobSpec::new("kv".parse().unwrap())).into(), PATIENCE).await.unwrap();
    let _task = cluster.start_task("kv-0").unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let assigner = cluster.addresses()[0].to_string();
    let file = cluster.dir().join("proxy.handover");
    let ports = free_ports(3);
    let (listen, admin) = (local(ports[0]), local(ports[1]));
    let mut serving = proxy(listen, admin, &assigner, &file);
    until("a proxy to be ready", || {
        ask(admin, "GET", "/readyz", "").filter(|answer| answer.status == 200)
    });

    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let callers: Vec<_> = (0..4)
        .map(|_| tokio::spawn(keep_asking(listen, Arc::clone(&done), Arc::clone(&served))))
        .collect();
    for n in 0..10 {
        let before = served.load(Relaxed);
        until("requests before", || (served.load(Relaxed) > before + 20).then_some(()));
        let mut next = proxy(listen, admin, &assigner, &file);
        next.line("proxy: requests for job kv");
        assert_eq!(serving.ended(), Some(0), "take-over {n}: {}", serving.stderr());
        let before = served.load(Relaxed);
        until("requests after", || (served.load(Relaxed) > before + 20).then_some(()));
        serving = next;
    }

    // One that never learns who serves what takes nothing over.
    let nobody = local(ports[2]).to_string();
    let mut blind = proxy(listen, admin, &nobody, &file);
    assert_eq!(blind.ended(), Some(2));
    for said in ["nobody has told who serves job kv", "the process that serves now goes on"] {
        assert!(blind.stderr().contains(said), "{}", blind.stderr());
    }
    // Neither does one that is to listen elsewhere.
    let mut elsewhere = proxy(local(ports[2]), admin, &assigner, &file);
    assert_eq!(elsewhere.ended(), Some(2));
    let said = elsewhere.stderr();
    let why = format!("nowhere where this one is to, on {}", local(ports[2]));
    assert!(said.contains(&why), "{said}");
    let before = served.load(Relaxed);
    until("requests after all that", || (served.load(Relaxed) > before + 20).then_some(()));

    done.store(true, Relaxed);
    for caller in callers {
        tokio::time::timeout(PATIENCE, caller).await.expect("a caller ends").unwrap().unwrap();
    }
    // It takes its offer back, and leaves no file.
    serving.signal(Signal::TERM);
    assert_eq!(serving.ended(), Some(0));
    assert!(!file.exists());
    // A file that a killed process left is no hindrance.
    let mut killed = proxy(listen, admin, &assigner, &file);
    killed.line("proxy: requests for job kv");
    drop(killed);
    assert!(file.exists());
    let mut last = proxy(listen, admin, &assigner, &file);
    last.line("proxy: requests for job kv");
}

/// As systemd does it: descriptor 3 is a socket that listens, and stays open while proxies come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_managers_socket_is_served_from_and_outlives_the_process() {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&(&JobSpec::new("kv".parse().unwrap())).into(), PATIENCE).await.unwrap();
    let _task = cluster.start_task("kv-0").unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let assigner = cluster.addresses()[0].to_string();
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (listen, admin) = (held.local_addr().unwrap(), local(free_ports(1)[0]));
    let start = |listen: SocketAddr| {
        let mut shell = std::process::Command::new("sh");
        let socket: std::os::fd::OwnedFd = held.try_clone().unwrap().into();
        let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
        shell.stdin(socket).args(["-c", script, "sh"]).arg(program());
        shell.args(["proxy", "--assigners", &assigner, "--workers", "2"]);
        shell.args(["--listen", &listen.to_string(), "--admin", &admin.to_string()]);
        Process::spawn(shell)
    };
    let put = || ask(listen, "PUT", "/kv/key", "value").map(|answer| answer.status < 300);
    let mut first = start(listen);
    first.line("proxy: requests for job kv");
    until("a request to be served", || put().filter(|served| *served));
    first.signal(Signal::TERM);
    assert_eq!(first.ended(), Some(0), "{}", first.stderr());
    // Nobody serves; a client that comes now waits for the next process.
    let waiting = std::thread::spawn(move || {
        until("the next process to serve", || {
            ask(listen, "GET", "/readyz-is-no-key", "").map(|answer| answer.status)
        })
    });
    let mut second = start(listen);
    second.line("proxy: requests for job kv");
    waiting.join().unwrap();
    until("a request to be served again", || put().filter(|served| *served));
    // A socket that listens elsewhere than the configuration says is refused, and named.
    let mut wrong = start(local(free_ports(1)[0]));
    assert_eq!(wrong.ended(), Some(2));
    assert!(wrong.stderr().contains(&format!("only for {listen}")), "{}", wrong.stderr());
}

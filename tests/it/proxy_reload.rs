//! A proxy's file changes while the proxy serves: by being saved, by SIGHUP, by the admin address. Nothing fails, and what cannot work
//! leaves what was there.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use mandoline_core::spec::JobSpec;
use rustix::process::Signal;

use crate::callers::{PATIENCE, my_turn, program};
use crate::kit::{Process, ask, free_ports, local, run, text, try_ask, until};
use crate::processes::{Cluster, ProxyKnows};

/// With the zone the clerk is another one each time, too: what a reload starts knows nothing at first.
const PLAIN: &str = "zone: a\nroutes:\n  - {name: kv, path: /kv/*, job: kv}\n";
const MORE: &str = "zone: b\nroutes:\n  - {name: kv, path: /kv/*, job: kv}\n  - {name: new, path: /new/*, job: kv}\n";
const WRONG: &str = "routes:\n  - {name: kv, path: /kv/*, jbo: kv}\n";

/// The file changes after it was read, and before the proxy serves: here while it waits to hear of pauses from an assigner that is silent.
#[test]
fn a_file_that_changes_while_the_proxy_starts_comes_into_force() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("proxy.yaml");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = free_ports(2);
    let (listen, admin) = (local(ports[0]), local(ports[1]));
    save(&file, "routes:\n  - {path: /old/*, job: kv}\n");
    let (config, assigner) = (file.display().to_string(), silent.local_addr().unwrap().to_string());
    let mut proxy = Process::start(&[
        "proxy",
        "--config",
        &config,
        "--assigners",
        &assigner,
        "--listen",
        &listen.to_string(),
        "--admin",
        &admin.to_string(),
        "--workers",
        "1",
    ]);
    // Whoever it asks, it knows by now what the file says.
    let _asked = silent.accept().unwrap();
    save(&file, "routes:\n  - {path: /new/*, job: kv}\n");
    proxy.line("proxy: requests for job kv");
    until("the file to be in force", || {
        let answer = ask(listen, "GET", "/new/key", "")?;
        (!answer.head.contains("destination_not_found")).then_some(())
    });
}

/// Replaces a file as editors and deployments do: whole, in one step.
fn save(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(&beside, path).unwrap();
}

/// Asks for one key after the other until told to stop, and counts what went well; the first thing that did not is its end.
fn keep_asking(
    proxy: SocketAddr,
    done: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
) -> Result<(), String> {
    let mut n = 0;
    while !done.load(Relaxed) {
        n += 1;
        let answer = try_ask(proxy, "PUT", &format!("/kv/key-{n}"), "value")?;
        if answer.status >= 300 {
            return Err(format!("{answer:?}"));
        }
        served.fetch_add(1, Relaxed);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_reloads_of_a_proxy_fail_no_request() {
    let _turn = my_turn().await;
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&(&JobSpec::new("kv".parse().unwrap())).into(), PATIENCE).await.unwrap();
    let _task = cluster.start_task("kv-0").unwrap();
    cluster.served("kv", 1, PATIENCE).await.unwrap();
    let file: PathBuf = cluster.dir().join("proxy.yaml");
    save(&file, PLAIN);
    let flags = vec!["--config".to_owned(), file.display().to_string()];
    let knows = ProxyKnows { flags, ..ProxyKnows::default() };
    let proxy = cluster.start_proxy("proxy", knows).await.unwrap();

    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let callers: Vec<_> = (0..2)
        .map(|_| {
            let (done, served) = (Arc::clone(&done), Arc::clone(&served));
            thread::spawn(move || keep_asking(proxy.address, done, served))
        })
        .collect();
    // The sample task knows no such path either, but says so itself.
    let new_is = |routed: bool| {
        let answer = ask(proxy.address, "GET", "/new/key", "").unwrap();
        (answer.head.contains("destination_not_found") != routed).then_some(())
    };
    let number = |name: &str| {
        let page = ask(proxy.admin, "GET", "/metrics", "").unwrap().body;
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).parse::<u64>().unwrap()
    };

    assert_eq!(new_is(false), Some(()));
    // By being saved.
    save(&file, MORE);
    until("the saved file to be in force", || new_is(true));
    // By the admin address, which answers when it is in force. What is in force already stays so.
    for n in 0..98 {
        let (yaml, routed) = if n % 2 == 0 { (PLAIN, false) } else { (MORE, true) };
        save(&file, yaml);
        let before = served.load(Relaxed);
        let answer = ask(proxy.admin, "POST", "/reload", "").unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(new_is(routed), Some(()), "reload {n}");
        until("a request after the reload", || (served.load(Relaxed) > before).then_some(()));
    }
    // By SIGHUP.
    save(&file, PLAIN);
    proxy.process.signal(Signal::HUP).unwrap();
    until("the file to be in force after SIGHUP", || new_is(false));
    assert!(number("mandoline_proxy_reloads_total") >= 100);

    // What cannot work.
    save(&file, WRONG);
    let answer = ask(proxy.admin, "POST", "/reload", "").unwrap();
    assert_eq!(answer.status, 422);
    let place = format!("{}:2:29: unknown field \"jbo\"", file.display());
    assert!(answer.body.contains(&place), "{}", answer.body);
    assert!(answer.body.contains("did you mean \"job\"?"), "{}", answer.body);
    assert_eq!(number("mandoline_proxy_reload_last_refused"), 1);
    save(&file, &format!("handover: elsewhere\n{PLAIN}"));
    let answer = ask(proxy.admin, "POST", "/reload", "").unwrap();
    assert_eq!(answer.status, 422);
    assert!(answer.body.contains("handover cannot change while the proxy runs"), "{answer:?}");
    save(&file, &format!("workers: 7\n{PLAIN}"));
    let answer = ask(proxy.admin, "POST", "/reload", "").unwrap();
    // The flag wins over the file, so nothing has changed.
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(number("mandoline_proxy_reload_last_refused"), 0);
    let before = served.load(Relaxed);
    until("requests after all that", || (served.load(Relaxed) > before + 10).then_some(()));

    done.store(true, Relaxed);
    for caller in callers {
        caller.join().unwrap().unwrap();
    }
    assert_eq!(number("mandoline_proxy_requests_failed_total"), 0);

    // What is refused leaves whoever was asked before: here with a place of its own for pauses, and two routes for one request.
    let elsewhere = cluster.dir().join("elsewhere").display().to_string();
    let two = "routes:\n  - {job: kv}\n  - {job: kv}\n";
    save(&file, &format!("pauses: {{cache: {elsewhere}}}\n{two}"));
    assert_eq!(ask(proxy.admin, "POST", "/reload", "").unwrap().status, 422);
    let assigners = cluster.addresses()[0].to_string();
    let added = run(&["pause", "add", "--job", "kv", "--for", "30s", "--assigners", &assigners]);
    assert!(added.status.success(), "{}", text(&added.stderr));
    until("the pause to be in force", || {
        let state = ask(proxy.admin, "GET", "/api/state", "").unwrap().body;
        state.contains("\"in_force\":true").then_some(())
    });
}

//! The fan-out tier alone: callers learn from a distributor what they would learn from an assigner, and go on by it when
//! all assigners are dead.

use mandoline::Clerk;

use crate::callers::{PATIENCE, at_rest, bytes_of, kv, program};
use crate::kit::{Process, ask, free_ports, local, run, text, until};
use crate::langs::Events;
use crate::processes::{Cluster, address};

fn start(upstream: &str, listen: &str, cache: &str) -> Process {
    let mut process = Process::start(&[
        "distributor",
        "--job",
        "kv",
        "--upstream",
        upstream,
        "--listen",
        listen,
        "--cache-dir",
        cache,
    ]);
    process.line("distributor: tells of kv");
    process
}

async fn knows(clerk: &Clerk, what: &str) {
    let ready = tokio::time::timeout(PATIENCE, clerk.ready()).await;
    ready.unwrap_or_else(|_| panic!("{what} knows nothing: {:?}", clerk.state()));
    for key in 0..60 {
        let target = clerk.route(&bytes_of(key));
        assert!(target.is_ok(), "{what}, key {key}: {:?}", target.err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_go_by_a_distributor_when_all_assigners_are_dead() {
    let mut cluster = Cluster::start(program(), 1).await.unwrap();
    let upstream = cluster.addresses()[0].to_string();
    let cache = cluster.dir().join("cache").display().to_string();
    let ports = free_ports(4);
    let places: Vec<String> = ports.iter().map(|port| local(*port).to_string()).collect();
    let first = start(&upstream, &places[0], &cache);
    let page = |port: u16, path: &str| ask(local(port), "GET", path, "");
    assert_eq!(page(ports[0], "/livez").unwrap().status, 200);
    let early = page(ports[0], "/readyz").unwrap();
    assert_eq!(early.status, 503, "nobody has made the job: {early:?}");
    assert!(early.body.contains("[failed] kv: nothing is known yet"), "{early:?}");

    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let _tasks = [cluster.start_task("kv-0").unwrap(), cluster.start_task("kv-1").unwrap()];
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    until("the distributor to be ready", || {
        page(ports[0], "/readyz").filter(|answer| answer.status == 200)
    });
    // A tier below a tier.
    let second_cache = cluster.dir().join("second").display().to_string();
    let _second = start(&places[0], &places[1], &second_cache);
    let clerk = |port: u16| {
        let builder = Clerk::builder("kv").sources([address(local(port))]);
        builder.start().unwrap()
    };
    let (above, below) = (clerk(ports[0]), clerk(ports[1]));
    knows(&above, "a clerk of the first tier").await;
    knows(&below, "a clerk of the second tier").await;
    let generation = at_rest(&above, 2).await;
    below.wait_for(generation, PATIENCE).await.unwrap();
    // The clerk of the first tier watches the job; the second tier watches the job and the flags.
    let metrics = page(ports[0], "/metrics").unwrap().body;
    assert!(metrics.contains("mandoline_distributor_watchers 3"), "{metrics}");
    let known = format!("mandoline_distributor_job_generation{{job=\"kv\"}} {}", generation.number);
    assert!(metrics.contains(&known), "{metrics}");
    // It tells by server-sent events too, and what it has not heard of it does not claim to be nowhere.
    let told = |port: u16| Events::open(port, "/api/v1/jobs/kv/watch", "").next().unwrap();
    assert_eq!(told(ports[0]).name, "full");
    let unheard = page(ports[0], "/api/v1/jobs/nope/watch").unwrap();
    assert_eq!(unheard.status, 503, "{unheard:?}");
    assert!(unheard.body.contains("nothing was heard of a job nope here"), "{unheard:?}");

    cluster.kill_nodes();
    let event = told(ports[1]);
    assert_eq!((event.name.as_str(), event.id), ("full", generation.to_string()));
    knows(&clerk(ports[0]), "a clerk that comes now").await;
    knows(&clerk(ports[1]), "a clerk of the second tier that comes now").await;
    // Even one that was restarted meanwhile, for it has a disk, written once a second.
    let (written, copy) = (format!("{cache}/kv.assignment"), format!("{cache}/copy"));
    until("the last assignment to be on disk", || {
        std::fs::copy(&written, &copy).ok()?;
        let builder = Clerk::builder("kv").sources([address(local(ports[2]))]);
        let known = builder.cache(&copy).start().unwrap().assignment()?;
        (known.generation == generation).then_some(())
    });
    drop(first);
    let restarted = start(&upstream, &places[2], &cache);
    knows(&clerk(ports[2]), "a clerk of a distributor that began anew").await;
    let stale = page(ports[2], "/readyz").unwrap();
    assert_eq!(stale.status, 200, "it can tell: {stale:?}");
    assert!(stale.body.contains("not told anew for"), "{stale:?}");
    // And a proxy takes it for an assigner.
    let admin = local(ports[3]).to_string();
    let proxy = Process::start(&[
        "proxy",
        "--listen",
        "127.0.0.1:0",
        "--admin",
        &admin,
        "--assigners",
        &places[2],
    ]);
    until("a proxy that knows nobody else to be ready", || {
        page(ports[3], "/readyz").filter(|answer| answer.status == 200)
    });
    drop((proxy, restarted));
}

#[test]
fn what_a_distributor_cannot_do_is_refused() {
    for (args, says) in [
        (&[][..], "the distributor has no job to tell of"),
        (&["--job", "kv", "--upstream", "here"], "\"here\" is no address: give host:port"),
        (
            &["--job", "kv", "--listen", "0.0.0.0:0"],
            "the distributor's address is open to strangers",
        ),
        (&["--job", "kv", "--cache-dir", "/dev/null/x"], "cannot keep assignments in /dev/null/x"),
    ] {
        let bad = run(&[&["distributor"], args].concat());
        assert_eq!(bad.status.code(), Some(2), "{args:?}");
        assert!(text(&bad.stderr).contains(says), "{args:?}: {}", text(&bad.stderr));
    }
}

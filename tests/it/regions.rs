//! Two data centres and one cluster of assigners over both: a request for what lives near is served near, one for what lives far is sent
//! to the other data centre and served there as if it had been asked there. Once by proxies, once by the application itself.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::get;
use mandoline::gateways::Gateways;
use mandoline::http::backhaul::BackhaulLayer;
use mandoline::http::key::KeyFrom;
use mandoline::http::route::Routing;
use mandoline::{Clerk, Slicelet};
use mandoline_core::key::SliceKey;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::{JoinHandle, JoinSet};

use crate::kit::{PATIENCE, Process, ask, free_ports, json, local, run, run_with, text, until};

/// The lower half of all keys lives in eu, the upper in us.
const SPEC: &str = "name: kv
homes:
  - {slice: 0000000000000000..7fffffffffffffff, region: eu}
  - {slice: 8000000000000000..ffffffffffffffff, region: us}
heartbeat: 500ms
report_every: 500ms
balance_every: 1s
";

/// One cluster of assigners over two regions, and a job whose keys live in either.
struct Land {
    _nodes: Vec<Process>,
    list: String,
    _data: tempfile::TempDir,
}

impl Land {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = free_ports(6);
        let (clients, peers) = ports.split_at(3);
        let seats = clients.iter().zip(peers);
        let seats: Vec<_> =
            seats.map(|(client, peer)| format!("127.0.0.1:{client}/{peer}")).collect();
        let node = |at: usize| {
            let kept = data.path().join(at.to_string());
            let (listen, peer) = (local(clients[at]).to_string(), local(peers[at]).to_string());
            let place = ["--listen", &listen, "--peer-listen", &peer, "--peers", &seats.join(",")];
            let kept = ["--data-dir", kept.to_str().unwrap()];
            Process::start(&[&["assigner"], &place[..], &kept].concat())
        };
        let nodes = (0..3).map(node).collect();
        let list: Vec<String> = clients.iter().map(|port| local(*port).to_string()).collect();
        let land = Self { _nodes: nodes, list: list.join(","), _data: data };
        until("the job to be made", || {
            let applied = run_with(&["job", "apply", "-", "--assigners", &land.list], SPEC);
            applied.status.success().then_some(())
        });
        land
    }

    /// The task that a key is assigned to.
    fn owner(&self, key: &str) -> Option<String> {
        let show = ["assignment", "show", "kv", "--key", key, "-o", "json"];
        let page = json(&[&show[..], &["--assigners", &self.list]].concat());
        page["slices"][0]["replicas"][0]["task"].as_str().map(str::to_owned)
    }

    /// Waits until all these tasks serve, and each key is at home; then nothing moves any more. Gives the generation of that.
    fn settles(&self, tasks: &[&str]) -> u64 {
        until("every key to be at home", || {
            let list = json(&["task", "list", "-o", "json", "--assigners", &self.list]);
            let serves = |task: &Value| task["slices"].as_u64() > Some(0);
            let list = list.as_array()?;
            (list.len() == tasks.len() && list.iter().all(serves)).then_some(())?;
            let page = json(&["assignment", "show", "kv", "-o", "json", "--assigners", &self.list]);
            let is_home = |slice: &Value| {
                let (slice, task) =
                    (slice["slice"].as_str()?, slice["replicas"][0]["task"].as_str()?);
                let upper = slice.as_bytes()[0] >= b'8';
                task.starts_with(if upper { "us-" } else { "eu-" }).then_some(())
            };
            page["slices"].as_array()?.iter().all(|slice| is_home(slice).is_some()).then_some(())
        });
        let frozen = run(&["assignment", "freeze", "kv", "--assigners", &self.list]);
        assert!(frozen.status.success(), "{}", text(&frozen.stderr));
        let page = json(&["assignment", "show", "kv", "-o", "json", "--assigners", &self.list]);
        let generation = page["generation"].as_str().unwrap();
        generation.rsplit('.').next().unwrap().parse().unwrap()
    }
}

/// Keys of one half, of which there is no end.
fn keys(upper: bool) -> impl Iterator<Item = String> {
    let keys = (0..).map(|n| format!("key-{n}"));
    keys.filter(move |key| (SliceKey::of(key.as_bytes()).0 >= 1 << 63) == upper)
}

/// An answer with its head, in lower case; nothing if nobody answers.
#[derive(Debug)]
struct Seen {
    status: u16,
    head: String,
    body: String,
}

impl Seen {
    /// Who signed, in order.
    fn via(&self) -> Vec<String> {
        let lines = self.head.lines().filter_map(|line| line.strip_prefix("via: "));
        lines.flat_map(|line| line.split(", ")).map(str::to_owned).collect()
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

fn fetch(address: SocketAddr, key: &str) -> Option<Seen> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let head = format!("GET /kv/{key} HTTP/1.1\r\nhost: shop.example\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    let mut answer = vec![];
    stream.read_to_end(&mut answer).ok()?;
    let answer = text(&answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Seen { status, head: head.to_lowercase(), body: body.to_owned() })
}

struct Proxy {
    process: Option<Process>,
    args: Vec<String>,
    listen: SocketAddr,
    admin: SocketAddr,
}

impl Proxy {
    fn new(
        land: &Land,
        region: &str,
        gateways: &[SocketAddr],
        beyond: &str,
        at: (u16, u16),
    ) -> Self {
        let (listen, admin) = (local(at.0), local(at.1));
        let words = [
            "proxy",
            "--region",
            region,
            "--assigners",
            &land.list,
            "--listen",
            &listen.to_string(),
            "--admin",
            &admin.to_string(),
            "--workers",
            "1",
        ];
        let mut args = words.map(str::to_owned).to_vec();
        for gateway in gateways {
            args.extend(["--gateway".to_owned(), format!("{beyond}={gateway}")]);
        }
        let mut proxy = Self { process: None, args, listen, admin };
        proxy.start();
        proxy
    }

    fn start(&mut self) {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.process = Some(Process::start(&args));
        until("a proxy to be ready", || {
            ask(self.admin, "GET", "/readyz", "").filter(|answer| answer.status == 200)
        });
    }

    fn kill(&mut self) {
        self.process = None;
    }

    /// A number of its metrics, by the beginning of its line.
    fn count(&self, begins: &str) -> u64 {
        let page = ask(self.admin, "GET", "/metrics", "").expect("the proxy is there").body;
        let line = page.lines().find_map(|line| line.strip_prefix(begins)).map(str::trim);
        line.map_or(0, |line| line.parse().unwrap_or_else(|_| panic!("{begins}{line}")))
    }
}

#[test]
fn by_proxies_a_local_key_is_served_near_and_a_remote_one_where_it_lives() {
    let land = Land::start();
    let ports = free_ports(8);
    let task = |name: &str, region: &str, port: u16| {
        let (label, listen) = (format!("region={region}"), local(port).to_string());
        let place = ["--label", &label, "--listen", &listen, "--assigners", &land.list];
        Process::start(&[&["demo", "task", "--name", name], &place[..]].concat())
    };
    let _tasks = [task("eu-0", "eu", ports[0]), task("us-0", "us", ports[1])];
    let generation = land.settles(&["eu-0", "us-0"]);
    let us_at = [(ports[2], ports[3]), (ports[4], ports[5])];
    let gateways = us_at.map(|(listen, _)| local(listen));
    let near = Proxy::new(&land, "eu", &gateways, "us", (ports[6], ports[7]));
    let mut far = us_at.map(|at| Proxy::new(&land, "us", &[near.listen], "eu", at));
    for proxy in far.iter().chain([&near]) {
        // It may have asked a node that had not heard of all.
        until("a proxy to know what has settled", || {
            let known = proxy.count("mandoline_proxy_assignment_generation{job=\"kv\"}");
            (known >= generation).then_some(())
        });
    }
    let (here, there) = (keys(false).next().unwrap(), keys(true).next().unwrap());
    let served = |seen: &Seen, by: &str| {
        // The sample cache has nothing under the key, and says so.
        assert_eq!((seen.status, seen.field("mandoline-task")), (404, Some(by)), "{seen:?}");
    };

    // 1a: a client asks the nearest data centre for a local shard. 1b: it is served there.
    let seen = fetch(near.listen, &here).unwrap();
    served(&seen, "eu-0");
    let [eu] = &seen.via()[..] else { panic!("one hop: {seen:?}") };
    let names = far.each_ref().map(|far| {
        let seen = fetch(far.listen, &there).unwrap();
        served(&seen, "us-0");
        let [us] = &seen.via()[..] else { panic!("one hop: {seen:?}") };
        us.clone()
    });
    // 2a: it asks the same data centre for a remote shard. 2b: that is proxied to the other one, where it is served as in 1b.
    let before = far.each_ref().map(|far| far.count("mandoline_proxy_requests_total"));
    let seen = fetch(near.listen, &there).unwrap();
    served(&seen, "us-0");
    let [us, last] = &seen.via()[..] else { panic!("two hops: {seen:?}") };
    assert_eq!(last, eu, "the near one is the last on the way back");
    let by = names.iter().position(|name| name == us).expect("one of the gateways");
    assert_eq!(far[by].count("mandoline_proxy_requests_total"), before[by] + 1);
    let to = format!(
        "mandoline_proxy_gateway_requests_total{{region=\"us\",address=\"{}\"}}",
        gateways[by]
    );
    assert_eq!(near.count(&to), 1);
    let us_task = format!("127.0.0.1:{}", ports[1]);
    let page = ask(near.admin, "GET", "/metrics", "").unwrap().body;
    assert!(!page.contains(&us_task), "the far task was never asked straight: {page}");
    // And the other way round.
    let seen = fetch(far[0].listen, &here).unwrap();
    served(&seen, "eu-0");
    assert_eq!(seen.via(), [eu.clone(), names[0].clone()]);

    // One gateway is lost: nobody notices.
    far[by].kill();
    for key in keys(true).take(20) {
        served(&fetch(near.listen, &key).unwrap(), "us-0");
    }
    let other = 1 - by;
    assert!(near.count("mandoline_proxy_requests_region_lost_total") == 0);
    // Both are: only the keys beyond fail, and say why.
    far[other].kill();
    let lost = fetch(near.listen, &there).unwrap();
    assert_eq!(lost.status, 503, "{lost:?}");
    let status = "mandoline; error=destination_unavailable; details=\"region us\"";
    assert_eq!(lost.field("proxy-status"), Some(status), "{lost:?}");
    assert!(lost.body.contains("region us, where this key lives, cannot be reached"), "{lost:?}");
    for (here, there) in keys(false).zip(keys(true)).take(10) {
        served(&fetch(near.listen, &here).unwrap(), "eu-0");
        assert_eq!(fetch(near.listen, &there).unwrap().status, 503);
    }
    assert_eq!(near.count("mandoline_proxy_requests_region_lost_total"), 11);
    let up = format!("mandoline_proxy_gateway_up{{region=\"us\",address=\"{}\"}}", gateways[other]);
    assert_eq!(near.count(&up), 0);
    // It is back, and is used again.
    far[other].start();
    until("the link to be used again", || {
        fetch(near.listen, &there).filter(|seen| seen.status == 404)
    });
    assert_eq!(near.count(&up), 1);
}

/// A link between two data centres: what is sent to its near end comes out at the far one, until it is cut.
struct Link {
    near: SocketAddr,
    far: SocketAddr,
    relay: Option<JoinHandle<()>>,
}

impl Link {
    fn to(runtime: &Runtime, far: SocketAddr) -> Self {
        let mut link = Self { near: local(free_ports(1)[0]), far, relay: None };
        link.mend(runtime);
        link
    }

    fn mend(&mut self, runtime: &Runtime) {
        let (near, far) = (self.near, self.far);
        let listener = runtime.block_on(TcpListener::bind(near)).expect("the port is free");
        self.relay = Some(runtime.spawn(async move {
            // What is under way breaks off with the link.
            let mut carried = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                carried.spawn(async move {
                    let mut to = tokio::net::TcpStream::connect(far).await?;
                    tokio::io::copy_bidirectional(&mut from, &mut to).await
                });
            }
        }));
    }

    fn cut(&mut self, runtime: &Runtime) {
        let relay = self.relay.take().expect("it is there");
        relay.abort();
        assert!(runtime.block_on(relay).unwrap_err().is_cancelled());
    }
}

/// A task that forwards what is not its own: says who it is and who signed the request on the way.
struct App {
    address: SocketAddr,
}

impl App {
    fn start(
        runtime: &Runtime,
        land: &Land,
        (name, region): (&'static str, &str),
        gateways: &[(&str, SocketAddr)],
    ) -> Self {
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let slicelet = Slicelet::builder("kv", name, &address.to_string())
                .assigners(land.list.split(','))
                .label("region", region);
            let slicelet = Arc::new(slicelet.start().unwrap());
            let clerk = Clerk::builder("kv").sources(land.list.split(',')).start().unwrap();
            let gateways = gateways.iter().map(|(of, at)| format!("{of}={at}").parse().unwrap());
            let gateways = Gateways::new(region.parse().unwrap(), gateways).unwrap();
            let routing = Routing::new(clerk, KeyFrom::path(1)).by_gateways(gateways);
            let layer = BackhaulLayer::routed(name, Arc::clone(&slicelet), routing);
            let app =
                axum::Router::new().route("/kv/{key}", get(say)).with_state(name).layer(layer);
            tokio::spawn(async { axum::serve(listener, app).await.unwrap() });
            Self { address }
        })
    }
}

async fn say(State(name): State<&'static str>, headers: HeaderMap) -> String {
    let signed = headers.get_all("via").iter().map(|via| via.to_str().unwrap().to_owned());
    format!("{name} by [{}]", signed.collect::<Vec<_>>().join(", "))
}

#[test]
fn by_the_application_a_local_key_is_served_near_and_a_remote_one_where_it_lives() {
    let land = Land::start();
    let runtime = Runtime::new().unwrap();
    let us = ["us-0", "us-1"].map(|name| App::start(&runtime, &land, (name, "us"), &[]));
    // The other data centre is reached by one of its tasks alone, over a link.
    let mut link = Link::to(&runtime, us[1].address);
    let eu = App::start(&runtime, &land, ("eu-0", "eu"), &[("us", link.near)]);
    land.settles(&["eu-0", "us-0", "us-1"]);
    let here = keys(false).next().unwrap();
    let there = keys(true).find(|key| land.owner(key).as_deref() == Some("us-0")).unwrap();
    let at_gateway = keys(true).find(|key| land.owner(key).as_deref() == Some("us-1")).unwrap();
    let answers = |at: &App, key: &str, body: &str| {
        // Callers hear of the last move a moment after the tool.
        until(body, || {
            fetch(at.address, key).filter(|seen| seen.status == 200 && seen.body == body)
        });
    };

    // 1a: a client asks the nearest data centre for a local shard. 1b: it is served there.
    answers(&eu, &here, "eu-0 by []");
    answers(&us[1], &there, "us-0 by [1.1 us-1]");
    // 2a: it asks the same data centre for a remote shard. 2b: that is sent to the other one, where it is served as in 1b.
    answers(&eu, &there, "us-0 by [1.1 eu-0, 1.1 us-1]");
    answers(&eu, &at_gateway, "us-1 by [1.1 eu-0]");
    // A region that names no gateways is asked straight.
    answers(&us[0], &here, "eu-0 by [1.1 us-0]");

    // The link is lost: only the keys beyond it fail, and say why.
    link.cut(&runtime);
    let lost =
        until("the loss to show", || fetch(eu.address, &there).filter(|seen| seen.status != 200));
    assert!(lost.status == 503 || lost.status == 502, "what was under way broke off: {lost:?}");
    for _ in 0..5 {
        let lost = fetch(eu.address, &there).unwrap();
        assert_eq!(lost.status, 503, "{lost:?}");
        assert_eq!(
            lost.field("proxy-status"),
            Some("eu-0; error=destination_unavailable; details=\"region us\""),
            "{lost:?}"
        );
        assert!(
            lost.body.contains("region us, where this key lives, cannot be reached"),
            "{lost:?}"
        );
        answers(&eu, &here, "eu-0 by []");
    }
    // It is back, and is used again.
    link.mend(&runtime);
    answers(&eu, &there, "us-0 by [1.1 eu-0, 1.1 us-1]");
}

#[test]
fn what_a_proxy_cannot_use_is_refused_before_it_starts() {
    let gateway = ["--gateway", "us=10.8.0.1:8080"];
    for (args, says) in [
        (&["--gateway", "us=10.8.0.1:8080"][..], "Give --region: the one that this proxy is in"),
        (&["--region", "us", gateway[0], gateway[1]], "is a gateway of the own region"),
        (
            &["--region", "eu", gateway[0], gateway[1], gateway[0], gateway[1]],
            "the gateway us=10.8.0.1:8080 is given twice",
        ),
        (&["--region", "eu", "--region", "us"], "cannot be used multiple times"),
        (&["--region", "e u"], "\"e u\" is no region"),
        (&["--region", "eu", "--gateway", "10.8.0.1:8080"], "give REGION=HOST:PORT"),
        (&["--region", "eu", "--gateway", "us=10.8.0.1"], "is no address: give host:port"),
        (&["--key", "path:0/"], "is no key source"),
    ] {
        let output = run(&[&["proxy", "--listen", "127.0.0.1:0"], args].concat());
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?} does not say {says:?}: {err}");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("proxy.yaml");
    std::fs::write(&file, "region: eu\ngateways: ['eu=10.8.0.1:8080']\n").unwrap();
    let output = run(&["proxy", "--listen", "127.0.0.1:0", "--config", file.to_str().unwrap()]);
    assert!(text(&output.stderr).contains("is a gateway of the own region"), "{output:?}");
}

//! A shop's shard is a row of a database, as `lookups` of a proxy's file have it: real processes, a real file of SQLite.

use std::process::Command;

use mandoline::Clerk;
use rustix::process::Signal;

use crate::callers::{PATIENCE, at_rest, kv, program};
use crate::kit::{Answer, Process, ask, free_ports, local, until};
use crate::processes::{Cluster, ProxyKnows};

/// The sample task serves `/kv/KEY` only if it owns `KEY`. So a request names the shard that it must come to, beside its shop.
const FILE: &str = "
lookups:
  shops:
    sqlite:
      file: shops.db
      query: select shard from shops where name = ?1
    ttl: 24h
routes:
  - job: kv
    key: query:shop
    lookup: shops
    request: {set: {x-shard: '{translation}'}}
    response: {set: {x-shard: '{translation}', x-task: '{task}'}}
";

/// The value of a header.
fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    let line = |line: &'a str| line.split_once(": ").filter(|(given, _)| *given == name);
    answer.head.lines().find_map(line).map_or("", |(_, value)| value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_is_looked_up_in_a_database_and_a_changed_row_moves_its_requests() {
    let cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&kv(), PATIENCE).await.unwrap();
    let _tasks = ["kv-0", "kv-1"].map(|name| cluster.start_task(name).unwrap());
    cluster.served("kv", 2, PATIENCE).await.unwrap();
    let clerk = Clerk::builder("kv").sources(cluster.addresses()).start().unwrap();
    at_rest(&clerk, 2).await;

    let db = rusqlite::Connection::open(cluster.dir().join("shops.db")).unwrap();
    db.execute_batch(
        "create table shops (name text, shard text);
         insert into shops values ('two', 'a'), ('two', 'b')",
    )
    .unwrap();
    for n in 0..40 {
        db.execute(
            "insert into shops values (?1, ?2)",
            (format!("shop-{n}"), format!("shard-{n}")),
        )
        .unwrap();
    }
    let file = cluster.dir().join("proxy.yaml");
    std::fs::write(&file, FILE).unwrap();
    let checked = Command::new(program()).args(["proxy", "check"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && said.contains("query:shop, by lookup shops"), "{said}");
    let flags = vec!["--config".to_owned(), file.display().to_string()];
    let proxy =
        cluster.start_proxy("proxy", ProxyKnows { flags, ..ProxyKnows::default() }).await.unwrap();
    let put = |shop: &str, shard: &str| {
        ask(proxy.address, "PUT", &format!("/kv/{shard}?shop={shop}"), "value").unwrap()
    };

    // Each shop is served by whoever owns its shard; both tasks own some.
    let mut served = Vec::new();
    for n in 0..40 {
        let (shop, shard) = (format!("shop-{n}"), format!("shard-{n}"));
        let answer = put(&shop, &shard);
        assert!(answer.status < 300, "{answer:?}");
        assert_eq!(header(&answer, "x-shard"), shard);
        served.push((shop, shard, header(&answer, "x-task").to_owned()));
    }
    let (shop, _, task) = &served[0];
    let (_, other, new_task) = served.iter().find(|(.., by)| by != task).unwrap();

    // A reload keeps what is known, and asks for none of it again.
    let number = |name: &str| {
        let page = ask(proxy.admin, "GET", "/metrics", "").unwrap().body;
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix("{lookup=\"shops\"} "));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).parse::<u64>().unwrap()
    };
    assert_eq!(number("mandoline_proxy_lookup_questions_total"), 40);
    assert_eq!(ask(proxy.admin, "POST", "/reload", "").unwrap().status, 200);
    assert_eq!(header(&put(shop, "shard-0"), "x-shard"), "shard-0");
    assert_eq!(number("mandoline_proxy_lookup_questions_total"), 40);

    // The shop moves to the other one's shard. Nobody tells the proxy, whose answers would be good for a day.
    db.execute("update shops set shard = ?2 where name = ?1", (shop, other)).unwrap();
    until("the shop's requests to go to its new shard", || {
        let answer = put(shop, other);
        let moved = answer.status < 300 && header(&answer, "x-task") == new_task;
        (moved && header(&answer, "x-shard") == other).then_some(())
    });

    // What has no shard, or two, says so and is in nobody's way.
    assert_eq!(put("nowhere", "a").status, 404);
    assert_eq!(put("two", "a").status, 502);
    assert!(put(shop, other).status < 300);
    let explained = ask(proxy.admin, "GET", &format!("/explain?url=http://a/kv/x?shop={shop}"), "");
    let explained = explained.unwrap().body;
    assert!(explained.contains(&format!("\\\"{other}\\\" stands for")), "{explained}");
    let flushed = ask(proxy.admin, "POST", "/lookups/shops/flush", "").unwrap();
    assert_eq!(flushed.status, 200, "{flushed:?}");
    let page = ask(proxy.admin, "GET", "/metrics", "").unwrap().body;
    let line = "mandoline_proxy_lookup_faults_total{lookup=\"shops\",fault=\"two\"} 1";
    assert!(page.contains(line), "{page}");
    assert_eq!(number("mandoline_proxy_lookup_keys"), 0);
}

/// Clients are told neither where the table is nor why; whoever runs the proxy is, and not by a line for each request.
#[test]
fn why_a_table_does_not_answer_is_in_the_log_now_and_then() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("proxy.yaml");
    let [listen, admin, assigner, table] =
        <[u16; 4]>::try_from(free_ports(4)).unwrap().map(|port| local(port).to_string());
    let lookup = format!("lookups: {{shops: {{http: {{url: 'http://{table}/{{key}}'}}}}}}");
    std::fs::write(
        &file,
        format!("{lookup}\nroutes: [{{job: kv, key: query:shop, lookup: shops}}]\n"),
    )
    .unwrap();
    let place = ["--listen", &listen, "--admin", &admin, "--assigners", &assigner];
    let config = file.display().to_string();
    let mut proxy = Process::start(&[&["proxy", "--config", &config], &place[..]].concat());
    proxy.line("proxy: requests for job kv");
    for n in 0..20 {
        let answer = ask(listen.parse().unwrap(), "GET", &format!("/?shop={n}"), "").unwrap();
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(!answer.body.contains(&table), "{answer:?}");
    }
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.ended(), Some(0));
    let log = proxy.stdout() + &proxy.stderr();
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("A lookup's table does not answer")).collect();
    assert!((1..20).contains(&lines.len()), "{log}");
    assert!(lines[0].contains("shops") && lines[0].contains(&table), "{log}");
}

//! Keys that are translated through a table, here behind an HTTP service: whatever it answers, and when it does not.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use super::harness::{Backend, Stage, key_at, status, talk, text, until};
use super::keys::{halves, owner};
use super::pauses::{Operator, held, in_force, order};
use super::tls::pem;
use crate::access_log::AccessLog;
use crate::access_log::writer::{Output, Writer};
use crate::config::Config;
use crate::config::headers::HeaderRules;
use crate::config::tls::{Tls, TlsFiles};
use crate::lookup::{Fault, Limits, Lookup, LookupStats};
use crate::tables::Table;
use crate::tables::http::Http;

/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

/// A service with a table that the test writes. Some names have answers that no service should give.
struct Service {
    backend: Backend,
    rows: Arc<Mutex<BTreeMap<String, String>>>,
    /// Lets those go on who ask for `hang`.
    go_on: Arc<Notify>,
}

impl Service {
    async fn start(rows: &[(&str, &str)]) -> Self {
        let rows = rows.iter().map(|(name, row)| ((*name).to_owned(), (*row).to_owned()));
        let rows = Arc::new(Mutex::new(rows.collect::<BTreeMap<_, _>>()));
        let go_on = Arc::new(Notify::new());
        let (table, gate) = (Arc::clone(&rows), Arc::clone(&go_on));
        let backend = Backend::serve(move |request| {
            let name = request.uri().query().and_then(|query| query.strip_prefix("of="));
            let name = name.unwrap_or_default().to_owned();
            let (row, gate) = (table.lock().unwrap().get(&name).cloned(), Arc::clone(&gate));
            async move {
                match row.as_deref().filter(|row| *row == "hang").unwrap_or(&name) {
                    "hang" => gate.notified().await,
                    "broken" => return status(500, &[]),
                    "elsewhere" => return status(302, &[("location", "/")]),
                    "long" => return text("x".repeat(70_000)),
                    _ => {}
                }
                row.map_or_else(|| status(404, &[]), text)
            }
        });
        Self { backend: backend.await, rows, go_on }
    }

    fn set(&self, name: &str, row: &str) {
        self.rows.lock().unwrap().insert(name.to_owned(), row.to_owned());
    }

    fn lookup(&self, limits: Limits) -> Lookup {
        lookup_at(self.backend.address, limits)
    }
}

fn lookup_at(address: SocketAddr, limits: Limits) -> Lookup {
    let url = format!("http://{address}/shards?of={{key}}").parse().unwrap();
    let http = Http::new(url, None, None).unwrap();
    Table::Http(Box::new(http)).start("shops", limits).unwrap()
}

/// Has the only route translate its hosts.
fn translate(config: &mut Config, lookup: Lookup) {
    key_at(config, "host");
    config.routes[0].lookup = Some(lookup.clone());
    config.lookups.insert("shops".into(), lookup);
    config.admin = Some("127.0.0.1:0".parse().unwrap());
}

fn ask(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
}

fn stats(stage: &Stage) -> LookupStats {
    stage.stats().lookups["shops"]
}

/// Asks the admin address.
async fn admin(stage: &Stage, method: &str, target: &str) -> String {
    let request = format!("{method} {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    talk(stage.proxy.admin_addr().unwrap(), request.as_bytes()).await
}

/// Who served, by the body of the answer.
fn server(answer: &str) -> &str {
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    answer.split("\r\n\r\n").nth(1).unwrap().split(' ').next().unwrap()
}

/// Two names whose shards have different owners.
fn two_shards() -> [String; 2] {
    ["low", "high"].map(|of| {
        let mut shards = (0..).map(|n| n.to_string());
        shards.find(|shard| owner(shard.as_bytes()) == of).unwrap()
    })
}

#[tokio::test]
async fn tasks_are_told_what_stands_for_a_key() {
    let service = Service::start(&[("a.org", "eu 1%\u{e9}")]).await;
    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits::default());
    let stage = Stage::with(owners, |config| {
        translate(config, lookup);
        let set = |rules: &mut HeaderRules| {
            rules.set = vec![("x-shard".parse().unwrap(), "{translation}".parse().unwrap())];
        };
        set(&mut config.routes[0].request);
        set(&mut config.routes[0].response);
    });
    let answer = stage.talk(&ask("a.org").replace("\r\n\r\n", "\r\nx-shard: forged\r\n\r\n")).await;
    // In the answer's head, and in what the task saw.
    assert_eq!(answer.matches("x-shard: eu 1%25%C3%A9\r\n").count(), 1, "{answer}");
    assert_eq!(answer.matches("x-shard: eu 1%25%C3%A9").count(), 2, "{answer}");
    assert!(!answer.contains("forged"), "{answer}");
}

#[tokio::test]
async fn whatever_a_service_answers_has_an_outcome_and_is_counted() {
    let [low, high] = two_shards();
    let service = Service::start(&[
        ("a.org", &low),
        ("b.org", &format!("{high}\r\n")),
        ("two", "1\n2"),
        ("empty", " \n"),
    ])
    .await;
    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits::default());
    let stage = Stage::with(owners, |config| translate(config, lookup));
    for (host, wanted) in [("a.org", "low"), ("b.org", "high"), ("A.ORG:80", "low")] {
        assert_eq!(server(&stage.talk(&ask(host)).await), wanted, "{host}");
    }
    let one = LookupStats { hits: 1, misses: 2, questions: 2, keys: 2, ..stats(&stage) };
    assert_eq!(stats(&stage), one);
    for (host, code) in [
        ("none", "404"),
        ("none", "404"),
        ("two", "502"),
        ("empty", "502"),
        ("broken", "503"),
        ("elsewhere", "503"),
        ("long", "503"),
    ] {
        let answer = stage.talk(&ask(host)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{host}: {answer}");
        assert_eq!(answer.contains("retry-after:"), code == "503", "{host}: {answer}");
    }
    let LookupStats { negative_hits, two, length, down, late, stale, .. } = stats(&stage);
    assert_eq!((negative_hits, two, length, down, late, stale), (1, 1, 1, 3, 0, 0));
    // None of it was in the way of anyone else, and what is known can be told.
    assert_eq!(server(&stage.talk(&ask("a.org")).await), "low");
    let explained = admin(&stage, "GET", "/explain?url=http://a.org/").await;
    let known = format!("\\\"{low}\\\" stands for \\\"a.org\\\"");
    assert!(explained.contains(&known), "{known}: {explained}");
    let explained = admin(&stage, "GET", "/explain?url=http://unheard.org/").await;
    assert!(explained.contains("what stands for it is not known yet"), "{explained}");
    assert!(explained.contains("\"end\":null"), "{explained}");
    let page = admin(&stage, "GET", "/metrics").await;
    let line = "mandoline_proxy_lookup_faults_total{lookup=\"shops\",fault=\"two\"} 1";
    assert!(page.contains(line), "{page}");
}

#[tokio::test]
async fn a_question_that_hangs_keeps_nobody_else_waiting_and_has_an_end() {
    let [low, high] = two_shards();
    let service = Service::start(&[("a.org", &low), ("b.org", &high), ("hang", &high)]).await;
    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits { within: LONG, ..Limits::default() });
    let stage = Stage::with(owners, |config| translate(config, lookup));
    let mut hanging = stage.connect().await;
    hanging.send(ask("hang")).await;
    until("the question to be asked", || stats(&stage).questions == 1).await;
    assert_eq!(server(&stage.talk(&ask("a.org")).await), "low");
    assert_eq!(server(&stage.talk(&ask("b.org")).await), "high");
    service.go_on.notify_one();
    assert_eq!(server(&hanging.rest().await), "high");

    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits { within: Duration::from_millis(50), ..Limits::default() });
    let stage = Stage::with(owners, |config| translate(config, lookup));
    let answer = stage.talk(&ask("hang")).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("in time"), "{answer}");
    assert_eq!(stats(&stage).late, 1);
}

/// A file is read by one thread alone, which one question keeps busy.
#[cfg(feature = "sqlite")]
#[tokio::test]
async fn a_query_that_hangs_whenever_it_is_asked_leaves_the_file_to_others() {
    use crate::tables::sqlite::Sqlite;

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shops.db");
    rusqlite::Connection::open(&file).unwrap().execute_batch("create table shops (a)").unwrap();
    let query = "with recursive n(x) as (select 1 union all select x + 1 from n) \
                 select x from n where ?1 <> 'hang' or x < 0 limit 1";
    let table = Table::Sqlite(Sqlite { file, query: query.to_owned() });
    let limits = Limits { within: Duration::from_secs(4), ..Limits::default() };
    let lookup = table.start("shops", limits).unwrap();
    let (owners, _tasks) = halves().await;
    let stage = Stage::with(owners, |config| translate(config, lookup));
    let hanging = async {
        loop {
            let answer = stage.talk(&ask("hang")).await;
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        }
    };
    let others = async {
        until("the file to be busy", || stats(&stage).questions > 0).await;
        for n in 0..100 {
            server(&stage.talk(&ask(&format!("{n}.org"))).await);
        }
    };
    tokio::select! {
        never = hanging => never,
        () = others => {}
    }
    assert!(stats(&stage).questions > 100);
}

#[tokio::test]
async fn a_service_that_is_gone_is_asked_again_once_it_is_back_and_old_answers_serve_meanwhile() {
    let nobody = Backend::nobody().await;
    let (owners, _tasks) = halves().await;
    let lookup = lookup_at(nobody, Limits { ttl: Duration::ZERO, ..Limits::default() });
    let stage = Stage::with(owners, |config| translate(config, lookup));
    let answer = stage.talk(&ask("a.org")).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");

    let [low, _] = two_shards();
    let service = Service::start(&[("a.org", &low)]).await;
    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits { ttl: Duration::ZERO, ..Limits::default() });
    let stage = Stage::with(owners, |config| translate(config, lookup));
    assert_eq!(server(&stage.talk(&ask("a.org")).await), "low");
    drop(service);
    assert_eq!(server(&stage.talk(&ask("a.org")).await), "low");
    let LookupStats { stale, down, .. } = stats(&stage);
    assert_eq!((stale, down), (1, 1));
}

#[tokio::test]
async fn where_a_table_is_and_what_it_said_is_told_to_the_log_and_not_to_clients() {
    let free = Backend::nobody().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let writer = Writer::open(Output::File(path.clone())).unwrap();
    let (owners, _tasks) = halves().await;
    let lookup = lookup_at(free, Limits::default());
    let stage = Stage::with(owners, |config| {
        translate(config, lookup);
        config.access_log =
            Some(AccessLog::new(writer.clone(), "{status} {reason}".parse().unwrap()));
    });
    let call = "POST / HTTP/1.1\r\nhost: b.org\r\ncontent-type: application/grpc\r\n\
                connection: close\r\ncontent-length: 0\r\n\r\n";
    for (request, wanted) in [
        (ask("a.org"), "at the moment: try again in a second\n"),
        (call.to_owned(), "grpc-status: 14"),
    ] {
        let answer = stage.talk(&request).await;
        assert!(answer.contains(wanted), "{answer}");
        assert!(!answer.contains(&free.to_string()) && !answer.contains("refused"), "{answer}");
    }
    until("the requests to end", || stage.stats().in_flight == 0).await;
    writer.flush(Duration::from_secs(10));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        text.matches(&format!("at the moment: {free} does not accept")).count(),
        2,
        "{text}"
    );
}

#[tokio::test]
async fn an_operator_has_a_lookup_forget_one_key_or_all() {
    let [low, high] = two_shards();
    let service = Service::start(&[("a.org", &low), ("b.org", &low)]).await;
    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits { ttl: LONG, ..Limits::default() });
    let stage = Stage::with(owners, |config| translate(config, lookup));
    let who = async |host: &str| server(&stage.talk(&ask(host)).await).to_owned();
    assert_eq!([who("a.org").await, who("b.org").await], ["low", "low"]);
    service.set("a.org", &high);
    service.set("b.org", &high);
    assert_eq!([who("a.org").await, who("b.org").await], ["low", "low"]);
    for (method, target, code) in [
        ("POST", "/lookups/shops/flush?kye=a.org", "400"),
        ("POST", "/lookups/shps/flush", "404"),
        ("GET", "/lookups/shops/flush", "405"),
    ] {
        let answer = admin(&stage, method, target).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{target}: {answer}");
    }
    assert_eq!([who("a.org").await, who("b.org").await], ["low", "low"]);
    assert!(admin(&stage, "POST", "/lookups/shops/flush?key=a.org").await.contains("forgotten"));
    assert_eq!([who("a.org").await, who("b.org").await], ["high", "low"]);
    assert!(admin(&stage, "POST", "/lookups/shops/flush").await.contains("forgotten"));
    assert_eq!([who("a.org").await, who("b.org").await], ["high", "high"]);
    let LookupStats { forgotten, flushes, .. } = stats(&stage);
    assert_eq!((forgotten, flushes), (1, 1));
}

#[tokio::test]
async fn a_request_that_was_held_goes_to_where_its_key_stands_for_by_then() {
    let [low, high] = two_shards();
    let service = Service::start(&[("a.org", &low)]).await;
    let (owners, _tasks) = halves().await;
    let lookup = service.lookup(Limits { ttl: LONG, ..Limits::default() });
    let (operator, told) = Operator::new();
    let stage = Stage::with(owners, |config| {
        config.flags = told;
        translate(config, lookup);
    });
    assert_eq!(server(&stage.talk(&ask("a.org")).await), "low");
    operator.add(7, order("host=a.org", LONG));
    in_force(&stage, 7).await;
    let mut wire = stage.connect().await;
    wire.send(ask("a.org")).await;
    held(&stage, 1).await;
    // The shop moves while nobody is let in. Nobody tells the lookup, whose answer would be good for long.
    service.set("a.org", &high);
    let request = ask("a.org");
    let others: Vec<_> = (0..20).map(|_| stage.talk(&request)).collect();
    let (others, ()) = tokio::join!(futures_util::future::join_all(others), async {
        held(&stage, 21).await;
        operator.end(7, Duration::ZERO);
    });
    assert_eq!(server(&wire.rest().await), "high");
    assert!(others.iter().all(|answer| server(answer) == "high"));
    // Asked for once by all of them.
    assert_eq!(stats(&stage).questions, 2);
}

#[tokio::test]
async fn after_a_pause_no_answer_of_before_it_serves() {
    let [low, high] = two_shards();
    let service = Service::start(&[("a.org", &low), ("b.org", &low), ("c.com", &low)]).await;
    let (owners, _tasks) = halves().await;
    let within = Duration::from_millis(300);
    let limits = Limits { ttl: LONG, negative_ttl: LONG, within, ..Limits::default() };
    let lookup = service.lookup(limits);
    let (operator, told) = Operator::new();
    let stage = Stage::with(owners, |config| {
        config.flags = told;
        translate(config, lookup);
    });
    let who = async |host: &str| server(&stage.talk(&ask(host)).await).to_owned();
    for host in ["a.org", "b.org", "c.com"] {
        assert_eq!(who(host).await, "low");
    }
    for host in ["new.a.org", "new.c.com"] {
        assert!(stage.talk(&ask(host)).await.starts_with("HTTP/1.1 404 "));
    }
    operator.add(7, order("host=a.org", LONG));
    operator.add(8, order("host=b.org", LONG));
    operator.add(9, order("host=new.a.org", LONG));
    in_force(&stage, 9).await;
    for host in ["a.org", "b.org", "c.com", "new.a.org", "new.c.com"] {
        service.set(host, &high);
    }
    // Nobody was held.
    operator.end(7, Duration::ZERO);
    operator.end(8, Duration::ZERO);
    operator.end(9, Duration::ZERO);
    until("the pauses to be over", || stage.stats().pauses.iter().all(|pause| !pause.in_force))
        .await;
    assert_eq!(who("a.org").await, "high");
    // The pauses had nothing to do with this one.
    assert_eq!(who("c.com").await, "low");
    // That there was nothing is an answer of before as well.
    assert_eq!(who("new.a.org").await, "high");
    assert!(stage.talk(&ask("new.c.com")).await.starts_with("HTTP/1.1 404 "));
    // The table does not say who has it now. What it said before may be wrong.
    service.set("b.org", "hang");
    let answer = stage.talk(&ask("b.org")).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("retry-after: "), "{answer}");
    let stats = stats(&stage);
    assert_eq!((stats.questions, stats.late, stats.stale), (8, 1, 0));
    service.go_on.notify_one();
}

#[tokio::test]
async fn a_service_is_asked_by_tls_if_it_is_the_right_one() {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_file(pem("first.pem")).unwrap()];
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(pem("first.key")).unwrap());
    let acceptor = TlsAcceptor::from(Arc::new(config.unwrap()));
    let service = Backend::raw(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            // Whoever does not believe it hangs up.
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let answer = service_fn(|_| async { Ok::<_, Infallible>(text("{\"shard\": 7}")) });
            let builder = hyper::server::conn::http1::Builder::new();
            drop(builder.serve_connection(TokioIo::new(stream), answer).await);
        }
    })
    .await;
    let by = |name: &str| {
        let (authorities, name) = (pem("authority.pem"), Some(name.to_owned()));
        let tls = Tls::load(TlsFiles { authorities, identity: None, name }).unwrap();
        let url = format!("https://{}/{{key}}", service.address).parse().unwrap();
        let http = Http::new(url, Some("/shard".parse().unwrap()), Some(Arc::new(tls))).unwrap();
        Table::Http(Box::new(http)).start("shops", Limits::default()).unwrap()
    };
    assert_eq!(by("first.example").find(b"a.org").await.as_deref(), Ok(&b"7"[..]));
    let Err(Fault::Down(said)) = by("second.example").find(b"a.org").await else {
        panic!("it was believed");
    };
    assert!(said.contains("cannot be believed"), "{said}");
}

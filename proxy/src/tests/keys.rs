//! Where keys are found: in any part of a request, and in any combination of them.

use std::net::SocketAddr;

use mandoline_core::key::SliceKey;

use super::harness::{Backend, Owners, Stage, key_at};

/// Two tasks, the first of which owns the lower half of all places, and which of them owns a key.
pub(super) async fn halves() -> (Owners, [Backend; 2]) {
    let tasks = [Backend::echo("low").await, Backend::echo("high").await];
    let [low, high]: [SocketAddr; 2] = tasks.each_ref().map(|task| task.address);
    let owners = Owners::none();
    owners.give(1, &[(0, 1, low), (1 << 63, 2, high)]).await;
    (owners, tasks)
}

pub(super) fn owner(key: &[u8]) -> &'static str {
    if SliceKey::of(key).0 < 1 << 63 { "low" } else { "high" }
}

/// Sends a request for each of some keys, made by `request`, and expects each at the owner of what `key` says.
async fn check(from: &str, request: impl Fn(&str) -> String, key: impl Fn(&str) -> Vec<u8>) {
    let (owners, _tasks) = halves().await;
    let stage = Stage::with(owners, |config| key_at(config, from));
    for name in ["ann", "ben", "cho", "dee", "eve", "fay", "gus", "hal"] {
        let answer = stage.talk(&request(name)).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{from}: {answer}");
        let served_by = answer.split("\r\n\r\n").nth(1).unwrap();
        assert!(served_by.starts_with(owner(&key(name))), "{from} of {name}: {answer}");
    }
}

fn get(target: &str, lines: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nhost: h\r\n{lines}connection: close\r\n\r\n")
}

fn post(target: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {target} HTTP/1.1\r\nhost: h\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

fn plain(name: &str) -> Vec<u8> {
    name.into()
}

#[tokio::test]
async fn a_request_is_sharded_by_its_host() {
    let request = |name: &str| get("/", "").replace("host: h", &format!("host: {name}.org:80"));
    check("host", request, |name| format!("{name}.org").into()).await;
}

#[tokio::test]
async fn a_request_is_sharded_by_its_uri() {
    check("path(/shops/{key}/*)", |name| get(&format!("/shops/{name}/carts/7"), ""), plain).await;
    check("query:shop", |name| get(&format!("/?shop={name}"), ""), plain).await;
}

#[tokio::test]
async fn a_request_is_sharded_by_its_clients_address() {
    check("client", |_| get("/", ""), |_| b"127.0.0.1".to_vec()).await;
    check("client:8", |_| get("/", ""), |_| b"127.0.0.0".to_vec()).await;
}

#[tokio::test]
async fn a_request_is_sharded_by_a_combination_of_its_parts() {
    let joined = |name: &str| {
        let mut key = vec![0, 1];
        key.extend_from_slice(b"h");
        key.extend_from_slice(&[0, name.len() as u8]);
        key.extend_from_slice(name.as_bytes());
        key
    };
    check("join(host, path:0)", |name| get(&format!("/{name}"), ""), joined).await;
    let either = "first(cookie:shop, lower(path(/shops/{key})))";
    check(either, |name| get("/", &format!("cookie: a=b; shop={name}\r\n")), plain).await;
    check(either, |name| get(&format!("/shops/{}", name.to_uppercase()), ""), plain).await;
}

#[tokio::test]
async fn a_request_is_sharded_by_a_field_of_its_body_which_the_task_gets_whole() {
    let body = |name: &str| format!("{{\"cart\": [1, 2], \"user\": {{\"id\": \"{name}\"}}}}");
    check("json(/user/id)", |name| post("/", &body(name)), plain).await;

    let (owners, _tasks) = halves().await;
    let stage = Stage::with(owners, |config| key_at(config, "json(/user/id)"));
    let answer = stage.talk(&post("/x", &body("ann"))).await;
    assert!(answer.ends_with(&format!("[{}]", body("ann"))), "{answer}");
    // Chunked, in pieces that end where they like.
    let chunked =
        "POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
    let pieces = "9\r\n{\"user\": \r\nd\r\n{\"id\": \"ann\"}\r\n1\r\n}\r\n0\r\n\r\n";
    let answer = stage.talk(&format!("{chunked}{pieces}")).await;
    assert!(answer.ends_with("[{\"user\": {\"id\": \"ann\"}}]"), "{answer}");

    let long = format!("{{\"pad\": \"{}\", \"user\": {{\"id\": \"x\"}}}}", "x".repeat(64 << 10));
    for (body, why) in [
        ("", "a token or a body that cannot be read"),
        ("{\"user\": {}}", "the request has no key"),
        ("{\"user\": {\"id\": \"a\", \"id\": \"b\"}}", "more than one key"),
        ("{\"user\": {\"id\": \"a\"}", "cannot be read"),
        (&long, "a body of more than 65536 bytes"),
    ] {
        let answer = stage.talk(&post("/", body)).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains(why), "{why}: {answer}");
    }
    let answer = stage.talk(&format!("{chunked}zz\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for_for_ever() {
    let (owners, _tasks) = halves().await;
    let stage = Stage::with(owners, |config| {
        key_at(config, "json(/id)");
        config.timeouts.header = std::time::Duration::from_millis(200);
    });
    let answer = stage.talk("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n{\"id\"").await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

#[tokio::test]
async fn a_request_is_sharded_by_a_claim_of_its_token() {
    // {"sub":"ann"}, unsigned.
    let token = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ.";
    let request = |_: &str| get("/", &format!("authorization: Bearer {token}\r\n"));
    check("jwt(sub)", request, |_| b"ann".to_vec()).await;
    let request = |_: &str| get("/", &format!("cookie: t={token}\r\n"));
    check("jwt(sub, cookie:t)", request, |_| b"ann".to_vec()).await;
}

/// Shops have domains, and a database says on which shard each is.
#[cfg(feature = "sqlite")]
#[tokio::test]
async fn a_shard_is_looked_up_in_a_database() {
    use super::harness::within;
    use crate::lookup::Limits;
    use crate::tables::Table;
    use crate::tables::sqlite::Sqlite;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shops.db");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch("create table shops (domain text, shard)").unwrap();
    for n in 0..20 {
        let row = (format!("{n}.org"), n % 4);
        db.execute("insert into shops values (?1, ?2)", row).unwrap();
    }
    db.execute_batch("insert into shops values ('two.org', 1), ('two.org', 2), ('e.org', '')")
        .unwrap();

    let query = "select shard from shops where domain = ?1".to_owned();
    let table = Table::Sqlite(Sqlite { file: path, query });
    let lookup = table.start("shops", Limits::default()).unwrap();
    let (owners, _tasks) = halves().await;
    let stage = Stage::with(owners, |config| {
        key_at(config, "host");
        config.routes[0].lookup = Some(lookup);
    });
    let ask = |host: &str| get("/", "").replace("host: h", &format!("host: {host}"));
    for n in 0..20 {
        let answer = stage.talk(&ask(&format!("{n}.org"))).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{n}: {answer}");
        let served_by = answer.split("\r\n\r\n").nth(1).unwrap();
        assert!(served_by.starts_with(owner((n % 4).to_string().as_bytes())), "{n}: {answer}");
    }
    // A row changes, and so does its shard.
    for n in 0..20 {
        let shard = (n + 1) % 4;
        db.execute("update shops set shard = ?2 where domain = ?1", (format!("{n}.org"), shard))
            .unwrap();
        let moved = owner(shard.to_string().as_bytes());
        within("requests to go to the other shard", async {
            while !stage
                .talk(&ask(&format!("{n}.org")))
                .await
                .split("\r\n\r\n")
                .nth(1)
                .unwrap()
                .starts_with(moved)
            {}
        })
        .await;
    }
    for (host, status) in [("none.org", "404"), ("two.org", "502"), ("e.org", "502")] {
        let answer = stage.talk(&ask(host)).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {answer}");
    }
    // A database that nobody can open disturbs only those whom it has told nothing.
    let (file, query) = (folder.path().join("none.db"), "select 1".to_owned());
    let table = Table::Sqlite(Sqlite { file, query });
    let lookup = table.start("shops", Limits::default()).unwrap();
    let (owners, _tasks) = halves().await;
    let stage = Stage::with(owners, |config| config.routes[0].lookup = Some(lookup));
    let answer = stage.talk(&get("/kv/a", "")).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
}

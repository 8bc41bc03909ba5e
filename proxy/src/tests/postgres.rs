//! Keys that are translated through a table in a real PostgreSQL, which says itself what changes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, MutexGuard};

use super::harness::{Backend, Stage, key_at, within};
use super::keys::{halves, owner};
use super::tls::pem;
use crate::config::tls::{Tls, TlsFiles};
use crate::config::transport::Endpoint;
use crate::lookup::{Fault, Limits, Lookup};
use crate::tables::Table;
use crate::tables::postgres::Postgres;
use crate::tables::secret::Secret;

/// Longer than any test: what grows old is no way to notice a change.
const LONG: Duration = Duration::from_secs(600);
/// How long a server may take to start on a machine that has other things to do.
const START_WITHIN: Duration = Duration::from_secs(60);
/// One server at a time: each is a dozen processes.
static TURN: Mutex<()> = Mutex::const_new(());

/// A PostgreSQL with its data in a folder of its own, behind a socket there. Stopped when dropped.
struct Server {
    programs: PathBuf,
    folder: tempfile::TempDir,
    /// Where it listens beside its socket, which is named for the port, and what else is set.
    port: u16,
    settings: Vec<String>,
    child: Option<Child>,
    _turn: MutexGuard<'static, ()>,
}

impl Server {
    /// Starts one with a table of shops. Without the folder of its programs a test says so and passes, unless
    /// `MANDOLINE_REQUIRE_ALL=1` forbids that.
    async fn start() -> Option<Self> {
        Self::start_with(5432, &["listen_addresses="]).await
    }

    /// The same with settings of the server.
    async fn start_with(port: u16, settings: &[&str]) -> Option<Self> {
        let Some(programs) = std::env::var_os("MANDOLINE_POSTGRES") else {
            let required = std::env::var("MANDOLINE_REQUIRE_ALL").as_deref() == Ok("1");
            assert!(!required, "MANDOLINE_POSTGRES does not name PostgreSQL's programs");
            println!("skipped: MANDOLINE_POSTGRES does not name PostgreSQL's programs");
            return None;
        };
        let turn = TURN.lock().await;
        let folder = tempfile::tempdir().unwrap();
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let mut server =
            Self { programs: programs.into(), folder, port, settings, child: None, _turn: turn };
        if let Some((user, group)) = someone_else() {
            chown(server.folder.path(), Some(user), Some(group)).unwrap();
        }
        let password = server.keep("password", b"open sesame");
        server.keep("chain", &fs::read(pem("first.pem")).unwrap());
        server.keep("key", &fs::read(pem("first.key")).unwrap());
        let made = server
            .program("initdb")
            .args(["--no-sync", "--no-locale", "--encoding=UTF8", "--username=proxy"])
            .args(["--auth=scram-sha-256", "--pwfile"])
            .arg(&password)
            .arg(server.data())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.serve().await;
        server.run(
            "create table shops (domain text, shard text); \
             create table numbers (number integer, shard integer); \
             create function tell() returns trigger language plpgsql as $$ \
             begin perform pg_notify('Shops \"changed\"', coalesce(new.domain, old.domain)); return null; end $$; \
             create trigger tell after insert or update or delete on shops for each row execute function tell(); \
             insert into shops values ('a.org', '7'), ('b.org', 'eu-1'), ('two', '1'), ('two', '2'), \
             ('empty', ''), ('null', null); \
             insert into numbers values (1, 10), (2, 20);",
        );
        Some(server)
    }

    /// Writes a file that only the server may read.
    fn keep(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        if let Some((user, group)) = someone_else() {
            chown(&path, Some(user), Some(group)).unwrap();
        }
        path
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// A program of PostgreSQL, which does not run for root.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        if let Some((user, group)) = someone_else() {
            command.uid(user).gid(group);
        }
        command
    }

    async fn serve(&mut self) {
        let child = self
            .program("postgres")
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(self.folder.path())
            .args(["-p", &self.port.to_string(), "-c", "fsync=off"])
            .args(self.settings.iter().flat_map(|setting| ["-c", setting]))
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        self.child = Some(child);
        // It listens before it lets anyone in.
        let mut again = tokio::time::interval(Duration::from_millis(20));
        let letting_in = async {
            while !self.sql("select 1").status.success() {
                again.tick().await;
            }
        };
        tokio::time::timeout(START_WITHIN, letting_in).await.expect("PostgreSQL lets us in");
    }

    /// Ends it at once, connections or not.
    fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = rustix::process::Pid::from_child(&child);
        // Its own way: "immediate", which also ends those that serve connections.
        let _: Result<(), _> = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        drop(child.wait());
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join(format!(".s.PGSQL.{}", self.port))
    }

    fn sql(&self, statements: &str) -> std::process::Output {
        self.program("psql")
            .env("PGPASSWORD", "open sesame")
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "proxy", "-d", "postgres", "-h"])
            .arg(self.folder.path())
            .args(["-p", &self.port.to_string(), "-c", statements])
            .output()
            .unwrap()
    }

    fn run(&self, statements: &str) {
        let output = self.sql(statements);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn table(&self, query: &str) -> Postgres {
        Postgres {
            endpoint: Endpoint::Unix(self.socket().into()),
            tls: None,
            user: "proxy".to_owned(),
            password: Some(Secret("open sesame".to_owned())),
            database: "postgres".to_owned(),
            query: query.to_owned(),
            listen: None,
        }
    }

    fn shops(&self) -> Postgres {
        let listen = Some("Shops \"changed\"".to_owned());
        Postgres { listen, ..self.table("select shard from shops where domain = $1") }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whom PostgreSQL runs for where the tests run for root: its own user if there is one, or nobody.
fn someone_else() -> Option<(u32, u32)> {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let ids = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut parts = line.split(':').skip(2).map(|id| id.parse().unwrap());
        Some((parts.next()?, parts.next()?))
    };
    Some(ids("postgres").or_else(|| ids("nobody")).expect("there is a user that is not root"))
}

fn start(table: Postgres, limits: Limits) -> Lookup {
    Table::Postgres(Box::new(table)).start("shops", limits).unwrap()
}

fn patient() -> Limits {
    Limits { within: Duration::from_secs(10), ttl: LONG, negative_ttl: LONG, ..Limits::default() }
}

/// Asks again and again until the answer is this one.
async fn becomes(lookup: &Lookup, key: &str, answer: Result<&str, Fault>) {
    let answer = answer.map(str::as_bytes);
    within(&format!("{key} to be {answer:?}"), async {
        while lookup.find(key.as_bytes()).await.as_deref() != answer.as_ref().map(|answer| *answer)
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn rows_of_a_real_server_are_found_and_it_says_what_changes() {
    let Some(mut server) = Server::start().await else { return };
    let lookup = start(server.shops(), patient());
    for (key, wanted) in [
        (&b"a.org"[..], Ok(&b"7"[..])),
        (b"b.org", Ok(b"eu-1")),
        (b"none", Err(Fault::Unknown)),
        (b"null", Err(Fault::Unknown)),
        (b"two", Err(Fault::Two)),
        (b"empty", Err(Fault::Length(0))),
        (b"' or true --", Err(Fault::Unknown)),
        // No text of the server's encoding, so no row has it.
        (b"\xff\xfe", Err(Fault::Unknown)),
        (b"a\0b", Err(Fault::Unknown)),
    ] {
        assert_eq!(lookup.find(key).await.as_deref(), wanted.as_ref().map(|answer| *answer));
    }
    // A change is heard of, long before answers grow old; also that a row comes, and goes.
    within("the server to be listened to", async {
        while lookup.stats().flushes == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    becomes(&lookup, "a.org", Ok("7")).await;
    becomes(&lookup, "b.org", Ok("eu-1")).await;
    becomes(&lookup, "none", Err(Fault::Unknown)).await;
    let questions = lookup.stats().questions;
    server.run("update shops set shard = '8' where domain = 'a.org'; insert into shops values ('none', 'x')");
    becomes(&lookup, "a.org", Ok("8")).await;
    becomes(&lookup, "none", Ok("x")).await;
    server.run("delete from shops where domain = 'none'");
    becomes(&lookup, "none", Err(Fault::Unknown)).await;
    // Each of them was asked for again, and nothing else was.
    assert_eq!(lookup.find(b"b.org").await.as_deref(), Ok(&b"eu-1"[..]));
    let stats = lookup.stats();
    assert_eq!((stats.questions - questions, stats.flushes), (3, 1));
    server.run("notify \"Shops \"\"changed\"\"\"");
    within("everything to be forgotten", async {
        while lookup.stats().flushes == 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;

    // The server is away for a while: what was known serves, and what changed meanwhile is learned.
    becomes(&lookup, "a.org", Ok("8")).await;
    server.stop();
    assert_eq!(lookup.find(b"a.org").await.as_deref(), Ok(&b"8"[..]));
    assert!(matches!(lookup.find(b"unheard").await, Err(Fault::Down(_))));
    server.serve().await;
    server.run("alter table shops disable trigger tell; update shops set shard = '9' where domain = 'a.org'");
    becomes(&lookup, "a.org", Ok("9")).await;
}

#[tokio::test]
async fn a_query_that_hangs_ends_there_too_and_keeps_nobody_waiting() {
    let Some(server) = Server::start().await else { return };
    let query =
        "select case when $1 = 'hang' then (select 'x' from pg_sleep(600)) else 'at once' end";
    let limits = Limits { within: Duration::from_millis(500), ..patient() };
    let lookup = start(server.table(query), limits);
    // The first connection takes a while on a busy machine.
    becomes(&lookup, "a", Ok("at once")).await;
    let (hanging, other) = tokio::join!(lookup.find(b"hang"), becomes(&lookup, "b", Ok("at once")));
    assert_eq!((hanging, other), (Err(Fault::Late), ()));
    within("the server to be rid of the query", async {
        let running = "do $$ begin assert not exists (select from pg_stat_activity \
                       where state = 'active' and application_name = 'mandoline-proxy'); end $$";
        let mut again = tokio::time::interval(Duration::from_millis(20));
        while !server.sql(running).status.success() {
            again.tick().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_login_or_a_query_that_cannot_work_says_why() {
    let Some(server) = Server::start().await else { return };
    let shops = server.shops();
    for (table, why) in [
        (
            Postgres { password: Some(Secret("open barley".to_owned())), ..shops.clone() },
            "password authentication failed",
        ),
        (Postgres { password: None, ..shops.clone() }, "give password_file"),
        (Postgres { database: "nowhere".to_owned(), ..shops.clone() }, "does not exist"),
        (Postgres { query: "selekt 1".to_owned(), ..shops.clone() }, "syntax error"),
        (Postgres { query: "select 'x'".to_owned(), ..shops.clone() }, "parameter"),
        (
            Postgres { query: "delete from shops where domain = $1".to_owned(), ..shops.clone() },
            "read-only transaction",
        ),
        (Postgres { endpoint: "127.0.0.1:1".parse().unwrap(), ..shops }, "127.0.0.1:1"),
    ] {
        let Err(Fault::Down(said)) = start(table, patient()).find(b"a.org").await else {
            panic!("{why}: it was answered");
        };
        assert!(said.contains(why), "{why}: {said}");
    }
    // A column of numbers has no row for what is none.
    let numbers = server.table("select shard from numbers where number = $1");
    let lookup = start(numbers, patient());
    assert_eq!(lookup.find(b"2").await.as_deref(), Ok(&b"20"[..]));
    for none in [&b"3"[..], b"two", b"99999999999999999999"] {
        assert_eq!(lookup.find(none).await, Err(Fault::Unknown));
    }
}

#[tokio::test]
async fn a_shard_is_looked_up_in_postgresql() {
    let Some(server) = Server::start().await else { return };
    let (owners, _tasks) = halves().await;
    let lookup = start(server.shops(), patient());
    let stage = Stage::with(owners, |config| {
        key_at(config, "host");
        config.routes[0].lookup = Some(lookup);
    });
    let ask = "GET / HTTP/1.1\r\nhost: a.org\r\nconnection: close\r\n\r\n";
    let served_by = async || {
        let answer = stage.talk(ask).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        answer.split("\r\n\r\n").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    };
    assert_eq!(served_by().await, owner(b"7"));
    let other = (0..).map(|n| n.to_string()).find(|n| owner(n.as_bytes()) != owner(b"7")).unwrap();
    server.run(&format!("update shops set shard = '{other}' where domain = 'a.org'"));
    within("requests to go to the other shard", async {
        while served_by().await != owner(other.as_bytes()) {}
    })
    .await;
}

/// Asks for a password by SCRAM, and lets in whoever comes after so many of its messages, without having shown that it knows it.
async fn impostor(after: usize) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let message = |tag: u8, body: &[u8]| {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[tag][..], &length, body].concat()
    };
    let asks = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
    let lets_in = [message(b'R', &[0; 4]), message(b'Z', b"I")].concat();
    drop(tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        hear(&mut stream).await;
        stream.write_all(&asks).await.unwrap();
        let said = hear(&mut stream).await;
        if after == 2 {
            let nonce = said.split_once("r=").unwrap().1;
            let challenge = format!("\0\0\0\x0br={nonce}more,s=QSXCR+Q6sek8bf92,i=1");
            stream.write_all(&message(b'R', challenge.as_bytes())).await.unwrap();
            hear(&mut stream).await;
        }
        stream.write_all(&lets_in).await.unwrap();
        // Until the other side leaves.
        drop(stream.read_to_end(&mut Vec::new()).await);
    }));
    address.to_string().parse().unwrap()
}

/// What is said next, which is short enough to come at once.
async fn hear(stream: &mut TcpStream) -> String {
    let mut said = [0; 1 << 12];
    let length = stream.read(&mut said).await.unwrap();
    String::from_utf8_lossy(&said[..length]).into_owned()
}

#[tokio::test]
async fn a_server_that_does_not_show_that_it_knows_the_password_is_not_believed() {
    for after in [1, 2] {
        let table = Postgres {
            endpoint: impostor(after).await,
            tls: None,
            user: "proxy".to_owned(),
            password: Some(Secret("open sesame".to_owned())),
            database: "postgres".to_owned(),
            query: "select $1".to_owned(),
            listen: None,
        };
        let Err(Fault::Down(said)) = start(table, patient()).find(b"a.org").await else {
            panic!("it was believed after {after}");
        };
        assert!(said.contains("does not know the password itself"), "{said}");
    }
}

/// TLS towards a server that has this name, vouched for by this authority.
fn tls(name: &str, authority: &str) -> Option<Arc<Tls>> {
    let (authorities, name) = (pem(authority), Some(name.to_owned()));
    Some(Arc::new(Tls::load(TlsFiles { authorities, identity: None, name }).unwrap()))
}

#[tokio::test]
async fn a_server_is_spoken_to_by_tls_if_it_can_and_is_the_right_one() {
    let address = Backend::nobody().await;
    let settings =
        ["ssl=on", "ssl_cert_file=../chain", "ssl_key_file=../key", "listen_addresses=127.0.0.1"];
    let Some(server) = Server::start_with(address.port(), &settings).await else { return };
    let query = "select version from pg_stat_ssl where pid = pg_backend_pid() and $1 <> ''";
    let by = |tls| {
        let endpoint = address.to_string().parse().unwrap();
        start(Postgres { endpoint, tls, ..server.table(query) }, patient())
    };
    let lookup = by(tls("first.example", "authority.pem"));
    assert_eq!(lookup.find(b"x").await.as_deref(), Ok(&b"TLSv1.3"[..]));
    assert_eq!(by(None).find(b"x").await, Err(Fault::Unknown));
    for bad in [tls("second.example", "authority.pem"), tls("first.example", "impostor.pem")] {
        let Err(Fault::Down(said)) = by(bad).find(b"x").await else { panic!("it was believed") };
        assert!(said.contains("cannot be believed"), "{said}");
    }
    // It speaks none on its socket: then nobody does.
    let plain = Postgres { tls: tls("first.example", "authority.pem"), ..server.table(query) };
    let said = start(plain, patient()).find(b"x").await;
    assert_eq!(said, Err(Fault::Down("the server does not speak TLS".to_owned())));
}

//! Listening on sockets in the file system, and on several places at once.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::harness::{Backend, Owners, Stage, config, text, until, within};
use crate::config::Config;
use crate::config::listener::{Address, Listener, UNIX_MODE};
use crate::proxy::{Proxy, StartError};
use crate::sockets::SocketsError;

fn at(path: &Path) -> Listener {
    Listener::new(Address::Unix { path: path.to_owned(), mode: UNIX_MODE })
}

async fn ask(path: &Path) -> String {
    let mut stream = within("a connection", UnixStream::connect(path)).await.unwrap();
    let request = b"GET /k/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn clients_come_in_by_files_and_ports() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| folder.path().join(name));
    let backend = Backend::echo("task").await;
    let stage = Stage::with(Owners::all(backend.address).await, |config: &mut Config| {
        config.listeners.extend(paths.iter().map(|path| at(path)));
        config.workers = 3.try_into().unwrap();
    });
    for path in &paths {
        for _ in 0..4 {
            let answer = ask(path).await;
            assert!(answer.contains("forwarded: for=unknown;proto=http;host=a"), "{answer}");
        }
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
    }
    let answer = stage.talk("GET /k/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let said: Vec<String> = stage.proxy.addresses().iter().map(Address::to_string).collect();
    let wanted = [
        stage.proxy.local_addr().to_string(),
        format!("unix:{}", paths[0].display()),
        format!("unix:{}", paths[1].display()),
    ];
    assert_eq!(said, wanted);
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up_there_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("proxy.sock");
    let backend = Backend::serve(|_| async { text(vec![0; 8 << 20]) }).await;
    let stage = Stage::with(Owners::all(backend.address).await, |config: &mut Config| {
        config.listeners.push(at(&path));
        config.timeouts.stall = Duration::from_millis(400);
    });
    let mut stream = within("a connection", UnixStream::connect(&path)).await.unwrap();
    stream.write_all(b"GET /k/a HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    until("the client to be given up", || stage.stats().abandoned == 1).await;
    until("its connection to end", || stage.stats().connections == 0).await;
}

#[tokio::test]
async fn only_a_socket_that_was_left_behind_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("proxy.sock");
    let start = || {
        let config = config(&Owners::none(), |config| config.listeners = vec![at(&path)]);
        Proxy::start(config, &CancellationToken::new())
    };
    let refused = |started: Result<Proxy, StartError>| match started {
        Err(StartError::Sockets(SocketsError::BindUnix { path: named, .. })) => named == path,
        _ => false,
    };
    std::fs::write(&path, "somebody's").unwrap();
    assert!(refused(start()));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's");
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    assert!(refused(start()));
    // The file outlives its listener.
    drop(listener);
    let proxy = start().unwrap();
    assert!(ask(&path).await.starts_with("HTTP/1.1 503 "));
    assert!(refused(start()));
    within("the end", proxy.stop()).await;
}

//! A task that trusts nobody: it writes down each request that it sees, by the strictest reading, and answers with it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::tests::corpus::case::Script;
use crate::tests::corpus::strict::{Fault, Message, Strict};
use crate::tests::harness::Backend;

/// A task that writes down what it sees.
pub(super) struct Recorder {
    backend: Backend,
    notes: Arc<Mutex<Notes>>,
}

#[derive(Default)]
struct Notes {
    seen: Vec<Result<Message, Fault>>,
    script: Option<Script>,
}

impl Recorder {
    pub(super) async fn start() -> Self {
        let notes = Arc::<Mutex<Notes>>::default();
        let backend = Backend::raw({
            let notes = Arc::clone(&notes);
            move |stream| serve(stream, Arc::clone(&notes))
        })
        .await;
        Self { backend, notes }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.backend.address
    }

    /// Has the next request answered so.
    pub(super) fn next_answer(&self, script: Option<Script>) {
        self.notes.lock().unwrap().script = script;
    }

    /// Gives what was seen since it was last asked.
    pub(super) fn seen(&self) -> Vec<Result<Message, Fault>> {
        std::mem::take(&mut self.notes.lock().unwrap().seen)
    }
}

async fn serve(stream: TcpStream, notes: Arc<Mutex<Notes>>) {
    let mut strict = Strict::new(stream);
    loop {
        let mut script = None;
        let mut read = strict.request().await;
        if let Ok(head) = read {
            script = notes.lock().unwrap().script.take();
            if let Some(early) = script.as_ref().filter(|script| script.is_early) {
                // The proxy may have seen enough.
                drop(strict.stream.write_all(&early.bytes).await);
            }
            read = strict.request_body(head).await;
        }
        let answer = match &read {
            Ok(message) => echo(message),
            Err(Fault::Nothing) => return,
            Err(_) => {
                notes.lock().unwrap().seen.push(read);
                return;
            }
        };
        notes.lock().unwrap().seen.push(read);
        let bytes = match &script {
            Some(script) if script.is_early => &[],
            Some(script) => &script.bytes[..],
            None => &answer,
        };
        let sent = strict.stream.write_all(bytes).await;
        if sent.is_err() || script.is_some_and(|script| script.closes) {
            return;
        }
    }
}

/// An answer that says which request it belongs to.
fn echo(message: &Message) -> Vec<u8> {
    let (line, body) = (message.line(), &message.body);
    let head =
        format!("HTTP/1.1 200 OK\r\nx-echo: {line}\r\ncontent-length: {}\r\n\r\n", body.len());
    // The answer to HEAD has a length and no body.
    let body = if line.starts_with("HEAD ") { &[] } else { &body[..] };
    [head.as_bytes(), body].concat()
}

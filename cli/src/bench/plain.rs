//! A connection to one task, with as little between it and the wire as may be: what a caller takes itself counts as latency in
//! what is measured here.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use mandoline::tries::Refusal;
use mandoline_core::generation::Generation;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection, once it is needed.
#[derive(Debug)]
pub(crate) struct Caller {
    address: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The assignment that the task judged by, if it said so.
    generation: Option<Generation>,
    is_in_transit: bool,
}

impl Answer {
    /// Whether the task served the key, whether or not it has a value.
    pub(crate) const fn is_served(self) -> bool {
        matches!(self.status, 200 | 204 | 404)
    }

    /// Why the task did not take the request, if another try may help.
    pub(crate) fn refusal(self) -> Option<Refusal> {
        match (self.status, self.generation?) {
            (421, told) => Some(Refusal::NotOwner(told)),
            (503, told) if self.is_in_transit => Some(Refusal::InTransit(told)),
            _ => None,
        }
    }
}

impl Caller {
    pub(crate) const fn new(address: SocketAddr) -> Self {
        Self { address, stream: None, buffer: Vec::new() }
    }

    /// Asks for a key and reads the whole answer. A connection that was closed meanwhile is made anew.
    pub(crate) async fn ask(
        &mut self,
        method: &str,
        key: &str,
        body: &[u8],
    ) -> anyhow::Result<Answer> {
        let was_open = self.stream.is_some();
        match self.try_ask(method, key, body).await {
            Err(_) if was_open => self.try_ask(method, key, body).await,
            answer => answer,
        }
    }

    /// Whether a task answers for a key. One that is gone does not.
    pub(crate) async fn is_served(&mut self, key: &str) -> bool {
        self.ask("GET", key, &[]).await.is_ok_and(Answer::is_served)
    }

    /// Asks once. A connection that broke is given up.
    pub(crate) async fn try_ask(
        &mut self,
        method: &str,
        key: &str,
        body: &[u8],
    ) -> anyhow::Result<Answer> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        let length = body.len();
        let head = format!(
            "{method} /kv/{key} HTTP/1.1\r\nhost: task\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        if !body.is_empty() {
            stream.write_all(body).await?;
        }
        self.buffer.clear();
        let (answer, whole) = loop {
            if stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the task closed the connection");
            }
            if let Some(found) = head_of(&self.buffer)? {
                break found;
            }
        };
        while self.buffer.len() < whole {
            if stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the task broke off");
            }
        }
        self.stream = Some(stream);
        Ok(answer)
    }
}

/// What the head of an answer says, and how long the answer is with its body, once the head is there. Our own tasks write
/// names in lower case.
fn head_of(bytes: &[u8]) -> anyhow::Result<Option<(Answer, usize)>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let mut lines = std::str::from_utf8(&bytes[..end])?.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.split(' ').nth(1).context("an answer has a status")?.parse()?;
    let mut answer = Answer { status, generation: None, is_in_transit: false };
    let mut length = 0;
    for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
        match name {
            "content-length" => length = value.parse::<usize>()?,
            "mandoline-generation" => answer.generation = Some(value.parse()?),
            "mandoline-transit" => answer.is_in_transit = true,
            _ => {}
        }
    }
    Ok(Some((answer, end + 4 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(head: &str) -> (Answer, usize) {
        head_of(head.as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn an_answer_is_read_once_its_head_is_there() {
        assert_eq!(head_of(b"HTTP/1.1 200 OK\r\n").unwrap(), None);
        let (answer, whole) = read("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n");
        assert_eq!((answer.is_served(), answer.refusal(), whole), (true, None, 45));
        assert!(head_of(b"HTTP/1.1\r\n\r\n").is_err());
        assert!(head_of(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n").is_err());
    }

    #[test]
    fn refusals_are_told_from_failures() {
        let told = Generation { incarnation: 1, number: 7 };
        for (head, refusal) in [
            ("421 X\r\nmandoline-generation: 1.7", Some(Refusal::NotOwner(told))),
            (
                "503 X\r\nmandoline-generation: 1.7\r\nmandoline-transit: 1.6@0",
                Some(Refusal::InTransit(told)),
            ),
            ("503 X\r\nmandoline-generation: 1.7", None),
            ("500 X", None),
        ] {
            let (answer, _) = read(&format!("HTTP/1.1 {head}\r\n\r\n"));
            assert!(!answer.is_served());
            assert_eq!(answer.refusal(), refusal, "{head}");
        }
    }
}

//! The strictest reading of HTTP/1.1 there is: what does not have one form alone is a fault, however well others cope with it.

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// A message.
#[derive(Debug, Default)]
pub(super) struct Message {
    /// The first line.
    pub(super) start: String,
    pub(super) fields: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

/// Why a message cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The connection ended before a message began.
    Nothing,
    /// The connection ended in the middle of this one.
    Cut(String),
    /// It has no reading, or more than one.
    Bad(String),
}

/// What ends the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    None,
    Length(usize),
    Chunked,
    Close,
}

/// A connection that messages are read from.
pub(super) struct Strict {
    pub(super) stream: TcpStream,
    read: Vec<u8>,
}

/// What a trailer must not say: it is for the head, and who merges the two would believe it (RFC 9110, 6.5.1).
const NO_TRAILERS: [&str; 10] = [
    "authorization",
    "connection",
    "content-length",
    "cookie",
    "forwarded",
    "host",
    "te",
    "transfer-encoding",
    "via",
    "x-forwarded-for",
];

impl Strict {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, read: Vec::new() }
    }

    /// Reads the head of a request.
    pub(super) async fn request(&mut self) -> Result<Message, Fault> {
        let message = self.head().await?;
        let words: Vec<&str> = message.start.split(' ').collect();
        let [method, target, "HTTP/1.1"] = words[..] else {
            return Err(message.bad("no request line"));
        };
        let plain = target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
        if !is_token(method) || !plain || !(target.starts_with('/') || target == "*") {
            return Err(message.bad("no method or no target"));
        }
        if message.all("host").count() != 1 {
            return Err(message.bad("not one Host"));
        }
        message.framing()?;
        Ok(message)
    }

    /// Reads what belongs to the head of a request.
    pub(super) async fn request_body(&mut self, mut message: Message) -> Result<Message, Fault> {
        let framing = message.framing()?.unwrap_or(Framing::None);
        self.body(&mut message, framing).await?;
        Ok(message)
    }

    /// Reads an answer, past those that are not the last.
    pub(super) async fn answer(&mut self, to_head: bool) -> Result<Message, Fault> {
        loop {
            let mut message = self.head().await?;
            let status = message.status()?;
            let framing = message.framing()?;
            if (100..200).contains(&status) {
                continue;
            }
            let framing = match status {
                204 | 304 => Framing::None,
                _ if to_head => Framing::None,
                _ => framing.unwrap_or(Framing::Close),
            };
            self.body(&mut message, framing).await?;
            return Ok(message);
        }
    }

    /// Reads to the end of the connection; a reset is an end.
    pub(super) async fn rest(&mut self) -> Vec<u8> {
        while self.fill().await {}
        std::mem::take(&mut self.read)
    }

    async fn head(&mut self) -> Result<Message, Fault> {
        if self.read.is_empty() && !self.fill().await {
            return Err(Fault::Nothing);
        }
        let mut message = Message::default();
        message.start = self.line(&message).await?;
        message.fields = self.fields(&message).await?;
        Ok(message)
    }

    async fn fields(&mut self, message: &Message) -> Result<Vec<(String, String)>, Fault> {
        let mut fields = Vec::new();
        loop {
            let line = self.line(message).await?;
            if line.is_empty() {
                return Ok(fields);
            }
            let Some((name, value)) = line.split_once(':') else {
                return Err(message.bad("a line that is no field"));
            };
            if !is_token(name) {
                return Err(message.bad("the name of a field"));
            }
            fields.push((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()));
        }
    }

    async fn body(&mut self, message: &mut Message, framing: Framing) -> Result<(), Fault> {
        match framing {
            Framing::None => {}
            Framing::Length(length) => message.body = self.take(length, message).await?,
            Framing::Close => message.body = self.rest().await,
            Framing::Chunked => loop {
                let size = self.line(message).await?;
                if size.is_empty()
                    || size.len() > 15
                    || !size.bytes().all(|b| b.is_ascii_hexdigit())
                {
                    return Err(message.bad("the size of a chunk"));
                }
                let size = usize::from_str_radix(&size, 16).expect("it is digits");
                if size == 0 {
                    let trailers = self.fields(message).await?;
                    let forged =
                        |(name, _): &(String, String)| NO_TRAILERS.contains(&name.as_str());
                    if trailers.iter().any(forged) {
                        return Err(message.bad("a trailer that is for heads"));
                    }
                    message.fields.extend(
                        trailers
                            .into_iter()
                            .map(|(name, value)| (format!("trailer {name}"), value)),
                    );
                    break;
                }
                let chunk = self.take(size, message).await?;
                message.body.extend(chunk);
                if !self.line(message).await?.is_empty() {
                    return Err(message.bad("the end of a chunk"));
                }
            },
        }
        Ok(())
    }

    async fn take(&mut self, length: usize, message: &Message) -> Result<Vec<u8>, Fault> {
        while self.read.len() < length {
            if !self.fill().await {
                self.read.clear();
                return Err(Fault::Cut(message.start.clone()));
            }
        }
        let rest = self.read.split_off(length);
        Ok(std::mem::replace(&mut self.read, rest))
    }

    /// Reads a line that ends with CR LF and has neither elsewhere.
    async fn line(&mut self, message: &Message) -> Result<String, Fault> {
        let end = loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                break end;
            }
            if !self.fill().await {
                self.read.clear();
                return Err(Fault::Cut(message.start.clone()));
            }
        };
        let line = self.take(end + 1, message).await?;
        let Some(line) = line.strip_suffix(b"\r\n") else {
            return Err(message.bad("a line without a carriage return"));
        };
        if line.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            return Err(message.bad("a control character"));
        }
        // Bytes beyond ASCII may stand in a value; which ones is nobody's question here.
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    async fn fill(&mut self) -> bool {
        self.stream.read_buf(&mut self.read).await.is_ok_and(|length| length > 0)
    }
}

impl Message {
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields.iter().filter(move |(field, _)| field == name).map(|(_, value)| &**value)
    }

    pub(super) fn first(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| &**value)
    }

    pub(super) fn status(&self) -> Result<u16, Fault> {
        let status = self.start.split(' ').nth(1).and_then(|status| status.parse().ok());
        status
            .filter(|_| self.start.starts_with("HTTP/1."))
            .ok_or_else(|| self.bad("no status line"))
    }

    /// Method and target.
    pub(super) fn line(&self) -> String {
        self.start.trim_end_matches(" HTTP/1.1").to_owned()
    }

    fn framing(&self) -> Result<Option<Framing>, Fault> {
        let lengths: Vec<_> = self.all("content-length").collect();
        let codings: Vec<_> = self.all("transfer-encoding").collect();
        match (&lengths[..], &codings[..]) {
            ([], []) => Ok(None),
            ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
                let length = length.parse().map_err(|_| self.bad("the length"))?;
                Ok(Some(Framing::Length(length)))
            }
            ([], ["chunked"]) => Ok(Some(Framing::Chunked)),
            _ => Err(self.bad("more than one length, or none that is sure")),
        }
    }

    fn bad(&self, what: &str) -> Fault {
        Fault::Bad(format!("{what}: {self:?}"))
    }
}

fn is_token(text: &str) -> bool {
    let of_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(of_token)
}

//! One connection to PostgreSQL: version 3.0 of its protocol, as far as one prepared query and one channel need it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::pool::dial::{ConnectError, Io, Plain, Speech, dial, name_of};
use crate::tables::postgres::Postgres;
use crate::tables::postgres::scram::{First, NAME, ScramError};

/// The longest message that is taken: longer ones would be of a row that is no key.
const MESSAGE_MAX_BYTES: usize = 256 << 10;
/// Version 3.0, and the number by which TLS is asked for.
const VERSION: i32 = 196_608;
const TLS_PLEASE: i32 = 80_877_103;
/// What the prepared query is called.
const NAME_OF_QUERY: &[u8] = b"lookup\0";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the connection broke: {0}")]
    Broke(#[from] io::Error),
    #[error("the server says: {message} ({code})")]
    Server { code: String, message: String },
    #[error("the server wants {0}, which is not spoken here: have it ask for scram-sha-256")]
    Login(&'static str),
    #[error("the server wants a password: give password_file")]
    Password,
    #[error(transparent)]
    Scram(#[from] ScramError),
    #[error("the server does not speak TLS")]
    NoTls,
    #[error("the server does not keep to its protocol")]
    Garbled,
}

/// Rows of one column, as far as they matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    None,
    One(Option<Vec<u8>>),
    Two,
}

/// What the server says unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Something has changed: this, or anything.
    Notice(Bytes),
    /// That it is there.
    Alive,
}

/// One connection.
pub(super) struct Session {
    io: Io,
    incoming: BytesMut,
    // Once anything went wrong that leaves open what comes next.
    is_broken: bool,
}

impl Session {
    /// Connects and logs in.
    pub(super) async fn connect(to: &Postgres, within: Duration) -> Result<Self, SessionError> {
        let (io, _) = dial(&to.endpoint, None, Speech::One).await?;
        let io = match (&to.tls, io) {
            (Some(_), Io::Plain(plain)) => by_tls(to, plain).await?,
            (_, io) => io,
        };
        let mut wire = Self { io, incoming: BytesMut::new(), is_broken: false };
        let mut hello = BytesMut::new();
        hello.put_i32(VERSION);
        // A query whose caller has given up must not go on and keep its place.
        let limit = within.as_millis().max(1).to_string();
        for (name, value) in [
            ("user", to.user.as_str()),
            ("database", &to.database),
            ("application_name", "mandoline-proxy"),
            ("client_encoding", "UTF8"),
            ("default_transaction_read_only", "on"),
            ("statement_timeout", &limit),
        ] {
            put_text(&mut hello, name);
            put_text(&mut hello, value);
        }
        hello.put_u8(0);
        wire.send_untagged(&hello).await?;
        wire.log_in(to).await?;
        wire.until_ready().await?;
        Ok(wire)
    }

    async fn log_in(&mut self, to: &Postgres) -> Result<(), SessionError> {
        let password = || to.password.as_ref().ok_or(SessionError::Password);
        let (mut first, mut last) = (None, None);
        // Whoever begins to show that it knows the password is to end with it.
        let mut is_proved = true;
        loop {
            let mut asked = self.expect(b'R').await?;
            match asked.try_get_i32().map_err(|_| SessionError::Garbled)? {
                0 if is_proved => return Ok(()),
                0 => return Err(ScramError::Stranger.into()),
                3 => {
                    let mut told = BytesMut::new();
                    put_text(&mut told, &password()?.0);
                    self.send(b'p', &told).await?;
                }
                5 => return Err(SessionError::Login("an MD5 of the password")),
                10 => {
                    if !asked.split(|b| *b == 0).any(|name| name == NAME.as_bytes()) {
                        return Err(SessionError::Login("SASL of another kind"));
                    }
                    password()?;
                    is_proved = false;
                    let message = first.insert(First::draw()).message();
                    let mut told = BytesMut::new();
                    put_text(&mut told, NAME);
                    told.put_i32(length(message.len())?);
                    told.put_slice(message.as_bytes());
                    self.send(b'p', &told).await?;
                }
                11 => {
                    let challenge = str::from_utf8(&asked).map_err(|_| SessionError::Garbled)?;
                    let first = first.as_ref().ok_or(SessionError::Garbled)?;
                    let answer = last.insert(first.answer(password()?, challenge)?);
                    self.send(b'p', answer.message.as_bytes()).await?;
                }
                12 => {
                    let shown = str::from_utf8(&asked).map_err(|_| SessionError::Garbled)?;
                    last.as_ref().ok_or(SessionError::Garbled)?.check(shown)?;
                    is_proved = true;
                }
                _ => return Err(SessionError::Login("another kind of login")),
            }
        }
    }

    /// Prepares the query that will be asked.
    pub(super) async fn prepare(&mut self, query: &str) -> Result<(), SessionError> {
        let mut parse = BytesMut::new();
        parse.put_slice(NAME_OF_QUERY);
        put_text(&mut parse, query);
        // The server finds out itself of what type the parameter is.
        parse.put_i16(0);
        self.send_all(&[(b'P', &parse), (b'S', &[])]).await?;
        self.until_ready().await.map(drop)
    }

    /// Asks the prepared query for a key.
    pub(super) async fn ask(&mut self, key: &[u8]) -> Result<Rows, SessionError> {
        let mut bind = BytesMut::new();
        // The unnamed portal, one parameter as text, and the answer as text.
        bind.put_u8(0);
        bind.put_slice(NAME_OF_QUERY);
        bind.put_i16(0);
        bind.put_i16(1);
        bind.put_i32(length(key.len())?);
        bind.put_slice(key);
        bind.put_i16(0);
        let mut execute = BytesMut::new();
        execute.put_u8(0);
        // Two rows are one too many already.
        execute.put_i32(2);
        self.send_all(&[(b'B', &bind), (b'E', &execute), (b'S', &[])]).await?;
        self.until_ready().await
    }

    /// Does what needs no answer, such as to listen.
    pub(super) async fn run(&mut self, statement: &str) -> Result<(), SessionError> {
        self.say(statement).await?;
        self.until_ready().await.map(drop)
    }

    /// Sends a statement without waiting for what comes of it. An empty one does nothing but to be answered.
    pub(super) async fn say(&mut self, statement: &str) -> Result<(), SessionError> {
        let mut query = BytesMut::new();
        put_text(&mut query, statement);
        self.send(b'Q', &query).await
    }

    /// Waits for what the server says. Nothing is lost if this is dropped meanwhile.
    pub(super) async fn hear(&mut self) -> Result<Heard, SessionError> {
        let (tag, mut body) = self.message().await?;
        match tag {
            b'A' => {
                body.try_get_i32().map_err(|_| SessionError::Garbled)?;
                let _channel = text(&mut body)?;
                Ok(Heard::Notice(text(&mut body)?))
            }
            b'E' => Err(server_error(body)),
            _ => Ok(Heard::Alive),
        }
    }

    /// Says whether another question can be asked here.
    pub(super) const fn is_usable(&self) -> bool {
        !self.is_broken
    }

    /// Reads up to where the server waits for the next question, and gives the rows on the way.
    async fn until_ready(&mut self) -> Result<Rows, SessionError> {
        let (mut rows, mut failed) = (Rows::None, None);
        // Until it is clear again what comes next; also for whoever drops this.
        self.is_broken = true;
        loop {
            let (tag, body) = match self.message().await {
                Ok(message) => message,
                // After the worst of errors it hangs up.
                Err(error) => return Err(failed.unwrap_or(error)),
            };
            match tag {
                b'D' => {
                    rows = match rows {
                        Rows::None => Rows::One(column(body)?),
                        Rows::One(_) | Rows::Two => Rows::Two,
                    };
                }
                b'E' => failed = Some(server_error(body)),
                b'Z' => {
                    self.is_broken = false;
                    return failed.map_or(Ok(rows), Err);
                }
                _ => {}
            }
        }
    }

    /// Reads the next message, which must be this one.
    async fn expect(&mut self, wanted: u8) -> Result<Bytes, SessionError> {
        loop {
            match self.message().await? {
                (tag, body) if tag == wanted => return Ok(body),
                (b'E', body) => return Err(server_error(body)),
                // A remark.
                (b'N', _) => {}
                _ => return Err(SessionError::Garbled),
            }
        }
    }

    async fn message(&mut self) -> Result<(u8, Bytes), SessionError> {
        loop {
            if let Some(message) = parse(&mut self.incoming)? {
                return Ok(message);
            }
            if self.io.read_buf(&mut self.incoming).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    async fn send(&mut self, tag: u8, body: &[u8]) -> Result<(), SessionError> {
        self.send_all(&[(tag, body)]).await
    }

    async fn send_all(&mut self, messages: &[(u8, &[u8])]) -> Result<(), SessionError> {
        self.is_broken = true;
        let mut all = BytesMut::new();
        for (tag, body) in messages {
            all.put_u8(*tag);
            all.put_i32(length(body.len() + 4)?);
            all.put_slice(body);
        }
        self.io.write_all(&all).await?;
        Ok(self.io.flush().await?)
    }

    /// The first message has no tag.
    async fn send_untagged(&mut self, body: &[u8]) -> Result<(), SessionError> {
        let mut all = BytesMut::new();
        all.put_i32(length(body.len() + 4)?);
        all.put_slice(body);
        self.io.write_all(&all).await?;
        Ok(self.io.flush().await?)
    }
}

/// Asks for TLS, and goes on by it.
async fn by_tls(to: &Postgres, mut plain: Plain) -> Result<Io, SessionError> {
    let Some(tls) = &to.tls else { return Ok(Io::Plain(plain)) };
    let mut please = BytesMut::new();
    please.put_i32(8);
    please.put_i32(TLS_PLEASE);
    plain.write_all(&please).await?;
    plain.flush().await?;
    // Exactly this byte: what comes after it must come by TLS.
    if plain.read_u8().await? != b'S' {
        return Err(SessionError::NoTls);
    }
    let failed = |error| ConnectError::Tls(to.endpoint.clone(), error);
    let name = match &tls.name {
        Some(name) => name.clone(),
        None => name_of(&to.endpoint).map_err(failed)?,
    };
    let mut config = (*tls.http1).clone();
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    let stream = TlsConnector::from(Arc::new(config)).connect(name, plain).await.map_err(failed)?;
    Ok(Io::Tls(Box::new(stream)))
}

/// Takes one whole message, if it has come.
fn parse(incoming: &mut BytesMut) -> Result<Option<(u8, Bytes)>, SessionError> {
    let Some([tag, length @ ..]) = incoming.first_chunk::<5>() else { return Ok(None) };
    let (tag, length) = (*tag, i32::from_be_bytes(*length));
    let length = usize::try_from(length).ok().filter(|n| (4..=MESSAGE_MAX_BYTES).contains(n));
    let whole = 1 + length.ok_or(SessionError::Garbled)?;
    if incoming.len() < whole {
        return Ok(None);
    }
    let mut message = incoming.split_to(whole).freeze();
    message.advance(5);
    Ok(Some((tag, message)))
}

/// The first column of a row; nothing for a null.
fn column(mut row: Bytes) -> Result<Option<Vec<u8>>, SessionError> {
    let garbled = |_| SessionError::Garbled;
    if row.try_get_i16().map_err(garbled)? < 1 {
        return Ok(None);
    }
    match usize::try_from(row.try_get_i32().map_err(garbled)?) {
        Err(_) => Ok(None),
        Ok(length) => {
            row.get(..length).map(|value| Some(value.to_vec())).ok_or(SessionError::Garbled)
        }
    }
}

/// What the server says of an error: fields, each with a letter before it and a zero behind.
fn server_error(mut body: Bytes) -> SessionError {
    let (mut code, mut message) = (String::new(), String::new());
    while let Ok(kind @ 1..) = body.try_get_u8() {
        let Ok(value) = text(&mut body) else { break };
        let value = || String::from_utf8_lossy(&value).into_owned();
        match kind {
            b'C' => code = value(),
            b'M' => message = value(),
            _ => {}
        }
    }
    SessionError::Server { code, message }
}

/// Takes a text up to the zero that ends it.
fn text(body: &mut Bytes) -> Result<Bytes, SessionError> {
    let end = body.iter().position(|b| *b == 0).ok_or(SessionError::Garbled)?;
    let text = body.split_to(end);
    body.advance(1);
    Ok(text)
}

fn put_text(to: &mut BytesMut, text: &str) {
    to.put_slice(text.as_bytes());
    to.put_u8(0);
}

fn length(bytes: usize) -> Result<i32, SessionError> {
    i32::try_from(bytes).map_err(|_| SessionError::Garbled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_whole_and_bad_lengths_refused() {
        let mut incoming = BytesMut::from(&b"Z\0\0\0\x05IA\0\0"[..]);
        assert_eq!(parse(&mut incoming).unwrap(), Some((b'Z', Bytes::from_static(b"I"))));
        assert_eq!(parse(&mut incoming).unwrap(), None);
        assert_eq!(incoming, &b"A\0\0"[..]);
        for bad in [&b"D\0\0\0\x03"[..], b"D\xff\xff\xff\xff", b"D\x7f\0\0\0"] {
            assert!(
                matches!(parse(&mut BytesMut::from(bad)), Err(SessionError::Garbled)),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn rows_and_errors_are_read_and_never_beyond_their_end() {
        let row = |bytes: &'static [u8]| column(Bytes::from_static(bytes));
        assert_eq!(row(b"\0\x01\0\0\0\x02ab").unwrap(), Some(b"ab".to_vec()));
        assert_eq!(row(b"\0\x01\xff\xff\xff\xff").unwrap(), None);
        assert_eq!(row(b"\0\0").unwrap(), None);
        assert!(row(b"\0\x01\0\0\0\x03ab").is_err());
        assert!(row(b"\0").is_err());
        let error = server_error(Bytes::from_static(b"SERROR\0C42P01\0Mno such table\0\0"));
        assert_eq!(error.to_string(), "the server says: no such table (42P01)");
        let error = server_error(Bytes::from_static(b"C42P01"));
        assert_eq!(error.to_string(), "the server says:  ()");
    }
}

//! Asks a PostgreSQL server, and listens to what it says of changes.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tokio::time::{error::Elapsed, sleep, timeout};
use tracing::{info, warn};

use crate::lookup::desk::{Desk, Teller};
use crate::lookup::{Fault, Found, Source};
use crate::tables::postgres::Postgres;
use crate::tables::postgres::wire::{Heard, Rows, Session, SessionError};
use crate::tables::remote::{self, Remote};

/// How many questions the server is asked at a time. Each takes a process there.
const CONNECTIONS: usize = 4;
/// After how much silence the server is asked whether it is still there, and how long it may take to say so: a connection that is gone
/// without a word would tell of no change.
const SILENCE: Duration = Duration::from_secs(10);
/// How long to wait before the next attempt to listen.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Asks a PostgreSQL server.
pub(super) struct Server {
    table: Postgres,
    within: Duration,
}

impl Server {
    pub(super) const fn new(table: Postgres) -> Self {
        Self { table, within: Duration::ZERO }
    }

    /// Listens until the connection is of no more use.
    async fn listen(&self, channel: &str, teller: &Teller) -> Result<Infallible, Deaf> {
        let mut wire = timeout(SILENCE, async {
            let mut wire = Session::connect(&self.table, self.within).await?;
            wire.run(&format!("listen \"{}\"", channel.replace('"', "\"\""))).await?;
            Ok::<_, SessionError>(wire)
        })
        .await??;
        info!(channel, "A lookup's table says what changes");
        // What changed before went unheard.
        teller.flush();
        let mut was_asked = false;
        loop {
            match timeout(SILENCE, wire.hear()).await {
                Ok(heard) => {
                    was_asked = false;
                    match heard? {
                        Heard::Notice(key) if key.is_empty() => teller.flush(),
                        Heard::Notice(key) => teller.forget(&key),
                        Heard::Alive => {}
                    }
                }
                Err(silent) if was_asked => return Err(silent.into()),
                Err(_) => {
                    timeout(SILENCE, wire.say("")).await??;
                    was_asked = true;
                }
            }
        }
    }
}

/// Why changes are not heard of.
#[derive(Debug, thiserror::Error)]
enum Deaf {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the server is silent")]
    Silent(#[from] Elapsed),
}

impl Source for Server {
    async fn serve(mut self, desk: Desk) {
        self.within = desk.within();
        remote::serve(self, CONNECTIONS, desk).await;
    }
}

impl Remote for Server {
    type Connection = Session;

    async fn connect(&self) -> Result<Session, Fault> {
        let connecting = async {
            let mut wire = Session::connect(&self.table, self.within).await?;
            wire.prepare(&self.table.query).await?;
            Ok(wire)
        };
        connecting.await.map_err(fault)
    }

    async fn ask(&self, connection: &mut Session, key: &[u8]) -> Found {
        match connection.ask(key).await {
            Ok(Rows::None | Rows::One(None)) => Ok(None),
            Ok(Rows::One(answer)) => Ok(answer),
            Ok(Rows::Two) => Err(Fault::Two),
            // A key that cannot be a value of the column is in no row of it.
            Err(SessionError::Server { code, .. }) if NO_VALUE.contains(&&*code) => Ok(None),
            Err(error) => Err(fault(error)),
        }
    }

    fn is_usable(connection: &Session) -> bool {
        connection.is_usable()
    }

    async fn watch(&self, teller: &Teller) {
        let Some(channel) = &self.table.listen else { return pending().await };
        loop {
            let Err(error) = self.listen(channel, teller).await;
            warn!(channel, %error, "A lookup's table cannot say what changes");
            sleep(LISTEN_AGAIN).await;
        }
    }
}

/// No text of the encoding, no text of the type, out of its range, and a character that it has not.
const NO_VALUE: [&str; 4] = ["22021", "22P02", "22003", "22P05"];
/// The server ended the query, since it took too long.
const CANCELED: &str = "57014";

fn fault(error: SessionError) -> Fault {
    match error {
        SessionError::Server { code, .. } if code == CANCELED => Fault::Late,
        SessionError::Connect(error) => remote::down(&error),
        error => Fault::Down(error.to_string()),
    }
}

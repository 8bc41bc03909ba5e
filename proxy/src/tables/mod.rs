//! The tables through which keys are translated: in a file of SQLite, in PostgreSQL, or behind an HTTP service. What knows a database is
//! a feature, and what is not built in can be named all the same, so that a configuration is refused with a reason.

pub mod secret;
mod remote;
pub mod http;
pub mod postgres;
pub mod sqlite;

use std::io;

use crate::lookup::{Limits, Lookup};
use crate::tables::http::Http;
use crate::tables::postgres::Postgres;
use crate::tables::sqlite::Sqlite;

/// A table, and how it is asked.
#[derive(Clone, Debug)]
pub enum Table {
    /// In a file of SQLite.
    Sqlite(Sqlite),
    /// In PostgreSQL.
    Postgres(Box<Postgres>),
    /// Behind an HTTP service.
    Http(Box<Http>),
}

/// Why nobody asks a table.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// This program cannot: it was built without what is needed.
    #[error("this program was built without {what}: build it with --features {feature}")]
    NotBuilt {
        /// What is needed.
        what: &'static str,
        /// What brings it.
        feature: &'static str,
    },
    /// There is no thread for it.
    #[error("the thread that asks the table cannot be started")]
    Thread(#[from] io::Error),
}

impl Table {
    /// Refuses a table that this program cannot ask.
    pub const fn check(&self) -> Result<(), StartError> {
        match self {
            Self::Sqlite(_) if !sqlite::IS_BUILT => {
                Err(StartError::NotBuilt { what: "SQLite", feature: "sqlite" })
            }
            Self::Postgres(_) if !postgres::IS_BUILT => {
                Err(StartError::NotBuilt { what: "PostgreSQL", feature: "postgres" })
            }
            Self::Sqlite(_) | Self::Postgres(_) | Self::Http(_) => Ok(()),
        }
    }

    /// Starts whoever asks it.
    pub fn start(self, name: &str, limits: Limits) -> Result<Lookup, StartError> {
        self.check()?;
        Ok(match self {
            #[cfg(feature = "sqlite")]
            Self::Sqlite(sqlite) => Lookup::start(name, limits, sqlite.source())?,
            #[cfg(feature = "postgres")]
            Self::Postgres(postgres) => Lookup::start(name, limits, postgres.source())?,
            Self::Http(http) => Lookup::start(name, limits, http.source())?,
            #[cfg(not(feature = "sqlite"))]
            Self::Sqlite(_) => unreachable!("check has refused it"),
            #[cfg(not(feature = "postgres"))]
            Self::Postgres(_) => unreachable!("check has refused it"),
        })
    }

    /// Says whether both are the same, so that what the one has said the other says too.
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sqlite(one), Self::Sqlite(other)) => one == other,
            (Self::Postgres(one), Self::Postgres(other)) => one.is(other),
            (Self::Http(one), Self::Http(other)) => one.is(other),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_built_in_is_refused_with_what_would_bring_it() {
        let sqlite = Table::Sqlite(Sqlite { file: "shops.db".into(), query: "select 1".into() });
        match (sqlite::IS_BUILT, sqlite.start("shops", Limits::default())) {
            (true, Ok(_)) => {}
            (false, Err(error)) => assert_eq!(
                error.to_string(),
                "this program was built without SQLite: build it with --features sqlite"
            ),
            (is_built, started) => panic!("{is_built}: {started:?}"),
        }
    }
}

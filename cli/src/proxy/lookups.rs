//! The section `lookups` of a proxy's file: the tables through which keys are translated.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use mandoline_proxy::config::timeouts::TIMEOUT_MAX;
use mandoline_proxy::config::transport::Endpoint;
use mandoline_proxy::lookup::Limits;
use mandoline_proxy::tables::Table;
use mandoline_proxy::tables::http::{Http, Pointer, Url};
use mandoline_proxy::tables::postgres::Postgres;
use mandoline_proxy::tables::secret::Secret;
use mandoline_proxy::tables::sqlite::Sqlite;
use serde::Deserialize;

use crate::failure::Failure;
use crate::file;
use crate::proxy::file::job::TaskTlsFile;
use crate::text::Text;
use crate::units::{Size, Span};

/// What a lookup is called: in a route, in metrics, and in the path by which it is told to forget.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LookupName(pub(crate) Box<str>);

impl FromStr for LookupName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if (1..=NAME_MAX_BYTES).contains(&text.len()) && text.bytes().all(allowed) {
            return Ok(Self(text.into()));
        }
        Err(format!(
            "{text:?} is no name for a lookup: give 1 to {NAME_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_' and '.'"
        ))
    }
}

const NAME_MAX_BYTES: usize = 63;

/// A table, and how its answers are kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LookupFile {
    sqlite: Option<SqliteFile>,
    postgres: Option<PostgresFile>,
    http: Option<HttpFile>,
    ttl: Option<Span>,
    negative_ttl: Option<Span>,
    stale: Option<Span>,
    timeout: Option<Span>,
    cache_bytes: Option<Size>,
}

/// A table in a file of SQLite.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SqliteFile {
    file: PathBuf,
    query: String,
}

/// A table in PostgreSQL.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PostgresFile {
    address: Text<Endpoint>,
    tls: Option<TaskTlsFile>,
    user: String,
    password_file: Option<PathBuf>,
    database: String,
    query: String,
    listen: Option<String>,
}

/// A table behind an HTTP service.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpFile {
    url: Text<Url>,
    field: Option<Text<Pointer>>,
    tls: Option<TaskTlsFile>,
}

impl LookupFile {
    /// Says where the table is. Files are looked for beside the configuration's.
    pub(crate) fn table(&self, beside: &Path) -> Result<Table, Failure> {
        match (&self.sqlite, &self.postgres, &self.http) {
            (Some(SqliteFile { file, query }), None, None) => {
                Ok(Table::Sqlite(Sqlite { file: beside.join(file), query: query.clone() }))
            }
            (None, Some(postgres), None) => postgres.table(beside),
            (None, None, Some(HttpFile { url: Text(url), field, tls })) => {
                let tls = tls.as_ref().map(|tls| tls.tls(beside)).transpose()?;
                let field = field.clone().map(|Text(field)| field);
                let http = Http::new(url.clone(), field, tls).map_err(Failure::new)?;
                Ok(Table::Http(Box::new(http)))
            }
            _ => Err(Failure::new("a lookup has one table: give sqlite, postgres or http")),
        }
    }

    /// Says how its answers are kept.
    pub(crate) fn limits(&self) -> Result<Limits, Failure> {
        let mut limits = Limits::default();
        for (name, given, least, place) in [
            ("ttl", self.ttl, Duration::ZERO, &mut limits.ttl),
            ("negative_ttl", self.negative_ttl, Duration::ZERO, &mut limits.negative_ttl),
            ("stale", self.stale, Duration::ZERO, &mut limits.stale),
            ("timeout", self.timeout, Duration::from_millis(1), &mut limits.within),
        ] {
            let Some(Span(length)) = given else { continue };
            if !(least..=TIMEOUT_MAX).contains(&length) {
                return Err(Failure::new(format!("{name} is {length:?}: give {least:?} to 24h")));
            }
            *place = length;
        }
        if let Some(Size(bytes)) = self.cache_bytes {
            limits.cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        if limits.cache_bytes < CACHE_MIN_BYTES {
            return Err(Failure::new(
                "cache_bytes is too little for the longest key: give at least 64KiB",
            ));
        }
        Ok(limits)
    }
}

/// Room for a few of the longest keys and answers.
const CACHE_MIN_BYTES: usize = 64 << 10;

impl PostgresFile {
    fn table(&self, beside: &Path) -> Result<Table, Failure> {
        let Text(endpoint) = self.address.clone();
        let tls = self.tls.as_ref().map(|tls| tls.tls(beside)).transpose()?;
        let password = match &self.password_file {
            None => None,
            // Editors end a file with a line's end, which no password means.
            Some(path) => Some(Secret(file::read_text(&beside.join(path))?.trim_end().to_owned())),
        };
        let texts = [("user", Some(&self.user)), ("database", Some(&self.database))];
        let others = [("query", Some(&self.query)), ("listen", self.listen.as_ref())];
        for (name, text) in texts.into_iter().chain(others) {
            if text.is_some_and(|text| text.is_empty() || text.contains('\0')) {
                return Err(Failure::new(format!("{name} is empty, or has a zero byte in it")));
            }
        }
        let (user, database) = (self.user.clone(), self.database.clone());
        let (query, listen) = (self.query.clone(), self.listen.clone());
        let postgres = Postgres { endpoint, tls, user, password, database, query, listen };
        Ok(Table::Postgres(Box::new(postgres)))
    }
}

//! A table in a file of SQLite. Another process may write it at any time: what was kept is then forgotten.

use std::path::PathBuf;

#[cfg(feature = "sqlite")]
use crate::lookup::Source;

/// Whether files of SQLite can be read here.
pub(super) const IS_BUILT: bool = cfg!(feature = "sqlite");

/// A table in a file of SQLite. It is opened when it is first asked, and again after each fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sqlite {
    /// The file.
    pub file: PathBuf,
    /// A query with one parameter (the key) and one column, such as `select shard from shops where domain = ?1`.
    pub query: String,
}

#[cfg(feature = "sqlite")]
mod reader;

#[cfg(feature = "sqlite")]
impl Sqlite {
    pub(super) fn source(self) -> impl Source {
        reader::Reader::new(self)
    }
}

//! How tasks and servers are spoken to, as the file has it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mandoline_proxy::config::tls::{Tls as TaskTls, TlsFiles};
use mandoline_proxy::config::transport::{Protocol, Transport};
use serde::Deserialize;

use crate::failure::Failure;
use crate::text::Text;

/// What is different for one job.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct JobFile {
    /// Where its last assignment is kept.
    pub(crate) cache: Option<PathBuf>,
    protocol: Option<Text<Protocol>>,
    tls: Option<TaskTlsFile>,
}

impl JobFile {
    /// Reads how its tasks are spoken to. Files are looked for beside the configuration's.
    pub(crate) fn transport(&self, beside: &Path) -> Result<Transport, Failure> {
        transport(self.protocol.as_ref(), self.tls.as_ref(), beside)
    }
}

/// Reads how tasks, or servers, are spoken to.
pub(crate) fn transport(
    protocol: Option<&Text<Protocol>>,
    tls: Option<&TaskTlsFile>,
    beside: &Path,
) -> Result<Transport, Failure> {
    let protocol = protocol.map_or(Protocol::Auto, |Text(protocol)| *protocol);
    Ok(Transport { protocol, tls: tls.map(|tls| tls.tls(beside)).transpose()? })
}

/// TLS towards tasks and servers.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct TaskTlsFile {
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    name: Option<String>,
}

impl TaskTlsFile {
    pub(crate) fn tls(&self, beside: &Path) -> Result<Arc<TaskTls>, Failure> {
        let identity = match (&self.cert, &self.key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((beside.join(cert), beside.join(key))),
            _ => {
                return Err(Failure::new("a certificate and its key belong together")
                    .try_this("give both cert and key, or neither"));
            }
        };
        let authorities = beside.join(&self.ca);
        let files = TlsFiles { authorities, identity, name: self.name.clone() };
        let failed = |error| Failure::new("TLS towards tasks cannot be set up").because(error);
        Ok(Arc::new(TaskTls::load(files).map_err(failed)?))
    }
}

//! The end of clients' TLS connections: what the files say, in force until they say something else that works.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tracing::{error, info};

use crate::config::listener::{Address, Listener, Tls};
use crate::look::Look;
use crate::metrics::stats::TlsStats;
use crate::tls::certificates::{TlsError, load, now};
use crate::tls::der::{self, Name};

/// The end of a listener's TLS connections.
pub(crate) struct Terminator {
    tls: Tls,
    http2: bool,
    address: Address,
    config: ArcSwap<ServerConfig>,
    // What the files were when they were last looked at, and what came of it.
    state: Mutex<State>,
}

struct State {
    looks: Vec<Option<Look>>,
    stats: TlsStats,
}

impl Terminator {
    /// Reads the files, which must be good; nothing if the listener is a clear one.
    pub(crate) fn new(listener: &Listener) -> Result<Option<Self>, TlsError> {
        let Some(tls) = listener.tls.clone() else { return Ok(None) };
        let (http2, address) = (listener.http2.is_some(), listener.address.clone());
        // Looked at first: a change in between is seen as one later.
        let looks = looks(&tls);
        let loaded = load(&tls, http2, now())?;
        let stats = TlsStats {
            address: address.to_string(),
            valid_until: loaded.valid_until,
            ..TlsStats::default()
        };
        let state = Mutex::new(State { looks, stats });
        Ok(Some(Self { tls, http2, address, config: ArcSwap::new(loaded.config), state }))
    }

    /// Gives what is in force.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    /// Looks at the files, and brings them into force if they have changed and work. Otherwise all stays as it was.
    pub(crate) fn look(&self) {
        let looks = looks(&self.tls);
        let mut state = self.lock();
        if state.looks == looks {
            return;
        }
        state.looks = looks;
        let address = &self.address;
        match load(&self.tls, self.http2, now()) {
            Ok(loaded) => {
                self.config.store(loaded.config);
                state.stats.valid_until = loaded.valid_until;
                state.stats.taken += 1;
                state.stats.last_refused = false;
                info!(%address, "Certificates were read again");
            }
            Err(error) => {
                state.stats.refused += 1;
                state.stats.last_refused = true;
                error!(%address, %error, "Certificates stay as they were");
            }
        }
    }

    pub(crate) fn stats(&self) -> TlsStats {
        self.lock().stats.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn looks(tls: &Tls) -> Vec<Option<Look>> {
    let pairs = tls.certificates.iter().flat_map(|files| [&files.chain, &files.key]);
    let files: Vec<&PathBuf> = pairs.chain(tls.clients.authorities()).collect();
    files.into_iter().map(|path| Look::at(path)).collect()
}

/// Who a client is, by the certificate that it showed and an authority vouched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Such as `CN=shop, O=Example`.
    pub(crate) subject: Box<str>,
    // Such as `URI:spiffe://example.org/shop` and `DNS:shop.example.org`.
    names: Box<[Box<str>]>,
}

impl Identity {
    /// Reads a certificate that was verified.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let read = der::read(certificate)?;
        let name = |name: &Name| match name {
            Name::Dns(name) => format!("DNS:{name}").into(),
            Name::Uri(name) => format!("URI:{name}").into(),
            Name::Mail(name) => format!("email:{name}").into(),
            Name::Ip(address) => format!("IP:{address}").into(),
        };
        Some(Self { subject: read.subject.into(), names: read.names.iter().map(name).collect() })
    }

    /// Gives all its names, one after the other.
    pub(crate) fn names(&self) -> String {
        self.names.join(", ")
    }
}

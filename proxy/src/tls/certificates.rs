//! A listener's certificates, as files say: read and checked as a whole, so that what is in force is always something that works.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};

use crate::config::listener::{CertificateFiles, ClientCertificates, Listener, Tls};
use crate::tls::der::{self, Name};

/// Files cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read", .0.display())]
    Unread(PathBuf, #[source] io::Error),
    /// A file is no PEM, or only part of it.
    #[error("{path} is no PEM, or was not written to its end: {1}", path = .0.display())]
    NoPem(PathBuf, String),
    /// A file has no certificate.
    #[error("{} holds no certificate: give one in PEM", .0.display())]
    NoCertificate(PathBuf),
    /// A file has something that only looks like a certificate.
    #[error("{path} holds a certificate that cannot be used: {1}", path = .0.display())]
    BadCertificate(PathBuf, String),
    /// A file has no private key.
    #[error("{} holds no private key: give one in PEM, without a password", .0.display())]
    NoKey(PathBuf),
    /// A file has a key of a kind that is not known.
    #[error("{path} holds a private key that cannot be used: {1}", path = .0.display())]
    BadKey(PathBuf, String),
    /// The key belongs to another certificate.
    #[error(
        "the key in {} does not belong to the certificate in {}: give both of one certificate, which are perhaps half replaced",
        key.display(), chain.display()
    )]
    Mismatch {
        /// Where the certificate is.
        chain: PathBuf,
        /// Where the key is.
        key: PathBuf,
    },
    /// The certificate is not valid any more.
    #[error("the certificate in {path} has expired {1} s ago: renew it", path = .0.display())]
    Expired(PathBuf, i64),
    /// The certificate is not valid yet.
    #[error("the certificate in {path} is not valid before {1} s from now: look at the clock, or wait", path = .0.display())]
    NotYetValid(PathBuf, i64),
    /// The authorities cannot vouch for anyone.
    #[error("the authorities in {path} cannot be used: {1}", path = .0.display())]
    BadAuthorities(PathBuf, String),
}

/// Says whether the files of a listener can be used, and why not.
pub fn check(listener: &Listener) -> Result<(), TlsError> {
    match &listener.tls {
        None => Ok(()),
        Some(tls) => load(tls, listener.http2.is_some(), now()).map(drop),
    }
}

/// What the files make.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) config: Arc<ServerConfig>,
    /// Where each certificate is, and until when it is valid, in seconds since 1970.
    pub(crate) valid_until: Vec<(PathBuf, i64)>,
}

pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Reads the files of a listener.
pub(crate) fn load(tls: &Tls, http2: bool, now: i64) -> Result<Loaded, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let (mut by_name, mut valid_until) = (ByName::default(), Vec::new());
    for files in &tls.certificates {
        let (key, certificate) = certified(files, &provider)?;
        let (chain, until) = (files.chain.clone(), certificate.not_after);
        if until < now {
            return Err(TlsError::Expired(chain, now - until));
        }
        if certificate.not_before > now {
            return Err(TlsError::NotYetValid(chain, certificate.not_before - now));
        }
        by_name.add(&Arc::new(key), &certificate.names);
        valid_until.push((chain, until));
    }
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("the provider has both versions");
    let builder = match tls.clients.authorities() {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let bad =
                |error: &dyn ToString| TlsError::BadAuthorities(path.clone(), error.to_string());
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(|error| bad(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = match tls.clients {
                ClientCertificates::Required { .. } => verifier,
                _ => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| bad(&error))?)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(by_name));
    config.alpn_protocols = if http2 { vec![H2.into(), H1.into()] } else { vec![H1.into()] };
    // Its keys change every six hours. A new one with each change of the files, so that no session outlives the authority that
    // vouched for its client.
    if let Ok(ticketer) = rustls::crypto::ring::Ticketer::new() {
        config.ticketer = ticketer;
    }
    Ok(Loaded { config: Arc::new(config), valid_until })
}

/// What HTTP/2 and HTTP/1.1 are called in ALPN.
pub(crate) const H2: &[u8] = b"h2";
const H1: &[u8] = b"http/1.1";

fn certified(
    files: &CertificateFiles,
    provider: &CryptoProvider,
) -> Result<(CertifiedKey, der::Certificate), TlsError> {
    let CertificateFiles { chain, key } = files;
    let certificates = certificates(chain)?;
    let bad = |what: String| TlsError::BadCertificate(chain.clone(), what);
    let first = der::read(&certificates[0]).ok_or_else(|| bad("it cannot be read".to_owned()))?;
    let key_der = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::NoKey(key.clone()),
        error => TlsError::NoPem(key.clone(), error.to_string()),
    })?;
    let signing = provider
        .key_provider
        .load_private_key(key_der)
        .map_err(|error| TlsError::BadKey(key.clone(), error.to_string()))?;
    let certified = CertifiedKey::new(certificates, signing);
    match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {
            Ok((certified, first))
        }
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(TlsError::Mismatch { chain: chain.clone(), key: key.clone() })
        }
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Gives the certificates in a file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let all = all.map_err(|error| TlsError::NoPem(path.to_owned(), error.to_string()))?;
    if all.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(all) }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| TlsError::Unread(path.to_owned(), error))
}

/// Certificates by the names that clients ask for.
#[derive(Debug, Default)]
struct ByName {
    exact: BTreeMap<String, Arc<CertifiedKey>>,
    /// What stands behind `*.`: one label may stand before it.
    wildcards: BTreeMap<String, Arc<CertifiedKey>>,
    first: Option<Arc<CertifiedKey>>,
}

impl ByName {
    fn add(&mut self, key: &Arc<CertifiedKey>, names: &[Name]) {
        self.first.get_or_insert_with(|| Arc::clone(key));
        for name in names {
            let Name::Dns(name) = name else { continue };
            let (map, name) = match name.strip_prefix("*.") {
                Some(rest) => (&mut self.wildcards, rest),
                None => (&mut self.exact, name.as_str()),
            };
            map.entry(name.to_owned()).or_insert_with(|| Arc::clone(key));
        }
    }

    fn find(&self, name: Option<&str>) -> Option<&Arc<CertifiedKey>> {
        let name = name.map(|name| name.trim_end_matches('.').to_ascii_lowercase());
        let named = name.as_deref().and_then(|name| {
            let wildcard = || self.wildcards.get(name.split_once('.')?.1);
            self.exact.get(name).or_else(wildcard)
        });
        named.or(self.first.as_ref())
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(hello.server_name()).cloned()
    }
}

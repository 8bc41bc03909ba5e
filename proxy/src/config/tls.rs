//! TLS towards tasks and servers: whom to believe, who the proxy says that it is, and which name the other side must have.
//!
//! The files are read when the configuration is, so a bad or half-written one refuses the configuration and the one before stays in
//! force; a reload reads them again.

use std::fmt;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName, pem};
use rustls::{ClientConfig, RootCertStore, crypto};

use crate::seldom::Seldom;

/// Where the files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of those who may vouch for the other side (PEM). There is no default: services have authorities of their own, and
    /// whom the public Web believes is no answer to who may be a task.
    pub authorities: PathBuf,
    /// The proxy's own certificate with those up to its root, and its key (PEM), where the other side asks who calls.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the other side's certificate must have; the host of its address unless set.
    pub name: Option<String>,
}

/// TLS towards tasks and servers, ready to use.
pub struct Tls {
    files: TlsFiles,
    // Of what the files held, to know them again.
    print: u64,
    /// By what both sides may choose: HTTP/1.1, HTTP/2, and either.
    pub(crate) http1: Arc<ClientConfig>,
    pub(crate) http2: Arc<ClientConfig>,
    pub(crate) either: Arc<ClientConfig>,
    pub(crate) name: Option<ServerName<'static>>,
    /// The proxy's own certificate, and when to write again that it is of no use.
    pub(crate) own: Option<CertificateDer<'static>>,
    pub(crate) complaints: Seldom,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("{} cannot be read", .path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no {what} in PEM form: it is another file, or was only half written", .path.display())]
    Empty {
        /// Which one.
        path: PathBuf,
        /// Certificates, or a key.
        what: &'static str,
    },
    /// A file is not well formed.
    #[error("{} is no PEM", .path.display())]
    Pem {
        /// Which one.
        path: PathBuf,
        /// Where it stops being it.
        #[source]
        source: pem::Error,
    },
    /// A certificate is of no use, or does not belong to its key.
    #[error("{} cannot be used", .path.display())]
    Unusable {
        /// The file that it is in.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
    /// The name that was set is none.
    #[error("{name:?} is no name that a certificate could have: give a host name or an IP address")]
    Name {
        /// What was set.
        name: String,
        /// Why not.
        #[source]
        source: InvalidDnsNameError,
    },
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let print = print(&files)?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.authorities)? {
            let unusable = |source| TlsError::Unusable { path: files.authorities.clone(), source };
            roots.add(certificate).map_err(unusable)?;
        }
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|source| TlsError::Unusable { path: files.authorities.clone(), source })?
            .with_root_certificates(roots);
        let (config, own) = match &files.identity {
            None => (builder.with_no_client_auth(), None),
            Some((path, key)) => {
                let chain = certificates(path)?;
                let own = chain.first().cloned();
                let config = builder.with_client_auth_cert(chain, private_key(key)?);
                let unusable = |source| TlsError::Unusable { path: path.clone(), source };
                (config.map_err(unusable)?, own)
            }
        };
        let name = match &files.name {
            None => None,
            Some(name) => {
                let bad = |source| TlsError::Name { name: name.clone(), source };
                Some(ServerName::try_from(name.clone()).map_err(bad)?)
            }
        };
        let with = |protocols: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            Arc::new(config)
        };
        let (http1, http2) = (with(&[b"http/1.1"]), with(&[b"h2"]));
        let either = with(&[b"h2", b"http/1.1"]);
        let complaints = Seldom::default();
        Ok(Self { http1, http2, either, files, print, name, own, complaints })
    }

    /// Says whether connections that were opened by the one suit the other: the files were the same, and have not changed.
    pub fn is(&self, other: &Self) -> bool {
        self.files == other.files && self.print == other.print
    }

    /// Says where it was read from.
    pub const fn files(&self) -> &TlsFiles {
        &self.files
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.files).finish()
    }
}

fn print(files: &TlsFiles) -> Result<u64, TlsError> {
    let mut hasher = DefaultHasher::new();
    read(&files.authorities)?.hash(&mut hasher);
    for path in files.identity.iter().flat_map(|(chain, key)| [chain, key]) {
        read(path)?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let bad = |source| TlsError::Pem { path: path.to_owned(), source };
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let all = all.map_err(bad)?;
    if all.is_empty() {
        return Err(TlsError::Empty { path: path.to_owned(), what: "certificate" });
    }
    Ok(all)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|source| match source {
        pem::Error::NoItemsFound => TlsError::Empty { path: path.to_owned(), what: "private key" },
        source => TlsError::Pem { path: path.to_owned(), source },
    })
}

//! Where requests come in, as the file has it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use mandoline_proxy::config::listener::{
    Address, CertificateFiles, ClientCertificates, Http2, Listener, Tls,
};
use mandoline_proxy::config::network::Network;
use serde::Deserialize;

use crate::text::{Text, plain};

/// Where requests come in, and what is spoken there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListenerFile {
    address: Text<Address>,
    mode: Option<Text<Mode>>,
    tls: Option<TlsFile>,
    #[serde(default)]
    proxy_protocol: Vec<Text<Network>>,
    http2: Option<bool>,
    http2_streams: Option<u32>,
}

/// How a listener's connections are encrypted.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsFile {
    certificates: Vec<CertificateFile>,
    clients: Option<ClientsFile>,
}

/// A certificate and its key.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CertificateFile {
    chain: PathBuf,
    key: PathBuf,
}

/// The certificates that clients show.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientsFile {
    authorities: PathBuf,
    required: Option<bool>,
}

/// The permissions of a file, in octal.
#[derive(Clone, Copy, Debug)]
struct Mode(u32);

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('0').unwrap_or(text);
        let plain = digits.len() == 3 && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
        let mode = u32::from_str_radix(digits, 8).ok().filter(|_| plain);
        mode.map(Self).ok_or_else(|| format!("{text:?} are no permissions: give such as '0660'"))
    }
}

impl ListenerFile {
    /// Makes the listener. Files are looked for beside the configuration's.
    pub(crate) fn listener(&self, beside: &Path) -> Listener {
        let Text(mut address) = self.address.clone();
        if let (Address::Unix { mode, .. }, Some(Text(Mode(given)))) = (&mut address, &self.mode) {
            *mode = *given;
        }
        let mut http2 = self.http2.unwrap_or(true).then(Http2::default);
        if let (Some(http2), Some(streams)) = (&mut http2, self.http2_streams) {
            http2.streams = streams;
        }
        let tls = self.tls.as_ref().map(|tls| tls.tls(beside));
        let proxy_protocol = plain(self.proxy_protocol.clone());
        Listener { tls, proxy_protocol, http2, ..Listener::new(address) }
    }
}

impl TlsFile {
    fn tls(&self, beside: &Path) -> Tls {
        let files = self.certificates.iter().map(|certificate| CertificateFiles {
            chain: beside.join(&certificate.chain),
            key: beside.join(&certificate.key),
        });
        let clients = match &self.clients {
            None => ClientCertificates::Off,
            Some(ClientsFile { authorities, required }) => {
                let authorities = beside.join(authorities);
                match required.unwrap_or(true) {
                    true => ClientCertificates::Required { authorities },
                    false => ClientCertificates::Optional { authorities },
                }
            }
        };
        Tls { certificates: files.collect(), clients }
    }
}

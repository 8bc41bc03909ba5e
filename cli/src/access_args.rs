//! Who may speak with whom, as flags, environment and files say it: certificates, the token, and the word that none is
//! wanted. The token itself comes from a file or `MANDOLINE_TOKEN` and never stands on a command line, where `ps` shows it.

use std::path::{Path, PathBuf};

use mandoline_assigner::config::{Access, Tls, Token};
use serde::Deserialize;

use crate::failure::Failure;
use crate::text::overlay;

/// Who may speak with whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct AccessArgs {
    /// This node's certificate, PEM
    #[arg(long, env = "MANDOLINE_TLS_CERT", value_name = "FILE", help_heading = "Access")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's key, PEM
    #[arg(long, env = "MANDOLINE_TLS_KEY", value_name = "FILE", help_heading = "Access")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The authority that vouches for the other side, PEM; with it, calls use TLS
    #[arg(long, env = "MANDOLINE_TLS_CA", value_name = "FILE", help_heading = "Access")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// The token that calls show, from a file; MANDOLINE_TOKEN holds it itself
    #[arg(long, env = "MANDOLINE_TOKEN_FILE", value_name = "FILE", help_heading = "Access")]
    pub(crate) token_file: Option<PathBuf>,
    /// Plain text and no token are fine on any address: for networks that nobody else is on
    #[arg(
        long,
        env = "MANDOLINE_INSECURE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Access"
    )]
    pub(crate) insecure: Option<bool>,
}

impl AccessArgs {
    /// Fills what was not given from a file.
    pub(crate) fn overlay(&mut self, file: Self) {
        overlay!(self, file; tls_cert, tls_key, tls_ca, token_file, insecure);
    }

    /// Reads the files.
    pub(crate) fn load(&self) -> Result<Access, Failure> {
        let token = match (&self.token_file, std::env::var("MANDOLINE_TOKEN")) {
            (Some(path), _) => {
                let text = String::from_utf8(read(path)?)
                    .map_err(|_| Failure::new(format!("{} is no text", path.display())))?;
                Some((path.display().to_string(), text))
            }
            (None, Ok(text)) if !text.is_empty() => Some(("MANDOLINE_TOKEN".to_owned(), text)),
            (None, _) => None,
        };
        let token = token
            .map(|(from, text)| {
                Token::new(&text).map_err(|error| Failure::new(format!("{from}: {error}")))
            })
            .transpose()?;
        let tls = match (&self.tls_cert, &self.tls_key, &self.tls_ca) {
            (None, None, None) => None,
            // A caller needs to know the authority and nothing else.
            (None, None, Some(authority)) => {
                Some(Tls { certificate: vec![], key: vec![], authority: read(authority)? })
            }
            (Some(certificate), Some(key), Some(authority)) => Some(Tls {
                certificate: read(certificate)?,
                key: read(key)?,
                authority: read(authority)?,
            }),
            _ => {
                return Err(Failure::new("TLS needs three files: --tls-cert, --tls-key, --tls-ca")
                    .because("some of them are given and some are not"));
            }
        };
        Ok(Access { tls, token, insecure: self.insecure == Some(true) })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path)
        .map_err(|error| Failure::new(format!("cannot read {}", path.display())).because(error))
}

//! Whose word is taken for where a request comes from, as the file has it.

use mandoline_proxy::config::forwarded::{Forwarded, Witness};
use mandoline_proxy::config::network::Network;
use serde::Deserialize;

use crate::text::{Text, plain};

/// Whose word is taken for where a request comes from, and how tasks are told.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ForwardedFile {
    trusted: Vec<Text<Network>>,
    headers: Option<Vec<Text<Witness>>>,
    x_forwarded: Option<bool>,
}

impl ForwardedFile {
    pub(crate) fn forwarded(&self) -> Forwarded {
        let usual = Forwarded::default();
        Forwarded {
            trusted: plain(self.trusted.clone()),
            headers: self.headers.clone().map_or(usual.headers, plain),
            x_forwarded: self.x_forwarded.unwrap_or(usual.x_forwarded),
        }
    }
}

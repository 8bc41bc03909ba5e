//! How long to wait, how much to take and what to hold, as the file has it.

use std::path::{Path, PathBuf};

use http::header::{HeaderName, HeaderValue};
use mandoline_proxy::config::limits::Limits;
use mandoline_proxy::config::timeouts::Timeouts;
use mandoline_proxy::config::{Config, Exempt};
use serde::Deserialize;

use crate::failure::Failure;
use crate::units::{Size, Span};

/// How long to wait for what.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TimeoutsFile {
    connect: Option<Span>,
    header: Option<Span>,
    client_idle: Option<Span>,
    response: Option<Span>,
    stall: Option<Span>,
    idle: Option<Span>,
    tunnel: Option<Span>,
    grace: Option<Span>,
}

impl TimeoutsFile {
    /// Changes what is given.
    pub(crate) fn apply(self, to: &mut Timeouts) {
        let Self { connect, header, client_idle, response, stall, idle, tunnel, grace } = self;
        for (given, place) in [
            (connect, &mut to.connect),
            (header, &mut to.header),
            (client_idle, &mut to.client_idle),
            (response, &mut to.response),
            (stall, &mut to.stall),
            (idle, &mut to.idle),
            (tunnel, &mut to.tunnel),
            (grace, &mut to.grace),
        ] {
            if let Some(Span(length)) = given {
                *place = length;
            }
        }
    }
}

/// How much to take at most.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitsFile {
    connections: Option<usize>,
    header_bytes: Option<Size>,
    headers: Option<usize>,
    idle_per_task: Option<usize>,
    replay_bytes: Option<Size>,
    key_bytes: Option<Size>,
    body_bytes: Option<Size>,
    body_rate: Option<Size>,
    tunnels: Option<usize>,
}

impl LimitsFile {
    /// Changes what is given.
    pub(crate) fn apply(self, to: &mut Limits) {
        let Self {
            connections,
            header_bytes,
            headers,
            idle_per_task,
            replay_bytes,
            key_bytes,
            body_bytes,
            body_rate,
            tunnels,
        } = self;
        if let Some(Size(most)) = body_bytes {
            to.body_bytes = most;
        }
        if let Some(Size(least)) = body_rate {
            to.body_rate = least;
        }
        let bytes = |size: Option<Size>| {
            size.map(|Size(bytes)| usize::try_from(bytes).unwrap_or(usize::MAX))
        };
        for (given, place) in [
            (connections, &mut to.connections),
            (bytes(header_bytes), &mut to.header_bytes),
            (headers, &mut to.headers),
            (idle_per_task, &mut to.idle_per_task),
            (bytes(replay_bytes), &mut to.replay_bytes),
            (bytes(key_bytes), &mut to.key_bytes),
            (tunnels, &mut to.tunnels),
        ] {
            if let Some(most) = given {
                *place = most;
            }
        }
    }
}

/// What is held by pauses.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PausesFile {
    /// Where pauses are kept, so that a proxy that starts while nobody answers goes by them.
    pub(crate) cache: Option<PathBuf>,
    wait: Option<Span>,
    requests: Option<usize>,
    bytes: Option<Size>,
    exempt_paths: Option<Vec<String>>,
    exempt_header: Option<ExemptHeaderFile>,
}

/// A header whose secret shows that no pause is to hold the request.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExemptHeaderFile {
    name: String,
    secret_file: PathBuf,
}

impl PausesFile {
    /// Changes what is given. Files are looked for beside the configuration's.
    pub(crate) fn apply(&self, to: &mut Config, beside: &Path) -> Result<(), Failure> {
        if let Some(Span(wait)) = self.wait {
            to.timeouts.pause = wait;
        }
        if let Some(requests) = self.requests {
            to.limits.paused_requests = requests;
        }
        if let Some(Size(bytes)) = self.bytes {
            to.limits.paused_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        let paths = self.exempt_paths.iter().flatten().map(|path| path.as_str().into()).collect();
        to.exempt = Exempt { paths, header: self.exempt_header(beside)? };
        Ok(())
    }

    /// Reads the secret, if requests that show one are exempt.
    fn exempt_header(&self, beside: &Path) -> Result<Option<(HeaderName, HeaderValue)>, Failure> {
        let Some(ExemptHeaderFile { name, secret_file }) = &self.exempt_header else {
            return Ok(None);
        };
        let failure = |what: String| {
            Failure::new(format!("which requests no pause holds cannot be said: {what}"))
        };
        let header = HeaderName::try_from(name.as_str())
            .map_err(|_| failure(format!("{name:?} is no header's name")))?;
        let secret_file = beside.join(secret_file);
        let place = secret_file.display();
        let secret = std::fs::read_to_string(&secret_file).map_err(|error| {
            failure(format!("the secret in {place} cannot be read")).because(error)
        })?;
        let secret = HeaderValue::try_from(secret.trim()).ok().filter(|secret| !secret.is_empty());
        let mut secret = secret
            .ok_or_else(|| failure(format!("the secret in {place} is not a line of text")))?;
        secret.set_sensitive(true);
        Ok(Some((header, secret)))
    }
}

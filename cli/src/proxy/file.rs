//! The sections of a proxy's configuration file that have no flag of their own: routes, jobs, time-outs and limits. What is left out
//! has its default; what is not known is refused, with its line and what was probably meant.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use http::Method;
use http::header::{HeaderName, HeaderValue};
use mandoline::http::key::KeyFrom;
use mandoline_core::name::JobName;
use mandoline_core::spec::Ratio;
use mandoline_proxy::access_log::AccessLog;
use mandoline_proxy::access_log::format::{Field, Format, FormatError};
use mandoline_proxy::access_log::writer::{Output, Writer};
use mandoline_proxy::config::forwarded::{Forwarded, Witness};
use mandoline_proxy::config::headers::{FieldName, HeaderRules, Template};
use mandoline_proxy::config::listener::{
    Address, CertificateFiles, ClientCertificates, Http2, Listener, Tls,
};
use mandoline_proxy::config::matching::{HeaderKey, HostPattern, Match, PathPattern};
use mandoline_proxy::config::network::Network;
use mandoline_proxy::config::route::{Destination, Forwarding, Route};
use mandoline_proxy::config::tls::{Tls as TaskTls, TlsFiles};
use mandoline_proxy::config::transport::{Protocol, Transport};
use mandoline_proxy::config::upgrade::Upgrade;
use mandoline_proxy::config::{Config, DebugHeader, Exempt, Limits, Timeouts};
use mandoline_proxy::trace::{Sink, Traces};
use serde::Deserialize;
use serde_saphyr::Spanned;

use crate::failure::Failure;
use crate::file::closest;
use crate::text::{Text, plain};
use crate::units::{Share, Size, Span};

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

/// Which requests go where.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RouteFile {
    name: Option<String>,
    host: Option<Text<HostPattern>>,
    path: Option<Text<PathPattern>>,
    methods: Option<Vec<Text<Method>>>,
    headers: Option<BTreeMap<String, String>>,
    job: Option<Text<JobName>>,
    key: Option<Text<KeyFrom>>,
    pool: Option<Text<JobName>>,
    lookup: Option<Spanned<String>>,
    protocol: Option<Text<Protocol>>,
    response_timeout: Option<Span>,
    total_timeout: Option<Span>,
    upgrades: Option<Vec<Text<Upgrade>>>,
    body_bytes: Option<Size>,
    request: Option<HeadersFile>,
    response: Option<HeadersFile>,
}

/// What is changed in heads.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HeadersFile {
    remove: Vec<Text<FieldName>>,
    set: BTreeMap<Text<FieldName>, Text<Template>>,
}

impl HeadersFile {
    fn rules(&self) -> HeaderRules {
        let set = self.set.iter().map(|(Text(name), Text(value))| (name.clone(), value.clone()));
        HeaderRules { remove: plain(self.remove.clone()), set: set.collect() }
    }
}

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
    /// Reads how its tasks are spoken to.
    pub(crate) fn transport(&self) -> Result<Transport, Failure> {
        transport(self.protocol.as_ref(), self.tls.as_ref())
    }
}

/// Reads how tasks, or servers, are spoken to.
pub(crate) fn transport(
    protocol: Option<&Text<Protocol>>,
    tls: Option<&TaskTlsFile>,
) -> Result<Transport, Failure> {
    let protocol = protocol.map_or(Protocol::Auto, |Text(protocol)| *protocol);
    Ok(Transport { protocol, tls: tls.map(TaskTlsFile::tls).transpose()? })
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
    pub(crate) fn tls(&self) -> Result<Arc<TaskTls>, Failure> {
        let identity = match (&self.cert, &self.key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            _ => {
                return Err(Failure::new("a certificate and its key belong together")
                    .try_this("give both cert and key, or neither"));
            }
        };
        let files = TlsFiles { authorities: self.ca.clone(), identity, name: self.name.clone() };
        let failed = |error| Failure::new("TLS towards tasks cannot be set up").because(error);
        Ok(Arc::new(TaskTls::load(files).map_err(failed)?))
    }
}

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

/// Which requests are written down, how, and where.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AccessLogFile {
    to: Text<Output>,
    format: Option<Spanned<String>>,
    fields: Option<Vec<Spanned<String>>>,
    share: Option<Share>,
    slow: Option<Span>,
}

/// Which requests are traced, and where their spans go.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TracesFile {
    /// A collector that takes OTLP over gRPC.
    pub(crate) otlp: String,
    share: Option<Share>,
}

/// Whose word is taken for where a request comes from, and how tasks are told.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ForwardedFile {
    trusted: Vec<Text<Network>>,
    headers: Option<Vec<Text<Witness>>>,
    x_forwarded: Option<bool>,
}

/// Who may ask what became of a request, with the request itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DebugFile {
    networks: Vec<Text<Network>>,
    header: Option<Text<HeaderName>>,
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

impl RouteFile {
    /// Makes the route. The text of what it takes is its name unless it has one.
    pub(crate) fn route(&self) -> Result<Route, Failure> {
        let matches = Match {
            host: self.host.clone().map(|Text(host)| host),
            path: self.path.clone().map(|Text(path)| path),
            methods: plain(self.methods.clone().unwrap_or_default()),
            headers: self.headers()?,
        };
        let mut route = Route::new(matches, self.to()?);
        if let Some(name) = &self.name {
            route.name = name.as_str().into();
        }
        route.request = self.request.as_ref().map(HeadersFile::rules).unwrap_or_default();
        route.response = self.response.as_ref().map(HeadersFile::rules).unwrap_or_default();
        route.forwarding = Forwarding {
            protocol: self.protocol.clone().map(|Text(protocol)| protocol),
            response: self.response_timeout.map(|Span(length)| length),
            total: self.total_timeout.map(|Span(length)| length),
            body_bytes: self.body_bytes.map(|Size(bytes)| bytes),
        };
        if let Some(upgrades) = self.upgrades.clone() {
            route.upgrades = plain(upgrades).into();
        }
        Ok(route)
    }

    fn to(&self) -> Result<Destination, Failure> {
        match (self.job.clone(), self.pool.clone(), self.key.clone()) {
            (Some(Text(job)), None, key) => {
                let key = key.map_or_else(|| KeyFrom::path(1), |Text(key)| key);
                Ok(Destination::Job { job, key })
            }
            (None, Some(Text(pool)), None) => Ok(Destination::Pool { pool }),
            (None, Some(_), Some(_)) => {
                Err(Failure::new("this route has a key and leads to a pool")
                    .try_this("leave out the key: every server of a pool serves everything"))
            }
            (Some(_), Some(_), _) => {
                Err(Failure::new("this route leads to a job and to a pool").try_this("choose one"))
            }
            (None, None, _) => Err(Failure::new("this route leads nowhere")
                .try_this("give it a job, and the key if that is not path:1, or a pool")),
        }
    }

    fn headers(&self) -> Result<BTreeMap<HeaderKey, HeaderValue>, Failure> {
        let given = self.headers.iter().flatten();
        given
            .map(|(name, value)| {
                let bad = |what| Failure::new(format!("{name}: {value:?} is no header's {what}"));
                let name = HeaderName::try_from(name.as_str()).map_err(|_| bad("name"))?;
                let value = HeaderValue::try_from(value).map_err(|_| bad("value"))?;
                Ok((HeaderKey(name), value))
            })
            .collect()
    }

    /// Names what translates its key, if anything does.
    pub(crate) const fn lookup(&self) -> Option<&Spanned<String>> {
        self.lookup.as_ref()
    }

    /// Names the job that the route leads to.
    pub(crate) fn job(&self) -> Option<&JobName> {
        self.job.as_ref().map(|Text(job)| job)
    }

    /// Names the pool that the route leads to.
    pub(crate) fn pool(&self) -> Option<&JobName> {
        self.pool.as_ref().map(|Text(pool)| pool)
    }
}

impl AccessLogFile {
    /// Says where the log goes.
    pub(crate) const fn output(&self) -> &Output {
        let Text(output) = &self.to;
        output
    }

    /// Makes the log. `at` says where in the file something is.
    pub(crate) fn access_log(
        &self,
        writer: Writer,
        at: impl Fn(&Spanned<String>) -> String,
    ) -> Result<AccessLog, Failure> {
        let refuse = |error: &FormatError, given: &Spanned<String>| {
            let failure = Failure::new(error).at(at(given));
            let FormatError::Unknown(name) = error else { return failure };
            match closest(name, &Field::names().collect::<Vec<_>>()) {
                Some(meant) => failure.try_this(format!("did you mean {meant:?}?")),
                None => failure,
            }
        };
        let format = match (&self.format, &self.fields) {
            (Some(text), None) if text.value != "json" => {
                text.value.parse().map_err(|error| refuse(&error, text))?
            }
            (_, None) => Format::usual(),
            (None, Some(names)) => self.json(names, refuse)?,
            (Some(text), Some(names)) if text.value == "json" => self.json(names, refuse)?,
            (Some(text), Some(_)) => {
                return Err(Failure::new("fields are for format: json, and this is a template")
                    .at(at(text))
                    .try_this("name the fields in the template, or leave format out"));
            }
        };
        let share = whole("the access log's share", self.share, Ratio::percent(100))?;
        let slow = self.slow.map(|Span(slow)| slow);
        Ok(AccessLog { share, slow, ..AccessLog::new(writer, format) })
    }

    fn json(
        &self,
        names: &[Spanned<String>],
        refuse: impl Fn(&FormatError, &Spanned<String>) -> Failure,
    ) -> Result<Format, Failure> {
        let fields = names
            .iter()
            .map(|name| name.value.parse::<Field>().map_err(|error| refuse(&error, name)));
        Format::json(fields.collect::<Result<_, _>>()?).map_err(Failure::new)
    }
}

/// Gives a share of no more than everything.
fn whole(what: &str, given: Option<Share>, usual: Ratio) -> Result<Ratio, Failure> {
    match given {
        None => Ok(usual),
        Some(Share(share)) if share <= Ratio::percent(100) => Ok(share),
        Some(Share(share)) => Err(Failure::new(format!("{what} is {share}: give at most 100%"))),
    }
}

impl TracesFile {
    /// Makes what goes by them.
    pub(crate) fn traces(&self, sink: Sink) -> Result<Traces, Failure> {
        // Whoever wants all of them can say so.
        Ok(Traces { share: whole("the share of traces", self.share, Ratio::percent(1))?, sink })
    }
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

impl DebugFile {
    pub(crate) fn debug(&self) -> DebugHeader {
        let header = self.header.clone().map_or(DEBUG_HEADER, |Text(name)| name);
        DebugHeader { networks: plain(self.networks.clone()), header }
    }
}

/// What clients ask by, unless another header is set.
const DEBUG_HEADER: HeaderName = HeaderName::from_static("mandoline-explain");

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

impl PausesFile {
    /// Changes what is given.
    pub(crate) fn apply(&self, to: &mut Config) -> Result<(), Failure> {
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
        to.exempt = Exempt { paths, header: self.exempt_header()? };
        Ok(())
    }

    /// Reads the secret, if requests that show one are exempt.
    fn exempt_header(&self) -> Result<Option<(HeaderName, HeaderValue)>, Failure> {
        let Some(ExemptHeaderFile { name, secret_file }) = &self.exempt_header else {
            return Ok(None);
        };
        let failure = |what: String| {
            Failure::new(format!("which requests no pause holds cannot be said: {what}"))
        };
        let header = HeaderName::try_from(name.as_str())
            .map_err(|_| failure(format!("{name:?} is no header's name")))?;
        let place = secret_file.display();
        let secret = std::fs::read_to_string(secret_file).map_err(|error| {
            failure(format!("the secret in {place} cannot be read")).because(error)
        })?;
        let secret = HeaderValue::try_from(secret.trim()).ok().filter(|secret| !secret.is_empty());
        let mut secret = secret
            .ok_or_else(|| failure(format!("the secret in {place} is not a line of text")))?;
        secret.set_sensitive(true);
        Ok(Some((header, secret)))
    }
}

//! Which requests go where, as the file has it.

use std::collections::BTreeMap;

use http::Method;
use http::header::{HeaderName, HeaderValue};
use mandoline::http::key::KeyFrom;
use mandoline_core::name::JobName;
use mandoline_proxy::config::headers::{FieldName, HeaderRules, Template};
use mandoline_proxy::config::matching::{HeaderKey, Match};
use mandoline_proxy::config::pattern::{HostPattern, PathPattern};
use mandoline_proxy::config::route::{Destination, Forwarding, Route};
use mandoline_proxy::config::transport::Protocol;
use mandoline_proxy::config::upgrade::Upgrade;
use serde::Deserialize;
use serde_saphyr::Spanned;

use crate::failure::Failure;
use crate::text::{Text, plain};
use crate::units::{Size, Span};

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

//! What is told of requests and to whom, as the file has it.

use http::header::HeaderName;
use mandoline_core::spec::Ratio;
use mandoline_proxy::access_log::AccessLog;
use mandoline_proxy::access_log::field::{Field, FormatError};
use mandoline_proxy::access_log::format::Format;
use mandoline_proxy::access_log::writer::{Output, Writer};
use mandoline_proxy::config::DebugHeader;
use mandoline_proxy::config::network::Network;
use mandoline_proxy::trace::{Sink, Traces};
use serde::Deserialize;
use serde_saphyr::Spanned;

use crate::failure::Failure;
use crate::file::closest;
use crate::text::{Text, plain};
use crate::units::{Share, Span};

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

/// Which requests are traced, and where their spans go.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TracesFile {
    /// A collector that takes OTLP over gRPC.
    pub(crate) otlp: String,
    share: Option<Share>,
}

impl TracesFile {
    /// Makes what goes by them.
    pub(crate) fn traces(&self, sink: Sink) -> Result<Traces, Failure> {
        // Whoever wants all of them can say so.
        Ok(Traces { share: whole("the share of traces", self.share, Ratio::percent(1))?, sink })
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

/// Who may ask what became of a request, with the request itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DebugFile {
    networks: Vec<Text<Network>>,
    header: Option<Text<HeaderName>>,
}

impl DebugFile {
    pub(crate) fn debug(&self) -> DebugHeader {
        let header = self.header.clone().map_or(DEBUG_HEADER, |Text(name)| name);
        DebugHeader { networks: plain(self.networks.clone()), header }
    }
}

/// What clients ask by, unless another header is set.
const DEBUG_HEADER: HeaderName = HeaderName::from_static("mandoline-explain");

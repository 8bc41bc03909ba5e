//! Asking the assigners: each of the list in order, until one answers.

use std::time::Duration;

use mandoline_assigner::access::{MESSAGE_MAX_BYTES, connector};
use mandoline_assigner::api::admin::NOT_LEADER;
use mandoline_core::task::Address;
use mandoline_distributor::connect::{Authorize, Connector};
use mandoline_proto::pb::admin_client::AdminClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::access_args::AccessArgs;
use crate::failure::{Failure, chain};
use crate::text::Text;
use crate::units::Span;

/// Where the assigners are, and how to be let in.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ClientArgs {
    /// Where assigners answer: any of them will do, the others are asked if it does not
    #[arg(
        long,
        env = "MANDOLINE_ASSIGNERS",
        value_name = "HOST:PORT,..",
        value_delimiter = ',',
        default_value = "127.0.0.1:7400"
    )]
    pub(crate) assigners: Vec<Text<Address>>,
    /// How long to wait for an answer
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    pub(crate) timeout: Span,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
}

/// A connection to whichever assigner answers.
#[derive(Debug)]
pub(crate) struct Client {
    addresses: Vec<Address>,
    connector: Connector,
    timeout: Duration,
}

/// What makes the calls.
pub(crate) type Admin = AdminClient<InterceptedService<Channel, Authorize>>;

impl Client {
    /// Gets ready; nothing is sent yet.
    pub(crate) fn new(args: &ClientArgs) -> Result<Self, Failure> {
        let addresses = args.assigners.iter().map(|Text(address)| address.clone()).collect();
        let connector = connector(&args.access.load()?);
        Ok(Self { addresses, connector, timeout: args.timeout.0 })
    }

    /// Asks these, in plain text.
    pub(crate) fn to(addresses: Vec<Address>, timeout: Duration) -> Self {
        Self { addresses, connector: Connector::default(), timeout }
    }

    /// Asks each assigner in turn until one answers. A refusal is an answer.
    pub(crate) async fn ask<R: Clone, T>(
        &self,
        request: R,
        call: impl AsyncFn(Admin, Request<R>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.first_answer(request, None, call).await
    }

    /// Has something changed. Asks the next assigner only where the one before surely did nothing: the same change twice is
    /// another thing than once. `look` is the command that shows whether it was carried out.
    pub(crate) async fn change<R: Clone, T>(
        &self,
        request: R,
        look: &str,
        call: impl AsyncFn(Admin, Request<R>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.first_answer(request, Some(look), call).await
    }

    async fn first_answer<R: Clone, T>(
        &self,
        request: R,
        look: Option<&str>,
        call: impl AsyncFn(Admin, Request<R>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let mut silent: Vec<String> = vec![];
        // Whether any of them is there, though it could not answer.
        let mut met = false;
        for address in &self.addresses {
            let channel = match self.connect(address).await? {
                Ok(channel) => channel,
                Err(why) => {
                    silent.push(format!("{address}: {why}"));
                    continue;
                }
            };
            let client = AdminClient::with_interceptor(channel, self.connector.authorize())
                .max_decoding_message_size(MESSAGE_MAX_BYTES);
            let mut request = Request::new(request.clone());
            request.set_timeout(self.timeout);
            let answer = tokio::time::timeout(self.timeout, call(client, request)).await;
            let (why, nothing_done) = match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if is_silence(&status) => {
                    // Without a source it came by the wire.
                    met |= std::error::Error::source(&status).is_none();
                    (plain(&status), status.metadata().contains_key(NOT_LEADER))
                }
                Ok(Err(status)) => return Err(refused(address, &status)),
                Err(_) => (format!("no answer within {}", Span(self.timeout)), false),
            };
            let why = format!("{address}: {why}");
            if let Some(look) = look.filter(|_| !nothing_done) {
                return Err(Failure::new("it may have been carried out, or may yet be")
                    .because(why)
                    .try_this(format!("look with `{look}` before you try again")));
            }
            silent.push(why);
        }
        let failure = Failure::new("no assigner could answer").because(silent.join("; "));
        Err(failure.try_this(if met {
            "check that more than half of the assigners run and reach each other (`mandoline cluster status`, or \
             /readyz?verbose of each)"
        } else {
            "start one (`mandoline dev`), say where one is (--assigners HOST:PORT), or by whom it is vouched for if it \
             speaks TLS (--tls-ca FILE)"
        }))
    }

    /// Connects, before anything is sent; gives why not if nobody is there.
    async fn connect(&self, address: &Address) -> Result<Result<Channel, String>, Failure> {
        let endpoint = self
            .connector
            .endpoint(address)
            .map_err(|error| Failure::new(format!("cannot call {address}")).caused_by(&error))?;
        Ok(match tokio::time::timeout(self.timeout, endpoint.connect()).await {
            Ok(connected) => connected.map_err(|error| chain(&error)),
            Err(_) => Err(format!("no connection within {}", Span(self.timeout))),
        })
    }
}

/// Whether nobody answered, so that another node may: what has a source came about on this side of the wire.
fn is_silence(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
        || matches!(status.code(), Code::Unavailable | Code::Unknown | Code::DeadlineExceeded)
}

fn refused(address: &Address, status: &Status) -> Failure {
    match status.code() {
        Code::Unauthenticated => Failure::new(format!("{address} does not let this call in"))
            .because(status.message())
            .try_this("give the cluster's token by --token-file FILE or MANDOLINE_TOKEN"),
        Code::Unimplemented => Failure::new(format!("{address} does not know this call"))
            .because(status.message())
            .try_this("check that an assigner of this version listens there"),
        _ => Failure::new(status.message()),
    }
}

/// What a status says, and the cause at the very bottom: between lie names of layers that no operator knows.
fn plain(status: &Status) -> String {
    let mut cause = std::error::Error::source(status);
    while let Some(below) = cause.and_then(std::error::Error::source) {
        cause = Some(below);
    }
    match cause.map(ToString::to_string) {
        Some(cause) if cause != status.message() => format!("{}: {cause}", status.message()),
        _ => status.message().to_owned(),
    }
}

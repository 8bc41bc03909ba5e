//! How to reach someone who serves: one place for TLS, the join token and the times after which silence is a failure.

use std::fmt;
use std::time::Duration;

use mandoline_core::task::Address;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Error};
use tonic::{Request, Status};

/// How long a connection may take to come about.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may be silent before it is asked whether it is there, and how long the answer may take, unless
/// told: a watch may have nothing to say for hours, and a machine that lost its power says nothing either.
pub const KEEPALIVE: Duration = Duration::from_secs(5);

/// Opens connections. The default is plain text without a token, as on loopback.
#[derive(Clone)]
pub struct Connector {
    tls: Option<ClientTlsConfig>,
    token: Option<MetadataValue<Ascii>>,
    keepalive: Duration,
}

impl Default for Connector {
    fn default() -> Self {
        Self { tls: None, token: None, keepalive: KEEPALIVE }
    }
}

/// A join token held a character that a header cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the join token has a character that a header cannot carry: use visible ASCII")]
pub struct TokenError;

impl Connector {
    /// Speaks TLS.
    #[must_use]
    pub fn with_tls(mut self, tls: ClientTlsConfig) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Says a join token with each call.
    pub fn with_token(mut self, token: &str) -> Result<Self, TokenError> {
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {token}").parse().map_err(|_| TokenError)?;
        value.set_sensitive(true);
        self.token = Some(value);
        Ok(self)
    }

    /// Asks a silent connection so often whether it is there, and gives it up when there is no answer for as long.
    #[must_use]
    pub fn with_keepalive(mut self, keepalive: Duration) -> Self {
        self.keepalive = keepalive;
        self
    }

    /// Describes the connection to an address.
    pub fn endpoint(&self, address: &Address) -> Result<Endpoint, Error> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(self.keepalive)
            .keep_alive_timeout(self.keepalive)
            .keep_alive_while_idle(true);
        match &self.tls {
            Some(tls) => endpoint.tls_config(tls.clone()),
            None => Ok(endpoint),
        }
    }

    /// Opens a connection.
    pub async fn connect(&self, address: &Address) -> Result<Channel, Error> {
        self.endpoint(address)?.connect().await
    }

    /// Gives what adds the token to each call.
    pub fn authorize(&self) -> Authorize {
        Authorize { token: self.token.clone() }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tls, token) = (self.tls.is_some(), self.token.is_some());
        f.debug_struct("Connector").field("tls", &tls).field("token", &token).finish()
    }
}

/// Adds the join token to each call, if there is one.
#[derive(Clone, Debug)]
pub struct Authorize {
    token: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Authorize {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

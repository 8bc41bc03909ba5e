//! How nodes and callers prove who they are: TLS to know the other side, and a token that each call shows. The token is
//! compared in constant time, so that the time of a refusal says nothing about how much of a guess was right.

use std::sync::Arc;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use mandoline_distributor::connect::Connector;
use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig};
use tonic::{Request, Status};

use crate::config::{Access, Tls, Token};
use crate::raft::config::Transport;

/// The largest message that is read; larger things travel in parts.
pub const MESSAGE_MAX_BYTES: usize = 4 << 20;

/// Lets a call in if it shows the token.
#[derive(Clone, Debug)]
pub struct Guard {
    token: Option<Token>,
}

impl Guard {
    /// Asks for the token of `access`, if there is one.
    pub fn new(access: &Access) -> Self {
        Self { token: access.token.clone() }
    }

    /// Lets a plain HTTP request in by the same rule.
    pub(crate) fn admit(&mut self, headers: &HeaderMap) -> Result<(), Status> {
        let mut shown = Request::new(());
        let token = headers.get(AUTHORIZATION).map(|token| (AUTHORIZATION, token.clone()));
        *shown.metadata_mut() = MetadataMap::from_headers(token.into_iter().collect());
        self.call(shown).map(drop)
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(token) = &self.token else { return Ok(request) };
        let Some(shown) = request.metadata().get(HEADER) else {
            return Err(Status::unauthenticated(
                "this cluster asks for a token: give --token-file or MANDOLINE_TOKEN",
            ));
        };
        let shown = shown.as_bytes().strip_prefix(SCHEME.as_bytes()).unwrap_or_default();
        if bool::from(shown.ct_eq(token.expose().as_bytes())) {
            Ok(request)
        } else {
            Err(Status::unauthenticated("the token is not this cluster's"))
        }
    }
}

/// Makes connections that prove who we are, and check who the other side is, as `access` says.
pub fn connector(access: &Access) -> Connector {
    let connector = match &access.tls {
        Some(tls) => Connector::default().with_tls(client_tls(tls)),
        None => Connector::default(),
    };
    match &access.token {
        Some(token) => {
            connector.with_token(token.expose()).expect("a token is made of visible ASCII")
        }
        None => connector,
    }
}

/// Makes what nodes reach each other by.
pub(crate) fn transport(access: &Access) -> Transport {
    let tls = access.tls.as_ref().map(client_tls);
    let endpoint = move |address: &str| match &tls {
        Some(tls) => Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls.clone()),
        None => Endpoint::from_shared(format!("http://{address}")),
    };
    let shown = access.token.as_ref().map(|token| {
        let mut value: MetadataValue<Ascii> = format!("{SCHEME}{}", token.expose())
            .parse()
            .expect("a token is made of visible ASCII");
        value.set_sensitive(true);
        value
    });
    let sign = move |metadata: &mut MetadataMap| {
        if let Some(value) = &shown {
            metadata.insert(HEADER, value.clone());
        }
    };
    Transport { endpoint: Arc::new(endpoint), sign: Arc::new(sign) }
}

fn client_tls(tls: &Tls) -> ClientTlsConfig {
    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.authority))
}

/// Gives the server's side of TLS.
pub(crate) fn server_tls(tls: &Tls) -> ServerTlsConfig {
    ServerTlsConfig::new().identity(Identity::from_pem(&tls.certificate, &tls.key))
}

const HEADER: &str = "authorization";
const SCHEME: &str = "Bearer ";

#[cfg(test)]
mod tests {
    use super::*;

    fn access(token: &str) -> Access {
        Access { token: Some(Token::new(token).unwrap()), ..Access::default() }
    }

    #[test]
    fn a_call_is_let_in_by_the_token_alone() {
        let mut guard = Guard::new(&access("0123456789abcdef"));
        let with =
            |token: &str| connector(&access(token)).authorize().call(Request::new(())).unwrap();
        assert!(guard.call(with("0123456789abcdef")).is_ok());
        for stranger in [with("0123456789abcdeg"), with("0123456789abcdef0"), Request::new(())] {
            let status = guard.call(stranger).unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unauthenticated);
            assert!(!status.message().contains("0123"), "{status}");
        }
        assert!(Guard::new(&Access::default()).call(Request::new(())).is_ok());
    }
}

//! A connection to a server as requests get one, for whoever wants to know whether it is well.

use mandoline_core::task::Address;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::config::tls::Tls;
use crate::pool::dial::{ConnectError, Speech, dial};

/// A server was not reached, or cannot be believed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ProbeError(#[from] ConnectError);

/// Connects to a server, by TLS where that is given; to speak HTTP/2 there if `http2`, and HTTP/1.1 if not.
pub async fn connect(
    server: &Address,
    tls: Option<&Tls>,
    http2: bool,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, ProbeError> {
    let speech = if http2 { Speech::Many } else { Speech::One };
    let (stream, _) = dial(&server.clone().into(), tls, speech).await?;
    Ok(stream)
}

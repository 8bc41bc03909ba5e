//! How to reach the cluster, from what Python gives.

use mandoline::Connector;
use pyo3::PyResult;
use tonic::transport::{Certificate, ClientTlsConfig};

use crate::failure::Failure;

/// Makes connections that show `token`, and trust what `ca` (PEM) has signed.
pub(crate) fn connector(token: Option<&str>, ca: Option<&[u8]>) -> PyResult<Connector> {
    let mut connector = Connector::default();
    if let Some(ca) = ca {
        let authority = Certificate::from_pem(ca);
        connector = connector.with_tls(ClientTlsConfig::new().ca_certificate(authority));
    }
    if let Some(token) = token {
        connector = connector.with_token(token).map_err(|error| Failure::config(&error))?;
    }
    Ok(connector)
}

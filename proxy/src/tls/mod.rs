//! TLS towards clients: which certificate they are shown, which they must show, and how both change while the proxy runs.

pub(crate) mod der;
pub mod certificates;
pub(crate) mod terminator;

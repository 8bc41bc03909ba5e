//! The wire and the disk in one schema language, and the only place where bytes become domain types.
//!
//! `pb` holds what the schemas in `mandoline/v1` say; the other modules turn it into the types of `core` (`TryFrom`, with
//! errors that name the field) and back (`From`). Beyond this crate nobody asks again whether a name is too long.

/// What the schemas say, as generated.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::use_self)]
pub mod pb {
    tonic::include_proto!("mandoline.v1");
}

pub mod error;
pub mod assignment;
pub mod task;
pub mod transfer;
pub mod job;
pub mod update;
pub mod brake;
pub mod flags;
pub mod command;
pub mod state;

#[cfg(test)]
mod tests;

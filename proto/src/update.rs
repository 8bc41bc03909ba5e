//! What a watch says: a full assignment in parts, or a delta.

use bytes::{Bytes, BytesMut};
use mandoline_core::assignment::Assignment;
use mandoline_core::delta::Delta;
use mandoline_core::name::JobName;
use prost::Message;

use crate::assignment::job_name;
use crate::error::{WireError, decode, need};
use crate::pb;
use crate::pb::update::Update as Kind;

/// The most bytes of one part: small beside the 4 MiB that a message may have, so that no stream is blocked for long.
pub const PART_MAX_BYTES: usize = 1 << 20;
/// The most bytes of all parts together: two million slices of 100 bytes, and some air.
pub const FULL_MAX_BYTES: usize = 256 << 20;

/// What a watcher hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Everything.
    Full(Assignment),
    /// The step from one generation to the next.
    Delta(Delta),
    /// The upstream does not know the job yet.
    Unknown(JobName),
}

/// Encodes a full assignment into the messages that carry it, each an encoded `pb::Update`.
pub fn encode_full(assignment: &Assignment) -> Vec<Bytes> {
    parts(assignment).into_iter().map(|part| encode(Kind::Full(part))).collect()
}

/// Cuts a full assignment into the parts that carry it.
pub fn parts(assignment: &Assignment) -> Vec<pb::Part> {
    let whole = Bytes::from(pb::Assignment::from(assignment).encode_to_vec());
    let parts = whole.len().div_ceil(PART_MAX_BYTES).max(1);
    let part = |index: usize| {
        let end = whole.len().min((index + 1) * PART_MAX_BYTES);
        pb::Part { bytes: whole.slice(index * PART_MAX_BYTES..end), last: index + 1 == parts }
    };
    (0..parts).map(part).collect()
}

/// Encodes a delta into the message that carries it.
pub fn encode_delta(delta: &Delta) -> Bytes {
    encode(Kind::Delta(delta.into()))
}

/// Encodes the answer to a watch of a job that is not known.
pub fn encode_unknown(job: &JobName) -> Bytes {
    encode(Kind::Unknown(job.to_string()))
}

fn encode(update: Kind) -> Bytes {
    pb::Update { update: Some(update) }.encode_to_vec().into()
}

/// Puts the parts of full assignments together again. One a stream; parts of a stream that broke are dropped with it.
#[derive(Debug, Default)]
pub struct Assembler {
    parts: BytesMut,
}

impl Assembler {
    /// Takes an encoded message and gives what it completes.
    pub fn take_bytes(&mut self, message: &[u8]) -> Result<Option<Update>, WireError> {
        self.take(decode(message, "update")?)
    }

    /// Takes a message and gives what it completes.
    pub fn take(&mut self, message: pb::Update) -> Result<Option<Update>, WireError> {
        match need(message.update, "update")? {
            Kind::Full(part) => self.take_part(&part),
            Kind::Delta(delta) if self.parts.is_empty() => {
                Ok(Some(Update::Delta(delta.try_into()?)))
            }
            Kind::Delta(_) => {
                Err(WireError::new("update", "a delta came between the parts of a full assignment"))
            }
            Kind::Unknown(job) => Ok(Some(Update::Unknown(job_name(&job)?))),
        }
    }

    fn take_part(&mut self, part: &pb::Part) -> Result<Option<Update>, WireError> {
        if self.parts.len() + part.bytes.len() > FULL_MAX_BYTES {
            return Err(WireError::new(
                "full",
                format!("the assignment is larger than {FULL_MAX_BYTES} bytes"),
            ));
        }
        self.parts.extend_from_slice(&part.bytes);
        if !part.last {
            return Ok(None);
        }
        let whole = std::mem::take(&mut self.parts).freeze();
        let assignment: pb::Assignment = decode(whole, "full")?;
        Ok(Some(Update::Full(assignment.try_into()?)))
    }
}

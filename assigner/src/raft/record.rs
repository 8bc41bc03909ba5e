//! How one record stands on disk: a format version, a kind, a checksum, then `mandoline.v1` bytes.
//!
//! ```text
//! 0        1       2..4   4..12                 12..
//! format   kind    zero   XXH3-64, seed = key   payload
//! ```
//!
//! The checksum covers the first four bytes too, and its seed is the key under which the record is kept: a record that
//! turned up in another's place does not pass for it. redb has checksums of its own; these hold from the moment that
//! the record is encoded until it is decoded, and in `golden/`.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The format that this version writes, and the newest that it reads.
pub(crate) const FORMAT: u8 = 1;
const HEAD_BYTES: usize = 12;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Identity = 1,
    Vote = 2,
    Committed = 3,
    Purged = 4,
    Entry = 5,
    SnapshotHead = 6,
    SnapshotPart = 7,
}

/// Why a record does not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("it has format {found}, and this version knows formats up to {FORMAT}")]
    Newer { found: u8 },
    #[error("{0}")]
    Damaged(String),
}

/// Seals a message under `key`: the index of an entry, the number of a part, zero for the records of which there is one.
pub(crate) fn seal(kind: Kind, key: u64, message: &impl Message) -> Bytes {
    seal_bytes(kind, key, &message.encode_to_vec())
}

/// Seals bytes under `key`.
pub(crate) fn seal_bytes(kind: Kind, key: u64, payload: &[u8]) -> Bytes {
    let start = [FORMAT, kind as u8, 0, 0];
    let mut record = BytesMut::with_capacity(HEAD_BYTES + payload.len());
    record.put_slice(&start);
    record.put_u64_le(checksum(start, key, payload));
    record.put_slice(payload);
    record.freeze()
}

/// Reads the payload of a record that was sealed as `kind` under `key`.
pub(crate) fn open(kind: Kind, key: u64, record: &[u8]) -> Result<&[u8], RecordError> {
    let Some((head, payload)) = record.split_at_checked(HEAD_BYTES) else {
        return Err(RecordError::Damaged(format!(
            "{} bytes, where {HEAD_BYTES} are the least",
            record.len()
        )));
    };
    let start = [head[0], head[1], head[2], head[3]];
    let sum = u64::from_le_bytes(head[4..].try_into().expect("a head is twelve bytes long"));
    // The version comes first, since a newer one may mean anything by the rest.
    if start[0] > FORMAT {
        return Err(RecordError::Newer { found: start[0] });
    }
    if start != [FORMAT, kind as u8, 0, 0] {
        return Err(RecordError::Damaged(format!(
            "it begins {start:02x?}, where {kind:?} was due"
        )));
    }
    if sum != checksum(start, key, payload) {
        return Err(RecordError::Damaged("its checksum does not fit its bytes".to_owned()));
    }
    Ok(payload)
}

/// Reads the message of a record.
pub(crate) fn open_as<M: Message + Default>(
    kind: Kind,
    key: u64,
    record: &[u8],
) -> Result<M, RecordError> {
    M::decode(open(kind, key, record)?).map_err(|error| RecordError::Damaged(error.to_string()))
}

/// The checksum of a whole snapshot.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

fn checksum(start: [u8; 4], key: u64, payload: &[u8]) -> u64 {
    let mut hasher = Xxh3::with_seed(key);
    hasher.update(&start);
    hasher.update(payload);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_under_its_own_key_and_kind_only() {
        let record = seal_bytes(Kind::Entry, 7, b"payload");
        assert_eq!(open(Kind::Entry, 7, &record), Ok(&b"payload"[..]));
        assert!(matches!(open(Kind::Entry, 8, &record), Err(RecordError::Damaged(_))));
        assert!(matches!(open(Kind::Vote, 7, &record), Err(RecordError::Damaged(_))));
    }

    #[test]
    fn every_bit_that_flips_and_every_byte_that_is_missing_is_noticed() {
        let record = seal_bytes(Kind::Entry, 7, b"payload");
        for bit in 0..record.len() * 8 {
            let mut flipped = record.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(Kind::Entry, 7, &flipped).is_err(), "bit {bit}");
        }
        for length in 0..record.len() {
            assert!(open(Kind::Entry, 7, &record[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_newer_format_is_named_as_such() {
        let mut record = seal_bytes(Kind::Entry, 7, b"payload").to_vec();
        record[0] = FORMAT + 1;
        assert_eq!(open(Kind::Entry, 7, &record), Err(RecordError::Newer { found: FORMAT + 1 }));
    }
}

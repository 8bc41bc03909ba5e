//! What two tasks say to each other while a slice's state moves from one to the other.

use std::fmt;

use bytes::Bytes;
use mandoline_core::name::JobName;
use mandoline_core::task::SessionId;
use mandoline_core::transit::HandOffId;

use crate::assignment::{job_name, session};
use crate::error::{WireError, need};
use crate::pb;
use crate::pb::pull_reply::Reply as SayKind;
use crate::pb::pull_request::Request as AskKind;

/// The most bytes of a chunk: small beside the 4 MiB that a message may have, and large beside what a message costs.
pub const CHUNK_MAX_BYTES: usize = 256 * 1024;

/// A side of a transfer: its session, and what its process drew when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Party {
    /// Its life.
    pub session: SessionId,
    /// Its process: another one under the same address is another party.
    pub incarnation: u64,
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {} of process {:016x}", self.session, self.incarnation)
    }
}

/// Which part of a slice's state is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// Everything, while the one that has the slice serves on.
    Bulk,
    /// What has changed since the bulk pass began, when it serves no longer.
    Last,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bulk => "bulk",
            Self::Last => "last",
        })
    }
}

/// A pass that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Everything.
    Bulk,
    /// What has changed since the bulk pass of that attempt.
    Last {
        /// Which attempt, from 1 on.
        after: u32,
    },
}

impl Wanted {
    /// Says which pass it is.
    pub const fn pass(self) -> Pass {
        match self {
            Self::Bulk => Pass::Bulk,
            Self::Last { .. } => Pass::Last,
        }
    }
}

/// How a pull begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// Which job.
    pub job: JobName,
    /// Which hand-off.
    pub hand_off: HandOffId,
    /// Who asks.
    pub puller: Party,
    /// Who is meant to answer.
    pub server: Party,
    /// What is asked for.
    pub wanted: Wanted,
    /// How often the puller has begun from the start: from 1 on.
    pub attempt: u32,
    /// How many bytes of this attempt it has.
    pub offset: u64,
}

/// What a puller says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// First, and once.
    Pull(Pull),
    /// So many bytes are taken in.
    Taken(u64),
    /// All is taken in, and was as the end said.
    Imported,
}

/// What the other side says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Say {
    /// Bytes follow.
    Begun {
        /// Who says so.
        server: Party,
        /// From where on.
        offset: u64,
    },
    /// Some bytes, never none.
    Chunk {
        /// Where they stand.
        offset: u64,
        /// What they are.
        bytes: Bytes,
    },
    /// All bytes were sent.
    End(End),
    /// Nothing more comes.
    Refused(Refusal),
}

/// How a pass ends: nothing is to be believed before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Of which hand-off.
    pub hand_off: HandOffId,
    /// Which pass.
    pub pass: Pass,
    /// How many bytes there were.
    pub length: u64,
    /// XXH3-64, seed 0, of all of them.
    pub checksum: u64,
}

/// Why a pull was refused or broken off by the other side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Which kind.
    pub code: RefusalCode,
    /// What happened, for people.
    pub message: String,
}

/// The kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// The hand-off does not lead to the one that asks.
    NotThePeer,
    /// The one that was asked is not the one that was meant.
    WrongServer,
    /// The hand-off, or its bulk pass, is over.
    Over,
    /// It is too early for this pass.
    NotDue,
    /// The application exports nothing.
    NoExporter,
    /// A last pass without the bulk pass that it would add to.
    NoBulk,
    /// What comes at this offset is not there any more.
    CannotResume,
    /// A newer pull of the same hand-off has taken over.
    Superseded,
    /// The application's export failed.
    ExportFailed,
    /// The application's export panicked.
    ExportPanicked,
    /// The application's export has written nothing for too long.
    ExportStalled,
}

impl From<Party> for pb::Party {
    fn from(party: Party) -> Self {
        Self { session: party.session.0, incarnation: party.incarnation }
    }
}

impl TryFrom<pb::Party> for Party {
    type Error = WireError;

    fn try_from(party: pb::Party) -> Result<Self, WireError> {
        let session = session(party.session, "session")?;
        Ok(Self { session, incarnation: party.incarnation })
    }
}

impl From<Pass> for pb::Pass {
    fn from(pass: Pass) -> Self {
        match pass {
            Pass::Bulk => Self::Bulk,
            Pass::Last => Self::Last,
        }
    }
}

fn pass(pass: pb::Pass) -> Result<Pass, WireError> {
    match pass {
        pb::Pass::Bulk => Ok(Pass::Bulk),
        pb::Pass::Last => Ok(Pass::Last),
        pb::Pass::Unspecified => {
            Err(WireError::new("pass", "is not one of those that this version knows"))
        }
    }
}

impl From<&Pull> for pb::Pull {
    fn from(pull: &Pull) -> Self {
        let after = match pull.wanted {
            Wanted::Bulk => 0,
            Wanted::Last { after } => after,
        };
        Self {
            job: pull.job.to_string(),
            hand_off: Some(pull.hand_off.into()),
            puller: Some(pull.puller.into()),
            server: Some(pull.server.into()),
            pass: pb::Pass::from(pull.wanted.pass()).into(),
            attempt: pull.attempt,
            after,
            offset: pull.offset,
        }
    }
}

impl TryFrom<pb::Pull> for Pull {
    type Error = WireError;

    fn try_from(pull: pb::Pull) -> Result<Self, WireError> {
        let party = |party: Option<pb::Party>, field: &str| {
            Party::try_from(need(party, field)?).map_err(|error| error.within(field))
        };
        let wanted = match (pass(pull.pass())?, pull.after) {
            (Pass::Bulk, 0) => Wanted::Bulk,
            (Pass::Last, after @ 1..) => Wanted::Last { after },
            (Pass::Bulk, _) => return Err(WireError::new("after", "a bulk pass comes first")),
            (Pass::Last, 0) => return Err(WireError::new("after", "is missing")),
        };
        if pull.attempt == 0 {
            return Err(WireError::new("attempt", "is zero: count from 1 on"));
        }
        Ok(Self {
            job: job_name(&pull.job)?,
            hand_off: HandOffId::try_from(need(pull.hand_off, "hand_off")?)
                .map_err(|error| error.within("hand_off"))?,
            puller: party(pull.puller, "puller")?,
            server: party(pull.server, "server")?,
            wanted,
            attempt: pull.attempt,
            offset: pull.offset,
        })
    }
}

impl From<&Ask> for pb::PullRequest {
    fn from(ask: &Ask) -> Self {
        let request = match ask {
            Ask::Pull(pull) => AskKind::Pull(pull.into()),
            Ask::Taken(taken) => AskKind::Taken(*taken),
            Ask::Imported => AskKind::Imported(pb::Imported {}),
        };
        Self { request: Some(request) }
    }
}

impl TryFrom<pb::PullRequest> for Ask {
    type Error = WireError;

    fn try_from(request: pb::PullRequest) -> Result<Self, WireError> {
        Ok(match need(request.request, "request")? {
            AskKind::Pull(pull) => {
                Self::Pull(Pull::try_from(pull).map_err(|error| error.within("pull"))?)
            }
            AskKind::Taken(taken) => Self::Taken(taken),
            AskKind::Imported(pb::Imported {}) => Self::Imported,
        })
    }
}

impl From<Say> for pb::PullReply {
    fn from(say: Say) -> Self {
        let reply = match say {
            Say::Begun { server, offset } => {
                SayKind::Begun(pb::Begun { server: Some(server.into()), offset })
            }
            Say::Chunk { offset, bytes } => SayKind::Chunk(pb::Chunk { offset, bytes }),
            Say::End(end) => SayKind::End(pb::PassEnd {
                hand_off: Some(end.hand_off.into()),
                pass: pb::Pass::from(end.pass).into(),
                length: end.length,
                checksum: end.checksum,
            }),
            Say::Refused(refusal) => SayKind::Refused(pb::PullRefused {
                code: pb::PullRefusedCode::from(refusal.code).into(),
                message: refusal.message,
            }),
        };
        Self { reply: Some(reply) }
    }
}

impl TryFrom<pb::PullReply> for Say {
    type Error = WireError;

    fn try_from(reply: pb::PullReply) -> Result<Self, WireError> {
        Ok(match need(reply.reply, "reply")? {
            SayKind::Begun(begun) => Self::Begun {
                server: Party::try_from(need(begun.server, "server")?)
                    .map_err(|error| error.within("begun.server"))?,
                offset: begun.offset,
            },
            SayKind::Chunk(chunk) => {
                let len = chunk.bytes.len();
                if !(1..=CHUNK_MAX_BYTES).contains(&len) {
                    let problem = format!("has {len} bytes: 1 to {CHUNK_MAX_BYTES} are allowed");
                    return Err(WireError::new("chunk.bytes", problem));
                }
                Self::Chunk { offset: chunk.offset, bytes: chunk.bytes }
            }
            SayKind::End(end) => Self::End(End {
                pass: pass(end.pass()).map_err(|error| error.within("end"))?,
                hand_off: HandOffId::try_from(need(end.hand_off, "hand_off")?)
                    .map_err(|error| error.within("end.hand_off"))?,
                length: end.length,
                checksum: end.checksum,
            }),
            SayKind::Refused(refused) => {
                let code = RefusalCode::try_from(refused.code())?;
                Self::Refused(Refusal { code, message: refused.message })
            }
        })
    }
}

impl From<RefusalCode> for pb::PullRefusedCode {
    fn from(code: RefusalCode) -> Self {
        match code {
            RefusalCode::NotThePeer => Self::NotThePeer,
            RefusalCode::WrongServer => Self::WrongServer,
            RefusalCode::Over => Self::Over,
            RefusalCode::NotDue => Self::NotDue,
            RefusalCode::NoExporter => Self::NoExporter,
            RefusalCode::NoBulk => Self::NoBulk,
            RefusalCode::CannotResume => Self::CannotResume,
            RefusalCode::Superseded => Self::Superseded,
            RefusalCode::ExportFailed => Self::ExportFailed,
            RefusalCode::ExportPanicked => Self::ExportPanicked,
            RefusalCode::ExportStalled => Self::ExportStalled,
        }
    }
}

impl TryFrom<pb::PullRefusedCode> for RefusalCode {
    type Error = WireError;

    fn try_from(code: pb::PullRefusedCode) -> Result<Self, WireError> {
        Ok(match code {
            pb::PullRefusedCode::NotThePeer => Self::NotThePeer,
            pb::PullRefusedCode::WrongServer => Self::WrongServer,
            pb::PullRefusedCode::Over => Self::Over,
            pb::PullRefusedCode::NotDue => Self::NotDue,
            pb::PullRefusedCode::NoExporter => Self::NoExporter,
            pb::PullRefusedCode::NoBulk => Self::NoBulk,
            pb::PullRefusedCode::CannotResume => Self::CannotResume,
            pb::PullRefusedCode::Superseded => Self::Superseded,
            pb::PullRefusedCode::ExportFailed => Self::ExportFailed,
            pb::PullRefusedCode::ExportPanicked => Self::ExportPanicked,
            pb::PullRefusedCode::ExportStalled => Self::ExportStalled,
            pb::PullRefusedCode::Unspecified => {
                let problem = "is not one of those that this version knows";
                return Err(WireError::new("refused.code", problem));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use prost::Message;

    use super::*;
    use crate::error::decode;

    fn id() -> HandOffId {
        HandOffId { began: Generation { incarnation: 1, number: 7 }, first: SliceKey(255) }
    }

    fn party(session: u64) -> Party {
        Party { session: SessionId(session), incarnation: u64::MAX - session }
    }

    fn pull(wanted: Wanted) -> Pull {
        let job = "kv".parse().unwrap();
        let (puller, server) = (party(2), party(1));
        Pull { job, hand_off: id(), puller, server, wanted, attempt: 3, offset: 1 << 40 }
    }

    /// Checks that a message comes back, and that no cut does worse than an error.
    fn survives<M, T>(value: &T, message: &M)
    where
        M: Message + Default,
        T: TryFrom<M, Error = WireError> + PartialEq + fmt::Debug,
    {
        let bytes = message.encode_to_vec();
        assert_eq!(decode::<M>(&*bytes, "it").and_then(T::try_from).as_ref(), Ok(value));
        for cut in 0..bytes.len() {
            drop(decode::<M>(&bytes[..cut], "it").and_then(T::try_from));
        }
        for at in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            drop(decode::<M>(&*flipped, "it").and_then(T::try_from));
        }
    }

    #[test]
    fn everything_said_comes_back() {
        for wanted in [Wanted::Bulk, Wanted::Last { after: 2 }] {
            let ask = Ask::Pull(pull(wanted));
            survives(&ask, &pb::PullRequest::from(&ask));
        }
        for ask in [Ask::Taken(0), Ask::Taken(u64::MAX), Ask::Imported] {
            survives(&ask, &pb::PullRequest::from(&ask));
        }
        let end = End { hand_off: id(), pass: Pass::Last, length: 5, checksum: u64::MAX };
        let mut said = vec![
            Say::Begun { server: party(1), offset: 9 },
            Say::Chunk { offset: 9, bytes: Bytes::from_static(b"state") },
            Say::End(end),
        ];
        let codes = (1..).map_while(|code| pb::PullRefusedCode::try_from(code).ok());
        said.extend(codes.map(|code| {
            let code = RefusalCode::try_from(code).unwrap();
            Say::Refused(Refusal { code, message: "no".to_owned() })
        }));
        assert_eq!(said.len(), 14, "each kind of refusal is known");
        for say in said {
            survives(&say, &pb::PullReply::from(say.clone()));
        }
    }

    #[test]
    fn a_pull_that_makes_no_sense_is_refused_by_field() {
        let bad = |change: fn(&mut pb::Pull)| {
            let mut pull = pb::Pull::from(&pull(Wanted::Last { after: 2 }));
            change(&mut pull);
            Pull::try_from(pull).unwrap_err().to_string()
        };
        assert!(bad(|pull| pull.job.clear()).starts_with("job: the name is empty"));
        assert_eq!(bad(|pull| pull.hand_off = None), "hand_off: is missing");
        let unbegun = |pull: &mut pb::Pull| pull.hand_off = Some(pb::HandOffId::default());
        assert_eq!(bad(unbegun), "hand_off.began: is missing");
        assert_eq!(bad(|pull| pull.puller = None), "puller: is missing");
        let nobody = |pull: &mut pb::Pull| pull.server = Some(pb::Party::default());
        assert_eq!(bad(nobody), "server.session: is zero");
        assert_eq!(bad(|pull| pull.attempt = 0), "attempt: is zero: count from 1 on");
        assert_eq!(bad(|pull| pull.after = 0), "after: is missing");
        let early = |pull: &mut pb::Pull| pull.pass = pb::Pass::Bulk.into();
        assert_eq!(bad(early), "after: a bulk pass comes first");
        let unknown = "pass: is not one of those that this version knows";
        assert_eq!(bad(|pull| pull.pass = 9), unknown);
    }

    #[test]
    fn a_chunk_is_neither_empty_nor_large() {
        for len in [0, CHUNK_MAX_BYTES + 1] {
            let chunk = pb::Chunk { offset: 0, bytes: vec![0; len].into() };
            let reply = pb::PullReply { reply: Some(SayKind::Chunk(chunk)) };
            let problem = Say::try_from(reply).unwrap_err().to_string();
            assert!(problem.starts_with(&format!("chunk.bytes: has {len} bytes")), "{problem}");
        }
    }
}

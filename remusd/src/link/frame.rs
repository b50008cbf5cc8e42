//! The vocabulary of the link. Layouts are in `payload`, the specification in docs/protocol.md.

pub use super::codes::{ErrorCode, GuestState, GuestType, LostReason, OnPrimaryLoss, RefuseCode, Role, StopReason};
use super::token::Token;
use crate::audit::Sample;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    ids::{DomId, Epoch, Generation, Nonce, ProtectionId},
    stream::{Layer, PageBatch, digest::EpochDigest},
};

/// Oldest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 3;
/// Newest protocol version that this build speaks.
pub const VERSION_MAX: u16 = 3;
/// Version under which the frames of a handshake are framed, whatever is agreed later: so that two builds without a common version can
/// still tell each other. Version 1 had no witness and version 2 no `CHALLENGE`; neither was ever released.
pub const VERSION_HANDSHAKE: u16 = 2;

/// Senders cut pages and state so that a frame stays below this, in bytes; a control frame waits for at most one such frame.
pub const CHUNK: usize = 256 * 1024;
/// Most pages in one `PAGES` frame, as in one libxc `PAGE_DATA` record; bounds what zero pages can decode to (4 MiB).
pub const MAX_PAGES_PER_FRAME: usize = 1024;
/// Longest state record in bytes (libxc `REC_LENGTH_MAX`).
pub const MAX_RECORD: usize = 128 * 1024 * 1024;

/// Optional abilities of a side, as bits.
pub mod capability {
    /// Pages may come as `CODED_PAGES`; both sides then remember pages of [`page_cache`](super::page_cache) bytes.
    pub const PAGE_CODEC: u64 = 1;
    /// What this build can.
    pub const OURS: u64 = PAGE_CODEC;
}

/// Most bytes of pages that a session remembers on each side.
const PAGE_CACHE_MAX: u64 = 256 << 20;

/// Bytes of pages that both sides of a session remember for a guest of so much memory: twice that memory (committed pages take at most
/// half), at most 256 MiB. It is taken from the system as pages come.
#[must_use]
pub fn page_cache(max_memory_kib: u64) -> usize {
    usize::try_from(max_memory_kib.saturating_mul(2048).min(PAGE_CACHE_MAX)).unwrap_or(usize::MAX)
}

/// What a frame is, as numbered on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[allow(missing_docs)] // The names are the specification's.
pub enum FrameType {
    Hello = 0x01,
    Welcome = 0x02,
    Refuse = 0x03,
    QueryResult = 0x04,
    Challenge = 0x05,
    ChallengeAnswer = 0x06,
    Config = 0x10,
    Preamble = 0x11,
    EpochBegin = 0x12,
    Pages = 0x13,
    State = 0x14,
    EpochEnd = 0x15,
    Ack = 0x16,
    Audit = 0x17,
    CodedPages = 0x18,
    Heartbeat = 0x20,
    Stop = 0x30,
    Stopped = 0x31,
    BackupLost = 0x32,
    Superseded = 0x33,
    Handover = 0x34,
    HandoverFailed = 0x35,
    Token = 0x36,
    TokenAck = 0x37,
    Error = 0x3f,
}

impl FrameType {
    /// All types, for tables and tests.
    pub const ALL: [Self; 25] = [
        Self::Hello,
        Self::Welcome,
        Self::Refuse,
        Self::QueryResult,
        Self::Challenge,
        Self::ChallengeAnswer,
        Self::Config,
        Self::Preamble,
        Self::EpochBegin,
        Self::Pages,
        Self::State,
        Self::EpochEnd,
        Self::Ack,
        Self::Audit,
        Self::CodedPages,
        Self::Heartbeat,
        Self::Stop,
        Self::Stopped,
        Self::BackupLost,
        Self::Superseded,
        Self::Handover,
        Self::HandoverFailed,
        Self::Token,
        Self::TokenAck,
        Self::Error,
    ];

    /// The type numbered `code`, if there is one.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as u16 == code)
    }

    /// The specification's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "HELLO",
            Self::Welcome => "WELCOME",
            Self::Refuse => "REFUSE",
            Self::QueryResult => "QUERY_RESULT",
            Self::Challenge => "CHALLENGE",
            Self::ChallengeAnswer => "CHALLENGE_ANSWER",
            Self::Config => "CONFIG",
            Self::Preamble => "PREAMBLE",
            Self::EpochBegin => "EPOCH_BEGIN",
            Self::Pages => "PAGES",
            Self::State => "STATE",
            Self::EpochEnd => "EPOCH_END",
            Self::Ack => "ACK",
            Self::Audit => "AUDIT",
            Self::CodedPages => "CODED_PAGES",
            Self::Heartbeat => "HEARTBEAT",
            Self::Stop => "STOP",
            Self::Stopped => "STOPPED",
            Self::BackupLost => "BACKUP_LOST",
            Self::Superseded => "SUPERSEDED",
            Self::Handover => "HANDOVER",
            Self::HandoverFailed => "HANDOVER_FAILED",
            Self::Token => "TOKEN",
            Self::TokenAck => "TOKEN_ACK",
            Self::Error => "ERROR",
        }
    }

    /// Longest payload in bytes. A receiver refuses a longer one from its header alone, before it reserves memory.
    #[must_use]
    pub fn limit(self) -> usize {
        match self {
            Self::Hello | Self::Welcome | Self::Refuse | Self::Error => 16 * 1024,
            Self::Stop | Self::Stopped | Self::BackupLost | Self::Superseded | Self::HandoverFailed => 16 * 1024,
            Self::EpochBegin | Self::EpochEnd | Self::Ack | Self::Heartbeat => 256,
            Self::Handover | Self::Token | Self::TokenAck => 256,
            Self::Challenge | Self::ChallengeAnswer => 256,
            Self::Audit => 2048,
            Self::QueryResult => 256 * 1024,
            Self::Config | Self::Preamble | Self::Pages | Self::CodedPages => 1024 * 1024,
            Self::State => CHUNK,
        }
    }
}

/// One frame of the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Opens the session; first frame of the connecting side.
    Hello(Hello),
    /// Accepts a `HELLO` that wants to protect; the session is open.
    Welcome(Welcome),
    /// Declines a `HELLO`; the stream is closed after it.
    Refuse {
        /// For programs.
        code: RefuseCode,
        /// One sentence that says what to do.
        text: String,
    },
    /// Answers a `HELLO` that asks; the stream is closed after it.
    QueryResult(Vec<QueryEntry>),
    /// Before anything that could be activated is destroyed for this `HELLO`: is its sender still there? What was late may be a dead
    /// host's (rule R9).
    Challenge {
        /// Fresh for every challenge.
        nonce: Nonce,
    },
    /// Answers a `CHALLENGE`, at once.
    ChallengeAnswer {
        /// That of the challenge.
        nonce: Nonce,
    },
    /// The domain's configuration as xl's JSON (`libxl_domain_config`), without a trailing NUL. Once, before `PREAMBLE`.
    Config(Bytes),
    /// libxc image header, domain header and static records, verbatim. Once, before the first epoch.
    Preamble(Bytes),
    /// What follows belongs to this epoch. An epoch that was begun and not ended is discarded by the next `EPOCH_BEGIN`.
    EpochBegin {
        /// Greater than every ended epoch.
        epoch: Epoch,
        /// Whether the sender means to arm it. `EPOCH_END` decides.
        armed: bool,
    },
    /// Pages of the open epoch.
    Pages {
        /// The open epoch.
        epoch: Epoch,
        /// At most [`MAX_PAGES_PER_FRAME`] pages.
        batch: PageBatch,
    },
    /// A part of a state record of the open epoch.
    State(StatePart),
    /// The epoch is complete on the sender's side.
    EpochEnd(EpochEnd),
    /// The backup holds all of this epoch and of those before it: the point of no return.
    Ack {
        /// The newest complete epoch.
        epoch: Epoch,
        /// Epochs that the receiver has not taken in yet.
        backlog_epochs: u32,
        /// Bytes that the receiver has not taken in yet.
        backlog_bytes: u64,
    },
    /// Hashes of pages that the sender's guest had at an epoch's suspend and that the epoch does not carry (rule R7). After `EPOCH_END`,
    /// before the next epoch; the backup compares them with its copy once a later epoch is applied.
    Audit(Sample),
    /// Pages of the open epoch, encoded against what both sides remember; only if both have [`capability::PAGE_CODEC`]. The session's
    /// reader turns it into [`Frame::Pages`].
    CodedPages {
        /// The open epoch.
        epoch: Epoch,
        /// One part of [`super::pages`].
        body: Bytes,
    },
    /// Sign of life with what it is a sign of (hazard F22).
    Heartbeat(Heartbeat),
    /// Ends the protection on purpose: the backup destroys its copy and answers `STOPPED`.
    Stop {
        /// Why.
        reason: StopReason,
    },
    /// No copy is left on the backup.
    Stopped,
    /// The backup cannot protect any longer and says why.
    BackupLost {
        /// For programs.
        reason: LostReason,
        /// One sentence.
        text: String,
    },
    /// The backup's copy has been activated: the primary's copy stays sealed and stops.
    Superseded {
        /// Who activated it and when.
        text: String,
    },
    /// The guest stands still after this epoch, which is acknowledged: the backup activates its copy and answers `SUPERSEDED`, or
    /// `HANDOVER_FAILED` once nothing is left of it.
    Handover {
        /// The newest epoch, which the backup has to hold.
        epoch: Epoch,
        /// The mode that the primary takes to be agreed: with a witness the backup still has to win the record, without one this
        /// frame is the token.
        token: Token,
    },
    /// The backup could not activate its copy; nothing is left of it and it never ran.
    HandoverFailed {
        /// One sentence.
        text: String,
    },
    /// Proposes a mode. The newest one counts.
    Token {
        /// Counts the proposals of this session, from 1.
        seq: u64,
        /// The mode.
        token: Token,
    },
    /// The backup has this proposal on disk.
    TokenAck {
        /// Which.
        seq: u64,
    },
    /// The sender gives up this session.
    Error {
        /// For programs.
        code: ErrorCode,
        /// One sentence.
        text: String,
    },
}

impl Frame {
    /// The frame's type.
    #[must_use]
    pub fn frame_type(&self) -> FrameType {
        match self {
            Self::Hello(_) => FrameType::Hello,
            Self::Welcome(_) => FrameType::Welcome,
            Self::Refuse { .. } => FrameType::Refuse,
            Self::QueryResult(_) => FrameType::QueryResult,
            Self::Challenge { .. } => FrameType::Challenge,
            Self::ChallengeAnswer { .. } => FrameType::ChallengeAnswer,
            Self::Config(_) => FrameType::Config,
            Self::Preamble(_) => FrameType::Preamble,
            Self::EpochBegin { .. } => FrameType::EpochBegin,
            Self::Pages { .. } => FrameType::Pages,
            Self::State(_) => FrameType::State,
            Self::EpochEnd(_) => FrameType::EpochEnd,
            Self::Ack { .. } => FrameType::Ack,
            Self::Audit(_) => FrameType::Audit,
            Self::CodedPages { .. } => FrameType::CodedPages,
            Self::Heartbeat(_) => FrameType::Heartbeat,
            Self::Stop { .. } => FrameType::Stop,
            Self::Stopped => FrameType::Stopped,
            Self::BackupLost { .. } => FrameType::BackupLost,
            Self::Superseded { .. } => FrameType::Superseded,
            Self::Handover { .. } => FrameType::Handover,
            Self::HandoverFailed { .. } => FrameType::HandoverFailed,
            Self::Token { .. } => FrameType::Token,
            Self::TokenAck { .. } => FrameType::TokenAck,
            Self::Error { .. } => FrameType::Error,
        }
    }

    /// The specification's name of the frame.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.frame_type().name()
    }
}

/// Inclusive range of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl VersionRange {
    /// What this build speaks.
    pub const OURS: Self = Self { min: VERSION_MIN, max: VERSION_MAX };

    /// The newest version that both ranges hold.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min && newest >= other.min).then_some(newest)
    }
}

/// First frame of the connecting side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions that the sender speaks.
    pub versions: VersionRange,
    /// Optional abilities, one bit each, see [`capability`]; unknown bits are ignored.
    pub capabilities: u64,
    /// The sender's software and its version, for messages.
    pub software: String,
    /// The sender's host name, for messages.
    pub host: String,
    /// What the session is for.
    pub purpose: Purpose,
}

/// What a session is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Protect a domain.
    Protect(ProtectOffer),
    /// Ask about one protection, or about all.
    Query {
        /// Which one; `None` is all.
        protection: Option<ProtectionId>,
    },
}

/// What the primary wants protected, and what both sides agree on by accepting it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectOffer {
    /// The domain's Xen UUID.
    pub protection: ProtectionId,
    /// The domain's name.
    pub domain: String,
    /// The domain's maximum memory in KiB, video memory included.
    pub max_memory_kib: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// How the guest is virtualised.
    pub guest_type: GuestType,
    /// What the backup does by itself when it loses the primary.
    pub on_primary_loss: OnPrimaryLoss,
    /// Silence in milliseconds after which either side suspects the other, 100 ms and up.
    pub detection_ms: u32,
    /// The primary's host: the durable id of its installation.
    #[serde(default)]
    pub host_id: Uuid,
    /// The witness that decides, as typed; `None` is none. The backup must be able to use the same one.
    #[serde(default)]
    pub witness: Option<String>,
    /// What the backup does once it runs its copy: how to protect it in turn, as JSON; `None` is nothing.
    #[serde(default)]
    pub then: Option<String>,
    /// Whether the receiver's xl does not stay behind as the monitor of the activated domain (`xl remus -e`).
    #[serde(default)]
    pub no_monitor: bool,
}

#[cfg(test)]
impl ProtectOffer {
    /// A small guest called web, without a witness, for tests.
    pub(crate) fn example() -> Self {
        Self {
            protection: ProtectionId::from_u128(1),
            domain: "web".into(),
            max_memory_kib: 1024,
            vcpus: 1,
            guest_type: GuestType::Pvh,
            on_primary_loss: OnPrimaryLoss::Wait,
            detection_ms: 1000,
            host_id: Uuid::nil(),
            witness: None,
            then: None,
            no_monitor: false,
        }
    }
}

/// Accepts a `HELLO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that every later frame has.
    pub version: u16,
    /// The abilities that both sides have.
    pub capabilities: u64,
    /// The sender's software and its version.
    pub software: String,
    /// The sender's host name.
    pub host: String,
    /// The sender's wall clock, milliseconds since 1970 (hazard F25d).
    pub wall_clock_ms: u64,
    /// The backup's host: the durable id of its installation.
    pub host_id: Uuid,
    /// Whether the backup's host has ever seen a witness record of this protection: then an absent one was lost (hazard F7).
    pub knows_record: bool,
}

/// What the backup knows about one protection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryEntry {
    /// Which protection.
    pub protection: ProtectionId,
    /// What the asked host is to it.
    pub role: Role,
    /// Newest generation that it has seen.
    pub generation: Generation,
    /// Newest epoch that it acknowledged in that generation.
    pub acked: Option<Epoch>,
    /// The domain that holds the copy, if there is one.
    pub domid: Option<DomId>,
}

/// A part of a state record. Parts of one record follow each other without another record between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePart {
    /// The open epoch.
    pub epoch: Epoch,
    /// Which stream's numbering `kind` is from.
    pub layer: Layer,
    /// The record's type.
    pub kind: u32,
    /// The whole record's length in bytes, at most [`MAX_RECORD`].
    pub total: u32,
    /// Where in the record this part starts.
    pub offset: u32,
    /// This part's bytes. Empty only when the whole record is.
    pub data: Bytes,
}

/// Closes an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochEnd {
    /// Which epoch.
    pub epoch: Epoch,
    /// Whether output of this epoch was held from its suspend on, so that it may be activated (DESIGN section 2).
    pub armed: bool,
    /// Digest over the decoded contents in order.
    pub digest: EpochDigest,
    /// Page entries sent, those without contents included.
    pub pages: u64,
    /// Decoded bytes: page contents and record bodies.
    pub bytes: u64,
    /// State records sent.
    pub records: u32,
}

/// A sign of life, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// From the primary: the epoch it is in. From the backup: the newest complete one.
    pub epoch: Epoch,
    /// What the guest is doing.
    pub guest: GuestState,
    /// Milliseconds since the guest was last resumed; 0 from the backup.
    pub since_resume_ms: u64,
    /// The sender's wall clock, milliseconds since 1970.
    pub wall_clock_ms: u64,
    /// The sender's own timer was late by more than one interval: it was starved or frozen.
    pub late: bool,
    /// Milliseconds since the sender last heard anything from the receiver of this: a link may carry one way only.
    pub heard_ms: u32,
}

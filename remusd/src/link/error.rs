//! What can go wrong on the link, in words for the operator.

use std::{io, time::Duration};

use super::frame::{ErrorCode, RefuseCode};

/// Why bytes were not accepted as frames. Every one of them ends the session: a stream that has lost its place is never
/// resynchronised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes are not of this protocol at all.
    #[error(
        "the peer does not speak remusd's protocol (the stream starts with {found:02x?}); is something printing on the remote shell's standard output?"
    )]
    Magic {
        /// What stood in the magic's place.
        found: [u8; 4],
    },
    /// The header's checksum does not match.
    #[error("a frame header arrived damaged (crc {found:08x}, expected {expected:08x})")]
    HeaderChecksum {
        /// What the header says.
        found: u32,
        /// What its bytes give.
        expected: u32,
    },
    /// The payload's checksum does not match.
    #[error("the payload of a {kind} frame arrived damaged (crc {found:08x}, expected {expected:08x})")]
    PayloadChecksum {
        /// Name of the frame's type.
        kind: &'static str,
        /// What the header says.
        found: u32,
        /// What the payload's bytes give.
        expected: u32,
    },
    /// The frame is of another protocol version than agreed.
    #[error("a frame of protocol version {found} in a session of version {expected}")]
    Version {
        /// The frame's version.
        found: u16,
        /// The session's version.
        expected: u16,
    },
    /// The frame's type is unknown or reserved.
    #[error("a frame of unknown type {0:#06x}")]
    UnknownType(u16),
    /// Reserved flag bits are set.
    #[error("a frame with unknown flags {0:#06x}")]
    UnknownFlags(u16),
    /// The payload is longer than its type allows.
    #[error("a {kind} frame of {length} bytes, more than the {limit} allowed")]
    TooLong {
        /// Name of the frame's type.
        kind: &'static str,
        /// The announced length in bytes.
        length: u64,
        /// The type's limit in bytes.
        limit: u64,
    },
    /// The frame belongs to another session (DESIGN R4, hazard F9).
    #[error("a frame of another session (generation {found}, this session has {expected})")]
    OtherSession {
        /// The frame's generation; the nonces may differ although generations agree.
        found: u64,
        /// The session's generation.
        expected: u64,
    },
    /// A frame was lost, repeated or reordered.
    #[error("frame number {found} where {expected} was due")]
    Sequence {
        /// The frame's number.
        found: u64,
        /// The number that was due.
        expected: u64,
    },
    /// The first frame of the stream was not `HELLO`.
    #[error("the peer opened with {0}, not with HELLO")]
    NotHello(&'static str),
    /// The payload does not have its type's layout.
    #[error("a {kind} frame that makes no sense: {what}")]
    Malformed {
        /// Name of the frame's type.
        kind: &'static str,
        /// Which rule of the layout is broken.
        what: &'static str,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended in the middle of a frame")]
    Truncated,
}

/// Why a session ended. Never by itself a reason to activate or destroy anything (DESIGN R9).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// We closed it.
    #[error("closed by this side")]
    Local,
    /// The peer closed the stream at a frame boundary.
    #[error("the peer closed the connection")]
    Eof,
    /// Reading or writing failed.
    #[error("the connection failed: {0}")]
    Io(String),
    /// The peer's bytes were not valid frames.
    #[error("{0}")]
    Protocol(FrameError),
    /// A valid frame came where it has no place.
    #[error("the peer sent {0} where it has no place")]
    Unexpected(&'static str),
    /// The peer reported an error and gave up.
    #[error("the peer gave up: {text} ({code:?})")]
    Peer {
        /// What kind of error.
        code: ErrorCode,
        /// The peer's sentence.
        text: String,
    },
    /// The transport process ended and said something.
    #[error("{why}; the transport said: {said}")]
    Transport {
        /// What the stream showed.
        why: Box<CloseReason>,
        /// Exit status and the last lines of its standard error.
        said: String,
    },
}

/// Why a link could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The transport could not be started.
    #[error("cannot start the transport `{what}`: {source}")]
    Transport {
        /// The command or socket.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The peer did not complete the handshake in time.
    #[error("{peer} did not answer within {} s{said}", .after.as_secs())]
    HandshakeTimeout {
        /// Where we connected to.
        peer: String,
        /// How long we waited.
        after: Duration,
        /// `: ` and the transport's last words, or nothing.
        said: String,
    },
    /// The stream ended or broke during the handshake.
    #[error("no session with {peer}: {reason}")]
    Handshake {
        /// Where we connected to.
        peer: String,
        /// How the stream ended.
        reason: CloseReason,
    },
    /// The peer speaks no version that we speak.
    #[error(
        "{peer} speaks protocol versions {theirs_min}..{theirs_max}, this host {ours_min}..{ours_max}: install the same remusd on both hosts"
    )]
    NoCommonVersion {
        /// Where we connected to.
        peer: String,
        /// The peer's oldest version.
        theirs_min: u16,
        /// The peer's newest version.
        theirs_max: u16,
        /// Our oldest version.
        ours_min: u16,
        /// Our newest version.
        ours_max: u16,
    },
    /// The peer refuses; its sentence says what to do.
    #[error("{peer} refuses: {text}")]
    Refused {
        /// Where we connected to.
        peer: String,
        /// The kind of refusal, for programs.
        code: RefuseCode,
        /// The peer's sentence.
        text: String,
    },
    /// The peer has activated its copy of the domain: ours must stay sealed and stop.
    #[error("{peer} runs its copy of this domain: {text}")]
    Superseded {
        /// Where we connected to.
        peer: String,
        /// The peer's sentence.
        text: String,
    },
    /// The peer answered the handshake with a frame that has no place there.
    #[error("{peer} answered the handshake with {frame}")]
    UnexpectedFrame {
        /// Where we connected to.
        peer: String,
        /// The frame's name.
        frame: &'static str,
    },
    /// The session has ended; nothing more can be sent.
    #[error("the session has ended")]
    Closed,
    /// A frame could not be sent because it breaks a limit of the protocol.
    #[error("cannot send: {0}")]
    Unsendable(#[from] FrameError),
}

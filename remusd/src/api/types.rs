//! What the control socket carries.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::{DomId, Epoch, Generation, ProtectionId};
use crate::ops::Event;
use crate::protect::options::{ProtectOptions, Target};
use crate::protect::report::EpochReport;

/// Version of this interface. A request with another one is refused.
pub const API_VERSION: u32 = 1;

/// Longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 1 << 20;

/// Where the daemon listens unless told otherwise.
#[must_use]
pub fn default_socket() -> PathBuf {
    std::env::var_os("REMUS_SOCKET").map_or_else(|| "/run/remus/remusd.sock".into(), PathBuf::from)
}

/// A request with its version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// [`API_VERSION`].
    pub version: u32,
    /// What is asked.
    pub request: Request,
}

/// What can be asked. Everything but `status` and `events` acts, and needs root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(clippy::large_enum_variant, reason = "one at a time, never kept")]
pub enum Request {
    /// Start a protection. Event lines follow until the guest is protected (or not).
    Protect {
        /// Domain name, id or UUID.
        domain: String,
        /// Where to.
        target: Target,
        /// How.
        #[serde(default)]
        options: ProtectOptions,
        /// Keep the connection until protection ends; protection ends with the connection.
        #[serde(default)]
        foreground: bool,
    },
    /// End a protection; the guest runs on, no copy is left.
    Unprotect {
        /// Domain name, id or UUID.
        domain: String,
    },
    /// One row per protection, both roles.
    Status,
    /// Past events that are still kept and, with `follow`, all later ones.
    Events {
        /// Go on until the client hangs up.
        #[serde(default)]
        follow: bool,
    },
    /// On the backup: activate the copy.
    Failover {
        /// Domain name or UUID.
        domain: String,
        /// The operator asserts that the primary host is off. Without it the daemon refuses.
        primary_is_off: bool,
    },
    /// On the primary: let the guest run on the backup, without loss. Answers with how long it stood still.
    Switchover {
        /// Domain name, id or UUID.
        domain: String,
    },
    /// On either host: the operator asserts that no other copy runs or will; this one goes on although the witness does not say so.
    AssumeAlone {
        /// Domain name, id or UUID.
        domain: String,
    },
    /// On the backup: destroy the copy without activating it.
    Discard {
        /// Domain name or UUID.
        domain: String,
    },
    /// Put a domain right that a crashed protection has left behind.
    Recover {
        /// Domain name, id or UUID; all that have a record when absent.
        domain: Option<String>,
        /// The operator asserts that no other copy runs: do not ask the peer.
        #[serde(default)]
        assume_owner: bool,
    },
}

/// Which side of a protection this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The guest runs here.
    Primary,
    /// The copy is kept here.
    Backup,
}

/// One protection as it stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusRow {
    /// Domain name.
    pub domain: String,
    /// Protection id: the domain's UUID.
    pub uuid: ProtectionId,
    /// Domain id on this host: the guest's on the primary, the paused copy's on the backup.
    pub domid: Option<DomId>,
    /// This host's side.
    pub role: Role,
    /// The other side as configured or as it named itself.
    pub peer: String,
    /// State in the words of docs/protocol.md.
    pub state: String,
    /// Primary: would the loss of this host be survived now? Backup: can the copy be activated?
    pub protected: bool,
    /// Session number.
    pub generation: Generation,
    /// Newest acknowledged epoch.
    pub acked: Option<Epoch>,
    /// Milliseconds since that acknowledgement.
    pub acked_age_ms: Option<u64>,
    /// Primary: output held now, in packets.
    pub held_packets: u64,
    /// Primary: output held now, in bytes.
    pub held_bytes: u64,
    /// Primary: output lost to the buffer's limit or resets since protection began, in packets.
    pub dropped_packets: u64,
    /// Primary: the newest finished epoch.
    pub last_epoch: Option<EpochReport>,
    /// A sentence: what an operator should know or do.
    pub detail: String,
}

/// Kinds of failure a program may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request cannot be understood or has values out of range.
    Invalid,
    /// The caller may not do this.
    Denied,
    /// No such domain or protection.
    NotFound,
    /// It exists already or is in a state that forbids this.
    Conflict,
    /// Something needed is missing on this host: Xen, a module, a tool, a device.
    Unsupported,
    /// The peer refused or could not be reached.
    Peer,
    /// Anything else; the message says what.
    Failed,
}

/// A failure: what failed, on what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl ApiError {
    /// An error with this code and sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Something happened meanwhile.
    Event(Event),
    /// Events that this subscriber was too slow to get.
    Missed(u64),
    /// How far the first copy is.
    Progress {
        /// Pages sent so far.
        pages: u64,
        /// Pages the guest has.
        total: u64,
        /// Bytes sent so far.
        bytes: u64,
    },
    /// The end, well.
    Result(serde_json::Value),
    /// The end, badly.
    Error(ApiError),
}

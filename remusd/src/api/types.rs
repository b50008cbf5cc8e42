//! What the control socket carries. `org.remus.Control.varlink` beside this file says the same for other languages, and a test holds
//! the two together.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::{DomId, Epoch, Generation, ProtectionId};
use crate::ops::operation::{Initiator, Progress};
use crate::ops::{DomainRef, Event, EventKind, OperationId};
use crate::protect::options::{ProtectOptions, Target};
use crate::protect::pace::IntervalReport;
use crate::protect::report::EpochReport;
use crate::protect::trace::TracedEpoch;

pub use crate::ops::{ErrorCode, Failure as ApiError};

/// The interface's name. Methods, fields and values are only ever added under it; anything else gets a new name.
pub const INTERFACE: &str = "org.remus.Control";

/// Its description.
pub const DESCRIPTION: &str = include_str!("org.remus.Control.varlink");

/// Longest message that the daemon accepts, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Where the daemon listens unless told otherwise.
#[must_use]
pub fn default_socket() -> PathBuf {
    std::env::var_os("REMUS_SOCKET").map_or_else(|| "/run/remus/remusd.sock".into(), PathBuf::from)
}

/// Who is asking, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id of the peer process.
    pub uid: u32,
    /// Its group id.
    pub gid: u32,
    /// Its process id, if the kernel told.
    pub pid: Option<i32>,
}

impl From<Caller> for Initiator {
    fn from(caller: Caller) -> Self {
        Self { uid: caller.uid, pid: caller.pid }
    }
}

/// What can be asked: the variant is the method, its fields are the parameters. An acting method with a `tag` answers at once with
/// the job's number, and the end comes as an `operation_complete` event that carries the tag; without one it answers at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::large_enum_variant, reason = "one at a time, never kept")]
pub enum Request {
    /// One row per protection, both roles.
    Status {
        /// Only this domain: name, id or UUID.
        #[serde(default)]
        domain: Option<String>,
    },
    /// The same again whenever it changes. Needs `more`.
    WatchStatus {
        /// Only this domain.
        #[serde(default)]
        domain: Option<String>,
    },
    /// The newest epochs of a protection from this host, in detail.
    Trace {
        /// Domain name, id or UUID.
        domain: String,
        /// How many, 10 by default; no more come than are kept.
        #[serde(default)]
        epochs: Option<u32>,
    },
    /// The past events that are still kept.
    GetEvents {
        /// Only this domain.
        #[serde(default)]
        domain: Option<String>,
        /// Only these kinds.
        #[serde(default)]
        kinds: Option<Vec<EventKind>>,
        /// Only those with a greater `seq`.
        #[serde(default)]
        after: Option<u64>,
    },
    /// The past events that are still kept, then every later one. Needs `more`.
    FollowEvents {
        /// Only this domain.
        #[serde(default)]
        domain: Option<String>,
        /// Only these kinds.
        #[serde(default)]
        kinds: Option<Vec<EventKind>>,
        /// Only those with a greater `seq`.
        #[serde(default)]
        after: Option<u64>,
    },
    /// The operations that are under way and the latest that have ended.
    Jobs {},
    /// Start a protection.
    Protect {
        /// Domain name, id or UUID.
        domain: String,
        /// Where to.
        target: TargetSpec,
        /// How.
        #[serde(default)]
        options: Option<Box<ProtectOptions>>,
        /// Answer when protection ends; it ends with the connection.
        #[serde(default)]
        foreground: bool,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// End a protection; the guest runs on, no copy is left.
    Unprotect {
        /// Domain name, id or UUID.
        domain: String,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// On the backup: activate the copy.
    Failover {
        /// Domain name or UUID.
        domain: String,
        /// The operator asserts that the primary host is off. Without it the daemon refuses.
        #[serde(default)]
        primary_is_off: bool,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// On the primary: let the guest run on the backup, without loss. Answers with how long it stood still.
    Switchover {
        /// Domain name, id or UUID.
        domain: String,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// On either host: the operator asserts that no other copy runs or will; this one goes on although the witness does not say so.
    AssumeAlone {
        /// Domain name, id or UUID.
        domain: String,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// On the backup: start the last epoch in isolation, see whether it runs, destroy it.
    Drill {
        /// Domain name or UUID.
        domain: String,
        /// How long it is to run, in milliseconds: 1000 to 600 000, 5000 by default.
        #[serde(default)]
        run_ms: Option<u64>,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// On the backup: destroy the copy without activating it.
    Discard {
        /// Domain name or UUID.
        domain: String,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// Put a domain right that a crashed protection has left behind.
    Recover {
        /// Domain name, id or UUID; all that have a record when absent.
        #[serde(default)]
        domain: Option<String>,
        /// The operator asserts that no other copy runs: do not ask the peer.
        #[serde(default)]
        assume_owner: bool,
        /// See [`Request`]. Only with a domain.
        #[serde(default)]
        tag: Option<String>,
    },
    /// Compare both copies of a mirrored disk of which this host has the source.
    VerifyDisk {
        /// Its name.
        disk: String,
        /// See [`Request`].
        #[serde(default)]
        tag: Option<String>,
    },
    /// Ask a job to give up.
    Abort {
        /// Its number.
        job: OperationId,
        /// Answer when it has ended; else as soon as it was told.
        #[serde(default)]
        wait: bool,
    },
    /// Read the configuration and the policies anew. Answers with what has changed, what has to wait for a restart and what is wrong.
    Reload {
        /// The policy of this domain counts anew, also if an operator had ended its protection by hand.
        #[serde(default)]
        domain: Option<String>,
    },
}

impl Request {
    /// Whether it changes anything, so that not everybody may.
    #[must_use]
    pub fn acts(&self) -> bool {
        !matches!(
            self,
            Self::Status { .. }
                | Self::WatchStatus { .. }
                | Self::Trace { .. }
                | Self::GetEvents { .. }
                | Self::FollowEvents { .. }
                | Self::Jobs {}
        )
    }

    /// Whether it has the daemon run a program of the caller's choice, with root's rights.
    #[must_use]
    pub fn names_a_program(&self) -> bool {
        let Self::Protect { target, options, .. } = self else { return false };
        target.ssh.is_some()
            || target.command.is_some()
            || target.stock_receiver.is_some()
            || options.as_ref().is_some_and(|o| {
                o.netbuffer_script.is_some()
                    || !o.disk_scripts.is_empty()
                    || o.witness.as_ref().is_some_and(|w| w.starts_with("script:"))
            })
    }

    /// Whether it makes sense only for a client that takes more than one reply.
    #[must_use]
    pub fn needs_more(&self) -> bool {
        matches!(self, Self::WatchStatus { .. } | Self::FollowEvents { .. })
    }
}

/// A [`Target`] as it is written in the interface, which has no unions: exactly one of `host`, `tls`, `command`, `blackhole`
/// and `stock_receiver`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TargetSpec {
    /// Host name: by TLS if it is paired, else by ssh.
    pub host: Option<String>,
    /// Command in place of ssh; with `host`.
    pub ssh: Option<String>,
    /// Name of a paired host: by TLS or not at all.
    pub tls: Option<String>,
    /// Shell command that carries the link.
    pub command: Option<String>,
    /// UNSAFE: nowhere.
    pub blackhole: Option<bool>,
    /// UNSAFE: shell command that speaks to `xl migrate-receive -r`.
    pub stock_receiver: Option<String>,
}

impl From<Target> for TargetSpec {
    fn from(target: Target) -> Self {
        let none = Self::default();
        match target {
            Target::Host { host, ssh } => Self { host: Some(host), ssh, ..none },
            Target::Tls { host, .. } => Self { tls: Some(host), ..none },
            Target::Command(command) => Self { command: Some(command), ..none },
            Target::Blackhole => Self { blackhole: Some(true), ..none },
            Target::StockReceiver(command) => Self { stock_receiver: Some(command), ..none },
        }
    }
}

impl TryFrom<TargetSpec> for Target {
    type Error = ApiError;

    fn try_from(spec: TargetSpec) -> Result<Self, ApiError> {
        let blackhole = spec.blackhole.filter(|wanted| *wanted);
        match (spec.host, spec.tls, spec.command, blackhole, spec.stock_receiver, spec.ssh) {
            (Some(host), None, None, None, None, ssh) => Ok(Self::Host { host, ssh }),
            (None, Some(host), None, None, None, None) => Ok(Self::Tls { host, id: None }),
            (None, None, Some(command), None, None, None) => Ok(Self::Command(command)),
            (None, None, None, Some(_), None, None) => Ok(Self::Blackhole),
            (None, None, None, None, Some(command), None) => Ok(Self::StockReceiver(command)),
            _ => Err(ApiError::new(
                ErrorCode::Invalid,
                "target: give exactly one of host, tls, command, blackhole and stock_receiver; ssh only with host",
            )),
        }
    }
}

/// Which side of a protection this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The guest runs here.
    Primary,
    /// The copy is kept here.
    Backup,
}

/// Who may run the guest, as far as this host knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MayRun {
    /// This host.
    Here,
    /// The other one.
    Peer,
    /// That is being decided, or waits for an operator.
    Undecided,
    /// Nobody: the guest has ended.
    Nobody,
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
    /// State in the words of docs/api.md.
    pub state: String,
    /// Primary: would the loss of this host be survived now? Backup: can the copy be activated?
    pub protected: bool,
    /// Who may run the guest.
    pub may_run: MayRun,
    /// Session number.
    pub generation: Generation,
    /// Newest acknowledged epoch.
    pub acked: Option<Epoch>,
    /// Milliseconds since that acknowledgement.
    pub acked_age_ms: Option<u64>,
    /// Age in milliseconds of the state that the copy has: what the guest has done since then is lost if the primary dies now. On the
    /// backup, which does not know when the guest was suspended, since the acknowledgement. None: there is no copy.
    pub stale_ms: Option<u64>,
    /// Primary: output held now, in packets.
    pub held_packets: u64,
    /// Primary: output held now, in bytes.
    pub held_bytes: u64,
    /// Primary: output lost to the buffer's limit or resets since protection began, in packets.
    pub dropped_packets: u64,
    /// Primary: the newest finished epoch.
    pub last_epoch: Option<EpochReport>,
    /// Primary: the intervals between epochs.
    #[serde(default)]
    pub interval: Option<IntervalReport>,
    /// A sentence: what an operator should know or do.
    pub detail: String,
}

/// The newest epochs of one protection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Of which domain.
    pub domain: DomainRef,
    /// The backup.
    pub peer: String,
    /// Oldest first.
    pub epochs: Vec<TracedEpoch>,
}

/// One message of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Something happened meanwhile.
    Event(Event),
    /// Events that this subscriber was too slow to get.
    Missed(u64),
    /// How far a job is.
    Progress(Progress),
    /// How the protections stand, again.
    Rows(Vec<StatusRow>),
    /// The end, well.
    Result(serde_json::Value),
    /// The end, badly.
    Error(ApiError),
}

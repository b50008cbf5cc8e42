//! What operations are called, and how they end.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ops::{DomainRef, ErrorCode, Failure};

/// Names an operation in one run of the daemon; never reused in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperationId(pub u64);

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// From the request until the guest is protected.
    Protect,
    /// From the request until no copy is left.
    Unprotect,
    /// Planned change of sides.
    Switchover,
    /// Activation of a copy.
    Failover,
    /// Destruction of a copy.
    Discard,
    /// Putting right what a crash left behind.
    Recover,
    /// The last epoch is started in isolation.
    Drill,
    /// A copy goes on, or is begun, on an operator's word alone.
    AssumeAlone,
    /// A copy that an audit found wrong is made anew.
    Resync,
    /// A disk's copies are made equal.
    DiskSync,
    /// A disk's copies are compared.
    DiskVerify,
}

impl OperationKind {
    /// Every kind.
    pub const ALL: &[Self] = &[
        Self::Protect,
        Self::Unprotect,
        Self::Switchover,
        Self::Failover,
        Self::Discard,
        Self::Recover,
        Self::Drill,
        Self::AssumeAlone,
        Self::Resync,
        Self::DiskSync,
        Self::DiskVerify,
    ];
}

impl fmt::Display for OperationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Protect => "protect",
            Self::Unprotect => "unprotect",
            Self::Switchover => "switchover",
            Self::Failover => "failover",
            Self::Discard => "discard",
            Self::Recover => "recover",
            Self::Drill => "drill",
            Self::AssumeAlone => "assume_alone",
            Self::Resync => "resync",
            Self::DiskSync => "disk_sync",
            Self::DiskVerify => "disk_verify",
        })
    }
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was to do; the object has a `message` for people and whatever else there is to say.
    Completed(serde_json::Value),
    /// It was aborted; the sentence says what that left.
    Cancelled(String),
    /// It failed.
    Failed(Failure),
}

impl Outcome {
    /// Completed, with a sentence.
    #[must_use]
    pub fn done(message: impl Into<String>) -> Self {
        Self::Completed(serde_json::json!({ "message": message.into() }))
    }

    /// One word: `completed`, `cancelled` or `failed`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Completed(_) => "completed",
            Self::Cancelled(_) => "cancelled",
            Self::Failed(_) => "failed",
        }
    }

    /// The sentence for people.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Completed(value) => value.get("message").and_then(|m| m.as_str()).unwrap_or("done"),
            Self::Cancelled(text) => text,
            Self::Failed(failure) => &failure.message,
        }
    }

    /// As the result of a call that has waited for it.
    ///
    /// # Errors
    /// What failed; [`ErrorCode::Cancelled`] for an abort.
    pub fn into_result(self) -> Result<serde_json::Value, Failure> {
        match self {
            Self::Completed(value) => Ok(value),
            Self::Cancelled(text) => Err(Failure::new(ErrorCode::Cancelled, text)),
            Self::Failed(failure) => Err(failure),
        }
    }
}

impl From<Result<serde_json::Value, Failure>> for Outcome {
    fn from(result: Result<serde_json::Value, Failure>) -> Self {
        match result {
            Ok(value) => Self::Completed(value),
            Err(failure) => Self::Failed(failure),
        }
    }
}

/// Who asked for an operation over the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Initiator {
    /// User id.
    pub uid: u32,
    /// Process id, if the kernel told.
    pub pid: Option<i32>,
}

/// What an operation is to be.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What is done.
    pub kind: OperationKind,
    /// To which domain.
    pub domain: DomainRef,
    /// On whose behalf; the daemon's own when `None`.
    pub initiator: Option<Initiator>,
    /// Why it can never be aborted, if so; otherwise it can until its [`super::Work::point_of_no_return`].
    pub never_abort: Option<&'static str>,
}

impl Spec {
    /// An operation of the daemon's own that can be aborted.
    #[must_use]
    pub fn new(kind: OperationKind, domain: DomainRef) -> Self {
        Self { kind, domain, initiator: None, never_abort: None }
    }

    /// On behalf of a client.
    #[must_use]
    pub fn on_behalf_of(self, initiator: Initiator) -> Self {
        Self { initiator: Some(initiator), ..self }
    }

    /// It can never be aborted, because.
    #[must_use]
    pub fn never_abort(self, why: &'static str) -> Self {
        Self { never_abort: Some(why), ..self }
    }
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Pages (or, for disks, bytes) done.
    pub pages: u64,
    /// Of so many, as far as is known.
    pub total: u64,
    /// Bytes sent.
    pub bytes: u64,
}

/// What an event says of the operation that it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationNote {
    /// Which.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// `completed`, `cancelled` or `failed`.
    pub outcome: String,
    /// The code of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorCode>,
    /// The initiator's own tag, in `operation_complete`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// Where a job is, for people and programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Under way.
    Running,
    /// Under way, told to give up.
    Aborting,
    /// Ended well.
    Completed,
    /// Ended by an abort.
    Cancelled,
    /// Ended badly.
    Failed,
}

impl JobState {
    /// Whether it has not ended.
    #[must_use]
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::Running | Self::Aborting)
    }
}

/// An operation as it stands, or has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Which.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// To which domain.
    pub domain: DomainRef,
    /// Where it is.
    pub state: JobState,
    /// When it began, milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// How long it ran, or has run, in milliseconds.
    pub ran_ms: u64,
    /// Whether it can be aborted now.
    pub abortable: bool,
    /// Why not, if not; what it became, once it has ended.
    pub detail: String,
    /// How far it is, if it says.
    pub progress: Option<Progress>,
    /// On whose behalf.
    pub initiator: Option<Initiator>,
}

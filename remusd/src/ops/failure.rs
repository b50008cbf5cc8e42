//! What failed, for programs and for people.

use serde::{Deserialize, Serialize};

/// Kinds of failure a program may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request cannot be understood or has values out of range.
    Invalid,
    /// The caller may not do this.
    Denied,
    /// No such domain, protection or operation.
    NotFound,
    /// It exists already or is in a state that forbids this.
    Conflict,
    /// Something needed is missing on this host: Xen, a module, a tool, a device.
    Unsupported,
    /// The peer refused or could not be reached.
    Peer,
    /// It was aborted.
    Cancelled,
    /// Anything else; the message says what.
    Failed,
}

/// A failure: what failed, on what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl Failure {
    /// A failure with this code and sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

//! What can go wrong on the backup, in words for the operator.

use std::io;
use std::path::PathBuf;

/// Why something on this host could not be done for a protection.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The receiver could not be started.
    #[error(
        "cannot start the receiver {}: {source}; is xen-utils installed and is this host running Xen (`xl info`)?",
        .program.display()
    )]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The receiver did not say what it should.
    #[error("the receiver did not {what}: {said}")]
    Receiver {
        /// What it did not do.
        what: &'static str,
        /// Its last words.
        said: String,
    },
    /// Xen or xenstore could not be asked, or a domain not be destroyed.
    #[error("{0}")]
    Host(String),
    /// State could not be read or written.
    #[error("{0}")]
    Record(String),
}

/// Why an operator's command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// It may not be; the sentence says why and what to do.
    #[error("{0}")]
    Refused(String),
    /// It was begun and failed.
    #[error("{0}")]
    Failed(String),
    /// The protection is gone.
    #[error("this protection has ended on this host")]
    Gone,
}

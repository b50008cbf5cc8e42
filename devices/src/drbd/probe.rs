//! The probe script and what its exit codes mean.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// What the disk is, if it can be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// A DRBD device that can checkpoint, connected, in the right roles.
    ProtocolD,
    /// Not a DRBD device.
    NotDrbd,
}

/// The disk cannot be used, or nobody can tell.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Exit 2.
    #[error("it cannot be told whether this is a DRBD device: {0}")]
    Unknown(String),
    /// Exit 3.
    #[error(
        "{0}. An ordinary DRBD secondary is ahead of the checkpoint that the guest would go on from; use a mirrored \
             disk (docs/disks.md) on the DRBD's backing device instead"
    )]
    Protocol(String),
    /// Exit 4.
    #[error("the DRBD device is not ready: {0}")]
    NotReady(String),
    /// No exit code that the script has.
    #[error("the probe {program} ended with {status}: {said}")]
    Strange {
        /// Its path.
        program: PathBuf,
        /// How it ended.
        status: String,
        /// What it said.
        said: String,
    },
    /// It could not be run.
    #[error("the probe {program} cannot be run: {source}")]
    Run {
        /// Its path.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It takes too long, as when a drbd tool hangs in the kernel.
    #[error("the probe {program} did not end within {after:?}; is a DRBD device stuck?")]
    Timeout {
        /// Its path.
        program: PathBuf,
        /// How long.
        after: Duration,
    },
}

/// Runs the probe on the block device `device`.
///
/// # Errors
/// [`ProbeError`]: anything but a clear yes or no.
pub async fn probe(program: &Path, device: &Path, within: Duration) -> Result<Finding, ProbeError> {
    let mut command = Command::new(program);
    command.arg(device).stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(within, command.output()).await {
        Err(_) => return Err(ProbeError::Timeout { program: program.to_owned(), after: within }),
        Ok(Err(source)) => return Err(ProbeError::Run { program: program.to_owned(), source }),
        Ok(Ok(output)) => output,
    };
    let said = String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr });
    let said = said.trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(Finding::ProtocolD),
        Some(1) => Ok(Finding::NotDrbd),
        Some(2) => Err(ProbeError::Unknown(said)),
        Some(3) => Err(ProbeError::Protocol(said)),
        Some(4) => Err(ProbeError::NotReady(said)),
        _ => Err(ProbeError::Strange { program: program.to_owned(), status: output.status.to_string(), said }),
    }
}

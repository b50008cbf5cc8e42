//! Disks on a DRBD that can checkpoint: 8.3.11 with protocol D, as Remus had it. Ordinary DRBD is refused, because its
//! secondary is ahead of the epoch (hazard F12); the mirror is the way out.
//!
//! Nobody has run this on that DRBD: it is a kernel module of 2014 that no present kernel loads. What is tested is the
//! probe, against `/proc/drbd` and tools in all their states, and order and failures, against a stand-in for the ioctls.

mod handle;
mod probe;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use probe::{Finding, probe};

use crate::device::{Device, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};

/// `DRBD_SEND_CHECKPOINT`, a bare number and not one of the `_IO` family, on the device opened for reading, argument 0.
pub const SEND_CHECKPOINT: u32 = 20;
/// `DRBD_WAIT_CHECKPOINT_ACK`, likewise.
pub const WAIT_CHECKPOINT_ACK: u32 = 30;

/// What `SEND_CHECKPOINT` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It returned 1: nothing was written since the last one, so nothing will be acknowledged.
    Nothing,
    /// It returned 0: a barrier is on its way.
    Barrier,
}

/// The two ioctls. Blocking; called on threads that may block.
pub trait CheckpointIoctls: Send + Sync {
    /// `SEND_CHECKPOINT` on `device`.
    ///
    /// # Errors
    /// EINVAL: not protocol D. EPROTO: not connected.
    fn send(&self, device: &Path) -> io::Result<Sent>;

    /// `WAIT_CHECKPOINT_ACK` on `device`. The driver waits for twice its ping timeout, 1 s by default.
    ///
    /// # Errors
    /// EPROTO: no acknowledgement came, or the connection was lost.
    fn wait(&self, device: &Path) -> io::Result<()>;
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct DrbdLimits {
    /// The probe script.
    pub probe: Duration,
    /// `SEND_CHECKPOINT`, the guest suspended.
    pub send: Duration,
    /// `WAIT_CHECKPOINT_ACK`, the guest running.
    pub wait: Duration,
}

impl Default for DrbdLimits {
    fn default() -> Self {
        Self { probe: Duration::from_secs(10), send: Duration::from_millis(500), wait: Duration::from_secs(10) }
    }
}

/// Takes disks that the probe script says yes to.
#[derive(Clone)]
pub struct Drbd {
    probe: PathBuf,
    ioctls: Arc<dyn CheckpointIoctls>,
    limits: DrbdLimits,
}

impl Drbd {
    /// `probe` is the path of `block-drbd-probe`.
    #[must_use]
    pub fn new(probe: impl Into<PathBuf>, ioctls: Arc<dyn CheckpointIoctls>, limits: DrbdLimits) -> Self {
        Self { probe: probe.into(), ioctls, limits }
    }
}

/// The device's path: `phy:/dev/drbd0`, or what the block script found for `drbd:resource`.
fn path(device: &Device) -> Option<PathBuf> {
    let found = device.param("physical-device-path").or_else(|| device.param("params"))?;
    found.starts_with('/').then(|| found.into())
}

#[async_trait]
impl Subkind for Drbd {
    fn name(&self) -> &'static str {
        "drbd"
    }

    fn kind(&self) -> Kind {
        Kind::Disk
    }

    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        let Some(path) = path(device) else { return Ok(Match::No) };
        match probe(&self.probe, &path, self.limits.probe).await {
            Ok(Finding::Usable) => Ok(Match::Yes),
            Ok(Finding::NotDrbd) => Ok(Match::No),
            Err(error) => Err(DeviceError::failed(device, "probe for DRBD", error)),
        }
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        Box::new(handle::Handle::new(device.clone(), path(device), self.ioctls.clone(), self.limits))
    }
}

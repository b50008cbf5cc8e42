//! Disks on DRBD are recognised, so that they can be refused with the reason.
//!
//! Ordinary DRBD's secondary is ahead of the epoch (hazard F12). The one DRBD that can checkpoint, 8.3.11 with protocol D as Remus had
//! it, is a kernel module of 2014 that no present kernel loads: nobody could try its ioctls, so remusd does not use them.

mod probe;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

pub use probe::{Finding, probe};

use crate::device::{Device, Ending, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};

/// How long the probe script may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Recognises disks on DRBD by the probe script, and refuses them.
#[derive(Debug, Clone)]
pub struct Drbd {
    probe: PathBuf,
}

impl Drbd {
    /// `probe` is the path of `block-drbd-probe`.
    #[must_use]
    pub fn new(probe: impl Into<PathBuf>) -> Self {
        Self { probe: probe.into() }
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
        match probe(&self.probe, &path, PATIENCE).await {
            Ok(Finding::ProtocolD) => Ok(Match::Yes),
            Ok(Finding::NotDrbd) => Ok(Match::No),
            Err(error) => Err(DeviceError::failed(device, "probe for DRBD", error)),
        }
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        Box::new(Refused(device.clone()))
    }
}

/// A DRBD with protocol D.
struct Refused(Device);

#[derive(Debug, thiserror::Error)]
#[error(
    "it is a DRBD with protocol D, which can checkpoint, but remusd was never tried with one and does not use it: put a mirrored disk \
     (docs/disks.md) on its backing device instead"
)]
struct Untried;

#[async_trait]
impl Checkpointed for Refused {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        Err(DeviceError::failed(&self.0, "set up", Untried))
    }

    async fn teardown(&mut self, _ending: Ending) -> Result<(), DeviceError> {
        Ok(())
    }
}

//! Disks on DRBD: the ordinary ones are recognised and refused with the reason, those with protocol D take part in checkpoints.
//!
//! Ordinary DRBD's secondary is ahead of the epoch (hazard F12). Protocol D is that of the DRBD that came with Remus: the peer holds
//! writes back until a checkpoint of theirs arrives, and then applies them, whatever became of the memory's checkpoint. So a primary
//! that dies between the two leaves a disk that is one epoch ahead, which is why an operator has to choose it by `--unsafe drbd`.

mod checkpoint;
mod probe;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

pub use checkpoint::DrbdLimits;
pub use probe::{Finding, probe};

use crate::device::{Device, Ending, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};

/// How long the probe script may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Recognises disks on DRBD by the probe script.
#[derive(Debug, Clone)]
pub struct Drbd {
    probe: PathBuf,
    checkpoint: Option<(PathBuf, DrbdLimits)>,
}

impl Drbd {
    /// `probe` is the path of `block-drbd-probe`. Whatever is recognised is refused.
    #[must_use]
    pub fn new(probe: impl Into<PathBuf>) -> Self {
        Self { probe: probe.into(), checkpoint: None }
    }

    /// Uses disks with protocol D, by `program`, which is `drbd-checkpoint`.
    #[must_use]
    pub fn with_checkpoints(mut self, program: impl Into<PathBuf>, limits: DrbdLimits) -> Self {
        self.checkpoint = Some((program.into(), limits));
        self
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
        match (&self.checkpoint, path(device)) {
            (Some((program, limits)), Some(path)) => Box::new(checkpoint::Replicated::new(
                device.clone(),
                path,
                self.probe.clone(),
                program.clone(),
                *limits,
            )),
            _ => Box::new(Refused(device.clone())),
        }
    }
}

/// A DRBD with protocol D that nobody has chosen.
struct Refused(Device);

#[derive(Debug, thiserror::Error)]
#[error(
    "it is a DRBD with protocol D: its peer applies an epoch's writes before the epoch is acknowledged, so a primary that dies in between \
     leaves a disk that is ahead of the memory. --unsafe drbd uses it all the same; a mirrored disk (docs/disks.md) on its backing \
     device has no such gap"
)]
struct NotChosen;

#[async_trait]
impl Checkpointed for Refused {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        Err(DeviceError::failed(&self.0, "set up", NotChosen))
    }

    async fn teardown(&mut self, _ending: Ending) -> Result<(), DeviceError> {
        Ok(())
    }
}

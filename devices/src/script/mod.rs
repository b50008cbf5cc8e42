//! A disk in the care of somebody else's program, on both hosts: one long-lived co-process per disk, one line per phase, one
//! line back. Never a fork inside the pause (hazard F23).
//!
//! `docs/disks.md` has the lines and the environment.

pub(crate) mod process;
mod standby;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;

pub use standby::{ScriptStandby, ScriptStandbyError, ScriptedDisk};

use crate::device::{Device, Ending, EpochContext, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};
use process::{Process, ScriptError, trusted};

/// How long the program may take.
#[derive(Debug, Clone, Copy)]
pub struct ScriptLimits {
    /// For `match`, `setup`, `teardown`; `accept`, `activate`, `release`.
    pub slow: Duration,
    /// For `ready`, `arm`, `commit`, `abandon`, `held`: the guest runs.
    pub running: Duration,
    /// For `postsuspend` and `preresume`: the guest stands still.
    pub paused: Duration,
}

impl Default for ScriptLimits {
    fn default() -> Self {
        Self { slow: Duration::from_secs(30), running: Duration::from_secs(5), paused: Duration::from_millis(2500) }
    }
}

/// Takes the one disk that an operator has given to a program.
#[derive(Debug, Clone)]
pub struct Script {
    disk: ScriptedDisk,
    limits: ScriptLimits,
}

impl Script {
    /// The program is run without arguments, once for the question and once for the care of the disk.
    #[must_use]
    pub fn new(disk: ScriptedDisk, limits: ScriptLimits) -> Self {
        Self { disk, limits }
    }
}

/// Starts the program on the primary, where the device is.
fn start(disk: &ScriptedDisk, device: &Device) -> Result<Process, ScriptError> {
    trusted(&disk.program)?;
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    let mut environment: BTreeMap<String, String> = device
        .params
        .iter()
        .map(|(key, value)| (format!("REMUS_PARAM_{}", key.chars().map(plain).collect::<String>()), value.clone()))
        .collect();
    environment.extend(disk.environment("primary"));
    environment.insert("REMUS_DOMID".into(), device.domid.to_string());
    environment.insert("REMUS_DEVID".into(), device.devid.to_string());
    Process::start(&disk.program, &environment, device.to_string())
}

#[async_trait]
impl Subkind for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    fn kind(&self) -> Kind {
        Kind::Disk
    }

    /// The operator has said that the program takes this disk: its `no` is an error, and no other subkind is asked.
    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        if !device.is_called(&self.disk.vdev) {
            return Ok(Match::No);
        }
        let failed = |e: ScriptError| DeviceError::failed(device, "match", e);
        let mut process = start(&self.disk, device).map_err(failed)?;
        let answer = process.ask("match", self.limits.slow).await.map_err(failed)?;
        process.end().await;
        match answer.as_str() {
            "yes" => Ok(Match::Yes),
            "no" => Err(failed(ScriptError::NotTaken(self.disk.program.clone()))),
            _ => Err(failed(ScriptError::Answer { asked: "match".into(), answer })),
        }
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        Box::new(Scripted { device: device.clone(), disk: self.disk.clone(), limits: self.limits, process: None })
    }
}

struct Scripted {
    device: Device,
    disk: ScriptedDisk,
    limits: ScriptLimits,
    process: Option<Process>,
}

impl Scripted {
    /// One line and its answer. After any failure the program is ended: what it would answer later belongs to nothing.
    async fn ask(&mut self, line: &str, within: Duration) -> Result<String, DeviceError> {
        let Some(mut process) = self.process.take() else {
            return Err(DeviceError::failed(&self.device, line, ScriptError::NotRunning));
        };
        match process.ask(line, within).await {
            Ok(answer) => {
                self.process = Some(process);
                Ok(answer)
            }
            Err(error) => {
                process.end().await;
                Err(DeviceError::failed(&self.device, line, error))
            }
        }
    }

    /// One line, to be answered with `ok`.
    async fn tell(&mut self, line: String, within: Duration) -> Result<(), DeviceError> {
        let answer = self.ask(&line, within).await?;
        if answer == "ok" {
            return Ok(());
        }
        // It said no and lives: the next phase may go better.
        if let Some(why) = answer.strip_prefix("error ") {
            return Err(DeviceError::failed(&self.device, line, ScriptError::Refused(why.into())));
        }
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        Err(DeviceError::failed(&self.device, line.clone(), ScriptError::Answer { asked: line, answer }))
    }
}

#[async_trait]
impl Checkpointed for Scripted {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        let process = start(&self.disk, &self.device);
        self.process = Some(process.map_err(|e| DeviceError::failed(&self.device, "set up", e))?);
        self.tell("setup".into(), self.limits.slow).await
    }

    /// A program that died is started again for this, so that it can undo what it did.
    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError> {
        if ending == Ending::Hold {
            if let Some(process) = self.process.take() {
                process.end().await;
            }
            return Ok(());
        }
        if self.process.is_none() {
            let process = start(&self.disk, &self.device);
            self.process = Some(process.map_err(|e| DeviceError::failed(&self.device, "tear down", e))?);
        }
        let word = if ending == Ending::Release { "release" } else { "discard" };
        self.tell(format!("teardown {word}"), self.limits.slow).await?;
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        Ok(())
    }

    async fn is_ready(&mut self) -> bool {
        match self.ask("ready", self.limits.running).await.as_deref() {
            Ok("yes") => true,
            Ok("no") => false,
            answer => {
                tracing::warn!(device = %self.device, ?answer, "its program does not say whether it is ready");
                false
            }
        }
    }

    async fn arm(&mut self) -> Result<(), DeviceError> {
        self.tell("arm".into(), self.limits.running).await
    }

    async fn postsuspend(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let armed = if epoch.armed { "armed" } else { "unarmed" };
        self.tell(format!("postsuspend {} {armed}", epoch.epoch), self.limits.paused).await
    }

    async fn preresume(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        self.tell(format!("preresume {}", epoch.epoch), self.limits.paused).await
    }

    async fn commit(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        self.tell(format!("commit {}", epoch.epoch), self.limits.running).await
    }

    async fn abandon(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        self.tell(format!("abandon {}", epoch.epoch), self.limits.running).await
    }

    fn record(&self) -> serde_json::Value {
        serde_json::to_value(&self.disk).unwrap_or_default()
    }
}

/// Ends the care for a disk after a restart of the daemon: `record` is what [`Checkpointed::record`] gave for `device`.
///
/// # Errors
/// [`DeviceError`]: the record is none of ours, or the program could not undo what it did.
pub async fn end_protection(device: &Device, record: &serde_json::Value, ending: Ending) -> Result<(), DeviceError> {
    let disk: ScriptedDisk =
        serde_json::from_value(record.clone()).map_err(|e| DeviceError::failed(device, "tear down", e))?;
    Script::new(disk, ScriptLimits::default()).attach(device).teardown(ending).await
}

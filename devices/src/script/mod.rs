//! Disks or nics in the care of somebody else's program: one long-lived co-process per device, one line per phase, one
//! line back. Never a fork inside the pause (hazard F23).
//!
//! `docs/devices.md` has the lines and the environment.

mod process;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

use crate::device::{Device, Ending, EpochContext, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};
use process::{Process, ScriptError};

/// How long the program may take.
#[derive(Debug, Clone, Copy)]
pub struct ScriptLimits {
    /// For `match`, `setup`, `teardown`.
    pub slow: Duration,
    /// For `arm`, `confirm`, `commit`, `abandon`: the guest runs.
    pub running: Duration,
    /// For `postsuspend` and `preresume`: the guest stands still.
    pub paused: Duration,
}

impl Default for ScriptLimits {
    fn default() -> Self {
        Self { slow: Duration::from_secs(30), running: Duration::from_secs(5), paused: Duration::from_millis(500) }
    }
}

/// Asks a program about devices of one kind.
#[derive(Debug, Clone)]
pub struct Script {
    kind: Kind,
    program: PathBuf,
    limits: ScriptLimits,
}

impl Script {
    /// `program` is run without arguments, once for the question and once for the care of each device.
    #[must_use]
    pub fn new(kind: Kind, program: impl Into<PathBuf>, limits: ScriptLimits) -> Self {
        Self { kind, program: program.into(), limits }
    }
}

#[async_trait]
impl Subkind for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        let failed = |e: ScriptError| DeviceError::failed(device, "match", e);
        let mut process = Process::start(&self.program, device).map_err(failed)?;
        let answer = process.ask("match", self.limits.slow).await.map_err(failed)?;
        process.end().await;
        match answer.as_str() {
            "yes" => Ok(Match::Yes),
            "no" => Ok(Match::No),
            _ => Err(failed(ScriptError::Answer { asked: "match".into(), answer })),
        }
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        let script =
            Scripted { device: device.clone(), program: self.program.clone(), limits: self.limits, process: None };
        Box::new(script)
    }
}

struct Scripted {
    device: Device,
    program: PathBuf,
    limits: ScriptLimits,
    process: Option<Process>,
}

impl Scripted {
    /// One line, to be answered with `ok`. After any failure the program is ended: what it would answer later belongs to
    /// nothing.
    async fn tell(&mut self, line: String, within: Duration) -> Result<(), DeviceError> {
        let Some(process) = &mut self.process else {
            return Err(DeviceError::failed(&self.device, line, ScriptError::NotRunning));
        };
        let result = match process.ask(&line, within).await {
            Ok(answer) if answer == "ok" => return Ok(()),
            Ok(answer) => Err(match answer.strip_prefix("error ") {
                // It said no and lives: the next phase may go better.
                Some(why) => return Err(DeviceError::failed(&self.device, line, ScriptError::Refused(why.into()))),
                None => ScriptError::Answer { asked: line.clone(), answer },
            }),
            Err(error) => Err(error),
        };
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        result.map_err(|e: ScriptError| DeviceError::failed(&self.device, line, e))
    }
}

#[async_trait]
impl Checkpointed for Scripted {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        let process = Process::start(&self.program, &self.device);
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
            let process = Process::start(&self.program, &self.device);
            self.process = Some(process.map_err(|e| DeviceError::failed(&self.device, "tear down", e))?);
        }
        let word = if ending == Ending::Release { "release" } else { "discard" };
        self.tell(format!("teardown {word}"), self.limits.slow).await?;
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        Ok(())
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

    async fn confirm(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        self.tell(format!("confirm {}", epoch.epoch), self.limits.running).await
    }

    async fn commit(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        self.tell(format!("commit {}", epoch.epoch), self.limits.running).await
    }

    async fn abandon(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        self.tell(format!("abandon {}", epoch.epoch), self.limits.running).await
    }
}

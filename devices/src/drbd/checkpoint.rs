//! A disk on DRBD with protocol D, epoch by epoch.
//!
//! The two ioctls are made by a co-process, `scripts/drbd-checkpoint`: one is sent while the guest is suspended, the other waits for the
//! peer while it runs, before the epoch is declared whole. libxl waits while the guest is suspended and ignores both results
//! (libxl_remus_disk_drbd.c); here each failure is the epoch's.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

use super::probe::{Finding, probe};
use super::{NotChosen, PATIENCE};
use crate::device::{Device, Ending, EpochContext};
use crate::error::DeviceError;
use crate::script::process::{Process, ScriptError, trusted};
use crate::subkind::Checkpointed;

/// How long the co-process may take.
#[derive(Debug, Clone, Copy)]
pub struct DrbdLimits {
    /// For a checkpoint to be sent: the guest stands still.
    pub paused: Duration,
    /// For the peer to have it: the guest runs.
    pub running: Duration,
}

/// Why a checkpoint is none.
#[derive(Debug, thiserror::Error)]
enum CheckpointError {
    #[error("its peer may have applied writes of an epoch that will never be acknowledged; protect the guest anew")]
    Ahead,
    #[error("the program answered {0:?} with {1:?}")]
    Answer(&'static str, String),
}

pub(super) struct Replicated {
    device: Device,
    path: PathBuf,
    probe: PathBuf,
    program: PathBuf,
    limits: DrbdLimits,
    process: Option<Process>,
    /// A checkpoint was queued that nobody has waited for.
    queued: bool,
}

impl Replicated {
    pub(super) fn new(device: Device, path: PathBuf, probe: PathBuf, program: PathBuf, limits: DrbdLimits) -> Self {
        Self { device, path, probe, program, limits, process: None, queued: false }
    }

    /// One line and its answer. After any failure the program is ended, and the device refuses further epochs.
    async fn ask(&mut self, line: &'static str, within: Duration) -> Result<String, DeviceError> {
        let Some(mut process) = self.process.take() else {
            return Err(DeviceError::failed(&self.device, line, ScriptError::NotRunning));
        };
        let failed = match process.ask(line, within).await {
            Ok(answer) => match answer.strip_prefix("error ") {
                None => {
                    self.process = Some(process);
                    return Ok(answer);
                }
                Some(why) => ScriptError::Refused(why.to_owned()),
            },
            Err(error) => error,
        };
        process.end().await;
        Err(DeviceError::failed(&self.device, line, failed))
    }

    async fn refuse(&mut self, doing: &'static str, error: CheckpointError) -> DeviceError {
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        DeviceError::failed(&self.device, doing, error)
    }
}

#[async_trait]
impl Checkpointed for Replicated {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        let environment = [("REMUS_TARGET".to_owned(), self.path.display().to_string())].into();
        tracing::warn!(device = %self.device, "{}", NotChosen);
        let started =
            trusted(&self.program).and_then(|()| Process::start(&self.program, &environment, self.device.to_string()));
        self.process = Some(started.map_err(|e| DeviceError::failed(&self.device, "set up", e))?);
        Ok(())
    }

    async fn teardown(&mut self, _ending: Ending) -> Result<(), DeviceError> {
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        Ok(())
    }

    async fn is_ready(&mut self) -> bool {
        // The probe says yes only for a pair that is connected and up to date on both hosts.
        match probe(&self.probe, &self.path, PATIENCE).await {
            Ok(finding) => finding == Finding::ProtocolD,
            Err(error) => {
                tracing::info!(device = %self.device, %error, "not ready yet");
                false
            }
        }
    }

    async fn postsuspend(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        self.queued = match self.ask("send", self.limits.paused).await?.as_str() {
            "queued" => true,
            "empty" => false,
            other => {
                let error = CheckpointError::Answer("send", other.to_owned());
                return Err(self.refuse("send", error).await);
            }
        };
        Ok(())
    }

    async fn confirm(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.queued) {
            return Ok(());
        }
        match self.ask("wait", self.limits.running).await?.as_str() {
            "ok" => Ok(()),
            other => {
                let error = CheckpointError::Answer("wait", other.to_owned());
                Err(self.refuse("wait", error).await)
            }
        }
    }

    async fn abandon(&mut self, _epoch: &EpochContext) -> Result<(), DeviceError> {
        if self.queued { Err(self.refuse("abandon", CheckpointError::Ahead).await) } else { Ok(()) }
    }
}

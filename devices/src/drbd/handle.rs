//! One DRBD device through its epochs.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{CheckpointIoctls, DrbdLimits, Sent};
use crate::device::{Device, Ending, EpochContext};
use crate::error::{BoxError, DeviceError};
use crate::subkind::Checkpointed;

#[derive(Debug, thiserror::Error)]
enum DrbdError {
    #[error("{0}: {1}; look at /proc/drbd")]
    Ioctl(&'static str, io::Error),
    #[error("{0} did not return within {1:?}; look at /proc/drbd")]
    Timeout(&'static str, Duration),
    #[error("an earlier checkpoint failed or its outcome is unknown: protect again")]
    GivenUp,
    #[error("epoch {0} was not closed")]
    NotClosed(u64),
    #[error("the disk has no path")]
    NoPath,
}

/// What the driver was told last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// `SEND_CHECKPOINT` was done for the epoch; whether an acknowledgement is owed.
    Closed(u64, Sent),
    /// All of the epoch is at the peer.
    Confirmed(u64),
    /// An outcome is unknown: whatever comes next could be counted for the wrong checkpoint.
    GivenUp,
}

pub(super) struct Handle {
    device: Device,
    path: Option<PathBuf>,
    ioctls: Arc<dyn CheckpointIoctls>,
    limits: DrbdLimits,
    state: State,
}

impl Handle {
    pub(super) fn new(
        device: Device,
        path: Option<PathBuf>,
        ioctls: Arc<dyn CheckpointIoctls>,
        limits: DrbdLimits,
    ) -> Self {
        Self { device, path, ioctls, limits, state: State::Open }
    }

    fn failed(&self, doing: String, error: DrbdError) -> DeviceError {
        DeviceError::failed(&self.device, doing, Box::new(error) as BoxError)
    }

    /// Runs an ioctl on a thread that may block. A timeout leaves it there, and its outcome unknown.
    async fn ioctl<T: Send + 'static>(
        &self,
        name: &'static str,
        within: Duration,
        call: impl FnOnce(&dyn CheckpointIoctls, &std::path::Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DrbdError> {
        let (ioctls, path) = (self.ioctls.clone(), self.path.clone().ok_or(DrbdError::NoPath)?);
        match timeout(within, spawn_blocking(move || call(&*ioctls, &path))).await {
            Err(_) => Err(DrbdError::Timeout(name, within)),
            Ok(Err(panicked)) => Err(DrbdError::Ioctl(name, io::Error::other(panicked))),
            Ok(Ok(result)) => result.map_err(|e| DrbdError::Ioctl(name, e)),
        }
    }

    async fn wait(&mut self, epoch: u64) -> Result<(), DrbdError> {
        match self.state {
            State::GivenUp => Err(DrbdError::GivenUp),
            State::Confirmed(n) if n == epoch => Ok(()),
            State::Closed(n, sent) if n == epoch => {
                if sent == Sent::Barrier {
                    let done = self.ioctl("DRBD_WAIT_CHECKPOINT_ACK", self.limits.wait, |i, path| i.wait(path)).await;
                    if done.is_err() {
                        self.state = State::GivenUp;
                    }
                    done?;
                }
                self.state = State::Confirmed(epoch);
                Ok(())
            }
            _ => Err(DrbdError::NotClosed(epoch)),
        }
    }
}

#[async_trait]
impl Checkpointed for Handle {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn teardown(&mut self, _ending: Ending) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn postsuspend(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let doing = || format!("close epoch {}", epoch.epoch);
        if self.state == State::GivenUp {
            return Err(self.failed(doing(), DrbdError::GivenUp));
        }
        match self.ioctl("DRBD_SEND_CHECKPOINT", self.limits.send, |i, path| i.send(path)).await {
            Ok(sent) => {
                self.state = State::Closed(epoch.epoch, sent);
                Ok(())
            }
            Err(error) => {
                self.state = State::GivenUp;
                Err(self.failed(doing(), error))
            }
        }
    }

    async fn confirm(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let done = self.wait(epoch.epoch).await;
        done.map_err(|e| self.failed(format!("wait for epoch {}", epoch.epoch), e))
    }

    /// An epoch that was not confirmed is not committed.
    async fn commit(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        match self.state {
            State::Confirmed(n) if n == epoch.epoch => Ok(()),
            State::GivenUp => Err(self.failed(format!("commit epoch {}", epoch.epoch), DrbdError::GivenUp)),
            _ => Err(self.failed(format!("commit epoch {}", epoch.epoch), DrbdError::NotClosed(epoch.epoch))),
        }
    }

    /// The driver counts checkpoints: an acknowledgement that is owed has to be taken before the next one is sent.
    async fn abandon(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        match self.state {
            State::Closed(n, _) if n == epoch.epoch => {
                let done = self.wait(n).await;
                done.map_err(|e| self.failed(format!("abandon epoch {n}"), e))
            }
            _ => Ok(()),
        }
    }
}

//! The backup's side: what a program is told that keeps the copy of a disk.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::ScriptLimits;
use super::process::{Process, ScriptError, trusted};

/// Between two questions whether an epoch is there: from the first to the last.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// A disk of which a program keeps the copy. Goes to the backup with the guest's configuration, and into its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptedDisk {
    /// The guest's name for it: `xvdb`.
    pub vdev: String,
    /// The program, an absolute path, the same on both hosts.
    pub program: PathBuf,
    /// The block device or file that it is on each host: libxl's `pdev_path`.
    pub target: String,
    /// The guest's name.
    pub domain: String,
    /// The guest's UUID.
    pub uuid: String,
}

impl ScriptedDisk {
    /// What its program finds in its environment. `side`: `primary` or `backup`.
    pub(super) fn environment(&self, side: &str) -> BTreeMap<String, String> {
        let pairs = [
            ("REMUS_SIDE", side),
            ("REMUS_VDEV", &self.vdev),
            ("REMUS_TARGET", &self.target),
            ("REMUS_DOMAIN", &self.domain),
            ("REMUS_UUID", &self.uuid),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }
}

/// A program did not do what the backup needs.
#[derive(Debug, thiserror::Error)]
#[error("disk {vdev}: {program}: {source}")]
pub struct ScriptStandbyError {
    /// The disk.
    pub vdev: String,
    /// The program.
    pub program: PathBuf,
    /// Why.
    pub source: crate::BoxError,
}

struct Kept {
    disk: ScriptedDisk,
    process: Mutex<Option<Process>>,
}

/// The disks of one incoming protection that programs keep, all together. Each program runs from the first word to it until
/// [`ScriptStandby::release`] or the end of this.
#[derive(Clone, Default)]
pub struct ScriptStandby {
    disks: Vec<Arc<Kept>>,
    limits: ScriptLimits,
}

impl std::fmt::Debug for ScriptStandby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.disks.iter().map(|kept| &kept.disk)).finish()
    }
}

impl Kept {
    fn error(&self, source: impl Into<crate::BoxError>) -> ScriptStandbyError {
        ScriptStandbyError { vdev: self.disk.vdev.clone(), program: self.disk.program.clone(), source: source.into() }
    }

    /// One line and its answer. A program that has ended is started anew; one that does not answer is ended.
    async fn ask(&self, line: &str, within: Duration) -> Result<String, ScriptStandbyError> {
        let mut running = self.process.lock().await;
        let mut process = match running.take() {
            Some(process) => process,
            None => {
                trusted(&self.disk.program).map_err(|e| self.error(e))?;
                let environment = self.disk.environment("backup");
                let about = format!("copy of disk {} of {}", self.disk.vdev, self.disk.domain);
                Process::start(&self.disk.program, &environment, about).map_err(|e| self.error(e))?
            }
        };
        match process.ask(line, within).await {
            Ok(answer) => {
                *running = Some(process);
                Ok(answer)
            }
            Err(error) => {
                process.end().await;
                Err(self.error(error))
            }
        }
    }

    async fn tell(&self, line: &str, within: Duration) -> Result<(), ScriptStandbyError> {
        let answer = self.ask(line, within).await?;
        if answer == "ok" {
            return Ok(());
        }
        Err(self.error(match answer.strip_prefix("error ") {
            Some(why) => ScriptError::Refused(why.into()),
            None => ScriptError::Answer { asked: line.into(), answer },
        }))
    }

    async fn hold(&self, epoch: u64, within: Duration) {
        let mut pause = PAUSE.0;
        loop {
            match self.ask(&format!("held {epoch}"), within).await.as_deref() {
                Ok("yes") => return,
                Ok("no") => {}
                Ok(other) => tracing::debug!(disk = self.disk.vdev, epoch, answer = other, "not held yet"),
                Err(error) => {
                    tracing::debug!(disk = self.disk.vdev, epoch, %error, "not held yet");
                    pause = PAUSE.1;
                }
            }
            // A program has no event to wait for: it is asked again, ever less often.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }
}

impl ScriptStandby {
    /// For these disks. Nothing runs before the first request.
    #[must_use]
    pub fn new(disks: Vec<ScriptedDisk>, limits: ScriptLimits) -> Self {
        let kept = |disk| Arc::new(Kept { disk, process: Mutex::new(None) });
        Self { disks: disks.into_iter().map(kept).collect(), limits }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// The disks.
    #[must_use]
    pub fn disks(&self) -> Vec<ScriptedDisk> {
        self.disks.iter().map(|kept| kept.disk.clone()).collect()
    }

    async fn all(&self, line: &str, within: Duration) -> Result<(), ScriptStandbyError> {
        try_join_all(self.disks.iter().map(|kept| kept.tell(line, within))).await.map(drop)
    }

    /// A copy of the guest begins to arrive: what the disk has here will be overwritten.
    ///
    /// # Errors
    /// The first program's.
    pub async fn accept(&self) -> Result<(), ScriptStandbyError> {
        self.all("accept", self.limits.slow).await
    }

    /// Returns once every program has all of the epoch. Never, if one does not get it.
    pub async fn hold(&self, epoch: u64) {
        join_all(self.disks.iter().map(|kept| kept.hold(epoch, self.limits.running))).await;
    }

    /// The memory will never go back before this epoch.
    ///
    /// # Errors
    /// The first program's.
    pub async fn commit(&self, epoch: u64) -> Result<(), ScriptStandbyError> {
        self.all(&format!("commit {epoch}"), self.limits.running).await
    }

    /// Makes every disk exactly that of `epoch`, and usable by xl (R5).
    ///
    /// # Errors
    /// The first program's; then none may be used, see [`ScriptStandby::release`].
    pub async fn activate(&self, epoch: u64) -> Result<(), ScriptStandbyError> {
        self.all(&format!("activate {epoch}"), self.limits.slow).await
    }

    /// The copy of the guest is gone, or never came to be; ends the programs. Returns what could not be done.
    pub async fn release(&self) -> Vec<ScriptStandbyError> {
        let release = |kept: &Arc<Kept>| {
            let (kept, within) = (kept.clone(), self.limits.slow);
            async move {
                let told = kept.tell("release", within).await;
                if let Some(process) = kept.process.lock().await.take() {
                    process.end().await;
                }
                told
            }
        };
        join_all(self.disks.iter().map(release)).await.into_iter().filter_map(Result::err).collect()
    }
}

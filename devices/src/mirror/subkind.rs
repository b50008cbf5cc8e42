//! The subkind that takes disks of ours.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::client::{ClientError, DiskClient, LINKS, RUN, events};
use super::service::DiskEvent;
use super::standby;
use crate::device::{Device, DeviceStats, Ending, EpochContext, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};

/// How the device layer finds mirrored disks, and what it does with them.
#[derive(Debug, Clone)]
pub struct MirrorConfig {
    /// Where their services have their sockets.
    pub run: PathBuf,
    /// Where the links to their block devices are.
    pub links: PathBuf,
    /// How long closing an epoch may take, the guest suspended; it takes less than a millisecond.
    pub barrier: Duration,
    /// The peer's host name, as `ssh` takes it: how a copy is reached that nobody has configured a way to.
    pub peer: Option<String>,
}

impl Default for MirrorConfig {
    fn default() -> Self {
        Self { run: RUN.into(), links: LINKS.into(), barrier: Duration::from_secs(2), peer: None }
    }
}

/// Something happened to a disk that has been set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskNews {
    /// The disk.
    pub disk: String,
    /// What.
    pub event: DiskEvent,
}

/// Takes disks whose block device is a mirrored disk's.
#[derive(Debug, Clone)]
pub struct Mirror {
    config: MirrorConfig,
    news: mpsc::Sender<DiskNews>,
}

/// A disk of ours that cannot be kept in step.
#[derive(Debug, thiserror::Error)]
enum MirrorError {
    /// Hazard F12a.
    #[error(
        "its backend is {0:?}: with anything but phy: dom0's page cache is between the guest and the mirror, and an \
             epoch would not have what the guest has written; write 'phy:{1}' in the configuration"
    )]
    Backend(String, String),
    #[error("the disk is {0} on this host, not the source")]
    Role(String),
    #[error("the disk is closed: `remus disk attach` opens it")]
    Closed,
    #[error(
        "nobody has said how the disk's copy is reached: `remus disk create {0} ... --via 'ssh HOST remus-disk connect {0}'`"
    )]
    Alone(String),
}

impl Mirror {
    /// What happens to the disks that it takes goes to `news`.
    #[must_use]
    pub fn new(config: MirrorConfig, news: mpsc::Sender<DiskNews>) -> Self {
        Self { config, news }
    }

    /// The name of the mirrored disk that a device is, if it is one.
    #[must_use]
    pub fn name_of(&self, device: &Device) -> Option<String> {
        let target = device.param("params").or_else(|| device.param("physical-device-path"))?;
        standby::name_of(&self.config.links, target)
    }
}

#[async_trait]
impl Subkind for Mirror {
    fn name(&self) -> &'static str {
        "mirror"
    }

    fn kind(&self) -> Kind {
        Kind::Disk
    }

    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        let Some(name) = self.name_of(device) else { return Ok(Match::No) };
        let backend = device.param("type").unwrap_or("phy");
        if backend != "phy" {
            let path = self.config.links.join(name).display().to_string();
            return Err(DeviceError::failed(device, "look at it", MirrorError::Backend(backend.to_owned(), path)));
        }
        Ok(Match::Yes)
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        let name = self.name_of(device).unwrap_or_default();
        Box::new(Mirrored {
            device: device.clone(),
            client: DiskClient::new(&self.config.run, &name),
            config: self.config.clone(),
            news: self.news.clone(),
            following: None,
            stats: DeviceStats::default(),
        })
    }
}

struct Mirrored {
    device: Device,
    client: DiskClient,
    config: MirrorConfig,
    news: mpsc::Sender<DiskNews>,
    following: Option<JoinHandle<()>>,
    stats: DeviceStats,
}

impl Mirrored {
    /// Passes the disk's events on, from now on.
    async fn follow(&mut self) -> Result<(), ClientError> {
        let disk = self.client.disk().to_owned();
        let mut events = events(&self.config.run, &disk).await?;
        let news = self.news.clone();
        self.following = Some(tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if news.send(DiskNews { disk: disk.clone(), event }).await.is_err() {
                    return;
                }
            }
            // A service that ends, ends the session too; the new one reconnects, unarmed.
            let event = DiskEvent::Disconnected { why: "its service has ended".into() };
            drop(news.send(DiskNews { disk, event }).await);
        }));
        Ok(())
    }

    fn unfollow(&mut self) {
        if let Some(task) = self.following.take() {
            task.abort();
        }
    }

    fn failed(&self, doing: impl Into<String>) -> impl FnOnce(ClientError) -> DeviceError {
        let (device, doing) = (self.device.clone(), doing.into());
        move |error| DeviceError::failed(&device, doing, error)
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        self.unfollow();
    }
}

#[async_trait]
impl Checkpointed for Mirrored {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        let status = self.client.status().await.map_err(self.failed("set up"))?;
        let wrong = match status {
            status if status.role != "source" => Some(MirrorError::Role(status.role)),
            status if !status.open => Some(MirrorError::Closed),
            _ => None,
        };
        if let Some(wrong) = wrong {
            return Err(DeviceError::failed(&self.device, "set up", wrong));
        }
        // A new session in any case: the epochs of this protection begin in it, and none of an earlier one are left.
        if self.client.connect(None).await.is_err() {
            let disk = self.client.disk().to_owned();
            let Some(peer) = &self.config.peer else {
                return Err(DeviceError::failed(&self.device, "set up", MirrorError::Alone(disk)));
            };
            let via = format!("exec ssh -T -o BatchMode=yes -o ServerAliveInterval=5 {peer} remus-disk connect {disk}");
            self.client.connect(Some(&via)).await.map_err(self.failed("set up"))?;
        }
        self.follow().await.map_err(self.failed("set up"))
    }

    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError> {
        self.unfollow();
        end_protection(&mut self.client, ending).await.map_err(self.failed("tear down"))
    }

    async fn is_ready(&mut self) -> bool {
        self.client.status().await.is_ok_and(|status| status.connected && status.in_sync)
    }

    async fn arm(&mut self) -> Result<(), DeviceError> {
        self.client.arm().await.map_err(self.failed("arm"))
    }

    async fn postsuspend(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        // Before that the disk follows by itself, and the backup asks for nothing.
        if !epoch.armed {
            return Ok(());
        }
        let closed = self.client.barrier(epoch.epoch, self.config.barrier).await;
        let closed = closed.map_err(self.failed(format!("close epoch {}", epoch.epoch)))?;
        (self.stats.queued, self.stats.queued_bytes) = (closed.records, closed.bytes);
        Ok(())
    }

    // Nothing to commit here: the backup's daemon commits there, and marks go when that is durable. An abandoned epoch's
    // writes are in the log before those of the next one, which covers them.

    fn stats(&self) -> DeviceStats {
        self.stats
    }

    fn record(&self) -> serde_json::Value {
        serde_json::json!({ "disk": self.client.disk() })
    }
}

/// Ends the care for a disk, also after a restart of the daemon: `client` is for the disk that the record names.
///
/// # Errors
/// [`ClientError`]. With [`Ending::Discard`] the disk may then still be in use here.
pub async fn end_protection(client: &mut DiskClient, ending: Ending) -> Result<(), ClientError> {
    match ending {
        Ending::Release => client.disarm().await,
        // The other host's copy goes on: this one is to follow it, and what only this one has is undone (hazard F16).
        Ending::Discard => match client.status().await?.role.as_str() {
            "source" => {
                client.close().await?;
                client.demote().await
            }
            _ => Ok(()),
        },
        Ending::Hold => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(values: &[(&str, &str)]) -> Device {
        Device {
            kind: Kind::Disk,
            domid: 1,
            devid: 51712,
            names: vec!["xvda".into()],
            params: values.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        }
    }

    #[tokio::test]
    async fn only_direct_phy_disks_of_ours_match() {
        let config = MirrorConfig { run: "/none".into(), ..MirrorConfig::default() };
        let mirror = Mirror::new(config, mpsc::channel(1).0);
        let ours = disk(&[("params", "/dev/remus/root"), ("type", "phy")]);
        assert_eq!(mirror.matches(&ours).await.unwrap(), Match::Yes);
        assert_eq!(mirror.matches(&disk(&[("params", "/dev/vg/root")])).await.unwrap(), Match::No);
        let cached = mirror.matches(&disk(&[("params", "/dev/remus/root"), ("type", "qdisk")])).await.unwrap_err();
        assert!(cached.to_string().contains("page cache"), "{cached}");
        let error = mirror.attach(&ours).setup().await.unwrap_err();
        assert!(error.to_string().contains("remus-disk@root"), "{error}");
    }
}

//! The subkind that takes disks of ours.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use super::client::{ClientError, DiskClient};
use crate::device::{Device, DeviceStats, Ending, EpochContext, Kind};
use crate::error::DeviceError;
use crate::subkind::{Checkpointed, Match, Subkind};

/// Takes disks whose block device is a mirrored disk's.
#[derive(Debug, Clone)]
pub struct Mirror {
    run: PathBuf,
    links: PathBuf,
    barrier: Duration,
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
    #[error("the disk is closed: the service was told nobody may use it")]
    Closed,
    #[error(
        "the disk has no connection to its copy: look at the disk service of the other host, or \
             `remus-disk ctl {0} connect via='ssh HOST remus-disk connect {0}'`"
    )]
    Alone(String),
}

impl Mirror {
    /// Disks whose services have their sockets in `run`, and whose block devices have links in `links`. `barrier` is how
    /// long closing an epoch may take, the guest suspended; it takes less than a millisecond.
    #[must_use]
    pub fn new(run: &Path, links: &Path, barrier: Duration) -> Self {
        Self { run: run.to_owned(), links: links.to_owned(), barrier }
    }

    /// The name of the mirrored disk that a device is, if it is one.
    #[must_use]
    pub fn name_of(&self, device: &Device) -> Option<String> {
        let target = device.param("params").or_else(|| device.param("physical-device-path"))?;
        Path::new(target).strip_prefix(&self.links).ok()?.to_str().filter(|name| !name.contains('/')).map(str::to_owned)
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
            let path = self.links.join(name).display().to_string();
            return Err(DeviceError::failed(device, "look at it", MirrorError::Backend(backend.to_owned(), path)));
        }
        Ok(Match::Yes)
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        let name = self.name_of(device).unwrap_or_default();
        Box::new(Mirrored {
            device: device.clone(),
            client: DiskClient::new(&self.run, &name),
            barrier: self.barrier,
            stats: DeviceStats::default(),
        })
    }
}

struct Mirrored {
    device: Device,
    client: DiskClient,
    barrier: Duration,
    stats: DeviceStats,
}

impl Mirrored {
    fn failed(&self, doing: impl Into<String>) -> impl FnOnce(ClientError) -> DeviceError {
        let (device, doing) = (self.device.clone(), doing.into());
        move |error| DeviceError::failed(&device, doing, error)
    }
}

#[async_trait]
impl Checkpointed for Mirrored {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        let status = self.client.status().await.map_err(self.failed("set up"))?;
        let wrong = match status {
            status if status.role != "source" => MirrorError::Role(status.role),
            status if !status.open => MirrorError::Closed,
            status if !status.connected => MirrorError::Alone(status.name),
            _ => return Ok(()),
        };
        Err(DeviceError::failed(&self.device, "set up", wrong))
    }

    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError> {
        end_protection(&mut self.client, ending).await.map_err(self.failed("tear down"))
    }

    async fn arm(&mut self) -> Result<(), DeviceError> {
        self.client.arm().await.map_err(self.failed("arm"))
    }

    async fn postsuspend(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let closed = self.client.barrier(epoch.epoch, self.barrier).await;
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
        Ending::Discard => client.close().await,
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
        let mirror = Mirror::new(Path::new("/none"), Path::new("/dev/remus"), Duration::from_secs(1));
        let ours = disk(&[("params", "/dev/remus/root"), ("type", "phy")]);
        assert_eq!(mirror.matches(&ours).await.unwrap(), Match::Yes);
        assert_eq!(mirror.matches(&disk(&[("params", "/dev/vg/root")])).await.unwrap(), Match::No);
        let cached = mirror.matches(&disk(&[("params", "/dev/remus/root"), ("type", "qdisk")])).await.unwrap_err();
        assert!(cached.to_string().contains("page cache"), "{cached}");
        let error = mirror.attach(&ours).setup().await.unwrap_err();
        assert!(error.to_string().contains("remus-disk@root"), "{error}");
    }
}

//! The disks of one incoming protection, as the backup's daemon drives them: all together, over their services' sockets.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};

use super::client::{ClientError, DiskClient};

/// How long one look for an epoch takes at most; then it is looked for again.
const LOOK: Duration = Duration::from_secs(2);
/// Between looks at a disk that cannot have the epoch yet, such as one without a session.
const PAUSE: Duration = Duration::from_millis(100);
/// How long writing all that is held may take, before the guest goes on.
const ACTIVATION: Duration = Duration::from_secs(120);

/// A disk cannot be what the backup needs.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// Its service did not do something.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It may not be overwritten.
    #[error(
        "disk {0} is a source on this host, {1}: if its contents may be overwritten, `remus disk demote {0}` on this host \
             says so"
    )]
    Source(String, &'static str),
}

/// The mirrored disks of one protection on the backup.
#[derive(Debug, Clone)]
pub struct Standby {
    run: PathBuf,
    names: Vec<String>,
}

/// Below [`super::client::LINKS`]: a link for each device-mapper device that is moved onto a mirrored disk, with that disk's name.
pub const ABOVE: &str = ".above";

/// The mirrored disk that a guest's disk is, if it is one: its link, or a device-mapper device that is moved onto it. Looks into the
/// file system; does not wait.
#[must_use]
pub fn name_of(links: &Path, target: &str) -> Option<String> {
    let target = Path::new(target);
    if let Ok(below) = target.strip_prefix(links) {
        return below.to_str().filter(|name| !name.is_empty() && !name.contains('/')).map(str::to_owned);
    }
    let device = target.canonicalize().ok()?;
    let above = std::fs::read_dir(links.join(ABOVE)).ok()?.flatten();
    let same = above.filter(|entry| entry.path().canonicalize().is_ok_and(|path| path == device));
    same.filter_map(|entry| entry.file_name().into_string().ok()).next()
}

impl Standby {
    /// The disks `names`, whose services have their sockets in `run`.
    #[must_use]
    pub fn new(run: &Path, names: Vec<String>) -> Self {
        Self { run: run.to_owned(), names }
    }

    /// Their names.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    fn clients(&self) -> impl Iterator<Item = DiskClient> + '_ {
        self.names.iter().map(|name| DiskClient::new(&self.run, name))
    }

    /// Makes them follow whoever connects, if they may be overwritten: a disk that was used here must be given free first.
    ///
    /// # Errors
    /// The first disk that cannot.
    pub async fn accept(&self) -> Result<(), StandbyError> {
        let accept = |mut disk: DiskClient| async move {
            let status = disk.status().await?;
            match status.role.as_str() {
                "source" if status.open => Err(StandbyError::Source(status.name, "and in use")),
                "source" => Err(StandbyError::Source(status.name, "closed")),
                "target" => Ok(disk.disarm().await?),
                _ => Ok(disk.demote().await?),
            }
        };
        try_join_all(self.clients().map(accept)).await.map(drop)
    }

    /// Returns once all of the epoch's writes are here on every disk. Never, if they do not come.
    pub async fn hold(&self, epoch: u64) {
        let hold = |mut disk: DiskClient| async move {
            loop {
                let asked = Instant::now();
                match disk.held(epoch, LOOK).await {
                    Ok(true) => return,
                    Ok(false) => {}
                    Err(error) => tracing::debug!(disk = disk.disk(), epoch, %error, "not held yet"),
                }
                // One that waited has waited; the others are asked again soon, not at once.
                tokio::time::sleep(PAUSE.saturating_sub(asked.elapsed())).await;
            }
        };
        join_all(self.clients().map(hold)).await;
    }

    /// The memory will never go back before this epoch.
    ///
    /// # Errors
    /// The first disk's.
    pub async fn commit(&self, epoch: u64) -> Result<(), ClientError> {
        try_join_all(self.clients().map(|mut disk| async move { disk.commit(epoch).await })).await.map(drop)
    }

    /// Makes every disk exactly that of `epoch`, and then lets a guest on this host have them (R5). To be called with the
    /// copy of the guest stopped: ownership is proven after this and before it runs.
    ///
    /// # Errors
    /// The first disk's; then none may be used, see [`Standby::release`].
    pub async fn activate(&self, epoch: u64) -> Result<(), ClientError> {
        let activate = |mut disk: DiskClient| async move { disk.activate(epoch, ACTIVATION).await };
        try_join_all(self.clients().map(activate)).await?;
        let open = |mut disk: DiskClient| async move {
            disk.open().await?;
            disk.attach(None).await
        };
        try_join_all(self.clients().map(open)).await.map(drop)
    }

    /// The copy of the guest is gone: the disks follow the source again, or whoever is the source then.
    ///
    /// Returns what could not be done.
    pub async fn release(&self) -> Vec<ClientError> {
        let release = |mut disk: DiskClient| async move {
            if disk.status().await?.role == "source" {
                // Made so by an activation that came to nothing. The guest never ran on it.
                disk.close().await?;
                disk.demote().await
            } else {
                disk.disarm().await
            }
        };
        join_all(self.clients().map(release)).await.into_iter().filter_map(Result::err).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_of_ours_are_mirrored_disks() {
        let links = Path::new("/dev/remus");
        assert_eq!(name_of(links, "/dev/remus/root").as_deref(), Some("root"));
        for other in ["/dev/remus", "/dev/remus/a/b", "/dev/vg/root", "phy:/dev/remus/root", ""] {
            assert_eq!(name_of(links, other), None, "{other}");
        }
    }

    #[test]
    fn a_device_above_a_mirrored_disk_is_known_by_any_of_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let links = dir.path().join("remus");
        std::fs::create_dir_all(links.join(ABOVE)).unwrap();
        let (node, alias) = (dir.path().join("dm-3"), dir.path().join("vg-root"));
        std::fs::write(&node, "").unwrap();
        std::os::unix::fs::symlink(&node, &alias).unwrap();
        assert_eq!(name_of(&links, alias.to_str().unwrap()), None);
        std::os::unix::fs::symlink(&alias, links.join(ABOVE).join("web")).unwrap();
        for path in [&node, &alias] {
            assert_eq!(name_of(&links, path.to_str().unwrap()).as_deref(), Some("web"));
        }
    }
}

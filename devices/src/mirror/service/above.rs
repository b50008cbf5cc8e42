//! A guest's device-mapper device above the disk: it leads to the mirror while the disk is open, to errors while it is closed, and to
//! what it led to at first once the disk is given up.

use std::io;
use std::path::Path;

use super::node::{Duty, Node, NodeError, io_error, lock};
use super::runtime::{self, Runtime};
use crate::mirror::core::meta::{Head, Role};
use crate::mirror::io::{Mapped, MapperError, MetaFile, MetaFileError};
use crate::mirror::standby::ABOVE;

/// Finds the device, and sees to it that what it led to is there to be the backing device.
pub(super) fn prepare(device: &Path, disk: &str) -> Result<Mapped, MapperError> {
    let above = Mapped::open(device, disk)?;
    above.prepare()?;
    Ok(above)
}

/// After a boot of the host the guest's device led past the mirror, until now: nobody knows of what was written so. All of it is
/// compared when the copies meet next.
pub(super) fn distrust(meta: &MetaFile, head: &mut Head) -> Result<(), MetaFileError> {
    if head.role == Role::None || head.lineage == 0 {
        return Ok(());
    }
    head.lineage = 0;
    head.sequence += 1;
    meta.save_head(head)
}

impl Node {
    /// Has others find out that the guest's device is this disk.
    pub(super) fn link_above(&self) -> Result<(), NodeError> {
        let Some(above) = &self.above else { return Ok(()) };
        let (dir, link) = (self.links.join(ABOVE), self.links.join(ABOVE).join(&self.shared.name));
        let linked = std::fs::create_dir_all(dir).and_then(|()| match std::fs::remove_file(&link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => std::os::unix::fs::symlink(above.node(), &link),
        });
        linked.map_err(io_error(link.display().to_string()))
    }

    /// After a start: a disk that is in use elsewhere, or by nobody, is not to be reached past the mirror.
    pub(super) fn settle_above(&self) -> Result<(), NodeError> {
        let closed = match &*lock(&self.shared.duty) {
            // A guest may be using the device: it is moved when the disk is attached.
            Duty::None => false,
            Duty::Source(source) => source.nbd.is_none(),
            Duty::Target(_) => true,
        };
        if closed { self.cut_above() } else { Ok(()) }
    }

    pub(super) fn put_above(&self, index: u32) -> Result<(), NodeError> {
        let size = self.shared.head().geometry.size;
        Ok(self.above.as_ref().map_or(Ok(()), |above| above.onto(index, size))?)
    }

    pub(super) fn cut_above(&self) -> Result<(), NodeError> {
        Ok(self.above.as_ref().map_or(Ok(()), Mapped::cut)?)
    }

    /// Gives the disk up as a mirrored one. A guest that has a device-mapper device above it goes on with what that led to at first.
    ///
    /// # Errors
    /// Under protection; while it is open without such a device, since its guest would have no disk any more.
    pub fn leave(&self) -> Result<(), NodeError> {
        let _changing = self.change()?;
        let name = || self.shared.name.clone();
        let (source, armed, open, nbd) = match &*lock(&self.shared.duty) {
            Duty::None => (false, false, false, None),
            Duty::Source(s) => (true, s.engine.with(|source| source.is_armed()), s.open, s.nbd),
            Duty::Target(follower) => {
                (false, follower.as_ref().is_some_and(|follower| !follower.is_replaceable()), false, None)
            }
        };
        if armed {
            return Err(NodeError::Armed(name()));
        }
        match &self.above {
            Some(above) => above.straight()?,
            None if open => return Err(NodeError::Open(name())),
            None => {}
        }
        // From here on nothing reaches the mirror, and what is written now is in no marks.
        if source {
            self.disconnect()?;
            if let Some(index) = nbd {
                self.take_from_kernel(index)?;
            }
            self.source(|s| s.open = false)?;
        }
        let mut duty = lock(&self.shared.duty);
        match &*duty {
            Duty::Source(source) => source.engine.stop(),
            Duty::Target(Some(follower)) => follower.stop(),
            Duty::Target(None) | Duty::None => {}
        }
        self.shared.change_head(|head| {
            (head.role, head.lineage) = (Role::None, 0);
            (head.synced, head.applying, head.epoch) = (false, false, None);
        })?;
        *duty = Duty::None;
        let path = runtime::path(&self.run, &self.shared.name);
        runtime::save(&path, &Runtime::default()).map_err(io_error(path.display().to_string()))?;
        match std::fs::remove_file(self.links.join(ABOVE).join(&self.shared.name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("the link of its device")(e)),
            _ => Ok(()),
        }
    }

    /// Whether the service may end: the disk was left, and the guest does not need it.
    ///
    /// # Errors
    /// When it was not.
    pub fn may_quit(&self) -> Result<(), NodeError> {
        match &*lock(&self.shared.duty) {
            Duty::None => Ok(()),
            _ => Err(NodeError::InUse(self.shared.name.clone())),
        }
    }
}

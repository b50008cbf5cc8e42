//! The disk or file that a mirrored disk lives on.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, fallocate};

use super::buffer::{Buffer, is_aligned};
use super::lock;
use crate::mirror::core::extent::Extent;

/// Zeroes are written in pieces of this size where the disk cannot make them itself.
const ZEROES: usize = 1 << 20;

/// The backing device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Opening failed.
    #[error("backing device {path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No direct I/O: what we write would be in the page cache, where the guest's block backend does not look (F12c).
    #[error("backing device {0} does not support direct I/O: put it on a block device, ext4 or xfs")]
    NoDirectIo(PathBuf),
    /// Another process uses it.
    #[error("backing device {0} is in use by another disk service")]
    InUse(PathBuf),
}

/// An open disk or file, used with direct I/O only. All calls block.
#[derive(Debug)]
pub struct Backing {
    file: Flock<File>,
    size: u64,
}

impl Backing {
    /// Opens it for this process alone.
    ///
    /// The lock lasts until the last request of the process that holds it has ended, also when that was killed: nothing
    /// that it began can reach the disk after something that its successor does.
    ///
    /// # Errors
    /// [`BackingError`]. `wait` seconds are given to a predecessor that is just ending.
    pub fn open(path: &Path, wait: u32) -> Result<Self, BackingError> {
        let open = |source| BackingError::Open { path: path.to_owned(), source };
        let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
        let mut file = match direct {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Err(BackingError::NoDirectIo(path.to_owned())),
            other => other.map_err(open)?,
        };
        let size = file.seek(SeekFrom::End(0)).map_err(open)?;
        let file = lock::exclusive(file, wait).map_err(open)?;
        let file = file.ok_or_else(|| BackingError::InUse(path.to_owned()))?;
        Ok(Self { file, size })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The smallest request that it takes, in bytes: 512 for files.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn block(&self) -> io::Result<u32> {
        let metadata = self.file.metadata()?;
        if !metadata.file_type().is_block_device() {
            return Ok(512);
        }
        let (major, minor) = (nix::sys::stat::major(metadata.rdev()), nix::sys::stat::minor(metadata.rdev()));
        // A partition has no queue of its own.
        for queue in ["queue", "../queue"] {
            let path = format!("/sys/dev/block/{major}:{minor}/{queue}/logical_block_size");
            if let Ok(text) = std::fs::read_to_string(path) {
                return text.trim().parse().map_err(io::Error::other);
            }
        }
        Err(io::Error::other("the kernel does not tell the device's block size"))
    }

    /// Reads all of `extent`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&self, extent: Extent) -> io::Result<Buffer> {
        let mut buffer = Buffer::stale(extent.length as usize);
        self.file.read_exact_at(buffer.as_mut(), extent.offset)?;
        Ok(buffer)
    }

    /// Writes. The bytes are copied unless they lie as direct I/O wants them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if is_aligned(bytes) {
            self.file.write_all_at(bytes, offset)
        } else {
            self.file.write_all_at(Buffer::copy(bytes).as_ref(), offset)
        }
    }

    /// Makes the range read as zeroes. `punch` lets the disk give the space back.
    ///
    /// # Errors
    /// The kernel's.
    pub fn zero(&self, extent: Extent, punch: bool) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let range = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for mode in if punch { [hole, range] } else { [range, range] } {
            match fallocate(&*self.file, mode, extent.offset as i64, i64::from(extent.length)) {
                Ok(()) => return Ok(()),
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let zeroes = Buffer::new(ZEROES.min(extent.length as usize));
        let mut offset = extent.offset;
        while offset < extent.end() {
            let length = ((extent.end() - offset) as usize).min(ZEROES);
            self.file.write_all_at(&zeroes.as_ref()[..length], offset)?;
            offset += length as u64;
        }
        Ok(())
    }

    /// Returns when all that was written is on stable storage.
    ///
    /// # Errors
    /// The kernel's. What of the earlier writes is on stable storage is then unknown.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_zeroes_whether_punched_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let backing = Backing::open(&path, 0).unwrap();
        assert_eq!((backing.size(), backing.block().unwrap()), (1 << 20, 512));
        backing.zero(Extent::new(512, 1024), true).unwrap();
        backing.zero(Extent::new(8192, 4096), false).unwrap();
        backing.write(20480, &[9; 512]).unwrap();
        backing.flush().unwrap();
        let all = std::fs::read(&path).unwrap();
        assert_eq!(all.len(), 1 << 20);
        for (at, byte) in all.iter().enumerate() {
            let want = match at {
                512..1536 | 8192..12288 => 0,
                20480..20992 => 9,
                _ => 7,
            };
            assert_eq!(*byte, want, "byte {at}");
        }
    }

    #[test]
    fn a_second_user_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let first = Backing::open(&path, 0).unwrap();
        assert!(matches!(Backing::open(&path, 0), Err(BackingError::InUse(_))));
        drop(first);
        assert!(Backing::open(&path, 0).is_ok());
    }
}

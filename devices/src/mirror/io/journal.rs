//! The file that held batches spill into: a ring of bytes, past the page cache. What is in it means something to the process
//! that wrote it only; [`crate::mirror::core::spill`] gives out its places.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, Flock, fallocate};

use super::buffer::Buffer;
use super::lock;
use crate::mirror::core::spill::{ALIGN, Place};

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Opening it failed, or setting its space aside.
    #[error(
        "journal {path} cannot be made with {size} bytes: {source}; it needs a file system with direct I/O and so much free \
             space (--journal, --journal-size)"
    )]
    Open {
        /// Which.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("journal {0} is in use by another disk service: give each disk its own")]
    InUse(PathBuf),
    /// What it is on waits for this service.
    #[error(
        "journal {0} is on the disk that this service serves, or on its backing device: it has to be on another one"
    )]
    OwnDisk(PathBuf),
    /// Reading or writing failed.
    #[error("journal {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It lies.
    #[error("journal {0} does not give back what was written to it; look for a faulty disk")]
    Damaged(PathBuf),
}

/// The open file, all of whose space is set aside.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    size: u64,
}

impl Journal {
    /// Opens the file for this process alone, or makes it, with `size` bytes. `backing` and `nbd` are what the journal must
    /// not be on.
    ///
    /// # Errors
    /// [`JournalError`]. `wait` seconds are given to a predecessor that is just ending.
    pub fn open(path: &Path, size: u64, backing: &Path, nbd: Option<u32>, wait: u32) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Open { path: path.to_owned(), size, source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(failed)?;
        let (here, below) = (file.metadata().map_err(failed)?, std::fs::metadata(backing).map_err(failed)?);
        let same = (here.dev(), here.ino()) == (below.dev(), below.ino());
        let on = below_device(here.dev());
        let served = nbd.is_some_and(|index| on.iter().any(|name| *name == format!("nbd{index}")));
        // A regular file's `rdev` is 0, which no device has.
        let on_backing = below.rdev() != 0 && {
            let name = below_device(below.rdev()).into_iter().next();
            name.is_some_and(|name| on.contains(&name))
        };
        if same || served || on_backing {
            return Err(JournalError::OwnDisk(path.to_owned()));
        }
        let file = lock::exclusive(file, wait).map_err(failed)?.ok_or_else(|| JournalError::InUse(path.to_owned()))?;
        let size = size - size % ALIGN;
        file.set_len(size).map_err(failed)?;
        // Space now, so that no epoch ever fails for the lack of it.
        fallocate(&*file, FallocateFlags::empty(), 0, size as i64).map_err(|e| failed(e.into()))?;
        Ok(Self { file, path: path.to_owned(), size })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pieces of the file that a place is, with their ends within the place.
    fn pieces(&self, place: Place) -> [(u64, usize, usize); 2] {
        let at = place.at % self.size;
        let first = place.length.min(self.size - at) as usize;
        [(at, 0, first), (0, first, place.length as usize)]
    }

    fn failed(&self, source: io::Error) -> JournalError {
        JournalError::Io { path: self.path.clone(), source }
    }

    /// Writes all of a place.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn write(&self, place: Place, bytes: &Buffer) -> Result<(), JournalError> {
        for (at, from, to) in self.pieces(place) {
            self.file.write_all_at(&bytes.as_ref()[from..to], at).map_err(|e| self.failed(e))?;
        }
        Ok(())
    }

    /// Reads all of a place.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn read(&self, place: Place) -> Result<Buffer, JournalError> {
        let mut bytes = Buffer::new(place.length as usize);
        for (at, from, to) in self.pieces(place) {
            self.file.read_exact_at(&mut bytes.as_mut()[from..to], at).map_err(|e| self.failed(e))?;
        }
        Ok(bytes)
    }
}

/// The kernel's name of a block device, and of those that it is made of. Nothing for what is none, as the devices of btrfs.
fn below_device(device: u64) -> Vec<String> {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let Ok(path) = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else { return Vec::new() };
    let mut names = Vec::new();
    let mut left = vec![path];
    while let Some(path) = left.pop() {
        names.extend(path.file_name().and_then(|name| name.to_str()).map(str::to_owned));
        let slaves = std::fs::read_dir(path.join("slaves")).into_iter().flatten().flatten();
        left.extend(slaves.filter_map(|slave| std::fs::canonicalize(slave.path()).ok()));
        // A partition's disk.
        if path.join("partition").exists() {
            left.extend(path.parent().map(Path::to_owned));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_may_wrap_around_the_end_and_space_is_there_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = (dir.path().join("journal"), dir.path().join("disk"));
        std::fs::write(&disk, vec![0; 4096]).unwrap();
        let journal = Journal::open(&path, 5 * ALIGN, &disk, Some(0), 0).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 5 * ALIGN);
        let place = Place { at: 13 * ALIGN, length: 4 * ALIGN };
        let bytes: Vec<u8> = (0..4 * ALIGN).map(|n| (n / 1000) as u8).collect();
        journal.write(place, &Buffer::copy(&bytes)).unwrap();
        assert!(journal.read(place).unwrap().as_ref() == bytes);
        let file = std::fs::read(&path).unwrap();
        assert!(file[3 * 4096..] == bytes[..2 * 4096] && file[..2 * 4096] == bytes[2 * 4096..]);
        assert!(matches!(Journal::open(&path, ALIGN, &disk, None, 0), Err(JournalError::InUse(_))));
        drop(journal);
        assert_eq!(Journal::open(&path, ALIGN, &disk, None, 0).unwrap().size(), ALIGN, "it may become smaller");
    }

    #[test]
    fn a_journal_that_is_the_disk_itself_or_has_no_space_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, vec![7; 4096]).unwrap();
        assert!(matches!(Journal::open(&disk, 8192, &disk, None, 0), Err(JournalError::OwnDisk(_))));
        assert_eq!(std::fs::read(&disk).unwrap(), vec![7; 4096], "and is not touched");
        let much = Journal::open(&dir.path().join("journal"), 1 << 50, &disk, None, 0);
        assert!(matches!(much, Err(JournalError::Open { .. })), "{much:?}");
    }
}

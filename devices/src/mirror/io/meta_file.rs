//! The metadata file: [`crate::mirror::core::meta`] has its layout.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::buffer::Buffer;
use crate::mirror::core::extent::Geometry;
use crate::mirror::core::meta::{BLOCK, Head, MetaError, PAGE_BYTES, PageImage, encode_page, pages};

/// The metadata cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetaFileError {
    /// Reading or writing failed.
    #[error("metadata file {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is valid and not usable.
    #[error("metadata file {path}: {source}")]
    Meta {
        /// Which.
        path: PathBuf,
        /// Why.
        source: MetaError,
    },
    /// It belongs to a disk of another size.
    #[error(
        "metadata file {path} is that of a disk with {theirs:?}, this one has {ours:?}: was the disk resized? \
             Remove the file to begin anew, with everything compared"
    )]
    OtherDisk {
        /// Which.
        path: PathBuf,
        /// In the file.
        theirs: Geometry,
        /// Of the backing device.
        ours: Geometry,
    },
}

/// The open file. Every write is on stable storage when it returns, and goes past the page cache, so that it does not
/// need memory that the kernel may be waiting for us to free.
#[derive(Debug)]
pub struct MetaFile {
    file: File,
    path: PathBuf,
}

/// What was found in it.
#[derive(Debug)]
pub struct Loaded {
    /// The newest head; a new one if there was none.
    pub head: Head,
    /// Pages of marks as they are; for a new head there are none, which counts as all marked.
    pub pages: Vec<Vec<u8>>,
}

impl MetaFile {
    /// Opens the file, or makes it. `log` is a number never used before, for the case that it is made.
    ///
    /// # Errors
    /// [`MetaFileError`].
    pub fn open(path: &Path, geometry: Geometry, log: u128) -> Result<(Self, Loaded), MetaFileError> {
        let io = |source| MetaFileError::Io { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
            .open(path)
            .map_err(io)?;
        let meta = Self { file, path: path.to_owned() };
        let count = pages(geometry.regions());
        let length = (2 + u64::from(count)) * BLOCK as u64;
        if meta.file.metadata().map_err(io)?.len() < length {
            // Space now, so that no mark ever fails for the lack of it.
            nix::fcntl::fallocate(&meta.file, nix::fcntl::FallocateFlags::empty(), 0, length as i64)
                .map_err(|e| io(e.into()))?;
            meta.file.sync_all().map_err(io)?;
            // The file's name has to survive, too.
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(parent).and_then(|dir| dir.sync_all()).map_err(io)?;
        }
        let slots = [meta.read(0)?, meta.read(BLOCK as u64)?];
        let head = Head::newest([&slots[0], &slots[1]])
            .map_err(|source| MetaFileError::Meta { path: path.to_owned(), source })?;
        let Some(head) = head else {
            return Ok((meta, Loaded { head: Head::fresh(geometry, log), pages: Vec::new() }));
        };
        if head.geometry != geometry {
            let (theirs, ours) = (head.geometry, geometry);
            return Err(MetaFileError::OtherDisk { path: path.to_owned(), theirs, ours });
        }
        let pages = (0..count).map(|page| meta.read((2 + u64::from(page)) * BLOCK as u64)).collect::<Result<_, _>>()?;
        Ok((meta, Loaded { head, pages }))
    }

    fn read(&self, offset: u64) -> Result<Vec<u8>, MetaFileError> {
        let mut block = Buffer::new(BLOCK);
        self.file
            .read_exact_at(block.as_mut(), offset)
            .map_err(|source| MetaFileError::Io { path: self.path.clone(), source })?;
        Ok(block.as_ref().to_vec())
    }

    fn write(&self, offset: u64, block: &[u8]) -> Result<(), MetaFileError> {
        self.file
            .write_all_at(Buffer::copy(block).as_ref(), offset)
            .map_err(|source| MetaFileError::Io { path: self.path.clone(), source })
    }

    /// Replaces the head. Its sequence number must have grown by one.
    ///
    /// # Errors
    /// [`MetaFileError::Io`].
    pub fn save_head(&self, head: &Head) -> Result<(), MetaFileError> {
        self.write(head.offset(), &head.encode())
    }

    /// Writes a page of marks.
    ///
    /// # Errors
    /// [`MetaFileError::Io`].
    pub fn save_page(&self, image: &PageImage) -> Result<(), MetaFileError> {
        self.write(image.offset(), &image.bytes)
    }

    /// Takes all marks away.
    ///
    /// # Errors
    /// [`MetaFileError::Io`].
    pub fn clear_pages(&self, log: u128, regions: u32) -> Result<Vec<Vec<u8>>, MetaFileError> {
        let clear = (0..pages(regions)).map(|page| {
            let image = encode_page(log, page, &[0; PAGE_BYTES]);
            self.save_page(&image).map(|()| image.bytes)
        });
        clear.collect()
    }

    /// The pages of marks as they are on disk.
    ///
    /// # Errors
    /// [`MetaFileError::Io`].
    pub fn load_pages(&self, regions: u32) -> Result<Vec<Vec<u8>>, MetaFileError> {
        (0..pages(regions)).map(|page| self.read((2 + u64::from(page)) * BLOCK as u64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::core::intent::Intent;

    #[test]
    fn what_is_saved_is_found_again_and_a_new_file_marks_everything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let geometry = Geometry::new(4 << 20, 512, 1 << 20).unwrap();
        let (meta, loaded) = MetaFile::open(&path, geometry, 42).unwrap();
        assert_eq!(loaded.head, Head::fresh(geometry, 42));
        assert_eq!(Intent::load(42, 4, &loaded.pages).marked(4).count(), 4);
        let mut head = loaded.head;
        head.sequence += 1;
        head.lineage = 5;
        meta.save_head(&head).unwrap();
        meta.clear_pages(42, 4).unwrap();
        let mut intent = Intent::load(42, 4, &meta.load_pages(4).unwrap());
        meta.save_page(&intent.want(2).unwrap()).unwrap();
        drop(meta);
        let (_, found) = MetaFile::open(&path, geometry, 43).unwrap();
        assert_eq!(found.head, head);
        assert_eq!(Intent::load(42, 4, &found.pages).marked(4).collect::<Vec<_>>(), [2]);
        let other = Geometry::new(8 << 20, 512, 1 << 20).unwrap();
        assert!(matches!(MetaFile::open(&path, other, 43), Err(MetaFileError::OtherDisk { .. })));
    }
}

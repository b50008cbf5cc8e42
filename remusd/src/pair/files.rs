//! Files that only root may see: refused when anybody else could have read or changed them, replaced as a whole.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of such a file. Thousands of peers fit.
const LIMIT: u64 = 16 << 20;

/// A key file or the list of peers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Somebody else may have read or changed it.
    #[error(
        "{} is {what}: it may have been read or changed by others and is not used. If you trust it: chown root:root and chmod {mode} it; \
         otherwise remove it and pair again",
        .path.display()
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// The mode it should have.
        mode: &'static str,
    },
    /// It is damaged or of another version.
    #[error("{} cannot be understood: {text}; it was left alone. Move it away and pair again to go on without it", .path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        text: String,
    },
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> FileError + '_ {
    |source| FileError::Io { path: path.to_owned(), source }
}

/// Refuses what is not ours alone. `us` is the user that the daemon runs as: root, but for tests.
fn check(path: &Path, metadata: &fs::Metadata, mode: &'static str) -> Result<(), FileError> {
    let us = nix::unistd::geteuid().as_raw();
    let exposed = |what: String| Err(FileError::Exposed { path: path.to_owned(), what, mode });
    if metadata.uid() != us {
        return exposed(format!("owned by user {}, not by {us}", metadata.uid()));
    }
    if metadata.mode() & 0o077 != 0 {
        return exposed(format!("open to others (mode {:04o})", metadata.mode() & 0o7777));
    }
    Ok(())
}

/// Makes the folder (mode 0700), or checks that an existing one is ours alone.
///
/// # Errors
/// [`FileError`].
pub(super) fn folder(path: &Path) -> Result<(), FileError> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(path)(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(io(path))?;
    if !metadata.is_dir() {
        return Err(FileError::Exposed { path: path.to_owned(), what: "not a folder".into(), mode: "0700" });
    }
    check(path, &metadata, "0700")
}

/// Reads a file; `None` if there is none.
///
/// # Errors
/// [`FileError`], also when the file is a link, has another owner or is open to others.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    // The opened file is what is checked, not a name that may mean another file a moment later.
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(FileError::Exposed { path: path.to_owned(), what: "a symbolic link".into(), mode: "0600" });
        }
        other => other.map_err(io(path))?,
    };
    let metadata = file.metadata().map_err(io(path))?;
    if !metadata.is_file() {
        return Err(FileError::Exposed { path: path.to_owned(), what: "not a plain file".into(), mode: "0600" });
    }
    check(path, &metadata, "0600")?;
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes).map_err(io(path))?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| FileError::Format { path: path.to_owned(), text: error.to_string() })
}

/// Replaces a file durably (write, fsync, rename, fsync of the folder), mode 0600. Blocks for the disk.
///
/// # Errors
/// [`FileError::Io`]; the old file is whole then.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| FileError::Format { path: path.to_owned(), text: error.to_string() })?;
    let temporary = path.with_extension("new");
    // A left-over could have any mode: the new file must never have been open to others.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(&temporary)(error)),
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(io(&temporary))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io(&temporary))?;
    fs::rename(&temporary, path).map_err(io(path))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder).and_then(|f| f.sync_all()).map_err(io(folder))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn written_files_are_ours_alone_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.json");
        assert_eq!(read::<Vec<u8>>(&path).unwrap(), None);
        write(&path, &vec![1u8, 2]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(read::<Vec<u8>>(&path).unwrap(), Some(vec![1, 2]));
    }

    #[test]
    fn a_file_that_others_could_read_or_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.json");
        for mode in [0o640, 0o604, 0o620, 0o602, 0o610] {
            write(&path, &1).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read::<u8>(&path).unwrap_err();
            assert!(matches!(error, FileError::Exposed { .. }), "{mode:o}");
            assert!(error.to_string().contains("chmod 0600"), "{error}");
        }
    }

    #[test]
    fn a_file_of_another_owner_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can give a file away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.json");
        write(&path, &1).unwrap();
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        assert!(read::<u8>(&path).unwrap_err().to_string().contains("owned by user 12345"));
    }

    #[test]
    fn links_pipes_and_open_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        write(&real, &1).unwrap();
        symlink(&real, &link).unwrap();
        assert!(matches!(read::<u8>(&link).unwrap_err(), FileError::Exposed { .. }));
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(read::<u8>(&pipe).unwrap_err(), FileError::Exposed { .. }));
        let open = dir.path().join("open");
        folder(&open).unwrap();
        folder(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(folder(&open).unwrap_err(), FileError::Exposed { .. }));
    }
}

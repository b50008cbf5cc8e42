//! Writer of "newc" cpio archives, the format the Linux kernel unpacks as an initramfs.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel: a 110-byte
//! header of hexadecimal fields, the NUL-terminated name padded to 4 bytes, the data padded to 4.

use std::collections::BTreeSet;

/// An archive under construction. Parent directories are added by themselves.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file. `path` has no leading slash; `mode` holds permission bits only.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.parents(path);
        self.entry(path, 0o100_000 | mode, (0, 0), data);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, 0o120_777, (0, 0), target.as_bytes());
    }

    /// Adds a directory (once; a second call is ignored).
    pub fn directory(&mut self, path: &str) {
        self.parents(path);
        if self.directories.insert(path.to_owned()) {
            self.entry(path, 0o040_755, (0, 0), &[]);
        }
    }

    /// Adds a character device node.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, 0o020_000 | mode, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes (uncompressed).
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let size = u32::try_from(data.len()).expect("a file of an initramfs is below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn gnu_cpio_unpacks_what_we_pack() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = Archive::new();
        archive.file("a/b/tool", 0o755, b"12345");
        archive.file("a/empty", 0o600, b"");
        archive.symlink("a/link", "b/tool");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let Ok(mut child) =
            Command::new("cpio").args(["-i", "-d", "--quiet"]).current_dir(dir.path()).stdin(Stdio::piped()).spawn()
        else {
            eprintln!("no cpio on this machine: only the sizes were checked");
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("a/b/tool")).unwrap(), b"12345");
        assert_eq!(std::fs::read(dir.path().join("a/empty")).unwrap(), b"");
        assert_eq!(std::fs::read(dir.path().join("a/link")).unwrap(), b"12345");
    }
}

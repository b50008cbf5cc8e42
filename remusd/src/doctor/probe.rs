//! How to look at a host.

use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

/// What a program said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Whether it ended well.
    pub ok: bool,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A host that can be looked at. Changes nothing.
pub trait Probe {
    /// A file's text; `None` if it cannot be read.
    fn read(&self, path: &str) -> Option<String>;
    /// Names in a folder; none if it cannot be read.
    fn list(&self, folder: &str) -> Vec<String>;
    /// Whether there is such a file or folder.
    fn exists(&self, path: &str) -> bool;
    /// Runs a program; `None` if there is none.
    fn run(&self, program: &str, arguments: &[&str]) -> Option<Output>;
    /// An environment variable.
    fn variable(&self, name: &str) -> Option<String>;
    /// The user that asks.
    fn user(&self) -> u32;
    /// Free bytes in the file system of a path, for root.
    fn free_bytes(&self, path: &str) -> Option<u64>;
    /// Milliseconds since the Unix epoch.
    fn now_ms(&self) -> u64;
}

/// This host.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealProbe;

impl Probe for RealProbe {
    fn read(&self, path: &str) -> Option<String> {
        std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn exists(&self, path: &str) -> bool {
        Path::new(path).exists()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Option<Output> {
        // Xen's tools and ldconfig are in sbin, which a user's PATH may lack.
        let path = format!("{}:/usr/local/sbin:/usr/sbin:/sbin", self.variable("PATH").unwrap_or_default());
        let output = Command::new(program).args(arguments).env("PATH", path).env("LC_ALL", "C").output().ok()?;
        Some(Output {
            ok: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn user(&self) -> u32 {
        nix::unistd::geteuid().as_raw()
    }

    fn free_bytes(&self, path: &str) -> Option<u64> {
        let found = Path::new(path).ancestors().find(|p| p.exists())?;
        let stat = nix::sys::statvfs::statvfs(found).ok()?;
        Some(stat.blocks_free() * stat.fragment_size())
    }

    fn now_ms(&self) -> u64 {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
    }
}

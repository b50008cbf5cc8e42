//! A run: one booted set of hosts, its files, and the record by which other processes find it and
//! the janitor knows what a dead one left.

mod child;
mod janitor;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

pub use child::{Child, start_time};
pub use janitor::sweep;

use crate::image::cache_dir;

/// Log directories of finished runs that are kept.
const KEPT_LOGS: usize = 20;

/// What other processes may know of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Name given on the command line.
    pub name: String,
    /// The process that owns the run.
    pub pid: i32,
    /// Start time of `pid` in clock ticks since boot, so that a reused pid is not taken for it.
    pub pid_start: u64,
    /// Thread of `pid` that is in the run's network namespace.
    pub netns_thread: i32,
    /// Names of the hosts, in order.
    pub hosts: Vec<String>,
    /// All hosts were ready once.
    pub ready: bool,
    /// Where this run's consoles and logs go.
    pub logs: PathBuf,
    /// Key for ssh into the hosts.
    pub ssh_key: PathBuf,
    /// The hosts' ssh keys.
    pub known_hosts: PathBuf,
}

impl Record {
    /// Reads the record of the living run `name`.
    ///
    /// # Errors
    /// There is none, or its process is gone.
    pub fn of(name: &str) -> Result<Self> {
        let file = runs_dir()?.join(name).join("record.json");
        let text =
            std::fs::read(&file).with_context(|| format!("no run called '{name}': start it with `xen-test up`"))?;
        let record: Self =
            serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", file.display()))?;
        if !record.is_alive() {
            bail!("run '{name}' has ended: start it with `xen-test up --name {name}`");
        }
        Ok(record)
    }

    /// Whether the owning process still exists.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.pid_start)
    }
}

/// Directory that holds one directory for each run.
pub fn runs_dir() -> Result<PathBuf> {
    let dir = cache_dir()?.join("runs");
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// The files of a run of this process. Dropping it removes them (logs stay).
#[derive(Debug)]
pub struct RunDir {
    dir: PathBuf,
    logs: PathBuf,
    _lock: Flock<File>,
}

impl RunDir {
    /// Claims the name for this process.
    ///
    /// # Errors
    /// A living run has that name, or the name is not made of letters, digits, `-` and `_`.
    pub fn claim(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 40 || !name.chars().all(plain) {
            bail!("'{name}' is no name for a run: use up to 40 letters, digits, '-' and '_'");
        }
        let runs = runs_dir()?;
        sweep(&runs)?;
        let Some(lock) = janitor::take(&runs.join(format!("{name}.lock")))? else {
            bail!("a run called '{name}' is up already: `xen-test down --name {name}` ends it");
        };
        let dir = runs.join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        if let Ok(mut dirs) = OWN.lock() {
            dirs.push(dir.clone());
        }
        let all_logs = cache_dir()?.join("logs");
        std::fs::create_dir_all(&all_logs)?;
        prune(&all_logs)?;
        let stamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let logs = all_logs.join(format!("{stamp}-{name}"));
        std::fs::create_dir_all(&logs)?;
        Ok(Self { dir, logs, _lock: lock })
    }

    /// Directory for disks and sockets; gone after the run.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Directory for logs; stays after the run.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Publishes the record, replacing an earlier one in one step.
    pub fn publish(&self, record: &Record) -> Result<()> {
        let part = self.dir.join("record.part");
        std::fs::write(&part, serde_json::to_vec_pretty(record)?)?;
        std::fs::rename(&part, self.dir.join("record.json"))?;
        Ok(())
    }
}

/// Directories of the runs of this process, for [`remove_own_files`].
static OWN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the files of all runs of this process, just before it ends without unwinding.
pub fn remove_own_files() {
    if let Ok(dirs) = OWN.lock() {
        for dir in dirs.iter() {
            // A thread that still boots hosts may put files in between.
            for _ in 0..50 {
                let _ = std::fs::remove_dir_all(dir);
                if !dir.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Ok(mut dirs) = OWN.lock() {
            dirs.retain(|dir| *dir != self.dir);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn prune(logs: &Path) -> Result<()> {
    let mut names: Vec<_> = std::fs::read_dir(logs)?.flatten().map(|e| e.path()).collect();
    names.sort();
    for old in names.iter().take(names.len().saturating_sub(KEPT_LOGS)) {
        let _ = std::fs::remove_dir_all(old);
    }
    Ok(())
}

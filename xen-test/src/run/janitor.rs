//! Removes what dead runs left behind.
//!
//! Processes die with their run (see [`super::Child`]) and namespaces, bridges and taps with the
//! last process in them; what a `kill -9` leaves is files, and at worst a process that was caught
//! between its start and its prctl.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::start_time;

/// Removes the files of runs that nobody holds the lock of, and processes that still use them.
pub fn sweep(runs: &Path) -> Result<()> {
    for entry in std::fs::read_dir(runs)?.flatten() {
        let file = entry.path();
        if file.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        // Held until the files are gone: nobody takes the name over meanwhile.
        let Some(_lock) = take(&file)? else { continue };
        let dir = file.with_extension("");
        for process in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if process.path().extension().is_some_and(|extension| extension == "pid") {
                kill_recorded(&process.path());
            }
        }
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::remove_file(&file)?;
    }
    Ok(())
}

/// Takes the lock file of a run, if nobody holds it.
pub(super) fn take(path: &Path) -> Result<Option<Flock<File>>> {
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
        // Another janitor may have removed the file between our open and our lock.
        let ours = lock.metadata()?.ino();
        if path.metadata().is_ok_and(|current| current.ino() == ours) {
            return Ok(Some(lock));
        }
    }
}

/// Kills the process of a `PID START-TIME` file if it is still the same process.
fn kill_recorded(file: &Path) {
    let Ok(text) = std::fs::read_to_string(file) else {
        return;
    };
    let mut words = text.split_whitespace();
    let (Some(Ok(pid)), Some(Ok(start))) = (words.next().map(str::parse::<i32>), words.next().map(str::parse::<u64>))
    else {
        return;
    };
    if start_time(pid) == Some(start) {
        crate::progress!("killing process {pid}, left by a dead run");
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Child;
    use super::*;
    use crate::wait::wait_until;

    #[test]
    fn a_dead_run_is_swept_and_a_living_one_stays() {
        let runs = tempfile::tempdir().unwrap();
        let mut child = Child::spawn("sleep", Child::command("sleep").arg("1000")).unwrap();
        for name in ["living", "dead"] {
            std::fs::create_dir(runs.path().join(name)).unwrap();
            std::fs::write(runs.path().join(format!("{name}.lock")), "").unwrap();
        }
        let living = take(&runs.path().join("living.lock")).unwrap().expect("free");
        assert!(take(&runs.path().join("living.lock")).unwrap().is_none());
        let pid = child.pid();
        let stamp = format!("{pid} {}", start_time(pid).unwrap());
        std::fs::write(runs.path().join("dead/a.pid"), stamp).unwrap();
        sweep(runs.path()).unwrap();
        assert!(runs.path().join("living").exists() && runs.path().join("living.lock").exists());
        assert!(!runs.path().join("dead").exists() && !runs.path().join("dead.lock").exists());
        drop(living);
        wait_until(Duration::from_secs(10), "process killed", || child.try_wait()).unwrap();
    }
}

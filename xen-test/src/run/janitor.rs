//! Removes what dead runs left behind.
//!
//! Processes die with their run (see [`super::Child`]) and namespaces, bridges and taps with the
//! last process in them; what a `kill -9` leaves is files, and at worst a process that was caught
//! between its start and its prctl.

use std::path::Path;

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Record;
use super::start_time;

/// Removes the directories of runs whose process is gone, and processes that still use them.
pub fn sweep(runs: &Path) -> Result<()> {
    for entry in std::fs::read_dir(runs)?.flatten() {
        let dir = entry.path();
        let Ok(text) = std::fs::read(dir.join("record.json")) else {
            continue;
        };
        let Ok(record) = serde_json::from_slice::<Record>(&text) else {
            continue;
        };
        if record.is_alive() {
            continue;
        }
        for host in &record.hosts {
            kill_recorded(&dir.join(format!("{host}.pid")));
        }
        let _ = std::fs::remove_dir_all(&dir);
    }
    Ok(())
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
        let record = |pid: i32, pid_start: u64| Record {
            name: "x".into(),
            pid,
            pid_start,
            netns_thread: pid,
            hosts: vec!["a".into()],
            ready: true,
            logs: "/".into(),
            ssh_key: "/".into(),
            known_hosts: "/".into(),
        };
        let me = i32::try_from(std::process::id()).unwrap();
        let start = start_time(me).unwrap();
        for (name, record) in [("living", record(me, start)), ("dead", record(me, start + 1))] {
            let dir = runs.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("record.json"), serde_json::to_vec(&record).unwrap()).unwrap();
        }
        let pid = child.pid();
        let stamp = format!("{pid} {}", start_time(pid).unwrap());
        std::fs::write(runs.path().join("dead/a.pid"), stamp).unwrap();
        sweep(runs.path()).unwrap();
        assert!(runs.path().join("living").exists());
        assert!(!runs.path().join("dead").exists());
        wait_until(Duration::from_secs(10), "process killed", || child.try_wait()).unwrap();
    }
}

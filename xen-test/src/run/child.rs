//! Child processes that cannot outlive us.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A child process that is killed when this value is dropped, and by the kernel when the thread
/// that started it is gone (also after `kill -9` of the whole program). It is in a process group
/// of its own, so that Ctrl-C reaches only us.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    name: String,
}

impl Child {
    /// A command for `program` that dies with the calling thread: call [`Child::spawn`] on a thread
    /// that lives long enough.
    pub fn command(program: impl AsRef<OsStr>) -> Command {
        // PR_SET_PDEATHSIG would need unsafe code between fork and exec; setpriv does it for us.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
        command
    }

    /// Starts a command made by [`Child::command`].
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let process = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { process, name: name.to_owned() })
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).expect("a pid fits in i32")
    }

    /// The exit status, if the process has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.process.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// The process's pipes and `wait`.
    pub fn process(&mut self) -> &mut std::process::Child {
        &mut self.process
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid()), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Kills the process and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat), if it exists and
/// is no zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name (field 2) may hold spaces and parentheses: count from its last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::wait::wait_until;

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let child = std::thread::spawn(|| {
            let child = Child::spawn("sleep", Child::command("sleep").arg("1000")).unwrap();
            let comm = format!("/proc/{}/comm", child.pid());
            wait_until(Duration::from_secs(10), "setpriv done", || {
                Ok((std::fs::read_to_string(&comm)? == "sleep\n").then_some(()))
            })
            .unwrap();
            child
        });
        let mut child = child.join().unwrap();
        let status = wait_until(Duration::from_secs(10), "child gone", || child.try_wait());
        assert!(!status.unwrap().success());
    }

    #[test]
    fn start_time_tells_the_living_from_the_dead() {
        assert!(start_time(i32::try_from(std::process::id()).unwrap()).is_some());
        let mut child = Child::spawn("true", &mut Child::command("true")).unwrap();
        let pid = child.pid();
        wait_until(Duration::from_secs(10), "zombie", || Ok(start_time(pid).is_none().then_some(()))).unwrap();
        child.kill();
    }
}

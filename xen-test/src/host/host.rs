//! A nested host as scenarios see it.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Agent, Machine, Output, Running, Said, Snapshot};
use crate::progress;
use crate::wait::wait_until;

/// Longest boot that is still taken as one.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// A nested Xen host: its machine (power, freeze, snapshot) and commands in its dom0.
#[derive(Debug)]
pub struct Host {
    name: String,
    machine: Mutex<Machine>,
    agent: Agent,
}

impl Host {
    /// Joins a machine and the agent in its dom0.
    pub fn new(name: &str, machine: Machine, agent: Agent) -> Self {
        Self { name: name.to_owned(), machine: Mutex::new(machine), agent }
    }

    /// `a` or `b`. In the dom0s, and for ssh, the host is called `hosta` or `hostb`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hardware below.
    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The agent in the dom0.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Runs a bash command line in the dom0 and waits for its end; a failing command is no error.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.agent.run(command).with_context(|| format!("host {}: {command}", self.name))
    }

    /// Runs a command that must succeed; returns its standard output without trailing newlines.
    pub fn sh(&self, command: &str) -> Result<String> {
        let output = self.run(command)?;
        if !output.ok() {
            bail!("host {}: `{command}` ended with {}\n{}{}", self.name, output.status, output.stdout, output.stderr);
        }
        Ok(output.stdout.trim_end_matches('\n').to_owned())
    }

    /// Starts a command and returns at once. Dropping the result kills the command.
    pub fn spawn(&self, command: &str) -> Result<Running> {
        self.agent.start(command).with_context(|| format!("host {}: {command}", self.name))
    }

    /// Copies files and directories into the dom0, see [`push`].
    pub fn push(&self, files: &[impl AsRef<Path>], destination: &str) -> Result<()> {
        push(&self.agent, files, destination).with_context(|| format!("push to host {}", self.name))
    }

    /// Reads a file of the dom0.
    pub fn pull(&self, path: &str) -> Result<Vec<u8>> {
        pull(&self.agent, path).with_context(|| format!("host {}: {path}", self.name))
    }

    /// Power loss. See [`Machine::power_off`].
    /// Commands that ran on it end with an error.
    pub fn power_off(&self) {
        self.machine().power_off();
        self.agent.sever();
    }

    /// Puts the host back to a snapshot, whatever state it is in, with the right time.
    pub fn reset(&self, to: Snapshot) -> Result<()> {
        self.power_off();
        self.load(to)?;
        self.machine().go()?;
        self.wake()
    }

    /// First half of [`Host::reset`], of a host that is off: as in the snapshot, but standing still.
    pub fn load(&self, from: Snapshot) -> Result<()> {
        let mut machine = self.machine();
        machine.power_on(Some(from))?;
        machine.wait_loaded()
    }

    /// Last half of [`Host::reset`]: waits until the dom0 answers and puts its clock right.
    pub fn wake(&self) -> Result<()> {
        self.wait_ready()?;
        self.agent.wake()
    }

    /// First start of a new machine: a boot, or the booted state that the cache has of one like it.
    pub fn start(&self) -> Result<()> {
        if self.machine().has(Snapshot::Ready) {
            match self.reset(Snapshot::Ready) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    progress!("host {}: the booted state in the cache is no good ({error:#})", self.name);
                    self.power_off();
                    self.machine().forget_warm()?;
                    self.machine().fresh_disk()?;
                }
            }
        }
        self.boot()?;
        self.sh("sync")?;
        self.agent.sever();
        self.machine().keep_warm()?;
        self.reset(Snapshot::Ready)
    }

    /// Powers the host on again, from its disk as it was left (what was pushed is still there
    /// unless it was on a tmpfs or not yet written), and waits until `xl` is usable.
    pub fn boot(&self) -> Result<()> {
        self.machine().power_on(None)?;
        self.wait_ready()
    }

    /// Waits until the dom0 has finished its start and answers.
    pub fn wait_ready(&self) -> Result<()> {
        wait_until(BOOT_LIMIT, &format!("host {} ready", self.name), || {
            if !self.machine().is_on()? {
                bail!("host {} ended while it booted: see its console log", self.name);
            }
            Ok(self.agent.answers().then_some(()))
        })
    }

    /// Stops the whole host where it stands.
    pub fn freeze(&self) -> Result<()> {
        self.machine().freeze()
    }

    /// Lets a frozen host go on.
    pub fn thaw(&self) -> Result<()> {
        self.machine().thaw()
    }

    /// `kill -9` of every process in the dom0 whose command line matches the extended regular
    /// expression.
    ///
    /// # Errors
    /// No process matched.
    pub fn kill9(&self, pattern: &str) -> Result<()> {
        // The bracket keeps the pattern from matching the shell that carries it.
        let output = self
            .run(&format!("pids=$(pgrep -f -- {} | grep -vx $$); [ -n \"$pids\" ] && kill -9 $pids", quote(pattern)))?;
        if !output.ok() {
            bail!("host {}: no process matches '{pattern}'", self.name);
        }
        Ok(())
    }

    /// `kill -9` of every process in the dom0 that runs this program (its name, at most 15 bytes of it).
    ///
    /// # Errors
    /// No process runs it.
    pub fn kill9_program(&self, name: &str) -> Result<()> {
        self.sh(&format!("kill -9 $(pgrep -x {})", quote(name))).map(drop)
    }

    /// `kill -9` of one process in the dom0.
    pub fn kill9_pid(&self, pid: u32) -> Result<()> {
        self.sh(&format!("kill -9 {pid}")).map(drop)
    }

    /// Writes the dom0's Xen and remusd logs below `directory`. Does what it can: a host that is
    /// off or frozen has only its console log.
    pub fn collect_logs(&self, directory: &Path) -> Result<()> {
        if !self.machine().is_on()? {
            return Ok(());
        }
        let archive = self.pull_command(
            "dmesg >/tmp/dmesg.txt; xl dmesg >/tmp/xl-dmesg.txt 2>&1; ps -ef >/tmp/ps.txt; \
             xenstore-ls -f >/tmp/xenstore.txt 2>&1; xl list -v >/tmp/xl-list.txt 2>&1; \
             tar -C / -czf - --ignore-failed-read --warning=none tmp/dmesg.txt tmp/xl-dmesg.txt \
             tmp/ps.txt tmp/xenstore.txt tmp/xl-list.txt var/log || true",
            Duration::from_secs(30),
        )?;
        let target = directory.join(&self.name);
        std::fs::create_dir_all(&target)?;
        let mut tar = Command::new("tar")
            .args(["-xzf", "-", "-C"])
            .arg(&target)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        tar.stdin.take().expect("piped").write_all(&archive)?;
        tar.wait()?;
        Ok(())
    }

    fn pull_command(&self, command: &str, limit: Duration) -> Result<Vec<u8>> {
        collect(&self.agent, command, limit)
    }
}

/// Quotes a word for a POSIX shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Copies files and directories into a dom0. One file to a `destination` that is neither a
/// directory nor ends with `/`: that is its new name. Everything else goes into the directory
/// `destination`, which is made if need be. Modes are kept; a program that runs can be replaced.
pub fn push(agent: &Agent, files: &[impl AsRef<Path>], destination: &str) -> Result<()> {
    let one = files.len() == 1 && !destination.ends_with('/');
    for file in files {
        let file = file.as_ref();
        let meta = file.metadata().with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.file_name().context("a file to push needs a name")?.to_string_lossy();
        if meta.is_dir() {
            push_directory(agent, file, destination)?;
            continue;
        }
        let data = std::fs::read(file)?;
        push_bytes(agent, &data, meta.permissions().mode() & 0o7777, destination, &name, one)?;
    }
    Ok(())
}

fn push_bytes(agent: &Agent, data: &[u8], mode: u32, destination: &str, name: &str, may_rename: bool) -> Result<()> {
    let into = if may_rename { "[ -d \"$d\" ] && d=$d/$n" } else { "d=$d/$n" };
    let mut running = agent.start(&format!(
        "d={} n={}; {into}; mkdir -p \"$(dirname \"$d\")\" && cat >\"$d.part$$\" && \
         chmod {mode:o} \"$d.part$$\" && mv -f \"$d.part$$\" \"$d\"",
        quote(destination),
        quote(name)
    ))?;
    running.write(data)?;
    finish(running, "writing the file")
}

fn push_directory(agent: &Agent, directory: &Path, destination: &str) -> Result<()> {
    let directory = directory.canonicalize()?;
    let parent = directory.parent().context("cannot push the root directory")?;
    let tar = Command::new("tar")
        .args(["-cf", "-", "-C"])
        .arg(parent)
        .arg(directory.file_name().context("a directory to push needs a name")?)
        .output()
        .context("cannot run tar")?;
    if !tar.status.success() {
        bail!("tar: {}", String::from_utf8_lossy(&tar.stderr).trim());
    }
    let destination = quote(destination);
    let mut running = agent.start(&format!("mkdir -p {destination} && tar -xf - -C {destination}"))?;
    running.write(&tar.stdout)?;
    finish(running, "unpacking")
}

fn finish(running: Running, what: &str) -> Result<()> {
    let output = running.wait_output()?;
    if !output.ok() {
        bail!("{what} failed: {}", output.stderr.trim());
    }
    Ok(())
}

/// Reads a file of a dom0.
pub fn pull(agent: &Agent, path: &str) -> Result<Vec<u8>> {
    collect(agent, &format!("cat -- {}", quote(path)), Duration::from_secs(600))
}

/// Standard output of a command that must succeed, as bytes. `limit` is for each silence.
fn collect(agent: &Agent, command: &str, limit: Duration) -> Result<Vec<u8>> {
    let mut running = agent.start(command)?;
    running.close_input()?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match running.next(limit)? {
            Some(Said::Stdout(data)) => stdout.extend(data),
            Some(Said::Stderr(data)) => stderr.extend(data),
            Some(Said::End(0)) => return Ok(stdout),
            Some(Said::End(status)) => {
                bail!("ended with {status}: {}", String::from_utf8_lossy(&stderr).trim());
            }
            None => bail!("the host said nothing for {} s", limit.as_secs()),
        }
    }
}

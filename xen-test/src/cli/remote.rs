//! Commands that act on a run of another process.

use std::io::{IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{self, Agent, Said};
use crate::net::enter_netns_of;
use crate::progress;
use crate::run::Record;
use crate::wait::wait_until;

/// The agent of a host of the run `name`; puts the calling thread into the run's namespace.
fn agent(name: &str, host: &str) -> Result<Agent> {
    let record = Record::of(name)?;
    if !record.hosts.iter().any(|known| known == host) {
        bail!("run '{name}' has no host '{host}', only {}", record.hosts.join(" and "));
    }
    if !record.ready {
        progress!("run '{name}' is still booting: waiting");
        wait_until(Duration::from_secs(300), "the run to be ready", || Ok(Record::of(name)?.ready.then_some(())))?;
    }
    enter_netns_of(record.pid, record.netns_thread)?;
    Agent::of(host, None)
}

/// Runs a command line and passes output and exit code on. Standard input is passed unless it is a
/// terminal.
pub fn exec(name: &str, host: &str, command: &str) -> Result<ExitCode> {
    let mut running = agent(name, host)?.start(command)?;
    let mut input = std::io::stdin();
    if input.is_terminal() {
        running.close_input()?;
    } else {
        let mut feed = running.input()?;
        // Not joined: it may wait for input that the command never needs.
        std::thread::spawn(move || -> Result<()> {
            let mut buffer = vec![0; 65536];
            loop {
                let count = input.read(&mut buffer)?;
                if count == 0 {
                    return feed.close();
                }
                feed.write(&buffer[..count])?;
            }
        });
    }
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    loop {
        match running.next(Duration::from_secs(3600))? {
            Some(Said::Stdout(data)) => {
                stdout.write_all(&data)?;
                stdout.flush()?;
            }
            Some(Said::Stderr(data)) => stderr.write_all(&data)?,
            // A shell's convention for an end by signal.
            Some(Said::End(status)) if status < 0 => {
                return Ok(ExitCode::from(u8::try_from(128 - status).unwrap_or(255)));
            }
            Some(Said::End(status)) => {
                return Ok(ExitCode::from(u8::try_from(status).unwrap_or(255)));
            }
            None => {}
        }
    }
}

/// Copies files; the last one named is the destination.
pub fn push(name: &str, host: &str, files: &[PathBuf]) -> Result<()> {
    let Some((destination, files)) = files.split_last() else { bail!("nothing to push") };
    host::push(&agent(name, host)?, files, &destination.to_string_lossy())
}

/// Ends a run and waits until it is gone.
pub fn down(name: &str) -> Result<()> {
    let record = Record::of(name)?;
    kill(Pid::from_raw(record.pid), Signal::SIGTERM)?;
    wait_until(Duration::from_secs(30), "the run to end", || Ok((!record.is_alive()).then_some(())))
}

/// Does what a line of [`crate::control`] says in a run of `up`.
pub fn fault(name: &str, line: &str) -> Result<()> {
    Record::of(name)?;
    crate::control::ask(&crate::run::runs_dir()?.join(name), line)
}

/// Becomes a program in the run's namespace. Returns only what went wrong.
pub fn client(name: &str, command: &[String]) -> anyhow::Error {
    let enter = || {
        let record = Record::of(name)?;
        enter_netns_of(record.pid, record.netns_thread)
    };
    if let Err(error) = enter() {
        return error;
    }
    let error = std::process::Command::new(&command[0]).args(&command[1..]).exec();
    anyhow::Error::new(error).context(format!("cannot run {}", command[0]))
}

//! `shell`: a prompt over a booted pair.

use std::io::{BufRead, Write};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::interrupt::interruptible;
use super::up::UpArgs;
use crate::control;
use crate::net::enter_netns_of;
use crate::pair::Pair;

const HELP: &str = "\
a, b          a shell in that dom0 (/opt/guest holds the test guest: xl create /opt/guest/pvh.cfg)
client        a shell where the client lives, outside both hosts
quit          end the hosts";

/// Boots, prepares, and reads commands until `quit` or the end of the input.
pub fn shell(args: &UpArgs) -> Result<()> {
    let pair = interruptible(args.starter())?;
    eprintln!("{HELP}\n{}\nlogs: {}", control::HELP, pair.logs().display());
    let mut line = String::new();
    loop {
        eprint!("xen-test> ");
        std::io::stderr().flush()?;
        line.clear();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            break;
        }
        let result = match line.trim() {
            "" => Ok(()),
            "quit" | "exit" => break,
            "help" | "?" => {
                eprintln!("{HELP}\n{}", control::HELP);
                Ok(())
            }
            "client" => inside(&pair, Command::new("bash")),
            host @ ("a" | "b") => login(&pair, host),
            other => control::act(&pair, other),
        };
        if let Err(error) = result {
            eprintln!("{error:#}");
        }
    }
    Ok(())
}

fn login(pair: &Arc<Pair>, host: &str) -> Result<()> {
    let Some(index) = pair.hosts().iter().position(|known| known.name() == host) else {
        bail!("no host '{host}' in this run");
    };
    let mut ssh = Command::new("ssh");
    ssh.arg("-i").arg(pair.image().ssh_key());
    ssh.arg("-o").arg(format!("UserKnownHostsFile={}", pair.image().known_hosts().display()));
    ssh.args(["-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR", "-F", "none", "-tt"]);
    ssh.arg(format!("root@10.78.0.{}", index + 1));
    inside(pair, ssh)
}

/// Runs a program with our terminal inside the namespace. Its exit code is its user's affair.
fn inside(pair: &Arc<Pair>, mut command: Command) -> Result<()> {
    let pid = i32::try_from(std::process::id())?;
    let thread = pair.client_ns().thread();
    let run = move || -> Result<()> {
        enter_netns_of(pid, thread)?;
        let name = command.get_program().to_string_lossy().into_owned();
        command.status().with_context(|| format!("cannot run {name}"))?;
        Ok(())
    };
    match std::thread::spawn(run).join() {
        Ok(result) => result,
        Err(_) => bail!("the thread that ran it panicked"),
    }
}

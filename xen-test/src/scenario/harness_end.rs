//! The harness ended the hard way: nothing may be left of it.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::run::{Record, runs_dir, start_time};
use crate::wait::wait_until;

pub(super) const END: Scenario = Scenario {
    name: "main-harness-end",
    about: "Ctrl-C and kill -9 of the harness leave no process, namespace or file behind",
    hosts: 1,
    start: Snapshot::Ready,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        ended_by(signal).with_context(|| format!("after {signal}"))?;
        ctx.note(&format!("nothing is left after {signal}"));
    }
    Ok(())
}

fn ended_by(signal: Signal) -> Result<()> {
    let name = format!("end-{}", std::process::id());
    let dir = runs_dir()?.join(&name);
    let mut harness = Command::new(std::env::current_exe()?)
        .args(["up", "--hosts", "2", "--name", &name])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start another xen-test")?;
    let started = wait_until(Duration::from_secs(60), "its hosts run", || {
        let pid = |host: &str| -> Option<i32> {
            let text = std::fs::read_to_string(dir.join(format!("{host}.pid"))).ok()?;
            text.split_whitespace().next()?.parse().ok()
        };
        Ok(pid("a").zip(pid("b")))
    });
    let record = started.and_then(|pids| Ok((pids, Record::of(&name)?)));
    let namespace = record.as_ref().ok().and_then(|(_, record)| {
        std::fs::read_link(format!("/proc/{}/task/{}/ns/net", record.pid, record.netns_thread)).ok()
    });
    kill(Pid::from_raw(i32::try_from(harness.id())?), signal)?;
    harness.wait()?;
    let ((a, b), _) = record?;
    let namespace = namespace.context("the run had no namespace")?;
    wait_until(Duration::from_secs(10), "both QEMU processes gone", || {
        Ok((start_time(a).is_none() && start_time(b).is_none()).then_some(()))
    })?;
    wait_until(Duration::from_secs(10), "the namespace gone", || Ok((!processes_in(&namespace)?).then_some(())))?;
    if signal == Signal::SIGKILL {
        // Only its files can be left; the next run of any name removes them.
        crate::run::sweep(&runs_dir()?)?;
    }
    ensure!(!dir.exists(), "{} is still there", dir.display());
    Ok(())
}

/// Whether any process is in the network namespace that `/proc/PID/ns/net` names so.
fn processes_in(namespace: &std::path::Path) -> Result<bool> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        if std::fs::read_link(entry.path().join("ns/net")).is_ok_and(|link| link == namespace) {
            return Ok(true);
        }
    }
    Ok(false)
}

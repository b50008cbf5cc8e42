//! The network buffer on Debian's kernel with real packets: the device layer's own self-test, run in a dom0.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};

pub(super) const KERNEL: Scenario = Scenario {
    name: "main-netbuffer-kernel",
    about: "the network buffer against Debian's sch_plug with real packets: holds, releases, seals, resets, leftovers",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    // Each host's kernel does one half.
    let (pair, logs) = (ctx.pair(), ctx.logs());
    let tallies = Mutex::<Vec<String>>::default();
    pair.each(|host| {
        let tally = half(host, logs).with_context(|| format!("the self-test on host {}", host.name()))?;
        tallies.lock().unwrap_or_else(PoisonError::into_inner).push(format!("host {}: {tally}", host.name()));
        Ok(())
    })?;
    ctx.note(&tallies.into_inner().unwrap_or_else(PoisonError::into_inner).join("; "));
    Ok(())
}

fn half(host: &Host, logs: &Path) -> Result<String> {
    let part = if host.name() == "a" { "1/2" } else { "2/2" };
    let output = host.run(&format!("netbuffer-selftest --part {part} 2>&1"))?;
    std::fs::write(logs.join(format!("selftest-{}.log", host.name())), &output.stdout)?;
    let tally = output.stdout.trim().lines().last().unwrap_or_default().to_owned();
    let failed: Vec<&str> = output.stdout.lines().filter(|l| l.to_lowercase().contains("fail")).collect();
    ensure!(output.ok(), "{}", failed.join("; "));
    ensure!(tally.contains(" passed, 0 failed") && !tally.starts_with('0'), "it ran nothing: {tally}");
    Ok(tally)
}

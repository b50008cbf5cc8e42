//! The network buffer on Debian's kernel with real packets: the device layer's own self-test, run in a dom0.

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;

pub(super) const KERNEL: Scenario = Scenario {
    name: "main-netbuffer-kernel",
    about: "the network buffer against Debian's sch_plug with real packets: holds, releases, seals, resets, leftovers",
    hosts: 1,
    start: Snapshot::Ready,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let output = ctx.pair().a().run("netbuffer-selftest 2>&1")?;
    std::fs::write(ctx.logs().join("selftest.log"), &output.stdout)?;
    let tally = output.stdout.trim().lines().last().unwrap_or_default().to_owned();
    ctx.note(&tally);
    let failed: Vec<&str> = output.stdout.lines().filter(|l| l.to_lowercase().contains("fail")).collect();
    ensure!(output.ok(), "the self-test failed: {}", failed.join("; "));
    ensure!(tally.contains(" passed, 0 failed") && !tally.starts_with('0'), "the self-test ran nothing: {tally}");
    Ok(())
}

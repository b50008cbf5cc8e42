//! A host that lost comes back and somebody starts its old guest (R9, hazards F3 and F4), while the guest lives on the other one. And
//! the audit of an ordinary protection.

use std::time::Instant;

use anyhow::{Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};
use crate::protection::{PATIENCE, Protected, events, fail_over, start_daemon, wait_epochs};
use crate::wait::wait_until;

pub(super) const RETURNS: Scenario = Scenario {
    name: "safety-lost-host-returns",
    about: "the primary loses power, the backup takes over, the old host boots and starts its guest: nobody ever sees it",
    hosts: 2,
    start: Snapshot::Guest,
    run,
};

fn guarded(host: &Host) -> Result<usize> {
    Ok(host.sh("ls /var/lib/remus/gate 2>/dev/null | wc -l")?.trim().parse()?)
}

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    pair.each(|host| host.sh("remus gate install").map(drop))?;
    let protected = Protected::start(pair, "")?;
    ensure!((guarded(a)?, guarded(b)?) == (1, 1), "not guarded on both hosts");
    ensure!(a.sh("remus gate status")?.contains("is open"), "the owner's own interface is sealed");

    let audited = wait_until(PATIENCE, "the audit compares pages", || {
        wait_epochs(a, "guest", 2)?;
        let lines = b.sh("grep -a ' audit .*compared=' /var/log/remus/remusd.log | tail -n 5; true")?;
        Ok(lines.lines().any(|line| !line.contains("compared=0")).then_some(lines))
    })?;
    ctx.note(&format!("audit: {}", audited.lines().last().unwrap_or_default()));
    ensure!(!events(b)?.iter().any(|e| e.kind == EventKind::AuditDiffers), "the audit blames a healthy copy");

    a.power_off();
    let failover = fail_over(b, &protected.guest, &protected.client, Instant::now())?;
    ctx.note(&format!("failed over, first byte after {:.1} s", failover.first_byte.as_secs_f32()));
    ensure!(guarded(b)? == 0, "the new owner is still guarded");
    let script = b.sh("xenstore-read /local/domain/0/backend/vif/$(xl domid guest)/0/script")?;
    ensure!(script == "/etc/xen/scripts/vif-remus-bridge", "the copy's vif was made with {script}");
    protected.goes_on()?;

    a.boot()?;
    ensure!(guarded(a)? == 1, "the entry has not outlived the power cut");
    // As xendomains does it, before and without any daemon.
    a.sh(&format!("{} >/dev/null", protected.guest.spec.create_command()))?;
    let old = a.sh("xl domid guest")?;
    let dropped = || -> Result<Option<u64>> {
        let text = a.sh(&format!("tc -s filter show dev vif{old}.0 ingress pref 1"))?;
        let count = text.split("(dropped ").nth(1).and_then(|rest| rest.split(',').next()?.trim().parse().ok());
        Ok(count.filter(|count: &u64| *count >= 3))
    };
    let count = wait_until(PATIENCE, "the old guest tries to talk", dropped)?;
    ctx.note(&format!("the old host has booted its guest again: {count} frames dropped at its vif"));
    protected.goes_on()?;
    start_daemon(a)?;
    ctx.note(&format!("its daemon: {}", events(a)?.last().map(|e| e.detail.clone()).unwrap_or_default()));
    let status = a.sh("remus gate status")?;
    ensure!(status.contains(&format!("vif{old}.0 is sealed")), "the daemon has opened it: {status}");
    protected.goes_on()
}

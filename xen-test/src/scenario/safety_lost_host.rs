//! A host that lost comes back and somebody starts its old guest (R9, hazards F3 and F4), while the guest lives on the other one. And
//! the audit of an ordinary protection.

use std::time::Instant;

use anyhow::{Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};
use crate::protection::{
    PATIENCE, Protected, domains, dropped_at_seal, events, fail_over, protect, start_daemon, wait_epochs,
};
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
    let protected = Protected::make(pair)?;
    // The host boots it by itself, until somebody takes care of that.
    let auto = protected.guest.spec.write_command("/etc/xen/auto/guest.cfg");
    a.sh(&format!("mkdir -p /etc/xen/auto; {auto}"))?;
    let refused = protect(a, "guest", "").err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(
        refused.contains("/etc/xen/auto/guest.cfg") && refused.contains("--manage-autostart"),
        "refused: {refused}"
    );
    protect(a, "guest", "--manage-autostart")?;
    wait_epochs(a, "guest", 3)?;
    ensure!(!a.run("test -e /etc/xen/auto/guest.cfg")?.ok(), "the host would still boot the guest by itself");
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
    // Before and without any daemon.
    let xendomains = a.sh("/etc/init.d/xendomains start 2>&1; xl list")?;
    ensure!(!xendomains.contains("guest"), "xendomains has started the guest: {xendomains}");
    ctx.note("the old host is back; its xendomains has nothing to boot; somebody tells it to");
    a.sh(&auto)?;
    let xendomains = a.sh("/etc/init.d/xendomains stop >/dev/null 2>&1; /etc/init.d/xendomains start 2>&1")?;
    ensure!(!domains(a)?.is_empty(), "xendomains has started nothing, so nothing is shown: {xendomains}");
    let old = a.sh("xl domid guest")?;
    let count = dropped_at_seal(a, &old)?;
    ctx.note(&format!("the old host has booted its guest again: {count} frames dropped at its vif"));
    protected.goes_on()?;
    start_daemon(a)?;
    ctx.note(&format!("its daemon: {}", events(a)?.last().map(|e| e.detail.clone()).unwrap_or_default()));
    let status = a.sh("remus gate status")?;
    ensure!(status.contains(&format!("vif{old}.0 is sealed")), "the daemon has opened it: {status}");
    protected.goes_on()
}

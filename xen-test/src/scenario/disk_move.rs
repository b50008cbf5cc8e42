//! A running guest's device-mapper device goes onto the mirror, off it, onto it again, over to the other host, and off it there.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};
use crate::protection::disks::{BACKING, DISK, WithDisk, backing, create_on, disk};
use crate::protection::{fail_over, protect, start_daemons, wait_epochs};

pub(super) const MOVE: Scenario = Scenario {
    name: "disk-move",
    about: "a guest writes all the time while its device-mapper disk is moved onto the mirror, off it, on again, fails over, and is moved off there",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

/// The guest's disk, as a volume manager would make it.
const VOLUME: &str = "/dev/mapper/vg-root";

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    start_daemons(pair)?;
    pair.each(|host| {
        backing(host)?;
        host.sh(&format!(
            "losetup --direct-io=on /dev/loop0 {BACKING} && \
             echo \"0 $(blockdev --getsz /dev/loop0) linear /dev/loop0 0\" | dmsetup create vg-root && dmsetup mknodes && sync"
        ))
        .map(drop)
    })?;
    let guest = WithDisk::on(pair, &format!("phy:{VOLUME},xvda,w"))?;
    guest.writes(10)?;

    create_on(b, &format!("--above {VOLUME}"), false)?;
    ensure!(!b.run(&format!("dd if={VOLUME} of=/dev/null count=1"))?.ok(), "a copy can be read past the mirror");
    create_on(a, &format!("--above {VOLUME}"), true)?;
    leads_to(a, "nbd0")?;
    guest.goes_on()?;
    ctx.note("moved onto the mirror");
    protect(a, "guest", "")?;
    wait_epochs(a, "guest", 4)?;
    let refused = a.run(&format!("remus disk remove {DISK}"))?;
    ensure!(!refused.ok() && refused.stderr.contains("unprotect"), "moved off under protection: {refused:?}");
    a.sh("remus unprotect guest")?;
    guest.goes_on()?;

    a.sh(&format!("remus disk remove {DISK}"))?;
    leads_to(a, "loop0")?;
    let left =
        a.sh(&format!("ls /etc/remus/disk /run/remus/disk/{DISK}.ctl; pgrep -x remus-disk; dmsetup ls; true"))?;
    ensure!(!left.contains(&format!("{DISK}.env")) && !left.contains(&format!("remus-{DISK}")), "left behind: {left}");
    guest.goes_on()?;
    ctx.note("moved off it");

    create_on(a, &format!("--above {VOLUME}"), true)?;
    guest.goes_on()?;
    protect(a, "guest", "")?;
    let source = disk(a)?;
    ensure!(
        source.in_sync && source.sync_total == source.size,
        "what was written past the mirror is not compared: {source:?}"
    );
    wait_epochs(a, "guest", 4)?;
    let known = guest.written()?.completed;
    ctx.note(&format!("on it again, {known} records are complete; the primary loses its power"));
    a.power_off();
    fail_over(b, &guest.protected.guest, &guest.protected.client, Instant::now())?;
    leads_to(b, "nbd0")?;
    ensure!(guest.check()?.completed >= known, "{known} records were complete before");
    guest.goes_on()?;
    b.sh(&format!("remus disk remove {DISK}"))?;
    leads_to(b, "loop0")?;
    guest.goes_on()
}

fn leads_to(host: &Host, device: &str) -> Result<()> {
    let deps = host.sh(&format!("dmsetup deps -o devname {VOLUME}"))?;
    ensure!(deps.contains(&format!("({device})")), "{VOLUME} of host {} leads to {deps}", host.name());
    Ok(())
}

//! A disk that a program keeps in step, in place of the mirror.

use std::time::Instant;

use anyhow::{Result, ensure};
use remusd::api::Role;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::disks::WithDisk;
use crate::protection::{domains, fail_over, protect, row, start_daemons, wait_epochs};

pub(super) const SCRIPT: Scenario = Scenario {
    name: "disk-script",
    about: "the primary loses power while the guest writes a disk that disk-by-copy keeps: memory and disk go on at the backup, in step",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

/// As small as the guest's journal makes sense on: all of it is sent with every epoch.
const SIZE_MB: u32 = 4;
const PROGRAM: &str = "/usr/local/lib/remus/disk-by-copy";

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    start_daemons(pair)?;
    pair.each(|host| {
        let peer = if host.name() == "a" { "hostb" } else { "hosta" };
        host.sh(&format!(
            "echo 0 >/sys/module/xen_blkback/parameters/feature_persistent; modprobe loop; mkdir -p /etc/remus; \
             echo \"peer='ssh {peer}'\" >/etc/remus/disk-by-copy.conf; \
             truncate -s {SIZE_MB}M /var/lib/small.img && losetup --direct-io=on /dev/loop7 /var/lib/small.img && sync"
        ))
        .map(drop)
    })?;
    let guest = WithDisk::on(pair, "phy:/dev/loop7,xvda,w")?;
    guest.writes(20)?;
    protect(pair.a(), "guest", &format!("--disk xvda=script:{PROGRAM}"))?;
    wait_epochs(pair.a(), "guest", 4)?;
    let known = guest.written()?.completed;
    ctx.note(&format!("{known} records are complete; the primary loses its power"));
    pair.a().power_off();
    fail_over(pair.b(), &guest.protected.guest, &guest.protected.client, Instant::now())?;
    let after = guest.check()?;
    ensure!(after.completed >= known, "{known} records were complete, and the guest knows of {} now", after.completed);
    ctx.note(&format!("all {} records are there", after.completed));
    guest.goes_on()?;
    ensure!(domains(pair.b())? == ["guest"], "domains of host b: {:?}", domains(pair.b())?);
    let left = row(pair.b(), "guest", Role::Primary)?;
    ensure!(left.is_none_or(|row| !row.protected), "nobody protects it");
    Ok(())
}

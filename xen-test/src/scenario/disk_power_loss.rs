//! The host of a guest with a mirrored disk loses its power: memory, network and disk go on together at the backup (R5).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::disks::{WithDisk, disk, wait_disk};
use crate::protection::{domains, fail_over, wait_epochs};

pub(super) const LOSS: Scenario = Scenario {
    name: "disk-power-loss",
    about: "the primary loses power while the guest writes its mirrored disk: memory, network and disk go on at the backup, in step",
    hosts: 2,
    start: Snapshot::Disk,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = WithDisk::protected(pair)?;
    let source = disk(pair.a())?;
    ensure!(source.connected && source.in_sync, "protected, and the copies of the disk are not alike: {source:?}");
    wait_epochs(pair.a(), "guest", 5)?;
    let held = wait_disk(pair.b(), "follows epoch by epoch", |s| s.target.as_ref().is_some_and(|t| t.armed))?;
    ctx.note(&format!("protected, the copy: {:?}", held.target));
    // Heard from outside, so it was complete in an epoch that is acknowledged.
    let known = guest.written()?.completed;
    ctx.note(&format!("{known} records are complete; the primary loses its power"));
    pair.a().power_off();
    let failover = fail_over(pair.b(), &guest.protected.guest, &guest.protected.client, Instant::now())?;
    ctx.note(&format!(
        "detected after {} ms, first byte after {} ms",
        failover.detect.as_millis(),
        failover.first_byte.as_millis()
    ));
    let after = guest.check()?;
    ensure!(after.completed >= known, "{known} records were complete, and the guest knows of {} now", after.completed);
    ctx.note(&format!("all {} records are there", after.completed));
    guest.goes_on()?;
    // Long enough for the writer to have come around to every block that the lost host may have written.
    guest.writes(after.slots / 4)?;
    let half = Instant::now() + Duration::from_secs(30);
    while let Some(left) = half.checked_duration_since(Instant::now()) {
        std::thread::sleep(left.min(Duration::from_secs(10)));
        guest.written()?;
    }
    guest.goes_on()?;
    let now = disk(pair.b())?;
    ensure!(now.role == "source" && now.open && !now.connected, "the disk of host b after the failover: {now:?}");
    ensure!(domains(pair.b())? == ["guest"], "domains of host b: {:?}", domains(pair.b())?);
    Ok(())
}

//! The planned end of a protection with a disk.

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::disks::{WithDisk, disk};
use crate::protection::{no_copy, nothing_left, protect, wait_epochs};

pub(super) const STOP: Scenario = Scenario {
    name: "disk-planned-stop",
    about: "unprotect while the guest writes its mirrored disk: no copy is left, both hosts' disks are the same bytes, and again",
    hosts: 2,
    start: Snapshot::Disk,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = WithDisk::protected(pair)?;
    for round in ["first", "second"] {
        if round == "second" {
            protect(pair.a(), "guest", "")?;
            wait_epochs(pair.a(), "guest", 5)?;
        }
        guest.writes(20)?;
        pair.a().sh("remus unprotect guest")?;
        no_copy(pair.b(), "guest")?;
        nothing_left(pair.a())?;
        guest.goes_on()?;
        let copy = disk(pair.b())?;
        ensure!(copy.role == "target" && copy.nbd.is_none(), "the disk of host b after the stop: {copy:?}");
        guest.rate(0)?;
        guest.settled(pair.a())?;
        guest.alike()?;
        ctx.note(&format!("{round} stop: both disks are the same bytes"));
        guest.go_on()?;
    }
    Ok(())
}

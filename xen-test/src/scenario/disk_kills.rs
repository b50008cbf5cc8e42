//! kill -9 of what stands between a guest and its mirrored disk: no I/O error, no lost write (hazard F20).

use anyhow::{Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::disks::{WithDisk, disk, serve, wait_disk};
use crate::protection::{nothing_left, protect, start_daemon, wait_epochs, wait_event};

pub(super) const DAEMON: Scenario = Scenario {
    name: "disk-kill-daemon",
    about: "kill -9 of the primary's remusd under write load: the disk's process lives, the guest sees no I/O error",
    hosts: 2,
    start: Snapshot::Ready,
    run: daemon,
};

pub(super) const SERVICE: Scenario = Scenario {
    name: "disk-kill-service",
    about: "kill -9 of the disk's service on either host under write load: the guest waits and sees no I/O error, nothing is lost",
    hosts: 2,
    start: Snapshot::Ready,
    run: service,
};

fn daemon(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = WithDisk::start(pair)?;
    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 4)?;
    pair.a().kill9_program("remusd")?;
    let lives = disk(pair.a())?;
    ensure!(lives.open && lives.connected, "the disk after the daemon's end: {lives:?}");
    start_daemon(pair.a())?;
    let recovered = wait_event(pair.a(), "guest", EventKind::Recovered)?;
    ctx.note(&recovered.detail);
    nothing_left(pair.a())?;
    guest.goes_on()?;
    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 4)?;
    guest.goes_on()
}

fn service(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = WithDisk::start(pair)?;
    let before = guest.writes(20)?.completed;
    pair.a().kill9_program("remus-disk")?;
    serve(pair.a())?;
    wait_disk(pair.a(), "is attached again", |s| s.open && s.nbd.is_some())?;
    guest.goes_on()?;
    ctx.note(&format!("killed alone: {} records more since", guest.written()?.completed - before));

    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 4)?;
    pair.a().kill9_program("remus-disk")?;
    let event = wait_event(pair.a(), "guest", EventKind::Unprotected)?;
    ctx.note(&format!("killed under protection: {}", event.detail));
    serve(pair.a())?;
    guest.goes_on()?;

    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 4)?;
    pair.b().kill9_program("remus-disk")?;
    serve(pair.b())?;
    guest.goes_on()?;
    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 4)?;
    guest.goes_on()
}

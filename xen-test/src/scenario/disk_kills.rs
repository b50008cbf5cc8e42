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
    start: Snapshot::Disk,
    run: daemon,
};

pub(super) const SERVICE: Scenario = Scenario {
    name: "disk-kill-service",
    about: "kill -9 of the source's disk service under write load, alone and under protection: the guest waits, sees no I/O error, loses nothing",
    hosts: 2,
    start: Snapshot::Ready,
    run: service,
};

pub(super) const COPY: Scenario = Scenario {
    name: "disk-kill-copy",
    about: "kill -9 of the copy's disk service while it applies: the guest goes on, and the copy is the same bytes again in the end",
    hosts: 2,
    start: Snapshot::Disk,
    run: copy,
};

fn daemon(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = WithDisk::protected(pair)?;
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
    wait_disk(pair.a(), "is attached again", |s| s.open && s.nbd.is_some())?;
    guest.goes_on()
}

fn copy(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    // Each acknowledged epoch is being applied while the next one is captured.
    let guest = WithDisk::protected(pair)?;
    pair.b().kill9_program("remus-disk")?;
    let event = wait_event(pair.a(), "guest", EventKind::Unprotected)?;
    ctx.note(&format!("the copy's service is killed: {}", event.detail));
    guest.writes(20)?;
    serve(pair.b())?;
    let left = disk(pair.b())?;
    ensure!(left.role == "target", "the disk of host b after its service was killed: {left:?}");
    ctx.note(&format!("the copy that it left counts as good: {}", left.good));
    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 3)?;
    pair.a().sh("remus unprotect guest")?;
    guest.goes_on()?;
    guest.rate(0)?;
    guest.settled(pair.a())?;
    guest.alike()
}

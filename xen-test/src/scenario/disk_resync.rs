//! The backup goes and comes back, and the old primary does: only what differs is sent, and nothing counts as protected before.

use std::time::Instant;

use anyhow::{Result, ensure};
use remusd::api::Role;
use remusd::ops::{Event, EventKind};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::disks::{WithDisk, disk, serve, serve_link, wait_disk};
use crate::protection::{
    Carrier, PATIENCE, domains, events, fail_over, protect, protect_command, row, start_daemon, wait_epochs, wait_event,
};
use crate::wait::wait_until;

pub(super) const RESYNC: Scenario = Scenario {
    name: "disk-resync",
    about: "the backup loses power and comes back: the disk is brought up to date by what differs, and the guest protected only then",
    hosts: 2,
    start: Snapshot::Disk,
    run: resync,
};

pub(super) const BACK: Scenario = Scenario {
    name: "disk-fail-back",
    about: "failover, the old primary returns, its divergent disk is brought up to date, and the guest fails back",
    hosts: 2,
    start: Snapshot::Disk,
    run: back,
};

fn resync(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = WithDisk::protected(pair)?;
    pair.b().power_off();
    let event = wait_event(pair.a(), "guest", EventKind::Unprotected)?;
    ctx.note(&format!("the backup is gone: {}", event.detail));
    guest.goes_on()?;
    let alone = wait_disk(pair.a(), "notices that its copy is gone", |s| !s.connected)?;
    ensure!(alone.marked > 0, "the guest has written and nothing is marked: {alone:?}");
    guest.writes(50)?;
    pair.b().boot()?;
    start_daemon(pair.b())?;
    // Without the disk's service there: refused, with the reason, and the guest runs on.
    let refused = protect(pair.a(), "guest", "").map_or_else(|e| e.to_string(), |()| "it was not refused".into());
    ensure!(refused.contains("remus-disk@d0"), "protecting with no disk service there: {refused}");
    ctx.note(&format!("refused: {refused}"));
    serve(pair.b())?;
    unfinished(ctx)?;
    wait_until(PATIENCE, "the guest is protected", || {
        Ok(row(pair.a(), "guest", Role::Primary)?.filter(|row| row.protected).map(drop))
    })?;
    let now = disk(pair.a())?;
    ensure!(now.connected && now.in_sync, "protected, and the disk's copies are not alike: {now:?}");
    ctx.note(&format!(
        "of {} MiB, {} MiB were to be compared, {} KiB sent",
        now.size >> 20,
        now.sync_total >> 20,
        now.sync_copied >> 10
    ));
    wait_epochs(pair.a(), "guest", 4)?;
    guest.goes_on()?;
    pair.a().sh("remus unprotect guest")?;
    guest.rate(0)?;
    guest.settled(pair.a())?;
    guest.alike()
}

/// With memory on the backup and a disk that is not brought up to date, nothing counts as protected and nothing can be activated (R4).
/// Returns when the disk can be reached, and the guest is being protected.
fn unfinished(ctx: &Ctx<'_>) -> Result<()> {
    let (a, b) = (ctx.pair().a(), ctx.pair().b());
    b.sh("pkill -f '[T]CP-LISTEN:7789'")?;
    let command = protect_command(Carrier::Tcp, a, "guest", "");
    a.sh(&format!("setsid {command} >/var/log/remus/protect.log 2>&1 </dev/null &"))?;
    // Epochs are taken, so the memory is there; only the disk is not.
    let epochs = |event: &Event| event.kind == EventKind::FirstCopyProgress && event.detail.contains("copied");
    let before = events(a)?.iter().filter(|event| epochs(event)).count();
    wait_until(PATIENCE * 2, "epochs reach host b", || {
        Ok((events(a)?.iter().filter(|event| epochs(event)).count() >= before + 3).then_some(()))
    })?;
    ensure!(
        !row(a, "guest", Role::Primary)?.is_some_and(|row| row.protected),
        "protected with a disk that is out of date"
    );
    let refused = b.run("remus failover guest --primary-is-off")?;
    ensure!(!refused.ok(), "a guest was activated on a disk that is out of date: {refused:?}");
    ctx.note(&format!("failover refused: {}", refused.stderr.trim()));
    ensure!(!domains(b)?.iter().any(|name| name == "guest"), "domains of host b: {:?}", domains(b)?);
    serve_link(b)
}

fn back(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    let guest = WithDisk::protected(pair)?;
    let known = guest.written()?.completed;
    a.power_off();
    fail_over(b, &guest.protected.guest, &guest.protected.client, Instant::now())?;
    ensure!(guest.check()?.completed >= known, "{known} records were complete before");
    guest.writes(30)?;
    ctx.note("the guest lives on host b; host a returns");
    a.boot()?;
    serve(a)?;
    let old = disk(a)?;
    ensure!(old.role == "source" && !old.open, "a disk that nobody has opened is open: {old:?}");
    start_daemon(a)?;
    // It learns from the other host that it has lost, and its disk is a copy from then on.
    wait_disk(a, "gives its disk free", |s| s.role == "target")?;
    protect(b, "guest", "")?;
    wait_epochs(b, "guest", 4)?;
    guest.goes_on()?;
    let known = guest.written()?.completed;
    ctx.note(&format!("protected the other way round with {known} records; host b loses its power"));
    b.power_off();
    // The event log of host a begins anew with its boot.
    fail_over(a, &guest.protected.guest, &guest.protected.client, Instant::now())?;
    ensure!(guest.check()?.completed >= known, "{known} records were complete before");
    guest.goes_on()
}

//! The witness fails: it is down, comes back, or has forgotten everything.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use remusd::api::Role;
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::net::Party;
use crate::protection::{Arena, DETECTION, PATIENCE, events, fail_over, row, wait_epochs};
use crate::wait::wait_until;
use crate::witness::Etcd;

pub(super) const DOWN: Scenario = Scenario {
    name: "safety-witness-down",
    about: "the witness dies, then the primary: nothing is activated until an operator says that the primary is off",
    hosts: 2,
    start: Snapshot::Armed,
    run: down,
};

pub(super) const BACK: Scenario = Scenario {
    name: "safety-witness-back",
    about: "the witness dies and comes back: protection is armed anew and the backup takes over by itself",
    hosts: 2,
    start: Snapshot::Armed,
    run: back,
};

pub(super) const WIPED: Scenario = Scenario {
    name: "safety-witness-wiped",
    about: "the witness loses its data and the primary dies: an absent record is claimed by nobody",
    hosts: 2,
    start: Snapshot::Armed,
    run: |ctx| forgetful(ctx, Etcd::wipe),
};

pub(super) const LOST_BOTH: Scenario = Scenario {
    name: "safety-backup-and-witness-lost",
    about: "backup and witness are lost together: output is held until the witness is back",
    hosts: 2,
    start: Snapshot::Armed,
    run: lost_both,
};

/// Longer than any detection, extra interval and claim.
const LONG_ENOUGH: Duration = Duration::from_secs(4 * DETECTION.as_secs());

/// Waits until the primary says that the witness decides, or that it does not.
fn witness_decides(arena: &Arena<'_>, decides: bool) -> Result<()> {
    wait_until(PATIENCE, &format!("the witness decides: {decides}"), || {
        let said = events(arena.host(Party::A))?.into_iter().rfind(|event| event.kind == EventKind::WhoDecides);
        Ok(said.filter(|event| event.detail.starts_with("the witness decides") == decides).map(drop))
    })
}

fn down(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let mut arena = Arena::start(pair, "")?;
    arena.etcd.stop();
    witness_decides(&arena, false)?;
    wait_epochs(pair.a(), "guest", 3)?;
    ctx.note("the witness is down, protection goes on; the primary loses its power");
    pair.a().power_off();
    let lost = Instant::now();
    arena.silent_for(LONG_ENOUGH)?;
    let failover = fail_over(pair.b(), &arena.protected.guest, &arena.protected.client, lost)?;
    ctx.note(&format!("by an operator's word, first byte after {:.1} s", failover.first_byte.as_secs_f32()));
    arena.protected.goes_on()?;
    arena.etcd.run()?;
    ensure!(arena.decided()? == Party::B, "the witness has not been told");
    arena.ended_as(&[Party::A, Party::B])
}

fn back(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let mut arena = Arena::start(pair, "")?;
    let before = arena.record()?.generation;
    arena.etcd.stop();
    witness_decides(&arena, false)?;
    arena.etcd.run()?;
    witness_decides(&arena, true)?;
    let after = arena.record()?.generation;
    ensure!(after > before, "armed anew under the old generation {before}");
    wait_epochs(pair.a(), "guest", 3)?;
    ctx.note("armed anew; the primary loses its power");
    pair.a().power_off();
    ensure!(arena.decided()? == Party::B, "nobody took over");
    arena.ended_as(&[Party::A, Party::B])
}

fn forgetful(ctx: &mut Ctx<'_>, forget: fn(&mut Etcd) -> Result<()>) -> Result<()> {
    let pair = ctx.pair();
    let mut arena = Arena::start(pair, "")?;
    // Before the primary can notice and say that the token is its own again.
    pair.a().power_off();
    let lost = Instant::now();
    forget(&mut arena.etcd)?;
    arena.silent_for(LONG_ENOUGH)?;
    ctx.note("the backup does not claim what the witness does not know");
    fail_over(pair.b(), &arena.protected.guest, &arena.protected.client, lost)?;
    arena.ended_as(&[Party::A, Party::B])
}

fn lost_both(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let mut arena = Arena::start(pair, "")?;
    arena.etcd.freeze(true)?;
    pair.b().power_off();
    wait_until(PATIENCE, "output is held", || {
        Ok(row(pair.a(), "guest", Role::Primary)?.filter(|row| row.state == "holding").map(drop))
    })?;
    arena.silent_for(LONG_ENOUGH)?;
    ctx.note("output is held; the witness is back");
    arena.etcd.freeze(false)?;
    ensure!(arena.decided()? == Party::A, "the primary did not get its guest");
    arena.ended_as(&[Party::A])?;
    arena.etcd.stop();
    Ok(())
}

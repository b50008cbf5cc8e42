//! Planned moves: there and back, nothing lost.

use anyhow::{Context, Result, ensure};
use remusd::api::Role;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::net::Party;
use crate::protection::{Arena, PATIENCE, Protected, domains, row, wait_epochs};
use crate::wait::wait_until;

pub(super) const WITNESS: Scenario = Scenario {
    name: "safety-switchover",
    about: "remus switchover with a witness: the guest moves, is protected again towards its old host, and moves back",
    hosts: 2,
    start: Snapshot::Guest,
    run: with_witness,
};

pub(super) const ALONE: Scenario = Scenario {
    name: "safety-switchover-no-witness",
    about: "remus switchover without a witness: the guest moves and nothing is lost",
    hosts: 2,
    start: Snapshot::Protected,
    run: without,
};

fn with_witness(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let arena = Arena::start(pair, "--reprotect")?;
    let said = pair.a().sh("remus switchover guest --json")?;
    ctx.note(said.trim());
    arena.protected.goes_on()?;
    ensure!(domains(pair.a())?.is_empty(), "left on host a: {:?}", domains(pair.a())?);
    // Over ssh, as users have it: emulated ciphers carry some 2 MB/s.
    wait_until(3 * PATIENCE, "the guest is protected again towards its old host", || {
        Ok(row(pair.b(), "guest", Role::Primary)?.filter(|row| row.protected).map(drop))
    })?;
    wait_epochs(pair.b(), "guest", 3)?;
    let said = pair.b().sh("remus switchover guest --json")?;
    ctx.note(said.trim());
    // It is being protected again towards host b, so there may be a copy.
    arena.spoke_from(&[Party::A, Party::B, Party::A])
}

fn without(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, "")?;
    let said = pair.a().sh("remus switchover guest --json").context("switchover")?;
    ctx.note(said.trim());
    protected.goes_on()?;
    ensure!(domains(pair.a())?.is_empty(), "left on host a: {:?}", domains(pair.a())?);
    ensure!(domains(pair.b())? == ["guest"], "on host b: {:?}", domains(pair.b())?);
    Ok(())
}

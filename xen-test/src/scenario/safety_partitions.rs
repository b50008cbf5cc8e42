//! Links cut with a witness to decide: each time exactly one copy goes on, by itself.

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::net::Party;
use crate::protection::{Arena, nothing_left};

pub(super) const HOSTS: Scenario = Scenario {
    name: "safety-partition",
    about: "the hosts are cut from each other, both see the witness: exactly one goes on",
    hosts: 2,
    start: Snapshot::Armed,
    run: hosts,
};

pub(super) const PRIMARY: Scenario = Scenario {
    name: "safety-primary-cut",
    about: "the primary is cut from backup, witness and client: the backup goes on, the primary's copy never speaks again",
    hosts: 2,
    start: Snapshot::Armed,
    run: primary,
};

pub(super) const BACKUP: Scenario = Scenario {
    name: "safety-backup-cut",
    about: "the backup is cut from primary, witness and client: the primary goes on, the backup's copy never runs",
    hosts: 2,
    start: Snapshot::Armed,
    run: backup,
};

fn hosts(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let arena = Arena::start(pair, "")?;
    pair.cut(Party::A, Party::B)?;
    let winner = arena.decided()?;
    ctx.note(&format!("cut from each other: host {} goes on", winner.name()));
    arena.protected.goes_on()?;
    pair.join(Party::A, Party::B)?;
    match winner {
        Party::A => {
            arena.ended_as(&[Party::A])?;
            nothing_left(pair.a())
        }
        _ => arena.ended_as(&[Party::A, Party::B]),
    }
}

fn primary(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let arena = Arena::start(pair, "")?;
    pair.cut(Party::A, Party::B)?;
    pair.cut(Party::A, Party::Client)?;
    ensure!(arena.decided()? == Party::B, "a host that nobody sees has won");
    ctx.note("the backup goes on; the old primary is joined again");
    arena.protected.goes_on()?;
    pair.join(Party::A, Party::Client)?;
    pair.join(Party::A, Party::B)?;
    arena.ended_as(&[Party::A, Party::B])?;
    nothing_left(pair.a())
}

fn backup(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let arena = Arena::start(pair, "")?;
    pair.cut(Party::A, Party::B)?;
    pair.cut(Party::B, Party::Client)?;
    ensure!(arena.decided()? == Party::A, "a host that nobody sees has won");
    ctx.note("the primary goes on alone; the backup is joined again");
    arena.protected.goes_on()?;
    pair.join(Party::B, Party::Client)?;
    pair.join(Party::A, Party::B)?;
    arena.ended_as(&[Party::A])?;
    nothing_left(pair.a())
}

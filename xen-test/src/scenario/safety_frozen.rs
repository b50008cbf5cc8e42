//! Both hosts stand still for longer than the detection time and wake up in one order or the other.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::net::Party;
use crate::protection::{Arena, DETECTION, PATIENCE, row, wait_epochs};
use crate::wait::wait_until;

pub(super) const BOTH: Scenario = Scenario {
    name: "safety-both-frozen",
    about: "both hosts freeze and thaw, the backup first and then the primary first: never two copies, no output lost",
    hosts: 2,
    start: Snapshot::Armed,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let arena = Arena::start(pair, "")?;
    // Both at once: nobody was away from the other for longer than itself.
    pair.each(|host| host.freeze())?;
    std::thread::sleep(2 * DETECTION);
    pair.each(|host| host.thaw())?;
    arena.protected.goes_on()?;
    ctx.note("thawed together");
    let turns = arena.turns()?.len();
    ensure!(turns <= 2, "the guest moved {} times", turns - 1);
    if turns == 1 && row(pair.a(), "guest", remusd::api::Role::Primary)?.is_some_and(|row| row.protected) {
        wait_epochs(pair.a(), "guest", 3)?;
        pair.each(|host| host.freeze())?;
        std::thread::sleep(2 * DETECTION);
        // The backup hears nothing for as long as it takes to decide.
        pair.b().thaw()?;
        ensure!(arena.decided()? == Party::B, "the backup did not take over from a frozen primary");
        std::thread::sleep(Duration::from_secs(5));
        pair.a().thaw()?;
        ctx.note("the backup was first, and the primary wakes up beside it");
        wait_until(PATIENCE, "the old copy is gone", || {
            Ok(crate::protection::domains(pair.a())?.is_empty().then_some(()))
        })?;
        return arena.ended_as(&[Party::A, Party::B]);
    }
    let owner = arena.decided()?;
    ctx.note(&format!("host {} goes on alone", owner.name()));
    let expected: &[Party] = if owner == Party::A { &[Party::A] } else { &[Party::A, Party::B] };
    arena.ended_as(expected)
}

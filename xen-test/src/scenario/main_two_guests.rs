//! Two guests, one protected in each direction (issue scenario 9).

use std::time::Instant;

use anyhow::{Result, ensure};
use remusd::api::Role;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::{Guest, domains, fail_over, protect, row, start_daemons, wait_epochs};

pub(super) const TWO: Scenario = Scenario {
    name: "main-two-guests",
    about: "two guests, one protected in each direction; one host dies and both go on",
    hosts: 2,
    start: Snapshot::Ready,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    start_daemons(pair)?;
    let east = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh).numbered("east", 21))?;
    let west = Guest::create(pair, pair.b(), GuestSpec::new(Kind::Pvh).numbered("west", 22))?;
    let (from_east, from_west) = (east.counter(10.0)?, west.counter(10.0)?);
    protect(pair.a(), "east", "")?;
    protect(pair.b(), "west", "")?;
    for (host, guest) in [(pair.a(), "east"), (pair.b(), "west")] {
        wait_epochs(host, guest, 5)?;
    }
    ensure!(row(pair.b(), "east", Role::Backup)?.is_some_and(|r| r.protected), "b does not hold east");
    ensure!(row(pair.a(), "west", Role::Backup)?.is_some_and(|r| r.protected), "a does not hold west");
    ctx.note("both protected; host a loses its power");
    pair.a().power_off();
    let failover = fail_over(pair.b(), &east, &from_east, Instant::now())?;
    ctx.note(&format!("east runs on b, first byte after {:.1} s", failover.first_byte.as_secs_f32()));
    for (name, guest, client) in [("east", &east, &from_east), ("west", &west, &from_west)] {
        let from = client.last().map_or(0, |a| a.line.n);
        ensure!(client.wait_for(from + 20, crate::protection::PATIENCE).is_some(), "{name} does not count on");
        let report = client.report();
        ensure!(report.gaps + report.regressions == 0 && report.ended.is_none(), "{name}: {report:?}");
        guest.is_the_same()?;
    }
    let mut names = domains(pair.b())?;
    names.sort();
    ensure!(names == ["east", "west"], "domains of host b: {names:?}");
    Ok(())
}

//! The host of a protected guest loses its power: the guest goes on at the backup (issue scenario 1).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::{Carrier, Guest, Protected, domains, fail_over, protect_over, start_daemons, wait_epochs};

pub(super) const PVH: Scenario = Scenario {
    name: "main-power-loss-pvh",
    about: "the primary loses power; a PVH guest and its client's connection go on at the backup",
    hosts: 2,
    start: Snapshot::Guest,
    run: |ctx| run(ctx, Kind::Pvh, ""),
};

pub(super) const HVM: Scenario = Scenario {
    name: "main-power-loss-hvm",
    about: "the primary loses power; an HVM guest and its client's connection go on at the backup",
    hosts: 2,
    start: Snapshot::Ready,
    run: |ctx| run(ctx, Kind::Hvm, ""),
};

/// `more`: further options of `remus protect`.
pub(super) fn run(ctx: &mut Ctx<'_>, kind: Kind, more: &str) -> Result<()> {
    let pair = ctx.pair();
    start_daemons(pair)?;
    let Protected { guest, client } = Protected::of(Guest::create(pair, pair.a(), GuestSpec::new(kind))?)?;
    // The PVH guest by what users have, the HVM guest by the faster carrier.
    let carrier = if kind == Kind::Pvh { Carrier::Usual } else { Carrier::Tcp };
    protect_over(carrier, pair.a(), "guest", more)?;
    wait_epochs(pair.a(), "guest", 8)?;
    ctx.note("protected; the primary loses its power");
    pair.a().power_off();
    let failover = fail_over(pair.b(), &guest, &client, Instant::now())?;
    ctx.note(&format!(
        "detected after {} ms, first byte after {} ms",
        failover.detect.as_millis(),
        failover.first_byte.as_millis()
    ));
    guest.is_the_same()?;
    guest.verify()?;
    // It is to live on, not to blink once: a minute of counting and writing.
    let minute = Instant::now() + Duration::from_secs(60);
    while let Some(left) = minute.checked_duration_since(Instant::now()) {
        std::thread::sleep(left.min(Duration::from_secs(10)));
        let recent = client.last().is_some_and(|a| a.at.elapsed() < Duration::from_secs(10));
        ensure!(recent, "the guest fell silent after the failover");
    }
    guest.verify()?;
    let report = client.report();
    ensure!(report.ended.is_none(), "the connection ended: {:?}", report.ended);
    ensure!(report.gaps == 0 && report.regressions == 0, "the counter was not whole: {report:?}");
    ensure!(report.time_regressions == 0, "the guest's clock went backwards: {report:?}");
    ensure!(domains(pair.b())? == ["guest"], "domains of host b: {:?}", domains(pair.b())?);
    Ok(())
}

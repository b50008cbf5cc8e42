//! The primary freezes past detection, an operator fails over, the primary thaws (issue scenario 5).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::client::{BeaconSink, protocol::BeaconSpec};
use crate::host::Snapshot;
use crate::protection::{Protected, domains, fail_over, wait_event};
use crate::wait::wait_until;

pub(super) const FROZEN: Scenario = Scenario {
    name: "main-primary-frozen",
    about: "the primary freezes, the backup is activated, the primary thaws: its held output never leaves, its copy is stopped",
    hosts: 2,
    start: Snapshot::Protected,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, "")?;
    // Numbered datagrams, unprompted: the old copy's held ones would come as numbers that the new copy sends too.
    let client_ip = std::net::IpAddr::from([10, 77, 0, 100]);
    let sink = pair.client_ns().call(move || BeaconSink::bind(client_ip))??;
    let spec: BeaconSpec = sink.order(20.0, 64)?;
    protected.guest.ask(move |c| c.beacon(spec))?;
    wait_until(Duration::from_secs(60), "the beacon is heard", || Ok((sink.report().received > 20).then_some(())))?;

    pair.a().freeze()?;
    let failover = fail_over(pair.b(), &protected.guest, &protected.client, Instant::now())?;
    ctx.note(&format!(
        "failed over, first byte after {:.1} s; the old primary thaws",
        failover.first_byte.as_secs_f32()
    ));
    pair.a().thaw()?;
    let thawed = Instant::now();
    wait_event(pair.a(), "guest", EventKind::Superseded)?;
    wait_until(Duration::from_secs(60), "the old copy is gone", || Ok(domains(pair.a())?.is_empty().then_some(())))?;
    ctx.note(&format!("the old copy was stopped {:.1} s after the thaw", thawed.elapsed().as_secs_f32()));
    protected.goes_on()?;
    let heard = sink.report();
    ensure!(heard.repeated == 0, "datagrams of two copies were heard: {heard:?}");
    ensure!(domains(pair.b())? == ["guest"], "domains of host b: {:?}", domains(pair.b())?);
    let left = pair.a().sh("ip -o link show type ifb | grep rmifb || true")?;
    ensure!(left.is_empty(), "left on the old primary: {left}");
    Ok(())
}

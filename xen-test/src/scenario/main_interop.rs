//! Interoperation with stock Xen, the named unsafe modes (issue scenario 8).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use remusd::api::Role;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::{
    Guest, PATIENCE, domains, fail_over, no_copy, nothing_left, row, slow_host_options, start_daemon, start_daemons,
    status,
};
use crate::wait::wait_until;

pub(super) const TO_STOCK: Scenario = Scenario {
    name: "main-interop-to-stock",
    about: "our primary to a stock `xl migrate-receive -r`: Xen's own verifiers accept the stream, a clean stop leaves no copy",
    hosts: 2,
    start: Snapshot::Guest,
    run: |ctx| to_stock(ctx, ""),
};

pub(super) const FROM_STOCK: Scenario = Scenario {
    name: "main-interop-from-stock",
    about: "a stock `xl remus -s` to our backup side: its copy waits for an operator and goes on",
    hosts: 2,
    start: Snapshot::Guest,
    run: from_stock,
};

fn acked(ctx: &Ctx<'_>) -> Result<Option<u64>> {
    Ok(row(ctx.pair().a(), "guest", Role::Primary)?.and_then(|r| r.acked).map(|e| e.0))
}

/// `more`: further options of `remus protect`.
pub(super) fn to_stock(ctx: &mut Ctx<'_>, more: &str) -> Result<()> {
    let pair = ctx.pair();
    start_daemon(pair.a())?;
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
    let client = guest.counter(10.0)?;
    let command = "tee /root/stream | ssh hostb xl migrate-receive -r 2>/root/receiver.log";
    let output = pair.a().run(&format!(
        "remus protect guest '{command}' -s '' --unsafe stock-receiver {} {more}",
        slow_host_options()
    ))?;
    ensure!(output.ok(), "remus protect: {}{}", output.stdout, output.stderr);
    wait_until(PATIENCE, "a few checkpoints", || Ok(acked(ctx)?.filter(|n| *n >= 5)))?;
    let shown = row(pair.a(), "guest", Role::Primary)?;
    ensure!(
        shown.as_ref().is_some_and(|r| !r.protected && r.detail.contains("UNSAFE")),
        "status must not call this protected: {shown:?}"
    );
    wait_until(PATIENCE, "the stock receiver's copy", || {
        Ok(domains(pair.b())?.contains(&"guest--incoming".to_string()).then_some(()))
    })?;
    // Cut off anywhere, as if the primary had been killed.
    pair.a().push(&[concat!(env!("CARGO_MANIFEST_DIR"), "/verify/verify_stream.py")], "/root/")?;
    let verdict = pair.a().run("cp /root/stream /root/cut && python3 /root/verify_stream.py --cut /root/cut")?;
    ctx.note(verdict.stdout.trim());
    ensure!(verdict.ok(), "Xen's verifiers refuse the stream: {}{}", verdict.stdout, verdict.stderr);
    pair.a().sh("remus unprotect guest")?;
    no_copy(pair.b(), "guest")?;
    nothing_left(pair.a())?;
    let from = client.last().map_or(0, |a| a.line.n);
    ensure!(client.wait_for(from + 20, PATIENCE).is_some(), "the guest does not go on after the stop");
    guest.is_the_same()
}

fn from_stock(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    start_daemons(pair)?;
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
    let client = guest.counter(10.0)?;
    let remus = pair
        .a()
        .spawn("xl remus -F -n -d -i 200 -s '' guest 'ssh hostb remusd receive-stock' >/root/xl-remus.log 2>&1")?;
    wait_until(PATIENCE, "our backup side holds the stock primary's checkpoints", || {
        Ok(row(pair.b(), "guest", Role::Backup)?.filter(|r| r.protected && r.acked.is_some_and(|e| e.0 >= 4)))
    })?;
    ctx.note("the copy is held; the stock primary loses its power");
    pair.a().power_off();
    drop(remus);
    // The stock primary has no heartbeat of ours, but the bridge it runs on has: the loss is seen when ssh notices or the bridge's
    // input falls silent. An operator need not wait for that; nothing may start by itself meanwhile.
    std::thread::sleep(Duration::from_secs(10));
    ensure!(
        domains(pair.b())? == ["guest--incoming"],
        "something was started without an operator: {:?}",
        status(pair.b())?
    );
    let lost = Instant::now();
    pair.b().sh("pkill -f 'remusd [r]eceive-stock'")?;
    let failover = fail_over(pair.b(), &guest, &client, lost)?;
    ctx.note(&format!(
        "runs on b, first byte after {:.1} s (a stock primary holds no output: gaps are its own)",
        failover.first_byte.as_secs_f32()
    ));
    guest.is_the_same()
}

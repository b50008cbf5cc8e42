//! A drill on the backup proves that the last epoch would start, while the guest it is of goes on untouched.

use anyhow::{Context, Result, ensure};
use remusd::ops::EventKind;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot};
use crate::protection::{PATIENCE, Protected, domains, events, row, wait_epochs};
use crate::wait::wait_until;
use remusd::api::Role;

pub(super) const DRILL: Scenario = Scenario {
    name: "safety-drill",
    about: "remus drill starts the last epoch in isolation, and neither guest nor client nor protection notices",
    hosts: 2,
    start: Snapshot::Protected,
    run,
};

fn acked(a: &Host) -> Result<u64> {
    let row = row(a, "guest", Role::Primary)?.context("the guest is protected")?;
    ensure!(row.protected, "protection was lost: {}", row.detail);
    Ok(row.acked.map_or(0, |epoch| epoch.0))
}

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    let protected = Protected::start(pair, "")?;
    // Enough writing that later epochs overwrite what the drill has still to read.
    protected.guest.dirty(500, 64, 16)?;
    wait_epochs(a, "guest", 2)?;
    let before = acked(a)?;

    let output = b.run("remus drill guest --json")?;
    ensure!(output.ok(), "remus drill: {}{}", output.stdout, output.stderr);
    let value: serde_json::Value = serde_json::from_str(output.stdout.trim()).context(output.stdout.clone())?;
    let report = &value["result"];
    let number = |name: &str| report[name].as_u64().with_context(|| format!("{name} in {report}"));
    ctx.note(&format!("verdict: {report}"));
    ensure!(number("epoch")? >= before, "it drilled epoch {} although {before} was acknowledged", number("epoch")?);
    let whole = u64::from(GuestSpec::new(Kind::Pvh).memory_mb) * 256;
    ensure!(number("pages")? > whole / 2, "only {} pages", number("pages")?);
    ensure!(number("cpu_ms")? > 0 && number("ran_ms")? >= 5000, "it did not run: {report}");
    number("answered_ms")?;

    let after = acked(a)?;
    ensure!(after > before, "no epoch was acknowledged during the drill: {before}, {after}");
    for host in [a, b] {
        let bad = [EventKind::Unprotected, EventKind::Holding, EventKind::PrimarySuspect, EventKind::AuditDiffers];
        let told: Vec<_> = events(host)?.into_iter().filter(|event| bad.contains(&event.kind)).collect();
        ensure!(told.is_empty(), "the drill was noticed on host {}: {told:?}", host.name());
    }
    ensure!(events(b)?.iter().any(|event| event.kind == EventKind::Drilled), "no event of it");
    ensure!(domains(b)? == ["guest--incoming"], "left on host b: {:?}", domains(b)?);
    protected.goes_on()?;
    ctx.note(&format!("{} epochs were acknowledged meanwhile", after - before));

    aborted(ctx, b)?;
    refused(ctx, b)?;
    wait_epochs(a, "guest", 2)?;
    protected.goes_on()
}

/// An aborted drill leaves nothing.
fn aborted(ctx: &Ctx<'_>, b: &Host) -> Result<()> {
    let said = b.sh("remus drill guest --run-ms 600000 --tag d")?;
    let job: u64 = said.trim().strip_prefix("job ").context(said.clone())?.parse()?;
    wait_until(PATIENCE, "the drilled domain is there", || {
        Ok(domains(b)?.iter().any(|name| name.starts_with("guest--drill")).then_some(()))
    })?;
    // It is called guest--drill--incoming at first. The first line is the headings.
    let networks = b.sh("xl network-list $(xl list | awk '/^guest--drill/ { print $2 }')")?;
    ensure!(networks.lines().count() == 1, "the drilled domain has a network: {networks}");
    let abort = b.sh(&format!("remus abort {job}"))?;
    ensure!(abort.contains("cancelled"), "{abort}");
    ensure!(domains(b)? == ["guest--incoming"], "left on host b: {:?}", domains(b)?);
    ctx.note(&abort);
    Ok(())
}

/// Without memory for a second domain nothing is begun.
fn refused(ctx: &Ctx<'_>, b: &Host) -> Result<()> {
    let free: u64 = b.sh("xl info free_memory")?.trim().parse()?;
    let spec = GuestSpec {
        name: "filler".into(),
        memory_mb: u32::try_from(free.saturating_sub(80))?,
        ..GuestSpec::new(Kind::Pvh)
    };
    // xl takes options before the file only.
    let create = spec.create_command().replacen("xl create", "xl create -p", 1);
    let made = b.run(&create)?;
    ensure!(made.ok(), "{create}: {}{}", made.stdout, made.stderr);
    let output = b.run("remus drill guest")?;
    b.sh("xl destroy filler")?;
    ensure!(output.status == 5 && output.stderr.contains("MiB free"), "a drill without memory: {output:?}");
    ctx.note(output.stderr.trim());
    Ok(())
}

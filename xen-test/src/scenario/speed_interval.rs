//! `--interval auto`: epochs end when output waits, and not before the longest interval when nothing does.

use anyhow::{Context, Result, ensure};
use remusd::api::Role;
use remusd::ops::EventKind;
use remusd::protect::pace::IntervalReport;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::client::{EchoClient, Spread};
use crate::host::Snapshot;
use crate::pair::Pair;
use crate::protection::{Guest, PATIENCE, at, events, nothing_left, protect, row};
use crate::wait::wait_until;

pub(super) const AUTO: Scenario = Scenario {
    name: "speed-interval-auto",
    about: "with --interval auto epochs end early while output waits, and take the longest interval while none does",
    hosts: 2,
    start: Snapshot::Guest,
    run,
};

/// The longest interval, in milliseconds: long enough to be told from whatever an emulated host adds to a short one.
const LONGEST: u64 = 2000;

fn intervals(pair: &Pair) -> Result<IntervalReport> {
    let row = row(pair.a(), "guest", Role::Primary)?.context("the guest is not protected")?;
    ensure!(row.protected, "the guest is not protected: {}", row.detail);
    row.interval.context("a primary without intervals")
}

/// Waits until so many more epochs have ended for the reason that `pick` picks, and returns what all reasons have grown by: the timer's,
/// and output's.
fn grown(pair: &Pair, what: &str, by: u64, pick: fn(&IntervalReport) -> u64) -> Result<(u64, u64)> {
    let from = intervals(pair)?;
    let to = wait_until(PATIENCE, &format!("{by} more epochs ended {what}"), || {
        let now = intervals(pair)?;
        Ok((pick(&now) >= pick(&from) + by).then_some(now))
    })?;
    Ok((to.by_timer - from.by_timer, to.by_output - from.by_output))
}

fn echo(pair: &Pair, guest: &Guest<'_>, during: impl FnOnce() -> Result<()>) -> Result<Spread> {
    let to = at(guest.spec.ip, guest.ports().echo_tcp);
    let echo = pair.client_ns().call(move || EchoClient::tcp(to, 10.0, 0, PATIENCE))??;
    during()?;
    let report = echo.report();
    ensure!(report.ended.is_none() && report.regressions == 0, "{report:?}");
    Ok(report.rtt)
}

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
    // Something to check at the end; the guest itself is left silent.
    guest.dirty(0, 64, 8)?;
    protect(pair.a(), "guest", &format!("--interval auto:5-{LONGEST}"))?;

    let (timer, output) = grown(pair, "by the timer", 5, |report| report.by_timer)?;
    ctx.note(&format!("nobody talks to the guest: {timer} epochs ended by the timer, {output} by output"));
    ensure!(
        output <= timer,
        "epochs of a silent guest were ended by output that is not there: {output} of {}",
        output + timer
    );

    let auto = echo(pair, &guest, || {
        let (timer, output) = grown(pair, "by output", 30, |report| report.by_output)?;
        let report = intervals(pair)?;
        ctx.note(&format!("a client talks to it: {timer} epochs ended by the timer, {output} by output; {report:?}"));
        ensure!(output > timer, "output waited and did not end the epochs: {output} of {}", output + timer);
        // Of the latest epochs, all of which ended with a client waiting.
        ensure!(report.mean_ms.is_some_and(|mean| mean < LONGEST), "epochs took the longest interval: {report:?}");
        Ok(())
    })?;

    // The mean is over the 16 latest: those of the client have to go first.
    grown(pair, "by the timer", 17, |report| report.by_timer)?;
    let report = intervals(pair)?;
    ctx.note(&format!("silent again: {report:?}"));
    ensure!(report.mean_ms.is_some_and(|mean| mean > LONGEST / 2), "a silent guest's epochs are short: {report:?}");

    let slow = events(pair.a())?.iter().filter(|event| event.kind == EventKind::EpochSlow).count();
    ensure!(slow <= 1, "{slow} epochs are told as slow");
    pair.a().sh("remus unprotect guest")?;
    nothing_left(pair.a())?;

    protect(pair.a(), "guest", "--interval 200")?;
    let fixed = echo(pair, &guest, || {
        let (_, output) = grown(pair, "by the timer", 20, |report| report.by_timer)?;
        ensure!(output == 0, "a fixed interval was cut short");
        Ok(())
    })?;
    // Figures for people: what they are worth depends on what else this machine does.
    ctx.note(&format!("round trips: auto {auto:?}, 200 ms {fixed:?}"));
    pair.a().sh("remus unprotect guest")?;
    nothing_left(pair.a())?;
    guest.is_the_same()?;
    guest.verify()
}

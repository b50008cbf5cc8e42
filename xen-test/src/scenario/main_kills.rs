//! kill -9 of everything that takes part, each in several phases of an epoch (issue scenario 7).

use std::time::Duration;

use anyhow::{Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::pair::Pair;
use crate::protection::{
    Carrier, PATIENCE, Protected, no_copy, nothing_left, protect, protect_over, start_daemon, wait_epochs,
};
use crate::wait::wait_until;

pub(super) const PRIMARY: Scenario = Scenario {
    name: "main-kill-primary-daemon",
    about: "kill -9 of the primary's remusd in several phases: sealed, recovered, unsealed; the guest never stays suspended",
    hosts: 2,
    start: Snapshot::Protected,
    run: primary,
};

pub(super) const BACKUP: Scenario = Scenario {
    name: "main-kill-backup-daemon",
    about: "kill -9 of the backup's remusd activates nothing; the guest goes on, and is protected again",
    hosts: 2,
    start: Snapshot::Protected,
    run: backup,
};

pub(super) const PARTS: Scenario = Scenario {
    name: "main-kill-parts",
    about: "kill -9 of the save helper, of ssh and of the receiver: the guest goes on, no copy is started",
    hosts: 2,
    start: Snapshot::Protected,
    run: parts,
};

/// Delays after an acknowledged epoch, spread over the phases of the next one.
const PHASES_MS: [u64; 3] = [40, 230, 420];

fn primary(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    for (round, phase) in PHASES_MS.into_iter().enumerate() {
        let protected = protected_anew(pair, round)?;
        std::thread::sleep(Duration::from_millis(phase));
        // The daemon alone, not the bridge that ssh runs on the other host.
        pair.a().kill9_program("remusd")?;
        if round == 0 {
            // Proves that the question can be answered with yes: nobody has ended log-dirty mode yet.
            let mode = pair.a().sh("remusd log-dirty guest")?;
            ensure!(mode == "on", "log-dirty mode after the kill: {mode}");
        }
        start_daemon(pair.a())?;
        let recovered = crate::protection::wait_event(pair.a(), "guest", EventKind::Recovered)?;
        ctx.note(&format!("killed after {phase} ms: {}", recovered.detail));
        protected.goes_on()?;
        nothing_left(pair.a())?;
        ensure!(pair.a().sh("remusd log-dirty guest")? == "off", "log-dirty mode is still on");
    }
    pair.b().sh("remus discard guest || true")?;
    no_copy(pair.b(), "guest")?;
    protected_again(pair)
}

/// A protected guest that no kill before has touched.
fn protected_anew(pair: &Pair, round: usize) -> Result<Protected<'_>> {
    if round > 0 {
        pair.reset(Snapshot::Protected)?;
    }
    Protected::start(pair, "")
}

/// Whatever was killed: it can be protected again, and the stop leaves nothing.
fn protected_again(pair: &Pair) -> Result<()> {
    protect(pair.a(), "guest", "")?;
    wait_epochs(pair.a(), "guest", 2)?;
    pair.a().sh("remus unprotect guest")?;
    no_copy(pair.b(), "guest")
}

fn backup(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    for (round, phase) in PHASES_MS.into_iter().enumerate() {
        let protected = protected_anew(pair, round)?;
        std::thread::sleep(Duration::from_millis(phase));
        pair.b().kill9_program("remusd")?;
        unprotected(ctx, &protected, &format!("backup's remusd killed after {phase} ms"))?;
        no_copy(pair.b(), "guest")?;
    }
    start_daemon(pair.b())?;
    protected_again(pair)
}

fn unprotected(ctx: &Ctx<'_>, protected: &Protected<'_>, what: &str) -> Result<()> {
    let a = ctx.pair().a();
    wait_until(PATIENCE, &format!("{what}: the primary says so"), || {
        Ok(crate::protection::row(a, "guest", remusd::api::Role::Primary)?
            .filter(|r| !r.protected && r.state == "unprotected"))
    })
    .map(|row| ctx.note(&format!("{what}: {}", row.detail)))?;
    protected.goes_on()?;
    nothing_left(a)?;
    ensure!(a.sh("remusd log-dirty guest")? == "off", "{what}: log-dirty mode is still on");
    Ok(())
}

fn parts(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let victims = [
        (pair.a(), "libxl-save-helper", "libxl-save-helper", Carrier::Tcp),
        (pair.b(), "receiver", "xl migrate-receive", Carrier::Tcp),
        (pair.a(), "ssh", "ssh .*remusd connect", Carrier::Usual),
    ];
    let protected = Protected::start(pair, "")?;
    for (round, ((host, name, pattern, carrier), phase)) in victims.into_iter().zip(PHASES_MS).enumerate() {
        // Whatever was killed before: it can be protected again.
        if round > 0 {
            protect_over(carrier, pair.a(), "guest", "")?;
            wait_epochs(pair.a(), "guest", 2)?;
        }
        std::thread::sleep(Duration::from_millis(phase));
        host.kill9(pattern)?;
        unprotected(ctx, &protected, &format!("{name} killed after {phase} ms"))?;
        if name == "ssh" {
            // The copy is whole and waits for an operator: nothing has started it, and it is stale now.
            pair.b().sh("remus discard guest")?;
        }
        no_copy(pair.b(), "guest")?;
    }
    protected_again(pair)
}

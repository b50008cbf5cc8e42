//! The guest powers off, reboots or crashes under protection (issue scenario 6).

use std::time::Duration;

use anyhow::{Result, anyhow};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::client::{Control, ControlError};
use crate::host::Snapshot;
use crate::protection::{PATIENCE, Protected, at, domains, no_copy, nothing_left, wait_event};
use crate::wait::wait_until;

pub(super) const POWEROFF: Scenario = Scenario {
    name: "main-guest-poweroff",
    about: "the guest powers off: nothing is resurrected, it stays down as its configuration says",
    hosts: 2,
    start: Snapshot::Protected,
    run: |ctx| run(ctx, |c| c.poweroff().map(drop), false),
};

pub(super) const REBOOT: Scenario = Scenario {
    name: "main-guest-reboot",
    about: "the guest reboots: the stop is recorded first, then it boots anew, unprotected",
    hosts: 2,
    start: Snapshot::Protected,
    run: |ctx| run(ctx, |c| c.reboot().map(drop), true),
};

pub(super) const CRASH: Scenario = Scenario {
    name: "main-guest-crash",
    about: "the guest crashes: nothing is resurrected, it is destroyed as its configuration says",
    hosts: 2,
    start: Snapshot::Protected,
    run: |ctx| run(ctx, |c| c.crash().map(drop), false),
};

fn run(ctx: &mut Ctx<'_>, end: fn(&Control) -> Result<(), ControlError>, comes_back: bool) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, "")?;
    // Its answer may be held for ever with the guest.
    let _ = protected.guest.ask_within(Duration::from_secs(5), end);
    let ended = wait_event(pair.a(), "guest", EventKind::GuestEnded)?;
    ctx.note(&ended.detail);
    // Recorded at the backup before anything was done with the domain.
    let discarded = wait_event(pair.b(), "guest", EventKind::Discarded)?;
    ctx.note(&format!("backup: {}", discarded.detail));
    no_copy(pair.b(), "guest")?;
    if comes_back {
        let second = booted_after(ctx, &protected, &protected.guest.hello.id)?;
        ctx.note("it has booted anew");
        // xl's monitor left at the first checkpoint: ours has to do the next reboot too.
        let _ = protected.guest.ask_within(Duration::from_secs(5), |c| c.reboot().map(drop));
        booted_after(ctx, &protected, &second)?;
        ctx.note("and once more, with no protection any more");
    } else {
        wait_until(Duration::from_secs(60), "the domain is gone", || Ok(domains(pair.a())?.is_empty().then_some(())))?;
    }
    nothing_left(pair.a())
}

/// Waits until a boot answers that is not `before`; returns who it is.
fn booted_after(ctx: &Ctx<'_>, protected: &Protected<'_>, before: &str) -> Result<String> {
    let address = at(protected.guest.spec.ip, protected.guest.ports().control);
    let before = before.to_owned();
    ctx.pair()
        .client_ns()
        .spawn(move || {
            let control = Control::new(address, Duration::from_secs(5));
            wait_until(PATIENCE, "the guest boots anew", || {
                Ok(control.hello().ok().map(|h| h.id).filter(|id| *id != before))
            })
        })?
        .join()
        .map_err(|_| anyhow!("the client's thread panicked"))??
}

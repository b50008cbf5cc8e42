//! The backup is lost: the guest goes on alone and says so (issue scenario 4).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use remusd::api::Role;
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::net::Party;
use crate::protection::{DETECTION, PATIENCE, Protected, nothing_left, row, wait_epochs, wait_event};

pub(super) const POWER: Scenario = Scenario {
    name: "main-backup-power-loss",
    about: "the backup loses power: the guest goes on within the detection time, unprotected, and says so",
    hosts: 2,
    start: Snapshot::Protected,
    run: |ctx| {
        run(ctx, |ctx| {
            ctx.pair().b().power_off();
            Ok(())
        })
    },
};

pub(super) const FROZEN: Scenario = Scenario {
    name: "main-backup-frozen",
    about: "the backup freezes: the guest goes on within the detection time, unprotected, and says so",
    hosts: 2,
    start: Snapshot::Protected,
    run: |ctx| run(ctx, |ctx| ctx.pair().b().freeze()),
};

pub(super) const HOLD: Scenario = Scenario {
    name: "main-backup-loss-hold",
    about: "with --on-backup-loss hold, output stays held after the loss until an operator decides",
    hosts: 2,
    start: Snapshot::Guest,
    run: hold,
};

fn run(ctx: &mut Ctx<'_>, fault: fn(&Ctx<'_>) -> Result<()>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, "")?;
    let since = Instant::now();
    wait_epochs(pair.a(), "guest", 5)?;
    let usual = longest_silence(&protected, since);
    let lost_at = Instant::now();
    fault(ctx)?;
    let event = wait_event(pair.a(), "guest", EventKind::Unprotected)?;
    ctx.note(&format!("the primary says: {}", event.detail));
    protected.goes_on()?;
    let silence = longest_silence(&protected, lost_at);
    ctx.note(&format!(
        "the client heard nothing for {:.1} s; the longest before was {:.1} s",
        silence.as_secs_f32(),
        usual.as_secs_f32()
    ));
    // The bound: detection plus a second; on emulated hosts an epoch's own length comes on top.
    ensure!(
        silence <= DETECTION + Duration::from_secs(1) + usual,
        "the guest was silent for {:.1} s, with a detection time of {:.1} s",
        silence.as_secs_f32(),
        DETECTION.as_secs_f32()
    );
    let status = row(pair.a(), "guest", Role::Primary)?;
    ensure!(
        status.as_ref().is_some_and(|s| !s.protected && s.detail.contains("UNPROTECTED")),
        "status says {status:?}"
    );
    nothing_left(pair.a())
}

/// The longest time without a line around or after the fault.
fn longest_silence(protected: &Protected<'_>, lost_at: Instant) -> Duration {
    let arrivals = protected.client.arrivals();
    let gaps = arrivals.windows(2).filter(|pair| pair[1].at >= lost_at).map(|pair| pair[1].at - pair[0].at);
    gaps.max().unwrap_or_default()
}

fn hold(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, "--on-backup-loss hold")?;
    pair.cut(Party::A, Party::B)?;
    wait_event(pair.a(), "guest", EventKind::Holding)?;
    let from = Instant::now();
    ensure!(
        protected.client.first_after(from, Duration::from_secs(5)).is_none(),
        "output left although it was to be held"
    );
    pair.a().sh("remus unprotect guest")?;
    ensure!(
        protected.client.first_after(from, PATIENCE).is_some(),
        "held output did not flow after the operator's word"
    );
    protected.goes_on()?;
    nothing_left(pair.a())
}

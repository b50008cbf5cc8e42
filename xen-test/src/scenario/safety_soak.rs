//! A few minutes of the soak.

use std::time::Duration;

use anyhow::Result;

use super::{Ctx, Scenario};
use crate::host::Snapshot;

pub(super) const SOAK: Scenario = Scenario {
    name: "safety-soak",
    about: "something breaks every few seconds for three minutes: no value lost or repeated, never two copies (xen-test soak: longer)",
    hosts: 2,
    start: Snapshot::Armed,
    run,
};

/// The rest of the scenario's time limit is for what was begun to settle.
const TIME: Duration = Duration::from_secs(180);

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let tally = crate::soak::soak(ctx.pair(), TIME, 1)?;
    ctx.note(&format!("{} faults, {} moves, {} lines", tally.faults, tally.moves, tally.lines));
    Ok(())
}

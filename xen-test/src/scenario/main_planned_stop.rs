//! A planned stop (issue scenario 3).

use anyhow::{Result, ensure};

use super::{Ctx, Scenario};
use crate::client::Control;
use crate::host::Snapshot;
use crate::protection::{Protected, domains, no_copy, nothing_left, protect, wait_epochs};

pub(super) const STOP: Scenario = Scenario {
    name: "main-planned-stop",
    about: "unprotect leaves no copy, no qdisc, no log-dirty, and never pauses the guest for longer than an epoch",
    hosts: 2,
    start: Snapshot::Protected,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, "")?;
    protected.guest.ask(|c| c.stall_start(5.0))?;
    wait_epochs(pair.a(), "guest", 6)?;
    let steady = protected.guest.ask(|c| c.stall_read(true))?;
    ensure!(steady.count > 0, "checkpoints cause no stall: the meter does not work");
    pair.a().sh("remus unprotect guest")?;
    let stop = protected.guest.ask(Control::stall_stop)?;
    ctx.note(&format!("longest stall in steady state {:.0} ms, over the stop {:.0} ms", steady.max_ms, stop.max_ms));
    // The stop adds no suspend of its own: its worst stall is that of an epoch. Twice leaves room for the emulator's own noise.
    ensure!(
        stop.max_ms <= 2.0 * steady.max_ms,
        "the guest stood still for {:.0} ms over the stop, and at most {:.0} ms in steady state",
        stop.max_ms,
        steady.max_ms
    );
    no_copy(pair.b(), "guest")?;
    nothing_left(pair.a())?;
    ensure!(pair.a().sh("remusd log-dirty guest")? == "off", "log-dirty mode is still on");
    protected.goes_on()?;
    ensure!(domains(pair.a())? == ["guest"], "domains of host a: {:?}", domains(pair.a())?);
    ctx.note("and it can be protected again");
    protect(pair.a(), "guest", "")?;
    pair.a().sh("remus unprotect guest")?;
    no_copy(pair.b(), "guest")?;
    nothing_left(pair.a())
}

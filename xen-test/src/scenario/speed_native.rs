//! The native capture engine on nested Xen: the same memory as the save helper's, and everything that protection has to bear.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario, main_interop, main_power_loss};
use crate::host::{Host, Snapshot};
use crate::protection::{
    Carrier, DETECTION, Guest, PATIENCE, Protected, fail_over, nothing_left, protect_over, row, start_daemon,
    wait_epochs, wait_event,
};
use crate::wait::wait_until;
use remusd::api::Role;
use remusd::ops::EventKind;

/// The option that chooses the engine.
pub(super) const NATIVE: &str = "--engine native";

pub(super) const COMPARE: Scenario = Scenario {
    name: "speed-engine-compare",
    about: "both engines capture the same suspended PVH guest: the same memory, byte for byte",
    hosts: 1,
    start: Snapshot::Guest,
    run: |ctx| compare(ctx, Kind::Pvh),
};

pub(super) const COMPARE_HVM: Scenario = Scenario {
    name: "speed-engine-compare-hvm",
    about: "both engines capture the same suspended HVM guest: the same memory, byte for byte",
    hosts: 1,
    start: Snapshot::Ready,
    run: |ctx| compare(ctx, Kind::Hvm),
};

pub(super) const BLACKHOLE: Scenario = Scenario {
    name: "speed-native-blackhole",
    about: "a guest is checkpointed natively into nothing; a stop, and a kill of the daemon, leave nothing behind",
    hosts: 1,
    start: Snapshot::Guest,
    run: blackhole,
};

pub(super) const POWER_LOSS: Scenario = Scenario {
    name: "speed-native-power-loss",
    about: "as main-power-loss-pvh, captured by the native engine",
    hosts: 2,
    start: Snapshot::Guest,
    run: |ctx| main_power_loss::run(ctx, Kind::Pvh, NATIVE),
};

pub(super) const POWER_LOSS_HVM: Scenario = Scenario {
    name: "speed-native-power-loss-hvm",
    about: "as main-power-loss-hvm, captured by the native engine",
    hosts: 2,
    start: Snapshot::Ready,
    run: |ctx| main_power_loss::run(ctx, Kind::Hvm, NATIVE),
};

pub(super) const TO_STOCK: Scenario = Scenario {
    name: "speed-native-to-stock",
    about: "as main-interop-to-stock, captured by the native engine: Xen's verifiers and its receiver accept the stream",
    hosts: 2,
    start: Snapshot::Guest,
    run: |ctx| main_interop::to_stock(ctx, NATIVE),
};

pub(super) const BALLOON: Scenario = Scenario {
    name: "speed-native-balloon",
    about: "a natively captured guest is ballooned down and up under protection, then its host loses power",
    hosts: 2,
    start: Snapshot::Guest,
    run: balloon,
};

pub(super) const GONE: Scenario = Scenario {
    name: "speed-native-guest-gone",
    about: "a guest is destroyed under the native engine's mappings: no zombie of it stays",
    hosts: 1,
    start: Snapshot::Guest,
    run: gone,
};

pub(super) const OVER_BUDGET: Scenario = Scenario {
    name: "speed-native-over-budget",
    about: "epochs larger than the budget: the guest is resumed at once, and the operator is told",
    hosts: 1,
    start: Snapshot::Guest,
    run: over_budget,
};

/// Waits until so many were taken into nothing: a guest that is not protected, so that no epochs of a protection can be waited for.
fn checkpoints(host: &Host, count: u64) -> Result<()> {
    let acked = || Ok::<_, anyhow::Error>(row(host, "guest", Role::Primary)?.and_then(|row| row.acked));
    wait_until(PATIENCE, &format!("{count} checkpoints"), || Ok(acked()?.filter(|epoch| epoch.0 >= count))).map(drop)
}

fn compare(ctx: &mut Ctx<'_>, kind: Kind) -> Result<()> {
    let pair = ctx.pair();
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(kind))?;
    guest.dirty(2000, 64, 32)?;
    // Once as it is, and once more from the start: nothing that the first capture left may matter.
    for epochs in [12, 4] {
        // Dom0 puts packets into the buffers of a guest that stands suspended: between the two captures none may come.
        pair.a().sh("ip link set vif$(xl domid guest).0 down")?;
        let output = pair.a().run(&format!("engine-compare $(xl domid guest) -n {epochs} 2>&1"))?;
        pair.a().sh("ip link set vif$(xl domid guest).0 up")?;
        for line in output.stdout.lines() {
            ctx.note(line);
        }
        ensure!(output.ok(), "the engines' copies differ: {}", output.stdout);
    }
    guest.is_the_same()?;
    guest.verify()
}

fn blackhole(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    start_daemon(pair.a())?;
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
    guest.dirty(2000, 64, 32)?;
    let client = guest.counter(10.0)?;
    let protect = || -> Result<()> {
        protect_over(Carrier::Nowhere, pair.a(), "guest", &format!("{NATIVE} --interval 200"))?;
        checkpoints(pair.a(), 20)
    };
    protect()?;
    if let Some(row) = row(pair.a(), "guest", Role::Primary)? {
        ctx.note(&serde_json::to_string(&row)?);
    }
    pair.a().sh("remus unprotect guest")?;
    nothing_left(pair.a())?;
    protect()?;
    pair.a().kill9("remusd")?;
    start_daemon(pair.a())?;
    wait_until(PATIENCE, "the restarted daemon has put everything right", || {
        let from = client.last().map_or(0, |a| a.line.n);
        Ok(client.wait_for(from + 10, Duration::from_secs(5)).map(drop))
    })?;
    nothing_left(pair.a())?;
    guest.is_the_same()?;
    guest.verify()
}

fn balloon(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let protected = Protected::start(pair, NATIVE)?;
    let held = || -> Result<u64> {
        let list = pair.a().sh("xl list guest | tail -1")?;
        Ok(list.split_whitespace().nth(2).and_then(|word| word.parse().ok()).unwrap_or(0))
    };
    let before = held()?;
    ctx.note(&format!("the guest has {before} MiB"));
    for (target, reached) in [(before - 32, true), (before, false), (before - 16, true), (before, false)] {
        pair.a().sh(&format!("xl mem-set guest {target}"))?;
        wait_until(PATIENCE, &format!("the guest has about {target} MiB"), || {
            let now = held()?;
            Ok((if reached { now <= target + 1 } else { now + 1 >= target }).then_some(()))
        })?;
        wait_epochs(pair.a(), "guest", 3)?;
        ctx.note(&format!("the guest has {} MiB, protected all along", held()?));
    }
    // Pages that came back are written to, so that a copy from a stale mapping would show.
    protected.guest.dirty(2000, 64, 16)?;
    wait_epochs(pair.a(), "guest", 5)?;
    pair.a().power_off();
    let failover = fail_over(pair.b(), &protected.guest, &protected.client, Instant::now())?;
    ctx.note(&format!(
        "first byte after {} ms (detection {} ms)",
        failover.first_byte.as_millis(),
        DETECTION.as_millis()
    ));
    protected.goes_on()
}

fn gone(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    start_daemon(pair.a())?;
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
    guest.dirty(1000, 64, 16)?;
    protect_over(Carrier::Nowhere, pair.a(), "guest", NATIVE)?;
    checkpoints(pair.a(), 3)?;
    pair.a().sh("xl destroy guest")?;
    // A mapping that is still held keeps the domain's memory, and the domain as a zombie called (null).
    wait_until(PATIENCE, "nothing is left of the domain", || {
        let domains = crate::protection::domains(pair.a())?;
        ctx.note(&format!("domains: {domains:?}"));
        Ok(domains.is_empty().then_some(()))
    })?;
    let ended = wait_event(pair.a(), "guest", EventKind::GuestEnded)?;
    ctx.note(&ended.detail);
    nothing_left(pair.a())
}

fn over_budget(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    start_daemon(pair.a())?;
    let guest = Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
    let client = guest.counter(10.0)?;
    // 16 MiB are 4096 pages: fewer than the guest writes to in an interval of a second.
    let more = format!("{NATIVE} --interval 1000 --epoch-budget 16777216");
    protect_over(Carrier::Nowhere, pair.a(), "guest", &more)?;
    guest.dirty(12_000, 64, 36)?;
    let event = wait_event(pair.a(), "guest", EventKind::Unprotected)?;
    ctx.note(&format!("{event:?}"));
    let from = client.last().map_or(0, |a| a.line.n);
    ensure!(client.wait_for(from + 20, PATIENCE).is_some(), "the guest does not go on");
    nothing_left(pair.a())?;
    guest.verify()?;
    guest.is_the_same()
}

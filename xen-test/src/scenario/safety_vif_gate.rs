//! The vif gate (R9, hazards F3 and F4) with no daemon at all: a guarded guest that is created, boots anew by itself, or is HVM, sends
//! nothing that anybody sees until its owner says so. And the reading of single pages that the audit does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::client::Sniffer;
use crate::host::{Host, Snapshot};
use crate::protection::{Guest, PATIENCE, dropped_at_seal};
use crate::wait::wait_until;

pub(super) const GATE: Scenario = Scenario {
    name: "safety-vif-gate",
    about: "without any daemon: guarded guests come up sealed at create and reboot, PVH and HVM, until the operator opens them",
    hosts: 1,
    start: Snapshot::Ready,
    run,
};

/// All that the gate changes.
const FILES: &str = "cat /etc/xen/xl.conf 2>/dev/null; ls -l /etc/xen/scripts";

/// A copy from the same configuration file has another UUID each time: the name is what it is known by.
const GUARD: &str = "mkdir -p /var/lib/remus/gate; \
                     printf 'name guest\\nwhy a scenario\\n' >/var/lib/remus/gate/00000000-0000-4000-8000-000000000001";

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let a = pair.a();
    let before = a.sh(FILES)?;
    ensure!(a.sh("remus gate status")?.starts_with("NOT in place"), "in place from the start");
    ctx.note(&a.sh("remus gate install")?.replace('\n', "; "));
    ensure!(a.sh("remus gate install")?.contains("already"), "the second time does something");

    let mut spec = GuestSpec::new(Kind::Pvh);
    let guest = Guest::create(pair, a, spec.clone())?;
    let script = a.sh("xenstore-read /local/domain/0/backend/vif/$(xl domid guest)/0/script")?;
    ensure!(script == "/etc/xen/scripts/vif-remus-bridge", "the guest's vif was made with {script}");
    ctx.note("unguarded: it answers, through the gate's script");
    audit(ctx, a)?;

    let mac = guest.mac();
    let sniffer = pair.client_ns().call(move || Sniffer::start("client", mac))??;
    let sent = || sniffer.capture().frames.len();
    a.sh(GUARD)?;
    let known = sent();
    // The F3 schedule: it boots itself anew, and xl's monitor makes it a new vif.
    let domid = a.sh("xl domid guest")?;
    let _ = guest.ask_within(Duration::from_secs(5), |c| c.reboot().map(drop));
    let reborn = wait_until(PATIENCE, "the guest boots anew", || {
        let now = a.run("xl domid guest")?.stdout;
        Ok((!now.trim().is_empty() && now.trim() != domid).then(|| now.trim().to_owned()))
    })?;
    let at_reboot = sent();
    ctx.note(&format!("rebooted as domain {reborn}; it said goodbye with {} frames", at_reboot - known));
    silent(ctx, a, &sniffer, "after its own reboot", &["vif"])?;
    open(ctx, &spec)?;

    a.sh("xl destroy guest")?;
    a.sh(GUARD)?;
    a.sh(&spec.create_command())?;
    silent(ctx, a, &sniffer, "after xl create", &["vif"])?;
    open(ctx, &spec)?;

    a.sh("xl destroy guest")?;
    a.sh(GUARD)?;
    spec = GuestSpec::new(Kind::Hvm);
    a.sh(&spec.create_command())?;
    silent(ctx, a, &sniffer, "as HVM", &["vif", "tap"])?;
    let refused = a.run("remus gate remove")?;
    ensure!(!refused.ok() && refused.stderr.contains("guards guest"), "removed while it guards: {refused:?}");
    open(ctx, &spec)?;

    let used = a.sh("remus gate remove")?;
    ensure!(used.contains("the scripts stay"), "removed under a running guest: {used}");
    a.sh("xl destroy guest")?;
    a.sh("remus gate remove")?;
    let after = a.sh(FILES)?;
    ensure!(after == before, "not as it was before:\n{before}\nnow:\n{after}");
    ctx.note("removed without a trace");
    Ok(())
}

/// Waits until the guest has tried to talk, and fails if anybody has heard it since the last time.
fn silent(ctx: &Ctx<'_>, host: &Host, sniffer: &Sniffer, when: &str, kinds: &[&str]) -> Result<()> {
    let heard = sniffer.capture().frames.len();
    let domid = host.sh("xl domid guest")?;
    for kind in kinds {
        let vif = format!("vif{domid}.0{}", if *kind == "tap" { "-emu" } else { "" });
        // The domain is there before its interfaces are.
        wait_until(PATIENCE, &format!("{when}: {vif} is sealed"), || {
            let status = host.sh("remus gate status")?;
            ensure!(!status.contains(&format!("{vif} is open")), "{when}: {status}");
            Ok(status.contains(&format!("{vif} is sealed")).then_some(()))
        })?;
    }
    let dropped =
        dropped_at_seal(host, &domid).with_context(|| format!("waiting for the guest to try to talk {when}"))?;
    let capture = sniffer.capture();
    ensure!(capture.failed.is_none() && capture.dropped == 0, "the capture proves nothing: {:?}", capture.failed);
    ensure!(capture.frames.len() == heard, "{when}: heard {:?}", &capture.frames[heard..]);
    ctx.note(&format!("{when}: {dropped} frames dropped at the vif, none heard"));
    Ok(())
}

/// The operator's word; then the guest answers.
fn open(ctx: &Ctx<'_>, spec: &GuestSpec) -> Result<()> {
    ctx.note(&ctx.pair().a().sh("remus gate open guest")?);
    Guest::meet(ctx.pair(), spec.clone()).map(drop)
}

/// Pages read through fresh mappings: ordinary RAM has a hash, Xen's own pages and holes have none; and what it costs.
fn audit(ctx: &Ctx<'_>, host: &Host) -> Result<()> {
    // 64 MiB up: the middle of the kernel's free memory. The last three: xenstore and console pages of a PVH guest, and a hole.
    host.sh("xl pause guest")?;
    let read = host.sh("remusd audit-read guest $(seq 16384 16399) 1044475 1044476 1044477 262144");
    let again = host.sh("remusd audit-read guest $(seq 16384 16399)");
    let many = host.sh("remusd audit-read guest $(seq 16384 17407) | tail -n1");
    let all = host.sh("for i in $(seq 0 1024 31744); do remusd audit-read guest $(seq $i $((i+1023))); done | grep -- ' -$' | tr '\\n' ' '");
    host.sh("xl unpause guest")?;
    let (read, again, many, all) = (read?, again?, many?, all?);
    let (read, again): (Vec<_>, Vec<_>) = (read.lines().collect(), again.lines().collect());
    ensure!(read[..16] == again[..16], "the pages of a paused guest differ: {read:?} {again:?}");
    ensure!(!read[..16].iter().any(|line| line.ends_with('-')), "ordinary pages were not read: {read:?}");
    ensure!(read[19].ends_with('-'), "a hole was read: {read:?}");
    ctx.note(&format!("audit: {}; {}; {many}", read[16..].join("; "), again[16]));
    ctx.note(&format!("audit leaves out, of all RAM: {all}"));
    Ok(())
}

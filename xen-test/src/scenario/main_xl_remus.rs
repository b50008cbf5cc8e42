//! `xl-remus`: the flags of `xl remus` 4.17, in the foreground.

use anyhow::{Result, ensure};
use remusd::api::Role;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::{Ctx, Scenario};
use crate::host::Snapshot;
use crate::protection::{Guest, PATIENCE, nothing_left, row, start_daemon};
use crate::wait::wait_until;

pub(super) const XL_REMUS: Scenario = Scenario {
    name: "main-xl-remus",
    about: "xl-remus takes xl remus's flags, runs in the foreground, and ends the protection when it is ended",
    hosts: 1,
    start: Snapshot::Ready,
    run,
};

/// As Xen's remus-netbuf-setup, which Debian does not ship, with a device of its own.
const SCRIPT: &str = r#"#!/bin/sh
set -e
case "$1" in
setup)
    ip link add scripted type ifb
    ip link set scripted up
    tc qdisc add dev "$vifname" ingress
    tc filter add dev "$vifname" parent ffff: proto ip prio 10 u32 match u32 0 0 action mirred egress redirect dev scripted
    tc qdisc add dev scripted root plug limit 10000000
    xenstore-write "$XENBUS_PATH/ifb" scripted
    ;;
teardown)
    test "$REMUS_IFB" = scripted
    tc qdisc del dev "$vifname" ingress
    ip link del scripted
    xenstore-rm -t "$XENBUS_PATH/ifb"
    ;;
esac
"#;

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let a = pair.a();
    start_daemon(a)?;
    for (arguments, word) in [
        ("-b guest dummy", "-F"),
        ("-n guest dummy", "-F"),
        ("-c guest dummy", "COLO"),
        ("-F -p guest dummy", "COLO"),
        ("-x guest dummy", "not known"),
        ("-i", "needs a value"),
        ("guest", "a domain and a host"),
    ] {
        let output = a.run(&format!("xl-remus {arguments}"))?;
        let said = format!("{}{}", output.stdout, output.stderr);
        ensure!(!output.ok() && said.contains(word), "xl-remus {arguments} must refuse with {word:?}: {said}");
    }
    let guest = Guest::create(pair, a, GuestSpec::new(Kind::Pvh))?;
    a.sh(&format!("cat >/root/netbuf <<'END'\n{SCRIPT}END\nchmod +x /root/netbuf"))?;
    let client = guest.counter(10.0)?;
    // Ended by Ctrl-C, and by the death of the command.
    for (signal, flags) in [("INT", "-n"), ("KILL", "-n"), ("INT", "-N /root/netbuf")] {
        let foreground = a.spawn(&format!("exec xl-remus -F -b -u {flags} -d -e -i 100 guest dummy"))?;
        wait_until(PATIENCE, "a few checkpoints into the black hole", || {
            Ok(row(a, "guest", Role::Primary)?.filter(|r| r.acked.is_some_and(|e| e.0 >= 3)))
        })?;
        let shown = row(a, "guest", Role::Primary)?;
        ensure!(shown.is_some_and(|r| !r.protected), "a black hole must not be called protection");
        let scripted = a.run("tc qdisc show dev scripted")?.stdout.contains("plug");
        ensure!(scripted == flags.contains("-N"), "{flags}: whether the script's device is there: {scripted}");
        let from = client.last().map_or(0, |x| x.line.n);
        ensure!(client.wait_for(from + 20, PATIENCE).is_some(), "{flags}: the guest is not heard");
        a.sh(&format!("kill -{signal} $(pgrep -x remus)"))?;
        wait_until(PATIENCE, "the protection ends with its command", || {
            Ok(row(a, "guest", Role::Primary)?.filter(|r| r.state == "stopped").map(drop))
        })?;
        drop(foreground);
        nothing_left(a)?;
        guest.is_the_same()?;
        ctx.note(&format!("{flags}: ended by SIG{signal}"));
    }
    Ok(())
}
